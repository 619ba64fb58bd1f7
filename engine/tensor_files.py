"""Tensors out of files, without executing anything in them, and what is wrong with them for a network."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.progress
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hsrgan.engine.errors import UserError
from hsrgan.engine.safe_pickle import PersistentId, read_pickle, shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save's former format
WHAT, REMEDY = "weights file", "check its name"


def read_safetensors(
    path: Path, what: str = WHAT, remedy: str = REMEDY
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a .safetensors file; UserError when it is absent or damaged.

    what: the file's role, which begins the message; remedy: what to do where it is absent.
    """
    _must_exist(path, what, remedy)
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what} {path} is damaged or no safetensors file ({one_line(error)}): copy it or make it "
                        "again") from None


def read_pth(path: Path, what: str = WHAT, remedy: str = REMEDY, *, inert: Sequence[type] = ()) -> object:
    """What torch.save wrote, if it is tensors and plain Python; anything else is refused unexecuted (UserError).

    inert: classes whose instances may be in it too: making one and giving it any attributes must do nothing.
    """
    _must_exist(path, what, remedy)
    if _is_torchscript(path):
        raise UserError(f"{what} {path} is a TorchScript archive, which holds code that would be run: save its state "
                        "dict as .safetensors")
    try:
        _refuse_bomb(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(inert)):
            warnings.simplefilter("ignore")  # torch.load's thoughts on old pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, or a pickle of something other than tensors
        raise UserError(f"{what} {path} cannot be read as plain tensors ({_refusal(error)}): save its state dict as "
                        ".safetensors") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a .pth file's state dict, unwrapped; UserError for anything else."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    content = read_pth(path)
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
    if names := misfit_of_names(want, have):
        return names
    if wrong := [k for k, v in want.items() if v.shape != have[k].shape]:
        more = f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        return f"{wrong[0]} is {list(have[wrong[0]].shape)} there and {list(want[wrong[0]].shape)} here{more}"
    return None


def misfit_of_names(want: Mapping[str, object], have: Mapping[str, object]) -> str | None:
    """How the names of `have` differ from those of `want`."""
    if missing := [k for k in want if k not in have]:
        return f"it lacks {len(missing)} of {len(want)} tensors, first {missing[0]}"
    if extra := [k for k in have if k not in want]:
        return f"{len(extra)} tensors are none of the model's, first {extra[0]}"
    return None


def sha256_of(path: Path) -> str:
    """Hex digest of a file of any size; shows progress where that takes a while."""
    digest = hashlib.sha256()
    console = Console(stderr=True)
    with rich.progress.open(path, "rb", description=f"checking {path.name}", console=console, transient=True,
                            disable=not console.is_terminal or path.stat().st_size < 32 << 20) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


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


def is_torch_file(path: Path) -> bool:
    """Whether torch.save wrote `path`, in its present or its former format; False where it cannot be read."""
    try:
        return _is_zip(path) or _start(path) == b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
    except OSError:
        return False


def _is_zip(path: Path) -> bool:
    """As torch.load decides it: by the first bytes, whatever follows."""
    return _start(path).startswith(b"PK\x03\x04")


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(14)


def _refuse_bomb(path: Path) -> None:
    """ValueError where reading `path` would take far more memory or stack than its size: torch.load does not look.

    What its pickles call is left to torch.load to judge.
    """
    size = path.stat().st_size

    def see(pid: PersistentId) -> None:
        declared = pid.value[4] if isinstance(pid.value, tuple) and len(pid.value) > 4 else None
        if type(declared) is not int or not 0 <= declared <= size:
            raise ValueError(f"a tensor declares {shown(declared)} values in {size:,} bytes")

    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if sum(r.file_size for r in records) > size or any(r.compress_type for r in records):
                raise ValueError("its records are compressed, or overlap, as torch.save never writes them")
            for record in records:
                if record.filename.endswith("/data.pkl"):
                    read_pickle(io.BytesIO(archive.read(record)), see=see)
    elif size:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if read_pickle(content, see=see) == LEGACY_MAGIC:  # a version, sizes, content and storages' keys follow
                for _ in range(4):
                    read_pickle(content, see=see)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # no zip, or a damaged one, which can raise anything; torch.load is asked next
        return False


def _must_exist(path: Path, what: str, remedy: str) -> None:
    if not os.path.isfile(path):  # which, unlike Path.is_file, never raises
        raise UserError(f"{what} {path} does not exist: {remedy}")
