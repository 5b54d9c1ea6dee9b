"""How the CUDA planner chooses: all plans it compares keep what plans promise, the cheapest is taken, and a forced plan
is as it was forced."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastnorm import _C
from plan_checks import check_backward, check_forward
from plan_model import BATCH, DEVICES, GROUP, LAYER, Call, Shape, random_call

FREE = (0, 7)
RESNET = Call(Shape(BATCH, 32, 256, 56 * 56, 256, False), "bfloat16", 16, False, False, True, True)
CALLS = (
    RESNET,
    Call(Shape(BATCH, 32, 1024, 196, 1024, True), "bfloat16", 16, True, False, True, True),
    Call(Shape(GROUP, 1, 128, 20 * 256 * 256, 32, False), "float32", 16, False, False, True, True),
    Call(Shape(GROUP, 2, 320, 4096, 32, True), "float16", 16, False, False, True, True),
    Call(Shape(LAYER, 1024, 12288, 1, 1, False), "bfloat16", 16, False, False, True, True),
    Call(Shape(BATCH, 256, 2048, 49, 2048, False), "bfloat16", 16, True, False, True, True),
)


def check_all(call: Call, facts: _C.DeviceInfo, free: int) -> None:
    forward, backward = (plans(facts, free_multiprocessors=free) for plans in (call.all_forward, call.all_backward))
    for plan in forward:
        check_forward(call, facts, plan, free)
    for plan in backward:
        check_backward(call, facts, plan, free)
    for plans, chosen in ((forward, call.forward), (backward, call.backward)):
        totals = [plan.estimate.total for plan in plans]
        assert totals == sorted(totals)
        assert chosen(facts, free_multiprocessors=free).estimate.total == totals[0]
        texts = [str(plan).split("; estimate ")[0] for plan in plans]
        assert len(set(texts)) == len(texts) and not any("\n" in text for text in texts)


@pytest.mark.parametrize("seed", range(4))
def test_all_that_is_compared_keeps_the_promises(seed: int) -> None:
    r = random.Random(100 + seed)
    for _ in range(25):
        call = random_call(r)
        for name, facts in DEVICES.items():
            try:
                check_all(call, facts, r.choice(FREE))
            except AssertionError as error:
                raise AssertionError(f"{call} on {name}: {error}") from error


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("free", FREE)
def test_so_do_the_plans_of_real_shapes(call: Call, free: int) -> None:
    for facts in DEVICES.values():
        check_all(call, facts, free)


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("gang", ["block", "cluster", "grid"])
@pytest.mark.parametrize("buffers", [1, 2])
def test_forced_plans_are_as_forced(call: Call, gang: str, buffers: int) -> None:
    """Where there is such a plan at all; and it keeps the promises."""
    forced = {"strategy": "fused", "gang": gang, "buffers": buffers, "residents": 1, "tile_bytes": 128}
    for pieces in (None, 2, 8, 60):
        options: dict[str, Any] = {"forced": forced | ({} if pieces is None else {"pieces": pieces})}
        for facts in DEVICES.values():
            for plan_of, check in ((call.forward, check_forward), (call.backward, check_backward)):
                try:
                    plan = plan_of(facts, **options)
                except ValueError as error:
                    assert "forced" in str(error)
                    continue
                check(call, facts, plan)
                grid = plan.grid if isinstance(plan, _C.ForwardPlan) else plan.reduce
                assert (plan.strategy, grid.gang, grid.buffers) == ("fused", gang, buffers)
                assert pieces is None or gang == "block" or grid.pieces <= pieces
                assert grid.traversal == "rows" or grid.tile == call.shape.C or grid.tile * call.size >= 128


def test_each_gang_can_be_forced() -> None:
    """Else the test above would say less than it seems to."""
    facts = DEVICES["H200"]
    for gang in ("cluster", "grid"):
        for call in (CALLS[0], CALLS[3]):
            assert call.forward(facts, forced={"gang": gang}).grid.gang == gang
            assert call.backward(facts, forced={"gang": gang}).reduce.gang == gang
    for call in CALLS:
        assert call.forward(facts, forced={"strategy": "split"}).strategy == "split"


@pytest.mark.parametrize(
    ("forced", "words"),
    [
        ({"gangs": "grid"}, "forced has 'gangs'"),
        ({"gang": "warp"}, "forced gang is 'warp'"),
        ({"strategy": "best"}, "forced strategy is 'best'"),
        ({"gang": 1}, "forced has 'gang'"),
        ({"pieces": "many"}, "forced has 'pieces'"),
        ({"pieces": 0}, "forced pieces is 0"),
        ({"buffers": 3}, "forced buffers is 3"),
        ({"gang": "cluster", "strategy": "split"}, "no plan"),
    ],
)
def test_what_cannot_be_forced_is_refused(forced: dict[str, Any], words: str) -> None:
    for plan_of in (RESNET.forward, RESNET.backward):
        with pytest.raises(ValueError, match=words):
            plan_of(DEVICES["H200"], forced=forced)


def test_devices_without_gangs_get_none() -> None:
    for call in CALLS:
        for facts in (DEVICES["no gangs"], DEVICES["T4"]):
            grids = [p.grid for p in call.all_forward(facts)] + [p.reduce for p in call.all_backward(facts)]
            assert all(grid.gang != "cluster" for grid in grids)
        assert all(p.grid.gang == "block" for p in call.all_forward(DEVICES["no gangs"]))
        assert not any(p.meets for p in call.all_backward(DEVICES["no gangs"]))


def test_more_bytes_cost_more() -> None:
    """Of the same kind of plan, on the same device."""
    for facts in DEVICES.values():
        for forced in ({"gang": "block"}, {"strategy": "split"}):
            totals = []
            for n in (8, 32, 128):
                call = Call(Shape(GROUP, n, 64, 256, 8, False), "float32", 16, False, False, True, True)
                totals.append(call.forward(facts, forced=forced).estimate.total)
            assert totals[0] < totals[1] < totals[2]
