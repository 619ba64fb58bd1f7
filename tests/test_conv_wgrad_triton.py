"""The convolution's weight gradient in Triton: the op contract, autograd's own answer, per-sample weights, tiles."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from op_cases import OpCase, assert_equal, truth_and_op
from opcheck import CHECKS, check
from watched import watched

from hsrgan import kernels
from hsrgan.kernels import launch

pytest.importorskip("triton")
from hsrgan.kernels import conv_wgrad_triton

WAYS = {  # k, stride, padding
    "3×3": (3, 1, 1),
    "unpadded": (3, 1, 0),
    "down": (3, 2, 0),
    "padded down": (3, 2, 1),
    "1×1": (1, 1, 0),
    "strided 1×1": (1, 2, 0),
}


FITS = conv_wgrad_triton.fits


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter takes milliseconds a program; splits have their own tests."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(conv_wgrad_triton, "PROGRAMS", 1)
    monkeypatch.setattr(conv_wgrad_triton, "fits", lambda *_, **__: True)  # the kernel, not the library
    yield
    torch.set_num_threads(threads)


def inputs(n, c, h, w, way, cout=0):
    """x, g, weight, style, demod in fp64; up to 3 output channels where their number is not given."""
    cout = cout or min(c, 3)
    k, stride, padding = WAYS[way]
    size = [(s + 2 * padding - k) // stride + 1 for s in (h, w)]
    shapes = (n, c, h, w), (n, cout, *size), (cout, c, k, k), (n, c), (n, cout)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def case(way):
    k, stride, padding = WAYS[way]

    def call(op):
        return lambda x, g, xs, gs: op(x, g, k, stride, padding, x_scale=xs, g_scale=gs).flatten(1)

    def make(n, c, h, w):
        x, g, _, xs, gs = inputs(n, c, h, w, way)
        return [x, g, xs, gs]

    return OpCase(
        f"weight_gradient, {way}", call(kernels.weight_gradient), call(kernels.weight_gradient_torch), make,
        low=(0, 1), sizes=((1, 1, 3, 5), (2, 13, 3, 4), (1, 3, 7, 9), (0, 3, 4, 5)), layout_sizes=((2, 2, 2, 7),),
        precision_sizes=((2, 9, 6, 5),), determinism_size=(2, 3, 4, 9), gradcheck_size=(1, 2, 2, 3),
        slow_size=(1, 1, 1, 1),
    )  # fmt: skip


def modulated_case(way):
    _, stride, padding = WAYS[way]

    def call(op):
        return lambda *t: torch.cat([part.flatten() for part in op(*t, stride, padding)])

    return OpCase(
        f"modulated_weight_gradients, {way}", call(kernels.modulated_weight_gradients),
        call(kernels.modulated_weight_gradients_torch), lambda *size: inputs(*size, way),
        low=(0, 1), sizes=((1, 1, 3, 5), (2, 13, 3, 4), (0, 3, 4, 5)), layout_sizes=((2, 2, 2, 3),),
        precision_sizes=((2, 9, 6, 5),), determinism_size=(2, 3, 4, 9), gradcheck_size=(1, 2, 2, 3),
        slow_size=(1, 1, 1, 1),
    )  # fmt: skip


PLAIN, MODULATED = case("3×3"), modulated_case("1×1")


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("one", [PLAIN, MODULATED], ids=["plain", "modulated"])
def test_contract(one, name):
    """Layouts, copies and equal bits in the first order: the second is these ops and conv2d's once more."""
    with kernels.use_convolution("gemm") if one is PLAIN else nullcontext():  # its gradients are convolutions only
        check(replace(one, order=1) if name in ("layouts", "copies", "determinism") else one, name)


@pytest.mark.parametrize("way", WAYS)
def test_every_kernel_size_stride_and_padding(way):
    one = modulated_case(way)
    truth, fast, watch = truth_and_op(one, one.tensors((2, 3, 5, 6)), 2)
    assert not watch.outside
    assert_equal(truth, fast, way)


def close(fast, truth):
    for a, b in zip(fast, truth, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_what_aten_says(way):
    """Without scales, and with one: PyTorch's own weight gradient of what the scales were multiplied into."""
    k, stride, padding = WAYS[way]
    x, g, w, xs, gs = inputs(2, 3, 5, 6, way)
    for scales in ({}, {"x_scale": xs}, {"g_scale": gs}):
        with watched() as watch:
            fast = kernels.weight_gradient(x, g, k, stride, padding, **scales)
        scaled = [t * scales[name][:, :, None, None] if name in scales else t
                  for t, name in ((g, "g_scale"), (x, "x_scale"))]  # fmt: skip
        two = [[stride] * 2, [padding] * 2, [1, 1]]
        truth = torch.ops.aten.convolution_backward(*scaled, w, None, *two, False, [0, 0], 1, [False, True, False])
        close([fast], [truth[1]])
        assert watch.launches == 1 and not watch.outside and fast.is_contiguous()


def of_each_sample(x, w, style, demod, stride, padding):
    """The modulated convolution by one weight per sample."""
    each = w * style[:, None, :, None, None] * demod[:, :, None, None, None]
    return torch.cat([F.conv2d(a[None], b, None, stride, padding) for a, b in zip(x, each, strict=True)])


@pytest.mark.parametrize("way", ["3×3", "down", "1×1"])
def test_gradients_of_weights_per_sample(way):
    _, *how = WAYS[way]
    x, g, *leaves = inputs(3, 4, 5, 6, way)
    leaves = [t.requires_grad_() for t in leaves]
    truth = torch.autograd.grad(of_each_sample(x, *leaves, *how), leaves, g)
    with watched():
        close(kernels.modulated_weight_gradients(x, g, *leaves, *how), truth)


def test_the_transposed_convolution():
    """x and g change places, and their scales: dwᵀ, and the gradients in the order of the scales."""
    g, x, w, demod, style = inputs(2, 3, 7, 5, "down", cout=4)  # of a convolution from 3 to 4 channels, which reads g
    w = w.transpose(0, 1)
    leaves = [t.requires_grad_() for t in (w, style, demod)]
    y = F.conv_transpose2d(x * style[:, :, None, None], w.transpose(0, 1), stride=2) * demod[:, :, None, None]
    truth = torch.autograd.grad(y, leaves, g)
    with watched():
        dw = kernels.weight_gradient(g, x, 3, 2, 0, x_scale=demod, g_scale=style)
        found = kernels.modulated_weight_gradients(g, x, w.transpose(0, 1), demod, style, 2, 0)
    close([dw.transpose(0, 1)], truth[:1])
    close([found[0].transpose(0, 1), found[2], found[1]], truth)


@pytest.mark.parametrize(("samples", "launches"), [(1000, 1), (2, 2), (0, 3)])
def test_splits_and_samples_in_turn(samples, launches, monkeypatch):
    """Programs that share a sample's pixels; a workspace for so many samples' sums, each split no more."""
    monkeypatch.setattr(conv_wgrad_triton, "PROGRAMS", 7)
    monkeypatch.setattr(conv_wgrad_triton, "WORKSPACE", samples * 8 * 9 * 3 * 5)
    t = inputs(3, 5, 9, 7, "3×3")
    with watched() as watch:
        fast = kernels.modulated_weight_gradients(*t, 1, 1)
        plain = kernels.weight_gradient(*t[:2], 3, 1, 1)
    assert not watch.outside
    assert watch.launches == 1 + launches
    close(
        [*fast, plain],
        [*kernels.modulated_weight_gradients_torch(*t, 1, 1), kernels.weight_gradient_torch(*t[:2], 3, 1, 1)],
    )


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half_precision_with_the_block_sizes_of(chip, dtype, monkeypatch):
    """Tiles that channels fill and do not fill; no more error than twice the definition's in half precision."""
    monkeypatch.setattr(launch, "chip", lambda x: chip)
    for channels, cout in ((32, 32), (24, 72)):
        x, g, w, xs, gs = inputs(2, channels, 6, 9, "3×3", cout)
        x, g = x.to(dtype), g.to(dtype)
        w, xs, gs = w.float(), xs.float(), gs.float()
        with watched() as watch:
            fast = kernels.modulated_weight_gradients(x, g, w, xs, gs, 1, 1)
        assert not watch.outside
        own = kernels.modulated_weight_gradients_torch(x, g, w, xs, gs, 1, 1)
        truth = kernels.modulated_weight_gradients_torch(*(t.double() for t in (x, g, w, xs, gs)), 1, 1)
        for ours, theirs, exact in zip(fast, own, truth, strict=True):
            assert ours.dtype == theirs.dtype == torch.float32
            allowed = 2 * (theirs - exact).norm() + 1e-6 * exact.norm()
            assert (ours - exact).norm() <= allowed


def test_offsets_beyond_32_bits():
    """The third sample lies 2³¹ elements behind the first: memory that is asked for and never touched."""
    far = 2**30 + 64
    x = torch.empty(3 * far, dtype=torch.float16).as_strided((3, 3, 4, 5), (far, 1, 15, 3))
    x.copy_(torch.randn(x.shape))
    g = torch.empty(3 * far, dtype=torch.float16).as_strided((3, 2, 4, 5), (far, 1, 10, 2))
    g.copy_(torch.randn(g.shape))
    with watched() as watch:
        fast = kernels.weight_gradient(x, g, 3, 1, 1)
    assert not watch.outside
    truth = kernels.weight_gradient_torch(x.double(), g.double(), 3, 1, 1)
    torch.testing.assert_close(fast.double(), truth, rtol=1e-5, atol=1e-5)


def test_only_what_is_wanted_is_launched():
    """R1 and path length ask for gradients by x and the style: no sums of weights are taken for them."""
    shapes = ((2, 32, 16, 16), (2, 32, 16, 16), (32, 32, 3, 3), (2, 32), (2, 32))
    x, g, w, style, demod = (torch.empty(shape, device="meta", requires_grad=True) for shape in shapes)
    with launch.record() as launches:
        first = kernels.modulated_weight_gradients(x, g, w, style, demod, 1, 1, want=(False, True, True))
        assert [None, style.shape, demod.shape] == [t if t is None else t.shape for t in first]
        assert len(launches) == 1 and launches[0].arguments[5] is None
        for leaf, count in ((x, 0), (g, 0), (w, 2), (style, 1), (demod, 1)):
            before = len(launches)
            (found,) = torch.autograd.grad(first[1:], leaf, first[1:], retain_graph=True)
            assert found.shape == leaf.shape and len(launches) == before + count
            # which of dw, dxs and dgs each of them stores
            stored = [[t is not None for t in each.arguments[5:8]] for each in launches[before:]]
            wanted = {w: [[True, False, False]] * 2, style: [[False, True, False]], demod: [[False, False, True]]}
            assert stored == wanted.get(leaf, [])


def test_gradients_of_scales_do_not_overflow_in_half_precision():
    """Products beyond 65,504 and their sums, which fp16 would have made infinite."""
    x, g = torch.full((1, 2, 8, 8), 2000.0).half(), torch.full((1, 2, 8, 8), 30.0).half()
    scales = [torch.full((1, 2), 0.1, requires_grad=True) for _ in range(2)]
    with kernels.use_backend("torch"):
        dw = kernels.weight_gradient(x, g, 3, 1, 1, x_scale=scales[0], g_scale=scales[1])
        found = torch.autograd.grad(dw.sum(), scales)
    exact = [t.detach().double().requires_grad_() for t in scales]
    truth = kernels.weight_gradient_torch(x.double(), g.double(), 3, 1, 1, x_scale=exact[0], g_scale=exact[1])
    truth = torch.autograd.grad(truth.sum(), exact)
    assert max(t.abs().max() for t in truth) > torch.finfo(torch.float16).max
    for ours, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=0)


def test_more_samples_than_a_grid_has_room_for():
    """Samples that need programs of their own lie along the grid's second axis, which ends at 65,535."""
    x = torch.empty(70_000, 2, 4, 4, device="meta")
    scale = torch.empty(70_000, 2, device="meta")
    with launch.record() as launches:
        kernels.weight_gradient(x, x, 1, x_scale=scale)
        kernels.modulated_weight_gradients(x, x, torch.empty(2, 2, 1, 1, device="meta"), scale, None)
    assert [one.grid[1] for one in launches] == [65_535, 4_465] * 2


def on_meta(n, c, r, cout=None, dtype=torch.float16, memory_format=torch.channels_last):
    return [
        torch.empty(n, channels, r, r, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
        for channels in (c, cout or c)
    ]


def test_which_shapes_it_is_for():
    """Few channels at high resolution, in what tensor cores take, as the rule in `fits` says."""
    fits = FITS
    assert fits(*on_meta(8, 32, 1024), 3, 1, scaled=True) and fits(*on_meta(8, 64, 512), 3, 1, scaled=True)
    assert not fits(*on_meta(8, 128, 256), 3, 1, scaled=True)
    assert not fits(*on_meta(8, 32, 1024, dtype=torch.float32), 3, 1, scaled=True)
    assert not fits(*on_meta(8, 32, 1024, memory_format=torch.contiguous_format), 3, 1, scaled=True)
    assert not fits(*on_meta(8, 3, 1024, 32), 1, 1, scaled=False)
    assert not fits(*on_meta(8, 64, 8), 3, 1, scaled=True) and fits(*on_meta(8, 64, 64), 3, 1, scaled=False)


def test_workspace_is_bounded():
    """FFHQ-1024's widest layer with 64 images, whose sums take 600 MB, and its highest resolution."""
    for n, c, r in ((64, 512, 32), (8, 32, 1024)):
        scales = [torch.empty(n, c, device="meta")] * 2
        with launch.record("sm_90") as launches:
            kernels.weight_gradient(*on_meta(n, c, r), 3, 1, 1, x_scale=scales[0], g_scale=scales[1])
        assert all(each.arguments[5].nbytes <= 2**27 for each in launches)
        assert sum(each.grid[1] for each in launches) >= n and len(launches) <= 6


def test_builds_at_the_layers_of_ffhq():
    """The whole of `modulated_weight_gradients`, compiled: no spills; Hopper's matrix instruction does the work."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("wgrad_builds.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row for row in rows if row["problems"]] == []
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for row in rows:
        found = row["instructions"]
        if row["target"] == "sm_90":
            assert sum(n for name, n in found.items() if name.startswith("HGMMA.64x")) >= 12, row
            assert not any(name.startswith("HMMA") for name in found)
        if row["target"].startswith("sm_"):
            # x by 8 bytes into shared memory and the L1 cache, which its neighbours find it in; g by 16 around it
            assert found["LDGSTS.E.64"] > 0 and found["LDGSTS.E.BYPASS.128"] > 0, row


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("x must be", {"x": torch.zeros(2, 5)}),
        ("g must be a floating", {"g": torch.zeros(2, 5)}),
        ("g must be torch.float32 as x is", {"g": torch.zeros(2, 3, 8, 8).half()}),
        ("g must have shape", {"g": torch.zeros(2, 3, 4, 4)}),
        ("k must be 1 or 3", {"k": 5}),
        ("stride must be", {"stride": 3}),
        ("padding must be", {"padding": 2}),
        ("x_scale must have shape", {"x_scale": torch.zeros(2, 3)}),
        ("g_scale must have shape", {"g_scale": torch.zeros(2, 5)}),
    ],
)
def test_refusals_name_the_argument(backend, message, changes):
    arguments = {"x": torch.zeros(2, 5, 8, 8), "g": torch.zeros(2, 3, 8, 8), "k": 3, "stride": 1, "padding": 1}
    with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        kernels.weight_gradient(**(arguments | changes))
    if "scale" in message:
        names = {"x_scale": "style", "g_scale": "demod"}
        ((name, value),) = changes.items()
        more = {"weight": torch.zeros(3, 5, 3, 3), "style": None, "demod": None, names[name]: value}
        del arguments["k"]
        with kernels.use_backend(backend), pytest.raises(ValueError, match=f"{names[name]} must have shape"):
            kernels.modulated_weight_gradients(**arguments, **more)
