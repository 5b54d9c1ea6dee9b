"""The studies: quick forms measure what the pages say, pages are what their JSON says, and the formulas hold."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.studies import common, deep_residual, error_surface, initialization, paths, which_axes

STUDIES = ("error_surface", "initialization", "deep_residual", "which_axes", "inference")
PAGES = common.PAGES

#: Of the quick forms, the verdict on every claim, by its first words; None where so short a run settles nothing.
VERDICTS: dict[str, dict[str, bool | None]] = {
    "error_surface": {
        "Features of different scales": True,
        "On the round surface": True,
        "At the same learning rate a network with batch norm": True,
        "Five times the learning rate": False,
        "Thirty times the learning rate": False,
        "Without batch norm the larger learning rates": True,
        "With sigmoid": None,  # whether it trains without at all takes more steps
        "At the best learning rate of each": True,
    },
    "initialization": {
        "With standard deviation 0.01": True,
        "With standard deviation 1 tanh": True,
        "Saturated units have no slope": False,
        "With standard deviation 1 ReLU": True,
        "0.05 lies between": True,
        "Xavier keeps": True,
        "Xavier is too small for ReLU": True,
        "He keeps": True,
        "With batch norm the activations": True,
        "With batch norm gradients neither": False,
        "Without residual connections": True,
    },
    "deep_residual": {
        "With normalized branches": True,
        "The variance of every branch": True,
        "Without norms the variance doubles": True,
        "In a net of 10,000 normalized blocks": True,
        "The same, simulated: random paths": True,
        "The same, simulated: a linear net": True,
        "The same in narrow nets": False,
        "With batch norm very deep": True,
        "Without norms deep ones": True,
        "SkipInit with alpha = 1 fails": True,
        "SkipInit with alpha = 1/sqrt(d)": True,
        "SkipInit with alpha = 0": True,
        "It is depth": True,
    },
    "which_axes": {
        "Batch norm shares statistics": True,
        "Batch norm's error": None,  # two epochs
        "Group norm's does not": None,
        "At a batch of 8": None,
        "At a batch of 32": None,
    },
    "inference": {
        "In evaluation": None,  # two epochs at a constant rate: the running average is far behind
        "With small batches": False,
        "Then exact statistics": None,  # two images
        "While the weights still change": True,
        "Merged over batches": True,
        "Averaging the variances": True,
        "Where the inputs shift": True,
    },
}


def study(name: str) -> Any:
    return importlib.import_module(f"examples.studies.{name}")


def assert_written(name: str, folder: Path) -> None:
    """All that a study writes, and that the page shows the picture and has a table."""
    assert {path.name for path in folder.iterdir()} == {f"{name}.md", f"{name}.png", f"{name}.json", "README.md"}
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / f"{name}.md").read_text()
    assert f"]({name}.png)" in page and "\n| --- | --- | --- |\n" in page and "This is the quick form." in page
    assert f"({name}.md)" in (folder / "README.md").read_text()


@pytest.fixture
def quick(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the quick form of the study that the test is named after measures, run as from a shell. What it writes is
    there, and its verdicts are as expected."""
    name = request.function.__name__.removeprefix("test_")
    script = common.ROOT / "examples" / "studies" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert_written(name, tmp_path)
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["quick"]
    found = {claim["source"]: claim["agrees"] for claim in document["claims"]}
    assert len(found) == len(VERDICTS[name])
    for beginning, agrees in VERDICTS[name].items():
        (claim,) = [source for source in found if source.startswith(beginning)]
        assert agrees is None or found[claim] == agrees, claim
    measured: dict[str, Any] = document["measured"]
    return measured


def test_error_surface(quick: dict[str, Any]) -> None:
    # By the formula for a quadratic at its best rate: the error shrinks by (k - 1) / (k + 1) in a step.
    features = quick["features"]
    condition = features["raw"]["condition"]
    rate = (condition - 1) / (condition + 1)
    most = math.log(1e-3) / (2 * math.log(rate))
    assert 0.5 * most < features["raw"]["steps"] <= most + 1 and features["normalized"]["steps"] <= 3
    # x5 and x30: without batch norm neither trains, with it x5 does, and sigmoid, which is bounded, at x5 as well.
    reached = {(row["activation"], row["batch_norm"], row["factor"]): row["steps"] for row in quick["digits"]}
    assert len(reached) == 2 * 2 * len(error_surface.FACTORS)
    assert [reached["relu", False, factor] is None for factor in (1, 5, 30)] == [False, True, True]
    assert [reached["relu", True, factor] is None for factor in (1, 5, 30)] == [False, False, True]
    assert all(reached["sigmoid", False, factor] is None for factor in (1, 5, 30))
    assert all(reached["sigmoid", True, factor] is not None for factor in (1, 5))


def test_initialization(quick: dict[str, Any]) -> None:
    for rule in initialization.RULES:
        row = initialization.pick(quick, "relu", rule, True)
        growth = 1 / initialization.growth(row["gradients"])
        assert growth == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=0.05)
    # Every layer has a histogram of each, and they say what the root mean squares say.
    low, high, bins = initialization.LEAST, initialization.MOST, initialization.BINS
    of_exponents = low + (torch.arange(bins, dtype=torch.float64) + 0.5) * (high - low) / bins
    of_tanh = -1 + (torch.arange(bins, dtype=torch.float64) + 0.5) * 2 / bins
    for row in quick["runs"]:
        for what, exact in (("activation", row["activations"]), ("gradient", row["gradients"])):
            shares = torch.tensor(row[f"{what}_histograms"], dtype=torch.float64)
            assert shares.shape == (initialization.DEPTH, bins)
            torch.testing.assert_close(shares.sum(1), torch.ones(len(exact)).double(), atol=3e-3, rtol=0)
            if what == "gradient":
                means = (shares @ of_exponents).tolist()
                # The mean of log10 |g| is -0.276 where g is normal of deviation 1; less where many are near 0.
                assert all(-1 < m - math.log10(rms) < -0.2 for m, rms in zip(means, exact, strict=True))
            elif row["activation"] == "tanh":
                rms = (shares @ of_tanh.square()).sqrt().tolist()
                assert all(r == pytest.approx(e, abs=0.05) for r, e in zip(rms, exact, strict=True))


def test_deep_residual(quick: dict[str, Any]) -> None:
    assert quick["growth"]["no norm"]["skip"][100] > 1e20
    mean = paths.mean_length(quick["exact_simulated_blocks"])
    assert paths.mean_length(quick["walked"]["shares"]) == pytest.approx(mean, rel=0.05)
    # Where one variance normalizes all units the parts are independent; batch norm's paths are longer in narrower nets.
    mean, one_variance = paths.mean_length(quick["exact"]), quick["one_variance"]
    assert one_variance["mean_length"][0] == pytest.approx(mean, rel=0.1) and 0.5 < one_variance["excess"] < 2
    lengths = [net["mean_length"][0] for net in quick["normed"]]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] > 1.2 * mean
    assert all(net["excess"] > 10 for net in quick["normed"])
    for run in quick["runs"]:
        hopeless = run["variant"] in ("no norm", "SkipInit 1") and run["depth"] == deep_residual.FAILS_FROM
        assert deep_residual.fails(run) == hopeless and deep_residual.trains(run) != hopeless


def test_failure_is_that_of_all_rates_and_seeds() -> None:
    every = deep_residual.SEEDS * len(deep_residual.RATES)
    assert deep_residual.fails({"accuracy": 0.15, "tried": every})
    assert not deep_residual.fails({"accuracy": 0.794, "tried": every})
    assert not deep_residual.fails({"accuracy": 0.0, "tried": every - 1})
    assert not deep_residual.trains({"accuracy": 0.794})


def test_infinite_width_is_by_a_line_in_one_over_width() -> None:
    nets = [{"mean_length": (5 + 8 / width, width / 100)} for width in (1, 2, 4)]
    mean, error = deep_residual.at_infinite_width(nets)
    assert mean == pytest.approx(5) and error == pytest.approx(math.hypot(0.08, 0.02))


def test_path_shares_by_enumeration() -> None:
    """All 2^d paths of a small net; and of the large one the mean, which is H(d + 1) - 1, and random paths."""
    blocks = 9
    exact = torch.zeros(paths.LONGEST + 1, dtype=torch.float64)
    for taken in itertools.product((False, True), repeat=blocks):
        variance = math.prod(1 / block for block, through in enumerate(taken, 1) if through)
        exact[sum(taken)] += variance / (blocks + 1)
    shares = torch.tensor(paths.path_shares(blocks), dtype=torch.float64)
    torch.testing.assert_close(shares, exact)
    large = paths.path_shares(10_000)
    mean = paths.mean_length(large)
    assert mean == pytest.approx(sum(1 / block for block in range(2, 10_002)), abs=1e-5)
    assert 0.985 < paths.short(large) < 0.986 and sum(large) == pytest.approx(1)
    walked = paths.walked([1 / (block + 1) for block in range(1, 10_001)], 4000)
    assert walked["error"] == pytest.approx(math.sqrt(0.985 * 0.015 / 4000), rel=0.2)
    assert abs(paths.short(walked["shares"]) - paths.short(large)) < 4 * walked["error"]
    assert abs(paths.mean_length(walked["shares"]) - mean) < 4 * math.sqrt(mean / 4000)


def test_which_axes(quick: dict[str, Any]) -> None:
    assert {name: g.sets for name, g in which_axes.GEOMETRIES.items()} == {
        "batch norm": 6,
        "layer norm": 4,
        "instance norm": 24,
        "group norm": 8,
    }
    a = torch.tensor([0, 0, 1, 1])
    assert which_axes.same_partition(a, torch.tensor([7, 7, 3, 3]))
    assert not which_axes.same_partition(a, torch.tensor([0, 1, 1, 1]))
    assert not which_axes.same_partition(a, torch.tensor([0, 0, 0, 0]))
    means = {(run["norm"], run["batch"]): run["mean"] for run in quick["runs"]}
    assert means.keys() == set(itertools.product(which_axes.NORMS, which_axes.QUICK_SIZES))
    assert all(means["batch norm", size] > 0.9 for size in which_axes.QUICK_SIZES)
    assert means["group norm", which_axes.QUICK_SIZES[0]] > 0.9 and means["group norm", 32] > 0.7
    assert all(len(set(run["accuracies"])) > 1 for run in quick["runs"])


@pytest.mark.parametrize("norm", which_axes.NORMS)
def test_networks_side_by_side_are_networks_by_themselves(norm: str) -> None:
    seeds = 3
    torch.manual_seed(0)
    together, alone = which_axes.network(norm, seeds), which_axes.network(norm, 1)
    for parameter in together.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(4, seeds, 8, 8)
    logits = together(x)
    for seed in range(seeds):
        state = together.state_dict().items()
        alone.load_state_dict({key: t.chunk(seeds)[seed] if t.dim() else t for key, t in state})
        torch.testing.assert_close(logits[:, seed], alone(x[:, seed : seed + 1])[:, 0], rtol=1e-4, atol=1e-4)


def test_which_axes_compares_what_is_trained_alike() -> None:
    """On the page: the same number of images for every batch size, and enough steps for the largest."""
    measured = json.loads((PAGES / "which_axes.json").read_text())["measured"]
    images = measured["epochs"] * (1797 - common.HELD_OUT)
    assert [run["batch"] for run in measured["runs"]] == [s for s in (2, 4, 8, 16, 32, 64, 128) for _ in range(2)]
    for run in measured["runs"]:
        assert 0 <= images - run["batch"] * run["steps"] < run["batch"]
        assert run["mean"] > 0.95 and len(run["accuracies"]) == measured["seeds"] >= 3


def test_beyond_noise_is_by_two_standard_errors() -> None:
    assert common.estimate([1.0, 2.0, 3.0]) == pytest.approx((2, 1 / math.sqrt(3)))
    worse, better = {"mean": 0.95, "error": 0.003}, {"mean": 0.97, "error": 0.004}
    found = which_axes.difference(worse, better)
    assert found == pytest.approx((0.02, 0.005)) and which_axes.is_beyond_noise(found)
    assert not which_axes.is_beyond_noise((0.009, 0.005)) and not which_axes.is_beyond_noise((-0.02, 0.005))


def test_inference(quick: dict[str, Any]) -> None:
    for of_size in quick["small"].values():
        errors = {way: values["error"] for way, values in of_size.items()}
        assert errors["calibrate, layer by layer"] < 1e-5 < errors["calibrate"] < errors["update_bn"]
        assert errors["update_bn"] < errors["running average"]
        assert of_size["calibrate, layer by layer"]["accuracy"] > 0.9
    shift = {way: values["accuracy"] for way, values in quick["shift"].items()}
    assert min(shift[way] for way in shift if way != "running average") > shift["running average"] + 0.3


@pytest.mark.parametrize("name", STUDIES)
def test_writes_the_same_page_again_from_its_json(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figures of the full form."""
    module = study(name)
    measured = json.loads((PAGES / f"{name}.json").read_text())["measured"]
    monkeypatch.setattr(module, "measure", lambda is_quick: measured)
    common.main(module, (12, 8), ["--quick", "--out", str(tmp_path)])
    assert_written(name, tmp_path)
    before = (tmp_path / f"{name}.md").read_text()
    monkeypatch.setattr(module, "measure", None)
    common.main(module, (12, 8), ["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.md").read_text() == before
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", STUDIES)
def test_committed_page(name: str) -> None:
    """No figure in it is typed by hand, it is of the full form, and its picture is small."""
    document = json.loads((PAGES / f"{name}.json").read_text())
    report = study(name).report(document["measured"])
    facts = {key: document[key] for key in ("quick", "seconds", "where")}
    assert (PAGES / f"{name}.md").read_text() == common.page(name, report, facts)
    assert document["claims"] == [vars(claim) for claim in report.claims]
    assert not document["quick"]
    assert (PAGES / f"{name}.png").stat().st_size < 150_000


def test_committed_index(tmp_path: Path) -> None:
    for name in STUDIES:
        (tmp_path / f"{name}.json").write_text((PAGES / f"{name}.json").read_text())
    common.write_index(tmp_path)
    assert (tmp_path / "README.md").read_text() == (PAGES / "README.md").read_text()
