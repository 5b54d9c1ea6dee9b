"""benchmarks/bench.py on tiny layers: presets, the choice of contestants, values checked before timing; and compare."""

from __future__ import annotations

import copy
import json
import re
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import bench, compare, images, peers, validation
from benchmarks.contestants import Arena, Row, table, torch_parameters
from benchmarks.presets import CUDA_LAYERS, PRESETS
from benchmarks.results import NAMES
from benchmarks.tables import WIDTHS
from tests.common import cases

SAVED = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-epyc-2core.json"
TINY = Row(cases.TINY, "float32", "planar", "plain")


@pytest.fixture
def fake_abn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of the name inplace_abn, by torch's operators: it overwrites its input, as the real one does."""

    class InPlaceABN(nn.BatchNorm2d):
        def __init__(self, channels: int, activation: str) -> None:
            super().__init__(channels)
            self.slope = 0.01 if activation == "leaky_relu" else 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x.copy_(nn.functional.leaky_relu(super().forward(x.clone()), self.slope))

    module = types.ModuleType("inplace_abn")
    module.InPlaceABN = InPlaceABN  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "inplace_abn", module)


# ---- presets ----


def test_every_layer_of_a_preset_can_be_built_and_has_a_row_for_each_variant() -> None:
    for name, layers in PRESETS.items():
        rows = list(table(layers=layers))
        assert len({row.name for row in rows}) == len(rows) == 6 * sum(len(layer.layouts) for layer in layers), name
        for layer in layers:
            assert isinstance(layer.build(nn), nn.Module)
    assert set(cases.BENCH[:6]) <= set(PRESETS["resnet50"])  # the same names, so that runs can be compared
    assert {layer.norm for layers in PRESETS.values() for layer in layers} >= {c.norm for c in CUDA_LAYERS}


def test_presets_have_the_norms_of_resnet_50() -> None:
    """By the table of the paper: of each stage the two widths, each at the sizes where it is normalized."""
    sizes = {(layer.shape[1], layer.shape[2]) for layer in PRESETS["resnet50"]}
    stages = [(64, 56), (128, 28), (256, 14), (512, 7)]
    expected = {(64, 112)} | {(c, s) for c, s in stages} | {(4 * c, s) for c, s in stages}
    assert sizes == expected | {(c, 2 * s) for c, s in stages[1:]}  # before the convolution with stride 2


# ---- options ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "resnet50,vgg"], "vgg, expected some of resnet50, unet"),
        (["--vs", "cudnn,tensorrt"], "tensorrt, expected some of eager, compile"),
        (["--vs", ","], "nothing, expected some of eager"),
        (["--filter", "["], "no regular expression"),
        (["--budget", "0"], "'0', expected a number above 0"),
        (["--budget", "nan"], "'nan', expected a number above 0"),
        (["--threads", "1.5"], "'1.5', expected a whole number above 0"),
        (["--memory-format", "nhwc"], "'nhwc', expected planar or channels_last"),
        (["--plot", "a.docx"], "expected a path that ends in ."),
        (["--quick", "--preset", "tiny"], "give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_named_before_anything_is_timed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(SystemExit) as error:
        bench.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_memory_format_is_the_layout_by_torchs_name() -> None:
    args = bench.parse(["--memory-format", "contiguous", "--layout", "channels_last", "--preset", "tiny, unet"])
    assert args.layout == ["planar", "channels_last"] and args.preset == ("tiny", "unet")
    assert bench.default_budget(args, [TINY] * 3) == 3 * bench.ROW_BUDGET_S


def test_a_run_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_abn: None) -> None:
    """Every contestant of the machine in one run, and what it writes; then compared with itself."""
    out = tmp_path / "new" / "a.json"
    rows = "--preset tiny --dtype float32 --layout channels_last --epilogue plain --budget 0.01 --malloc system"
    outputs = ["--json", str(out), "--plot", str(tmp_path / "a.svg"), "--markdown", str(tmp_path / "a.md")]
    bench.main([*rows.split(), *outputs, "--vs", "eager,liger,inplace_abn,cudnn"])
    said = capsys.readouterr().out
    assert "cudnn: no contestant, its norms run on cuda" in said and "liger: no contestant, its norms run on" in said
    run = json.loads(out.read_text())
    assert run["options"]["vs"] == ["eager", "inplace_abn"] and run["versions"]["inplace_abn"] == "unknown"
    times = {row["norm"]: set(row["modes"]["step"]["us"]) for row in run["rows"]}
    assert times["BatchNorm2d"] == {"fastnorm", "torch", "clone", "inplace_abn"}
    assert times["GroupNorm"] == {"fastnorm", "torch", "clone"}
    assert (tmp_path / "a.svg").stat().st_size and (tmp_path / "a.md").read_text().startswith("| layer |")
    assert compare.main([str(out), str(out)]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out


def test_a_run_of_tiny_rows_has_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown = tmp_path / "tiny.md"
    words = ["--preset", "tiny", "--filter", "LayerNorm.* float32", "--budget", "0.1", "--vs", "eager"]
    bench.main([*words, "--markdown", str(markdown), "--plot", str(tmp_path / "tiny.png")])
    heads, _, *rows = markdown.read_text().splitlines()
    assert rows and "copies" not in heads
    text = capsys.readouterr().out
    assert "torch.nn" in text.partition("Geometric means")[2].partition("Lines to reach")[0]


def test_the_others_are_named_where_they_are_absent_or_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("undefined symbol") if name == "inplace_abn" else ModuleNotFoundError(name)

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    assert peers.why_absent("liger", "cuda") == "not installed (pip install liger-kernel)"
    assert peers.why_absent("inplace_abn", "cpu") == "cannot be imported: OSError: undefined symbol"
    assert peers.why_absent("onednn", "cuda") == "its norms run on a CPU"
    assert peers.why_absent("eager", "cuda") is peers.why_absent("compile", "cpu") is None
    group = Row(PRESETS["tiny"][1], "float32", "planar", "plain")
    half = Row(cases.TINY, "bfloat16", "planar", "plain")
    assert peers.why_idle("cudnn", [group, half]) == "serves none of these rows"
    assert peers.why_idle("cudnn", [half, TINY]) is None
    assert set(NAMES) == {"torch", *peers.NAMES} - {"eager"} and set(NAMES) <= set(WIDTHS)


# ---- values ----


def wrong(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        value = call()
        return tuple(2 * v for v in value) if isinstance(value, tuple) else value + 0.01

    return run


@pytest.mark.parametrize("mode", ["forward", "step", "eval"])
def test_a_contestant_with_other_values_is_not_timed(mode: str) -> None:
    arena = Arena(TINY)
    for _ in range(3):  # however often each has updated its running statistics
        arena.norms["torch"](arena.x, None)
    calls = arena.calls(mode)
    exact = partial(arena.exact, mode)
    assert validation.faults(calls, exact) == []
    (found,) = validation.faults({**calls, "apex": wrong(calls["torch"])}, exact)
    assert found.contestant == "apex" and "differs from torch.nn" in str(found)
    (found,) = validation.faults({**calls, "fastnorm": wrong(calls["torch"])}, exact)
    assert found.contestant == "fastnorm"
    with pytest.raises(RuntimeError, match=r"float32 planar plain, eval: fastnorm (differs|has)"):
        bench.raise_ours(TINY, "eval", found)


@pytest.mark.parametrize("mode", ["forward", "step", "eval"])
def test_values_are_compared_where_inputs_take_turns(mode: str) -> None:
    """As they do on a GPU."""
    arena = Arena(TINY, copies=3)
    calls = arena.calls(mode)
    exact = partial(arena.exact, mode)
    assert validation.faults(calls, exact) == []
    # Each from its first turn.
    (found,) = validation.faults({**arena.calls(mode), "apex": wrong(arena.calls(mode)["torch"])}, exact)
    assert found.contestant == "apex" and "differs from torch.nn" in str(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "step", "eval"])
def test_float64_decides_where_torch_is_the_one_that_is_wrong(mode: str, dtype: str) -> None:
    arena = Arena(Row(cases.TINY, dtype, "channels_last", "add_act"))
    calls = arena.calls(mode)
    shifted = {**calls, "torch": wrong(calls["torch"]) if mode == "step" else lambda: calls["torch"]() + 1}
    assert validation.faults(shifted, partial(arena.exact, mode)) == []
    assert [f.contestant for f in validation.faults(shifted, shifted["torch"])] == ["fastnorm"]


def test_a_contestant_that_refuses_is_named_and_one_of_ours_raises() -> None:
    def refuse() -> None:
        raise RuntimeError("not supported\nat line 3")

    arena = Arena(TINY)
    calls = arena.calls("eval")
    (found,) = validation.faults({**calls, "apex": refuse}, partial(arena.exact, "eval"))
    assert str(found) == "apex refuses: RuntimeError: not supported"
    with pytest.raises(RuntimeError, match="not supported"):
        validation.faults({**calls, "fastnorm": refuse}, partial(arena.exact, "eval"))


REFUSALS = {
    "build": "no kernels for this shape",
    "making of a call": "not of this dtype",
    "state": "Error(s) in loading state_dict for Dropout:",
    "call": "not supported",
}


@pytest.mark.parametrize("where", REFUSALS)
def test_a_row_goes_on_without_a_contestant_that_refuses_it(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Wherever it does."""

    def build(row: Row) -> peers.Contestant:
        if where == "build":
            raise RuntimeError(REFUSALS[where])

        def norm(x: Tensor, _: Tensor | None) -> Tensor:
            if where != "state":
                raise RuntimeError(f"{REFUSALS[where]}\nat line 3")
            return x

        return nn.Dropout() if where == "state" else row.layer.build(nn), norm

    monkeypatch.setitem(peers.PEERS, "liger", peers.Peer("types", "no-such-package", ("cpu",), build))
    mode = {"making of a call": "step", "state": "eval"}.get(where, "forward")
    arguments = ["--preset", "tiny", "--filter", "BatchNorm2d.*float32 planar plain", "--vs", "eager,liger"]
    options = ["--mode", mode, "--budget", "0.01", "--malloc", "system", "--json", str(tmp_path / "a.json")]
    bench.main([*arguments, *options])
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"planar plain, {mode}: liger refuses: RuntimeError: {REFUSALS[where]}" in said
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert set(row["modes"][mode]["us"]) == {"fastnorm", "torch", "clone"}


def test_a_row_that_torch_refuses_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("expected scalar type BFloat16 but found Float")

    monkeypatch.setattr(nn.GroupNorm, "forward", forward)
    arguments = ["--preset", "tiny", "--filter", "(Batch|Group)Norm.*float32 planar plain", "--mode", "forward"]
    bench.main([*arguments, "--budget", "0.01", "--malloc", "system", "--json", str(tmp_path / "a.json")])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "forward: torch refuses: RuntimeError: expected scalar type BFloat16 but found Float" in said
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows and all(row["norm"].startswith("BatchNorm") for row in rows)


def test_torchs_parameters_are_of_a_dtype_that_it_takes() -> None:
    """On a GPU its group norm and layer norm of bfloat16 refuse float32."""
    for row in table(device="cuda"):
        half_only = row.dtype == "bfloat16" and row.layer.norm in ("GroupNorm", "LayerNorm")
        expected = torch.bfloat16 if half_only else torch.float32
        assert torch_parameters(row, "cuda") == expected and torch_parameters(row, "cpu") == torch.float32


def test_another_dtype_or_shape_is_another_result() -> None:
    x = torch.ones(2, 3)
    assert "float64 of shape (2, 3), expected float32" in str(validation.disagreement(x.double(), x, 64))
    assert "of shape (3, 2)" in str(validation.disagreement(x.T, x, 64))
    assert validation.disagreement(x * torch.nan, x, 64) is not None
    assert validation.disagreement((x * torch.nan,), (x,), 64) is not None
    for value, words in ((None, "NoneType"), ((), "nothing"), ((x, None), "Tensor, NoneType")):
        for reference in (x, (x, x)):
            assert validation.disagreement(value, reference, 64) == f"returns {words}, expected tensors"


def test_a_wrong_row_of_ours_is_left_out_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = bench.faults
    asked = iter([True, False])

    def first_is_wrong(calls: dict[str, Any], exact: Any) -> list[validation.Fault]:
        return good({**calls, "fastnorm": wrong(calls["fastnorm"])} if next(asked) else calls, exact)

    monkeypatch.setattr(bench, "faults", first_is_wrong)
    arguments = ["--preset", "tiny", "--filter", "BatchNorm2d.*float32 planar (plain|.relu)", "--mode", "eval"]
    with pytest.raises(SystemExit, match="computes something else"):
        bench.main([*arguments, "--budget", "0.01", "--malloc", "system", "--json", str(tmp_path / "a.json")])
    assert "float32 planar plain, eval: fastnorm differs from torch.nn" in capsys.readouterr().out.replace("\n", " ")
    assert [row["epilogue"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["+relu"]


# ---- images ----

TINY_IMAGES = ["--batch", "1", "--size", "5", "--budget", "0.01", "--dtype", "bfloat16"]


def test_a_run_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, table = tmp_path / "new" / "a.json", tmp_path / "a.md"
    monkeypatch.setattr(images, "why_absent", lambda: "not installed (pip install torchvision)")
    images.main([*TINY_IMAGES, "--json", str(out), "--markdown", str(table)])
    assert "torchvision: no contestant, not installed (pip install torchvision)" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["dtype"], row["layout"]) for row in rows] == [("uint8 to bfloat16", name) for name in cases.LAYOUTS]
    assert all(row["modes"]["forward"]["us"].keys() == {"fastnorm", "torch", "clone"} for row in rows)
    assert table.read_text().count("| bfloat16 |") == 2
    assert compare.main([str(out), str(out)]) == 0
    assert "2 figures in both runs" in " ".join(capsys.readouterr().out.split())


def test_images_with_other_values_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = images.contestants

    def brighter(dtype: torch.dtype, _: bool) -> dict[str, Any]:
        calls = good(dtype, False)
        return calls | {"fastnorm": lambda x: calls["fastnorm"](x) + 1, "torchvision": lambda x: calls["torch"](x) + 5}

    monkeypatch.setattr(images, "contestants", brighter)
    with pytest.raises(SystemExit, match="computes something else"):
        images.main([*TINY_IMAGES, "--layout", "planar"])
    said = " ".join(capsys.readouterr().out.split())
    assert "to bfloat16 planar: fastnorm differs" in said and "to bfloat16 planar: torchvision differs" in said


# ---- compare ----


def scaled(run: dict[str, Any], pattern: str, contestants: tuple[str, ...], factor: float) -> dict[str, Any]:
    """The run with the times of some rows multiplied."""
    run = copy.deepcopy(run)
    for row in run["rows"]:
        if re.search(pattern, f"{row['norm']} {row['dtype']} {row['layout']} {row['epilogue']}"):
            for mode in row["modes"].values():
                for name in contestants:
                    mode["us"][name] = {k: v if k == "rounds" else v * factor for k, v in mode["us"][name].items()}
    return run


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    return compare.load(str(SAVED))


def test_compare_names_the_rows_that_moved(saved: dict[str, Any]) -> None:
    slower = scaled(saved, r"GroupNorm bfloat16 planar \+silu", ("fastnorm",), 3.0)
    found = compare.moves(saved, slower)
    moved = [m for m in found if m.beyond_noise(compare.LEAST)]
    assert {m.contestant for m in moved} == {"fastnorm"} and len(moved) == 3 * 3  # shapes, modes
    assert all("GroupNorm" in m.row and "bfloat16 planar +silu" in m.row for m in moved)
    assert [m.ratio for m in moved] == pytest.approx([3.0] * 9)


def test_a_slower_machine_has_moved_nothing(saved: dict[str, Any]) -> None:
    later = scaled(saved, "", ("fastnorm", "torch", "clone"), 1.5)
    assert not any(m.beyond_noise(compare.LEAST) for m in compare.moves(saved, later) if m.contestant == "fastnorm")
    microseconds = compare.moves(saved, later, "us")
    assert {m.contestant for m in microseconds} >= {"fastnorm", "torch", "clone"}
    assert any(m.beyond_noise(compare.LEAST) for m in microseconds)


def test_overlapping_quartiles_and_small_moves_are_noise() -> None:
    before = compare.Figure(10, 9, 11)
    assert not compare.Move("", "", before, compare.Figure(12, 10.9, 13)).beyond_noise(0.03)
    assert compare.Move("", "", before, compare.Figure(12, 11.1, 13)).beyond_noise(0.03)
    exact = compare.Figure(10, 10, 10)
    assert not compare.Move("", "", exact, compare.Figure(10.2, 10.2, 10.2)).beyond_noise(0.03)
    assert compare.Move("", "", exact, compare.Figure(9.5, 9.5, 9.5)).beyond_noise(0.03)


def test_compare_as_a_command(saved: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "slower.json"
    path.write_text(json.dumps(scaled(saved, "LayerNorm float32", ("fastnorm",), 2.0) | {"machine": {"cpu": "other"}}))
    with pytest.raises(SystemExit) as status:
        bench.main(["compare", str(SAVED), str(path)])
    said = capsys.readouterr().out
    assert status.value.code == 1 and "2.00x slower" in said and "not the same machine: cpu was" in said
    with pytest.raises(SystemExit):
        compare.main([str(SAVED), str(tmp_path / "none.json")])
    assert "none.json: FileNotFoundError" in capsys.readouterr().err
    path.write_text('{"machine": {}, "rows": [{"x": 1}]}')
    with pytest.raises(SystemExit):
        compare.main([str(path), str(SAVED)])
    assert "expected what bench.py" in capsys.readouterr().err


def test_compare_prints_the_slower_first() -> None:
    console = Console(record=True, width=200)
    one = compare.Figure(1, 1, 1)
    found = [
        compare.Move(name, "fastnorm", one, compare.Figure(t, t, t)) for name, t in (("a", 0.5), ("b", 2), ("c", 1))
    ]
    compare.print_moves(console, found, {"fastnorm": 4}, 0.03, "reference")
    lines = console.export_text().splitlines()
    assert lines[0].startswith("2.00x slower  b") and lines[1].startswith("2.00x faster  a")
    assert "3 figures in both runs, in units of the reference: 1 slower, 1 faster, 1 within noise" in lines[2]
    assert lines[3].strip() == "fastnorm: 1.000 times as long as before, geometric mean of 3 of 4 figures"


def test_runs_of_tune_are_compared_plan_by_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever forces a plan, and not by kinds that one run alone has."""
    run = json.loads((SAVED.parent / "tune-h200-2026-11-27-fourth.json").read_text())
    before, after = run | {"jobs": run["jobs"][:3]}, copy.deepcopy(run | {"jobs": run["jobs"][:2]})
    plans = [candidate for job in after["jobs"] for candidate in job["candidates"]]
    rows = [c for c in plans if c["plan"].startswith("fused: rows")]
    for candidate in rows:
        candidate["forced"] = {}
        candidate["us"] = {k: v if k == "rounds" else v * 1.5 for k, v in candidate["us"].items()}
    rows[0]["plan"] = "fused: rows, of another size; estimate 1 us"
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, text in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(text))
    assert compare.main([*map(str, paths)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("1.50x slower") == len(rows) - 1
    assert (
        f"fused rows: 1.500 times as long as before, geometric mean of {len(rows) - 1} of {len(rows)} figures" in said
    )
    others = len(plans) - len(rows)
    assert f"split rows: 1.000 times as long as before, geometric mean of {others} of {others} figures" in said
