"""tools/export.py: every format at any batch beside PyTorch."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from export_runs import TINY, exported, write
from safetensors.torch import load_file

from hsrgan.engine import exporting
from hsrgan.engine.config import load_recipe
from hsrgan.engine.exporting import BATCHES, Graph
from hsrgan.engine.model import Generator
from hsrgan.engine.snapshot import load_snapshot

RECIPE = Path(__file__).parents[1] / "recipes/quickstart.yaml"


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


def as_printed(stdout: str) -> dict:
    """The names that the printed lines of Python leave behind."""
    lines = [text.strip() for text in stdout.split("run it:\n")[1].splitlines()]
    assert len(lines) == 3
    names: dict = {}
    try:
        exec("\n".join(lines), names)
    finally:
        torch.set_default_device(None)  # as a script's, it would be every later test's
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
