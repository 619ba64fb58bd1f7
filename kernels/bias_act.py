"""The pointwise tail of every layer.

    y = clamp(act(x·demod[n,c] + noise[n,1,h,w]·strength + bias[c])·gain, ±clamp)·next_style[n,c] + residual

StyleGAN2 (arXiv 1912.04958), order of operations of one synthesis layer: convolution, demodulation, noise, bias, leaky
relu, gain, clamp.
"""

import torch
import torch.nn.functional as F
from hsrgan.kernels import launch
from torch import Tensor

SQRT2 = 2**0.5
DEFAULT_GAIN = {"lrelu": SQRT2, "relu": SQRT2, "swish": SQRT2, "linear": 1.0, "tanh": 1.0, "sigmoid": 1.0}


def bias_act_torch(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    next_style: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `bias_act`: one PyTorch call for each term of the equation, all in the dtype of x."""
    channels = (1, -1) + (1,) * (x.ndim - 2)
    pairs = x.shape[:2] + (1,) * (x.ndim - 2)
    if demod is not None:
        x = x * demod.to(x.dtype).reshape(pairs)
    if noise is not None:
        x = x + (noise if strength is None else noise * strength).to(x.dtype)
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(channels)
    if act == "lrelu":
        x = F.leaky_relu(x, 0.2 if alpha is None else alpha)
    elif act == "relu":
        x = F.relu(x)
    elif act == "swish":
        x = x * torch.sigmoid(x)
    elif act == "tanh":
        x = torch.tanh(x)
    elif act == "sigmoid":
        x = torch.sigmoid(x)
    x = x * (DEFAULT_GAIN[act] if gain is None else gain)
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    if next_style is not None:
        x = x * next_style.to(x.dtype).reshape(pairs)
    if residual is not None:
        x = x + residual
    return x


def check_bias_act(
    x: Tensor,
    bias: Tensor | None,
    demod: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    act: str,
    alpha: float | None,
    clamp: float | None,
    next_style: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise ValueError for arguments that `bias_act` does not take."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [N, C, ...]; got {x.dtype} of shape {list(x.shape)}")
    launch.check_shape(bias, "bias", x.shape[1])
    launch.check_shape(demod, "demod", *x.shape[:2])
    launch.check_shape(next_style, "next_style", *x.shape[:2])
    launch.check_shape(residual, "residual", *x.shape)
    if noise is not None and noise.shape not in ((x.shape[0], 1, *x.shape[2:]), (1, 1, *x.shape[2:])):
        raise ValueError(f"noise must have shape [N or 1, 1, ...] of x {list(x.shape)}; got {list(noise.shape)}")
    launch.check(strength is None or noise is not None, "strength needs noise")
    launch.check(strength is None or strength.numel() == 1, "strength must hold one value")
    launch.check(act in DEFAULT_GAIN, f"act must be one of {', '.join(DEFAULT_GAIN)}; got {act!r}")
    launch.check(alpha is None or act == "lrelu", f"alpha is the slope of lrelu; act is {act!r}")
    launch.check(alpha is None or 0 <= alpha <= 1, f"alpha must lie in 0 … 1; got {alpha}")
    launch.check(clamp is None or clamp > 0, f"clamp must be positive; got {clamp}")


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    next_style: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """clamp(act(x·demod + noise·strength + bias)·gain, ±clamp)·next_style + residual; dtype and memory format of x.

    x [N, C, ...]; bias [C]; demod, next_style [N, C]; noise [N or 1, 1, ...]; strength one value; residual like x.
    act: lrelu (slope alpha, default 0.2), relu, swish, linear, tanh, sigmoid; gain: √2 for the first three, else 1.
    Differentiable any number of times in every tensor argument. ValueError names an argument that does not fit.
    """
    check_bias_act(x, bias, demod, noise, strength, act, alpha, clamp, next_style, residual)
    launch.backend()
    return bias_act_torch(
        x, bias, demod=demod, noise=noise, strength=strength, act=act, alpha=alpha, gain=gain, clamp=clamp,
        next_style=next_style, residual=residual,
    )  # fmt: skip
