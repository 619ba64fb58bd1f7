"""Power-function averages of the generator, and any other length from them after training.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, §3 and
appendix C. The average of exponent γ after t steps weighs the parameters of step τ by p(τ) = (γ+1) τ^γ / t^(γ+1), so
that its window grows with the run. Its length is told as σ_rel, the standard deviation of p relative to t.

A stored average is a point in the space of all averages of one run; averages of other lengths are linear combinations
of them as far as their profiles p are. Time is counted in images here: only ratios matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 12**-0.5  # σ_rel of γ = 0, the plain mean of the whole run


def length_of(gamma: float) -> float:
    """σ_rel of the exponent γ: √(γ+1) / ((γ+2) √(γ+3))."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


@functools.lru_cache
def exponent_of(length: float) -> float:
    """γ of a length σ_rel in (0, LONGEST]: the largest root of (γ+2)² (γ+3) σ² = γ + 1."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_beta(batch: int, images: int, length: float) -> float:
    """Decay of one step, (1 − 1/t)^(γ+1) at the step that ends with `images` + `batch` images. It is 0 in the first.

    It makes the average exactly that of the profile, if parameters are constant within a step, whatever the batch.
    """
    return (images / (images + batch)) ** (exponent_of(length) + 1)


def part_name(length: float) -> str:
    """Of an average in a checkpoint."""
    return f"G_power-{length:.3f}"


def inner_product(time_a, gamma_a, time_b, gamma_b):
    """∫ p_a p_b dτ of two profiles that end at time_a and time_b; arrays broadcast."""
    until = np.minimum(time_a, time_b)
    both = (until / time_a) ** gamma_a * (until / time_b) ** gamma_b * until / (time_a * time_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * both


class Fit(NamedTuple):
    """weights [N] of the stored averages, fp64, which sum to 1. residual: the L2 distance of the profile that they make
    to the wanted one, over the wanted one's norm.
    """

    weights: np.ndarray
    residual: float


def fit(times: Sequence[float], lengths: Sequence[float], at: float, length: float) -> Fit:
    """The combination of averages (each of `lengths`, ended at `times` ≤ `at`) nearest to that of `length` ended at
    `at`: least squares over profiles.

    The sum of the weights is held at 1, which the paper leaves to the fit: few averages would else scale the network.
    """
    time, gamma = np.asarray(times) / at, np.array([exponent_of(one) for one in lengths])
    wanted, count = exponent_of(length), len(time)
    products = inner_product(time[:, None], gamma[:, None], time[None], gamma[None])
    with_wanted, norm = inner_product(time, gamma, 1.0, wanted), inner_product(1.0, wanted, 1.0, wanted)
    system = np.ones((count + 1, count + 1))  # the sum's Lagrange multiplier comes last
    system[:count, :count], system[count, count] = products, 0.0
    weights = np.linalg.lstsq(system, np.append(with_wanted, 1.0), rcond=None)[0][:count]
    squared = norm - 2 * weights @ with_wanted + weights @ products @ weights
    return Fit(weights, math.sqrt(max(squared, 0.0) / norm))
