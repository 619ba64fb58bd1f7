"""Directions in W to edit along, their files, and those of an attribute: unit normals of linear SVMs (InterFaceGAN,
1907.10786, §3.1). SeFa's and PCA's are found by `engine/factorised.py`.

For each attribute the 2 % of samples with the highest and the 2 % with the lowest logit are two classes; a linear SVM
(scikit-learn's SVC, C = 1) is fitted to 70 % of them and judged on the rest. Its unit normal d points to *present*.
The unit of an edit is the standard deviation of w along d, so that a strength means the same for every model:

    w ← w + strength · std(w·d) · d

A file (.safetensors) holds one [w_dim] vector per direction, by its name, and as metadata (text → text): format, names,
std, w_dim, samples, snapshot (its sha256), command, kind (absent: svm), that kind's measure of each direction by its
name in MEASURES, and layers (absent: all), for each direction null or [first, last] of the ws that it moves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.attributes import nearest
from hsrgan.engine.tensor_files import one_line, read_safetensors

FORMAT = "hsrgan-directions-1"
SHARE, SPLIT = 0.02, 0.7  # InterFaceGAN's
FEWEST = 10  # samples in each class
MEASURES = {"svm": "accuracy", "sefa": "eigenvalue_share", "pca": "variance_share"}  # kind: what `quality` is
MAKE = "make them with tools/directions.py"

Layers = tuple[int, int]  # the first and the last of the ws, counted from 0


@dataclass(frozen=True)
class Directions:
    """vectors [a, w_dim] of unit length and, for each of the `names`: quality (an SVM's held-out accuracy; a share of
    all eigenvalues, of all variance), and std, the standard deviation of w along the vector. snapshot: sha256 of the
    file whose W this is. samples: how many w's they come from. layers: the ws that they move, None for all.
    """

    names: tuple[str, ...]
    vectors: Tensor
    quality: tuple[float, ...]
    std: tuple[float, ...]
    snapshot: str
    samples: int
    kind: str = "svm"
    layers: tuple[Layers | None, ...] = ()  # () for None everywhere

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", (None,) * len(self.names))

    def shift(self, name: str, strength: float) -> Tensor:
        """What to add to w [w_dim]: `strength` standard deviations towards *present*. Raises `UserError` for an unknown
        name.
        """
        if name not in self.names:
            raise UserError(f"there is no direction {name!r}{nearest(name, self.names)}")
        a = self.names.index(name)
        return self.vectors[a] * (strength * self.std[a])

    def edit(self, name: str, strength: float, num_ws: int) -> Tensor:
        """What to add to ws [num_ws, w_dim]: `shift`, on the ws that the direction moves."""
        edit = self.shift(name, strength).repeat(num_ws, 1)
        first, last = self.layers[self.names.index(name)] or (0, num_ws - 1)
        edit[:first] = edit[last + 1 :] = 0
        return edit

    def expect(self, *, num_ws: int, w_dim: int, snapshot: str, path: Path) -> None:
        """Raise `UserError` unless these directions are of that snapshot's W; `path` is where they came from."""
        if self.vectors.shape[1] != w_dim:
            raise UserError(f"directions {path} have {self.vectors.shape[1]} dimensions, the snapshot's w has {w_dim}: "
                            f"{MAKE} from it")
        if self.snapshot != snapshot:
            raise UserError(f"directions {path} belong to another snapshot (sha256 {self.snapshot[:12]}…, this one is "
                            f"{snapshot[:12]}…): {MAKE} from it")
        if any(layers and layers[1] >= num_ws for layers in self.layers):
            raise UserError(f"directions {path} move ws that the snapshot has not ({num_ws} ws): {MAKE} from it")


def fit_directions(
    w: np.ndarray,
    logits: np.ndarray,
    names: Sequence[str],
    *,
    seed: int,
    snapshot: str,
    progress: Callable[[int], None] = lambda attributes: None,
) -> Directions:
    """Directions from w [n, w_dim] and the logits [n, a] of their images, positive = present.

    progress is told the number of attributes newly done. Raises `UserError` for too few samples.
    """
    size = int(len(w) * SHARE)
    if size < FEWEST:
        raise UserError(f"{len(w)} samples leave {size} at each end of an attribute: take {int(FEWEST / SHARE)} or "
                        "more")
    vectors, accuracies, deviations = [], [], []
    for a in range(len(names)):
        vector, accuracy = _direction(w, logits[:, a], size, np.random.Generator(np.random.Philox([seed, a])))
        vectors.append(vector)
        accuracies.append(accuracy)
        deviations.append(float((w @ vector).std()))
        progress(1)
    stack = torch.from_numpy(np.stack(vectors)).float()
    return Directions(tuple(names), stack, tuple(accuracies), tuple(deviations), snapshot, len(w))


def _direction(w: np.ndarray, score: np.ndarray, size: int, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """The SVM's unit normal [w_dim] towards high scores, and its accuracy on the held-out extremes."""
    from sklearn.svm import SVC

    order = np.argsort(score, kind="stable")
    absent, present = (generator.permutation(end) for end in (order[:size], order[-size:]))
    fitted = round(size * SPLIT)
    train, test = (np.concatenate([absent[part], present[part]]) for part in (slice(fitted), slice(fitted, None)))
    svm = SVC(kernel="linear").fit(w[train], np.repeat([0, 1], len(train) // 2))
    accuracy = svm.score(w[test], np.repeat([0, 1], len(test) // 2))
    return svm.coef_[0] / np.linalg.norm(svm.coef_[0]), float(accuracy)


def save_directions(path: Path, directions: Directions, *, command: str) -> None:
    """Write `directions` whole or not at all; `command` says how they were made."""
    metadata = {"format": FORMAT, "snapshot": directions.snapshot, "command": command}
    metadata["kind"] = directions.kind
    facts = {"names": directions.names, MEASURES[directions.kind]: directions.quality, "std": directions.std}
    facts |= {"w_dim": directions.vectors.shape[1], "samples": directions.samples, "layers": directions.layers}
    metadata |= {key: json.dumps(value) for key, value in facts.items()}
    tensors = {name: vector.clone() for name, vector in zip(directions.names, directions.vectors, strict=True)}
    with written_aside(path) as aside:
        aside.write_bytes(save(tensors, metadata))  # save_file has errors of its own


def load_directions(path: Path | str) -> Directions:
    """The directions of a file. Raises `UserError` for one that is absent, damaged or something else."""
    path = Path(path)
    tensors, metadata = read_safetensors(path, "directions", MAKE)
    if metadata.get("format") != FORMAT:
        has = metadata.get("format")
        raise UserError(f"{path} holds no directions (its format is {has!r}, not {FORMAT!r}): {MAKE}")
    try:
        kind = metadata.get("kind", "svm")
        names, quality, std = (tuple(json.loads(metadata[key])) for key in ("names", MEASURES[kind], "std"))
        layers = tuple(_layers(pair) for pair in json.loads(metadata.get("layers", "[]"))) or (None,) * len(names)
        shape = (len(names), json.loads(metadata["w_dim"]))
        vectors = torch.stack([tensors[name] for name in names])
        if vectors.shape != shape or not len(quality) == len(std) == len(layers) == len(names) == len(tensors):
            raise ValueError(f"it holds {list(vectors.shape)}, its metadata speaks of {list(shape)}")
        samples = json.loads(metadata["samples"])
        return Directions(names, vectors, quality, std, metadata["snapshot"], samples, kind, layers)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"directions {path} are damaged ({one_line(error)}): {MAKE} again") from None


def _layers(pair: object) -> Layers | None:
    if pair is None:
        return None
    first, last = pair
    if not (type(first) is type(last) is int and 0 <= first <= last):
        raise ValueError(f"layers {pair} are no range")
    return first, last
