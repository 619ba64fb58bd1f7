"""EMA half-lives against closed forms."""

import torch
from torch import nn

from hsrgan.engine.ema import ema_beta, update_ema


def test_half_life_and_rampup():
    beta = ema_beta(32, 10**9, 10.0, None)
    assert abs(beta ** (10_000 / 32) - 0.5) < 1e-12
    assert ema_beta(32, 0, 10.0, 0.05) < 1e-300  # before the first image: a plain copy
    assert abs(ema_beta(64, 1000, 500.0, 0.05) - 0.5 ** (64 / 50)) < 1e-12
    assert ema_beta(64, 10**9, 20.0, 0.05) == ema_beta(64, 10**9, 20.0, None)


def test_update_moves_parameters_and_copies_buffers():
    average, module = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        average.weight.fill_(1.0)
        module.weight.fill_(3.0)
        module.running_mean.fill_(7.0)
    update_ema(average, module, 0.75)
    assert torch.allclose(average.weight, torch.full((3,), 1.5)) and torch.equal(
        average.running_mean, module.running_mean
    )
    update_ema(average, module, 0.0)
    assert torch.equal(average.weight, module.weight)
