"""tools/bench_data.py: nothing is timed before all loaders have given the same pixels."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hsrgan.engine.errors import UserError
from hsrgan.tools import bench_data


@pytest.fixture
def files(tmp_path):
    return bench_data.make(tmp_path, 32, 40, "png")


def test_the_three_loaders_give_the_same_pixels(files):
    bench_data.check_equal(files, 8)
    path = next(files.root.rglob("000007.png"))
    pixels = np.asarray(Image.open(path)).copy()
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match="do not give the same pixels, so nothing is timed"):
        bench_data.check_equal(files, 8)


def test_an_image_too_many_is_noticed(files):
    Image.new("RGB", (32, 32)).save(files.root / "0" / "extra.png")
    with pytest.raises(UserError):
        bench_data.check_equal(files, 8)


def test_what_waits_is_not_counted(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: float(next(clock)))
    taken = []
    stream = (taken.append(i) or [0] * 10 for i in range(100))
    assert bench_data.timed(stream, 4, 3.0) == 2 * 10 / 3 and len(taken) == 6


def test_table_and_json(tmp_path):
    arguments = ["--resolutions", "32,64", "--images", "16", "--batch", "8", "--workers", "0", "--seconds", "0.05",
                 "--turns", "2", "--json", str(tmp_path / "rows.json")]  # fmt: skip
    done = CliRunner().invoke(bench_data.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "64²" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    expected = [(side, name) for side in (32, 64) for name in bench_data.LOADERS]
    assert [(row["resolution"], row["loader"]) for row in rows] == expected
    for row in rows:
        assert min(row["turns"]) <= row["img_s"] <= max(row["turns"]) and row["images"] == 16
    assert CliRunner().invoke(bench_data.app, ["--resolutions", "33"]).exit_code == 2


def test_images_are_like_photographs():
    """Neighbours are alike, and power falls with frequency about as 1/f² (amplitude as 1/f), as in natural images."""
    grey = np.asarray(bench_data.photograph(256, np.random.default_rng(0)).convert("L"), np.float64)
    assert grey.std() > 30 and np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1] > 0.9
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256))) * 256
    bands = [power[(radius >= r) & (radius < 2 * r)].mean() for r in (4, 8, 16, 32)]
    slope = np.polyfit(np.log2((4, 8, 16, 32)), np.log2(bands), 1)[0]
    assert -3.5 < slope < -1.5
