"""Class-balanced order of a data set's samples: every class equally often, whatever it has of images.

Positions come in rounds of K, the number of classes that have images. A round holds every class once, in an order of
its own; in round r comes the class's sample number r, modulo its size, in an order that changes every time the class
has been gone through. Both orders are permutations that are computed, not stored, so that the image at position p is a
pure function of (seed, p), known at once for any p. Held: 4 bytes an image, shared by the loader's workers.
"""

from __future__ import annotations

import os

import numpy as np

from hsrgan.engine.errors import UserError
from hsrgan.engine.shards import Manifest, Shard
from hsrgan.engine.transport import scheme_of

_MASK = 2**64 - 1
_ROUND, _CLASS, _MIRROR = range(3)  # streams of random bits, kept apart
_OPEN = 256  # shards to keep open: samples of a class lie in all of them


def _mixed(*numbers: int) -> int:
    """64 well-mixed bits: SplitMix64 (Steele et al. 2014) over one number after another."""
    bits = 0
    for number in numbers:
        bits = (bits + number + 0x9E3779B97F4A7C15) & _MASK
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & _MASK
        bits ^= bits >> 31
    return bits


def permuted(i: int, size: int, *key: int) -> int:
    """Where i goes in a permutation of 0 … size − 1 chosen by key: a Feistel network of four rounds over the least even
    number of bits that holds them, walked until it lands inside (Black & Rogaway 2002).
    """
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    low, base = (1 << half) - 1, _mixed(*key)
    while True:
        left, right = i >> half, i & low
        for turn in range(4):
            left, right = right, left ^ (_mixed(base, turn, right) & low)
        i = left << half | right
        if i < size:
            return i


class BalancedPlan:
    """Where the image of each position lies, as `Plan`. Raises `UserError` as `check_balanced`."""

    block = None  # there are none: everything is near
    keep = _OPEN

    def __init__(self, manifest: Manifest, seed: int):
        check_balanced(manifest)
        classes = np.concatenate([_load_classes(manifest, shard) for shard in manifest.shards])
        order = np.argsort(classes, kind="stable")
        sizes = np.bincount(classes[classes >= 0])
        self.seed, self.total = seed, int(sizes.sum())
        self._samples = order[len(order) - self.total :].astype(np.uint32 if len(order) < 2**32 else np.int64)
        ends = np.cumsum(sizes)
        self._classes = [(int(e - n), int(n)) for e, n in zip(ends, sizes, strict=True) if n]  # (first, how many)
        self._ends = np.cumsum([shard.count for shard in manifest.shards])
        self._starts = self._ends - [shard.count for shard in manifest.shards]

    def __getitem__(self, position: int) -> tuple[int, int, bool]:
        turn, i = divmod(position, len(self._classes))
        number = permuted(i, len(self._classes), self.seed, _ROUND, turn)
        first, size = self._classes[number]
        epoch, i = divmod(turn, size)
        sample = int(self._samples[first + permuted(i, size, self.seed, _CLASS, number, epoch)])
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        flip = bool(_mixed(self.seed, _MIRROR, position) >> 63)
        return shard, sample - int(self._starts[shard]), flip


def check_balanced(manifest: Manifest) -> None:
    """Raise `UserError` unless every image here has one class and it is known without reading the image."""
    where = manifest.root
    if not manifest.num_classes:
        raise UserError(f"{where} holds no labels but data.balanced is true: pack with tools/pack.py --labels, or set "
                        "data.balanced=false")
    if manifest.label_sets is not None:
        raise UserError(f"{where} is multi-label but data.balanced is true: classes that come together cannot each "
                        "come equally often, set data.balanced=false")
    for shard in manifest.shards:
        location = manifest.location(shard)
        if scheme_of(location):
            raise UserError(f"{location} is remote but data.balanced is true, which reads samples of all shards in "
                            "turn: copy the shards here, or set data.balanced=false")
        if not (file := manifest.classes_path(shard)).exists():
            raise UserError(f"{file} is missing, which data.balanced needs (older sets lack it): "
                            f"python tools/pack.py {where} --verify makes it")


def _load_classes(manifest: Manifest, shard: Shard) -> np.ndarray:
    file = manifest.classes_path(shard)
    try:
        classes = np.load(file, allow_pickle=False)
        if classes.shape != (shard.count,) or classes.dtype != np.int32:
            raise ValueError(f"{classes.dtype} {classes.shape} instead of int32 ({shard.count},)")
        if classes.max() >= manifest.num_classes:
            raise ValueError(f"class {classes.max()} of {manifest.num_classes}")
    except (OSError, ValueError, EOFError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"{file} is damaged ({reason}): remove it, then python tools/pack.py {manifest.root} --verify "
                        "makes it again") from None
    return classes
