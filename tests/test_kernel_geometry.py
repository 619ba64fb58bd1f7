"""Definitions against literal constructions of the resampling and the modulation; what autograd asks."""

import sys

import pytest
import torch
import torch.nn.functional as F
from op_inputs import SKEW, TAPS, _one_thread, normal  # noqa: F401  (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

from hsrgan import kernels
from hsrgan.kernels import launch

convolution_module, demodulation_module = (
    sys.modules[f"hsrgan.kernels.{name}"] for name in ("convolution", "demodulation")
)


def literal_fir(x, f, pads, gain):
    """Pad by (before, after) on both axes, then add up shifted copies. f is symmetric."""
    x = F.pad(x, (*pads, *pads))
    h, w = x.shape[2] - 3, x.shape[3] - 3
    kernel = torch.outer(f, f) * gain
    return sum(kernel[a, b] * x[:, :, a : a + h, b : b + w] for a in range(4) for b in range(4))


def zeros_between(x):
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    y[:, :, ::2, ::2] = x
    return y


def literal_conv2d(x, w, up, down):
    if w.shape[-1] == 1:
        if up == 2:
            return literal_fir(zeros_between(F.conv2d(x, w)), TAPS, (2, 1), 4)
        return F.conv2d(literal_fir(x, TAPS, (1, 1), 1)[:, :, ::2, ::2], w)
    if up == 2:
        return literal_fir(F.conv_transpose2d(x, w.transpose(0, 1), stride=2), TAPS, (1, 1), 4)
    return F.conv2d(literal_fir(x, TAPS, (2, 2), 1), w, stride=2)


@pytest.mark.parametrize("op", [kernels.conv2d, kernels.conv2d_torch], ids=["op", "definition"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("f", [TAPS, torch.outer(TAPS, TAPS)], ids=["taps", "square"])
def test_resampling_geometry_of_convolutions(op, k, up, down, f):
    x, w = normal(2, 3, 8, 6), normal(5, 3, k, k)
    y = op(x, w, up=up, down=down, f=f)
    assert y.shape[2:] == (8 * up // down, 6 * up // down)
    torch.testing.assert_close(y, literal_conv2d(x, w, up, down), rtol=1e-12, atol=1e-12)


def test_resampling_geometry_of_images():
    x = normal(2, 3, 8, 6)
    torch.testing.assert_close(kernels.upsample2d(x, TAPS), literal_fir(zeros_between(x), TAPS, (2, 1), 4))
    torch.testing.assert_close(kernels.downsample2d(x, TAPS), literal_fir(x, TAPS, (1, 1), 1)[:, :, ::2, ::2])
    flat = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(kernels.upsample2d(flat, TAPS)[..., 2:-2, 2:-2], flat.new_ones(()))  # brightness is kept


def test_upfirdn2d_is_a_convolution_unless_flipped():
    """An impulse shows the filter as it is, or mirrored."""
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1
    convolved = kernels.upfirdn2d(x, SKEW, padding=(2, 2, 1, 1))[0, 0]
    torch.testing.assert_close(convolved[2:4, 2:5], SKEW)
    correlated = kernels.upfirdn2d(x, SKEW, padding=(2, 2, 1, 1), flip_filter=True)[0, 0]
    torch.testing.assert_close(correlated[2:4, 2:5], SKEW.flip(0, 1))


@pytest.mark.parametrize("up", [1, 2])
def test_modulation_equals_weights_per_sample(up):
    x, w, s = normal(3, 4, 5, 5), normal(6, 4, 3, 3), normal(3, 4)
    rows = []
    for i in range(3):
        own = w * s[i][None, :, None, None]
        own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        rows.append(literal_conv2d(x[i : i + 1], own, 2, 1) if up == 2 else F.conv2d(x[i : i + 1], own, padding=1))
    y = kernels.modulated_conv2d(x, w, s, up=up, f=TAPS, act="linear")
    torch.testing.assert_close(y, torch.cat(rows), rtol=1e-10, atol=1e-10)


def test_fp16_modulation_does_not_overflow():
    """Style and weight far beyond fp16's products: demodulation makes them harmless, as both are normalised first."""
    x, w, s = torch.randn(2, 64, 4, 4), torch.randn(8, 64, 3, 3) * 1e3, torch.randn(2, 64) * 1e4
    truth = kernels.modulated_conv2d_torch(x.double(), w.double(), s.double())
    y = kernels.modulated_conv2d(x.half(), w, s)
    assert (y.double() - truth).abs().max() < 0.01 * truth.abs().max()


def test_to_rgb_accumulates_the_image_in_fp32():
    x, w, s = torch.randn(2, 8, 4, 4).bfloat16(), torch.randn(3, 8, 1, 1), torch.randn(2, 8)
    image = torch.full((2, 3, 4, 4), 1000.001)
    y = kernels.to_rgb(x, w, s, image=image)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y - image, kernels.to_rgb(x, w, s), rtol=0, atol=1e-4)


def network(x, w, style):
    """Two layers of each sort, so that gradients pass through convolutions that have weights."""
    x = kernels.modulated_conv2d(x, w[0] * 1.0, style, up=2, f=TAPS)
    x = kernels.modulated_conv2d(x, w[0], style)
    x = kernels.bias_act(kernels.conv2d(x, w[1] * 1.0), clamp=256)
    return kernels.bias_act(kernels.conv2d(x, w[1], down=2, f=TAPS), clamp=256)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_library_is_told_to_add_up_in_a_fixed_order_and_what_tf32_may(tf32):
    """cuDNN's flags, inside every convolution and gradient of ours, and as they were outside."""
    seen, cudnn = [], torch.backends.cudnn

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
                seen.append((func._opname, cudnn.deterministic, cudnn.allow_tf32))
            return func(*args, **(kwargs or {}))

    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    before = launch.tf32_allowed()
    launch.allow_tf32(tf32)
    try:
        with Watching(), cudnn.flags(enabled=True, allow_tf32=not tf32):
            y = kernels.conv2d(x, w)
            torch.autograd.grad(y, [x, w], torch.ones_like(y))
            assert cudnn.deterministic is False and cudnn.allow_tf32 is not tf32
    finally:
        launch.allow_tf32(before)
    assert sorted(seen) == [("convolution", True, tf32)] * 2 + [("convolution_backward", True, tf32)]


def results_of(function: type, method: str, monkeypatch) -> list:
    """What a method of an autograd Function returns, call by call."""
    found, original = [], getattr(function, method)

    def watched(ctx, *args):
        found.append(original(ctx, *args))
        return found[-1]

    monkeypatch.setattr(function, method, staticmethod(watched))
    return found


@pytest.mark.parametrize("wrt", ["images", "styles"])
def test_penalties_compute_no_weight_gradient_that_is_thrown_away(wrt, monkeypatch):
    """R1 (images) and path length (styles): none in the inner derivative, and after it those of the penalty."""
    calls = results_of(convolution_module.WeightGradient, "forward", monkeypatch)
    demodulated = results_of(demodulation_module._Demodulation, "backward", monkeypatch)
    x, style = normal(2, 3, 4, 4).requires_grad_(), normal(2, 3).requires_grad_()
    weights = [normal(3, 3, 3, 3).requires_grad_() for _ in range(2)]
    y = network(x, weights, style)
    (inner,) = torch.autograd.grad(y.sum(), x if wrt == "images" else style, create_graph=True)
    assert len(calls) == 0 and all(weight is None for weight, _ in demodulated)
    assert bool(demodulated) is (wrt == "styles")
    inner.square().sum().backward()
    assert len(calls) >= 4
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights)
    calls.clear()
    network(x, weights, style).sum().backward()
    assert len(calls) == 4  # one a convolution: an ordinary backward pass wants them all


def test_an_image_that_needs_no_gradient_costs_none(monkeypatch):
    """D's first layer in its main phase, of reals and of fakes: the gradient of the weight alone."""
    calls = results_of(convolution_module.Convolution, "forward", monkeypatch)
    x, weight = normal(2, 3, 4, 4), normal(3, 3, 3, 3).requires_grad_()
    kernels.conv2d(x, weight).sum().backward()
    assert len(calls) == 1 and weight.grad.abs().sum() > 0
    kernels.conv2d(x.requires_grad_(), weight).sum().backward()
    assert len(calls) == 3


def test_a_clamp_is_rounded_on_the_host_whatever_the_default_device():
    """A GPU as PyTorch's default device would else be waited for in every layer, and a recording of it broken off."""
    with torch.device("meta"):
        x = torch.empty(1, 2, 3, 4)
        kernels.bias_act(x, clamp=0.765625)
        with launch.record():
            kernels.bias_act(x, clamp=0.765625)


def test_the_library_is_given_both_in_one_memory_format():
    """Weights or a gradient of another one it would reorder in every call."""
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func == torch.ops.aten.convolution.default:
                seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in args[:2]])
            return func(*args, **(kwargs or {}))

    formats = torch.channels_last, torch.contiguous_format
    for own, other in (formats, formats[::-1]):
        x = torch.randn(2, 3, 5, 5).to(memory_format=own).requires_grad_()
        with Watching():
            y = kernels.conv2d(x, torch.randn(4, 3, 3, 3))
            torch.autograd.grad(y, x, torch.ones(y.shape).to(memory_format=other))
    assert seen == [[True, True]] * 2 + [[False, False]] * 2


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("sampling", [{}, {"up": 2}, {"down": 2}], ids=str)
def test_weight_gain_is_a_weight_that_was_scaled(sampling, k, memory_format):
    """On the library: values, and both derivatives, as an R1 penalty takes them."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    w = torch.randn(4, 3, k, k, dtype=torch.float64, requires_grad=True)
    found = []
    for y in (kernels.conv2d(x, w, f=TAPS.double(), weight_gain=0.25, **sampling),
              kernels.conv2d(x, w * 0.25, f=TAPS.double(), **sampling)):  # fmt: skip
        gx, gw = torch.autograd.grad(y.square().sum(), [x, w], create_graph=True)
        found.append([y, gx, gw, *torch.autograd.grad(gx.square().sum() + gw.square().sum(), [x, w])])
    for one, true in zip(*found, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-10, atol=1e-10)
