"""From a recipe to what trains: the data set, the networks, and the two engines that they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from hsrgan.engine import distributed
from hsrgan.engine.bad_samples import DataFaults
from hsrgan.engine.balanced import check_balanced
from hsrgan.engine.config import Recipe
from hsrgan.engine.data import open_stream
from hsrgan.engine.digits import ensure_digits
from hsrgan.engine.draws import Draws
from hsrgan.engine.freezing import Frozen, check_known
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.labels import ClassCounts
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.phases import Training
from hsrgan.engine.sections import Data
from hsrgan.engine.shard_sources import open_shards
from hsrgan.engine.shards import Manifest
from hsrgan.engine.stats import Meter
from hsrgan.engine.teacher import load_teacher
from hsrgan.engine.transfer import start_from

HALF = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADS = {"fp32": None, "fp16": torch.bfloat16, "bf16": torch.bfloat16}  # nothing clamps what HSR's heads compute


def dataset(data: Data, digits: str | Path = "datasets") -> Manifest:
    """digits: the folder below which the built-in ones are packed."""
    shards = data.shards or ensure_digits(digits, data.resolution, data.channels)
    manifest = open_shards(
        str(shards), cache=data.cache, cache_gb=data.cache_gb, allow_shell=data.allow_shell, max_bad=data.max_bad,
        quiet=os.environ.get("RANK", "0") != "0",
    )  # fmt: skip
    manifest.expect(resolution=data.resolution, channels=data.channels, labels=data.labels)
    if data.balanced:
        check_balanced(manifest)
    return manifest


def stream(
    recipe: Recipe, world: distributed.World, manifest: Manifest, start: int, faults: DataFaults | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of every batch from position `start` on (`open_stream`)."""
    return open_stream(
        manifest, seed=recipe.seed, start=start, global_batch=recipe.batch, rank=world.rank, world=world.size,
        workers=recipe.data.workers, window=recipe.data.window, mirror=recipe.data.mirror,
        resampled=recipe.data.resampled, balanced=recipe.data.balanced, faults=faults,
    )  # fmt: skip


def to_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [n, C, R, R] → [−1, 1] float32, channels_last."""
    images = images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    return images.div_(127.5).sub_(1)


def fake_labels(data: Data, manifest: Manifest) -> ClassCounts:
    """What the labels of fakes are drawn from while training: what the reals have."""
    if not data.labels:
        return ()
    return tuple(min(count, 1) for count in manifest.class_counts) if data.balanced else manifest.drawn_labels


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


def first_values(
    recipe: Recipe, world: distributed.World, manifest: Manifest, g_module, discriminator, g_ema, frozen: Frozen
) -> None:
    """At a run's first start: into the networks what `init_from` brings; rank 0 says and writes down what that was."""
    report = None
    if recipe.init_from:
        classes = manifest.class_names if recipe.data.labels else ()
        report = start_from(recipe.init_from, g_module, discriminator, g_ema, classes)
    check_known(frozen, report and {network: report.new(network) for network in frozen})
    if report and world.first:
        report.write(recipe.run_dir)
        Console().print(report.table())


def training(
    recipe: Recipe, world: distributed.World, manifest: Manifest, g_module, discriminator, teacher, frozen: Frozen
) -> Training:
    adam, micro = recipe.adam, recipe.batch // world.size // recipe.accumulation

    def shard(module, lr: float, interval: int) -> distributed.Sharded:
        optimizer = distributed.lazy_adam(module.parameters(), lr, adam.beta1, adam.beta2, adam.eps, interval)
        return distributed.Sharded(
            module, optimizer, zero_stage=recipe.zero_stage, micro_batch=micro, skip=recipe.faults.nonfinite == "skip"
        )

    return Training(
        recipe=recipe,
        world=world,
        draws=Draws(recipe.seed, world.device, fake_labels(recipe.data, manifest)),
        g=shard(g_module, recipe.generator.lr, recipe.path_length.interval),
        d=shard(discriminator, recipe.discriminator.lr, recipe.r1.interval),
        teacher=teacher,
        meter=Meter(world.device),
        pl_mean=torch.zeros((), device=world.device),
        frozen=frozen,
    )
