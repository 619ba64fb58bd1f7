"""Training runs as forks of one process that has imported everything: hundreds of starts, kills and resumes in a test.

Each is a process of its own from the fork on: its own engines, process group, signals and death, the same command
line as `python engine/train.py`. That the command itself starts, dies and resumes is test_training.py's.
"""

import contextlib
import functools
import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
import torch

ALL = "HSRGAN_TEST_ALL"
only_if_all = pytest.mark.skipif(not os.environ.get(ALL), reason=f"takes minutes: {ALL}=1 runs it")

RECIPE = """
run_dir: run
seed: 1
kimg: 0.064           # 8 steps
batch: 8
device: cpu
tick_kimg: 0.016
checkpoint_kimg: 0.016
image_kimg: 100.0
snapshot_kimg: 100.0
data: {builtin: digits, resolution: 16, channels: 1, labels: true, workers: 0}
generator: {z_dim: 8, w_dim: 8, mapping_layers: 1, channel_base: 64, channel_max: 8, lr: 0.002}
discriminator: {channel_base: 64, channel_max: 8, mbstd_group_size: 2, lr: 0.002, mapping_layers: 1}
r1: {gamma: 1.0, interval: 2}
path_length: {interval: 2}
ema: {kimg: 0.5, rampup: null}
"""


@dataclass
class Run:
    """One rank of a run. said: everything that it printed."""

    process: BaseProcess
    output: Path

    def ends(self, seconds: float = 120) -> int:
        """Its exit code: the negative number of a signal where one killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s: {self.said}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.output.read_text()


def start(
    folder: Path, *overrides: str, ranks: int = 1, plant: Callable[[], object] | None = None, port: int | None = None,
    absent: int | None = None,
) -> list[Run]:
    """`train.py recipe.yaml overrides` in `folder`, forked once for each rank. plant: called in it before anything.
    absent: a rank that never comes.
    """
    port = port or free_port()
    runs = []
    for rank in sorted({*range(ranks)} - {absent}):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
        environment = {key: str(value) for key, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        output = folder / f"said-{port}-{rank}.txt"
        given = (folder, ["recipe.yaml", *overrides], environment, output, plant)
        process = _context().Process(target=_rank, args=given)
        process.start()
        runs.append(Run(process, output))
    return runs


def train(folder: Path, *overrides: str, ranks: int = 1, plant: Callable[[], object] | None = None) -> str:
    """Train to the end; what rank 0 said."""
    runs = start(folder, *overrides, ranks=ranks, plant=plant)
    codes = [run.ends() for run in runs]
    assert codes == [0] * ranks, "\n".join(run.said for run in runs)
    return runs[0].said


def free_port() -> int:
    """One that nobody listens on, below those that the system hands to connections (32768 and up): rank 0 opens it
    seconds later.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """Start the process that all are forks of: one thread, and this folder to import from."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["preloaded"])
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    return context


def _rank(folder: Path, argv: Sequence[str], environment: dict[str, str], output: Path, plant) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    from hsrgan.engine import train

    if plant:
        plant()
    train.app(list(argv), standalone_mode=False)
