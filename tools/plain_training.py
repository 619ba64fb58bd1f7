"""A training run's phases without DeepSpeed, data or files: what is timed, modelled and tested as the step.

Everything is as in engine/train.py but the two engines, for which `Plain` stands in, and the teacher, which is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hsrgan.engine.assembly import HALF, HEADS, critic_heads
from hsrgan.engine.augment import Augmentation
from hsrgan.engine.config import Recipe
from hsrgan.engine.distributed import World, lazy_adam
from hsrgan.engine.draws import Draws
from hsrgan.engine.finite import Finite
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.phases import Phase, run_phase
from hsrgan.engine.run_state import GeneratorWithHeads, Round, Training
from hsrgan.engine.stats import Meter
from hsrgan.engine.teacher import Teacher, create_timm

TEACHER = "vit_base_patch16_224"  # of the HSR paper's recipe; weights are random here, which costs the same


class Plain:
    """In place of engine.distributed.Sharded: one network and its Adam on one device."""

    zero_stage = 0

    def __init__(self, module: nn.Module, lr: float, interval: float) -> None:
        self.module, self.parameters = module, list(module.parameters())
        self.optimizer = lazy_adam(self.parameters, lr, 0.0, 0.99, 1e-8, interval)
        self.finite = Finite([name for name, _ in module.named_parameters()], self.parameters[0].device)

    def step(self, gradients: Sequence[Tensor | None], loss: Tensor) -> None:
        self.optimizer.found_inf = self.deliver(gradients, loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def deliver(self, gradients: Sequence[Tensor | None], loss: Tensor) -> Tensor:
        """Every parameter its gradient, or zeros; 1 [] if one of them, or the loss, is not finite."""
        pairs = list(zip(self.parameters, gradients, strict=True))
        whole = [torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in pairs]
        found = self.finite.count(self.finite.check(whole, loss))
        for parameter, gradient in zip(self.parameters, whole, strict=True):
            parameter.grad = gradient
        return found


def random_teacher(layers: dict[int, int], model: str = TEACHER, **kwargs: object) -> Teacher:
    """`model` with random weights and statistics of 0.5, fed 224 pixels, on PyTorch's default device."""
    net = create_timm(model, **kwargs)
    return Teacher(net, layers, tuple(net.pretrained_cfg["input_size"][1:]), (0.5,) * 3, (0.5,) * 3)


def plain_training(
    recipe: Recipe, device: torch.device, teachers: Mapping[str, Teacher], num_classes: int = 0
) -> Training:
    """The recipe's networks from its seed, of `num_classes` classes, with everything that its phases need.

    teachers: of the recipe's sections that name one (`Recipe.on_teachers`).
    device "meta": networks without values; rounds are drawn on the CPU and taken there by `on_meta`.
    """
    host = torch.device("cpu") if device.type == "meta" else device
    torch.manual_seed(recipe.seed)
    shape = {
        "c_dim": num_classes,
        "img_resolution": recipe.data.resolution,
        "img_channels": recipe.data.channels,
        "half_dtype": HALF[recipe.precision],
    }
    with torch.device(device):
        g = Generator(**recipe.generator.model_dump(exclude={"mixing_prob", "lr", "w_avg_beta"}), **shape)
        d = Discriminator(**recipe.discriminator.model_dump(exclude={"lr"}), **shape)
        heads = None
        if recipe.hsr:
            widths = {r: g.synthesis.channels[r] for r in recipe.hsr.layers}
            heads = HSRHeads(widths, teachers["hsr"].channels, recipe.hsr.hidden, HEADS[recipe.precision])
        for name, critic in critic_heads(recipe, teachers, num_classes).items():
            d.add_module(name, critic)
    world, draws = World(0, 1, 0, 1, host), Draws(recipe.seed, host, [1] * num_classes)
    return Training(
        recipe=recipe,
        world=world,
        draws=draws,
        g=Plain(GeneratorWithHeads(g, heads), recipe.generator.lr, recipe.path_length.interval),
        d=Plain(d, recipe.discriminator.lr, recipe.d_interval),
        teachers=teachers,
        meter=Meter(host),
        pl_mean=torch.zeros((), device=device),
        augment=Augmentation(recipe, draws, world, device) if recipe.augment else None,
    )


def on_meta(batch: Round) -> Round:
    """The round's shapes without its values."""
    return Round(**{name: None if value is None else value.to("meta") for name, value in vars(batch).items()})


def run_step(t: Training, phases: Sequence[Phase], images: int, reals: Tensor, real_c: Tensor) -> None:
    """One step: every phase whose turn it is after `images` images."""
    for phase in phases:
        if images // t.recipe.batch % phase.interval == 0:
            run_phase(phase, t, images, reals, real_c)
    if t.augment:
        t.augment.adapt(images // t.recipe.batch)
