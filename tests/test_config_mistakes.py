"""The one line that every mistake in a recipe gets."""

import pytest
from recipe_texts import MINIMAL, PLAIN, from_text

from hsrgan.engine.errors import UserError
from hsrgan.engine.sizes import RULE


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return from_text


# (lines replaced, overrides, ranks, the line)
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
