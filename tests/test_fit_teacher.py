"""tools/fit_teacher.py: what it fits, that the shipped teacher has learnt, and its answers to mistakes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import hsrgan.recipes
from hsrgan.engine.digits import ensure_digits
from hsrgan.engine.teacher import Teacher, create_timm, load_teacher
from hsrgan.tools import fit_teacher

SHIPPED = Path(hsrgan.recipes.__file__).with_name("digits_teacher.safetensors")
TINY = ["--resolution", "8", "--batch", "8", "--kimg", "0.05", "--model-args",
        "patch_size=4,embed_dim=8,depth=2,num_heads=2,class_token=false,global_pool=avg,fc_norm=false"]


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(fit_teacher.app, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of colour images of two sizes, one of them damaged."""
    noise = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = noise.integers(0, 128, (20 + i, 24, 3)) + (128 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / label / f"{i}.png")
    (tmp_path / "images" / "light" / "9.png").write_bytes(b"nothing")
    return tmp_path / "images"


def test_the_shipped_teacher_has_learnt_from_the_digits(tmp_path):
    """A fifth of the digits took no part in its fit; of those it must know more than its untrained self and pixels."""
    assert SHIPPED.stat().st_size < 2_000_000
    with safe_open(SHIPPED, "pt") as file:
        metadata = file.metadata()
    assert metadata["command"] == "python tools/fit_teacher.py digits --out recipes/digits_teacher.safetensors"

    teacher = load_teacher(str(SHIPPED), layers={16: 3})
    assert teacher.channels == {16: 64} and teacher.grids == {16: (4, 4)}
    net = copy.deepcopy(teacher.net)
    torch.manual_seed(0)
    net.load_state_dict(create_timm("vit_tiny_patch16_224", img_size=16, num_classes=0,
                                    **fit_teacher.parse_args(fit_teacher.SMALL_VIT_ARGS)).state_dict())
    untrained = Teacher(net, {16: 3}, (16, 16), (0.3056,) * 3, (0.3861,) * 3)

    images = fit_teacher.read_images(str(ensure_digits(tmp_path, 16, 1)), 16)
    assert images.pixels.shape == (1797, 1, 16, 16) and images.labels.unique().tolist() == list(range(10))
    train, test = fit_teacher.hold_out(images, 0)

    def scores(features):
        rows = features(train.unit()), features(test.unit())
        return [score(rows[0], train.labels, rows[1], test.labels)
                for score in (fit_teacher.knn_accuracy, fit_teacher.few_label_accuracy, fit_teacher.probe_accuracy)]

    fitted = scores(lambda img: fit_teacher.features(teacher, img))
    before = scores(lambda img: fit_teacher.features(untrained, img))
    pixels = scores(lambda img: img.flatten(1))
    assert fitted[0] > 0.97 and fitted[1] > 0.94 and fitted[2] > 0.96
    assert fitted[1] > pixels[1] + 0.03
    assert all(a > b + 0.2 for a, b in zip(fitted, before, strict=True)), (fitted, before)


def test_a_folder_gives_a_teacher_and_its_figures_and_the_same_one_again(folder, tmp_path):
    outs = [tmp_path / "a.safetensors", tmp_path / "made" / "b.safetensors"]
    for out in outs:
        code, output = run(folder, "--out", out, *TINY)
        assert code == 0, output
    assert "19 images, 15 of them to fit on" in output and "4 held-out images" in output and "linear" in output
    assert "skipped 1 damaged" in output
    assert f"in a recipe: hsr.teacher={outs[-1]}\n" in output  # in one piece, to be pasted
    a, b = (load_file(out) for out in outs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    teacher = load_teacher(str(outs[0]), layers={4: 1, 8: 0})
    assert teacher.grids[4] == (2, 2) and teacher.input_size == (8, 8)
    train, _ = fit_teacher.hold_out(fit_teacher.read_images(str(folder), 8), seed=0)
    normalised = train.unit() * 2 * teacher.scale + teacher.shift - teacher.scale  # x·scale + shift, x = 2u − 1
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-3 and (normalised.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_convolutional_teacher_and_images_without_labels(folder, tmp_path):
    out = tmp_path / "conv.safetensors"
    code, output = run(folder / "dark", "--out", out, "--model", "test_resnet", "--resolution", "32", "--batch", "8",
                       "--kimg", "0.02", "--mirror")
    assert code == 0 and "own view" in output and "linear" not in output, output
    assert load_teacher(str(out), layers={8: 4, 16: 2}).channels.keys() == {8, 16}


def test_points_are_compared_where_both_views_show_the_same_place():
    torch.manual_seed(0)
    views = fit_teacher.Views(rotation=90, mirror=True)
    affines = [views.geometry(6, torch.device("cpu")) for _ in range(2)]
    centres = (torch.arange(32) * 2 + 1) / 32 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    cells = torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    # Each cell of a map says which place of the image it shows. Bilinear interpolation of that is exact.
    maps = [(affine @ cells)[:, :2].view(6, 2, 32, 32) for affine in affines]
    a, b = fit_teacher.same_points(*maps, *affines, points=64)
    assert len(a) > 60
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_view_shows_the_image_through_its_geometry():
    views = fit_teacher.Views(rotation=0, mirror=False)
    torch.manual_seed(0)
    img = torch.zeros(64, 1, 16, 16)
    img[:, :, 4, 4] = 1  # a point at (x, y) = (−0.4375, −0.4375)
    affine = torch.eye(3).repeat(64, 1, 1)
    affine[:, 0, 2] = -0.5  # the view looks half an image's half-width to the left, so the point moves right by 4
    seen = views.draw(img, affine)[:, 0]
    brightest = seen.flatten(1).argmax(1)
    assert (brightest == 4 * 16 + 8).float().mean() > 0.9


def test_vicreg_in_closed_form():
    a = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0]]) * 4
    torch.testing.assert_close(fit_teacher.vicreg(a, a), torch.tensor(0.0))  # agreeing, wide, uncorrelated
    torch.testing.assert_close(fit_teacher.vicreg(a, a + 2), torch.tensor(100.0))  # 25·2²
    flat = torch.zeros(4, 2)
    torch.testing.assert_close(fit_teacher.vicreg(flat, flat), torch.tensor(25 * (1 - 0.01)))  # collapsed
    same = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) * 2  # covariance 8 off the diagonal: 2·2·8²/2
    torch.testing.assert_close(fit_teacher.vicreg(same, same), torch.tensor(128.0))


@pytest.mark.parametrize(("args", "says"), [
    (["--model", "vit_tinny_patch16_224"], "did you mean vit_tiny_patch16_224"),
    (["--model-args", "depth"], "not key=value"),
    (["--model-args", "petch_size=4"], "petch_size"),
    (["--out", f"{__file__}/t.safetensors"], "Not a directory; name another --out"),
])
def test_mistakes_end_in_one_line(folder, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    code, output = run(folder, *args)
    assert code == 2 and says in output, output
    assert len(output.strip().splitlines()) == 1


def test_no_images_or_too_few(folder, tmp_path):
    code, output = run(folder / "light", "--out", tmp_path / "t.safetensors", *TINY)
    assert code == 2 and "holds 9 images: give ten at least" in output
    (tmp_path / "empty").mkdir()
    for data in (tmp_path / "empty", tmp_path / "gone"):
        code, output = run(data, "--out", tmp_path / "t.safetensors", *TINY)
        assert code == 2 and str(data) in output and output.startswith("error:")


def test_images_that_memory_does_not_hold_are_left_out_and_that_is_said(folder, monkeypatch, capsys):
    monkeypatch.setattr(fit_teacher, "MAX_BYTES", 12 * 3 * 8**2)
    images = fit_teacher.read_images(str(folder), 8)
    assert len(images.pixels) == len(images.names) == 12 and images.class_names == ["dark", "light"]
    assert "12 of 20 images are used" in capsys.readouterr().err
