"""fastnorm.enable under real models and under tools that look a class up exactly: nothing but the kernels changes.

Needs the packages of requirements-models.txt (`make test-models`); what is absent is skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def torchvision_model(name: str, size: int = 64, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, weights=None, num_classes=10, **options)
    return model, {"x": torch.randn(2, 3, size, size)}


def timm_model(name: str, size: int = 64, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10, **options), {"x": torch.randn(2, 3, size, size)}


def unet() -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, **blocks)
    return model, {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 5])}


def vae() -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    names = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = diffusers.AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, **names)
    return model, {"sample": torch.randn(2, 3, 32, 32)}


def transformer(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokens = {"input_ids": torch.arange(12).view(2, 6)}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=20, **small)), tokens
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=32, n_layer=2, n_head=2)
        return transformers.GPT2Model(config), tokens
    if kind == "vit":
        config = transformers.ViTConfig(image_size=32, patch_size=8, **small)
        return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ResNetModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "torchvision resnet18": lambda: torchvision_model("resnet18"),
    "torchvision densenet121": lambda: torchvision_model("densenet121"),
    "torchvision mobilenet_v3_small": lambda: torchvision_model("mobilenet_v3_small"),
    "torchvision convnext_tiny": lambda: torchvision_model("convnext_tiny"),
    "torchvision swin_t": lambda: torchvision_model("swin_t"),
    "timm resnet18": lambda: timm_model("resnet18"),
    "timm convnext_atto": lambda: timm_model("convnext_atto"),
    "timm vit_tiny": lambda: timm_model("vit_tiny_patch16_224", img_size=64),
    "timm efficientnet_b0": lambda: timm_model("efficientnet_b0"),
    "timm regnetx_002": lambda: timm_model("regnetx_002"),
    "timm densenet121": lambda: timm_model("densenet121"),
    "diffusers UNet2DModel": unet,
    "diffusers AutoencoderKL": vae,
    "transformers BERT": lambda: transformer("bert"),
    "transformers GPT-2": lambda: transformer("gpt2"),
    "transformers ViT": lambda: transformer("vit"),
    "transformers ResNet": lambda: transformer("resnet"),
}


def first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def step(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Output, gradients and buffers of a training step, and the output in evaluation."""
    model = copy.deepcopy(model).train()
    positional = [inputs["x"]] if "x" in inputs else []
    named = {} if positional else inputs
    torch.manual_seed(1)  # dropout
    y = first_tensor(model(*positional, **named))
    y.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        evaluated = first_tensor(model.eval()(*positional, **named))
    return [y.detach(), *gradients, *model.buffers(), evaluated]


def calls() -> tuple[int, int]:
    rows = list(fastnorm.report())
    return sum(row.served_calls for row in rows), sum(row.left_calls for row in rows)


@pytest.mark.parametrize("name", MODELS)
def test_same_values(name: str) -> None:
    """In float64, where a wrong formula cannot hide behind rounding; every norm called is served."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected, before = step(model, inputs), calls()
    with fastnorm.enabled():
        actual = step(model, inputs)
    served, left = (now - then for now, then in zip(calls(), before, strict=True))
    norms = sum(isinstance(module, NORMS) for module in model.modules())
    assert left == 0, fastnorm.report()
    assert served >= 2 * norms > 0, "forward and evaluation of each norm"
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-9)


def test_monai_metatensor() -> None:
    monai = pytest.importorskip("monai")
    x = monai.data.MetaTensor(torch.randn(2, 4, 5, 6, 7), affine=torch.eye(4) * 2)
    norm = nn.InstanceNorm3d(4, affine=True)
    expected, before = norm(x), calls()
    with fastnorm.enabled():
        actual = norm(x)
    assert type(actual) is type(expected) is monai.data.MetaTensor
    assert torch.equal(actual.affine, expected.affine)
    assert calls() == (before[0] + 1, before[1])
    torch.testing.assert_close(actual.as_tensor(), expected.as_tensor())


# ---- tools that compare classes ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.bn(self.conv(x))).mean((2, 3)))


def eager_quantization(model: nn.Module, x: Tensor) -> Any:
    from torch.ao import quantization

    wrapped = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub())
    fused = quantization.fuse_modules(wrapped.eval(), [["1.conv", "1.bn", "1.relu"]])
    fused.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(fused)
    y = prepared(x)
    converted = quantization.convert(prepared)
    return y, prepared, converted(x), converted


def quantization_aware_training(model: nn.Module, x: Tensor) -> Any:
    from torch.ao import quantization

    fused = quantization.fuse_modules_qat(model.train(), [["conv", "bn", "relu"]])
    wrapped = nn.Sequential(quantization.QuantStub(), fused, quantization.DeQuantStub()).train()
    wrapped.qconfig = quantization.get_default_qat_qconfig("x86")
    prepared = quantization.prepare_qat(wrapped)
    y = prepared(x)
    y.sum().backward()
    gradients = [p.grad for p in prepared.parameters()]
    converted = quantization.convert(prepared.eval())
    return y, gradients, prepared, converted(x), converted


def fx_quantization(model: nn.Module, x: Tensor) -> Any:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    prepared = quantize_fx.prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (x,))
    y, before = prepared(x), structure(prepared)
    converted = quantize_fx.convert_fx(prepared)
    return y, before, converted(x), converted


def fx_fuse(model: nn.Module, x: Tensor) -> Any:
    from torch.fx.experimental import optimization

    fused = optimization.fuse(model.eval())
    return fused(x), fused


def opacus_validator(model: nn.Module, x: Tensor) -> Any:
    validators = pytest.importorskip("opacus.validators")
    errors = validators.ModuleValidator.validate(model.train())
    fixed = validators.ModuleValidator.fix(model)
    assert errors
    return fixed(x), fixed, list(map(str, errors))


def opacus_gradients(model: nn.Module, x: Tensor) -> Any:
    opacus = pytest.importorskip("opacus")
    model.bn = nn.GroupNorm(2, 8)
    sampled = opacus.GradSampleModule(model)
    sampled(x).square().sum().backward()
    return [p.grad_sample for p in sampled.parameters()]


def captum_attributions(model: nn.Module, x: Tensor) -> Any:
    attr = pytest.importorskip("captum.attr")
    model.eval()
    integrated = attr.IntegratedGradients(model).attribute(x, target=1, n_steps=5)
    return integrated, attr.DeepLift(model).attribute(x, target=1)


def backpack_extension(model: nn.Module, x: Tensor) -> Any:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    net = nn.Sequential(model.conv, model.bn, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    net, loss = backpack.extend(net), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.BatchGrad()):
        loss(net(x), torch.tensor([0, 1])).backward()
    return [p.grad_batch for p in net.parameters()]


def thop_profile(model: nn.Module, x: Tensor) -> Any:
    thop = pytest.importorskip("thop")
    return thop.profile(model.eval(), (x,), verbose=False)


def ptflops_complexity(model: nn.Module, x: Tensor) -> Any:
    ptflops = pytest.importorskip("ptflops")
    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False, "backend": "pytorch"}
    return ptflops.get_model_complexity_info(model.eval(), (3, 8, 8), **options)


def class_check(model: nn.Module, x: Tensor) -> Any:
    """As yolov5 and its like choose what decays, and how BatchNorms are fused and initialised."""
    return [name for name, module in model.named_modules() if type(module) is nn.BatchNorm2d], model(x)


TOOLS = (
    eager_quantization,
    quantization_aware_training,
    fx_quantization,
    fx_fuse,
    opacus_validator,
    opacus_gradients,
    captum_attributions,
    backpack_extension,
    thop_profile,
    ptflops_complexity,
    class_check,
)

#: They fold batch norms into convolutions, by arithmetic of their own, before anything runs.
FOLDED = (eager_quantization, fx_quantization, fx_fuse)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_tools_see_torchs_classes(tool: Callable[[nn.Module, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 3, 8, 8)

    def run() -> Any:
        torch.manual_seed(1)
        return tool(copy.deepcopy(model), x.clone())

    expected, before = run(), calls()
    with fastnorm.enabled():
        actual = run()
    served, left = (now - then for now, then in zip(calls(), before, strict=True))
    assert left == 0
    assert (served == 0) == (tool in FOLDED), "a norm that is called is served"
    assert_same(actual, expected)


def structure(model: nn.Module) -> dict[str, Any]:
    """All that a model is made of: classes of modules, code of graphs, parameters, buffers and packed weights."""
    modules = dict(model.named_modules())
    return {
        "classes": {name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in modules.items()},
        "code": {name: m.code for name, m in modules.items() if isinstance(m, torch.fx.GraphModule)},
        "state": {name: t.clone() if isinstance(t, Tensor) else t for name, t in model.state_dict().items()},
        "modes": {name: m.training for name, m in modules.items()},
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
    }


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    elif isinstance(expected, nn.Module):
        assert_same(structure(actual), structure(expected))
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert_same(list(actual.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    else:
        assert actual == expected
