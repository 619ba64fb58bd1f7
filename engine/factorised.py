"""Directions in W without labels: from G's weights (SeFa), or from many w (PCA).

SeFa (Shen and Zhou, 2007.06600, eq. 5–8): a layer's style is A w + b, so a step d changes it by A d. The unit vectors
that change the styles of the chosen layers most are the eigenvectors of AᵀA with the largest eigenvalues, where A
[Σ channels, w_dim] stacks these layers' affine weights with every row at unit length.
PCA (GANSpace, Härkönen et al., 2004.02546, §3.1): the principal components of random w.

A sign is arbitrary in both: the entry of largest size is made positive.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.directions import Directions, Layers
from hsrgan.engine.model import Generator
from hsrgan.engine.sampler import BATCH

_STREAM = 36  # of the draws; 33–35 are those of engine.metrics.sequences


def check_count(count: int, samples: int, generator: Generator) -> None:
    """Raise `UserError` for more directions than W has dimensions, or too few random w to tell them apart."""
    if count > generator.w_dim:
        raise UserError(f"--count {count}: W has {generator.w_dim} dimensions; give that or less")
    if samples <= generator.w_dim:
        raise UserError(f"--samples {samples}: W has {generator.w_dim} dimensions; give ten times as many, or more")


@torch.no_grad()
def random_w(
    generator: Generator, count: int, seed: int, *, batch: int = BATCH, told: Callable[[int], None] = lambda n: None
) -> np.ndarray:
    """w [count, w_dim] fp64 of random z and random classes, ψ = 1; told is given the number newly made."""
    device = generator.mapping.w_avg.device
    draws = Draws(seed, device, [1] * generator.c_dim)
    found = []
    for start in range(0, count, batch):
        positions = range(start, min(start + batch, count))
        latents = draws.latents(_STREAM, positions, generator.z_dim)
        found.append(generator.mapping(latents.z, latents.c)[:, 0].double().cpu())
        told(len(positions))
    return torch.cat(found).numpy()


def style_weights(generator: Generator, layers: Layers | None = None) -> Tensor:
    """A [Σ channels, w_dim] fp64 of the layers that read ws[first] … ws[last], each row of unit length.

    ws[i] is the i-th convolution's, the last one the last toRGB's; the other toRGBs share a w with a convolution.
    """
    synthesis = generator.synthesis
    blocks = [getattr(synthesis, f"b{r}") for r in synthesis.resolutions]
    affines = [layer.affine for block in blocks for layer in block.layers] + [blocks[-1].torgb.affine]
    first, last = layers or (0, generator.num_ws - 1)
    stacked = torch.cat([affine.weight.detach().cpu().double() for affine in affines[first : last + 1]])
    return torch.nn.functional.normalize(stacked, dim=1)


def sefa(generator: Generator, count: int, layers: Layers | None, *, w: np.ndarray, snapshot: str) -> Directions:
    """The `count` strongest directions. w [n, w_dim]: random ones, for the deviation along each."""
    a = style_weights(generator, layers).numpy()
    values, vectors = np.linalg.eigh(a.T @ a)
    order = np.argsort(values)[::-1][:count]
    return _named("sefa", vectors.T[order], values[order] / values.sum(), layers, w, snapshot)


def pca(count: int, layers: Layers | None, *, w: np.ndarray, snapshot: str) -> Directions:
    """The first `count` principal components of w [n, w_dim]; `layers` are those that an edit is to move."""
    from sklearn.decomposition import PCA

    found = PCA(count, svd_solver="full").fit(w)
    return _named("pca", found.components_, found.explained_variance_ratio_, layers, w, snapshot)


def _named(
    kind: str, vectors: np.ndarray, quality: np.ndarray, layers: Layers | None, w: np.ndarray, snapshot: str
) -> Directions:
    largest = vectors[np.arange(len(vectors)), np.abs(vectors).argmax(1)]
    vectors = vectors * np.sign(largest)[:, None]
    return Directions(
        names=tuple(f"{kind}{i}" for i in range(len(vectors))),
        vectors=torch.from_numpy(vectors.copy()).float(),
        quality=tuple(quality.tolist()),
        std=tuple((w @ vectors.T).std(0).tolist()),
        snapshot=snapshot,
        samples=len(w),
        kind=kind,
        layers=(layers,) * len(vectors),
    )
