"""How the ranks of a run find each other, and what they hear of one that cannot come because it failed before."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import time
from collections.abc import Iterator

import torch

from hsrgan.engine.errors import RankError, UserError
from hsrgan.engine.tensor_files import one_line

PATIENCE = 300.0  # seconds in which all ranks must have come
FAREWELL = 30.0  # seconds for which a first rank that has failed waits for those that would wait for it
FIRST_WORD = 1.0  # seconds that the first rank has to speak, before a launcher sees another one gone and ends it too
FINE = "fine"


def meet(rank: int, size: int, backend: str, patience: float, collective: datetime.timedelta) -> None:
    """Join the process group.

    patience: seconds in which all ranks must have come; after that a `RankError` says who waited where for whom. A
    `UserError` that a rank met inside `before_meeting` is raised by all. collective: the time-out of what follows.
    """
    try:
        if size == 1:
            store = torch.distributed.HashStore()  # no port, so none that another program could have
        else:
            store = _store(patience)
            failure = _exchange(store, rank, size, FINE)
        if size == 1 or failure == FINE:
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=collective)
            store.set_timeout(collective)
            return
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RankError(
            f"rank {rank} of {size} on {socket.gethostname()}: {_no_meeting(str(error), where, patience)}"
        ) from None
    raise UserError(failure)


@contextlib.contextmanager
def before_meeting(rank: int, size: int) -> Iterator[None]:
    """A `UserError` inside, on any rank, is raised on those that wait for it in `meet` too, so that none waits in vain
    and the first rank, which speaks for all, has something to say. Any other exception is one here, and a `UserError`
    on the others. Once they have met it does nothing. Not to be nested: all are told once.
    """
    try:
        yield
    except Exception as error:
        if size == 1 or torch.distributed.is_initialized():
            raise
        mistake = isinstance(error, UserError)
        said = str(error) if mistake else f"failed: {one_line(error)}"
        said = said if rank == 0 else f"rank {rank} ({socket.gethostname()}): {said}"
        try:
            failure = _exchange(_store(FAREWELL if rank == 0 else PATIENCE), rank, size, said)
        except (RuntimeError, ValueError):  # the others never came: then this one says it itself
            failure = FINE
        if not mistake:
            raise
        if failure == FINE:  # or those who had met were of another run on this port
            raise RankError(said) from None
        raise UserError(failure) from None


def _store(patience: float) -> torch.distributed.Store:
    limit = datetime.timedelta(seconds=patience)
    store, _, _ = next(torch.distributed.rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    return store


def _exchange(store: torch.distributed.Store, rank: int, size: int, said: str) -> str:
    """What the first rank that is not fine said, or FINE; waits until all ranks have said something."""
    store.set(f"said/{rank}", said)
    if rank == 0:
        all_said = [store.get(f"said/{each}").decode() for each in range(size)]
        store.set("verdict", next((each for each in all_said if each != FINE), FINE))
    verdict = store.get("verdict").decode()
    if verdict != FINE:  # the store is gone with the first rank: it leaves last
        store.set(f"heard/{rank}", "")
        if rank == 0:
            with contextlib.suppress(RuntimeError):  # one has gone meanwhile: the verdict is more important
                store.wait([f"heard/{each}" for each in range(size)])
        else:
            time.sleep(FIRST_WORD)
    return verdict


def _no_meeting(error: str, where: str, patience: float) -> str:
    """Why the ranks did not find each other, and what to do; error: what torch says about it, stack and all."""
    if "EADDRINUSE" in error or "address already in use" in error:
        return f"{where} is in use by another program: give --master_port another number, the same on every machine"
    if waited := re.search(r"wait timeout.*(?:said/(\d+)|verdict)", error):  # where torchrun keeps the store
        return (
            f"rank {waited[1] or 0} did not come to {where} within {patience:g} s: see what it does, or raise "
            "faults.rendezvous_timeout"
        )
    if joined := re.search(r"(\d+)/(\d+) clients joined", error):
        return (
            f"only {joined[1]} of {joined[2]} ranks came to {where} within {patience:g} s: start the command on every "
            "machine, with the same --master_addr, --master_port and hostfile"
        )
    if "port must have value" in error or "invalid literal" in error:
        return f"{where} is no address: --master_port is a number below 65536"
    if "connect" in error or "timed out" in error.lower() or "getaddrinfo" in error:
        return (
            f"nobody answered at {where} within {patience:g} s: rank 0 must run there, and --master_addr and "
            "--master_port must be the same on every machine and not be blocked by a firewall"
        )
    return f"the ranks could not meet at {where} ({' '.join(error.split())[:200]})"
