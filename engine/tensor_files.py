"""Tensors out of files, without executing anything in them, and what is wrong with them for a network."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hsrgan.engine.errors import UserError


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a .safetensors file; UserError when it is absent or damaged."""
    _must_exist(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights file {path} is damaged or no safetensors file ({one_line(error)}): copy it or make "
                        "it again") from None


def read_pth(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pth file of plain tensors, unwrapped; a pickle of anything else is refused unexecuted."""
    _must_exist(path)
    if _is_torchscript(path):
        raise UserError(f"weights file {path} is a TorchScript archive, which holds code that would be run: save its "
                        "state dict as .safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load's thoughts on old pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, or a pickle of something other than tensors
        raise UserError(f"weights file {path} cannot be read as plain tensors ({_refusal(error)}): save its state dict "
                        "as .safetensors") from None
    for key in ("state_dict", "model", "teacher"):  # training checkpoints wrap the weights
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"weights file {path} holds a {type(content).__name__}, not a state dict of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"weights file {path} is no state dict of tensors: its {key!r} is a {type(value).__name__}")
    return {k.removeprefix("module.").removeprefix("backbone."): v for k, v in content.items()}


def misfit(want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> str | None:
    """How the names or shapes of `have` differ from those of `want`, in a few words; None when they do not."""
    if missing := [k for k in want if k not in have]:
        return f"it lacks {len(missing)} of {len(want)} tensors, first {missing[0]}"
    if extra := [k for k in have if k not in want]:
        return f"{len(extra)} tensors are none of the model's, first {extra[0]}"
    for k, v in want.items():
        if v.shape != have[k].shape:
            return f"{k} is {list(have[k].shape)} there and {list(v.shape)} here"
    return None


def one_line(error: BaseException) -> str:
    """The type and message of any exception, on one line of at most 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:199] + "…"


def _refusal(error: Exception) -> str:
    """Why torch.load refused, instead of its advice on how to load the file all the same."""
    if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"its pickle calls {called[1]}, and could run anything"
    if "Weights only load failed" in str(error):
        return "its pickle holds more than tensors, and could run anything"
    return f"damaged, or not written by torch.save: {one_line(error)}"


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist: check its name")
