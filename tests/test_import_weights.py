"""Weights files: what is taken, what is refused and how, and the cache that the metrics read. All through the CLI."""

import contextlib
import dataclasses
import io
import os
import pickle
import re
import shlex
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import metric_fixtures
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import weights
from hsrgan.engine.metrics.extractor import load_extractor, load_lpips
from hsrgan.engine.tensor_files import read_pth
from hsrgan.tools import import_weights


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HSRGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def heads(tmp_path, monkeypatch) -> Path:
    """A small file (LPIPS's heads) that the registry knows by size and sha256, as it does the large ones."""
    path = tmp_path / "heads.pth"
    path.write_bytes(weights.packaged_heads().read_bytes())
    known = dataclasses.replace(weights.PUBLISHED["lpips"], file="heads.pth", publisher="somebody",
                                size=path.stat().st_size, sha256=weights.sha256_of_file(path))  # fmt: skip
    monkeypatch.setitem(weights.PUBLISHED, "lpips", known)
    return path


def run(*arguments: object):
    return CliRunner().invoke(import_weights.app, [str(argument) for argument in arguments])


def line(result) -> str:
    """The one line of a user's mistake."""
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_a_published_file_is_checked_converted_and_found(heads, cache):
    result = run("lpips", heads)
    assert result.exit_code == 0 and "It is the published heads.pth" in result.output and "WARNING" not in result.output
    assert [p.name for p in cache.iterdir()] == ["lpips.safetensors"]
    loaded, original = weights.load_weights("lpips"), read_pth(heads)
    assert loaded.sha256 == weights.sha256_of_file(heads) and not loaded.own
    assert loaded.tensors.keys() == original.keys()
    assert all(torch.equal(loaded.tensors[k], v) for k, v in original.items())
    with safe_open(cache / "lpips.safetensors", "pt") as file:
        assert file.metadata()["sha256"] == loaded.sha256 and file.metadata()["source"] == "heads.pth"


def test_lpips_needs_no_file_and_no_import(cache):
    before = weights.load_weights("lpips")
    assert not cache.exists()
    result = run("lpips")
    assert result.exit_code == 0 and f"sha256 {before.sha256}" in result.output, result.output
    assert "no published sha256" in result.output
    after = weights.load_weights("lpips")
    assert (cache / "lpips.safetensors").is_file() and after.sha256 == before.sha256
    assert all(torch.equal(after.tensors[k], v) for k, v in before.tensors.items())


def test_a_file_of_ones_own_needs_the_flag_and_is_named_so_ever_after(heads, cache, tmp_path):
    own = tmp_path / "own.pth"
    torch.save({"state_dict": {f"module.{k}": v.half() for k, v in read_pth(heads).items()}}, own)
    assert "bytes and heads.pth" in line(run("lpips", own)) and not cache.exists()
    result = run("lpips", own, "--own-weights")
    assert result.exit_code == 0 and "WARNING: this is not heads.pth" in " ".join(result.stderr.split())
    assert "compare with nobody's" in " ".join(result.stderr.split())
    loaded = weights.load_weights("lpips")
    assert loaded.own and {v.dtype for v in loaded.tensors.values()} == {torch.float32}
    result = run("lpips", heads, "--own-weights")  # the flag does not make the published file another
    assert result.exit_code == 0 and "published heads.pth" in result.output and not weights.load_weights("lpips").own


def test_another_folder_and_safetensors(heads, tmp_path):
    save_file(read_pth(heads), tmp_path / "own.safetensors")
    result = run("lpips", tmp_path / "own.safetensors", "--own-weights", "--cache", tmp_path / "other")
    assert result.exit_code == 0 and weights.load_weights("lpips", tmp_path / "other").own


def test_inception_goes_through_the_tool_without_counters(cache, tmp_path):
    file = metric_fixtures.kaiming_inception(tmp_path)
    assert run("inception", file, "--own-weights").exit_code == 0
    state = torch.load(file, weights_only=True)
    without = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(without) < len(state) and load_file(cache / "inception.safetensors").keys() == without.keys()
    expected = load_extractor("inception")(metric_fixtures.digits(1, 8))
    torch.save(without, file)  # older files never had them
    assert run("inception", file, "--own-weights").exit_code == 0
    assert torch.equal(load_extractor("inception")(metric_fixtures.digits(1, 8)), expected)


class Hostile:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def legacy_pickle(mark: Path) -> bytes:
    return pickle.dumps(Hostile(mark), protocol=2)  # what torch.load takes for its former format


def new_pickle(mark: Path) -> bytes:
    return pickle.dumps(Hostile(mark), protocol=4)


def zipped_pickle(mark: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"lin0.model.1.weight": Hostile(mark)}, content)
    return content.getvalue()


@pytest.mark.parametrize("make", [legacy_pickle, new_pickle, zipped_pickle])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, cache, make):
    mark, file = tmp_path / "executed", tmp_path / "hostile.pth"
    file.write_bytes(make(mark))
    for network in weights.PUBLISHED:
        said = line(run(network, file, "--own-weights"))
        assert "hostile.pth cannot be read as plain tensors" in said
        assert re.search(r"holds more than" if make is new_pickle else r"calls (posix|nt)\.system", said), said
    with pytest.raises(UserError, match="and could run anything"):
        load_extractor(f"timm:test_vit:{file}")
    assert not mark.exists() and not cache.exists()
    with contextlib.suppress(RuntimeError):  # that the pickle does what it is feared for
        torch.load(file, weights_only=False)
    assert mark.exists()


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "net.pt")
    said = line(run("vgg16", tmp_path / "net.pt", "--own-weights"))
    assert "net.pt is a TorchScript archive, which holds code" in said


def write_nan(state, path):
    torch.save({**state, "lin2.model.1.weight": torch.full((1, 256, 1, 1), torch.nan)}, path)


@pytest.mark.parametrize(("write", "says"), [
    (lambda state, path: path.write_bytes(path.read_bytes()[:-700]), "cannot be read as plain tensors"),
    (lambda state, path: path.write_bytes(b"hello, world"), "cannot be read as plain tensors"),
    (lambda state, path: path.write_bytes(b""), "cannot be read as plain tensors"),
    (lambda state, path: torch.save([1, 2], path), "holds a list, not a state dict"),
    (lambda state, path: torch.save({**state, "epoch": 3}, path), "no state dict of tensors: its 'epoch' is a int"),
    (lambda state, path: torch.save(dict(list(state.items())[:3]), path), r"lacks 2 of 5 tensors, first lin3\.model"),
    (lambda state, path: torch.save({**state, "more": torch.zeros(1)}, path), r"1 tensors are none of .* first more"),
    (lambda state, path: torch.save({**state, "lin0.model.1.weight": torch.zeros(1, 32, 1, 1)}, path),
     r"lin0\.model\.1\.weight is \[1, 32, 1, 1\] there and \[1, 64, 1, 1\] here"),
    (write_nan, r"lin2\.model\.1\.weight holds values that are no finite numbers"),
], ids=["truncated", "text", "empty", "list", "number", "missing", "extra", "shape", "NaN"])  # fmt: skip
def test_a_file_that_is_not_the_network_is_one_line_and_leaves_the_cache_alone(heads, cache, write, says):
    assert run("lpips", heads).exit_code == 0
    before = (cache / "lpips.safetensors").read_bytes()
    write(read_pth(heads), heads)
    assert re.search(says, line(run("lpips", heads, "--own-weights")))
    said = line(run("lpips", heads))  # by size or sha256, before anything is read
    assert re.search(r"has [\d,]+ bytes and heads\.pth [\d,]+: get heads\.pth again from somebody", said), said
    assert [p.read_bytes() for p in cache.iterdir()] == [before]


def test_one_changed_byte_is_seen_by_the_sha256(heads):
    content = bytearray(heads.read_bytes())
    content[len(content) // 2] ^= 1
    heads.write_bytes(content)
    said = line(run("lpips", heads))
    assert f"has sha256 {weights.sha256_of_file(heads)} and heads.pth {weights.PUBLISHED['lpips'].sha256}" in said


def test_files_and_folders_that_are_not_there(tmp_path):
    assert "absent.pth does not exist: get vgg16-397923af.pth from torchvision" in line(run("vgg16", "absent.pth"))
    assert "which file? Get dinov2_vitl14_pretrain.pth from Meta" in line(run("dinov2"))
    (tmp_path / "file").write_text("")
    said = line(run("lpips", "--cache", tmp_path / "file/x"))
    assert re.search(r"cannot write .*: Not a directory; name another folder", said), said


@pytest.mark.parametrize("name", ["inception", "vgg16", "dinov2"])
def test_weights_that_nobody_imported_say_what_to_get_and_to_run(name, cache):
    known = weights.PUBLISHED[name]
    with pytest.raises(UserError) as error:
        load_extractor(name)
    said = str(error.value)
    assert all(part in said for part in (known.file, known.publisher, known.sha256 or "not published")), said
    command = shlex.split(said.split("run: ")[1])
    assert command[:2] == ["python", "tools/import_weights.py"] and Path(command[1]).is_file()
    assert "does not exist: get" in line(run(*command[2:]))  # the command is one that the tool takes
    if name == "vgg16":
        with pytest.raises(UserError, match=r"tools/import_weights\.py vgg16 .* --cache elsewhere$"):
            load_lpips(Path("elsewhere"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "says"), [
    (flip, "is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is damaged or no safetensors file"),
    (lambda path: save_file({"a": torch.zeros(1)}, path), "was not made by tools/import_weights.py lpips"),
])  # fmt: skip
def test_a_damaged_cache_is_one_line(cache, damage, says):
    assert run("lpips").exit_code == 0
    damage(cache / "lpips.safetensors")
    with pytest.raises(UserError, match=says) as error:
        weights.load_weights("lpips")
    assert "\n" not in str(error.value)


def test_as_a_script(cache, tmp_path):
    command = [sys.executable, "tools/import_weights.py", "lpips"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "5 tensors" in result.stdout and (cache / "lpips.safetensors").is_file()
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", legacy_pickle(tmp_path / "executed"))
    command = [*command[:2], "vgg16", tmp_path / "x.pth", "--own-weights"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "executed").exists()
