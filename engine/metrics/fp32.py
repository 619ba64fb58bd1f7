"""Full fp32 on any device, whatever the caller's process has switched on for training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hsrgan.kernels import launch


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """No TF32 (10 bits of mantissa) in products and convolutions, PyTorch's or our kernels', and no autocast inside;
    the former state after.
    """
    ours = launch.tf32_allowed()
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    launch.allow_tf32(False)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        launch.allow_tf32(ours)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
