"""conv1's pointwise tail with toRGB in one pass: the op contract, every set of operands, and what it launches."""

import itertools

import pytest
import torch
from op_cases import OpCase, assert_equal, derivatives
from op_inputs import _one_thread  # noqa: F401  (a fixture)
from opcheck import CHECKS, check
from watched import watched

from hsrgan import kernels
from hsrgan.kernels import launch

pytest.importorskip("triton")

TAPS = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64) / 10  # not symmetric: a mirrored tap shows
NAMES = ("x", "weight", "style", "bias", "rgb_bias", "demod", "noise", "strength", "image")
WITH_NEXT = (*NAMES, "next_style")
LAYER = {"clamp": 0.75, "rgb_clamp": 1.25}


def operands(n, c, h, w, *, names=NAMES, outputs=3, scale=2):
    """Sizes are of the image, `scale` times smaller than x."""
    H, W = h * scale, w * scale
    shapes = {
        "x": (n, c, H, W), "weight": (outputs, c, 1, 1), "style": (n, c), "bias": (c,), "rgb_bias": (outputs,),
        "demod": (n, c), "noise": (n, 1, H, W), "strength": (1,), "image": (n, outputs, h, w),
        "next_style": (n, c),
    }  # fmt: skip
    return [torch.randn(shapes[name], dtype=torch.float64) for name in names]


def call(op, names=NAMES, part="", **options):
    """part: which results are returned, or all, side by side as channels of one."""

    def function(*tensors):
        results = op(**dict(zip(names, tensors, strict=True)), f=TAPS.to(tensors[0].device), **options)
        assert len(results) == 2 + ("next_style" in names)
        named = dict(zip(("y", "rgb", "styled"), results, strict=False))
        chosen = [named[name] for name in part.split() or named]
        return chosen[0] if len(chosen) == 1 else torch.cat([t.to(results[1].dtype) for t in chosen], 1)

    return function


def op_case(name, names=NAMES, part="", made=None, **options):
    return OpCase(
        name, call(kernels.bias_act_to_rgb, names, part, **options),
        call(kernels.bias_act_to_rgb_torch, names, part, **options),
        lambda n, c, h, w: operands(n, c, h, w, names=names, **(made or {})),
        constants=(names.index("noise"),),
        sizes=((1, 1, 2, 3), (2, 7, 3, 1), (2, 3, 1, 7), (1, 129, 1, 2), (1, 3, 1, 63), (1, 100, 1, 1), (0, 3, 2, 2)),
        layout_sizes=((2, 5, 2, 3),), precision_sizes=((2, 16, 3, 4),), gradcheck_size=(2, 3, 2, 1),
        determinism_size=(2, 3, 4, 5), slow_size=(1, 1, 1, 1),
    )  # fmt: skip


FULL = op_case("both results", **LAYER)
RGB = op_case("the image alone", part="rgb", **LAYER)  # the last block; and its precision beside y's
NEXT = op_case("what the next block reads", WITH_NEXT, part="rgb styled", **LAYER)
SMALL = op_case(
    "few values", ("x", "weight", "style", "demod", "noise"), made={"outputs": 1, "scale": 1}, **LAYER
)  # to differentiate numerically, value by value


@pytest.mark.parametrize("name", CHECKS)
def test_contract(name):
    check(SMALL if name in ("gradcheck", "gradgradcheck") else FULL, name)


@pytest.mark.parametrize("name", ["launches", "order", "precision"])
def test_contract_of_the_image_alone(name):
    check(RGB, name)


@pytest.mark.parametrize("name", ["launches", "values", "gradients", "second", "order", "precision", "determinism"])
def test_contract_of_the_image_and_what_the_next_block_reads(name):
    check(NEXT, name)


def same(tensors, names=NAMES, order=2, wanted=None, **options):
    wanted = [i for i, name in enumerate(names) if name != "noise"] if wanted is None else wanted
    truth = derivatives(call(kernels.bias_act_to_rgb_torch, names, **options), tensors, wanted, order)
    with watched() as watch:
        fast = derivatives(call(kernels.bias_act_to_rgb, names, **options), tensors, wanted, order, watch=watch)
    assert not watch.outside
    assert_equal(truth, fast, f"{names} {options}")
    return watch


def test_every_set_of_operands():
    """Second derivatives with the demodulation, through which path length takes them."""
    terms = [((), ("bias",)), ((), ("rgb_bias",)), ((), ("demod",)), ((), ("noise",), ("noise", "strength"))]
    for i, chosen in enumerate(itertools.product(*terms, ((), ("image",)))):
        names = ("x", "weight", "style", *sum(chosen, ()))
        clamps = {"clamp": 0.7 if i % 2 else None, "rgb_clamp": 1.25 if i % 3 else None}
        order = 2 if "demod" in names else 1
        same(operands(1, 2, 1, 2, names=names, scale=1 + i % 2), names, order, part=("", "rgb")[i % 2], **clamps)


@pytest.mark.parametrize("outputs", [1, 2, 4, 5])
def test_any_number_of_outputs(outputs):
    same(operands(2, 3, 2, 1, outputs=outputs), **LAYER)


@pytest.mark.parametrize(("act", "gain"), [("swish", None), ("linear", 0.7), ("lrelu", -0.6)])
def test_other_activations(act, gain):
    same(operands(2, 3, 1, 2), act=act, gain=gain, **LAYER)


@pytest.mark.parametrize("part", ["y", "rgb", ""])
def test_one_result_alone(part):
    """And each with constants in place of the conv's parameters, so that y is read in place of x."""
    same(operands(2, 3, 2, 2), part=part, **LAYER)
    same(operands(2, 3, 2, 2), part=part, wanted=[0, 3, 4, 8], **LAYER)


@pytest.mark.parametrize("part", ["styled", "y styled", "rgb styled", ""])
def test_next_style(part):
    """Alone, beside what HSR reads, beside the image (most of training), and all of it (path length's outer pass)."""
    for wanted in ([0, 1, 2, 3, 4, 5, 7, 8, 9], [0, 3, 4, 8], [0], [9], [1, 5, 9]):
        same(operands(2, 3, 2, 1, names=WITH_NEXT), WITH_NEXT, part=part, wanted=wanted, **LAYER)
    names = ("x", "weight", "style", "next_style")
    same(operands(1, 3, 2, 1, names=names, outputs=5), names, part=part, act="swish")


def test_a_filter_that_the_kernel_does_not_take_and_noise_that_wants_a_gradient():
    x, weight, style, image = operands(1, 3, 2, 3, names=("x", "weight", "style", "image"))
    arguments = {"image": image, "f": TAPS.outer(TAPS)}
    with watched():
        found = kernels.bias_act_to_rgb(x, weight, style, **arguments)
    torch.testing.assert_close(found, kernels.bias_act_to_rgb_torch(x, weight, style, **arguments))
    same(operands(1, 2, 1, 2), wanted=[0, 6, 7], **LAYER)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_more_channels_and_pixels_than_a_program_takes(memory_format):
    tensors = [t.contiguous(memory_format=memory_format) if t.ndim == 4 else t for t in operands(1, 130, 2, 5)]
    same(tensors, order=1, clamp=0.75, rgb_clamp=16)


def record(wrt, names=NAMES, **options):
    shapes = dict(zip(names, [t.shape for t in operands(2, 8, 8, 8, names=names)], strict=True))
    tensors = {name: torch.empty(shape, device="meta", requires_grad=name in wrt) for name, shape in shapes.items()}
    with launch.record() as launches:
        results = kernels.bias_act_to_rgb(**tensors, f=torch.empty(4, device="meta"), **options)
        if wrt:
            torch.autograd.grad(results, [tensors[name] for name in wrt], [torch.empty_like(t) for t in results])
    return launches


def test_one_launch_forward_and_one_for_all_gradients():
    """A third makes the smaller image's gradient of the larger one's. What nobody wants is not computed."""
    for given in (NAMES, WITH_NEXT):
        everything = [name for name in given if name != "noise"]
        names = [entry.kernel.__name__ for entry in record(everything, given, clamp=256, rgb_clamp=256)]
        assert names == ["forward", "gradient", "fir4"]
    _, gradient = record(["x", "rgb_bias"], clamp=256, rgb_clamp=256)
    on = {name for name, value in gradient.constants.items() if value is True}
    assert on == {"FROM_Y", "HAS_BIAS", "HAS_DEMOD", "HAS_NOISE", "HAS_STRENGTH"}
    (forward,) = record([], rgb_clamp=256)
    assert forward.arguments[12] is None  # no bits are kept where nobody asks for a gradient


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("x must be", {"x": torch.zeros(2, 5)}),
        ("weight must have shape", {"weight": torch.zeros(3, 5, 3, 3)}),
        ("style must have shape", {"style": torch.zeros(2, 4)}),
        ("^bias must have shape", {"bias": torch.zeros(4)}),
        ("rgb_bias must have shape", {"rgb_bias": torch.zeros(4)}),
        ("^clamp must be positive", {"clamp": 0.0}),
        ("rgb_clamp must be positive", {"rgb_clamp": 0.0}),
        ("demod must have shape", {"demod": torch.zeros(2, 6)}),
        ("next_style must have shape", {"next_style": torch.zeros(5)}),
        ("noise must have shape", {"noise": torch.zeros(2, 1, 4, 8)}),
        ("strength needs noise", {"strength": torch.zeros(1)}),
        ("image must be .* pixels", {"image": torch.zeros(2, 3, 3, 3)}),
        ("f is needed", {"image": torch.zeros(2, 3, 4, 4), "f": None}),
        ("style must be on the device of x", {"style": torch.zeros(2, 5, device="meta")}),
    ],
)
def test_refusals_name_the_argument(backend, message, options):
    arguments = {"x": torch.zeros(2, 5, 8, 8), "weight": torch.zeros(3, 5, 1, 1), "style": torch.zeros(2, 5), "f": TAPS}
    with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        kernels.bias_act_to_rgb(**(arguments | options))
