"""fastnorm.fuse on the models of torchvision, timm, diffusers and transformers, with random weights and small inputs.

Each library is optional: its tests are skipped where it is not installed. Values are compared in float64, where nothing
but the order of sums differs.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.test_fuse import fused, refusals

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CLIP = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}", exc_type=ImportError)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of whatever a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def compare(make: Callable[[], nn.Module], *inputs: Any) -> collections.Counter[str]:
    """Outputs, gradients, statistics and keys in training, outputs in evaluation, and the classes after `revert`.
    Returns how often what is fused."""
    native = make().train().double()
    ours = copy.deepcopy(native)
    names = [name for name, _ in ours.named_modules(remove_duplicate=False)]
    assert fastnorm.fuse(ours) is ours
    assert list(ours.state_dict()) == list(native.state_dict())
    assert [name for name, _ in ours.named_modules(remove_duplicate=False)] == names
    xs = [x.double() if x.is_floating_point() else x for x in inputs]
    results = []
    for model in (ours, native):
        torch.manual_seed(1)
        outputs = list(tensors(model(*xs)))
        torch.stack([y.square().mean() for y in outputs]).sum().backward()
        results.append((outputs, [p.grad for p in model.parameters()], dict(model.state_dict())))
    for actual, expected in zip(*(r[0] for r in results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    flat = [torch.cat([g.flatten() for g in r[1] if g is not None]) for r in results]
    assert (flat[0] - flat[1]).norm() <= 1e-8 * flat[1].norm()
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        evaluated = [list(tensors(model.eval()(*xs))) for model in (ours, native)]
    torch.testing.assert_close(*evaluated, rtol=1e-7, atol=1e-9)
    count = collections.Counter(fused(ours).values())
    left = refusals(ours)
    norms = [n for n, m in ours.named_modules() if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm))]
    assert all(name in left or name in fused(ours) for name in norms)  # nothing is left without a reason
    fastnorm.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in native.modules()]
    assert repr(ours) == repr(native)
    return count


TORCHVISION = {
    "resnet18": {"relu": 9, "add + relu": 8},
    "resnet50": {"relu": 33, "add + relu": 16},
    "mobilenet_v2": {"add": 10},
    "mobilenet_v3_small": {"hardswish": 18, "relu": 5, "add": 6},
    "densenet121": {"relu": 121},
    "googlenet": {"relu": 57},
    "vgg11_bn": {"relu": 8},
    "regnet_x_400mf": {"relu": 45, "add + relu": 22},
    "mnasnet0_5": {"relu": 35, "add": 10},
    "segmentation.fcn_resnet50": {"relu": 33, "add + relu": 16},
    "segmentation.deeplabv3_mobilenet_v3_large": {"relu": 17, "add": 10, "hardswish": 18},
    "video.r3d_18": {"relu": 9, "add + relu": 8},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    make: Any = library("torchvision").models
    for part in name.split("."):
        make = getattr(make, part)
    options: dict[str, Any] = {"weights": None}
    if name == "googlenet":
        options |= {"aux_logits": False, "init_weights": False}
    if name.startswith("segmentation"):
        options["weights_backbone"] = None
    count = compare(lambda: make(**options), CLIP if name.startswith("video") else IMAGE)
    assert count == TORCHVISION[name]


TIMM = {
    "resnet18": {"relu": 9, "add + relu": 8},
    "efficientnet_b0": {"silu": 33, "add": 9},
    "convnext_atto": {},
    "regnetx_002": {"relu": 27, "add + relu": 13},
    "densenet121": {"relu": 121},
    "vit_tiny_patch16_224": {},
    "res2net50_14w_8s": {"relu": 17, "add + relu": 16},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = library("timm")
    options = {"img_size": 64} if name.startswith("vit") else {}
    assert compare(lambda: timm.create_model(name, pretrained=False, **options), IMAGE) == TIMM[name]


class Sample(nn.Module):
    """A model of diffusers or transformers, whose output is an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        return tuple(self.model(*args, return_dict=False))


def test_diffusers_unet() -> None:
    diffusers = library("diffusers")
    small = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    count = compare(
        lambda: Sample(diffusers.UNet2DModel(**small, **blocks)), IMAGE[..., :16, :16], torch.tensor([3, 7])
    )
    assert count == {"silu": 17}


def test_diffusers_autoencoder() -> None:
    diffusers = library("diffusers")
    options: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 4}
    options |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    count = compare(lambda: Sample(diffusers.AutoencoderKL(**options)), IMAGE[..., :16, :16])
    assert count == {"silu": 21}


def tiny_transformers() -> dict[str, tuple[Callable[[Any], nn.Module], dict[str, int]]]:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    segformer = {
        "depths": [1] * 4,
        "hidden_sizes": [8, 16, 16, 16],
        "num_attention_heads": [1] * 4,
        "decoder_hidden_size": 16,
    }
    return {
        "resnet basic": (
            lambda t: t.ResNetModel(t.ResNetConfig(**sizes, layer_type="basic")),
            {"relu": 5, "add + relu": 4},
        ),
        "resnet bottleneck": (
            lambda t: t.ResNetModel(t.ResNetConfig(**sizes, layer_type="bottleneck")),
            {"relu": 9, "add + relu": 4},
        ),
        "regnet": (
            lambda t: t.RegNetModel(t.RegNetConfig(**sizes, groups_width=8)),
            {"relu": 9, "add + relu": 4},
        ),
        "mobilenet v1": (
            lambda t: t.MobileNetV1Model(t.MobileNetV1Config(hidden_act="relu", depth_multiplier=0.25)),
            {"relu": 27},
        ),
        "mobilenet v2": (
            lambda t: t.MobileNetV2Model(t.MobileNetV2Config(depth_multiplier=0.35)),
            {"add": 10},
        ),
        "segformer": (
            lambda t: t.SegformerForSemanticSegmentation(t.SegformerConfig(**segformer)),
            {"relu": 1},
        ),
    }


@pytest.mark.parametrize("name", tiny_transformers())
def test_transformers(name: str) -> None:
    transformers = library("transformers")
    make, expected = tiny_transformers()[name]
    assert compare(lambda: Sample(make(transformers)), IMAGE) == expected


def test_monai() -> None:
    nets = library("monai.networks.nets")
    image = torch.randn(1, 3, 16, 16)
    count = compare(lambda: nets.SegResNet(2, in_channels=3, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)), image)
    assert count == {"relu": 7}
    count = compare(lambda: nets.DynUNet(2, 3, 2, [3] * 3, [1, 2, 2], [2, 2]), image)
    assert count["leaky_relu"] == 10


@pytest.mark.parametrize("norm", ["torchvision LayerNorm2d", "torchvision FrozenBatchNorm2d", "timm LayerNorm2d"])
def test_norms_of_other_libraries(norm: str) -> None:
    owner, name = norm.split()
    library(owner)
    from_module = {"LayerNorm2d": "torchvision.models.convnext", "FrozenBatchNorm2d": "torchvision.ops.misc"}[name]
    cls = getattr(library("timm.layers.norm" if owner == "timm" else from_module), name)
    assert compare(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), cls(4), nn.SiLU()), IMAGE) == {"silu": 1}


#: timm's norms that have an activation of their own, in front of another one, and what is fused.
TIMM_NORMS: dict[str, tuple[Callable[[Any], nn.Module], dict[str, int]]] = {
    "GroupNormAct": (lambda layers: layers.GroupNormAct(4, num_groups=2), {"relu": 1}),
    "GroupNormAct, SiLU": (lambda layers: layers.GroupNormAct(4, num_groups=2, act_layer=nn.SiLU), {"silu": 1}),
    "GroupNormAct, none": (lambda layers: layers.GroupNormAct(4, num_groups=2, apply_act=False), {"sigmoid": 1}),
    "LayerNormAct": (lambda layers: layers.LayerNormAct(64), {"relu": 1}),
    "LayerNormAct, GELU": (lambda layers: layers.LayerNormAct(64, act_layer=nn.GELU), {"gelu": 1}),
    "LayerNormAct2d": (lambda layers: layers.LayerNormAct2d(4), {}),
    "LayerNormAct2d, SiLU": (lambda layers: layers.LayerNormAct2d(4, act_layer=nn.SiLU), {}),
}


@pytest.mark.parametrize("name", TIMM_NORMS)
def test_norms_with_activations_of_timms(name: str) -> None:
    make, expected = TIMM_NORMS[name]
    norm = make(library("timm").layers)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1, 0.5)
    assert compare(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), copy.deepcopy(norm), nn.Sigmoid()), IMAGE) == expected


EDITS: dict[str, Callable[[Any], Any]] = {
    "setattr": lambda m: setattr(m, "act", nn.Tanh()),
    "_modules": lambda m: m._modules.__setitem__("act", nn.Tanh()),
    "unknown": lambda m: m._modules.__setitem__("act", nn.Softplus()),
    "none": lambda m: m._modules.__setitem__("act", nn.Identity()),
    "slope": lambda m: setattr(m.act, "negative_slope", 0.7),
    "drop": lambda m: m._modules.__setitem__("drop", nn.Softplus()),
    "hooks": lambda m: m.act.register_forward_hook(lambda module, args, output: 2 * output),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("alone", [True, False])
def test_an_edited_norm_of_timms(edit: str, alone: bool) -> None:
    layers = library("timm.layers")
    norm = layers.BatchNormAct2d(3, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.1, "inplace": False})
    native = nn.Sequential(norm) if alone else nn.Sequential(norm, nn.SiLU())
    ours = fastnorm.fuse(copy.deepcopy(native))
    assert fused(ours) == {"0": "leaky_relu"}
    torch.testing.assert_close(ours(IMAGE), native(IMAGE))
    for model in (ours, native):
        EDITS[edit](model[0])
    torch.testing.assert_close(ours(IMAGE), native(IMAGE))
    torch.testing.assert_close(fastnorm.revert(ours)(IMAGE), native(IMAGE))
