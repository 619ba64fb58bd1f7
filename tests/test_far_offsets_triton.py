"""Offsets beyond 2³¹ elements, as 64 images of 1024²×32 have: tensors that lie so far apart in memory, most of which no
page is ever given to.
"""

import pytest
import torch
from op_cases import derivatives
from op_inputs import TAPS, _one_thread, normal  # noqa: F401  (a fixture)
from watched import watched

from hsrgan import kernels

pytest.importorskip("triton")

FAR = 2**30 + 8  # elements between neighbours; it fits an int32, twice it does not
PLACES = 2**12  # elements at the start of each neighbour, for all tensors of a test


@pytest.fixture(scope="module")
def room():
    return torch.empty(2 * FAR + PLACES, dtype=torch.float16)


def apart(room, axis):
    """A function that puts images [N, C, H, W] of 2 or 3 along `axis` into the room, FAR apart, else channels_last."""
    taken = 0

    def place(t):
        nonlocal taken
        if t.ndim != 4 or t.dtype != torch.float16 or not 2 <= t.shape[axis] <= 3:
            return t
        shape = [1 if a == axis else size for a, size in enumerate(t.shape)]
        strides = list(torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride())
        strides[axis] = FAR
        put = room.data[taken:].as_strided(t.shape, strides).copy_(t)
        taken += -(-t.numel() // 16) * 16
        assert taken < PLACES
        return put

    return place


def half(*shape):
    return normal(*shape).half()


def taps(device, f=TAPS):
    return f.float().to(device)


def chain(x, bias, demod, noise, strength, style, residual):
    return kernels.bias_act(
        x, bias, demod=demod, noise=noise, strength=strength, next_style=style, residual=residual, clamp=2.0
    )


def fir(x, bias, demod, noise, strength):
    return kernels.fir_bias_act(
        x, taps(x.device), bias, padding=1, demod=demod.abs() + 0.5, noise=noise, strength=strength
    )


def last(x, weight, style, bias, rgb_bias, noise, next_style):
    y, rgb, styled = kernels.bias_act_to_rgb(
        x, weight, style, bias, rgb_bias, noise=noise.detach(), next_style=next_style, clamp=2.0, rgb_clamp=4.0
    )
    return torch.cat([y.float(), rgb, styled.float()], 1)


def operands(n, c, h, w):
    """Op → its function, order and tensors for x of n samples and c channels."""
    x, wider = half(n, c, h, w), half(n, c, h + 1, w + 1)
    small = [normal(c).float(), normal(n, c).float(), half(n, 1, h, w), normal(1).float()]
    rgb = [normal(3, c, 1, 1).float(), normal(n, c).float()]
    hsr = [half(5, c, 1, 1), half(5), half(4, 5, 1, 1), half(4), half(n, 4, 1, 2)]
    return {
        "bias_act": (chain, 2, [x, *small, normal(n, c).float(), half(*x.shape)]),
        "bias_act, samples as pixels": (lambda x: kernels.bias_act(x, clamp=2.0), 2, [half(n, c, 1, 1)]),
        "fir_bias_act": (fir, 2, [wider, *small]),
        "bias_act_fir": (lambda x, b: kernels.bias_act_fir(x, taps(x.device), b, padding=2), 2, [x, small[0]]),
        "upsample2d": (lambda x: kernels.upsample2d(x, taps(x.device)), 2, [x]),
        "upfirdn2d": (lambda x: kernels.upfirdn2d(x, taps(x.device)[:3], up=3, down=2, padding=2), 2, [x]),
        "to_rgb": (lambda *t: kernels.to_rgb(*t, clamp=4.0), 2, [x, *rgb, normal(3).float()]),
        "bias_act_to_rgb": (last, 2, [x, *rgb, small[0], normal(3).float(), small[2], small[1]]),
        "feature_match": (kernels.feature_match, 1, [x, *hsr]),
    }  # fmt: skip


AXES = {"samples": (0, (3, 2, 2, 4)), "channels": (1, (2, 3, 2, 4))}  # along which they lie apart; N, C, H, W
CASES = [(op, "samples") for op in operands(1, 1, 1, 1)]
CASES += [(op, "channels") for op in ("bias_act", "fir_bias_act", "upfirdn2d", "to_rgb", "bias_act_to_rgb")]


@pytest.mark.parametrize(("op", "where"), CASES)
def test_far_apart_as_side_by_side(room, op, where):
    axis, size = AXES[where]
    function, order, tensors = operands(*size)[op]
    constants = {"feature_match": [5], "bias_act_to_rgb": [5], "fir_bias_act": [3]}.get(op, [])  # a target; noise
    wanted = [i for i in range(len(tensors)) if i not in constants]
    place = apart(room, axis)
    with watched():
        near = derivatives(function, tensors, wanted, order)
    with watched() as watch:
        far = derivatives(function, [place(t) for t in tensors], wanted, order, gradient=place)
    assert not watch.outside, watch.outside[0]
    for name, value in near.items():
        torch.testing.assert_close(far[name], value, rtol=2e-3, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")
