"""Whole training steps timed on a GPU: the trainer's own phases (engine/phases.py) under a plain Adam, no loader.

A cycle is the steps after which the phases' turns repeat (16); a step is a cycle's share, lazy phases, draws, Adam and
the averaged G included, synchronised only at a cycle's ends. Contenders follow one another: two do not fit a GPU's
memory at 1024×1024. First of all every one must give the images and gradients of plain PyTorch in fp32, as nearly as
plain PyTorch in the same precision does.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hsrgan.engine.ema import update_ema
from hsrgan.engine.errors import UserError
from hsrgan.engine.graphs import Cuda, Graphs, direct
from hsrgan.engine.phases import Phase, build_phases, rounds, run_phase
from hsrgan.engine.run_state import Training
from hsrgan.engine.tensor_files import one_line
from hsrgan.kernels import launch, use_backend
from hsrgan.tools.plain_training import plain_training, random_teacher, run_step
from hsrgan.tools.train_variants import HSR_LAYERS, Variant, recipe, row

CHECKED = 4  # images of a check
FREE = 1e-5  # of the norm: fp32 sums of millions of terms in another order


class Probes(Protocol):
    """How a device is watched: seconds until all work of run is done, bytes at its peak, kernels and host launches."""

    device: torch.device

    def seconds(self, run: Callable[[], Any]) -> float: ...
    def peak(self, run: Callable[[], Any]) -> int: ...
    def launches(self, run: Callable[[], Any]) -> tuple[int, int]: ...
    def caller(self, graphs: bool) -> Callable[..., Any]: ...


class Gpu:
    """The probes of the current GPU."""

    device = torch.device("cuda")

    def seconds(self, run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def peak(self, run: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def launches(self, run: Callable[[], Any]) -> tuple[int, int]:
        # the runtime's calls are among CUDA's activities; the CPU's would be hundreds of thousands of events more
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        on_gpu = host = 0
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                on_gpu += not event.name.startswith(("Memcpy", "Memset"))
            else:  # cudaLaunchKernel, cuLaunchKernelEx, cudaGraphLaunch, and HIP's of the same names
                host += "LaunchKernel" in event.name or "GraphLaunch" in event.name
        return on_gpu, host

    def caller(self, graphs: bool) -> Callable[..., Any]:
        return Graphs(Cuda(), _refuse) if graphs else direct


def _refuse(line: str) -> None:
    """A benchmark of graphs that fall back would time something else."""
    raise UserError(f"{line}: nothing timed")


def training(variant: Variant, probes: Probes) -> Training:
    """Biases and noise strengths are moved off zero, so that a wrong one shows. Sets tf32 as the variant has it."""
    launch.allow_tf32(variant.tf32)
    launch.sum_in_fp32()
    with torch.device(probes.device):
        torch.manual_seed(1)
        teachers = {"hsr": random_teacher(HSR_LAYERS)} if variant.hsr else {}
    if probes.device.type == "cuda":
        for teacher in teachers.values():
            teacher.to_bf16()
    t = plain_training(recipe(variant), probes.device, teachers)
    with torch.no_grad():
        for parameter in (*t.g.parameters, *t.d.parameters):
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    t.call = probes.caller(variant.graphs)
    return t


def reals_of(t: Training) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = (t.recipe.batch, t.recipe.data.channels, *[t.recipe.data.resolution] * 2)
    reals = torch.rand(size, generator=generator) * 2 - 1
    device = t.world.device
    return reals.to(device, memory_format=torch.channels_last), torch.zeros(len(reals), 0, device=device)


def results(variant: Variant, probes: Probes) -> dict[str, Tensor]:
    """Images of G, and every phase's gradients as one vector, fp32, on the host."""
    t = training(variant, probes)
    reals, labels = reals_of(t)
    found = {}
    with use_backend(variant.backend):
        for phase in build_phases(t):
            other = t.d if phase.network == "G" else t.g
            other.module.requires_grad_(False)
            (batch,) = rounds(phase, t, 0, reals, labels)
            if phase.name == "Gmain":
                with torch.no_grad():
                    found["images"] = t.generator.synthesis(t.styles(batch), noise=batch.noise).flatten().cpu()
            gradients, _ = t.call(phase.name, phase.gradients, batch)
            found[phase.name] = torch.cat([g.flatten() for g in gradients if g is not None]).cpu()
            other.module.requires_grad_(True)
    return found


def check(variant: Variant, known: dict[Variant, dict[str, Any]], probes: Probes) -> str:
    """ "" if the variant's images and gradients are as near the truth as twice plain PyTorch's own; else what is not.

    known: the truth, and plain PyTorch's errors, of those that have been checked.
    """
    small = replace(variant, batch=CHECKED)
    plain = replace(small, backend="torch", graphs=False)
    if plain not in known:
        truth = results(replace(plain, precision="fp32", tf32=False), probes)
        known[plain] = errors(results(plain, probes), truth) | {"truth": truth}
    free()
    for name, error in errors(results(small, probes), known[plain]["truth"]).items():
        allowed = 2 * known[plain][name] + FREE
        if not error <= allowed:
            return f"{variant.name}: {name} is off by {error:.1e} (relative), allowed is {allowed:.1e}"
    return ""


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth}


def measure(variant: Variant, turns: int, probes: Probes) -> dict:
    """The row of one variant."""
    t = training(variant, probes)
    phases, (reals, labels) = build_phases(t), reals_of(t)
    average = copy.deepcopy(t.generator).requires_grad_(False)

    def step(images: int) -> None:
        run_step(t, phases, images, reals, labels)
        update_ema(average, t.generator, 0.999)

    def alone(phase: Phase) -> Callable[[], None]:
        return lambda: run_phase(phase, t, 0, reals, labels)

    with use_backend(variant.backend):
        timed = timing(step, {p.name: (alone(p), p.interval) for p in phases}, variant.batch, turns, probes)
    return row(variant, **timed)


def timing(step: Callable[[int], None], phases: dict[str, tuple[Callable[[], None], int]], batch: int, turns: int,
           probes: Probes) -> dict[str, float]:  # fmt: skip
    """Columns of a row: step(images) one whole step, phases {name: (run it alone, interval)}."""
    steps = math.lcm(*(interval for _, interval in phases.values()))

    def cycle() -> None:
        for i in range(steps):
            step(i * batch)

    peak = probes.peak(cycle)  # the first cycle also compiles and records
    seconds = sorted(probes.seconds(cycle) / steps for _ in range(turns))
    alone = {name: statistics.median(probes.seconds(run) for _ in range(5)) for name, (run, _) in phases.items()}
    kernels, host = probes.launches(cycle)
    middle = statistics.median(seconds)
    rest = max(0.0, middle - sum(alone[name] / interval for name, (_, interval) in phases.items()))
    return {
        "img_s": batch / middle, "step_p20": seconds[turns // 5], "step_p50": middle,
        "step_p80": seconds[turns * 4 // 5], **alone, "rest": rest, "peak_bytes": peak,
        "kernels_per_step": math.ceil(kernels / steps), "host_launches_per_step": math.ceil(host / steps),
        "timed": True,
    }  # fmt: skip


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bench(variants: list[Variant], turns: int, probes: Probes, say: Callable[[str], None]) -> Iterator[dict]:
    """A row for each variant that is right; say takes a line for each that is not, or that fails."""
    known: dict[Variant, dict[str, Any]] = {}
    for variant in variants:
        found = None
        try:
            complaint = check(variant, known, probes)
            found = None if complaint else measure(variant, turns, probes)
        except (RuntimeError, UserError) as error:  # what a GPU refuses, want of memory included; a refused recording
            complaint = f"{variant.name}: {one_line(error)}"
        if found is None:
            say(f"not timed: {complaint}")
        else:
            yield found
        free()
