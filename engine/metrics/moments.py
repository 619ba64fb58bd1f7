"""Sums of features for means and covariances, streamed: float64 on the device, one all-reduce at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hsrgan.engine.distributed import sum_over_ranks


@dataclass(frozen=True)
class Gaussian:
    """count N, total Σx [d] and outer Σxxᵀ [d, d] of features x, float64."""

    count: int
    total: Tensor
    outer: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self, ddof: int = 1) -> Tensor:
        """(Σxxᵀ − N·μμᵀ) / (N − ddof): 1 for EDM2's, torch-fidelity's and clean-fid's, 0 for NVIDIA's StyleGANs'."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - ddof)


class Moments:
    """Sums over the features of positions 0 … N−1 for every N of `bounds`, in one pass.

    Holds (1 + dim + dim²) · 8 bytes for each bound, 34 MB at 2048, and keeps no feature.
    """

    def __init__(self, dim: int, bounds: Iterable[int], device: torch.device | str) -> None:
        self.dim, self.bounds = dim, sorted(set(bounds))
        self.sums = torch.zeros(len(self.bounds), 1 + dim + dim * dim, dtype=torch.float64, device=device)

    def add(self, features: Tensor, first: int) -> None:
        """features [n, dim] of the positions first … first + n − 1."""
        for sums, (low, high) in zip(self.sums, pairwise([0, *self.bounds]), strict=True):
            part = features[max(low - first, 0) : max(high - first, 0)].double()
            if len(part):
                sums[0] += len(part)
                sums[1 : 1 + self.dim] += part.sum(0)
                sums[1 + self.dim :].view(self.dim, self.dim).addmm_(part.T, part)

    def reduce(self) -> dict[int, Gaussian]:
        """The sums of all ranks, by bound, on the host. A collective; call it once, after the last `add`."""
        sums = sum_over_ranks(self.sums).cumsum_(0).cpu()
        return {
            bound: Gaussian(int(row[0]), row[1 : 1 + self.dim], row[1 + self.dim :].view(self.dim, self.dim))
            for bound, row in zip(self.bounds, sums, strict=True)
        }
