"""init_from: from which files, in which company, what is told of it, and what is refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transfer_networks import fates, network_file, networks, of_block, saved, snapshot_of, start, state

from hsrgan.engine.errors import UserError

# Where it comes from


def test_a_snapshot_alone_starts_both_generators_and_says_that_d_is_new(tmp_path):
    there, here = networks(0), networks(1, heads=(8,))
    before = state(here["D"])
    report = start(snapshot_of(tmp_path / "s.safetensors", there["G_ema"]), here)
    old = state(there["G_ema"])
    for network in ("G", "G_ema"):
        now = state(here[network])
        assert all(torch.equal(now[key], value) for key, value in old.items())
    assert all(torch.equal(state(here["D"])[key], value) for key, value in before.items())
    assert {fate.why for fate in report.fates if fate.network == "D"} == {"init_from has no D"}
    assert fates(report, "G", "new") == of_block(here["G"], "heads.")


def test_networks_beside_a_snapshot_come_along(tmp_path):
    there, here = networks(0, heads=(8,)), networks(1, heads=(8,))
    path = snapshot_of(tmp_path / "out.safetensors", there["G_ema"])
    network_file(tmp_path / "out.G.safetensors", there["G"].generator, "G")
    network_file(tmp_path / "out.D.safetensors", there["D"], "D")
    network_file(tmp_path / "out.heads.safetensors", there["G"].heads, "heads")
    report = start(path, here)
    assert all(torch.equal(a, b) for name in there for a, b in zip(state(there[name]).values(),
               state(here[name]).values(), strict=True))  # fmt: skip
    assert report.files["D"].endswith("out.D.safetensors") and report.files["G"].endswith("out.G.safetensors")
    assert not torch.equal(there["G"].generator.mapping.fc0.weight, there["G_ema"].mapping.fc0.weight)
    only_d = networks(2)
    report = start(str(tmp_path / "out.D.safetensors"), only_d)
    assert torch.equal(only_d["D"].b4.out.weight, there["D"].b4.out.weight)
    assert {fate.what for fate in report.fates if fate.network != "D"} == {"new"}
    network_file(tmp_path / "out.D.safetensors", there["G_ema"], "G_ema")
    with pytest.raises(UserError, match=r"out\.D\.safetensors holds G_ema, not D"):
        start(path, networks(1))


def test_heads_of_the_same_shape_come_along(tmp_path):
    there, here = networks(0, heads=(8, 16)), networks(1, heads=(8, 16))
    there["G"].heads.heads["16"].conv1x1_2.weight = nn.Parameter(torch.zeros(6, 7, 1, 1))  # of another teacher
    report = start(saved(tmp_path / "1", there), here)
    assert fates(report, "G", "new") == {"heads.16.conv1x1_2.weight"}
    assert torch.equal(here["G"].heads.heads["8"].conv1x1_1.weight, there["G"].heads.heads["8"].conv1x1_1.weight)


def test_the_report_is_written_and_shown(tmp_path, capsys):
    from rich.console import Console

    there, here = networks(0), networks(1, img_resolution=32, c_dim=2)
    report = start(saved(tmp_path / "1", there), here)
    report.write(tmp_path)
    written = json.loads((tmp_path / "transfer.json").read_text())
    assert written["init_from"] == str(tmp_path / "1") and "Adam" in written["anew"]
    assert len(written["tensors"]) == len(report.fates) > 100
    fc0 = next(t for t in written["tensors"] if (t["network"], t["tensor"]) == ("G", "mapping.fc0.weight"))
    assert fc0 == {
        "network": "G", "tensor": "mapping.fc0.weight", "what": "partly", "count": 48, "there": [8, 6],
        "here": [8, 14], "why": "8×6 of 8×14, from 8×6, times √(14/6)",
    }  # fmt: skip
    Console(width=120).print(report.table())
    shown = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in rows] == [
        ["G, G_ema", "loaded"], ["", "partly"], ["", "new"], ["D", "loaded"], ["", "new"], ["", "dropped"]
    ]  # fmt: skip
    assert rows[1][2:] == ["1", "48", "mapping"] and rows[2][4] == "b32 mapping" and rows[5][4] == "b16"


# Refusals


def spoilt(path: Path, change, metadata=None) -> str:
    tensors = {key: value.clone() for key, value in networks(0)["G_ema"].state_dict().items()}
    change(tensors)
    default = {"format": "hsrgan-snapshot-1", "dataset": "{}"}
    save_file(tensors, path, default if metadata is None else metadata)
    return str(path)


def nothing(tensors):
    pass


def poison(tensors):
    tensors["synthesis.b8.conv0.bias"][0] = torch.nan


def other_filter(tensors):
    tensors["synthesis.b8.resample_filter"] = torch.eye(4)


def rename(tensors):
    for key in list(tensors):
        tensors[f"x.{key}"] = tensors.pop(key)


def only_buffers(tensors):
    for key in list(tensors):
        if not key.endswith(("resample_filter", "noise_const")):
            del tensors[key]


def pickle(path: Path) -> str:
    path.with_suffix(".pkl").write_bytes(b"anything")
    return str(path.with_suffix(".pkl"))


REFUSALS = {
    "nan": (partial(spoilt, change=poison), "synthesis.b8.conv0.bias is not finite numbers"),
    "filter": (partial(spoilt, change=other_filter), "synthesis.b8.resample_filter is not the .1, 3, 3, 1. filter"),
    "foreign": (partial(spoilt, change=rename), "none of its tensors is one of the recipe's networks"),
    "buffers": (partial(spoilt, change=only_buffers), "none of its tensors is one of the recipe's networks"),
    "no format": (partial(spoilt, change=nothing, metadata={}), "its format is not stated; give a checkpoint folder"),
    "format": (partial(spoilt, change=nothing, metadata={"format": "hsrgan-teacher-1"}), "format is hsrgan-teacher-1"),
    "no facts": (partial(spoilt, change=nothing, metadata={"format": "hsrgan-snapshot-1"}), "not a snapshot's"),
    "cut": (lambda path: path.write_bytes(b"\x00" * 9) and str(path), "damaged or no safetensors file"),
    "absent": (str, "does not exist: give a checkpoint folder"),
    "folder": (lambda path: str(path.parent), "cannot be read.*holds state.json"),
    "no folder": (lambda path: str(path.with_suffix("")), "cannot be read.*holds state.json"),
    "pickle": (pickle, "is no .safetensors file; give .* of tools/import_weights.py"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_start_is_refused_and_changes_nothing(tmp_path, case):
    make, message = REFUSALS[case]
    here = networks(1)
    before = {name: state(module) for name, module in here.items()}
    with pytest.raises(UserError, match=message) as refusal:
        start(make(tmp_path / "s.safetensors"), here)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert all(torch.equal(state(here[name])[key], value) for name in here for key, value in before[name].items())
