"""Losses as pure functions of tensors, and the schedule of the HSR weight.

Nothing here multiplies by a lazy interval or by the path-length weight: how often a phase runs is the trainer's affair.
Sources: Karras et al. 2020 (arXiv 1912.04958) for the logistic losses, R1 (Mescheder et al., arXiv 1801.04406) and path
length regularisation; Lim & Ye 2017 (arXiv 1705.02894) for the hinge losses, as SAGAN (arXiv 1805.08318, eq. 4) has
them; Huang et al. 2024 (R3GAN, arXiv 2501.05441) for the relativistic pairing loss with R1 and R2; Karnewar et al. 2022
(arXiv 2208.03764) for HSR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


def hinge_g(fake_logits: Tensor) -> Tensor:
    """Generator loss, −mean D(G(z)).  fake_logits [N, …] → scalar."""
    return -fake_logits.mean()


def hinge_d_fake(fake_logits: Tensor) -> Tensor:
    """Discriminator's loss on fakes, mean max(0, 1 + D(G(z))).  fake_logits [N, …] → scalar."""
    return F.relu(1 + fake_logits).mean()


def hinge_d_real(real_logits: Tensor) -> Tensor:
    """Discriminator's loss on reals, mean max(0, 1 − D(x)).  real_logits [N, …] → scalar."""
    return F.relu(1 - real_logits).mean()


def relativistic_g(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Generator loss, mean softplus(−(D(G(z)) − D(x))).  Both [N, 1], row n of each a pair → scalar.

    The paper writes both losses as one min-max of f(D(G(z)) − D(x)) with f(t) = −log(1 + exp(−t)), eq. 2; these two are
    its non-saturating form, which its experiments use.
    """
    return F.softplus(real_logits - fake_logits).mean()


def relativistic_d(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Discriminator's loss, mean softplus(−(D(x) − D(G(z)))).  Both [N, 1], row n of each a pair → scalar."""
    return F.softplus(fake_logits - real_logits).mean()


class Adversarial(NamedTuple):
    """A loss of two players. g and d take fake and real logits; g's real ones are None unless it is `paired`."""

    g: Callable[[Tensor, Tensor | None], Tensor]
    d: Callable[[Tensor, Tensor], Tensor]
    paired: bool = False


ADVERSARIAL = {
    "logistic": Adversarial(
        lambda fake, real: logistic_g(fake), lambda fake, real: logistic_d_fake(fake) + logistic_d_real(real)
    ),
    "hinge": Adversarial(
        lambda fake, real: hinge_g(fake), lambda fake, real: hinge_d_fake(fake) + hinge_d_real(real)
    ),
    "relativistic": Adversarial(relativistic_g, relativistic_d, paired=True),
}


def r1_penalty(real_logits: Tensor, real_img: Tensor, gamma: float) -> Tensor:
    """R1: mean over n of (γ/2)·Σ_chw (∂ΣD(x)/∂x)².  Differentiable, so that it can be minimised.  Of fakes it is R2.

    real_logits [N, 1] must have been computed from real_img [N, C, H, W], which requires grad and is not augmented.
    Returns a scalar in units of the adversarial loss; not multiplied by the lazy interval.
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
