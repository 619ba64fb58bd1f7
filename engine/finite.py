"""Watch over the gradients: steps that are not finite are counted and named on the device, and read once a tick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS = "its loss"


@dataclass(frozen=True)
class NotFinite:
    """Of `steps`, so many were not finite. first: the first parameter of the first of them whose gradient was not
    (`LOSS` where only the loss was not); of: how many parameters that step concerned.
    """

    count: int
    steps: int
    first: str = ""
    of: int = 0

    def __str__(self) -> str:
        others = f" and {self.of - 1} more" if self.of > 1 else ""
        return f"{self.count} of {self.steps} steps were not finite, first {self.first}{others}"


class Finite:
    """For one network, whose parameters' names these are, in order."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = [*names, LOSS]
        self.found = torch.zeros((), device=device)  # 1 where the last step was not finite
        self._moved = torch.zeros((), device=device)
        self._count = torch.zeros((), device=device)
        self._first = torch.zeros(len(self._names), device=device)
        self._steps = 0

    def check(self, gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
        """1 [] if a gradient of this rank or its loss is not finite, for each parameter and the loss, [P + 1]."""
        largest = [*torch._foreach_norm(list(gradients), torch.inf), loss.abs().float()]
        return 1 - torch.isfinite(torch.stack(largest)).float()

    def count(self, bad: Tensor) -> Tensor:
        """Note a step. bad: of `check`, the largest over the ranks. Returns `found`."""
        self.found = bad.amax()
        self._moved = torch.maximum(self._moved, 1 - self.found)
        self._first = torch.where(self._count > 0, self._first, bad)
        self._count = self._count + self.found
        self._steps += 1
        return self.found

    def moved(self) -> Tensor:
        """1 [] if any step since the last call was finite, else 0."""
        moved, self._moved = self._moved, torch.zeros_like(self._moved)
        return moved

    def collect(self) -> NotFinite:
        """What was noted since the last call, the same on every rank, and clear."""
        count, *first = torch.cat([self._count[None], self._first]).tolist()
        steps, self._steps = self._steps, 0
        self._count, self._first = torch.zeros_like(self._count), torch.zeros_like(self._first)
        named = [name for name, bad in zip(self._names, first, strict=True) if bad]
        layers = [name for name in named if name != LOSS]
        return NotFinite(int(count), steps, (named or [""])[0], len(layers))
