"""The rival on a GPU: NVIDIA's networks out of a checkout of stylegan3, trained by the same four phases.

Only its interfaces are used: training.networks_stylegan2.Generator and Discriminator, whose state dicts have the keys
of ours. The phases are those of train_cpu.PlainContender, the step as it is usually written: eager, mapping and D
called for each batch, PyTorch's Adam. Its networks must give our images and logits before they are timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from hsrgan.engine.ema import update_ema
from hsrgan.engine.errors import UserError
from hsrgan.kernels import use_backend
from hsrgan.tools.stylegan3_checkout import checkout
from hsrgan.tools.train_cpu import SHARES, PlainContender
from hsrgan.tools.train_gpu import CHECKED, FREE, Probes, errors, timing, training
from hsrgan.tools.train_variants import Variant, recipe, row


class Labelled(nn.Module):
    """Their D without labels: D(images)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, img: Tensor) -> Tensor:
        return self.network(img, None)


def contender(networks: ModuleType, variant: Variant, device: torch.device) -> PlainContender:
    settings = recipe(variant)
    of_both = {"channel_base": settings.generator.channel_base, "channel_max": settings.generator.channel_max,
               "num_fp16_res": settings.generator.num_fp16_res if variant.precision == "fp16" else 0,
               "conv_clamp": settings.generator.conv_clamp}  # fmt: skip
    resolution = settings.data.resolution
    group = settings.discriminator.mbstd_group_size
    g = networks.Generator(512, 0, 512, resolution, 3, **of_both).to(device)
    d = networks.Discriminator(0, resolution, 3, **of_both, epilogue_kwargs={"mbstd_group_size": group}).to(device)
    return PlainContender(g, Labelled(d), variant.batch, resolution, device)


def check(networks: ModuleType, variant: Variant, probes: Probes) -> None:
    """UserError where their images or logits, on our weights, are further from ours in fp32 than twice plain PyTorch's
    in the same precision.
    """
    z = torch.randn(CHECKED, 512, generator=torch.Generator().manual_seed(3)).to(probes.device)
    plain = replace(variant, batch=CHECKED, hsr=False, backend="torch", graphs=False)
    found = []
    with use_backend("torch"), torch.no_grad():
        for each in (replace(plain, precision="fp32", tf32=False), plain):
            t = training(each, probes)
            img = t.generator.synthesis(t.generator.mapping(z, None), noise_mode="const")
            found.append({"images": img.cpu(), "logits": t.discriminator(img).cpu()})
        theirs = contender(networks, plain, probes.device)
        theirs.generator.load_state_dict(t.generator.state_dict())
        theirs.discriminator.network.load_state_dict(t.discriminator.state_dict())
        img = theirs.generator.synthesis(theirs.generator.mapping(z, None), noise_mode="const")
        got = errors({"images": img.cpu(), "logits": theirs.discriminator(img).cpu()}, found[0])
    own = errors(found[1], found[0])
    for name, error in got.items():
        if not error <= 2 * own[name] + 100 * FREE:  # another algorithm for every layer
            raise UserError(f"stylegan3's {name} differ from ours by {error:.1e} on the same weights: nothing timed")


def bench(path: Path, variants: list[Variant], turns: int, probes: Probes) -> Iterator[dict]:
    """A row for each model: theirs has no HSR, no switches."""
    # cuDNN as their own training has it
    tf32 = torch.backends.cudnn.allow_tf32  # what the last of ours was timed with
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32)
    with checkout(path, "training.networks_stylegan2") as (networks,), cudnn:
        for variant in {v.model: replace(v, hsr=False, backend="torch", graphs=False) for v in variants}.values():
            check(networks, variant, probes)
            theirs = contender(networks, variant, probes.device)
            average = copy.deepcopy(theirs.generator).requires_grad_(False)
            intervals = {name: round(1 / share) for name, share in SHARES.items()}

            def step(images: int, theirs=theirs, average=average, every=intervals, batch=variant.batch) -> None:
                for name, interval in every.items():
                    if images // batch % interval == 0:
                        theirs.run(name)
                update_ema(average, theirs.generator, 0.999)

            phases = {name: (lambda name=name, theirs=theirs: theirs.run(name), interval)
                      for name, interval in intervals.items()}  # fmt: skip
            timed = timing(step, phases, variant.batch, turns, probes)
            precision = "fp16" if variant.precision == "fp16" else "fp32"  # they know no bf16
            yield row(replace(variant, precision=precision), "stylegan3", **timed)
