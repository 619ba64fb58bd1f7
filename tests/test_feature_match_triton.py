"""feature_match in Triton: the op contract, every teacher grid, memory never held, block sizes of every chip."""

import math
import weakref

import pytest
import torch
from op_cases import OpCase
from opcheck import CHECKS, check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from watched import watched

from hsrgan import kernels
from hsrgan.kernels import feature_match_triton, launch
from hsrgan.kernels.products import products

K, CT = 40, 7


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter takes milliseconds a program; parts and splits have their own tests."""
    torch.manual_seed(0)
    monkeypatch.setattr(feature_match_triton, "PROGRAMS", 1)


def inputs(n, c, h, w, grid, k=K, ct=CT):
    shapes = ((n, c, h, w), (k, c, 1, 1), (k,), (ct, k, 1, 1), (ct,), (n, ct, *grid))
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def case(distance):
    return OpCase(
        f"feature_match, {distance}",
        lambda *t: kernels.feature_match(*t, distance=distance),
        lambda *t: kernels.feature_match_torch(*t, distance=distance),
        lambda n, c, h, w: inputs(n, c, h, w, (3, 4)),  # finer than some images, coarser than others, or both
        low=tuple(range(6)),
        constants=(5,),
        order=1,
        sizes=((1, 1, 4, 5), (1, 17, 2, 3), (2, 3, 7, 4), (1, 3, 3, 19), (1, 63, 1, 2), (1, 129, 1, 2), (1, 2, 1, 100),
               (0, 3, 4, 5)),
        layout_sizes=((2, 3, 4, 5),),
        precision_sizes=((2, 16, 4, 5),),
        determinism_size=(2, 3, 5, 7),
        gradcheck_size=(1, 3, 2, 5),
        slow_size=(1, 1, 1, 2),
    )


CASES = {distance: case(distance) for distance in ("mse", "cosine")}


@pytest.mark.parametrize("name", [n for n in CHECKS if n not in ("second", "gradcheck", "gradgradcheck")])
def test_contract(name):
    check(CASES["mse"], name)


@pytest.mark.parametrize("name", ["values", "gradients", "precision"])
def test_contract_of_the_cosine(name):
    check(CASES["cosine"], name)


def test_gradcheck():
    """A random projection, in the format of activations."""
    *tensors, target = inputs(1, 2, 2, 5, (3, 4), k=2, ct=2)
    leaves = [t.requires_grad_() for t in (tensors[0].to(memory_format=torch.channels_last), *tensors[1:])]
    with watched():
        assert torch.autograd.gradcheck(
            lambda *t: kernels.feature_match(*t, target, distance="cosine"), leaves, fast_mode=True
        )


def gradients(tensors, op, *, distance="mse", scale=3.0):
    leaves = [t.detach().requires_grad_() for t in tensors[:5]]
    loss = op(*leaves, tensors[5], distance=distance)
    return [loss.detach(), *torch.autograd.grad(loss * scale, leaves)]


def compare(tensors, distance="mse", rtol=1e-9):
    with watched() as watch:
        fast = gradients(tensors, kernels.feature_match, distance=distance)
    assert not watch.outside
    truth = gradients(tensors, kernels.feature_match_torch, distance=distance)
    for a, b in zip(fast, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


GRIDS = {
    "rows 64→14": ((64, 5), (14, 3)),
    "columns 64→14": ((3, 64), (2, 14)),
    "32→14": ((32, 8), (14, 4)),
    "16→14": ((16, 16), (14, 14)),
    "8→14": ((8, 8), (14, 14)),
    "16→8": ((16, 16), (8, 8)),
    "8→8": ((8, 8), (8, 8)),
    "rows shrink, columns grow": ((9, 6), (4, 12)),
    "70→37": ((2, 70), (2, 37)),
    "150→2": ((3, 150), (1, 2)),
    "6×4→4×4": ((6, 4), (4, 4)),  # the start block's proportions of a tall image, a square teacher
    "12×18→14×14": ((12, 18), (14, 14)),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid(grid):
    size, bins = GRIDS[grid]
    compare(inputs(2 if max(size) < 10 else 1, 3, *size, bins), "cosine" if grid == "8→14" else "mse")


@pytest.mark.parametrize("length", [0.0, 1e-9])
def test_the_cosine_of_a_prediction_shorter_than_its_floor(length):
    """Its gradient is PyTorch's there, too: of the norm itself, not of what it was raised to."""
    tensors = inputs(1, 3, 4, 5, (2, 3))
    tensors[3] *= 0
    tensors[4] *= length
    compare(tensors, "cosine", rtol=1e-6)  # the floor is rounded to fp32


@pytest.mark.parametrize(("size", "grid", "hidden", "off"), [(14, 14, 30.0, 30.0), (32, 2, 300.0, 1.0)])
def test_sums_that_half_precision_holds_in_parts_only(size, grid, hidden, off):
    """Of the gradient of w2 over all rows, and of a bin's pixels: every term has the same sign."""
    x, w1, b1 = torch.ones(2, 1, size, size), torch.full((2, 1, 1, 1), hidden), torch.zeros(2)
    tensors = [x, w1, b1, torch.zeros(2, 2, 1, 1), torch.zeros(2), torch.full((2, 2, grid, grid), -off)]
    with watched():
        fast = gradients([t.half() for t in tensors], kernels.feature_match, scale=0.1)
    truth = gradients([t.double() for t in tensors], kernels.feature_match_torch, scale=0.1)
    for a, b in zip(fast, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=0)


def test_nan_reaches_the_loss():
    tensors = inputs(1, 3, 4, 5, (2, 3))
    tensors[0][0, 1, 2, 3] = torch.nan
    with watched():
        assert kernels.feature_match(*tensors).isnan()


@pytest.mark.parametrize("programs", [4, 64])
def test_an_image_cut_into_parts_and_gradients_into_splits(programs, monkeypatch):
    monkeypatch.setattr(feature_match_triton, "PROGRAMS", programs)
    compare(inputs(3, 5, 7, 4, (3, 3), k=70))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half_precision_with_the_block_sizes_of(chip, dtype, monkeypatch):
    """x in half precision, the weights in fp32: no more error than twice that of the definition in half precision."""
    monkeypatch.setattr(launch, "chip", lambda x: chip)
    tensors = inputs(2, 24, 10, 64, (3, 14)) if chip == "sm_90" else inputs(2, 24, 16, 16, (7, 14))
    rounded = [t.to(dtype) for t in tensors]
    truth = gradients([t.double() for t in rounded], kernels.feature_match_torch)
    own = gradients(rounded, kernels.feature_match_torch)
    mixed = [rounded[0], *(t.float() for t in rounded[1:])]
    with watched():
        fast = gradients(mixed, kernels.feature_match)
    assert [t.dtype for t in fast] == [torch.float32, dtype, *[torch.float32] * 4]
    for i, (ours, theirs, exact) in enumerate(zip(fast, own, truth, strict=True)):
        free = 1e-6 if i else torch.finfo(dtype).eps / 4  # the loss is one number, whose own error may happen to be 0
        allowed = 2 * (theirs.double() - exact).norm() + free * exact.norm()
        assert (ours.double() - exact).norm() <= allowed


def test_gradients_of_a_loss_scaled_for_fp16():
    """The scale reaches all gradients and overflows nothing on the way; without it x's would round to zero."""
    tensors = inputs(2, 16, 8, 8, (4, 4), ct=64)
    tensors = [(t * 0.2 * (1e-3 if i == 3 else 1)).half() for i, t in enumerate(tensors)]
    tensors[5] = tensors[5].float()
    for scale in (1.0, 2.0**16):
        with watched():
            fast = gradients(tensors, kernels.feature_match, scale=scale)
        truth = gradients([t.double() for t in tensors], kernels.feature_match_torch, scale=scale)
        assert (truth[1].abs().max() < 6e-6) == (scale == 1)
        if scale > 1:
            for a, b in zip(fast, truth, strict=True):
                assert a.isfinite().all() and (a.double() - b).norm() < 0.01 * b.norm()


def test_no_second_order_and_nothing_for_a_target():
    *tensors, target = inputs(1, 3, 4, 4, (2, 2))
    leaves = [t.requires_grad_() for t in tensors]
    target.requires_grad_()
    with watched(), pytest.raises(RuntimeError, match="differentiable once only"):
        torch.autograd.grad(kernels.feature_match(*leaves, target), leaves[0], create_graph=True)
    with watched():
        kernels.feature_match(*leaves, target).backward()
    assert target.grad is None


def test_only_what_is_wanted_is_launched():
    *tensors, target = inputs(1, 3, 4, 4, (2, 2))
    leaves = [t.requires_grad_() for t in tensors]
    for i, kernel in ((0, "dx_kernel"), (1, "dw_kernel"), (3, None)):
        metas = [t.detach().to("meta").requires_grad_() for t in leaves]
        with launch.record() as launches:
            loss = kernels.feature_match(*metas, target.to("meta"))
            forward = len(launches)
            torch.autograd.grad(loss, metas[i])
        assert [x.kernel.__name__ for x in launches[forward:]] == ([kernel] if kernel else [])


class Allocated(TorchDispatchMode):
    """The most bytes alive at a time of tensors made inside, and those of the largest; views are counted once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest, self.seen = 0, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.note(t)
        return out

    def note(self, t):
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)

        def gone():
            self.alive -= size
            self.seen.discard(key)

        weakref.finalize(storage, gone)


def peak_bytes(op, n, c, r, grid, k, ct, dtype):
    """Peak of forward and backward on meta tensors, the inputs not counted; the largest tensor."""
    shapes = ((n, c, r, r), (k, c, 1, 1), (k,), (ct, k, 1, 1), (ct,), (n, ct, grid, grid))
    tensors = [torch.empty(*shape, dtype=dtype, device="meta") for shape in shapes]
    leaves = [t.requires_grad_() for t in tensors[:5]]
    with launch.record(), Allocated() as allocated:
        loss = op(*leaves, tensors[5])
        torch.autograd.grad(loss, leaves, torch.empty_like(loss))
    return allocated.peak, allocated.largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_peak_memory_at_most_twelve_percent_of_the_definition(dtype):
    """16 images of 64×64×256 with 4096 hidden channels; nothing of the size of the hidden map is ever allocated."""
    shape = (16, 256, 64, 14, 4096, 768, dtype)
    ours, largest = peak_bytes(kernels.feature_match, *shape)
    theirs, hidden = peak_bytes(kernels.feature_match_torch, *shape)
    assert hidden == 16 * 64 * 64 * 4096 * dtype.itemsize
    assert ours <= 0.12 * theirs
    assert largest <= 0.1 * hidden
    # the sums of the bins and their gradient, a bit a hidden value, dw1's two splits in fp32, dx; little else
    known = 2 * 16 * 14 * 14 * 4096 * dtype.itemsize + hidden // (8 * dtype.itemsize) + 3 * 4096 * 256 * 4
    assert ours <= 1.6 * (known + 16 * 64 * 64 * 256 * dtype.itemsize)


def test_the_tf32_switch():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    x = torch.empty(1, 3, 8, 8, device="meta")
    assert not launch.tf32_allowed() and products(x)["PRECISION"] == "ieee"  # unless somebody asks
    try:
        for allowed, name in ((True, "tf32"), (False, "ieee")):
            launch.allow_tf32(allowed)
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
            assert products(x)["PRECISION"] == name
    finally:
        launch.allow_tf32(False)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_bins_tile_every_width():
    """Every pixel's bins are in the window that its chunk looks at, for all sizes up to 70."""
    for width in (*range(1, 20), 33, 64, 70):
        for w in range(1, width + 1):
            tiles = feature_match_triton.Tiles.of(torch.empty(1, 1, width, width), (w, w), 64, whole_bins=False)
            for first in range(0, width, tiles.columns):
                last = min(first + tiles.columns, width) - 1
                touched = [j for j in range(w) if first < math.ceil((j + 1) * width / w) and j * width // w <= last]
                assert touched[0] == first * w // width
                assert len(touched) <= tiles.bins
