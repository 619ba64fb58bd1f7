"""Ranks that watch each other, so that the death of one ends the run with its name instead of a hang.

A star of plain sockets beside the process group: every rank but the first keeps one connection to rank 0, and both
ends send a beat through it from a thread of their own. A connection that closes is a process that died; silence is
one that hangs whole (stopped, swapped out, a machine without power). Rank 0 passes on what it learns. What hangs in
the main thread alone still beats: the process group's own time-out, ten minutes, ends that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from types import TracebackType

from hsrgan.engine.distributed import World, from_first
from hsrgan.engine.errors import EXIT_RANK_LOST, EXIT_RESUME, EXIT_USER_ERROR, RankError, UserError
from hsrgan.engine.tensor_files import one_line

GRACE_SECONDS = 1.0  # for the main thread to end by itself with something better to say
CRASH_SECONDS = 3.0  # for the news of a peer's death, once a collective has failed
RESUME, AGAIN = "the same command resumes the run from its last checkpoint", "give the same command again"


class Peers:
    """A context in which the loss of another rank ends this process: one line on stderr, exit code EXIT_RANK_LOST.

    Every rank enters it, after the process group is up, and leaves that (`distributed.stop`) inside. seconds: the
    silence after which a rank counts as lost; remedy: what to do then. An exception that leaves the context, other than
    an exit to be resumed, is told to the others, which end too: with exit code 2 after a `UserError`.
    """

    def __init__(self, world: World, seconds: float = 45.0, remedy: str = RESUME) -> None:
        self.world, self.seconds, self.remedy = world, seconds, remedy
        self._names: dict[int, str] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._unread: dict[int, bytes] = {}
        self._heard: dict[int, float] = {}
        self._verdict = False
        self._ending = threading.Event()

    def __enter__(self) -> Peers:
        if self.world.size > 1:
            try:
                self._connect()
            except OSError as error:
                raise RankError(
                    f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()}: the ranks cannot watch "
                    f"each other ({one_line(error)}): all must reach {os.environ['MASTER_ADDR']}, on any port"
                ) from None
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.world.size == 1:
            return
        if isinstance(error, RuntimeError):  # of a collective, maybe: then somebody's death is about to be known
            deadline = time.monotonic() + CRASH_SECONDS
            while not self._verdict and time.monotonic() < deadline:
                time.sleep(0.05)
            if self._verdict:
                self._thread.join()  # it ends the process
        self._ending.set()
        if well := error is None or (isinstance(error, SystemExit) and error.code == EXIT_RESUME):
            self._tell("bye")
        elif isinstance(error, UserError):
            self._tell(f"error {self.world.rank} {' '.join(str(error).split())}")
        else:
            self._tell(f"lost {self.world.rank} failed: {one_line(error)}")
        if not well and not self.world.first:  # the first must say it before a launcher sees this one gone and ends all
            with contextlib.suppress(OSError):
                self._sockets[0].settimeout(2 * GRACE_SECONDS)
                while self._sockets[0].recv(4096):
                    pass
        for peer in self._sockets.values():
            peer.close()

    def _connect(self) -> None:
        me = f"{socket.gethostname()}, pid {os.getpid()}"
        if self.world.first:
            family = socket.getaddrinfo(os.environ["MASTER_ADDR"], None)[0][0]
            with socket.create_server(("", 0), family=family) as server:
                _, token, _ = from_first((server.getsockname()[1], secrets.token_hex(16), me))
                server.settimeout(self.seconds)
                while len(self._sockets) < self.world.size - 1:
                    peer, _ = server.accept()
                    peer.settimeout(self.seconds)
                    with contextlib.suppress(OSError, ValueError):  # a stranger's knock
                        line = peer.makefile("rb", buffering=0).readline()  # and not a byte of what comes after it
                        said, rank, name = line.decode().strip().split(" ", 2)
                        if secrets.compare_digest(said, token):
                            self._sockets[int(rank)], self._names[int(rank)] = peer, name
        else:
            port, token, self._names[0] = from_first(None)
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), self.seconds)
            peer.sendall(f"{token} {self.world.rank} {me}\n".encode())
            self._sockets[0] = peer
        for rank, peer in self._sockets.items():
            peer.settimeout(1.0)  # a peer that reads nothing must not stop the watch
            self._unread[rank], self._heard[rank] = b"", time.monotonic()

    def _watch(self) -> None:
        selector, pause = selectors.DefaultSelector(), min(1.0, self.seconds / 8)
        for rank, peer in self._sockets.items():
            selector.register(peer, selectors.EVENT_READ, rank)
        beat = woke = time.monotonic()
        while not self._ending.is_set() and selector.get_map():
            try:
                ready = selector.select(pause)
            except (OSError, ValueError):  # closed by the main thread, which is leaving
                return
            now = time.monotonic()
            if now - woke > self.seconds / 2:  # it was this process that slept
                self._heard = dict.fromkeys(self._heard, now)
            woke = now
            for key, _ in ready:
                if not self._read(key.data):
                    selector.unregister(key.fileobj)
                    del self._heard[key.data]
            if now - beat >= pause:
                self._tell("beat")
                beat = now
            for rank, heard in self._heard.items():
                if now - heard > self.seconds:
                    self._lost(rank, f"has not been heard of for {self.seconds:g} s")

    def _read(self, rank: int) -> bool:
        """Take in what a peer sent; False once it said goodbye."""
        try:
            data = self._sockets[rank].recv(4096)
        except TimeoutError:
            return True
        except OSError:
            data = b""
        if not data and not self._ending.is_set():
            self._lost(rank, "has died")
        self._heard[rank] = time.monotonic()
        *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "bye":
                return False
            if word in ("lost", "error"):
                subject, _, what = rest.partition(" ")
                self._lost(int(subject), what, mistake=word == "error", told=not self.world.first)
        return True

    def _lost(self, rank: int, what: str, *, mistake: bool = False, told: bool = False) -> None:
        """End this process, unless its main thread is about to. told: rank 0 has said it already, on its machine."""
        self._verdict = True
        if self.world.first:
            self._tell(f"{'error' if mistake else 'lost'} {rank} {what}")
        if self._ending.wait(GRACE_SECONDS):
            return
        if not told or (self.world.local_rank == 0 and not mistake):
            name = f" ({self._names[rank]})" if rank in self._names else ""
            remedy = "" if mistake else f"; {self.remedy}"
            print(f"error: rank {rank}{name}{':' if mistake else ''} {what}{remedy}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_USER_ERROR if mistake else EXIT_RANK_LOST)  # the main thread may wait in a collective for ever

    def _tell(self, line: str) -> None:
        for peer in self._sockets.values():
            with contextlib.suppress(OSError):  # gone, or it hears nothing: the watch will say so
                peer.sendall(line.encode() + b"\n")
