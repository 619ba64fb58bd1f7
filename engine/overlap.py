"""Which part of a trained tensor starts the tensor of the same name in another network.

Tensors of one shape are copied to the last bit. Where shapes differ, what both have is copied: the first channels of
either, the labels of the same name, the latent's and the label's part of the mapping network apart. The rest follows
two rules of how equalised layers compute, act(x·(w/√in)ᵀ + b) (arXiv 1710.10196, §4.1):

- More inputs, n → m: a new input starts with weight 0, and what is copied is multiplied by √(m/n), which the layer's
  1/√m undoes: the outputs that are copied begin as the function that they were (function-preserving widening, as in
  Net2Net, arXiv 1511.05641). Demodulated layers divide by their own norm and so need no factor. New outputs are as
  initialised: they feed new inputs, whose weight is 0 until training moves it.
- Fewer inputs: what is copied stays as it is; 1/√m then keeps the variance of the output, though not its value.

In G both are exact for the layers widened; D's minibatch std averages over new channels too. What has pixels (the
learned constant, the constant noise, a convolution's kernel, D's first fully connected layer) is new where their number
differs. D's heads on a teacher are carried only if all of them fit, since a part of a random projection is another one
and a spectral norm holds for its own weight alone; but for what they know of labels. Heads on another teacher, or on
other layers of it, are new even where they would fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HEADS = ("projected.", "vision_aided.")  # D's on teachers
DEMODULATED = re.compile(r"synthesis\.b\d+\.conv[01]\.weight")
Run = tuple[int, int, int]  # first index here, first index there, how many


class OtherFilter(ValueError):
    """The tensor is a resampling filter that these layers do not compute."""


@dataclass(frozen=True)
class Carried:
    """tensor: what the network starts from, None where nothing is carried. count: elements of the source in it. why:
    what is not as it was there, "" where it is the same to the last bit.
    """

    tensor: Tensor | None
    count: int = 0
    why: str = ""


@dataclass(frozen=True)
class Pair:
    """The state dicts of one network here and there, under published names, and the names of either's classes, empty
    where they are not known. strangers: by the beginning of their tensors' names, the heads that were made for
    something else there, and for what.
    """

    here: Mapping[str, Tensor]
    there: Mapping[str, Tensor]
    classes_here: Sequence[str] = ()
    classes_there: Sequence[str] = ()
    strangers: Mapping[str, str] = field(default_factory=dict)

    def carry(self, key: str) -> Carried:
        """What `key`, which both have, starts from. Raises OtherFilter."""
        if why := next((why for prefix, why in self.strangers.items() if key.startswith(prefix)), None):
            return Carried(None, why=why)
        new, old = self.here[key], self.there[key].float()
        if key.endswith("resample_filter"):
            if new.shape != old.shape or not torch.allclose(new.cpu(), old, atol=1e-6):
                raise OtherFilter(key)
            return Carried(old, old.numel())
        if key.startswith("b4.out.") and self._labelled(self.here) != self._labelled(self.there):
            return Carried(None, why="with labels D's last layer is another one than without")
        if key.startswith(HEADS) and not self._same_heads(key.split(".")[0]):
            return Carried(None, why="heads of another shape")
        if key.endswith("embed.weight"):
            return self._embedding(key, new, old)
        if new.ndim != old.ndim:
            return Carried(None, why="another number of dimensions")
        if key.endswith("noise_const") or key.startswith("heads."):
            return _whole(new, old, "another size")
        if _pixels(key, new) != _pixels(key, old):
            return Carried(None, why="another number of pixels")
        return self._slice(key, new, old)

    def _slice(self, key: str, new: Tensor, old: Tensor) -> Carried:
        rows = min(len(new), len(old)) if new.ndim else 0
        inputs = new.ndim in (2, 4)
        runs: list[Run] | None = self._inputs(key) if inputs else []
        if runs is None:
            return Carried(None, why="another number of pixels")
        if new.shape == old.shape and (not inputs or runs == [(0, 0, new.shape[1])]):
            return Carried(old, old.numel())
        tensor = new.detach().cpu().clone()
        if not inputs:
            tensor[:rows] = old[:rows]
            return Carried(tensor, old[:rows].numel(), f"{rows} of {len(new)}, from {len(old)}")
        n, m = old.shape[1], new.shape[1]
        factor = math.sqrt(m / n) if m > n and not DEMODULATED.fullmatch(key) else 1.0
        tensor[:rows] = 0  # of new inputs
        for here, there, count in runs:
            tensor[:rows, here : here + count] = old[:rows, there : there + count] * factor
        width = sum(count for *_, count in runs)
        scaled = f", times √({m}/{n})" if factor != 1 else ""
        why = f"{rows}×{width} of {len(new)}×{m}, from {len(old)}×{n}{scaled}"
        return Carried(tensor, rows * width * math.prod(new.shape[2:]), why)

    def _inputs(self, key: str) -> list[Run] | None:
        """Which inputs of a weight [out, in, …] are the same ones; None where they are not to be told apart."""
        m, n = self.here[key].shape[1], self.there[key].shape[1]
        if key == "mapping.fc0.weight":  # [latent | embedded label]
            label_here, label_there = self._label_width(self.here), self._label_width(self.there)
            z_here, z_there = m - label_here, n - label_there
            parts = [(0, 0, min(z_here, z_there)), (z_here, z_there, min(label_here, label_there))]
            runs = [part for part in parts if part[2] > 0]
            return [(0, 0, m)] if z_here == z_there and label_here == label_there else runs
        if key == "b4.conv.weight":  # the last channel is the minibatch standard deviation
            return [(0, 0, m)] if m == n else [(0, 0, min(m, n) - 1), (m - 1, n - 1, 1)]
        if key == "b4.fc.weight":  # [channel · pixels]
            pixels = [width / len(side["b4.conv.weight"]) for side, width in ((self.here, m), (self.there, n))]
            return [(0, 0, min(m, n))] if pixels[0] == pixels[1] else None
        return [(0, 0, min(m, n))]

    def _same_heads(self, name: str) -> bool:
        """Whether D's heads `name` are of the same shapes here and there, but for the number of labels."""
        here, there = (
            {key: value.shape for key, value in side.items()
             if key.startswith(f"{name}.") and not key.endswith("embed.weight")}
            for side in (self.here, self.there)
        )  # fmt: skip
        return here == there

    def _embedding(self, key: str, new: Tensor, old: Tensor) -> Carried:
        """A column for each class. By name where both sides name them, else by position if there are as many; a class
        keeps its embedding, w/√classes + b.
        """
        m, n = new.shape[1], old.shape[1]
        ours, theirs = (list(names) if len(set(names)) == width else [] for names, width in
                        ((self.classes_here, m), (self.classes_there, n)))  # fmt: skip
        if not (ours and theirs) or ours == theirs:
            if m != n:
                return Carried(None, why=f"{m} classes, {n} there, which no names match")
            return self._slice(key, new, old)
        shared = [name for name in ours if name in theirs]
        if not shared:
            return Carried(None, why="no class there has the name of one here")
        rows, factor = min(len(new), len(old)), math.sqrt(m / n)
        here, there = ([side.index(name) for name in shared] for side in (ours, theirs))
        tensor = new.detach().cpu().clone()
        tensor[:rows, here] = old[:rows, there] * factor
        scaled = f", times √({m}/{n})" if m != n else ""
        return Carried(tensor, rows * len(shared), f"{len(shared)} of {m} classes, by name, from {n}{scaled}")

    @staticmethod
    def _labelled(side: Mapping[str, Tensor]) -> bool:
        return "mapping.embed.weight" in side

    @staticmethod
    def _label_width(side: Mapping[str, Tensor]) -> int:
        return len(side["mapping.embed.weight"]) if "mapping.embed.weight" in side else 0


def _whole(new: Tensor, old: Tensor, why: str) -> Carried:
    return Carried(old, old.numel()) if new.shape == old.shape else Carried(None, why=why)


def _pixels(key: str, tensor: Tensor) -> torch.Size:
    """The sizes of a tensor that are not channels: those of a constant [C, h, w] or of a kernel [out, in, k, k]."""
    return tensor.shape[1:] if key.endswith("const") else tensor.shape[2:]
