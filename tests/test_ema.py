"""The averages of G: half-lives and power functions against closed forms, skipped steps, whole runs, tools/ema.py."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_checkpoints import assert_bitwise
from test_faults import LAYER, plant_nan
from torch import nn
from typer.testing import CliRunner

from hsrgan.engine.config import load_recipe
from hsrgan.engine.ema import ema_beta, update_ema
from hsrgan.engine.errors import UserError
from hsrgan.engine.power_ema import LONGEST, exponent_of, fit, inner_product, length_of, power_beta
from hsrgan.engine.snapshot import load_snapshot, save_snapshot
from hsrgan.tools import ema, sample

BUFFERS = ("noise_const", "resample_filter", "w_avg")
POWER = "ema.power=[0.05,0.1]"


# Half-life


def test_half_life_and_rampup():
    beta = ema_beta(32, 10**9, 10.0, None)
    assert abs(beta ** (10_000 / 32) - 0.5) < 1e-12
    assert ema_beta(32, 0, 10.0, 0.05) < 1e-300  # before the first image: a plain copy
    assert abs(ema_beta(64, 1000, 500.0, 0.05) - 0.5 ** (64 / 50)) < 1e-12
    assert ema_beta(64, 10**9, 20.0, 0.05) == ema_beta(64, 10**9, 20.0, None)


@pytest.mark.parametrize("moved", [None, torch.ones(())], ids=["always", "told"])
def test_update_moves_parameters_and_copies_buffers(moved):
    average, module = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        average.weight.fill_(1.0)
        module.weight.fill_(3.0)
        module.running_mean.fill_(7.0)
    update_ema(average, module, 0.75, moved)
    assert torch.allclose(average.weight, torch.full((3,), 1.5)) and torch.equal(
        average.running_mean, module.running_mean
    )
    update_ema(average, module, 0.25, moved)
    assert torch.allclose(average.weight, torch.full((3,), 2.625))
    update_ema(average, module, 0.0, moved)
    assert torch.equal(average.weight, module.weight)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.999])
def test_what_has_not_moved_leaves_the_average_to_the_last_bit(beta):
    average, module = nn.Linear(9, 9), nn.Linear(9, 9)
    before = average.weight.clone()
    update_ema(average, module, beta, torch.zeros(()))
    assert torch.equal(average.weight, before)


# Power functions


def test_lengths_and_exponents():
    """The two that the paper trains with, the plain mean, and the inverse everywhere."""
    assert [round(exponent_of(length), 2) for length in (0.05, 0.10)] == [16.97, 6.94]  # arXiv 2312.02696, §3.1
    assert exponent_of(LONGEST) == pytest.approx(0, abs=1e-9)
    for length in np.linspace(0.005, 0.28, 12):
        assert length_of(exponent_of(length)) == pytest.approx(length, rel=1e-9)
    tau = (np.arange(200_000) + 0.5) / 200_000  # the definition of σ_rel: the spread of p
    p = (exponent_of(0.1) + 1) * tau ** exponent_of(0.1)
    mean = (p * tau).mean()
    assert ((p * (tau - mean) ** 2).mean()) ** 0.5 == pytest.approx(0.1, rel=1e-6)


def test_decay_is_the_papers():
    for step in (1, 2, 7, 1000):
        gamma = exponent_of(0.07)
        assert power_beta(32, (step - 1) * 32, 0.07) == pytest.approx((1 - 1 / step) ** (gamma + 1), abs=1e-15)
    assert power_beta(32, 0, 0.07) == 0


@pytest.mark.parametrize(("a", "b"), [((1.0, 0.0), (1.0, 0.0)), ((0.4, 6.94), (1.0, 16.97)), ((0.9, 2.0), (0.7, 3.5))])
def test_inner_products_are_integrals(a, b):
    tau = (np.arange(400_000) + 0.5) / 400_000
    p, q = ((gamma + 1) * tau**gamma / time ** (gamma + 1) * (tau <= time) for time, gamma in (a, b))
    assert inner_product(*a, *b) == pytest.approx((p * q).mean(), rel=2e-5)


def trajectory(steps: int) -> np.ndarray:
    """[steps, 50] fp64: a way that settles, with a random walk and noise on it."""
    random = np.random.default_rng(0)
    time = np.arange(1, steps + 1)[:, None] / steps
    noise = random.standard_normal((2, steps, 50))
    return np.exp(-5 * time) * random.standard_normal(50) + 0.02 * np.cumsum(noise[0], 0) + 0.1 * noise[1]


def averages(way: np.ndarray, length: float) -> np.ndarray:
    """The power-function average after each step, by the recursion, fp64."""
    found, value = [], way[0]
    for step, now in enumerate(way):
        beta = power_beta(32, 32 * step, length)
        value = beta * value + (1 - beta) * now
        found.append(value)
    return np.array(found)


def test_the_recursion_is_the_profile():
    """Weights of a way's steps: the integral of p over each, exactly."""
    steps, gamma = 50, exponent_of(0.1)
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    assert np.allclose(averages(np.eye(steps), 0.1)[-1], np.diff(edges), rtol=1e-12, atol=1e-17)


def test_any_length_can_be_made_afterwards():
    """From 20 snapshots of two lengths: as near to the true average as the residual says, and exactly what is kept."""
    way = trajectory(2000)
    kept = {length: averages(way, length)[99::100] for length in (0.05, 0.10)}
    times, lengths = np.repeat(np.arange(100, 2001, 100), 2), [0.05, 0.10] * 20
    stored = np.stack([kept[0.05], kept[0.10]], 1).reshape(40, 50)
    spread = way[-400:].std(0).mean()
    for length, bound in ((0.03, 0.06), (0.06, 0.005), (0.08, 0.005), (0.13, 0.005), (0.2, 0.05)):
        found, truth = fit(times, lengths, 2000, length), averages(way, length)[-1]
        error = np.abs(found.weights @ stored - truth).max() / spread
        nearest = np.abs(stored[-2:] - truth).max(1).min() / spread
        assert error < bound and error < nearest / 5 and found.weights.sum() == pytest.approx(1, abs=1e-9)
        # Cauchy–Schwarz over steps: no way of bounded size is missed by more than residual × ‖p‖ × its own norm
        norm = inner_product(1.0, exponent_of(length), 1.0, exponent_of(length)) ** 0.5
        assert error * spread <= found.residual * norm * np.abs(way).max()
    same = fit(times, lengths, 2000, 0.10)
    assert same.residual < 1e-6 and np.allclose(same.weights, [0] * 39 + [1], atol=1e-7)
    assert fit(times[:4], lengths[:4], 2000, 0.1).residual > 0.5  # all of them long past


# Whole runs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


@pytest.fixture(scope="module")
def straight(workspace) -> Path:
    """Eight steps of 8 images; averages are kept after each other one."""
    forked.train(workspace, "run_dir=straight", "snapshot_kimg=0.016", "checkpoint_kimg=0.008", "keep_checkpoints=8",
                 POWER)  # fmt: skip
    return workspace / "straight"


def part(run: Path, images: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{images:09d}" / f"{name}.safetensors")


def test_a_run_keeps_the_averages_of_its_parameters(straight):
    """Against the recursion in fp64 over the G of every checkpoint; kept files are the checkpoint's own."""
    names = [f"{images:09d}-{length}.safetensors" for images in (16, 32, 48, 64) for length in ("0.050", "0.100")]
    assert sorted(path.name for path in (straight / "power").iterdir()) == names
    way = [part(straight, images, "G") for images in range(8, 65, 8)]
    for length in (0.05, 0.1):
        average = part(straight, 64, f"G_power-{length:.3f}")
        for key, value in average.items():
            if key.endswith(BUFFERS):
                assert torch.equal(value, way[-1][f"generator.{key}"])
                continue
            steps = torch.stack([step[f"generator.{key}"].double() for step in way])
            truth = averages(steps.reshape(len(way), -1).numpy(), length)[-1]
            assert np.allclose(value.flatten(), truth, rtol=1e-5, atol=1e-6), key
            assert not torch.equal(value, way[-1][f"generator.{key}"])
        generator, metadata = load_snapshot(straight / "power" / f"000000064-{length:.3f}.safetensors")
        assert metadata["power"] == {"length": length, "images": 64} and metadata["kimg"] == 0.064
        assert all(torch.equal(value, average[key]) for key, value in generator.state_dict().items())


def test_averages_resume_bitwise_and_on_any_ranks(workspace, straight):
    """From the middle; from the middle on two ranks under ZeRO 3; what lies beyond is forgotten."""
    for name, ranks, options in (("again", 1, ()), ("zero", 2, ("zero_stage=3",))):
        run = workspace / name
        shutil.copytree(straight, run)
        (run / "checkpoints" / "latest").write_text("000000032")
        stray = run / "power" / "000000063-0.100.safetensors"
        shutil.copy(stray.with_name("000000064-0.100.safetensors"), stray)
        options = ("snapshot_kimg=0.016", "checkpoint_kimg=0.008", "keep_checkpoints=8", POWER, *options)
        assert "resuming at 0.032" in forked.train(workspace, f"run_dir={name}", *options, ranks=ranks)
        assert not stray.exists() and len(list((run / "power").iterdir())) == 8
        if ranks == 1:
            assert_bitwise(run, straight)
        for length in ("0.050", "0.100"):
            mine, theirs = (part(one, 64, f"G_power-{length}") for one in (run, straight))
            assert all(torch.allclose(value, theirs[key], rtol=1e-4, atol=1e-5) for key, value in mine.items())


def test_without_power_there_is_nothing_of_it_and_other_lengths_are_refused(workspace, straight):
    shutil.copytree(straight, workspace / "changed")
    shutil.rmtree(workspace / "changed" / "power")
    (run,) = forked.start(workspace, "run_dir=changed", "ema.power=[0.05,0.2]", "kimg=0.072")
    assert run.ends() == 2 and "has no G_power-0.200.safetensors" in run.said and "Traceback" not in run.said
    forked.train(workspace, "run_dir=changed", "kimg=0.072", "checkpoint_kimg=0.008")
    assert not (workspace / "changed" / "power").exists()
    assert not list((workspace / "changed" / "checkpoints" / "000000072").glob("G_power*"))


def test_a_skipped_step_moves_no_average(workspace):
    """The only phase of G in the fourth step, and the second of two in the third, which moves it all the same."""
    plant = partial(plant_nan, "never", {"Gmain": (24, 24), "Greg": (16, 16)}, 0, LAYER)
    options = (POWER, "kimg=0.032", "checkpoint_kimg=0.008", "keep_checkpoints=4", "faults.max_nonfinite=1.0")
    forked.train(workspace, "run_dir=skipped", *options, plant=plant)
    for name in ("G_ema", "G_power-0.050", "G_power-0.100"):
        second, third, fourth = (part(workspace / "skipped", images, name) for images in (16, 24, 32))
        trained = [key for key in second if not key.endswith(BUFFERS)]
        assert [key for key in trained if not torch.equal(third[key], fourth[key])] == []
        assert any(not torch.equal(second[key], third[key]) for key in trained)
        assert not torch.equal(third["mapping.w_avg"], fourth["mapping.w_avg"])  # D's phase was finite


@pytest.mark.parametrize(("power", "says"), [
    ("[0.05,0.5]", "ema.power is 0.5, allowed: a list of lengths from 0.005 to 0.28, as [0.05, 0.10]"),
    ("0.1", "ema.power is 0.1, allowed: a list of lengths"),
    ("[0.05,0.0501]", "ema.power is [0.05, 0.0501], allowed: lengths that differ in three decimals"),
])
def test_lengths_that_cannot_be_are_refused(workspace, power, says):
    with pytest.raises(UserError, match=re.escape(says)):
        load_recipe(workspace / "recipe.yaml", [f"ema.power={power}"])
    assert load_recipe(workspace / "recipe.yaml", [POWER]).ema.power == [0.05, 0.1]


# tools/ema.py


def run_tool(*arguments: object):
    return CliRunner().invoke(ema.app, [str(argument) for argument in arguments])


def test_the_tool_makes_snapshots_of_any_length(straight, tmp_path):
    out = tmp_path / "averages" / "a.safetensors"
    result = run_tool(straight, "--length", 0.1, "--length", 0.08, "--out", out, "--seeds", "0-3")
    assert result.exit_code == 0, result.output
    kept, made = (json.loads(line) for line in result.stdout.splitlines())
    assert kept["residual"] < 1e-6 and 1e-6 < made["residual"] < 0.1 and made["averages"] == 8
    same, metadata = load_snapshot(kept["snapshot"])
    theirs, _ = load_snapshot(straight / "power" / "000000064-0.100.safetensors")
    for key, value in theirs.state_dict().items():
        assert torch.allclose(same.state_dict()[key], value, atol=1e-6)
    assert metadata["kimg"] == 0.064 and metadata["power"]["length"] == 0.1
    other = load_file(made["snapshot"])
    files = sorted((straight / "power").iterdir())
    stored = [load_file(path) for path in files]
    weights = fit([16, 16, 32, 32, 48, 48, 64, 64], [0.05, 0.1] * 4, 64, 0.08).weights
    for key in ("synthesis.b8.conv0.weight", "mapping.fc0.weight"):
        truth = sum(weight * value[key].double() for weight, value in zip(weights, stored, strict=True))
        assert torch.allclose(other[key].double(), truth, atol=1e-7)
    picture = Image.open(out.with_suffix(".png"))
    assert picture.size == (2 * 128 + ema.GAP, 128 + ema.TITLE)
    pixels = np.asarray(picture)[ema.TITLE :]
    assert (pixels[:, :128] != pixels[:, 128 + ema.GAP :]).any()
    pictures = CliRunner().invoke(sample.app, [made["snapshot"], "--seeds", "0", "--out", str(tmp_path / "sampled")])
    assert pictures.exit_code == 0

    earlier = run_tool(straight, "--length", 0.1, "--at", 0.048, "--out", tmp_path / "b.safetensors", "--seeds", "0")
    assert json.loads(earlier.stdout)["averages"] == 6
    at_48 = load_file(straight / "power" / "000000048-0.100.safetensors")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["mapping.w_avg"], at_48["mapping.w_avg"])


def another_seed(folder: Path) -> None:
    path = folder / "000000064-0.100.safetensors"
    generator, metadata = load_snapshot(path)
    recipe = json.dumps(metadata["recipe"] | {"seed": 99})
    save_snapshot(path, generator, recipe_json=recipe, kimg=1, dataset=metadata["dataset"], power=metadata["power"])


def only_one(folder: Path) -> None:
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


@pytest.mark.parametrize(("change", "options", "says"), [
    (None, ("--length", 0.5), "--length 0.5: allowed are lengths above 0 and up to 0.2887"),
    (None, ("--length", -0.1), "allowed are lengths above 0"),
    (None, ("--length", 0.005), "off by 77%; these 8 averages make 0.04 to 0.145 within 10%"),
    (None, ("--length", 0.1, "--at", 0.05), "--at 0.05: averages were kept at 0.032, 0.048, 0.064 … kimg"),
    (only_one, ("--length", 0.1), "holds 1 averages, two are the least"),
    (another_seed, ("--length", 0.1), "are of different runs .their seed differs."),
], ids=["too long", "negative", "too short", "moment", "too few", "two runs"])  # fmt: skip
def test_the_tools_refusals_are_one_line(straight, tmp_path, change, options, says):
    run = shutil.copytree(straight / "power", tmp_path / "run" / "power").parent
    if change:
        change(run / "power")
    result = run_tool(run, *options, "--out", tmp_path / "out" / "a.safetensors")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert re.search(says, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()
