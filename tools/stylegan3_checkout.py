"""A user's checkout of NVIDIA's stylegan3 as a rival: its modules, importable for a while and gone afterwards.

It needs requests and setuptools<82 and, on a GPU, the nvcc of PyTorch's CUDA, ninja and a C++ compiler: what is missing
is one line, before anything is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hsrgan.engine.errors import UserError

PACKAGES = ("training", "torch_utils", "dnnlib")
# what it imports that PyTorch's environments may lack, and what to install; newer setuptools has no pkg_resources
NEEDS = {"requests": "requests", "pkg_resources": "'setuptools<82'", "distutils": "'setuptools<82'"}


@contextmanager
def checkout(path: Path, *modules: str) -> Iterator[list[ModuleType]]:
    """Those of its modules that are named ("training.networks_stylegan2", …), imported afresh. Raises `UserError`."""
    first = Path(*modules[0].split(".")).with_suffix(".py")
    if not (path / first).is_file():
        raise UserError(f"--stylegan3 {path}: no {first} there; name a checkout of stylegan3")
    _forget()  # another checkout, or somebody else's package of such a name
    sys.path.insert(0, str(path))
    try:
        yield _imported(path, modules)
    finally:
        sys.path.remove(str(path))
        _forget()


def _imported(path: Path, modules: tuple[str, ...]) -> list[ModuleType]:
    try:
        found = [importlib.import_module(name) for name in modules]
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in NEEDS:
            missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
            install = " ".join(dict.fromkeys(NEEDS[name] for name in missing))
            reason = f"it needs {' and '.join(missing)}: pip install {install}"
        else:
            reason = f"it does not import: {' '.join(str(error).split())}"
        raise UserError(f"--stylegan3 {path}: {reason}") from None
    gradfix = sys.modules.get("torch_utils.ops.conv2d_gradfix")
    if gradfix is not None:
        gradfix.enabled = True  # as their own training has it; published, it steps aside for torch 1.11 and later
    return found


def build(path: Path, device: torch.device | str) -> None:
    """Have the imported checkout compile its CUDA ops, as their first call does. `UserError` where it cannot.

    Before anything else is timed: a failure takes as long as a build, and comes again with every call. A fork that
    falls back on PyTorch is refused: it would be timed under NVIDIA's name.
    """
    x = torch.zeros(1, 1, 4, 4, device=device)
    for name, options in (("bias_act", {"act": "lrelu"}), ("upfirdn2d", {"f": x.new_ones(1, 1)})):
        try:
            op = importlib.import_module(f"torch_utils.ops.{name}")
            with _loads_registered():
                getattr(op, name)(x, **options)
        except Exception as error:
            takes = f"it takes nvcc of CUDA {torch.version.cuda}, its headers, ninja and a C++ compiler"
            raise UserError(f"--stylegan3 {path}: its {name} does not build; {takes}: {gist(error)}") from None
        if getattr(op, "_plugin", None) is None:
            raise UserError(f"--stylegan3 {path}: its {name} runs without its CUDA: it would be timed as NVIDIA's")


@contextmanager
def _loads_registered() -> Iterator[None]:
    """What PyTorch compiles and loads can be imported by its name, as the checkout does next. Today's PyTorch hands the
    module back and leaves it out of `sys.modules`.
    """
    cpp_extension = importlib.import_module("torch.utils.cpp_extension")
    load = cpp_extension.load

    def registered(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        sys.modules[name] = module = load(name, *args, **kwargs)
        return module

    cpp_extension.load = registered
    try:
        yield
    finally:
        cpp_extension.load = load


def gist(error: Exception) -> str:
    """One line: the compiler's first complaint out of a build's pages; else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if re.search(r"\berror:|not found", line)), lines[0])[:300]


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
