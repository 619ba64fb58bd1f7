"""Named training configurations of StyleGAN2: the published ones and `auto`, as values for recipe keys.

Source: NVlabs/stylegan2-ada-pytorch `--cfg`. What every preset shares (z_dim = w_dim = 512, conv_clamp 256,
num_fp16_res 4, R1 every 16 steps, path length every 4, mixing .9) is the default of the recipe keys; the lazy scaling
of lr and betas is the trainer's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hsrgan.engine.sizes import Resolution, block_sizes


class _Row(NamedTuple):
    kimg: int                # thousands of real images
    batch: int               # global; the published micro-batch is batch / reference GPUs
    mbstd: int               # minibatch-std group size
    fmaps: float             # channel_base / 32768
    lr: float                # of G and of D
    gamma: float             # R1 weight
    ema_kimg: float          # half-life of the moving average
    rampup: float | None     # half-life ≤ rampup · images seen
    mapping_layers: int      # of G; D's mapping network always has 8


_PUBLISHED = {  # all made on 8 GPUs, cifar on 2
    "stylegan2": _Row(25000, 32, 4, 1, 0.002, 10, 10, None, 8),
    "paper256": _Row(25000, 64, 8, 0.5, 0.0025, 1, 20, None, 8),
    "paper512": _Row(25000, 64, 8, 1, 0.0025, 0.5, 20, None, 8),
    "paper1024": _Row(25000, 32, 4, 1, 0.002, 2, 10, None, 8),
    "cifar": _Row(100000, 64, 32, 1, 0.0025, 0.01, 500, 0.05, 2),
}
PRESETS = (*_PUBLISHED, "auto")


def _auto(size: Resolution, world_size: int, batch: int | None) -> _Row:
    """The heuristic for any size and GPU count; the formulas in the batch use the user's when it is set.

    gamma is proportional to a square's pixels, so a rectangle's count: resolution² is height·width. Batch, width and lr
    depend on how deep the networks are, so there resolution is the top block's name, 512 for 512×768.
    """
    resolution, (height, width) = max(block_sizes(size).items())
    if batch is None:
        batch = max(min(world_size * min(4096 // resolution, 32), 64), world_size)
    return _Row(
        kimg=25000,
        batch=batch,
        mbstd=max(min(batch // world_size, 4), 1),
        fmaps=1 if resolution >= 512 else 0.5,
        lr=0.002 if resolution >= 1024 else 0.0025,
        gamma=0.0002 * (height * width) / batch,
        ema_kimg=batch * 10 / 32,
        rampup=0.05,
        mapping_layers=2,
    )


def preset_values(name: str, *, resolution: Resolution, world_size: int, batch: int | None = None) -> dict[str, Any]:
    """Dotted recipe key → value of the preset `name` (one of PRESETS).

    `resolution` (a size of sizes.py), `world_size` (ranks) and `batch` (global; None: not set by the user) matter to
    `auto` only.
    """
    row = _auto(resolution, world_size, batch) if name == "auto" else _PUBLISHED[name]
    values = {
        "kimg": row.kimg,
        "batch": row.batch,
        "generator.channel_base": int(32768 * row.fmaps),
        "generator.mapping_layers": row.mapping_layers,
        "generator.lr": row.lr,
        "discriminator.channel_base": int(32768 * row.fmaps),
        "discriminator.mbstd_group_size": row.mbstd,
        "discriminator.lr": row.lr,
        "r1.gamma": row.gamma,
        "ema.kimg": row.ema_kimg,
        "ema.rampup": row.rampup,
    }
    if name == "cifar":
        # The weight is 0 and the interval stays 4: no path-length phase, yet G's learning rate keeps its factor 4/5.
        values |= {"path_length.weight": 0, "generator.mixing_prob": 0, "discriminator.architecture": "orig"}
    return values
