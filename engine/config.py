"""Recipes: what a training run is, as strict models, and `load_recipe`: YAML file, preset, overrides → one `Recipe`.

Everything that can be told from the recipe alone is checked here, before anything is allocated; torch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from hsrgan.engine.config_checks import inconsistencies
from hsrgan.engine.errors import UserError
from hsrgan.engine.presets import PRESETS, preset_values
from hsrgan.engine.recipe_file import (
    KeyPath,
    Source,
    apply_overrides,
    dotted,
    read_recipe_file,
    type_problem,
    unknown_keys,
)
from hsrgan.engine.sections import (
    AUGMENT_DEFAULTS,
    NOT_EMPTY,
    R1,
    R2,
    Adam,
    Augment,
    Data,
    Discriminator,
    Ema,
    Faults,
    Freeze,
    Generator,
    Hsr,
    Metrics,
    Objective,
    PathLength,
    Positive,
    Projected,
    Section,
    Text,
    VisionAided,
    Whole,
)
from hsrgan.engine.sizes import block_sizes


class Recipe(Section):
    """One training run, resolved: preset and defaults are filled in. kimg is thousands of real images everywhere."""

    run_dir: Text = Field(description=NOT_EMPTY)
    seed: int = Field(0, ge=0, le=2**32 - 1)
    preset: Literal["stylegan2", "paper256", "paper512", "paper1024", "cifar", "auto"] | None = None
    kimg: Positive
    batch: Whole                                    # images per step over all ranks
    accumulation: Whole = 1                         # micro-batch = batch / (ranks · accumulation)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    tf32: bool = False                              # what is fp32 is multiplied on tensor cores at 10 bits of mantissa
    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: int = Field(0, ge=0, le=3)
    cuda_graphs: bool = True                        # replay each phase as one graph; without effect on a CPU
    tick_kimg: Positive = 4.0                       # one line of log.jsonl
    checkpoint_kimg: Positive = 50.0
    image_kimg: Positive = 50.0
    snapshot_kimg: Positive = 200.0
    metrics_kimg: Positive = 200.0                  # between two evaluations by `metrics`
    keep_checkpoints: Whole = 2                     # the newest; with metrics, that of the best score too
    keep_every_kimg: Positive | None = None         # and the first one after each multiple of this
    dry_run: bool = False                           # say what would run, from 20 steps of it, and end
    init_from: Annotated[Text, Field(description=NOT_EMPTY)] | None = None   # what to start from: engine/transfer.py
    data: Data
    generator: Generator
    discriminator: Discriminator
    adam: Adam
    objective: Objective = Objective()
    r1: R1
    r2: R2 = R2()
    path_length: PathLength
    ema: Ema
    faults: Faults = Faults()
    freeze: Freeze | None = None
    augment: Augment | None = None
    hsr: Hsr | None = None
    projected: Projected | None = None
    vision_aided: VisionAided | None = None
    metrics: Metrics | None = None

    @property
    def on_teachers(self) -> dict[str, Hsr | Projected | VisionAided]:
        """The sections that name a teacher, where they are there."""
        sections = {"hsr": self.hsr, "projected": self.projected, "vision_aided": self.vision_aided}
        return {name: section for name, section in sections.items() if section}

    @property
    def d_interval(self) -> float:
        """Main steps of D for each lazy one; 0: there are none. R1's interval counts without a weight too, as NVIDIA's
        does.
        """
        if not self.r2.active:
            return self.r1.interval
        return 1 / ((1 / self.r1.interval if self.r1.interval else 0) + 1 / self.r2.interval)

    def to_json(self) -> str:
        """The resolved recipe as one line of JSON with sorted keys: equal recipes give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


SECTIONS = ("data", "generator", "discriminator", "adam", "objective", "r1", "r2", "path_length", "ema")

# Keys on which the shapes of the parameters depend: a checkpoint is of no use to a recipe that differs in one of them.
NETWORK_KEYS = (
    "data.resolution", "data.channels", "data.labels",
    "generator.z_dim", "generator.w_dim", "generator.mapping_layers", "generator.channel_base",
    "generator.channel_max", "generator.architecture",
    "discriminator.channel_base", "discriminator.channel_max", "discriminator.architecture",
    "discriminator.mapping_layers",
    "hsr", "hsr.teacher", "hsr.layers", "hsr.hidden",   # the heads
    "projected", "projected.teacher", "projected.layers", "projected.channels",     # D's heads
    "vision_aided", "vision_aided.teacher", "vision_aided.layers", "vision_aided.hidden",
)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, world_size: int = 1) -> Recipe:
    """The recipe in the file `path`, with `overrides` ("r1.gamma=1", value read as YAML) over it, resolved and checked.

    Precedence: override, file, preset, default. `world_size` is the number of ranks: the preset `auto` and the
    divisibility of the batch depend on it. Some defaults depend on other keys: `num_fp16_res` is 4, or as many as the
    resolution has; `conv_clamp` is 256 in half precision and null in fp32 (as NVIDIA's --fp32); those of `augment` are
    its mode's.

    Raises `UserError`, one line: file and line (or the override), the key, what was found and what is allowed.
    """
    source = read_recipe_file(path)
    apply_overrides(source, list(overrides), Recipe)
    problems = unknown_keys(source, Recipe)
    if problems:
        source.fail(problems)
    _fill(source, world_size)
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        source.fail([_problem(e["loc"], e["input"], e["type"]) for e in error.errors()])
    problems = list(inconsistencies(recipe, world_size))
    if problems:
        source.fail(problems)
    return recipe


def _problem(path: KeyPath, value: Any, kind: str) -> tuple[KeyPath, str]:
    where, text = type_problem(Recipe, path, value, kind)
    if kind == "missing" and dotted(path) in preset_values("auto", resolution=256, world_size=1):
        text += " or set preset: auto"      # with a preset set, none of these can be missing
    return where, text


def _fill(source: Source, world_size: int) -> None:
    """Preset and dependent defaults, for keys that neither the file nor an override sets."""
    for name in SECTIONS:   # a section left empty (`r1:`) is one with no key set
        if source.values.get(name) is None:
            source.values[name] = {}
    resolution, batch, preset = (source.get(p) for p in (("data", "resolution"), ("batch",), ("preset",)))
    try:
        levels = len(block_sizes(resolution))
    except UserError:       # missing or wrong: validation says so; until then any value does
        resolution, levels = 256, 7
    if isinstance(preset, str) and preset in PRESETS:
        batch = batch if _is_count(batch) else None
        for key, value in preset_values(preset, resolution=resolution, world_size=world_size, batch=batch).items():
            source.set_default(tuple(key.split(".")), value)
    half = source.get(("precision",)) in ("fp16", "bf16")
    for network in ("generator", "discriminator"):
        source.set_default((network, "num_fp16_res"), min(4, levels))
        source.set_default((network, "conv_clamp"), 256.0 if half else None)
    if isinstance(augment := source.get(("augment",)), dict):
        mode = augment.setdefault("mode", "ada")
        for key, value in (AUGMENT_DEFAULTS.get(mode, {}) if isinstance(mode, str) else {}).items():
            augment.setdefault(key, value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def check_paths(recipe: Recipe, *, data: bool = True) -> None:
    """Raise `UserError` when a file that the recipe reads is missing (not init_from: only the first start reads it).
    data: look for its shards too.
    """
    paths = {"data.shards": recipe.data.shards} if data else {}
    for name, section in recipe.on_teachers.items():
        paths[f"{name}.weights"] = section.weights
        paths[f"{name}.teacher"] = section.teacher if section.teacher.endswith(".safetensors") else None
    if recipe.metrics:
        paths["metrics.attributes"] = recipe.metrics.attributes
    for key, path in paths.items():
        pattern = key == "data.shards" and path and any(mark in path for mark in (":", "{"))
        if path and not pattern and not Path(path).exists():
            raise UserError(f"{key}: {path} does not exist (looked for from {Path.cwd()})")


def recipe_differences(a: Recipe | str, b: Recipe | str) -> list[str]:
    """Dotted keys in which two resolved recipes (or the text of their `to_json`) differ, sorted."""
    left, right = (json.loads(x if isinstance(x, str) else x.to_json()) for x in (a, b))

    def differences(x: Any, y: Any, path: KeyPath) -> Iterator[str]:
        if isinstance(x, dict) and isinstance(y, dict):
            for key in x.keys() | y.keys():
                yield from differences(x.get(key), y.get(key), (*path, key))
        elif x != y:
            yield dotted(path)

    return sorted(differences(left, right, ()))


def check_same_networks(saved: Recipe | str, recipe: Recipe, *, checkpoint: str | Path) -> None:
    """Raise `UserError` when `checkpoint`, made under the recipe `saved`, has parameters of other shapes, or none where
    `recipe` has some; HSR's heads alone may be left (`Checkpoint.without_heads`).
    """
    for key in recipe_differences(saved, recipe):
        if key == "hsr" and recipe.hsr is None:
            continue
        if key in NETWORK_KEYS or key.startswith("hsr.layers."):
            was, now = (_value(x, key) for x in (saved, recipe))
            raise UserError(
                f"checkpoint {checkpoint} was made with {key} = {was}, the recipe says {now}: "
                f"set {key} back, or take what fits into another run_dir with init_from={checkpoint}"
            )


def _value(recipe: Recipe | str, key: str) -> str:
    value = json.loads(recipe if isinstance(recipe, str) else recipe.to_json())
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "a section" if isinstance(value, dict) else json.dumps(value)
