"""HSR: heads that predict the frozen teacher's features from the generator's (Karnewar et al., arXiv 2208.03764).

    L_HSR = Σ_r λ_r · mean[(Resize(P_r(f_r)) − φ_{l(r)}(G(w)))²]

f_r [N, C_r, h, w] is block b{r} of the generator after conv1, φ the teacher's map, held constant, and Resize the area
resize to the teacher's grid. The gradient reaches the heads P_r and f_r only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hsrgan.kernels import feature_match


class PointwiseConv(nn.Module):
    """Equalised 1×1 convolution's parameters: weight ~ N(0, 1), scaled by 1/√in where it is used; bias zero."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def scaled(self) -> Tensor:
        return self.weight * (1 / math.sqrt(self.weight.shape[1]))


class HSRHead(nn.Module):
    """P_r: 1×1 conv C_r → hidden, ReLU·√2, 1×1 conv hidden → C_teacher; no norm."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.conv1x1_1 = PointwiseConv(in_channels, hidden)
        self.conv1x1_2 = PointwiseConv(hidden, out_channels)

    def forward(self, feature: Tensor, target: Tensor, distance: str) -> Tensor:
        first, second = self.conv1x1_1, self.conv1x1_2
        return feature_match(feature, first.scaled(), first.bias, second.scaled(), second.bias, target,
                             distance=distance)


class HSRHeads(nn.Module):
    """One predictor for each chosen resolution; trained by G's optimiser, dropped at inference.

    channels {r: C_r} of the generator's features, targets {r: C_t} of the teacher's maps (`Teacher.channels`).
    half_dtype: that of the products, None for the features' own; parameters and distance keep theirs.
    State-dict keys: `heads.{r}.conv1x1_{1,2}.{weight,bias}`.
    """

    def __init__(self, channels: Mapping[int, int], targets: Mapping[int, int], hidden: int = 4096,
                 half_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not targets or not set(targets) <= set(channels):
            raise ValueError(f"targets has resolutions {sorted(targets)}, channels has {sorted(channels)}")
        self.half_dtype = half_dtype
        self.heads = nn.ModuleDict({str(r): HSRHead(channels[r], hidden, targets[r]) for r in sorted(targets)})

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The block resolutions to ask of the generator, ascending."""
        return tuple(int(r) for r in self.heads)

    def loss(self, features: Mapping[int, Tensor], targets: Mapping[int, Tensor], *,
             weights: Mapping[int, float] | None = None, distance: str = "mse", detach: bool = False) -> Tensor:
        """Σ_r λ_r · distance_r, a scalar.  features {r: [N, C_r, h, w]}, targets {r: [N, C_t, h, w]}.

        weights {r: λ_r}: 1 for a resolution not named.  distance "mse", or "cosine" (1 − cos over channels).
        detach: the control arm, whose heads learn while the generator feels nothing.
        """
        terms = []
        for r in self.resolutions:
            weight = 1.0 if weights is None else weights.get(r, 1.0)
            if weight == 0:
                continue
            feature = features[r].detach() if detach else features[r]
            feature = feature.to(self.half_dtype or feature.dtype)
            terms.append(weight * self.heads[str(r)](feature, targets[r].detach(), distance))
        if not terms:
            raise ValueError("every weight of the HSR resolutions is zero: leave HSR out instead")
        return torch.stack(terms).sum()


def hsr_term(heads: HSRHeads, teacher: Callable[[Tensor], Mapping[int, Tensor]], features: Mapping[int, Tensor],
             img: Tensor, *, weights: Mapping[int, float] | None = None, distance: str = "mse",
             detach: bool = False) -> Tensor:
    """L_HSR of un-augmented fakes img [N, C, H, W], before its weight λ."""
    return heads.loss(features, teacher(img.detach()), weights=weights, distance=distance, detach=detach)
