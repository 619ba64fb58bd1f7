"""tools/bench_data.py: nothing is timed before all loaders have given the same pixels."""

import json

import numpy as np
import pytest
import torch
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
    torch.manual_seed(0)  # of ImageFolder's order: the one that is left out of 41 must not be this one
    with pytest.raises(UserError):
        bench_data.check_equal(files, 8)


def test_what_waits_is_not_counted(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: float(next(clock)))
    taken = []
    stream = (taken.append(i) or [0] * 10 for i in range(100))
    assert bench_data.timed(stream, 4, 3.0) == 2 * 10 / 3 and len(taken) == 6


def test_a_cell_ends_with_its_seconds(files, monkeypatch):
    clock, order = [0.0], []

    def slow(name):
        while True:
            clock[0] += 1
            order.append(name)
            yield [0] * 8

    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench_data, "LOADERS", {n: lambda *_, n=n: slow(n) for n in ("hsrgan", "b", "c")})
    said = []
    rows = bench_data.bench(files, 8, 2, 100.0, 50, said.append)
    turns = len(rows[0]["turns"])  # one takes (3 · 2 + 1 batches ahead and one that counts) · 3 loaders = 24
    assert clock[0] == 24 * turns <= 100 and turns == 4 and len(said) == 12
    assert [row["img_s"] for row in rows] == [8.0] * 3
    assert (said[0], said[3]) == ("c, turn 1 of 50", "hsrgan, turn 2 of 50")
    assert len(bench_data.bench(files, 8, 0, 1.0, 3, said.append)[0]["turns"]) == 1  # whatever the budget


def test_table_and_json(tmp_path):
    arguments = ["--resolutions", "32,64", "--images", "16", "--batch", "8", "--workers", "0", "--seconds", "0.05",
                 "--turns", "2", "--json", str(tmp_path / "rows.json")]  # fmt: skip
    done = CliRunner().invoke(bench_data.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "64²" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
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
