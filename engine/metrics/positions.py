"""Which rank computes what, and how the ranks' shares become one whole.

Whatever stands at position p of a metric (an image, a pair, a sequence) is a function of (seed, p) alone. Positions go
to ranks, and through networks, in units of UNIT that begin at its multiples, so that neither the number of ranks nor
the size of a batch changes how anything is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hsrgan.engine.distributed import World, failing_together, sum_over_ranks

UNIT = 16
Progress = Callable[[str, int, int], None]  # (what is being done, done, of how many)
Told = Callable[[int], None]  # of how many this rank has newly done


def silent(done: int) -> None:
    pass


def firsts(count: int, batch: int, world: World) -> Iterator[int]:
    """The first position of each unit of this rank, when positions 0 … count−1 are dealt out `batch` to a rank in turn,
    in whole units. Units may reach beyond count.
    """
    share = share_of(batch)
    for start in range(world.rank * share, count, world.size * share):
        yield from range(start, min(start + share, count), UNIT)


def share_of(batch: int) -> int:
    """`batch` in whole units, at least one."""
    return -(-batch // UNIT) * UNIT


def all_rows(
    count: int, width: Sequence[int], world: World, rows: Callable[[range], Tensor], told: Told = silent
) -> Tensor:
    """[count, *width] fp32 on the CPU of every rank, where `rows` gives those of one unit's positions, [UNIT, *width].

    A collective. told of positions. A `UserError` of one rank is raised on all.
    """
    whole = torch.zeros(count, *width, device=world.device)
    with failing_together():
        for first in firsts(count, UNIT, world):
            found = rows(range(first, first + UNIT))[: count - first]
            whole[first : first + len(found)] = found
            told(len(found))
    return sum_over_ranks(whole).cpu()  # a row is zero on all ranks but one


def counter(progress: Progress, what: str, total: int, world: World) -> Told:
    """Counts what this rank has done; `progress` is told of all ranks, taken to be equally far."""
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        progress(what, min(done * world.size, total), total)

    told(0)
    return told
