"""Whole networks on the Triton backend, interpreted, against PyTorch: every penalty that training takes."""

from collections import Counter

import pytest
import torch

from hsrgan import kernels
from hsrgan.engine import losses
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.kernels import launch

WIDTHS = {"channel_base": 32, "channel_max": 4, "mapping_layers": 1}


@pytest.fixture(scope="module")
def networks():
    return build(16)


@pytest.fixture(scope="module")
def small_networks():
    return build(8)


@pytest.fixture(scope="module")
def rectangles():
    return build([12, 8], 4)


def build(size, channels=3):
    torch.manual_seed(0)
    g = Generator(6, 0, 6, size, channels, **WIDTHS, conv_clamp=0.8).double()
    d = Discriminator(0, size, channels, **WIDTHS, mbstd_group_size=2, conv_clamp=2.0).double()
    heads = HSRHeads({8: g.synthesis.channels[8]}, {8: 5}, hidden=6).double()
    with torch.no_grad():
        for p in [*g.parameters(), *d.parameters()]:
            p.add_(0.2 * torch.randn_like(p))  # no bias or noise strength stays zero
    return g, d, heads


def g_main(g, d, heads, z, noise, reals):
    img, features = g.synthesis(g.mapping(z, None), noise=noise, return_features=(8,))
    target = torch.linspace(-1, 1, 2 * 5 * 9, dtype=img.dtype).reshape(2, 5, 3, 3)
    return losses.logistic_g(d(img)) + heads.loss(features, {8: target}), (g, heads)


def path_length(g, d, heads, z, noise, reals):
    ws = g.mapping(z, None)
    img = g.synthesis(ws, noise=noise)
    return losses.path_penalty(losses.path_lengths(img, ws, reals / 16), torch.tensor(0.1)), (g,)


def d_main(g, d, heads, z, noise, reals):
    return losses.logistic_d_real(d(reals)), (d,)


def r1(g, d, heads, z, noise, reals):
    reals = reals.detach().requires_grad_()
    return losses.r1_penalty(d(reals), reals, 1.0), (d,)


@pytest.mark.parametrize("phase", [g_main, path_length, d_main, r1], ids=lambda phase: phase.__name__)
def test_every_phase_has_the_gradients_of_pytorch(networks, phase, monkeypatch):
    launched = equal_on_both_backends(networks, phase, monkeypatch)
    # each block of G ends in one pass, forward and backward; to_rgb's own kernels make second derivatives at most
    blocks = len(networks[0].synthesis.resolutions) if phase in (g_main, path_length) else 0
    assert launched["bias_act_to_rgb_triton.forward"] == launched["bias_act_to_rgb_triton.gradient"] == blocks
    assert (launched["to_rgb_triton.gradient"] > 0) == (phase is path_length)


@pytest.mark.parametrize("phase", [g_main, path_length, r1], ids=lambda phase: phase.__name__)
def test_every_phase_has_the_gradients_of_pytorch_with_the_gemm(small_networks, phase, monkeypatch):
    with kernels.use_convolution("gemm"):
        launched = equal_on_both_backends(small_networks, phase, monkeypatch)
    assert launched["conv_gemm_triton.conv_gemm"] > 0 and launched["conv_wgrad_triton.wgrad_kernel"] > 0
    assert launched["bias_act_to_rgb_triton.forward"] == 0  # the GEMM writes conv1's features finished


@pytest.mark.parametrize(
    ("phase", "convolution"), [(g_main, "gemm"), (path_length, "library"), (r1, "gemm")],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_rectangles_of_four_channels_have_the_gradients_of_pytorch(rectangles, phase, convolution, monkeypatch):
    """12×8 from a start block of 6×4: HSR's head reads 12×8, to_rgb and fromrgb have an alpha beside the colours."""
    with kernels.use_convolution(convolution):
        launched = equal_on_both_backends(rectangles, phase, monkeypatch)
    assert (launched["conv_gemm_triton.conv_gemm"] > 0) == (convolution == "gemm")


def equal_on_both_backends(networks, phase, monkeypatch):
    """Compare loss and gradients; how often each kernel was launched."""
    g, d, heads = networks
    torch.manual_seed(1)
    z, noise = torch.randn(2, 6).double(), torch.randn(2, g.synthesis.noise_size).double()
    reals = torch.randn(2, *g.img_shape).double()
    found, launched = [], Counter()

    def counted(kernel, *arguments, **options):
        launched[f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"] += 1
        return run(kernel, *arguments, **options)

    run = launch.run
    monkeypatch.setattr(launch, "run", counted)
    for backend in ("torch", "triton"):
        with kernels.use_backend(backend):
            loss, trained = phase(g, d, heads, z, noise, reals)
            parameters = [p for net in trained for p in net.parameters()]
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        found.append([loss.detach(), *gradients])
    for truth, triton in zip(*found, strict=True):
        torch.testing.assert_close(triton, truth, rtol=1e-9, atol=1e-9 * float(found[0][0].abs() + 1))
    assert sum(float(x.abs().sum()) > 0 for x in found[0]) > len(found[0]) / 2
    return launched
