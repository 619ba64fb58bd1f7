"""Recipes: the shipped ones, presets, overrides, and the one line that every mistake gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrgan.engine.config import (
    Recipe,
    check_paths,
    check_same_networks,
    load_recipe,
    recipe_differences,
)
from hsrgan.engine.errors import UserError
from hsrgan.engine.presets import PRESETS
from hsrgan.engine.recipe_file import dotted, leaves
from hsrgan.engine.sizes import RULE

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SHIPPED = [
    "afhq_512", "afhqv2_512", "auto", "church_256", "cifar10", "ffhq_1024", "ffhq_256", "ffhq_256_baseline",
    "low_shot_256", "lsun_car_384x512", "metfaces_1024", "projected_256", "quickstart", "r3gan_ffhq_256",
    "transfer_256", "vision_aided_256",
]  # fmt: skip
KEYS = [dotted(path) for path in leaves(Recipe)]

PLAIN = """\
run_dir: runs/test
kimg: 100
batch: 32
data:
  builtin: digits
  resolution: 32
generator:
  lr: 0.002
discriminator:
  lr: 0.002
  mbstd_group_size: 4
r1:
  gamma: 1
ema:
  kimg: 10
hsr:
  teacher: teacher.safetensors
  layers: {8: 2, 16: 1}
"""
HEADED = PLAIN + "projected: {teacher: t.safetensors, layers: [1, 3]}\n"
MINIMAL = "run_dir: runs/test\ndata: {builtin: digits, resolution: 32}\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A recipe from text, read as r.yaml in the working folder, so that messages are predictable."""
    monkeypatch.chdir(tmp_path)

    def from_text(text, *overrides, world_size=1):
        Path("r.yaml").write_text(text)
        return load_recipe("r.yaml", list(overrides), world_size=world_size)

    return from_text


def value_of(recipe, key):
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def as_yaml(value):
    """A value as an override spells it; JSON would quote the keys of hsr.layers."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


# The shipped recipes


def test_the_promised_recipes_are_shipped():
    assert [path.stem for path in RECIPES] == SHIPPED


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_shipped_recipe_parses(path, world_size):
    few = ["path_length.batch_shrink=1"] if path.stem == "low_shot_256" and world_size == 8 else []
    recipe = load_recipe(path, few, world_size=world_size)     # half of a batch of 8 does not divide among 8
    assert recipe.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_recipe_can_be_overridden(path):
    recipe = load_recipe(path)
    off = tuple(f"{section}." for section in Recipe.model_fields if getattr(recipe, section) is None)
    keys = [key for key in KEYS if not key.startswith(off)]
    assert load_recipe(path, [f"{key}={as_yaml(value_of(recipe, key))}" for key in keys]) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_recipe_has_a_comment(path):
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert [line for line in lines if not line.partition(" #")[2].strip()] == []


def test_the_two_stages_of_ffhq_256_are_the_papers():
    """2 GPUs × 8, γ 1, lr .002, mbstd 4, EMA 10, mirror, paper256 widths; DINO ViT-B/16, blocks 11, 8, 5, 2."""
    by_name = {path.stem: path for path in RECIPES}
    base, hsr = (load_recipe(by_name[name], world_size=2) for name in ("ffhq_256_baseline", "ffhq_256"))
    for recipe in (base, hsr):
        assert (recipe.batch, recipe.r1.gamma, recipe.ema.kimg, recipe.ema.rampup) == (16, 1, 10, None)
        assert (recipe.generator.lr, recipe.discriminator.lr) == (0.002, 0.002)
        assert recipe.discriminator.mbstd_group_size == 4
        assert (recipe.generator.channel_base, recipe.generator.mapping_layers, recipe.data.mirror) == (16384, 8, True)
    assert base.kimg == 500 and base.hsr is None
    assert hsr.init_from == f"{base.run_dir}/checkpoints/{round(base.kimg * 1000):09d}"
    assert hsr.hsr.teacher == "vit_base_patch16_224.dino" and hsr.hsr.layers == {8: 11, 16: 8, 32: 5, 64: 2}
    assert (hsr.hsr.hidden, hsr.hsr.weight, hsr.hsr.distance, hsr.hsr.start_kimg) == (4096, 1, "mse", 0)
    allowed = ("run_dir", "kimg", "init_from", "checkpoint_kimg", "hsr")
    assert [key for key in recipe_differences(base, hsr) if key not in allowed] == []


# Presets

PRESET_KEYS = (
    "kimg", "batch", "discriminator.mbstd_group_size", "generator.channel_base", "generator.lr", "r1.gamma", "ema.kimg",
    "ema.rampup", "generator.mapping_layers", "path_length.weight", "generator.mixing_prob",
    "discriminator.architecture",
)  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "resolution", "world_size", "expected"),
    [
        ("stylegan2", 256, 8, (25000, 32, 4, 32768, 0.002, 10, 10, None, 8, 2, 0.9, "resnet")),
        ("paper256", 256, 8, (25000, 64, 8, 16384, 0.0025, 1, 20, None, 8, 2, 0.9, "resnet")),
        ("paper512", 512, 8, (25000, 64, 8, 32768, 0.0025, 0.5, 20, None, 8, 2, 0.9, "resnet")),
        ("paper1024", 1024, 8, (25000, 32, 4, 32768, 0.002, 2, 10, None, 8, 2, 0.9, "resnet")),
        ("cifar", 32, 2, (100000, 64, 32, 32768, 0.0025, 0.01, 500, 0.05, 2, 0, 0, "orig")),
        ("auto", 256, 1, (25000, 16, 4, 16384, 0.0025, 0.8192, 5, 0.05, 2, 2, 0.9, "resnet")),
        ("auto", 256, 8, (25000, 64, 4, 16384, 0.0025, 0.2048, 20, 0.05, 2, 2, 0.9, "resnet")),
        ("auto", 1024, 8, (25000, 32, 4, 32768, 0.002, 6.5536, 10, 0.05, 2, 2, 0.9, "resnet")),
        ("auto", 512, 2, (25000, 16, 4, 32768, 0.0025, 3.2768, 5, 0.05, 2, 2, 0.9, "resnet")),
        ("auto", 32, 128, (25000, 128, 1, 16384, 0.0025, 0.0016, 40, 0.05, 2, 2, 0.9, "resnet")),
    ],
)
def test_preset_values(load, preset, resolution, world_size, expected):
    # from 33 ranks on, half of `auto`'s batch no longer divides: no path length there
    off = ["path_length.interval=0"] if world_size == 128 else []
    recipe = load(MINIMAL, f"preset={preset}", f"data.resolution={resolution}", *off, world_size=world_size)
    found = {key: value_of(recipe, key) for key in PRESET_KEYS}
    assert found == pytest.approx(dict(zip(PRESET_KEYS, expected, strict=True)))
    assert recipe.discriminator.channel_base == recipe.generator.channel_base
    assert recipe.discriminator.lr == recipe.generator.lr
    # shared by all presets
    for network in (recipe.generator, recipe.discriminator):
        assert (network.channel_max, network.num_fp16_res) == (512, 4)
    assert (recipe.generator.z_dim, recipe.generator.w_dim, recipe.generator.architecture) == (512, 512, "skip")
    assert (recipe.discriminator.mapping_layers, recipe.r1.interval) == (8, 16)
    assert (recipe.adam.beta1, recipe.adam.beta2, recipe.adam.eps) == (0, 0.99, 1e-8)


def test_cifar_has_no_path_length_but_keeps_its_interval(load):
    path_length = load(MINIMAL, "preset=cifar").path_length
    assert not path_length.active and path_length.interval == 4


def test_every_preset_is_a_value_of_the_key(load):
    assert [load(MINIMAL, f"preset={name}").preset for name in PRESETS] == list(PRESETS)


def test_what_the_user_sets_beats_the_preset(load):
    recipe = load(MINIMAL + "preset: cifar\nbatch: 8\nema: {rampup: null}\n", "generator.lr=1e-3", "batch=16")
    assert (recipe.batch, recipe.generator.lr, recipe.ema.rampup) == (16, 0.001, None)
    assert (recipe.discriminator.lr, recipe.ema.kimg) == (0.0025, 500)      # neighbours keep the preset's


def test_auto_reckons_with_the_users_batch(load):
    recipe = load(MINIMAL, "preset=auto", "batch=8", "data.resolution=256", world_size=4)
    assert recipe.r1.gamma == pytest.approx(0.0002 * 256**2 / 8)
    assert (recipe.ema.kimg, recipe.discriminator.mbstd_group_size) == (2.5, 2)


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E3", 1000.0), ("2", 2.0), (".5", 0.5), ("+3.", 3.0), ("1_000", 1000.0)],
)
def test_numbers_are_read_as_a_person_writes_them(load, text, value):
    recipe = load(PLAIN.replace("gamma: 1", f"gamma: {text}"))
    assert recipe.r1.gamma == value and type(recipe.r1.gamma) is float
    assert load(PLAIN, f"r1.gamma={text}") == recipe


def test_null(load):
    assert load(PLAIN, "hsr=null").hsr is None
    assert load(PLAIN.partition("hsr:")[0] + "hsr:\n").hsr is None
    assert load(PLAIN + "path_length:\nadam:\n") == load(PLAIN)      # a section whose keys are all commented out


def test_overrides_of_layers(load):
    assert load(PLAIN, "hsr.layers.8=5").hsr.layers == {8: 5, 16: 1}
    assert load(PLAIN, "hsr.layers.32=0").hsr.layers == {8: 2, 16: 1, 32: 0}
    assert load(PLAIN, "hsr.layers={32: 0}").hsr.layers == {32: 0}
    assert load(PLAIN, "batch=64", "batch=16").batch == 16


def test_conv_clamp_follows_the_precision_unless_set(load):
    assert load(PLAIN).generator.conv_clamp is None and load(PLAIN).discriminator.conv_clamp is None
    half = load(PLAIN, "precision=bf16", "discriminator.conv_clamp=null")
    assert (half.generator.conv_clamp, half.discriminator.conv_clamp) == (256, None)
    assert load(PLAIN, "generator.conv_clamp=128").generator.conv_clamp == 128


def test_half_resolutions_end_at_the_networks_depth(load):
    assert load(PLAIN, "data.resolution=16").generator.num_fp16_res == 3
    assert load(PLAIN, "data.resolution=64").generator.num_fp16_res == 4


def test_a_recipe_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load(PLAIN).batch = 8


# Mistakes: (lines replaced, overrides, ranks, the line)

MISTAKES = {
    "unknown key": (("gamma: 1", "gama: 1"), [], 1, "r.yaml line 13: unknown key r1.gama, did you mean r1.gamma?"),
    "unknown section": (("ema:", "emma:"), [], 1, "r.yaml line 14: unknown key emma, did you mean ema?"),
    "key of a section at top level": (
        ("batch: 32", "lr: 32"), [], 1,
        "r.yaml line 3: unknown key lr, did you mean discriminator.lr or generator.lr?",
    ),
    "nothing near": (
        ("gamma: 1", "zzz: 1"), [], 1, "r.yaml line 13: unknown key r1.zzz, known here: gamma, interval",
    ),
    "two at once": (
        ("batch: 32", "batch: many\nseed: -1"), [], 1,
        "r.yaml line 4: seed is -1, allowed: a whole number from 0 to 4294967295; "
        "r.yaml line 3: batch is 'many', allowed: a whole number of at least 1",
    ),
    "whole number": (
        ("batch: 32", "batch: 1.5"), [], 1, "r.yaml line 3: batch is 1.5, allowed: a whole number of at least 1",
    ),
    "number": (("gamma: 1", "gamma: big"), [], 1, "r.yaml line 13: r1.gamma is 'big', allowed: a number of at least 0"),
    "bool for a number": (
        ("gamma: 1", "gamma: true"), [], 1, "r.yaml line 13: r1.gamma is true, allowed: a number of at least 0",
    ),
    "infinity": (("kimg: 100", "kimg: .inf"), [], 1, "r.yaml line 2: kimg is inf, allowed: a number above 0"),
    "yes for true": (
        ("  resolution: 32", "  resolution: 32\n  mirror: yes"), [], 1,
        "r.yaml line 7: data.mirror is 'yes', allowed: true or false",
    ),
    "number for text": (
        ("run_dir: runs/test", "run_dir: 7"), [], 1, "r.yaml line 1: run_dir is 7, allowed: text that is not empty",
    ),
    "null": (("batch: 32", "batch:"), [], 1, "r.yaml line 3: batch is null, allowed: a whole number of at least 1"),
    "one of": ((), ["precision=fp8"], 1, "override precision=fp8: precision is 'fp8', allowed: fp32 or fp16 or bf16"),
    "one of, or null": (
        (), ["preset=auo"], 1,
        "override preset=auo: preset is 'auo', allowed: "
        "stylegan2 or paper256 or paper512 or paper1024 or cifar or auto or null",
    ),
    "list for a section": (
        ("r1:\n  gamma: 1", "r1: [1]"), [], 1,
        "r.yaml line 12: r1 is a list, allowed: a section with the keys gamma, interval",
    ),
    "out of range": (
        (), ["zero_stage=4"], 1, "override zero_stage=4: zero_stage is 4, allowed: a whole number from 0 to 3",
    ),
    "half-open range": (
        (), ["adam.beta2=1"], 1, "override adam.beta2=1: adam.beta2 is 1, allowed: a number of at least 0 and below 1",
    ),
    "missing": (
        ("  gamma: 1\n", "  interval: 8\n"), [], 1,
        "r.yaml line 12: r1.gamma is missing, give it a number of at least 0 or set preset: auto",
    ),
    "missing, no preset has it": (
        ("run_dir: runs/test\n", "preset: auto\n"), [], 1, "r.yaml: run_dir is missing, give it text that is not empty",
    ),
    "set twice": (("batch: 32", "batch: 32\nbatch: 16"), [], 1, "r.yaml line 4: batch is set twice, first on line 3"),
    "not YAML": (
        ("batch: 32", "batch: [32"), [], 1, "recipe r.yaml line 4: not valid YAML: expected ',' or ']', but got ':'",
    ),
    "tab": (
        ("  gamma: 1", "\tgamma: 1"), [], 1,
        "recipe r.yaml line 13: not valid YAML: found character '\\t' that cannot start any token",
    ),
    "tag": (
        ("batch: 32", "batch: !!timestamp 1"), [], 1,
        "r.yaml line 3: a recipe has no values of type tag:yaml.org,2002:timestamp",
    ),
    "sexagesimal layers": (
        (), ["hsr.layers={8:11}"], 1,
        "override hsr.layers={8:11}: hsr.layers has the key '8:11', allowed: a whole number; "
        "override hsr.layers={8:11}: hsr.layers.8:11 is null, allowed: a whole number of at least 0",
    ),
    "no layers": (
        (), ["hsr.layers={}"], 1,
        "override hsr.layers={}: hsr.layers is empty, allowed: "
        "a mapping from resolution to teacher layer (0-based), as {8: 11, 16: 8}",
    ),
    "override without value": ((), ["batch="], 1, "override 'batch=' has no value (write batch=null for none)"),
    "override without =": ((), ["batch"], 1, "override 'batch' is not of the form key=value, as in r1.gamma=1"),
    "override with dashes": (
        (), ["--batch=8"], 1, "override '--batch=8' is not of the form key=value, as in r1.gamma=1",
    ),
    "override of an unknown key": (
        (), ["generator.lrr=1"], 1, "override 'generator.lrr=1': unknown key generator.lrr, did you mean generator.lr?",
    ),
    "override below a value": ((), ["batch.x=1"], 1, "override 'batch.x=1': batch is a single value, it has no key x"),
    "override not YAML": (
        (), ["batch={"], 1, "override 'batch={': not valid YAML: expected the node content, but found '<stream end>'",
    ),
    "resolution": (
        (), ["data.resolution=100"], 1,
        f"override data.resolution=100: data.resolution is 100, allowed: {RULE}; the nearest: 104 and 96",
    ),
    "small resolution": (
        (), ["data.resolution=4"], 1,
        f"override data.resolution=4: data.resolution is 4, allowed: {RULE}; the nearest: 8 and 10",
    ),
    "rectangle": (
        (), ["data.resolution=[500, 700]"], 1,
        f"override data.resolution=[500, 700]: data.resolution is [500, 700], allowed: {RULE}; "
        "the nearest: [512, 704] and [512, 640]",
    ),
    "rectangle of three": (
        (), ["data.resolution=[8, 8, 8]"], 1,
        "override data.resolution=[8, 8, 8]: data.resolution is a list, allowed: a side in pixels or "
        "[height, width], up to 4096",
    ),
    "rectangular digits": (
        (), ["data.resolution=[16, 24]"], 1,
        "override data.resolution=[16, 24]: data.resolution is [16, 24], allowed for the built-in digits: "
        "a power of two",
    ),
    "digits with alpha": (
        (), ["data.channels=4"], 1,
        "override data.channels=4: data.channels is 4, allowed for the built-in digits: 1 or 3",
    ),
    "no such channels": (
        (), ["data.channels=2"], 1, "override data.channels=2: data.channels is 2, allowed: 1 or 3 or 4",
    ),
    "half blocks of a rectangle": (
        ("builtin: digits", "shards: x"), ["data.resolution=[16, 24]", "generator.num_fp16_res=4"], 1,
        "override generator.num_fp16_res=4: generator.num_fp16_res is 4, allowed at resolution 16: 0 to 3",
    ),
    "no data": (
        (), ["data.builtin=null"], 1, "r.yaml line 4: give exactly one of data.shards and data.builtin, neither is set",
    ),
    "two data": (
        (), ["data.shards=x"], 1, "r.yaml line 4: give exactly one of data.shards and data.builtin, both are set",
    ),
    "batch not divisible": (
        (), ["accumulation=3"], 2,
        "r.yaml line 3: batch is 32, allowed: a multiple of 2 ranks × accumulation 3 = 6, as 30 or 36",
    ),
    "batch below the ranks": (
        ("batch: 32", "batch: 1"), [], 2,
        "r.yaml line 3: batch is 1, allowed: a multiple of 2 ranks × accumulation 1 = 2, as 2",
    ),
    "mbstd": (
        ("batch: 32", "batch: 12"), ["discriminator.mbstd_group_size=5"], 1,
        "override discriminator.mbstd_group_size=5: discriminator.mbstd_group_size is 5, allowed: "
        "a divisor of the micro-batch 12 / (1 rank × accumulation 1) = 12: 1, 2, 3, 4, 6, 12",
    ),
    "path length's batch": (
        (), ["path_length.batch_shrink=3"], 4,
        "override path_length.batch_shrink=3: path_length.batch_shrink is 3, which makes its batch 32 // 3 = 10, "
        "allowed: a multiple of 4 ranks × accumulation 1 = 4",
    ),
    "path length's empty batch": (
        (), ["path_length.batch_shrink=33"], 1,
        "override path_length.batch_shrink=33: path_length.batch_shrink is 33, which makes its batch 32 // 33 = 0, "
        "allowed: a multiple of 1 rank × accumulation 1 = 1",
    ),
    "too many half resolutions": (
        (), ["generator.num_fp16_res=5"], 1,
        "override generator.num_fp16_res=5: generator.num_fp16_res is 5, allowed at resolution 32: 0 to 4",
    ),
    "no channel": (
        (), ["discriminator.channel_base=16"], 1,
        "override discriminator.channel_base=16: discriminator.channel_base is 16, "
        "allowed at resolution 32: 32 (1 channel) or more",
    ),
    "init_from its own run": (
        (), ["init_from=./runs/test/checkpoints/01"], 1,
        "override init_from=./runs/test/checkpoints/01: init_from, ./runs/test/checkpoints/01, lies in run_dir: "
        "a run resumes by itself, a branch has its own run_dir",
    ),
    "more layers than D has": (
        (), ["freeze.d=11"], 1,
        "override freeze.d=11: freeze.d is 11, allowed for this discriminator: 0 to 10, its layers above 4×4",
    ),
    "names that are no list": (
        (), ["freeze.names=G.mapping.*"], 1,
        "override freeze.names=G.mapping.*: freeze.names is 'G.mapping.*', allowed: "
        "a list of patterns of parameter names, as [G.mapping.fc0.*, 'D.b16.*']",
    ),
    "a name that is none": (
        (), ["freeze.names=[D.b8.*, 3]"], 1,
        "override freeze.names=[D.b8.*, 3]: freeze.names is 3, allowed: a list of patterns of parameter names, "
        "as [G.mapping.fc0.*, 'D.b16.*']",
    ),
    "layer of no block": (
        (), ["hsr.layers.64=0"], 1,
        "override hsr.layers.64=0: hsr.layers names resolution 64, allowed in this network: 8, 16, 32",
    ),
    "weights of other resolutions": (
        (), ["hsr.weights_per_res={8: 1}"], 1,
        "override hsr.weights_per_res={8: 1}: hsr.weights_per_res names 8, allowed: all of hsr.layers, 8, 16",
    ),
    "weights of nothing": (
        (), ["hsr.weights_per_res={8: 0, 16: 0}"], 1,
        "override hsr.weights_per_res={8: 0, 16: 0}: hsr.weights_per_res is 0 everywhere, allowed: one above 0; "
        "without HSR set hsr: null",
    ),
    "weights beside a teacher file": (
        (), ["hsr.weights=x.safetensors"], 1,
        "override hsr.weights=x.safetensors: hsr.weights goes with a timm name, "
        "teacher.safetensors holds its own: drop the key",
    ),
    "a layer twice": (
        (), ["projected={teacher: t.safetensors, layers: [2, 5, 2]}"], 1,
        "override projected={teacher: t.safetensors, layers: [2, 5, 2]}: projected.layers names layer 2 twice, "
        "allowed: each layer once",
    ),
    "weights beside a critic's teacher file": (
        (), ["vision_aided={teacher: t.safetensors, layers: [2], weights: w.pth}"], 1,
        "override vision_aided={teacher: t.safetensors, layers: [2], weights: w.pth}: vision_aided.weights goes with a "
        "timm name, t.safetensors holds its own: drop the key",
    ),
    "no list": (
        (), ["projected={teacher: t.safetensors, layers: 2}"], 1,
        "override projected={teacher: t.safetensors, layers: 2}: projected.layers is 2, allowed: "
        "a list of teacher layers (0-based), as [2, 5]",
    ),
    "an item of a list": (
        (), ["projected={teacher: t.safetensors, layers: [2, -1]}"], 1,
        "override projected={teacher: t.safetensors, layers: [2, -1]}: projected.layers is -1, allowed: "
        "a list of teacher layers (0-based), as [2, 5]",
    ),
    "an empty list": (
        (), ["projected={teacher: t.safetensors, layers: []}"], 1,
        "override projected={teacher: t.safetensors, layers: []}: projected.layers is empty, allowed: "
        "a list of teacher layers (0-based), as [2, 5]",
    ),
    "critic without a weight": (
        (), ["projected={teacher: t.safetensors, layers: [2], weight: 0}"], 1,
        "override projected={teacher: t.safetensors, layers: [2], weight: 0}: projected.weight is 0, allowed: "
        "a number above 0; to train without it set the section to null",
    ),
    "another loss": (
        (), ["objective.loss=wgan"], 1,
        "override objective.loss=wgan: objective.loss is 'wgan', allowed: logistic or hinge or relativistic",
    ),
    "transforms of DiffAugment": (
        (), ["augment={mode: diffaugment, pipe: bg}"], 1,
        "override augment={mode: diffaugment, pipe: bg}: augment.pipe is bg, allowed in mode diffaugment: null, "
        "which has policy",
    ),
    "augmentation of no probability": (
        (), ["augment={mode: fixed}"], 1,
        "override augment={mode: fixed}: augment.p is null, allowed in mode fixed: a value",
    ),
    "augmentation of nothing": (
        (), ["augment={mode: fixed, p: 0}"], 1,
        "override augment={mode: fixed, p: 0}: augment.p is 0, allowed in mode fixed: above 0; "
        "without augmentation set augment: null",
    ),
    "a target of a fixed p": (
        (), ["augment={mode: fixed, p: 0.2}", "augment.target=0.6"], 1,
        "override augment.target=0.6: augment.target is 0.6, allowed in mode fixed: null, which has pipe, p",
    ),
    "ADA without its speed": (
        (), ["augment={mode: ada}", "augment.kimg=null"], 1,
        "override augment.kimg=null: augment.kimg is null, allowed in mode ada: a value, such as 500.0",
    ),
    "ADA's target": (
        (), ["augment.target=1"], 1, "override augment.target=1: augment.target is 1, allowed: "
        "a number above 0 and below 1 or null",
    ),
    "unknown pipe": (
        (), ["augment.pipe=bgx"], 1,
        "override augment.pipe=bgx: augment.pipe is 'bgx', allowed: blit or geom or color or filter or noise or cutout "
        "or bg or bgc or bgcf or bgcfn or bgcfnc or null",
    ),
    "unknown mode": (
        (), ["augment.mode=noaug"], 1,
        "override augment.mode=noaug: augment.mode is 'noaug', allowed: ada or fixed or diffaugment",
    ),
    "unknown policy": (
        (), ["augment={mode: diffaugment, policy: 'color,cut'}"], 1,
        "override augment={mode: diffaugment, policy: 'color,cut'}: augment.policy is 'color,cut', allowed: some of "
        "color,translation,cutout, each once",
    ),
    "unknown metric": (
        (), ["metrics={names: fid50kk}"], 1,
        "override metrics={names: fid50kk}: metrics.names: unknown metric 'fid50kk': did you mean fid50k? Known: "
        "fid50k_full, fid50k, kid50k_full, pr50k3_full, is50k, fd_dinov2_50k_full, fid_infinity, ppl2_wend, "
        "ppl_wfull, ppl_zfull, ppl_wend, ppl_zend, ls, als; any number of images as in fid10k_full, "
        "fid1000_full or ppl2_wend10k",
    ),
    "attributes without a classifier": (
        (), ["metrics.names=fid50k_full,als"], 1,
        "override metrics.names=fid50k_full,als: metrics.names has als, allowed: with metrics.attributes from "
        "tools/fit_attributes.py",
    ),
    "a best by two values": (
        (), ["metrics.names=pr50k3_full,fid50k_full"], 1,
        "override metrics.names=pr50k3_full,fid50k_full: metrics.names begins with pr50k3_full, "
        "allowed: a metric of one value, since it chooses the best",
    ),
    "HSR after the end": (
        (), ["hsr.start_kimg=100"], 1,
        "override hsr.start_kimg=100: hsr.start_kimg is 100, allowed: below kimg = 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake(load, case):
    replaced, overrides, world_size, line = MISTAKES[case]
    text = PLAIN.replace(*replaced) if replaced else PLAIN
    assert not replaced or text != PLAIN
    with pytest.raises(UserError) as error:
        load(text, *overrides, world_size=world_size)
    assert str(error.value) == line


def test_what_the_last_checks_allow(load):
    """The other side of each boundary above."""
    assert load(PLAIN, "accumulation=4", "zero_stage=3", world_size=4).batch == 32
    assert load(PLAIN, "discriminator.mbstd_group_size=64")     # D cuts it to the micro-batch
    assert load(PLAIN, "path_length.batch_shrink=3", "path_length.weight=0", world_size=4)
    assert load(PLAIN, "path_length.batch_shrink=8", world_size=4)
    assert load(PLAIN, "generator.channel_base=32", "discriminator.channel_base=32")
    assert load(PLAIN, "init_from=runs/test2/checkpoints/000500000")
    assert load(PLAIN, "freeze={d: 10, mapping: true, names: [D.b8.*]}").freeze.names == ["D.b8.*"]
    assert load(PLAIN, "hsr.layers={8: 0, 16: 0, 32: 0}", "hsr.weights_per_res={8: 1, 16: 0.5, 32: 0}")
    assert load(PLAIN, "augment={mode: fixed, p: 1}").augment.pipe == "bgc"
    assert load(PLAIN, "augment={}").augment.target == 0.6
    assert load(PLAIN, "augment={mode: diffaugment, policy: cutout}").augment.policies == ["cutout"]
    assert load(PLAIN, "hsr.teacher=vit_base_patch16_224.dino", "hsr.weights=x.safetensors", "hsr.start_kimg=99")


def test_many_mistakes_stay_one_line_of_bounded_length(load):
    with pytest.raises(UserError) as error:
        load(MINIMAL)
    *listed, more = str(error.value).split("; ")
    assert listed[0] == "r.yaml: kimg is missing, give it a number above 0 or set preset: auto"
    assert len(listed) == 5 and more == "and 2 more" and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "recipe r.yml does not exist, did you mean r.yaml?"),
        (b"", "recipe r.yml is empty"),
        (b"# nothing\n", "recipe r.yml is empty"),
        (b"- 1\n", "recipe r.yml holds a list, not `key: value` lines"),
        (b"a: &x {b: *x}", "r.yml line 1: nested more than 8 levels deep"),
        (
            b"\xff: 1",
            "recipe r.yml cannot be read as text: "
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
    ],
    ids=["missing", "empty", "only comments", "list", "recursive", "not text"],
)
def test_file_that_is_no_recipe(tmp_path, monkeypatch, content, line):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").touch()
    if content is not None:
        Path("r.yml").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_recipe("r.yml")
    assert str(error.value) == line


VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["null", "[1]", "{}", "{8: 1}", "{a: {b: c}}", "-1", "1e999", ".nan"]),
    st.sampled_from(["&a [*a]", "!!int x", "!!bool x", "!!set {a}", "|\n x"]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(key=st.sampled_from([*KEYS, "hsr", "data", "hsr.layers.8", "x", ""]), value=VALUES)
def test_any_override_gives_a_recipe_or_one_line(key, value):
    try:
        assert isinstance(load_recipe(RECIPES[0], [f"{key}={value}"]), Recipe)
    except UserError as error:
        assert len(str(error).splitlines()) == 1


# What a resolved recipe is good for


def test_json_is_stable_and_differences_are_named(load):
    recipe = load(PLAIN)
    assert recipe.to_json() == load(PLAIN + "seed: 0\n").to_json()
    assert recipe.to_json() == json.dumps(json.loads(recipe.to_json()), sort_keys=True)
    other = load(PLAIN, "r1.gamma=2", "hsr.layers={8: 2, 32: 1}", "seed=3")
    assert recipe_differences(recipe, recipe) == []
    assert recipe_differences(recipe.to_json(), other) == ["hsr.layers.16", "hsr.layers.32", "r1.gamma", "seed"]
    assert recipe_differences(recipe, load(PLAIN, "hsr=null")) == ["hsr"]


@pytest.mark.parametrize(
    ("override", "was", "now"),
    [
        ("generator.channel_max=64", "512", "64"),
        ("discriminator.architecture=orig", '"resnet"', '"orig"'),
        ("data.labels=true", "false", "true"),
        ("hsr.hidden=64", "4096", "64"),
        ("hsr.layers.8=3", "2", "3"),
        ("hsr=null", "a section", "null"),
        ("projected.layers=[1, 2]", "[1, 3]", "[1, 2]"),
        ("projected.channels=32", "64", "32"),
        ("vision_aided={teacher: t.safetensors, layers: [1]}", "null", "a section"),
    ],
)
def test_a_checkpoint_of_other_networks_is_refused(load, override, was, now):
    with pytest.raises(UserError) as error:
        saved = load(HEADED).to_json()
        check_same_networks(saved, load(HEADED, override), checkpoint="runs/test/checkpoints/000001000")
    key = override.partition("=")[0]
    assert str(error.value) == (
        f"checkpoint runs/test/checkpoints/000001000 was made with {key} = {was}, the recipe says {now}: "
        f"set {key} back, or train from the start in another run_dir"
    )


def test_a_checkpoint_of_the_same_networks_is_welcome(load):
    other = load(PLAIN, "r1.gamma=2", "batch=64", "precision=bf16", "hsr.weight=0.5", "zero_stage=1", "run_dir=x")
    assert recipe_differences(load(PLAIN), other)
    check_same_networks(load(PLAIN), other, checkpoint="c")
    other = load(HEADED, "projected.weight=2", "objective.loss=hinge", "r2.gamma=1")
    check_same_networks(load(HEADED), other, checkpoint="c")


def test_files_of_a_recipe_are_looked_for(load, tmp_path):
    recipe = load(PLAIN)
    with pytest.raises(UserError) as error:
        check_paths(recipe)
    assert str(error.value) == f"hsr.teacher: teacher.safetensors does not exist (looked for from {tmp_path})"
    Path("teacher.safetensors").touch()
    check_paths(recipe)
    with pytest.raises(UserError, match=r"^projected\.teacher: t\.safetensors does not exist"):
        check_paths(load(HEADED))
    check_paths(load(PLAIN, "hsr.teacher=vit_base_patch16_224.dino"))   # a timm name is no file
    with pytest.raises(UserError, match=r"^hsr\.weights: w does not exist"):
        check_paths(load(PLAIN, "hsr.teacher=vit_base_patch16_224.dino", "hsr.weights=w"))
    with pytest.raises(UserError, match=r"^data\.shards: no/where does not exist"):
        check_paths(load(PLAIN, "data.builtin=null", "data.shards=no/where"))


def test_recipes_are_read_before_torch_is():
    code = "import sys, hsrgan.engine.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
