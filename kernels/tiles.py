"""How pointwise kernels walk tensors [N, C, ...] of any strides: samples × channels × pixels, in two-dimensional tiles.

A tile is [pixels × channels], so that no kernel computes `i % C`: with channels_last strides the channels of a tile lie
side by side in memory, with NCHW strides its pixels do, and 16-byte accesses come of themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Walk:
    """The common shape of some tensors, and the strides of each."""

    samples: int
    channels: int
    pixels: int  # of a sample
    width: int  # a pixel is (pixel // width, pixel % width) where `split`
    split: bool  # False: one stride tells where a pixel lies
    strides: tuple[tuple[int, int, int, int], ...]  # of each tensor: sample, channel, row of pixels, pixel


def walk(shape: Sequence[int], tensors: Sequence[Tensor | None], *, per_sample: bool) -> Walk:
    """The walk over tensors of one shape [N, C, ...] (expanded views are welcome; None has strides of 0).

    per_sample=False: if no stride forbids it all samples' pixels are walked as those of one sample. ValueError for
    tensors whose pixels need more than two strides, which no layout of [N, C, H, W] does.
    """
    n, c, *sizes = shape
    strides = [(0,) * len(shape) if t is None else t.stride() for t in tensors]
    if not per_sample:
        sizes_all, strides_all = _merge([n, *sizes], [(s[0], *s[2:]) for s in strides])
        if len(sizes_all) < 2:
            pixels = math.prod(sizes_all)
            flat = tuple((0, s[1], 0, *(p or (0,))) for s, p in zip(strides, strides_all, strict=True))
            return Walk(1, c, pixels, pixels, False, flat)
    sizes, inner = _merge(sizes, [s[2:] for s in strides])
    if len(sizes) > 2:
        raise ValueError(f"the pixels of a tensor of shape {list(shape)} need {len(sizes)} strides; 2 are supported")
    padded = [(0,) * (2 - len(p)) + tuple(p) for p in inner]
    both = tuple((s[0], s[1], *p) for s, p in zip(strides, padded, strict=True))
    return Walk(n, c, math.prod(sizes), sizes[-1] if sizes else 1, len(sizes) == 2, both)


def _merge(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Join neighbouring dimensions wherever every tensor steps through them evenly; drop those of size 1."""
    kept = [i for i, size in enumerate(sizes) if size != 1]
    merged_sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for i in reversed(kept):
        even = merged_sizes and all(s[i] == m[0] * merged_sizes[0] for s, m in zip(strides, merged, strict=True))
        if even:
            merged_sizes[0] *= sizes[i]
        else:
            merged_sizes.insert(0, sizes[i])
            for s, m in zip(strides, merged, strict=True):
                m.insert(0, s[i])
    return merged_sizes, [tuple(m) for m in merged]


def channels_fastest(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Do the channels of a tensor [N, C, ...] lie closer together than its pixels?"""
    return all(strides[1] < stride for size, stride in zip(shape[2:], strides[2:], strict=True) if size > 1)


def is_nhwc(t: Tensor) -> bool:
    """Do the channels of t [N, C, H, W] lie closer together than its columns?"""
    return t.stride(1) < t.stride(3)


def tile(channels: int, pixels: int, by_channels: bool, elements: int) -> tuple[int, int]:
    """(pixels, channels) of a tile of at most `elements`: powers of two, filled along the fastest dimension first.

    channels_last: 64 channels, or 32 where those divide the number of channels and 64 do not: whole 128-byte lines of
    half precision. Where the pixels run out the tile takes more channels.
    """
    if not by_channels:
        block_p = min(power_of_two(pixels), elements)
        return block_p, min(power_of_two(channels), elements // block_p)
    block_c = 32 if channels % 64 and channels % 32 == 0 else min(power_of_two(channels), 64)
    block_p = min(power_of_two(pixels), elements // block_c)
    return block_p, max(block_c, min(power_of_two(channels), elements // block_p))


def tile_of_sums(channels: int, pixels: int, by_channels: bool, elements: int) -> tuple[int, int]:
    """`tile` for a kernel that adds up over channels: half of it, and at most 2048 elements, where registers keep the
    sums from block to block."""
    found = tile(channels, pixels, by_channels, elements)
    return found if found[1] >= channels else tile(channels, pixels, by_channels, min(elements // 2, 2048))


def tiles_per_program(tiles: int) -> int:
    """How many tiles a program with sums of its own goes through, of `tiles` in all: a power of two up to 32.

    More tiles mean fewer partial sums in memory, and fewer instructions for adding up what the threads summed; at
    least 4096 programs (about 2 rounds of a large GPU) are kept.
    """
    return 2 ** min(5, max(0, (tiles // 4096).bit_length() - 1))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()
