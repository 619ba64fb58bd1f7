"""Linear separability (LS): how well a hyperplane in latent space tells whether an image has an attribute.

StyleGAN (Karras et al., 1812.04948, §4.2): images of 200,000 latents are labelled by attribute classifiers, the half
about which a classifier is least sure is dropped, and a linear SVM is fitted from the latents to the labels of the
rest. With X the SVM's prediction and Y the classifier's label, the score is

    LS = exp(Σ_a H(Y_a | X_a)),        1 = every attribute separable, lower is better

The SVM is scikit-learn's LinearSVC (squared hinge, C = 1) and is judged on the samples that it was fitted to, as in the
authors' code. An attribute of which one side only is left is predicted perfectly: H = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from hsrgan.engine.distributed import World, sum_over_ranks
from hsrgan.engine.metrics.positions import Told, silent


def linear_separability(
    latents: np.ndarray, logits: np.ndarray, names: Sequence[str], world: World, *, keep: float = 0.5,
    told: Told = silent,
) -> dict:  # fmt: skip
    """latents [n, d] (w, or z) and the logits [n, a] of their images, positive = present → JSON-able figures.

    `ls`, `samples` (n), `kept` of them, and H in nats for each attribute as `entropies`. keep: the share that is kept.
    A collective, of which each rank fits its part of the attributes; told of those.
    """
    kept = int(len(latents) * keep)
    entropies = torch.zeros(len(names), dtype=torch.float64, device=world.device)
    for a in range(world.rank, len(names), world.size):
        surest = np.argsort(-np.abs(logits[:, a]), kind="stable")[:kept]
        entropies[a] = separation_entropy(latents[surest], logits[surest, a] > 0)
        told(1)
    values = sum_over_ranks(entropies).tolist()
    ls = math.exp(sum(values))
    return {"ls": ls, "samples": len(latents), "kept": kept, "entropies": dict(zip(names, values, strict=True))}


def separation_entropy(latents: np.ndarray, labels: np.ndarray) -> float:
    """H(Y | X) in nats of labels Y [n] (bool) given a linear SVM's prediction X of them from latents [n, d]."""
    from sklearn.svm import LinearSVC

    if labels.all() or not labels.any():
        return 0.0
    predicted = LinearSVC(random_state=0).fit(latents, labels).predict(latents)
    return conditional_entropy(predicted, labels)


def conditional_entropy(x: np.ndarray, y: np.ndarray) -> float:
    """H(Y | X) in nats of two binary variables [n] from their joint frequencies."""
    total = 0.0
    for x_value in (False, True):
        row = [np.mean((x == x_value) & (y == y_value)) for y_value in (False, True)]
        total -= sum(p * math.log(p / sum(row)) for p in row if p > 0)
    return total
