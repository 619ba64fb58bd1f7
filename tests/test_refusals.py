"""Every bad input of every op is a ValueError that names the argument; to_rgb and its fold have more of their own.

Checked before a backend is chosen, so that all backends refuse alike.
"""

import pytest
import torch

from hsrgan import kernels


def hsr_call(i, change, **options):
    """feature_match with its i-th tensor changed."""
    shapes = ((2, 3, 4, 4), (40, 3, 1, 1), (40,), (7, 40, 1, 1), (7,), (2, 7, 2, 2))
    tensors = [torch.randn(*shape) for shape in shapes]
    tensors[i] = change(tensors[i])
    return kernels.feature_match(*tensors, **options)


X, W, S = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(2, 3)
V = W[:, :, :1, :1]
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be", lambda: kernels.bias_act(torch.zeros(2, 3, 4, 4, dtype=torch.int32))),
        ("bias must have shape \\[3\\]", lambda: kernels.bias_act(X, torch.zeros(4))),
        ("noise must be floating-point", lambda: kernels.bias_act(X, noise=torch.zeros(2, 1, 4, 4, dtype=torch.int64))),
        ("demod must have shape", lambda: kernels.bias_act(X, demod=torch.zeros(2, 4))),
        ("next_style must have shape", lambda: kernels.bias_act(X, next_style=torch.zeros(3, 3))),
        ("residual must have shape", lambda: kernels.bias_act(X, residual=torch.zeros(2, 3, 4, 5))),
        ("noise must have shape", lambda: kernels.bias_act(X, noise=torch.zeros(2, 3, 4, 4))),
        ("strength needs noise", lambda: kernels.bias_act(X, strength=torch.zeros(1))),
        ("act must be one of", lambda: kernels.bias_act(X, act="gelu")),
        ("alpha is the slope", lambda: kernels.bias_act(X, act="relu", alpha=0.1)),
        ("clamp must be positive", lambda: kernels.bias_act(X, clamp=0.0)),
        ("x must be", lambda: kernels.upfirdn2d(X[0], TAPS)),
        ("f must be", lambda: kernels.upfirdn2d(X, TAPS[None, None])),
        ("up must be", lambda: kernels.upfirdn2d(X, TAPS, up=0)),
        ("padding must be", lambda: kernels.upfirdn2d(X, TAPS, padding=(1, 2, 3))),
        ("f must be", lambda: kernels.upsample2d(X, TAPS[None, None])),
        ("f must be", lambda: kernels.downsample2d(X, None)),
        ("f must be floating-point", lambda: kernels.upfirdn2d(X, torch.ones(4, dtype=torch.int32))),
        ("f must be on the device of x", lambda: kernels.upfirdn2d(X, TAPS.to("meta"))),
        ("padding .* leaves an output", lambda: kernels.upfirdn2d(X, TAPS, padding=-2)),
        ("down must be", lambda: kernels.upfirdn2d(X, TAPS, down=(1, 5))),
        ("up must be", lambda: kernels.upfirdn2d(X, TAPS, up=(1, 2, 3))),
        ("up must be", lambda: kernels.upfirdn2d(X, TAPS, up=1.5)),
        ("padding must be", lambda: kernels.upfirdn2d(X, TAPS, padding=0.5)),
        ("up must be", lambda: kernels.fir_bias_act(X, TAPS, up=5)),
        ("bias must have shape", lambda: kernels.fir_bias_act(X, TAPS, torch.zeros(4))),
        ("padding .* leaves an output", lambda: kernels.bias_act_fir(X, TAPS, padding=-2)),
        ("f must be", lambda: kernels.bias_act_fir(X, TAPS[None, None])),
        ("weight must be", lambda: kernels.conv2d(X, torch.randn(5, 4, 3, 3))),
        ("weight must be on the device of x", lambda: kernels.conv2d(X, W.to("meta"))),
        ("f must be on the device of x", lambda: kernels.conv2d(X, W, down=2, f=TAPS.to("meta"))),
        ("f, a 1-d or 2-d filter", lambda: kernels.conv2d(X, W, up=2, f=TAPS[None, None])),
        ("style must be on the device of x", lambda: kernels.modulated_conv2d(X, W, S.to("meta"))),
        ("style must have shape", lambda: kernels.modulated_convolution(X, W, torch.zeros(2, 4))),
        ("noise must have shape", lambda: kernels.modulated_conv2d(X, W, S, noise=torch.zeros(2, 1, 8, 8))),
        ("weight must be", lambda: kernels.conv2d(X, torch.randn(5, 3, 2, 2))),
        ("up and down", lambda: kernels.conv2d(X, W, up=2, down=2, f=TAPS)),
        ("takes 1×1 and 3×3", lambda: kernels.conv2d(X, torch.randn(5, 3, 5, 5), up=2, f=TAPS)),
        ("f, a 1-d or 2-d filter, is needed", lambda: kernels.conv2d(X, W, down=2)),
        ("style must have shape", lambda: kernels.modulated_conv2d(X, W, torch.zeros(2, 4))),
        ("weight must have shape", lambda: kernels.to_rgb(X, W, S)),
        ("weight must have shape \\[outputs, 3, 1, 1\\]", lambda: kernels.to_rgb(X, torch.tensor(1.0), S)),
        ("image must be", lambda: kernels.to_rgb(X, V, S, image=torch.zeros(2, 5, 3, 3))),
        ("f is needed", lambda: kernels.to_rgb(X, V, S, image=torch.zeros(2, 5, 2, 2))),
        ("image must be .* pixels", lambda: kernels.to_rgb(X[..., 1:], V, S, image=torch.zeros(2, 5, 2, 1), f=TAPS)),
        ("x must be", lambda: kernels.bias_act_to_rgb(X[0], V, S)),
        ("target must be on the device of x", lambda: hsr_call(5, lambda t: t.to("meta"))),
        ("w1 must be floating-point", lambda: hsr_call(1, lambda t: t.long())),
        ("x must be", lambda: hsr_call(0, lambda t: t[0])),
        ("target must be \\[N", lambda: hsr_call(5, lambda t: t[0])),
        ("target must have pixels", lambda: hsr_call(5, lambda t: t[..., :0])),
        ("x must have pixels", lambda: hsr_call(0, lambda t: t[..., :0])),
        ("w1 must have shape", lambda: hsr_call(1, lambda t: t[0, 0, 0, 0])),
        ("w2 must have shape", lambda: hsr_call(3, lambda t: W)),
        ("distance must be", lambda: hsr_call(0, lambda t: t, distance="l1")),
    ],
)
def test_arguments_that_do_not_fit_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()
