"""The emulator that runs the CUDA kernels on the CPU: first that it tells right from wrong, then the kernels under it.

Its own tests are C++ programs in tests/emulator: primitives against a table, and mutants, kernels with one deliberate
mistake. MUTANTS says by what each mutant is caught, and their correct twins must pass everything.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from tests.emulator import backend, build

SEEDED = ("random", "priority")

Builder = Callable[[str], str]


@pytest.fixture(scope="session")
def built() -> Builder:
    """Builds a target once; skips where the compiler or this machine cannot do its variant."""

    def built(path: str) -> str:
        try:
            build.runner(path.split("/")[0])
        except build.BuildError as error:
            pytest.skip(str(error))
        build.build(path)
        return path

    return built


# ---- primitives ----

PRIMITIVES = (
    *("indices", "shuffles", "barriers", "shared", "clusters", "orders", "counters", "devices", "refusals"),
    *("recovery", "arguments", "widen_bfloat16", "widen_float16", "narrow_bfloat16", "narrow_float16"),
    *("copies", "when_copies_land", "clusters_of_a_grid", "grid_of_a_whole_device", "refused_gangs"),
    *("refused_combinations", "limits_of_two_threads", "limits_of_a_failing_driver", "plans_of_twins"),
)


@pytest.mark.parametrize("variant", build.VARIANTS)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(built: Builder, variant: str, name: str) -> None:
    run = build.run(built(f"{variant}/self_test"), "primitive", name)
    assert run.returncode == 0, run.stdout


# ---- mutants ----


class Mutant(NamedTuple):
    name: str
    report: str | None = None
    """The launch throws this, under every order and seed; {name} stands for the line marked `LINE name`."""
    bits: tuple[str, ...] = ()
    """Under these orders the result changes with the seed."""
    wrong: bool = False
    """The result differs from the correct twin's, under every order and seed."""
    race: str | None = None
    """ThreadSanitizer reports this line."""
    address: str | None = None
    """AddressSanitizer or UndefinedBehaviorSanitizer reports this, and the line marked by the mutant's name."""


MUTANTS = (
    Mutant("first_barrier", bits=SEEDED, race="first_barrier"),
    Mutant("second_barrier", bits=SEEDED, race="second_barrier"),
    Mutant("warp_barrier", bits=SEEDED, race="warp_barrier"),
    Mutant("cluster_barrier_before", bits=SEEDED, race="cluster_barrier_before"),
    Mutant("cluster_barrier_after", bits=SEEDED, race="cluster_barrier_after", address="use-after-poison"),
    Mutant("grid_barrier", bits=SEEDED, race="grid_barrier"),
    Mutant("grid_not_cooperative", report="sync_grid in a launch that is not cooperative, in block"),
    Mutant("cluster_in_one_place", bits=SEEDED, race="one_place"),
    Mutant("grid_in_one_place", bits=SEEDED, race="one_place"),
    Mutant("too_many_to_meet", report="refused: cooperative, with 9 blocks where 8 are resident$"),
    Mutant("cross_block_race", bits=SEEDED, race="cross_block_race"),
    Mutant(
        "divergent_barrier",
        report="divergent barrier: at sync_block {divergent_barrier (one|other)} while block [0-3] thread [0-9]+ "
        "waits at sync_block {divergent_barrier (one|other)}, in block [0-3] thread",
    ),
    Mutant(
        "deadlock",
        report="deadlock: of 128 threads 28 have returned and 100 wait for ever;"
        "  block [0-3] thread 0 to 99 at sync_block {deadlock}$",
    ),
    Mutant(
        "uneven_barriers",
        report="127 have returned and 1 wait for ever;  block [0-3] thread 3 at sync_block {uneven_barriers}$",
    ),
    Mutant(
        "half_warp_shuffle",
        report="0 have returned and 128 wait for ever;  block [0-3] thread 0 to 15 at shuffle {half_warp_shuffle};"
        "  block [0-3] thread 16 to 31 at sync_block {half_warp_barrier}",
    ),
    Mutant(
        "shuffle_after_return",
        report="108 have returned and 20 wait for ever;  block 3 thread 96 to 115 at shuffle {shuffle_after_return}$",
    ),
    Mutant("partial_warp_shuffle", report="shuffle in a warp of 16 threads, in block 0 thread [34][0-9]$"),
    Mutant("shuffle_lane_outside", report="shuffle with lane 32, in block [0-3] thread [0-9]+$"),
    Mutant("global_out_of_bounds", address="heap-buffer-overflow"),
    Mutant(
        "shared_write_outside",
        report="block [0-3] wrote at byte 800 of its 800 bytes of shared memory$",
        address="use-after-poison",
    ),
    Mutant("shared_read_outside", wrong=True, address="use-after-poison"),
    Mutant("unwritten_shared", wrong=True),
    Mutant("misaligned_pack", report="misaligned: 16 bytes read at an address that is 8 past a multiple of 16, in"),
    Mutant("misaligned_unnoted", address="misaligned address"),
    Mutant("wrong_rank", report="cluster_shared with rank 1, in block [0-3] thread 0$"),
    Mutant("remote_global", report="cluster_shared of what is not the block's shared memory, in block"),
    Mutant("copy_not_waited_for", bits=SEEDED),
    Mutant(
        "copy_under_way_at_return",
        report="returned with copies to shared memory under way, 1 of them, in block [0-3] thread [0-9]+$",
    ),
    Mutant("copy_of_pending_batch", bits=SEEDED),
    Mutant("copy_without_barrier", bits=SEEDED, race="copy_for_others"),
    Mutant("barrier_before_wait", bits=SEEDED, race="copy_for_others"),
    Mutant("copy_over_readers", bits=SEEDED, race="copy_over_readers"),
    Mutant("copy_ahead_of_barrier", bits=SEEDED, race="copy_over_readers"),
    Mutant("copy_misaligned_source", report="16 bytes copied from an address that is 8 past a multiple of 16, in"),
    Mutant("copy_misaligned_place", report="16 bytes copied to an address that is 4 past a multiple of 16, in"),
    Mutant("copy_past_shared", report="copy_async to what is not the block's shared memory, in .* thread 127$"),
    Mutant("copy_to_global", report="copy_async to what is not the block's shared memory, in block"),
    Mutant("copy_out_of_bounds", address="heap-buffer-overflow"),
)


def line_of(mark: str) -> str:
    """FILE:LINE of the lines that are marked so, as a regular expression."""
    found = [
        re.escape(f"{source.relative_to(build.ROOT)}:{number}") + r"\b"
        for source in sorted(build.EMULATOR.glob("self_test*.cpp"))
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if re.search(f"// LINE {mark}$", line)
    ]
    assert found, f"no line is marked {mark}"
    return f"(?:{'|'.join(found)})"


def outcomes(path: str, *words: str) -> list[str]:
    """The text after the mutant's name in every line."""
    run = build.run(path, *words)
    assert run.returncode == 0, run.stdout
    return [line.split(" ", 1)[1] for line in run.stdout.splitlines()]


def results(path: str, order: str, seeds: int) -> dict[str, set[str]]:
    """The results of the correct twins, by name."""
    run = build.run(path, "correct", "all", order, "1", str(seeds))
    assert run.returncode == 0, run.stdout
    found: dict[str, set[str]] = {}
    for line in run.stdout.splitlines():
        name, outcome = line.split(" ", 1)
        found.setdefault(name, set()).add(outcome)
    return found


@pytest.fixture(scope="session")
def reference(built: Builder) -> dict[str, set[str]]:
    return results(built("plain/self_test"), "fifo", 1)


def ids(mutants: list[Mutant]) -> list[str]:
    return [mutant.name for mutant in mutants]


def mutants_with(means: str) -> pytest.MarkDecorator:
    chosen = [mutant for mutant in MUTANTS if getattr(mutant, means)]
    return pytest.mark.parametrize("mutant", chosen, ids=ids(chosen))


def test_tables_are_complete(built: Builder) -> None:
    listed = build.run(built("plain/self_test"), "list").stdout.split("\n")
    assert sorted(filter(None, listed)) == sorted(
        [f"primitive {name}" for name in PRIMITIVES] + [f"mutant {mutant.name}" for mutant in MUTANTS]
    )
    assert all(m.report or m.bits or m.wrong or m.race or m.address for m in MUTANTS)


@pytest.mark.parametrize("order", backend.ORDERS)
def test_correct_twins_pass(built: Builder, reference: dict[str, set[str]], order: str) -> None:
    assert all(len(found) == 1 and "bits" in min(found) for found in reference.values())
    assert results(built("plain/self_test"), order, 20) == reference


@pytest.mark.parametrize("variant", ["address", "thread"])
@pytest.mark.parametrize("order", backend.ORDERS)
def test_correct_twins_pass_sanitized(built: Builder, reference: dict[str, set[str]], variant: str, order: str) -> None:
    assert results(built(f"{variant}/self_test"), order, 2) == reference


@pytest.mark.parametrize("order", backend.ORDERS)
@mutants_with("report")
def test_reported_by_the_launch(built: Builder, mutant: Mutant, order: str) -> None:
    expected = re.sub(r"{(.*?)}", lambda match: line_of(match[1]), mutant.report or "")
    for outcome in outcomes(built("plain/self_test"), "broken", mutant.name, order, "1", "10"):
        assert outcome.startswith("defect emulator: ")
        assert re.search(expected, outcome), f"{outcome}\nis not\n{expected}"


@mutants_with("bits")
def test_caught_by_bits_that_change(built: Builder, reference: dict[str, set[str]], mutant: Mutant) -> None:
    for order in mutant.bits:
        found = outcomes(built("plain/self_test"), "broken", mutant.name, order, "1", "20")
        assert len(found) == 20
        assert len(set(found)) > 1, f"{order}: the same bits under 20 seeds"
        assert set(found) - reference[mutant.name], order


@pytest.mark.parametrize("order", backend.ORDERS)
@mutants_with("wrong")
def test_caught_by_wrong_values(built: Builder, reference: dict[str, set[str]], mutant: Mutant, order: str) -> None:
    found = outcomes(built("plain/self_test"), "broken", mutant.name, order, "1", "3")
    assert not set(found) & reference[mutant.name]


@mutants_with("race")
def test_caught_by_thread_sanitizer(built: Builder, mutant: Mutant) -> None:
    for order in ("fifo", "lifo"):  # it needs no seeds: it knows what happens before what
        run = build.run(built("thread/self_test"), "broken", mutant.name, order, "1", "1")
        assert run.returncode == 66, run.stdout
        assert "ThreadSanitizer: data race" in run.stdout
        assert re.search(line_of(mutant.race or ""), run.stdout), run.stdout


@mutants_with("address")
def test_caught_by_address_sanitizer(built: Builder, mutant: Mutant) -> None:
    # One that leaves too early is caught where the scheduler lets it: under `priority` and some seed.
    order = "priority" if mutant.bits else "fifo"
    run = build.run(built("address/self_test"), "broken", mutant.name, order, "1", "20")
    assert run.returncode != 0
    assert mutant.address and mutant.address in run.stdout, run.stdout
    assert re.search(line_of(mutant.name), run.stdout), run.stdout


# ---- the production kernels ----

# Gangs of one stage or two.
GANGS = tuple(f" {gang} {stages}" for gang in ("block", "cluster", "grid") for stages in (1, 2))
REGISTERS = {f"{direction} fused rows registers {stages}" for direction in ("forward", "backward") for stages in (1, 2)}
PLANS = {
    *(
        f"{direction} {strategy} {traversal}{gang}"
        for direction in ("forward", "backward")
        for traversal in ("rows", "columns")
        for strategy, gangs in (("fused", GANGS), ("split", ("",)), ("apply", ("",)))
        for gang in gangs
    ),
    *REGISTERS,
    *("parameter sums none", "parameter sums from_cells", "parameter sums in_gang", "parameter sums own_launch"),
    *("parameter sums from_cells, grid sync", "parameter sums in_gang, grid sync"),
}


def drive(built: Builder, variant: str, device: str, last_seed: int, blocks_together: int) -> set[str]:
    """The same bits under every schedule. Returns the plans that were taken."""
    words = (device, str(last_seed), str(blocks_together))
    run = build.run(built(f"{variant}/drive_kernels"), *words)
    assert run.returncode == 0, run.stdout
    return set(run.stdout.splitlines())


DEVICES = ("tiny", "few", "alone", "small", "wide", "h200")


def test_kernels_take_every_plan(built: Builder) -> None:
    assert set().union(*(drive(built, "plain", device, 0, 1) for device in DEVICES)) == PLANS


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_give_the_same_bits_under_every_schedule(built: Builder, device: str) -> None:
    drive(built, "plain", device, last_seed=1, blocks_together=5)
    if device not in ("few", "h200"):  # whose many blocks take their time
        drive(built, "plain", device, last_seed=3, blocks_together=1)


@pytest.mark.parametrize("device", ["tiny", "few", "wide", "h200"])
def test_kernels_under_address_sanitizer(built: Builder, device: str) -> None:
    drive(built, "address", device, last_seed=0, blocks_together=1)


@pytest.mark.parametrize("device", ["tiny", "few", "wide"])  # h200's gangs have more threads than it can follow
def test_kernels_under_thread_sanitizer(built: Builder, device: str) -> None:
    """One schedule suffices, because the sanitizer knows the order of events."""
    drive(built, "thread", device, last_seed=0, blocks_together=2)


def barriers() -> list[str]:
    """FILE:LINE of every barrier and wait of the kernels."""
    return [
        f"{path.name}:{number}"
        for path in sorted((build.CSRC / "cuda").glob("*.cu*"))
        if path.stem != "platform"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\b(sync_(block|warp|cluster|grid)\(\)|wait_copies\(.*\));", line)
    ]


def line_at(place: str) -> str:
    name, number = place.split(":")
    return (build.CSRC / "cuda" / name).read_text().splitlines()[int(number) - 1]


@pytest.mark.parametrize("barrier", barriers())
def test_every_barrier_is_needed(built: Builder, barrier: str) -> None:
    """Without it the drive finds other bits or a defect: the cases reach it, and it is needed."""
    path = built("plain/drive_kernels")
    runs = (build.run(path, device, "2", "1", barrier) for device in ("few", "tiny", "h200"))
    missed = any(run.returncode == 1 and "FAILED" in run.stdout for run in runs)
    assert missed, f"nothing misses {barrier}"


@pytest.mark.parametrize("pending", [2, 1, 0, 6, 5, 4])
def test_every_copy_group_is_waited_for(built: Builder, pending: int) -> None:
    """Long pieces fill all four groups, so that leaving out the wait for the second, third or fourth is noticed by all
    cases of the same number of stages. With two stages the four groups of the next wave are under way meanwhile."""
    (wait,) = (barrier for barrier in barriers() if barrier.startswith("gang.cuh") and "wait" in line_at(barrier))
    run = build.run(built("plain/drive_kernels"), "wide", "0", "1", f"{wait} pending {pending}")
    noticed = {line for line in run.stdout.splitlines() if line.startswith("FAILED")}
    assert run.returncode == 1 and len(noticed) == 18, run.stdout
    assert all(f"stages {1 + pending // 4}," in line for line in noticed), noticed


# ---- the library that Python loads ----


@pytest.fixture(scope="module")
def library() -> Iterator[backend.Emulator]:
    library = backend.load()
    yield library
    library.configure()


def norm_forward(x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.fastnorm_emulated.norm_forward(
        x, None, None, None, None, None, 0, 0, 1e-5, 0, 0.0, False
    )[0]
    return y


def test_library_computes_and_counts(library: backend.Emulator) -> None:
    x = torch.randn(4, 3, 16, 16)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    for device in DEVICES:
        library.configure(device=device)
        with library.counting() as counts:
            torch.testing.assert_close(norm_forward(x), expected)
        launches = counts.launches
        assert counts.traffic.written_stream == x.nbytes
        assert counts.traffic.read_stream == x.nbytes * (1 if len(launches) == 1 else 2)
        assert counts.traffic.read_stream == sum(launch.traffic.read_stream for launch in launches)
        assert all(launch.blocks > 0 and launch.threads % 32 == 0 for launch in launches)


def test_library_takes_orders_and_seeds(library: backend.Emulator) -> None:
    x = torch.randn(2, 3, 8, 8)
    with library.configured(device="tiny"):  # another device has another plan, and another order of sums
        expected = norm_forward(x)
    for order in backend.ORDERS:
        for seed in range(3):
            with library.configured(order, seed, "tiny", blocks_together=1 + seed):
                assert torch.equal(norm_forward(x), expected)


def test_library_refuses(library: backend.Emulator) -> None:
    with pytest.raises(RuntimeError, match="no order named best; there are fifo, lifo, random, priority"):
        library.configure(order="best")
    with pytest.raises(RuntimeError, match="no device named huge; there are tiny, few, alone, small, wide, h200"):
        library.configure(device="huge")
    with pytest.raises(RuntimeError, match="at least one block runs"):
        library.configure(blocks_together=0)
    with pytest.raises(RuntimeError, match="at most 262144 bytes of shared memory"):
        library.configure(device=dataclasses.replace(library.device("tiny"), shared_per_block=1 << 20))
    with pytest.raises(RuntimeError, match="does not refuse all; there are nothing, gangs"):
        library.configure(refuses="all")
    with pytest.raises(ValueError, match="a plan has no teams to force; it has strategy, gang, pieces"):
        library.configure(forced={"gang": "grid", "teams": 3})
    with pytest.raises(ValueError, match="a plan's gang cannot be 'pair'; there are block, cluster, grid"):
        library.configure(forced={"gang": "pair"})
    with pytest.raises(ValueError, match="a plan's stages cannot be 'two'; it is a number"):
        library.configure(forced={"stages": "two"})


def test_library_knows_its_devices(library: backend.Emulator) -> None:
    assert library.device("tiny").largest_cluster == 4
    assert library.device("small").cooperative is True
    assert library.device("h200").cluster_sms == 128
