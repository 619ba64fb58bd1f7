"""The images that metrics see: reals, each once, and fakes, every one a function of (seed, position).

Positions are dealt to ranks in units of `features.UNIT` images, and networks run on whole units, so that an image
comes out, and is seen, the same for any number of ranks and any batch size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hsrgan.engine.data import open_stream
from hsrgan.engine.distributed import World
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.features import UNIT, firsts, share_of
from hsrgan.engine.model import Generator
from hsrgan.engine.shards import Manifest
from hsrgan.kernels import launch

STREAM = 5  # of the draws: 0–3 are the phases', 4 the sample grid's
PIXELS = 2**19  # that G makes at a time: its activations at 256² then stay near 1 GB


def fakes(generator: Generator, draws: Draws, count: int, batch: int, world: World) -> Iterator[tuple[Tensor, int]]:
    """Units (uint8 [UNIT, C, R, R] on the generator's device, first position) of this rank; the last may pass count.

    ψ 1, random noise, labels as `draws` has them. Raises `UserError` for an image that is not finite.
    """
    piece = max(4, min(UNIT, PIXELS // generator.img_resolution**2))
    for first in firsts(count, batch, world):
        latents = draws.latents(STREAM, range(first, first + UNIT), generator.z_dim)
        images = []
        for start in range(0, UNIT, piece):
            noise = draws.noise(STREAM, range(first + start, first + start + piece), generator.synthesis.noise_size)
            rows = slice(start, start + piece)
            images.append(generator(latents.z[rows], latents.c[rows], noise=noise))
        unit = torch.cat(images)
        if not unit.isfinite().all():
            raise UserError(
                f"the generator makes images that are not finite (seed {draws.seed}, position {first} and after): "
                "its training has diverged, score an earlier snapshot"
            )
        yield quantised(unit), first


def quantised(images: Tensor) -> Tensor:
    """Images in about [−1, 1] as grey levels, rounded down as published figures have it, uint8."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def reals(manifest: Manifest, count: int, batch: int, world: World, workers: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Units (uint8 [UNIT, C, R, R] on the host, first position) of this rank, unflipped; the last may pass count.

    The order is shuffled, a function of the images alone: shards in another order, or another folder, change nothing,
    and the first count positions are a random subset. What lies beyond the last image repeats earlier ones.
    """
    in_order = dataclasses.replace(manifest, shards=tuple(sorted(manifest.shards, key=lambda shard: shard.sha256)))
    share = share_of(batch)
    stream = open_stream(
        in_order, seed=0, start=0, global_batch=share * world.size, rank=world.rank, world=world.size, workers=workers
    )
    with contextlib.closing(stream):
        for first in firsts(count, batch, world):
            at = first % share  # every share begins at a multiple of its length
            if at == 0:
                images, _ = next(stream)
            yield images[at : at + UNIT], first


def content_sha256(manifest: Manifest) -> str:
    """Names the images whatever folder they are in and whatever order their shards have."""
    return hashlib.sha256("\n".join(sorted(shard.sha256 for shard in manifest.shards)).encode()).hexdigest()


def fp32_copy(generator: Generator) -> Generator:
    """A copy that computes in fp32 throughout, as a snapshot's generator does, in eval mode on the same device."""
    device = next(generator.parameters()).device
    copy = Generator(**generator.init_kwargs).to(device)
    copy.load_state_dict(generator.state_dict())
    return copy.eval().requires_grad_(False)


@contextlib.contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """A training run that is scored in here goes on as if it had not been: random states and flags are put back.

    Inside: no gradients, full fp32, convolutions chosen without timing them (or two ranks might choose differently).
    """
    devices = sorted({p.device.index for module in modules for p in module.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    tf32, matmul = launch.tf32_allowed(), torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    launch.allow_tf32(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, True, False
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags
        torch.backends.cuda.matmul.allow_tf32 = matmul
        launch.allow_tf32(tf32)
        np.random.set_state(numpy)
        random.setstate(python)
