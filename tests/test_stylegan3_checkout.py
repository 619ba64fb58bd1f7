"""What tools/stylegan3_checkout.py does about a checkout that imports, or compiles, only in some environments."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from hsrgan.engine.errors import UserError
from hsrgan.tools.stylegan3_checkout import build, checkout

OPS = ("torch_utils.ops.bias_act", "torch_utils.ops.upfirdn2d")
# as theirs: torch loads the plugin, and it is imported by its name
LOADING = """
import importlib
from torch.utils import cpp_extension

_plugin = None

def run(x, **options):
    global _plugin
    cpp_extension.load(name="PLUGIN", sources=[])
    _plugin = importlib.import_module("PLUGIN")
    return x

OP = run
"""
FALLING_BACK = "_plugin = None\n\ndef OP(x, **options):\n    return x\n"


@pytest.fixture
def written(tmp_path):
    def write(source: str):
        ops = tmp_path / "torch_utils" / "ops"
        ops.mkdir(parents=True)
        for name in ("bias_act", "upfirdn2d"):
            (ops / f"{name}.py").write_text(source.replace("PLUGIN", f"{name}_toy_plugin").replace("OP", name))
        return tmp_path

    yield write
    for name in [name for name in sys.modules if name.endswith("_toy_plugin")]:
        del sys.modules[name]


def test_packages_that_it_lacks_are_named_together(written, monkeypatch):
    for name in ("requests", "pkg_resources"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "distutils", ModuleType("distutils"))
    sys.modules["distutils"].__spec__ = importlib.machinery.ModuleSpec("distutils", None)
    path = written("import requests\nimport pkg_resources\n")
    with pytest.raises(UserError) as caught, checkout(path, *OPS):
        pass
    assert str(caught.value).endswith("it needs requests and pkg_resources: pip install requests 'setuptools<82'")
    assert str(path) not in sys.path


def test_a_plugin_that_torch_has_loaded_is_imported_by_name(written, monkeypatch):
    monkeypatch.setattr(cpp_extension, "load", lambda name, sources: ModuleType(name))  # not in sys.modules, as torch's
    load = cpp_extension.load
    with checkout(written(LOADING), *OPS) as ops:
        build("x", "cpu")
    assert [op._plugin.__name__ for op in ops] == ["bias_act_toy_plugin", "upfirdn2d_toy_plugin"]
    assert cpp_extension.load is load


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError("CUDA_HOME environment variable is not set. Please set it."), "CUDA_HOME environment variable is not"),
        (RuntimeError("\nThe detected CUDA version (12.4) mismatches\nmore"), "The detected CUDA version (12.4) mism"),
        (RuntimeError("Error building 'x': [1/3] c++ …\nFAILED: x.o\nx.h:10:10: fatal error: cusparse.h: No such\n"),
         "x.h:10:10: fatal error: cusparse.h"),
    ],
)  # fmt: skip
def test_a_build_that_fails_is_one_line(raised, told, written, monkeypatch):
    def load(name, sources):
        raise raised

    monkeypatch.setattr(cpp_extension, "load", load)
    said = pytest.raises(UserError, match="its bias_act does not build; it takes nvcc")
    with said as caught, checkout(written(LOADING), *OPS):
        build("x", "cpu")
    assert f": {told}" in str(caught.value) and "\n" not in str(caught.value)


def test_what_runs_without_its_cuda_is_refused(written):
    with checkout(written(FALLING_BACK), *OPS), pytest.raises(UserError, match="bias_act runs without its CUDA"):
        build("x", torch.device("cpu"))
