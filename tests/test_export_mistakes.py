"""What tools/export.py and `Generator.from_pretrained` refuse, each in one line, and what is not kept."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from export_runs import TINY, exported, line, run, write
from safetensors.torch import load_file, save_file

from hsrgan.engine import exporting, publishing
from hsrgan.engine.errors import UserError
from hsrgan.engine.exporting import BATCHES, Graph
from hsrgan.engine.model import Generator
from hsrgan.engine.snapshot import load_snapshot, save_snapshot


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("snapshots") / "tiny.safetensors", **TINY)


def change_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config |= changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda p: (p / "config.json").unlink(), r"config\.json does not exist"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda p: (p / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is damaged"),
        (lambda p: (p / "config.json").write_text("[]"), "format is not stated"),
        (lambda p: change_config(p, format="other"), "format is other, not hsrgan-pretrained-1"),
        (lambda p: change_config(p, generator=None), "has no generator"),
        (lambda p: change_config(p, generator={**TINY, "depth": 3}), "cannot be built.*depth"),
        (lambda p: change_config(p, generator={**TINY, "img_resolution": 9}), "cannot be built"),
        (lambda p: change_config(p, generator={**TINY, "z_dim": 2**50}), r"does not fit its config.json: .*fc0"),
        (lambda p: change_config(p, generator={**TINY, "img_resolution": 16}), "it lacks"),
        (lambda p: change_config(p, generator={**TINY, "mapping_layers": 1}), "are none of the model's"),
        (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
        (lambda p: (p / "model.safetensors").write_bytes(b"hello, world"), "is damaged or no safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-4]), "is damaged"),
        (lambda p: save_file({"x": torch.zeros(1)}, p / "model.safetensors"), "it lacks"),
    ],
    ids=["folder", "no config", "torn", "bytes", "list", "format", "no generator", "unknown", "refused", "huge",
         "lacks", "more", "no weights", "no safetensors", "cut", "other weights"],
)  # fmt: skip
def test_damaged_folders_are_one_line(hf_of_tiny, tmp_path, damage, says):
    shutil.copytree(hf_of_tiny, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=says) as caught:
        Generator.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def hf_of_tiny(tiny) -> Path:
    out = tiny.with_name("tiny-hf")
    exported(tiny, "hf", out)
    return out


def test_the_hub_is_asked_only_when_named(hf_of_tiny, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(hf_of_tiny)

    def offline(name, allow_patterns):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"no such folder.*hf://OWNER/NAME"):
        Generator.from_pretrained("somebody/model")
    assert asked == []
    assert Generator.from_pretrained("hf://somebody/model").z_dim == 8
    assert asked == [("somebody/model", ["config.json", "model.safetensors"])]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"cannot be fetched.*offline"):
        Generator.from_pretrained("hf://somebody/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        Generator.from_pretrained("hf://somebody/model")


def test_a_graph_that_differs_is_not_kept(tiny, tmp_path, monkeypatch):
    out = tmp_path / "t.pt2"
    out.write_text("the former file")
    save = torch.export.save

    def save_another_bias(program, file, **more):
        bias = program.state_dict["generator.synthesis.b8.torgb.bias"]
        bias += 1e-3
        save(program, file, **more)
        bias -= 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", save_another_bias)
        told = line(run(tiny, "torch_export", "--out", out))
    assert "from PyTorch at batch 1, more than 0.0001, and was not kept" in told
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "trace", lambda g: torch.export.export(g, (), g.example(3), strict=False))
        assert "does not run at batch 1 and was not kept" in line(run(tiny, "torch_export", "--out", out))
    assert [p.name for p in tmp_path.iterdir()] == ["t.pt2"] and out.read_text() == "the former file"


def test_check_measures_what_it_says(tiny):
    truth, steps = Graph(load_snapshot(tiny)[0]), []

    def check(run, bound=0.02):
        return exporting.check(run, truth, bound, "x", lambda *step: steps.append(step))

    assert check(truth.run, 0.0) == 0 and steps[-1] == ("checking", 3, 3)
    largest = [truth.run(truth.example(batch)).abs().max().item() for batch in BATCHES]
    assert min(largest) > 1  # by which the error is divided
    assert check(lambda i: truth.run(i) + 0.01) == pytest.approx(0.01 / min(largest), rel=1e-3)
    wrong = {
        "x is nan from PyTorch at batch 1": lambda i: truth.run(i) * float("nan"),
        "from PyTorch at batch 3": lambda i: truth.run(i) + 0.5 * (len(i["z"]) == 3),
        "from PyTorch at batch 5": lambda i: truth.run(i | {"psi": i["psi"].clamp(min=0.5)}),  # 0.9, 0.5, 0.1
        r"x gives \[1, 3, 8\] at batch 1 where PyTorch gives \[1, 3, 8, 8\]": lambda i: truth.run(i)[..., 0],
        "x does not run at batch 1 and was not kept: KeyError": lambda i: i["absent"],
    }
    for says, wrong_run in wrong.items():
        with pytest.raises(UserError, match=says):
            check(wrong_run)


def test_weights_that_do_not_come_back_are_not_kept(tiny, tmp_path, monkeypatch):
    whole = publishing.own_copy
    monkeypatch.setattr(publishing, "save_snapshot", lambda path, generator, **facts: save_file(
        {key: whole(value, torch.bfloat16) for key, value in generator.state_dict().items()}, path))  # fmt: skip
    assert "is read back with other values" in line(run(tiny, "hf", "--out", tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tiny, tmp_path):
    """/dev/full refuses every byte; the file aside is a link to it."""
    mapping = ("--part", "mapping")
    for to, name, part in (("pt", "t.pt", ()), ("torch_export", "t.pt2", mapping), ("onnx", "t.onnx", mapping)):
        (tmp_path / f".{name}.part").symlink_to("/dev/full")
        assert "No space left on device" in line(run(tiny, to, "--out", tmp_path / name, *part))
    assert list(tmp_path.iterdir()) == []


def test_what_fp16_cannot_hold(tmp_path):
    snapshot = write(tmp_path / "large.safetensors", **TINY)
    tensors = load_file(snapshot)
    generator, _ = load_snapshot(snapshot)
    generator.load_state_dict(tensors | {"mapping.fc0.weight": tensors["mapping.fc0.weight"] * 1e4})
    save_snapshot(snapshot, generator, recipe_json="{}", kimg=1, dataset={})
    for to, name in (("hf", "model"), ("pt", "model.pt")):
        assert "mapping.fc0.weight reaches" in line(run(snapshot, to, "--precision", "fp16", "--out", tmp_path / name))
    assert [p.name for p in tmp_path.iterdir()] == ["large.safetensors"]


def test_mistakes_are_one_line(tiny, tmp_path, monkeypatch):
    out = tmp_path / "x.onnx"
    assert "no such file" in line(run(tmp_path / "absent", "onnx"))
    for option in (["--part", "mapping"], ["--psi", "0.7"], ["--cutoff", "2"], ["--noise", "none"]):
        assert f"{option[0]} is of graphs, and --to hf writes weights" in line(run(tiny, "hf", *option))
    assert "begins at ws" in line(run(tiny, "onnx", "--out", out, "--part", "synthesis", "--psi", 1))
    assert "ends at ws" in line(run(tiny, "onnx", "--out", out, "--part", "mapping", "--noise", "const"))
    assert "always computes in fp32" in line(run(tiny, "onnx", "--part", "mapping", "--precision", "fp16"))
    assert "has 4 ws; give 1 to 4" in line(run(tiny, "onnx", "--out", out, "--cutoff", 5))
    assert "must end with .pt2" in line(run(tiny, "torch_export", "--out", out))
    (tmp_path / "taken").mkdir()
    assert "exists: remove it" in line(run(tiny, "hf", "--out", tmp_path / "taken"))
    (tmp_path / "folder.onnx").mkdir()
    assert "is a folder; name another file" in line(run(tiny, "onnx", "--out", tmp_path / "folder.onnx"))
    (tmp_path / "file").write_text("")
    assert "name another --out" in line(run(tiny, "onnx", "--out", tmp_path / "file" / "x.onnx"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler, and no-such-compiler is not on the path" in line(run(tiny, "aoti"))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    assert 'needs onnxscript: pip install -e ".[export]"' in line(run(tiny, "onnx", "--out", out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.onnx", "taken"]
