"""tools/sample.py's grids and latents, tools/directions.py and tools/video.py, on a snapshot of the quickstart."""

import json
import shlex

import numpy as np
import pytest
import torch
from metric_fixtures import attributes_file
from PIL import Image
from quickstart_snapshot import save_quickstart
from typer.testing import CliRunner

from hsrgan.engine.factorised import pca, random_w
from hsrgan.engine.latents import Latents, load_latents, save_latents
from hsrgan.engine.metrics.directions import Directions, load_directions, save_directions
from hsrgan.engine.pictures import image_grid
from hsrgan.engine.sampler import layer_noise, ws_of_seeds
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools import directions, sample

NUM_WS, W_DIM = 6, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    save_quickstart(folder / "m.safetensors")
    save_quickstart(folder / "labelled.safetensors", labels=True)
    return folder


@pytest.fixture(scope="module")
def snapshot(folder):
    return folder / "m.safetensors"


@pytest.fixture(scope="module")
def generator(snapshot):
    return load_snapshot(snapshot)[0]


@pytest.fixture(scope="module")
def planted(folder, snapshot):
    """A file of two directions: `all` moves every ws, `coarse` the first two."""
    found = Directions(("all", "coarse"), torch.eye(W_DIM)[:2], (0.5, 0.25), (1.5, 0.5), sha256_of(snapshot), 700,
                       "sefa", (None, (0, 1)))  # fmt: skip
    save_directions(folder / "planted.safetensors", found, command="by hand")
    return folder / "planted.safetensors"


def run(app, *arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def line(app, *arguments) -> str:
    """The one line of a user's mistake."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def expected(generator, ws, noise_mode="const", noise=None):
    """The picture of one ws [num_ws, w_dim], as the tools save it."""
    image = generator.synthesis(ws[None], noise_mode=noise_mode, noise=noise)
    return np.asarray(image_grid(image, scale=1)).astype(int)


def near(path, image):
    """But for a rounding, which may depend on the batch."""
    assert np.abs(picture(path) - image).max() <= 1
    assert np.ptp(image) > 20  # it shows something


def test_mixing_takes_the_chosen_ws_from_the_column(snapshot, generator, tmp_path):
    said = run(sample.app, snapshot, "--seeds", "1,2", "--mix", "7-9", "--mix-layers", "1-2", "--psi", 0.8,
               "--out", tmp_path)  # fmt: skip
    assert "rows of the grid: sources of the columns, seed0007, seed0008, seed0009" in said
    assert len(list(tmp_path.glob("seed*.png"))) == 2 + 3 + 6
    ws = ws_of_seeds(generator, [2, 8], psi=0.8)
    mixed = ws[1].clone()
    mixed[1:3] = ws[0, 1:3]
    for name, of in {"seed0002": ws[0], "seed0008": ws[1], "seed0008-mix-seed0002": mixed}.items():
        near(tmp_path / f"{name}.png", expected(generator, of))
    grid = picture(tmp_path / "grid.png")
    assert grid.shape == (4 * 64, 3 * 64) and not grid[:64, :64].any()
    assert np.array_equal(grid[:64:4, 128::4], picture(tmp_path / "seed0002.png"))
    assert np.array_equal(grid[128:192:4, :64:4], picture(tmp_path / "seed0008.png"))
    assert np.array_equal(grid[128:192:4, 128::4], picture(tmp_path / "seed0008-mix-seed0002.png"))


def test_mixing_by_default_takes_the_coarser_half(folder, tmp_path):
    generator, _ = load_snapshot(folder / "labelled.safetensors")
    run(sample.app, folder / "labelled.safetensors", "--seeds", 1, "--mix", 2, "--label", 4, "--noise", "random",
        "--out", tmp_path)  # fmt: skip
    ws = ws_of_seeds(generator, [1, 2], torch.tensor([4, 4]))
    mixed = torch.cat([ws[0, :3], ws[1, 3:]])
    noise = layer_noise([2], generator)  # the row's
    near(tmp_path / "seed0002-mix-seed0001.png", expected(generator, mixed, "random", noise))


def test_a_truncation_sweep_has_a_row_for_each_psi(snapshot, generator, tmp_path):
    said = run(sample.app, snapshot, "--seeds", "4,5", "--psi", "0,0.5,1", "--cutoff", 2, "--out", tmp_path)
    assert "rows of the grid: psi0, psi0.5, psi1" in said
    whole = ws_of_seeds(generator, [5])[0]
    for psi in (0, 0.5, 1):
        ws = torch.cat([generator.mapping.w_avg.lerp(whole[:2], psi), whole[2:]])
        near(tmp_path / f"seed0005-psi{psi}.png", expected(generator, ws))
    assert picture(tmp_path / "grid.png").shape == (3 * 64, 2 * 64)


def test_an_edit_sweep_has_a_row_for_each_strength_and_moves_only_its_ws(snapshot, generator, planted, tmp_path):
    said = run(sample.app, snapshot, "--seeds", "4,5", "--directions", planted, "--edit", "coarse=-3:3",
               "--edit", "all=1", "--out", tmp_path, "--save-w", tmp_path / "w.safetensors")  # fmt: skip
    assert "coarse-3.00" in said and picture(tmp_path / "grid.png").shape == (7 * 64, 2 * 64)
    base = ws_of_seeds(generator, [4, 5])
    for row, strength in enumerate(range(-3, 4)):
        ws = base.clone()
        ws[:, :, 0] += 1.5
        ws[:, :2, 1] += strength * 0.5
        saved = load_latents(tmp_path / "w.safetensors").w[2 * row : 2 * row + 2]
        torch.testing.assert_close(saved, ws)
        near(tmp_path / f"seed0005-coarse{strength:+.2f}.png", expected(generator, ws[1]))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_saved_latents_give_the_same_pictures_again(snapshot, planted, tmp_path, suffix):
    file = tmp_path / f"w{suffix}"
    edit = ("--directions", planted, "--edit", "coarse=2")
    run(sample.app, snapshot, "--seeds", "0-2", "--psi", 0.7, *edit, "--save-w", file, "--out", tmp_path / "a")
    run(sample.app, snapshot, "--w", file, "--out", tmp_path / "b")
    for i in range(3):
        assert np.array_equal(picture(tmp_path / f"a/seed000{i}.png"), picture(tmp_path / f"b/w000{i}.png"))
    if suffix == ".npz":
        with np.load(file) as opened:  # NVIDIA's
            assert opened.files == ["w"] and opened["w"].shape == (3, NUM_WS, W_DIM)
    else:
        latents = load_latents(file)
        assert (latents.space, latents.snapshot_sha256) == ("w+", sha256_of(snapshot))


def test_a_file_of_w_and_one_with_noise(snapshot, generator, tmp_path):
    ws = ws_of_seeds(generator, [3, 4])
    np.savez(tmp_path / "w.npz", w=ws[:, 0].numpy())
    run(sample.app, snapshot, "--w", tmp_path / "w.npz", "--psi", 0.5, "--out", tmp_path / "w")
    near(tmp_path / "w/w0001.png", expected(generator, generator.mapping.w_avg.lerp(ws[1], 0.5)))

    noise = layer_noise([11, 12], generator)
    save_latents(tmp_path / "n.safetensors", Latents(ws, noise))
    again = tmp_path / "again.safetensors"
    run(sample.app, snapshot, "--w", tmp_path / "n.safetensors", "--psi", "1,0.5", "--out", tmp_path / "n",
        "--save-w", again)  # fmt: skip
    near(tmp_path / "n/w0001-psi1.png", expected(generator, ws[1], "random", noise[1:]))
    assert torch.equal(load_latents(again).noise, noise.repeat(2, 1)) and load_latents(again).space == "w"
    run(sample.app, snapshot, "--w", tmp_path / "n.safetensors", "--noise", "none", "--out", tmp_path / "none")
    near(tmp_path / "none/w0001.png", expected(generator, ws[1], "none"))
    said = run(sample.app, snapshot, "--w", tmp_path / "n.safetensors", "--mix", 5, "--out", tmp_path / "mix")
    assert "is left out: a mixed picture has two sources" in said


def test_the_sampler_refuses_what_does_not_go_together(folder, snapshot, planted, tmp_path):
    out = ("--out", tmp_path / "out")
    edit = ("--directions", planted, "--edit", "all=-1:1")
    labelled = folder / "labelled.safetensors"
    assert "a grid has rows of one kind" in line(sample.app, labelled, "--psi", "0,1", "--label", "all", *out)
    assert "--mix with --edit all=-1:1" in line(sample.app, snapshot, "--mix", "1", *edit, *out)
    assert "coarse=0:1: all has a range already" in line(sample.app, snapshot, *edit, "--edit", "coarse=0:1", *out)
    assert "--psi x: give a number" in line(sample.app, snapshot, "--psi", "x", *out)
    assert "the snapshot has the ws 0 to 5" in line(sample.app, snapshot, "--mix", "1", "--mix-layers", "2-6", *out)
    assert "--mix-layers 0 needs --mix" in line(sample.app, snapshot, "--mix-layers", "0", *out)
    assert "--mix x: 'x' is not a number" in line(sample.app, snapshot, "--mix", "x", *out)
    assert "name must end in .safetensors or .npz" in line(sample.app, snapshot, "--save-w", tmp_path / "w.txt", *out)
    save_latents(tmp_path / "w.npz", Latents(torch.zeros(1, NUM_WS, W_DIM)))
    for option in (("--seeds", "1"), ("--label", "1")):
        assert f"{option[0]} 1 with --w" in line(sample.app, snapshot, "--w", tmp_path / "w.npz", *option, *out)
    save_latents(tmp_path / "other.npz", Latents(torch.zeros(1, NUM_WS + 2, W_DIM)))
    assert "they belong to another model" in line(sample.app, snapshot, "--w", tmp_path / "other.npz", *out)
    assert not (tmp_path / "out").exists()


def affine_weights(snapshot):
    """Of ws 0 … 5 at 16×16, by the keys of the file: each convolution's, and the last toRGB's."""
    state = load_snapshot(snapshot)[0].state_dict()
    names = ["b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1", "b16.torgb"]
    return [state[f"synthesis.{name}.affine.weight"].double().numpy() for name in names]


def test_sefa_directions_change_the_styles_of_the_chosen_layers_most(snapshot, tmp_path):
    out = tmp_path / "made" / "of two" / "d.safetensors"
    said = run(directions.app, "sefa", snapshot, "--layers", "1-3", "--count", 3, "--samples", 300, "--seeds", "0,1",
               "--out", out)  # fmt: skip
    assert "eigenvalue share" in said
    found = load_directions(out)
    assert found.names == ("sefa0", "sefa1", "sefa2") and found.layers == ((1, 3),) * 3 and found.kind == "sefa"
    rows = np.concatenate(affine_weights(snapshot)[1:4])
    a = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    singular = np.linalg.svd(a, compute_uv=False)  # ‖A d‖ at its maxima
    d = found.vectors.double().numpy()
    np.testing.assert_allclose(np.linalg.norm(a @ d.T, axis=0), singular[:3], rtol=1e-5)
    np.testing.assert_allclose(d @ d.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(found.quality, singular[:3] ** 2 / (singular**2).sum(), rtol=1e-5)
    assert all(row[np.abs(row).argmax()] > 0 for row in d)

    figures = json.loads(out.with_suffix(".json").read_text())
    assert [row["name"] for row in figures["directions"]] == list(found.names) and figures["samples"] == 300
    assert figures["directions"][0] == {"name": "sefa0", "eigenvalue_share": found.quality[0], "std": found.std[0],
                                        "layers": [1, 3]}  # fmt: skip
    sheet = Image.open(out.with_suffix(".png"))
    assert sheet.size == (2 * 7 * 64 + 8, 3 * (64 + 14))


def test_the_contact_sheet_shows_what_an_edit_makes(snapshot, generator, planted, tmp_path):
    run(directions.app, "pca", snapshot, "--count", 2, "--samples", 200, "--seeds", "3", "--psi", 0.5, "--layers", "2",
        "--out", tmp_path / "d.safetensors")  # fmt: skip
    found = load_directions(tmp_path / "d.safetensors")
    ws = ws_of_seeds(generator, [3], psi=0.5)[0].clone()
    ws[2] += 2 * found.std[1] * found.vectors[1]
    sheet = picture(tmp_path / "d.png")
    tile = sheet[64 + 14 + 14 : 2 * (64 + 14) : 4, 5 * 64 : 6 * 64 : 4]  # the second direction, +2
    assert np.abs(tile - expected(generator, ws)).max() <= 1


def test_pca_finds_the_axes_of_w(generator):
    noise = np.random.default_rng(0)
    axes = np.linalg.qr(noise.standard_normal((W_DIM, W_DIM)))[0].T
    spread = np.array([9.0, 5.0, 3.0, *[1.0] * (W_DIM - 3)])
    w = noise.standard_normal((20000, W_DIM)) * spread @ axes + 7
    found = pca(3, (0, 1), w=w, snapshot="x")
    cosines = np.abs(found.vectors.double().numpy() @ axes[:3].T)
    assert np.diag(cosines).min() > 0.999
    assert found.std == pytest.approx(spread[:3], rel=0.02) and found.layers == ((0, 1),) * 3
    assert found.quality == pytest.approx(spread[:3] ** 2 / (spread**2).sum(), rel=0.05)
    assert np.array_equal(random_w(generator, 5, 1, batch=2), random_w(generator, 5, 1, batch=2))
    assert not np.array_equal(random_w(generator, 5, 1), random_w(generator, 5, 2))


def test_svm_and_names_of_ones_own(snapshot, tmp_path):
    out = tmp_path / "d e.safetensors"
    attributes_file(tmp_path / "attributes.safetensors")
    said = run(directions.app, "svm", snapshot, "--attributes", tmp_path / "attributes.safetensors", "--samples", 500,
               "--seeds", 0, "--out", out)  # fmt: skip
    assert load_directions(out).names == ("a0", "a1") and out.with_suffix(".png").is_file()
    assert shlex.split(said.splitlines()[-1])[-4:] == ["--directions", str(out), "--edit", "a0=2"]  # for a shell
    assert run(directions.app, "name", out, "a1=smile").endswith("a0, smile\n")
    found = load_directions(out)
    assert found.names == ("a0", "smile") and found.kind == "svm"
    assert [row["name"] for row in json.loads(out.with_suffix(".json").read_text())["directions"]] == ["a0", "smile"]
    run(sample.app, snapshot, "--directions", out, "--edit", "smile=2", "--seeds", 0, "--out", tmp_path / "s")
    assert "write it like pca0=pose" in line(directions.app, "name", out, "smile")
    assert "has no direction 'smiel': did you mean smile?" in line(directions.app, "name", out, "smiel=x")
    assert "has a direction 'a0' already" in line(directions.app, "name", out, "smile=a0")
    assert load_directions(out).names == ("a0", "smile")


def test_directions_refuse(snapshot, generator, tmp_path):
    out = ("--out", tmp_path / "d.safetensors")
    assert "the snapshot has the ws 0 to 5" in line(directions.app, "sefa", snapshot, "--layers", "5-6", *out)
    assert "W has 64 dimensions; give that or less" in line(directions.app, "sefa", snapshot, "--count", 65, *out)
    assert "must end in .safetensors" in line(directions.app, "sefa", snapshot, "--out", tmp_path / "d.png")
    within = ("--out", tmp_path / "made" / "d.safetensors")  # a folder that is refused with the rest
    assert "W has 64 dimensions" in line(directions.app, "pca", snapshot, "--count", 65, *within)
    assert not any(tmp_path.iterdir())
    far = Directions(("a",), torch.eye(W_DIM)[:1], (0.5,), (1.0,), sha256_of(snapshot), 9, "pca", ((4, 6),))
    save_directions(tmp_path / "far.safetensors", far, command="")
    edit = ("--directions", tmp_path / "far.safetensors", "--edit", "a=1", "--out", tmp_path / "out")
    assert "move ws that the snapshot has not (6 ws)" in line(sample.app, snapshot, *edit)
