"""Norms under torch's other tools: fx, TorchScript, functional_call, SWA, parametrizations, folding, meta devices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastnorm
from tests.common.cases import TYPICAL, Case, Layer
from tests.common.numerics import assert_alike, build, make_inputs

CPU = torch.device("cpu")


@pytest.fixture(params=TYPICAL, ids=lambda layer: layer.norm)
def layer(request: pytest.FixtureRequest) -> Layer:
    result: Layer = request.param
    return result


def test_fx_traces_over_it_as_a_leaf(layer: Layer) -> None:
    """As torch.nn's own: a call_module node, not the inside of our forward."""
    case = Case(layer, activation="relu")
    model = nn.Sequential(build(case, fastnorm, CPU), nn.Tanh())
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = make_inputs(case, CPU).x
    assert torch.equal(traced(x), model(x))
    assert_alike(traced.state_dict(), model.state_dict())


def test_fx_traces_the_residual() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = fastnorm.GroupNorm(2, 4, activation="silu")

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return self.norm(x * 2, skip)

    block, x, skip = Block(), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    traced = torch.fx.symbolic_trace(block)
    assert torch.equal(traced(x, skip), block(x, skip))


@pytest.mark.fallback(r"torch\.jit\.trace")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript(how: str, activation: str | None, layer: Layer) -> None:
    case = Case(layer, activation=activation, mode="eval")
    module, x = build(case, fastnorm, CPU), make_inputs(case, CPU).x
    expected = module(x)
    model = nn.Sequential(module)
    scripted = torch.jit.trace(model, x) if how == "trace" else torch.jit.script(model)
    assert_alike(scripted(x), expected)
    assert torch.equal(module(x), expected), "the module itself is as it was"


def test_functional_call(layer: Layer) -> None:
    """Parameters and buffers given by dict, with gradients through them."""
    results = []
    for namespace in (fastnorm, nn):
        case = Case(layer)
        module = build(case, namespace, CPU)
        state = {k: v.detach().clone() * 2 for k, v in module.state_dict().items()}
        weight = state["weight"].requires_grad_()
        y = torch.func.functional_call(module, state, make_inputs(case, CPU).x)
        results.append([y, *torch.autograd.grad(y.square().sum(), weight), *state.values(), module.state_dict()])
    assert_alike(*results)


@pytest.mark.fallback(r"torch\.func transform")
def test_an_ensemble_by_vmap(layer: Layer) -> None:
    """stack_module_state and vmap over the models, in eval mode."""
    case = Case(layer, activation="relu", mode="eval")
    models = [build(case, fastnorm, CPU, seed=seed) for seed in range(3)]
    x = make_inputs(case, CPU).x
    parameters, buffers = torch.func.stack_module_state(models)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), x)

    ours = torch.func.vmap(one, (0, 0, None))(parameters, buffers, x)
    assert_alike(ours, torch.stack([model(x) for model in models]))


def test_stochastic_weight_averaging() -> None:
    """update_bn resets the statistics and sets momentum to None on every _BatchNorm."""
    results = []
    for namespace in (fastnorm, nn):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), namespace.BatchNorm2d(4), nn.Flatten(), namespace.BatchNorm1d(64))
        averaged = torch.optim.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        batches = [torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        torch.optim.swa_utils.update_bn(batches, averaged)
        results.append(averaged.state_dict())
    assert_alike(*results)


def test_parametrized_weight(layer: Layer) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    results = []
    for namespace in (fastnorm, nn):
        case = Case(layer)
        module = build(case, namespace, CPU)
        parametrize.register_parametrization(module, "weight", Doubled())
        y = module(make_inputs(case, CPU).x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    assert_alike(*results)


def test_conv_bn_folding() -> None:
    """fuse_conv_bn_eval reads a plain BatchNorm's attributes."""
    conv, bn = nn.Conv2d(3, 4, 3).eval(), build(Case(Layer("", "BatchNorm2d", (), (4,)), mode="eval"), fastnorm, CPU)
    x = torch.randn(2, 3, 5, 5)
    fused = torch.nn.utils.fuse_conv_bn_eval(conv, bn)
    torch.testing.assert_close(fused(x), bn(conv(x)), rtol=1e-4, atol=1e-5)


def test_materialized_from_meta(layer: Layer) -> None:
    with torch.device("meta"):
        module = layer.build(fastnorm)
        y = module(torch.empty(layer.shape))
    assert y.is_meta and y.shape == layer.shape
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    x = torch.randn(layer.shape)
    assert_alike(module(x), layer.build(nn)(x))


def test_deterministic_algorithms_may_be_demanded(layer: Layer) -> None:
    """Nothing of ours is refused, and filling new memory with NaN changes nothing."""
    case = Case(layer, activation="relu", residual=True)
    inputs = make_inputs(case, CPU)
    expected = build(case, fastnorm, CPU)(inputs.x, inputs.residual)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.equal(build(case, fastnorm, CPU)(inputs.x, inputs.residual), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_state_dict_is_safe_to_load(layer: Layer, tmp_path: Path) -> None:
    module = build(Case(layer), fastnorm, CPU)
    torch.save(module.state_dict(), f"{tmp_path}/state")
    state = torch.load(f"{tmp_path}/state", weights_only=True)
    assert_alike(state, module.state_dict())


def test_weights_may_be_strided(layer: Layer) -> None:
    """Parameters that are views: every second element, or one value expanded."""
    case = Case(layer, residual=True)
    module, inputs = build(case, fastnorm, CPU), make_inputs(case, CPU)
    expected = module(inputs.x, inputs.residual)
    for name in ("weight", "bias"):
        values = module._parameters[name].detach()
        wide = torch.stack([values, torch.full_like(values, torch.nan)], -1)
        module._parameters[name] = wide[..., 0].requires_grad_()
    assert torch.equal(build_like(module, case)(inputs.x, inputs.residual), expected)
    module.weight = None
    module._parameters["weight"] = torch.tensor(2.0).expand(values.shape).requires_grad_()
    y = module(inputs.x, inputs.residual)
    reference = build(case, nn, CPU)
    reference.weight.data.fill_(2.0)
    assert_alike(y, reference(inputs.x) + inputs.residual)


def build_like(module: nn.Module, case: Case) -> nn.Module:
    """A fresh module with this one's parameter objects."""
    twin = build(case, fastnorm, CPU)
    twin._parameters.update(module._parameters)
    return twin
