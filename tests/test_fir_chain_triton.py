"""The fused chains in Triton: the op contract, where the kernel hands over to two ops, and penalties through both."""

from collections import Counter

import pytest
import torch
from op_cases import OpCase, assert_equal, truth_and_op
from op_inputs import _one_thread, normal  # noqa: F401  (a fixture)
from opcheck import CHECKS, check
from small_networks import make_g

from hsrgan import kernels
from hsrgan.kernels import blocks, launch

pytest.importorskip("triton")

KINDS = ("blur", "chain", "slope", "source", "tangent")  # of kernels in the table
TAPS = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64) / 10  # not symmetric: a mirrored tap shows
SMALL = {
    "sizes": ((1, 1, 3, 4), (1, 7, 4, 3), (2, 3, 2, 9), (1, 63, 2, 2), (1, 129, 2, 2), (1, 2, 2, 100), (0, 3, 4, 5)),
    "layout_sizes": ((2, 5, 2, 3),),
    "precision_sizes": ((2, 16, 6, 5),),
    "gradcheck_size": (1, 2, 3, 4),
    "slow_size": (1, 1, 2, 2),
}


def behind(pad=1, names=("bias", "demod", "noise", "strength"), **options):
    """fir_bias_act on x and named operands. As in use demod is positive, and bias and noise add less than it gives."""

    def make(n, c, h, w):
        size = (h + 2 * pad - 3, w + 2 * pad - 3)
        all_of_them = {
            "bias": normal(c) / 2, "demod": 0.75 + 0.5 * torch.rand(n, c, dtype=torch.float64),
            "noise": normal(n, 1, *size), "strength": normal(1) / 2, "next_style": normal(n, c),
        }  # fmt: skip
        return [normal(n, c, h, w), *(all_of_them[name] for name in names)]

    def call(op):
        return lambda x, *operands: op(
            x, TAPS.to(x.device), padding=pad, **dict(zip(names, operands, strict=True)), **options
        )

    constants = tuple(i for i, name in enumerate(names, 1) if name == "noise")
    return OpCase(
        "fir_bias_act", call(kernels.fir_bias_act), call(kernels.fir_bias_act_torch), make, constants=constants, **SMALL
    )


def before(pad=2, bias=True, **options):
    def call(op):
        return lambda x, *b: op(x, TAPS.to(x.device), *b, padding=pad, **options)

    def make(n, c, h, w):
        return [normal(n, c, h, w), normal(c)] if bias else [normal(n, c, h, w)]

    return OpCase("bias_act_fir", call(kernels.bias_act_fir), call(kernels.bias_act_fir_torch), make, **SMALL)


BEHIND = behind(gain=1.5, clamp=0.75, act_gain=1.25, alpha=0.25)
LAYER = ("bias", "demod", "noise", "strength")
STYLED = behind(names=(*LAYER, "next_style"), gain=1.5, clamp=0.75, act_gain=1.25, alpha=0.25)
BEFORE = before(gain=1.5, clamp=0.75, act_gain=1.25, alpha=0.25)


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "precision"])
def test_contract_behind(name):
    check(STYLED, name)


@pytest.mark.parametrize("name", ["bounds", "values", "gradients", "second", "partial"])
def test_contract_behind_without_a_style(name):
    check(BEHIND, name)


BEFORE_CHECKS = ("bounds", "poison", "values", "gradients", "second", "order", "layouts", "gradgradcheck")


@pytest.mark.parametrize("name", BEFORE_CHECKS)
def test_contract_before(name):
    check(BEFORE, name)


@pytest.mark.parametrize(
    "one", [behind(gain=4.0, clamp=256.0), behind(names=(*LAYER, "next_style"), gain=4.0, clamp=256.0),
           before(gain=1.5, clamp=256.0)], ids=["behind", "styled", "before"],
)
def test_contract_on_precision(one):
    """With a clamp as it is in use: at 0.75 a value just below it may round to it, and then counts as clamped."""
    check(one, "precision")


def same(case, *size, wanted=None, order=2):
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in case.tensors(size)]
    truth, fast, watch = truth_and_op(case, tensors, order, wanted)
    assert not watch.outside
    assert_equal(truth, fast, f"{size}")


OPERANDS = [(), ("bias",), ("demod",), ("noise",), ("bias", "demod"), ("demod", "noise"), ("bias", "noise", "strength")]


@pytest.mark.parametrize("names", OPERANDS, ids=str)
def test_any_set_of_operands(names):
    same(behind(names=names, clamp=0.75), 2, 3, 4, 5)


@pytest.mark.parametrize("options", [{"act": "relu"}, {"act": "linear"}, {"act": "linear", "clamp": 0.75}], ids=str)
def test_the_other_piecewise_linear_activations(options):
    same(behind(**options), 2, 3, 4, 5)
    same(before(**options), 2, 3, 4, 5)


@pytest.mark.parametrize("pad", [0, 1, 2, 3])
def test_every_padding_that_one_pass_takes(pad):
    """The pixel that a program counts as its own lies at another tap for each."""
    same(behind(pad, clamp=0.75), 1, 2, 5, 4)
    same(before(pad, clamp=0.75), 1, 2, 5, 4)


@pytest.mark.parametrize("name", ["fir_bias_act", "bias_act_fir"])
def test_paddings_that_differ_by_side(name):
    def call(op):
        return lambda x, bias: op(x, TAPS.to(x.device), bias, padding=(1, 3, 2, 1), clamp=0.75)

    def make(n, c, h, w):
        return [normal(n, c, h, w), normal(c)]

    same(OpCase(name, call(getattr(kernels, name)), call(getattr(kernels, f"{name}_torch")), make), 1, 2, 4, 5)


@pytest.mark.parametrize("span", [2, 4])
def test_programs_share_the_pixels_out(span):
    """More rows than a strip, more columns than a tile, more channels than a block: each pixel is summed once."""
    sizes = {"values": 4, "unroll": 2, "span": span, "rows": 16, "num_warps": 4}
    with blocks.using([blocks.Row(f"fir4.{kind}", "*", (4,), "*", tuple(sizes.items()), "") for kind in KINDS]):
        for pad in (1, 2, 3):
            same(behind(pad, clamp=0.75), 1, 65, 19, 18, order=1)
        same(before(clamp=0.75), 1, 65, 19, 18, order=1)


def test_noise_of_one_sample_is_shared():
    case = behind(names=("noise", "strength"))
    tensors = case.tensors((2, 3, 4, 5))
    tensors[1] = tensors[1][:1]
    truth, fast, _ = truth_and_op(case, tensors, 2)
    assert_equal(truth, fast, "noise [1, 1, …]")


@pytest.mark.parametrize(
    "case",
    [behind(act="swish"), behind(act_gain=-0.5), behind(5), before(act="tanh"),
     before(act_gain=-0.5), before(pad=4, down=2), before(bias=False)],
    ids=["swish", "negative gain", "wide padding", "tanh", "negative gain", "down", "no bias"],
)  # fmt: skip
def test_what_the_kernel_does_not_do_is_done_by_two_ops(case):
    same(case, 1, 2, 4, 3)


@pytest.mark.parametrize("names", [(*LAYER, "next_style"), ("bias", "next_style"), ("demod", "next_style")])
def test_next_style_without_a_clamp(names):
    """One sum then serves the gradients of demod and of the style."""
    same(behind(names=names), 1, 3, 4, 5)


@pytest.mark.parametrize("wanted", [(0,), (5,), (2, 5), (0, 5)])
def test_some_gradients_beside_that_of_next_style(wanted):
    same(STYLED, 1, 3, 4, 5, wanted=wanted)


@pytest.mark.parametrize("case", [BEHIND, STYLED, BEFORE], ids=["behind", "styled", "before"])
def test_a_penalty_whose_result_is_read_again(case):
    """As in path length: the next layer's gradient reads what this one wrote, and so does its derivative."""
    found = []
    for op in (case.op_torch, case.op):
        tensors = [t.requires_grad_(i not in case.constants) for i, t in enumerate(case.tensors((1, 3, 4, 5)))]
        free = [t for t in tensors if t.requires_grad]
        with kernels.use_backend("triton"):
            y = op(*tensors)
            first = torch.autograd.grad(y.pow(3).sum(), free, create_graph=True)
            found.append(torch.autograd.grad(sum(t.square().sum() for t in first), free))
    for one, true in zip(*found, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-9, atol=1e-9)


def test_noise_may_want_a_gradient():
    case = behind(clamp=0.75)
    same(case, 1, 2, 4, 3, wanted=range(5))


@pytest.mark.parametrize(("half", "own"), [(0, 1), (1, 2)])
def test_a_layer_finds_its_style_multiplied_in(half, own):
    """A style has a pass of its own in b4.conv1, whose x is a parameter, and in a conv0 whose x changes its dtype."""
    g = make_g(half_dtype=torch.float16, num_fp16_res=half).to("meta")
    ws = torch.empty(2, g.synthesis.num_ws, g.synthesis.w_dim, device="meta").requires_grad_()
    with launch.record() as launches:
        image = g.synthesis(ws, noise_mode="none")
        passes = modules(launches)
        torch.autograd.grad(image, ws, torch.empty_like(image))
    assert passes["bias_act_kernels"] == own and passes["fir4_kernels"] == 2
    assert modules(launches)["bias_act_kernels"] == 2 * own


def modules(launches):
    return Counter(one.kernel.fn.__module__.removeprefix("hsrgan.kernels.") for one in launches)


def test_one_launch_forward_and_one_for_all_gradients():
    x = torch.empty(2, 8, 17, 17, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    small = {"bias": (8,), "demod": (2, 8), "strength": (1,)}
    small = {name: torch.empty(*size, device="meta", requires_grad=True) for name, size in small.items()}
    f, noise = torch.empty(4, device="meta"), torch.empty(2, 1, 16, 16, device="meta")
    with launch.record() as launches:
        y = kernels.fir_bias_act(x, f, padding=1, gain=4, noise=noise, clamp=256, **small)
        torch.autograd.grad(y, [x, *small.values()], torch.empty_like(y))
        y = kernels.bias_act_fir(x, f, small["bias"], padding=2, clamp=256)
        torch.autograd.grad(y, [x, small["bias"]], torch.empty_like(y))
    assert len(launches) == 4


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("message", "op", "options"),
    [
        ("f must be a 1-d or 2-d filter", kernels.fir_bias_act, {"f": TAPS[None, None]}),
        ("f must be on the device of x", kernels.bias_act_fir, {"f": torch.empty(4, device="meta")}),
        ("up must be", kernels.fir_bias_act, {"up": 0}),
        ("down must be", kernels.bias_act_fir, {"down": 5}),
        ("padding .* leaves an output", kernels.bias_act_fir, {"padding": -2}),
        ("bias must have shape \\[3\\]", kernels.bias_act_fir, {"bias": torch.zeros(4)}),
        ("noise must have shape", kernels.fir_bias_act, {"noise": torch.zeros(2, 1, 4, 4)}),
        ("demod must have shape", kernels.fir_bias_act, {"demod": torch.zeros(3)}),
        ("act must be one of", kernels.bias_act_fir, {"act": "gelu"}),
        ("clamp must be positive", kernels.fir_bias_act, {"clamp": 0.0}),
        ("x must be", kernels.bias_act_fir, {"x": torch.zeros(2, 3)}),
    ],
)
def test_refusals_name_the_argument(backend, message, op, options):
    with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        op(**{"x": torch.zeros(2, 3, 4, 4), "f": TAPS, "padding": 1, **options})
