"""Whole training steps timed on a CPU, beside the same step in plain PyTorch: what tools/bench_train.py does there.

The four phases of StyleGAN2, each with its Adam step, weighted by their intervals: Gmain 1, Greg 1/4 (path length, half
the batch), Dmain 1, Dreg 1/16 (R1). No HSR, no loader. The rival (bench_plain.py) is NCHW with depthwise FIRs. Both get
one state dict and must agree on images, logits and gradients before anything is timed; then they take turns, so that
a change in the machine's speed meets all. The roof is a large channels_last convolution, measured in the same turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hsrgan.engine import losses
from hsrgan.engine.distributed import lazy_adam
from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.tools.bench_plain import PlainDiscriminator, PlainGenerator

SIZES = {32: (1024, 64, 16), 64: (4096, 256, 8)}  # resolution: channel_base, channel_max, batch
SHARES = {"Gmain": 1.0, "Greg": 1 / 4, "Dmain": 1.0, "Dreg": 1 / 16}
TOLERANCE = 1e-4  # of fp32 gradients against the rival's, relative to their norm


@dataclass
class Contender:
    """Two networks and the four phases of a step. z_dim = w_dim = 512 and 8 mapping layers, StyleGAN2's.

    One mapping call serves both latents of style mixing, and one pass of D fakes and reals, as in engine/phases.py.
    """

    generator: nn.Module
    discriminator: nn.Module
    batch: int
    resolution: int
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.g_adam = self.adam(self.generator, 4)
        self.d_adam = self.adam(self.discriminator, 16)
        self.reals = torch.rand(self.batch, 3, self.resolution, self.resolution, device=self.device) * 2 - 1
        self.pl_mean = torch.zeros([], device=self.device)

    def adam(self, network: nn.Module, interval: int) -> torch.optim.Adam:
        return lazy_adam(network.parameters(), 0.0025, 0.0, 0.99, 1e-8, interval)

    def latents(self, n: int) -> Tensor:
        return torch.randn(n, 512, device=self.device)

    def map_pair(self, n: int) -> tuple[Tensor, ...]:
        return self.generator.mapping(self.latents(2 * n), None).chunk(2)

    def logistic_d(self, fakes: Tensor) -> None:
        fake_logits, real_logits = self.discriminator(torch.cat([fakes, self.reals]), parts=2).chunk(2)
        (losses.logistic_d_fake(fake_logits) + losses.logistic_d_real(real_logits)).backward()

    def images(self, n: int) -> tuple[Tensor, Tensor]:
        first, second = self.map_pair(n)
        half = first.shape[1] // 2
        ws = torch.cat([first[:, :half], second[:, half:]], dim=1)
        return self.generator.synthesis(ws), ws

    def g_main(self) -> None:
        losses.logistic_g(self.discriminator(self.images(self.batch)[0])).backward()

    def g_reg(self) -> None:
        img, ws = self.images(self.batch // 2)
        lengths = losses.path_lengths(img, ws, torch.randn_like(img) / self.resolution)
        penalty = losses.path_penalty(lengths, self.pl_mean)
        self.pl_mean = losses.path_mean(self.pl_mean, lengths.mean(), 0.01).detach()
        (4 * 2 * penalty).backward()

    def d_main(self) -> None:
        with torch.no_grad():
            fakes = self.images(self.batch)[0]
        self.logistic_d(fakes)

    def d_reg(self) -> None:
        reals = self.reals.detach().requires_grad_(True)
        (16 * losses.r1_penalty(self.discriminator(reals), reals, 1.0)).backward()

    def run(self, phase: str) -> None:
        of_g = phase.startswith("G")
        self.generator.requires_grad_(of_g)
        self.discriminator.requires_grad_(not of_g)
        adam = self.g_adam if of_g else self.d_adam
        adam.zero_grad(set_to_none=True)
        {"Gmain": self.g_main, "Greg": self.g_reg, "Dmain": self.d_main, "Dreg": self.d_reg}[phase]()
        adam.step()


class PlainContender(Contender):
    """The step as usually written: mapping and D are called once for each batch, and Adam is PyTorch's default."""

    def adam(self, network: nn.Module, interval: int) -> torch.optim.Adam:
        ratio = interval / (interval + 1)
        return torch.optim.Adam(network.parameters(), lr=0.0025 * ratio, betas=(0.0, 0.99**ratio), eps=1e-8)

    def map_pair(self, n: int) -> tuple[Tensor, ...]:
        mapping = self.generator.mapping
        return mapping(self.latents(n), None), mapping(self.latents(n), None)

    def logistic_d(self, fakes: Tensor) -> None:
        losses.logistic_d_fake(self.discriminator(fakes)).backward()
        losses.logistic_d_real(self.discriminator(self.reals)).backward()


def ours(resolution: int, half_dtype: torch.dtype | None) -> Contender:
    base, most, batch = SIZES[resolution]
    # every resolution that may be half precision is: 8 and above
    widths = {"channel_base": base, "channel_max": most, "num_fp16_res": 9, "half_dtype": half_dtype}
    widths["conv_clamp"] = 256 if half_dtype else None  # as the recipes have it, and the plain form
    return Contender(
        Generator(img_resolution=resolution, **widths), Discriminator(0, resolution, **widths), batch, resolution
    )


def plain(resolution: int) -> Contender:
    base, most, batch = SIZES[resolution]
    widths = {"channel_base": base, "channel_max": most}
    return PlainContender(
        PlainGenerator(img_resolution=resolution, **widths),
        PlainDiscriminator(resolution, **widths),
        batch,
        resolution,
    )


def check_agreement(mine: Contender, rival: Contender) -> float:
    """Largest relative difference of images, logits and all gradients of G and D on one batch.

    Noise is the constant buffers' (and given a strength), so that both see the same.
    """
    with torch.no_grad():
        for name, parameter in rival.generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.1)
    mine.generator.load_state_dict(rival.generator.state_dict())
    mine.discriminator.load_state_dict(rival.discriminator.state_dict())
    z = torch.randn(mine.batch, 512)
    found = []
    for contender in (mine, rival):
        g, d = contender.generator.requires_grad_(True), contender.discriminator.requires_grad_(True)
        img = g.synthesis(g.mapping(z, None), noise_mode="const")
        logits = d(img)
        parameters = sorted([*g.named_parameters(prefix="G"), *d.named_parameters(prefix="D")])
        gradients = torch.autograd.grad(losses.logistic_g(logits), [p for _, p in parameters])
        found.append([img.detach(), logits.detach(), torch.cat([x.flatten() for x in gradients])])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


class FlopCount(TorchDispatchMode):
    """Adds up the convolutions and matrix products run inside; FlopCounterMode itself refuses inner gradients."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops_of_step(contender: Contender) -> float:
    """Multiplications and additions of one weighted step, second derivatives included."""
    total = 0.0
    for phase, share in SHARES.items():
        with FlopCount() as counter:
            contender.run(phase)
        total += share * counter.total
    return total


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def roof(dtype: torch.dtype) -> Callable[[], float]:
    """A call that measures the FLOP/s of a 3×3 convolution of 256 channels at 64×64, batch 8, channels_last."""
    x = torch.randn(8, 256, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    flops = 2 * 8 * 64 * 64 * 256 * 256 * 9

    def measure() -> float:
        with torch.no_grad():
            return flops / seconds(lambda: torch.nn.functional.conv2d(x, w, padding=1))

    return measure


def bench(resolution: int, turns: int, console: Console) -> list[dict]:
    """Rows for the plain form, fp32 and bf16 at one resolution."""
    torch.manual_seed(0)
    contenders = {"plain fp32": plain(resolution), "fp32": ours(resolution, None)}
    difference = check_agreement(contenders["fp32"], contenders["plain fp32"])
    if not difference < TOLERANCE:
        raise UserError(f"at {resolution} the networks differ from the plain form by {difference:.1e}: nothing timed")
    contenders["bf16"] = ours(resolution, torch.bfloat16)
    # counted on the plain form: its gradients are PyTorch's own, so every convolution is seen
    flops = flops_of_step(contenders["plain fp32"])
    roofs = {"fp32": roof(torch.float32), "bf16": roof(torch.bfloat16)}
    best = dict.fromkeys(roofs, 0.0)
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in SHARES} for name in contenders}
    for turn in track(range(turns + 1), f"{resolution}×{resolution}", console=console, transient=True):
        for name, contender in contenders.items():
            for phase in SHARES:
                elapsed = seconds(lambda c=contender, p=phase: c.run(p))
                if turn:  # the first turn warms up
                    times[name][phase].append(elapsed)
        for name, measure in roofs.items():
            best[name] = max(best[name], measure())
    rows = []
    for name, of_phase in times.items():
        steps = sorted(
            sum(share * of_phase[phase][turn] for phase, share in SHARES.items()) for turn in range(turns)
        )
        median = statistics.median(steps)
        rows.append({
            "resolution": resolution,
            "form": name,
            "batch": contenders[name].batch,
            "step_s": {"p20": steps[turns // 5], "p50": median, "p80": steps[turns * 4 // 5]},
            "phase_ms": {phase: 1000 * statistics.median(values) for phase, values in of_phase.items()},
            "img_s": contenders[name].batch / median,
            "gflop_s": flops / median / 1e9,
            "roof_gflop_s": best["bf16" if name == "bf16" else "fp32"] / 1e9,
            "agreement": difference,
        })  # fmt: skip
    for row in rows:
        row["ratio"] = rows[0]["step_s"]["p50"] / row["step_s"]["p50"]
        row["roof_share"] = row["gflop_s"] / row["roof_gflop_s"]
    return rows


def print_rows(rows: list[dict], console: Console) -> None:
    table = Table("size", "form", "img/s", "ratio", "step ms (p20–p80)", "GFLOP/s", "of the roof", *SHARES)
    for row in rows:
        low, middle, high = (1000 * row["step_s"][p] for p in ("p20", "p50", "p80"))
        table.add_row(
            f"{row['resolution']}", row["form"], f"{row['img_s']:.1f}", f"{row['ratio']:.2f}",
            f"{middle:.0f} ({low:.0f}–{high:.0f})", f"{row['gflop_s']:.0f}",
            f"{row['roof_share']:.0%} of {row['roof_gflop_s']:.0f}",
            *(f"{value:.0f} ms" for value in row["phase_ms"].values()),
        )  # fmt: skip
    console.print(table)
