"""Metrics by their published names, parsed without torch: what each needs, and what it gives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from hsrgan.engine.errors import UserError

MOST_KEPT = 200_000  # reals of the metrics that keep features; as published for precision and recall
ALL = 1 << 62
FEWEST = 10  # images of either side

PUBLISHED = (
    "fid50k_full", "fid50k", "kid50k_full", "pr50k3_full", "is50k", "fd_dinov2_50k_full", "fid_infinity",
    "ppl2_wend", "ppl_wfull", "ppl_zfull", "ppl_wend", "ppl_zend", "ls", "als",
)  # fmt: skip
PAIRS, SAMPLES, SEQUENCES = 50_000, 200_000, 1000  # of path length and LS as published; of ALS, which states none


@dataclass(frozen=True)
class Metric:
    """One metric.

    kind: how it is computed: fid, fid_infinity, kid, pr or is; or its published name, for those that take a generator
    and no images. features: the network it is published with, as `load_extractor` takes it; None where kind is a name.
    fakes: how many, or of a generator's own metric how many pairs, samples or sequences; reals: at most how many.
    full: fewer reals will do.
    values: the keys of its results, the first of which stands for it; higher: more of that is better.
    """

    name: str
    kind: str
    features: str | None = None
    fakes: int = 0
    reals: int = 0
    full: bool = False
    values: tuple[str, ...] = ()
    higher: bool = False

    def reals_of(self, available: int, where: str) -> int:
        """How many of the `available` reals it takes. Raises `UserError` for too few."""
        if available < self.reals and not self.full:
            raise UserError(
                f"{self.name} compares with {self.reals:,} real images and {where} holds {available:,}: "
                f"{self.name}_full takes all there are"
            )
        if available < FEWEST:
            raise UserError(f"{self.name} needs {FEWEST} real images or more and {where} holds {available}")
        return min(available, self.reals)


def parse_metrics(text: str) -> list[Metric]:
    """`fid50k_full,pr50k3_full` → two metrics. Raises `UserError` for an unknown name, with the nearest."""
    names = dict.fromkeys(part.strip() for part in text.split(","))
    return [_parse(name) for name in names]


def _parse(name: str) -> Metric:
    for pattern, build in _PATTERNS.items():
        if match := re.fullmatch(pattern, name):
            thousands = match.groupdict().get("k") and 1000
            count = int(match.groupdict().get("n") or 0) * (thousands or 1)
            metric = build(name, count, bool(match.groupdict().get("full")))
            if match.groupdict().get("n") and metric.fakes < FEWEST:
                raise UserError(f"metric {name!r} asks for {count} images: it needs {FEWEST} or more")
            return metric
    nearest = max(PUBLISHED, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())
    raise UserError(
        f"unknown metric {name!r}: did you mean {nearest}? Known: {', '.join(PUBLISHED)}; any number of images as in "
        "fid10k_full, fid1000_full or ppl2_wend10k"
    )


def _fid(name: str, count: int, full: bool) -> Metric:
    return Metric(name, "fid", "inception", count, ALL if full else count, full, (name,))


def _fd_dinov2(name: str, count: int, full: bool) -> Metric:
    return Metric(name, "fid", "dinov2", count, ALL, True, (name,))


def _fid_infinity(name: str, count: int, full: bool) -> Metric:
    return Metric(name, "fid_infinity", "inception", 50_000, ALL, True, (name,))


def _kid(name: str, count: int, full: bool) -> Metric:
    return Metric(name, "kid", "inception", count, MOST_KEPT if full else count, full, (name, f"{name}_std"))


def _pr(name: str, count: int, full: bool) -> Metric:
    values = (f"{name}_precision", f"{name}_recall")
    return Metric(name, "pr", "vgg16", count, MOST_KEPT if full else count, full, values, higher=True)


def _is(name: str, count: int, full: bool) -> Metric:
    return Metric(name, "is", "inception", count, values=(f"{name}_mean", f"{name}_std"), higher=True)


def _path_length(name: str, count: int, full: bool) -> Metric:
    return Metric(name, name.rstrip("0123456789k"), fakes=count or PAIRS, values=(name,))


def _separability(name: str, count: int, full: bool) -> Metric:
    return Metric(name, "ls", fakes=count or SAMPLES, values=(name,))


def _linearity(name: str, count: int, full: bool) -> Metric:
    return Metric(name, "als", fakes=count or SEQUENCES, values=(f"{name}_pairs", f"{name}_edits"))


_PATTERNS: dict[str, Callable[[str, int, bool], Metric]] = {
    r"fid(?P<n>\d+)(?P<k>k?)(?P<full>_full)?": _fid,
    r"kid(?P<n>\d+)(?P<k>k?)(?P<full>_full)?": _kid,
    r"pr(?P<n>\d+)(?P<k>k)3(?P<full>_full)?": _pr,
    r"is(?P<n>\d+)(?P<k>k?)": _is,
    r"fd_dinov2_(?P<n>\d+)(?P<k>k?)_full": _fd_dinov2,
    r"fid_infinity": _fid_infinity,
    r"(ppl2_wend|ppl_[wz](full|end))((?P<n>\d+)(?P<k>k?))?": _path_length,
    r"ls((?P<n>\d+)(?P<k>k?))?": _separability,
    r"als((?P<n>\d+)(?P<k>k?))?": _linearity,
}
