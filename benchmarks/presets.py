"""The layers of whole models, by the name that `bench.py --preset` takes, and the layers that a GPU's table adds.

Each preset has every norm of its model that differs in channels or in size, once. All are `Layer`s of
tests/common/cases.py, whose `BENCH` stays the table without a preset.
"""

from __future__ import annotations

from tests.common.cases import TINY, Layer

_AFFINE = (("affine", True),)


def _batch(batch: int, *sizes: tuple[int, int]) -> tuple[Layer, ...]:
    """sizes: (channels, height and width)."""
    return tuple(Layer("ResNet-50", "BatchNorm2d", (batch, c, s, s), (c,)) for c, s in sizes)


def _group(label: str, batch: int, *sizes: tuple[int, int]) -> tuple[Layer, ...]:
    return tuple(Layer(label, "GroupNorm", (batch, c, s, s), (32, c), (), ("silu",)) for c, s in sizes)


def _instance(*sizes: tuple[int, int]) -> tuple[Layer, ...]:
    shapes = ((c, (2, c, s, s, s)) for c, s in sizes)
    return tuple(Layer("nnU-Net", "InstanceNorm3d", shape, (c,), _AFFINE, ("leaky_relu",)) for c, shape in shapes)


def _layer(label: str, *sizes: tuple[int, int]) -> tuple[Layer, ...]:
    """sizes: (rows, elements of a row)."""
    return tuple(Layer(label, "LayerNorm", (n, d), (d,), (), ("gelu",)) for n, d in sizes)


# Layers that fill a GPU: the batches that ResNet-50 trains with, 3-D networks, long rows.
CUDA_LAYERS = (
    *_batch(256, (64, 112), (256, 56), (2048, 7)),
    Layer("VAE", "GroupNorm", (1, 128, 20, 256, 256), (32, 128), (), ("silu",)),
    *_group("VAE", 1, (512, 64)),
    *_instance((32, 128), (320, 8)),
    *_layer("transformer", (1024, 12288), (16384, 4096)),
)

PRESETS: dict[str, tuple[Layer, ...]] = {
    # torchvision's, at 224 x 224
    "resnet50": _batch(
        32,
        *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
        *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
    ),
    # Stable Diffusion 1's, of two latents of 64 x 64: on the way down, then behind the concatenations
    "unet": _group(
        "UNet", 2,
        *((320, 64), (320, 32), (640, 32), (640, 16), (1280, 16), (1280, 8)),
        *((2560, 8), (2560, 16), (1920, 16), (1920, 32), (1280, 32), (960, 32), (960, 64), (640, 64)),
    ),
    # Stable Diffusion's decoder, of one picture of 512 x 512
    "vae": _group("VAE", 1, (512, 64), (512, 128), (512, 256), (256, 256), (256, 512), (128, 512)),
    # patches of 128 x 128 x 128, two at a time
    "nnunet3d": _instance((32, 128), (64, 64), (128, 32), (256, 16), (320, 8), (320, 4)),
    # ConvNeXt-T, 128 pictures of 224 x 224: rows are pixels
    "convnext": _layer("ConvNeXt", (401408, 96), (100352, 192), (25088, 384), (6272, 768)),
    # ViT-B of 64 pictures; 8 texts of 512 tokens in GPT-2's widths; a long row of a large model
    "transformer": _layer("transformer", (12608, 768), (4096, 768), (4096, 1024), (4096, 1600), (4096, 4096)),
    # the host time of a call
    "tiny": (
        TINY,
        Layer("tiny", "GroupNorm", (2, 8, 4, 4), (2, 8), (), ("silu",)),
        Layer("tiny", "InstanceNorm2d", (2, 8, 4, 4), (8,), _AFFINE),
        Layer("tiny", "LayerNorm", (4, 64), (64,), (), ("gelu",)),
    ),
}  # fmt: skip
