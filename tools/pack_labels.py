"""The labels of a dataset.json, read as a stream: what is kept of an image is 4 bytes, and each different label once.

NVIDIA's {"labels": [["00000/img0.png", 3], …]}. A label is a class number; where images have several classes, or none,
a list of class numbers; or a vector, a list with a 0 or 1 for every class.
"""

from __future__ import annotations

import codecs
import json
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from json.decoder import WHITESPACE
from pathlib import Path

import numpy as np

from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import MOST_CLASSES, Label, is_multi_label

CHUNK = 1 << 16  # characters read at a time
_FORM = '{"labels": [["a.png", 3], …]}'
_REMEDY = "mend it, or pack with --no-labels"


class _Json:
    """The values of a JSON text, one after another, holding little more of it than the one at hand."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._text, self._at = codecs.iterdecode(chunks, "utf-8-sig"), "", 0

    def _more(self, least: int) -> bool:
        """Read on by at least so many characters, if there are; whether there were any."""
        parts, length = [self._text[self._at :]], 0
        for chunk in self._chunks:
            parts.append(chunk)
            length += len(chunk)
            if length >= least:
                break
        if length:
            self._text, self._at = "".join(parts), 0
        return length > 0

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            self._at = WHITESPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or not self._more(CHUNK):
                return self._text[self._at : self._at + 1]

    def take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            raise ValueError(f"{repr(found) if found else 'its end'} where {wanted!r} should be")
        self._at += 1

    def value(self) -> object:
        self.peek()
        least = CHUNK
        while True:
            fault = None
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                if end < len(self._text):  # a number may go on in the next chunk
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                fault = error
            if not self._more(least):
                if fault:
                    raise ValueError("it is cut off or no JSON") from fault
                self._at = end
                return value
            least *= 2

    def within(self, begin: str, end: str) -> Iterator[None]:
        """Stops at every item of an array or object, for the caller to read."""
        self.take(begin)
        while self.peek() != end:
            yield
            if self.peek() != end:
                self.take(",")
        self.take(end)


def _pairs(chunks: Iterator[bytes]) -> Iterator[tuple[str, object]]:
    """(name, label) in the order of the file, none where it says that there are none. Raises `ValueError`."""
    text, found = _Json(chunks), False
    for _ in text.within("{", "}"):
        key = text.value()
        text.take(":")
        if key != "labels" or text.peek() == "n":
            found |= text.value() is None and key == "labels"
            continue
        found = True
        for _ in text.within("[", "]"):
            item = text.value()
            if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
                raise ValueError(f"{json.dumps(item)[:80]} is no pair of a name and a label")
            yield item[0].replace("\\", "/"), item[1]
    if not found:
        raise ValueError("it has no list of labels")


def read_labels(
    path: Path, chunks: Iterator[bytes], names: Sequence[str]
) -> tuple[np.ndarray, tuple[Label, ...] | None, int] | None:
    """(int32 [N] of the sorted `names`, label sets or None, number of classes) from the bytes of `path`'s dataset.json.

    With label sets the data set is multi-label, and an image's number is that of its set; without, it is its class.
    None where the file says that there are no labels. Raises `UserError`.
    """

    def wrong(text: object) -> UserError:
        return UserError(f"dataset.json in {path} {text}: {_REMEDY}")

    numbers = np.full(len(names), -1, np.int32)
    known: dict[bytes, int] = {}  # uint32 of a label, behind them one more that says which form it has
    rows = 0
    try:
        for name, label in _pairs(chunks):
            rows += 1
            at = bisect_left(names, name)
            if at < len(names) and names[at] == name:
                try:
                    numbers[at] = known.setdefault(_key(label), len(known))
                except ValueError as fault:
                    raise wrong(f"gives {name} the label {json.dumps(label)[:80]}, {fault}") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as fault:
        raise wrong(f"is not of the form {_FORM} ({fault})") from None
    if not rows:
        return None
    if (unlisted := np.flatnonzero(numbers < 0)).size:
        raise wrong(f"does not list {names[unlisted[0]]}")
    try:
        labels, num_classes = _meant(list(known))
    except ValueError as fault:
        raise wrong(fault) from None
    if not num_classes:
        raise wrong("gives every image a list of no classes")
    if not is_multi_label(labels):
        return np.array([label[0] for label in labels], np.int32)[numbers], None, num_classes
    sets = tuple(sorted(set(labels)))
    place = {label: i for i, label in enumerate(sets)}
    return np.array([place[label] for label in labels], np.int32)[numbers], sets, num_classes


_CLASS, _LIST, _VECTOR = range(3)


def _key(label: object) -> bytes:
    """Raises `ValueError`, which goes on from the label."""
    values, form = (label, _LIST) if isinstance(label, list) else ([label], _CLASS)
    kinds = {type(value) for value in values}
    if form == _LIST and float in kinds and kinds <= {int, float}:
        form = _VECTOR
        if any(value not in (0, 1) for value in values):
            raise ValueError("a vector of other values than 0 and 1")
    elif not kinds <= {int} or any(value < 0 for value in values):
        raise ValueError("no whole number" if form == _CLASS else "no list of whole numbers")
    if form != _VECTOR and max(values, default=0) >= MOST_CLASSES:
        raise ValueError(f"whose class is not below {MOST_CLASSES}")
    return array("I", [*map(int, values), form]).tobytes()


def _meant(keys: list[bytes]) -> tuple[list[Label], int]:
    """What each label means, which the others decide where it is a list of 0 and 1; and the number of classes.

    Raises `ValueError`, which goes on from the file.
    """
    rows = [array("I", key) for key in keys]
    lists = [row[:-1].tolist() for row in rows if row[-1] != _CLASS]
    are_vectors = any(row[-1] == _VECTOR for row in rows)
    if lists and len({len(values) for values in lists}) == 1 and not any(v > 1 for values in lists for v in values):
        repeats = any(len(set(values)) < len(values) for values in lists)
        if not are_vectors and not repeats and lists[0]:
            raise ValueError(f"has lists like {lists[0]}, which may be class numbers or a 0 or 1 for every class: "
                             "write 0.0 and 1.0 for the latter, and for one class its number alone")
        are_vectors |= repeats
    if not are_vectors:
        for values in lists:
            if len(set(values)) < len(values):
                raise ValueError(f"has the list {values}, which names a class twice")
        return [tuple(sorted(row[:-1])) for row in rows], 1 + max((n for row in rows for n in row[:-1]), default=-1)
    if len(lists) < len(rows):
        raise ValueError("has numbers beside vectors with a 0 or 1 for every class")
    if len({len(values) for values in lists}) > 1 or any(v > 1 for values in lists for v in values):
        raise ValueError("has vectors of different lengths, or class numbers beside vectors")
    return [tuple(i for i, value in enumerate(values) if value) for values in lists], len(lists[0])
