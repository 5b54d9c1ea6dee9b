"""How the CUDA planner chooses: all plans that it compares keep the promises of plans, it takes the cheapest, and a
forced plan is as forced. Also the properties of the estimates that it goes by."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastnorm import _C
from tests.common.plan_checks import MAX_THREADS, RESERVED, check_backward, check_chosen, check_forward, rounds
from tests.common.plan_model import BATCH, DEVICES, GROUP, LAYER, Call, Shape, large_call, random_call, words

Plan = _C.ForwardPlan | _C.BackwardPlan
Forced = dict[str, str | int]

FREE = (0, 7, 1000)
SPLIT: Forced = {"strategy": "split"}
GANGS = ("block", "cluster", "grid")
RESNET = Call(Shape(BATCH, 32, 256, 56 * 56, 256, False), "bfloat16", 16, False, False, True, True)
CALLS = (
    RESNET,
    Call(Shape(BATCH, 32, 1024, 196, 1024, True), "bfloat16", 16, True, False, True, True),
    Call(Shape(GROUP, 1, 128, 20 * 256 * 256, 32, False), "float32", 16, False, False, True, True),
    Call(Shape(GROUP, 2, 320, 4096, 32, True), "float16", 16, False, False, True, True),
    Call(Shape(LAYER, 1024, 12288, 1, 1, False), "bfloat16", 16, False, False, True, True),
    Call(Shape(LAYER, 16384, 4096, 1, 1, False), "bfloat16", 16, True, False, True, True),
    Call(Shape(BATCH, 256, 2048, 49, 2048, False), "bfloat16", 16, True, False, True, True),
)


def plans(call: Call, facts: _C.DeviceInfo, backward: bool, **options: Any) -> Sequence[Plan]:
    """All that are compared."""
    return call.all_backward(facts, **options) if backward else call.all_forward(facts, **options)


def chosen(call: Call, facts: _C.DeviceInfo, backward: bool, **options: Any) -> Plan:
    return call.backward(facts, **options) if backward else call.forward(facts, **options)


def grid_of(plan: Plan) -> _C.Grid:
    return plan.grid if isinstance(plan, _C.ForwardPlan) else plan.reduce


def check(call: Call, facts: _C.DeviceInfo, plan: Plan, free: int = 0) -> None:
    if isinstance(plan, _C.ForwardPlan):
        check_forward(call, facts, plan, free)
    else:
        check_backward(call, facts, plan, free)


def everywhere(*calls: Call) -> Iterator[tuple[Call, str, _C.DeviceInfo, bool]]:
    for call, (name, facts), backward in itertools.product(calls, DEVICES.items(), (False, True)):
        yield call, name, facts, backward


def check_all(call: Call, facts: _C.DeviceInfo, backward: bool, free: int) -> None:
    options = {"free_sms": free}
    found = plans(call, facts, backward, **options)
    for plan in found:
        check(call, facts, plan, free)
        grid = grid_of(plan)
        assert grid.stages == 1 or rounds(grid) > grid.blocks, "the second stage has no second wave"
    totals = [plan.estimate.total for plan in found]
    assert totals == sorted(totals)
    best = chosen(call, facts, backward, **options)
    assert best == found[0] and str(best) == str(found[0])
    texts = [words(plan) for plan in found]
    assert len(set(texts)) == len(texts) and not any("\n" in text for text in texts)


@pytest.mark.parametrize("seed", range(8))
def test_all_that_is_compared_keeps_the_promises(seed: int) -> None:
    r = random.Random(100 + seed)
    for _ in range(50):
        for call, name, facts, backward in everywhere(random_call(r)):
            try:
                check_all(call, facts, backward, r.choice(FREE))
            except AssertionError as error:
                raise AssertionError(f"{call} on {name}: {error}") from error


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("free", FREE)
def test_so_do_the_plans_of_real_shapes(call: Call, free: int) -> None:
    for _, _, facts, backward in everywhere(call):
        check_all(call, facts, backward, free)


def test_equal_plans_print_alike_and_others_do_not() -> None:
    r = random.Random(0)
    for call in (*CALLS, *(random_call(r) for _ in range(20))):
        for backward in (False, True):
            found = [plan for facts in DEVICES.values() for plan in plans(call, facts, backward)[:5]]
            for a, b in itertools.combinations(found, 2):
                assert (a == b) == (words(a) == words(b)), f"{a}\n{b}"


def test_large_tensors_keep_the_device_busy() -> None:
    r = random.Random(0)
    for call, name, facts, backward in everywhere(*(large_call(r) for _ in range(400))):
        plan = chosen(call, facts, backward)
        check(call, facts, plan)
        try:
            check_chosen(grid_of(plan), plan.strategy, call, facts)
        except AssertionError as error:
            raise AssertionError(f"{call} on {name}: {plan}") from error


def test_no_other_share_of_the_grid_is_much_cheaper() -> None:
    """The planner tries few numbers of blocks to a gang."""
    r = random.Random(5)
    for call, name, facts, backward in everywhere(*(large_call(r) for _ in range(100))):
        best, most = chosen(call, facts, backward), 2 * facts.num_sms
        for pieces in {*range(2, 20), *range(20, most, 9), most // 2, most} if facts.cooperative else ():
            forced: Forced = {"gang": "grid", "pieces": pieces}
            for other in plans(call, facts, backward, forced=forced)[:1]:
                assert best.estimate.total <= 1.2 * other.estimate.total, f"{call} on {name}: {best}; {other}"


def test_devices_without_gangs_get_none() -> None:
    for call, name, facts, backward in everywhere(*CALLS):
        for plan in plans(call, facts, backward):
            assert facts.largest_cluster > 1 or grid_of(plan).gang != "cluster", name
            assert facts.cooperative or grid_of(plan).gang != "grid", name


# ---- forced plans ----


def obeys(plan: Plan, forced: Forced, call: Call, facts: _C.DeviceInfo) -> bool:
    """blocks_per_sm: so many blocks have room on an SM."""
    grid = grid_of(plan)
    place = "registers" if grid.thread_packs > 0 else "shared"
    is_so = {"strategy": plan.strategy, "gang": grid.gang, "stages": grid.stages, "place": place}
    is_so |= {"exchange": grid.exchange, "traversal": grid.traversal}
    if plan.strategy == "split" and len(forced) > ("strategy" in forced):
        return False
    if any(is_so[key] != forced[key] for key in forced.keys() & is_so.keys()):
        return False
    room = facts.shared_per_sm // int(forced.get("blocks_per_sm", 1)) - RESERVED
    widest = grid.traversal == "rows" or grid.tile == call.shape.walked_as(grid.traversal).C
    return (
        (grid.gang == "block" or grid.pieces <= int(forced.get("pieces", grid.pieces)))
        and grid.shared_bytes <= room
        and ("staged_length" not in forced or 0 < grid.staged_length <= int(forced["staged_length"]))
        and (widest or grid.tile * call.size >= int(forced.get("tile_bytes", 0)))
    )


def random_forced(r: random.Random) -> Forced:
    choices: dict[str, tuple[str | int, ...]] = {
        "strategy": ("fused", "fused", "split"),
        "gang": GANGS,
        "pieces": (1, 2, 5, 16, 60),
        "stages": (1, 2),
        "blocks_per_sm": (1, 2, 3),
        "tile_bytes": (8, 64, 200, 1024),
        "place": ("shared", "registers"),
        "staged_length": (70, 1000),
        "exchange": ("gather", "scatter"),
        "traversal": ("rows", "columns"),
    }
    return {key: r.choice(choices[key]) for key in r.sample(sorted(choices), r.randint(1, 3))}


@pytest.mark.parametrize("seed", range(4))
def test_forced_plans_are_as_forced(seed: int) -> None:
    """All of them, and they keep the promises; where there is none, that is an error."""
    r = random.Random(200 + seed)
    calls = (*CALLS, *(random_call(r) for _ in range(20)), *(large_call(r) for _ in range(20)))
    for call, name, facts, backward in everywhere(*calls):
        if call.frozen:  # the strategy is apply, whatever is forced
            continue
        forced = random_forced(r)
        found = plans(call, facts, backward, forced=forced)
        for plan in found:
            assert obeys(plan, forced, call, facts), f"{forced}: {plan} on {name}"
            check(call, facts, plan)
        if found:
            assert chosen(call, facts, backward, forced=forced) == found[0]
        else:
            with pytest.raises(ValueError, match="forced"):
                chosen(call, facts, backward, forced=forced)


def test_what_is_compared_can_be_forced() -> None:
    """The cheapest of each kind. A second stage may be forced where it is of no use."""
    r = random.Random(1)
    for call, name, facts, backward in everywhere(*CALLS, *(random_call(r) for _ in range(60))):
        found = plans(call, facts, backward)
        kinds = [SPLIT]
        kinds += [{"gang": gang, "stages": stages} for gang in GANGS for stages in (1, 2)]
        kinds.append({"place": "registers"})
        for forced in kinds:
            best = next((plan for plan in found if obeys(plan, {"strategy": "fused", **forced}, call, facts)), None)
            again = next(iter(plans(call, facts, backward, forced=forced)), None)
            if call.frozen or (best is None and forced.get("stages") == 2):
                continue
            assert (again is None) == (best is None), f"{forced}: {again}, {best}"
            if again is not None and best is not None:
                assert again.estimate.total <= best.estimate.total, f"{forced}: {again}, {best} on {name}"
                assert again == best or forced.get("stages") == 2


def test_a_block_that_can_keep_rows_in_registers_does() -> None:
    """It moves as many bytes as one that keeps them in shared memory, with fewer instructions. That can be forced."""
    r = random.Random(6)
    places = set()
    for call, name, facts, backward in everywhere(*CALLS, *(random_call(r) for _ in range(100))):
        found = [grid_of(plan) for plan in plans(call, facts, backward) if plan.strategy == "fused"]
        of_blocks = {grid.thread_packs > 0 for grid in found if grid.gang == "block"}
        # Each keeps enough of them on an SM.
        enough = any(
            grid.threads * (facts.shared_per_sm // (grid.shared_bytes + RESERVED)) >= MAX_THREADS
            for grid in found
            if grid.thread_packs > 0
        )
        if enough:
            assert of_blocks == {True}, f"{call} on {name}"
        places |= of_blocks
        for plan in plans(call, facts, backward, forced={"place": "shared"}):
            assert grid_of(plan).thread_packs == 0
    assert places == {False, True}


@pytest.mark.parametrize(
    ("forced", "text"),
    [
        ({"gangs": "grid"}, "forced has 'gangs'"),
        ({"gang": "warp"}, "forced gang is 'warp'"),
        ({"strategy": "best"}, "forced strategy is 'best'"),
        ({"gang": 1}, "forced has 'gang'"),
        ({"place": "cache"}, "forced place is 'cache'"),
        ({"place": "registers"}, "no plan"),
        ({"place": "registers", "gang": "cluster"}, "no plan"),
        ({"pieces": "many"}, "forced has 'pieces'"),
        *(({key: number}, f"forced {key} is {number}")
          for key in ("pieces", "stages", "blocks_per_sm", "tile_bytes") for number in (0, -3)),
        ({"stages": 3}, "forced stages is 3"),
        ({"blocks_per_sm": 300}, "no plan"),
        ({"gang": "cluster", "strategy": "split"}, "no plan"),
        ({"strategy": "apply"}, "no plan"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_forced_is_refused(forced: Forced, text: str) -> None:
    for backward in (False, True):
        with pytest.raises(ValueError, match=text):
            chosen(RESNET, DEVICES["H200"], backward, forced=forced)


def test_a_tile_narrower_than_an_element_is_one() -> None:
    """In a process of its own: a division by zero ends it."""
    code = "from tests.test_plan_choices import *; chosen(CALLS[3], DEVICES['H200'], False, forced={'tile_bytes': 1})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_negative_number_of_free_sms_is_refused() -> None:
    for backward in (False, True):
        with pytest.raises(ValueError, match="free_sms is -1"):
            chosen(RESNET, DEVICES["H200"], backward, free_sms=-1)


# ---- estimates ----


@pytest.mark.parametrize("backward", [False, True])
def test_an_estimate_is_printed_after_the_plan(backward: bool) -> None:
    plan = chosen(RESNET, DEVICES["H200"], backward)
    e = plan.estimate
    parts = f"memory {e.memory:.1f}, issue {e.issue:.1f}, waits {e.barriers:.1f}, launches {e.launches:.1f}"
    assert str(plan) == f"{words(plan)}; estimate {e.total:.1f} us: {parts}"
    assert e.memory > 1 and e.issue > 1 and e.barriers > 0.1 and e.launches > 0.1


def kinds_of(call: Call, facts: _C.DeviceInfo, backward: bool) -> Iterator[tuple[Forced, Plan]]:
    """The cheapest plan of every kind that there is."""
    for gang in (None, *GANGS):
        for stages in (1, 2):
            forced: Forced = {"gang": gang, "stages": stages} if gang else SPLIT
            found = plans(call, facts, backward, forced=forced)
            if found:
                yield forced, found[0]


def with_more_samples(call: Call, times: int) -> Call:
    return dataclasses.replace(call, shape=dataclasses.replace(call.shape, N=call.shape.N * times))


def test_more_samples_cost_more_and_are_served_alike() -> None:
    """By the same kind of plan, because sets of different samples are independent."""
    r = random.Random(2)
    for call, name, facts, backward in everywhere(*(large_call(r) for _ in range(100))):
        if call.shape.kind == BATCH:
            continue
        for forced, plan in kinds_of(call, facts, backward):
            more = plans(with_more_samples(call, 4), facts, backward, forced=forced)
            assert more, f"{call} on {name}: {plan}, but none of 4 times as many samples"
            assert more[0].estimate.total > plan.estimate.total, f"{call} on {name}: {plan}; {more[0]}"


def test_another_tensor_costs_more() -> None:
    """With the same launches: a residual that is read again, an output that is written. (Instructions may take longer
    than the memory does, with and without it.)"""
    r = random.Random(3)
    for call, _, facts, backward in everywhere(*(large_call(r) for _ in range(100))):
        more: dict[str, Any] = {"residual": True} if backward else {"input": True}
        less = {key: not value for key, value in more.items()}
        a, b = (chosen(dataclasses.replace(call, **each), facts, backward, forced=SPLIT) for each in (less, more))
        assert a.estimate.memory < b.estimate.memory and a.estimate.total <= b.estimate.total, f"{a}; {b}"


def test_gangs_wait_for_longer_than_blocks() -> None:
    call = Call(Shape(GROUP, 2, 32, 64, 2, False), "float32", 16, False, False, True, False)
    for backward in (False, True):
        block, cluster, grid = (
            chosen(call, DEVICES["H200"], backward, forced={"gang": gang, "stages": 1}).estimate for gang in GANGS
        )
        assert block.barriers + 1 < min(cluster.barriers, grid.barriers)
        assert block.launches == cluster.launches < grid.launches


def test_folds_of_many_partials_cost_more() -> None:
    """Columns leave a partial of a channel for every piece, and a warp merges 256 at a time. The many sets of a
    LayerNorm take turns."""

    def waits(shape: Shape, backward: bool) -> float:
        call = Call(shape, "bfloat16", 16, False, False, True, True)
        return chosen(call, DEVICES["H200"], backward, forced=SPLIT).estimate.barriers

    for backward in (False, True):
        few, many = (waits(Shape(BATCH, 32, 64, 56 * 56, 64, last), backward) for last in (False, True))
        assert few + 1 < many
        few, many = (waits(Shape(LAYER, rows, 1024, 1, 1, False), backward) for rows in (1000, 1_000_000))
        assert few * 100 < many


def with_facts(facts: _C.DeviceInfo, **other: int) -> _C.DeviceInfo:
    numbers = {name: getattr(facts, name) for name in dir(facts) if not name.startswith("_")}
    return _C.DeviceInfo(**numbers | other)


def test_faster_memory_costs_no_more() -> None:
    r = random.Random(4)
    for call, name, facts, backward in everywhere(*(large_call(r) for _ in range(150))):
        faster = with_facts(facts, bytes_per_us=facts.bytes_per_us * 5 // 4)
        slow, fast = (chosen(call, each, backward) for each in (facts, faster))
        assert fast.estimate.total <= slow.estimate.total * (1 + 1e-6), f"{call} on {name}: {slow}; faster: {fast}"


def test_memory_and_issue_go_on_side_by_side() -> None:
    """The same plan on SMs of another clock: nearly the longer of the two counts where the other is far shorter, and
    together they take longer than each."""
    for backward in (False, True):
        estimates = []
        for megahertz in (500, 1980, 100_000):
            facts = with_facts(DEVICES["H200"], clock_mhz=megahertz)
            estimates.append(chosen(RESNET, facts, backward, forced=SPLIT).estimate)
        slow, usual, fast = estimates
        assert slow.memory == usual.memory == fast.memory
        assert slow.issue * 500 == pytest.approx(usual.issue * 1980) == pytest.approx(fast.issue * 100_000)
        assert fast.issue < fast.memory < slow.issue
        together = [each.total - each.barriers - each.launches for each in estimates]
        assert together == pytest.approx([math.hypot(each.memory, each.issue) for each in estimates])
        assert together[2] == pytest.approx(fast.memory, rel=1e-3)


def test_instructions_of_an_activation_and_of_narrow_packs() -> None:
    """SiLU takes more than nothing, single elements more than packs of 16 bytes, and a wide type as much again."""

    def issue(backward: bool, **other: Any) -> float:
        call = dataclasses.replace(RESNET, **other)
        return chosen(call, DEVICES["H200"], backward, forced=SPLIT).estimate.issue

    for backward in (False, True):
        plain, silu, narrow = issue(backward), issue(backward, activation="silu"), issue(backward, alignment=2)
        assert plain * 1.05 < silu and plain * 1.5 < narrow
        half = {"shape": dataclasses.replace(RESNET.shape, last=True), "alignment": 4}
        single, double = (issue(backward, dtype=dtype, alignment=8) for dtype in ("float32", "float64"))
        assert issue(backward, dtype="float32", **half) > 0 and double == pytest.approx(2 * single, rel=1)


def test_one_block_issues_as_two() -> None:
    """A block that has an SM to itself has the threads of two."""
    for backward in (False, True):
        one, two = (
            chosen(RESNET, DEVICES["H200"], backward, forced={"gang": "grid", "stages": 1, "blocks_per_sm": n}).estimate
            for n in (1, 2)
        )
        assert two.issue == pytest.approx(one.issue, rel=0.1)
