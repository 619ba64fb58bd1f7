"""The exponential moving average of the generator: what is sampled, scored and exported."""

from __future__ import annotations

import torch
from torch import nn


def ema_beta(batch: int, images: int, kimg: float, rampup: float | None) -> float:
    """Decay of one step: 0.5^(batch / half-life), the half-life `kimg`·1000 images or, while the run is young,
    images·rampup.

    images: seen before this step. Source: stylegan2-ada-pytorch's training loop.
    """
    half_life = kimg * 1000
    if rampup is not None:
        half_life = min(half_life, images * rampup)
    return 0.5 ** (batch / max(half_life, 1e-8))


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, beta: float, moved: torch.Tensor | None = None) -> None:
    """average ← β·average + (1−β)·module for parameters; buffers (w_avg) are copied.

    moved []: 1, or 0 where the module has just not been changed (`Sharded.moved`), and so the average must not be
    either; it stays on the device. None: 1.
    """
    mine, theirs = list(average.parameters()), list(module.parameters())
    if moved is None:
        # lerp(a, b, 1) is b exactly, so that the first step of a ramp-up is a plain copy
        torch._foreach_lerp_(mine, theirs, 1 - beta)
    elif beta < 0.5:  # the first steps of a ramp-up: a kernel each
        torch._foreach_lerp_(mine, theirs, [moved * (1 - beta)] * len(mine))
    else:
        step = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(step, moved * (1 - beta))
        torch._foreach_add_(mine, step)
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)
