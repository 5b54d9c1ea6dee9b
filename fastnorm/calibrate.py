"""calibrate: the exact population statistics of every BatchNorm, in place of running averages."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .functional import moments

__all__ = ["calibrate"]

Model = TypeVar("Model", bound=nn.Module)
BatchNorm = nn.modules.batchnorm._BatchNorm

#: Elements that are converted to float64 at a time: 16 MB of them.
CHUNK = 1 << 21


def calibrate(
    model: Model,
    batches: Iterable[Any],
    *,
    layer_by_layer: bool = False,
    forward: Callable[[Any], Any] | None = None,
    device: torch.device | str | int | None = None,
    process_group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> Model:
    """Set the running statistics of every BatchNorm of `model` to the statistics of the inputs it has over `batches`:
    mean and unbiased variance over all of their values, in place; returns `model`.

    The moments of each batch are merged by the law of total variance, weighted by the number of values per channel and
    in float64, so that the result is that of all values at once (to the last bits of the buffer's dtype, whatever the
    sizes of the batches). A running average, or the mean of the variances of batches, is neither: it forgets, gives a
    short last batch the weight of the others, and leaves out how much the means of the batches differ.

    model: its BatchNorms are torch.nn's, fastnorm's, SyncBatchNorm and subclasses, wherever they have running
        statistics. One without, and one that no batch reaches, stays as it is. A model without any is returned as it
        came, and `batches` is left alone. Wrapped in DistributedDataParallel, what is inside is called.
    batches: tensors; tuples or lists, of which the first item is the input, (input, target) say; or mappings of keyword
        arguments.
    layer_by_layer: False: one pass. Each BatchNorm normalizes by the statistics of its batch, as in training and as in
        torch.optim.swa_utils.update_bn; so a norm behind another one sees inputs that depend on how the data is cut
        into batches. True: a pass for each BatchNorm, in the order of the first pass; those before it have their
        population statistics already. So every norm has the statistics that one training step on all data as a single
        batch would give it. `batches` must be a collection that gives the same batches each time, no iterator.
    forward: called with each batch instead of the model: `lambda batch: model(batch["image"], scale=2)`.
    device: where the tensors of every batch go first. None: they stay.
    process_group: with torch.distributed initialised, the ranks' moments are merged, and every rank has the result for
        the data of all. None: the default group. SyncBatchNorm's forward communicates as well: then all ranks need as
        many batches.
    progress: a bar, if tqdm is installed, on rank 0.

    In the meantime all modules are in evaluation (dropout is off, as it will be when the statistics are used), except
    that without layer_by_layer the BatchNorms are in training. All modes and momentum are afterwards what they were.
    num_batches_tracked becomes the number of batches that were merged (of all ranks; calls, where a norm is called more
    than once), so that training with momentum=None goes on from there. No gradients are recorded; compiled models run
    uncompiled.

    Raises what the model raises, and ValueError where `batches` is empty or no BatchNorm was reached, for inputs of a
    norm that are not finite or are a single value per channel, for an iterator with layer_by_layer, and for a lazy
    BatchNorm. Whatever is raised, the model is as it was.
    Source: Ioffe & Szegedy 2015, algorithm 2, https://arxiv.org/abs/1502.03167; Chan et al. 1983 (merging).
    """
    norms = _norms(model)
    if not norms:
        return model
    if layer_by_layer and isinstance(batches, Iterator):
        raise ValueError(
            f"batches is an iterator ({type(batches).__name__}), which can be read once; layer_by_layer needs a "
            "collection, a list or a DataLoader say"
        )
    call = forward or _caller(model)
    group = _Group(process_group)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _preserved(model, norms) as keep:
        run = _Run(norms, batches, call, device, group, progress and group.rank == 0)
        found = run.layer_by_layer() if layer_by_layer else run.one_pass()
        for norm, total in found.items():
            total.write(norm, correction=1)
        keep()
    return model


def _norms(model: nn.Module) -> dict[BatchNorm, str]:
    """The BatchNorms that have running statistics, and their names."""
    norms: dict[BatchNorm, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None and module.running_var is not None:
            if nn.parameter.is_lazy(module.running_mean):
                raise ValueError(f"{name} is lazy and knows no number of channels yet: call the model once before")
            norms[module] = name or type(module).__name__
    return norms


def _caller(model: nn.Module) -> Callable[[Any], Any]:
    """Calls the model with a batch."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def call(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return inner(**batch)
        return inner(batch[0] if isinstance(batch, (tuple, list)) else batch)

    return call


@contextlib.contextmanager
def _preserved(model: nn.Module, norms: Iterable[BatchNorm]) -> Iterator[Callable[[], None]]:
    """All modules in evaluation; afterwards modes and running statistics are what they were. The function it gives says
    that the statistics shall stay as they are then."""
    modes = [(module, module.training) for module in model.modules()]
    names = ("running_mean", "running_var", "num_batches_tracked")
    buffers = [getattr(norm, name) for norm in norms for name in names]
    saved = [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]
    try:
        for module, _ in modes:
            module.training = False
        yield saved.clear
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, value in saved:
            buffer.copy_(value)


@dataclasses.dataclass
class _Total:
    """What is known of the inputs of one norm; rows of the tensor that ranks exchange."""

    count: Tensor  # of values per channel, [1]; all in float64
    batches: Tensor  # [1]
    place: Tensor  # among the norms, by their first calls, [1]; infinite where there was none
    mean: Tensor  # [C]
    squares: Tensor  # sum of squares about the mean, [C]

    @classmethod
    def none(cls, channels: int, device: torch.device) -> _Total:
        total = cls.unpack(torch.zeros(3 + 2 * channels, dtype=torch.float64, device=device))
        total.place.fill_(torch.inf)
        return total

    @classmethod
    def unpack(cls, packed: Tensor) -> _Total:
        channels = (packed.numel() - 3) // 2
        return cls(*packed.split((1, 1, 1, channels, channels)))

    def pack(self) -> Tensor:
        return torch.cat((self.count, self.batches, self.place, self.mean, self.squares))

    def merge(self, other: _Total) -> None:
        """The law of total variance: the squares within both, and those of the difference between their means."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp_min(1), 0.0)
        difference = other.mean - self.mean
        self.squares = self.squares + other.squares + difference.square() * (self.count * share)
        self.mean = self.mean + difference * share
        self.count, self.batches = count, self.batches + other.batches
        self.place = torch.minimum(self.place, other.place)

    def add(self, x: Tensor) -> None:
        """One batch, (N, C, *). In float64 a part at a time: float32 would round the mean, and where that is large the
        rounding of the means of batches would pass for variance."""
        samples = max(1, CHUNK * x.shape[0] // max(1, x.numel()))
        for part in x.detach().split(samples):
            if part.numel() > 0:
                mean, var = (m.to(self.mean.device) for m in moments(part.double()))
                count = torch.full_like(self.count, part.numel() // part.shape[1])
                self.merge(_Total(count, torch.zeros_like(count), self.place, mean, var * count))
        self.batches = self.batches + 1

    def check(self, name: str) -> None:
        if not (self.mean.isfinite().all() and self.squares.isfinite().all()):
            raise ValueError(f"the inputs of {name} are not all finite: they have no mean and variance")
        if self.count.item() < 2:
            raise ValueError(f"the inputs of {name} have {self.count.item():g} values per channel, expected 2 or more")

    def write(self, norm: BatchNorm, correction: int) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.squares / (self.count - correction))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(self.batches[0])


class _Group:
    """The ranks whose moments are merged; without torch.distributed, this process."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.group = process_group
        distributed = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(process_group) if distributed else 1
        if self.size < 1:
            raise ValueError("process_group does not contain this process")
        self.rank = dist.get_rank(process_group) if distributed else 0

    def merge(self, totals: list[_Total]) -> list[_Total]:
        """The totals of all ranks' data, from those of this rank's, by one all_gather; merged in the order of ranks, so
        every rank has the same bits."""
        if self.size == 1 or not totals:
            return totals
        rows = [total.pack() for total in totals]
        mine = torch.cat([row.to(rows[0].device) for row in rows])
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self.group)
        sizes = [row.numel() for row in rows]
        merged, *others = ([_Total.unpack(row) for row in rank.split(sizes)] for rank in gathered)
        for other in others:
            for total, part in zip(merged, other, strict=True):
                total.merge(part)
        return merged


class _Run:
    """One call of `calibrate`."""

    def __init__(
        self,
        norms: dict[BatchNorm, str],
        batches: Iterable[Any],
        call: Callable[[Any], Any],
        device: torch.device | str | int | None,
        group: _Group,
        progress: bool,
    ) -> None:
        self.norms, self.batches, self.call = norms, batches, call
        self.device, self.group, self.progress = device, group, progress

    def one_pass(self) -> dict[BatchNorm, _Total]:
        """The total of every norm that was reached, each normalizing by its batch."""
        with contextlib.ExitStack() as stack:
            for norm in self.norms:
                stack.enter_context(_batch_statistics(norm))
            found = self._measure(list(self.norms), "calibrate")
        for norm, total in found.items():
            total.check(self.norms[norm])
        return found

    def layer_by_layer(self) -> dict[BatchNorm, _Total]:
        """The same, each normalizing by the population; a pass for every norm that is reached."""
        found = self._measure(list(self.norms), "calibrate")
        for number, norm in enumerate(found):
            if number > 0:  # what the first pass found of those behind the first had old statistics before it
                found |= self._measure([norm], f"calibrate, norm {number + 1} of {len(found)}")
            found[norm].check(self.norms[norm])
            # As in training, where the batch's own variance is the biased one.
            found[norm].write(norm, correction=0)
        return found

    def _measure(self, norms: list[BatchNorm], title: str) -> dict[BatchNorm, _Total]:
        """One pass over all batches and ranks: the totals of those of `norms` that were reached, in that order."""
        totals = {norm: _Total.none(norm.num_features, norm.running_mean.device) for norm in norms}  # type: ignore[union-attr]
        reached: set[BatchNorm] = set()

        def note(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(norm, BatchNorm)
            x, total = args[0] if args else kwargs["input"], totals[norm]
            if x.dim() >= 2 and x.shape[1] != norm.num_features:
                raise ValueError(f"{self.norms[norm]} got {x.shape[1]} channels, expected {norm.num_features}")
            if norm not in reached:
                total.place.fill_(len(reached))
                reached.add(norm)
            total.add(x)

        hooks = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
        try:
            number = 0
            for batch in _with_bar(self.batches, title, self.progress):
                self.call(batch if self.device is None else _moved(batch, self.device))
                number += 1  # not by enumerate: there may be none
        finally:
            for hook in hooks:
                hook.remove()
        merged = dict(zip(totals, self.group.merge(list(totals.values())), strict=True))
        found = {norm: merged[norm] for norm in norms if merged[norm].batches.item() > 0}
        found = dict(sorted(found.items(), key=lambda item: item[1].place.item()))
        if not found:
            what = "batches is empty" if number == 0 else f"{number} batches reached no BatchNorm of the model"
            raise ValueError(f"{what}: there is nothing to take statistics of")
        return found


@contextlib.contextmanager
def _batch_statistics(norm: BatchNorm) -> Iterator[None]:
    """In training, but the running statistics do not move."""
    tracks = norm.track_running_stats
    norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        norm.track_running_stats = tracks


def _moved(batch: Any, device: torch.device | str | int) -> Any:
    """The batch with every tensor in it on `device`."""
    if hasattr(batch, "to"):  # a tensor, or what transformers' tokenizers make
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        items = [_moved(value, device) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def _with_bar(batches: Iterable[Any], title: str, progress: bool) -> Iterable[Any]:
    """The batches, behind a bar if it is wanted and tqdm is there."""
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    total = len(batches) if isinstance(batches, Sized) else None
    bar: Iterable[Any] = tqdm(batches, desc=title, total=total, unit="batch", leave=False)
    return bar
