"""A user's checkout of NVIDIA's stylegan3 as a rival: its modules, importable for a while and gone afterwards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from hsrgan.engine.errors import UserError

PACKAGES = ("training", "torch_utils", "dnnlib")


@contextmanager
def checkout(path: Path, *modules: str) -> Iterator[list[ModuleType]]:
    """Those of its modules that are named ("training.networks_stylegan2", …), imported afresh. Raises `UserError`."""
    first = Path(*modules[0].split(".")).with_suffix(".py")
    if not (path / first).is_file():
        raise UserError(f"--stylegan3 {path}: no {first} there; name a checkout of stylegan3")
    _forget()  # another checkout, or somebody else's package of such a name
    sys.path.insert(0, str(path))
    try:
        found = [importlib.import_module(name) for name in modules]
        gradfix = sys.modules.get("torch_utils.ops.conv2d_gradfix")
        if gradfix is not None:
            gradfix.enabled = True  # as their own training sets it: R1 and path length differentiate twice
    except Exception as error:
        raise UserError(f"--stylegan3 {path}: it does not import: {' '.join(str(error).split())}") from None
    else:
        yield found
    finally:
        sys.path.remove(str(path))
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
