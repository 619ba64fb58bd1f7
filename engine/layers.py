"""The layers G and D are made of (Karras et al., StyleGAN 1912.04958; equalised learning rate: 1710.10196).

Every layer stores fp32 parameters drawn from N(0, 1) and applies its scale at run time; activations may be half
precision. Parameter and buffer names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsrgan.kernels import (
    Modulation,
    bias_act_fir,
    bias_act_to_rgb,
    blur_padding,
    conv2d,
    conv2d_bias_act,
    finishes,
    modulated_conv2d,
    modulated_convolution,
    to_rgb,
)

# [1, 3, 3, 1] / 8: the resampling filter of every published StyleGAN2. Its outer square is what state dicts hold.
TAPS = (0.125, 0.375, 0.375, 0.125)


def normalize_2nd_moment(x: Tensor) -> Tensor:
    """Scale each row of x [N, C] to unit mean square: x·rsqrt(mean(x²) + 1e-8)."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def register_filter(module: nn.Module) -> None:
    """Give `module` the published buffer `resample_filter` [4, 4], and `taps` [4], its separable half, to compute with.

    The kernels want the 1-d taps (8 multiplications a pixel in place of 16), so a file whose filter is another one
    is refused at load instead of being ignored.
    """
    taps = torch.tensor(TAPS)
    module.register_buffer("resample_filter", taps.outer(taps))
    module.register_buffer("taps", taps, persistent=False)
    module.register_load_state_dict_pre_hook(_refuse_other_filter)


def _refuse_other_filter(module, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    loaded = state_dict.get(f"{prefix}resample_filter")
    own = module.resample_filter
    if loaded is not None and loaded.shape == own.shape and not torch.allclose(loaded.to(own), own, atol=1e-6):
        errors.append(f"{prefix}resample_filter is not the [1, 3, 3, 1] filter, the only one these layers compute")


class Linear(nn.Module):
    """Equalised fully connected layer: x [N, in] → act(x·(w·lr/√in)ᵀ + b·lr) [N, out].

    The weight is stored as N(0, 1)/lr_multiplier, the bias as `bias_init`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, act: str = "linear", lr_multiplier: float = 1.0, bias_init=0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init)))
        self.act = act
        self.bias_gain = lr_multiplier * (math.sqrt(2) if act == "lrelu" else 1.0)  # lrelu(x)·√2 = lrelu(x·√2)
        self.weight_gain = self.bias_gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        # x bears the weight's scale: it is smaller, and the weight's gradient then needs no scaling either
        y = torch.addmm(self.bias, x * self.weight_gain, self.weight.t(), beta=self.bias_gain)
        return y if self.act == "linear" else F.leaky_relu(y, 0.2)


class Affine(nn.Module):
    """A layer's map from w to its style, an equalised layer too; `Synthesis` applies those of all layers at once."""

    def __init__(self, w_dim: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, w_dim))
        self.bias = nn.Parameter(torch.ones(channels))


class Conv(nn.Module):
    """Equalised k×k convolution with resampling, bias, activation and clamp: x [N, in, h, w] → [N, out, h', w'].

    `gain` multiplies the result (and the clamp), as the branches of a residual block need. A convolution without
    bias is plain linear, and nothing is clamped.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        up: int = 1,
        down: int = 1,
        gain: float = 1.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        register_filter(self)
        self.up, self.down = up, down
        # lrelu(x)·gain = lrelu(x·gain): every gain is folded into weight and bias, smaller than the activations
        self.act_gain = math.sqrt(2) * gain if bias else gain
        self.weight_gain = self.act_gain / math.sqrt(in_channels * kernel_size**2)
        self.clamp = None if clamp is None else clamp * gain

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, blurs: bool = False, blurred: bool = False
    ) -> Tensor:
        """`residual` [N, out, h', w'] is added last, after the clamp.

        blurs: the result is blurred for a 3×3 layer with down=2 that follows and is told that its x is `blurred`, as a
        1×1 layer with down=2 is whose x has been through `downsample2d_branch`.
        """
        f = self.taps if self.up > 1 or self.down > 1 else None
        scaled = {"up": self.up, "down": self.down, "f": f, "blurred": blurred, "weight_gain": self.weight_gain}
        if self.bias is None:
            return conv2d(x, self.weight, **scaled)
        bias = self.bias * self.act_gain
        if blurs:
            x, padding = conv2d(x, self.weight, **scaled), blur_padding(self.taps)
            return bias_act_fir(x, self.taps, bias, act="lrelu", act_gain=1, clamp=self.clamp, padding=padding)
        return conv2d_bias_act(
            x, self.weight, bias, act="lrelu", gain=1, clamp=self.clamp, residual=residual, **scaled
        )  # fmt: skip


class SynthesisLayer(nn.Module):
    """Modulated, demodulated 3×3 convolution with noise, bias, lrelu and clamp: x [N, in, h, w], style [N, in] →
    [N, out, h·up, w·up].

    `noise_strength` is held as [1], because DeepSpeed refuses 0-dim parameters, but is [] in state dicts, as published.
    """

    style_gain = 1.0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        w_dim: int,
        size: tuple[int, int],
        up: int = 1,
        gain: float = 1.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.up = up
        self.affine = Affine(w_dim, in_channels)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.register_buffer("noise_const", torch.randn(size))
        register_filter(self)
        self.act_gain = math.sqrt(2) * gain
        self.clamp = None if clamp is None else clamp * gain
        self.register_state_dict_post_hook(_strength_to_scalar)
        self.register_load_state_dict_pre_hook(_strength_from_scalar)

    def forward(
        self, x: Tensor, style: Tensor, noise: Tensor | None,
        torgb: Callable[..., tuple[Tensor, ...]] | None = None, *, next_style: Tensor | None = None,
        ready: Modulation | None = None,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        """style: of this layer's `affine`; noise [N, 1, h·up, w·up] or None for none; next_style: what the result is
        multiplied with, ready: of `kernels.prepared`, where x has been multiplied so.

        torgb: a `ToRGB` that takes what the convolution returns and ends this layer in its own pass over memory; its
        results are returned, features and image first. Of a layer that keeps the size.
        """
        strength = None if noise is None else self.noise_strength
        tail = {
            "noise": noise, "strength": strength, "bias": self.bias, "act": "lrelu", "gain": self.act_gain,
            "clamp": self.clamp,
        }  # fmt: skip
        if torgb is not None and not finishes(x, self.weight):
            x, tail["demod"] = modulated_convolution(x, self.weight, style, ready=ready)
            return torgb(x, tail=tail)
        f = self.taps if self.up > 1 else None
        x = modulated_conv2d(x, self.weight, style, up=self.up, f=f, next_style=next_style, ready=ready, **tail)
        return x if torgb is None else (x, torgb(x))


def _strength_to_scalar(module, state_dict, prefix, local_metadata) -> None:
    key = f"{prefix}noise_strength"
    state_dict[key] = state_dict[key].reshape(())


def _strength_from_scalar(module, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    key = f"{prefix}noise_strength"
    if key in state_dict and state_dict[key].ndim == 0:
        state_dict[key] = state_dict[key].reshape(1)


class ToRGB(nn.Module):
    """Modulated 1×1 convolution to the image's channels, not demodulated, linear and clamped; added to the image."""

    def __init__(self, in_channels: int, img_channels: int, *, w_dim: int, clamp: float | None = None) -> None:
        super().__init__()
        self.affine = Affine(w_dim, in_channels)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self.style_gain = 1 / math.sqrt(in_channels)
        self.clamp = clamp

    def forward(
        self, x: Tensor, style: Tensor, image: Tensor | None, taps: Tensor, tail: dict[str, Any] | None = None,
        next_style: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        """x [N, in, h, w], style [N, in], image [N, C, h/2, w/2] fp32 or None → image [N, C, h, w] fp32.

        style: of this layer's `affine`, times `style_gain`. tail: operands of the `bias_act` that is to make the
        features of x first → (features, image), and features·next_style where that is given.
        """
        if tail is None:
            return to_rgb(x, self.weight, style, self.bias, clamp=self.clamp, image=image, f=taps)
        return bias_act_to_rgb(
            x, self.weight, style, rgb_bias=self.bias, rgb_clamp=self.clamp, image=image, f=taps,
            next_style=next_style, **tail,
        )  # fmt: skip


def append_minibatch_std(x: Tensor, group_size: int, parts: int = 1) -> Tensor:
    """Append to x [N, C, h, w] one channel that holds the mean deviation within each group (1710.10196 §3).

    Groups are strided: with G = min(group_size, N) and M = N/G, group n is the samples n, n+M, n+2M, … A batch of
    several `parts` of equal length gives each part the statistics it would have alone.

    Raises ValueError where G does not divide N, or `parts` the batch.
    """
    n, _, h, w = x.shape
    if n % parts:
        raise ValueError(f"minibatch std: a batch of {n} cannot be cut into {parts} parts")
    group = min(group_size, n // parts)
    if n // parts % group:
        raise ValueError(
            f"minibatch std: a batch of {n // parts} cannot be cut into groups of {group} (mbstd_group_size)"
        )
    variance = x.unflatten(0, (parts, group, -1)).var(dim=1, correction=0)
    std = (variance + 1e-8).sqrt().mean(dim=(2, 3, 4))
    std = std[:, None].expand(-1, group, -1).reshape(n, 1, 1, 1).expand(n, 1, h, w)
    return torch.cat([x, std.contiguous(memory_format=torch.channels_last)], dim=1)  # cat keeps a format all share
