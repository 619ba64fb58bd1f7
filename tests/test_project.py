"""tools/project.py on a snapshot of the quickstart's architecture: its files, its choices, and its mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_fixtures import digits, imported, kaiming, photographs
from PIL import Image
from quickstart_snapshot import save_quickstart
from safetensors.torch import save_file
from typer.testing import CliRunner

from hsrgan.engine import projection
from hsrgan.engine.latents import load_latents
from hsrgan.engine.metrics import vgg16
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import to_uint8
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.teacher import create_timm
from hsrgan.tools import project

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "recipes/digits_teacher.safetensors"
FILES = ["{}-convergence.json", "{}-convergence.png", "{}-side-by-side.png", "{}-w.npz", "{}-w.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """quickstart.safetensors, labelled.safetensors, bare.safetensors (no teacher); digit.png 16×16, flower.jpg."""
    folder = tmp_path_factory.mktemp("project")
    save_quickstart(folder / "quickstart.safetensors", f"hsr.teacher={TEACHER}")
    save_quickstart(folder / "labelled.safetensors", labels=True)
    save_quickstart(folder / "bare.safetensors", recipe_json="{}")
    Image.fromarray(digits(1, 16)[0, 0].numpy()).save(folder / "digit.png")
    Image.fromarray(photographs()[1].permute(1, 2, 0).numpy()).save(folder / "flower.jpg")
    return folder


def _run(*arguments: object):
    return CliRunner().invoke(project.app, [str(argument) for argument in arguments])


def _line(*arguments: object) -> str:
    """The one line of a user's mistake."""
    result = _run(*arguments)
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_it_leaves_pictures_curves_and_latents_that_make_the_picture_again(folder, tmp_path):
    snapshot, out = folder / "quickstart.safetensors", tmp_path / "new" / "out"
    result = _run(snapshot, folder / "digit.png", folder / "flower.jpg", "--steps", 80, "--out", out, "--batch", 1)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(out)) == sorted(name.format(image) for name in FILES for image in ("digit", "flower"))
    generator, _ = load_snapshot(snapshot)
    for name in ("digit", "flower"):
        facts = json.loads((out / f"{name}-convergence.json").read_text())
        assert len(facts["distance"]) == len(facts["regulariser"]) == 81 and facts["likeness"] == str(TEACHER)
        assert facts["distance"][-1] < facts["distance"][0] / 4, name
        assert f"distance {facts['distance'][0]:.4f} → {facts['distance'][-1]:.4f}" in result.output

        latents = load_latents(out / f"{name}-w.safetensors")
        latents.expect(generator, out)
        assert latents.space == "w" and latents.snapshot_sha256 == facts["snapshot_sha256"]
        assert torch.equal(load_latents(out / f"{name}-w.npz").w, latents.w)
        again = to_uint8(generator.synthesis(latents.w, noise=latents.noise))[0, 0].numpy()
        both = np.asarray(Image.open(out / f"{name}-side-by-side.png"))
        assert both.shape == (64, 128)  # 16×16 pictures, four times as large
        left, right = both[::4, :64:4], both[::4, 64::4]
        assert np.array_equal(right, again)
        target = project.read_image(next(folder.glob(f"{name}.*")), generator)
        assert np.array_equal(left, to_uint8(target)[0].numpy()) and not np.array_equal(left, right)
        curve = np.asarray(Image.open(out / f"{name}-convergence.png").convert("L"))
        assert curve.shape == (600, 800) and len(np.unique(curve)) > 20
    assert np.array_equal(to_uint8(project.read_image(folder / "digit.png", generator)), digits(1, 16)[0].numpy())

    edited = generator.synthesis(latents.w + 0.5 * generator.synthesis.b4.conv1.affine.weight[0], noise=latents.noise)
    assert (to_uint8(edited)[0, 0].numpy() != again).any()


def test_as_a_script_in_w_plus_with_labels_by_another_teacher(folder, tmp_path):
    """From another folder: recipe and teacher are found all the same."""
    result = subprocess.run(
        [sys.executable, project.__file__, folder / "labelled.safetensors", folder / "digit.png", "--space", "w+",
         "--label", "2", "--steps", "3", "--seed", "5", "--pixel", "0.5", "--teacher", TEACHER],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 images projected" in result.stdout
    facts = json.loads((tmp_path / "projected/digit-convergence.json").read_text())
    assert (facts["label"], facts["seed"], facts["space"], facts["weight_of_pixel"]) == ("2", 5, "w+", 0.5)
    latents = load_latents(tmp_path / "projected/digit-w.safetensors")
    assert latents.space == "w+" and not torch.equal(latents.w[:, 0], latents.w[:, 1])


def test_the_recipes_teacher_is_looked_for_from_here(tmp_path, monkeypatch):
    """The quickstart names it by a relative path."""
    snapshot = save_quickstart(tmp_path / "m.safetensors")
    Image.fromarray(digits(1, 16)[0, 0].numpy()).save(tmp_path / "digit.png")
    arguments = (snapshot, tmp_path / "digit.png", "--steps", 1, "--out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    line = _line(*arguments)
    assert "teacher file recipes/digits_teacher.safetensors does not exist" in line
    assert f"go where it was trained (this is {tmp_path}), or name one with --features" in line
    monkeypatch.chdir(ROOT)
    assert _run(*arguments).exit_code == 0


def test_the_label_is_where_it_begins(folder):
    generator, metadata = load_snapshot(folder / "labelled.safetensors")

    named = {"class_names": [f"n{i}" for i in range(10)]}

    def read(label, **changes):
        return project.read_label(label, generator, folder, metadata["dataset"] | named | changes)

    labels = [read("0"), read("n2"), read("0,n2", multi_label=True)]
    assert [c.nonzero().flatten().tolist() for c in labels] == [[0], [2], [0, 2]]
    starts = [projection.w_statistics(generator, c, 0)[0] for c in (read("all"), *labels)]
    assert min((a - b).abs().max() for i, a in enumerate(starts) for b in starts[:i]) > 1e-3


def test_a_teacher_named_without_layers_is_seen_at_quarters_of_its_depth(folder, tmp_path):
    judge = project.likeness(str(TEACHER), {}, folder)
    assert len(judge.teacher.net.blocks) == 4 and judge.teacher.indices == [0, 1, 2, 3]
    net = kaiming(create_timm("resnet10t"))
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    judge = project.likeness(f"timm:resnet10t@32:{tmp_path / 'weights.safetensors'}", {"hsr": "not looked at"}, folder)
    assert len(judge.teacher.net.feature_info) == 5 and judge.teacher.indices == [1, 2, 3, 4]


def test_without_a_teacher_vgg16_is_taken_once_it_is_imported(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HSRGAN_CACHE", str(tmp_path / "cache"))
    arguments = (folder / "bare.safetensors", folder / "digit.png", "--steps", 2, "--out", tmp_path / "out")
    line = _line(*arguments)
    assert "has no teacher to compare images with: name one with --features, or import VGG-16" in line
    assert "python tools/import_weights.py vgg16 vgg16-397923af.pth" in line and not (tmp_path / "out").exists()

    monkeypatch.setattr(vgg16, "FEATURES", 24)  # of 4,096: the classifier, which LPIPS does not need
    torch.save(kaiming(vgg16.VGG16()).state_dict(), tmp_path / "vgg16.pth")
    imported("vgg16", tmp_path / "vgg16.pth")
    assert _run(*arguments).exit_code == 0
    facts = json.loads((tmp_path / "out/digit-convergence.json").read_text())
    assert facts["likeness"] == "lpips-vgg" and facts["distance"][-1] < facts["distance"][0]
    os.remove(tmp_path / "vgg16.pth")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [16, [16, 24]], ids=str)
def test_images_take_the_models_channels_and_shape(folder, channels, size):
    generator = Generator(8, 0, 8, size, channels, channel_base=64, mapping_layers=1)
    for name in ("digit.png", "flower.jpg"):
        image = project.read_image(folder / name, generator)
        assert image.shape == (channels, 16, 16 if size == 16 else 24) and image.dtype == torch.float32
        assert -1 <= image[0].min() < -0.5 and 0.2 < image[0].max() <= 1
        assert channels < 4 or (image[3] == 1).all()


def test_mistakes_are_one_line(folder, tmp_path):
    quickstart, digit, out = folder / "quickstart.safetensors", folder / "digit.png", ("--out", tmp_path / "out")
    (tmp_path / "torn.png").write_bytes(digit.read_bytes()[:80])
    (tmp_path / "notes.txt").write_text("no picture")
    assert "no such file" in _line(folder / "absent", digit, *out)
    assert "absent.png: No such file or directory; check" in _line(quickstart, tmp_path / "absent.png", *out)
    assert "torn.png cannot be read" in _line(quickstart, tmp_path / "torn.png", *out)
    assert "notes.txt cannot be read (no known image format)" in _line(quickstart, tmp_path / "notes.txt", *out)
    assert "Is a directory" in _line(quickstart, tmp_path, *out)
    shutil.copy(digit, tmp_path / "digit.png")
    assert "would both be written as digit-w.safetensors" in _line(quickstart, digit, tmp_path / "digit.png", *out)
    assert "trained without labels" in _line(quickstart, digit, "--label", 1, *out)
    assert "classes 0 to 9 (0, 1, 2, " in _line(folder / "labelled.safetensors", digit, "--label", 12, *out)
    assert "write vgg16, a teacher's" in _line(quickstart, digit, "--features", "resnet50", *out)
    assert "neither a timm model" in _line(quickstart, digit, "--features", "timm:resnet5000", *out)
    assert "does not exist" in _line(quickstart, digit, "--features", tmp_path / "t.safetensors", *out)
    for name, hsr, says in (
        ("moved", {"teacher": "gone.safetensors", "layers": {"8": 1}}, "teacher file gone.safetensors does not exist"),
        ("damaged", {"teacher": 3, "layers": {"8": 1}}, "its recipe's hsr is not understood"),
    ):
        made = save_quickstart(tmp_path / f"{name}.safetensors", recipe_json=json.dumps({"hsr": hsr}))
        line = _line(made, digit, *out)
        assert says in line and "--features" in line
    assert not (tmp_path / "out").exists()
    assert "name another --out" in _line(quickstart, digit, "--out", tmp_path / "notes.txt" / "x")
    assert "lower --lr" in _line(quickstart, digit, "--lr", 1e30, "--steps", 12, *out)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_what_was_there(folder, tmp_path, monkeypatch, fault):
    """The third of five files fails: none of them appears, and those of an earlier run stay."""
    arguments = (folder / "quickstart.safetensors", folder / "digit.png", "--steps", 1, "--out", tmp_path)
    assert _run(*arguments).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 5

    def fail(path, latents):
        path.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(project, "save_latents", fail)
    if isinstance(fault, OSError):
        assert "No space left on device; free space there or name another --out" in _line(*arguments, "--seed", 1)
    else:
        assert _run(*arguments, "--seed", 1).exit_code != 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
