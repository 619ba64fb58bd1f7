"""The implicit GEMM behind conv2d, conv2d_bias_act and modulated_conv2d, forced where the library would run."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import OpCase, assert_equal, truth_and_op
from opcheck import CHECKS, check

from hsrgan import kernels
from hsrgan.kernels import conv_table
from hsrgan.kernels.conv2d import convolution, geometry_of
from hsrgan.kernels.conv_table import use_convolution

pytest.importorskip("triton")

TAPS = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64) / 10  # not symmetric: a mirrored tap shows


@pytest.fixture(autouse=True)
def _gemm():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with use_convolution("gemm"):
        yield
    torch.set_num_threads(threads)


def normal(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


SIZES = {
    "sizes": ((1, 1, 1, 1), (2, 3, 3, 4), (1, 17, 2, 1), (0, 3, 2, 2)),
    "layout_sizes": ((1, 3, 2, 4),),
    "precision_sizes": ((2, 16, 4, 3),),
    "determinism_size": (2, 3, 2, 3),
    "gradcheck_size": (1, 2, 1, 2),
    "slow_size": (1, 1, 1, 1),
    "may_copy": True,  # the weight, which is larger than such a small x
}


# no pre-activation of these lies so near 0 that rounding the weight turns its sign, and with it the gradient
FEW = {"sizes": ((1, 3, 2, 3), (0, 3, 2, 2)), "precision_sizes": ((1, 15, 2, 3),)}


def case(name, op, op_torch, make, sizes, **options):
    return OpCase(name, op, op_torch, make, **(SIZES | (FEW if sizes == "few" else {})), **options)


def conv2d(k, sizes="contract", **options):
    def make(n, c, h, w):
        return normal((n, c, h, w), (c + 1, c, k, k))

    def call(op):
        return lambda x, weight: op(x, weight, f=TAPS.to(x.device), **options)

    return case(f"conv2d {k}x{k} {options}", call(kernels.conv2d), call(kernels.conv2d_torch), make, sizes)


def layer(k=3, down=1, residual=False, sizes="contract", **options):
    def make(n, c, h, w):
        shapes = [(n, c, h * down, w * down), (c + 1, c, k, k), (c + 1,)]
        return normal(*shapes, *([(n, c + 1, h, w)] if residual else []))

    def call(op):
        return lambda x, weight, bias, residual=None: op(
            x, weight, bias, down=down, f=TAPS.to(x.device), residual=residual, **options
        )

    ops = call(kernels.conv2d_bias_act), call(kernels.conv2d_bias_act_torch)
    return case(f"layer {k} {down} {options}", *ops, make, sizes, low=(0, 3) if residual else (0,))


def modulated(k=3, up=1, noise=True, bias=True, sizes="contract", **options):
    def make(n, c, h, w):
        shapes = [(n, c, h, w), (c + 1, c, k, k), (n, c)]
        shapes += [(n, 1, h * up, w * up), (1,)] if noise else []
        return normal(*shapes, *([(c + 1,)] if bias else []))

    def call(op):
        def function(x, weight, style, *rest):
            rest = list(rest)
            more = {"noise": rest.pop(0), "strength": rest.pop(0)} if noise else {}
            more |= {"bias": rest.pop(0)} if bias else {}
            return op(x, weight, style, up=up, f=TAPS.to(x.device), **more, **options)

        return function

    ops = call(kernels.modulated_conv2d), call(kernels.modulated_conv2d_torch)
    return case(f"modulated {k} {up} {options}", *ops, make, sizes)


# the whole contract with one tap: prologue, epilogue, sums and strides are those of nine
CONTRACTS = {
    "conv2d": conv2d(1),
    "conv2d_bias_act": layer(1, clamp=0.8),
    "conv2d_bias_act-residual": layer(1, residual=True, clamp=0.8),
    "modulated_conv2d": modulated(1, clamp=0.8),
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("contract", CONTRACTS)
def test_contract(contract, name):
    check(CONTRACTS[contract], name)


def bare(up=1, down=1):
    """The convolution inside conv2d, without the FIR."""
    options = {"stride": 2} if max(up, down) == 2 else {"padding": 1}

    def op(x, weight):
        return convolution(x, weight, geometry_of(weight, up, down))

    def op_torch(x, weight):
        weight = weight.to(x.dtype)
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2) if up == 2 else F.conv2d(x, weight, **options)

    def make(n, c, h, w):
        return normal((n, c, h * down + down - 1, w * down + down - 1), (c + 1, c, 3, 3))

    return case(f"bare {up} {down}", op, op_torch, make, "few")


FORMS = {
    "conv2d": bare(),
    "conv2d-up": bare(up=2),
    "conv2d-down": bare(down=2),
    "conv2d_bias_act": layer(clamp=1.5, sizes="few"),
    "modulated_conv2d": modulated(clamp=1.5, sizes="few"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_kernel(form):
    """Nine taps: values, both derivatives and precision in every dtype, by the contract's own checks."""
    check(FORMS[form], "launches", "bounds", "values", "gradients", "second", "precision")


def same(one, *size, order=2):
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in one.tensors(size)]
    truth, fast, watch = truth_and_op(one, tensors, order)
    assert not watch.outside
    assert_equal(truth, fast, f"{size}")


OPS = {
    "conv2d-1x1-up": conv2d(1, up=2),
    "conv2d-1x1-down": conv2d(1, down=2, weight_gain=0.5),
    "conv2d-5x5": conv2d(5),
    "conv2d-up": conv2d(3, up=2, weight_gain=0.5),
    "conv2d-down": conv2d(3, down=2),
    "conv2d_bias_act-down": layer(down=2, clamp=1.5),
    "conv2d_bias_act-down-residual": layer(down=2, residual=True, gain=0.7, clamp=1.5, weight_gain=0.5),
    "modulated_conv2d-up": modulated(up=2, clamp=1.5),
}


@pytest.mark.parametrize("op", OPS)
def test_every_mode_of_the_ops(op):
    same(OPS[op], 1, 3, 2, 3)


@pytest.mark.parametrize(
    "options", [{"act": "relu"}, {"act": "linear", "clamp": 0.5}, {"act": "swish"}, {"gain": -1.0}]
)
def test_activations_with_and_without_a_tail_in_the_epilogue(options):
    same(modulated(1, **options), 2, 3, 1, 2)


@pytest.mark.parametrize("options", [{"noise": False}, {"bias": False}, {"demodulate": False}])
def test_terms_that_are_absent(options):
    same(modulated(1, clamp=0.8, **options), 2, 3, 1, 2)


def test_one_noise_for_all_samples():
    """A constant noise, as sampling may have it."""
    x, w, s, noise, strength = normal((2, 3, 2, 3), (4, 3, 1, 1), (2, 3), (1, 1, 2, 3), (1,))
    options = {"noise": noise, "strength": strength, "clamp": 0.8}
    with kernels.use_backend("triton"):
        y = kernels.modulated_conv2d(x, w, s, **options)
    torch.testing.assert_close(y, kernels.modulated_conv2d_torch(x, w, s, **options), rtol=1e-10, atol=1e-10)


def test_the_style_of_a_strided_convolution():
    """Its gradient is summed over the four phases of the transpose."""
    tensors = [t.requires_grad_() for t in normal((2, 3, 5, 7), (4, 3, 3, 3), (2, 3))]
    found = []
    for backend in ("torch", "triton"):
        with kernels.use_backend(backend):
            x, w, style = tensors
            y = convolution(x, w, geometry_of(w, 1, 2), style)
            found.append(torch.autograd.grad(y, tensors, torch.ones_like(y)))
    for truth, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-10, atol=1e-10)


PROGRAMS = [conv2d(3), conv2d(3, up=2), conv2d(3, down=2), modulated(), layer(1, residual=True, gain=0.7)]


@pytest.mark.parametrize("one", PROGRAMS, ids=lambda one: one.name)
def test_more_than_one_program_along_every_axis(one, monkeypatch):
    """Tiles of 16 pixels, 16 outputs and 16 inputs: 2 samples, several tiles and blocks, 2 steps of channels."""
    monkeypatch.setattr(conv_table, "default_tile", lambda *_: conv_table.Tile(16, 16, 16, 4, 2))
    same(one, 2, 17, 5, 3, order=1)


def test_a_third_derivative_of_the_convolution_is_right():
    same(conv2d(3), 1, 2, 1, 2, order=3)


@pytest.mark.parametrize("up", [1, 2])
def test_modulation_equals_weights_per_sample(up):
    """A grouped convolution with one weight per sample, as StyleGAN2 writes it; up: of what the FIR then filters."""
    x, w, s = normal((2, 3, 3, 2), (4, 3, 3, 3), (2, 3))
    own = w[None] * s[:, None, :, None, None]
    own = own * (own.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    grouped = x.reshape(1, 6, 3, 2)
    if up == 2:
        y = F.conv_transpose2d(grouped, own.transpose(1, 2).reshape(6, 4, 3, 3), stride=2, groups=2)
        truth = kernels.upfirdn2d_torch(y.reshape(2, 4, *y.shape[2:]), TAPS, padding=1, gain=4)
    else:
        truth = F.conv2d(grouped, own.reshape(8, 3, 3, 3), padding=1, groups=2).reshape(2, 4, 3, 2)
    with kernels.use_backend("triton"):
        y = kernels.modulated_conv2d(x, w, s, up=up, f=TAPS, act="linear")
    torch.testing.assert_close(y, truth, rtol=1e-10, atol=1e-10)


def test_fp16_modulation_does_not_overflow():
    """Style and weight far beyond fp16: demodulation makes them harmless, as both are normalised first."""
    x, w, s = torch.randn(1, 64, 2, 2), torch.randn(8, 64, 3, 3) * 1e5, torch.randn(1, 64) * 1e6
    truth = kernels.modulated_conv2d_torch(x.double(), w.double(), s.double())
    with kernels.use_backend("triton"):
        y = kernels.modulated_conv2d(x.half(), w, s)
    assert (y.double() - truth).abs().max() < 0.01 * truth.abs().max()
