"""What the tests compare: the inputs of a case, torch.nn and fastnorm run on them, and the truth in float64.

The truth is written here from the definitions, and shares no code with fastnorm or with torch's norms.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fastnorm
from fastnorm.activations import ACTIVATIONS
from tests.common.cases import Case, make_data, to_layout

SLOPE = 0.2  # of leaky_relu in every test
#: torch's own functions
ACTIVATION_FUNCTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda z: z} | {
    name: functools.partial(activation.value, param=SLOPE) for name, activation in ACTIVATIONS.items()
}


@dataclasses.dataclass
class Inputs:
    x: Tensor
    residual: Tensor | None
    grad: Tensor  # of the output

    def to(self, device: torch.device) -> Inputs:
        residual = None if self.residual is None else self.residual.to(device)
        return Inputs(self.x.to(device), residual, self.grad.to(device))


def make_inputs(case: Case, device: torch.device, data: str = "normal", seed: int = 0) -> Inputs:
    def tensor(kind: str, seed: int) -> Tensor:
        t = make_data(kind, case.layer.shape, case.dtype, seed)
        return to_layout(t, case.layout).to(device)

    return Inputs(
        x=tensor(data, seed),
        residual=tensor("normal", seed + 1) if case.residual else None,
        grad=tensor("normal", seed + 2),
    )


def build(case: Case, namespace: ModuleType, device: torch.device, seed: int = 3) -> torch.nn.Module:
    """The layer with random parameters and running statistics, the same for every namespace."""
    extra = {}
    if namespace is fastnorm:
        extra = {"activation": case.activation, "activation_param": SLOPE}
    module = case.layer.build(namespace, dtype=case.param_dtype, **extra)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point():
                value = torch.randn(t.shape, generator=generator)
                if name in ("weight", "running_var"):
                    value = 0.5 + value.abs()
                t.copy_(value)
    return module.to(device).train(case.mode == "train")


def call(case: Case, module: torch.nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """act(norm(x) + residual): by torch's operators around a torch.nn module, fused by fastnorm's."""
    if isinstance(module, fastnorm.modules.Norm):
        return module(x) if residual is None else module(x, residual)
    y = module(x)
    return ACTIVATION_FUNCTIONS[case.activation](y if residual is None else y + residual)


def run(case: Case, module: torch.nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, gradients (except in eval mode) and running statistics of one call. Where torch.nn refuses these dtypes
    on the device (on a GPU its group norm and layer norm want parameters of x's dtype), its CPU kernels answer."""
    try:
        return run_as_placed(case, module, inputs)
    except RuntimeError as error:
        if isinstance(module, fastnorm.modules.Norm) or "expected scalar type" not in str(error):
            raise
        return run_on_cpu(case, module, inputs)


def as_fastnorm_lays_out(case: Case, native: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """torch.nn's results, to compare memory formats with. InstanceNorm, of which torch.nn makes planar tensors, keeps
    channels_last; so do on a GPU GroupNorm and the gradient of a frozen BatchNorm: in their place stands x."""
    on_gpu = inputs.x.device.type == "cuda"
    kept: tuple[str, ...] = ()
    if case.layer.norm.startswith("Instance") or (case.layer.norm == "GroupNorm" and on_gpu):
        kept = ("y", "dx", "dresidual")
    elif case.mode == "frozen" and on_gpu:
        kept = ("dx",)
    return native | {name: inputs.x for name in kept if name in native}


def run_on_cpu(case: Case, module: torch.nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """`run` by a copy of the module on the CPU; the results are where the inputs are."""
    cpu = torch.device("cpu")
    results = run_as_placed(case, copy.deepcopy(module).to(cpu), inputs.to(cpu))
    return {name: t.to(inputs.x.device) for name, t in results.items()}


def run_as_placed(case: Case, module: torch.nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    wants_grad = case.mode != "eval"
    x = inputs.x.detach().requires_grad_(wants_grad)
    residual = inputs.residual
    if residual is not None:
        residual = residual.detach().requires_grad_(wants_grad)
    with torch.set_grad_enabled(wants_grad):
        y = call(case, module, x, residual)
    results = {"y": y.detach()}
    if wants_grad:
        leaves = {"dx": x, **{f"d{name}": p for name, p in module.named_parameters()}}
        if residual is not None:
            leaves["dresidual"] = residual
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad)
        results |= dict(zip(leaves, gradients, strict=True))
    results |= {name: b.clone() for name, b in module.named_buffers()}
    return results


def as_sets(x: Tensor, case: Case, module: torch.nn.Module) -> Tensor:
    """x as [sets, elements]: a row holds the elements that share statistics."""
    norm = case.layer.norm
    if norm.startswith("BatchNorm"):
        return x.transpose(0, 1).reshape(x.shape[1], -1)
    if norm == "LayerNorm":
        shape = module.normalized_shape
        return x.reshape(x.shape[: x.dim() - len(shape)].numel(), -1)
    if norm == "LayerNorm2d":
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.reshape(x.shape[0] * case.layer.groups, -1)


def from_sets(sets: Tensor, like: Tensor, case: Case) -> Tensor:
    if case.layer.norm.startswith("BatchNorm"):
        return sets.reshape(like.shape[1], like.shape[0], *like.shape[2:]).transpose(0, 1)
    if case.layer.norm == "LayerNorm2d":
        return sets.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return sets.reshape(like.shape)


def add_batch(t: Tensor | None, case: Case) -> Tensor | None:
    """InstanceNorm takes samples without a batch dimension too."""
    norm, dims = case.layer.norm, len(case.layer.shape)
    unbatched = norm.startswith("InstanceNorm") and dims == int(norm[-2]) + 1
    return t.unsqueeze(0) if unbatched and t is not None else t


@dataclasses.dataclass
class Truth:
    """values: as `run` names them, float64.  scales: the size of the terms whose sum a value is, so that
    scale x epsilon is the error that rounding the inputs and terms of the formula cannot avoid."""

    values: dict[str, Tensor]
    scales: dict[str, float]


def truth(case: Case, module: torch.nn.Module, inputs: Inputs) -> Truth:
    """One call in float64. The module must be as it was before the call."""
    wants_grad = case.mode != "eval"
    shape = inputs.x.shape

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double().requires_grad_(wants_grad)

    x, residual = leaf(add_batch(inputs.x, case)), leaf(add_batch(inputs.residual, case))
    assert x is not None
    parameters = {name: leaf(p) for name, p in module.named_parameters()}
    sets = as_sets(x, case, module)
    tracks = module._buffers.get("running_mean") is not None
    if tracks and case.mode != "train":
        repeats = sets.shape[0] // module.running_mean.numel()
        mean = module.running_mean.double().repeat(repeats)[:, None]
        var = module.running_var.double().repeat(repeats)[:, None]
    else:
        mean = sets.mean(1, keepdim=True)
        var = (sets - mean).square().mean(1, keepdim=True)
    rstd = (var + module.eps).rsqrt()
    xhat = from_sets((sets - mean) * rstd, x, case)
    rstd_of_x = from_sets(rstd.expand_as(sets), x, case).detach()
    # What rounding the mean does to xhat, in epsilons: large when a set is nearly constant.
    shift = from_sets((mean.abs() * rstd).expand_as(sets), x, case).detach()

    def per_channel(p: Tensor | None, default: float) -> Tensor:
        if p is None:
            return torch.tensor(default, dtype=torch.float64, device=x.device)
        return p if case.layer.norm == "LayerNorm" else p.view(-1, *[1] * (x.dim() - 2))

    weight = per_channel(parameters.get("weight"), 1.0)
    z = xhat * weight + per_channel(parameters.get("bias"), 0.0)
    if residual is not None:
        z = z + residual
    y = ACTIVATION_FUNCTIONS[case.activation](z)
    values = {"y": y.detach().reshape(shape)}
    scales = {"y": largest(y) + largest(shift * weight.detach())}
    if wants_grad:
        grad = add_batch(inputs.grad, case)
        assert grad is not None
        leaves = {"dx": x, **{f"d{name}": p for name, p in parameters.items()}}
        if residual is not None:
            leaves["dresidual"] = residual
        dz, *gradients = torch.autograd.grad(y, [z, *leaves.values()], grad.double())
        values |= dict(zip(leaves, gradients, strict=True))
        values["dx"] = values["dx"].view(shape)
        scales["dx"] = largest(dz * rstd_of_x * weight.detach() * (1 + shift))
        # Behind an activation the slope turns with z, and z by what the mean was rounded.
        turned = torch.ones_like(shift) if case.activation is None else 1 + shift
        for name, factor in (("weight", xhat.detach().abs() + shift), ("bias", turned)):
            if name in parameters:
                scales[f"d{name}"] = largest(sum_to(dz.abs() * factor, parameters[name], case))
        if residual is not None:
            values["dresidual"] = values["dresidual"].view(shape)
            scales["dresidual"] = largest(dz * turned)
    if tracks:
        values |= running_statistics(case, module, sets.detach(), mean, var)
        scales |= {"running_mean": largest(x), "running_var": largest(values["running_var"])}
    return Truth(values, scales)


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


def sum_to(terms: Tensor, parameter: Tensor, case: Case) -> Tensor:
    """terms summed as the gradient of the parameter sums them."""
    if case.layer.norm == "LayerNorm":
        return terms.reshape(-1, *parameter.shape).sum(0)
    return terms.transpose(0, 1).reshape(parameter.numel(), -1).sum(1)


def running_statistics(
    case: Case, module: torch.nn.Module, sets: Tensor, mean: Tensor, var: Tensor
) -> dict[str, Tensor]:
    old_mean, old_var = module.running_mean.double(), module.running_var.double()
    batches = int(module.num_batches_tracked)
    count = sets.shape[1]
    counts_batches = case.layer.norm.startswith("BatchNorm") and case.mode == "train"
    if case.mode == "train" and sets.numel() > 0:
        momentum = module.momentum
        if momentum is None:  # a cumulative average; torch's InstanceNorm does not move
            momentum = 1.0 / (batches + 1) if counts_batches else 0.0
        new_mean = mean.detach().view(-1, old_mean.numel()).mean(0)
        new_var = (var.detach() * count / (count - 1)).view(-1, old_var.numel()).mean(0)
        old_mean = (1 - momentum) * old_mean + momentum * new_mean
        old_var = (1 - momentum) * old_var + momentum * new_var
    tracked = torch.tensor(batches + int(counts_batches), device=old_mean.device)
    return {"running_mean": old_mean, "running_var": old_var, "num_batches_tracked": tracked}


@functools.cache
def native_takes_no_eps() -> bool:
    """Whether torch's batch norm takes an eps of 0 in evaluation; torch 2.10 and 2.11 do not."""
    one = torch.ones(1)
    try:
        torch.nn.functional.batch_norm(torch.ones(1, 1), one, one, eps=0.0)
    except ValueError:
        return False
    return True


def native_settings(name: str, settings: dict[str, Any], training: bool | None) -> dict[str, Any]:
    """The settings for torch's norm of that name. Where it takes no eps of 0, one that is nothing beside a variance."""
    refused = name.lower().startswith("batch") and not training and settings.get("eps") == 0
    return {**settings, "eps": 1e-30} if refused and not native_takes_no_eps() else settings


def assert_alike(actual: Any, expected: Any, exact: Any = None, what: str = "") -> None:
    """Tensors, or sequences and dicts of them, that agree as two correct implementations of a norm do: within 32
    epsilons of the largest value, or as far as `expected` itself is from `exact`, the same computed in float64.
    Where a set is constant both multiply rounding errors by 1 / sqrt(eps)."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected), what
        actual, expected = list(actual.values()), list(expected.values())
        exact = None if exact is None else list(exact.values())
    if isinstance(expected, (list, tuple)):
        exact = exact or [None] * len(expected)
        for i, (a, b, c) in enumerate(zip(actual, expected, exact, strict=True)):
            assert_alike(a, b, c, f"{what}[{i}]")
    elif isinstance(expected, Tensor) and expected.is_floating_point():
        assert actual.dtype == expected.dtype, what
        eps = torch.finfo(expected.dtype).eps
        allowed = 32 * eps * largest(expected.detach()[expected.isfinite()].double())
        allowed += 1000 * min(eps, torch.finfo(torch.float32).eps)
        if exact is not None:
            error = expected.double() - exact.double()
            allowed += largest(error[error.isfinite()])
            actual, expected = actual.double(), exact.double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=allowed, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        torch.testing.assert_close(actual, expected, msg=lambda m: f"{what}: {m}")


@dataclasses.dataclass
class Error:
    """Errors of one quantity against the truth, in epsilons of its dtype times its scale."""

    name: str
    ours: float
    native: float
    where: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.ours:.3g} epsilons at {self.where}, torch.nn {self.native:.3g}"


def measure(name: str, ours: Tensor, native: Tensor, exact: Tensor, scale: float) -> Error:
    """Largest difference from the truth, over epsilon x scale. A NaN or Inf out of place is infinite."""
    # On the CPU: to divide by a number, torch's CUDA kernels multiply by its reciprocal, which for a denormal is Inf.
    ours, native, exact = ours.cpu(), native.cpu(), exact.cpu()
    assert ours.dtype == native.dtype, f"{name} has dtype {ours.dtype}, torch.nn {native.dtype}"
    assert ours.shape == native.shape == exact.shape, (
        f"{name} has shape {ours.shape}, torch.nn {native.shape}, truth {exact.shape}"
    )
    if ours.numel() == 0:
        return Error(name, 0.0, 0.0, ())
    if not ours.is_floating_point():
        wrong = [0.0 if torch.equal(t, exact) else torch.inf for t in (ours, native)]
        return Error(name, *wrong, ())
    unit = torch.finfo(ours.dtype).eps * max(scale, 1e-300)
    rounding = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps / unit

    def errors(t: Tensor) -> Tensor:
        difference = ((t.double() - exact).abs() / unit - rounding).clamp_min(0)
        return torch.where(torch.isfinite(t), difference, torch.inf)

    ours_errors = errors(ours)
    worst = int(ours_errors.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
    return Error(name, float(ours_errors.max()), largest(errors(native)), where)


def compare(case: Case, device: torch.device, data: str = "normal", plain: bool = False) -> list[Error]:
    """Runs fastnorm, torch.nn and the truth on the same inputs; one Error for each quantity.

    plain: the scale of a quantity is its own largest value, not that of its terms.
    """
    inputs = make_inputs(case, device, data)
    exact = truth(case, build(case, torch.nn, device), inputs)
    ours = run(case, build(case, fastnorm, device), inputs)
    native = run(case, build(case, torch.nn, device), inputs)
    assert ours.keys() == native.keys() == exact.values.keys()
    return [
        measure(name, ours[name], native[name], value, scale=scale_of(name, exact, plain=plain))
        for name, value in exact.values.items()
    ]


def scale_of(name: str, exact: Truth, plain: bool) -> float:
    own = largest(exact.values[name].double())
    return own if plain else max(own, exact.scales.get(name, 0.0))


def differences(case: Case, inputs: Inputs, device: torch.device, changes: dict[str, Tensor]) -> list[str]:
    """What becomes different when inputs are replaced by others of the same values: more than another order of the
    sums can make of it."""
    expected = run(case, build(case, fastnorm, device), inputs)
    exact = truth(case, build(case, torch.nn, device), inputs)
    results = run(case, build(case, fastnorm, device), dataclasses.replace(inputs, **changes))
    errors = [
        measure(name, results[name], value, value.double(), scale_of(name, exact, plain=False))
        for name, value in expected.items()
        if value.is_floating_point()
    ]
    return [f"{error} with another {next(iter(changes))}" for error in errors if not error.ours <= 6]
