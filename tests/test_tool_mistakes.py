"""Numbers, names and places that no tool can use: one line, exit code 2, and nothing written."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quickstart_snapshot import save_quickstart
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.directions import Directions, load_directions, save_directions
from hsrgan.engine.metrics.weights import read_weights
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import read_safetensors, sha256_of
from hsrgan.tools import (
    directions,
    ema,
    eval,
    export,
    fit_attributes,
    fit_teacher,
    import_weights,
    sample,
    score_digits,
    video,
)

APPS = {"sample": sample, "video": video, "directions": directions, "export": export, "ema": ema,
        "import_weights": import_weights, "score_digits": score_digits, "eval": eval, "fit_teacher": fit_teacher,
        "fit_attributes": fit_attributes}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """m.safetensors and directions a/b and far of it."""
    folder = tmp_path_factory.mktemp("kept")
    snapshot = save_quickstart(folder / "m.safetensors")
    made = Directions(("a/b", "far"), torch.eye(64)[:2], (0.5, 0.5), (1.0, 1.0), sha256_of(snapshot), 9, "pca",
                      (None, None))  # fmt: skip
    save_directions(folder / "d.safetensors", made, command="")
    return folder


@pytest.fixture
def here(kept, tmp_path, monkeypatch) -> Path:
    """The working folder, with links to what is kept."""
    for path in kept.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str):
    tool, *arguments = shlex.split(command)
    return CliRunner().invoke(APPS[tool].app, arguments)


def line(command: str) -> str:
    """The one line of a mistake, after which the folder is as it was."""
    before = sorted(Path().rglob("*"))
    result = run(command)
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert sorted(Path().rglob("*")) == before
    return result.stderr


@pytest.mark.parametrize(("command", "says"), [
    ("sample m.safetensors --psi nan", "--psi nan: give a number from -100 to 100"),
    ("sample m.safetensors --psi 0,1e40", "--psi 1e+40: give a number"),
    ("video m.safetensors --psi inf", "--psi inf: give a number"),
    ("directions pca m.safetensors --samples 100 --psi=-inf", "--psi -inf: give a number"),
    ("export m.safetensors --to onnx --psi nan", "--psi nan: give a number"),
    ("score_digits m.safetensors --psi nan", "--psi nan: give a number"),
    ("ema run --length 0.1 --out a.safetensors --psi nan", "--psi nan: give a number"),
    ("ema run --length 0.1 --out a.png", "--out a.png: the name must end in .safetensors"),
    ("ema run --length 0.1 --length 0.1 --out a.safetensors", "--length 0.1 is given twice"),
    ("sample m.safetensors --directions d.safetensors --edit far=1e39", "standard deviations of w, 1000 at most"),
    ("sample m.safetensors --directions d.safetensors --edit far=-1e38:1", "standard deviations of w, 1000 at most"),
    ("sample m.safetensors --seeds ''", "--seeds : '' is not a number or a range"),
    ("sample m.safetensors --mix ''", "--mix : '' is not a number or a range"),
    ("sample m.safetensors --mix 1 --mix-layers ''", "--mix-layers : write it like 0-5"),
    ("sample m.safetensors --mix-layers ''", "needs --mix"),
    ("directions pca m.safetensors --samples 100 --layers ''", "--layers : write it like 0-5"),
    ("directions pca m.safetensors --samples 1000000000000000", "so many take 953,674,316.4 GiB, and "),
    ("directions sefa m.safetensors --samples 1000000000000000", " GiB of memory are free; give "),
    ("score_digits m.safetensors --samples 4000000000", "--samples 4000000000: so many take 6,"),
    ("sample m.safetensors --seeds 5,0-4294967295", "these are more than 10,000,000 seeds"),
])  # fmt: skip
def test_what_cannot_be_meant(here, command, says):
    assert says in line(command)


@pytest.mark.parametrize(("command", "says"), [
    ("video m.safetensors --out folder.mp4", "folder.mp4 is a folder; name another file"),
    ("directions pca m.safetensors --samples 100 --out folder.safetensors", "folder.safetensors is a folder"),
    ("directions pca m.safetensors --samples 100 --out picture.safetensors", "picture.png is a folder"),
    ("export m.safetensors --to onnx --out folder.onnx", "folder.onnx is a folder"),
    ("export m.safetensors --to hf --out dangling", "--out dangling exists"),
    ("export m.safetensors --to pt --out text/x.pt", "cannot write text: "),
    ("sample m.safetensors --out text", "cannot write text: "),
    ("sample loop.safetensors", "snapshot loop.safetensors: no such file"),
    ("import_weights stylegan loop.safetensors out.safetensors", "loop.safetensors: Too many levels of symbolic links"),
    ("import_weights stylegan text loop.safetensors", "text is not imported"),
    ("import_weights stylegan m.safetensors same.safetensors", "same.safetensors is the file to import"),
])  # fmt: skip
def test_places_that_are_something_else(here, command, says):
    for name in ("folder.mp4", "folder.onnx", "folder.safetensors", "picture.png"):
        (here / name).mkdir()
    (here / "text").write_text("hello")
    (here / "loop.safetensors").symlink_to("loop.safetensors")
    (here / "dangling").symlink_to("nowhere")
    (here / "same.safetensors").symlink_to("m.safetensors")
    assert says in line(command)


@pytest.mark.parametrize(("command", "says"), [
    ("directions sefa m.safetensors --out m.safetensors", "--out m.safetensors: a snapshot is there"),
    ("sample m.safetensors --save-w m.safetensors", "--save-w m.safetensors: a snapshot is there"),
    ("eval m.safetensors --metrics als20 --out m.safetensors", "--out m.safetensors: a snapshot is there"),
    ("ema . --length 0.1 --out snapshots/m.safetensors", "--out snapshots/m.safetensors: a snapshot is there"),
    ("fit_teacher digits --out m.safetensors", "--out m.safetensors: a snapshot is there"),
    ("fit_attributes digits --out m.safetensors", "--out m.safetensors: a snapshot is there"),
    ("fit_teacher digits --out 00000.tar", "--out 00000.tar: the name must end in .safetensors"),
    ("fit_attributes digits --out snapshots", "--out snapshots: the name must end in .safetensors"),
    ("sample snapshots", "snapshot snapshots is a folder: name the .safetensors file in it"),
])  # fmt: skip
def test_a_snapshot_is_not_written_over(here, command, says):
    (here / "snapshots").mkdir()
    (here / "snapshots/m.safetensors").symlink_to((here / "m.safetensors").resolve())
    before = (here / "m.safetensors").read_bytes()
    assert says in line(command)
    assert (here / "m.safetensors").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where even root makes no file")
@pytest.mark.parametrize("command", [
    "sample m.safetensors --seeds 0 --out /proc/x",
    "video m.safetensors --seeds 0-1 --fps 1 --out /proc/x.mp4",
    "directions pca m.safetensors --samples 100 --out /proc/x.safetensors",
    "export m.safetensors --to onnx --out /proc/x.onnx",
])  # fmt: skip
def test_a_folder_that_takes_nothing_is_told_before_the_work(here, command, monkeypatch):
    monkeypatch.setattr("hsrgan.engine.model.Synthesis.forward", None)  # the work
    assert "cannot write /proc" in line(command)


def test_a_directions_file_that_cannot_be_written_is_one_line(kept):
    with pytest.raises(UserError, match="cannot write /proc/d"):
        save_directions(Path("/proc/d.safetensors"), load_directions(kept / "d.safetensors"), command="")


def test_paths_that_the_system_refuses_do_not_exist(tmp_path):
    for path in (tmp_path / ("a" * 300 + ".safetensors"), tmp_path / "file" / "x.safetensors"):
        (tmp_path / "file").touch()
        for read in (load_snapshot, read_safetensors, load_directions, lambda path: read_weights("vgg16", path)):
            with pytest.raises(UserError, match=r"no such file|does not exist"):
                read(path)


@pytest.mark.parametrize(("key", "text", "says"), [
    ("dataset", "[]", "dataset is a list, not a dict"),
    ("dataset", "null", "dataset is a NoneType"),
    ("recipe", "3", "recipe is a int"),
    ("generator", "[]", "generator is a list"),
    ("generator", "[" * 100_000, "RecursionError"),
    ("score", '"x"', "score is a str"),
])  # fmt: skip
def test_metadata_of_another_shape_is_one_line(kept, tmp_path, key, text, says):
    with safe_open(kept / "m.safetensors", "pt") as file:
        metadata = file.metadata() | {key: text}
    save_file(load_file(kept / "m.safetensors"), tmp_path / "m.safetensors", metadata)
    with pytest.raises(UserError, match=says):
        load_snapshot(tmp_path / "m.safetensors")


def test_a_direction_with_a_slash_in_its_name(here):
    result = run("sample m.safetensors --seeds 0 --directions d.safetensors --edit a/b=-1:1 --no-grid --out o")
    assert result.exit_code == 0, result.output
    assert "seed0000-a_b+1.00.png" in os.listdir("o")


def test_the_list_of_tools_in_a_terminal_that_knows_ascii_alone():
    command = [sys.executable, "-m", "hsrgan.tools.cli", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    listed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert listed.returncode == 0 and "import_weights" in listed.stdout, listed.stderr
