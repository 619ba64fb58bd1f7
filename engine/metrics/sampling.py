"""The images that metrics see: reals, each once, and fakes, every one a function of (seed, position).

Networks run on whole units (`positions`), so that an image comes out, and is seen, the same for any number of ranks and
any batch size.
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
from hsrgan.engine.metrics.fp32 import exact_fp32
from hsrgan.engine.metrics.positions import UNIT, firsts, share_of
from hsrgan.engine.model import Generator
from hsrgan.engine.shards import Manifest

STREAM = 5  # of the draws: 0–3 are the phases', 4 the sample grid's
PIXELS = 2**19  # that G makes at a time: its activations at 256² then stay near 1 GB


def fakes(generator: Generator, draws: Draws, count: int, batch: int, world: World) -> Iterator[tuple[Tensor, int]]:
    """Units (uint8 [UNIT, C, H, W] on the generator's device, first position) of this rank; the last may pass count.

    ψ 1, random noise, labels as `draws` has them. Raises `UserError` as `synthesised`.
    """
    for first in firsts(count, batch, world):
        positions = range(first, first + UNIT)
        latents = draws.latents(STREAM, positions, generator.z_dim)
        noise = draws.noise(STREAM, positions, generator.synthesis.noise_size)
        ws = generator.mapping(latents.z, latents.c)
        yield torch.cat([quantised(images) for images in synthesised(generator, ws, noise)]), first


def synthesised(generator: nn.Module, ws: Tensor, noise: Tensor) -> Iterator[Tensor]:
    """Images [n, C, H, W] of ws [N, num_ws, w_dim], n after n; each row of noise [M, noise_size] is that of N/M ws in
    turn. N is a multiple of UNIT, and n a function of the resolution alone: the rounding may depend on it.

    Raises `UserError` for an image that is not finite.
    """
    _, height, width = generator.img_shape
    piece = UNIT
    while piece > 4 and piece * height * width > PIXELS:
        piece //= 2
    each = len(ws) // len(noise)
    for start in range(0, len(ws), piece):
        of = torch.arange(start, start + piece, device=noise.device) // each
        images = generator.synthesis(ws[start : start + piece], noise=noise[of])
        if not images.isfinite().all():
            raise UserError("the model makes images that are not finite: its training has diverged, score an earlier "
                            "snapshot")
        yield images


def quantised(images: Tensor) -> Tensor:
    """Images in about [−1, 1] as grey levels, rounded down as published figures have it, uint8."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def reals(manifest: Manifest, count: int, batch: int, world: World, workers: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Units (uint8 [UNIT, C, H, W] on the host, first position) of this rank, unflipped; the last may pass count.

    The order is shuffled, a function of the images alone: shards in another order, or another folder, change nothing,
    and the first count positions are a random subset. What lies beyond the last image repeats earlier ones.
    """
    in_order = dataclasses.replace(manifest, shards=tuple(sorted(manifest.shards, key=lambda shard: shard.sha256)))
    share = share_of(batch)
    stream = open_stream(
        in_order, seed=0, start=0, global_batch=share * world.size, rank=world.rank, world=world.size, workers=workers,
        pinned=world.device.type == "cuda",
    )  # fmt: skip
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
    parameters = [p for module in modules for p in module.parameters()]
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), exact_fp32(parameters[0].device):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = flags
        np.random.set_state(numpy)
        random.setstate(python)
