"""Projection: the latent and the noise whose picture is most like a given one (StyleGAN2, 1912.04958, appendix D).

    minimise over w, n:  d(G(w + ε_t, n), x) + α · L(n) [ + β · mean (G − x)² ],   ε_t ~ N(0, (0.05 · σ_w · s_t)² · I)

d is a perceptual distance (likeness.py). w starts at μ_w, the mean of 10,000 mapped latents, whose spread is
σ_w² = E ‖f(z) − μ_w‖²; n starts as N(0, 1), and each map is brought back to mean 0 and variance 1 after every step.
With t = step / steps, Adam's rate rises over the first 5 % and falls along a cosine over the last 25 %, and ε fades:

    rate_t = peak · (½ − ½ cos(π · min(1, (1 − t)/0.25))) · min(1, t/0.05),     s_t = max(0, 1 − t/0.75)²

L keeps the picture out of the noise maps: with n_j a map that was averaged over 2×2 pixels and doubled j times, to 8×8,

    L = Σ_maps Σ_j (mean n_j(x, y) · n_j(x−1, y))² + (mean n_j(x, y) · n_j(x, y−1))²,   both axes cyclic, α = 10⁵
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.fp32 import exact_fp32
from hsrgan.engine.model import Generator

SPACES = ("w", "w+")
SAMPLES, CHUNK = 10_000, 1000  # latents behind μ_w and σ_w; mapped at a time
JITTER, JITTER_END = 0.05, 0.75
RAMP_UP, RAMP_DOWN = 0.05, 0.25
NOISE_WEIGHT = 1e5  # α
LEAST_MAP = 8  # pixels of the smaller side at which the noise's pyramid ends
TOLD_EVERY = 10  # steps: reading a value waits for a GPU


class Likeness(Protocol):
    """d: what `maps` makes of two batches of images, `between` compares [N]."""

    def maps(self, images: Tensor) -> Sequence[Tensor]: ...

    def between(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Settings:
    """space "w" has one w for all layers of an image, "w+" one for each. rate: Adam's peak. pixel: β."""

    space: str = "w"
    steps: int = 1000
    rate: float = 0.1
    seed: int = 0
    pixel: float = 0.0


@dataclass(frozen=True)
class Projection:
    """w [N, num_ws, w_dim] and noise [N, noise_size] give image [N, C, H, W].

    distance, regulariser, pixel [steps + 1, N]: d, L and the mean square before each step, with that step's ε, and of
    the result, without.
    """

    w: Tensor
    noise: Tensor
    image: Tensor
    distance: Tensor
    regulariser: Tensor
    pixel: Tensor


def project(
    generator: Generator,
    target: Tensor,
    likeness: Likeness,
    settings: Settings,
    *,
    label: Tensor | None = None,
    told: Callable[[int, float], None] = lambda step, distance: None,
) -> Projection:
    """Project target [N, C, H, W] in [−1, 1], on the device of `generator`, which is in eval mode, fp32 and frozen.

    label [c_dim]: of a conditional generator, for μ_w; None takes all classes alike. told of steps done and the mean
    distance. Images do not influence each other. Raises `UserError` where the search leaves the finite numbers.
    """
    if settings.space not in SPACES:
        raise ValueError(f"space is {settings.space!r}, but must be one of {', '.join(SPACES)}")
    synthesis, n, device = generator.synthesis, len(target), target.device
    draws = torch.Generator().manual_seed(settings.seed)  # on the CPU, and one row for all images
    free = 1 if settings.space == "w" else generator.num_ws
    with exact_fp32(device):
        mean, spread = w_statistics(generator, label, settings.seed)
        w = mean.expand(n, free, -1).clone().requires_grad_()
        noise = torch.randn(1, synthesis.noise_size, generator=draws).to(device).expand(n, -1).clone().requires_grad_()
        sizes = synthesis.noise_sizes
        adam = torch.optim.Adam([w, noise])
        with torch.no_grad():
            seen = likeness.maps(target)
        history = torch.empty(3, settings.steps + 1, n, device=device)

        def terms(ws: Tensor) -> tuple[Tensor, Tensor]:
            """The image, and [3, N]: d, L, mean square."""
            image = synthesis(ws.expand(-1, generator.num_ws, -1), noise=noise)
            square = (image - target).square().mean((1, 2, 3))
            distance = likeness.between(likeness.maps(image), seen)
            return image, torch.stack([distance, noise_regulariser(noise, sizes), square])

        weights = torch.tensor([1.0, NOISE_WEIGHT, settings.pixel], device=device)
        for step in range(settings.steps):
            t = step / settings.steps
            for group in adam.param_groups:
                group["lr"] = learning_rate(t, settings.rate)
            jitter = torch.randn(1, *w.shape[1:], generator=draws).to(device) * (spread * jitter_scale(t))
            _, found = terms(w + jitter)
            adam.zero_grad()
            (weights @ found).sum().backward()
            adam.step()
            with torch.no_grad():
                noise.copy_(normalised(noise, sizes))
            history[:, step] = found.detach()
            if step % TOLD_EVERY == 0 or step + 1 == settings.steps:
                told(step + 1, float(found[0].detach().mean()))
        with torch.no_grad():
            image, history[:, -1] = terms(w)
    if not image.isfinite().all() or not history.isfinite().all():
        raise UserError(f"the projection left the finite numbers: lower --lr, which is {settings.rate:g}")
    return Projection(w.detach().expand(-1, generator.num_ws, -1).contiguous(), noise.detach(), image, *history)


@torch.no_grad()
def w_statistics(generator: Generator, label: Tensor | None, seed: int) -> tuple[Tensor, float]:
    """μ_w [w_dim] and σ_w. label [c_dim] or, for None, every class in turn."""
    device = generator.mapping.w_avg.device
    z = torch.from_numpy(np.random.RandomState(seed).randn(SAMPLES, generator.z_dim)).float().to(device)
    c = None
    if generator.c_dim:
        classes = torch.eye(generator.c_dim, device=device) if label is None else label.to(device)[None]
        c = classes[torch.arange(SAMPLES, device=device) % len(classes)]
    parts = [slice(start, start + CHUNK) for start in range(0, SAMPLES, CHUNK)]
    w = torch.cat([generator.mapping(z[part], None if c is None else c[part])[:, 0] for part in parts])
    mean = w.mean(0)
    return mean, float((w - mean).square().sum(1).mean().sqrt())


def learning_rate(t: float, peak: float) -> float:
    """Adam's rate at t in [0, 1]."""
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / RAMP_DOWN))
    return peak * down * min(1.0, t / RAMP_UP)


def jitter_scale(t: float) -> float:
    """ε's standard deviation at t in [0, 1], in σ_w."""
    return JITTER * max(0.0, 1 - t / JITTER_END) ** 2


def noise_regulariser(noise: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """L [N] of noise [N, noise_size]. A map whose side is odd is not averaged further."""
    total = noise.new_zeros(len(noise))
    for n in _maps(noise, sizes):
        while True:
            for axis in (2, 3):
                total = total + (n * n.roll(1, axis)).mean((1, 2, 3)).square()
            height, width = n.shape[2:]
            if min(height, width) <= LEAST_MAP or height % 2 or width % 2:
                break
            n = F.avg_pool2d(n, 2) * 2  # which keeps the variance of white noise
    return total


def normalised(noise: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """noise [N, noise_size] with each map at mean 0 and variance 1."""
    maps = [n.flatten(1) for n in _maps(noise, sizes)]
    maps = [n - n.mean(1, keepdim=True) for n in maps]
    return torch.cat([n * n.square().mean(1, keepdim=True).rsqrt() for n in maps], 1)


def _maps(noise: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[N, 1, h, w] of each layer."""
    rows = noise.split([height * width for height, width in sizes], dim=1)
    return [row.unflatten(1, (1, *size)) for row, size in zip(rows, sizes, strict=True)]
