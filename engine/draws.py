"""Random numbers as a function of (seed, phase, position): however a global batch is split over ranks and rounds,
every image gets the same ones.

A *position* is the number of the image in the run's endless sequence (the count of images seen before it). Latents
and labels come from a counter-based generator on the host, whose counter is (kind, position, phase); the large fields
(layer noise, path-length directions) too on a CPU, and from a generator of the device, seeded per image, elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hsrgan.engine.labels import ClassCounts, LabelSets

_LATENT, _BATCH, _NOISE, _DIRECTION, _UNIFORM, _AUGMENT, _PIXEL = range(7)


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Of the host's, on the device. A copy out of memory that is not pinned would first wait for the GPU."""
    if device.type == "cuda" and values.numel():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Latents(NamedTuple):
    """What one pass of G starts from: z and the second z of style mixing [n, z_dim], labels of 0 and 1
    [n, num_classes], all float32.
    """

    z: torch.Tensor
    z_mix: torch.Tensor
    c: torch.Tensor


class Draws:
    """Every draw of a training run.

    seed: the recipe's. device: where the results go. class_counts: images per class, or per set of classes, of the
    dataset; a label is that of a random dataset item.
    """

    def __init__(self, seed: int, device: torch.device, class_counts: ClassCounts = ()):
        self.seed, self.device = seed, device
        if isinstance(class_counts, LabelSets):
            self._num_classes, self._labels, counts = class_counts.num_classes, class_counts.sets, class_counts.counts
        else:
            self._num_classes, counts = len(class_counts), class_counts
            self._labels = [(i,) for i in range(self._num_classes)]
        self._ends = np.cumsum(counts) if counts else None
        self._device_generator = torch.Generator(device) if device.type != "cpu" else None

    def _host(self, kind: int, phase: int, position: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, 0], counter=[0, kind, position, phase]))

    def latents(self, phase: int, positions: Sequence[int], z_dim: int) -> Latents:
        z = np.empty((2, len(positions), z_dim), np.float32)
        c = np.zeros((len(positions), self._num_classes), np.float32)
        for row, position in enumerate(positions):
            generator = self._host(_LATENT, phase, position)
            z[:, row] = generator.standard_normal((2, z_dim), np.float32)
            if self._ends is not None:
                drawn = np.searchsorted(self._ends, generator.integers(self._ends[-1]), side="right")
                c[row, list(self._labels[drawn])] = 1
        z, c = (sent(torch.from_numpy(values), self.device) for values in (z, c))
        return Latents(z[0], z[1], c)

    def mixing_cutoff(self, phase: int, position: int, num_ws: int, probability: float) -> int:
        """First index of `ws` that takes the second z, one for the whole global batch that begins at `position`;
        `num_ws` means none.

        StyleGAN2 (arXiv 1912.04958) mixes per micro-batch; a draw per global batch keeps a run independent of how it
        is split.
        """
        generator = self._host(_BATCH, phase, position)
        return int(generator.integers(1, num_ws)) if generator.random() < probability and num_ws > 1 else num_ws

    def uniform(self, phase: int, positions: Sequence[int]) -> torch.Tensor:
        """Uniform in [0, 1), [n] fp64."""
        values = [self._host(_UNIFORM, phase, position).random() for position in positions]
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def noise(self, phase: int, positions: Sequence[int], size: int) -> torch.Tensor:
        """Standard normal [n, size]: the noise of all layers of G, a row an image."""
        return self._field(_NOISE, phase, positions, size)

    def directions(self, phase: int, positions: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Standard normal [n, *shape]: the random image directions y of the path-length penalty."""
        return self._field(_DIRECTION, phase, positions, int(np.prod(shape))).view(len(positions), *shape)

    def augmentation(self, phase: int, positions: Sequence[int], uniform: int, normal: int) -> torch.Tensor:
        """[n, uniform + normal] float32: so many numbers in [0, 1), then so many standard normal ones."""
        rows = np.empty((len(positions), uniform + normal), np.float32)
        for row, position in zip(rows, positions, strict=True):
            generator = self._host(_AUGMENT, phase, position)
            row[:uniform] = generator.random(uniform, np.float32)
            row[uniform:] = generator.standard_normal(normal, np.float32)
        return sent(torch.from_numpy(rows), self.device)

    def pixels(self, phase: int, positions: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Standard normal [n, *shape]: the noise that augmentation adds to an image."""
        return self._field(_PIXEL, phase, positions, int(np.prod(shape))).view(len(positions), *shape)

    def _field(self, kind: int, phase: int, positions: Sequence[int], size: int) -> torch.Tensor:
        if self._device_generator is None:
            return torch.from_numpy(
                np.stack([self._host(kind, phase, p).standard_normal(size, np.float32) for p in positions])
            )
        field = torch.empty(len(positions), size, device=self.device)
        for row, position in zip(field, positions, strict=True):
            seed = np.random.SeedSequence([self.seed, kind, phase, position]).generate_state(1, np.uint64)[0]
            row.normal_(generator=self._device_generator.manual_seed(int(seed)))
        return field


def interleaved(count: int, group: int) -> list[int]:
    """The order in which a micro-batch of consecutive images goes through D so that its minibatch-std groups are runs
    of `group` consecutive images.

    D's group n is the samples n, n + count/group, … (StyleGAN2); with this order a group never straddles a split of
    the global batch.
    """
    return [first * group + member for member in range(group) for first in range(count // group)]
