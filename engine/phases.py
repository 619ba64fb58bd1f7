"""The phases of a training step, as data: which network they step, how often, on what share of the batch, and their
loss.

StyleGAN2's four (arXiv 1912.04958): main and lazy path-length phases of G, main and lazy R1 phases of D; and R2, which
is R1 of fakes. The main phases' losses are sums over D and the critics beside it (objectives.py); HSR (arXiv
2208.03764) is one more term of G's. A loss is a mean over the phase's images.

Whatever changes from step to step reaches a loss as a tensor of its `Round`, and whatever it wants to tell leaves it as
a tensor of its `Told`: so that a phase's gradients can be a CUDA graph (graphs.py), a loss must read nothing to the
host and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hsrgan.engine import losses
from hsrgan.engine.augment import REALS_STREAM
from hsrgan.engine.distributed import gathered, mean_over_ranks
from hsrgan.engine.draws import interleaved
from hsrgan.engine.graphs import fresh_leaves
from hsrgan.engine.hsr import hsr_term
from hsrgan.engine.objectives import discriminator_loss, generator_loss
from hsrgan.engine.run_state import HEAD_LOSSES, Round, Told, Training


class Phase:
    """name; network "G" or "D"; stream: which random numbers are its own; augmented: the streams of the images that it
    shows D; interval in steps; shrink: it works on the first 1/shrink of the global batch. fp16_scale: by which the
    loss is multiplied, and its gradients divided again, where activations are fp16; a power of two, which rounds
    nothing.
    """

    name: str
    network: str
    stream: int
    augmented: tuple[int, ...] = ()
    shrink = 1
    fp16_scale = 1.0

    def __init__(self, training: Training, interval: int = 1):
        self.training, self.interval = training, interval
        self.scale = self.fp16_scale if training.recipe.precision == "fp16" else 1.0

    def inputs(self, images: int, positions: Sequence[int], reals: Tensor, real_c: Tensor) -> dict[str, Tensor]:
        """The fields of the Round of the images at `positions` of the run, in a step that `images` were seen before:
        here what a fake is made from. reals, real_c: those of the round.
        """
        t, recipe = self.training, self.training.recipe
        latents = t.draws.latents(self.stream, positions, t.generator.z_dim)
        noise = t.draws.noise(self.stream, positions, t.generator.synthesis.noise_size)
        found = {"z": latents.z, "c": latents.c, "noise": noise}
        if recipe.generator.mixing_prob > 0:
            # the same computation in every step, whether or not it mixes: a recorded one cannot branch
            cutoff = t.draws.mixing_cutoff(self.stream, images, t.generator.num_ws, recipe.generator.mixing_prob)
            found |= {"z_mix": latents.z_mix, "cutoff": t.scalar(cutoff, torch.int64)}
        return found

    def loss(self, batch: Round) -> tuple[Tensor, Told]:
        raise NotImplementedError  # every phase below defines it

    def gradients(self, batch: Round) -> tuple[list[Tensor | None], Told]:
        """Of the loss, as it counts in the phase's step, by the parameters of the network, in their order; None for one
        that has no part in it or is frozen. `each` is summed over the round's images.
        """
        t = self.training
        net = t.g if self.network == "G" else t.d
        with fresh_leaves(net.module, t.frozen.get(self.network, ())) as leaves:
            loss, told = self.loss(batch)
            loss = loss * (self.interval / t.recipe.accumulation)
            trained = [leaf for leaf in leaves if leaf.requires_grad]
            if self.scale == 1:
                found = torch.autograd.grad(loss, trained, allow_unused=True)
            else:
                scaled = torch.autograd.grad(loss * self.scale, trained, allow_unused=True)
                known = iter(torch._foreach_div([g for g in scaled if g is not None], self.scale))  # a few launches
                found = [None if gradient is None else next(known) for gradient in scaled]
        found = iter(found)
        gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
        means = {name: value.detach() for name, value in told.means.items()}
        return gradients, Told(means, None if told.each is None else told.each.detach().sum(0), loss.detach())

    def finish(self, mean: Tensor | None, skip: Tensor) -> None:
        """Called once after the step. mean: of what the losses told of `each` image, over all rounds and ranks.
        skip [], bool: the step was not finite, and must change nothing.
        """


class Main(Phase):
    """What G's and D's main phases share. A loss that compares a fake with a real gives both the real's label."""

    # An activation's gradient falls with the number of pixels and of images: at 256² and 32 images a rank most are too
    # small for fp16. 2⁸ gives the parameters their gradients back, and 2¹² still overflows nowhere there. Path length
    # loses nothing, and R1 comes no nearer to fp32 by a scale: pytest tests/test_precision.py -k scale -s
    fp16_scale = 256.0

    @property
    def paired(self) -> bool:
        return losses.ADVERSARIAL[self.training.recipe.objective.loss].paired

    def inputs(self, images: int, positions: Sequence[int], reals: Tensor, real_c: Tensor) -> dict[str, Tensor]:
        found = super().inputs(images, positions, reals, real_c)
        return found | {"reals": reals, "real_c": real_c, "c": real_c} if self.paired else found

    def shown(self, fakes: Tensor, batch: Round) -> tuple[Tensor, Tensor]:
        """The images that the critics look at, augmented, with labels: the fakes, and behind them the reals, if there
        are any.
        """
        if batch.reals is None:
            return self.training.augmented(fakes, batch), batch.c
        images, labels = torch.cat([fakes, batch.reals]), torch.cat([batch.c, batch.real_c])
        return self.training.augmented(images, batch), labels


class GMain(Main):
    """The critics' losses on the augmented fake, plus λ·L_HSR on the un-augmented one while λ > 0."""

    name, network, stream = "Gmain", "G", 0

    @property
    def augmented(self) -> tuple[int, ...]:
        return (0, 7) if self.paired else (0,)  # 7: of the reals, as no other phase sees them

    def inputs(self, images: int, positions: Sequence[int], reals: Tensor, real_c: Tensor) -> dict[str, Tensor]:
        found, hsr = super().inputs(images, positions, reals, real_c), self.training.recipe.hsr
        weight = losses.hsr_weight(images / 1000, hsr.weight, hsr.start_kimg, hsr.ramp_kimg) if hsr else 0.0
        return found | {"hsr_weight": self.training.scalar(weight)} if weight > 0 else found

    def loss(self, batch: Round) -> tuple[Tensor, Told]:
        t, hsr = self.training, self.training.recipe.hsr
        ws, regularised = t.styles(batch), batch.hsr_weight is not None
        if regularised:
            fakes, features = t.generator.synthesis(ws, noise=batch.noise, return_features=tuple(hsr.layers))
        else:
            fakes = t.generator.synthesis(ws, noise=batch.noise)
        loss, means = generator_loss(t.critics, *self.shown(fakes, batch))
        if regularised:
            regulariser = hsr_term(
                t.g.module.heads, t.teachers["hsr"], features, fakes,
                weights=hsr.weights_per_res, distance=hsr.distance, detach=hsr.detach,
            )  # fmt: skip
            means["loss/hsr"] = regulariser
            loss = loss + batch.hsr_weight * regulariser
        return loss, Told(means)


class GReg(Phase):
    """Path length regularisation (arXiv 1912.04958, eq. 4). The mean a is updated once a phase from all ranks'
    images.
    """

    name, network, stream = "Greg", "G", 1

    def __init__(self, training: Training, interval: int):
        super().__init__(training, interval)
        self.shrink = training.recipe.path_length.batch_shrink

    def inputs(self, images: int, positions: Sequence[int], reals: Tensor, real_c: Tensor) -> dict[str, Tensor]:
        y = self.training.draws.directions(self.stream, positions, reals.shape[1:])
        y = y.contiguous(memory_format=torch.channels_last)  # or the image's gradient would be NCHW through all of G
        return super().inputs(images, positions, reals, real_c) | {"y": y}

    def loss(self, batch: Round) -> tuple[Tensor, Told]:
        t, settings = self.training, self.training.recipe.path_length
        ws = t.styles(batch).requires_grad_()  # a frozen mapping network gives ws that need none
        fakes = t.generator.synthesis(ws, noise=batch.noise)
        lengths = losses.path_lengths(fakes, ws, batch.y / fakes[0, 0].numel() ** 0.5)
        mean = losses.path_mean(t.pl_mean, lengths.mean(), settings.decay) if settings.parity else t.pl_mean
        penalty = losses.path_penalty(lengths, mean)
        return settings.weight * penalty, Told({"path_length": lengths, "loss/path": penalty}, each=lengths)

    def finish(self, mean: Tensor | None, skip: Tensor) -> None:
        t = self.training
        mean = torch.where(skip, t.pl_mean, mean)
        t.pl_mean.copy_(losses.path_mean(t.pl_mean, mean, t.recipe.path_length.decay))


class DMain(Main):
    """The critics' losses on fakes and reals, in one pass of D, which holds no more than Gmain's pass through G and D;
    also where w_avg follows the mean of w (the first z's, before mixing).
    """

    name, network, stream = "Dmain", "D", 2
    augmented = (2, REALS_STREAM)

    def inputs(self, images: int, positions: Sequence[int], reals: Tensor, real_c: Tensor) -> dict[str, Tensor]:
        return super().inputs(images, positions, reals, real_c) | {"reals": reals, "real_c": real_c}

    def loss(self, batch: Round) -> tuple[Tensor, Told]:
        t = self.training
        with torch.no_grad():
            ws = t.styles(batch)
            fakes = t.generator.synthesis(ws, noise=batch.noise)
        loss, means = discriminator_loss(t.critics, *self.shown(fakes, batch))
        # a loss of differences leaves D's level open: there a real's sign is that of how far it is above its fake
        means |= t.signs(means["score/real"] - means["score/fake_d"] if self.paired else means["score/real"])
        return loss, Told(means, each=ws[:, 0])

    def finish(self, mean: Tensor | None, skip: Tensor) -> None:
        t = self.training
        mean = torch.where(skip, t.generator.mapping.w_avg, mean)
        t.generator.mapping.update_w_avg(mean[None], t.recipe.generator.w_avg_beta)
        if heads := [getattr(t.discriminator, name) for name in HEAD_LOSSES if name in t.teachers]:
            with gathered(t.d):
                for each in heads:
                    each.settle(skip)


class DReg(Phase):
    """R1 on the same reals as Dmain (arXiv 1801.04406, eq. 9), with respect to them as they are: its gradient goes
    through the augmentation. Of D alone: not of the critics on teachers.
    """

    name, network, stream = "Dreg", "D", 3
    augmented = (3,)

    def inputs(self, images: int, positions: Sequence[int], reals: Tensor, real_c: Tensor) -> dict[str, Tensor]:
        return {"reals": reals, "real_c": real_c}

    def loss(self, batch: Round) -> tuple[Tensor, Told]:
        t = self.training
        reals = batch.reals.detach().requires_grad_(True)
        logits = t.discriminator(t.augmented(reals, batch), batch.real_c)
        penalty = losses.r1_penalty(logits, reals, t.recipe.r1.gamma)
        paired = losses.ADVERSARIAL[t.recipe.objective.loss].paired  # with fakes, of which there are none here
        return penalty, Told({"loss/r1": penalty} | ({} if paired else t.signs(logits)))


class DR2(Phase):
    """R2: the same penalty on fakes of its own (arXiv 1801.04406, eq. 9), of D alone."""

    name, network, stream = "Dr2", "D", 6  # 4 and 5 are the sample grid's and the augmentation's of Dmain's reals
    augmented = (6,)

    def loss(self, batch: Round) -> tuple[Tensor, Told]:
        t = self.training
        with torch.no_grad():
            fakes = t.generator.synthesis(t.styles(batch), noise=batch.noise)
        fakes = fakes.requires_grad_(True)
        logits = t.discriminator(t.augmented(fakes, batch), batch.c)
        penalty = losses.r1_penalty(logits, fakes, t.recipe.r2.gamma)
        return penalty, Told({"loss/r2": penalty})


def build_phases(training: Training) -> list[Phase]:
    """In StyleGAN2's order: Gmain, Greg, Dmain, Dreg, and Dr2; a lazy phase of weight or interval 0 is left out."""
    recipe = training.recipe
    phases: list[Phase] = [GMain(training)]
    if recipe.path_length.active:
        phases.append(GReg(training, recipe.path_length.interval))
    phases.append(DMain(training))
    if recipe.r1.active:
        phases.append(DReg(training, recipe.r1.interval))
    if recipe.r2.active:
        phases.append(DR2(training, recipe.r2.interval))
    return phases


def rounds(phase: Phase, t: Training, images: int, reals: Tensor, real_c: Tensor) -> Iterator[Round]:
    """This rank's part of the phase's global batch, which begins at position `images`, cut into the recipe's rounds
    of accumulation.
    """
    recipe = t.recipe
    per_rank = recipe.batch // phase.shrink // t.world.size
    count = per_rank // recipe.accumulation
    # a phase on a part of the batch shows D nothing, so it has no minibatch-std groups to keep together
    order = interleaved(count, min(recipe.discriminator.mbstd_group_size, count) if phase.shrink == 1 else 1)
    for first in range(0, per_rank, count):
        rows = tuple(first + row for row in order)
        positions = [images + t.world.rank * per_rank + row for row in rows]
        index = t.rows(rows)
        fields = phase.inputs(images, positions, reals[index], real_c[index])
        if t.augment and phase.augmented:
            fields |= t.augment.inputs(phase.augmented, positions, reals.shape[1:])
        yield Round(**fields)


def run_phase(phase: Phase, t: Training, images: int, reals: Tensor, real_c: Tensor) -> None:
    """Differentiate the phase's loss over all rounds, the other network frozen, and take one step of its own.

    A lazy phase's loss is multiplied by its interval; rounds are averaged. reals [batch / ranks, C, H, W], the rank's
    slice of the global batch.
    """
    net, other = (t.g, t.d) if phase.network == "G" else (t.d, t.g)
    other.module.requires_grad_(False)
    total: list[Tensor | None] = [None] * len(net.parameters)
    each = loss = None
    with gathered(net, other):
        for batch in rounds(phase, t, images, reals, real_c):
            gradients, told = t.call(phase.name, phase.gradients, batch)
            for name, values in told.means.items():
                t.meter.add(name, values)
            if t.augment and "augment/sign" in told.means:
                t.augment.hear(told.means["augment/sign"])
            if t.recipe.accumulation == 1:
                total, each, loss = gradients, told.each, told.loss
            else:  # the next round may be the same graph, which writes where this one did
                total = [_plus(mine, more) for mine, more in zip(total, gradients, strict=True)]
                each, loss = _plus(each, told.each), _plus(loss, told.loss)
        net.step(total, loss)
    if t.augment:
        t.augment.settle(net.finite.found > 0)
    other.module.requires_grad_(True)
    mean = None if each is None else mean_over_ranks(each / (t.recipe.batch // phase.shrink // t.world.size))
    phase.finish(mean, net.finite.found > 0)


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """A new tensor, unless there is nothing to add."""
    if more is None:
        return total
    return more.clone() if total is None else total + more
