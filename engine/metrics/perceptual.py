"""LPIPS, the perceptual distance of Zhang et al. (arXiv 1801.03924), version 0.1 on VGG-16: the distance inside PPL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hsrgan.engine.metrics.fp32 import exact_fp32
from hsrgan.engine.metrics.vgg16 import convolutions

WIDTHS = (64, 128, 256, 512, 512)
_HEAD = "lin{}.model.1.weight"
_TAPS = (3, 8, 15, 22, 29)  # the last ReLU before each pool


class LPIPS(nn.Module):
    """`distance(a, b)` between images in [−1, 1].

    `features` has torchvision's keys of VGG-16, `lin0` to `lin4` are the published heads: one weight ≥ 0 a channel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = convolutions()[:-1]  # nothing looks behind the last pool
        for i, width in enumerate(WIDTHS):
            self.register_parameter(f"lin{i}", nn.Parameter(torch.empty(1, width, 1, 1)))
        shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's statistics, of images in [−1, 1]
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)

    def load_published(self, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        """trunk: the state dict of VGG16, whose classifier is not needed; heads: as published_heads."""
        state = {k: v for k, v in trunk.items() if k.startswith("features.")}
        self.load_state_dict(state | {f"lin{i}": heads[_HEAD.format(i)] for i in range(len(WIDTHS))})

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b fp32 [N, 3 or 1, H, W] in [−1, 1], not clamped → fp32 [N] ≥ 0.

        fp32 only: PPL divides by ε² = 1e-8, and half precision's rounding inflates it 11 (fp16) to 360 (bf16) times.
        """
        for name, images in (("a", a), ("b", b)):
            if images.dtype != torch.float32:
                raise ValueError(f"{name} is {images.dtype}: LPIPS takes float32; PPL's ε is lost in less")
            if images.ndim != 4 or images.shape[1] not in (1, 3):
                raise ValueError(f"{name} is {list(images.shape)}: LPIPS takes [N, 3, H, W] or grey [N, 1, H, W]")
        if a.shape != b.shape:
            raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}: LPIPS compares image with image")
        with exact_fp32(a.device):
            return self.between(self.maps(a), self.maps(b))

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """What `between` compares, one map after another [N, C, h, w]. The gradient passes to images."""
        x = (images - self.shift) / self.scale  # grey is repeated by broadcasting
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                yield unit(x)

    def between(self, a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
        """The distance [N] of images with the maps a and b."""
        total = 0.0
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            total = total + ((x - y).square() * getattr(self, f"lin{i}")).sum(1).mean((1, 2))
        return total


def published_heads() -> dict[str, Tensor]:
    """Names and shapes in the lpips package's vgg.pth."""
    return {_HEAD.format(i): torch.empty(1, width, 1, 1) for i, width in enumerate(WIDTHS)}


def unit(x: Tensor) -> Tensor:
    """Each place's channels scaled to length 1. Where all are zero the gradient is finite, unlike a square root's."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
