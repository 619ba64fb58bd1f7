"""Kernel Inception Distance (Bińkowski et al., arXiv 1801.01401): unbiased MMD² with the kernel (x·y/d + 1)³."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hsrgan.engine.metrics.features import Features

SUBSETS, SUBSET_SIZE = 100, 1000


def kid(
    fakes: Features, reals: Features, *, seed: int, progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[float, float]:
    """Mean and population standard deviation of MMD² over 100 pairs of subsets of min(N_real, N_fake, 1000), each drawn
    without replacement. progress(subsets done, of all). A collective: subsets are put together from all ranks.
    """
    size = min(fakes.count, reals.count, SUBSET_SIZE)
    draws = np.random.RandomState(seed)  # its draws are frozen for good
    scores = []
    for done in range(SUBSETS):
        progress(done, SUBSETS)
        x, y = (side.rows(draws.choice(side.count, size, replace=False)) for side in (fakes, reals))
        scores.append(mmd2(x.double(), y.double()).item())
    progress(SUBSETS, SUBSETS)
    return float(np.mean(scores)), float(np.std(scores))


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² of x and y [m, d] (arXiv 1801.01401, eq. 4): the mean kernel within each without the diagonal,
    minus twice the mean kernel between them.
    """
    m = len(x)
    within = sum((k.sum() - k.diagonal().sum()) / (m * (m - 1)) for k in (_kernel(x, x), _kernel(y, y)))
    return within - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1]).pow_(3)
