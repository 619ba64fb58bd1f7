"""Directions in W along which one attribute changes: unit normals of linear SVMs (InterFaceGAN, 1907.10786, §3.1).

For each attribute the 2 % of samples with the highest and the 2 % with the lowest logit are two classes; a linear SVM
(scikit-learn's SVC, C = 1) is fitted to 70 % of them and judged on the rest. Its unit normal d points to *present*.
The unit of an edit is the standard deviation of w along d, so that a strength means the same for every model:

    w ← w + strength · std(w·d) · d

A file (.safetensors) holds one [w_dim] vector per attribute, by its name, and as metadata (text → text): format, names,
accuracy, std, w_dim, samples, snapshot (its sha256) and command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.attributes import nearest
from hsrgan.engine.tensor_files import one_line, read_safetensors

FORMAT = "hsrgan-directions-1"
SHARE, SPLIT = 0.02, 0.7  # InterFaceGAN's
FEWEST = 10  # samples in each class


@dataclass(frozen=True)
class Directions:
    """vectors [a, w_dim] of unit length and, for each of the `names`: the SVM's held-out accuracy, and std, the
    standard deviation of w along the vector. snapshot: sha256 of the file whose W this is. samples: how many w's they
    come from.
    """

    names: tuple[str, ...]
    vectors: Tensor
    accuracy: tuple[float, ...]
    std: tuple[float, ...]
    snapshot: str
    samples: int

    def shift(self, name: str, strength: float) -> Tensor:
        """What to add to w [w_dim]: `strength` standard deviations towards *present*. Raises `UserError` for an unknown
        name.
        """
        if name not in self.names:
            raise UserError(f"there is no direction {name!r}{nearest(name, self.names)}")
        a = self.names.index(name)
        return self.vectors[a] * (strength * self.std[a])

    def expect(self, *, w_dim: int, snapshot: str, path: Path) -> None:
        """Raise `UserError` unless these directions are of that snapshot's W; `path` is where they came from."""
        if self.vectors.shape[1] != w_dim:
            raise UserError(f"directions {path} have {self.vectors.shape[1]} dimensions, the snapshot's w has {w_dim}: "
                            "fit them to it with tools/fit_directions.py")
        if self.snapshot != snapshot:
            raise UserError(f"directions {path} belong to another snapshot (sha256 {self.snapshot[:12]}…, this one is "
                            f"{snapshot[:12]}…): fit them to it with tools/fit_directions.py")


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
    facts = {"names": directions.names, "accuracy": directions.accuracy, "std": directions.std}
    facts |= {"w_dim": directions.vectors.shape[1], "samples": directions.samples}
    metadata |= {key: json.dumps(value) for key, value in facts.items()}
    tensors = {name: vector.clone() for name, vector in zip(directions.names, directions.vectors, strict=True)}
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata)


def load_directions(path: Path | str) -> Directions:
    """The directions of a file. Raises `UserError` for one that is absent, damaged or something else."""
    path = Path(path)
    tensors, metadata = read_safetensors(path, "directions", "make them with tools/fit_directions.py")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} holds no directions (its format is {metadata.get('format')!r}, not {FORMAT!r}): make "
                        "them with tools/fit_directions.py")
    try:
        names, accuracy, std = (tuple(json.loads(metadata[key])) for key in ("names", "accuracy", "std"))
        shape = (len(names), json.loads(metadata["w_dim"]))
        vectors = torch.stack([tensors[name] for name in names])
        if vectors.shape != shape or not len(accuracy) == len(std) == len(names) == len(tensors):
            raise ValueError(f"it holds {list(vectors.shape)}, its metadata speaks of {list(shape)}")
        return Directions(names, vectors, accuracy, std, metadata["snapshot"], json.loads(metadata["samples"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"directions {path} are damaged ({one_line(error)}): make them again with "
                        "tools/fit_directions.py") from None
