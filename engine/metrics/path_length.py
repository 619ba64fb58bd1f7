"""Perceptual path length (PPL): how far the image moves, to a perceptual distance, for a small step in latent space.

StyleGAN (Karras et al., 1812.04948, §4.1) and StyleGAN2 (1912.04958, appendix C):

    PPL = E[ d(G(x(t)), G(x(t + ε))) / ε² ],    ε = 1e-4

x(t): between two mapped latents in W, w0 + t·(w1 − w0), or on the great circle between two latents in Z; t uniform in
[0, 1) ("full") or 0 ("end"); no truncation. Both halves of a pair have the same layer noise and labels. Of all pairs,
those from the 1st (rounded down) to the 99th percentile (rounded up) are averaged. Images are neither clamped nor
quantised; from 512² on they are averaged down to 256², a rectangle by its smaller side. All but `ppl2_wend` see the
middle of a face only.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsrgan.engine.alpha import over_grey
from hsrgan.engine.distributed import World
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import ClassCounts
from hsrgan.engine.metrics.fp32 import exact_fp32
from hsrgan.engine.metrics.positions import Told, all_rows, silent
from hsrgan.engine.metrics.sampling import synthesised

EPSILON = 1e-4
SIDE = 256  # pixels that larger images are averaged to
_STREAM = 32  # of the draws; a run's own are below


class Protocol(NamedTuple):
    """space: w or z; full: t uniform, else 0; crop: rows 3/8 to 7/8 and columns 2/8 to 6/8 only."""

    space: str
    full: bool
    crop: bool


PROTOCOLS = {
    "ppl2_wend": Protocol("w", full=False, crop=False),
    "ppl_wfull": Protocol("w", full=True, crop=True),
    "ppl_zfull": Protocol("z", full=True, crop=True),
    "ppl_wend": Protocol("w", full=False, crop=True),
    "ppl_zend": Protocol("z", full=False, crop=True),
}


def path_length(distances: Tensor) -> float:
    """PPL from the distances [n] of all pairs, in any order: the mean of the 1st to the 99th percentile, inclusive."""
    values = np.sort(distances.double().cpu().numpy())
    low, high = np.percentile(values, 1, method="lower"), np.percentile(values, 99, method="higher")
    return float(values[(values >= low) & (values <= high)].mean())


@torch.no_grad()
def path_distances(
    generator: nn.Module,
    distance: Callable[[Tensor, Tensor], Tensor],
    name: str,
    *,
    count: int,
    seed: int,
    world: World,
    class_counts: ClassCounts = (),
    told: Told = silent,
) -> Tensor:
    """d/ε² of all pairs, fp64 [count] on the CPU, for `path_length`. A collective.

    generator: an fp32 Generator in eval mode. distance: images a, b [N, 3, H, W] in about [−1, 1], grey ones repeated
    to three channels → [N]; all is computed with TF32 off. name: a key of PROTOCOLS. class_counts: of the data set, for
    labels. told of pairs.

    Raises `UserError` for a generator in half precision, or images that are not finite.
    """
    space, full, crop = PROTOCOLS[name]
    refuse_half(generator, name)
    draws = Draws(seed, world.device, class_counts)

    def distances(positions: range) -> Tensor:
        latents = draws.latents(_STREAM, positions, generator.z_dim)
        noise = draws.noise(_STREAM, positions, generator.synthesis.noise_size)
        t = draws.uniform(_STREAM, positions) if full else torch.zeros(len(positions), device=draws.device).double()
        if space == "w":
            ends = [generator.mapping(z, latents.c) for z in (latents.z, latents.z_mix)]
        halves = []
        for at in (t, t + EPSILON):
            if space == "w":
                ws = ends[0].double().lerp(ends[1].double(), at[:, None, None]).to(ends[0].dtype)
            else:
                ws = generator.mapping(slerp(latents.z.double(), latents.z_mix.double(), at[:, None]), latents.c)
            halves.append(torch.cat([_seen(images, crop) for images in synthesised(generator, ws, noise)]))
        d = distance(*halves)
        if d.shape != (len(positions),):
            raise ValueError(f"distance must give [{len(positions)}] for as many pairs, gave {list(d.shape)}")
        return d

    with exact_fp32(world.device):
        return all_rows(count, (), world, distances, told).double() / EPSILON**2


def _seen(images: Tensor, crop: bool) -> Tensor:
    """What of images [N, C, H, W] the distance is shown."""
    images = over_grey(images)
    height, width = images.shape[2:]
    if crop:
        images = images[:, :, 3 * height // 8 : 7 * height // 8, 2 * width // 8 : 6 * width // 8]
    if min(height, width) >= 2 * SIDE:
        images = F.avg_pool2d(images, min(height, width) // SIDE)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The point at t of the great circle through a and b [N, D], of unit length: 0 is a's direction, 1 is b's."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    cosine = (a * b).sum(1, keepdim=True)
    angle = t * torch.acos(cosine.clamp(-1, 1))
    across = F.normalize(b - cosine * a, dim=1)
    return a * angle.cos() + across * angle.sin()


def refuse_half(generator: nn.Module, name: str) -> None:
    """Raise `UserError` where parameters, buffers or activations of `generator` are below fp32."""
    found = {tensor.dtype for tensor in chain(generator.parameters(), generator.buffers())}
    found |= {module.half_dtype for module in generator.modules() if getattr(module, "half_dtype", None)}
    for dtype in found & {torch.bfloat16, torch.float16}:
        short = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{name} needs fp32 and the generator computes in {short}: at ε = 1e-4 its rounding would be measured "
            "instead (bfloat16 inflates the score some 360 times, float16 11 times); score the saved snapshot, "
            "which is fp32, or sampling.fp32_copy of the averaged generator"
        )
