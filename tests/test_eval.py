"""tools/eval.py as a user starts it: results, comparison, the one line for every mistake, and Ctrl-C."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from metric_fixtures import StandInLPIPS, attributes_file
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from hsrgan.engine import snapshot as snapshots
from hsrgan.engine.digits import ensure_digits
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import generator_metrics
from hsrgan.engine.model import Generator
from hsrgan.engine.snapshot import save_snapshot
from hsrgan.tools import eval as eval_tool

ROOT = Path(__file__).parents[1]
EVAL = ROOT / "tools" / "eval.py"
TEACHER = ROOT / "recipes" / "digits_teacher.safetensors"
METRICS = "fid300_full,kid300_full,pr1k3_full,als20"
TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "mapping_layers": 2, "channel_base": 128, "channel_max": 8}


def write_snapshot(path: Path, seed: int = 0, poison: float | None = None, **changes) -> Path:
    torch.manual_seed(seed)
    generator = Generator(**TINY | {"img_channels": 1, "c_dim": 10} | changes)
    if poison is not None:
        generator.synthesis.b4.const.data[0] = poison
    save_snapshot(path, generator, recipe_json="{}", kimg=12.5, dataset={})
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return ensure_digits(tmp_path_factory.mktemp("data"), 16, channels=1)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    return write_snapshot(tmp_path_factory.mktemp("snapshot") / "a.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HSRGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: object):
    return CliRunner().invoke(eval_tool.app, [str(argument) for argument in arguments])


def lines(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def attributes(tmp_path_factory) -> Path:
    return attributes_file(tmp_path_factory.mktemp("attributes") / "attributes.safetensors")


@pytest.fixture(scope="module")
def alone(shards, snapshot, attributes, tmp_path_factory) -> list[dict]:
    """METRICS of `snapshot` on one process."""
    folder = tmp_path_factory.mktemp("alone")
    os.environ["HSRGAN_CACHE"] = str(folder)
    torch.set_num_threads(1)
    options = ("--data", shards, "--features", TEACHER, "--attributes", attributes, "--out", folder / "alone.jsonl")
    return lines(run(snapshot, "--metrics", METRICS, *options))


def test_a_result_says_what_it_is_of(alone, shards, snapshot):
    assert [result["metric"] for result in alone] == METRICS.split(",")
    *compared, of_generator = alone
    for result in compared:
        assert result["reals"] == 1797 and result["fakes"] == {"f": 300, "k": 300, "p": 1000}[result["metric"][0]]
        assert result["value"] == next(iter(result["values"].values())) and result["seconds"] > 0
        protocol = result["protocol"]
        assert protocol["network"] == "teacher" and len(protocol["weights_sha256"]) == 64
        assert (protocol["psi"], protocol["noise"], protocol["dtype"]) == ("1", "random", "float32")
        assert result["dataset_sha256"] == alone[0]["dataset_sha256"] and len(result["dataset_sha256"]) == 64
    assert of_generator["reals"] == 0 and of_generator["fakes"] == 500 + 20 * 11 * 3
    for result in alone:
        assert (result["seed"], result["kimg"], result["snapshot"]) == (0, 12.5, str(snapshot))
        assert len(result["snapshot_sha256"]) == len(result["protocol"]["weights_sha256"]) == 64
    assert alone[0]["protocol"]["covariance"] == "n-1" and "covariance" not in alone[1]["protocol"]
    assert set(alone[2]["values"]) == {"pr1k3_full_precision", "pr1k3_full_recall"}


def test_deepspeed_gives_the_same_on_two_ranks(alone, shards, snapshot, attributes, tmp_path):
    out = tmp_path / "two.jsonl"
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", str(forked.free_port()), str(EVAL)]
    options = ["--data", str(shards), "--metrics", METRICS, "--features", str(TEACHER), "--batch", "48",
               "--attributes", str(attributes)]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([*launch, str(snapshot), *options, "--out", str(out)], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for one, two in zip(alone, found, strict=True):
        assert two["values"] == pytest.approx(one["values"], abs=1e-9)
        assert two["protocol"] == one["protocol"] and two["snapshot_sha256"] == one["snapshot_sha256"]
    assert found[-1] | {"seconds": 0} == alone[-1] | {"seconds": 0} and (tmp_path / "two_als20" / "als.json").is_file()


def test_a_snapshot_that_a_run_replaces_is_whole_or_refused(tmp_path, monkeypatch):
    """Never the facts of one and the tensors of the other."""
    path, other = (write_snapshot(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1))
    real, old = snapshots._metadata, snapshots.load_snapshot(path)[0].state_dict()

    def metadata(*args):
        os.replace(other, path)
        return real(*args)

    monkeypatch.setattr(snapshots, "_metadata", metadata)
    with pytest.raises(UserError, match="was replaced while it was read"):
        eval_tool._load(path)
    write_snapshot(other, 2)
    os.replace(write_snapshot(tmp_path / "c.safetensors", 0), path)
    loaded = snapshots.load_snapshot(path)[0].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in old.items())


def test_compare_seed_and_covariance(shards, snapshot, tmp_path):
    other, out = write_snapshot(tmp_path / "b.safetensors", seed=1), tmp_path / "new" / "results.jsonl"
    options = ("--data", shards, "--metrics", "fid100_full,kid100_full", "--features", TEACHER, "--out", out)
    result = run(snapshot, other, *options, "--compare")
    results = lines(result)
    assert [Path(r["snapshot"]).name for r in results] == ["a.safetensors"] * 2 + ["b.safetensors"] * 2
    assert results[0]["value"] != results[2]["value"] and "fid100_full" in result.stdout
    for r in results:
        assert f"{r['value']:.4g}" in result.stdout  # in the table
    assert [json.loads(line) for line in out.read_text().splitlines()] == results
    chart = Image.open(tmp_path / "new" / "results.png")
    assert chart.width == 900 and len(chart.convert("RGB").getcolors(1 << 16)) > 10

    (seeded,) = lines(run(snapshot, *options[:2], "--metrics", "fid100_full", *options[4:], "--seed", 1))
    (over_n,) = lines(run(snapshot, *options[:2], "--metrics", "fid100_full", *options[4:], "--covariance", "n"))
    assert len({seeded["value"], over_n["value"], results[0]["value"]}) == 3 and seeded["seed"] == 1
    assert over_n["protocol"]["covariance"] == "n" and len(out.read_text().splitlines()) == 6  # appended


def test_als_of_two_models(snapshot, attributes, tmp_path, monkeypatch):
    """The issue's line, of unconditional models: results of each, tables of both, and a folder beside --out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generator_metrics, "load_lpips", StandInLPIPS)
    a, b = (write_snapshot(tmp_path / f"{name}.safetensors", seed, c_dim=0) for seed, name in enumerate("ab"))
    result = run(a, b, "--metrics", "als20,ppl2_wend20", "--attributes", attributes, "--compare")
    assert "--features" not in result.output
    results = lines(result)
    assert [(r["metric"], Path(r["snapshot"]).stem) for r in results] == [
        ("als20", "a"), ("ppl2_wend20", "a"), ("als20", "b"), ("ppl2_wend20", "b")
    ]  # fmt: skip
    report = json.loads((tmp_path / "als20" / "als.json").read_text())
    assert list(report["models"]) == ["a", "b"]
    for r in results[::2]:
        kinds = report["models"][Path(r["snapshot"]).stem]
        assert r["values"] == {f"als20_{kind}": kinds[kind]["own"]["als"] for kind in ("pairs", "edits")}
        assert r["details"]["pairs"]["interval"] == kinds["pairs"]["own"]["interval"]
        assert f"{kinds['edits']['shared']['als']:.3f} [" in result.stdout
    files = ["compare.png", *(f"als20/als{name}" for name in (".json", "_pairs.png", "_edits.png", "_strips_0.png",
                                                              "_strips_1.png"))]  # fmt: skip
    assert result.stdout.splitlines()[-6:] == files and all((tmp_path / file).is_file() for file in files)
    for title in ("pairs, each model's own σ", "edits, one σ for all models"):
        assert title in result.stdout

    labelled = run(snapshot, "--metrics", "als20", "--attributes", attributes)
    assert labelled.exit_code == 2 and labelled.stderr.count("\n") == 1
    assert "a.safetensors draws from 10 classes and no --data is given" in labelled.stderr


NO_FEATURES = ["--features", None]
# case: (changes of the snapshot, or None for one that is not ours; arguments; what the line says)
MISTAKES = {
    "not ours": (None, [], "made.safetensors: its format is not stated, not hsrgan-snapshot-1"),
    "nan images": ({"poison": torch.nan}, [], "the model makes images that are not finite: its training has"),
    "few reals": ({}, ["--metrics", "fid50k"], "fid50k compares with 50,000 real images and"),
    "other labels": ({"c_dim": 7}, [], "made.safetensors draws from 7 classes and SHARDS has 10: labels are drawn as"),
    "no data": ({}, ["--data", None], "fid50_full compares with real images: name their shards with --data"),
    "corrupt weights": ({}, ["--features", "timm:resnet10t:WEIGHTS"], "weights.safetensors is damaged or no safetens"),
    "weights missing": (
        {}, ["--features", None], "tools/import_weights.py inception weights-inception-2015-12-05-6726825d.pth",
    ),
    "unknown metric": ({}, ["--metrics", "fid50kfull"], "unknown metric 'fid50kfull': did you mean fid50k_full?"),
    "resolution": ({"img_resolution": 32}, [], "makes 32x32 images of 1 channel(s) and SHARDS holds 16x16 of 1"),
    "channels": ({"img_channels": 3}, [], "makes 16x16 images of 3 channel(s) and SHARDS holds 16x16 of 1"),
    "logits": ({}, ["--metrics", "is100"], "is100 needs the logits of inception"),
    "features of nothing": ({}, ["--metrics", "ppl2_wend100,als"], "has no say in ppl2_wend100, als: path lengths"),
    "no attributes": (
        {}, ["--metrics", "als", *NO_FEATURES], "ls and als need a classifier of attributes: give --attributes FILE",
    ),
    "attributes of nothing": (
        {}, ["--metrics", "ls", "--attributes", "WEIGHTS", *NO_FEATURES], "attribute classifier WEIGHTS is damaged",
    ),
    "no lpips": ({}, ["--metrics", "ppl2_wend", *NO_FEATURES], "tools/import_weights.py vgg16 vgg16-397923af.pth"),
    "unwritable": ({}, ["--out", "WEIGHTS/results.jsonl"], "cannot write WEIGHTS: Not a directory; name another --out"),
    "a folder": ({}, ["--out", "/"], "cannot write /: Is a directory; name another --out"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_every_mistake_is_one_line(case, shards, tmp_path):
    changes, changed, line = MISTAKES[case]
    made, garbage, out = (tmp_path / name for name in ("made.safetensors", "weights.safetensors", "new/results.jsonl"))
    garbage.write_bytes(b"\x10" + b"\0" * 100)
    if changes is None:
        save_file({"x": torch.zeros(1)}, made)
    else:
        write_snapshot(made, **changes)
    options = {"--data": shards, "--metrics": "fid50_full", "--features": TEACHER, "--out": out}
    options |= dict(zip(changed[::2], changed[1::2], strict=True))
    given = [str(part) for option, value in options.items() if value for part in (option, value)]
    result = run(made, *(part.replace("WEIGHTS", str(garbage)) for part in given))
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), result.output
    errors = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    line = line.replace("SHARDS", str(shards)).replace("WEIGHTS", str(garbage))
    assert len(errors) == 1 and line in errors[0], result.stderr
    assert "Traceback" not in result.output and result.stdout == "" and not list(tmp_path.rglob("*.part"))
    assert not out.parent.exists()


def test_features_leave_path_lengths_as_they_are_and_that_is_said(shards, snapshot, monkeypatch):
    monkeypatch.setattr(generator_metrics, "load_lpips", StandInLPIPS)
    options = ("--data", shards, "--metrics", "fid50_full,ppl2_wend20", "--features", TEACHER)
    _, path_length = lines(result := run(snapshot, *options))
    said = [line for line in result.stderr.splitlines() if "--features" in line]
    assert said == ["--features has no say in ppl2_wend20: path lengths are LPIPS's, on VGG-16"]
    assert path_length["protocol"]["network"] == "stand-in"


def test_resize_is_one_of_two(snapshot):
    result = run(snapshot, "--resize", "nearest")
    assert result.exit_code == 2 and "'tf1', 'clean'" in result.stderr


# A network that takes its time, and a file that says when it is shown the first image.
SLOW = """
import sys, time
from pathlib import Path
from hsrgan.engine.metrics.extractor import Extractor
from hsrgan.tools import eval

def forward(self, images):
    if images.any():
        Path(sys.argv[-1]).touch()
        time.sleep(60)
    return real(self, images)

real, Extractor.forward = Extractor.forward, forward
eval.app(sys.argv[1:-1])
"""


def test_ctrl_c_leaves_nothing(shards, snapshot, tmp_path, cache):
    """The signal comes in the middle of the reals."""
    begun, out = tmp_path / "begun", tmp_path / "new" / "results.jsonl"
    command = [sys.executable, "-c", SLOW, str(snapshot), "--data", str(shards), "--metrics", "fid50_full",
               "--features", str(TEACHER), "--workers", "0", "--out", str(out), str(begun)]  # fmt: skip
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:  # fmt: skip
        while not begun.exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, 2) and "Traceback" not in output and '"metric"' not in output, output
    assert not out.parent.exists() and not list((cache / "reals").glob("*"))
