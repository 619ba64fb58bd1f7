"""to_rgb in Triton: the op contract, every number of outputs, images of both sizes, and more than one program."""

import pytest
import torch
from op_cases import OpCase, assert_equal, truth_and_op
from op_inputs import _one_thread  # noqa: F401  (a fixture)
from opcheck import CHECKS, check

from hsrgan import kernels
from hsrgan.kernels import launch

pytest.importorskip("triton")

TAPS = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64) / 10  # not symmetric: a mirrored tap shows


def case(outputs=3, image=2, bias=True, f=TAPS, **options):
    """image: how many times smaller than x, or None. Sizes are of the image where it is smaller."""

    def make(n, c, h, w):
        scale = image or 1
        shapes = [(n, c, h * scale, w * scale), (outputs, c, 1, 1), (n, c)]
        shapes += [(outputs,)] if bias else []
        shapes += [(n, outputs, h, w)] if image else []
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def call(op):
        def function(x, weight, style, *rest):
            rest = list(rest)
            b = rest.pop(0) if bias else None
            return op(x, weight, style, b, image=rest[0] if rest else None, f=f.to(x.device), **options)

        return function

    return OpCase(
        "to_rgb", call(kernels.to_rgb), call(kernels.to_rgb_torch), make,
        sizes=((1, 1, 2, 3), (1, 7, 3, 1), (2, 3, 1, 7), (1, 129, 1, 2), (1, 3, 1, 63), (1, 100, 1, 1),
               (0, 3, 2, 2)),
        layout_sizes=((2, 5, 2, 3),), precision_sizes=((2, 16, 3, 4),), gradcheck_size=(2, 3, 2, 2),
        slow_size=(1, 1, 1, 1),
    )  # fmt: skip


CONTRACT = case(clamp=1.25)


@pytest.mark.parametrize("name", CHECKS)
def test_contract(name):
    check(CONTRACT, name)


def same(one, *size, order=2):
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in one.tensors(size)]
    truth, fast, watch = truth_and_op(one, tensors, order)
    assert not watch.outside
    assert_equal(truth, fast, f"{size}")


@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 5])
def test_any_number_of_outputs(outputs):
    same(case(outputs, clamp=1.25), 2, 3, 2, 3)


@pytest.mark.parametrize("image", [None, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_with_and_without_image_and_bias(image, bias):
    same(case(image=image, bias=bias), 2, 3, 2, 3)
    same(case(image=image, bias=bias, clamp=0.75), 1, 4, 2, 1)


def test_a_filter_that_the_kernel_does_not_take():
    same(case(f=TAPS.outer(TAPS)), 1, 3, 2, 3)


def test_more_channels_and_pixels_than_a_program_takes():
    same(case(clamp=8.0), 1, 70, 5, 9, order=1)


@pytest.mark.parametrize("image", [None, 1, 2])
def test_programs_that_divide_a_row_evenly(image):
    """16 pixels of 64 channels in fp64: the row is told once for all."""
    height, width = (2, 8) if image == 2 else (4, 16)
    x = torch.empty(1, 64, 4, 16, dtype=torch.float64, device="meta").to(memory_format=torch.channels_last)
    with launch.record() as launches:
        kernels.to_rgb(x, x.new_empty(3, 64, 1, 1), x.new_empty(1, 64))
    assert launches[0].constants["IN_ROW"] and launches[0].grid == (4,)
    same(case(image=image, clamp=8.0), 1, 64, height, width, order=1)


def test_a_third_derivative_is_right():
    same(case(outputs=2), 1, 2, 1, 2, order=3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_bias_that_moves_the_clamp_has_a_second_gradient_of_zero(backend):
    """Zero, not none, on both backends: an optimiser tells them apart."""
    sizes = ((1, 2, 1, 2), (3, 2, 1, 1), (1, 2), (3,))
    x, weight, style, bias = (torch.randn(*size).requires_grad_() for size in sizes)
    with kernels.use_backend(backend):
        alone = kernels.to_rgb(x, weight, style, bias, clamp=1.0)
        _, folded = kernels.bias_act_to_rgb(x, weight, style, rgb_bias=bias, rgb_clamp=1.0)
        for y in (alone, folded):
            (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(gx.sum(), bias, allow_unused=True)
            assert second is not None and second.abs().sum() == 0


def test_one_launch_forward_and_two_for_all_gradients():
    """The second makes the smaller image's gradient of the larger one's."""
    shapes = {"x": (2, 8, 16, 16), "weight": (3, 8, 1, 1), "style": (2, 8), "bias": (3,), "image": (2, 3, 8, 8)}
    tensors = {name: torch.empty(shape, device="meta", requires_grad=True) for name, shape in shapes.items()}
    with launch.record() as launches:
        y = kernels.to_rgb(**tensors, f=torch.empty(4, device="meta"), clamp=256)
        torch.autograd.grad(y, list(tensors.values()), torch.empty_like(y))
    assert [run.kernel.__name__ for run in launches] == ["project", "gradient", "fir4"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("x must be", {"x": torch.zeros(2, 5)}),
        ("weight must have shape", {"weight": torch.zeros(3, 5, 3, 3)}),
        ("style must have shape", {"style": torch.zeros(2, 4)}),
        ("bias must have shape", {"bias": torch.zeros(4)}),
        ("clamp must be positive", {"clamp": 0.0}),
        ("image must be .* pixels", {"image": torch.zeros(2, 3, 3, 3)}),
        ("image must be \\[N, Cimg\\]", {"image": torch.zeros(2, 4, 8, 8)}),
        ("f is needed", {"image": torch.zeros(2, 3, 4, 4), "f": None}),
        ("style must be on the device of x", {"style": torch.zeros(2, 5, device="meta")}),
    ],
)
def test_refusals_name_the_argument(backend, message, options):
    arguments = {"x": torch.zeros(2, 5, 8, 8), "weight": torch.zeros(3, 5, 1, 1), "style": torch.zeros(2, 5), "f": TAPS}
    with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        kernels.to_rgb(**(arguments | options))
