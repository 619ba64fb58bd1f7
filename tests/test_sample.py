"""Snapshots and what is made from them alone: pictures by seed, and the score of digits."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hsrgan.engine import sampler
from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Generator
from hsrgan.engine.snapshot import load_snapshot, save_snapshot
from hsrgan.tools import sample, score_digits

TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}


def _write(path: Path, c_dim: int = 0, channels: int = 3) -> Generator:
    torch.manual_seed(0)
    generator = Generator(c_dim=c_dim, img_channels=channels, **TINY).eval()
    with torch.no_grad():
        for name, value in generator.named_parameters():
            if name.endswith("noise_strength"):
                value.fill_(0.5)  # zero at the start of training, which would hide the noise modes
    generator.mapping.w_avg.fill_(0.3)
    names = [f"n{i}" for i in range(c_dim)]
    save_snapshot(path, generator, recipe_json='{"seed": 7}', kimg=1.5, dataset={"class_names": names})
    return generator


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    _write(path)
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "labelled.safetensors"
    _write(path, c_dim=3, channels=1)
    return path


def _run(app, *arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _line(result) -> str:
    """The one line of a user's mistake."""
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_snapshot_round_trip_is_exact(tmp_path):
    path = tmp_path / "snapshot.safetensors"
    saved = _write(path, c_dim=3)
    loaded, metadata = load_snapshot(path)
    assert saved.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in saved.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert metadata["kimg"] == 1.5 and metadata["recipe"] == {"seed": 7}
    assert metadata["dataset"] == {"class_names": ["n0", "n1", "n2"]} and metadata["generator"] == saved.init_kwargs
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot.safetensors"]


def test_a_failed_save_leaves_the_former_snapshot(tmp_path, monkeypatch):
    path = tmp_path / "snapshot.safetensors"
    generator = _write(path)
    before = path.read_bytes()

    def torn(target, content):
        with open(target, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(UserError, match=r"cannot write .*snapshot.safetensors: No space left"):
        save_snapshot(path, generator, recipe_json="{}", kimg=2, dataset={})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def _changed(source: Path, target: Path, change) -> Path:
    """`source` with `change(tensors, metadata)` done to it, at `target`."""
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, m: m.pop("format"), "its format is not stated"),
        (lambda t, m: m.update(generator='{"z_dim": 8, "depth": 3}'), "does not describe a generator.*depth"),
        (lambda t, m: m.update(generator="{"), "does not describe a generator"),
        (lambda t, m: m.pop("kimg"), "does not describe a generator.*kimg"),
        (lambda t, m: t.pop("synthesis.b4.const"), r"fit the generator .*: synthesis\.b4\.const is missing;"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "extra is not part of it;"),
        (lambda t, m: t.update({"mapping.w_avg": torch.zeros(9)}), r"mapping\.w_avg is \[9\], not \[8\];"),
        (lambda t, m: m.update(generator=json.dumps({**TINY, "img_resolution": 32})), r"is missing \(and \d+ more\)"),
    ],
    ids=["format", "unknown argument", "torn JSON", "no kimg", "missing", "extra", "shape", "other resolution"],
)
def test_a_snapshot_that_does_not_fit_is_one_clear_line(plain, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        load_snapshot(_changed(plain, tmp_path / "changed.safetensors", change))


def test_files_that_are_no_snapshots(plain, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_snapshot(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="is a folder: name the"):
        load_snapshot(tmp_path)
    for name, content in {"text": b"hello, world", "cut": plain.read_bytes()[:-4], "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_snapshot(tmp_path / name)


def test_parse_seeds():
    assert sampler.parse_seeds("0-3, 10,7-7") == [0, 1, 2, 3, 10, 7]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-", "1-2-3", "4294967296", "1.5"])
def test_bad_seeds_are_refused(text):
    with pytest.raises(UserError, match="--seeds"):
        sampler.parse_seeds(text)


@pytest.mark.parametrize("noise_mode", ["random", "const", "none"])
def test_a_seed_is_one_picture_whatever_its_batch(labelled, noise_mode):
    generator, _ = load_snapshot(labelled)
    together = sampler.generate(generator, [3, 4, 5], noise_mode=noise_mode, batch=2)
    alone = sampler.generate(generator, [5], noise_mode=noise_mode, batch=1)
    assert together.dtype == torch.uint8 and together.shape == (3, 1, 16, 16)
    # the last bit of the fp32 sum may differ between batch sizes, and with it one rounding
    assert (together[2].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[1])


def test_noise_modes_truncation_and_labels_reach_the_generator(labelled):
    generator, _ = load_snapshot(labelled)
    z = torch.from_numpy(np.random.RandomState(5).randn(1, 8)).float()  # NVIDIA's
    c = torch.tensor([[0.0, 1.0, 0.0]])
    expected = generator(z, c, truncation_psi=0.5, truncation_cutoff=2, noise_mode="none")
    made = sampler.generate(generator, [5], torch.tensor([1]), psi=0.5, cutoff=2, noise_mode="none")
    assert torch.equal(made, sampler.to_uint8(expected))
    variants = [
        sampler.generate(generator, [5], torch.tensor([label]), psi=psi, cutoff=cutoff, noise_mode=mode)
        for label, psi, cutoff, mode in
        [(1, 0.5, 2, "none"), (2, 0.5, 2, "none"), (1, 1, 2, "none"), (1, 0.5, None, "none"), (1, 0.5, 2, "const"),
         (1, 0.5, 2, "random")]
    ]  # fmt: skip
    assert len({image.numpy().tobytes() for image in variants}) == len(variants)


def test_seeds_draw_every_class(labelled):
    generator, _ = load_snapshot(labelled)
    _, classes = sampler.draw(range(300), generator)
    assert min(np.bincount(classes, minlength=3)) > 70


def test_cli_writes_grid_and_single_images(labelled, tmp_path):
    result = _run(sample.app, labelled, "--seeds", "0-1,7", "--label", "all", "--out", tmp_path / "out", "--batch", 2)
    assert result.exit_code == 0, result.output
    assert "9 pictures" in result.output and "rows of the grid: n0, n1, n2" in result.output
    grid = np.asarray(Image.open(tmp_path / "out/grid.png"))
    assert grid.shape == (3 * 64, 3 * 64)
    corner = np.asarray(Image.open(tmp_path / "out/seed0007-class1.png"))  # row 1 (class), column 2 (seed)
    assert corner.shape == (16, 16) and np.array_equal(grid[64:128:4, 128::4], corner)
    assert len(list((tmp_path / "out").iterdir())) == 10


def test_cli_as_a_script(plain, tmp_path):
    script = Path(sample.__file__)
    result = subprocess.run(
        [sys.executable, script, plain, "--seeds", "1", "--no-grid", "--out", tmp_path / "out"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["seed0001.png"]


def test_cli_mistakes_are_one_line(plain, labelled, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "was trained without labels" in _line(_run(sample.app, plain, "--label", "1", *out))
    assert "classes 0 to 2" in _line(_run(sample.app, labelled, "--label", "3", *out))
    assert "classes 0 to 2" in _line(_run(sample.app, labelled, "--label", "x", *out))
    assert "'x' is not a number" in _line(_run(sample.app, plain, "--seeds", "x", *out))
    assert "has 6 ws" in _line(_run(sample.app, plain, "--cutoff", "7", *out))
    assert "nothing to write" in _line(_run(sample.app, plain, "--no-grid", "--no-single", *out))
    assert "no such file" in _line(_run(sample.app, tmp_path / "absent", *out))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "name another --out" in _line(_run(sample.app, plain, "--out", tmp_path / "file" / "x"))


def _as_images(digits: np.ndarray, resolution: int) -> torch.Tensor:
    """Originals [N, 64] as an RGB batch in [−1, 1] whose area means they are."""
    images = torch.from_numpy(digits).float().reshape(-1, 1, 8, 8) / 8 - 1
    return torch.nn.functional.interpolate(images, size=resolution, mode="nearest").expand(-1, 3, -1, -1)


def test_originals_scale_is_the_originals():
    digits, _ = score_digits.real_digits()
    for resolution in (8, 16, 32):
        assert np.array_equal(score_digits.originals_scale(_as_images(digits[:200], resolution)), digits[:200])


def test_digit_score_knows_digits_from_what_is_none():
    digits, labels = score_digits.real_digits()
    real = score_digits.digit_score(_as_images(digits, 16))
    assert real["samples"] == 1797 and 0.985 < real["sure_share"] < 1 and real["nearest_real"] < 1e-3
    assert np.abs(np.array(real["class_shares"]) - np.bincount(labels) / 1797).max() < 0.005

    torch.manual_seed(0)
    noise = score_digits.digit_score(torch.rand(500, 3, 16, 16) * 2 - 1)
    assert noise["sure_share"] < 0.02 and noise["nearest_real"] > 30
    upside_down = score_digits.digit_score(_as_images(digits[:, ::-1].reshape(-1, 64).copy(), 16)[labels == 4])
    assert upside_down["sure_share"] < 0.5

    threes = score_digits.digit_score(_as_images(digits[labels == 3], 32))
    assert threes["class_shares"][3] > 0.98 and sum(threes["class_shares"]) == pytest.approx(1)


def test_classifier_is_the_calibrated_svc_of_libsvm():
    """Against LIBSVM's own probabilities, while scikit-learn still offers them (its folds are drawn otherwise)."""
    from sklearn.svm import SVC

    digits, labels = score_digits.real_digits()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            theirs = SVC(gamma=0.001, probability=True, random_state=0).fit(digits, labels)
    except TypeError:
        pytest.skip("this scikit-learn has no SVC(probability=True) to compare with (removed in 1.11)")
    mixed = (digits[:300] + digits[300:600]) / 2
    ours = score_digits.classifier().probabilities(mixed)
    assert np.abs(ours - theirs.predict_proba(mixed)).max() < 0.08
    assert ours.min() >= 0 and np.allclose(ours.sum(1), 1)


def test_nearest_sees_copies():
    digits, _ = score_digits.real_digits()
    among_themselves = score_digits.nearest(digits[:300])
    assert among_themselves.min() > 0
    step = digits[:300].copy()
    step[:, 0] += 3
    assert score_digits.nearest(step, among=digits[:300]).max() <= 3 < among_themselves.mean()


def test_score_cli_prints_and_writes_its_figures(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(score_digits, "real_score", lambda: {  # takes 8 s, and does not depend on the snapshot
        "samples": 1797, "sure_share": 0.87, "sure_share_seen": 0.99, "class_shares": [0.1] * 10, "nearest_real": 16.4,
    })  # fmt: skip
    result = _run(score_digits.app, labelled, "--samples", 30, "--json", tmp_path / "score.json")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "score.json").read_text())
    assert figures["samples"] == 30 and figures["kimg"] == 1.5 and len(figures["class_shares"]) == 10
    assert f"{figures['sure_share']:.1%}" in result.output and "87.0% unseen" in result.output
    assert Image.open(tmp_path / "score.png").size == (640, 3 * 78)


def test_score_cli_mistakes_are_one_line(plain, tmp_path):
    assert "no such file" in _line(_run(score_digits.app, tmp_path / "absent"))
    assert "passes the last seed" in _line(_run(score_digits.app, plain, "--seed", 2**32 - 5))
