"""Snapshots: the averaged generator as one .safetensors file, with all that is needed to use it as metadata.

The file holds the generator's state dict in fp32 (fp16 where tools/export.py was told so) under the published StyleGAN2
keys. Its metadata (text → text): `format`, `generator` (JSON of the constructor's arguments), `recipe` (JSON of the
resolved recipe), `kimg`, `dataset` (JSON: class_names, resolution and so on), `score` where it was scored (JSON: a
result of tools/eval.py), and `power` where it is a power-function average (JSON: its length and the images seen).
Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Generator

FORMAT = "hsrgan-snapshot-1"


def save_snapshot(
    path: Path | str,
    generator: nn.Module,
    *,
    recipe_json: str,
    kimg: float,
    dataset: dict,
    score: dict | None = None,
    power: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `generator` (with `init_kwargs`) to `path`, whole or not at all.

    recipe_json: the resolved recipe. dataset: JSON-able facts about the training images. score: a metric's result.
    power: of a power-function average, what it is. dtype: of the tensors in the file; they are loaded as fp32.
    Raises `UserError` where the folder refuses.
    """
    metadata = {
        "format": FORMAT,
        "generator": json.dumps(generator.init_kwargs),
        "recipe": recipe_json,
        "kimg": repr(float(kimg)),
        "dataset": json.dumps(dataset),
    }
    metadata |= {key: json.dumps(value) for key, value in (("score", score), ("power", power)) if value is not None}
    tensors = {key: own_copy(value, dtype) for key, value in generator.state_dict().items()}
    with written_aside(Path(path)) as aside:
        aside.write_bytes(save(tensors, metadata))  # save_file has errors of its own for a full disk


def own_copy(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU in memory of its own (safetensors refuses shared storage, such as one filter for all layers)."""
    return value.detach().to("cpu", dtype, copy=True).contiguous()


def load_snapshot(path: Path | str) -> tuple[Generator, dict]:
    """The generator of a snapshot, in eval mode, without gradients, on the CPU; and its metadata (`read_metadata`).

    Raises `UserError` as `read_metadata` does, and for one whose tensors do not fit the configuration it names.
    """
    path = Path(path)
    with _opened(path) as file:  # once: the snapshot of the best score may be replaced between two looks at it
        metadata, tensors = _metadata(path, file), _tensors(file)
    try:
        generator = Generator(**metadata["generator"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_generator(path, error) from error
    _check_fit(path, generator.state_dict(), tensors)
    generator.load_state_dict(tensors)
    return generator.eval().requires_grad_(False), metadata


def read_metadata(path: Path | str) -> dict:
    """A snapshot's metadata, parsed: `format` str, `generator` dict, `recipe` dict, `kimg` float, `dataset` dict, and
    the dicts `score` and `power` where it has them.

    Raises `UserError` for a missing file, one that is not safetensors or is cut short, and one that is not a snapshot.
    """
    path = Path(path)
    with _opened(path) as file:
        return _metadata(path, file)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A snapshot's state dict."""
    with _opened(path) as file:
        return _tensors(file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if os.path.isdir(path):
        raise UserError(f"snapshot {path} is a folder: name the .safetensors file in it")
    if not os.path.isfile(path):  # which, unlike Path.is_file, never raises
        raise UserError(f"snapshot {path}: no such file; give a .safetensors file from a run's snapshots folder")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"snapshot {path}: not a whole safetensors file ({error}); copy or make it again") from error


def _tensors(file: safe_open) -> dict[str, torch.Tensor]:
    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def _metadata(path: Path, file: safe_open) -> dict:
    metadata = dict(file.metadata() or {})
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"snapshot {path}: its format is {metadata.get('format', 'not stated')}, not {FORMAT}; "
            "give a file from a run's snapshots folder"
        )
    try:
        for key in ("generator", "recipe", "dataset", *({"score", "power"} & metadata.keys())):
            metadata[key] = json.loads(metadata[key])
            if not isinstance(metadata[key], dict):
                raise TypeError(f"{key} is a {type(metadata[key]).__name__}, not a dict")
        metadata["kimg"] = float(metadata["kimg"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _no_generator(path, error) from error
    return metadata


def _no_generator(path: Path, error: Exception) -> UserError:
    return UserError(f"snapshot {path}: its metadata does not describe a generator ({error!r})")


def _check_fit(path: Path, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Refuse tensors whose names or shapes are not exactly those of the generator in the metadata."""
    wrong = [f"{key} is missing" for key in expected.keys() - found.keys()]
    wrong += [f"{key} is not part of it" for key in found.keys() - expected.keys()]
    wrong += [
        f"{key} is {list(found[key].shape)}, not {list(expected[key].shape)}"
        for key in expected.keys() & found.keys()
        if found[key].shape != expected[key].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"snapshot {path}: tensors do not fit the generator its metadata describes: {min(wrong)}{more}; "
            "the file was put together from two models: save the snapshot again"
        )
