"""The run log: means over ranks, lines that survive a kill, curves, grids, and silence off rank 0."""

import json
import math
import resource
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from hsrgan.engine import stats
from hsrgan.engine.curves import thinned
from hsrgan.engine.errors import CannotWrite, UserError
from hsrgan.engine.pictures import image_grid, to_uint8
from hsrgan.engine.stats import Meter, RunLog, read_log


def test_meter_means_every_element_and_clears():
    meter = Meter()
    meter.add("a", torch.tensor([1.0, 2.0, 6.0], requires_grad=True))
    meter.add("a", torch.tensor([[7.0]]))
    meter.add("b", 2.5)
    assert meter.collect() == {"a": 4.0, "b": 2.5}
    assert meter.collect() == {}


def test_meter_keeps_small_addends():
    meter = Meter()
    meter.add("a", torch.tensor(2.0**25))
    for _ in range(3):
        meter.add("a", torch.tensor(1.0))  # lost in a float32 sum
    assert meter.collect()["a"] == (2.0**25 + 3) / 4


def _rank_meets_other_names(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meter = Meter()
    meter.add("both", torch.full((rank + 1,), float(rank + 1)))
    meter.add(f"only{rank}", 5.0 + rank)
    means = [meter.collect(), meter.collect()]
    with open(f"{results}/{rank}.json", "w") as file:
        json.dump(means, file)
    dist.destroy_process_group()


def test_meter_over_ranks_that_met_different_names(tmp_path):
    mp.spawn(_rank_meets_other_names, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        first, second = json.loads((tmp_path / f"{rank}.json").read_text())
        assert first == {"both": 5 / 3, "only0": 5.0, "only1": 6.0}
        assert second == {}


def _scalars(kimg: float) -> dict[str, float]:
    return {"loss/G": 1 + kimg, "loss/D": 0.5, "r1": 0.1, "score/real": 0.3, "score/fake": -0.3}


def _ticks(run_dir, start: int, stop: int) -> None:
    with RunLog(run_dir, total_kimg=200, start_kimg=start) as log:
        for kimg in range(start + 1, stop + 1):
            log.step(kimg * 1000)
            log.tick(kimg * 1000, _scalars(kimg))


def test_a_run_writes_all_its_files(tmp_path, capsys):
    images = torch.rand(6, 3, 8, 8) * 2 - 1
    with RunLog(tmp_path / "run", total_kimg=200) as log:
        log.reals(to_uint8(images))
        log.event("start", ranks=1)
        log.tick(123_000, {**_scalars(123), "loss/hsr": math.nan})
        log.fakes(images, 123.0)
        log.message("half way [not markup]")
        log.finish({"snapshot": "where.safetensors"})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "log.jsonl", "reals.png", "curves.png", "samples", "tensorboard",
    }  # fmt: skip
    reals = np.asarray(Image.open(tmp_path / "run/reals.png"))
    assert reals.shape == (2 * 64, 3 * 64, 3)
    assert np.array_equal(reals, np.asarray(Image.open(tmp_path / "run/samples/fakes-000123.png")))
    assert Image.open(tmp_path / "run/curves.png").size == (900, 900)

    event, tick = read_log(tmp_path / "run/log.jsonl")
    assert event["event"] == "start" and event["ranks"] == 1 and event["kimg"] == 0
    assert tick["kimg"] == 123 and tick["images"] == 123_000 and tick["loss/G"] == 124 and tick["loss/hsr"] is None
    assert tick["ram_gib"] > 0.01 and tick["img_s"] > 0 and tick["seconds"] > 0

    out = capsys.readouterr().out
    assert out.count("123.0/200 kimg") == 1  # one plain line a tick where there is no terminal
    assert "half way [not markup]" in out and "where.safetensors" in out and "curves.png" in out


def test_short_runs_name_tenths_of_a_kimg(tmp_path):
    with RunLog(tmp_path, total_kimg=2) as log:
        log.fakes(torch.zeros(1, 1, 4, 4), 0.4)
        log.fakes(torch.zeros(1, 1, 4, 4), 1.0)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "fakes-000000.4.png", "fakes-000001.0.png",
    ]  # fmt: skip


def test_tensorboard_has_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _ticks(tmp_path, 0, 3)
    _ticks(tmp_path, 2, 4)  # resumed at 2: the first run's tick 3 is purged
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    steps = [(event.step, event.value) for event in board.Scalars("loss/G")]
    assert steps == [(1000, 2.0), (2000, 3.0), (3000, 4.0), (4000, 5.0)]


def test_a_disk_that_is_full_for_a_while_tears_no_event(tmp_path, capfd):
    """Whatever is written while no file may grow is one CannotWrite line; what comes later can be read again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, total_kimg=200) as log:
        log.fakes(torch.zeros(1, 1, 8, 8), 0.0)
        log.tick(1000, _scalars(1))
        (file,) = (tmp_path / "tensorboard").iterdir()
        whole = file.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 30, no_limit[1]))  # into the next event
        try:
            with pytest.raises(CannotWrite, match=r"cannot write .*tensorboard: File too large"):
                log.tick(2000, _scalars(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
        assert file.stat().st_size == whole
        log.tick(3000, _scalars(3))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/G")] == [(1000, 2.0), (3000, 4.0)]
    assert len(board.Images("fakes")) == 1 and "Traceback" not in "".join(capfd.readouterr())


def test_resuming_drops_what_lies_beyond_and_what_was_torn(tmp_path):
    _ticks(tmp_path, 0, 4)
    seconds = read_log(tmp_path / "log.jsonl")[1]["seconds"]
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kimg": 1.5, "loss/G": 0.')  # killed while writing
    assert [row["kimg"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    _ticks(tmp_path, 2, 3)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["kimg"] for row in rows] == [1, 2, 3]
    assert rows[2]["seconds"] > seconds == rows[1]["seconds"]  # the clock goes on from where the run was taken up
    assert not list(tmp_path.glob(".*"))


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", total_kimg=1, rank=1) as log:
        log.reals(torch.zeros(1, 1, 4, 4))
        log.fakes(torch.zeros(1, 1, 4, 4), 0)
        log.step(10)
        log.tick(10, {"loss/G": 1.0})
        log.event("start")
        log.message("x")
        log.finish({})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_unwritable_run_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run: .*; name another run_dir"), \
            RunLog(tmp_path / "file" / "run", total_kimg=1):  # fmt: skip
        pass


def test_step_and_curves_cost_little(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich knows: one redraw takes 1 ms and more
    with RunLog(tmp_path, total_kimg=1000) as log:
        log.tick(1000, _scalars(1))
        began = time.perf_counter()
        for step in range(10_000):
            log.step(1000 + step)
        assert (time.perf_counter() - began) / 10_000 < 100e-6  # 1 µs here; a training step is 20 ms and more
        drawn = (tmp_path / "curves.png").stat().st_mtime_ns
        log.tick(2000, _scalars(2))
        assert (tmp_path / "curves.png").stat().st_mtime_ns == drawn  # not yet: drawing may take 2 % of the time
    assert (tmp_path / "curves.png").stat().st_mtime_ns > drawn
    assert "2.0/1000 kimg" in capsys.readouterr().out  # the line was there, and ends where the run ended


def test_scores_are_lines_and_panels_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(stats, "REDRAW_SECONDS", 0.0)
    with RunLog(tmp_path, total_kimg=200) as log:
        for kimg in (1, 2):
            log.tick(kimg * 1000, _scalars(kimg) | {"path_length": 0.5})
            before = log._tick_time
            log.working("fakes for fid50k_full", 0, 50_000)
            log.working("fakes for fid50k_full", 25_000, 50_000)
            scores = {"metric/fid50k_full": 9.0 - kimg, "metric/kid50k_full": 0.1, "metric/kid50k_full_std": 0.01}
            log.scores(kimg * 1000, scores | {"since_best": 0}, spent=7.0)
            assert log._tick_time == before + 7.0  # the next img_s is that of training
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["kimg"] for row in rows] == [1, 1, 2, 2] and rows[3]["metric/fid50k_full"] == 7.0
    assert "loss/G" not in rows[1] and rows[3]["since_best"] == 0
    assert Image.open(tmp_path / "curves.png").size == (900, 1500)  # losses, scores, regularisers, and two metrics
    out = capsys.readouterr().out
    assert "fakes for fid50k_full  25000/50000" in out and "ETA" in out


def test_long_curves_are_thinned_to_means():
    x, y = np.arange(1203.0), np.tile([0.0, 3.0, 6.0], 401)
    thin_x, thin_y = thinned(x, y)
    assert len(thin_x) == 401 and (thin_y == 3).all() and np.array_equal(thin_x, x[1::3])
    assert np.array_equal(thinned(x[:500], y[:500])[1], y[:500])
    assert len(thinned(x[:0], y[:0])[0]) == 0


def test_grid_is_row_by_row_enlarged_and_padded():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 2) * 100
    grid = np.asarray(image_grid(images, cols=2, scale=3))
    assert grid.shape == (12, 12)
    assert (grid[:6, :6] == 0).all() and (grid[:6, 6:] == 100).all() and (grid[6:, :6] == 200).all()
    assert (grid[6:, 6:] == 0).all()


def test_to_uint8_undoes_the_loader():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
