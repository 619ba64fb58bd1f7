"""Features kept for the metrics that compare images with images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hsrgan.engine.distributed import World, sum_over_ranks
from hsrgan.engine.metrics.positions import UNIT, firsts


class Features:
    """The features of positions 0 … count−1, float32 in host memory, each on the rank that computed it.

    Holds count · dim · 4 bytes over all ranks: 410 MB for 50,000 of 2048, 819 MB for 50,000 of 4096.
    """

    def __init__(self, count: int, dim: int, batch: int, world: World) -> None:
        self.count, self.dim, self.world = count, dim, world
        units = np.fromiter(firsts(count, batch, world), np.int64)
        positions = (units[:, None] + np.arange(UNIT)).reshape(-1)
        self.positions = torch.from_numpy(positions[positions < count])
        self.values = torch.empty(len(self.positions), dim)

    def add(self, features: Tensor, first: int) -> None:
        """features [n, dim] of the positions first … first + n − 1, of which those below count are kept."""
        features = features[: max(self.count - first, 0)]
        at = int(torch.searchsorted(self.positions, first))
        self.values[at : at + len(features)] = features.cpu()

    def first(self, count: int) -> Features:
        """Of the first `count` positions; shares memory."""
        few = copy.copy(self)
        few.count, mine = count, int(torch.searchsorted(self.positions, count))
        few.positions, few.values = self.positions[:mine], self.values[:mine]
        return few

    def rows(self, indices: Sequence[int], values: Tensor | None = None) -> Tensor:
        """[n, …] of those positions, from all ranks, on the device; `values`: other values of this rank's positions.

        A collective: every rank asks for the same positions.
        """
        values = self.values if values is None else values
        indices = torch.as_tensor(indices)
        at = torch.searchsorted(self.positions, indices).clamp_(max=max(len(self.positions) - 1, 0))
        mine = self.positions[at] == indices if len(self.positions) else torch.zeros_like(indices, dtype=torch.bool)
        rows = values.new_zeros(len(indices), *values.shape[1:])
        rows[mine] = values[at[mine]]
        return sum_over_ranks(rows.to(self.world.device))

    def blocks(self, size: int) -> Iterator[range]:
        """Runs of positions, at most `size` long, that cover all."""
        return (range(first, min(first + size, self.count)) for first in range(0, self.count, size))
