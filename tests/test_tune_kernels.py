"""The static table of block sizes, and tools/tune_kernels.py, which measures it anew or builds it ahead of time."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hsrgan import kernels
from hsrgan.engine.errors import UserError
from hsrgan.kernels import blocks, builds, conv_table, launch
from hsrgan.kernels.blocks import Row
from hsrgan.kernels.conv_table import Shape

pytest.importorskip("triton")
from hsrgan.tools import kernel_timing, tune_convolutions, tune_kernels

ROOT = Path(__file__).parents[1]
RULES = {"rule", "ahead-of-time builds"}


def row(elements=64, chip="sm_90", shape="*", **changes):
    sizes = (("elements", elements), ("num_warps", 4))
    return replace(Row("bias_act.forward", shape, (4,), chip, sizes, "test"), **changes)


# ---- the table


def test_the_table_is_written_as_it_is_read():
    assert blocks.text(blocks.read()) == blocks.PATH.read_text(encoding="utf-8")


def test_every_row_says_where_it_comes_from():
    """A figure that no device gave is none: a measurement names its device and its day."""
    rows = blocks.read()
    assert all(r.source in RULES or r.source.startswith("measured on ") for r in rows)
    assert len({(r.kernel, r.shape, r.bytes, r.chip) for r in rows}) == len(rows)


@pytest.mark.parametrize("chip", ["", "sm_75", *builds.TARGETS])
def test_every_kernel_has_sizes_on_every_chip(chip):
    """Also on one that nobody has heard of: the rules are last, and fit."""
    asked = {slot.key for slot in tune_kernels.slots(tune_kernels.PROBES, chip)}
    assert {kernel for kernel, *_ in asked} == {r.kernel for r in blocks.read()}
    assert {size for _, _, size, _ in asked} == {2, 4} and {shape for _, shape, *_ in asked} >= {"large", "small"}
    for key in asked:
        blocks.row_for(*key)


def test_the_first_row_that_fits():
    x = torch.empty(1, 4, 128, 128, device="meta")
    small, fp64, half = x[:, :, :64], x.double(), x.half()
    rule = blocks.sizes("bias_act.forward", x)
    with launch.record("sm_90"), blocks.using([row(7, chip="sm_8*"), row(32, shape="large"), row(8)]):
        found = [blocks.sizes("bias_act.forward", t)["elements"] for t in (x, small, fp64, half)]
        assert found == [32, 8, 16, rule["elements"]]  # fp64 has half of what fp32 has
    assert blocks.sizes("bias_act.forward", x) == rule
    with pytest.raises(LookupError, match="has no row for to_rgb of shape 'large', 4 bytes, on any chip"):
        blocks.sizes("to_rgb", x)


def test_launches_take_what_the_table_says():
    x = torch.empty(1, 4, 16, 16, device="meta")
    with launch.record("sm_90") as launches, blocks.using([row(64, sizes=(("elements", 64), ("num_warps", 2)))]):
        kernels.bias_act(x)
    assert launches[0].num_warps == 2 and launches[0].constants["BLOCK_P"] * launches[0].constants["BLOCK_C"] == 64


# ---- measuring


@pytest.fixture
def slot():
    """The forward pass of bias_act on 4 channels of 8×8, in fp32, interpreted."""
    probe = next(probe for probe in tune_kernels.PROBES if probe.kernel == "bias_act.forward")
    found = tune_kernels.slots([probe], "", places=[(4, 8)])
    with kernels.use_backend("triton"):
        yield next(slot for slot in found if slot.bytes == 4)


def stopwatch(slot, seconds):
    """Times each candidate by its sizes, as the table gives them while it runs."""

    def times(run):
        run()
        return {"p50": seconds(dict(blocks.row_for(*slot.key).sizes))}

    return times


def test_the_fastest_candidate_is_written(slot):
    new, what = tune_kernels.tune(
        slot, "cpu", stopwatch(slot, lambda s: s["elements"] * 1e-9 + (s["num_warps"] == 8) * 1e-7), "measured on a toy"
    )
    assert dict(new.sizes) == {"elements": 1024, "num_warps": 4} and "elements 1024" in what
    assert (new.kernel, new.shape, new.bytes, new.chip, new.source) == (*slot.key[:2], (4,), "", "measured on a toy")


def test_one_percent_is_noise(slot):
    new, what = tune_kernels.tune(slot, "cpu", stopwatch(slot, lambda s: 1 - 0.01 * (s["elements"] < 2048)), "")
    assert new is None and "nothing is faster" in what


def test_a_wrong_candidate_is_never_timed(slot, monkeypatch):
    wrong = {"elements": 1024, "num_warps": 4}

    def gate(truth, op):
        return "off" if dict(blocks.row_for(*slot.key).sizes) == wrong else ""

    def seconds(sizes):
        assert sizes != wrong
        return float(sizes["elements"])

    monkeypatch.setattr(kernel_timing.Truth, "gate", gate)
    new, what = tune_kernels.tune(slot, "cpu", stopwatch(slot, seconds), "")
    assert new is None and "1 refused" in what
    wrong = {"elements": 2048, "num_warps": 4}  # today's own
    with pytest.raises(UserError, match=r"bias_act.forward small, 4 bytes, D conv0, float32, forward: off"):
        tune_kernels.tune(slot, "cpu", stopwatch(slot, seconds), "")


def test_candidates_are_few_and_change_one_size():
    for each in blocks.read():
        found = tune_kernels.candidates(each)
        assert found[0] == each and len(found) <= 13
        assert all(sum(a != b for a, b in zip(each.sizes, new.sizes, strict=True)) == 1 for new in found[1:])


def test_new_rows_come_first_and_replace_their_like():
    old = [row(1), row(2, chip="*")]
    assert tune_kernels.merged(old, [row(3), row(4, chip="sm_80")]) == [row(3), row(4, chip="sm_80"), row(2, chip="*")]


# ---- convolutions


def test_layers_ask_for_their_convolutions_once():
    with conv_table.using((), alone=True):
        found = {slot.key[0]: slot for slot in tune_convolutions.slots("sm_90", [(32, 1024)])}
    forms = {(s.form, s.inputs, s.outputs, s.fused): slot.today.run for s, slot in found.items()}
    assert {s.resolution for s in found} == {512, 1024}  # D's skip comes after its downsampling
    assert {slot.key[1:] for slot in found.values()} == {("half", "sm_90")}
    assert forms["3x3", 32, 32, True] == "gemm" and forms["3x3", 32, 32, False] == "library"
    assert forms["3x3 up", 64, 32, True] == "gemm" and forms["3x3 down dw", 32, 64, False] == "gemm"
    assert found[Shape("3x3", 32, 32, 1024, True)].today.tile == conv_table.Tile(128, 32, 32, 4, 4)


def test_each_implementation_and_tile_is_a_candidate_once():
    today = conv_table.Row(Shape("3x3", 32, 32, 1024, True), "half", "sm_90", "library", None, "")
    found = tune_convolutions.candidates(today, "measured on a toy")
    tiles = [row.tile for row in found[1:]]
    assert found[0] == today._replace(source="measured on a toy") and all(row.run == "gemm" for row in found[1:])
    assert len(set(tiles)) == len(tiles) == 5 and set(conv_table.tiles("half", "sm_90")) < set(tiles)
    dw = today._replace(shape=Shape("3x3 dw", 32, 32, 1024, True))
    assert [(row.run, row.tile) for row in tune_convolutions.candidates(dw, "")] == [("library", None), ("gemm", None)]


@pytest.mark.parametrize("faster", ["gemm", "library"])
def test_the_faster_convolution_is_written(faster):
    """Of the smallest layer there is, interpreted; what is timed is what the table says."""
    with kernels.use_backend("triton"):
        slots = tune_convolutions.slots("", [(4, 8)])
        slot = next(slot for slot in slots if slot.key[0] == Shape("3x3", 4, 4, 8, False))

        def watch(run):
            run()
            row = conv_table.measured(slot.key[0], torch.float16, "")
            return {"p50": 1.0 if row.run == faster else 2.0}

        new, what = tune_convolutions.tune(slot, "cpu", watch, "measured on a toy")
    if faster == slot.today.run:
        assert new is None and "nothing is faster" in what
    else:
        assert (new.shape, new.run, new.source) == (slot.key[0], faster, "measured on a toy") and faster in what


def test_new_convolutions_replace_their_like():
    a = conv_table.Row(Shape("3x3", 32, 32, 1024, True), "half", "sm_90", "library", None, "old")
    b, c = a._replace(chip="sm_80"), a._replace(run="gemm", tile=conv_table.Tile(128, 32, 32, 4, 4), source="new")
    assert tune_convolutions.merged([a, b], [c]) == [c, b]


# ---- the command line


def test_ctrl_c_writes_what_was_found(table, monkeypatch):
    """One row of each table; the first slot is wrong, which is said, and the last is interrupted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    of_conv = conv_table.Row(Shape("3x3", 32, 32, 1024, True), "half", "sm_90", "library", None, "measured on a toy")

    def interrupted(slot, *_):
        if slot == "second":
            raise KeyboardInterrupt
        return of_conv, "faster"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy")
    monkeypatch.setattr(launch, "chip", lambda x: "sm_90")
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(kernel_timing, "Stopwatch", lambda: None)
    def right_or_wrong(slot, *_):
        if slot == "wrong":
            raise UserError("fir4 is off")
        return row(7, source="measured on a toy"), "faster"

    monkeypatch.setattr(tune_kernels, "slots", lambda probes, chip: ["wrong", "only"])
    monkeypatch.setattr(tune_kernels, "tune", right_or_wrong)
    monkeypatch.setattr(tune_convolutions, "slots", lambda chip: ["first", "second"])
    monkeypatch.setattr(tune_convolutions, "tune", interrupted)
    done = CliRunner().invoke(tune_kernels.app, ["--table", str(table)])
    assert done.exit_code == 130 and "not timed: fir4 is off" in done.output, done.output
    assert blocks.read(table)[0] == row(7, source="measured on a toy") and len(blocks.read(table)) > 1
    assert conv_table.read(table.with_name("convolutions.json")) == (of_conv,)


@pytest.fixture
def table(tmp_path):
    return Path(shutil.copy(blocks.PATH, tmp_path / "blocks.json"))


def test_without_a_gpu_one_line_and_nothing_written(table, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = table.read_bytes()
    done = CliRunner().invoke(tune_kernels.app, ["--table", str(table)])
    assert done.exit_code == 2 and done.output.startswith("error: no GPU here: nothing was timed")
    assert len(done.output.splitlines()) == 1
    assert table.read_bytes() == before and list(table.parent.iterdir()) == [table]


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        (["--kernel", "bias"], None, "--kernel bias: there are bias_act.forward,"),
        (["--target", "sm_70"], None, "--target sm_70: there are sm_80,"),
        (["--check"], "[{}]", "cannot be read as a table of block sizes"),
        (["--check"], "no", "cannot be read as a table of block sizes"),
    ],
)
def test_mistakes_get_one_line(table, monkeypatch, options, content, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if content is not None:
        table.write_text(content)
    done = CliRunner().invoke(tune_kernels.app, ["--table", str(table), *options])
    assert done.exit_code == 2 and message in done.output and len(done.output.splitlines()) == 1


def test_check_names_the_row_that_spills(table):
    """65,536 values in four warps are 512 registers; the others of the kernel are built as well, and fit."""
    bad = row(65536, shape="large", source="measured on nothing")
    table.write_text(blocks.text([bad, *blocks.read()]), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ["--check", "--table", table, "--target", "sm_90", "--kernel", "bias_act.forward"]
    command = [sys.executable, ROOT / "tools" / "tune_kernels.py", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    *lines, last = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    assert done.returncode == 1 and len(lines) == 1, done.stdout + done.stderr
    where = "bias_act.forward, shape large, 4 bytes, chip sm_90: on sm_90, x [8, 64, 512, 512], forward "
    assert lines[0].startswith(where)
    assert last.endswith("1 problems")
