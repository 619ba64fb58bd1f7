"""Labels. That of an image is the set of its classes, a tuple of rising class numbers: (3,) where a data set gives
every image one class, (0, 5) or () where it gives several or none (multi-label). Networks see c, a row of 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsrgan.engine.errors import UserError

Label = tuple[int, ...]

MOST_CLASSES = 100_000  # a larger number is not taken for a class
FILES = ("cls", "json")  # members of a sample in a tar that may hold its label, webdataset's convention first


@dataclass(frozen=True)
class LabelSets:
    """What a multi-label data set holds: every set of classes that occurs, and how many images have it."""

    num_classes: int
    sets: tuple[Label, ...]
    counts: tuple[int, ...]

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Images that have each class, perhaps beside others."""
        found = np.zeros(self.num_classes, np.int64)
        for label, count in zip(self.sets, self.counts, strict=True):
            found[list(label)] += count
        return tuple(found.tolist())


ClassCounts = Sequence[int] | LabelSets  # images per class, or per set of classes: labels are drawn as these have them


def to_text(label: Label) -> str:
    """(0, 5) as "0 5", which JSON takes for a key."""
    return " ".join(map(str, label))


def from_text(text: str) -> Label:
    label = tuple(map(int, text.split()))
    if any(b <= a for a, b in zip((-1, *label), label, strict=False)):
        raise ValueError(f"{text!r} is no set of classes")
    return label


def is_multi_label(labels: Iterable[Label]) -> bool:
    return any(len(label) != 1 for label in labels)


def counts_of(labels: Mapping[Label, int], num_classes: int) -> ClassCounts:
    """From how often each label occurs."""
    if is_multi_label(labels):
        return LabelSets(num_classes, *zip(*sorted(labels.items()), strict=True))
    return tuple(labels.get((i,), 0) for i in range(num_classes))


def read_label(files: Mapping[str, bytes]) -> Label:
    """Of a sample's files by suffix: `cls` holds a class, `json` {"label": 3} or {"labels": [0, 5]}.

    Raises `ValueError`, which goes on from "sample 3 of 00001.tar".
    """
    if "cls" in files:
        text = files["cls"].strip()
        if not text.isdigit():
            raise ValueError(f"has the label {text!r}, which is no class number")
        return (int(text),)
    if "json" not in files:
        raise ValueError("has no label")
    try:
        content = json.loads(files["json"])
    except (ValueError, RecursionError):
        raise ValueError("has a .json file that is no JSON") from None
    given = [content[key] for key in ("label", "labels") if key in content] if isinstance(content, dict) else []
    if len(given) != 1:
        raise ValueError(f"has a .json file with {'both label and labels' if given else 'no label'}")
    numbers = given if "label" in content else given[0]
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        form = '{"label": 3} or {"labels": [0, 5]} with class numbers'
        raise ValueError(f"has the label {given[0]!r}, not of the form {form}")
    label = tuple(sorted(set(numbers)))
    if len(label) != len(numbers):
        raise ValueError(f"has the label {given[0]!r}, which names a class twice")
    return label


def multi_hot(labels: Sequence[Label], num_classes: int) -> np.ndarray:
    """c, float32 [N, num_classes]."""
    c = np.zeros((len(labels), num_classes), np.float32)
    c[[row for row, label in enumerate(labels) for _ in label], [i for label in labels for i in label]] = 1
    return c


def name_of(label: Label, class_names: Sequence[str]) -> str:
    """For people: `cat`, `cat+indoors`, `none`."""
    return "+".join(class_names[i] if i < len(class_names) else str(i) for i in label) or "none"


def parse_label(text: str, num_classes: int, class_names: Sequence[str], *, several: bool, where: str) -> Label:
    """A class by its number or name or, where there may be `several`, some with commas between.

    Raises `UserError`, which begins with `where`.
    """
    label = set()
    for part in (part.strip() for part in (text.split(",") if several else [text])):
        if part.isdecimal() and int(part) < num_classes:
            label.add(int(part))
        elif part in class_names:
            label.add(list(class_names).index(part))
        else:
            what = "give some of them with commas between, or all" if several else "give one, or all"
            named = f" ({', '.join(class_names[:5])}{', …' if num_classes > 5 else ''})" if class_names else ""
            raise UserError(f"{where} has the classes 0 to {num_classes - 1}{named}, not {part!r}; {what}")
    return tuple(sorted(label))
