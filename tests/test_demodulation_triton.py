"""modulation in Triton: the op contract with and without fp16's normalisation, its launches, whole layers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from op_cases import OpCase, assert_equal, truth_and_op
from op_inputs import TAPS, _one_thread, normal  # noqa: F401  (a fixture)
from opcheck import CHECKS, check
from watched import watched

from hsrgan import kernels
from hsrgan.kernels import blocks, launch
from hsrgan.kernels.blocks import Row

pytest.importorskip("triton")


def case(k=3, transposed=False, normalise=False, outputs=1):
    """A convolution of x made of all four results by PyTorch's ops; what graph stands for has the values of cast."""

    def make(n, c, h, w):
        return normal(n, c, h, w), normal(c + outputs, c, k, k), normal(n, c)

    def call(op):
        def function(x, weight, style):
            graph, cast, style, demod = op(weight, style, x, transposed=transposed, normalise=normalise)
            w = graph - graph.detach() + cast
            x = x * style[:, :, None, None]
            y = F.conv_transpose2d(x, w, padding=k // 2) if transposed else F.conv2d(x, w, padding=k // 2)
            return y * demod[:, :, None, None] + style.square().sum()

        return function

    return OpCase(
        "modulation", call(kernels.modulation), call(kernels.modulation_torch), make, dtypes=(torch.float32,),
        sizes=((2, 3, 1, 2), (0, 2, 1, 1)), layout_sizes=((2, 2, 1, 3),), precision_sizes=((2, 9, 3, 2),),
        determinism_size=(2, 3, 1, 2), gradcheck_size=(2, 2, 1, 2), slow_size=(1, 1, 1, 1), may_copy=True,
    )  # fmt: skip


# a constant maximum is no derivative, but this y does not depend on it: what the layer is for
CONTRACT = case(normalise=True)


@pytest.mark.parametrize("name", CHECKS)
def test_contract(name):
    if name in ("gradcheck", "gradgradcheck"):
        check(case(transposed=True), name)
    else:
        check(CONTRACT, name)


def same(one, *size, order=2):
    truth, fast, watch = truth_and_op(one, one.tensors(size), order)
    assert not watch.outside
    assert_equal(truth, fast, f"{size}")


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("k", "transposed"), [(1, False), (3, False), (3, True)])
def test_kernels_of_both_sizes_and_directions(k, transposed, normalise):
    same(case(k, transposed, normalise), 3, 5, 1, 2)


@pytest.mark.parametrize("inputs", [1, 7, 33])
def test_more_of_everything_than_a_program_takes(inputs):
    """The last block of outputs, inputs and samples is cut off."""
    sizes = {
        "modulate": {"outputs": 2, "inputs": 16, "samples": 2}, "rows": {"outputs": 2, "inputs": 16, "samples": 2},
        "second": {"outputs": 4, "inputs": 16, "samples": 2}, "columns": {"outputs": 4, "inputs": 16, "samples": 2},
    }  # fmt: skip
    rows = [Row(f"demodulation.{name}", "*", (4,), "*", tuple(each.items()), "") for name, each in sizes.items()]
    with blocks.using(rows):
        same(case(normalise=True, outputs=4), 3, inputs, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_precision_and_formats(dtype, transposed):
    """No worse than twice the definition, fp32 weights and a rounding of the cast; in the format of x."""
    torch.manual_seed(1)
    weight, style = torch.randn(5, 70, 3, 3), torch.randn(4, 70)
    weight[0] *= 1e4
    x = torch.empty(4, 70, 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    names = ("cast", "style", "demod", "gradient of the weight", "of the style")

    def results(op, weight, style):
        leaves = [t.clone().requires_grad_() for t in (weight, style)]
        ready = op(*leaves, x.to(weight.dtype), transposed=transposed, normalise=dtype == torch.float16)
        torch.manual_seed(2)
        gs = [torch.randn(t.shape).to(t) for t in (ready.graph, ready.style, ready.demod)]
        return *ready[1:], *torch.autograd.grad((ready.graph, ready.style, ready.demod), leaves, gs)

    truth = results(kernels.modulation_torch, weight.double(), style.double())
    own = kernels.modulation_torch(weight, style, x, transposed=transposed)
    with watched():
        ready = kernels.modulation(weight, style, x, transposed=transposed)
        ours = results(kernels.modulation, weight, style)
    assert ready.cast.dtype == dtype and ready.cast.stride() == own.cast.contiguous(
        memory_format=torch.channels_last
    ).stride()
    assert ready.demod.dtype == torch.float32 and not ready.cast.requires_grad
    for name, a, b, c in zip(names, ours, results(kernels.modulation_torch, weight, style), truth, strict=True):
        error, theirs = ((t.detach().double() - c.detach()).norm() / c.detach().norm() for t in (a, b))
        assert error <= 2 * theirs + 4 * torch.finfo(torch.float32).eps, name
    off = (ready.cast.double() - own.cast.double()).abs()
    assert (off <= torch.finfo(dtype).eps * own.cast.double().abs()).all()


def launched(function):
    with launch.record() as launches:
        function()
    return [each.kernel.__name__ for each in launches]


def meta(*shape):
    return torch.empty(shape, device="meta", requires_grad=True)


def test_one_launch_forward_two_for_the_gradients_two_for_theirs():
    """Path length: the style's gradient is differentiated, by all that it is made of."""
    weight, style, x = meta(5, 7, 3, 3), meta(2, 7), meta(2, 7, 4, 4).half()
    results = []

    def forward():
        ready = kernels.modulation(weight, style, x)
        results[:] = ready.graph, ready.style, ready.demod

    assert launched(forward) == ["modulate"]
    gs = [torch.empty_like(t) for t in results]
    assert launched(lambda: torch.autograd.grad(results, [weight, style], gs)) == ["rows", "columns"]
    launched(forward)
    assert launched(lambda: torch.autograd.grad(results, weight, gs)) == ["rows"]
    launched(forward)
    gs = [g.requires_grad_() for g in gs]
    first = []

    def of_the_style():
        first[:] = torch.autograd.grad(results, style, gs, create_graph=True)

    assert launched(of_the_style) == ["columns"]
    twice = launched(lambda: torch.autograd.grad(first, [weight, style, *gs[1:]], torch.empty_like(style)))
    assert twice == ["second_rows", "columns", "rows", "columns"]


@pytest.mark.parametrize("up", [1, 2])
def test_path_length_asks_for_no_weight_gradient(up):
    """Although the node that the weight's gradient goes to is run, for the style's sake."""
    x, weight, style = meta(2, 8, 4, 4), meta(8, 8, 3, 3), meta(2, 8)
    products = []
    with launch.record() as launches, kernels.use_convolution("gemm"):
        y = kernels.modulated_conv2d(x, weight, style, up=up, f=TAPS.to("meta"))
        forward = len(launches)
        torch.autograd.grad(y, style, torch.empty_like(y), create_graph=True)
        products = [each.kernel.__name__ for each in launches[forward:]]
        assert "conv_gemm" in products and "wgrad_kernel" not in products and "rows" not in products
        torch.autograd.grad(
            kernels.modulated_conv2d(x, weight, style, up=up, f=TAPS.to("meta")), weight, torch.empty_like(y)
        )
    assert [each.kernel.__name__ for each in launches].count("wgrad_kernel") == 1


@pytest.mark.parametrize("which", [0, 1])
def test_frozen_weight_or_style(which):
    """No gradient is asked for, nor made, on either side of what stands for them."""
    weight, style, x = meta(5, 7, 3, 3), meta(2, 7), meta(2, 7, 4, 4).half()
    (weight, style)[which].requires_grad_(False)
    with launch.record():
        ready = kernels.modulation(weight, style, x)
    assert (ready.graph.requires_grad, ready.style.requires_grad) == (weight.requires_grad, style.requires_grad)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("convolution", ["library", "gemm"])
def test_a_layer_with_path_length(convolution, up):
    """Two layers of fp64, and the derivative of the style gradient's length by all of it."""

    def op(operation):
        def function(x, weight, style, bias):
            return operation(x, weight, style, up=up, f=TAPS, bias=bias, clamp=2.0)

        return function

    def make(n, c, h, w):
        return normal(n, c, h, w), normal(c + 1, c, 3, 3), normal(n, c), normal(c + 1)

    one = replace(CONTRACT, op=op(kernels.modulated_conv2d), op_torch=op(kernels.modulated_conv2d_torch), make=make)
    with kernels.use_convolution(convolution):
        same(one, 2, 3, 2, 3)


@pytest.mark.parametrize("demodulate", [False, True])
def test_a_product_reads_the_values_of_its_weight(demodulate):
    """1×1 in channels_last, on the library: F.linear. fp16 would show a weight that is not normalised by its size."""
    x, weight, style = torch.randn(2, 3, 2, 2).half(), torch.randn(4, 3, 1, 1) * 1e5, torch.randn(2, 3)
    x, style = x.contiguous(memory_format=torch.channels_last), style if demodulate else style * 1e-5
    weight = weight if demodulate else weight * 1e-5
    truth = kernels.modulated_conv2d_torch(x.double(), weight.double(), style.double(), demodulate=demodulate)
    with watched(), kernels.use_convolution("library"):
        y = kernels.modulated_conv2d(x, weight, style, demodulate=demodulate)
    assert (y.double() - truth).norm() <= 5e-3 * truth.norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("weight must be \\[O, I, k, k\\]", {"weight": torch.zeros(5, 3)}),
        ("style must be \\[N, I\\]", {"style": torch.zeros(3)}),
        ("weight must have shape", {"style": torch.zeros(2, 4)}),
        ("weight must have shape", {"weight": torch.zeros(5, 3, 1, 3)}),
        ("style must be on the device of x", {"style": torch.zeros(2, 3, device="meta")}),
        ("style must be floating-point", {"style": torch.zeros(2, 3, dtype=torch.int64)}),
    ],
)
def test_refusals_name_the_argument(backend, message, changes):
    arguments = {"weight": torch.zeros(5, 3, 3, 3), "style": torch.zeros(2, 3), "x": torch.zeros(2, 3, 4, 4)}
    with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        kernels.modulation(**(arguments | changes))
