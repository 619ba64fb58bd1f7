"""The random numbers that ADA's 18 transforms (arXiv 2006.06676, appendix B) are made of, a row an image, by name.

A transform is gated on its own, by a uniform number below p: arithmetic, since p is a value of the device. A row holds
every transform's numbers whatever the pipe, so that an image's draws do not depend on which others are on.
"""

from __future__ import annotations

from torch import Tensor

UNIFORM = (  # in [0, 1); a name with a ? is a gate
    "flip?", "flip", "turn?", "turn", "jump?", "jump_x", "jump_y",
    "scale?", "spin?", "spin", "stretch?", "respin?", "respin", "move?",
    "brightness?", "contrast?", "luma?", "luma", "hue?", "hue", "saturation?",
    "band0?", "band1?", "band2?", "band3?", "noise?", "cutout?", "cutout_x", "cutout_y",
)  # fmt: skip
NORMAL = (
    "scale", "stretch", "move_x", "move_y", "brightness", "contrast", "saturation",
    "band0", "band1", "band2", "band3", "noise",
)  # fmt: skip

_COLUMN = {name: column for column, name in enumerate(UNIFORM + NORMAL)}


class Numbers:
    """values [n, len(UNIFORM) + len(NORMAL)]; p [], the probability of each transform."""

    def __init__(self, values: Tensor, p: Tensor) -> None:
        self.values, self.p = values, p

    def __getitem__(self, name: str) -> Tensor:
        """[n]."""
        return self.values[:, _COLUMN[name]]

    def gated(self, gate: str, value: Tensor, neutral: float, p: Tensor | None = None) -> Tensor:
        """`value` [n, …] in the images whose gate is below p, `neutral` in the others."""
        closed = self[gate] >= (self.p if p is None else p)
        return value.masked_fill(closed.view(-1, *[1] * (value.ndim - 1)), neutral)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a·b of [n, k, k] matrices, never in TF32, whose 10 bits of mantissa would move pixels."""
    return (a[:, :, :, None] * b[:, None]).sum(2)
