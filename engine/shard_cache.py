"""A folder of fetched shards that stays under a size, shared by any number of processes on one machine.

    <sha256>.tar    a whole shard, checked; its mtime is when it was last opened
    <sha256>.npy    offsets of its samples
    <name>.part     a shard on its way, locked (flock) by the one who fetches it, of full length from the start
    .lock           held while room is made (whoever was opened longest ago goes first) and while a shard gets its name
    .turn           held by the one who fills all the room that is left with a shard of unknown length

A reader holds descriptors, which outlive the removal of their file. The folder must be on a disk of this machine.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hsrgan.engine import transport
from hsrgan.engine.aside import writable
from hsrgan.engine.errors import UserError
from hsrgan.engine.shards import Manifest, Shard
from hsrgan.engine.tar_index import sample_offsets

SLOW_SECONDS = 10.0  # of fetching one shard, after which a line says so
GB = 1_000_000_000
_REMEDY = "free space there, lower data.cache_gb or name another folder with data.cache"


class _NoRoom(UserError):
    """Not now."""


@contextlib.contextmanager
def claimed(part: Path, *, wait: bool = True) -> Iterator[int | None]:
    """A descriptor of the file `part`, made if missing and held against every other process and thread; None where
    another holds it and `wait` is false. On leaving, the file is removed unless it was renamed."""

    def is_ours(descriptor: int) -> bool:
        try:
            return os.stat(part).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            return False

    while True:
        with writable(part, _REMEDY):
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            yield None
            return
        if is_ours(descriptor):
            break
        os.close(descriptor)  # whoever held it has renamed or removed it meanwhile
    try:
        yield descriptor
    finally:
        if is_ours(descriptor):
            part.unlink()
        # Said, not left to close: a process forked meanwhile has this descriptor too and would hold on.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


class ShardCache:
    """folder: made if missing; `UserError` where it cannot be. cap: bytes that its files may take."""

    def __init__(self, folder: Path, cap: int, *, allow_shell: bool = False):
        self.folder, self.cap, self.allow_shell = folder, cap, allow_shell
        self.news: collections.deque[dict] = collections.deque(maxlen=1000)  # retries, for the log
        with writable(folder, "name another folder with data.cache"):
            folder.mkdir(parents=True, exist_ok=True)

    def check(self, manifest: Manifest, window: int) -> None:
        """Raise `UserError` unless two windows of shards fit: the one that is read and the one that is fetched."""
        remote = (s.bytes for s in manifest.shards if transport.scheme_of(manifest.location(s)))
        need = sum(sorted(remote, reverse=True)[: 2 * window])
        if need > self.cap:
            raise UserError(
                f"data.cache_gb is {self.cap / GB:g}, two windows of {window} shards take {need / GB:.3g} GB: "
                f"set data.cache_gb to {need / GB * 1.05:.3g} or more, or a smaller data.window"
            )

    def open(self, shard: Shard, url: str) -> tuple[int, np.ndarray]:
        """(descriptor, offsets) of a shard, fetched unless it is there. `UserError` where that fails for good."""
        descriptor = self._whole(shard)
        if descriptor is None:
            with claimed(self.folder / f"{shard.sha256}.part") as part:
                descriptor = self._whole(shard)  # another may have fetched it while we waited
                if descriptor is None:
                    self._fetch(part, shard, url)
                    descriptor = os.dup(part)
        return descriptor, self._offsets(descriptor, shard, url)

    def prefetch(self, shard: Shard, url: str) -> None:
        """Have a shard here soon; nothing is done where another is at it."""
        if (self.folder / f"{shard.sha256}.tar").exists():
            return
        with claimed(self.folder / f"{shard.sha256}.part", wait=False) as part:
            if part is not None and not (self.folder / f"{shard.sha256}.tar").exists():
                self._fetch(part, shard, url)

    def adopt(self, url: str) -> tuple[int, str, int]:
        """(descriptor, SHA-256, bytes) of a shard of which nothing is known yet; it stays while there is room."""
        name = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()}.part"
        with claimed(name) as part:
            try:
                sha256, size = self._download(part, url, None)
            except _NoRoom:  # others may each have filled a part of it, and would wait for one another for ever
                os.ftruncate(part, 0)
                with self._locked(".turn"):
                    sha256, size = self._download(part, url, None, wait=True)
            with self._locked():
                os.replace(name, self.folder / f"{sha256}.tar")
            return os.dup(part), sha256, size

    def _whole(self, shard: Shard) -> int | None:
        path = self.folder / f"{shard.sha256}.tar"
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != shard.bytes:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # somebody else's file, or gone: then it is not the one to keep
            os.utime(path)
        return descriptor

    def _fetch(self, part: int, shard: Shard, url: str) -> None:
        self._download(part, url, shard)
        with self._locked():  # or who counts what is here might see it under neither name
            os.replace(self.folder / f"{shard.sha256}.part", self.folder / f"{shard.sha256}.tar")

    def _offsets(self, descriptor: int, shard: Shard, url: str) -> np.ndarray:
        path = self.folder / f"{shard.sha256}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            offsets = np.load(path, allow_pickle=False)
            if offsets.shape == (shard.count + 1,) and offsets.dtype == np.uint64:
                return offsets
        try:
            with open(descriptor, "rb", closefd=False) as file:
                offsets = sample_offsets(file)
        except ValueError as error:
            raise UserError(f"{url} is as its manifest says, but {error}: pack it again") from None
        if len(offsets) != shard.count + 1:
            raise UserError(f"{url} holds {len(offsets) - 1} samples, its manifest says {shard.count}: pack it again")
        part = path.with_suffix(".npy.part")
        with claimed(part, wait=False) as mine, writable(path, _REMEDY):
            if mine is not None:
                with open(mine, "wb", closefd=False) as file:
                    np.save(file, offsets)
                os.replace(part, path)
        return offsets

    def _download(self, part: int, url: str, shard: Shard | None, *, wait: bool = False) -> tuple[str, int]:
        """Fill the descriptor with the bytes of `url` -> (SHA-256, size), those of `shard` if it is given. Raises
        `_NoRoom` where neither side says the length and there is no room for more; with `wait`, it waits for that.
        """
        began, slow = time.monotonic(), SLOW_SECONDS

        def once() -> tuple[str, int]:
            nonlocal slow
            stream, length = transport.open_url(url, allow_shell=self.allow_shell)
            with stream, open(part, "r+b", closefd=False) as out:
                size = shard.bytes if shard else length
                if size is not None:
                    self._reserve(part, size)
                out.seek(0)
                digest, at = hashlib.sha256(), 0
                while chunk := stream.read(transport.CHUNK):
                    at += len(chunk)
                    if size is None:
                        self._reserve(part, at, wait=wait)
                    elif at > size:
                        raise OSError(f"more than {size} bytes came")
                    digest.update(chunk)
                    with writable(self.folder, _REMEDY):
                        out.write(chunk)
                    if time.monotonic() - began > slow:
                        slow = float("inf")
                        transport.tell(f"waiting for {url}: {at / 1e6:.0f} MB of {(size or 0) / 1e6:.0f} so far")
                if size is not None and at != size:
                    raise OSError(f"{at} of {size} bytes came")
                if shard and digest.hexdigest() != shard.sha256:
                    raise OSError("its bytes are not those that the manifest's SHA-256 names")
                with writable(self.folder, _REMEDY):
                    out.flush()
                    os.fsync(part)
            return digest.hexdigest(), at

        def note(text: str) -> None:
            transport.tell(f"fetching again: {text}")
            self.news.append({"event": "shard_retry", "url": url, "reason": text.removeprefix(f"{url}: ")})

        return transport.retrying(url, once, note)

    @contextlib.contextmanager
    def _locked(self, name: str = ".lock") -> Iterator[None]:
        with writable(self.folder, _REMEDY):
            lock = open(self.folder / name, "w")  # noqa: SIM115  (closed below)
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # as in `claimed`

    def _reserve(self, part: int, size: int, *, wait: bool = True) -> None:
        """Let the file have `size` bytes, once there is room for them; without `wait`, now or `_NoRoom`."""
        while True:
            with self._locked():
                if self._make_room(size - os.fstat(part).st_size):
                    with writable(self.folder, _REMEDY):
                        os.ftruncate(part, size)
                    return
            if size > self.cap:
                raise UserError(f"data.cache_gb is {self.cap / GB:g}, one shard takes {size / GB:.3g} GB: raise it")
            if not wait:
                raise _NoRoom(f"data.cache_gb is {self.cap / GB:g}, and other shards take it all")
            time.sleep(0.1)  # others are fetching; what they have fetched can go when they are done

    def _make_room(self, need: int) -> bool:
        shards, taken = [], 0
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                taken += status.st_size
                if entry.name.endswith(".tar"):
                    shards.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
                elif entry.name.endswith(".part"):
                    with claimed(Path(entry.path), wait=False) as abandoned:
                        taken -= status.st_size if abandoned is not None else 0
        for _, size, path in sorted(shards):
            if taken + need <= self.cap:
                break
            path.unlink(missing_ok=True)
            path.with_suffix(".npy").unlink(missing_ok=True)
            taken -= size
        return taken + need <= self.cap


class Ahead:
    """Fetches shards in a thread while others are read. What fails is left to the reader, who will meet it."""

    def __init__(self, manifest: Manifest):
        self._manifest, self._closed = manifest, False
        self._wanted: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="fetch-ahead").start()

    def want(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._wanted.put(self._manifest.shards[number])

    def close(self) -> None:
        self._closed = True
        self._wanted.put(None)

    def _run(self) -> None:
        while (shard := self._wanted.get()) is not None:
            url = self._manifest.location(shard)
            if transport.scheme_of(url) and not self._closed:
                with contextlib.suppress(UserError, OSError):
                    self._manifest.cache.prefetch(shard, url)
