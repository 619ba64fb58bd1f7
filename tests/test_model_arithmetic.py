"""Generator and discriminator beside a literal fp64 reading, and their first and second gradients."""

import pytest
import torch
from literal_networks import mapping, reference_d, reference_g
from small_networks import (  # noqa: F401  (one_thread is a fixture)
    ARCHITECTURES,
    as_function,
    close,
    labels,
    make_d,
    make_g,
    one_thread,
    stir,
)

from hsrgan.engine.model import Discriminator, Generator


@pytest.mark.parametrize("c_dim", [0, 5], ids=["plain", "conditional"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator_equals_the_literal_reference(architecture, c_dim):
    clamp = 1.5  # low, so that every clamp acts
    g = stir(make_g(architecture, c_dim, conv_clamp=clamp)).double()
    z = torch.randn(3, 10, dtype=torch.float64)
    c = labels(3) if c_dim else None
    noise = torch.randn(3, 656, dtype=torch.float64)
    assert g.synthesis.noise_size == 656
    p = g.state_dict()
    w = mapping(p, z, c)
    features = {}
    ws = p["mapping.w_avg"] + 0.7 * (w - p["mapping.w_avg"])
    expected = reference_g(p, architecture, ws[:, None].repeat(1, 6, 1), noise, clamp, features)
    close(g.mapping(z, c), w[:, None].repeat(1, 6, 1))
    close(g(z, c, truncation_psi=0.7, noise=noise), expected)

    ws = torch.randn(3, 6, 6, dtype=torch.float64)  # all different: an index in the wrong place shows
    expected = reference_g(p, architecture, ws, noise, clamp, features)
    image, got = g.synthesis(ws, noise=noise, return_features=(8, 16))
    close(image, expected)
    assert sorted(got) == [8, 16]
    close(got[8], features[8])
    close(got[16], features[16])


@pytest.mark.parametrize("c_dim", [0, 5], ids=["plain", "conditional"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_equals_the_literal_reference(architecture, c_dim):
    d = stir(make_d(architecture, c_dim, conv_clamp=0.8, mbstd_group_size=3)).double()
    img = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    c = labels(6) if c_dim else None
    close(d(img, c), reference_d(d.state_dict(), architecture, img, c, 0.8, 3))
    close(d(img[:2], None if c is None else c[:2]),
          reference_d(d.state_dict(), architecture, img[:2], None if c is None else c[:2], 0.8, 3))  # fmt: skip


# ---- gradients, first and second order, against finite differences in fp64


def tiny_g(architecture, c_dim=0):
    torch.manual_seed(3)
    g = Generator(2, c_dim, 3, 8, 1, mapping_layers=1, channel_base=16, channel_max=2, architecture=architecture)
    return stir(g).double()


def tiny_d(architecture, c_dim=0):
    torch.manual_seed(4)
    d = Discriminator(
        c_dim, 8, 1, mapping_layers=1, channel_base=16, channel_max=2, architecture=architecture, mbstd_group_size=2
    )
    return stir(d).double()


def wild(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator_gradients(architecture):
    noise = torch.randn(2, 144, dtype=torch.float64)
    function, values = as_function(tiny_g(architecture), lambda g, z: g(z, noise=noise))
    inputs = (*values, wild(2, 2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_gradients(architecture):
    function, values = as_function(tiny_d(architecture), lambda d, img: d(img))
    inputs = (*values, wild(2, 1, 8, 8))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_conditional_gradients():
    c = torch.eye(2, dtype=torch.float64)
    function, values = as_function(tiny_g("skip", 2), lambda g, z: g(z, c, noise_mode="const"))
    assert torch.autograd.gradcheck(function, (*values, wild(2, 2)), fast_mode=True)
    function, values = as_function(tiny_d("resnet", 2), lambda d, img: d(img, c))
    assert torch.autograd.gradgradcheck(function, (*values, wild(2, 1, 8, 8)), fast_mode=True)


@pytest.mark.parametrize("architecture", ["resnet", "orig"])
def test_gradient_penalty_of_the_discriminator(architecture):
    img = wild(2, 1, 8, 8)

    def penalty(d):
        (grad,) = torch.autograd.grad(d(img).sum(), img, create_graph=True)
        return grad.square().sum()

    function, values = as_function(tiny_d(architecture), penalty)
    assert torch.autograd.gradcheck(function, values)


def test_path_length_of_the_generator():
    torch.manual_seed(5)
    noise = torch.randn(2, 144, dtype=torch.float64)
    y = torch.randn(2, 1, 8, 8, dtype=torch.float64) / 8
    z = torch.randn(2, 2, dtype=torch.float64)
    g = tiny_g("skip")

    class PathLength(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.g = g

        def forward(self):
            ws = self.g.mapping(z, None)
            (grad,) = torch.autograd.grad((self.g.synthesis(ws, noise=noise) * y).sum(), ws, create_graph=True)
            return (grad.square().sum(2).mean(1).sqrt() - 0.1).square().mean()

    function, values = as_function(PathLength(), lambda module: module())
    assert torch.autograd.gradcheck(function, values)
