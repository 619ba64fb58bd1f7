"""Losses of StyleGAN2 as pure functions of tensors, and the schedule of the HSR weight.

Nothing here multiplies by a lazy interval or by the path-length weight: how often a phase runs is the trainer's affair.
Sources: Karras et al. 2020 (arXiv 1912.04958) for the logistic losses, R1 (Mescheder et al., arXiv 1801.04406) and path
length regularisation; Karnewar et al. 2022 (arXiv 2208.03764) for HSR.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic_g(fake_logits: Tensor) -> Tensor:
    """Non-saturating generator loss, mean softplus(−D(G(z))).  fake_logits [N, 1] → scalar."""
    return F.softplus(-fake_logits).mean()


def logistic_d_fake(fake_logits: Tensor) -> Tensor:
    """Discriminator's loss on fakes, mean softplus(D(G(z))).  fake_logits [N, 1] → scalar."""
    return F.softplus(fake_logits).mean()


def logistic_d_real(real_logits: Tensor) -> Tensor:
    """Discriminator's loss on reals, mean softplus(−D(x)).  real_logits [N, 1] → scalar."""
    return F.softplus(-real_logits).mean()


def r1_penalty(real_logits: Tensor, real_img: Tensor, gamma: float) -> Tensor:
    """R1: mean over n of (γ/2)·Σ_chw (∂ΣD(x)/∂x)².  Differentiable, so that it can be minimised.

    real_logits [N, 1] must have been computed from real_img [N, C, H, W], which requires grad and is not augmented.
    Returns a scalar in units of the logistic loss; not multiplied by the lazy interval.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_img, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean() * (gamma / 2)


def path_lengths(img: Tensor, ws: Tensor, y: Tensor) -> Tensor:
    """ℓ [N] = √(mean over ws of Σ_w (∂Σ(img·y)/∂ws)²), differentiable.

    img [N, C, H, W] must have been synthesised from ws [N, num_ws, w_dim], which requires grad (a non-leaf may);
    y [N, C, H, W] ~ N(0, 1)/√(H·W) is drawn by the caller, who decides on its seed.
    """
    (gradient,) = torch.autograd.grad((img * y).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


def path_mean(pl_mean: Tensor, mean_length: Tensor, decay: float) -> Tensor:
    """Moving average of the path length, pl_mean + decay·(mean ℓ − pl_mean).  Scalars; detach before storing."""
    return pl_mean.lerp(mean_length, decay)


def path_penalty(lengths: Tensor, pl_mean: Tensor) -> Tensor:
    """Path length penalty mean (ℓ − a)², before its weight.  lengths [N], pl_mean a scalar → scalar.

    With a = the stored mean of *before* this phase the penalty is a mean over samples, so splitting the batch over
    ranks or accumulation rounds does not change it; the stored mean is moved once, after the phase, by `path_mean`.
    NVIDIA's own moves first and differentiates through it: a = path_mean(pl_mean, lengths.mean(), 0.01), un-detached.
    """
    return (lengths - pl_mean).square().mean()


def hsr_weight(kimg: float, weight: float, start_kimg: float = 0.0, ramp_kimg: float = 0.0) -> float:
    """λ of HSR after `kimg` thousand images: 0 before start_kimg, then linear over ramp_kimg up to `weight`."""
    if kimg < start_kimg:
        return 0.0
    if ramp_kimg <= 0:
        return weight
    return weight * min((kimg - start_kimg) / ramp_kimg, 1.0)
