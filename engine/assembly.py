"""From a recipe to what trains: the data set, the networks, and the two engines that they share."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hsrgan.engine import distributed
from hsrgan.engine.augment import Augmentation
from hsrgan.engine.bad_samples import DataFaults
from hsrgan.engine.balanced import check_balanced
from hsrgan.engine.config import Recipe, recipe_differences
from hsrgan.engine.data import open_stream
from hsrgan.engine.digits import ensure_digits
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.freezing import Frozen, check_known
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.labels import ClassCounts
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.projected import ProjectedHeads, TeacherHeads, VisionAidedHeads
from hsrgan.engine.run_state import Training
from hsrgan.engine.sections import Data
from hsrgan.engine.shard_sources import open_shards
from hsrgan.engine.shards import Manifest
from hsrgan.engine.stats import Meter
from hsrgan.engine.teacher import Teacher, load_teacher
from hsrgan.engine.transfer import start_from, targets_of

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


def check_alike(recipe: Recipe, world: distributed.World, manifest: Manifest) -> None:
    """UserError, on every rank, unless all have read the same recipe and data: a file may be changed between one rank's
    look at it and another's, and two runs on one port may have been mixed. A collective.

    Only where the shards lie may differ from machine to machine.
    """
    recipe_there, sha256 = distributed.from_first((recipe.to_json(), manifest.sha256))
    with distributed.failing_together():
        differ = [key for key in recipe_differences(recipe_there, recipe) if key not in ("data.shards", "data.cache")]
        if manifest.sha256 != sha256:
            differ.append("the data set (its manifest.json)")
        if differ:
            raise UserError(
                f"rank {world.rank} on {socket.gethostname()} has not read what rank 0 has: {', '.join(differ)}; give "
                "the same command on every machine, change no file while the ranks start, and give a second run on "
                "these machines another --master_port"
            )


def stream(
    recipe: Recipe, world: distributed.World, manifest: Manifest, start: int, faults: DataFaults | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of every batch from position `start` on (`open_stream`)."""
    return open_stream(
        manifest, seed=recipe.seed, start=start, global_batch=recipe.batch, rank=world.rank, world=world.size,
        workers=recipe.data.workers, window=recipe.data.window, mirror=recipe.data.mirror,
        resampled=recipe.data.resampled, balanced=recipe.data.balanced, faults=faults,
        pinned=world.device.type == "cuda",
    )  # fmt: skip


def to_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [n, C, H, W] → [−1, 1] float32, channels_last."""
    images = images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    return images.div_(127.5).sub_(1)


def fake_labels(data: Data, manifest: Manifest) -> ClassCounts:
    """What the labels of fakes are drawn from while training: what the reals have."""
    if not data.labels:
        return ()
    return tuple(min(count, 1) for count in manifest.class_counts) if data.balanced else manifest.drawn_labels


def load_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The teacher of each section that names one, on the CPU in fp32; sections that name the same share its network."""
    loaded, found = {}, {}
    for name, section in recipe.on_teachers.items():
        layers = section.layers if name == "hsr" else {layer: layer for layer in section.layers}
        found[name] = load_teacher(
            section.teacher, weights=section.weights, layers=layers, section=name, loaded=loaded,
            parity_normalize=name == "hsr" and section.parity_normalize,
        )  # fmt: skip
    return found


def changed_teachers(state: Mapping[str, Any], teachers: Mapping[str, Teacher]) -> list[str]:
    """The sections whose teacher is made of another file than when the state.json was written, which may not say."""
    before = state.get("teachers", {})
    return [name for name, teacher in teachers.items() if before.get(name) not in (None, teacher.sha256)]


def critic_heads(recipe: Recipe, teachers: Mapping[str, Teacher], c_dim: int) -> dict[str, TeacherHeads]:
    """What D trains on teachers, by the names of the recipe's sections. Raises UserError for a layer without a map."""
    heads: dict[str, TeacherHeads] = {}
    if recipe.projected:
        teacher = teachers["projected"]
        for layer, grid in teacher.grids.items():
            if min(grid) < 2:
                raise UserError(
                    f"projected.layers: layer {layer} of {recipe.projected.teacher} has a map of {grid[0]}×{grid[1]}, "
                    "allowed: 2×2 or more, as earlier layers of a convolutional network or any of a ViT have"
                )
        heads["projected"] = ProjectedHeads(teacher.channels, teacher.grids, c_dim, recipe.projected.channels)
    if recipe.vision_aided:
        channels = teachers["vision_aided"].channels
        heads["vision_aided"] = VisionAidedHeads(channels, c_dim, recipe.vision_aided.hidden)
    return heads


def networks(recipe: Recipe, manifest: Manifest, world: distributed.World):
    """G, D with its heads as further modules of it, HSR heads, and the teachers by section, on the rank's device; the
    same values on every rank.
    """
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
    heads, teachers = None, load_teachers(recipe)
    if recipe.hsr:
        widths = {r: generator.synthesis.channels[r] for r in recipe.hsr.layers}
        heads = HSRHeads(widths, teachers["hsr"].channels, recipe.hsr.hidden, HEADS[recipe.precision]).to(world.device)
    for name, critic in critic_heads(recipe, teachers, shape["c_dim"]).items():
        discriminator.add_module(name, critic)
    for teacher in teachers.values():
        teacher.to(world.device)
        if world.device.type == "cuda":
            teacher.to_bf16()
    return generator.to(world.device), discriminator.to(world.device), heads, teachers


def first_values(
    recipe: Recipe, world: distributed.World, manifest: Manifest | None, g_module, discriminator, g_ema, frozen: Frozen,
    keep: bool = True,
) -> None:
    """At a run's first start: into the networks what `init_from` brings; rank 0 says and, to keep, writes down what
    that was. manifest: may be None without labels.
    """
    report = None
    if recipe.init_from:
        classes = manifest.class_names if recipe.data.labels else ()
        targets = targets_of(recipe.model_dump(mode="json"))
        with distributed.failing_together():
            report = start_from(recipe.init_from, g_module, discriminator, g_ema, classes, targets)
        distributed.copy_from_first(g_module, discriminator, g_ema)  # the file may be a run's best, which it replaces
    check_known(frozen, report and {network: report.new(network) for network in frozen})
    if report and world.first:
        if keep:
            report.write(recipe.run_dir)
        Console().print(report.table())


def training(
    recipe: Recipe, world: distributed.World, manifest: Manifest, g_module, discriminator,
    teachers: dict[str, Teacher], frozen: Frozen,
) -> Training:
    adam, micro = recipe.adam, recipe.batch // world.size // recipe.accumulation

    def shard(module, lr: float, interval: float) -> distributed.Sharded:
        optimizer = distributed.lazy_adam(module.parameters(), lr, adam.beta1, adam.beta2, adam.eps, interval)
        return distributed.Sharded(
            module, optimizer, zero_stage=recipe.zero_stage, micro_batch=micro, skip=recipe.faults.nonfinite == "skip"
        )

    draws = Draws(recipe.seed, world.device, fake_labels(recipe.data, manifest))
    return Training(
        recipe=recipe,
        world=world,
        draws=draws,
        g=shard(g_module, recipe.generator.lr, recipe.path_length.interval),
        d=shard(discriminator, recipe.discriminator.lr, recipe.d_interval),
        teachers=teachers,
        meter=Meter(world.device),
        pl_mean=torch.zeros((), device=world.device),
        frozen=frozen,
        augment=Augmentation(recipe, draws, world, world.device) if recipe.augment else None,
    )
