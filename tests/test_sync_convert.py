"""convert_sync_batchnorm, revert_sync_batchnorm, and SyncBatchNorm where there is nobody to exchange with."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from fastnorm import unfused
from tests.common.numerics import assert_alike

CLASSES = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(fastnorm.BatchNorm, fastnorm.BatchNorm1d, fastnorm.BatchNorm2d, fastnorm.BatchNorm3d),
    unfused.BatchNorm,
)
DIMS = {"1": 3, "2": 4, "3": 5}


def input_of(cls: type[nn.Module]) -> Tensor:
    return torch.randn([2, 4, 3, 3, 3][: DIMS.get(cls.__name__[-2], 4)])


def state(module: nn.Module) -> dict[str, object]:
    """All that a module is made of, but its class: the objects themselves."""
    own = vars(module) | {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    return {name: value for name, value in own.items() if name not in ("_served_calls", "_left_calls")}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_there_and_back(cls: type[nn.Module], training: bool) -> None:
    norm = cls(4, 1e-3, momentum=None, affine=training)
    norm.register_forward_hook(lambda *_: None)
    norm.train(training)
    model = nn.Sequential(nn.Sequential(norm), nn.ReLU(), norm)  # a shared module
    before, x = state(norm), input_of(cls)
    expected = copy.deepcopy(model)(x)
    assert fastnorm.convert_sync_batchnorm(model) is model
    assert type(norm) is fastnorm.SyncBatchNorm and model[0][0] is model[2] is norm
    assert_alike(copy.deepcopy(model)(x), expected)
    assert list(norm.state_dict()) == list(cls(4, affine=training).state_dict())
    assert fastnorm.revert_sync_batchnorm(model) is model
    assert type(norm) is cls and state(norm) == before
    assert_alike(model(x), expected)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_the_activation_stays(activation: str) -> None:
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    model = nn.Sequential(fastnorm.BatchNorm2d(4, activation=activation, activation_param=0.2))
    expected = model[0](x, residual)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)
    assert (model[0].activation, model[0].activation_param) == (activation, 0.2)
    assert_alike(model[0](x, residual), expected)
    for step, expected_class in (
        (fastnorm.revert, unfused.SyncBatchNormActivation),
        (fastnorm.convert, fastnorm.SyncBatchNorm),
        (fastnorm.revert, unfused.SyncBatchNormActivation),
        (fastnorm.revert_sync_batchnorm, fastnorm.BatchNorm2d),
    ):
        step(model)
        assert type(model[0]) is expected_class
        assert_alike(model[0](x, residual), expected)


def test_an_activation_that_was_dropped_meanwhile() -> None:
    model = fastnorm.revert(nn.Sequential(fastnorm.BatchNorm2d(4, activation="relu")))
    assert type(model[0]) is unfused.BatchNorm2dActivation
    fastnorm.convert_sync_batchnorm(model)
    model[0].activation = None
    fastnorm.revert(model)
    assert type(model[0]) is nn.SyncBatchNorm
    fastnorm.revert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    model(torch.randn(2, 4, 3, 3))


def test_of_unknown_origin() -> None:
    """Nobody knows how many dimensions they were of: the class takes any."""
    model = nn.Sequential(nn.SyncBatchNorm(4, momentum=0.3), fastnorm.SyncBatchNorm(4, activation="relu"))
    parameters = list(model.parameters())
    fastnorm.revert_sync_batchnorm(model)
    assert [type(m) for m in model] == [fastnorm.BatchNorm] * 2
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model[0].momentum == 0.3 and model[1].activation == "relu"
    for shape in ((2, 4), (2, 4, 3), (2, 4, 3, 3), (2, 4, 3, 3, 3)):
        assert model(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        model(torch.randn(4))
    fastnorm.revert(model)
    assert [type(m) for m in model] == [unfused.BatchNorm, unfused.BatchNormActivation]
    model(torch.randn(2, 4))


def test_torchs_own_conversion_goes_back_too() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))
    fastnorm.convert(model)
    assert type(model[0]) is fastnorm.SyncBatchNorm
    fastnorm.revert(model)
    assert type(model[0]) is nn.SyncBatchNorm
    fastnorm.revert_sync_batchnorm(model)
    assert type(model[0]) is fastnorm.BatchNorm


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_what_is_left_is_named() -> None:
    """Silence would leave statistics apart that the user wants together."""
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x
    model = nn.ModuleDict({"a": Doubled(4), "b": nn.Sequential(nn.BatchNorm2d(4), patched), "c": nn.GroupNorm(2, 4)})
    with pytest.warns(UserWarning, match="leaves") as caught:
        fastnorm.convert_sync_batchnorm(model)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and "leaves a as" in texts[0] and "Doubled is a subclass" in texts[0]
    assert "leaves b.1 as" in texts[1] and "forward was replaced" in texts[1]
    assert [type(m) for m in (model["a"], *model["b"])] == [Doubled, fastnorm.SyncBatchNorm, nn.BatchNorm2d]


class Synchronized(nn.SyncBatchNorm):
    """It synchronizes by itself."""


def test_what_synchronizes_already_is_no_cause_for_a_warning() -> None:
    model = nn.Sequential(Synchronized(4), fastnorm.SyncBatchNorm(4), nn.LayerNorm(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastnorm.convert_sync_batchnorm(model)
    assert [type(m) for m in model] == [Synchronized, fastnorm.SyncBatchNorm, nn.LayerNorm]


def test_the_process_group_is_the_one_given() -> None:
    """Of modules that synchronize already, too, as with torch.nn."""
    group = object()
    model = nn.Sequential(nn.BatchNorm1d(4), nn.SyncBatchNorm(4), fastnorm.SyncBatchNorm(4))
    fastnorm.convert_sync_batchnorm(model, group)
    assert all(m.process_group is group for m in model)
    fastnorm.convert_sync_batchnorm(model)
    assert all(m.process_group is None for m in model)


def test_copies_and_pickles() -> None:
    model = fastnorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4), fastnorm.BatchNorm1d(4)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fastnorm.revert_sync_batchnorm(other)
        assert [type(m) for m in other] == [nn.BatchNorm2d, fastnorm.BatchNorm1d]


def test_alone_it_is_an_ordinary_batch_norm() -> None:
    """Without torch.distributed: the same bits, in training and in evaluation."""
    x = torch.randn(4, 4, 3, 3)
    ours = fastnorm.SyncBatchNorm(4, activation="relu")
    other = fastnorm.BatchNorm2d(4, activation="relu")
    for training in (True, False):
        results = []
        for norm in (ours, other):
            norm.train(training)
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, norm.weight, norm.bias]), *norm.buffers()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert "fastnorm" in fastnorm.explain(x, ours)


def test_constructor() -> None:
    """torch.nn.SyncBatchNorm's, then the activation's."""
    norm = fastnorm.SyncBatchNorm(
        4, 1e-3, None, False, False, None, "cpu", torch.float64, activation="leaky_relu", activation_param=0.3
    )
    assert norm.weight is None and norm.running_mean is None and isinstance(norm, nn.SyncBatchNorm)
    assert repr(norm).endswith("track_running_stats=False, activation='leaky_relu', activation_param=0.3)")
    with pytest.raises(ValueError, match="activation"):
        fastnorm.SyncBatchNorm(4, activation="no such")
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        norm(torch.randn(3, 0))
