"""Pictures of a trained generator: latents by seed, and images of any latents, made batch by batch.

What a seed gives is the same in every tool, and the same as in NVIDIA's: z = RandomState(seed).randn(1, z_dim).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.report import Bars
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import to_uint8

MAX_SEED = 2**32 - 1  # of NumPy's RandomState
BATCH = 16
MOST_SEEDS = 10_000_000
MOST_PSI = 100.0

NoiseRows = Callable[[Sequence[int]], Tensor]  # numbers of pictures → their noise [n, noise_size]


class Noise(str, enum.Enum):
    """What is added in every synthesis layer."""

    random = "random"
    const = "const"
    none = "none"


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """`0-3,10` → [0, 1, 2, 3, 10]. Raises `UserError` for anything else, and for seeds beyond 2³² − 1."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"{option} {text}: {part.strip()!r} is not a number or a range; write it like 0-63,100")
        low, high = int(first), int(last or first)
        if not low <= high <= MAX_SEED:
            raise UserError(f"{option} {text}: {part.strip()} must rise, and end at {MAX_SEED} or before")
        if len(seeds) + high - low >= MOST_SEEDS:
            raise UserError(f"{option} {text}: these are more than {MOST_SEEDS:,} seeds; take them in parts")
        seeds.extend(range(low, high + 1))
    return seeds


def check_memory(samples: int, size: int) -> None:
    """Raise `UserError` where `--samples` of so many bytes each do not fit into what memory is free."""
    free = psutil.virtual_memory().available
    if samples * size > free:
        raise UserError(f"--samples {samples}: so many take {samples * size / 2**30:,.1f} GiB, and {free / 2**30:.1f} "
                        f"GiB of memory are free; give {free // size} or less")


def check_psi(psi: float) -> None:
    """Raise `UserError` for a --psi that is no number, or far outside of all that gives pictures."""
    if not abs(psi) <= MOST_PSI:  # so that NaN fails
        raise UserError(f"--psi {psi:g}: give a number from {-MOST_PSI:g} to {MOST_PSI:g}; 1 = none, 0 = the average")


def place(generator: Generator) -> Generator:
    """On the GPU where there is one, else on the CPU."""
    return generator.to("cuda" if torch.cuda.is_available() else "cpu")


def draw(seeds: Sequence[int], generator: Generator) -> tuple[Tensor, Tensor]:
    """z [N, z_dim] fp32 and a class for each [N] int64 (0 where the model has none), a function of the seed alone.

    z is NVIDIA's. The class is uniform, the next draw of the same stream.
    """
    streams = [np.random.RandomState(seed) for seed in seeds]
    z = np.concatenate([stream.randn(1, generator.z_dim) for stream in streams])
    classes = [stream.randint(max(generator.c_dim, 1)) for stream in streams]
    return torch.from_numpy(z).float(), torch.tensor(classes)


def layer_noise(seeds: Sequence[int], generator: Generator) -> Tensor:
    """[N, noise_size] fp32, a function of the seed alone: a sample does not depend on the others in its batch."""
    size = generator.synthesis.noise_size
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def ws_of_seeds(
    generator: Generator,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    psi: float = 1.0,
    cutoff: int | None = None,
    batch: int = BATCH,
) -> Tensor:
    """ws [N, num_ws, w_dim] on the CPU. labels: classes [N] int64 or c [N, c_dim]; by default drawn from each seed."""
    device = next(generator.parameters()).device
    found = []
    for start in range(0, len(seeds), batch):
        z, c = draw(seeds[start : start + batch], generator)
        if labels is not None:
            c = labels[start : start + batch]
        if generator.c_dim and c.ndim == 1:
            c = torch.nn.functional.one_hot(c, generator.c_dim).float()
        c = c.to(device) if generator.c_dim else None
        found.append(generator.mapping(z.to(device), c, truncation_psi=psi, truncation_cutoff=cutoff).cpu())
    return torch.cat(found)


def truncated(generator: Generator, ws: Tensor, psi: float, cutoff: int | None) -> Tensor:
    """`Mapping.truncated` of ws on the CPU, wherever the generator lives."""
    return generator.mapping.truncated(ws.to(generator.mapping.w_avg.device), psi, cutoff).cpu()


@torch.inference_mode()
def images_of(
    generator: Generator,
    ws: Tensor,
    *,
    noise_mode: str = "const",
    noise: NoiseRows | None = None,
    batch: int = BATCH,
) -> Iterator[Tensor]:
    """Images of ws [N, num_ws, w_dim], uint8 [n, C, H, W] on the CPU, `batch` at a time where the generator lives.

    noise gives each picture's, in place of what `noise_mode` says.
    """
    device = next(generator.parameters()).device
    mode = noise_mode if noise is None else "random"
    for start in range(0, len(ws), batch):
        part = ws[start : start + batch].to(device)
        rows = None if noise is None else noise(range(start, start + len(part))).to(device)
        yield to_uint8(generator.synthesis(part, noise_mode=mode, noise=rows)).cpu()


def generate(
    generator: Generator,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    psi: float = 1.0,
    cutoff: int | None = None,
    noise_mode: str = "random",
    batch: int = BATCH,
) -> Tensor:
    """The images of `seeds`, uint8 [N, C, H, W] on the CPU; labels as for `ws_of_seeds`. Shows progress."""
    ws = ws_of_seeds(generator, seeds, labels, psi=psi, cutoff=cutoff, batch=batch)
    noise = (lambda at: layer_noise([seeds[i] for i in at], generator)) if noise_mode == "random" else None
    with Bars() as bars:
        return torch.cat(list(told(images_of(generator, ws, noise_mode=noise_mode, noise=noise, batch=batch), bars,
                                   "sampling", len(ws))))  # fmt: skip


def told(images: Iterator[Tensor], bars: Bars, text: str, total: int) -> Iterator[Tensor]:
    """Pass batches on, and tell `bars` of every image."""
    done = 0
    bars(text, done, total)
    for part in images:
        done += len(part)
        bars(text, done, total)
        yield part
