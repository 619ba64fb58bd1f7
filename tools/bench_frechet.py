"""The Fréchet distance beside scipy's matrix root: `python tools/bench_frechet.py --dim 2048`."""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import torch
import typer

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.metrics.frechet import frechet_distance

app = CommandLine()


def by_scipy(mean1: torch.Tensor, cov1: torch.Tensor, mean2: torch.Tensor, cov2: torch.Tensor) -> float:
    """‖μ1 − μ2‖² + tr (Σ1 + Σ2 − 2·(Σ1Σ2)^½), as most implementations of FID compute it."""
    from scipy.linalg import sqrtm

    root = np.real(sqrtm((cov1 @ cov2).numpy()))
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root))


@app.command()
def main(
    dim: Annotated[int, typer.Option(min=2, help="Features of an image: 2048 for Inception.")] = 2048,
    images: Annotated[int, typer.Option(min=2, help="Images on each side.")] = 5000,
) -> None:
    """Both values, both times and their ratio, on random features.

    Example:

      python tools/bench_frechet.py --dim 2048
    """
    sides = []
    for seed in range(2):
        x = torch.randn(images, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).relu()
        x *= torch.linspace(1, 0.1, dim)
        sides += [x.mean(0), x.T.cov()]
    seconds = []
    for name, distance in (("ours", frechet_distance), ("scipy", by_scipy)):
        began = time.perf_counter()
        value = distance(*sides)
        seconds.append(time.perf_counter() - began)
        typer.echo(f"{name:<6} {seconds[-1]:8.2f} s   {value:.12g}")
    to_itself = frechet_distance(*sides[:2], *sides[:2])
    typer.echo(f"ratio  {seconds[1] / seconds[0]:8.1f}     ours to itself: {to_itself:.1e}")


if __name__ == "__main__":
    app()
