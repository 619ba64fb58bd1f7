"""One block of G and one of D: images, gradients, path length and R1 the same on both backends."""

import pytest
import torch

from hsrgan import kernels
from hsrgan.engine.blocks import DiscriminatorBlock, SynthesisBlock

pytest.importorskip("triton")


def results(backend):
    """By name, in fp64: what the blocks return, and the gradients of a loss, of path length and of R1."""
    torch.manual_seed(0)
    options = {"img_channels": 3, "conv_clamp": 256, "half_dtype": None}
    g = SynthesisBlock(6, 4, w_dim=8, resolution=8, architecture="skip", is_last=True, **options).double()
    d = DiscriminatorBlock(4, 6, architecture="resnet", is_first=True, **options).double()
    for layer in g.layers:
        layer.noise_strength.data.fill_(0.3)
    x, image = torch.randn(2, 6, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    x = x.contiguous(memory_format=torch.channels_last)
    ws = [torch.randn(2, 8).double().requires_grad_() for _ in range(3)]
    noises = [torch.randn(2, 1, 8, 8).double() for _ in range(2)]
    parameters = {f"G {k}": p for k, p in g.named_parameters()} | {f"D {k}": p for k, p in d.named_parameters()}
    found = {}

    def gradients(loss, what):
        for name, t in zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True):
            found[f"{what}: {name}"] = t

    with kernels.use_backend(backend):
        found["features"], found["image"] = features, image = g(x, image, ws, noises)
        found["D"], _ = d(None, image)
        gradients(found["D"].sin().sum() + features.cos().sum(), "loss")
        _, image = g(x, torch.zeros_like(image[:, :, ::2, ::2]), ws, noises)
        slopes = torch.autograd.grad((image * image.detach().cos()).sum(), ws, create_graph=True)
        gradients(sum(slope.square().mean() for slope in slopes), "path length")
        real = image.detach().requires_grad_()
        (slope,) = torch.autograd.grad(d(None, real)[0].tanh().sum(), real, create_graph=True)
        gradients(slope.square().sum(), "R1")
    return found


def test_blocks_penalties_and_all():
    expected, found = results("torch"), results("triton")
    for name, t in expected.items():
        if t is None or found[name] is None:
            assert t is None and found[name] is None, f"{name}: a gradient on one backend only"
        else:
            torch.testing.assert_close(found[name], t, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
