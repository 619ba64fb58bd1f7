"""Builds for NVIDIA of the products in fp64, in which tests compare on a GPU: fp64_builds.py --json ROWS.

Run by test_builds.py in a process of its own, where @triton.jit compiles. Spills are no matter here.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from hsrgan import kernels
from hsrgan.kernels import builds, launch


def tensors(*shapes):
    return [torch.empty(shape, dtype=torch.float64, device="meta", requires_grad=True) for shape in shapes]


if __name__ == "__main__":
    with launch.record("sm_90") as launches, kernels.use_convolution("gemm"):
        leaves = tensors((2, 3, 7, 4), (40, 3, 1, 1), (40,), (7, 40, 1, 1), (7,))
        torch.autograd.grad(kernels.feature_match(*leaves, torch.empty(2, 7, 3, 4).to(leaves[0])), leaves)
        leaves = tensors((2, 13, 3, 4), (5, 13, 3, 3), (2, 13))
        y = kernels.modulated_conv2d(*leaves, act="linear")
        torch.autograd.grad(y, leaves, torch.empty_like(y))
    rows = [{"built": asdict(built), "error": built.error} for built in builds.build_all(launches, ["sm_90"])]
    Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(rows))
