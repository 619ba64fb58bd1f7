"""Who convolves: the table's rule, its overrides and its switch; and what a whole layer launches and casts."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hsrgan import kernels
from hsrgan.engine.blocks import DiscriminatorBlock
from hsrgan.kernels import conv_table, launch
from hsrgan.kernels.conv_table import Shape, choose, use_convolution

pytest.importorskip("triton")
TAPS = torch.empty(4, device="meta")


def shape(inputs, outputs, resolution, form="3x3", fused=True):
    return Shape(form, inputs, outputs, resolution, fused)


@pytest.fixture
def _rule():
    """The rule alone, whatever has been measured."""
    with conv_table.using((), alone=True):
        yield


@pytest.mark.usefixtures("_rule")
@pytest.mark.parametrize("chip", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_the_rule(chip):
    """Few channels at a high resolution in half precision, with something to fuse: the GEMM, where a tile has been
    built; else the library."""
    assert choose(shape(64, 64, 512), torch.float16, chip).outputs == 64
    assert choose(shape(32, 32, 1024), torch.bfloat16, chip).outputs == 32
    assert choose(shape(3, 32, 1024, "1x1"), torch.float16, chip) is not None
    for other in (shape(64, 128, 512), shape(128, 64, 512), shape(64, 64, 256), shape(32, 32, 1024, fused=False)):
        assert choose(other, torch.float16, chip) is None
    assert choose(shape(32, 32, 1024), torch.float32, chip) is None
    assert choose(shape(32, 32, 1024), torch.float16, "sm_75") is None
    assert choose(shape(32, 32, 1024), torch.float16, "") is None


def row(shape, tile, chip="sm_90", kind="half"):
    return conv_table.Row(shape, kind, chip, "library" if tile is None else "gemm", tile, "measured on a toy")


def test_a_measurement_goes_before_the_rule():
    tile = conv_table.Tile(128, 256, 64, 8, 3)
    with conv_table.using([row(shape(32, 32, 1024), None), row(shape(512, 512, 64), tile)]):
        assert choose(shape(32, 32, 1024), torch.float16, "sm_90") is None
        assert choose(shape(512, 512, 64), torch.bfloat16, "sm_90") is tile
        assert choose(shape(32, 32, 1024), torch.float16, "sm_100") is not None
        assert choose(shape(512, 512, 64), torch.float32, "sm_90") is None
        assert choose(shape(512, 512, 64), torch.float64, "sm_90") is None
    assert choose(shape(32, 32, 1024), torch.float16, "sm_90") is not None


def test_the_table_is_written_as_it_is_read(tmp_path):
    """A measurement names its device and its day."""
    rows = [row(shape(32, 32, 1024), None), row(shape(64, 64, 512), conv_table.Tile(128, 64, 64, 4, 3))]
    (tmp_path / "rows.json").write_text(conv_table.text(rows))
    assert list(conv_table.read(tmp_path / "rows.json")) == rows
    assert conv_table.text(conv_table.read()) == conv_table.PATH.read_text(encoding="utf-8")
    assert all(each.source.startswith("measured on ") for each in conv_table.read())


def test_the_switch_goes_before_everything(monkeypatch):
    with use_convolution("library"):
        assert choose(shape(32, 32, 1024), torch.float16, "sm_90") is None
        with use_convolution("gemm"):
            assert choose(shape(513, 512, 4), torch.float32, "").outputs == 32
    with pytest.raises(ValueError, match="unknown convolution 'cudnn'"), use_convolution("cudnn"):
        pass
    monkeypatch.setattr(conv_table, "_forced", "cudnn")
    with pytest.raises(ValueError, match="HSRGAN_CONV takes one of: gemm, library"):
        choose(shape(3, 3, 4), torch.float32, "")


def test_shapes_are_told_apart_by_what_is_read_and_written():
    assert Shape.of(3, 2, True, 64, 32, 1025, True) == Shape("3x3 up", 64, 32, 1024, True)
    assert Shape.of(3, 2, False, 32, 64, 1025, False) == Shape("3x3 down", 32, 64, 1024, False)
    assert Shape.of(1, 1, False, 3, 32, 513, True) == Shape("1x1", 3, 32, 512, True)


class Seen(TorchDispatchMode):
    """Results of every operation by shape and dtype, and casts of weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.casts, self.largest, self.convolutions = weight, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            # not the partial sums of the weight gradient, which are fp32 and bounded (conv_wgrad_triton.WORKSPACE)
            self.largest = max(self.largest, out.numel() if out.dtype == torch.float16 else 0)
            half = out.dtype == torch.float16 and sorted(out.shape) == sorted(self.weight)
            self.casts += half and func == torch.ops.aten._to_copy.default
        self.convolutions += func == torch.ops.aten.convolution.default
        return out


def meta(*size):
    t = torch.empty(size, device="meta")
    return (t.half().contiguous(memory_format=torch.channels_last) if len(size) == 4 else t).requires_grad_()


@pytest.mark.parametrize("implementation", conv_table.IMPLEMENTATIONS)
@pytest.mark.parametrize("layer", ["G", "G up", "D", "D down"])
def test_a_weight_is_cast_once_for_a_forward_pass_a_penalty_and_its_gradient(layer, implementation):
    """fp16; R1 for D, path length (by the styles) for G. No half-precision weight a sample exists at any time."""
    samples, channels, size = 8, 16, 4
    weight = torch.empty(24, channels, 3, 3, device="meta", requires_grad=True)
    x, style, bias = meta(samples, channels, size, size), meta(samples, channels), meta(24)
    with use_convolution(implementation), launch.record("sm_90") as launches, Seen(weight.shape) as seen:
        if layer.startswith("G"):
            up = 2 if layer == "G up" else 1
            y = kernels.modulated_conv2d(x, weight, style, up=up, f=TAPS, bias=bias)
        else:
            y = kernels.conv2d_bias_act(x, weight, bias, down=2 if layer == "D down" else 1, f=TAPS)
        upstream = torch.empty_like(y).requires_grad_()
        (g,) = torch.autograd.grad(y, style if layer.startswith("G") else x, upstream, create_graph=True)
        torch.autograd.grad(g, [weight, upstream], torch.empty_like(g))
    assert seen.casts + sum(run.kernel.__name__ == "modulate" for run in launches) == 1
    gemms = sum(run.kernel.__name__ == "conv_gemm" for run in launches)
    assert (gemms == 0, seen.convolutions == 0) == (implementation == "library", implementation == "gemm")
    assert gemms + seen.convolutions >= 3  # forward, inner gradient, and the penalty's
    assert seen.largest < samples * weight.numel()


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("modulated_conv2d", {"modulate": 1, "conv_gemm": 1}),
        ("modulated_conv2d up", {"modulate": 1, "conv_gemm": 1, "fir4": 1}),
        ("conv2d_bias_act", {"conv_gemm": 1}),
        ("conv2d_bias_act residual", {"conv_gemm": 1}),
    ],
)
def test_launches_of_a_layer(op, expected):
    """Forward by the GEMM: the pointwise tail, residual included, is in its epilogue, or in the FIR's."""
    x, weight, style, bias = meta(2, 16, 4, 4), meta(16, 16, 3, 3), meta(2, 16), meta(16)
    with use_convolution("gemm"), launch.record() as launches:
        if op.startswith("modulated"):
            kernels.modulated_conv2d(x, weight, style, up=2 if op.endswith("up") else 1, f=TAPS, bias=bias, clamp=1.0)
        else:
            kernels.conv2d_bias_act(x, weight, bias, residual=x.detach() if op.endswith("residual") else None)
    assert Counter(run.kernel.__name__ for run in launches) == expected


@pytest.mark.parametrize(
    ("size", "fused", "plain"), [((2, 32, 1024, 1024), 1, 0), ((2, 32, 256, 256), 0, 0), ((2, 128, 512, 512), 0, 0)]
)
def test_a_layer_takes_what_the_rule_says(size, fused, plain):
    """conv1 of G at FFHQ-1024, and D's conv0 beside it, which has nothing to fuse."""
    x, weight, style, bias = meta(*size), meta(size[1], size[1], 3, 3), meta(*size[:2]), meta(size[1])
    for op, count in ((lambda: kernels.modulated_conv2d(x, weight, style, bias=bias), fused),
                      (lambda: kernels.conv2d(x, weight), plain)):  # fmt: skip
        with launch.record("sm_90") as launches:
            op()
        assert sum(run.kernel.__name__ == "conv_gemm" for run in launches) == count


@pytest.mark.parametrize("options", [{}, {"up": 2}, {"down": 2}], ids=str)
def test_a_recorded_convolution_of_the_library_keeps_channels_last(options):
    """As it does on a GPU: builds and the static model would else see the FIRs between two formats."""
    x, weight = meta(2, 4, 8, 8), torch.empty(6, 4, 3, 3, device="meta")
    with use_convolution("library"), launch.record("sm_90") as launches:
        y = kernels.conv2d(x, weight, f=TAPS, **options)
        (gx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    images = [t for run in launches for t in run.arguments if isinstance(t, torch.Tensor) and t.ndim == 4]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, gx, *images))


@pytest.mark.usefixtures("_rule")
def test_the_down_convolution_of_d_adds_its_residual():
    """D's block at FFHQ-1024, forward: no pass of bias_act behind conv1 at 1024², one at 512²."""
    for channels, size, expected in ((32, 1024, {"conv_gemm": 1, "fir4": 2}), (64, 512, {"forward": 1, "fir4": 2})):
        with torch.device("meta"):
            block = DiscriminatorBlock(
                channels, 2 * channels, img_channels=3, conv_clamp=256.0, architecture="resnet", is_first=False,
                half_dtype=torch.float16,
            )  # fmt: skip
        with launch.record("sm_90") as launches:
            block(meta(2, channels, size, size), torch.empty(0, device="meta"))
        assert Counter(run.kernel.__name__ for run in launches) == expected


@pytest.mark.usefixtures("_rule")
@pytest.mark.parametrize("base", [8192, 16384, 32768])
def test_a_layer_of_g_on_the_gemm_has_its_next_one_there(base):
    """Which takes its style in its prologue: no epilogue of conv1 needs a next style."""
    half, count = torch.float16, 0
    for resolution in (256, 512, 1024):
        wide, narrow = base // resolution, base // resolution // 2
        if choose(shape(wide, wide, resolution), half, "sm_90") is not None:
            conv0 = Shape.of(3, 2, True, wide, narrow, 2 * resolution + 1, True)
            assert choose(conv0, half, "sm_90") is not None
            count += 1
    assert count > 0


def test_gradients_of_a_fused_layer_take_one_pass_over_the_activations_each():
    """bias_act's gradient, then the GEMM that gives the gradients of x and of the scale together, and the style's."""
    x, weight, style, bias = meta(2, 16, 4, 4), meta(16, 16, 3, 3), meta(2, 16), meta(16)
    with use_convolution("gemm"), launch.record() as launches:
        y = kernels.modulated_conv2d(x, weight, style, bias=bias, clamp=1.0)
        launches.clear()
        torch.autograd.grad(y, [x, style, bias], torch.empty_like(y))
    assert [run.kernel.__name__ for run in launches] == ["first", "conv_gemm", "columns"]


@pytest.mark.parametrize(
    ("size", "dtype", "tf32", "expected"),
    [
        ((32, 64, 1024, 1024), torch.float16, False, {"WIDE": False, "PRECISION": "ieee"}),  # samples are int64 anyway
        ((1, 32, 8192, 8192), torch.float16, False, {"WIDE": True}),
        ((1, 32, 64, 64), torch.float32, True, {"WIDE": False, "PRECISION": "tf32"}),
        ((1, 32, 64, 64), torch.float32, False, {"PRECISION": "ieee"}),
        ((1, 32, 64, 64), torch.float64, True, {"PRECISION": "ieee"}),
    ],
)
def test_offsets_and_precision_of_a_launch(size, dtype, tf32, expected):
    x = torch.empty(size, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    launch.allow_tf32(tf32)
    try:
        with use_convolution("gemm"), launch.record() as launches:
            kernels.conv2d(x, torch.empty(32, size[1], 3, 3, device="meta"))
    finally:
        launch.allow_tf32(False)
    assert {key: launches[0].constants[key] for key in expected} == expected
