"""Builds for NVIDIA that no layer of a model has and tests on a GPU do: products in fp64, and images a pixel high or
wide, whose size of 1 Triton makes a constant: edge_builds.py --json ROWS.

Run by test_builds.py in a process of its own, where @triton.jit compiles. Spills are no matter here.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from hsrgan import kernels
from hsrgan.kernels import builds, launch


def tensors(*shapes, dtype=torch.float64):
    return [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]


def differentiated(op, leaves, twice=False):
    ys = op(*leaves)
    ys = (ys,) if isinstance(ys, torch.Tensor) else ys
    gs = [torch.empty_like(y).requires_grad_() for y in ys]
    first = torch.autograd.grad(ys, leaves, gs, create_graph=twice)
    if twice:
        torch.autograd.grad(first, [*leaves, *gs], [torch.empty_like(t) for t in first], allow_unused=True)


def of_a_pixel(n, c, h, w):
    f = torch.empty(4, device="meta")
    x, bias, demod, image, weight, style, rgb_bias = tensors(
        (n, c, h, w), (c,), (n, c), (n, 3, h, w), (3, c, 1, 1), (n, c), (3,), dtype=torch.float32
    )
    differentiated(lambda x: kernels.upfirdn2d(x, f, padding=2), [x])
    differentiated(lambda x: kernels.upsample2d(x, f), [x])
    differentiated(lambda x: kernels.upfirdn2d(x, torch.empty(3, 2, device="meta"), padding=2), [x])
    differentiated(lambda x, b, d: kernels.bias_act(x, b, demod=d, clamp=1.0), [x, bias, demod], twice=True)
    differentiated(lambda x, b: kernels.bias_act_fir(x, f, b, padding=2, clamp=1.0), [x, bias], twice=True)
    differentiated(lambda x, b, d: kernels.fir_bias_act(x, f, b, demod=d, padding=2, clamp=1.0), [x, bias, demod])
    differentiated(lambda x, w, s, b: kernels.to_rgb(x, w, s, b, clamp=1.0), [x, weight, style, rgb_bias])
    leaves = [*tensors((n, c, 2 * h, 2 * w), dtype=torch.float32), weight, style, rgb_bias, image]
    differentiated(lambda x, w, s, b, i: kernels.to_rgb(x, w, s, b, image=i, f=f), leaves)
    with kernels.use_convolution("gemm"):
        differentiated(kernels.conv2d, [x, *tensors((5, c, 3, 3), dtype=torch.float32)])


if __name__ == "__main__":
    with launch.record("sm_90") as launches:
        with kernels.use_convolution("gemm"):
            leaves = tensors((2, 3, 7, 4), (40, 3, 1, 1), (40,), (7, 40, 1, 1), (7,))
            torch.autograd.grad(kernels.feature_match(*leaves, torch.empty(2, 7, 3, 4).to(leaves[0])), leaves)
            leaves = tensors((2, 13, 3, 4), (5, 13, 3, 3), (2, 13))
            y = kernels.modulated_conv2d(*leaves, act="linear")
            torch.autograd.grad(y, leaves, torch.empty_like(y))
        leaves, x = tensors((1, 1, 3, 3), (1, 1), dtype=torch.float32), torch.empty(1, 1, 1, 1, device="meta").half()
        differentiated(lambda w, s: tuple(kernels.modulation(w, s, x)[i] for i in (0, 2, 3)), leaves, twice=True)
        of_a_pixel(1, 16, 1, 3)
        of_a_pixel(1, 1, 3, 1)
    rows = [{"built": asdict(built), "error": built.error} for built in builds.build_all(launches, ["sm_90"])]
    Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(rows))
