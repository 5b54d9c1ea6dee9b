"""SyncBatchNorm on several ranks, and the same as one big batch in torch.nn.BatchNorm. Imports no pytest: ranks import
it (ranks.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastnorm
from fastnorm import unfused
from tests.common.numerics import ACTIVATION_FUNCTIONS, SLOPE, assert_alike


@dataclasses.dataclass(frozen=True)
class SyncCase:
    """sizes: the batch of each rank.  rest: (C, *spatial)."""

    sizes: tuple[int, ...]
    rest: tuple[int, ...] = (6, 5, 4)
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    channels_last: bool = False
    activation: str | None = None
    residual: bool = False
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True
    offset: float = 1.0
    steps: int = 1

    @property
    def id(self) -> str:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        sizes = "+".join(map(str, own.pop("sizes")))
        return "-".join([sizes, *(f"{k}={v}".replace("torch.", "") for k, v in own.items())])


def layout(t: Tensor, case: SyncCase) -> Tensor:
    if not case.channels_last:
        return t
    return t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


@dataclasses.dataclass
class Batch:
    x: Tensor
    residual: Tensor | None
    grad: Tensor

    def part(self, begin: int, end: int, case: SyncCase) -> Batch:
        cut = [None if t is None else layout(t[begin:end], case) for t in (self.x, self.residual, self.grad)]
        return Batch(*cut)  # type: ignore[arg-type]


def whole_batch(case: SyncCase, step: int = 0) -> Batch:
    """The batch of all ranks."""
    generator = torch.Generator().manual_seed(7 + step)
    shape = (sum(case.sizes), *case.rest)

    def make(scale: float, offset: float) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset
        return layout(t.to(case.dtype), case)

    return Batch(make(2, case.offset), make(1, 0) if case.residual else None, make(1, 0))


def part_of(case: SyncCase, rank: int, step: int = 0) -> Batch:
    begin = sum(case.sizes[:rank])
    return whole_batch(case, step).part(begin, begin + case.sizes[rank], case)


def make_norm(cls: type[nn.Module], case: SyncCase, dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
    """The layer with random parameters, the same for every class."""
    norm = cls(case.rest[0], 1e-4, case.momentum, case.affine, case.track, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 1)
    return norm.to(case.param_dtype or case.dtype) if dtype is None else norm


def gather_results(module: nn.Module, x: Tensor, residual: Tensor | None, y: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaves = {"dx": x, **{f"d{name}": p for name, p in module.named_parameters()}}
    if residual is not None:
        leaves["dresidual"] = residual
    gradients = torch.autograd.grad(y, list(leaves.values()), grad)
    results = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    return results | {name: b.clone() for name, b in module.named_buffers()}


def leaf(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().requires_grad_()


def make_sync(case: SyncCase, group: Any = None) -> nn.Module:
    return make_norm(
        fastnorm.SyncBatchNorm, case, activation=case.activation, activation_param=SLOPE, process_group=group
    )


def run_rank(case: SyncCase, compiled: str | None = None) -> dict[str, Tensor]:
    """What a rank has after the case's steps. On a rank."""
    module = make_sync(case)
    call: Any = module
    if compiled is not None:
        torch._dynamo.reset()
        call = torch.compile(module, fullgraph=True, backend=compiled)
    for step in range(case.steps):
        batch = part_of(case, dist.get_rank(), step)
        x, residual = leaf(batch.x), leaf(batch.residual)
        assert x is not None
        y = call(x) if residual is None else call(x, residual)
        memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
        assert y.numel() == 0 or y.is_contiguous(memory_format=memory_format)
        results = gather_results(module, x, residual, y, batch.grad)
    return results


def run_whole(case: SyncCase, dtype: torch.dtype | None = None, first_step: int = 0) -> dict[str, Tensor]:
    """One big batch in torch.nn.BatchNorm. dtype: instead of the case's."""
    module = make_norm(unfused.BatchNorm, case, dtype=None)
    if dtype is not None:
        module = module.to(dtype)
    for step in range(first_step, first_step + case.steps):
        batch = whole_batch(case, step)
        x, residual = leaf(batch.x if dtype is None else batch.x.to(dtype)), leaf(batch.residual)
        assert x is not None
        if residual is not None and dtype is not None:
            residual = leaf(batch.residual.to(dtype))  # type: ignore[union-attr]
        y = module(x)
        y = ACTIVATION_FUNCTIONS[case.activation](y if residual is None else y + residual)
        results = gather_results(module, x, residual, y, batch.grad.to(x.dtype))
    return results


PARAMETERS = ("dweight", "dbias")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def join(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all ranks as those of one big batch. Buffers are the same everywhere, to the bit."""
    joined = {}
    for name in results[0]:
        parts = [r[name] for r in results]
        if name in BUFFERS:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            joined[name] = parts[0]
        else:
            joined[name] = torch.stack(parts).sum(0) if name in PARAMETERS else torch.cat(parts)
    return joined


def assert_like_whole(results: list[dict[str, Tensor]], case: SyncCase) -> None:
    assert_alike(join(results), run_whole(case), run_whole(case, torch.float64), what=case.id)


# ---- groups, compilation, derivatives: functions that run on a rank ----


def make_groups(groups: tuple[tuple[int, ...], ...]) -> Any:
    """This rank's group. Every rank makes all of them."""
    made = [dist.new_group(list(members)) for members in groups]
    mine = [group for group, members in zip(made, groups, strict=True) if dist.get_rank() in members]
    return mine[0] if mine else made[0]


def run_in_group(cases: tuple[SyncCase, ...], groups: tuple[tuple[int, ...], ...], compiled: bool) -> Any:
    """Every group has a case of its own; a rank that is in none has an ordinary batch norm of the last case."""
    group = make_groups(groups)
    rank = dist.get_rank()
    turn = next((i for i, members in enumerate(groups) if rank in members), None)
    case = cases[-1 if turn is None else turn]
    batch = part_of(case, 0 if turn is None else groups[turn].index(rank))
    module: Any = make_sync(case, group)
    if compiled:
        torch._dynamo.reset()
    x, residual = leaf(batch.x), leaf(batch.residual)
    assert x is not None
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    return gather_results(module, x, residual, call(x) if residual is None else call(x, residual), batch.grad)


def run_uneven_compiled(case: SyncCase, sizes: tuple[tuple[int, ...], ...]) -> tuple[list[Any], int]:
    """Training steps with other batch sizes each: results, and the number of graphs compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    module = make_sync(case)
    call = torch.compile(module, fullgraph=True, backend=counter)
    for step, now in enumerate(sizes):
        case = dataclasses.replace(case, sizes=now)
        batch = part_of(case, dist.get_rank(), step)
        x = leaf(batch.x)
        assert x is not None
        results.append(gather_results(module, x, None, call(x), batch.grad))
    return results, counter.frame_count


def penalty(module: nn.Module, case: SyncCase, batch: Batch) -> dict[str, Tensor]:
    """The derivatives of the squares of dx and dresidual: of a loss that has gradients in it."""
    x, residual, grad = leaf(batch.x), leaf(batch.residual), leaf(batch.grad)
    assert x is not None and grad is not None
    if isinstance(module, nn.SyncBatchNorm):
        y = module(x) if residual is None else module(x, residual)
    else:
        y = module(x)
        y = ACTIVATION_FUNCTIONS[case.activation](y if residual is None else y + residual)
    leaves = {"dx": x} if residual is None else {"dx": x, "dresidual": residual}
    inner = torch.autograd.grad(y, list(leaves.values()), grad, create_graph=True)
    loss = sum((t.square().sum() for t in inner), torch.zeros((), dtype=x.dtype))
    wanted = {**leaves, "dgrad": grad}
    if case.affine:
        wanted["dweight"] = module.weight
    if case.activation == "silu":  # of the others, z plays no part in the slope
        wanted["dbias"] = module.bias
    # Of a two-sided activation the slope depends on no residual.
    second = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    return dict(zip(wanted, second, strict=True))


def penalty_on_rank(case: SyncCase) -> dict[str, Tensor]:
    return penalty(make_sync(case), case, part_of(case, dist.get_rank()))


def penalty_of_whole(case: SyncCase) -> dict[str, Tensor]:
    return penalty(make_norm(unfused.BatchNorm, case), case, whole_batch(case))
