"""tools/kernel_builds.py for one op of a test: build_samples.py scaled_square|spilling|spilling_wide|special OPTIONS.

Run by test_builds.py in a process of its own, where @triton.jit compiles.
"""

import sys

import torch
import triton
import triton.language as tl
from scaled_square import scaled_square

from hsrgan import kernels
from hsrgan.kernels import launch
from hsrgan.tools import kernel_builds, kernel_shapes
from hsrgan.tools.kernel_shapes import Call


@triton.jit
def _softmax(X, Y, BLOCK: tl.constexpr):
    """The whole row is alive from the first load to the last store."""
    i = tl.arange(0, BLOCK)
    x = tl.exp(tl.load(X + i) - tl.max(tl.load(X + i)))
    tl.store(Y + i, x / tl.sum(x))


def spilling(x, block=8192):
    """256 values a thread of NVIDIA's warps, all alive at once."""
    y = torch.empty_like(x)
    launch.run(_softmax, (1,), x, y, BLOCK=block, num_warps=1)
    return _WithoutGradient.apply(x, y)


def spilling_wide(x):
    """512 values a thread of AMD's waves."""
    return spilling(x, 32768)


@triton.jit(do_not_specialize=["fixed"])
def _special(X, Y, one, sixteen, seven, fixed, wide, ratio, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i) * one * sixteen * seven * fixed * ratio + wide.to(tl.float32))


def special(x):
    y = torch.empty_like(x)
    launch.run(_special, (1,), x, y, 1, 16, 7, 16, 2**40, 0.5, BLOCK=128, num_warps=8, num_stages=3)
    return _WithoutGradient.apply(x, y)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        return g, None


def sample(name):
    def calls(n, c, r):
        if r == 32:
            yield Call(name, name, {"x": (n, c, r, r)} | ({"scale": (c,)} if name == "scaled_square" else {}), order=2)

    return calls


if __name__ == "__main__":
    name = sys.argv.pop(1)
    for op in (scaled_square, spilling, spilling_wide, special):
        setattr(kernels, op.__name__, op)
    kernel_shapes.OPS[:] = [sample(name)]
    kernel_builds.app()
