"""The launcher: two machines without ssh, on loopback, and what it makes of a run that leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest

from hsrgan.engine.errors import EXIT_RESUME

TRAIN = Path(__file__).parents[1] / "engine" / "train.py"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    (folder / "hostfile").write_text("machine-a slots=1\nmachine-b slots=1\n")
    return folder


def node(workspace: Path, rank: int, port: int, *overrides: str, address: str = "127.0.0.1") -> subprocess.Popen:
    """The README's launch line without ssh, as it is typed on machine number `rank`."""
    launch = ["deepspeed", "--hostfile", "hostfile", "--no_ssh", "--node_rank", str(rank), "--master_addr", address,
              "--master_port", str(port), str(TRAIN), "recipe.yaml", *overrides]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    return subprocess.Popen(
        launch, cwd=workspace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_machines_without_ssh_train_and_leave_together(workspace):
    """One is told to leave: both save, both launchers end with 75."""
    options = ("kimg=100", "checkpoint_kimg=100", "run_dir=nodes", "faults.rank_timeout=20")
    port = forked.free_port()
    nodes = [node(workspace, rank, port, *options) for rank in (0, 1)]
    log, deadline = workspace / "nodes" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and '"images": 32' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    below = psutil.Process(nodes[1].pid).children(recursive=True)
    (rank,) = [process for process in below if process.cmdline()[1:3] == ["-u", str(TRAIN)]]
    rank.send_signal(signal.SIGUSR1)
    said = [each.communicate(timeout=120)[0] for each in nodes]
    assert [each.returncode for each in nodes] == [EXIT_RESUME] * 2, said
    saved = int((workspace / "nodes" / "checkpoints" / "latest").read_text())
    assert f"SIGUSR1 at {saved / 1000:g} kimg: the same command resumes the run" in said[0] and "SIGUSR1" not in said[1]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert saved >= 32 and [row["event"] for row in rows if "event" in row] == ["rows", "preempted"]


def test_a_machine_that_finds_no_other_says_so(workspace):
    """Rank 1's machine is given a port on which nobody listens."""
    lost = node(workspace, 1, forked.free_port(), "run_dir=lost", "faults.rendezvous_timeout=2")
    said = lost.communicate(timeout=120)[0]
    (line,) = [line for line in said.splitlines() if "error: rank" in line]
    assert line.startswith("error: rank 1 of 2 on ") and "nobody answered at 127.0.0.1:" in line
    assert lost.returncode == 2 and "Traceback" not in said
