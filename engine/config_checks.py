"""What is wrong between keys of a recipe that are each right alone, told before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.names import parse_metrics
from hsrgan.engine.recipe_file import KeyPath
from hsrgan.engine.sections import AUGMENT_DEFAULTS, POLICIES, Augment, Data, Hsr, Metrics
from hsrgan.engine.sizes import block_sizes

if TYPE_CHECKING:
    from hsrgan.engine.config import Recipe


def inconsistencies(recipe: Recipe, world_size: int) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong between keys that are each right alone."""
    try:
        blocks = list(block_sizes(recipe.data.resolution, "data.resolution"))
    except UserError as error:
        yield ("data", "resolution"), str(error)
        return      # the other checks count on it
    r = blocks[-1]
    if (recipe.data.shards is None) == (recipe.data.builtin is None):
        have = "both are set" if recipe.data.shards else "neither is set"
        yield ("data",), f"give exactly one of data.shards and data.builtin, {have}"
    if recipe.data.builtin:
        yield from _builtin_inconsistencies(recipe.data)
    if recipe.data.balanced and recipe.data.resampled:
        text = "data.balanced is true, allowed: with data.resampled: false, since it reads all shards at once"
        yield ("data", "balanced"), text
    yield from _batch_inconsistencies(recipe, world_size)
    for name, network in (("generator", recipe.generator), ("discriminator", recipe.discriminator)):
        if network.num_fp16_res > len(blocks):
            text = f"{name}.num_fp16_res is {network.num_fp16_res}, allowed at resolution {r}: 0 to {len(blocks)}"
            yield (name, "num_fp16_res"), text
        if network.channel_base < r:
            text = f"{name}.channel_base is {network.channel_base}, allowed at resolution {r}: {r} (1 channel) or more"
            yield (name, "channel_base"), text
    if recipe.init_from and Path(recipe.run_dir).resolve() in (p := Path(recipe.init_from).resolve(), *p.parents):
        text = f"init_from, {recipe.init_from}, lies in run_dir: a run resumes by itself, a branch has its own run_dir"
        yield ("init_from",), text
    if recipe.freeze:
        per_block = {"orig": 2, "resnet": 3, "skip": 3}[recipe.discriminator.architecture]
        layers = per_block * (len(blocks) - 1) + (recipe.discriminator.architecture != "skip")  # one fromrgb
        if recipe.freeze.d > layers:
            text = f"freeze.d is {recipe.freeze.d}, allowed for this discriminator: 0 to {layers}, its layers above 4×4"
            yield ("freeze", "d"), text
    power = [f"{length:.3f}" for length in recipe.ema.power]
    if len(set(power)) < len(power):
        yield ("ema", "power"), f"ema.power is {recipe.ema.power}, allowed: lengths that differ in three decimals"
    for section_name, section in recipe.on_teachers.items():
        if section.weights and section.teacher.endswith(".safetensors"):
            text = f"{section_name}.weights goes with a timm name, {section.teacher} holds its own: drop the key"
            yield (section_name, "weights"), text
    if recipe.augment:
        yield from _augment_inconsistencies(recipe.augment)
    if recipe.hsr:
        yield from _hsr_inconsistencies(recipe.hsr, blocks[1:], recipe.kimg)
    for name, section in (("projected", recipe.projected), ("vision_aided", recipe.vision_aided)):
        if section and len(set(section.layers)) < len(section.layers):
            twice = next(layer for layer in section.layers if section.layers.count(layer) > 1)
            yield (name, "layers"), f"{name}.layers names layer {twice} twice, allowed: each layer once"
    if recipe.metrics:
        yield from _metrics_inconsistencies(recipe.metrics)


def _builtin_inconsistencies(data: Data) -> Iterator[tuple[KeyPath, str]]:
    r = data.resolution
    if not isinstance(r, int) or r & (r - 1):
        yield ("data", "resolution"), f"data.resolution is {r}, allowed for the built-in digits: a power of two"
    if data.channels == 4:
        yield ("data", "channels"), "data.channels is 4, allowed for the built-in digits: 1 or 3"


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


def _hsr_inconsistencies(hsr: Hsr, blocks: list[int], kimg: float) -> Iterator[tuple[KeyPath, str]]:
    for r in hsr.layers:
        if r not in blocks:
            text = f"hsr.layers names resolution {r}, allowed in this network: {', '.join(map(str, blocks))}"
            yield ("hsr", "layers", r), text
    if hsr.weights_per_res is not None and hsr.weights_per_res.keys() != hsr.layers.keys():
        have, need = (", ".join(map(str, sorted(d))) or "none" for d in (hsr.weights_per_res, hsr.layers))
        yield ("hsr", "weights_per_res"), f"hsr.weights_per_res names {have}, allowed: all of hsr.layers, {need}"
    elif hsr.weights_per_res and not any(hsr.weights_per_res.values()):
        text = "hsr.weights_per_res is 0 everywhere, allowed: one above 0; without HSR set hsr: null"
        yield ("hsr", "weights_per_res"), text
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
