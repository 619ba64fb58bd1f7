"""The pointwise tail of every layer.

    y = clamp(act(x·demod[n,c] + noise[n,1,h,w]·strength + bias[c])·gain, ±clamp)·next_style[n,c] + residual

StyleGAN2 (arXiv 1912.04958), order of operations of one synthesis layer: convolution, demodulation, noise, bias, leaky
relu, gain, clamp.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrgan.kernels import launch

SQRT2 = 2**0.5
DEFAULT_GAIN = {"lrelu": SQRT2, "relu": SQRT2, "swish": SQRT2, "linear": 1.0, "tanh": 1.0, "sigmoid": 1.0}
SLOPE = {"lrelu": 0.2, "relu": 0.0, "linear": 1.0}  # of the negative side: the piecewise linear activations


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
    if demod is not None:
        x = x * pairs(demod, x)
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
        x = x * pairs(next_style, x)
    if residual is not None:
        x = x + residual
    return x


class _PiecewiseLinear(torch.autograd.Function):
    """clamp(act(x·demod + noise·strength + bias)·gain, ±clamp) for lrelu, relu and linear.

    These activations are homogeneous (act(p)·gain = act(p·gain) for gain > 0), so that the gain rides on demod,
    strength and bias; and the sign and size of y tell all that a gradient needs. Only the first pass allocates.
    """

    @staticmethod
    def forward(ctx, x, bias, demod, noise, strength, slope, gain, clamp):
        shift = None if bias is None else (bias * gain).to(x.dtype).reshape((1, -1) + (1,) * (x.ndim - 2))
        if demod is not None:
            scale = pairs(demod * gain, x)
            y = x * scale if shift is None else torch.addcmul(shift, x, scale)
        else:
            y = x * gain if shift is None else torch.add(shift, x, alpha=gain)
        if noise is not None:
            y += (noise * (gain if strength is None else strength * gain)).to(x.dtype)
        if slope != 1:
            F.leaky_relu_(y, slope)
        if clamp is not None:
            y.clamp_(-clamp, clamp)
        ctx.save_for_backward(None if demod is None else x, bias, demod, noise, strength, y)
        ctx.slope, ctx.gain, ctx.clamp = slope, gain, clamp
        return y

    @staticmethod
    def backward(ctx, gy):
        x, bias, demod, noise, strength, y = ctx.saved_tensors
        gain, images = ctx.gain, tuple(range(2, gy.ndim))
        want_x, want_bias, want_demod, want_noise, want_strength, *_ = launch.wanted(ctx)
        linear = ctx.slope == 1 and ctx.clamp is None
        g = gy if linear else _ActivationGradient.apply(gy, y, ctx.slope, ctx.clamp)
        gx = gbias = gdemod = gnoise = gstrength = None
        if want_strength:
            # with 1 as a second noise, one product gives the gradients of bias and strength
            maps = noise.reshape(len(noise), 1, -1).to(g.dtype).expand(len(g), -1, -1)
            sums = torch.cat([torch.ones_like(maps), maps], dim=1) @ g.reshape(*g.shape[:2], -1).transpose(1, 2)
            total, weighted = sums.sum(0) * gain
            gstrength = weighted.sum().to(strength.dtype).reshape(strength.shape)
        elif want_bias:
            total = g.sum((0, *images)) * gain
        if want_bias:
            gbias = total.to(bias.dtype)
        if want_noise:
            gnoise = g.sum(1, keepdim=True).sum_to_size(noise.shape) * (gain if strength is None else strength * gain)
            gnoise = gnoise.to(noise.dtype)
        if want_demod:
            gdemod = ((g * x).sum(images) * gain).to(demod.dtype)
        if want_x:
            scale = gain if demod is None else pairs(demod * gain, g)
            gx = g * scale if linear or torch.is_grad_enabled() else g.mul_(scale)
        return gx, gbias, gdemod, gnoise, gstrength, None, None, None


class _ActivationGradient(torch.autograd.Function):
    """gy, y → gy·(1 or slope by the sign of y)·(0 where y is clamped): linear in gy, constant in y but for jumps."""

    @staticmethod
    def forward(ctx, gy, y, slope, clamp):
        ctx.save_for_backward(y)
        ctx.slope, ctx.clamp = slope, clamp
        g = torch.empty_like(y)  # in the layout of y, whatever layout gy came in
        if clamp is not None:
            gy = torch.ops.aten.hardtanh_backward.grad_input(gy, y, -clamp, clamp, grad_input=g)
        return gy if slope == 1 else torch.ops.aten.leaky_relu_backward.grad_input(gy, y, slope, True, grad_input=g)

    @staticmethod
    def backward(ctx, gg):
        (y,) = ctx.saved_tensors
        return _ActivationGradient.apply(gg, y, ctx.slope, ctx.clamp), None, None, None


def pairs(t: Tensor, x: Tensor) -> Tensor:
    """t [N, C] → [N, C, 1, …] in the dtype of x, to multiply x with."""
    return t.to(x.dtype).reshape(t.shape + (1,) * (x.ndim - 2))


class Tail(NamedTuple):
    """The arguments of `bias_act` behind x, as one, for the ops that it is a part of."""

    bias: Tensor | None = None
    demod: Tensor | None = None
    noise: Tensor | None = None
    strength: Tensor | None = None
    act: str = "lrelu"
    alpha: float | None = None
    gain: float | None = None
    clamp: float | None = None
    next_style: Tensor | None = None
    residual: Tensor | None = None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """bias, demod, noise, strength: what act is applied to, beside x."""
        return self[:4]

    @property
    def slope(self) -> float:
        """Of the negative side; 0 for a smooth act."""
        return SLOPE.get(self.act, 0.0) if self.alpha is None else self.alpha

    @property
    def factor(self) -> float:
        """The gain, or the act's own where none is given."""
        return DEFAULT_GAIN[self.act] if self.gain is None else self.gain

    @property
    def told_by_y(self) -> bool:
        """Do the sign and size of y tell its gradient by x? Those of a piecewise linear act and a positive gain do."""
        return self.act in SLOPE and self.factor > 0

    def check(self, x: Tensor) -> None:
        """Raise ValueError for what `bias_act` of x does not take."""
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(f"x must be a floating-point tensor [N, C, ...]; got {x.dtype} of shape {list(x.shape)}")
        noise, strength, act, alpha, residual = self.noise, self.strength, self.act, self.alpha, self.residual
        named = ("bias", "demod", "noise", "strength", "next_style", "residual")
        launch.check_devices(x, **{name: getattr(self, name) for name in named})
        launch.check(residual is None or residual.dtype == x.dtype, f"residual must have the dtype of x, {x.dtype}")
        launch.check_shape(self.bias, "bias", x.shape[1])
        launch.check_shape(self.demod, "demod", *x.shape[:2])
        launch.check_shape(self.next_style, "next_style", *x.shape[:2])
        launch.check_shape(residual, "residual", *x.shape)
        if noise is not None and noise.shape not in ((x.shape[0], 1, *x.shape[2:]), (1, 1, *x.shape[2:])):
            raise ValueError(f"noise must have shape [N or 1, 1, ...] of x {list(x.shape)}; got {list(noise.shape)}")
        launch.check(strength is None or noise is not None, "strength needs noise")
        launch.check(strength is None or strength.numel() == 1, "strength must hold one value")
        launch.check(act in DEFAULT_GAIN, f"act must be one of {', '.join(DEFAULT_GAIN)}; got {act!r}")
        launch.check(alpha is None or act == "lrelu", f"alpha is the slope of lrelu; act is {act!r}")
        launch.check(alpha is None or 0 <= alpha <= 1, f"alpha must lie in 0 … 1; got {alpha}")
        launch.check(self.clamp is None or self.clamp > 0, f"clamp must be positive; got {self.clamp}")


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
    Differentiable in every tensor argument, twice in Triton (a third derivative raises RuntimeError), any number of
    times in PyTorch. ValueError names an argument that does not fit.
    """
    tail = Tail(bias, demod, noise, strength, act, alpha, gain, clamp, next_style, residual)
    tail.check(x)
    if launch.backend(x) == "triton":
        from hsrgan.kernels.bias_act_triton import bias_act_triton

        return bias_act_triton(x, tail)
    if not tail.told_by_y:
        return bias_act_torch(x, **tail._asdict())
    if clamp is not None:
        # to a value that the dtype holds: in bfloat16 0.7 becomes 0.6992, which a comparison with 0.7 calls unclamped
        clamp = torch.tensor(clamp, dtype=x.dtype, device="cpu").item()
    y = _PiecewiseLinear.apply(x, bias, demod, noise, strength, tail.slope, tail.factor, clamp)
    y = y if next_style is None else y * pairs(next_style, y)
    return y if residual is None else y + residual
