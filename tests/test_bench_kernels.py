"""tools/bench_kernels.py: nothing is timed before all is right; its rows; its model of GPUs that are not there."""

import csv
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hsrgan import kernels
from hsrgan.engine.errors import UserError
from hsrgan.tools import bench_kernels, kernel_shapes, kernel_timing

ROOT = Path(__file__).parents[1]
ROOFS = {"copy": 1e12, "float32": 1e13, "float16": 1e14}
SHAPES = """
- {op: bias_act, batch: 1, channels: 8, resolution: 8}
- {op: feature_match, batch: 2, channels: 64, resolution: 16}
- {op: convolution, batch: 1, channels: 16, resolution: 4}
"""  # in YAML, as --shapes takes them


def eager(call):
    return getattr(kernels, f"{call.op}_torch")


def small_cases(modes=kernel_timing.MODES, dtypes=(torch.float32,)):
    calls = [*kernel_shapes.bias_act(1, 4, 8), *kernel_shapes.upfirdn2d(1, 4, 8)]
    return kernel_timing.cases(calls, list(dtypes), list(modes))


def fake_watch(run):
    run()
    return {"p20": 1e-3, "p50": 2e-3, "p80": 3e-3, "graph": False}


def bench(cases, providers):
    return list(bench_kernels.bench(cases, providers, "cpu", fake_watch, ROOFS, peak=lambda run: 7))


@pytest.mark.parametrize("mode", kernel_timing.MODES)
def test_a_wrong_result_in_any_mode_is_found(mode):
    class OnlyThisModeIsWrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * (1.01 if mode == "forward" else 1)

        @staticmethod
        def backward(ctx, g):
            if mode == "double":
                return g + 0 * g.detach() if not torch.is_grad_enabled() else Twice.apply(g)
            return g * (1.01 if mode == "backward" else 1)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g):
            return g.clone()

        @staticmethod
        def backward(ctx, g):
            return g * 1.01

    def broken(call):
        return lambda **t: OnlyThisModeIsWrong.apply(eager(call)(**t))

    cases = small_cases([mode])
    providers = {"sound": eager, "broken": broken}
    wrong = bench_kernels.check_all(cases, providers, "cpu")
    assert list(wrong) == [(case.call.op, case.name, "broken") for case in cases]
    rows = bench_kernels.bench(cases, providers, "cpu", fake_watch, ROOFS, wrong, peak=lambda run: 7)
    assert [row["provider"] for row in rows] == ["sound"] * len(cases)


def test_a_provider_that_raises_is_wrong_too():
    def fails(call):
        def op(**tensors):
            raise RuntimeError("no kernel image")

        return op

    wrong = bench_kernels.check_all(small_cases(["forward"]), {"fails": fails}, "cpu")
    assert set(wrong.values()) == {"raises RuntimeError: no kernel image"}


def test_a_provider_that_fails_while_it_is_timed_leaves_the_others():
    said, cases = [], small_cases(["forward"])

    def starving(run):
        if "D conv0" in cases[len(said) + starving.timed].name:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 80 GiB")
        starving.timed += 1
        return fake_watch(run)

    starving.timed = 0
    rows = list(bench_kernels.bench(cases, {"eager": eager}, "cpu", starving, ROOFS, (), said.append, lambda run: 7))
    assert len(rows) == len(cases) - 1 and said == [
        "not timed: eager bias_act, D conv0, float32, forward: "
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB"
    ]


def test_the_gate_is_of_the_dtype():
    """Half precision may be off by as much as the definition in half precision, and no more."""
    (case,) = small_cases(["forward"], [torch.float16])[:1]

    def rounded(factor):
        def op(x, **tensors):
            return (kernels.bias_act_torch(x.double(), **tensors) * factor).to(x.dtype)

        return op

    truth = kernel_timing.Truth(case, "cpu")
    assert truth.gate(rounded(1)) == ""
    assert "is off by" in truth.gate(rounded(1.01))


def test_a_gradient_of_zeros_is_as_good_as_none():
    """A convolution has no second derivative by x. NVIDIA's FIR before it makes zeros of that, and they are right."""
    call = kernel_timing.Call("", "conv2d", {"x": (1, 4, 8, 8), "weight": (4, 4, 3, 3)})
    truth = kernel_timing.Truth(kernel_timing.Case(call, torch.float32, "double"), "cpu")
    assert truth.expected[0] is None
    complaints = [
        truth.gate(lambda x, weight, bent=bent: kernels.conv2d_torch(x, weight) + bent * x.square()) for bent in (0, 1)
    ]
    assert complaints[0] == "" and "result 0 is off by inf" in complaints[1]


def test_a_single_number_that_the_definition_has_right_by_luck_allows_no_less_than_the_others():
    layer = {"x": (1, 8, 8, 8), "demod": (1, 8), "noise": (1, 1, 8, 8), "strength": (1,)}
    for options in ({"gain": 1.0}, {"gain": 1.1}, {"gain": 1.3}):
        call = kernel_timing.Call("", "bias_act", layer, options)
        allowed = kernel_timing.Truth(kernel_timing.Case(call, torch.float16, "backward"), "cpu").allowed
        assert allowed[-1] == max(allowed) < 0.01


def test_rows_and_files(tmp_path):
    cases = small_cases()
    rows = bench(cases, {"hsrgan": lambda call: getattr(kernels, call.op), "eager": eager, "absent": lambda call: None})
    assert len(rows) == 2 * len(cases)
    assert {row["provider"] for row in rows} == {"hsrgan", "eager"}
    assert {row["mode"] for row in rows} == set(kernel_timing.MODES)
    for row in rows:
        assert list(row) == list(bench_kernels.KEYS)
        assert None not in row.values()
        assert row["gb_s"] == pytest.approx(row["bytes"] / 2e-3 / 1e9)
        assert row["roof_share"] == pytest.approx(row["floor"] / 2e-3)
    bench_kernels.write(rows, tmp_path / "new" / "kernels", ROOFS)
    with (tmp_path / "new" / "kernels.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["shape"] for row in read] == [row["shape"] for row in rows]
    assert list(read[0]) == list(bench_kernels.KEYS)
    saved = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert saved == {"roofs": ROOFS, "rows": rows}
    assert (tmp_path / "new" / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_are_those_that_any_implementation_moves():
    call = kernel_timing.Call("", "bias_act", {"x": (2, 4, 8, 8), "bias": (4,)})
    x, bias = 2 * 4 * 8 * 8 * 2, 4 * 4
    cases = kernel_timing.cases([call], [torch.float16], list(kernel_timing.MODES))
    moved = {case.mode: kernel_timing.bytes_of(case) for case in cases}
    assert moved == {"forward": 2 * x + bias, "backward": 3 * x + 2 * bias, "double": 5 * x + 2 * bias}


def test_an_output_that_is_an_input_is_not_written():
    branch = kernel_timing.Call("", "downsample2d_branch", {"x": (2, 4, 8, 8), "f": (4,)}, constants=("f",))
    x, half, f = 2 * 4 * 8 * 8 * 2, 2 * 4 * 4 * 4 * 2, 4 * 4
    cases = kernel_timing.cases([branch], [torch.float16], ["forward", "backward"])
    assert [kernel_timing.bytes_of(case) for case in cases] == [x + f + half, x + f + (half + x) + x]


def test_compiled_functions_have_no_second_derivative_and_a_case_no_third():
    feature = next(kernel_shapes.feature_match(1, 4, 8))
    cases = kernel_timing.cases([feature], [torch.float32], list(kernel_timing.MODES))
    assert [case.mode for case in cases] == ["forward", "backward"]
    double = small_cases(["double"])[0]
    assert kernel_timing.possible("eager", double) and not kernel_timing.possible("compiled", double)


def test_every_op_has_bytes_and_a_shape_in_every_mode():
    calls = {call.op: call for call in kernel_shapes.calls({"small": (256, 1024)})}
    assert {"packed_styles", "modulation", "feature_match"} <= calls.keys()
    for case in kernel_timing.cases(list(calls.values()), [torch.float16], list(kernel_timing.MODES)):
        made = bench_kernels.row(case, "hsrgan", kernel_timing.bytes_of(case), 1.0, "toy")
        assert made["bytes"] > 0 and case.call.name in made["shape"]


def test_every_shape_is_compiled_anew(monkeypatch):
    """dynamo would run the ninth shape of a function eagerly, and a rival would be timed under a wrong name."""
    built = []

    def backend(graph, inputs):
        built.append(inputs[0].shape)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    provider = kernel_timing.providers(None)["compiled"]
    for width in range(2, 12):
        call = kernel_timing.Call("", "bias_act", {"x": (1, 2, 2, width)})
        call.function(provider(call))(**call.make(torch.float32, "cpu"))
    assert len(built) == 10


class FakeWatch:
    def __call__(self, run):
        return fake_watch(run)


def test_what_was_timed_before_ctrl_c_is_kept(tmp_path, monkeypatch):
    """And what is wrong is named and left out; the largest layers come first."""
    (tmp_path / "shapes.yaml").write_text(
        "- {op: bias_act, batch: 1, channels: 4, resolution: 4}\n- {op: bias_act, batch: 1, channels: 4, resolution: 8}"
    )
    timed = []

    def watch(self, run):
        if len(timed) == 3:
            raise KeyboardInterrupt
        timed.append(1)
        return fake_watch(run)

    monkeypatch.setattr(FakeWatch, "__call__", watch)
    monkeypatch.setattr(kernel_timing, "Stopwatch", FakeWatch)
    monkeypatch.setattr(kernel_timing, "roofs", lambda *_: ROOFS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
    on_cpu = functools.partial(bench_kernels.bench, peak=lambda run: 7)
    monkeypatch.setattr(bench_kernels, "bench", lambda cases, who, _, *rest: on_cpu(cases, who, "cpu", *rest))
    wrong = ("bias_act", "8 G layer, float32, forward", "eager")
    monkeypatch.setattr(bench_kernels, "check_all", lambda *_: {wrong: "is off by 3"})
    options = ["--shapes", str(tmp_path / "shapes.yaml"), "--dtype", "float32", "--mode", "forward"]
    options += ["--provider", "eager", "--out", str(tmp_path / "rows")]
    run = CliRunner().invoke(bench_kernels.app, options)
    assert run.exit_code == 130 and "stopped: 3 rows timed, of 10 cases" in run.output
    assert "not timed: eager bias_act, 8 G layer, float32, forward: is off by 3" in run.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == ["eager"] * 3 and all("[1, 4, 8, 8]" in row["shape"] for row in rows)


def test_a_function_that_cannot_be_recorded_is_called(monkeypatch):
    class Refuses:
        def capture_begin(self, pool, capture_error_mode):
            pass

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refuses)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    left = []
    monkeypatch.setattr(kernel_timing, "leave", left.append)
    assert kernel_timing.recorded(lambda: None) is None and left == [(0, 7)]


def test_the_static_model_end_to_end(tmp_path):
    (tmp_path / "shapes.yaml").write_text(SHAPES)
    options = ["--shapes", tmp_path / "shapes.yaml", "--gpu", "H200", "--out", tmp_path / "rows", "--jobs", "1"]
    if torch.cuda.is_available():
        pytest.skip("a GPU is timed instead")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "200"}
    command = [sys.executable, ROOT / "tools" / "bench_kernels.py", *options, "--mode", "forward,backward"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NOTHING WAS TIMED" in done.stdout and "nothing was timed" in done.stdout
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["roofs"]["copy"] == 4.8e12
    rows = [row for row in saved["rows"] if row["op"] == "feature_match"]
    assert [row["mode"] for row in rows] == ["forward", "backward"] * 2
    for row in saved["rows"]:
        assert row["p50"] is None and row["gb_s"] is None and row["floor"] > 0
        assert row["device"] == "H200 (data sheet)"
    names = [[kernel["kernel"].rpartition(".")[2] for kernel in row["kernels"]] for row in rows[:2]]
    assert names == [["pool_kernel", "distance_kernel"], ["dx_kernel", "dw_kernel"]]
    for kernel in rows[0]["kernels"] + rows[1]["kernels"]:
        assert kernel["registers"] > 0 and kernel["spills"] == 0 and not kernel["error"]
        assert 0 < kernel["occupancy"] <= 1
    # 16×16 pixels of 64 channels to 4096, the 196 bins of a 14×14 grid to 768
    assert rows[0]["flops"] == 2 * 2 * 4096 * (16 * 16 * 64 + 196 * 768)
    assert rows[1]["flops"] == 2 * rows[0]["flops"]
    assert (tmp_path / "rows.csv").exists() and (tmp_path / "rows.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("a: [", "not YAML"),
        ("{op: bias_act}", "must be a list"),
        ("[]", "must be a list"),
        ("[{op: bias_act, batch: 1, channels: 8}]", "entry 1 must have op, batch, channels and resolution"),
        ("[{op: gelu, batch: 1, channels: 8, resolution: 8}]", "entry 1 has op 'gelu'; there are bias_act"),
        ("[{op: bias_act, batch: 0, channels: 8, resolution: 8}]", "whole numbers above 0"),
        ("[{op: bias_act, batch: 1, channels: 8, resolution: true}]", "whole numbers above 0"),
        ("[{op: feature_match, batch: 1, channels: 8, resolution: 128}]", "no layer at resolution 128"),
    ],
)
def test_a_bad_shapes_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "shapes.yaml"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(bench_kernels.app, ["--shapes", str(path)])
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--op", "gelu", "--op gelu: there are bias_act"),
        ("--dtype", "fp8", "--dtype fp8: there are float16"),
        ("--mode", ",", "--mode: give some of forward"),
        ("--gpu", "GTX", "--gpu GTX: there are A100"),
        ("--model", "sg3", "--model sg3: there are ffhq256"),
        ("--provider", "eager", "no GPU here: leave them out"),
        ("--stylegan3", "/nowhere", "--stylegan3 /nowhere: no torch_utils/ops/bias_act.py there"),  # without a GPU, too
        ("--provider", "theirs", "--provider theirs: there are hsrgan"),
    ],
)
def test_bad_options_are_one_line(option, value, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = CliRunner().invoke(bench_kernels.app, [option, value])
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_checkout_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no torch_utils/ops/bias_act"):
        kernel_timing.providers(tmp_path)


def test_a_checkout_becomes_a_rival(tmp_path, monkeypatch):
    """Its ops are called with their own arguments, and PyTorch does around them what they leave out."""
    ops = tmp_path / "torch_utils" / "ops"
    ops.mkdir(parents=True)
    (tmp_path / "torch_utils" / "__init__.py").write_text("")
    (ops / "__init__.py").write_text("")
    (ops / "bias_act.py").write_text(
        "from hsrgan import kernels\n"
        "def bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None):\n"
        "    return kernels.bias_act_torch(x, b, act=act, alpha=alpha, gain=gain, clamp=clamp)\n"
    )
    (ops / "upfirdn2d.py").write_text(
        "from hsrgan import kernels\n"
        "def filtered(op):\n"
        "    def function(x, f, **options):\n"
        "        assert f.ndim == 2  # filters of four taps are squares in their networks\n"
        "        return op(x, f, **options)\n"
        "    return function\n"
        "upfirdn2d = filtered(kernels.upfirdn2d_torch)\n"
        "upsample2d = filtered(kernels.upsample2d_torch)\n"
        "downsample2d = filtered(kernels.downsample2d_torch)\n"
    )
    (ops / "fma.py").write_text("import torch\n\ndef fma(a, b, c):\n    return torch.addcmul(c, a, b)\n")
    (ops / "conv2d_gradfix.py").write_text("enabled = False\n")
    (ops / "conv2d_resample.py").write_text(
        "from hsrgan.kernels import conv2d_torch\n"
        "from torch_utils.ops import conv2d_gradfix\n"
        "def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):\n"
        "    assert conv2d_gradfix.enabled and (f is None or f.ndim == 2)\n"
        "    assert padding == w.shape[-1] // 2 and flip_weight == (up == 1) and w.dtype == x.dtype\n"
        "    return conv2d_torch(x, w, up=up, down=down, f=f)\n"
    )
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("")
    (tmp_path / "training" / "networks_stylegan2.py").write_text(
        "from hsrgan.kernels import modulated_conv2d_torch\n"
        "def modulated_conv2d(x, weight, styles, noise=None, up=1, down=1, padding=0, resample_filter=None,\n"
        "                     demodulate=True, flip_weight=True, fused_modconv=True):\n"
        "    assert padding == 1 and flip_weight == (up == 1) and not fused_modconv\n"
        "    assert resample_filter is None or resample_filter.ndim == 2\n"
        "    return modulated_conv2d_torch(x, weight, styles, up=up, f=resample_filter, demodulate=demodulate,\n"
        "                                  noise=noise, act='linear')\n"
    )
    before, built = list(sys.path), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_timing, "build", lambda *of: built.append(of))
    nvidia = kernel_timing.providers(tmp_path)["nvidia"]
    assert sys.path == before and built == [(tmp_path, "cuda")]  # before anything is timed
    assert nvidia(next(kernel_shapes.feature_match(1, 4, 8))) is None
    convolutions = kernel_timing.cases(list(kernel_shapes.convolution(1, 4, 8)), [torch.float32], ["forward"])
    rows = bench(small_cases() + convolutions, {"nvidia": nvidia})
    there = {"bias_act", "upfirdn2d", "upsample2d", "downsample2d", *kernel_timing.CONVOLUTIONS} - {"weight_gradient"}
    assert {row["op"] for row in rows} == there
    assert "torch_utils" not in sys.modules
    half = kernel_timing.cases([case.call for case in convolutions], [torch.bfloat16], ["forward"])
    assert bench(half, {"nvidia": nvidia}) == []  # its CUDA has no bf16
