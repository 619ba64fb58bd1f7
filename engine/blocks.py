"""One resolution of G and of D (StyleGAN2, 1912.04958, figures 2 and 7), and D's end at the start block.

A block's activations are half precision where it is given a `half_dtype`; its parameters are fp32 in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hsrgan.engine.layers import Conv, Linear, SynthesisLayer, ToRGB, append_minibatch_std, register_filter
from hsrgan.kernels import Modulation, downsample2d, downsample2d_branch, finishes, prepared


class Features(NamedTuple):
    """What a block of G hands to the next, whose conv0 reads `styled` where it has made its weight `ready` before."""

    x: Tensor
    styled: Tensor | None = None  # x·ready.style
    ready: Modulation | None = None


class SynthesisBlock(nn.Module):
    """One resolution of G: (b4 only: the learned constant,) up-convolution, convolution, residual, toRGB."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        w_dim: int,
        size: tuple[int, int],
        img_channels: int,
        conv_clamp: float | None,
        architecture: str,
        is_last: bool,
        half_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.half_dtype, self.size = half_dtype, size
        register_filter(self)
        residual = architecture == "resnet" and in_channels > 0
        layer = {"w_dim": w_dim, "size": size}
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, *size))
            self.conv0 = None
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, up=2, clamp=conv_clamp, **layer)
        gain = math.sqrt(0.5) if residual else 1.0
        self.conv1 = SynthesisLayer(out_channels, out_channels, gain=gain, clamp=conv_clamp, **layer)
        self.skip = Conv(in_channels, out_channels, 1, bias=False, up=2, gain=gain) if residual else None
        self.torgb = None
        if is_last or architecture == "skip":
            self.torgb = ToRGB(out_channels, img_channels, w_dim=w_dim, clamp=conv_clamp)

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The convolutions in order: each takes one w and one noise."""
        return [self.conv1] if self.conv0 is None else [self.conv0, self.conv1]

    @property
    def styled(self) -> list[SynthesisLayer | ToRGB]:
        """The layers that take a style, in order."""
        return self.layers if self.torgb is None else [*self.layers, self.torgb]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.half_dtype or self.conv1.weight.dtype

    def forward(
        self,
        below: Features | None,
        image: Tensor | None,
        styles: Sequence[Tensor],
        noises: Sequence[Tensor | None],
        above: tuple[SynthesisBlock, Tensor] | None = None,
    ) -> tuple[Features, Tensor | None]:
        """Features [N, in, h/2, w/2], image [N, C, h/2, w/2] → both h×w. styles: of each convolution, then toRGB's.
        above: the next block and the style of its conv0."""
        dtype = self.dtype
        residual = ready = following = None
        if below is None:
            n = styles[0].shape[0]  # len() would fix the batch of an exported graph
            x = self.const.to(dtype).expand(n, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        else:
            x = below.x.to(dtype) if below.ready is None else below.styled
            residual = None if self.skip is None else self.skip(x)
            # conv1 alone reads what conv0 writes: its style can be multiplied in before
            ready = prepared(x, self.conv1.weight, styles[1], self.size)
            next_style = None if ready is None else ready.style
            x = self.conv0(x, styles[0], noises[0], next_style=next_style, ready=below.ready)
        style = styles[len(self.layers) - 1]
        if self.torgb is not None and self.skip is None:  # both read what conv1 writes: one pass
            if above is not None and not finishes(x, self.conv1.weight):
                following = above[0].conv0_prepared(x, above[1], self.size)
            next_style = None if following is None else following.style
            torgb = partial(self.torgb, style=styles[-1], image=image, taps=self.taps, next_style=next_style)
            x, image, *styled = self.conv1(x, style, noises[-1], torgb, ready=ready)
            return Features(x, *styled, following) if styled else Features(x), image
        x = self.conv1(x, style, noises[-1], ready=ready)
        if residual is not None:
            x = x + residual
        if self.torgb is not None:
            image = self.torgb(x, styles[-1], image, self.taps)
        return Features(x), image

    def conv0_prepared(self, x: Tensor, style: Tensor, size: tuple[int, int]) -> Modulation | None:
        """`kernels.prepared` of conv0, for the block below: conv0 and toRGB read what it makes of x in one pass.

        None also where the dtype changes between the blocks, or `skip` reads the features too.
        """
        if self.skip is not None or self.dtype != x.dtype:
            return None
        return prepared(x, self.conv0.weight, style, size, up=2)


class DiscriminatorBlock(nn.Module):
    """One resolution of D, halving it: (fromrgb,) convolution, down-convolution, residual."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        img_channels: int,
        conv_clamp: float | None,
        architecture: str,
        is_first: bool,
        half_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.half_dtype = half_dtype
        self.pyramid = architecture == "skip"
        register_filter(self)
        self.fromrgb = Conv(img_channels, channels, 1, clamp=conv_clamp) if is_first or self.pyramid else None
        residual = architecture == "resnet"
        gain = math.sqrt(0.5) if residual else 1.0
        self.conv0 = Conv(channels, channels, 3, clamp=conv_clamp)
        self.conv1 = Conv(channels, out_channels, 3, down=2, gain=gain, clamp=conv_clamp)
        self.skip = Conv(channels, out_channels, 1, bias=False, down=2, gain=gain) if residual else None

    def forward(self, x: Tensor | None, img: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C, h, w] (None at the top), img [N, img_channels, h, w] → x and (`skip` only) img at half the size."""
        dtype = self.half_dtype or self.conv0.weight.dtype
        if x is not None:
            x = x.to(dtype)
        if self.fromrgb is not None:
            img = img.to(dtype)
            x = self.fromrgb(img, residual=x)
            if self.pyramid:
                img = downsample2d(img, self.taps)
        residual = None
        if self.skip is not None:
            half, x = downsample2d_branch(x, self.skip.taps)
            residual = self.skip(half, blurred=True)
        return self.conv1(self.conv0(x, blurs=True), residual=residual, blurred=True), img


class DiscriminatorEpilogue(nn.Module):
    """The end of D at the start block's size, all fp32: minibatch std → 3×3 convolution → fully connected → logits."""

    def __init__(
        self,
        channels: int,
        *,
        size: tuple[int, int],
        cmap_dim: int,
        img_channels: int,
        conv_clamp: float | None,
        architecture: str,
        mbstd_group_size: int,
    ) -> None:
        super().__init__()
        self.mbstd_group_size = mbstd_group_size
        self.fromrgb = Conv(img_channels, channels, 1) if architecture == "skip" else None
        self.conv = Conv(channels + 1, channels, 3, clamp=conv_clamp)
        self.fc = Linear(channels * math.prod(size), channels, act="lrelu")
        self.out = Linear(channels, cmap_dim or 1)

    def forward(self, x: Tensor, img: Tensor, cmap: Tensor | None, parts: int) -> Tensor:
        """x [N, C, h, w], img [N, img_channels, h, w] (`skip` only), cmap [N, cmap_dim] → logits [N, 1]."""
        dtype = self.fc.weight.dtype
        x = x.to(dtype)
        if self.fromrgb is not None:
            x = self.fromrgb(img.to(dtype), residual=x)
        x = self.conv(append_minibatch_std(x, self.mbstd_group_size, parts))
        x = self.out(self.fc(x.flatten(1)))
        if cmap is not None:
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(cmap.shape[1])
        return x
