"""The pointwise chain of bias_act as Triton device functions, for every kernel that carries it.

    p = x·demod + noise·strength + bias        y = clamp(act(p)·gain, ±clamp)

All functions take blocks of one floating-point type (fp32, or fp64 for fp64 tensors: cast loads first) and return
blocks of it. The constants come from `chain_of`:

    ACT    "lrelu" (piecewise linear: relu and linear are slopes 0 and 1), "swish", "tanh", "sigmoid"
    SLOPE  of the negative side of lrelu
    GAIN   any sign
    CLAMP  None, or a positive value that the activations' dtype can hold

A gradient passes where |act(p)·gain| < clamp and takes the negative side at p = 0.
"""

import functools

import torch
import triton
import triton.language as tl

from hsrgan.kernels.bias_act import Tail

SMOOTH = ("swish", "tanh", "sigmoid")


def chain_of(tail: Tail, dtype: torch.dtype) -> dict[str, object]:
    """The constexprs ACT, SLOPE, GAIN, CLAMP. dtype: of the activations; the clamp is rounded to it, as they are."""
    return _constants(tail.act, tail.slope, tail.factor, tail.clamp, dtype)


@functools.cache
def _constants(act: str, slope: float, gain: float, clamp: float | None, dtype: torch.dtype) -> dict[str, object]:
    if clamp is not None:
        clamp = torch.tensor(clamp, dtype=dtype, device="cpu").item()
    act, slope = (act, 0.0) if act in SMOOTH else ("lrelu", float(slope))
    return {"ACT": act, "SLOPE": slope, "GAIN": float(gain), "CLAMP": clamp}


@triton.jit
def tanh(p):
    """tanh in any floating-point type: a quotient of polynomials near 0, where 1 − exp(−2|p|) would cancel."""
    q = p * p
    near = p * (945.0 + q * (105.0 + q)) / (945.0 + q * (420.0 + 15.0 * q))  # |error| < p¹¹/10⁷
    e = tl.exp(-2.0 * tl.abs(p))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(p) < 0.25, near, tl.where(p < 0, -far, far))


@triton.jit
def limit_like(y, CLAMP: tl.constexpr):
    """CLAMP in the type of y: a comparison with the bare constant is one with it in fp32, also where y is fp64."""
    return tl.zeros_like(y) + CLAMP


@triton.jit
def _scaled(p, ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr):
    """act(p)·gain."""
    if ACT == "swish":
        u = p * tl.sigmoid(p) * GAIN
    elif ACT == "tanh":
        u = tanh(p) * GAIN
    elif ACT == "sigmoid":
        u = tl.sigmoid(p) * GAIN
    elif SLOPE == 1:
        u = p * GAIN
    elif SLOPE == 0:
        u = tl.where(p <= 0, 0.0, p * GAIN)  # so that −inf gives 0 and NaN stays NaN
    else:
        u = tl.where(p > 0, p * GAIN, p * (GAIN * SLOPE))
    return u


@triton.jit
def pointwise(p, ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr):
    """y from the pre-activation p. NaN stays NaN."""
    if ACT == "lrelu" and SLOPE > 0 and SLOPE < 1 and GAIN > 0:
        y = tl.maximum(p * GAIN, p * (GAIN * SLOPE))  # what `_scaled` gives, in fewer instructions
    else:
        y = _scaled(p, ACT, SLOPE, GAIN)
    if CLAMP is not None:
        limit = limit_like(y, CLAMP)
        y = tl.where(y > limit, limit, y)  # one after the other: each is one instruction on NVIDIA
        y = tl.where(y < -limit, -limit, y)
    return y


@triton.jit
def pointwise_gradient(v, p, ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr):
    """v·∂y/∂p from the pre-activation p; v and p of one shape."""
    if ACT == "swish":
        s = tl.sigmoid(p)
        g = v * (s * (1.0 + p * (1.0 - s)) * GAIN)
    elif ACT == "tanh":
        t = tanh(p)
        g = v * ((1.0 - t * t) * GAIN)
    elif ACT == "sigmoid":
        s = tl.sigmoid(p)
        g = v * (s * (1.0 - s) * GAIN)
    else:
        g = _sides(v, p, SLOPE, GAIN)
    if CLAMP is not None:
        g = tl.where(tl.abs(_scaled(p, ACT, SLOPE, GAIN)) < limit_like(p, CLAMP), g, 0.0)
    return g


@triton.jit
def pointwise_gradient_from_y(v, y, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr):
    """v·∂y/∂p from y, for ACT "lrelu" with GAIN > 0: the sign and size of y tell the side and the clamp."""
    g = _sides(v, y, SLOPE, GAIN)
    if CLAMP is not None:
        g = tl.where(tl.abs(y) < limit_like(y, CLAMP), g, 0.0)
    return g


@triton.jit
def input_from_y(
    y, demod, shift, bias, HAS_DEMOD: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLOPE: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """x of a tile y [pixels, channels] wherever a gradient passes, for ACT "lrelu" with GAIN > 0; elsewhere anything.

    As precise as y is: see `bias_act_triton`. The others as for `pre_activation`.
    """
    if SLOPE == 0 or SLOPE == 1:
        x = y * (1.0 / GAIN)
    else:
        x = tl.where(y > 0, y * (1.0 / GAIN), y * (1.0 / (GAIN * SLOPE)))
    if HAS_NOISE:
        x = x - shift[:, None]
    if HAS_BIAS:
        x = x - bias[None, :]
    if HAS_DEMOD:
        x = x / tl.where(demod == 0, 1.0, demod)[None, :]  # 0 beyond the last channel
    return x


@triton.jit
def _sides(v, p, SLOPE: tl.constexpr, GAIN: tl.constexpr):
    """v·gain where p > 0, else v·gain·slope."""
    if SLOPE == 1:
        g = v * GAIN
    elif SLOPE == 0:
        g = tl.where(p > 0, v * GAIN, 0.0)
    else:
        g = tl.where(p > 0, v * GAIN, v * (GAIN * SLOPE))
    return g


@triton.jit
def pointwise_curvature(v, p, ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr):
    """v·∂²y/∂p² from the pre-activation p; zero, and not to be asked for, where ACT is "lrelu"."""
    if ACT == "swish":
        s = tl.sigmoid(p)
        g = v * (s * (1.0 - s) * (2.0 + p * (1.0 - 2.0 * s)) * GAIN)
    elif ACT == "tanh":
        t = tanh(p)
        g = v * (t * (1.0 - t * t) * (-2.0 * GAIN))
    elif ACT == "sigmoid":
        s = tl.sigmoid(p)
        g = v * (s * (1.0 - s) * (1.0 - 2.0 * s) * GAIN)
    else:
        g = v * 0.0
    if CLAMP is not None:
        g = tl.where(tl.abs(_scaled(p, ACT, SLOPE, GAIN)) < limit_like(p, CLAMP), g, 0.0)
    return g


@triton.jit
def pre_activation(x, demod, shift, bias, HAS_DEMOD: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """p of a tile x [pixels, channels] from demod [channels], shift = noise·strength [pixels] and bias [channels].

    What its flag switches off may be anything.
    """
    if HAS_DEMOD:
        x = x * demod[None, :]
    if HAS_NOISE:
        x = x + shift[:, None]
    if HAS_BIAS:
        x = x + bias[None, :]
    return x
