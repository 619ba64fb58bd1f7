"""Images along edits and what an attribute classifier says of them: the raw material of ALS, LS and SVM directions.

Everything at position p is a function of (seed, p), so models are compared on edits from the same z. Truncation is off
(ψ = 1), the layer noise is fixed within a sequence, and images are quantised to 8 bits before they are classified, as
every image metric but PPL has it. All functions but `strip` are collectives, whose result every rank has on its CPU;
`told` is told of images. class_counts: images per class of the data set, for a model with labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsrgan.engine.distributed import World
from hsrgan.engine.draws import Draws
from hsrgan.engine.labels import ClassCounts
from hsrgan.engine.metrics.attributes import AttributeClassifier
from hsrgan.engine.metrics.positions import Told, all_rows, silent
from hsrgan.engine.metrics.sampling import quantised, synthesised

FRAMES = 11  # t = 0, 0.1, …, 1
_PAIRS, _EDITS, _SAMPLES = 33, 34, 35  # streams of the draws


@dataclass(frozen=True)
class Samples:
    """Of n random images: w [n, w_dim] and the logits [n, a] of their attributes."""

    w: Tensor
    logits: Tensor


@torch.no_grad()
def random_samples(
    generator: nn.Module,
    classifier: AttributeClassifier,
    *,
    count: int,
    seed: int,
    world: World,
    class_counts: ClassCounts = (),
    told: Told = silent,
) -> Samples:
    """Random images and their attributes."""
    draws = Draws(seed, world.device, class_counts)

    def rows(positions: range) -> Tensor:
        latents = draws.latents(_SAMPLES, positions, generator.z_dim)
        ws = generator.mapping(latents.z, latents.c)
        noise = draws.noise(_SAMPLES, positions, generator.synthesis.noise_size)
        return torch.cat([ws[:, 0], _logits(generator, classifier, ws, noise)], dim=1)

    width = generator.w_dim, len(classifier.names)
    return Samples(*all_rows(count, [sum(width)], world, rows, told).split(width, dim=1))


@torch.no_grad()
def random_pairs(
    generator: nn.Module,
    classifier: AttributeClassifier,
    *,
    count: int,
    seed: int,
    world: World,
    class_counts: ClassCounts = (),
    told: Told = silent,
) -> Tensor:
    """Logits [n, FRAMES, a] along w0 → w1, both random (ALS's first kind of sequence)."""
    draws = Draws(seed, world.device, class_counts)

    def rows(positions: range) -> Tensor:
        ws, noise = _pair(generator, draws, positions)
        return _logits(generator, classifier, ws, noise).unflatten(0, (-1, FRAMES))

    return all_rows(count, [FRAMES, len(classifier.names)], world, rows, lambda done: told(done * FRAMES))


@torch.no_grad()
def attribute_edits(
    generator: nn.Module,
    classifier: AttributeClassifier,
    shifts: Tensor,
    *,
    count: int,
    seed: int,
    world: World,
    class_counts: ClassCounts = (),
    told: Told = silent,
) -> Tensor:
    """Logits [n, e, FRAMES, a] along w → w + shift for each of `shifts` [e, w_dim] (ALS's second kind), all from the
    same n random w. A shift is α·d, from `directions.Directions.shift`.
    """
    draws = Draws(seed, world.device, class_counts)

    def edits(shift: Tensor) -> Tensor:
        def rows(positions: range) -> Tensor:
            ws, noise = _edit(generator, draws, positions, shift)
            return _logits(generator, classifier, ws, noise).unflatten(0, (-1, FRAMES))

        return all_rows(count, [FRAMES, len(classifier.names)], world, rows, lambda done: told(done * FRAMES))

    return torch.stack([edits(shift) for shift in shifts], dim=1)


@torch.no_grad()
def strip(
    generator: nn.Module,
    position: int,
    shift: Tensor | None = None,
    *,
    seed: int,
    device: torch.device,
    class_counts: ClassCounts = (),
) -> Tensor:
    """The frames [FRAMES, C, R, R], uint8 on the CPU, of the random pair at `position`, or of the edit by `shift`
    [w_dim] from there: what `random_pairs` and `attribute_edits` classified.
    """
    draws = Draws(seed, device, class_counts)
    ws, noise = _pair(generator, draws, [position]) if shift is None else _edit(generator, draws, [position], shift)
    return torch.cat([quantised(generator.synthesis(w[None], noise=noise)) for w in ws]).cpu()


def _pair(generator: nn.Module, draws: Draws, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    latents = draws.latents(_PAIRS, positions, generator.z_dim)
    ends = [generator.mapping(z, latents.c) for z in (latents.z, latents.z_mix)]
    return _between(*ends), draws.noise(_PAIRS, positions, generator.synthesis.noise_size)


def _edit(generator: nn.Module, draws: Draws, positions: Sequence[int], shift: Tensor) -> tuple[Tensor, Tensor]:
    latents = draws.latents(_EDITS, positions, generator.z_dim)
    ws = generator.mapping(latents.z, latents.c)
    return _between(ws, ws + shift.to(ws)), draws.noise(_EDITS, positions, generator.synthesis.noise_size)


def _between(start: Tensor, end: Tensor) -> Tensor:
    """ws [n·FRAMES, num_ws, w_dim] from `start` to `end` [n, num_ws, w_dim], sequence by sequence."""
    t = torch.linspace(0, 1, FRAMES, dtype=start.dtype, device=start.device).view(-1, 1, 1)
    return start[:, None].lerp(end[:, None], t).flatten(0, 1)


def _logits(generator: nn.Module, classifier: AttributeClassifier, ws: Tensor, noise: Tensor) -> Tensor:
    """[N, a] of the images of ws [N, num_ws, w_dim], as `synthesised` makes them."""
    images = (quantised(part).float() / 127.5 - 1 for part in synthesised(generator, ws, noise))
    return torch.cat([classifier(part) for part in images])
