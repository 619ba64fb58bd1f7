"""One tool's files in another's hands: import → project → edit → export, on the quickstart's architecture and a
rectangle of RGBA.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import stylegan_pickles
import torch
from PIL import Image
from quickstart_snapshot import save_quickstart
from typer.testing import CliRunner

from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import to_uint8
from hsrgan.engine.sampler import draw
from hsrgan.engine.snapshot import load_snapshot, save_snapshot
from hsrgan.tools import directions, ema, export, import_weights, project, sample

TEACHER = Path(__file__).parents[1] / "recipes/digits_teacher.safetensors"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    return save_quickstart(tmp_path_factory.mktemp("snapshot") / "m.safetensors")


@pytest.fixture(scope="module")
def rectangle(tmp_path_factory) -> Path:
    """RGBA, 24×16."""
    torch.manual_seed(0)
    generator = Generator(z_dim=16, w_dim=16, img_resolution=[24, 16], img_channels=4, mapping_layers=2,
                          channel_base=128, channel_max=16)  # fmt: skip
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            value.data.fill_(0.3)
    path = tmp_path_factory.mktemp("rectangle") / "r.safetensors"
    save_snapshot(path, generator, recipe_json="{}", kimg=1, dataset={})
    return path


def run(app, *arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("to", ["torch_export", "hf"])
def test_a_rectangle_of_rgba_computes_the_same_elsewhere(rectangle, tmp_path, to):
    out = tmp_path / ("r.pt2" if to == "torch_export" else "r")
    run(export.app, rectangle, "--to", to, "--out", out)
    generator, _ = load_snapshot(rectangle)
    z = torch.from_numpy(np.random.RandomState(7).randn(4, 16)).float()
    expected = generator(z, truncation_psi=0.7, noise_mode="const")
    if to == "hf":
        found = Generator.from_pretrained(out)(z, truncation_psi=0.7, noise_mode="const")
        assert "24×16, RGBA" in (out / "README.md").read_text(encoding="utf-8")
    else:
        found = torch.export.load(out).module()(z=z, psi=torch.tensor(0.7))
    assert found.shape == (4, 4, 24, 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("which", "space"), [("snapshot", "w"), ("rectangle", "w+")])
def test_a_projection_comes_back_and_can_be_edited(which, space, request, tmp_path):
    model = request.getfixturevalue(which)
    generator, _ = load_snapshot(model)
    run(sample.app, model, "--seeds", 3, "--no-grid", "--out", tmp_path)
    run(project.app, model, tmp_path / "seed0003.png", "--space", space, "--steps", 15, "--teacher", TEACHER,
        "--out", tmp_path)  # fmt: skip
    curve = json.loads((tmp_path / "seed0003-convergence.json").read_text())["distance"]
    assert min(curve[1:]) < 0.9 * curve[0]
    run(directions.app, "pca", model, "--count", 1, "--samples", 100, "--seeds", 0, "--out",
        tmp_path / "d.safetensors")  # fmt: skip
    run(sample.app, model, "--w", tmp_path / "seed0003-w.safetensors", "--directions", tmp_path / "d.safetensors",
        "--edit", "pca0=-2:2", "--no-grid", "--out", tmp_path / "edited")  # fmt: skip
    unedited = pixels(tmp_path / "edited/w0000-pca0+0.00.png")

    pair = pixels(tmp_path / "seed0003-side-by-side.png")
    height, width = generator.img_shape[1:]
    scale = pair.shape[0] // height
    given, found = pair[::scale, : width * scale : scale], pair[::scale, width * scale :: scale]
    assert np.array_equal(given, pixels(tmp_path / "seed0003.png"))
    assert np.abs(unedited - found).max() <= 1
    changes = [np.abs(pixels(tmp_path / f"edited/w0000-pca0{strength}.00.png") - unedited).mean()
               for strength in ("-2", "+2")]  # fmt: skip
    assert min(changes) > 2, changes


def test_a_pickle_of_the_quickstart_comes_back_bit_by_bit(snapshot, tmp_path):
    ours, _ = load_snapshot(snapshot)
    content = stylegan_pickles.content(stylegan_pickles.generator(ours))
    (tmp_path / "network-snapshot-000160.pkl").write_bytes(stylegan_pickles.dumps(content))
    again = tmp_path / "again.safetensors"
    run(import_weights.app, "stylegan", tmp_path / "network-snapshot-000160.pkl", again)
    theirs, metadata = load_snapshot(again)
    assert theirs.state_dict().keys() == ours.state_dict().keys() and metadata["kimg"] == 160
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    run(sample.app, again, "--seeds", "5", "--psi", 0.7, "--no-grid", "--out", tmp_path)
    z = torch.from_numpy(np.random.RandomState(5).randn(1, 64)).float()  # NVIDIA's
    assert torch.equal(draw([5], ours)[0], z)
    picture = to_uint8(ours(z, truncation_psi=0.7, noise_mode="const"))[0, 0].numpy().astype(int)
    assert np.abs(pixels(tmp_path / "seed0005.png") - picture).max() <= 1


def test_averages_of_the_quickstart(snapshot, tmp_path):
    """Four stored averages of a walk; the length of two of them, at the end, is the last of these itself."""
    generator, metadata = load_snapshot(snapshot)
    (tmp_path / "power").mkdir()
    for images in (80_000, 160_000):
        for length in (0.05, 0.1):
            with torch.no_grad():
                for value in generator.parameters():
                    value.add_(0.01)
            path = tmp_path / "power" / f"{images:09d}-{length:.3f}.safetensors"
            save_snapshot(path, generator, recipe_json=json.dumps(metadata["recipe"]), kimg=images / 1000,
                          dataset=metadata["dataset"], power={"length": length, "images": images})  # fmt: skip
    said = json.loads(run(ema.app, tmp_path, "--length", 0.1, "--seeds", "0-1", "--out", tmp_path / "a.safetensors"))
    assert said["averages"] == 4 and said["residual"] < 1e-6
    made, facts = load_snapshot(tmp_path / "a.safetensors")
    for key, value in generator.state_dict().items():
        torch.testing.assert_close(made.state_dict()[key], value, rtol=0, atol=1e-5)
    assert facts["power"]["length"] == 0.1 and pixels(tmp_path / "a.png").shape[:2] == (64 + ema.TITLE, 128)
