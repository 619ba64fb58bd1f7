"""Packing in processes, a shard at a time: what a shard holds is settled before anybody begins, so that the result does
not depend on how many there are, and a shard that is finished stays finished.

`manifest.json.part` is the record of it: the first line says what is being packed, each further one what became of a
shard. The same packing, begun again, goes on after them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import Label, to_text
from hsrgan.engine.shard_writer import ShardFile, remove_shards
from hsrgan.engine.shards import MANIFEST, Shard
from hsrgan.tools.pack_images import Recipe
from hsrgan.tools.pack_sources import Source, reader

_counter = _stop = None  # shared with the process that started this one


@dataclass(frozen=True)
class Job:
    """One shard to be: where its images are, their names in order, their entries in a zip, their labels."""

    folder: Path
    number: int
    first: int  # position of the first image in the whole order: sample keys count on from it
    source: tuple[str, str]
    names: list[str]
    entries: np.ndarray | None
    labels: list[int] | list[Label] | None
    recipe: Recipe


@dataclass
class Done:
    """What became of a job. shard: None where no image could be used; classes: how many images of each label."""

    number: int
    shard: Shard | None
    classes: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    enlarged: int = 0
    size: int = 0  # bytes of the encoded images


class Stopped(Exception):
    """Another process has failed, or the user has had enough."""


def _begin(counter: object, stop: object) -> None:
    """In a new process: the parent alone minds Ctrl-C, and nobody outlives it."""
    global _counter, _stop
    _counter, _stop = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    gc.freeze()


class Packers:
    """Processes that pack. Made before the source is listed: they then carry nothing of the list."""

    def __init__(self, processes: int):
        context = multiprocessing.get_context("fork")
        self.count, self._counter, self._stop = processes, context.Value("q", 0), context.Event()
        self._pool = ProcessPoolExecutor(processes, context, _begin, (self._counter, self._stop))
        self._pool.submit(int).result()  # a fork pool starts all its processes at the first job

    def run(self, work: Callable, jobs: Iterator) -> Iterator[tuple[object | None, int]]:
        """(a result or None, images begun so far) whenever there is something new, in no order."""
        waiting = {self._pool.submit(work, job) for job in itertools.islice(jobs, 2 * self.count)}
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result(), self._counter.value
                waiting |= {self._pool.submit(work, job) for job in itertools.islice(jobs, 1)}
            yield None, self._counter.value

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Packers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def step() -> None:
    """Count one image; `Stopped` where the work is no longer wanted."""
    if _stop is not None:
        if _stop.is_set():
            raise Stopped
        with _counter.get_lock():
            _counter.value += 1


def pack_shard(job: Job) -> Done:
    """Read and encode the images of one shard and write it."""
    read, done, classes = reader(*job.source), Done(job.number, None), Counter()
    file = ShardFile(job.folder, job.number, job.recipe.format.value)
    try:
        for i, name in enumerate(job.names):
            step()
            try:
                entry = None if job.entries is None else job.entries[i]
                image, is_enlarged = job.recipe.apply(name, read(name, entry))
            except UserError:
                raise
            except Exception as error:  # a damaged archive makes its library raise nearly anything
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                done.skipped.append((name, reason))
                continue
            label = None if job.labels is None else job.labels[i]
            file.add(f"{job.first + i:08d}", image, label)
            if label is not None:
                classes[to_text((label,) if isinstance(label, int) else label)] += 1
            done.enlarged += is_enlarged
            done.size += len(image)
        done.classes = dict(sorted(classes.items()))
        if file.count:
            done.shard = file.end()
        return done
    finally:
        if done.shard is None:
            file.drop()


def jobs_of(
    source: Source, recipe: Recipe, folder: Path, *, seed: int, limit: int, shard_size: int, finished: set[int]
) -> Iterator[Job]:
    # Streaming shuffles only within a window of shards; this is what makes that enough.
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(source.names))[:limit]
    for number, first in enumerate(range(0, len(order), shard_size)):
        if number not in finished:
            rows = order[first : first + shard_size]
            yield Job(
                folder, number, first, (source.kind, str(source.path)), [source.names[i] for i in rows],
                None if source.entries is None else source.entries[rows],
                source.labels_of(rows), recipe,
            )  # fmt: skip


class Record:
    """The lines of `manifest.json.part`. what: says all that decides the result; another one begins anew."""

    def __init__(self, folder: Path, what: dict):
        self.path, self.done = folder / (MANIFEST + ".part"), {}
        head = json.dumps(what, sort_keys=True)
        lines = self.path.read_text("utf-8", "replace").splitlines() if self.path.exists() else []
        if (folder / MANIFEST).exists():  # to be replaced: from here on the folder is not complete
            os.replace(folder / MANIFEST, self.path)
            lines = []
        self.restarted = bool(lines) and lines[0] != head
        for line in lines[1:] if lines[:1] == [head] else []:
            with contextlib.suppress(ValueError, TypeError, KeyError, OSError):  # a torn line, a shard that is gone
                done = _done(json.loads(line))
                if done.shard is None or (folder / done.shard.name).stat().st_size == done.shard.bytes:
                    self.done[done.number] = done
        shards = [done.shard for done in self.done.values() if done.shard]
        remove_shards(folder, {name for shard in shards for name in shard.file_names})
        self._file = self.path.open("w", encoding="utf-8")
        for line in (head, *(json.dumps(asdict(done)) for done in self.done.values())):
            self._write(line)

    def add(self, done: Done) -> None:
        self.done[done.number] = done
        self._write(json.dumps(asdict(done)))

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leaves finished shards and this record, or nothing where there are none."""
        self._file.close()
        shards = [done.shard for done in self.done.values() if done.shard]
        remove_shards(self.path.parent, {name for shard in shards for name in shard.file_names})
        if not shards and self.path.exists():
            self.path.unlink()


def _done(row: dict) -> Done:
    shard = Shard(**row["shard"]) if row["shard"] else None
    return Done(**row | {"shard": shard})
