"""tools/export.py: every format at any batch beside PyTorch, what it refuses, and `Generator.from_pretrained`."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hsrgan.engine import exporting, publishing
from hsrgan.engine.config import load_recipe
from hsrgan.engine.errors import UserError
from hsrgan.engine.exporting import BATCHES, Graph
from hsrgan.engine.model import Generator
from hsrgan.engine.snapshot import load_snapshot, save_snapshot
from hsrgan.tools import export

TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}
RECIPE = Path(__file__).parents[1] / "recipes/quickstart.yaml"
SCORE = {"metric": "fid1000_full", "values": {"fid1000_full": 12.25}, "data": "/home/me/shards"}


def write(path: Path, recipe_json: str = "{}", **kwargs: object) -> Path:
    """A snapshot with random weights in which every input changes the image."""
    torch.manual_seed(0)
    generator = Generator(**kwargs).eval()
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            value.data.fill_(0.5)
    generator.mapping.w_avg.normal_()
    names = [f"n{i}" for i in range(generator.c_dim)]
    save_snapshot(path, generator, recipe_json=recipe_json, kimg=160, dataset={"class_names": names}, score=SCORE)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def quick(folder) -> Path:
    """The quickstart's generator, built from its recipe as engine/train.py does."""
    recipe = load_recipe(RECIPE, ["run_dir=/home/me/runs/quickstart"])
    widths = recipe.generator.model_dump(exclude={"mixing_prob", "lr", "w_avg_beta"})
    return write(folder / "quick.safetensors", recipe.to_json(), **widths, img_resolution=recipe.data.resolution,
                 img_channels=recipe.data.channels)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(folder) -> Path:
    return write(folder / "tiny.safetensors", **TINY)


@pytest.fixture(scope="module")
def labelled(folder) -> Path:
    """Three classes, RGBA."""
    return write(folder / "labelled.safetensors", **TINY, c_dim=3, img_channels=4)


def run(snapshot: Path, to: str, *options: object):
    return CliRunner().invoke(export.app, [str(snapshot), "--to", to, *map(str, options)])


def exported(snapshot: Path, to: str, out: Path, *options: object) -> str:
    """What the tool says of a successful export."""
    result = run(snapshot, to, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "checked at batch 1, 3, 5" in result.stdout
    return result.stdout


def line(result) -> str:
    """The one line of a user's mistake."""
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), (result.output, result.exception)
    messages = [text for text in result.stderr.splitlines() if not text.startswith(("writing: ", "checking: "))]
    assert len(messages) == 1 and messages[0].startswith("error: "), result.stderr
    return messages[0]


def as_printed(stdout: str) -> dict:
    """The names that the printed lines of Python leave behind."""
    lines = [text.strip() for text in stdout.split("run it:\n")[1].splitlines()]
    assert len(lines) == 3
    names: dict = {}
    exec("\n".join(lines), names)
    return names


def latents(generator: Generator, batch: int, **more: object) -> dict[str, torch.Tensor]:
    z = np.concatenate([np.random.RandomState(seed).randn(1, generator.z_dim) for seed in range(batch)])
    return {"z": torch.from_numpy(z).float(), **more}


def onnx_session(path: Path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session, lambda inputs: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return (a - b).abs().max().item()


def test_onnx_of_the_quickstart(quick, tmp_path):
    told = exported(quick, "onnx", tmp_path / "q.onnx")
    generator, _ = load_snapshot(quick)
    session, onnx = onnx_session(tmp_path / "q.onnx")
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("z", ["batch", 64], "tensor(float)"), ("psi", [], "tensor(float)")
    ]  # fmt: skip
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("image", ["batch", 1, 16, 16])]
    images = {}
    for batch in (*BATCHES, 2):
        for psi in (1.0, 0.7):
            inputs = latents(generator, batch, psi=torch.tensor(psi))
            images[batch, psi] = onnx(inputs)
            expected = generator(inputs["z"], truncation_psi=psi, noise_mode="const")
            assert distance(images[batch, psi], expected) <= 1e-4
    assert distance(images[5, 1.0], images[5, 0.7]) > 0.1
    facts = json.loads(session.get_modelmeta().custom_metadata_map["hsrgan"])
    assert Generator(**facts["generator"]).init_kwargs == generator.init_kwargs
    assert (facts["precision"], facts["psi"], facts["noise_mode"]) == ("fp32", None, "const")
    content = (tmp_path / "q.onnx").read_bytes()
    assert b"engine/" not in content and str(Path(exporting.__file__).parent).encode() not in content
    assert as_printed(told)["image"].shape == (4, 1, 16, 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.onnx"]


def test_onnx_fp16_with_labels_noise_and_folded_truncation(labelled, tmp_path):
    import onnx

    options = ("--precision", "fp16", "--psi", "0.5", "--cutoff", "2", "--noise", "random")
    told = exported(labelled, "onnx", tmp_path / "l.onnx", *options)
    assert as_printed(told)["image"].shape == (4, 4, 8, 8)
    generator, _ = load_snapshot(labelled)
    c, noise = torch.eye(3)[[0, 1, 2]], torch.randn(3, generator.synthesis.noise_size)
    inputs = latents(generator, 3, c=c, noise=noise)
    session, model = onnx_session(tmp_path / "l.onnx")
    assert [i.name for i in session.get_inputs()] == ["z", "c", "noise"]
    expected = generator(inputs["z"], c, truncation_psi=0.5, truncation_cutoff=2, noise=noise)
    error = distance(model(inputs), expected) / expected.abs().max().item()
    assert 1e-6 < error <= 1e-2  # half precision, and no more
    assert distance(model(inputs | {"c": c.roll(1, 0)}), expected) > 0.1
    assert distance(model(inputs | {"noise": -noise}), expected) > 0.1
    weights = {i.data_type for i in onnx.load(tmp_path / "l.onnx").graph.initializer if tuple(i.dims) == (8, 8, 3, 3)}
    assert weights == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}  # of 4×4, and of 8×8


def test_torch_export_of_the_quickstart(quick, tmp_path):
    told = exported(quick, "torch_export", tmp_path / "q.pt2", "--noise", "random")
    generator, _ = load_snapshot(quick)
    extra = {"hsrgan.json": ""}
    model = torch.export.load(tmp_path / "q.pt2", extra_files=extra).module()
    assert json.loads(extra["hsrgan.json"])["noise_mode"] == "random"
    for batch in (*BATCHES, 2):
        noise = torch.randn(batch, generator.synthesis.noise_size)
        inputs = latents(generator, batch, psi=torch.tensor(0.7), noise=noise)
        expected = generator(inputs["z"], truncation_psi=0.7, noise=noise)
        assert distance(model(**inputs), expected) <= 1e-5
    assert distance(model(**inputs | {"noise": -noise}), expected) > 0.1
    assert as_printed(told)["image"].shape == (4, 1, 16, 16)
    assert b"engine/" not in (tmp_path / "q.pt2").read_bytes()


def test_the_two_parts_make_the_whole(labelled, tmp_path):
    """To edit ws in between; one in ONNX, the other in torch.export."""
    told = exported(labelled, "onnx", tmp_path / "m.onnx", "--part", "mapping")
    assert as_printed(told)["ws"].shape == (4, 4, 8)
    told = exported(labelled, "torch_export", tmp_path / "s.pt2", "--part", "synthesis", "--noise", "none")
    assert as_printed(told)["image"].shape == (4, 4, 8, 8)
    generator, _ = load_snapshot(labelled)
    inputs = latents(generator, 3, c=torch.eye(3), psi=torch.tensor(0.3))
    ws = onnx_session(tmp_path / "m.onnx")[1](inputs)
    assert distance(ws, generator.mapping(inputs["z"], inputs["c"], truncation_psi=0.3)) <= 1e-5
    image = torch.export.load(tmp_path / "s.pt2").module()(ws=ws)
    expected = generator(inputs["z"], inputs["c"], truncation_psi=0.3, noise_mode="none")
    assert distance(image, expected) <= 1e-4
    assert distance(expected, generator(inputs["z"], inputs["c"], truncation_psi=0.3, noise_mode="const")) > 0.1


@pytest.mark.parametrize("cutoff", [None, 1])
def test_psi_as_an_input_is_the_folded_one(tiny, cutoff):
    generator, _ = load_snapshot(tiny)
    inputs = latents(generator, 3)
    as_input = exporting.trace(Graph(generator, part="mapping", cutoff=cutoff)).module()
    for psi in (0.0, 0.7, 1.0):
        folded = exporting.trace(Graph(generator, part="mapping", psi=psi, cutoff=cutoff)).module()
        ws = folded(**inputs)
        assert distance(as_input(**inputs, psi=torch.tensor(psi)), ws) <= 1e-6
        assert distance(ws, generator.mapping(inputs["z"], None, truncation_psi=psi, truncation_cutoff=cutoff)) == 0


@pytest.mark.parametrize("architecture", ["orig", "resnet"])
def test_the_other_architectures(architecture, tmp_path):
    snapshot = write(tmp_path / "a.safetensors", **TINY, architecture=architecture)
    exported(snapshot, "torch_export", tmp_path / "a.pt2", "--precision", "fp16")
    program = torch.export.load(tmp_path / "a.pt2")
    halves = [n for n in program.graph.nodes if getattr(n.meta.get("val"), "dtype", None) == torch.float16]
    assert len(halves) > 10


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler on this machine")
def test_aoti(labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    told = exported(labelled, "aoti", tmp_path / "l.aoti.pt2")
    assert as_printed(told)["image"].shape == (4, 4, 8, 8)
    model = torch._inductor.aoti_load_package(str(tmp_path / "l.aoti.pt2"))
    assert json.loads(model.get_metadata()["hsrgan"])["generator"]["c_dim"] == 3
    generator, _ = load_snapshot(labelled)
    for batch in (*BATCHES, 2):
        inputs = latents(generator, batch, c=torch.eye(3)[[1] * batch], psi=torch.tensor(0.4))
        expected = generator(inputs["z"], inputs["c"], truncation_psi=0.4, noise_mode="const")
        assert distance(model(**inputs), expected) <= 1e-4


def test_pt_is_plain_tensors_under_the_published_keys(quick, tmp_path):
    told = exported(quick, "pt", tmp_path / "q.pt")
    names = as_printed(told)
    tensors = load_file(quick)
    assert names["weights"].keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in names["weights"].items())
    assert names["config"]["generator"]["img_resolution"] == 16 and names["config"]["kimg"] == 160
    exported(quick, "pt", tmp_path / "h.pt", "--precision", "fp16")
    half = torch.load(tmp_path / "h.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, tensors[key].half()) for key, value in half.items())


@pytest.mark.parametrize("which", ["quick", "labelled"])
def test_hf_comes_back_bit_by_bit(which, request, tmp_path, monkeypatch):
    snapshot, out = request.getfixturevalue(which), tmp_path / "model"
    told = exported(snapshot, "hf", out)
    assert "equal to PyTorch" in told and as_printed(told)["image"].shape[0] == 4
    before, metadata = load_snapshot(snapshot)
    after = Generator.from_pretrained(out)
    assert after.init_kwargs == before.init_kwargs and not after.training
    assert after.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    inputs = {"c": torch.eye(3)} if before.c_dim else {}
    z = torch.randn(3, before.z_dim)
    assert torch.equal(after(z, **inputs, noise_mode="const"), before(z, **inputs, noise_mode="const"))
    again, its_metadata = load_snapshot(out / "model.safetensors")  # every tool takes it
    assert torch.equal(again.mapping.w_avg, before.mapping.w_avg) and its_metadata["kimg"] == metadata["kimg"]
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]

    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: hsrgan\n") and "fid1000_full 12.25" in card and "160 thousand" in card
    assert ("n0, n1, n2" in card and "RGBA" in card) if before.c_dim else ("grey" in card and '"kimg": 160.0' in card)
    assert not any(b"/home/me" in path.read_bytes() for path in out.iterdir())  # nothing of the publisher's disk
    names: dict = {}
    monkeypatch.chdir(out)
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["images"].shape[0] == 4


def test_hf_in_fp16_is_half_as_large_and_loads_as_fp32(quick, tmp_path):
    exported(quick, "hf", tmp_path / "full")
    exported(quick, "hf", tmp_path / "half", "--precision", "fp16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.55 * sizes[1]
    generator, (truth, _) = Generator.from_pretrained(tmp_path / "half"), load_snapshot(quick)
    assert generator.synthesis.b8.conv0.weight.dtype == torch.float32
    assert torch.equal(generator.synthesis.b8.conv0.weight, truth.synthesis.b8.conv0.weight.half().float())


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
def hf_of_tiny(tiny, folder) -> Path:
    exported(tiny, "hf", folder / "tiny-hf")
    return folder / "tiny-hf"


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
    for says, run in wrong.items():
        with pytest.raises(UserError, match=says):
            check(run)


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
