"""calibrate: exact population statistics, whatever the batches; and a model that is otherwise as it was."""

from __future__ import annotations

import builtins
import collections
import copy
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fastnorm
from fastnorm import calibrate
from tests.common.cases import DTYPES, to_layout

SIZES = (7, 5, 7, 1, 3)  # of the batches


def exact_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every channel, in float64."""
    sets = x.double().transpose(0, 1).reshape(x.shape[1], -1)
    return sets.mean(1), sets.var(1, correction=1)


def assert_within_ulps(actual: Tensor, exact: Tensor, ulps: int) -> None:
    error = (actual.double() - exact).abs() / (exact.abs() * torch.finfo(actual.dtype).eps)
    assert float(error.max()) <= ulps, f"{float(error.max()):.3g} epsilons"


def deep_net() -> nn.Sequential:
    """Three norms; the second and third see what those before make of their input."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        fastnorm.BatchNorm2d(6, activation="relu"),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 5),
        fastnorm.BatchNorm1d(5, momentum=0.3),
    )


def images() -> Tensor:
    """Batches of these differ in their means: they are sorted by brightness."""
    torch.manual_seed(4)
    return torch.randn(sum(SIZES), 3, 8, 8) + torch.linspace(-3, 3, sum(SIZES)).view(-1, 1, 1, 1)


def norms_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def whole_state(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_served_calls", "_left_calls")}
        flags = {k: v for k, v in own.items() if isinstance(v, (bool, int, float, str, type(None)))}
        state[f"{name}'s"] = flags | {k: len(v) for k, v in own.items() if "hooks" in k}
    return state


def assert_unchanged(model: nn.Module, state: dict[str, Any]) -> None:
    now = whole_state(model)
    assert list(now) == list(state)
    for name, value in state.items():
        assert torch.equal(value, now[name]) if isinstance(value, Tensor) else value == now[name], name


# Values


@pytest.mark.parametrize("data", ["normal", "offset"])
@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_exact(dtype: torch.dtype, layout: str, data: str) -> None:
    """At mean 1e6 and deviation 1 too, where the rounding of a float32 mean is as large as 0.03."""
    x = torch.randn(sum(SIZES), 4, 5, 5, dtype=torch.float64) * torch.tensor([1.0, 2, 0.1, 5]).view(4, 1, 1)
    x += torch.randn(sum(SIZES), 1, 1, 1, dtype=torch.float64)
    offset = 3.0 if data == "normal" else 1e6 if dtype.itemsize > 2 else 30.0
    x = to_layout((x + offset).to(dtype), layout)
    norm = fastnorm.BatchNorm2d(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert calibrate(norm, x.split(SIZES), progress=False) is norm
    mean, var = exact_statistics(x)
    assert_within_ulps(norm.running_mean, mean, 8 if dtype == torch.float64 else 1)
    # In float64 the mean itself is rounded at 1e6 times the deviation, and more.
    assert_within_ulps(norm.running_var, var, 1 if dtype != torch.float64 else 1 << 24 if data == "offset" else 64)
    assert norm.num_batches_tracked == len(SIZES)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (26, 4)),
        (nn.BatchNorm1d(4), (26, 4, 9)),
        (fastnorm.BatchNorm1d(4, affine=False), (26, 4)),
        (nn.BatchNorm2d(4), (26, 4, 3, 5)),
        (fastnorm.BatchNorm3d(4), (26, 4, 2, 3, 2)),
        (nn.SyncBatchNorm(4), (26, 4, 3)),
        (type("Own", (nn.BatchNorm2d,), {})(4), (26, 4, 3, 5)),
        (type("Own", (fastnorm.BatchNorm2d,), {})(4, activation="silu"), (26, 4, 3, 5)),
    ],
    ids=lambda value: (
        f"{type(value).__mro__[1].__module__}.{type(value).__name__}" if isinstance(value, nn.Module) else ""
    ),
)
def test_every_class(norm: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 3 + 1
    calibrate(norm, x.split((10, 9, 7)), progress=False)
    mean, var = exact_statistics(x)
    assert_within_ulps(norm.running_mean, mean, 1)
    assert_within_ulps(norm.running_var, var, 1)


def test_large_batches_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastnorm.calibrate"], "CHUNK", 64)
    x, norm = torch.randn(23, 4, 5), nn.BatchNorm1d(4)
    calibrate(norm, [x], progress=False)
    assert_within_ulps(norm.running_var, exact_statistics(x)[1], 1)
    assert norm.num_batches_tracked == 1


def test_layer_by_layer_is_one_pass_over_all_data() -> None:
    """What a training step with momentum 1 on all data as one batch leaves in the buffers, in every norm."""
    x, expected, ours = images(), deep_net(), deep_net()
    for module in norms_of(expected):
        module.momentum = 1.0
    expected.train()[4].eval()  # no dropout
    expected(x)
    calibrate(ours, list(x.split(SIZES)), layer_by_layer=True, progress=False)
    for norm, truth in zip(norms_of(ours), norms_of(expected), strict=True):
        torch.testing.assert_close(norm.running_mean, truth.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, truth.running_var, rtol=1e-5, atol=0)
        assert norm.num_batches_tracked == len(SIZES)


def test_one_pass_normalizes_by_batches() -> None:
    """Of the first norm the statistics of all data; of those behind it, of what it makes of the batches. update_bn
    sees the same inputs, and averages the variances of batches: that of the first norm is far too small."""
    x, ours, theirs = images(), deep_net(), deep_net()
    batches = [b for b in x.split(SIZES) if len(b) > 1]
    seen: list[Tensor] = []
    ours[6].register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    calibrate(ours, batches, progress=False)
    mean, var = exact_statistics(ours[0](torch.cat(batches)).detach())
    assert_within_ulps(ours[1].running_mean, mean, 8)
    assert_within_ulps(ours[1].running_var, var, 8)
    assert_within_ulps(ours[7].running_var, exact_statistics(torch.cat(seen))[1], 1)
    update_bn(batches, theirs)
    assert theirs[1].running_var.mean() < 0.4 * ours[1].running_var.mean()


def test_a_norm_that_is_called_twice_pools_both() -> None:
    norm = nn.BatchNorm1d(3)
    x, y = torch.randn(8, 3), torch.randn(6, 3) + 2

    def both(batch: tuple[Tensor, Tensor]) -> None:
        for part in batch:
            norm(part)

    calibrate(norm, [(x, y)], forward=both, progress=False)
    assert_within_ulps(norm.running_var, exact_statistics(torch.cat((x, y)))[1], 1)


def test_compiled_model() -> None:
    """torch.compile's own wrapper, and a module compiled in place, after calls that compiled them."""
    x = torch.randn(12, 3, 6, 6)
    for build in (lambda m: torch.compile(m, backend="aot_eager"), lambda m: m.compile(backend="aot_eager") or m):
        inner = nn.Sequential(nn.Conv2d(3, 4, 3), fastnorm.BatchNorm2d(4))
        model = build(inner)
        model(x)
        calibrate(model, x.split(5), progress=False)
        mean, var = exact_statistics(inner[0](x).detach())
        assert_within_ulps(inner[1].running_mean, mean, 16)
        assert_within_ulps(inner[1].running_var, var, 16)


def test_layer_by_layer_does_not_look_at_what_old_statistics_make() -> None:
    """A model whose statistics are broken is mended: norms behind the first saw NaN in the first pass alone."""
    model, fresh = deep_net(), deep_net()
    for norm in norms_of(model):
        norm.running_var.fill_(torch.nan)
    for each in (model, fresh):
        calibrate(each, list(images().split(SIZES)), layer_by_layer=True, progress=False)
    for ours, theirs in zip(norms_of(model), norms_of(fresh), strict=True):
        assert torch.equal(ours.running_var, theirs.running_var)


# What goes in


Named = collections.namedtuple("Named", ["input", "target"])


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize(
    "make",
    [lambda x: x, lambda x: (x, 1), lambda x: [x, torch.ones(2)], lambda x: {"input": x}, lambda x: Named(x, "label")],
    ids=["tensor", "tuple", "list", "mapping", "namedtuple"],
)
def test_batches(make: Callable[[Tensor], Any], device: str | None) -> None:
    """Tensors go to the device, wherever they are; so a model on meta gets no values, and says so."""
    x, norm = torch.randn(10, 3), nn.BatchNorm1d(3)
    batches = [make(part) for part in x.split(4)]
    if device == "meta":
        seen: list[Any] = []
        with pytest.raises(ValueError, match="3 batches reached no BatchNorm"):
            calibrate(norm, batches, forward=seen.append, device=device, progress=False)
        first = seen[0]
        value = first["input"] if isinstance(first, dict) else first if isinstance(first, Tensor) else first[0]
        assert type(first) is type(batches[0]) and value.device.type == "meta"
        return
    calibrate(norm, batches, device=device, progress=False)
    assert_within_ulps(norm.running_mean, exact_statistics(x)[0], 2)


def test_what_has_no_statistics_and_what_is_not_reached() -> None:
    model = nn.ModuleDict(
        {
            "used": nn.BatchNorm1d(3),
            "unused": nn.BatchNorm1d(3),
            "without": nn.BatchNorm1d(3, track_running_stats=False),
            "instance": nn.InstanceNorm1d(3, track_running_stats=True),
        }
    )
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def forward(x: Tensor) -> None:
        model["used"](model["without"](x))

    calibrate(model, [torch.randn(4, 3, 5)], forward=forward, progress=False)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {"used.running_mean", "used.running_var", "used.num_batches_tracked"}


def test_a_model_without_batch_norm_reads_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))

    def batches() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield

    assert calibrate(model, batches()) is model


# What is left of it


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_all_else_is_as_it_was(layer_by_layer: bool) -> None:
    """Modes, module by module, momentum, flags, hooks, parameters; only the statistics are new."""
    model = deep_net()
    model.train()
    model[3].eval()
    model[2].weight.requires_grad_(False)
    state = whole_state(model)
    calibrate(model, [b for b in images().split(SIZES) if len(b) > 1], layer_by_layer=layer_by_layer, progress=False)
    for norm, name in zip(norms_of(model), "137", strict=True):
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            assert not torch.equal(getattr(norm, buffer), state[f"{name}.{buffer}"])
            state[f"{name}.{buffer}"] = getattr(norm, buffer)
    assert_unchanged(model, state)
    assert model(images())[0].requires_grad


class Broken(Exception):
    pass


def breaking(batches: list[Any]) -> Iterator[Any]:
    yield from batches
    raise Broken("broken")


class Breaking(list[Any]):
    """Breaks in its second pass."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(breaking(list(super().__iter__()))) if self.passes == 2 else super().__iter__()


GOOD = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
FAILURES: tuple[tuple[Any, dict[str, Any], type[Exception], str], ...] = (
    ([], {}, ValueError, "batches is empty"),
    ([], {"layer_by_layer": True}, ValueError, "batches is empty"),
    (iter(GOOD), {"layer_by_layer": True}, ValueError, r"batches is an iterator \(list_iterator\)"),
    (breaking(GOOD), {}, Broken, "broken"),
    (Breaking(GOOD), {"layer_by_layer": True}, Broken, "broken"),
    ([*GOOD, torch.full((2, 3, 8, 8), torch.nan)], {}, ValueError, "the inputs of 1 are not all finite"),
    ([*GOOD, torch.full((2, 3, 8, 8), torch.inf)], {"layer_by_layer": True}, ValueError, "the inputs of 1 are not"),
    ([*GOOD, torch.randn(4, 2, 8, 8)], {}, RuntimeError, "channels"),
    (GOOD, {"forward": lambda batch: None}, ValueError, "2 batches reached no BatchNorm"),
    ([GOOD[0][:1]], {}, ValueError, "Expected more than 1 value per channel when training"),  # of the last norm
    ([GOOD[0][:1]], {"layer_by_layer": True}, ValueError, "the inputs of 7 have 1 values per channel"),
    (None, {}, TypeError, "not iterable"),
)


@pytest.mark.parametrize(("batches", "kwargs", "error", "message"), FAILURES)
def test_a_failure_changes_nothing(batches: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model = deep_net().train()
    model[1].eval()
    state = whole_state(model)
    with pytest.raises(error, match=message):
        calibrate(model, batches, progress=False, **kwargs)
    assert_unchanged(model, state)


def test_a_subclass_that_moves_its_statistics_itself() -> None:
    """A failure puts them back."""

    class Mover(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            assert self.running_mean is not None
            self.running_mean.add_(1)
            return x

    norm = Mover(3)
    state = whole_state(norm)
    with pytest.raises(Broken):
        calibrate(norm, breaking([torch.randn(4, 3)]), progress=False)
    assert_unchanged(norm, state)


def test_channels_and_lazy_norms_are_checked() -> None:
    with pytest.raises(ValueError, match="BatchNorm1d got 4 channels, expected 3"):
        calibrate(nn.BatchNorm1d(3, affine=False), [torch.randn(5, 4)], progress=False)
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="0 is lazy"):
        calibrate(lazy, [torch.randn(5, 4)], progress=False)
    lazy(torch.randn(5, 4))
    calibrate(lazy, [torch.randn(5, 4)], progress=False)


def test_training_goes_on() -> None:
    """With momentum None the next batch joins the average as one more."""
    norm, x = nn.BatchNorm1d(3, momentum=None), torch.randn(12, 3)
    calibrate(norm, x.split(4), progress=False)
    before = norm.running_mean.clone()
    y = torch.randn(4, 3)
    norm(y)
    torch.testing.assert_close(norm.running_mean, (3 * before + y.mean(0)) / 4)


# The bar


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's, with a total where there is one; not asked for where it is not wanted."""
    made: list[dict[str, Any]] = []

    def tqdm(batches: Any, **kwargs: Any) -> Any:
        made.append(kwargs)
        return batches

    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=tqdm))
    batches = [torch.randn(4, 3), torch.randn(4, 3)]
    calibrate(nn.BatchNorm1d(3), batches)
    calibrate(nn.BatchNorm1d(3), iter(batches))
    assert [(bar["total"], bar["desc"]) for bar in made] == [(2, "calibrate"), (None, "calibrate")]
    calibrate(nn.BatchNorm1d(3), batches, progress=False)
    assert len(made) == 2
    calibrate(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), batches, layer_by_layer=True)
    assert [bar["desc"] for bar in made[2:]] == ["calibrate", "calibrate, norm 2 of 2"]


def test_does_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    norm = calibrate(nn.BatchNorm1d(3), [torch.randn(4, 3)])
    assert norm.num_batches_tracked == 1


def test_a_copy_is_calibrated_alone() -> None:
    model = deep_net()
    other = copy.deepcopy(model)
    state = whole_state(model)
    calibrate(other, GOOD, progress=False)
    assert_unchanged(model, state)
