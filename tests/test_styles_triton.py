"""The styles of all layers in one launch: the op contract, layers of any size, the network that uses them."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from op_cases import OpCase
from opcheck import CHECKS, check
from small_networks import make_g
from watched import watched

from hsrgan import kernels
from hsrgan.kernels import launch, use_backend

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LAYERS = {"which": (0, 1, 1, 3), "gains": (1.0, 0.25, 1.0, 3.0)}  # nobody reads ws[:, 2]


def sizes(c: int) -> tuple[int, ...]:
    """A layer of more than one block (but of one row where c is 1: gradcheck), one of a row, and two of c."""
    return (33 if c > 1 else 1, 1, c, c)


def case() -> OpCase:
    """n samples, c rows of some layers, h·w features."""

    def call(op):
        return lambda ws, w, b: op(ws, w, b, sizes=sizes(1 if len(w) == 4 else (len(w) - 34) // 2), **LAYERS)

    def make(n, c, h, w):
        rows = sum(sizes(c))
        return [torch.randn(size, dtype=torch.float64) for size in ((n, 4, h * w), (rows, h * w), (rows,))]

    return OpCase(
        "packed_styles", call(kernels.packed_styles), call(kernels.packed_styles_torch), make, low=(),
        sizes=((1, 1, 1, 1), (2, 3, 7, 1), (17, 2, 3, 3), (3, 33, 5, 13), (1, 2, 1, 129), (0, 3, 4, 5)),
        layout_sizes=((2, 3, 2, 5),), precision_sizes=((3, 5, 10, 13),), determinism_size=(2, 3, 9, 15),
        gradcheck_size=(2, 1, 1, 2), slow_size=(1, 1, 1, 1), dtypes=(torch.float32,),
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("layouts", "copies")])
def test_contract(name):
    """Layouts are those of images: ws has its strides tried below."""
    check(case(), name)


def test_ws_of_any_strides():
    """One w for all layers, as the mapping network returns it, and every second of a larger tensor."""
    w, b = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    options = {"sizes": (33, 1, 3, 3), **LAYERS}
    for ws in (torch.randn(3, 1, 6).double().expand(3, 4, 6), torch.randn(6, 8, 12).double()[::2, ::2, ::2]):
        with watched() as watch:
            found = kernels.packed_styles(ws, w, b, **options)
        assert not watch.outside and not watch.copies
        torch.testing.assert_close(found, kernels.packed_styles_torch(ws, w, b, **options), rtol=1e-12, atol=1e-12)


def test_bad_arguments_are_named():
    ws, w, b = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    good = {"sizes": (2, 3), "which": (0, 2), "gains": (1.0, 1.0)}
    for named, tensors, options in (
        ("ws", (ws[0], w, b), good), ("weight", (ws, w[:4], b), good), ("bias", (ws, w, b[:4]), good),
        ("weight", (ws, w.double(), b), good), ("which", (ws, w, b), good | {"which": (0,)}),
        ("which", (ws, w, b), good | {"which": (0, 3)}), ("which", (ws, w, b), good | {"which": (2, 0)}),
        ("gains", (ws, w, b), good | {"gains": (1.0,)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{named} "):
            kernels.packed_styles(*tensors, **options)


def test_a_generator_has_one_launch_for_all_its_styles_and_two_for_their_gradients():
    """A layer's own products would be three times as many as there are layers."""
    g = make_g().to("meta")
    ws = torch.randn(2, g.synthesis.num_ws, g.synthesis.w_dim, device="meta", requires_grad=True)
    with launch.record() as launches:
        g.synthesis(ws, noise_mode="none").sum().backward()
    counts = Counter(one.kernel.fn.__name__ for one in launches if "styles" in one.kernel.fn.__module__)
    assert counts == {"forward": 1, "gradient_x": 1, "gradient_w": 1}
    assert all(layer.affine.weight.grad is not None for layer in g.synthesis.b16.styled)


def test_both_backends_give_the_styles_of_each_layer():
    torch.manual_seed(0)
    ws = torch.randn(3, 4, 7, dtype=torch.float64)
    weights = [torch.randn(size, 7, dtype=torch.float64) for size in (5, 2, 40)]
    biases = [torch.randn(len(w), dtype=torch.float64) for w in weights]
    which, gains = (0, 1, 3), (1.0, 0.5, 1.0)
    truth = [gain * (ws[:, i] @ w.t() + b) for w, b, i, gain in zip(weights, biases, which, gains, strict=True)]
    for backend in ("torch", "triton"):
        with use_backend(backend), watched() if backend == "triton" else nullcontext():
            found = kernels.styles(ws, weights, biases, which, gains)
        for one, true in zip(found, truth, strict=True):
            assert one.is_contiguous()
            torch.testing.assert_close(one, true, rtol=1e-12, atol=1e-12)
