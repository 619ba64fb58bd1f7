"""What a run tells about itself: running means, log.jsonl, TensorBoard, curves, sample grids and the progress line."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from hsrgan.engine.aside import writable, written_aside
from hsrgan.engine.board import Board
from hsrgan.engine.curves import draw_curves
from hsrgan.engine.errors import CannotWrite
from hsrgan.engine.pictures import image_grid, opaque, save_png

REDRAW_SECONDS = 0.5  # the progress line
RATE_SECONDS = 60.0  # the window behind "img/s" and the ETA
CURVES_SHARE = 0.02  # of a run's time may go into drawing curves


class Meter:
    """Named running means that stay on the device until they are collected, once a tick."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Count every element of `value` (any shape) into the mean called `name`. Reads nothing to the host."""
        value = torch.as_tensor(value).detach()
        total = self._sums.get(name)
        if total is None:
            total = self._sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
            self._counts[name] = 0
        total += value.sum(dtype=torch.float64)
        self._counts[name] += value.numel()

    def collect(self) -> dict[str, float]:
        """The means over every rank since the last call, and clear. A collective: every rank calls it.

        Ranks may have met different names (a lazy phase, an empty micro-batch): a name's mean is over those that did.
        """
        names = sorted(self._sums)
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if parallel:
            met: list[list[str] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(met, names)
            names = sorted(set().union(*met))
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        counts = torch.tensor([self._counts.get(name, 0) for name in names], dtype=torch.float64, device=self._device)
        sums = [self._sums.get(name, zero) for name in names]
        self._sums, self._counts = {}, {}
        if not names:
            return {}
        both = torch.stack([torch.stack(sums), counts])
        if parallel:
            dist.all_reduce(both)
        return {name: total / count for name, total, count in zip(names, *both.tolist(), strict=True) if count}


def read_log(path: Path | str) -> list[dict]:
    """The lines of a log.jsonl, in order: ticks, and events (those have the key `event`).

    A line torn by a kill is passed over. A value that was not finite reads as None. A missing file reads as empty.
    """
    rows = []
    path = Path(path)
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kimg" in row:
            rows.append(row)
    return rows


class RunLog:
    """Everything a run writes for people. Every rank may call everything; only rank 0 writes and draws.

    run_dir: made if absent. total_kimg: the goal in thousands of images. start_kimg: where this process takes up the
    run; lines of log.jsonl beyond it are dropped, so that a resumed run's curves have no second branch.
    Used as a context manager. Raises `UserError` where run_dir refuses to be written.
    """

    def __init__(self, run_dir: Path | str, *, total_kimg: float, start_kimg: float = 0.0, rank: int = 0) -> None:
        self.run_dir = Path(run_dir)
        self._total_images = round(total_kimg * 1000)
        self._start_images = self._images = self._tick_images = round(start_kimg * 1000)
        self._active = rank == 0
        self._console = Console(highlight=False)
        self._rows: list[dict] = []
        self._curves_due, self._curves_ticks = 0.0, 0
        self._work = "", 0.0  # what `working` was last told of, and since when

    def __enter__(self) -> RunLog:
        self._began = self._tick_time = self._drawn = time.perf_counter()
        self._window: deque[tuple[float, int]] = deque([(self._began, self._images)])
        self._earlier_seconds = 0.0
        if self._active:
            self._open()
        return self

    def _open(self) -> None:
        path = self.run_dir / "log.jsonl"
        with writable(self.run_dir, "name another run_dir"):
            (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
            kept = [row for row in read_log(path) if round(row["kimg"] * 1000) <= self._start_images]
            with written_aside(path) as aside:
                aside.write_text("".join(_line(row) for row in kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")
            self._board = Board(self.run_dir / "tensorboard", purge_step=self._start_images + 1)
        self._rows = [row for row in kept if "event" not in row]
        self._earlier_seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
        self._progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=self._console,
            auto_refresh=False,  # no thread: the loop redraws between steps
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=self._total_images, completed=self._images)
        self._progress.start()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._active:
            return
        self._redraw()
        self._progress.stop()
        try:
            with writable(self.run_dir / "log.jsonl"):
                self._file.close()
                self._board.close()
            self._draw_curves(due_only=False)
        except CannotWrite as refusal:  # said, not raised: whatever else the run ends with is more important
            self.message(str(refusal))

    def reals(self, images: Tensor) -> None:
        """Write `images` (as `image_grid` takes them) to reals.png."""
        if self._active:
            save_png(image_grid(images), self.run_dir / "reals.png")

    def fakes(self, images: Tensor, kimg: float, rows: Sequence[str] = ()) -> None:
        """Write samples/fakes-<kimg>.png and the same grid, without alpha, to TensorBoard. Runs under 100 kimg name
        tenths.

        rows: what the rows of the grid are; named in TensorBoard beside it and, once a run, in the log.
        """
        if not self._active:
            return
        stamp = f"{kimg:08.1f}" if self._total_images < 100_000 else f"{round(kimg):06d}"
        cols = len(images) // len(rows) if rows else None
        save_png(image_grid(images, cols=cols), self.run_dir / "samples" / f"fakes-{stamp}.png")
        self._show("fakes", images, round(kimg * 1000), cols)
        if rows:
            with writable(self.run_dir / "tensorboard"):
                self._board.text("fakes/rows", ", ".join(rows), round(kimg * 1000))
        if rows and kimg == 0:
            self.note("rows", f"rows of samples/fakes-*.png: {', '.join(rows)}")

    def augmented(self, images: Tensor, seen: int) -> None:
        """Write `images` to samples/augmented.png and to TensorBoard, as of `seen` images of the run."""
        if self._active:
            save_png(image_grid(images), self.run_dir / "samples" / "augmented.png")
            self._show("augmented", images, seen)

    def _show(self, name: str, images: Tensor, seen: int, cols: int | None = None) -> None:
        with writable(self.run_dir / "tensorboard"):
            self._board.image(name, np.asarray(opaque(image_grid(images, cols=cols, scale=1))), seen)

    def step(self, images_seen: int) -> None:
        """Note that `images_seen` images are done, and move the progress line at most twice a second."""
        self._images = images_seen
        now = time.perf_counter()
        if not self._active or now - self._drawn < REDRAW_SECONDS:
            return
        self._drawn = now
        self._window.append((now, images_seen))
        while len(self._window) > 2 and now - self._window[0][0] > RATE_SECONDS:
            self._window.popleft()
        self._redraw()

    def tick(self, images_seen: int, scalars: dict[str, float]) -> None:
        """Log `scalars` (means since the last tick) as one line of log.jsonl and to TensorBoard; redraw the curves.

        Beside them the line holds kimg, images, seconds (of training, over every resume), img_s (since the last tick),
        ram_gib (this process) and, on a GPU, gpu_gib (peak). Names starting with loss/ and score/ get their own curves.
        """
        self.step(images_seen)
        if not self._active:
            return
        now = time.perf_counter()
        rate = (images_seen - self._tick_images) / max(now - self._tick_time, 1e-9)
        self._tick_images, self._tick_time = images_seen, now
        row = {"kimg": images_seen / 1000, "images": images_seen, "seconds": self._seconds(), "img_s": round(rate, 2)}
        row |= {key: round(value, 3) for key, value in _memory().items()} | scalars
        self._add_row(row)
        if not self._console.is_terminal:
            shown = "  ".join(f"{name} {value:.3g}" for name, value in scalars.items())
            self.message(f"{self._status()}  {shown}")

    def scores(self, images_seen: int, scalars: dict[str, float], spent: float) -> None:
        """Log published metrics (`metric/…`) as a line of log.jsonl of their own, to TensorBoard and the curves.

        spent: seconds that they took, which do not count as training in the next tick's img_s.
        """
        if self._active:
            self._tick_time += spent
            row = {"kimg": images_seen / 1000, "images": images_seen, "seconds": self._seconds()}
            self._add_row(row | scalars)

    def working(self, what: str, done: int, total: int) -> None:
        """Say on the progress line how far something is that training waits for; at most twice a second."""
        now = time.perf_counter()
        if done == 0 or what != self._work[0]:
            self._work = what, now
        if not self._active or now - self._drawn < REDRAW_SECONDS or not self._progress.live.is_started:
            return
        self._drawn = now
        rate = done / max(now - self._work[1], 1e-9)
        eta = _clock((total - done) / rate) if rate > 0 else "–"
        status = f"{what}  {done}/{total}  {rate:.1f}/s  ETA {eta}"
        self._progress.update(self._task, description=status, refresh=True)

    def event(self, kind: str, **fields: object) -> None:
        """One line of log.jsonl for something notable (start, resume, checkpoint), with when it happened."""
        if self._active:
            self._append({"event": kind, "kimg": self._images / 1000, "seconds": self._seconds(), **fields})

    def message(self, text: str) -> None:
        """Print `text` above the progress line."""
        if self._active:
            self._console.print(text, markup=False, soft_wrap=True)

    def note(self, kind: str, text: str) -> None:
        """Say `text` and keep it as an event."""
        self.message(text)
        self.event(kind, text=text)

    def finish(self, paths: dict[str, Path | str]) -> None:
        """Say how long it took and where everything is: the run's own files, and `paths` (a name for each)."""
        if not self._active:
            return
        self._redraw()
        self._progress.stop()
        self._draw_curves(due_only=False)
        done = self._images - self._start_images
        seconds = time.perf_counter() - self._began
        rate = f"{done / 1000:.1f} kimg in {_clock(seconds)}, {done / max(seconds, 1e-9):.1f} img/s"
        own = {"samples": self.run_dir / "samples", "curves": self.run_dir / "curves.png"}
        own |= {"log": self.run_dir / "log.jsonl", "tensorboard": self.run_dir / "tensorboard"}
        for name, value in {"trained": rate, **own, **paths}.items():
            self.message(f"{name:<12} {value}")

    def _redraw(self) -> None:
        """The progress line, if there is a terminal and it has not been stopped."""
        if self._progress.live.is_started:
            self._progress.update(self._task, completed=self._images, description=self._status(), refresh=True)

    def _add_row(self, row: dict) -> None:
        self._append(row)
        self._rows.append(row)
        with writable(self.run_dir / "tensorboard"):
            scalars = {name: value for name, value in row.items() if name not in ("kimg", "images", "seconds")}
            self._board.scalars(scalars, row["images"])
        self._draw_curves()

    def _append(self, row: dict) -> None:
        with writable(self.run_dir / "log.jsonl"):
            self._file.write(_line(row))
            self._file.flush()

    def _draw_curves(self, *, due_only: bool = True) -> None:
        """Redraw curves.png, but not before its last cost has become a fiftieth of the time since."""
        began = time.perf_counter()
        if len(self._rows) == self._curves_ticks or (due_only and began < self._curves_due):
            return
        draw_curves(self._rows, self.run_dir / "curves.png")
        now = time.perf_counter()
        self._curves_due, self._curves_ticks = now + (now - began) / CURVES_SHARE, len(self._rows)

    def _seconds(self) -> float:
        return round(self._earlier_seconds + time.perf_counter() - self._began, 3)

    def _status(self) -> str:
        """kimg, rate over the last minute, time to go, memory."""
        then, images_then = self._window[0]
        rate = (self._images - images_then) / max(time.perf_counter() - then, 1e-9)
        eta = _clock((self._total_images - self._images) / rate) if rate > 0 else "–"
        memory = "  ".join(f"{key.removesuffix('_gib')} {value:.1f} GiB" for key, value in _memory().items())
        kimg = f"{self._images / 1000:.1f}/{self._total_images / 1000:g} kimg"
        return f"{kimg}  {rate:.1f} img/s  ETA {eta}  {memory}"


def _line(row: dict) -> str:
    """`row` as one line of JSON; what is not finite becomes null, since NaN is not JSON."""
    bad = {key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({key: None if key in bad else value for key, value in row.items()}) + "\n"


def _memory() -> dict[str, float]:
    """Resident memory of this process, and the GPU's peak where one is in use, in GiB."""
    memory = {"ram_gib": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return memory


def _clock(seconds: float) -> str:
    """Seconds as 1d 02:03:04, without days where there are none."""
    days, rest = divmod(max(0, round(seconds)), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
