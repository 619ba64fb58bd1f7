"""Hostile and damaged files: one line, exit 2, nothing written, nothing executed, in little memory and time."""

import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import hostile_files
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hsrgan.engine.errors import UserError
from hsrgan.engine.import_rosinality import read_rosinality
from hsrgan.engine.import_stylegan import read_stylegan
from hsrgan.engine.safe_pickle import read_pickle

CASES = [("pickle", name) for name in hostile_files.PICKLES]
CASES += [(tool, name) for name in hostile_files.CHECKPOINTS for tool in ("checkpoint", "vgg16", "anycost")]
SECONDS = 20  # of CPU time, for the slowest on a slow machine


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """All files of the corpus through their command lines, in one process that may take little memory."""
    folder = tmp_path_factory.mktemp("hostile")
    commands, files = [], {}
    for tool, name in CASES:
        corpus = hostile_files.PICKLES if tool == "pickle" else hostile_files.CHECKPOINTS
        path = folder / tool / f"{len(files)}.pkl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(corpus[name][0](path.with_suffix(".executed")))
        files[tool, name] = path
        out = str(path.with_suffix(".safetensors"))
        commands.append({
            "pickle": ["weights", "stylegan", str(path), out, "--all"],
            "checkpoint": ["weights", "stylegan", str(path), out, "--all"],
            "vgg16": ["weights", "vgg16", str(path), "--own-weights", "--cache", out],
            "anycost": ["attributes", "anycost", str(path), "--out", out],
        }[tool])  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(commands))
    before = set(folder.rglob("*"))
    command = [sys.executable, Path(__file__).with_name("refuse_all.py"), folder / "commands.json", folder / "out.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr  # a crash of the process is none of our lines
    report = json.loads((folder / "out.json").read_text())
    written = set(folder.rglob("*")) - before - {folder / "out.json"}
    return report["limited"], dict(zip(CASES, report["rows"], strict=True)), written


@pytest.mark.parametrize(("tool", "name"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_a_file_is_refused_with_one_line(refusals, tool, name):
    row = refusals[1][tool, name]
    assert row["failed"] is None and row["code"] == 2, row
    assert row["stderr"].startswith("error: ") and row["stderr"].count("\n") == 1 and row["stderr"].endswith("\n"), row
    assert row["stderr"][:-1].isprintable() and len(row["stderr"]) < 700, row
    says = (hostile_files.PICKLES if tool == "pickle" else hostile_files.CHECKPOINTS)[name][1]
    assert re.search(says, row["stderr"]), row
    assert row["seconds"] < SECONDS, row


def test_nothing_was_written_or_executed_and_memory_was_limited(refusals):
    limited, rows, written = refusals
    assert written == set() and limited
    assert len(rows) == len(CASES) >= 30


def test_the_corpus_does_what_it_is_feared_for(tmp_path):
    """Read as trusting programs read, the first file leaves its mark."""
    mark = tmp_path / "executed"
    pickle.loads(hostile_files.PICKLES["os.system"][0](mark))
    assert mark.exists()


# ---- fuzzing

VALID = hostile_files.valid()
SNIPPETS = [  # with a mark that appears in the working folder
    hostile_files.touch("executed"),
    hostile_files.call("builtins", "exec", hostile_files.text("open('executed', 'w')")),
    b"cposix\nsystem\n", b"R", b"b", b"\x81", b"\x92", b"o", b"(S'touch executed'\nios\nsystem\n", b"\x93", b"Q", b"0",
    b"2", b"1", b"(", b"t", b"s", b"u", b"}", b"]", b"a", b"e", b"h\x00", b"r\xff\xff\xff\xff",
    b"\x95" + b"\xff" * 8, b".", b"\x8e" + b"\x7f" * 8, b"\x8b\xff\xff\xff\x7f", b"N\x85R", b"I9\n", b"\x94",
    b"ctorch.storage\n_load_from_bytes\n",
]  # fmt: skip
fuzz = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused_or_whole(read, data: bytes) -> None:
    """Whatever `data` is, reading it ends in one line or in a network, and leaves no mark."""
    Path("fuzzed").write_bytes(data)
    try:
        found = read(Path("fuzzed"))
    except UserError as error:
        assert "\n" not in " ".join(str(error).split())
    else:
        assert all(v.isfinite().all() for v in found.networks["G_ema"].state.values())
    assert not Path("executed").exists()


@fuzz
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([*SNIPPETS, b"\x00", b"\xff", b"K"]), st.booleans()),
                min_size=1, max_size=4))  # fmt: skip
def test_a_valid_pickle_with_anything_in_it(here, changes):
    data = bytearray(VALID)
    for place, snippet, replaces in changes:
        start = int(place * len(data))
        data[start : start + len(snippet) * replaces] = snippet
    refused_or_whole(read_stylegan, bytes(data))


@fuzz
@given(st.floats(0, 1), st.floats(0, 1))
def test_a_valid_pickle_with_a_part_cut_out(here, start, stop):
    start, stop = sorted((int(start * len(VALID)), int(stop * len(VALID))))
    refused_or_whole(read_stylegan, VALID[:start] + VALID[stop:])


@settings(fuzz, max_examples=400)
@given(st.lists(st.one_of(st.sampled_from(SNIPPETS), st.binary(max_size=3)), max_size=30))
@example([SNIPPETS[0]])
def test_opcodes_in_any_order(here, opcodes):
    refused_or_whole(read_stylegan, b"\x80\x04" + b"".join(opcodes) + b".")
    refused_or_whole(read_stylegan, hostile_files.g_ema(hostile_files.persistent(x=b"".join(opcodes))))


@settings(fuzz, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), st.floats(0, 1),
       st.booleans())  # fmt: skip
def test_a_checkpoint_with_bytes_changed(here, changes, stop, cut):
    data = bytearray(hostile_files.checkpoint())
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    refused_or_whole(read_rosinality, bytes(data[: int(stop * len(data))] if cut else data))


def test_the_valid_pickle_is_valid(here):
    refused_or_whole(read_stylegan, VALID)
    Path("valid").write_bytes(VALID)
    assert len(read_stylegan(Path("valid")).networks["G_ema"].state) == 56


def test_what_a_pickle_holds_is_read_as_it_is():
    value = {"a": [1, -2, 2**70, 1.5, None, True], 3: (), "b": ((1,), (1, 2), (1, 2, 3), (4,) * 9)}
    value["c"] = [value["a"], "é" * 300, {"d": "\n"}]
    for protocol in range(2, 6):
        value["e"] = [b"x" * 300, bytearray(b"y")] if protocol == 5 else [b"x"] if protocol > 2 else []
        assert read_pickle(io.BytesIO(pickle.dumps(value, protocol))) == value
    assert read_pickle(io.BytesIO(pickle.dumps({"x"}, 4))) == ["x"]  # no one asks a set anything
    assert torch.tensor(read_pickle(io.BytesIO(pickle.dumps([1, 2], 0)))).sum() == 3
