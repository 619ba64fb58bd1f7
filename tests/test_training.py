"""Whole training runs, as a user starts them: the same result however the work is split, and after any interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "engine" / "train.py"
TEACHER = ROOT / "recipes" / "digits_teacher.safetensors"

RECIPE = """
run_dir: run
seed: 1
kimg: 0.32            # 20 steps
batch: 16
precision: fp32
device: cpu
tick_kimg: 0.08
checkpoint_kimg: 0.32
image_kimg: 100.0
snapshot_kimg: 100.0
data: {builtin: digits, resolution: 16, channels: 1, labels: true, workers: 0}
generator: {z_dim: 16, w_dim: 16, mapping_layers: 2, channel_base: 128, channel_max: 16, lr: 0.002}
discriminator: {channel_base: 128, channel_max: 16, mbstd_group_size: 4, lr: 0.002, mapping_layers: 2}
r1: {gamma: 1.0, interval: 4}
path_length: {interval: 4}
ema: {kimg: 0.5, rampup: null}
hsr: {teacher: TEACHER, layers: {8: 3, 16: 1}, hidden: 32}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the recipe; the digits are packed there by the first run."""
    folder = tmp_path_factory.mktemp("training")
    recipe = RECIPE.replace("TEACHER", str(TEACHER))
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    world = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_SIZE": ranks,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }
    # one thread each, so that the number of ranks does not change how a convolution is cut up
    return {**os.environ, **{key: str(value) for key, value in world.items()}, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *overrides: str, ranks: int = 1) -> list[subprocess.Popen]:
    port = forked.free_port()
    command = [sys.executable, str(TRAIN), "recipe.yaml", *overrides]
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(rank, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def train(folder: Path, *overrides: str, ranks: int = 1) -> Path:
    """Run to the end and return the last checkpoint."""
    processes = start(folder, *overrides, ranks=ranks)
    with ThreadPoolExecutor(ranks) as readers:
        outputs = [readers.submit(process.communicate) for process in processes]
        deadline = time.monotonic() + 300
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > deadline:
                time.sleep(5)  # for the others to say what they think of it
                for process in processes:
                    process.kill()
            time.sleep(0.05)
    said = "\n".join(f"rank {rank}: {output.result()[0]}" for rank, output in enumerate(outputs))
    assert not any(process.returncode for process in processes), said
    run_dir = next((o.split("=", 1)[1] for o in overrides if o.startswith("run_dir=")), "run")
    return last_checkpoint(folder / run_dir)


def last_checkpoint(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{key}": value
        for file in checkpoint.glob("*.safetensors")
        for key, value in load_file(file).items()
    }


BUFFERS = ("noise_const", "resample_filter")  # never trained: they would dilute a relative difference


def relative_difference(a: Path, b: Path, part: str) -> float:
    """‖a − b‖ / ‖b‖ over the trained tensors of one file of two checkpoints."""
    first, second = load_file(a / f"{part}.safetensors"), load_file(b / f"{part}.safetensors")
    assert first.keys() == second.keys()
    keys = [key for key in first if not key.endswith(BUFFERS)]
    difference = sum((first[key].double() - second[key].double()).square().sum() for key in keys)
    return float((difference / sum(second[key].double().square().sum() for key in keys)) ** 0.5)


def assert_same_networks(a: Path, b: Path) -> None:
    differences = {part: relative_difference(a, b, part) for part in ("G", "D", "G_ema", "G_adam", "D_adam")}
    print(", ".join(f"{part} {value:.1e}" for part, value in differences.items()))
    assert all(differences[part] < 1e-5 for part in ("G", "D", "G_ema"))


@pytest.fixture(scope="module")
def reference(workspace) -> Path:
    """20 steps on one rank, ZeRO 0, no accumulation; R1 and path length five times each, HSR in every step."""
    return train(workspace, "run_dir=reference")


SPLITS = [
    (1, "accumulation=2", "zero_stage=0"),
    (2, "accumulation=1", "zero_stage=0"),
    (1, "accumulation=1", "zero_stage=1"),
    (1, "accumulation=1", "zero_stage=2"),
    (1, "accumulation=1", "zero_stage=3"),
    (2, "accumulation=1", "zero_stage=1"),
    (2, "accumulation=2", "zero_stage=2"),
    (2, "accumulation=2", "zero_stage=3"),
]


@pytest.mark.parametrize(("ranks", "accumulation", "stage"), SPLITS, ids=lambda value: str(value).replace("=", ""))
def test_any_split_trains_the_same_networks(workspace, reference, ranks, accumulation, stage):
    name = f"{ranks}-{accumulation}-{stage}".replace("=", "")
    split = train(workspace, f"run_dir={name}", accumulation, stage, ranks=ranks)
    assert_same_networks(split, reference)


def test_training_moves_every_parameter(workspace, reference):
    """The comparison above would also hold between runs that do nothing."""
    from hsrgan.engine.checkpoint import read_checkpoint

    trained = read_checkpoint(reference)
    start_ = read_checkpoint(train(workspace, "run_dir=first", "kimg=0.016", "checkpoint_kimg=0.016"))
    for part in ("G", "D", "G_ema"):
        for key, value in trained.tensors[part].items():
            if not key.endswith(BUFFERS):
                assert not torch.equal(value, start_.tensors[part][key]), f"{part} {key} did not move"
    assert (
        trained.state["images"] == 320
        and trained.state["adam_steps"] == {"G": 25, "D": 25}
        and trained.state["pl_mean"] > 0
    )


def test_kill_and_resume_is_bitwise(workspace):
    """40 steps straight, and 20 steps, kill −9, the same command again."""
    options = ("kimg=0.64", "checkpoint_kimg=0.32")
    straight = train(workspace, "run_dir=straight", *options)
    (process,) = start(workspace, "run_dir=killed", *options)
    deadline = time.time() + 240
    while not list((workspace / "killed" / "checkpoints").glob("[0-9]*")):
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    at_kill = last_checkpoint(workspace / "killed")
    assert at_kill.name == "000000320", "the run ended before it was killed"
    resumed = train(workspace, "run_dir=killed", *options)
    first, second = tensors(straight), tensors(resumed)
    assert first.keys() == second.keys() and any("exp_avg_sq" in key for key in first)
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different
    assert (straight / "state.json").read_text() == (resumed / "state.json").read_text().replace("killed", "straight")
    lines = [json.loads(line) for line in (workspace / "killed" / "log.jsonl").read_text().splitlines()]
    kimgs = [line["kimg"] for line in lines if "loss/G" in line]
    assert kimgs == sorted(set(kimgs)) and kimgs[-1] == 0.64


def test_resume_with_other_ranks_and_stage(workspace):
    """A checkpoint of two ranks under ZeRO 3 goes on on one rank under ZeRO 1, as if nothing had changed."""
    train(workspace, "run_dir=moved", "zero_stage=3", ranks=2)
    moved = train(workspace, "run_dir=moved", "zero_stage=1", "kimg=0.64")
    assert_same_networks(moved, train(workspace, "run_dir=stayed", "kimg=0.64"))


def test_init_from_restarts_the_count(workspace, reference):
    """HSR's second stage: networks from a baseline's checkpoint; Adam, pl_mean and the image count begin anew."""
    branch = train(workspace, "run_dir=branch", f"init_from={reference}", "kimg=0.016", "checkpoint_kimg=0.016")
    state = json.loads((branch / "state.json").read_text())
    assert state["images"] == 16 and state["adam_steps"]["G"] == 2
    first, second = tensors(branch), tensors(reference)
    key = "D/b16.conv0.weight"
    assert 0 < (first[key] - second[key]).abs().max() < 0.05  # one step away from where it came from


SCORED = ("metrics_kimg=0.08", f"metrics={{names: 'fid200_full,fid100_full', features: {TEACHER}}}")


def test_scoring_does_not_change_training_and_keeps_the_best(workspace, reference, monkeypatch):
    """Four evaluations in 20 steps: the same run to the last bit; then two ranks go on, from a best that stays."""
    from hsrgan.engine.snapshot import load_snapshot, save_snapshot
    from hsrgan.engine.stats import read_log
    from hsrgan.tools import eval as eval_tool

    monkeypatch.setenv("HSRGAN_CACHE", str(workspace / "cache"))
    scored = train(workspace, "run_dir=scored", *SCORED)
    first, second = tensors(scored), tensors(reference)
    assert first.keys() == second.keys() and not [key for key in first if not torch.equal(first[key], second[key])]
    run = workspace / "scored"
    rows = [row for row in read_log(run / "log.jsonl") if "metric/fid200_full" in row]
    assert [row["kimg"] for row in rows] == [0.08, 0.16, 0.24, 0.32]
    assert all(row["metric/fid100_full"] > 0 for row in rows)

    best = run / "snapshots" / "best.safetensors"
    generator, metadata = load_snapshot(best)
    kimg, value = min((row["metric/fid200_full"], row["kimg"]) for row in rows)[::-1]
    assert (metadata["kimg"], metadata["score"]["value"]) == (kimg, value) and rows[-1]["since_best"] == sum(
        row["kimg"] > kimg for row in rows
    )
    data = next((workspace / "datasets").glob("digits-16*"))
    options = ["--metrics", "fid200_full", "--features", str(TEACHER), "--seed", "1", "--data", str(data)]
    result = CliRunner().invoke(eval_tool.app, [str(best), *options])
    assert json.loads(result.stdout)["value"] == pytest.approx(value, abs=1e-9)  # scored again from the file

    unbeatable = metadata["score"] | {"value": -1.0, "kimg": 0.2}
    save_snapshot(best, generator, recipe_json="{}", kimg=0.2, dataset={}, score=unbeatable)
    kept = best.read_bytes()
    train(workspace, "run_dir=scored", "kimg=0.4", *SCORED, ranks=2)
    rows = [row for row in read_log(run / "log.jsonl") if "since_best" in row]
    assert best.read_bytes() == kept and rows[-1]["kimg"] == 0.4 and rows[-1]["since_best"] == 3  # of .24, .32 and .4


def test_metrics_that_cannot_be_are_refused_at_the_start(workspace, monkeypatch):
    monkeypatch.setenv("HSRGAN_CACHE", str(workspace / "no_weights"))
    expect_error(workspace, "run_dir=broken", "metrics={names: fid50k_full}", naming="import_weights.py inception")


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_off_unless_the_recipe_allows_it(workspace, tmp_path, allowed):
    """Set before anything is computed: here the run ends at its data, which is not there. And halves sum in fp32."""
    from hsrgan.engine.errors import UserError
    from hsrgan.engine.train import train as train_here
    from hsrgan.kernels import launch

    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    cublas, sums = switches[0], [f"allow_{half}_reduced_precision_reduction" for half in ("fp16", "bf16")]
    changes = [f"run_dir={tmp_path}", "data.builtin=null", f"data.shards={tmp_path}/none", "hsr=null"]
    try:
        launch.allow_tf32(not allowed)
        for name in sums:
            setattr(cublas, name, True)  # PyTorch's default
        with pytest.raises(UserError, match="none does not exist"):
            train_here(workspace / "recipe.yaml", changes + ["tf32=true"] * allowed)
        assert [launch.tf32_allowed(), *(switch.allow_tf32 for switch in switches)] == [allowed] * 3
        assert not any(getattr(cublas, name) for name in sums)
    finally:
        launch.allow_tf32(False)
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


WITH_STAND_IN = """
import sys
from pathlib import Path
from metric_fixtures import StandInLPIPS
from hsrgan.engine.metrics import generator_metrics
from hsrgan.engine.train import train

generator_metrics.load_lpips = StandInLPIPS
train(Path("recipe.yaml"), sys.argv[1:])
"""


def test_path_length_and_linearity_of_a_bf16_run_are_of_its_fp32_copy(workspace, monkeypatch):
    """LPIPS is missed at the start, then a stand-in takes its place. The figures are the best snapshot's, anew."""
    from metric_fixtures import StandInLPIPS, attributes_file

    from hsrgan.engine.metrics import generator_metrics
    from hsrgan.engine.snapshot import load_snapshot
    from hsrgan.engine.stats import read_log
    from hsrgan.tools import eval as eval_tool

    monkeypatch.setenv("HSRGAN_CACHE", str(workspace / "no_weights"))
    expect_error(workspace, "run_dir=broken", "metrics={names: ppl2_wend}", naming="tools/import_weights.py vgg16")
    file = attributes_file(workspace / "attributes.safetensors")
    metrics = f"metrics={{names: 'ppl2_wend20,als20', attributes: {file}}}"
    command = [sys.executable, "-c", WITH_STAND_IN, "run_dir=lengths", "kimg=0.032", "precision=bf16", metrics]
    environment = _environment(0, 1, forked.free_port()) | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    (row,) = [row for row in read_log(workspace / "lengths" / "log.jsonl") if "metric/ppl2_wend20" in row]
    best = workspace / "lengths" / "snapshots" / "best.safetensors"
    assert load_snapshot(best)[1]["score"]["value"] == row["metric/ppl2_wend20"] > 0
    data = next((workspace / "datasets").glob("digits-16*"))
    monkeypatch.setattr(generator_metrics, "load_lpips", StandInLPIPS)
    torch.set_num_threads(1)
    monkeypatch.chdir(workspace)
    result = CliRunner().invoke(eval_tool.app, [str(best), "--metrics", "ppl2_wend20,als20", "--data", str(data),
                                                "--attributes", str(file), "--seed", "1"])  # fmt: skip
    again = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    for name, value in (again[0]["values"] | again[1]["values"]).items():
        assert row[f"metric/{name}"] == pytest.approx(value, abs=1e-9)


def expect_error(folder: Path, *overrides: str, naming: str) -> None:
    (process,) = start(folder, *overrides)
    output = process.communicate(timeout=120)[0]
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(errors) == 1 and naming in errors[0] and "Traceback" not in output, output


def test_user_mistakes_get_one_line(workspace, reference, tmp_path):
    expect_error(workspace, "generator.chanel_base=64", naming="channel_base")
    expect_error(workspace, "batch=x", naming="batch")
    expect_error(workspace, "batch=18", "accumulation=4", naming="batch")
    expect_error(workspace, "data.builtin=null", f"data.shards={tmp_path}", naming=str(tmp_path))
    packed = next((workspace / "datasets").glob("digits-16*"))
    other = ("data.builtin=null", f"data.shards={packed}", "data.resolution=32")
    expect_error(workspace, "run_dir=refused", *other, naming="16x16")
    assert not (workspace / "refused").exists()
    expect_error(workspace, "run_dir=reference", "generator.w_dim=8", naming="generator.w_dim")
    expect_error(workspace, "run_dir=other", f"init_from={reference / 'state.json'}", naming="state.json is no")
    (tmp_path / "file").write_text("")
    expect_error(workspace, f"run_dir={tmp_path / 'file' / 'run'}", naming="run_dir")
    expect_error(workspace, "hsr.layers={8: 99}", naming="99")
    expect_error(workspace, f"hsr.teacher={packed / 'manifest.json'}", naming="manifest.json")


def test_broken_data_and_teachers_get_one_line(workspace, reference, tmp_path):
    packed = next((workspace / "datasets").glob("digits-16*"))

    def broken(name: str, break_it: Callable[[Path], object]) -> str:
        folder = shutil.copytree(packed, tmp_path / name)
        for shard in folder.glob("*.tar"):
            break_it(shard)
        return f"data.shards={folder}"

    def garble(shard: Path) -> None:
        content = shard.read_bytes()
        shard.write_bytes(content.replace(b"IDAT", b"____"))

    own = "data.builtin=null", "run_dir=broken"
    expect_error(workspace, *own, broken("missing", Path.unlink), naming="00000.tar is missing")
    expect_error(workspace, *own, broken("cut", lambda shard: os.truncate(shard, 20_000)), naming="truncated")
    expect_error(workspace, *own, broken("garbled", garble), naming="no whole png image")
    teacher = tmp_path / "teacher.safetensors"
    save_file(load_file(TEACHER), teacher, {"format": "hsrgan-teacher-1", "model": "resnet10t", "kwargs": "{}"})
    expect_error(workspace, "run_dir=broken", f"hsr.teacher={teacher}", naming="teacher.safetensors")
    snapshot = next((workspace / "reference" / "snapshots").glob("*.safetensors"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(snapshot.read_bytes()[:5000])
    expect_error(workspace, "run_dir=broken", f"init_from={cut}", naming=cut.name)


def test_deepspeed_launches_the_recipe(workspace):
    """The README's launch line, two ranks, to the end, with what a run leaves behind."""
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", str(forked.free_port()), str(TRAIN)]
    command = [*launch, "recipe.yaml", "run_dir=launched", "kimg=0.064"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = workspace / "launched"
    for name in ("log.jsonl", "reals.png", "curves.png"):
        assert (run / name).stat().st_size > 0
    assert list((run / "samples").glob("fakes-*.png")) and list((run / "snapshots").glob("*.safetensors"))
    for said in ("curves.png", "snapshots", "samples"):
        assert said in done.stdout
