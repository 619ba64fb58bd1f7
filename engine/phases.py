"""The phases of a training step, as data: which network they step, how often, on what share of the batch, and their
loss.

StyleGAN2's four (arXiv 1912.04958): main and lazy path-length phases of G, main and lazy R1 phases of D. HSR (arXiv
2208.03764) is one term of G's main phase. A loss is a mean over the phase's images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hsrgan.engine import losses
from hsrgan.engine.config import Recipe
from hsrgan.engine.distributed import Sharded, World, gathered, mean_over_ranks
from hsrgan.engine.draws import Draws, Latents, interleaved
from hsrgan.engine.hsr import hsr_term
from hsrgan.engine.stats import Meter


class GeneratorWithHeads(nn.Module):
    """What G's optimiser trains: the generator, and HSR's prediction heads where HSR is on."""

    def __init__(self, generator: nn.Module, heads: nn.Module | None):
        super().__init__()
        self.generator, self.heads = generator, heads


@dataclass(frozen=True)
class Round:
    """One round of a phase on one rank: the numbers of its images in the run, their latents, and the reals at the
    same positions.

    reals: [n, C, R, R] in [−1, 1], real_c [n, num_classes].
    cutoff: where style mixing takes the second z. images: seen before this step.
    """

    stream: int
    positions: Sequence[int]
    latents: Latents
    cutoff: int
    images: int
    reals: torch.Tensor
    real_c: torch.Tensor


@dataclass
class Training:
    """Everything that the phases share. `pl_mean` is a device tensor, one value the same on all ranks."""

    recipe: Recipe
    world: World
    draws: Draws
    g: Sharded
    d: Sharded
    teacher: nn.Module | None
    meter: Meter
    pl_mean: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def generator(self) -> nn.Module:
        return self.g.module.generator

    @property
    def discriminator(self) -> nn.Module:
        return self.d.module

    def styles(self, batch: Round) -> torch.Tensor:
        """ws [n, num_ws, w_dim], mixed from two latents at the cutoff."""
        mapping, (z, z_mix, c) = self.generator.mapping, batch.latents
        if batch.cutoff == self.generator.num_ws:
            return mapping(z, c)
        ws, mixed = mapping(torch.cat([z, z_mix]), torch.cat([c, c])).chunk(2)
        return torch.cat([ws[:, : batch.cutoff], mixed[:, batch.cutoff :]], dim=1)

    def noise(self, batch: Round) -> torch.Tensor:
        return self.draws.noise(batch.stream, batch.positions, self.generator.synthesis.noise_size)

    def add_to_mean(self, name: str, values: torch.Tensor) -> None:
        """Collect values [n, …] whose mean over the phase's whole batch is taken by `phase_mean`."""
        total, count = values.detach().sum(0), values.shape[0]
        if name in self.sums:
            total, count = self.sums[name][0] + total, self.sums[name][1] + count
        self.sums[name] = (total, count)

    def phase_mean(self, name: str) -> torch.Tensor:
        total, count = self.sums.pop(name)
        return mean_over_ranks(total / count)


class Phase:
    """name; network "G" or "D"; stream: which random numbers are its own; interval in steps; shrink: it works on the
    first 1/shrink of the global batch.
    """

    name: str
    network: str
    stream: int
    shrink = 1

    def __init__(self, training: Training, interval: int = 1):
        self.training, self.interval = training, interval

    def loss(self, batch: Round) -> torch.Tensor:
        raise NotImplementedError  # every phase below defines it

    def finish(self) -> None:
        """Called once after the last round, outside any graph."""


class GMain(Phase):
    """Non-saturating logistic loss, plus λ·L_HSR on the un-augmented fake while λ > 0."""

    name, network, stream = "Gmain", "G", 0

    def loss(self, batch: Round) -> torch.Tensor:
        t = self.training
        hsr = t.recipe.hsr
        weight = losses.hsr_weight(batch.images / 1000, hsr.weight, hsr.start_kimg, hsr.ramp_kimg) if hsr else 0.0
        ws, noise = t.styles(batch), t.noise(batch)
        if weight > 0:
            fakes, features = t.generator.synthesis(ws, noise=noise, return_features=tuple(hsr.layers))
        else:
            fakes = t.generator.synthesis(ws, noise=noise)
        logits = t.discriminator(fakes, batch.latents.c)
        adversarial = losses.logistic_g(logits)
        t.meter.add("loss/G", adversarial)
        t.meter.add("score/fake", logits)
        if weight > 0:
            regulariser = hsr_term(
                weight, t.g.module.heads, t.teacher, features, fakes,
                weights=hsr.weights_per_res, distance=hsr.distance, detach=hsr.detach,
            )  # fmt: skip
            t.meter.add("loss/hsr", regulariser / weight)
            adversarial = adversarial + regulariser
        return adversarial


class GReg(Phase):
    """Path length regularisation (arXiv 1912.04958, eq. 4). The mean a is updated once a phase from all ranks'
    images.
    """

    name, network, stream = "Greg", "G", 1

    def __init__(self, training: Training, interval: int):
        super().__init__(training, interval)
        self.shrink = training.recipe.path_length.batch_shrink

    def loss(self, batch: Round) -> torch.Tensor:
        t, settings = self.training, self.training.recipe.path_length
        ws = t.styles(batch)
        fakes = t.generator.synthesis(ws, noise=t.noise(batch))
        y = t.draws.directions(batch.stream, batch.positions, fakes.shape[1:]) / fakes[0, 0].numel() ** 0.5
        lengths = losses.path_lengths(fakes, ws, y)
        mean = losses.path_mean(t.pl_mean, lengths.mean(), settings.decay) if settings.parity else t.pl_mean
        penalty = losses.path_penalty(lengths, mean)
        t.add_to_mean("path_length", lengths)
        t.meter.add("path_length", lengths)
        t.meter.add("loss/path", penalty)
        return settings.weight * penalty

    def finish(self) -> None:
        t = self.training
        t.pl_mean.copy_(losses.path_mean(t.pl_mean, t.phase_mean("path_length"), t.recipe.path_length.decay))


class DMain(Phase):
    """Logistic loss on fakes and reals in one pass of D, which holds no more than Gmain's pass through G and D; also
    where w_avg follows the mean of w (the first z's, before mixing).
    """

    name, network, stream = "Dmain", "D", 2

    def loss(self, batch: Round) -> torch.Tensor:
        t = self.training
        with torch.no_grad():
            ws = t.styles(batch)
            fakes = t.generator.synthesis(ws, noise=t.noise(batch))
        t.add_to_mean("w", ws[:, 0])
        images, labels = torch.cat([fakes, batch.reals]), torch.cat([batch.latents.c, batch.real_c])
        fake_logits, real_logits = t.discriminator(images, labels, parts=2).chunk(2)
        loss = losses.logistic_d_fake(fake_logits) + losses.logistic_d_real(real_logits)
        t.meter.add("score/fake_d", fake_logits)
        t.meter.add("score/real", real_logits)
        t.meter.add("loss/D", loss)
        return loss

    def finish(self) -> None:
        t = self.training
        t.generator.mapping.update_w_avg(t.phase_mean("w")[None], t.recipe.generator.w_avg_beta)


class DReg(Phase):
    """R1 on the same reals as Dmain (arXiv 1801.04406, eq. 9)."""

    name, network, stream = "Dreg", "D", 3

    def loss(self, batch: Round) -> torch.Tensor:
        t = self.training
        reals = batch.reals.detach().requires_grad_(True)
        penalty = losses.r1_penalty(t.discriminator(reals, batch.real_c), reals, t.recipe.r1.gamma)
        t.meter.add("loss/r1", penalty)
        return penalty


def build_phases(training: Training) -> list[Phase]:
    """In StyleGAN2's order: Gmain, Greg, Dmain, Dreg; a lazy phase of weight or interval 0 is left out."""
    recipe = training.recipe
    phases: list[Phase] = [GMain(training)]
    if recipe.path_length.active:
        phases.append(GReg(training, recipe.path_length.interval))
    phases.append(DMain(training))
    if recipe.r1.active:
        phases.append(DReg(training, recipe.r1.interval))
    return phases


def _rounds(phase: Phase, t: Training, images: int, reals: torch.Tensor, real_c: torch.Tensor) -> Iterator[Round]:
    """This rank's part of the phase's global batch, which begins at position `images`, cut into the recipe's rounds
    of accumulation.
    """
    recipe, generator = t.recipe, t.generator
    per_rank = recipe.batch // phase.shrink // t.world.size
    count = per_rank // recipe.accumulation
    # a phase on a part of the batch shows D nothing, so it has no minibatch-std groups to keep together
    order = interleaved(count, min(recipe.discriminator.mbstd_group_size, count) if phase.shrink == 1 else 1)
    cutoff = t.draws.mixing_cutoff(phase.stream, images, generator.num_ws, recipe.generator.mixing_prob)
    for first in range(0, per_rank, count):
        rows = [first + row for row in order]
        positions = [images + t.world.rank * per_rank + row for row in rows]
        latents = t.draws.latents(phase.stream, positions, generator.z_dim)
        yield Round(phase.stream, positions, latents, cutoff, images, reals[rows], real_c[rows])


def run_phase(phase: Phase, t: Training, images: int, reals: torch.Tensor, real_c: torch.Tensor) -> None:
    """Differentiate the phase's loss over all rounds, the other network frozen, and take one step of its own.

    A lazy phase's loss is multiplied by its interval; rounds are averaged. reals [batch / ranks, C, R, R], the rank's
    slice of the global batch.
    """
    net, other = (t.g, t.d) if phase.network == "G" else (t.d, t.g)
    other.module.requires_grad_(False)
    total: list[torch.Tensor | None] = [None] * len(net.parameters)
    with gathered(net, other):
        for batch in _rounds(phase, t, images, reals, real_c):
            loss = phase.loss(batch) * (phase.interval / t.recipe.accumulation)
            gradients = torch.autograd.grad(loss, net.parameters, allow_unused=True)
            total = [_plus(mine, more) for mine, more in zip(total, gradients, strict=True)]
        net.step(total)
    other.module.requires_grad_(True)
    phase.finish()


def _plus(total: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or gradient is None:
        return total if gradient is None else gradient
    return total + gradient
