"""A run that is asked to leave, that loses a rank, and whose numbers are no longer finite."""

import contextlib
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import forked
import psutil
import pytest
import torch
from test_checkpoints import assert_bitwise, newest

from hsrgan.engine import distributed, phases, rendezvous, train
from hsrgan.engine.aside import check_writable
from hsrgan.engine.errors import EXIT_RANK_LOST, EXIT_RESUME, UserError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


@pytest.fixture(scope="module")
def straight(workspace) -> Path:
    forked.train(workspace, "run_dir=straight")
    return workspace / "straight"


@pytest.fixture(scope="module")
def straight_2(workspace) -> Path:
    forked.train(workspace, "run_dir=straight_2", "zero_stage=2", ranks=2)
    return workspace / "straight_2"


def events(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == kind]


def plant_at(images: int, rank: int, action) -> None:
    """In the first phase of the step after `images` images, on that rank."""
    real = train.run_phase

    def run_phase(phase, t, now, *rest):
        if (now, t.world.rank, phase.name) == (images, rank, "Gmain"):
            action()
        real(phase, t, now, *rest)

    train.run_phase = run_phase


def signal_oneself(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_the_family(number: int) -> None:
    """The loader's workers too, as the launcher does, and they first."""
    for child in psutil.Process().children():
        child.send_signal(number)
    time.sleep(0.2)
    signal_oneself(number)


# Preemption


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)], ids=["TERM", "USR1 at 1"])
def test_a_signal_saves_within_the_step_and_all_ranks_leave_with_75(workspace, request, number, ranks):
    name = signal.Signals(number).name
    options = (f"run_dir={name}", f"zero_stage={0 if ranks == 1 else 2}", "checkpoint_kimg=0.064")
    plant = partial(plant_at, 24, ranks - 1, partial(signal_the_family, number))
    runs = forked.start(workspace, *options, "data.workers=2", ranks=ranks, plant=plant)
    assert [run.ends() for run in runs] == [EXIT_RESUME] * ranks, runs[0].said
    assert newest(workspace / name) == "000000032"  # the step that began at 24 is the last
    (event,) = events(workspace / name, "preempted")
    assert event["text"] == f"{name} at 0.032 kimg: the same command resumes the run"
    assert "resuming at 0.032 kimg" in forked.train(workspace, *options, ranks=ranks)
    end = workspace / name / "checkpoints"
    reference = workspace / request.getfixturevalue("straight" if ranks == 1 else "straight_2")
    for file in (end / newest(end.parent)).glob("*.safetensors"):
        assert file.read_bytes() == (reference / "checkpoints" / "000000064" / file.name).read_bytes()


# Other ranks


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_loss_of_a_rank_ends_the_run_with_its_name(workspace, number, victim):
    """Killed: seen at once. Stopped: seen after faults.rank_timeout, though every connection is still open."""
    name = f"{signal.Signals(number).name}-{victim}"
    plant = partial(plant_at, 24, victim, partial(signal_oneself, number))
    runs = forked.start(workspace, f"run_dir={name}", "faults.rank_timeout=3", ranks=2, plant=plant)
    began = time.monotonic()
    try:
        assert runs[1 - victim].ends(30) == EXIT_RANK_LOST
    finally:
        runs[victim].process.kill()
    print(f"{time.monotonic() - began:.1f} s from the start")
    said = runs[1 - victim].said
    (line,) = [line for line in said.splitlines() if "error:" in line]
    pid = runs[victim].process.pid
    assert f"rank {victim} (" in line and f"pid {pid})" in line and "resumes the run from its last checkpoint" in line
    assert ("has died" if number == signal.SIGKILL else "not been heard of for 3 s") in line
    assert "Traceback" not in said
    assert newest(workspace / name) in ("000000016", "000000032")


def crash() -> None:
    raise KeyError("a bug")


def user_error() -> None:
    raise UserError("shard 3 is gone")


@pytest.mark.parametrize(("action", "code", "says"), [
    (crash, EXIT_RANK_LOST, "failed: KeyError: 'a bug'; the same command"),
    (user_error, 2, "): shard 3 is gone"),
])
def test_what_one_rank_fails_on_is_said_by_the_first(workspace, action, code, says):
    runs = forked.start(workspace, "run_dir=crash", ranks=2, plant=partial(plant_at, 8, 1, action))
    assert runs[0].ends(60) == code and runs[1].ends(60) == (1 if action is crash else 2)
    assert "error: rank 1 (" in runs[0].said and says in runs[0].said and "Traceback" not in runs[0].said
    assert ("Traceback" in runs[1].said) == (action is crash)


@pytest.mark.parametrize(("case", "says"), [
    ("nobody", "nobody answered at 127.0.0.1:"),
    ("alone", "only 1 of 2 ranks came to 127.0.0.1:"),
    ("taken", "is in use by another program"),
])
def test_ranks_that_do_not_meet_say_why(workspace, case, says):
    port = forked.free_port()
    with socket.create_server(("", port)) if case == "taken" else contextlib.nullcontext():
        options = ("run_dir=apart", "faults.rendezvous_timeout=2")
        (run,) = forked.start(workspace, *options, ranks=2, port=port, absent=0 if case == "nobody" else 1)
        assert run.ends(60) == 2
    assert says in run.said and "Traceback" not in run.said, run.said


def test_ranks_that_start_at_once_try_the_same_folder(tmp_path):
    """None takes the other's trial of it for a refusal."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check_writable, [tmp_path] * 400))
    assert not list(tmp_path.iterdir())


def refuse_folder(*ranks: int) -> None:
    real = train.check_writable

    def check(folder):
        if int(os.environ["RANK"]) in ranks:
            raise UserError("cannot write run: no")
        real(folder)

    train.check_writable = check


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_rank_that_fails_before_they_meet_ends_all_at_once(workspace, ranks):
    """One line in all, from the first rank, which names the one that it is about."""
    runs = forked.start(workspace, "run_dir=early", ranks=2, plant=partial(refuse_folder, *ranks))
    assert [run.ends(60) for run in runs] == [2, 2]
    errors = [[line for line in run.said.splitlines() if line.startswith("error:")] for run in runs]
    assert len(errors[0]) == 1 and not errors[1] and errors[0][0].endswith("cannot write run: no"), errors
    assert ("error: rank 1 (" in errors[0][0]) == (ranks == (1,)) and "Traceback" not in runs[0].said + runs[1].said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_and_finds_no_other_says_so_itself(workspace, rank):
    plant = partial(lonely, rank)
    (run,) = forked.start(workspace, "run_dir=early", ranks=2, plant=plant, absent=1 - rank)
    assert run.ends(60) == 2
    (line,) = [line for line in run.said.splitlines() if line.startswith("error:")]
    assert line.endswith("cannot write run: no") and "Traceback" not in run.said


def lonely(rank: int) -> None:
    rendezvous.PATIENCE = rendezvous.FAREWELL = 2.0
    refuse_folder(rank)


# Numbers


def plant_nan(marker: str, where: dict, rank: int, layer: str) -> None:
    """Until a file called `marker` exists: NaN in one gradient of these phases (name → images), on that rank."""
    real_phase, real_step, now = train.run_phase, distributed.Sharded.step, {}

    def run_phase(phase, t, images, *rest):
        first, last = where.get(phase.name, (1, 0))
        now["bad"] = first <= images <= last and t.world.rank == rank and not Path(marker).exists()
        real_phase(phase, t, images, *rest)

    def step(net, gradients, loss):
        if now["bad"]:
            at = net.names.index(layer)
            gradients = [g * torch.nan if i == at else g for i, g in enumerate(gradients)]
        real_step(net, gradients, loss)

    train.run_phase = phases.run_phase = run_phase
    distributed.Sharded.step = step


def plant_absence(where: dict) -> None:
    """These phases do not take place."""
    real = train.run_phase

    def run_phase(phase, t, images, *rest):
        if where.get(phase.name) != (images, images):
            real(phase, t, images, *rest)

    train.run_phase = run_phase


LAYER = "generator.synthesis.b8.conv0.weight"


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_a_phase_that_is_not_finite_is_as_if_it_had_not_been(workspace, ranks, stage):
    """Parameters, moments, averages, pl_mean and w_avg; on any rank. The count and the layer are in the log."""
    where = {"Gmain": (8, 8), "Greg": (16, 16)}
    options = (f"zero_stage={stage}", "faults.max_nonfinite=0.5")
    plant = partial(plant_nan, "never", where, ranks - 1, LAYER)
    said = forked.train(workspace, f"run_dir=nan-{stage}", *options, ranks=ranks, plant=plant)
    forked.train(workspace, f"run_dir=none-{stage}", *options, ranks=ranks, plant=partial(plant_absence, where))
    run = workspace / f"nan-{stage}"
    assert_bitwise(run, workspace / f"none-{stage}")
    assert [row["text"] for row in events(run, "nonfinite")] == [
        f"G: 1 of 3 steps were not finite, first {LAYER}; they were skipped"] * 2
    assert f"first {LAYER}; they were skipped" in said
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["nonfinite/G"] for row in rows if "nonfinite/G" in row] == [1, 1]


def test_a_divergence_that_does_not_come_back_costs_the_work_since_the_checkpoint(workspace, straight_2):
    """Every step from the fifth on is NaN, on one rank, until the run has rolled back."""
    marker = workspace / "rolled_back"
    plant = partial(plant_transient, str(marker))
    said = forked.train(workspace, "run_dir=healed", "zero_stage=2", ranks=2, plant=plant)
    assert_bitwise(workspace / "healed", straight_2)
    (event,) = events(workspace / "healed", "rollback")
    assert event["text"] in said and event["text"].endswith("rolled back, resuming at 0.032 kimg")
    assert f"G has diverged: 3 of 3 steps were not finite, first {LAYER}" in event["text"]


def plant_transient(marker: str) -> None:
    plant_nan(marker, {"Gmain": (32, 1000), "Greg": (32, 1000)}, 1, LAYER)
    real = train.checkpoint.resume_point

    def resume_point(run_dir, world):
        found = real(run_dir, world)
        if found:
            Path(marker).touch()
        return found

    train.checkpoint.resume_point = resume_point


@pytest.mark.parametrize(("policy", "first", "why"), [
    ("rollback", 32, "it has diverged again since checkpoint 000000032"),
    ("rollback", 0, "there is no checkpoint to go back to"),
    ("stop", 32, "faults.diverged is stop"),
])
def test_a_divergence_that_comes_back_stops_with_the_layer(workspace, policy, first, why):
    plant = partial(plant_nan, "never", {"Gmain": (first, 1000)}, 0, LAYER)
    name = f"run_dir=diverged-{policy}-{first}"
    (run,) = forked.start(workspace, name, f"faults.diverged={policy}", plant=plant)
    assert run.ends() == 2
    (line,) = [line for line in run.said.splitlines() if line.startswith("error:")]
    assert f"G has diverged: 2 of 3 steps were not finite, first {LAYER}; {why}" in line and "Traceback" not in run.said
    assert run.said.count("rolled back") == (policy == "rollback" and first > 0)


def no_graphs() -> None:
    """As on a GPU that refuses a recording."""
    from hsrgan.engine import graphs

    def caller(wanted, world, zero_stage, say):
        say("cuda_graphs: off, Gmain cannot be recorded (no)")
        return graphs.direct

    graphs.caller = caller


def test_the_log_keeps_that_graphs_are_off(workspace):
    """benchmarks/gpu.sh looks for it there."""
    said = forked.train(workspace, "run_dir=refused", "kimg=0.016", plant=no_graphs)
    rows = [json.loads(line) for line in (workspace / "refused" / "log.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows if row.get("event") == "cuda_graphs"] == [
        "cuda_graphs: off, Gmain cannot be recorded (no)"
    ]
    assert "cuda_graphs: off" in said
