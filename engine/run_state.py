"""What the phases of a training step share: the networks with what trains beside them, a round's inputs, what a loss
tells, and the state of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hsrgan.engine import losses
from hsrgan.engine.augment import Augmentation
from hsrgan.engine.config import Recipe
from hsrgan.engine.distributed import Sharded, World
from hsrgan.engine.draws import Draws
from hsrgan.engine.graphs import direct
from hsrgan.engine.objectives import Critic
from hsrgan.engine.stats import Meter

# by the names of D's heads on teachers: the papers' losses
HEAD_LOSSES = {"projected": "hinge", "vision_aided": "logistic"}


class GeneratorWithHeads(nn.Module):
    """What G's optimiser trains: the generator, and HSR's prediction heads where HSR is on."""

    def __init__(self, generator: nn.Module, heads: nn.Module | None):
        super().__init__()
        self.generator, self.heads = generator, heads


@dataclass(frozen=True)
class Round:
    """What one round of a phase on one rank computes from, on the device; None where the phase has no use for it.

    z and z_mix [n, z_dim], the latents and those of style mixing; cutoff [], where z_mix takes over in the ws (num_ws:
    nowhere); c [n, num_classes]; noise [n, noise_size]; y [n, C, H, W] path-length directions, N(0, 1).
    reals [n, C, H, W] in [−1, 1] at the same positions of the run, real_c [n, num_classes].
    hsr_weight [], λ; None while HSR is off. augment, augment_p, augment_noise: of `Augmentation.inputs`, for the images
    that D sees, fakes first.
    """

    z: Tensor | None = None
    z_mix: Tensor | None = None
    cutoff: Tensor | None = None
    c: Tensor | None = None
    noise: Tensor | None = None
    y: Tensor | None = None
    reals: Tensor | None = None
    real_c: Tensor | None = None
    hsr_weight: Tensor | None = None
    augment: Tensor | None = None
    augment_p: Tensor | None = None
    augment_noise: Tensor | None = None


class Told(NamedTuple):
    """What a loss tells beside its value: `means`, whose elements the meter averages, and `each` [n, …], one value an
    image, whose mean over the phase's whole batch goes to `Phase.finish`. loss [] is what `Phase.gradients` took the
    derivatives of.
    """

    means: dict[str, Tensor]
    each: Tensor | None = None
    loss: Tensor | None = None


@dataclass
class Training:
    """Everything that the phases share. `teachers`: by the recipe's sections that name one; of those but HSR's, D has
    the heads, as modules of these names. `pl_mean` is a device tensor, one value the same on all ranks. `call` calls a
    phase's `gradients`: eagerly, or as a graph. frozen: of "G" and "D" the parameters that no phase moves. anew: which
    of them resumed without its Adam.
    """

    recipe: Recipe
    world: World
    draws: Draws
    g: Sharded
    d: Sharded
    teachers: Mapping[str, nn.Module]
    meter: Meter
    pl_mean: Tensor
    augment: Augmentation | None = None
    call: Callable[..., Any] = direct
    frozen: Mapping[str, Collection[str]] = field(default_factory=dict)
    anew: Sequence[str] = ()
    indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def generator(self) -> nn.Module:
        return self.g.module.generator

    @property
    def discriminator(self) -> nn.Module:
        return self.d.module

    @property
    def critics(self) -> list[Critic]:
        """D, and its heads on teachers, which have the papers' own losses."""

        def on_teacher(name: str, loss: str) -> Critic:
            heads, teacher = self.discriminator.get_submodule(name), self.teachers[name]
            weight = self.recipe.on_teachers[name].weight
            score = lambda images, c, parts: heads(teacher.features(images), c)  # noqa: E731
            return Critic(f"_{name}", score, losses.ADVERSARIAL[loss], weight)

        own = losses.ADVERSARIAL[self.recipe.objective.loss]
        found = [Critic("", lambda *seen: (self.discriminator(*seen),), own)]
        return found + [on_teacher(name, loss) for name, loss in HEAD_LOSSES.items() if name in self.teachers]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the networks and their optimisers, JSON-able. Waits for the device."""
        augment = self.augment.state() if self.augment else {}
        return {"pl_mean": self.pl_mean.item(), "augment": augment}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` was."""
        self.pl_mean.fill_(state["pl_mean"])
        if self.augment:
            self.augment.take_up(state.get("augment", {}))

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """[] on the device, filled there: a copy from the host would wait for the device."""
        return torch.full((), value, dtype=dtype, device=self.world.device)

    def rows(self, rows: tuple[int, ...]) -> Tensor:
        """[n] on the device, copied there once."""
        if rows not in self.indices:
            self.indices[rows] = torch.tensor(rows, device=self.world.device)
        return self.indices[rows]

    def augmented(self, images: Tensor, batch: Round) -> Tensor:
        """What D sees of images; the same where nothing is augmented."""
        return self.augment(images, batch) if self.augment else images

    def signs(self, real_logits: Tensor) -> dict[str, Tensor]:
        """What ADA steers by, as `means` of a Told."""
        return {"augment/sign": real_logits.sign()} if self.augment else {}

    def styles(self, batch: Round) -> Tensor:
        """ws [n, num_ws, w_dim], mixed from two latents at the cutoff."""
        mapping = self.generator.mapping
        if batch.z_mix is None:
            return mapping(batch.z, batch.c)
        ws, mixed = mapping(torch.cat([batch.z, batch.z_mix]), torch.cat([batch.c, batch.c])).chunk(2)
        first = torch.arange(self.generator.num_ws, device=ws.device)[:, None] < batch.cutoff
        return torch.where(first, ws, mixed)
