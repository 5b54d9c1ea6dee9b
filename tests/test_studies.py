"""The studies: quick forms measure what the pages say, pages are what their JSON says, and the formulas hold."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.studies import common, deep_residual, initialization, which_axes

STUDIES = ("error_surface", "initialization", "deep_residual", "which_axes", "inference")
PAGES = common.PAGES


def study(name: str) -> Any:
    return importlib.import_module(f"examples.studies.{name}")


@functools.cache
def quick(name: str) -> dict[str, Any]:
    """What the quick form measures; once in a run."""
    measured: dict[str, Any] = json.loads(json.dumps(study(name).measure(True)))
    return measured


def agreeing(name: str) -> dict[str, bool]:
    """By the first words of each claim."""
    return {claim.source: claim.agrees for claim in study(name).report(quick(name)).claims}


def assert_claims(name: str, expected: dict[str, bool]) -> None:
    """Of the claims that begin so."""
    found = agreeing(name)
    for beginning, agrees in expected.items():
        (claim,) = [source for source in found if source.startswith(beginning)]
        assert found[claim] == agrees, claim


def test_error_surface() -> None:
    assert_claims(
        "error_surface",
        {
            "Features of different scales": True,
            "On the round surface": True,
            "At the same learning rate a network with batch norm": True,
            "Without batch norm the larger learning rates": True,
            "With sigmoid": True,
        },
    )
    features = quick("error_surface")["features"]
    # By the formula for a quadratic at its best rate: the error shrinks by (k - 1) / (k + 1) in a step.
    condition = features["raw"]["condition"]
    rate = (condition - 1) / (condition + 1)
    most = math.log(1e-3) / (2 * math.log(rate))
    assert 0.5 * most < features["raw"]["steps"] <= most + 1 and features["normalized"]["steps"] <= 3


def test_initialization() -> None:
    """Two claims that one reads do not hold as they are written."""
    found = agreeing("initialization")
    refuted = {source for source, agrees in found.items() if not agrees}
    assert refuted == {
        "Saturated units have no slope, so the gradient vanishes.",
        "With batch norm gradients neither vanish nor explode.",
    }
    runs = quick("initialization")
    for rule in initialization.RULES:
        row = initialization.pick(runs, "relu", rule, True)
        growth = 1 / initialization.growth(row["gradients"])
        assert growth == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=0.05)


def test_deep_residual() -> None:
    assert_claims(
        "deep_residual",
        {
            "With normalized branches": True,
            "The variance of every branch": True,
            "Without norms the variance doubles": True,
            "In a net of 10,000 normalized blocks": True,
            "The same, simulated": True,
            "The same, in a linear net": True,
            "With batch norm very deep": True,
            "Without norms deep ones": True,
            "SkipInit with alpha = 1 fails": True,
            "SkipInit with alpha = 1/sqrt(d)": True,
            "SkipInit with alpha = 0": True,
            "It is depth": True,
        },
    )
    measured = quick("deep_residual")
    assert measured["growth"]["no norm"]["skip"][100] > 1e20
    expected = deep_residual.mean_length(measured["exact_simulated_blocks"])
    assert deep_residual.mean_length(measured["simulated"]) == pytest.approx(expected, rel=0.05)
    assert deep_residual.mean_length(measured["carried"]) == pytest.approx(expected, rel=0.2)


def test_path_shares_by_enumeration() -> None:
    """All 2^d paths of a small net; and of the large one the mean, which is H(d + 1) - 1."""
    blocks = 9
    exact = torch.zeros(deep_residual.LONGEST + 1, dtype=torch.float64)
    for taken in itertools.product((False, True), repeat=blocks):
        variance = math.prod(1 / block for block, through in enumerate(taken, 1) if through)
        exact[sum(taken)] += variance / (blocks + 1)
    shares = torch.tensor(deep_residual.path_shares(blocks), dtype=torch.float64)
    torch.testing.assert_close(shares, exact)
    large = deep_residual.path_shares(10_000)
    mean = sum(k * share for k, share in enumerate(large))
    assert mean == pytest.approx(sum(1 / block for block in range(2, 10_002)), abs=1e-5)
    assert 0.985 < deep_residual.short(large) < 0.986 and sum(large) == pytest.approx(1)


def test_which_axes() -> None:
    assert_claims("which_axes", {"Batch norm shares statistics": True})
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
    assert all(min(run["accuracies"]) > 0.6 for run in quick("which_axes")["runs"])


def test_inference() -> None:
    assert_claims("inference", {"Merged over batches": True, "Where the inputs shift": True})
    for of_size in quick("inference")["small"].values():
        errors = {way: values["error"] for way, values in of_size.items()}
        assert errors["calibrate, layer by layer"] < 1e-5 < errors["calibrate"] < errors["running average"]


@pytest.mark.parametrize("name", STUDIES)
def test_writes_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page, picture and JSON, of what the committed one was made of; and again from the JSON alone."""
    module = study(name)
    measured = json.loads((PAGES / f"{name}.json").read_text())["measured"]
    monkeypatch.setattr(module, "measure", lambda is_quick: measured)
    common.main(module, (12, 8), ["--quick", "--out", str(tmp_path)])
    names = {f"{name}.md", f"{name}.png", f"{name}.json", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    before = (tmp_path / f"{name}.md").read_text()
    assert "This is the quick form." in before and f"({name}.md)" in (tmp_path / "README.md").read_text()
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
    assert not document["quick"]
    assert (PAGES / f"{name}.png").stat().st_size < 150_000


def test_committed_index(tmp_path: Path) -> None:
    for name in STUDIES:
        (tmp_path / f"{name}.json").write_text((PAGES / f"{name}.json").read_text())
    common.write_index(tmp_path)
    assert (tmp_path / "README.md").read_text() == (PAGES / "README.md").read_text()
