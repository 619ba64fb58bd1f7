"""From a recipe to what trains: the data set, the networks, and the two engines that they share."""

from __future__ import annotations

import os

import torch

from hsrgan.engine import distributed
from hsrgan.engine.augment import Augmentation
from hsrgan.engine.config import Recipe
from hsrgan.engine.digits import ensure_digits
from hsrgan.engine.draws import Draws
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.phases import Training
from hsrgan.engine.sections import Data
from hsrgan.engine.shard_sources import open_shards
from hsrgan.engine.shards import Manifest
from hsrgan.engine.stats import Meter
from hsrgan.engine.teacher import load_teacher

HALF = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADS = {"fp32": None, "fp16": torch.bfloat16, "bf16": torch.bfloat16}  # nothing clamps what HSR's heads compute


def dataset(data: Data) -> Manifest:
    shards = data.shards or ensure_digits("datasets", data.resolution, data.channels)
    manifest = open_shards(
        str(shards), cache=data.cache, cache_gb=data.cache_gb, allow_shell=data.allow_shell, max_bad=data.max_bad,
        quiet=os.environ.get("RANK", "0") != "0",
    )  # fmt: skip
    manifest.expect(resolution=data.resolution, channels=data.channels, labels=data.labels)
    return manifest


def networks(recipe: Recipe, manifest: Manifest, world: distributed.World):
    """G, D, HSR heads and teacher on the rank's device; the same values on every rank."""
    torch.manual_seed(recipe.seed)
    data = recipe.data
    shape = {
        "c_dim": manifest.num_classes if data.labels else 0,
        "img_resolution": data.resolution,
        "img_channels": data.channels,
        "half_dtype": HALF[recipe.precision],
    }
    generator = Generator(**recipe.generator.model_dump(exclude={"mixing_prob", "lr", "w_avg_beta"}), **shape)
    discriminator = Discriminator(**recipe.discriminator.model_dump(exclude={"lr"}), **shape)
    heads = teacher = None
    if recipe.hsr:
        teacher = load_teacher(
            recipe.hsr.teacher,
            weights=recipe.hsr.weights,
            layers=recipe.hsr.layers,
            parity_normalize=recipe.hsr.parity_normalize,
        ).to(world.device)
        if world.device.type == "cuda":
            teacher.to_bf16()
        widths = {r: generator.synthesis.channels[r] for r in recipe.hsr.layers}
        heads = HSRHeads(widths, teacher.channels, recipe.hsr.hidden, HEADS[recipe.precision]).to(world.device)
    return generator.to(world.device), discriminator.to(world.device), heads, teacher


def training(
    recipe: Recipe, world: distributed.World, manifest: Manifest, g_module, discriminator, teacher
) -> Training:
    adam, micro = recipe.adam, recipe.batch // world.size // recipe.accumulation

    def shard(module, lr: float, interval: int) -> distributed.Sharded:
        optimizer = distributed.lazy_adam(module.parameters(), lr, adam.beta1, adam.beta2, adam.eps, interval)
        return distributed.Sharded(
            module, optimizer, zero_stage=recipe.zero_stage, micro_batch=micro, skip=recipe.faults.nonfinite == "skip"
        )

    draws = Draws(recipe.seed, world.device, manifest.class_counts if recipe.data.labels else ())
    return Training(
        recipe=recipe,
        world=world,
        draws=draws,
        g=shard(g_module, recipe.generator.lr, recipe.path_length.interval),
        d=shard(discriminator, recipe.discriminator.lr, recipe.r1.interval),
        teacher=teacher,
        meter=Meter(world.device),
        pl_mean=torch.zeros((), device=world.device),
        augment=Augmentation(recipe, draws, world, world.device) if recipe.augment else None,
    )
