"""init_from where heads on a teacher fit by their shapes, and were fitted to something else."""

import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_graphs import recipe

from hsrgan.engine import assembly, checkpoint, transfer
from hsrgan.engine.distributed import World
from hsrgan.engine.freezing import frozen_parameters
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.projected import ProjectedHeads, VisionAidedHeads
from hsrgan.engine.run_state import GeneratorWithHeads

RECIPE = {
    "hsr": {"teacher": "a.safetensors", "weights": None, "layers": {"8": 3, "16": 1}},
    "projected": {"teacher": "resnet10t", "weights": "w.pth", "layers": [1, 3]},
    "vision_aided": {"teacher": "a.safetensors", "weights": None, "layers": [1, 3]},
}
FILES = {"hsr": "a.safetensors", "projected": "w.pth", "vision_aided": "a.safetensors"}  # which hold their names
HEADS = {"heads.8.", "heads.16.", "projected.", "vision_aided."}


def networks(seed):
    """G with heads, D with both kinds of its own, and G_ema, of random values."""
    torch.manual_seed(seed)
    shape = {"img_resolution": 16, "c_dim": 0, "channel_base": 64, "channel_max": 8, "mapping_layers": 1}
    g, d = Generator(z_dim=6, w_dim=8, **shape), Discriminator(**shape)
    channels, grids = {1: 6, 3: 6}, {1: (4, 4), 3: (4, 4)}
    d.add_module("projected", ProjectedHeads(channels, grids, 0, 4))
    d.add_module("vision_aided", VisionAidedHeads(channels, 0, 4))
    return {"G": GeneratorWithHeads(g, HSRHeads({8: 8, 16: 4}, {8: 5, 16: 5}, 7)), "D": d, "G_ema": copy.deepcopy(g)}


def written(folder, **facts):
    """A checkpoint under RECIPE, whose files lie in the working folder: its networks and its path."""
    for name in ("a.safetensors", "w.pth"):
        Path(name).write_text(name)
    nets = networks(0)
    parts = {name: net.state_dict() for name, net in nets.items()} | {"G_adam": {}, "D_adam": {}}
    state = {"format": checkpoint.FORMAT, "recipe": RECIPE, **facts}
    checkpoint.write_folder(Path(folder), checkpoint._files(parts, state))
    return nets, folder


@pytest.fixture
def source(tmp_path, monkeypatch):
    """One that was written before they kept the teachers' sha256."""
    monkeypatch.chdir(tmp_path)
    return written("1")


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sha256s = {name: hashlib.sha256(file.encode()).hexdigest() for name, file in FILES.items()}
    return written("1", teachers=sha256s)


def anew(source, changes: dict) -> set[str]:
    """The heads that begin anew under RECIPE with these changes; all else is carried, they to the last bit not."""
    (there, path), here = source, networks(1)
    changed = {name: {**section, **changes.get(name, {})} for name, section in RECIPE.items()}
    before = {name: copy.deepcopy(net.state_dict()) for name, net in here.items()}
    report = transfer.start_from(path, *here.values(), (), transfer.targets_of(changed))
    found = set()
    for network in ("G", "D"):
        for key, now in here[network].state_dict().items():
            name = transfer.published(key)
            head = next((prefix for prefix in HEADS if name.startswith(prefix)), None)
            new = name in report.new(network)
            assert torch.equal(now, before[network][key] if new else there[network].state_dict()[key]), name
            assert head or not new
            found |= {head} if new else set()
    return found


@pytest.mark.parametrize(("changes", "begin"), [
    ({}, set()),
    ({"hsr": {"teacher": "b.safetensors"}}, {"heads.8.", "heads.16."}),
    ({"hsr": {"layers": {"8": 3, "16": 0}}}, {"heads.16."}),
    ({"projected": {"weights": None}}, {"projected."}),
    ({"projected": {"teacher": "resnet18"}, "vision_aided": {"layers": [1, 2]}}, {"projected.", "vision_aided."}),
])  # fmt: skip
def test_heads_on_another_teacher_or_other_layers_begin_anew(source, changes, begin):
    assert anew(source, changes) == begin


def test_a_teacher_is_the_same_by_whatever_path(source, tmp_path):
    (tmp_path / "copy.safetensors").write_text("a.safetensors")
    (tmp_path / "other.safetensors").write_text("other")
    same = {"teacher": str(tmp_path / "copy.safetensors")}
    assert anew(source, {"hsr": same, "vision_aided": {"teacher": "./a.safetensors"}}) == set()
    assert anew(source, {"hsr": {"teacher": "other.safetensors"}}) == {"heads.8.", "heads.16."}


@pytest.mark.parametrize(("file", "changes", "begin"), [
    ("a.safetensors", {}, {"heads.8.", "heads.16.", "vision_aided."}),
    ("w.pth", {}, {"projected."}),
    ("other", {}, set()),
    ("other", {"projected": {"teacher": "resnet18"}, "hsr": {"layers": {"8": 2, "16": 1}}}, {"heads.8.", "projected."}),
    ("other", {"hsr": {"teacher": "timm", "weights": "a.safetensors"}}, {"heads.8.", "heads.16."}),
])  # fmt: skip
def test_a_teacher_made_anew_under_its_name_is_another(hashed, file, changes, begin):
    Path(file).write_text("fitted again")
    assert anew(hashed, changes) == begin


def test_a_teacher_is_known_by_its_content_when_its_old_file_is_gone(hashed):
    Path("a.safetensors").rename("b.safetensors")
    assert anew(hashed, {"hsr": {"teacher": "b.safetensors"}, "vision_aided": {"teacher": "b.safetensors"}}) == set()


@pytest.mark.parametrize("kept", ["source", "hashed"])
def test_a_run_asks_its_recipe_and_says_what_they_were_on(request, kept, tmp_path, capsys):
    here, source = networks(1), request.getfixturevalue(kept)
    settings = recipe(run_dir=str(tmp_path), init_from=source[1])  # HSR by another teacher, and no other heads
    frozen = frozen_parameters(None, here["G"], here["D"])
    assembly.first_values(settings, World(0, 1, 0, 1, torch.device("cpu")), None, *here.values(), frozen)
    assert "new" in capsys.readouterr().out
    fates = json.loads((tmp_path / "transfer.json").read_text())["tensors"]
    found = {(fate["tensor"].split(".conv")[0], fate["why"]) for fate in fates if fate["what"] == "new"}
    file = f"a.safetensors{' (sha256 163f4dbbadd9…)' if kept == 'hashed' else ''}"
    assert found == {(f"heads.{r}", f"a head on {file}, layer {layer}, there") for r, layer in ((8, 3), (16, 1))}


def test_a_run_that_goes_on_with_another_teacher_says_so():
    """One that was fitted anew under its old name; a state.json of before says nothing, nor does timm's own."""
    teachers = {"hsr": SimpleNamespace(sha256="b"), "projected": SimpleNamespace(sha256=None)}
    cases = [({}, []), ({"hsr": "b", "projected": None}, []), ({"hsr": "a", "projected": None}, ["hsr"])]
    for before, changed in cases:
        assert assembly.changed_teachers({"teachers": before}, teachers) == changed
    assert assembly.changed_teachers({}, teachers) == []
