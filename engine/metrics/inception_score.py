"""Inception Score (Salimans et al., arXiv 1606.03498), streamed: no logit is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from hsrgan.engine.distributed import sum_over_ranks
from hsrgan.engine.metrics.inception import LOGITS

SPLITS = 10


class InceptionScore:
    """exp of the mean over x of KL(p(y|x) ‖ p(y)), over `count` images in ten consecutive splits."""

    def __init__(self, count: int, device: torch.device | str, classes: int = LOGITS) -> None:
        self.edges = [i * count // SPLITS for i in range(SPLITS + 1)]
        self.sums = torch.zeros(SPLITS, classes + 2, dtype=torch.float64, device=device)  # Σp, Σp·log p, count

    def add(self, logits: Tensor, first: int) -> None:
        """logits [n, classes] of the positions first … first + n − 1."""
        for i, sums in enumerate(self.sums):
            part = logits[max(self.edges[i] - first, 0) : max(self.edges[i + 1] - first, 0)].double()
            if len(part):
                log_p = part.log_softmax(1)
                p = log_p.exp()
                sums[:-2] += p.sum(0)
                sums[-2] += (p * log_p).sum()
                sums[-1] += len(part)

    def reduce(self) -> tuple[float, float]:
        """Mean and population standard deviation over the splits. A collective; call it once, after the last `add`."""
        sums = sum_over_ranks(self.sums)
        count = sums[:, -1:]
        marginal = sums[:, :-2] / count
        scores = (sums[:, -2] / count[:, 0] - torch.xlogy(marginal, marginal).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()
