"""What a run of several ranks does where only one of them fails, or sees another file than the rest."""

import contextlib
import dataclasses
import datetime
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import forked
import pytest
import torch

from hsrgan.engine import assembly, distributed, peers, rendezvous, stats, train
from hsrgan.engine.distributed import World
from hsrgan.engine.errors import EXIT_RANK_LOST, CannotWrite, RankError, UserError
from hsrgan.engine.metrics import real_cache
from hsrgan.engine.peers import Peers
from hsrgan.engine.rendezvous import before_meeting
from hsrgan.tools import eval as eval_tool

TEACHER = Path(__file__).parents[1] / "recipes" / "digits_teacher.safetensors"
SCORED = ("metrics_kimg=0.032", f"metrics={{names: fid32_full, features: {TEACHER}}}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


@pytest.fixture(scope="module")
def made(workspace) -> Path:
    """A run of one step."""
    forked.train(workspace, "run_dir=made", "kimg=0.008")
    return workspace / "made"


def first() -> bool:
    return os.environ["RANK"] == "0"


def errors(runs: list[forked.Run]) -> list[list[str]]:
    """The lines of each that begin with "error:"; none may hold a traceback."""
    assert not any("Traceback" in run.said for run in runs), "\n".join(run.said for run in runs)
    return [[line for line in run.said.splitlines() if line.startswith("error:")] for run in runs]


@contextlib.contextmanager
def refuse(path: Path):
    raise CannotWrite(f"cannot write {path}: No space left on device")
    yield


def plant_full_cache(cache: str) -> None:
    os.environ["HSRGAN_CACHE"] = cache
    real_cache.written_aside = refuse


def test_a_cache_that_is_full_leaves_the_ranks_in_step(workspace):
    """The first rank alone writes it, and says once that it cannot; scores do not need it."""
    plant = partial(plant_full_cache, str(workspace / "cache"))
    runs = forked.start(workspace, "run_dir=full", *SCORED, ranks=2, plant=plant)
    assert [run.ends(60) for run in runs] == [0, 0], runs[0].said + runs[1].said
    assert [run.said.count("the reals' statistics are not kept") for run in runs] == [1, 0]
    assert (workspace / "full" / "log.jsonl").read_text().count("metric/fid32_full") == 2


def leave_at(images: int) -> None:
    """The second rank exits of its own accord."""
    real = train.run_phase

    def run_phase(phase, t, now, *rest):
        if now == images and not first():
            sys.exit(3)
        real(phase, t, now, *rest)

    train.run_phase = run_phase


def fail_on_the_second(where: str, name: str) -> None:
    """What the module `where` calls `name` raises a UserError there."""
    module = sys.modules[where]
    real = getattr(module, name)

    def call(*args, **kwargs):
        if not first():
            raise UserError("the file is damaged")
        return real(*args, **kwargs)

    setattr(module, name, call)


def fail_before(error: type[Exception]) -> None:
    """The second rank, before they meet."""
    real = train.check_paths

    def check_paths(recipe):
        if not first():
            raise error("a bug")
        real(recipe)

    train.check_paths = check_paths


@pytest.mark.parametrize(("plant", "codes", "says"), [
    (partial(fail_before, KeyError), [2, 1], "): failed: KeyError: 'a bug'"),
    (partial(leave_at, 8), [EXIT_RANK_LOST, 3], " failed: SystemExit: 3; the same command"),
])
def test_any_end_of_a_rank_is_heard_of(workspace, plant, codes, says):
    runs = forked.start(workspace, "run_dir=any", ranks=2, plant=plant)
    assert [run.ends(60) for run in runs] == codes
    (line,) = [line for line in runs[0].said.splitlines() if line.startswith("error:")]
    assert "error: rank 1 (" in line and says in line and "Traceback" not in runs[0].said


def test_nothing_is_lost_that_follows_a_name(monkeypatch):
    """A rank that fails right after it has connected."""

    def connect(value):
        port, token, _ = value
        stranger, peer = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        peer.sendall(f"{token} 1 here, pid 3\nerror 1 it is late\n".encode())
        return value

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(peers, "from_first", connect)
    watch = Peers(World(0, 2, 0, 2, torch.device("cpu")), 5.0)
    watch._connect()
    with watch._sockets[1] as peer:
        assert watch._names == {1: "here, pid 3"} and peer.recv(100) == b"error 1 it is late\n"


def test_more_ranks_than_gpus_is_one_line():
    with pytest.raises(UserError, match=r"there is no cuda:99: .* has \d+ GPUs; start as many ranks there"):
        distributed.start(World(99, 1, 99, 1, torch.device("cuda", 99)))


def test_whom_a_store_of_the_launcher_waited_for():
    """As torchrun's own store says it."""
    store = torch.distributed.PrefixStore("/worker/attempt_0", torch.distributed.TCPStore("127.0.0.1", 0, 1, True))
    store.set_timeout(datetime.timedelta(milliseconds=10))
    for key, rank in (("said/3", 3), ("verdict", 0)):
        with pytest.raises(RuntimeError) as caught:
            store.get(key)
        said = str(caught.value)
        assert f"rank {rank} did not come to a:1 within 5 s" in rendezvous._no_meeting(said, "a:1", 5.0), said


def test_a_run_that_meets_another_ones_verdict_says_its_own(monkeypatch):
    """Two runs on one port: the store of the other says that all is well with it."""
    store = torch.distributed.HashStore()
    store.set("verdict", rendezvous.FINE)
    monkeypatch.setattr(rendezvous, "_store", lambda patience: store)
    with pytest.raises(RankError, match="shard 3 is gone"), before_meeting(1, 2):
        raise UserError("shard 3 is gone")


@pytest.mark.parametrize("name", ["dataset", "load_teachers"])  # before the ranks have met, and after
def test_a_dry_run_says_on_what_one_rank_fails(workspace, name):
    plant = partial(fail_on_the_second, "hsrgan.engine.assembly", name)
    runs = forked.start(workspace, "dry_run=true", ranks=2, plant=plant)
    assert [run.ends(25) for run in runs] == [2, 2]
    (line,), others = errors(runs)
    assert "error: rank 1 (" in line and line.endswith("): the file is damaged") and not others


def plant_bad_end() -> None:
    """The first rank's last lines fail, when the others have nothing more to do."""
    real = stats.RunLog.finish

    def finish(log, paths):
        if first():
            time.sleep(0.5)
            raise CannotWrite("cannot write curves.png")
        real(log, paths)

    stats.RunLog.finish = finish


def test_a_rank_that_is_done_hears_how_the_others_end(workspace):
    runs = forked.start(workspace, "run_dir=end", "kimg=0.016", ranks=2, plant=plant_bad_end)
    assert [run.ends(60) for run in runs] == [2, 2]
    (line,), others = errors(runs)
    assert line == "error: cannot write curves.png" and not others


def plant_eval(snapshot: str, data: str, folder: str, fault: str) -> None:
    """tools/eval.py in place of a training; its second rank fails once they have met, or has read another file."""
    os.environ["HSRGAN_CACHE"] = folder
    command = [snapshot, "--data", data, "--metrics", "fid32_full", "--features", str(TEACHER), "--workers", "0"]
    train.app = lambda argv, standalone_mode: eval_tool.app(command, standalone_mode=False)
    if fault == "fails":
        fail_on_the_second("hsrgan.tools.eval", "short_names")
    elif not first():
        eval_tool.sha256_of = lambda path: "of what is there by now"


@pytest.mark.parametrize(("fault", "says"), [
    ("fails", "): the file is damaged"),
    ("replaced", ".safetensors was replaced while it was read, as a run does with its best: score a copy of it"),
])
def test_scoring_says_what_is_wrong_on_one_rank(workspace, made, fault, says):
    (snapshot,), (data,) = (made / "snapshots").iterdir(), (workspace / "datasets").iterdir()
    plant = partial(plant_eval, str(snapshot), str(data), str(workspace / "cache"), fault)
    runs = forked.start(workspace, ranks=2, plant=plant)
    assert [run.ends(60) for run in runs] == [2, 2]
    (line,), others = errors(runs)
    assert line.endswith(says) and not others


def plant_other_data() -> None:
    real = assembly.dataset
    assembly.dataset = lambda data: dataclasses.replace(real(data), sha256="packed anew")


def test_ranks_that_read_different_things_do_not_train_together(workspace):
    """Here of two runs on one port, one of which has lost its first rank over it; so it is with files that change."""
    port = forked.free_port()
    runs = forked.start(workspace, "run_dir=a", ranks=2, port=port, absent=1)
    options = ("run_dir=b", "generator.lr=0.001", "data.shards=null")
    runs += forked.start(workspace, *options, ranks=2, port=port, absent=0, plant=plant_other_data)
    assert [run.ends(60) for run in runs] == [2, 2]
    (line,), others = errors(runs)
    assert "rank 1 on " in line and "what rank 0 has: generator.lr, run_dir, the data set (" in line and not others


def plant_other_init(path: str) -> None:
    """The second rank finds another file; both say what they start from."""
    start_from, first_values = assembly.start_from, assembly.first_values

    def start(init_from, *rest):
        return start_from(init_from if first() else path, *rest)

    def values(recipe, world, manifest, *networks_and_more):
        first_values(recipe, world, manifest, *networks_and_more)
        for network in networks_and_more[:3]:
            print("starts from", [value.double().sum().item() for value in network.state_dict().values()])

    assembly.start_from, assembly.first_values = start, values


def test_ranks_start_from_the_same_networks(workspace, made):
    (snapshot,), (newest,) = (made / "snapshots").iterdir(), (made / "checkpoints").glob("0*")
    plant = partial(plant_other_init, str(newest))
    runs = forked.start(workspace, "run_dir=from", "kimg=0.008", f"init_from={snapshot}", ranks=2, plant=plant)
    assert [run.ends(60) for run in runs] == [0, 0], runs[0].said
    told = [[line for line in run.said.splitlines() if line.startswith("starts from")] for run in runs]
    assert told[0] == told[1] and len(told[0]) == 3


def plant_rest(marker: str) -> None:
    """The run waits, once, before its second step, with the loader's workers there, until it is told to go on."""
    real = train.run_phase

    def run_phase(phase, t, images, *rest):
        while images == 8 and first() and not Path(marker).exists():
            Path(f"{marker}-waits").touch()
            time.sleep(0.05)
        real(phase, t, images, *rest)

    train.run_phase = run_phase


def test_two_runs_do_not_write_into_one_folder(workspace):
    """The second is refused on all ranks; after a kill the folder is free at once, whoever still lives on."""
    marker = workspace / "go on"
    options = ("run_dir=held", "kimg=0.016", "data.workers=1")
    (killed,) = forked.start(workspace, *options, plant=partial(plant_rest, str(marker)))
    deadline = time.monotonic() + 60
    while not (workspace / "go on-waits").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    runs = forked.start(workspace, *options, ranks=2)
    assert [run.ends(60) for run in runs] == [2, 2]
    (line,), others = errors(runs)
    assert f"pid {killed.process.pid} is at work in held: end it first" in line and not others
    killed.process.kill()
    assert killed.ends() == -signal.SIGKILL
    forked.train(workspace, *options)
