"""The memory of the CPU backend's outputs: as torch's own, and found again (csrc/torch/cpu_memory.h)."""

import io
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm


def output(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, dtype=dtype)
    return fastnorm.functional.layer_norm(x, shape[-1:]), F.layer_norm(x, shape[-1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 17, 1000, 70_001])
def test_outputs_begin_at_a_line(size: int, dtype: torch.dtype) -> None:
    tensors = [output(2, size, dtype=dtype)[0] for _ in range(5)]
    assert all(t.data_ptr() % 64 == 0 for t in tensors)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)


def test_what_torch_does_with_storages() -> None:
    y, expected = output(4, 1000)
    lazy = torch._lazy_clone(y)
    assert lazy.data_ptr() != y.data_ptr()  # which makes the copy
    torch.testing.assert_close(lazy, expected)
    torch.testing.assert_close(y.clone().share_memory_(), expected)
    y.share_memory_()
    torch.testing.assert_close(y, expected)

    y, expected = output(4, 1000)
    saved = io.BytesIO()
    torch.save(y, saved)
    saved.seek(0)
    torch.testing.assert_close(torch.load(saved), expected)
    y.resize_(8, 1000)
    torch.testing.assert_close(y[:4], expected)
    assert y.data_ptr() % 64 == 0


def test_the_profiler_hears_of_it() -> None:
    x = torch.randn(64, 1000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = fastnorm.functional.layer_norm(x, (1000,))
        nbytes = y.nbytes
        del y
    changes = [event.cpu_memory_usage for event in profile.events()]
    assert max(changes) >= nbytes
    assert min(changes) <= -nbytes


LOOP = """
import torch, fastnorm
torch.set_num_threads(1)
x = torch.randn(2, 64, 64, 64, requires_grad=True)
dy = torch.randn_like(x)
net = fastnorm.GroupNorm(8, 64)
places = []
for _ in range(40):
    y = net(x)
    (dx,) = torch.autograd.grad(y, [x], dy)
    places.append((y.data_ptr(), dx.data_ptr()))
    del y, dx
print(len(set(places[20:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep what they keep")
def test_a_loop_finds_its_outputs_places_again() -> None:
    """With torch's allocator, and scratch memory of malloc, they had 5 to 9 places and more."""
    shown = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    assert int(shown.stdout) <= 2
