"""Recipes: what a training run is, as strict models, and `load_recipe`: YAML file, preset, overrides → one `Recipe`.

Everything that can be told from the recipe alone is checked here, before anything is allocated; torch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.names import parse_metrics
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

Whole = Annotated[int, Field(ge=1)]
WholeOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]

NOT_EMPTY = "text that is not empty"
MAX_RESOLUTION = 4096


class Section(BaseModel):
    """Strict: no unknown key, no conversion but int → float, no infinity. Frozen: nothing changes it during a run."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Where the images come from: exactly one of `shards` and `builtin`."""

    shards: Annotated[Text, Field(description=NOT_EMPTY)] | None = None   # what it may say: engine/shard_sources.py
    builtin: Literal["digits"] | None = None        # scikit-learn's digits, packed on first use
    resolution: int = Field(ge=8, le=MAX_RESOLUTION, description=f"a power of two from 8 to {MAX_RESOLUTION}")
    channels: Literal[1, 3] = 3                     # grey or RGB
    mirror: bool = False                            # x-flips, half of the time
    labels: bool = False                            # train conditionally on the manifest's classes
    workers: WholeOrZero = 2                        # loader processes per rank
    window: Whole = 16                              # shards shuffled together
    resampled: bool = False                         # endless random shards instead of epochs
    max_bad: Share = 0.01                           # share of images that may be unusable and replaced; 0 = none
    cache: Annotated[Text, Field(description=NOT_EMPTY)] | None = None  # folder; null = ~/.cache/hsrgan/shards
    cache_gb: Positive = 64.0                       # 10⁹ bytes that fetched shards may take on this machine
    allow_shell: bool = False                       # pipe: and other URLs that run a program


class Generator(Section):
    z_dim: Whole = 512
    w_dim: Whole = 512
    mapping_layers: Whole = 8
    channel_base: Whole = 32768                     # channels at resolution r: min(channel_base / r, channel_max)
    channel_max: Whole = 512
    architecture: Literal["skip", "orig", "resnet"] = "skip"
    num_fp16_res: WholeOrZero                       # top resolutions in half precision, never below 8; ignored in fp32
    conv_clamp: Positive | None                     # bound on activations, in every precision
    mixing_prob: Share = 0.9
    lr: Positive                                    # before the lazy scaling k/(k+1), which the trainer does
    w_avg_beta: Beta = 0.998                        # of the moving average of w, per update


class Discriminator(Section):
    channel_base: Whole = 32768
    channel_max: Whole = 512
    architecture: Literal["resnet", "orig", "skip"] = "resnet"
    num_fp16_res: WholeOrZero
    conv_clamp: Positive | None
    mbstd_group_size: Whole                         # samples per minibatch-std group, at most the micro-batch
    lr: Positive
    mapping_layers: Whole = 8                       # conditional D only


class Adam(Section):
    """Before the lazy scaling of the betas, which the trainer does."""

    beta1: Beta = 0.0
    beta2: Beta = 0.99
    eps: Positive = 1e-8


class R1(Section):
    gamma: NotNegative
    interval: WholeOrZero = 16      # steps between two penalties, 0 = off

    @property
    def active(self) -> bool:
        return self.gamma > 0 and self.interval > 0


class PathLength(Section):
    weight: NotNegative = 2.0       # 0 = phase off, but the interval still scales G's lr (NVIDIA's cifar)
    interval: WholeOrZero = 4       # steps between two penalties, 0 = off and no scaling
    batch_shrink: Whole = 2         # the phase runs on batch // batch_shrink samples
    decay: Annotated[float, Field(gt=0, le=1)] = 0.01
    parity: bool = False            # gradient through the running mean, as NVIDIA's code has it

    @property
    def active(self) -> bool:
        return self.weight > 0 and self.interval > 0


class Ema(Section):
    kimg: NotNegative               # half-life
    rampup: Positive | None = None  # half-life ≤ rampup · images seen; null = no ramp


class Hsr(Section):
    """Hierarchical semantic regularisation, arXiv 2208.03764."""

    teacher: Text = Field(description="a .safetensors file of tools/fit_teacher.py or a timm model name")
    weights: Annotated[Text, Field(description=NOT_EMPTY)] | None = None    # file, for a timm name
    layers: dict[int, WholeOrZero] = Field(
        min_length=1, description="a mapping from resolution to teacher layer (0-based), as {8: 11, 16: 8}"
    )
    hidden: Whole = 4096            # channels between the two 1×1 convs of a predictor
    weight: NotNegative = 1.0       # λ
    weights_per_res: dict[int, NotNegative] | None = None     # λ_r for each resolution of `layers`; null = 1
    distance: Literal["mse", "cosine"] = "mse"
    start_kimg: NotNegative = 0.0   # HSR acts from here on
    ramp_kimg: NotNegative = 0.0    # λ rises linearly over this
    detach: bool = False            # control arm: the heads train, G does not feel it
    parity_normalize: bool = False  # the released code's mixed mean and std


class Metrics(Section):
    """Scores of the averaged G during training. The first of `names` decides which snapshot is the best."""

    names: Text = Field(description="published names, as fid50k_full,pr50k3_full")
    features: Annotated[Text, Field(description=NOT_EMPTY)] | None = None   # timm:MODEL:FILE or a teacher; null = own
    attributes: Annotated[Text, Field(description=NOT_EMPTY)] | None = None   # for ls and als: tools/fit_attributes.py


class Faults(Section):
    """What the run does when something fails."""

    nonfinite: Literal["skip", "mend"] = "skip"     # such a step changes nothing, or NaN → 0 and ±inf → ±1e5 in it
    max_nonfinite: Share = 0.1                      # share of a tick's steps; above it the run has diverged
    diverged: Literal["rollback", "stop"] = "rollback"  # to the last checkpoint, once; then stop
    disk_full: Literal["stop", "continue"] = "stop"     # also read-only, over quota, …
    rank_timeout: Annotated[float, Field(ge=1)] = 45.0          # seconds of silence after which a rank is lost
    rendezvous_timeout: Annotated[float, Field(ge=1)] = 300.0   # seconds for all ranks to find each other


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
    init_from: Annotated[Text, Field(description=NOT_EMPTY)] | None = None   # checkpoint folder to branch from
    data: Data
    generator: Generator
    discriminator: Discriminator
    adam: Adam
    r1: R1
    path_length: PathLength
    ema: Ema
    faults: Faults = Faults()
    hsr: Hsr | None = None
    metrics: Metrics | None = None

    def to_json(self) -> str:
        """The resolved recipe as one line of JSON with sorted keys: equal recipes give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


SECTIONS = ("data", "generator", "discriminator", "adam", "r1", "path_length", "ema")

# Keys on which the shapes of the parameters depend: a checkpoint is of no use to a recipe that differs in one of them.
NETWORK_KEYS = (
    "data.resolution", "data.channels", "data.labels",
    "generator.z_dim", "generator.w_dim", "generator.mapping_layers", "generator.channel_base",
    "generator.channel_max", "generator.architecture",
    "discriminator.channel_base", "discriminator.channel_max", "discriminator.architecture",
    "discriminator.mapping_layers",
    "hsr", "hsr.teacher", "hsr.layers", "hsr.hidden",   # the heads
)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, world_size: int = 1) -> Recipe:
    """The recipe in the file `path`, with `overrides` ("r1.gamma=1", value read as YAML) over it, resolved and checked.

    Precedence: override, file, preset, default. `world_size` is the number of ranks: the preset `auto` and the
    divisibility of the batch depend on it. Two defaults depend on other keys: `num_fp16_res` is 4, or as many as the
    resolution has; `conv_clamp` is 256 in half precision and null in fp32 (as NVIDIA's --fp32).

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
    problems = list(_inconsistencies(recipe, world_size))
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
    if not _is_count(resolution):
        resolution = 256    # missing or wrong: validation says so; until then any value does
    if isinstance(preset, str) and preset in PRESETS:
        batch = batch if _is_count(batch) else None
        for key, value in preset_values(preset, resolution=resolution, world_size=world_size, batch=batch).items():
            source.set_default(tuple(key.split(".")), value)
    half = source.get(("precision",)) in ("fp16", "bf16")
    for network in ("generator", "discriminator"):
        source.set_default((network, "num_fp16_res"), min(4, _levels(resolution)))
        source.set_default((network, "conv_clamp"), 256.0 if half else None)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _levels(resolution: int) -> int:
    """Resolutions of a network: 4, 8, … resolution."""
    return max(resolution.bit_length() - 2, 0)


def _inconsistencies(recipe: Recipe, world_size: int) -> Iterator[tuple[KeyPath, str]]:
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
        if network.num_fp16_res > _levels(r):
            text = f"{name}.num_fp16_res is {network.num_fp16_res}, allowed at resolution {r}: 0 to {_levels(r)}"
            yield (name, "num_fp16_res"), text
        if network.channel_base < r:
            text = f"{name}.channel_base is {network.channel_base}, allowed at resolution {r}: {r} (1 channel) or more"
            yield (name, "channel_base"), text
    if recipe.init_from and Path(recipe.run_dir).resolve() in (p := Path(recipe.init_from).resolve(), *p.parents):
        text = f"init_from, {recipe.init_from}, lies in run_dir: a run resumes by itself, a branch has its own run_dir"
        yield ("init_from",), text
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


def check_paths(recipe: Recipe) -> None:
    """Raise `UserError` when a file that the recipe reads is missing (not init_from: only the first start reads it)."""
    paths = {"data.shards": recipe.data.shards}
    if recipe.hsr:
        paths["hsr.weights"] = recipe.hsr.weights
        paths["hsr.teacher"] = recipe.hsr.teacher if recipe.hsr.teacher.endswith(".safetensors") else None
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
    """Raise `UserError` when `checkpoint`, made under the recipe `saved`, has parameters of other shapes."""
    for key in recipe_differences(saved, recipe):
        if key in NETWORK_KEYS or key.startswith("hsr.layers."):
            was, now = (_value(x, key) for x in (saved, recipe))
            raise UserError(
                f"checkpoint {checkpoint} was made with {key} = {was}, the recipe says {now}: "
                f"set {key} back, or train from the start in another run_dir"
            )


def _value(recipe: Recipe | str, key: str) -> str:
    value = json.loads(recipe if isinstance(recipe, str) else recipe.to_json())
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "a section" if isinstance(value, dict) else json.dumps(value)
