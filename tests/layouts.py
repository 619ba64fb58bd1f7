"""The memory layouts in which the op contract hands tensors to an op."""

from collections.abc import Callable

import torch
from torch import Tensor

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def _sliced(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """t as a view with gaps on every axis of a larger tensor that is NaN in between."""
    if t.ndim == 0:
        return t
    large = torch.full([2 * s + 1 for s in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    large = large.contiguous(memory_format=memory_format) if t.ndim == 4 else large
    # a step of 2 on the outer axes, a margin on the inner one (channels of NHWC, columns of NCHW)
    inner = 1 if memory_format == torch.channels_last else t.ndim - 1
    view = large[tuple(slice(1, 1 + s) if a == inner else slice(1, 2 * s, 2) for a, s in enumerate(t.shape))]
    view.copy_(t)
    return view


def _transposed(t: Tensor, i: int) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3) if t.ndim == 4 else t


LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "nchw": lambda t, i: t.contiguous(),
    "nhwc": lambda t, i: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "sliced nchw": lambda t, i: _sliced(t, torch.contiguous_format),
    "sliced nhwc": lambda t, i: _sliced(t, torch.channels_last),
    "x nhwc, others nchw": lambda t, i: t.contiguous(memory_format=torch.channels_last) if i == 0 else t.contiguous(),
    "transposed": _transposed,
    "expanded": lambda t, i: t[:1].expand_as(t) if i == 0 else t,
}

GRADIENT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as y": lambda g: g,
    "nchw": lambda g: g.contiguous(),
    "nhwc": lambda g: g.contiguous(memory_format=torch.channels_last) if g.ndim == 4 else g,
    "expanded": lambda g: g.flatten()[:1].reshape([1] * g.ndim).expand_as(g),
}
