"""Images along edits and what an attribute classifier says of them: the raw material of ALS, LS and SVM directions.

Everything at position p is a function of (seed, p), so models are compared on edits from the same z. Truncation is off
(ψ = 1), the layer noise is fixed within a sequence, and images are quantised to 8 bits before they are classified, as
every image metric but PPL has it. In these functions `batch` counts images, `progress` is told of images newly done,
and results are this rank's share, for `positions.gathered`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.positions import draws_for, gathered, shares
from hsrgan.engine.pictures import to_uint8

FRAMES = 11  # t = 0, 0.1, …, 1
_PAIRS, _EDITS, _SAMPLES = 33, 34, 35  # streams of the draws
Progress = Callable[[int], None]


def _silent(images: int) -> None:
    pass


@dataclass(frozen=True)
class Samples:
    """Of n random images: z [n, z_dim], w [n, w_dim] and the logits [n, a] of their attributes; fp32, on the CPU."""

    z: Tensor
    w: Tensor
    logits: Tensor

    def gathered(self) -> Samples:
        """Those of all ranks, on every rank."""
        return Samples(gathered(self.z), gathered(self.w), gathered(self.logits))


@torch.no_grad()
def random_samples(
    generator: nn.Module,
    classifier: nn.Module,
    *,
    count: int,
    seed: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    class_counts: Sequence[int] = (),
    progress: Progress = _silent,
) -> Samples:
    """Random images and their attributes."""
    draws = draws_for(generator, seed, class_counts)
    parts = []
    for positions, real in shares(count, batch, rank, world_size):
        latents = draws.latents(_SAMPLES, positions, generator.z_dim)
        ws = generator.mapping(latents.z, latents.c if generator.c_dim else None)
        noise = draws.noise(_SAMPLES, positions, generator.synthesis.noise_size)
        logits = classifier(quantised(generator.synthesis(ws, noise=noise)))
        parts.append([x[:real].float().cpu() for x in (latents.z, ws[:, 0], logits)])
        progress(real)
    if not parts:  # more ranks than samples
        widths = (generator.z_dim, generator.w_dim, len(classifier.names))
        parts = [[torch.empty(0, width) for width in widths]]
    return Samples(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def random_pairs(
    generator: nn.Module,
    classifier: nn.Module,
    *,
    count: int,
    seed: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    class_counts: Sequence[int] = (),
    progress: Progress = _silent,
) -> Tensor:
    """Logits [n, FRAMES, a] fp64 along w0 → w1, both random (ALS's first kind of sequence)."""
    draws = draws_for(generator, seed, class_counts)
    parts = [torch.empty(0, FRAMES, len(classifier.names), dtype=torch.float64)]
    for positions, real in shares(count, max(1, batch // FRAMES), rank, world_size):
        images = _frames(generator, draws, _PAIRS, positions, *_pair(generator, draws, positions))
        logits = classifier(quantised(images)).unflatten(0, (-1, FRAMES))
        parts.append(logits[:real].double().cpu())
        progress(real * FRAMES)
    return torch.cat(parts)


@torch.no_grad()
def attribute_edits(
    generator: nn.Module,
    classifier: nn.Module,
    shifts: Tensor,
    *,
    count: int,
    seed: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    class_counts: Sequence[int] = (),
    progress: Progress = _silent,
) -> Tensor:
    """Logits [n, e, FRAMES, a] fp64 along w → w + shift for each of `shifts` [e, w_dim] (ALS's second kind), all from
    the same n random w. A shift is α·d, from `directions.Directions.shift`.
    """
    draws = draws_for(generator, seed, class_counts)
    parts = [torch.empty(0, len(shifts), FRAMES, len(classifier.names), dtype=torch.float64)]
    for positions, real in shares(count, max(1, batch // FRAMES), rank, world_size):
        edits = []
        for shift in shifts:
            images = _frames(generator, draws, _EDITS, positions, *_edit(generator, draws, positions, shift))
            edits.append(classifier(quantised(images)).unflatten(0, (-1, FRAMES))[:real].double().cpu())
            progress(real * FRAMES)
        parts.append(torch.stack(edits, dim=1))
    return torch.cat(parts)


@torch.no_grad()
def strip(
    generator: nn.Module, position: int, shift: Tensor | None = None, *, seed: int, class_counts: Sequence[int] = ()
) -> Tensor:
    """The frames [FRAMES, C, R, R], uint8 on the CPU, of the random pair at `position`, or of the edit by `shift`
    [w_dim] from there: what `random_pairs` and `attribute_edits` classified.
    """
    draws = draws_for(generator, seed, class_counts)
    ends = _pair(generator, draws, [position]) if shift is None else _edit(generator, draws, [position], shift)
    stream = _PAIRS if shift is None else _EDITS
    return to_uint8(_frames(generator, draws, stream, [position], *ends)).cpu()


def quantised(images: Tensor) -> Tensor:
    """Images in about [−1, 1] as their 8-bit form has them, in [−1, 1] again. `UserError` where they are not finite."""
    if not torch.isfinite(images).all():
        raise UserError("the model's images are not finite: it has diverged; take an earlier snapshot")
    return to_uint8(images).float() / 127.5 - 1


def _pair(generator: nn.Module, draws: Draws, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    latents = draws.latents(_PAIRS, positions, generator.z_dim)
    labels = latents.c if generator.c_dim else None
    return generator.mapping(latents.z, labels), generator.mapping(latents.z_mix, labels)


def _edit(generator: nn.Module, draws: Draws, positions: Sequence[int], shift: Tensor) -> tuple[Tensor, Tensor]:
    latents = draws.latents(_EDITS, positions, generator.z_dim)
    ws = generator.mapping(latents.z, latents.c if generator.c_dim else None)
    return ws, ws + shift.to(ws)


def _frames(
    generator: nn.Module, draws: Draws, stream: int, positions: Sequence[int], start: Tensor, end: Tensor
) -> Tensor:
    """Images [n·FRAMES, C, R, R] from ws `start` to `end` [n, num_ws, w_dim], sequence by sequence."""
    t = torch.linspace(0, 1, FRAMES, dtype=start.dtype, device=start.device).view(-1, 1, 1)
    ws = start[:, None].lerp(end[:, None], t)
    noise = draws.noise(stream, positions, generator.synthesis.noise_size).repeat_interleave(FRAMES, dim=0)
    return generator.synthesis(ws.flatten(0, 1), noise=noise)
