"""What is wrong between keys of a recipe that are each right alone, told before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.names import parse_metrics
from hsrgan.engine.recipe_file import KeyPath
from hsrgan.engine.sections import AUGMENT_DEFAULTS, MAX_RESOLUTION, POLICIES, Augment, Hsr, Metrics

if TYPE_CHECKING:
    from hsrgan.engine.config import Recipe


def levels(resolution: int) -> int:
    """Resolutions of a network: 4, 8, … resolution."""
    return max(resolution.bit_length() - 2, 0)


def inconsistencies(recipe: Recipe, world_size: int) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong between keys that are each right alone."""
    r = recipe.data.resolution
    if r & (r - 1):
        yield ("data", "resolution"), f"data.resolution is {r}, allowed: a power of two from 8 to {MAX_RESOLUTION}"
        return      # the other checks count on it
    if (recipe.data.shards is None) == (recipe.data.builtin is None):
        have = "both are set" if recipe.data.shards else "neither is set"
        yield ("data",), f"give exactly one of data.shards and data.builtin, {have}"
    yield from _batch_inconsistencies(recipe, world_size)
    for name, network in (("generator", recipe.generator), ("discriminator", recipe.discriminator)):
        if network.num_fp16_res > levels(r):
            text = f"{name}.num_fp16_res is {network.num_fp16_res}, allowed at resolution {r}: 0 to {levels(r)}"
            yield (name, "num_fp16_res"), text
        if network.channel_base < r:
            text = f"{name}.channel_base is {network.channel_base}, allowed at resolution {r}: {r} (1 channel) or more"
            yield (name, "channel_base"), text
    if recipe.init_from and Path(recipe.run_dir).resolve() in (p := Path(recipe.init_from).resolve(), *p.parents):
        text = f"init_from, {recipe.init_from}, lies in run_dir: a run resumes by itself, a branch has its own run_dir"
        yield ("init_from",), text
    if recipe.augment:
        yield from _augment_inconsistencies(recipe.augment)
    if recipe.hsr:
        yield from _hsr_inconsistencies(recipe.hsr, r, recipe.kimg)
    if recipe.metrics:
        yield from _metrics_inconsistencies(recipe.metrics)


def _batch_inconsistencies(recipe: Recipe, world_size: int) -> Iterator[tuple[KeyPath, str]]:
    batch, parts = recipe.batch, world_size * recipe.accumulation
    split = f"{world_size} rank{'s' * (world_size > 1)} × accumulation {recipe.accumulation}"
    if batch % parts:
        below = batch // parts * parts
        multiples = f"{below} or {below + parts}" if below else parts
        yield ("batch",), f"batch is {batch}, allowed: a multiple of {split} = {parts}, as {multiples}"
        return
    micro, group = batch // parts, recipe.discriminator.mbstd_group_size
    if micro % min(group, micro):
        divisors = ", ".join(str(d) for d in range(1, micro + 1) if micro % d == 0)
        text = (
            f"discriminator.mbstd_group_size is {group}, allowed: a divisor of the micro-batch "
            f"{batch} / ({split}) = {micro}: {divisors}"
        )
        yield ("discriminator", "mbstd_group_size"), text
    if recipe.path_length.active:
        shrink = recipe.path_length.batch_shrink
        if batch // shrink == 0 or batch // shrink % parts:
            text = (
                f"path_length.batch_shrink is {shrink}, which makes its batch {batch} // {shrink} = {batch // shrink}, "
                f"allowed: a multiple of {split} = {parts}"
            )
            yield ("path_length", "batch_shrink"), text


def _augment_inconsistencies(augment: Augment) -> Iterator[tuple[KeyPath, str]]:
    keys = AUGMENT_DEFAULTS[augment.mode]
    for key, value in augment:
        if key == "mode":
            continue
        if key in keys and value is None:
            default = "" if keys[key] is None else f", such as {keys[key]}"
            yield ("augment", key), f"augment.{key} is null, allowed in mode {augment.mode}: a value{default}"
        if key not in keys and value is not None:
            text = f"augment.{key} is {value}, allowed in mode {augment.mode}: null, which has {', '.join(keys)}"
            yield ("augment", key), text
    if augment.mode == "fixed" and augment.p == 0:
        yield ("augment", "p"), "augment.p is 0, allowed in mode fixed: above 0; without augmentation set augment: null"
    names = augment.policies
    if set(names) - set(POLICIES) or len(set(names)) < len(names):
        text = f"augment.policy is {augment.policy!r}, allowed: some of {','.join(POLICIES)}, each once"
        yield ("augment", "policy"), text


def _hsr_inconsistencies(hsr: Hsr, resolution: int, kimg: float) -> Iterator[tuple[KeyPath, str]]:
    blocks = [2**i for i in range(3, resolution.bit_length())]
    for r in hsr.layers:
        if r not in blocks:
            text = f"hsr.layers names resolution {r}, allowed in this network: {', '.join(map(str, blocks))}"
            yield ("hsr", "layers", r), text
    if hsr.weights_per_res is not None and hsr.weights_per_res.keys() != hsr.layers.keys():
        have, need = (", ".join(map(str, sorted(d))) or "none" for d in (hsr.weights_per_res, hsr.layers))
        yield ("hsr", "weights_per_res"), f"hsr.weights_per_res names {have}, allowed: all of hsr.layers, {need}"
    if hsr.weights and hsr.teacher.endswith(".safetensors"):
        yield ("hsr", "weights"), f"hsr.weights goes with a timm name, {hsr.teacher} holds its own: drop the key"
    if hsr.start_kimg >= kimg:
        yield ("hsr", "start_kimg"), f"hsr.start_kimg is {hsr.start_kimg:g}, allowed: below kimg = {kimg:g}"


def _metrics_inconsistencies(metrics: Metrics) -> Iterator[tuple[KeyPath, str]]:
    try:
        first, *others = parse_metrics(metrics.names)
    except UserError as error:
        yield ("metrics", "names"), f"metrics.names: {error}"
        return
    for metric in (first, *others):
        if metric.kind in ("ls", "als") and metrics.attributes is None:
            text = f"metrics.names has {metric.name}, allowed: with metrics.attributes from tools/fit_attributes.py"
            yield ("metrics", "names"), text
    if first.kind == "pr":
        text = f"metrics.names begins with {first.name}, allowed: a metric of one value, since it chooses the best"
        yield ("metrics", "names"), text
