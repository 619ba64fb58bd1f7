"""Imports only point down: kernels ◀ the networks ◀ losses, teacher, ema ◀ the rest of engine ◀ tools."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"engine", "kernels", "tools", "recipes"}

KERNELS = {"hsrgan.kernels"}
BELOW = ("errors", "sizes", "safe_pickle", "tensor_files", "layers", "blocks", "pretrained", "model")
NETWORKS = KERNELS | {f"hsrgan.engine.{name}" for name in BELOW}
ABOVE = ("losses", "objectives", "projected", "alpha", "teacher", "ema")
OBJECTIVES = NETWORKS | {f"hsrgan.engine.{name}" for name in ABOVE}
OF_AUGMENT = ("augment_numbers", "augment_geometry", "augment_color", "augment_filter", "diffaugment")
TRANSFORMS = {f"hsrgan.engine.{name}" for name in OF_AUGMENT}
ALLOWED = {  # what a module may import of ours; a prefix stands for everything below it
    "hsrgan.kernels": KERNELS,
    **dict.fromkeys(NETWORKS - KERNELS, NETWORKS),
    **dict.fromkeys(OBJECTIVES - NETWORKS, OBJECTIVES),
    **dict.fromkeys(TRANSFORMS, KERNELS | TRANSFORMS),
    "hsrgan.engine": {"hsrgan.kernels", "hsrgan.engine", "hsrgan.recipes"},
    "hsrgan.tools": {"hsrgan"},
}


def below(module, prefixes):
    """The longest of `prefixes` that is `module` or a package above it, else None."""
    return max((p for p in prefixes if module == p or module.startswith(f"{p}.")), key=len, default=None)


def is_module(name):
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree):
    """Every module that a file imports, anywhere in it; `from hsrgan.engine import config` counts as the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if base.split(".")[0] == "hsrgan" and is_module(full) else base


def violations(module, source):
    """Sentences for each import that `module` may not make."""
    allowed = ALLOWED[below(module, ALLOWED)]
    tree = ast.parse(source)
    found = []
    for name in imports(tree):
        if name.startswith("."):
            found.append(f"{module} imports {name}: imports inside the package are absolute")
        elif name.split(".")[0] in OURS:
            found.append(f"{module} imports {name}: write hsrgan.{name}")
        elif name.split(".")[0] == "hsrgan" and below(name, allowed) is None:
            found.append(f"{module} imports {name}, which stands above it")
    for node in tree.body:  # timm and torchvision are slow and optional: inside functions only
        if isinstance(node, ast.Import | ast.ImportFrom):
            wrong = {n.split(".")[0] for n in imports(ast.Module([node], []))} & {"timm", "torchvision"}
            found += [f"{module} imports {name} at its top: import it inside the function" for name in wrong]
    return found


FILES = sorted(p for room in ("kernels", "engine", "tools") for p in (ROOT / room).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["hsrgan", *(parts[:-1] if parts[-1] == "__init__" else parts)])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    assert violations(module_name(path), path.read_text()) == []


def test_every_room_is_seen():
    assert {module_name(p) for p in FILES} >= {"hsrgan.kernels", "hsrgan.kernels.bias_act", "hsrgan.engine.model"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("hsrgan.kernels.bias_act", "from hsrgan.engine.errors import UserError"),
        ("hsrgan.kernels.bias_act", "def f():\n    import hsrgan.tools.eval"),
        ("hsrgan.engine.layers", "import hsrgan.engine.losses"),
        ("hsrgan.engine.losses", "from hsrgan.engine import errors, nothing"),
        ("hsrgan.engine.losses", "from hsrgan.engine.config import Recipe"),
        ("hsrgan.engine.augment_color", "from hsrgan.engine.sections import PIPES"),
        ("hsrgan.engine.train", "from hsrgan.tools.eval import main"),
        ("hsrgan.engine.train", "from hsrgan import tools"),
        ("hsrgan.engine.train", "from . import losses"),
        ("hsrgan.engine.train", "from engine.losses import logistic_g"),
        ("hsrgan.engine.teacher", "import timm"),
    ],
)
def test_the_check_refuses(module, line):
    assert len(violations(module, line)) == 1


def test_the_check_accepts():
    assert violations("hsrgan.kernels.conv2d", "import torch\nfrom hsrgan.kernels import launch") == []
    assert violations("hsrgan.engine.losses", "from hsrgan.engine import errors\nimport hsrgan.kernels") == []
    assert violations("hsrgan.engine.teacher", "def load():\n    import timm") == []
    assert violations("hsrgan.tools.sample", "from hsrgan.engine.model import Generator") == []


@pytest.mark.parametrize("room", ["engine", "tools"])
def test_no_file_hides_a_standard_module(room):
    """Launched as a file, its folder is first on sys.path: engine/queue.py would be everybody's `queue`."""
    assert [p.name for p in (ROOT / room).glob("*.py") if p.stem in sys.stdlib_module_names] == []
