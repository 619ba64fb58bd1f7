"""Input gradients as public ops: the contract, PyTorch's own answer, arguments."""

import pytest
import torch
from op_cases import OpCase, assert_equal, truth_and_op
from opcheck import check

from hsrgan import kernels

pytest.importorskip("triton")
WAYS = {"3×3": (3, 1, 1), "unpadded": (3, 1, 0), "down": (3, 2, 0), "1×1": (1, 1, 0)}  # k, stride, padding


def case(way: str, *, modulated: bool) -> OpCase:
    """Where a stride leaves rows of the input over, too."""
    k, stride, padding = WAYS[way]

    def make(n, c, h, w):
        size = [(s + 2 * padding - k) // stride + 1 for s in (h, w)]
        shapes = [(n, c + 1, *size), (c + 1, c, k, k)]
        if modulated:
            shapes[1:1], shapes[3:] = [(n, c, h, w)], [(n, c)]
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def call(op):
        if modulated:
            return lambda g, x, w, s: torch.cat([t.flatten() for t in op(g, x, w, s, stride, padding)])
        # the size of the input is that of this many pixels, or one more where stride 2 would leave it over
        return lambda g, w: op(g, w, tuple((s - 1) * stride + k - 2 * padding + stride // 2 for s in g.shape[2:]),
                               stride, padding)  # fmt: skip

    name = "modulated_input_gradient" if modulated else "input_gradient"
    return OpCase(
        f"{name}, {way}", call(getattr(kernels, name)), call(getattr(kernels, f"{name}_torch")), make,
        low=(0, 1) if modulated else (0,), sizes=((1, 1, 3, 5), (2, 3, 6, 5), (0, 2, 4, 5)),
        precision_sizes=((2, 9, 6, 5),), gradcheck_size=(1, 1, 3, 3), determinism_size=(2, 3, 4, 9),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["values", "gradients", "second", "poison", "bounds", "precision", "gradgradcheck"])
@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
def test_contract(modulated, name):
    with kernels.use_convolution("gemm"):
        check(case("down", modulated=modulated), name)


@pytest.mark.parametrize("by", ["gemm", "library"])
@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize("way", WAYS)
def test_every_kernel_size_stride_and_padding(way, modulated, by):
    one = case(way, modulated=modulated)
    with kernels.use_convolution(by):
        truth, fast, watch = truth_and_op(one, one.tensors((2, 3, 5, 6)), 2)
    assert not watch.outside
    assert_equal(truth, fast, way)


def test_it_is_the_gradient_of_the_modulated_convolution():
    sizes = (2, 3, 5, 6), (4, 3, 3, 3), (2, 3)
    x, w, s = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    y = kernels.modulated_conv2d(x, w, s, demodulate=False, act="linear")
    g = torch.randn_like(y)
    truth = torch.autograd.grad(y, [x, s], g)
    for found, true in zip(kernels.modulated_input_gradient(g, x, w, s, 1, 1), truth, strict=True):
        torch.testing.assert_close(found, true)
    torch.testing.assert_close(kernels.input_gradient(g, w, (5, 6), 1, 1) * s[:, :, None, None], truth[0])


def test_bad_arguments_are_named():
    g, x, w, s = torch.randn(2, 4, 5, 6), torch.randn(2, 3, 5, 6), torch.randn(4, 3, 3, 3), torch.randn(2, 3)
    plain, modulated = kernels.input_gradient, kernels.modulated_input_gradient
    for named, op, args in (
        ("weight", plain, (g, w[:3], (5, 6), 1, 1)), ("weight", plain, (g, w[:, :, :2, :2], (5, 6))),
        ("weight", plain, (g, w.long(), (5, 6), 1, 1)), ("stride", plain, (g, w, (5, 6), 3)),
        ("stride", plain, (g, w, (9, 11), 2, 1)), ("padding", plain, (g, w, (5, 6), 1, 2)),
        ("g", plain, (g, w, (9, 9))), ("g", modulated, (g.half(), x, w, s, 1, 1)),
        ("x", modulated, (g, x[:1], w, s, 1, 1)), ("style", modulated, (g, x, w, s[:1], 1, 1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{named} "):
            op(*args)
