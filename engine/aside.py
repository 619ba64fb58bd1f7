"""Files appear whole or not at all: they are written aside, in the same folder, and then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hsrgan.engine.errors import CannotWrite, UserError


@contextlib.contextmanager
def writable(path: Path, remedy: str = "free space there or name another folder") -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a `CannotWrite` that says why and what to do."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is flushed to disk and takes `path`'s place in one step.

    A crash or an error leaves the former `path`, if any, as it was. Raises `CannotWrite` where the folder refuses.
    """
    aside = path.with_name(f".{path.name}.part")  # one name: what a kill leaves, the next write replaces
    with writable(path):
        try:
            yield aside
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which must not exist, to fill; on success it takes its name in one step.

    A crash or an error leaves no `folder`. Raises `CannotWrite` where the folder above refuses.
    """
    aside = folder.with_name(f".{folder.name}.part")
    with writable(folder):
        shutil.rmtree(aside, ignore_errors=True)  # what a kill left
        aside.mkdir(parents=True)
        try:
            yield aside
            sync_folder(aside)
            os.rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has its content; `sync_folder` is for its name."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk knows which files the folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, remedy: str = "choose another with run_dir=…", *, make: bool = True) -> None:
    """Make the folder and try it, before hours of work want to write there; UserError where it refuses.

    make: False leaves what is absent absent, and tries the nearest folder above it.
    """
    with writable(folder, remedy):
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        tried = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=tried):  # a name of its own: the ranks of a run all try it at once
            pass


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder`, which exists, against every other process, on any machine that sees it, until this one ends, in
    whatever way; its file `held` says who. Raises UserError where another holds it.
    """
    with contextlib.ExitStack() as stack:
        with writable(folder):
            # unlike flock's, this lock does not pass to what is forked, which may outlive us
            file = stack.enter_context(open(folder / "held", "a+"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    file.seek(0)
                    who = file.read().strip() or "another process"
                    raise UserError(f"{who} is at work in {folder}: end it first, or choose another run_dir") from None
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a disk that knows no locks
                    raise
            file.truncate(0)
            file.write(f"{socket.gethostname()}, pid {os.getpid()}\n")
            file.flush()
        yield
