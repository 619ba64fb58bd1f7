"""Checkpoints are complete or absent, whatever ends the writing of them, and a damaged one is passed over."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from unittest import mock

import forked
import pytest
import torch
from safetensors.torch import load_file

from hsrgan.engine import aside, checkpoint
from hsrgan.engine.errors import CannotWrite, UserError
from hsrgan.engine.outputs import Outputs
from hsrgan.engine.snapshot import read_metadata
from hsrgan.engine.stats import read_log

TEACHER = Path(__file__).parents[1] / "recipes/digits_teacher.safetensors"
NAMES = ("state.json", *(f"{part}.safetensors" for part in checkpoint.TENSOR_FILES))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


@pytest.fixture(scope="module")
def straight(workspace) -> Path:
    """Eight steps, a checkpoint after each other one, both of the newest kept."""
    forked.train(workspace, "run_dir=straight")
    return workspace / "straight"


def files(text: str) -> list[tuple[str, bytes]]:
    return [(name, f"{text} {name}".encode()) for name in NAMES]


def newest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


def state(run: Path) -> dict[str, torch.Tensor | str]:
    """The last checkpoint, every tensor of it and state.json without the run's name."""
    folder = run / "checkpoints" / newest(run)
    found = {f"{f.stem}/{key}": value for f in folder.glob("*.safetensors") for key, value in load_file(f).items()}
    return found | {"state": (folder / "state.json").read_text().replace(run.name, "run")}


def assert_bitwise(a: Path, b: Path) -> None:
    first, second = state(a), state(b)
    assert first.pop("state") == second.pop("state")
    assert first.keys() == second.keys() and any("exp_avg_sq" in key for key in first)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


# The folder


SYSTEM_CALLS = ("mkdir", "open", "fsync", "rename", "replace", "rmdir", "unlink")


def calls_of(action, stop_at: int = 0, error: OSError | None = None) -> int:
    """Run `action`; how many calls it makes that change the disk. The one numbered `stop_at` raises `error` instead,
    or ends the process without one.
    """
    made = 0

    def counting(real):
        def call(*args, **kwargs):
            nonlocal made
            made += 1
            if made == stop_at:
                if error:
                    raise error
                os._exit(9)
            return real(*args, **kwargs)

        return call

    faked = {name: counting(getattr(os, name)) for name in SYSTEM_CALLS}
    with mock.patch.multiple(os, **faked), mock.patch.object(aside, "open", counting(open), create=True):
        action()
    return made


def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path):
    """`latest` names the old one or the new one, to the last byte; and the next write puts everything in order."""

    def write(run: Path, images: int) -> None:
        checkpoint.write_folder(run / "checkpoints" / f"{images:09d}", files(str(images)))

    write(tmp_path / "counted", 10)
    total = calls_of(lambda: write(tmp_path / "counted", 20))
    assert total > 3 * len(NAMES)
    found = []
    for stop_at in range(1, total + 1):
        run = tmp_path / str(stop_at)
        write(run, 10)
        if (pid := os.fork()) == 0:
            calls_of(lambda run=run: write(run, 20), stop_at)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        path, passed_over = checkpoint.newest_whole(run)
        found.append(path.name)
        assert (path / "state.json").read_text() == f"{int(path.name)} state.json" and not passed_over
        write(run, 30)
        assert newest(run) == "000000030" and not list((run / "checkpoints").glob(".*"))
    assert found == sorted(found) and set(found) == {"000000010", "000000020"}


def test_a_refused_write_keeps_the_last_one_and_leaves_no_half_file(tmp_path):
    for stop_at in range(1, 100):
        run = tmp_path / str(stop_at)
        checkpoint.write_folder(run / "checkpoints" / "000000010", files("old"))
        write = lambda run=run: checkpoint.write_folder(run / "checkpoints" / "000000020", files("new"))  # noqa: E731
        try:
            calls_of(write, stop_at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        except (OSError, CannotWrite) as error:
            assert "No space left" in str(error)
        else:
            break
        assert checkpoint.newest_whole(run)[0].name in ("000000010", "000000020")
        assert not list((run / "checkpoints").glob(".*"))
    assert stop_at > 3 * len(NAMES)


def test_checksums_are_sha256sums(straight):
    lines = (straight / "checkpoints" / newest(straight) / "SHA256SUMS").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted(NAMES)
    assert all(len(line.split()[0]) == 64 for line in lines)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "flipped": flip,
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", [*NAMES, "SHA256SUMS"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_passed_over_with_one_line(tmp_path, damage, name):
    for images in (10, 20):
        checkpoint.write_folder(tmp_path / "checkpoints" / f"{images:09d}", files(str(images)))
    DAMAGES[damage](tmp_path / "checkpoints" / "000000020" / name)
    path, (line,) = checkpoint.newest_whole(tmp_path)
    assert path.name == "000000010" and "000000020 is damaged" in line and "falling back" in line
    assert name in line or name == "SHA256SUMS"
    shutil.rmtree(tmp_path / "checkpoints" / "000000010")
    with pytest.raises(UserError, match="no older one is whole"):
        checkpoint.newest_whole(tmp_path)


def test_latest_is_obeyed_and_may_be_lost(tmp_path):
    folder = tmp_path / "checkpoints"
    for images in (10, 20, 30):
        checkpoint.write_folder(folder / f"{images:09d}", files(str(images)))
    (folder / "latest").write_text("000000020")  # a person goes back
    assert checkpoint.newest_whole(tmp_path)[0].name == "000000020"
    (folder / "latest").unlink()
    assert checkpoint.newest_whole(tmp_path)[0].name == "000000030"
    assert checkpoint.newest_whole(tmp_path / "nowhere") == (None, ())


def test_what_is_kept(tmp_path):
    """The two newest, the first after each 100 images, and the first that holds the best; nothing of another branch."""
    retention = checkpoint.Retention(2, 0.1, [])
    folder = tmp_path / "checkpoints"
    (folder / "000000999").mkdir(parents=True)
    for images in range(30, 400, 30):
        checkpoint.write_folder(folder / f"{images:09d}", files(str(images)))
        retention.add(folder / f"{images:09d}", 200 if images > 200 else None)
    kept = [int(path.name) for path in sorted(folder.glob("0*"))]
    assert kept == [120, 210, 300, 360, 390] == [int(name) for name in retention.own]
    retention = checkpoint.Retention(1, None, ["000000360", "000000390"])
    checkpoint.write_folder(folder / "000000420", files("420"))
    retention.add(folder / "000000420", 365)
    assert [int(path.name) for path in sorted(folder.glob("0*"))] == [390, 420]


# Whole runs


def test_a_damaged_checkpoint_costs_the_work_since_the_one_before(workspace, straight):
    shutil.copytree(straight, workspace / "damaged")
    run = workspace / "damaged"
    flip(run / "checkpoints" / "000000064" / "D_adam.safetensors")
    for ranks in (1, 2):
        said = forked.train(workspace, "run_dir=damaged", ranks=ranks)
        assert ("000000064 is damaged (D_adam.safetensors is not what was written)" in said) == (ranks == 1)
        assert f"resuming at {0.048 if ranks == 1 else 0.064:g} kimg" in said
        assert_bitwise(run, straight)
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["event"] for row in events if "event" in row] == ["rows", "fallback", "resume", "resume"]
    flip(run / "checkpoints" / "000000064" / "D.safetensors")
    flip(run / "checkpoints" / "000000048" / "D.safetensors")
    for one in (runs := forked.start(workspace, "run_dir=damaged", ranks=2)):
        assert one.ends() == 2
    assert "no older one is whole" in runs[0].said and "Traceback" not in runs[0].said + runs[1].said


def plant_full_disk(for_ever: bool) -> None:
    """While the third checkpoint is written, or from there on, no file may pass 6,000 bytes: the kernel refuses the
    rest of it, as a full disk does.
    """
    real = checkpoint.write_folder

    def write_folder(folder: Path, content) -> None:
        if folder.name == "000000048":
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        try:
            real(folder, content)
        finally:
            if not for_ever:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    checkpoint.write_folder = write_folder


@pytest.mark.parametrize(("policy", "for_ever"), [("stop", True), ("continue", False), ("continue", True)])
def test_a_full_disk(workspace, straight, policy, for_ever):
    name = f"{policy}-{for_ever}"
    run, options = workspace / name, (f"run_dir={name}", f"faults.disk_full={policy}")
    runs = forked.start(workspace, *options, ranks=2, plant=partial(plant_full_disk, for_ever))
    codes = [one.ends() for one in runs]
    assert not list(run.rglob(".*")) and f"{name}/checkpoints/000000048: File too large" in runs[0].said
    assert "Traceback" not in runs[0].said + runs[1].said  # TensorBoard's writer is one of those that fail
    if policy == "stop":
        assert codes == [2, 2] and newest(run) == "000000032"
    else:
        assert codes == [0, 0] and "goes on without it" in runs[0].said
        kept = sorted(path.name for path in (run / "checkpoints").glob("0*"))
        assert kept == (["000000016", "000000032"] if for_ever else ["000000032", "000000064"])
    if for_ever:
        forked.train(workspace, *options)
        assert newest(run) == "000000064"


def plant_no_room_for_the_best() -> None:
    """The first snapshot of a best score does not fit."""
    os.environ["HSRGAN_CACHE"] = "cache"
    real, calls = Outputs.best, itertools.count()

    def best(*args) -> None:
        if not next(calls):
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        try:
            real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    Outputs.best = best


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_at_the_best_score_leaves_the_score(workspace, policy):
    metrics = ("metrics_kimg=0.016", f"metrics={{names: 'fid10_full', features: {TEACHER}}}")
    options = (f"run_dir=best-{policy}", f"faults.disk_full={policy}", "kimg=0.032", *metrics)
    (run,) = forked.start(workspace, *options, plant=plant_no_room_for_the_best)
    code, folder = run.ends(), workspace / f"best-{policy}"
    rows = [row for row in read_log(folder / "log.jsonl") if "metric/fid10_full" in row]
    assert "best: this one, which is not kept" in run.said and "snapshots/best.safetensors: File too large" in run.said
    assert (code, [row["kimg"] for row in rows]) == ((2, [0.016]) if policy == "stop" else (0, [0.016, 0.032]))
    if policy == "continue":  # the first that fits is the best so far
        score = read_metadata(folder / "snapshots" / "best.safetensors")["score"]
        assert score["kimg"] == 0.032 and score["value"] == rows[1]["metric/fid10_full"] and not rows[1]["since_best"]


def progress(run: Path) -> str:
    try:
        return newest(run)
    except OSError:
        return ""


def live_and_be_killed(workspace: Path, options: list[str], dice: random.Random) -> bool:
    """One start of the run, killed at a random moment: of the start, of training, or of a write. Whether it was the
    last, which left a half-written folder.
    """
    run = workspace / "killed"
    (one,) = forked.start(workspace, *options)
    before, moment = progress(run), dice.choice(["start", "training", "writing", "writing"])
    into_a_write = dice.choice([0, 0.012])  # at once: some disks have written all before a millisecond is over
    longest = {"start": 0.8, "training": 0.1, "writing": into_a_write}
    wait, steps = dice.uniform(0, longest[moment]), dice.choice([0, 1, 2])
    deadline = time.monotonic() + 60
    while moment != "start" and one.process.is_alive() and time.monotonic() < deadline:
        done = int(progress(run) or 0) - int(before or 0) >= 8 * steps
        if done and moment == "training":
            break
        if done and list((run / "checkpoints").glob(".*.part")):
            break
        time.sleep(0.0005)
    time.sleep(wait)
    os.kill(one.process.pid, signal.SIGKILL)
    assert one.ends() == -signal.SIGKILL, one.said
    return bool(list((run / "checkpoints").glob(".*.part")))


@pytest.mark.parametrize("kills", [
    8,
    pytest.param(50, marks=forked.only_if_all),
])
def test_kill_9_at_random_moments_then_resume_is_bitwise(workspace, kills):
    """A checkpoint after every step; kills in the start, in training and in the middle of writes."""
    dice, run = random.Random(kills), workspace / "killed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(workspace / "unkilled", ignore_errors=True)
    options = [f"kimg={kills * 0.024}", "checkpoint_kimg=0.008", "tick_kimg=0.064"]
    torn = sum(live_and_be_killed(workspace, ["run_dir=killed", *options], dice) for _ in range(kills))
    reached = progress(run)
    print(f"{kills} kills, {torn} of them in a write, by {reached} of {kills * 24} images")
    assert torn >= kills // 8 and int(reached) < kills * 24
    said = forked.train(workspace, "run_dir=killed", *options)
    assert f"resuming at {int(reached) / 1000:g} kimg" in said
    forked.train(workspace, "run_dir=unkilled", *options)
    assert_bitwise(run, workspace / "unkilled")
