"""Every kernel compiles for every target without spills and within its shared memory, on a machine without a GPU."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hsrgan.engine.model import Discriminator, Generator
from hsrgan.kernels import builds, conv_table, launch
from hsrgan.kernels.builds import Build
from hsrgan.tools import kernel_builds, kernel_shapes

ROOT = Path(__file__).parents[1]


def run(tmp_path, script, *options):
    """The exit code, the rows and what was printed, of a process in which @triton.jit compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "120"}
    rows = tmp_path / "builds.json"
    command = [sys.executable, ROOT / script, *options, "--json", rows]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert rows.exists(), done.stderr
    return done.returncode, json.loads(rows.read_text()), done.stdout


OPS = {call.op for call in kernel_shapes.calls()} - {"conv2d", "conv2d_bias_act", "modulated_conv2d"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ops", "options"),
    [
        (OPS, ["--resolution=64", "--resolution=1024", "--dtype=float16"]),
        (OPS, ["--resolution=64", "--resolution=1024", "--dtype=float32", "--target=sm_100"]),
        ({"feature_match"}, ["--resolution=8", "--dtype=float16", "--dtype=float32"]),  # the teacher's grid is finer
    ],
    ids=["half", "single", "finer grid"],
)
def test_every_kernel_is_fit_to_ship(tmp_path, ops, options):
    """Few and many channels, sizes that divide by 16 and that do not. bfloat16 compiles to what float16 does, and fp32
    is built where kernels spill first. All of it, other resolutions too: `python tools/kernel_builds.py`.
    """
    options = [*options, "--model=ffhq1024", *(f"--op={op}" for op in sorted(ops))]  # the convolutions': the next test
    code, rows, _ = run(tmp_path, "tools/kernel_builds.py", *options)
    bad = [f"{row['kernel']} {row['target']} {row['first']}: {row['problems']}" for row in rows if row["problems"]]
    assert bad == [] and code == 0


def test_what_only_tests_ask_of_a_gpu_compiles(tmp_path):
    """Products in fp64, and sizes of 1, which the interpreter takes where the compiler does not."""
    _, rows, _ = run(tmp_path, "tests/edge_builds.py")
    assert [row["built"] for row in rows if row["error"]] == []
    assert {row["built"]["kernel"].split(".")[1] for row in rows} >= {"conv_gemm", "dx_kernel", "dw_kernel"}


@pytest.mark.timeout(600)
def test_every_tile_of_the_convolutions_table(tmp_path):
    """Fit to ship on its own architecture, and its products run on the matrix units: on sm_90 as wgmma (HGMMA)."""
    code, rows, _ = run(tmp_path, "tests/conv_builds.py")
    assert [f"{row['target']} {row['tile']}: {row['problems']}" for row in rows if row["problems"]] == [] and code == 0
    expected = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
    for row in rows:
        assert row["matrix"] == expected[row["target"]] or row["kind"] == "ieee" or "bias_act" in row["kernel"], row
    # x by 8 bytes into shared memory and the L1 cache, where the other eight taps find it
    copies = [row["copies"].get("LDGSTS.E.64", 0) for row in rows if "copies" in row]
    assert len(copies) == len(conv_table.TILES["half", "sm_90"]) and min(copies) > 0
    assert {(row["kind"], tuple(row["tile"])) for row in rows} == {
        (kind, tile) for (kind, _), tiles in conv_table.TILES.items() for tile in tiles if kind != "fp64"
    } | {("layer", ())}


def test_a_sound_op(tmp_path):
    code, rows, printed = run(tmp_path, "tests/build_samples.py", "scaled_square")
    assert code == 0 and "_backward" in printed
    assert {row["target"] for row in rows} == set(builds.TARGETS)
    assert {row["kernel"] for row in rows} == {"scaled_square._forward", "scaled_square._backward"}
    assert all(8 < row["registers"] < 128 and row["spills"] == 0 for row in rows)
    assert all((20 < row["executed"] < 2000 and row["issue"] > 0) != row["target"].startswith("gfx") for row in rows)
    for target in builds.TARGETS:
        # the two models launch the same: in each dtype one forward, one first and one second backward
        assert len([row for row in rows if row["target"] == target]) == 9


@pytest.mark.parametrize(("op", "target"), [("spilling", "sm_90"), ("spilling_wide", "gfx942")])
def test_a_kernel_that_spills_is_reported(tmp_path, op, target):
    options = ["--dtype", "float32", "--model", "ffhq256", "--target", target]
    code, (row,), printed = run(tmp_path, "tests/build_samples.py", op, *options)
    assert code == 1 and "1 builds, 1 of them not fit to ship" in printed
    assert row["spills"] > 0 and row["problems"] == [f"spills {row['spills']} bytes a thread"]


def test_arguments_specialise_as_at_a_call(tmp_path):
    """A 1 is a constant, what divides by 16 is known to, and do_not_specialize is left alone."""
    options = ["--dtype", "bfloat16", "--model", "ffhq256", "--target", "sm_90"]
    code, rows, _ = run(tmp_path, "tests/build_samples.py", "special", *options)
    (row,) = rows
    expected = "X:*bf16/16 Y:*bf16/16 one=1 sixteen:i32/16 seven:i32 fixed:i32 wide:i64/16 ratio:fp32 BLOCK=128"
    assert row["variant"] == expected
    assert (row["num_warps"], row["num_stages"], code) == (8, 3, 0)


def test_interpreted_kernels_are_refused():
    import scaled_square

    with launch.record() as launches:
        scaled_square.scaled_square(torch.empty(1, 2, 3, 4, device="meta"), torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="without TRITON_INTERPRET"):
        builds.build_all(launches)
    with pytest.raises(ValueError, match="unknown target 'sm_70'"):
        builds.build_all(launches, ["sm_70"])


def a_build(**changes):
    return Build(**{**dict(kernel="k", target="sm_90", variant="", num_warps=4, num_stages=2, registers=32, shared=0,
                           spills=0), **changes})  # fmt: skip


def test_problems_are_what_a_chip_cannot_take():
    assert a_build(shared=232_448).problems() == []
    assert a_build(shared=232_449).problems() == ["needs 232,449 bytes of shared memory; sm_90 has 232,448"]
    assert len(a_build(target="sm_80", shared=166_913, spills=8).problems()) == 2
    assert a_build(target="gfx942", shared=65_537).problems() != []
    assert a_build(error="no").problems() == ["does not compile: no"]


@pytest.mark.parametrize(
    ("changes", "gpu", "programs", "limit"),
    [
        ({"registers": 32}, "H200", 16, "warps"),
        ({"registers": 72}, "H200", 7, "registers"),  # 65,536 / (72·32) = 28.4 warps
        ({"registers": 255}, "H200", 2, "registers"),
        ({"registers": 33, "num_warps": 8}, "H200", 6, "registers"),  # handed out as 40
        ({"shared": 100_000}, "H200", 2, "shared memory"),
        ({"num_warps": 1, "registers": 16}, "H200", 32, "programs"),
        ({"registers": 128, "target": "sm_80"}, "A100", 4, "registers"),
        ({"registers": 96, "target": "gfx942"}, "MI300X", 5, "registers"),  # 512 / 96 = 5 waves a SIMD
        ({"shared": 32_768, "target": "gfx942"}, "MI300X", 2, "shared memory"),
    ],
)
def test_occupancy(changes, gpu, programs, limit):
    found = builds.occupancy(a_build(**changes), gpu)
    assert (found.programs, found.limit) == (programs, limit)
    assert found.share == found.warps / builds.GPUS[gpu].warps


def test_bytes_count_each_tensor_and_each_element_once():
    x = torch.empty(2, 3, 4, device="meta", dtype=torch.float16)
    row = torch.empty(3, 1, device="meta").expand(3, 4)
    each = launch.Launch(None, (1,), (x, x, row, 7, torch.empty(0, device="meta"), x[:, :, ::2]), {}, 4, 2)
    assert builds.bytes_moved(each) == 24 * 2 + 3 * 4 + 12 * 2


def test_floor_is_the_slower_of_bytes_and_flops():
    assert builds.floor_seconds(4.8e12, 0, "H200") == 1
    assert builds.floor_seconds(4.8e12, 989e12 * 2, "H200", "half") == 2
    assert builds.floor_seconds(4.8e12, 989e12 * 2, "H200", "tf32") == 4


def test_the_table_has_the_whole_name_of_a_kernel():
    facts = {"first": "", "issue": 12.34, "problems": []}
    name = "feature_distance_triton.grow_gradient_kernel"
    one = a_build(kernel=name, shared=232_448, registers=255, matrix="UTCHMMA")
    console = Console(width=kernel_builds.WIDTH, file=io.StringIO())
    kernel_builds.print_rows([asdict(one) | facts], console)
    assert name in console.file.getvalue() and "12.34" in console.file.getvalue()


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FFMA R5, R16, UR23, R90 ;
        /*0020*/              @!P6 LDG.E.128 R4, desc[UR16][R20.64] ;
        /*0030*/               @P6 BRA `(.L_x_0) ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   STG.E.128 desc[UR16][R10.64], R4 ;
.L_x_1:
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""


def test_instructions_of_a_thread_are_counted_as_often_as_they_run():
    assert builds._executed(SASS, 5) == 1 + 3 * 5 + 4
    assert builds._executed(SASS, 0) == 0  # a loop of unknown turns
    assert builds._executed(SASS.replace("@P6 BRA", "@P6 FFMA"), 0) == 8
    twice = SASS.replace("STG.E.128", "BRA `(.L_x_0)")
    assert builds._executed(twice, 5) == 0
    assert [builds.turns(launch.Launch(None, (1,), (), constants, 4, 2)) for constants in (
        {"ROWS": 32, "UNROLL": 2}, {"TILES": 8}, {"BLOCKS": 3}, {"BLOCK_K": 64})] == [16, 8, 3, 0]  # fmt: skip


def test_issue_floor_is_one_instruction_a_clock_and_scheduler():
    each = launch.Launch(None, (132, 1), (), {}, 4, 2)
    clock = builds.GPUS["H200"].vector / (132 * 128 * 2)  # 128 multiply-adds a clock and unit
    assert builds.issue_seconds(a_build(executed=1000), each, "H200") == pytest.approx(1000 / clock)


@pytest.mark.parametrize(
    "call", kernel_shapes.calls({"tiny": (16, 64)}, batch=2), ids=lambda call: f"{call.op} {call.name}"
)
def test_calls_fit_their_op(call):
    """Each runs forward and backward at its shapes, and its definition takes the same arguments."""
    kernel_shapes.passes(call, torch.float32)
    tensors = call.make(torch.float32)
    from hsrgan import kernels

    found, defined = (call.function(op)(**tensors) for op in (None, getattr(kernels, f"{call.op}_torch")))
    assert [y.shape for y in found] == [y.shape for y in defined]


def test_calls_are_the_layers_of_the_models():
    found = {call.name: call for call in kernel_shapes.calls()}
    assert found["ffhq1024 1024 G layer"].sizes["x"] == (8, 32, 1024, 1024)
    assert found["ffhq256 4 D conv0"].sizes["x"] == (8, 512, 4, 4)
    assert found["ffhq256 64 HSR, mse"].sizes["x"] == (8, 256, 64, 64)
    assert len(found) == len(kernel_shapes.calls())
    for size, base in kernel_shapes.MODELS.values():
        with torch.device("meta"):
            nets = [net(img_resolution=size, channel_base=base) for net in (Generator, Discriminator)]
        weights = {tuple(p.shape) for net in nets for p in net.parameters() if p.ndim == 4}
        assert not weights - {call.sizes.get("weight") for call in found.values()}


@pytest.mark.parametrize("option", [("--op", "modulation,to_rgb"), ("--resolution", "48"), ("--model", "sg3")])
def test_an_option_that_names_nothing_is_one_line(option):
    """Not: nothing built, nothing unfit."""
    run = CliRunner().invoke(kernel_builds.app, [*option])
    assert run.exit_code == 2 and f"{option[0]} {option[1]}: there are " in run.stderr and run.stderr.count("\n") == 1
