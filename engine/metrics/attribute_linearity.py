"""Attribute linearity score (ALS): how straight an attribute's logit runs while an edit runs from t = 0 to t = 1.

The released code of HSR (arXiv 2208.03764; val-iisc/HSR, ALS/). With ℓ[n, t, a] the logit of attribute a in frame t of
sequence n, t = 0, 0.1, …, 1:

    σ_a      = standard deviation (over N, not N − 1) of ℓ[·, ·, a]
    δ[n,t,a] = ((1 − t)·ℓ[n,0,a] + t·ℓ[n,1,a] − ℓ[n,t,a]) / σ_a
    m[t,a]   = mean_n |δ[n,t,a]|        ALS_a = Σ_t m[t,a]²        ALS = mean_a ALS_a        0 = linear, lower is better

σ_a is a model's own, so a model whose attributes vary more may look straighter; `shared_sigma` gives the σ_a to use for
all models of a comparison. Logits may be [n, t, a], or [n, g, t, a] for g sequences that start at the same place: the
formula takes n·g sequences, the bootstrap draws n groups. All in fp64; an attribute that never changes scores NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hsrgan.engine.errors import UserError


def spread(logits: Tensor) -> Tensor:
    """σ [a] of logits [..., t, a] over everything but the attribute."""
    return logits.double().flatten(0, -2).std(0, correction=0)


def shared_sigma(logits: Sequence[Tensor]) -> Tensor:
    """One σ [a] for the logits of several models: over all their frames together."""
    return spread(torch.cat([model.double().flatten(0, -2) for model in logits]))


def deviation(logits: Tensor) -> Tensor:
    """The chord minus the logits [..., t, a]: δ before it is divided by σ."""
    logits = logits.double()
    t = torch.linspace(0, 1, logits.shape[-2], dtype=torch.float64, device=logits.device)[:, None]
    return (1 - t) * logits[..., :1, :] + t * logits[..., -1:, :] - logits


def curve(logits: Tensor, sigma: Tensor | None = None) -> Tensor:
    """m [t, a] of logits [..., t, a]. sigma [a]: by default the logits' own."""
    mean = deviation(logits).abs().flatten(0, -3).mean(0)
    return mean / (spread(logits) if sigma is None else sigma)


def attribute_linearity_score(logits: Tensor, sigma: Tensor | None = None) -> Tensor:
    """ALS [a] of logits [n, t, a] (or [n, g, t, a]). sigma [a]: by default the logits' own."""
    return curve(logits, sigma).square().sum(0)


def nonlinearity(logits: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Σ_t δ² [..., a] of each sequence of logits [..., t, a]: tells the straightest from the most bent."""
    return (deviation(logits) / (spread(logits) if sigma is None else sigma)).square().sum(-2)


def bootstrap(logits: Tensor, sigma: Tensor | None = None, *, seed: int, draws: int = 1000) -> Tensor:
    """ALS [draws, a] of as many resamples, with replacement, of the n sequences (or groups) of logits.

    σ is taken anew from each resample, unless `sigma` [a] is given. A function of the logits and the seed.
    """
    n = len(logits)
    centred = logits.double() - logits.double().flatten(0, -2).mean(0)
    groups = centred.reshape(n, -1, *logits.shape[-2:])
    bends = deviation(groups).abs().mean(1)
    first, second = groups.mean((1, 2)), groups.square().mean((1, 2))
    generator = np.random.Generator(np.random.Philox(seed))
    scores = []
    for start in range(0, draws, 100):  # a hundred at a time: their weights are [100, n]
        chosen = generator.integers(n, size=(min(100, draws - start), n))
        weights = torch.from_numpy(np.stack([np.bincount(row, minlength=n) for row in chosen])).double() / n
        mean = (weights @ bends.flatten(1)).unflatten(1, bends.shape[1:])
        if sigma is None:
            variance = weights @ second - (weights @ first).square()
        else:
            variance = sigma.double().square()
        scores.append(mean.square().sum(1) / variance)
    return torch.cat(scores)


def linearity(
    logits: Tensor, names: Sequence[str], sigma: Tensor | None = None, *, seed: int = 0, draws: int = 1000
) -> dict:
    """Everything about one model and one kind of sequence, JSON-able: ALS with its bootstrap 95 % interval, the mean
    over attributes first, then for each: als, interval, sigma, and the curve m over t.

    Raises `UserError` for an attribute whose logit is the same in all frames.
    """
    sigma_used = spread(logits) if sigma is None else sigma
    if still := [name for name, value in zip(names, sigma_used.tolist(), strict=True) if not value > 0]:
        raise UserError(f"attribute {still[0]} is the same in all frames, so it has no linearity: leave it out")
    scores, resampled = attribute_linearity_score(logits, sigma), bootstrap(logits, sigma, seed=seed, draws=draws)
    low, high = _interval(resampled)
    curves = curve(logits, sigma)
    attributes = {
        name: {
            "als": scores[a].item(),
            "interval": [low[a].item(), high[a].item()],
            "sigma": sigma_used[a].item(),
            "curve": curves[:, a].tolist(),
        }
        for a, name in enumerate(names)
    }
    mean_low, mean_high = _interval(resampled.mean(1))
    return {
        "als": scores.mean().item(),
        "interval": [mean_low.item(), mean_high.item()],
        "sequences": logits.shape[:-2].numel(),
        "attributes": attributes,
    }


def _interval(resampled: Tensor) -> Tensor:
    """The middle 95 % of resampled scores [draws, …]: [2, …]."""
    return resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
