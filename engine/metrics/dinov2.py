"""DINOv2's ViT-L/14 (arXiv 2304.07193) as FD-DINOv2 uses it (arXiv 2306.04675): the class token at 224², 1024 wide.

The network is timm's; the weights and their keys are Meta's. Only the position table differs: trained for 37×37
patches, it is resampled to 16×16 as Meta's hub does, which timm (antialiased) does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, INPUT_SIZE, TRAINED_SIZE, PATCH = 1024, 224, 518, 14


class DINOv2(nn.Module):
    """fp32 [N, 3, 224, 224] with ImageNet's statistics → the class token after the final norm [N, width].

    load_published takes Meta's state dict. width, depth, heads: other than ViT-L's, for tests.
    """

    def __init__(self, width: int = FEATURES, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.net = VisionTransformer(img_size=INPUT_SIZE, patch_size=PATCH, embed_dim=width, depth=depth,
                                     num_heads=heads, init_values=1e-5, num_classes=0)

    def published_tensors(self) -> dict[str, Tensor]:
        """Names and shapes of Meta's file, as tensors without memory."""
        tensors = {k: torch.empty_like(v, device="meta") for k, v in self.net.state_dict().items()}
        width = tensors["pos_embed"].shape[2]
        tensors["pos_embed"] = torch.empty(1, 1 + (TRAINED_SIZE // PATCH) ** 2, width, device="meta")
        tensors["mask_token"] = torch.empty(1, width, device="meta")
        return tensors

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        state = {k: v for k, v in state.items() if k != "mask_token"}  # only pre-training masks patches
        state["pos_embed"] = resample_positions(state["pos_embed"], INPUT_SIZE // PATCH)
        self.net.load_state_dict(state, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x)[:, 0]


def resample_positions(table: Tensor, grid: int) -> Tensor:
    """[1, 1 + M², D], class token first → [1, 1 + grid², D], as Meta's hub does it.

    Bicubic without antialias, and by the factor (grid + 0.1)/M instead of grid/M: their guard against rounding, which
    shifts every sample and so is part of what the published features are.
    """
    token, patches = table[:, :1], table[:, 1:]
    side = math.isqrt(patches.shape[1])
    maps = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (grid + 0.1) / side
    maps = F.interpolate(maps, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([token, maps.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], 1)
