"""Which image sizes the networks make: a start block of h₀×w₀ pixels, doubled n times.

A size is an int where it is square, else (height, width); in files a list. Block b{r} bears the name r = 4·2^level in
every network: its true size is (h₀·2^level, w₀·2^level), which is r×r where the start block is 4×4. torch is not
imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from hsrgan.engine.errors import UserError

START, MAX_START = 4, 16  # pixels: the least of the start block's smaller side, the most of its larger one
MAX_RESOLUTION = 4096
RULE = f"sides of {START} to {MAX_START} pixels, both doubled equally often and at least once, up to {MAX_RESOLUTION}"

Resolution = int | Sequence[int]


def sides(resolution: Any, name: str = "img_resolution") -> tuple[int, int]:
    """(height, width). Raises `UserError` for what is neither a side in pixels nor a pair of them."""
    pair = (resolution, resolution) if isinstance(resolution, int) else resolution
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(x) is int and x >= 1 for x in pair):
        raise UserError(f"{name} is {resolution!r}, but must be a side in pixels or [height, width]")
    return pair[0], pair[1]


def plain(resolution: Resolution) -> int | list[int]:
    """As files hold it: an int where it is square, else [height, width]."""
    height, width = sides(resolution)
    return height if height == width else [height, width]


def in_words(resolution: Resolution) -> str:
    """Of a message: "16x16", and where the order of the two matters "512x768 (height x width)"."""
    height, width = sides(resolution)
    return f"{height}x{width}" + (" (height x width)" if height != width else "")


def block_sizes(resolution: Any, name: str = "img_resolution") -> dict[int, tuple[int, int]]:
    """{4: (h₀, w₀), 8: …, r: (height, width)}: the blocks of a network, by what their names count.

    n is the largest that leaves whole sides of START pixels or more. Raises `UserError`, which calls the size `name`
    and tells the nearest ones there are, for a size that no start block comes to.
    """
    size = sides(resolution, name)
    n = _doublings(*size)
    if n < 1 or max(size) > MAX_RESOLUTION or max(size) >> n > MAX_START:
        nearest = " and ".join(str(plain(near)) for near in _nearest(*size))
        raise UserError(f"{name} is {plain(size)}, allowed: {RULE}; the nearest: {nearest}")
    return {START << level: (size[0] >> n - level, size[1] >> n - level) for level in range(n + 1)}


def _doublings(height: int, width: int) -> int:
    n = 0
    while height % 2 == width % 2 == 0 and min(height, width) >= 2 * START:
        height, width, n = height // 2, width // 2, n + 1
    return n


def _nearest(height: int, width: int) -> list[tuple[int, int]]:
    """The two allowed sizes whose sides differ least in proportion; squares for a square."""
    starts = product(range(START, MAX_START + 1), repeat=2)
    found = {
        (h << n, w << n)
        for h, w in starts
        if h == w or height != width
        for n in range(1, (MAX_RESOLUTION // max(h, w)).bit_length())
    }
    return sorted(found, key=lambda s: (abs(math.log(s[0] / height)) + abs(math.log(s[1] / width)), s))[:2]
