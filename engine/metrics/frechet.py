"""The Fréchet distance of two Gaussians (Dowson and Landau, 1982), which FID (arXiv 1706.08500) takes of features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

INFINITY_COUNTS = tuple(np.linspace(5000, 50_000, 15).astype(int).tolist())  # of fakes, for FID∞


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """‖μ1 − μ2‖² + tr Σ1 + tr Σ2 − 2·tr (Σ1Σ2)^½ for float64 means [d] and covariances [d, d], of any rank.

    With S = V√λ of Σ = VλVᵀ, the trace is the sum of the singular values of S1ᵀS2: two symmetric eigenproblems and
    one singular value problem instead of a general matrix root, which also fails on singular products.
    """
    root1, root2 = _root(mean1, cov1), _root(mean2, cov2)
    cross = torch.linalg.svdvals(root1.T @ root2).sum()
    return float((mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * cross)


def _root(mean: Tensor, covariance: Tensor) -> Tensor:
    """S [d, rank] with S·Sᵀ = Σ.

    Eigenvalues below the rounding error of the sums that Σ comes from are zero: with fewer images than features most
    are, and the square root of their noise (1e-8 of the largest) would be what differs between two runs.
    """
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * (values[-1] + mean.square().sum())
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def fid_infinity(counts: list[int], distances: list[float]) -> float:
    """The intercept of the least-squares line of FID over 1/N: its value without the bias of finitely many fakes.

    Source: Chong and Forsyth, arXiv 1911.07023, eq. 6.
    """
    return float(np.polyfit(1 / np.array(counts, np.float64), distances, 1)[1])
