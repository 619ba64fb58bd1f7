"""The Inception-v3 of FID: Google's graph of 2015-12-05, with the state-dict keys of torch-fidelity and pytorch-fid.

Not torchvision's: 1008 logits, batch norm with eps 1e-3, average pools that do not count their padding, and a max pool
in the last block, as in that graph (Szegedy et al., arXiv 1512.00567, describes an average pool there).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, LOGITS, INPUT_SIZE = 2048, 1008, 299

_mean_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_max_pool_half = partial(F.max_pool2d, kernel_size=3, stride=2)


class ConvNorm(nn.Module):
    """Convolution without bias → batch norm → ReLU."""

    def __init__(self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side over one input, concatenated by channel.

    A branch is a chain of steps: a pooling function, or convolutions by name → (width, kernel[, stride]). Two
    convolutions in one step both see the step before and are concatenated. Stride 1 keeps the size, stride 2 pads none.
    """

    def __init__(self, cin: int, *branches: list) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = cin
            for step in branch:
                if callable(step):
                    continue
                for name, (cout, kernel, *stride) in step.items():
                    padding = 0 if stride else _half(kernel)
                    self.add_module(f"branch{name}", ConvNorm(width, cout, kernel, *stride, padding=padding))
                width = sum(cout for cout, *_ in step.values())

    def forward(self, x: Tensor) -> Tensor:
        ends = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = step(y) if callable(step) else _side_by_side([self.get_submodule(f"branch{n}")(y) for n in step])
            ends.append(y)
        return torch.cat(ends, 1)


def _half(kernel: int | tuple[int, int]) -> int | tuple[int, int]:
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


def _side_by_side(maps: list[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


def _mixed_35(cin: int, pooled: int) -> Mixed:
    return Mixed(
        cin,
        [{"1x1": (64, 1)}],
        [{"5x5_1": (48, 1)}, {"5x5_2": (64, 5)}],
        [{"3x3dbl_1": (64, 1)}, {"3x3dbl_2": (96, 3)}, {"3x3dbl_3": (96, 3)}],
        [_mean_pool, {"_pool": (pooled, 1)}],
    )


def _mixed_17(mid: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    return Mixed(
        768,
        [{"1x1": (192, 1)}],
        [{"7x7_1": (mid, 1)}, {"7x7_2": (mid, row)}, {"7x7_3": (192, column)}],
        [{"7x7dbl_1": (mid, 1)}, {"7x7dbl_2": (mid, column)}, {"7x7dbl_3": (mid, row)}, {"7x7dbl_4": (mid, column)},
         {"7x7dbl_5": (192, row)}],
        [_mean_pool, {"_pool": (192, 1)}],
    )


def _mixed_8(cin: int, pool: partial) -> Mixed:
    row, column = (1, 3), (3, 1)
    return Mixed(
        cin,
        [{"1x1": (320, 1)}],
        [{"3x3_1": (384, 1)}, {"3x3_2a": (384, row), "3x3_2b": (384, column)}],
        [{"3x3dbl_1": (448, 1)}, {"3x3dbl_2": (384, 3)}, {"3x3dbl_3a": (384, row), "3x3dbl_3b": (384, column)}],
        [pool, {"_pool": (192, 1)}],
    )


class InceptionV3(nn.Module):
    """fp32 [N, 3, 299, 299], (x − 128)/128 of grey levels → features [N, 2048]; `logits` are linear in them."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = _mixed_35(192, pooled=32)
        self.Mixed_5c = _mixed_35(256, pooled=64)
        self.Mixed_5d = _mixed_35(288, pooled=64)
        self.Mixed_6a = Mixed(
            288,
            [{"3x3": (384, 3, 2)}],
            [{"3x3dbl_1": (64, 1)}, {"3x3dbl_2": (96, 3)}, {"3x3dbl_3": (96, 3, 2)}],
            [_max_pool_half],
        )
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        self.Mixed_7a = Mixed(
            768,
            [{"3x3_1": (192, 1)}, {"3x3_2": (320, 3, 2)}],
            [{"7x7x3_1": (192, 1)}, {"7x7x3_2": (192, (1, 7))}, {"7x7x3_3": (192, (7, 1))}, {"7x7x3_4": (192, 3, 2)}],
            [_max_pool_half],
        )
        self.Mixed_7b = _mixed_8(1280, _mean_pool)
        self.Mixed_7c = _mixed_8(2048, _max_pool)
        self.fc = nn.Linear(FEATURES, LOGITS)

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict(state, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_max_pool_half(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_max_pool_half(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """features [N, 2048] → [N, 1008], without the bias: what the published Inception Score takes."""
        return features @ self.fc.weight.T
