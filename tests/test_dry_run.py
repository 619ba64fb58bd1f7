"""What a dry run says, against counts, published figures, files of a real run and a clock that is not real."""

import json
import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import forked
import psutil
import pytest
import torch
from metric_fixtures import attributes_file
from safetensors import safe_open

from hsrgan.engine import dry_run
from hsrgan.engine.config import load_recipe
from hsrgan.engine.model import Discriminator, Generator

TEACHER = Path(__file__).parents[1] / "recipes/digits_teacher.safetensors"
NO_DATA = ("data.builtin=null", "data.shards=nowhere", "data.labels=false")
OPTIONS = ("ema.power=[0.05,0.1]", "snapshot_kimg=0.024", "keep_every_kimg=0.04")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


def figures(said: str) -> dict:
    return json.loads(said.splitlines()[-1])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "said-" not in path.name}


def plant_clock() -> None:
    """Each reading is a second after the one before: a call takes one second."""
    real, now = dry_run.mean_seconds, [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    dry_run.mean_seconds = lambda calls, steps, _, each: real(calls, steps, clock, each)


def plant_short_probe() -> None:
    plant_clock()
    dry_run.PROBE_STEPS = 2


def plant_signal(number: int, temporary: Path) -> None:
    """`number` comes in the middle of the steps; folders for a while are made in `temporary`."""
    tempfile.tempdir = str(temporary)

    def mean_seconds(calls, *_) -> None:
        calls["data"][1](0)
        assert list(temporary.glob("hsrgan-*/digits-16x16x1/*.tar"))
        for child in psutil.Process().children():  # the loader's worker, first, as the launcher does
            child.send_signal(number)
        time.sleep(0.2)
        os.kill(os.getpid(), number)
        time.sleep(60)

    dry_run.mean_seconds = mean_seconds


def plant_no_weights() -> None:
    os.environ["HSRGAN_CACHE"] = "no_weights"


def test_a_dry_run_says_what_a_run_does_and_leaves_nothing(workspace):
    """Against the same run's files; on two ranks only the first one speaks; no file is made or changed, no folder."""
    before = files(workspace)
    first, second = forked.start(workspace, *OPTIONS, "dry_run=true", "zero_stage=3", ranks=2, plant=plant_clock)
    assert [first.ends(), second.ends()] == [0, 0], first.said + second.said
    assert files(workspace) == before and sorted(p.name for p in workspace.iterdir() if p.is_dir()) == []
    assert "{" not in second.said and "parameters of D" in first.said and "recipe: 3" in first.said
    told = figures(first.said)
    assert (told["ranks"], told["steps"], told["images"], told["kimg"], told["done"]) == (2, 8, 64, 0.064, 0)
    # every call takes 1 s: data, averages, two main phases; and two lazy ones in every other step
    assert told["seconds_per_step"] == 5 and told["hours"] == 8 * 5 / 3600 and told["img_s"] == 8 / 5
    assert told["activations"] > 0

    forked.train(workspace, *OPTIONS)
    run = workspace / "run"
    kept = sorted((run / "checkpoints").glob("0*"))
    assert told["disk"]["checkpoints"] == (len(kept) + 1) * told["disk"]["checkpoint"]
    for folder, size in ((kept[-1], told["disk"]["checkpoint"]), (run / "snapshots", told["disk"]["snapshots"]),
                         (run / "power", told["disk"]["power averages"])):  # fmt: skip
        assert sum(map(tensor_bytes, folder.glob("*.safetensors"))) == size, folder

    before = files(workspace)
    said = forked.train(workspace, *OPTIONS, "dry_run=true", "kimg=0.08", plant=plant_clock)
    told = figures(said)
    assert files(workspace) == before and (told["steps"], told["done"]) == (10, 8) and told["hours"] == 2 * 5 / 3600


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_a_dry_run_that_is_asked_to_leave_takes_its_digits_along(workspace, tmp_path, number, ranks):
    options = ("dry_run=true", "run_dir=new", "data.workers=1")
    runs = forked.start(workspace, *options, ranks=ranks, plant=partial(plant_signal, number, tmp_path))
    assert [run.ends() for run in runs] == [128 + number] * ranks, runs[0].said
    assert not any(tmp_path.iterdir()) and "Traceback" not in runs[0].said


def tensor_bytes(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 (not a mapping)


def test_data_that_is_not_there_is_noise_or_one_line(workspace):
    absent = ("data.builtin=null", "data.shards=nowhere", "dry_run=true", "run_dir=absent")
    told = figures(said := forked.train(workspace, *absent, "data.labels=false"))
    assert told["data"].startswith("noise, because") and "nowhere" in told["data"] and told["hours"] > 0
    assert said.index("data: noise, because") < said.index("probe")  # and not after minutes of steps
    (run,) = forked.start(workspace, *absent)
    assert run.ends() == 2 and "nowhere" in run.said and "Traceback" not in run.said
    assert not (workspace / "absent").exists()


@pytest.mark.parametrize(
    ("run", "overrides", "says"),
    [
        ("new", ["freeze.mapping=true"], "since the recipe has no init_from"),
        ("new", ["init_from=nowhere.safetensors"], "nowhere.safetensors"),
        ("run", ["generator.z_dim=4"], "was made with generator.z_dim = 8"),
        ("run", ["ema.power=[0.2]"], "has no G_power-0.200.safetensors"),
        ("new", ["data.builtin=null", "data.shards=datasets/digits-16x16x1", "data.labels=false", "data.channels=3"],
         "set data.channels=1"),
        ("new", ["data.builtin=null", "data.shards=recipe.yaml", "data.labels=false"], "recipe.yaml"),
        ("recipe.yaml/new", [], "cannot write recipe.yaml/new: Not a directory; choose another with run_dir="),
        ("new", ["metrics={names: fid50k_full}"], "import_weights.py inception"),
        ("new", ["metrics={names: fid50k_full, features: gone.safetensors}"], "gone.safetensors does not exist"),
        ("new", ["metrics={names: als20, attributes: gone}"], "metrics.attributes: gone does not exist"),
        ("new", ["metrics={names: als20, attributes: recipe.yaml}"], "recipe.yaml"),
        ("new", [f"metrics={{names: fid5k, features: {TEACHER}}}"], "fid5k compares with 5,000 real images"),
        ("new", ["metrics={names: fid50k_full}", *NO_DATA], "import_weights.py inception"),
        ("new", ["metrics={names: als20, attributes: gone}", *NO_DATA], "metrics.attributes: gone does not exist"),
    ],
    ids=["freeze of nothing trained", "init_from that is not there", "a checkpoint of other networks",
         "a checkpoint without the average", "data of other channels", "data that are none",
         "a run_dir that cannot be", "weights",
         "features", "attributes", "attributes that are none",
         "too few images", "weights, and no data", "attributes, and no data"],
)  # fmt: skip
def test_what_the_run_would_refuse_is_refused(workspace, run, overrides, says):
    if not (workspace / "run").exists():
        forked.train(workspace, "kimg=0.008")
    (process,) = forked.start(workspace, f"run_dir={run}", "dry_run=true", *overrides, plant=plant_no_weights)
    assert process.ends() == 2 and says in process.said and "Traceback" not in process.said
    assert len([line for line in process.said.splitlines() if line.startswith("error: ")]) == 1
    assert not (workspace / "new").exists()


def test_metrics_that_can_be_are_no_hindrance(workspace):
    attributes = attributes_file(workspace / "attributes.safetensors")
    metrics = f"metrics={{names: 'fid300_full,als20', features: {TEACHER}, attributes: {attributes}}}"
    for options in ((), NO_DATA):
        said = forked.train(workspace, "run_dir=new", "dry_run=true", metrics, *options, plant=plant_short_probe)
        assert figures(said)["seconds_per_step"] == 5
        assert figures(said)["memory"][0]["teacher, buffers"] > 800_000  # the teacher, 816,896, scores
    assert not (workspace / "new").exists() and not (workspace / "no_weights").exists()


def test_what_init_from_brings_is_told(workspace):
    if not (workspace / "run").exists():
        forked.train(workspace, "kimg=0.008")
    checkpoint = sorted((workspace / "run" / "checkpoints").glob("0*"))[-1]
    options = (f"init_from={checkpoint}", "freeze.mapping=true", "run_dir=new", "dry_run=true")
    said = forked.train(workspace, *options, plant=plant_clock)
    assert "loaded" in said and "G, G_ema" in said and figures(said)["steps"] == 8
    assert not (workspace / "new").exists()


def test_parameters_of_paper256():
    """The counts that StyleGAN2-ADA prints for --cfg=paper256, on the meta device: nothing is allocated."""
    shape = {"c_dim": 0, "img_resolution": 256, "img_channels": 3, "channel_base": 16384}
    with torch.device("meta"):
        assert dry_run.numel(Generator(**shape, mapping_layers=8)) == 24_767_458
        assert dry_run.numel(Discriminator(**shape, mbstd_group_size=8)) == 24_001_089
    assert dry_run.numel(None) == 0


def test_steps_are_whole_and_writes_are_counted(workspace):
    recipe = load_recipe(workspace / "recipe.yaml", ["kimg=0.1", "batch=24", "discriminator.mbstd_group_size=4"])
    assert dry_run.total_images(recipe) == 120
    assert dry_run.moments(120, 24, 0.04) == [48, 96, 120] == dry_run.moments(120, 24, 0.039)
    assert dry_run.moments(120, 24, 0.12) == dry_run.moments(120, 24, 1) == [120]


def test_model_states_are_zeros():
    """Figure 1 of ZeRO (arXiv 1910.02054): 7.5·10⁹ parameters in half precision, on 64 ranks."""
    half = dry_run.Bytes(parameter=2, gradient=2, moments=8, master=4)
    sums = [sum(dry_run.model_states(7.5e9, stage, 64, half).values()) / 1e9 for stage in (1, 2, 3)]
    assert [round(total, 1) for total in sums] == [31.4, 16.6, 1.9]
    assert sum(dry_run.model_states(7.5e9, 1, 1, half).values()) / 1e9 == 120
    assert sum(dry_run.model_states(100, 0, 64).values()) == 1600  # plain fp32: no master copy


def test_model_states_are_deepspeeds():
    """Against its own estimators, without what they add for the largest layer under stage 3."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    half = dry_run.Bytes(parameter=2, gradient=2, moments=8, master=4 + 4)  # they also count an fp32 gradient,
    sizes = {2: half, 3: half._replace(gradient=0)}  # and under stage 3 no other
    ours = [sum(dry_run.model_states(10**7, stage, 8, size).values()) for stage, size in sizes.items()]
    _, second = estimate_zero2_model_states_mem_needs(10**7, num_gpus_per_node=8, num_nodes=1, cpu_offload=False)
    _, third, _ = estimate_zero3_model_states_mem_needs(10**7, 0, 8, 1, False, False, False)
    assert ours == [second, third]


def test_mean_seconds_leaves_the_first_call_out_and_calls_everything_twice():
    now, done = [0.0], []

    def call(name: str, seconds: float):
        def run(step: int) -> None:
            now[0] += seconds if name in done else 100.0
            done.append(name)

        return run

    calls = {"main": (1, call("main", 2.0)), "lazy": (4, call("lazy", 3.0)), "rare": (50, call("rare", 5.0))}
    means = dry_run.mean_seconds(calls, 20, lambda: now[0])
    assert means == {"main": 2.0, "lazy": 3.0, "rare": 5.0}
    assert [done.count(name) for name in calls] == [20, 5, 2]
    assert dry_run.seconds_per_step(calls, means) == pytest.approx(2 + 3 / 4 + 5 / 50)


def test_activations_are_what_autograd_keeps():
    layer = torch.nn.Linear(100, 50)
    x = torch.randn(10, 100, requires_grad=True)  # so that the weight is kept as well
    with dry_run.Activations([layer]) as kept:
        y = torch.tanh(layer(x))
        (y * y).sum()
    assert kept.bytes == 4 * (10 * 100 + 10 * 50)  # the input and tanh's result, kept by two; no parameter
