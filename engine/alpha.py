"""Images with an alpha channel, as networks that know none see them: over mid-grey."""

from __future__ import annotations

import torch
from torch import Tensor

PROTOCOL = "over mid-grey (127.5)"  # of figures that were taken so


def over_grey(images: Tensor) -> Tensor:
    """RGBA [N, 4, H, W], straight alpha, → RGB [N, 3, H, W]; images of other channels pass as they are.

    float: all four about [−1, 1], mid-grey is 0, alpha beyond its range is clamped. uint8: mid-grey is 127.5, and the
    result is rounded.
    """
    if images.shape[1] != 4:
        return images
    colour, alpha = images[:, :3], images[:, 3:]
    if images.dtype == torch.uint8:
        alpha = alpha.float() / 255
        return (colour.float() * alpha + 127.5 * (1 - alpha)).round().to(torch.uint8)
    return colour * (alpha * 0.5 + 0.5).clamp(0, 1)
