"""Files of tensors, some of them other people's: read without executing anything, and refused in one line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hsrgan.engine.errors import UserError


def read_safetensors(path: Path, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, on the CPU. Raises `UserError` for one that is absent or damaged.

    what: the file's role, which begins the message; remedy: what to do where it is absent.
    """
    _must_exist(path, what, remedy)
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what} {path} is damaged or no safetensors file ({one_line(error)}): copy it or make it "
                        "again") from None


def read_pth(path: Path, what: str, remedy: str) -> object:
    """What torch.save wrote, as far as it is tensors and plain Python. Raises `UserError` for anything else."""
    _must_exist(path, what, remedy)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, or a pickle of something other than tensors
        raise UserError(f"{what} {path} cannot be read as plain tensors ({one_line(error)}): save its state dict as "
                        ".safetensors") from None


def misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first difference between what a network expects and what a file holds, in words; None where they agree."""
    if missing := [k for k in expected if k not in found]:
        return f"it lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}"
    if extra := [k for k in found if k not in expected]:
        return f"{len(extra)} tensors are none of the model's, first {extra[0]}"
    for k, v in expected.items():
        if v.shape != found[k].shape:
            return f"{k} is {list(found[k].shape)} there and {list(v.shape)} here"
    return None


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:199] + "…"


def _must_exist(path: Path, what: str, remedy: str) -> None:
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist: {remedy}")
