"""The op contract lets a right op pass and catches each of a set of broken ones, each by the checks that should."""

import contextlib
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from op_cases import OpCase
from opcheck import CHECKS, check, failures
from scaled_square import _forward, scaled_square, scaled_square_torch
from watched import rounding, watched

from hsrgan.kernels import launch


@triton.jit
def _copy(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n).to(Y.dtype.element_ty), mask=i < n)


def make(n, c, h, w):
    return [torch.randn(n, c, h, w, dtype=torch.float64), torch.randn(c, dtype=torch.float64)]


FEW = {  # what is enough for the broken forms
    "sizes": ((1, 1, 2, 3), (2, 2, 1, 100), (0, 3, 4, 5)),
    "layout_sizes": ((1, 3, 2, 4),),
    "precision_sizes": ((1, 7, 9, 8),),
    "gradcheck_size": (1, 2, 3, 2),
    "slow_size": (1, 1, 1, 2),
}


def case(broken, options=FEW):
    name = f"scaled_square {broken}"
    return OpCase(name, lambda x, scale: scaled_square(x, scale, broken), scaled_square_torch, make, **options)


RIGHT = case("", {})
EVERYWHERE = {"values", "gradients", "second", "partial", "layouts"}  # what compares fp64 results with the definition
BROKEN = {  # form → all checks that it fails
    "wrong index": EVERYWHERE | {"precision", "gradcheck", "gradgradcheck"},
    "height for width": EVERYWHERE | {"bounds", "poison", "precision", "gradcheck", "gradgradcheck"},
    "last tile left out": {"poison", "values", "gradients", "second", "precision"},
    "wrong second": {"second", "partial", "layouts", "gradgradcheck"},
    "forgets a term": {"second", "partial", "layouts", "gradgradcheck"},
    "second detached": {"launches", "second", "order", "partial", "layouts", "gradgradcheck"},
    "third detached": {"order"},
    "wrong alone": {"partial"},
    "another block a call": {"determinism"},
    "accumulates in x's dtype": {"precision"},
    "writes its input": EVERYWHERE - {"values"} | {"inputs", "gradcheck", "gradgradcheck"},
    "ignores strides": {"layouts", "copies", "gradgradcheck"},
    "copies": {"layouts", "copies"},
    "plain torch": {"launches", "layouts"},
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_right_op_passes(name):
    check(RIGHT, name)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_op_fails_the_checks_that_look_there(broken):
    found = set(failures(case(broken)))
    if "bounds" in found:  # what lies outside of one tensor may belong to another of the launch: by chance, not always
        found.discard("determinism")
    assert found == BROKEN[broken]


def test_a_missing_mask_is_seen_and_kept_from_doing_harm():
    """Of what lies outside, some may belong to another tensor of the launch: which other checks fail is chance."""
    with pytest.raises(AssertionError, match=r"fails bounds.*_forward (reads|writes) \d+ elements outside"):
        check(case("missing mask"), "bounds")
    room = torch.ones(4096)
    with watched() as watch, mock.patch.object(torch, "empty_like", lambda x: room[1024:1030].view(x.shape)):
        scaled_square(torch.full((1, 1, 2, 3), 2.0), torch.ones(1), "missing mask")
    assert watch.outside and room.sum() == 4096 - 6 + 6 * 4


def test_failures_of_a_check_name_it_and_the_place():
    with pytest.raises(AssertionError, match=r"fails second: \(1, 1, 2, 3\): order 2, input 0 is wrong in 6 of 6"):
        check(case("wrong second"), "second", "determinism")


def test_rounding_is_what_the_interpreter_lacks_for_bfloat16():
    """Cut off instead of rounded, a store is off by twice as much (root mean square): the whole of the tolerance."""
    x = torch.randn(1, 32, 16, 16)
    exact = x.double().square()
    y = torch.empty_like(x, dtype=torch.bfloat16)
    options = dict(ACC=tl.float32, BLOCK_P=64, BLOCK_C=32, SWAP=False, UNMASKED=False, SHIFT=0)
    errors = []
    for context in (contextlib.nullcontext(), rounding()):
        with context:
            launch.run(_forward, (1, 4, 1), x, torch.ones(32), y, *x.shape, *x.stride(), *y.stride(), **options)
        errors.append((y.double() - exact).square().mean().sqrt())
    nearest = (exact.bfloat16().double() - exact).square().mean().sqrt()
    truncated, rounded = (error / nearest for error in errors)
    assert abs(rounded - 1) < 1e-3
    assert 1.8 < truncated < 2.2


def test_rounding_equals_that_of_torch_for_every_sort_of_value():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    y = torch.empty_like(x, dtype=torch.bfloat16)
    with rounding():
        launch.run(_copy, (1,), x, y, 10, BLOCK=16)
    assert torch.equal(y.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(y[known].view(torch.int16), x[known].bfloat16().view(torch.int16))
