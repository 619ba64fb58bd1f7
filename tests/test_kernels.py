"""Every public op against its definition in fp64, its first and second gradients, its precision and its refusals.

A dtype's tolerance is twice the error that the definition makes in that dtype.
"""

import warnings

import pytest
import torch
from op_inputs import SKEW, TAPS, _one_thread, normal  # noqa: F401  (a fixture)
from torch.autograd import gradcheck, gradgradcheck

from hsrgan import kernels
from hsrgan.kernels.demodulation import demodulation, normalize_for_half

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def in_format(tensors, memory_format):
    return [t.contiguous(memory_format=memory_format) if t.ndim == 4 else t for t in tensors]


def bias_act_case(n, c, h, w, **options):
    names = ("x", "bias", "demod", "noise", "strength", "next_style", "residual")
    noise = (n, 1, h, w)
    shapes = ((n, c, h, w), (c,), (n, c), noise, (1,), (n, c), (n, c, h, w))
    tensors = [normal(*shape) for shape in shapes]
    return "bias_act", tensors, lambda op: lambda *t: op(**dict(zip(names, t, strict=True)), **options)


def upfirdn2d_case(n, c, h, w, f, **options):
    return "upfirdn2d", [normal(n, c, h, w)], lambda op: lambda x: op(x, f, **options)


def conv2d_case(n, c, h, w, k, **options):
    return "conv2d", [normal(n, c, h, w), normal(c + 1, c, k, k)], lambda op: lambda x, w: op(x, w, f=TAPS, **options)


def modulated_case(n, c, h, w, up, **options):
    shapes = ((n, c, h, w), (c + 1, c, 3, 3), (n, c), (n, 1, up * h, up * w), (1,), (c + 1,))
    return (
        "modulated_conv2d",
        [normal(*shape) for shape in shapes],
        lambda op: lambda x, w, s, noise, strength, bias: op(
            x, w, s, up=up, f=TAPS, noise=noise, strength=strength, bias=bias, **options
        ),
    )


def to_rgb_case(n, c, h, w, scale, **options):
    shapes = ((n, c, h, w), (3, c, 1, 1), (n, c), (3,), (n, 3, h // scale, w // scale))
    return (
        "to_rgb",
        [normal(*shape) for shape in shapes],
        lambda op: lambda x, w, s, bias, image: op(x, w, s, bias, image=image, f=TAPS, **options),
    )


def fold_case(n, c, h, w, **options):
    shapes = ((n, c, h, w), (3, c, 1, 1), (n, c), (c,), (3,), (n, c), (n, 1, h, w), (1,), (n, 3, h, w), (n, c))
    names = ("x", "weight", "style", "bias", "rgb_bias", "demod", "noise", "strength", "image", "next_style")

    def call(op):
        return lambda *t: torch.cat(op(**dict(zip(names, t, strict=True)), f=TAPS, **options), 1)

    return "bias_act_to_rgb", [normal(*shape) for shape in shapes], call


def resample_case(name, n, c, h, w):
    return name, [normal(n, c, h, w)], lambda op: lambda x: op(x, TAPS, gain=1.5)


def branch_case(n, c, h, w):
    def call(op):
        def both(x):
            half, x = op(x, TAPS)
            return half + torch.nn.functional.avg_pool2d(x * x, 2)

        return both

    return "downsample2d_branch", [normal(n, c, h, w)], call


ACTS = ("lrelu", "relu", "linear", "swish", "tanh", "sigmoid")
CASES = {
    **{f"bias_act-{act}": lambda n, h, w, act=act: bias_act_case(n, 3, h, w, act=act) for act in ACTS},
    "bias_act-clamped": lambda n, h, w: bias_act_case(n, 3, h, w, clamp=0.7, gain=0.9, alpha=0.3),
    "bias_act-linear-clamped": lambda n, h, w: bias_act_case(n, 3, h, w, act="linear", clamp=0.7),
    "bias_act-negative-gain": lambda n, h, w: bias_act_case(n, 3, h, w, gain=-0.5),
    "upfirdn2d-blur": lambda n, h, w: upfirdn2d_case(n, 3, h, w, TAPS, padding=2),
    "upfirdn2d-up": lambda n, h, w: upfirdn2d_case(n, 3, h, w, SKEW, up=2, padding=(2, 1, 0, 3), gain=4),
    "upfirdn2d-down": lambda n, h, w: upfirdn2d_case(n, 3, h, w, SKEW, down=2, padding=(1, 2, -1, 3), flip_filter=True),
    "upfirdn2d-both": lambda n, h, w: upfirdn2d_case(n, 3, h, w, SKEW, up=(2, 3), down=(3, 2), padding=2),
    "upfirdn2d-rest": lambda n, h, w: upfirdn2d_case(n, 3, h, w, SKEW[:, :2], up=(2, 1), down=4, padding=(2, 3, 3, -2)),
    "upfirdn2d-crop": lambda n, h, w: upfirdn2d_case(n, 3, h, w, None, up=(1, 2), padding=(-1, 0, 0, -1)),
    "upsample2d": lambda n, h, w: resample_case("upsample2d", n, 3, h, w),
    "downsample2d": lambda n, h, w: resample_case("downsample2d", n, 3, h, w),
    "downsample2d_branch": lambda n, h, w: branch_case(n, 3, h, w),
    **{f"conv2d-{k}x{k}": lambda n, h, w, k=k: conv2d_case(n, 3, h, w, k) for k in (1, 3, 5)},
    **{f"conv2d-{k}x{k}-up": lambda n, h, w, k=k: conv2d_case(n, 3, h, w, k, up=2) for k in (1, 3)},
    **{f"conv2d-{k}x{k}-down": lambda n, h, w, k=k: conv2d_case(n, 3, h, w, k, down=2) for k in (1, 3)},
    "modulated_conv2d": lambda n, h, w: modulated_case(n, 3, h, w, 1),
    "modulated_conv2d-up": lambda n, h, w: modulated_case(n, 3, h, w, 2, clamp=1.5),
    "modulated_conv2d-plain": lambda n, h, w: modulated_case(n, 3, h, w, 1, demodulate=False, act="linear"),
    "to_rgb": lambda n, h, w: to_rgb_case(n, 3, h, w, 1, clamp=2.0),
    "to_rgb-up": lambda n, h, w: to_rgb_case(n, 3, 2 * h, 2 * w, 2),
    "bias_act_to_rgb": lambda n, h, w: fold_case(n, 3, h, w, clamp=0.7, rgb_clamp=2.0),
}


@pytest.mark.parametrize("size", [(2, 6, 6), (1, 5, 7), (3, 8, 3)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_op_equals_its_definition_with_all_gradients(case, memory_format, size):
    name, tensors, call = CASES[case](*size)
    results = []
    for op in (getattr(kernels, name), getattr(kernels, f"{name}_torch")):
        inputs = [t.detach().requires_grad_() for t in in_format(tensors, FORMATS[memory_format])]
        y = call(op)(*inputs)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        results.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_op_is_differentiable_twice(case, memory_format):
    name, tensors, call = CASES[case](2, 4, 3)
    inputs = [t.detach().requires_grad_() for t in in_format(tensors, FORMATS[memory_format])]
    function = call(getattr(kernels, name))
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", ["bias_act-clamped", "upfirdn2d-up", "conv2d-3x3-down", "modulated_conv2d-up"])
def test_every_entry_of_both_derivatives(case):
    """The slow mode of gradcheck looks at each entry instead of at one random projection."""
    name, tensors, call = CASES[case](1, 3, 2)
    inputs = [t.detach().requires_grad_() for t in in_format(tensors, torch.channels_last)]
    function = call(getattr(kernels, name))
    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "case",
    ["bias_act-lrelu", "bias_act-clamped", "upfirdn2d-blur", "upsample2d", "downsample2d", "conv2d-1x1-down",
     "conv2d-3x3", "conv2d-3x3-up", "conv2d-3x3-down", "modulated_conv2d", "modulated_conv2d-up", "to_rgb-up"],
)  # fmt: skip
def test_error_is_at_most_twice_that_of_the_definition(case, dtype):
    """Root mean square over eight draws of the output and of each gradient, against fp64 on the same (rounded) inputs.

    Four fp32 roundings are free: sums are taken in another order.
    """
    errors, truths = {}, {}
    for seed in range(8):
        torch.manual_seed(seed)
        name, tensors, call = CASES[case](4, 16, 12)
        definition = getattr(kernels, f"{name}_torch")
        # x (and what is added to it) in the dtype under test; weights, styles, noise and images stay fp32 as in a model
        low = {"bias_act": (0, 6)}.get(name, (0,))
        rounded = [t.to(dtype if i in low else torch.float32) for i, t in enumerate(tensors)]
        results = {}
        for key, op, dtypes in (
            ("truth", definition, [torch.float64] * len(rounded)),
            ("own", definition, [t.dtype for t in rounded]),
            ("fast", getattr(kernels, name), [t.dtype for t in rounded]),
        ):
            inputs = [t.to(d).requires_grad_() for t, d in zip(rounded, dtypes, strict=True)]
            y = call(op)(*in_format(inputs, torch.channels_last))
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(y.dtype)
            results[key] = [y, *torch.autograd.grad((y * weights).sum(), inputs)]
        for i, truth in enumerate(results["truth"]):
            truths[i] = truths.get(i, 0) + truth.square().sum()
            for key in ("own", "fast"):
                assert results[key][i].isfinite().all()
                errors[key, i] = errors.get((key, i), 0) + (results[key][i].double() - truth).square().sum()
    free = 4 * torch.finfo(torch.float32).eps
    for i in truths:
        own, fast = (errors["own", i] / truths[i]).sqrt(), (errors["fast", i] / truths[i]).sqrt()
        assert fast <= 2 * own + free, f"output {i}: {fast:.2e} against the definition's {own:.2e}"


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_op_keeps_the_memory_format(case, memory_format):
    name, tensors, call = CASES[case](2, 6, 6)
    y = call(getattr(kernels, name))(*in_format(tensors, FORMATS[memory_format]))
    assert y.is_contiguous(memory_format=FORMATS[memory_format])


def test_gradients_come_in_the_layout_of_the_activations():
    """A loss on a flattened map sends an NCHW gradient; without care the whole backward pass would run in NCHW."""
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = kernels.bias_act(kernels.conv2d(x, torch.randn(4, 4, 3, 3)), clamp=256)
    (gradient,) = torch.autograd.grad(y.flatten(1) @ torch.randn(256, 1), x, torch.ones(2, 1))
    assert gradient.is_contiguous(memory_format=torch.channels_last)


# Backends

X = torch.randn(2, 3, 4, 4)


def test_backend_is_triton_where_it_runs_and_torch_elsewhere(monkeypatch):
    assert kernels.backend(X) == "torch"  # on the CPU
    with kernels.use_backend("torch"):
        assert kernels.backend(X) == "torch"
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), kernels.use_backend("cuda"):
        pass
    with kernels.use_backend("triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert kernels.backend(X) == "triton"
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="x is on cpu"):
            kernels.bias_act(X)


def test_a_gpu_machine_without_triton_is_told_once(monkeypatch):
    from hsrgan.kernels import launch

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(launch, "_has_triton", False)
    launch._say_what_is_missing.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [kernels.backend(OnGpu()) for _ in range(3)] == ["torch"] * 3
    assert [str(each.message) for each in told] == [
        "triton is not installed: the ops run in plain PyTorch; pip install triton"
    ]
    with pytest.raises(ValueError, match="needs the package triton"), kernels.use_backend("triton"):
        kernels.bias_act(X)


def test_bias_act_of_rows_with_noise():
    x, noise, strength = normal(3, 4).requires_grad_(), normal(3, 1), normal(1).requires_grad_()
    assert gradcheck(lambda x, s: kernels.bias_act(x, noise=noise, strength=s), (x, strength))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_clamp_that_the_dtype_cannot_hold_still_stops_gradients(dtype):
    """256·√½, the clamp of D's residual branch, lies between two values of either half precision."""
    x = torch.full((1, 1, 1, 4), 1000.0, dtype=dtype).requires_grad_()
    y = kernels.bias_act(x, act="lrelu", clamp=256 * 0.5**0.5)
    assert torch.autograd.grad(y.sum(), x)[0].abs().max() == 0


@pytest.mark.parametrize("order", [1, 2])
def test_normalisation_for_half_precision_needs_no_gradient(order):
    """Demodulation undoes it: with its maxima as constants a layer has the derivatives of one without it."""
    x, weight, style = normal(2, 5, 4, 4), normal(3, 5, 3, 3).requires_grad_(), normal(2, 5).requires_grad_()
    found = []
    for w, s, demodulate in (
        (weight, style, lambda w, s: (s.square() @ w.square().sum((2, 3)).t() + 1e-8).rsqrt()),
        (*normalize_for_half(weight, style), demodulation),
    ):
        y = kernels.conv2d_torch(x * s[:, :, None, None], w) * demodulate(w, s)[:, :, None, None]
        gradients = torch.autograd.grad(y.sin().sum(), [weight, style], create_graph=True)
        if order == 2:
            gradients = torch.autograd.grad(sum(g.square().sum() for g in gradients), [weight, style])
        found.append(gradients)
    for plain, normalised in zip(*found, strict=True):
        assert (plain - normalised).norm() <= 1e-5 * plain.norm()
