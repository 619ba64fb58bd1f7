"""Recipes: the shipped ones, presets, values and overrides, and what a resolved recipe is good for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import HEADED, MINIMAL, PLAIN, from_text

from hsrgan.engine.config import Recipe, check_paths, check_same_networks, load_recipe, recipe_differences
from hsrgan.engine.errors import UserError
from hsrgan.engine.presets import PRESETS
from hsrgan.engine.recipe_file import dotted, leaves

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SHIPPED = [
    "afhq_512", "afhqv2_512", "auto", "church_256", "cifar10", "ffhq_1024", "ffhq_256", "ffhq_256_baseline",
    "low_shot_256", "lsun_car_384x512", "metfaces_1024", "projected_256", "quickstart", "r3gan_ffhq_256",
    "transfer_256", "vision_aided_256",
]  # fmt: skip
KEYS = [dotted(path) for path in leaves(Recipe)]


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
        f"set {key} back, or take what fits into another run_dir with init_from=runs/test/checkpoints/000001000"
    )


def test_a_checkpoint_of_the_same_networks_is_welcome(load):
    other = load(PLAIN, "r1.gamma=2", "batch=64", "precision=bf16", "hsr.weight=0.5", "zero_stage=1", "run_dir=x")
    assert recipe_differences(load(PLAIN), other)
    check_same_networks(load(PLAIN), other, checkpoint="c")
    other = load(HEADED, "projected.weight=2", "objective.loss=hinge", "r2.gamma=1")
    check_same_networks(load(HEADED), other, checkpoint="c")
    check_same_networks(load(HEADED), load(HEADED, "hsr=null"), checkpoint="c")     # the heads are dropped
    with pytest.raises(UserError, match="made with hsr = null, the recipe says a section"):
        check_same_networks(load(HEADED, "hsr=null"), load(HEADED), checkpoint="c")


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
