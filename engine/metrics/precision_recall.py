"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991), exact, in blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hsrgan.engine.distributed import sum_over_ranks
from hsrgan.engine.metrics.features import Features

NEIGHBOURS = 3
BLOCK = 2048  # rows against rows at a time: 34 MB of distances


def precision_recall(
    fakes: Features, reals: Features, *, k: int = NEIGHBOURS, progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[float, float]:
    """Share of fakes within some real's ball, and of reals within some fake's. A ball reaches to the k-th nearest
    neighbour among its own side. progress(rows done, of all) of this rank's comparisons. A collective.
    """
    sides = (reals, fakes)
    done, total = 0, 2 * (reals.count + fakes.count)

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done, total)

    real_radii, fake_radii = (_radii(side, k, count) for side in sides)
    precision = _covered(fakes, reals, real_radii, count)
    return precision, _covered(reals, fakes, fake_radii, count)


def _radii(side: Features, k: int, count: Callable[[int], None]) -> Tensor:
    """Squared distance from each row of this rank to its (k + 1)-th nearest of all, itself included, float64 [n]."""
    nearest = torch.full((len(side.values), k + 1), torch.inf, dtype=torch.float64)
    for block in side.blocks(BLOCK):
        others = side.rows(block).double()
        for tile in _tiles(side):
            distances = squared_distances(side.values[tile].to(others), others).cpu()
            nearest[tile] = torch.cat([nearest[tile], distances], 1).topk(k + 1, largest=False).values
        count(len(block))
    return nearest.amax(1)


def _covered(points: Features, centres: Features, radii: Tensor, count: Callable[[int], None]) -> float:
    """Share of all points that lie within (≤) the ball of any centre."""
    inside = torch.zeros(len(points.values), dtype=torch.bool)
    for block in centres.blocks(BLOCK):
        rows, reach = centres.rows(block).double(), centres.rows(block, radii)
        for tile in _tiles(points):
            inside[tile] |= (squared_distances(points.values[tile].to(rows), rows) <= reach).any(1).cpu()
        count(len(block))
    return sum_over_ranks(inside.sum().to(points.world.device)).item() / points.count


def _tiles(side: Features) -> list[slice]:
    return [slice(first, first + BLOCK) for first in range(0, len(side.values), BLOCK)]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² of float64 rows [n, d], [m, d] → [n, m]; exactly 0 where rounding is all that is left, as for twins.

    float64, since in float32 the rounding of |a|² + |b|² − 2ab decides some of the `≤`, and changes with the blocks.
    """
    scale = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = scale - 2 * a @ b.T
    return distances.masked_fill_(distances <= 4 * a.shape[1] * torch.finfo(a.dtype).eps * scale, 0)
