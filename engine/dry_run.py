"""What a recipe would do, told without doing it: `dry_run: true` in a recipe, or dry_run=true on the command line.

Networks, data and engines are the run's own, init_from is read and what the run would refuse is refused, and some real
steps are taken and timed; but run_dir is not touched, and what was trained is thrown away.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from hsrgan.engine import assembly, checkpoint, distributed, graphs
from hsrgan.engine.aside import check_writable
from hsrgan.engine.config import Recipe, check_paths, check_same_networks
from hsrgan.engine.draws import sent
from hsrgan.engine.ema import update_ema
from hsrgan.engine.errors import UserError
from hsrgan.engine.faults import Preemption
from hsrgan.engine.freezing import frozen_parameters
from hsrgan.engine.peers import AGAIN, Peers
from hsrgan.engine.phases import Phase, build_phases, rounds, run_phase
from hsrgan.engine.power_ema import part_name
from hsrgan.engine.rendezvous import before_meeting
from hsrgan.engine.run_state import GeneratorWithHeads, Training
from hsrgan.engine.scoring import scorer_of
from hsrgan.engine.shards import Manifest

PROBE_STEPS = 20
FP32 = 4  # bytes of a value: parameters, gradients, moments and averages are all fp32
STAGES = (0, 1, 2, 3)

Call = tuple[int, Callable[[int], object]]  # every so many steps; what is then called with the step's number


class Bytes(NamedTuple):
    """Of one value: of a parameter, its gradient, Adam's two moments, and the copy of it that DeepSpeed's sharded
    optimisers step, from stage 1 on, in fp32 too.
    """

    parameter: int = FP32
    gradient: int = FP32
    moments: int = 2 * FP32
    master: int = FP32


def model_states(count: float, stage: int, ranks: int, size: Bytes = Bytes()) -> dict[str, float]:  # noqa: B008
    """Bytes on one rank of `count` trained parameters and what goes with them, by their kind.

    Source: ZeRO, arXiv 1910.02054, §3 and figure 1: stage 1 shares out the optimiser's state, 2 the gradients too, and
    3 the parameters too.
    """
    return {
        "parameters": size.parameter * count / (ranks if stage == 3 else 1),
        "gradients": size.gradient * count / (ranks if stage >= 2 else 1),
        "adam": count * (size.moments + size.master) / ranks if stage else count * size.moments,
    }


def memory(recipe: Recipe, networks: dict[str, int], ranks: int, fixed: int) -> list[dict[str, float]]:
    """For each ZeRO stage, bytes on one rank by kind, without activations.

    networks: trained parameters of G with its heads ("G") and of D ("D"); "average": values of G's state dict. fixed:
    bytes of the teacher, of the metrics' networks and of both networks' buffers.

    whole: this trainer takes a phase's derivatives itself, so that the gradients of the network that it steps are there
    whole, and once more as they are handed over; from stage 1 on again in the buffer that is reduced, which stage 3
    keeps for both; and under stage 3 both networks' parameters are gathered for a phase.
    """
    trained, largest = networks["G"] + networks["D"], max(networks["G"], networks["D"])
    rows = []
    for stage in STAGES:
        row = model_states(trained, stage, ranks)
        row["whole"] = FP32 * (2 * largest + (0, largest, largest, 2 * trained)[stage])
        row["averages"] = FP32 * networks["average"] * (1 + len(recipe.ema.power))
        row["teacher, buffers"] = fixed
        rows.append(row)
    return rows


def disk(recipe: Recipe, networks: dict[str, int], buffers: int) -> dict[str, int]:
    """Bytes in run_dir at the end, of `memory`'s networks and so many values in buffers of G and D. Pictures and logs
    are not counted; while one is written, a checkpoint more is there.
    """
    images, powers = total_images(recipe), len(recipe.ema.power)
    with_moments = 3 * (networks["G"] + networks["D"])
    one = FP32 * (with_moments + buffers + (1 + powers) * networks["average"])
    written = moments(images, recipe.batch, recipe.checkpoint_kimg)
    kept = {*written[-recipe.keep_checkpoints :]}
    if recipe.keep_every_kimg:
        for due in moments(images, recipe.batch, recipe.keep_every_kimg):
            kept.add(min(moment for moment in written if moment >= due))
    extra = 1 if recipe.metrics else 0  # that of the best score
    snapshot, snapshots = FP32 * networks["average"], len(moments(images, recipe.batch, recipe.snapshot_kimg))
    return {
        "checkpoint": one,
        "checkpoints": one * (min(len(kept) + extra, len(written)) + 1),
        "snapshots": snapshot * (snapshots + extra),
        "power averages": snapshot * snapshots * powers,
    }


def moments(images: int, batch: int, every_kimg: float) -> list[int]:
    """Images seen when something is done that is done every so many kimg, after a whole step, and at the end."""
    every = every_kimg * 1000
    return sorted({images, *(math.ceil(k * every / batch) * batch for k in range(1, int(images / every) + 1))})


def total_images(recipe: Recipe) -> int:
    """That the run will have seen at its end: whole steps."""
    return -(-round(recipe.kimg * 1000) // recipe.batch) * recipe.batch


def mean_seconds(
    calls: dict[str, Call], steps: int, clock: Callable[[], float], each: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Seconds of one call of each, the mean over `steps` steps. The first call of each, which compiles, is not counted;
    what has had no second one by then is called once more. each: called after every step.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}

    def call(name: str, step: int) -> None:
        began = clock()
        calls[name][1](step)
        spent[name].append(clock() - began)

    for step in range(steps):
        for name, (interval, _) in calls.items():
            if step % interval == 0:
                call(name, step)
        each()
    for name, times in spent.items():
        if len(times) == 1:
            call(name, 0)
    return {name: sum(times[1:]) / len(times[1:]) for name, times in spent.items()}


def seconds_per_step(calls: dict[str, Call], means: dict[str, float]) -> float:
    """Of the mean step: a lazy phase counts by its interval."""
    return sum(means[name] / interval for name, (interval, _) in calls.items())


@contextlib.contextmanager
def leaving_as_told() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end this process from inside, as Ctrl-C does, so that what is there for a while goes too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in Preemption.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def dataset(recipe: Recipe) -> Iterator[tuple[Manifest | None, str]]:
    """The run's data and where it lies, the built-in digits in a folder that is gone afterwards. None where it is not
    there, and why, if the networks can do without: they have no labels. What is there and the run would refuse is
    refused.
    """
    with tempfile.TemporaryDirectory(prefix="hsrgan-") if recipe.data.builtin else contextlib.nullcontext("") as folder:
        try:
            found = assembly.dataset(recipe.data, folder), recipe.data.shards or recipe.data.builtin
        except UserError as error:
            if recipe.data.labels or os.path.exists(str(recipe.data.shards)):
                raise
            found = None, f"noise, because {error}"
        yield found


class Activations:
    """A context that adds up what autograd keeps for the backward passes inside, each memory once; `bytes`."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._seen = {p.untyped_storage().data_ptr() for m in modules for p in (*m.parameters(), *m.buffers())}
        self._kept: list[torch.Tensor] = []
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor.detach())  # alive, or its address could be another's
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> Activations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self._kept.clear()


def probe(
    t: Training, manifest: Manifest | None, average: nn.Module, clock: Callable[[], float], console: Console
) -> dict[str, Any]:
    """Take real steps, such as the run's last ones (HSR is on there). Every rank calls it."""
    recipe, world, phases = t.recipe, t.world, build_phases(t)
    first = max(total_images(recipe) // recipe.batch - PROBE_STEPS, 0) * recipe.batch
    cuda = world.device.type == "cuda"
    t.call = graphs.caller(recipe.cuda_graphs, world, recipe.zero_stage, lambda text: None)
    stream = assembly.stream(recipe, world, manifest, first) if manifest else _noise(t, average)
    now: list[torch.Tensor] = []

    def load(step: int) -> None:
        reals, labels = next(stream)
        now[:] = assembly.to_float(reals, world.device), sent(labels[:, : t.generator.c_dim], world.device)

    def run(phase: Phase) -> Callable[[int], None]:
        return lambda step: run_phase(phase, t, first + step * recipe.batch, *now)

    def averages(step: int) -> None:
        moved = t.g.moved()
        with distributed.gathered(t.g):
            for _ in range(1 + len(recipe.ema.power)):
                update_ema(average, t.generator, 0.999, moved)

    calls: dict[str, Call] = {"data": (1, load)}
    calls |= {phase.name: (phase.interval, run(phase)) for phase in phases} | {"averages": (1, averages)}

    def finished() -> float:
        if cuda:
            torch.cuda.synchronize(world.device)
        return clock()

    columns = [TextColumn("probe"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()]
    with contextlib.closing(stream), Progress(*columns, console=console, disable=not world.first) as progress:
        task = progress.add_task("probe", total=PROBE_STEPS)
        means = mean_seconds(calls, PROBE_STEPS, finished, lambda: progress.advance(task))
        found = {"seconds": means, "seconds_per_step": seconds_per_step(calls, means)}
        if cuda:
            found["peak"] = int(distributed.max_over_ranks(t.scalar(torch.cuda.max_memory_allocated())))
        else:
            found["activations"] = max(_kept(phase, t, first, *now) for phase in phases)
    return found


def _noise(t: Training, generator: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches such as `open_stream`'s, of no images, for networks without labels."""
    with torch.no_grad():
        shape = generator(torch.zeros(1, generator.z_dim, device=t.world.device), None).shape[1:]
    count = t.recipe.batch // t.world.size
    while True:
        yield torch.randint(256, (count, *shape), dtype=torch.uint8), torch.zeros(count, 0)


def _kept(phase: Phase, t: Training, images: int, reals: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes of the activations of one round."""
    other = t.d if phase.network == "G" else t.g
    other.module.requires_grad_(False)
    with distributed.gathered(t.g, t.d):
        batch = next(rounds(phase, t, images, reals, labels))
        with Activations([t.g.module, t.d.module, *t.teachers.values()]) as kept:
            phase.gradients(batch)
    other.module.requires_grad_(True)
    return kept.bytes


def dry_run(recipe: Recipe, world: distributed.World, clock: Callable[[], float] = time.perf_counter) -> None:
    """Print tables and, as the last line, the same figures as JSON (bytes and seconds). Every rank calls it."""
    console = Console(highlight=False, quiet=not world.first)
    if not console.is_terminal:
        console.width = 120
    with leaving_as_told(), contextlib.ExitStack() as stack:
        with before_meeting(world.rank, world.size):
            check_paths(recipe, data=False)
            manifest, where = stack.enter_context(dataset(recipe))
            check_writable(Path(recipe.run_dir), make=False)
        if manifest is None:
            console.print(f"data: {where}")  # now, and not after the steps: it may be a slip of the pen
        distributed.start(world, recipe.faults.rendezvous_timeout)
        with Peers(world, recipe.faults.rank_timeout, AGAIN):
            figures = _measured(recipe, world, manifest, where, clock, console)
            for table in tables(figures):
                console.print(table)
            if world.first:
                print(json.dumps(figures), flush=True)
            distributed.stop()


def _measured(
    recipe: Recipe, world: distributed.World, manifest: Manifest | None, where: str, clock: Callable[[], float],
    console: Console,
) -> dict[str, Any]:
    """The figures, from networks and engines as the run would have them. A collective."""
    generator, discriminator, heads, teachers = assembly.networks(recipe, manifest, world)
    counts = {"G": numel(generator), "D": numel(discriminator), "heads": numel(heads)}
    values = {"G": nbytes(generator.state_dict().values()) // FP32}
    values["D"] = nbytes(discriminator.state_dict().values()) // FP32
    networks = {"G": counts["G"] + counts["heads"], "D": counts["D"], "average": values["G"]}
    of_teachers = {v.data_ptr(): v for teacher in teachers.values() for v in teacher.state_dict().values()}
    scorer = scorer_of(recipe, manifest, world, generator) if recipe.metrics else None  # as the run holds it
    scoring = [v for net in scorer.extractors.values() for v in net.state_dict().values()] if scorer else []
    fixed = [*generator.buffers(), *discriminator.buffers(), *of_teachers.values(), *scoring]
    figures = {
        "data": where, "parameters": counts, **_schedule(recipe, world), "zero_stage": recipe.zero_stage,
        "device": world.device.type, "memory": memory(recipe, networks, world.size, nbytes(fixed)),
        "disk": disk(recipe, networks, values["G"] - counts["G"] + values["D"] - counts["D"]),
    }  # fmt: skip
    average = copy.deepcopy(generator).requires_grad_(False).eval()
    g_module = GeneratorWithHeads(generator, heads)
    frozen = frozen_parameters(recipe.freeze, g_module, discriminator)
    if resumed := checkpoint.resume_point(recipe.run_dir, world):
        check_same_networks(json.dumps(resumed.state["recipe"]), recipe, checkpoint=resumed.path)
        resumed = resumed if recipe.hsr else resumed.without_heads()
        for part, module in {"G": g_module, "D": discriminator, "G_ema": average}.items():
            resumed.fill(part, module)
        for length in recipe.ema.power:
            resumed.fill(part_name(length), copy.deepcopy(average))
    else:
        assembly.first_values(recipe, world, manifest, g_module, discriminator, average, frozen, keep=False)
    t = assembly.training(recipe, world, manifest, g_module, discriminator, teachers, frozen)
    figures |= probe(t, manifest, average, clock, console)
    if "peak" in figures:
        figures["activations"] = max(figures["peak"] - sum(figures["memory"][recipe.zero_stage].values()), 0)
    figures["img_s"] = recipe.batch / figures["seconds_per_step"]
    figures["hours"] = (figures["steps"] - figures["done"]) * figures["seconds_per_step"] / 3600
    return figures


def _schedule(recipe: Recipe, world: distributed.World) -> dict[str, int | float]:
    images = total_images(recipe)
    folders = checkpoint.checkpoint_folders(recipe.run_dir)
    done = min(int(folders[-1].name), images) // recipe.batch if folders else 0
    return {
        "ranks": world.size, "batch": recipe.batch, "micro_batch": recipe.batch // world.size // recipe.accumulation,
        "steps": images // recipe.batch, "images": images, "kimg": images / 1000, "done": done,
    }  # fmt: skip


def numel(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module else 0


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def tables(figures: dict[str, Any]) -> Iterator[Table]:
    """The figures for people."""
    what = Table(title="what would run", show_header=False, title_justify="left")
    what.add_row("data", figures["data"])
    for name, count in figures["parameters"].items():
        what.add_row(f"parameters of {name}", f"{count:,}")
    what.add_row("steps", f"{figures['steps']:,} of {figures['batch']} images; {figures['done']:,} are done")
    what.add_row("ranks", f"{figures['ranks']}, each with {figures['micro_batch']} images at a time")
    what.add_row("images", f"{figures['images']:,} ({figures['kimg']:g} kimg)")
    for name, seconds in figures["seconds"].items():
        what.add_row(f"seconds of {name}", f"{seconds:.4g}")
    step = f"{figures['seconds_per_step']:.4g} s, {figures['img_s']:.4g} img/s; metrics and files come on top"
    what.add_row("mean step", step)
    what.add_row("hours to go", f"{figures['hours']:.4g}")
    for name, size in figures["disk"].items():
        what.add_row(f"disk, {name}", f"{size / 2**30:.3g} GiB")
    yield what

    grid = Table(title="GiB on a rank at most, by ZeRO stage", title_justify="left", caption_justify="left")
    if "peak" in figures:
        grid.caption = f"measured: {figures['peak'] / 2**30:.3g} GiB at stage {figures['zero_stage']}"
    for name in ("stage", *figures["memory"][0], "activations", "sum"):
        grid.add_column(name, justify="right")
    for stage, row in enumerate(figures["memory"]):
        sizes = [*row.values(), figures["activations"]]
        mark = "recipe: " if stage == figures["zero_stage"] else ""
        grid.add_row(f"{mark}{stage}", *(f"{size / 2**30:.3g}" for size in [*sizes, sum(sizes)]))
    yield grid
