"""Whole models for end_to_end.py: ResNet, a U-Net and ConvNeXt in plain torch, and those of timm and diffusers.

They are written as torchvision, diffusers and the ConvNeXt paper write them, with random weights. Each takes a batch of
pictures and returns a tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (He et al. 2015, ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the stride in the second (ResNet-50 and deeper, as torchvision has it)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """block: its class; depths: blocks of the four stages."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        blocks, channels = [], 64
        for stage, depth in enumerate(depths):
            for i in range(depth):
                width = 64 << stage
                blocks.append(block(channels, width, 2 if stage and not i else 1))
                channels = width * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))


class UNetBlock(nn.Module):
    """GroupNorm, SiLU and a convolution, twice, beside the identity (diffusers' ResnetBlock2D without time)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.skip(x)


class UNet(nn.Module):
    """Down and up again with concatenations, two blocks a level. widths: channels by level."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = widths[max(level - 1, 0)]
            self.down.append(nn.Sequential(UNetBlock(inputs, width), UNetBlock(width, width)))
            self.shrink.append(nn.Conv2d(width, width, 3, 2, 1) if width != widths[-1] else nn.Identity())
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for wide, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.grow.append(nn.Conv2d(wide, width, 3, padding=1))
            self.up.append(nn.Sequential(UNetBlock(2 * width, width), UNetBlock(width, width)))
        self.norm = nn.GroupNorm(32, widths[0])
        self.last = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.first(x), []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            x = blocks(x)
            kept.append(x)
            x = shrink(x)
        kept.pop()
        for grow, blocks in zip(self.grow, self.up, strict=True):
            x = grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = blocks(torch.cat([x, kept.pop()], 1))
        return self.last(F.silu(self.norm(x)))


class ConvNeXtBlock(nn.Module):
    """A 7x7 convolution of single channels, LayerNorm of pixels, and an MLP (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.reduce(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class PixelNorm(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """widths, depths: of the four stages; by default ConvNeXt-T's."""

    def __init__(self, widths: tuple[int, ...] = (96, 192, 384, 768), depths: tuple[int, ...] = (3, 3, 9, 3)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), PixelNorm(widths[0])]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i:
                layers += [PixelNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, 2)]
            layers += [ConvNeXtBlock(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x).mean((2, 3))))


class Sample(nn.Module):
    """A model of diffusers, with what it takes beside the picture, as a model of pictures alone."""

    def __init__(self, model: nn.Module, *others: object) -> None:
        super().__init__()
        self.model, self.others = model, others

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, *self.others).sample


def _timm(name: str) -> nn.Module:
    model = importlib.import_module("timm").create_model(name, pretrained=False)
    assert isinstance(model, nn.Module)
    return model


def _diffusers_unet() -> nn.Module:
    """The noise predictor of DDPM for small pictures."""
    down, up = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    options = {"block_out_channels": (64, 128, 256), "down_block_types": down, "up_block_types": up}
    return Sample(importlib.import_module("diffusers").UNet2DModel(layers_per_block=2, **options), 10)


def _diffusers_vae() -> nn.Module:
    """An autoencoder of Stable Diffusion's kind, of half its width."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    model = importlib.import_module("diffusers").AutoencoderKL(block_out_channels=(64, 128, 256), **kinds)
    return Sample(model)


@dataclass(frozen=True)
class Model:
    """build: makes it; size: height and width of the pictures; needs: the library and what is used of it."""

    build: Callable[[], nn.Module]
    size: int = 224
    needs: tuple[str, str] | None = None


MODELS = {
    "resnet18": Model(partial(ResNet, BasicBlock, (2, 2, 2, 2))),
    "resnet50": Model(partial(ResNet, Bottleneck, (3, 4, 6, 3))),
    "unet": Model(UNet, 64),
    "convnext": Model(ConvNeXt),
    "timm/resnet50": Model(partial(_timm, "resnet50"), needs=("timm", "create_model")),
    "timm/convnext_tiny": Model(partial(_timm, "convnext_tiny"), needs=("timm", "create_model")),
    "diffusers/unet": Model(_diffusers_unet, 64, ("diffusers", "UNet2DModel")),
    "diffusers/vae": Model(_diffusers_vae, 64, ("diffusers", "AutoencoderKL")),
}


def why_absent(name: str) -> str | None:
    """Why a model of MODELS cannot be built here, or None."""
    needs = MODELS[name].needs
    if needs is None:
        return None
    library, attribute = needs
    try:
        getattr(importlib.import_module(library), attribute)  # diffusers imports it now
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # built for another torch
        return f"{library}.{attribute} cannot be imported: {type(error).__name__}: {str(error).splitlines()[-1]}"
    return None
