"""What a run does when something fails that is nobody's mistake: it is asked to leave, the disk is full, the numbers
are no longer finite. (Another rank's death: peers.py.)
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from hsrgan.engine.distributed import World
from hsrgan.engine.errors import CannotWrite
from hsrgan.engine.finite import NotFinite
from hsrgan.engine.run_state import Training
from hsrgan.engine.sections import Faults


class Preemption:
    """A context in which SIGTERM and SIGUSR1 are requests to save and leave. Every rank enters it."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, world: World) -> None:
        # gloo beside NCCL: the ranks agree on the host, and no host waits for its GPU
        self._group = dist.new_group(backend="gloo") if world.size > 1 and world.device.type == "cuda" else None
        self._parallel = world.size > 1
        self._number = 0

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def asked(self) -> str:
        """The name of a signal that any rank has received, else an empty string; the same on every rank."""
        number = self._number
        if self._parallel:
            largest = torch.tensor(number)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
            number = int(largest)
        return signal.Signals(number).name if number else ""


class Writing:
    """How the run takes it when a file cannot be written: it ends, or says so and goes on, as the recipe wants it."""

    def __init__(self, faults: Faults, say: Callable[[str], None]) -> None:
        self._go_on, self._say = faults.disk_full == "continue", say

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            yield
        except CannotWrite as error:
            if not self._go_on:
                raise
            self._say(f"{error}; the run goes on without it (faults.disk_full)")


def not_finite(t: Training) -> tuple[dict[str, float], list[str], str]:
    """Of the steps since the last call: their counts for the log, a line for each network with any, and, if the run
    has diverged, a line that says where; the same on every rank.
    """
    counts, lines, diverged = {}, [], ""
    for name, net in (("G", t.g), ("D", t.d)):
        found: NotFinite = net.finite.collect()
        if not found.count:
            continue
        counts[f"nonfinite/{name}"] = float(found.count)
        done = "they were skipped" if net.skip else "their gradients were mended"
        lines.append(f"{name}: {found}; {done}")
        if found.count > t.recipe.faults.max_nonfinite * found.steps:
            diverged = diverged or f"{name} has diverged: {found}"
    return counts, lines, diverged
