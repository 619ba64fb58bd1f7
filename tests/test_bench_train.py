"""tools/bench_train.py: the static model against counts by hand; the GPU's path on the CPU, clock faked."""

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_graphs import Replayed
from typer.testing import CliRunner

from hsrgan.engine.errors import UserError
from hsrgan.engine.graphs import Graphs, direct
from hsrgan.kernels import bias_act, bias_act_torch, conv2d, feature_match, launch, use_convolution
from hsrgan.kernels.builds import GPUS
from hsrgan.tools import bench_train, kernel_shapes, train_gpu, train_model, train_stylegan3, train_variants
from hsrgan.tools.plain_training import plain_training, random_teacher
from hsrgan.tools.train_model import Cost, Counter, counting
from hsrgan.tools.train_variants import KEYS, Variant

H200 = GPUS["H200"]
SMALL = {"embed_dim": 8, "num_heads": 2}  # with the 12 blocks that the layers name


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A model of 64×64 with few channels, and a teacher that a CPU can run."""
    monkeypatch.setitem(kernel_shapes.MODELS, "tiny", (64, 256))
    monkeypatch.setattr(train_variants, "HIDDEN", 16)
    monkeypatch.setattr(train_variants, "CHANNEL_MAX", 16)

    def teacher(layers):
        return random_teacher(layers, "vit_tiny_patch16_224", **SMALL)

    monkeypatch.setattr(train_gpu, "random_teacher", teacher)
    monkeypatch.setattr(train_model, "random_teacher", teacher)


def variant(**changes) -> Variant:
    return Variant(**{"model": "tiny", "precision": "bf16", "num_fp16_res": 4, "tf32": False, "batch": 4, "hsr": False,
                      "backend": "torch", "graphs": False} | changes)  # fmt: skip


def meta(*shape: int, dtype=torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_a_product_and_a_copy_are_counted_by_hand():
    x, w = meta(8, 64, 32, 32), meta(128, 64, 3, 3)
    with Counter(H200) as counter:
        F.conv2d(x, w, padding=1).mul_(2)
    y = 8 * 128 * 32 * 32 * 2
    flops = 2 * 8 * 128 * 32 * 32 * 64 * 9
    assert counter.cost.kernels == 2 and counter.cost.half == flops and counter.cost.full == 0
    assert counter.cost.moved == x.nbytes + w.nbytes + y + 2 * y
    floor = max((x.nbytes + w.nbytes + y) / H200.bandwidth, flops / H200.matrix) + 2 * y / H200.bandwidth
    assert counter.cost.seconds == pytest.approx(floor)


def test_a_fir_and_views_are_no_products():
    x, f = meta(2, 8, 16, 16), meta(8, 1, 4, 4)
    with Counter(H200) as counter:
        y = F.conv2d(x, f, groups=8).view(2, -1)[:, :3].expand(2, 3)
        torch.empty_like(y)
    assert counter.cost.kernels == 1 and counter.cost.half == 0


def test_peak_follows_what_is_alive():
    with Counter(H200) as counter:
        a = meta(1000)
        b = a + 1
        del a
        c = b + 1  # a's memory is free by now
        del b, c
    assert counter.peak == 2 * 2000 and counter.now == 0


def test_launches_are_counted_and_hold_no_memory():
    t = plain_training(train_variants.recipe(variant()), torch.device("meta"), {})
    x = meta(4, 16, 8, 8)
    with counting(t, H200, "triton") as counter:
        for _ in range(10):
            bias_act(x, act="lrelu")
    assert counter.cost.kernels == 10 and counter.cost.moved == 10 * 2 * x.nbytes
    assert counter.peak <= 2 * x.nbytes
    with counting(t, H200, "torch") as definition:
        bias_act_torch(x, act="lrelu")
    assert definition.cost.moved == 2 * 2 * x.nbytes  # lrelu, gain


def test_costs_add_up():
    total = Cost(1, 2.0, 3.0, 4.0, 5.0).plus(Cost(10, 10.0, 10.0, 10.0, 10.0), 0.5)
    assert total == Cost(6, 7.0, 8.0, 9.0, 10.0)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_products_of_convolutions_are_counted(up, down):
    """The GEMM's and the weight gradient's are those of the definition: so they overlap with their own bytes."""
    t = plain_training(train_variants.recipe(variant()), torch.device("meta"), {})
    x, w, f = meta(4, 32, 16, 16), meta(48, 32, 3, 3, dtype=torch.float32), meta(4, dtype=torch.float32)
    leaves, found = [x.requires_grad_(), w.requires_grad_()], {}
    for backend in ("triton", "torch"):
        with use_convolution("gemm"), counting(t, H200, backend) as counter:
            y = conv2d(*leaves, up=up, down=down, f=f)
            torch.autograd.grad(y, leaves, torch.empty_like(y))
        found[backend] = counter.cost.half
    products = 2 * 9 * 4 * 32 * 48 * 16 * 16 / down**2
    assert found == {"triton": 3 * products, "torch": 3 * products}


def test_products_of_hsr_are_counted_and_others_are_told_by_the_definitions():
    n, c, r, k, ct, grid = 2, 32, 16, 64, 24, 7
    t = plain_training(train_variants.recipe(variant()), torch.device("meta"), {})
    shapes = [(n, c, r, r), (k, c, 1, 1), (k,), (ct, k, 1, 1), (ct,), (n, ct, grid, grid)]
    leaves = [meta(*shape, dtype=torch.float32).requires_grad_() for shape in shapes]
    with counting(t, H200, "triton") as counter:
        torch.autograd.grad(feature_match(*leaves), leaves[:5])
    assert counter.cost.full == 3 * 2 * n * (r * r * c * k + grid * grid * k * ct) and counter.cost.half == 0
    convolution = Cost(half=5e9, full=1e9)
    seconds = train_model.missing_seconds(Cost(half=2e9, full=4e9), convolution, H200)
    assert seconds == pytest.approx(3e9 / H200.matrix)


def test_the_command_models_every_variant_and_says_that_nothing_was_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    run = CliRunner().invoke(bench_train.app, ["--model", "tiny", "--batch", "4", "--out", str(tmp_path / "rows")])
    assert torch.backends.cudnn.allow_tf32 is False  # or the fp32 truth of the checks on a GPU would be tf32
    assert run.exit_code == 0 and run.output.count("NOTHING WAS TIMED") == 1 and "nothing was timed" in run.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows[0]["device"] == "H200 (data sheet)" and rows[0]["date"] and rows[0]["versions"]
    assert next(csv.DictReader((tmp_path / "rows.csv").open())).keys() == set(KEYS)
    assert len(rows) == 8 and all(set(row) == set(KEYS) and row["timed"] is False for row in rows)
    by = {(row["hsr"], row["kernels"], row["graphs"]): row for row in rows}
    for hsr in (False, True):
        for graphs in (False, True):
            off, on = by[hsr, False, graphs], by[hsr, True, graphs]
            assert on["img_s"] > off["img_s"] and on["kernels_per_step"] < off["kernels_per_step"]
            assert on["step_p20"] is None
        eager, graphed = by[hsr, True, False], by[hsr, True, True]
        assert graphed["step_p50"] == eager["step_p50"] and graphed["peak_bytes"] > eager["peak_bytes"]
        assert graphed["host_launches_per_step"] < eager["host_launches_per_step"] / 4
    assert by[True, True, False]["Gmain"] > by[False, True, False]["Gmain"]
    row = by[False, True, False]
    step = row["Gmain"] + row["Greg"] / 4 + row["Dmain"] + row["Dreg"] / 16 + row["rest"]
    assert row["step_p50"] == pytest.approx(step) and row["img_s"] == pytest.approx(4 / step)


def test_the_model_knows_tf32_and_how_many_resolutions_are_half():
    """fp32 products are the only ones that tf32 speeds up; with more resolutions in half precision fewer are left."""
    after = launch.tf32_allowed()
    seconds = {}
    try:
        for changes in ({}, {"tf32": True}, {"num_fp16_res": 1}, {"num_fp16_res": 1, "tf32": True}):
            (row,) = train_model.model([variant(batch=64, **changes)], H200)
            seconds[tuple(changes)] = row["step_p50"]
            assert (row["num_fp16_res"], row["tf32"]) == (changes.get("num_fp16_res", 4), changes.get("tf32", False))
    finally:
        launch.allow_tf32(after)
    some, half, few, tf32_of_few = seconds.values()
    assert half < some < few and tf32_of_few < few
    product = {}
    for allowed in (False, True):
        launch.allow_tf32(allowed)
        with Counter(H200) as counter:
            meta(4096, 4096, dtype=torch.float32) @ meta(4096, 4096, dtype=torch.float32)
        product[allowed] = counter.cost.seconds
    launch.allow_tf32(after)
    assert product == {False: 2 * 4096**3 / H200.vector, True: 2 * 4096**3 / (H200.matrix / 2)}


def test_ctrl_c_keeps_the_rows_there_are(tmp_path, monkeypatch):
    def two(variants, gpu):
        for each in variants[:2]:
            yield train_variants.row(each, img_s=1.0, step_p50=1.0, peak_bytes=1, kernels_per_step=1,
                                     host_launches_per_step=1, timed=False, **dict.fromkeys(bench_train.PHASES, 0.1))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_model, "model", two)
    run = CliRunner().invoke(bench_train.app, ["--model", "tiny", "--out", str(tmp_path / "rows")])
    assert run.exit_code == 130 and "stopped: 2 rows, of 8" in run.output
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2


def test_a_rival_that_is_not_ready_is_told_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy")
    monkeypatch.setattr(train_gpu, "bench", lambda *_: pytest.fail("timed"))
    run = CliRunner().invoke(bench_train.app, ["--model", "tiny", "--stylegan3", str(tmp_path)])
    assert run.exit_code == 2 and "name a checkout of stylegan3" in run.output


def test_a_rival_that_is_wrong_leaves_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy")
    row = train_variants.row(variant(), img_s=1.0, step_p20=1.0, step_p50=1.0, step_p80=1.0, peak_bytes=1,
                             kernels_per_step=1, host_launches_per_step=1, timed=True,
                             **dict.fromkeys(bench_train.PHASES, 0.1))  # fmt: skip

    def rival(*_):
        raise UserError("stylegan3's images differ from ours")
        yield

    monkeypatch.setattr(train_gpu, "bench", lambda *_: iter([row]))
    monkeypatch.setattr(train_stylegan3, "ready", lambda *_: None)
    monkeypatch.setattr(train_stylegan3, "bench", rival)
    options = ["--model", "tiny", "--out", str(tmp_path / "rows"), "--stylegan3", "x"]
    run = CliRunner().invoke(bench_train.app, options)
    assert run.exit_code == 1 and "stylegan3's images differ from ours" in run.output
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (["--model", "ffhq"], "--model ffhq"),
        (["--model", "tiny", "--gpu", "X1"], "--gpu X1"),
        (["--model", "tiny", "--precision", "int8"], "--precision int8"),
        (["--model", "tiny", "--batch", "3"], "--batch 3"),
        (["--model", "tiny", "--stylegan3", "x"], "--stylegan3"),
        (["--model", "tiny", "--resolutions", "32"], "--resolutions"),
        (["--resolutions", "33"], "--resolutions 33"),
    ],
)
def test_mistakes_get_one_line(options, naming, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = CliRunner().invoke(bench_train.app, options)
    assert run.exit_code == 2 and naming in run.output and len(run.output.strip().splitlines()) == 1


class Fake:
    """Probes for the CPU: a clock that ticks a second a call, graphs of test_graphs."""

    device = torch.device("cpu")

    def __init__(self):
        self.ran = 0

    def seconds(self, run):
        run()
        return 1.0

    def peak(self, run):
        run()
        return 7

    def launches(self, run):
        return 160, 32

    def caller(self, graphs):
        return Graphs(Replayed(), self.refuse) if graphs else direct

    def refuse(self, line):
        raise AssertionError(line)


@pytest.fixture
def _once(monkeypatch):
    """One timed step a cycle: what is tested is the bookkeeping."""
    monkeypatch.setattr(math, "lcm", lambda *intervals: 2)


def test_a_variant_is_checked_and_timed(_once):
    both = [variant(), variant(hsr=True, graphs=True)]
    rows = list(train_gpu.bench(both, 1, Fake(), pytest.fail))
    assert [row["graphs"] for row in rows] == [False, True] and all(set(row) == set(KEYS) for row in rows)
    for row in rows:
        assert row["timed"] is True and row["peak_bytes"] == 7 and row["step_p50"] == 0.5 and row["img_s"] == 8
        assert (row["kernels_per_step"], row["host_launches_per_step"]) == (80, 16)


def test_a_wrong_gradient_is_named_and_not_timed(_once):
    class Wrong(Fake):
        def caller(self, graphs):
            def call(name, function, batch):
                gradients, told = function(batch)
                return [None if g is None else g * (1.2 if name == "Dreg" else 1) for g in gradients], told

            return call if graphs else direct

    said = []
    rows = list(train_gpu.bench([variant(graphs=True), variant()], 1, Wrong(), said.append))
    assert [row["graphs"] for row in rows] == [False]
    (line,) = said
    assert line.startswith("not timed: tiny bf16") and "graphs: Dreg is off by" in line


def test_a_variant_that_fails_is_named_and_the_others_are_timed(_once, monkeypatch):
    """One whose recording is refused, and one that wants too much memory."""

    def check(variant, known, probes):
        if variant.graphs:
            raise UserError("cuda_graphs: off, Gmain cannot be recorded: nothing timed")
        if variant.hsr:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 80 GiB")
        return ""

    monkeypatch.setattr(train_gpu, "check", check)
    said = []
    rows = list(train_gpu.bench([variant(graphs=True), variant(hsr=True), variant()], 1, Fake(), said.append))
    assert [(row["graphs"], row["hsr"]) for row in rows] == [(False, False)]
    refused, starved = said
    assert "with graphs: UserError: cuda_graphs: off" in refused
    assert starved.endswith("with HSR: OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB")


CHECKOUT = """
from hsrgan.engine.model import Discriminator as Ours, Generator as OurGenerator

class Generator(OurGenerator):
    def __init__(self, *shape, fused_modconv_default=True, **widths):
        super().__init__(*shape, **widths)
        assert fused_modconv_default == "inference_only"  # as their train.py has it

class Discriminator(Ours):
    def __init__(self, c_dim, img_resolution, img_channels, *, epilogue_kwargs, **widths):
        super().__init__(c_dim, img_resolution, img_channels, **epilogue_kwargs, **widths)

    def forward(self, img, c):
        return super().forward(img, c) * SCALE
"""


def test_a_checkout_of_stylegan3_becomes_a_rival(tmp_path, monkeypatch, _once):
    (tmp_path / "training").mkdir()
    module = tmp_path / "training" / "networks_stylegan2.py"
    module.write_text(CHECKOUT.replace("SCALE", "1"))
    train_stylegan3.ready(tmp_path, "fp32", Fake())
    built, gpu, said = [], Fake(), []
    gpu.device = torch.device("cuda")
    monkeypatch.setattr(train_stylegan3, "build", lambda *of: built.append(of))
    train_stylegan3.ready(tmp_path, "fp16", gpu)
    assert built == [(tmp_path, gpu.device)]
    (row,) = train_stylegan3.bench(tmp_path, [variant(precision="fp32")], 1, Fake(), said.append)
    assert row["provider"] == "stylegan3" and row["step_p50"] == 0.5 and not row["kernels"] and not said
    module.write_text(CHECKOUT.replace("SCALE", "1.5"))
    assert list(train_stylegan3.bench(tmp_path, [variant(precision="fp32")], 1, Fake(), said.append)) == []
    assert "not timed: tiny: stylegan3's logits differ from ours by 5.0e-01" in said.pop()
    with pytest.raises(UserError, match="name a checkout of stylegan3"):
        train_stylegan3.ready(tmp_path / "training", "fp16", Fake())
    with pytest.raises(UserError, match="no bf16"):
        train_stylegan3.ready(tmp_path, "bf16", Fake())


def test_a_rival_that_fails_at_one_model_is_timed_at_the_other(tmp_path, monkeypatch):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "networks_stylegan2.py").write_text("")

    def measure(networks, of, turns, probes):
        if of.model == "huge":
            raise torch.OutOfMemoryError("CUDA out of memory.\nA page of figures")
        return of.model

    both, gpu, built, said = [variant(model="huge"), variant()], Fake(), [], []
    gpu.device = torch.device("cuda")
    monkeypatch.setattr(train_stylegan3, "build", lambda *of: built.append(of))
    monkeypatch.setattr(train_stylegan3, "check", lambda *_: None)
    monkeypatch.setattr(train_stylegan3, "measure", measure)
    assert list(train_stylegan3.bench(tmp_path, both, 1, gpu, said.append)) == ["tiny"]
    assert said == ["not timed: huge: stylegan3 raises OutOfMemoryError: CUDA out of memory."]
    assert built == [(tmp_path, gpu.device)]
