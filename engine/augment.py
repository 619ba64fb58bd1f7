"""What stands between images and D: adaptive discriminator augmentation (ADA, arXiv 2006.06676) with its pipes, or
DiffAugment (arXiv 2006.10738); and p, which ADA adapts.

A phase's gradients may be a CUDA graph: random numbers and p reach it as tensors of its Round, nothing is read to the
host, and no shape depends on a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hsrgan.engine import augment_color, augment_filter, augment_geometry, augment_numbers, diffaugment
from hsrgan.engine.augment_numbers import Numbers
from hsrgan.engine.config import Recipe
from hsrgan.engine.distributed import World, sum_over_ranks
from hsrgan.engine.draws import Draws
from hsrgan.engine.sections import GROUPS, PIPES

REALS_STREAM = 5  # the draws of Dmain's reals; 0–3, 6 and 7 are the phases' (phases.py), 4 the grid's


class Pipe:
    """The groups of transforms that ADA's `name` (one of PIPES) switches on."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        groups = PIPES[name]
        blit, geometry, self.color, self.filter, self.noise, self.cutout = (group in groups for group in GROUPS)
        self.moves = augment_geometry.BLIT * blit + augment_geometry.GEOMETRY * geometry
        self.low_pass = augment_geometry.low_pass(device).to(dtype)
        self.bank = augment_filter.filter_bank(device).to(dtype)

    def __call__(self, x: Tensor, values: Tensor, p: Tensor, field: Tensor | None) -> Tensor:
        """x [n, C, H, W] augmented, each transform with probability p []. values: of `Numbers`; field ~ N(0, 1) of x's
        shape, for the noise.
        """
        numbers, (height, width) = Numbers(values, p), x.shape[2:]
        if self.moves:
            inverse = augment_geometry.inverse(numbers, self.moves, height, width)
            x = augment_geometry.warp(x, inverse, self.low_pass)
        if self.color:
            transforms = augment_color.GREY if x.shape[1] == 1 else augment_color.COLOR
            x = augment_color.recolor(x, augment_color.matrix(numbers, transforms))
        if self.filter:
            x = augment_filter.amplify(x, augment_filter.band_gains(numbers), self.bank)
        if self.noise:
            x = augment_filter.add_noise(x, augment_filter.noise_level(numbers), field)
        if self.cutout:
            x = x * augment_filter.cutout_mask(numbers, height, width)
        return x


class Augmentation:
    """A run's. p [], on the device: the probability of each of ADA's transforms.

    ADA's rule: every `interval` steps, p moves by batch·interval / (1000·kimg), up where the mean sign of D's real
    logits since the last move is above the target, else down. Of a loss that compares a real with a fake, the sign is
    that of the difference. The signs' sum is a whole number: the same for any split of the batch.
    """

    def __init__(self, recipe: Recipe, draws: Draws, world: World, device: torch.device) -> None:
        settings = self.settings = recipe.augment
        self._draws, self._world = draws, world
        self._pipe = None if settings.pipe is None else Pipe(settings.pipe, device)
        self._policy = [diffaugment.POLICY[name] for name in settings.policies]
        self.p = torch.full((), settings.p or 0.0, device=device)
        self._signs = torch.zeros(2, dtype=torch.float64, device=device)  # this rank's: sum and count
        self._heard = torch.zeros_like(self._signs)  # in the phase that runs
        self.adaptive = settings.mode == "ada"
        if self.adaptive:
            self._move = recipe.batch * settings.interval / (1000 * settings.kimg)

    def inputs(self, streams: Sequence[int], positions: Sequence[int], shape: Sequence[int]) -> dict[str, Tensor]:
        """The fields of a Round for images [C, H, W] = shape: as many at the same positions as there are streams, one
        after the other.
        """
        if self._pipe is None:
            sizes = len(diffaugment.UNIFORM), 0
        else:
            sizes = len(augment_numbers.UNIFORM), len(augment_numbers.NORMAL)
        found = {"augment": torch.cat([self._draws.augmentation(s, positions, *sizes) for s in streams])}
        if self._pipe is not None:
            found["augment_p"] = self.p
            if self._pipe.noise:
                found["augment_noise"] = torch.cat([self._draws.pixels(s, positions, shape) for s in streams])
        return found

    def __call__(self, images: Tensor, batch: Any) -> Tensor:
        """What D sees of images [n, C, H, W]. batch: a Round with this object's `inputs`."""
        if images.requires_grad:  # what comes back through here keeps the image's memory format
            images = images.view_as(images)
            images.register_hook(lambda g: g.contiguous(memory_format=torch.channels_last))
        if self._pipe is not None:
            images = self._pipe(images, batch.augment, batch.augment_p, batch.augment_noise)
        for change in self._policy:
            images = change(images, batch.augment)
        return images.contiguous(memory_format=torch.channels_last)

    def hear(self, signs: Tensor) -> None:
        """Count the signs of real logits that a round of the running phase has told."""
        self._heard[0] += signs.sum(dtype=torch.float64)
        self._heard[1] += signs.numel()

    def settle(self, skip: Tensor) -> None:
        """The phase's step is done; what it told counts, unless skip [], bool."""
        self._signs += self._heard.masked_fill(skip, 0)
        self._heard.zero_()

    def adapt(self, step: int) -> None:
        """The end of step `step` (from 0): move p where it is its turn. Every rank calls it."""
        if self.adaptive and (step + 1) % self.settings.interval == 0:
            total, count = sum_over_ranks(self._signs.clone())
            self.p += torch.sign(total - self.settings.target * count).to(self.p.dtype) * self._move
            self.p.clamp_(0, 1)
            self._signs.zero_()

    def told(self) -> dict[str, float]:
        """For a line of the log. Waits for the device."""
        return {} if self._pipe is None else {"augment/p": self.p.item()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able. Waits for the device; every rank calls it."""
        return {"p": self.p.item(), "signs": sum_over_ranks(self._signs.clone()).tolist()} if self.adaptive else {}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` was; from the recipe's p if that run did not adapt it."""
        if self.adaptive and state:
            self.p.fill_(state["p"])
            if self._world.first:
                self._signs.copy_(torch.tensor(state["signs"], dtype=torch.float64))
