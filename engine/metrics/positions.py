"""Which items of a metric fall to which rank, what they are drawn from, and how the ranks' shares become one again.

Item p of every metric is a function of (seed, p) alone. Rank r of n computes p = r, r + n, r + 2n, …, in batches that
all have one length, so that neither the number of ranks nor a short last batch changes how a sum is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError


def shares(count: int, batch: int, rank: int, world_size: int) -> Iterator[tuple[list[int], int]]:
    """(positions, how many of them count) for each batch of this rank; the last is filled up with repeats."""
    mine = range(rank, count, world_size)
    size = min(batch, count)
    for start in range(0, len(mine), size):
        part = list(mine[start : start + size])
        yield part + part[-1:] * (size - len(part)), len(part)


def merged(parts: Sequence[Tensor]) -> Tensor:
    """The shares [n_r, …] of ranks 0, 1, … as one [n, …], in the order of positions."""
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def gathered(local: Tensor) -> Tensor:
    """`merged` over the process group, on the CPU of every rank; `local` itself where there is one rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return local.cpu()
    parts: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local.cpu())
    return merged(parts)


def draws_for(generator: nn.Module, seed: int, class_counts: Sequence[int]) -> Draws:
    """Latents, noise and labels on the generator's device. class_counts: images per class of the data set.

    Raises `UserError` for a class-conditional generator without them, or with those of other classes.
    """
    if generator.c_dim != len(class_counts):
        raise UserError(
            f"the model has {generator.c_dim} classes, the data set {len(class_counts)}: its labels are drawn from the "
            "data set, so name the one that it was trained on (without labels for a model without classes)"
        )
    return Draws(seed, next(generator.parameters()).device, class_counts)
