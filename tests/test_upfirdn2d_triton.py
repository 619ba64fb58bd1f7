"""upfirdn2d in Triton: the op contract on both kernels, every rate, ragged sizes, and where the programs meet."""

import pytest
import torch
from op_cases import OpCase, assert_equal, truth_and_op
from op_inputs import _one_thread  # noqa: F401  (a fixture)
from opcheck import CHECKS, check

from hsrgan import kernels
from hsrgan.kernels import launch

pytest.importorskip("triton")

TAPS = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64) / 10  # not symmetric: a mirrored tap shows
SKEW = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]], dtype=torch.float64) / 22


def call(op, f, **options):
    return lambda x: op(x, None if f is None else f.to(x.device), **options)


def case(name, f, sizes, **options):
    return OpCase(
        name, call(kernels.upfirdn2d, f, **options), call(kernels.upfirdn2d_torch, f, **options),
        lambda n, c, h, w: [torch.randn(n, c, h, w, dtype=torch.float64)],
        precise_order=2, sizes=sizes, layout_sizes=((2, 3, 1, 3),), precision_sizes=((1, 16, 4, 5),),
        gradcheck_size=(1, 2, 3, 4),
    )  # fmt: skip


RAGGED = (
    *((1, 1, 4, 3), (1, 7, 3, 1), (2, 3, 1, 7), (1, 63, 2, 2), (1, 3, 2, 63)),
    *((1, 129, 1, 2), (1, 2, 2, 100), (0, 3, 4, 5)),
)
CASES = {
    case.name: case
    for case in (
        case("blur", TAPS, RAGGED, padding=2, gain=1.5),
        case("up", TAPS, RAGGED, up=2, padding=(2, 1, 3, 0), gain=4.0, flip_filter=True),
        case("down", TAPS, RAGGED, down=2, padding=(2, 1, 1, 2)),
        case("general", SKEW, RAGGED, up=(2, 3), down=(3, 2), padding=(2, 3, 1, 4), gain=0.7),
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_contract(name):
    check(CASES["blur"], name)


@pytest.mark.parametrize("kind", ["up", "down", "general"])
def test_contract_of_the_other_rates(kind):
    check(CASES[kind], "launches", "bounds", "poison", "values", "gradients", "second", "order", "precision")


@pytest.mark.parametrize("kind", ["up", "down", "general"])
def test_layouts_of_the_other_rates(kind):
    check(CASES[kind], "layouts")


def both(op):
    def joined(x):
        half, x = op(x, TAPS.to(x.device))
        return half + torch.nn.functional.avg_pool2d(x * x, 2)

    return joined


BRANCH = OpCase(
    "branch", both(kernels.downsample2d_branch), both(kernels.downsample2d_branch_torch),
    lambda n, c, h, w: [torch.randn(n, c, h, w, dtype=torch.float64)],
    precise_order=2, layout_sizes=((2, 3, 2, 4),), precision_sizes=((1, 16, 4, 6),), gradcheck_size=(1, 2, 4, 4),
    sizes=((1, 1, 4, 3), (1, 7, 3, 2), (1, 63, 2, 2), (1, 3, 2, 63), (0, 3, 4, 5)),
)  # fmt: skip


@pytest.mark.parametrize("name", ["bounds", "poison", "values", "gradients", "second", "layouts", "precision"])
def test_contract_of_a_branch(name):
    check(BRANCH, name)


@pytest.mark.parametrize("who", [(True, True), (True, False), (False, True)], ids=str)
def test_a_branch_adds_the_other_gradient_in_the_pass_of_its_own(who):
    """One launch, and no addition: what is not differentiated is not computed either."""
    x = torch.empty(2, 16, 8, 8, device="meta").requires_grad_()
    with launch.record() as launches:
        outputs = kernels.downsample2d_branch(x, torch.empty(4, device="meta"))
        launches.clear()
        used = [y for y, wanted in zip(outputs, who, strict=True) if wanted]
        (gx,) = torch.autograd.grad(used, x, [torch.empty_like(y) for y in used])
    assert [run.constants["BACK"] for run in launches] == {(True, True): ["add"], (True, False): ["none"]}.get(who, [])
    assert gx.shape == x.shape


def same(x, f, **options):
    one = OpCase("", call(kernels.upfirdn2d, f, **options), call(kernels.upfirdn2d_torch, f, **options), None)
    truth, fast, watch = truth_and_op(one, [x], 1)
    assert not watch.outside
    assert_equal(truth, fast, f"{options}")


def normal(*shape, nhwc=True):
    x = torch.randn(*shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if nhwc else x


@pytest.mark.parametrize("options", [{"padding": 2}, {"up": 2, "padding": (2, 1)}, {"down": 2, "padding": 1}], ids=str)
def test_rows_and_columns_meet_where_programs_do(options):
    """More rows than a strip, more columns than a tile, more channels than a block."""
    same(normal(1, 65, 21, 12), TAPS, **options)
    same(normal(1, 1, 2, 259, nhwc=False), TAPS, **options)


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (3, 2, -1, 4), (-2, 5, 5, -2)], ids=str)
@pytest.mark.parametrize("rate", [{}, {"up": 2}, {"down": 2}], ids=str)
def test_paddings_of_any_parity_and_cropping(rate, pads):
    for flip in (False, True):
        same(normal(1, 2, 6, 7), TAPS, padding=pads, flip_filter=flip, **rate)


@pytest.mark.parametrize("up", [1, 2, 3, 4])
@pytest.mark.parametrize("down", [1, 2, 3, 4])
def test_every_rate(up, down):
    same(normal(1, 2, 4, 5), SKEW, up=(up, 5 - up), down=(down, up), padding=(1, 2, 3, 1))


FILTERS = {"none": None, "1": TAPS[:1], "3": TAPS[:3], "11": TAPS.repeat(3)[:11], "3x2": SKEW.t()}
FILTERS["4x4"] = TAPS.outer(TAPS)


@pytest.mark.parametrize("f", FILTERS.values(), ids=FILTERS)
def test_every_filter(f):
    same(normal(1, 2, 5, 4), f, up=(2, 1), padding=6)
    same(normal(1, 2, 5, 4), f, down=(1, 2), padding=6, flip_filter=True)


def test_separable_taps_in_any_dtype_stay_separable():
    """What is asked of the fast path is launched as such: 4 taps, not their 16 products; nothing for an empty batch."""
    with launch.record() as launches:
        x = torch.empty(2, 8, 16, 16, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        f = torch.empty(4, device="meta")
        y = [kernels.upfirdn2d(x, f, padding=2), kernels.upsample2d(x, f), kernels.downsample2d(x, f)]
    assert [t.shape[2:] for t in y] == [(17, 17), (32, 32), (8, 8)]
    assert [run.kernel.__name__ for run in launches] == ["fir4"] * 3


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("f must be a 1-d or 2-d filter", {"f": TAPS[None, None]}),
        ("f must be a 1-d or 2-d filter", {"f": TAPS[:0]}),
        ("f must be on the device of x", {"f": torch.empty(4, device="meta")}),
        ("up must be 1 … 4", {"up": 5}),
        ("down must be 1 … 4", {"down": (1, 0)}),
        ("padding .* leaves an output of 0×1 pixels", {"padding": (0, 0, -1, 0)}),
        ("padding .* leaves an output of -5×-5", {"padding": -3}),
        ("padding must be", {"padding": (1, 2, 3)}),
    ],
)
def test_refusals_name_the_argument(backend, message, options):
    with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        kernels.upfirdn2d(torch.zeros(1, 1, 4, 4), **{"f": TAPS, **options})
