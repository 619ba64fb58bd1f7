"""Generators and discriminators so small that every entry of a gradient can be checked, and what their tests share."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from hsrgan.engine.model import Discriminator, Generator

ARCHITECTURES = ("skip", "orig", "resnet")
WIDTHS = {"channel_base": 128, "channel_max": 12}  # 12 channels at 4 and 8, 8 at 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and waiting threads cost minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_g(architecture="skip", c_dim=0, size=16, channels=3, **kwargs):
    torch.manual_seed(1)
    return Generator(10, c_dim, 6, size, channels, mapping_layers=2, architecture=architecture, **{**WIDTHS, **kwargs})


def make_d(architecture="resnet", c_dim=0, size=16, channels=3, **kwargs):
    torch.manual_seed(2)
    return Discriminator(c_dim, size, channels, architecture=architecture, mapping_layers=2, **{**WIDTHS, **kwargs})


@torch.no_grad()
def stir(net):
    """Move every parameter and w_avg off its initial value, so that a forgotten bias or strength shows."""
    for p in net.parameters():
        p.add_(0.3 * p.std(correction=0).clamp(min=0.5) * torch.randn_like(p))
    if isinstance(net, Generator):
        net.mapping.w_avg.normal_()
    return net


def labels(n):
    return F.one_hot(torch.arange(n) % 5, 5).double()


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-10 * max(1, expected.abs().max())


def as_function(net, forward):
    """(function of every parameter and the inputs, its parameters): what gradcheck wants."""
    names = [name for name, _ in net.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in net.parameters())

    def function(*tensors):
        weights = dict(zip(names, tensors, strict=False))
        return forward(lambda *args, **kw: functional_call(net, weights, args, kw), *tensors[len(names) :])

    return function, values
