"""What G and D play against each other for in their main phases: a sum over critics, of which StyleGAN2's D is one.

Pure functions of tensors, so that a phase's gradients can be a CUDA graph (graphs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hsrgan.engine.losses import Adversarial


class Critic(NamedTuple):
    """One discriminator. score(images, c, parts) gives its logits, [N, K] for each of its levels, whose losses are
    summed; the images are `parts` batches of equal length, one after another.

    suffix: of its names in the log. weight: of its loss, for G and D alike.
    """

    suffix: str
    score: Callable[[Tensor, Tensor, int], Sequence[Tensor]]
    loss: Adversarial
    weight: float = 1.0


def generator_loss(critics: Sequence[Critic], images: Tensor, c: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · Σ_levels g(fake, real) over the critics, and what the meter is told. images: fakes, followed by as
    many reals if one of the losses is paired; c: labels of all.
    """
    fakes, reals, of_fakes, of_reals = images, None, c, None
    if any(critic.loss.paired for critic in critics):
        (fakes, reals), (of_fakes, of_reals) = images.chunk(2), c.chunk(2)
    parts, told = [], {}
    for critic in critics:
        scores = critic.score(fakes, of_fakes, 1)
        others: Sequence[Tensor | None] = [None] * len(scores)
        if critic.loss.paired:
            with torch.no_grad():  # constants to G
                others = critic.score(reals, of_reals, 1)
        loss = _sum([critic.loss.g(fake, real) for fake, real in zip(scores, others, strict=True)])
        parts.append(critic.weight * loss)
        told |= {f"loss/G{critic.suffix}": loss, f"score/fake{critic.suffix}": _flat(scores)}
    return _sum(parts), told


def discriminator_loss(critics: Sequence[Critic], images: Tensor, c: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · Σ_levels d(fake, real) over the critics, and what the meter is told. images: fakes, followed by as
    many reals, which each critic scores in one pass; c: labels of all.
    """
    parts, told = [], {}
    for critic in critics:
        both = [scores.chunk(2) for scores in critic.score(images, c, 2)]
        loss = _sum([critic.loss.d(fake, real) for fake, real in both])
        parts.append(critic.weight * loss)
        fake, real = (_flat(scores) for scores in zip(*both, strict=True))
        name = critic.suffix
        told |= {f"score/fake_d{name}": fake, f"score/real{name}": real, f"loss/D{name}": loss}
    return _sum(parts), told


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0])


def _flat(scores: Sequence[Tensor]) -> Tensor:
    return scores[0] if len(scores) == 1 else torch.cat([level.flatten() for level in scores])
