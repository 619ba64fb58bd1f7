"""bias_act in Triton: the op contract, every act with every set of operands, and penalties that differentiate it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from op_cases import OpCase, assert_equal, derivatives
from op_inputs import _one_thread, normal  # noqa: F401  (a fixture)
from opcheck import CHECKS, check
from watched import watched

from hsrgan import kernels
from hsrgan.kernels import blocks, launch, use_backend

pytest.importorskip("triton")
from hsrgan.kernels import bias_act_triton as module

ACTS = ("lrelu", "relu", "linear", "swish", "tanh", "sigmoid")
NAMES = ("x", "bias", "demod", "noise", "strength", "next_style", "residual")


def operands(n, c, *size, names=NAMES):
    shapes = {
        "x": (n, c, *size), "bias": (c,), "demod": (n, c), "noise": (n, 1, *size), "strength": (1,),
        "next_style": (n, c), "residual": (n, c, *size),
    }  # fmt: skip
    return [normal(*shapes[name]) for name in names]


def call(op, names=NAMES, **options):
    return lambda *tensors: op(**dict(zip(names, tensors, strict=True)), **options)


def op_case(name, names=NAMES, **options):
    return OpCase(
        name, call(kernels.bias_act, names, **options), call(kernels.bias_act_torch, names, **options),
        lambda n, c, h, w: operands(n, c, h, w, names=names),
        low=tuple(i for i, name in enumerate(names) if name in ("x", "residual")),
        sizes=((1, 1, 2, 3), (1, 63, 2, 3), (1, 129, 2, 3), (2, 2, 1, 3), (2, 2, 1, 7), (2, 2, 1, 100), (3, 33, 5, 7),
               (0, 3, 4, 5)),
        slow_size=(1, 1, 1, 2), precise_order=2,
    )  # fmt: skip


# a clamp of 0.75, which every dtype holds, as a mask that flips with the clamp's rounding is no error of a gradient:
# one that reads x and needs everything, one that reads y, one whose second derivative has curvature
FULL = op_case("all operands", clamp=0.75, gain=0.9, alpha=0.3)
FROM_Y = op_case("y saved", ("x", "bias", "noise", "strength"), clamp=0.75)
SWISH = op_case("swish", ("x", "bias", "demod"), act="swish", clamp=1.5)


@pytest.mark.parametrize("name", CHECKS)
def test_contract(name):
    check(FULL, name)


@pytest.mark.parametrize("case", [FROM_Y, SWISH], ids=lambda case: case.name)
def test_contract_of_other_paths(case):
    check(case, "launches", "order", "partial", "precision", "determinism")


def same(names, tensors, order=2, **options):
    wanted = range(len(tensors))
    truth = derivatives(call(kernels.bias_act_torch, names, **options), tensors, wanted, order)
    with watched() as watch:
        fast = derivatives(call(kernels.bias_act, names, **options), tensors, wanted, order)
    assert not watch.outside
    assert_equal(truth, fast, f"{names} {options}")


@pytest.mark.parametrize("act", ACTS)
def test_every_set_of_operands(act):
    """The clamp comes and goes so that it meets every pair of operands. Second derivatives of one act of each sort."""
    order = 2 if act in ("lrelu", "swish") else 1
    noise = ((), ("noise",), ("noise", "strength")) if order == 2 else ((), ("noise", "strength"))
    terms = [((), ("bias",)), ((), ("demod",)), noise, ((), ("next_style",))]
    for i, chosen in enumerate(itertools.product(*terms, ((), ("residual",)))):
        names = ("x", *sum(chosen, ()))
        clamp = 0.7 if (i + len(names)) % 2 else None
        same(names, operands(1, 2, 1, 2, names=names), order, act=act, clamp=clamp)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gain", [0.0, -0.6])
def test_second_derivatives_at_any_gain(act, gain):
    same(NAMES, operands(2, 3, 2, 2), act=act, gain=gain, clamp=0.8 if gain else None)


@pytest.mark.parametrize("names", [NAMES, ("x", "bias", "residual"), ("x", "noise")], ids=len)
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 9), (2, 3, 2, 3, 4)], ids=len)
def test_any_number_of_dimensions(shape, names):
    same(names, operands(*shape, names=names), clamp=0.9)


def test_one_noise_for_all_samples():
    tensors = operands(3, 2, 2, 3)
    tensors[3] = tensors[3][:1]
    same(NAMES, tensors)


@pytest.mark.parametrize("style", [0.0, -1.0])
def test_any_next_style(style):
    """Nothing is divided by it."""
    tensors = operands(2, 3, 2, 2)
    tensors[5][:, :2] = style
    same(NAMES, tensors, clamp=0.8)  # which in fp32 is larger than in fp64


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_sums_over_several_tiles_programs_and_blocks(memory_format, monkeypatch):
    """As at large sizes: 2 tiles to a program, several programs to a sample, several blocks of channels."""
    kinds = ("forward", "gradient", "sums")
    rows = [blocks.Row(f"bias_act.{kind}", "*", (4,), "*", (("elements", 512),), "test") for kind in kinds]
    monkeypatch.setattr(module, "tiles_per_program", lambda tiles: 2)
    tensors = [t.contiguous(memory_format=memory_format) if t.ndim == 4 else t for t in operands(2, 65, 3, 2)]
    with blocks.using(rows):  # 256 in fp64
        same(NAMES, tensors, clamp=0.7, act="swish")
        same(("x", "bias"), [tensors[0], tensors[1]])


def penalty(inner, outer, backend):
    """The gradients of Σ(∂Σ out/∂inner)² by `outer`. The network is a function of the leaves."""
    x, w1, w2, b1, b2, s, noise, strength = leaves = [
        t.requires_grad_() for t in (
            normal(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), normal(4, 3, 3, 3), normal(4, 4, 1, 1),
            normal(4), normal(4), normal(2, 3), normal(2, 1, 4, 4), normal(1),
        )
    ]  # fmt: skip
    with use_backend(backend):
        demod = ((w1 * s[:, None, :, None, None]).square().sum((2, 3, 4)) + 1e-8).rsqrt()
        next_style = torch.tanh(s @ w1[:, :, 1, 1].T)
        y = F.conv2d(x * s[:, :, None, None], w1, padding=1)
        y = kernels.bias_act(
            y, b1, demod=demod, noise=noise, strength=strength, next_style=next_style, clamp=3.0,
        )  # fmt: skip
        y = kernels.bias_act(F.conv2d(y, w2), b2, residual=F.avg_pool2d(y, 1), clamp=2.0, gain=1)
        y = kernels.bias_act(F.conv2d(y, w2), b2, clamp=2.0, act="lrelu")
        out = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()
        (gradient,) = torch.autograd.grad(out, leaves[inner], create_graph=True)
        loss = gradient.square().sum() + out
        return gradient, *torch.autograd.grad(loss, [leaves[i] for i in outer])


@pytest.mark.parametrize("inner", [0, 5], ids=["R1, by images", "path length, by styles"])
def test_penalties(inner):
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        results.append(penalty(inner, range(8), backend))
    for truth, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-9, atol=1e-9)


def record(names, wrt, second=False, **options):
    """The launches at a real size: forward, gradients, and second derivatives along the gradient of x."""
    tensors = {
        name: torch.empty(t.shape, dtype=torch.float16 if name in ("x", "residual") else torch.float32, device="meta")
        for name, t in zip(names, operands(8, 32, 1, 1, names=names), strict=True)
    }
    for name in ("x", "noise", "residual"):
        if name in names:
            t = tensors[name].expand(-1, -1, 1024, 1024)
            tensors[name] = torch.empty_like(t, memory_format=torch.channels_last)
    for name in names:
        tensors[name].requires_grad_()  # as a network's parameters do, whoever is asked about
    with launch.record() as launches:
        y = kernels.bias_act(**tensors, **options)
        g = torch.autograd.grad(y, [tensors[name] for name in wrt], torch.empty_like(y).requires_grad_(),
                                create_graph=second)  # fmt: skip
        if second:
            g[0].sum().backward()
    return launches


def on(entry, prefix):
    return {name.removeprefix(prefix) for name, value in entry.constants.items() if value is True and prefix in name}


def test_launches_at_real_sizes():
    """No gradient that nobody wants, nor a launch too many; whole 128-byte lines; few partial sums."""
    forward, first = record(("x", "bias"), ("x", "bias"), clamp=256)
    assert (forward.kernel.__name__, first.kernel.__name__) == ("forward", "first")
    assert on(first, "WANT_") == {"X", "BIAS"} and first.constants["FROM_Y"]
    sums = first.arguments[8]
    assert sums.numel() * 4 < 0.02 * first.arguments[0].numel() * 2
    # R1: the gradient of bias is not computed, and y and the cotangent alone make the second derivative
    *_, first, second = record(("x", "bias"), ("x",), second=True, clamp=256)
    assert on(first, "WANT_") == {"X"}
    assert on(second, "WANT_") == {"Z"} and on(second, "GIVEN_") == {"X"}
    # a layer of G, as path length sees it
    names = ("x", "bias", "demod", "noise", "strength")
    *_, first, second = record(names, ("x", "demod"), second=True, clamp=256)
    assert on(first, "WANT_") == {"X", "DEMOD"} and not first.constants["FROM_Y"]
    assert on(second, "WANT_") == {"Z", "DEMOD"} and on(second, "GIVEN_") == {"X"}


@pytest.mark.parametrize(
    ("options", "wrt", "saved"),
    [
        ({"clamp": 1.0}, ("x", "bias"), ["z"]),
        ({"act": "linear"}, ("x", "bias"), []),
        ({"act": "linear"}, ("x", "demod"), ["x"]),
        ({"act": "swish"}, ("x", "bias"), ["x"]),
        ({}, ("x", "next_style"), ["x"]),
        ({}, ("x", "residual"), ["x"]),
    ],
)
def test_what_is_saved(options, wrt, saved):
    names = ("x", *(name for name in NAMES[1:] if name in wrt))
    tensors = [t.requires_grad_() for t in operands(2, 3, 4, 4, names=names)]
    large = []
    with (
        watched(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: large.append(t) if t.ndim == 4 else None, lambda t: t),
    ):
        z = call(kernels.bias_act, names, **options)(*tensors)
    known = {tensors[0].data_ptr(): "x", z.data_ptr(): "z"}
    assert [known[t.data_ptr()] for t in large] == saved


def test_the_gradient_of_the_residual_is_no_copy():
    x, residual = (normal(2, 3, 4, 4).requires_grad_() for _ in range(2))
    g = normal(2, 3, 4, 4)
    with watched():
        z = kernels.bias_act(x, residual=residual)
        assert torch.autograd.grad(z, residual, g)[0].data_ptr() == g.data_ptr()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"residual": torch.zeros(1, 5).double()}], ids=["of y", "of x"])
def test_gradients_at_the_kinks(backend, options):
    """At 0 that of the negative side; none where the clamp is met exactly, as half precision does."""
    x = torch.tensor([[-5.0, -1.0, 0.0, 0.5, 1.0]]).double().requires_grad_()
    with use_backend(backend):
        y = kernels.bias_act(x, gain=1.0, clamp=1.0, **options)
        (g,) = torch.autograd.grad(y.sum(), x)
    assert g.tolist() == [[0.0, 0.2, 0.2, 1.0, 0.0]]


def test_tanh_of_small_values_keeps_its_digits():
    x = torch.randn(1, 64) * 1e-3
    with watched():
        y = kernels.bias_act(x, act="tanh")
    assert ((y.double() - x.double().tanh()) / x).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_nan_stays_and_infinity_is_clamped():
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 70000.0]])
    for act in ("lrelu", "relu", "linear", "tanh", "sigmoid"):
        with watched():
            y = kernels.bias_act(x, act=act, clamp=256)
        torch.testing.assert_close(y, kernels.bias_act_torch(x, act=act, clamp=256), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_clamp_that_the_dtype_cannot_hold_still_stops_gradients(dtype):
    x = torch.full((1, 1, 1, 4), 1000.0, dtype=dtype).requires_grad_()
    for options in ({}, {"residual": torch.zeros_like(x)}):
        with watched():
            y = kernels.bias_act(x, clamp=256 * 0.5**0.5, **options)
        assert torch.autograd.grad(y.sum(), x)[0].abs().max() == 0


def test_a_third_derivative_says_that_there_is_none():
    x = normal(1, 2, 2, 2).requires_grad_()
    with watched():
        (first,) = torch.autograd.grad(kernels.bias_act(x, act="swish").sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="bias_act has two derivatives"):
            second.sum().backward()


@pytest.mark.parametrize("name", NAMES[1:])
def test_another_device_is_refused(name):
    tensors = dict(zip(NAMES, operands(2, 3, 4, 4), strict=True))
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on the device of x"):
        kernels.bias_act(**tensors)


def test_other_refusals():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="residual must have the dtype of x"):
        kernels.bias_act(x.half(), residual=x)
    with watched(), pytest.raises(ValueError, match="need 3 strides"):
        kernels.bias_act(torch.zeros(2, 3, 4, 4, 4)[..., ::2, ::2, ::2])
