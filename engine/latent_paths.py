"""How latents move through a video: a cubic spline through key frames in W or W+, and the swing of an edit."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class KeyFrames:
    """A path through ws [K, …] at the times 0, 1, …, K − 1; a loop goes on to the first again at time K.

    Twice continuously differentiable everywhere: the loop's spline is periodic, the other's ends are natural. One key
    is a path that stays.
    """

    def __init__(self, ws: Tensor, *, loop: bool) -> None:
        from scipy.interpolate import CubicSpline

        self._first, self.keys = ws[0], len(ws)
        self.length = self.keys if loop else self.keys - 1  # in keys
        if self.keys > 1:
            points = (torch.cat([ws, ws[:1]]) if loop else ws).double().numpy()
            ends = "periodic" if loop else "natural"
            self._spline = CubicSpline(np.arange(len(points)), points, bc_type=ends)

    def at(self, times: Tensor) -> Tensor:
        """[T, …] fp32 at `times` [T]."""
        if self.keys == 1:
            return self._first.expand(len(times), *self._first.shape)
        return torch.from_numpy(self._spline(times.double().numpy())).float()


def swing(low: float, high: float, share: float, *, loop: bool) -> float:
    """An edit's strength when `share` of the video has passed: low → high, in a loop back to low, smoothly."""
    turns = 1 if loop else 0.5
    return low + (high - low) * (1 - math.cos(2 * math.pi * turns * share)) / 2
