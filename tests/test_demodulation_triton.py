"""modulation in Triton: the op contract with and without fp16's normalisation, its launches, whole layers."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import OpCase, assert_equal, truth_and_op
from op_inputs import _one_thread  # noqa: F401  (a fixture)
from opcheck import CHECKS, check

from hsrgan import kernels
from hsrgan.kernels import blocks, demodulation, launch
from hsrgan.kernels.demodulation import modulation, modulation_torch

pytest.importorskip("triton")


def case(k=3, transposed=False, **options):
    """A convolution of x, made of all four results by PyTorch's ops: what graph stands for has the values of cast."""

    def make(n, c, h, w):
        return [torch.randn(shape, dtype=torch.float64) for shape in ((n, c, h, w), (c + 1, c, k, k), (n, c))]

    def call(op):
        def function(x, weight, style):
            graph, cast, style, demod = op(weight, style, x, transposed=transposed)
            w = graph - graph.detach() + cast
            x = x * style[:, :, None, None]
            y = F.conv_transpose2d(x, w, padding=k // 2) if transposed else F.conv2d(x, w, padding=k // 2)
            return y * demod[:, :, None, None] + style.square().sum()

        return function

    sizes = {
        "sizes": ((1, 1, 2, 2), (2, 3, 1, 3), (1, 17, 1, 1), (0, 3, 2, 2)), "layout_sizes": ((2, 3, 2, 3),),
        "determinism_size": (2, 3, 2, 3), "gradcheck_size": (2, 2, 1, 2), "slow_size": (1, 2, 1, 1),
        "dtypes": (torch.float32,), "may_copy": True,
    }  # fmt: skip
    return OpCase("modulation", call(modulation), call(modulation_torch), make, **sizes, **options)


CASES = {"3x3": case(), "transposed": case(transposed=True), "1x1": case(1)}


@pytest.fixture
def normalised(monkeypatch):
    """What fp16 asks for, of the fp64 that checks run in, too."""
    monkeypatch.setattr(demodulation, "normalises", lambda x: True)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("which", CASES)
def test_contract(which, name):
    check(CASES[which], name)
