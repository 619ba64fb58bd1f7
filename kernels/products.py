"""How Triton kernels multiply matrices: the constants of tl.dot, by the dtype of the activations."""

import os

import torch
import triton.language as tl
from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.fir4_triton import accumulator


def products(x: Tensor) -> dict[str, object]:
    """The constants ACC, DOT and PRECISION: dtype of sums, of a product's operands, and its mode for fp32."""
    dot = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16}.get(x.dtype, tl.bfloat16)
    if dot == tl.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        dot = tl.float32  # the interpreter's bf16 products are garbage
    return {"ACC": accumulator(x), "DOT": dot, "PRECISION": "tf32" if launch.kind_of(x.dtype) == "tf32" else "ieee"}
