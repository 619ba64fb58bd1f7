"""Discriminators on the features of a frozen teacher, beside D: Projected GAN's (Sauer et al., arXiv 2111.01007) and
vision-aided training's (Kumari et al., arXiv 2112.09130).

The teacher is no part of these modules: they take its maps. They are trained by D's optimiser and of no use after
training. Every convolution is spectrally normalised (arXiv 1802.05957). Two things differ from the published code, so
that a batch may be split in any way and a forward changes nothing: features are normalised in groups of channels where
Projected GAN's are over the batch, and the singular vectors move in `settle`, once a step, not in each forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList

from hsrgan.engine.layers import Linear

GROUP = 16  # channels normalised together
CMAP = 64  # width in which a feature and a label are compared
SMALLEST = 14  # of the sides of a map that is still halved: the paper's 112², 56², 28² and 14² all end at 7²


def spectral(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """The layer with weights ~ N(0, 1) over their spectral norm: how fast that turns does not depend on the layer."""
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return parametrizations.spectral_norm(layer)


class TeacherHeads(nn.Module):
    """What both kinds of heads share: their spectral norms stay as they are until `settle`."""

    def train(self, mode: bool = True) -> TeacherHeads:
        """Stays in eval mode, in which a forward leaves the singular vectors alone."""
        return super().train(False)

    @torch.no_grad()
    def settle(self, skip: Tensor) -> None:
        """One round of the power iteration, after a step. skip [], bool: the step changed nothing, nor does this."""
        for module in self.modules():
            if isinstance(module, ParametrizationList):
                before = [vector.clone() for vector in module[0].buffers()]
                module[0].train()(module.original)
                module[0].eval()
                for old, vector in zip(before, module[0].buffers(), strict=True):
                    vector.copy_(torch.where(skip, old, vector))


class FeatureDiscriminator(nn.Module):
    """One of Projected GAN's: x [N, C, h, w] → logits [N, K], one for each place of what the halvings leave.

    width: of the last feature, halved towards the input as far as `least`. c_dim: a label is compared with each place.
    """

    def __init__(self, channels: int, grid: tuple[int, int], width: int, least: int, c_dim: int) -> None:
        super().__init__()
        h, w = grid
        halvings = 0
        while min(h, w) >> halvings >= SMALLEST:
            halvings += 1
        blocks: list[nn.Module] = []
        for left in reversed(range(max(halvings, 1))):
            out = max(width >> left, least)
            if halvings:
                conv = nn.Conv2d(channels, out, 4, stride=2, padding=1, bias=False)
            else:
                conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            blocks += [spectral(conv), nn.GroupNorm(max(out // GROUP, 1), out), nn.LeakyReLU(0.2)]
            channels = out
        self.blocks = nn.Sequential(*blocks)
        places = min(4, h >> halvings), min(4, w >> halvings)
        self.out = spectral(nn.Conv2d(channels, CMAP if c_dim else 1, places, bias=False))
        self.embed = Linear(c_dim, CMAP) if c_dim else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.out(self.blocks(x)).flatten(2)
        if self.embed is None:
            return y.flatten(1)
        return (y * self.embed(c)[:, :, None]).sum(1) / math.sqrt(CMAP)


class ProjectedHeads(TeacherHeads):
    """A `FeatureDiscriminator` for each layer of the teacher, behind random projections that are never trained.

    Cross-channel mixing: a 1×1 convolution of layer l to `width`·2^l channels. Cross-scale mixing, from the last layer
    to the first: add what comes from behind, resize to the grid before (the first: to twice its own), 1×1 convolution
    to half the channels (the first: to as many). channels {layer: C_t}, grids {layer: (h, w)}: of the teacher's maps.
    """

    def __init__(
        self, channels: Mapping[int, int], grids: Mapping[int, tuple[int, int]], c_dim: int, width: int
    ) -> None:
        super().__init__()
        self.layers = sorted(channels)
        self.grids = [grids[layer] for layer in self.layers]
        first = self.grids[0]
        self.targets = [(2 * first[0], 2 * first[1]), *self.grids[:-1]]
        self.heads = nn.ModuleDict()
        for level, layer in enumerate(self.layers):
            mixed = width << level
            out = mixed // 2 if level else mixed
            self.register_buffer(f"mix_channels{layer}", _random_projection(channels[layer], mixed))
            self.register_buffer(f"mix_scales{layer}", _random_projection(mixed, out))
            self.heads[str(layer)] = FeatureDiscriminator(out, self.targets[level], 8 * width, width, c_dim)
        self.train(False)

    def projections(self, maps: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """{layer: [N, C_t, h, w]} → {layer: [N, C, h', w']}, what the discriminators look at."""
        found, behind = {}, None
        for layer, target in zip(reversed(self.layers), reversed(self.targets), strict=True):
            x = F.conv2d(maps[layer], self.get_buffer(f"mix_channels{layer}"))
            if behind is not None:
                x = x + behind
            if x.shape[2:] != target:
                x = F.interpolate(x, target, mode="bilinear", align_corners=True)
            found[layer] = behind = F.conv2d(x, self.get_buffer(f"mix_scales{layer}"))
        return found

    def forward(self, maps: Mapping[int, Tensor], c: Tensor) -> tuple[Tensor, ...]:
        """maps {layer: [N, C_t, h, w]}, labels c [N, c_dim] → for each layer, first to last, logits [N, K]."""
        projections = self.projections(maps)
        return tuple(self.heads[str(layer)](projections[layer], c) for layer in self.layers)


def _random_projection(in_channels: int, out_channels: int) -> Tensor:
    """Weight of a 1×1 convolution that keeps the variance (Kaiming's for a linear layer)."""
    return torch.randn(out_channels, in_channels, 1, 1) / math.sqrt(in_channels)


class VisionAidedHeads(TeacherHeads):
    """The multi-level discriminator: a 3×3 convolution, then a logit for each place at half the grid, on every layer
    but the last; on the last one's mean over its map, in place of the published code's class token, a hidden layer and
    a logit, to which the label's embedding adds its product with the hidden one. channels {layer: C_t}.
    """

    def __init__(self, channels: Mapping[int, int], c_dim: int, hidden: int) -> None:
        super().__init__()
        *self.layers, self.last = sorted(channels)
        self.convs = nn.ModuleDict(
            {str(layer): spectral(nn.Conv2d(channels[layer], hidden, 3, padding=1)) for layer in self.layers}
        )
        self.outs = nn.ModuleDict({str(layer): spectral(nn.Conv2d(hidden, 1, 1)) for layer in self.layers})
        self.pooled = spectral(nn.Linear(channels[self.last], hidden))
        self.out = spectral(nn.Linear(hidden, 1))
        self.embed = Linear(c_dim, hidden) if c_dim else None
        self.train(False)

    def forward(self, maps: Mapping[int, Tensor], c: Tensor) -> tuple[Tensor, ...]:
        """maps {layer: [N, C_t, h, w]}, labels c [N, c_dim] → for each layer, first to last, logits [N, K]."""
        logits = []
        for layer in self.layers:
            x = F.leaky_relu(self.convs[str(layer)](maps[layer]), 0.2)
            x = F.adaptive_avg_pool2d(x, [-(-side // 2) for side in x.shape[2:]])
            logits.append(self.outs[str(layer)](x).flatten(1))
        hidden = F.leaky_relu(self.pooled(maps[self.last].mean((2, 3))), 0.2)
        y = self.out(hidden)
        if self.embed is not None:
            y = y + (self.embed(c) * hidden).sum(1, keepdim=True)
        return *logits, y
