"""Measure the block sizes of every kernel on this GPU and write what is faster into kernels/blocks.json.

    python tools/tune_kernels.py                        # about ten minutes; then commit the table
    python tools/tune_kernels.py --kernel to_rgb.project,bias_act.sums,convolution
    python tools/tune_kernels.py --check                # no GPU needed: every row, compiled for its chips

A kernel is timed within the op that launches it, once for each class of shapes and size of value, with the sizes of
today and with each of them halved and doubled, one at a time; a convolution of few channels by the library and by the
GEMM in each of its tiles (tune_convolutions.py; kernels/convolutions.json). What is not as near the truth as
tools/bench_kernels.py asks is not timed. A row is written where another candidate takes at least 2 % less time than
today's; Ctrl-C keeps what has been found.

--check exits with 1 if a row spills, needs more shared memory than its chip has, does not compile or is never used.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from hsrgan import kernels
from hsrgan.engine.aside import written_aside
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.kernels import blocks, builds, conv_table, launch
from hsrgan.kernels.blocks import Row
from hsrgan.tools import kernel_shapes, kernel_timing, tune_convolutions
from hsrgan.tools.kernel_shapes import Call
from hsrgan.tools.kernel_timing import Case

BATCH = 8
# Channels and resolution: every class of shapes (blocks.sizes, feature_match_triton.product_blocks) has a layer here.
PLACES = ((64, 512), (512, 64), (256, 64), (64, 64), (520, 64), (512, 8))
CONVOLUTION = "convolution"  # beside the kernels' names
DTYPES = {2: torch.float16, 4: torch.float32}


@dataclass(frozen=True)
class Probe:
    """Where a kernel of the table is timed: in which mode of which call, and what the launch is called."""

    kernel: str
    call: str
    mode: str
    function: str


PROBES = (
    Probe("bias_act.forward", "D conv0", "forward", "forward"),
    Probe("bias_act.gradient", "D conv0", "backward", "first"),
    Probe("bias_act.sums", "G layer", "backward", "first"),
    Probe("fir4.blur", "D conv1, blur", "forward", "fir4"),
    Probe("fir4.resample", "D skip, down", "forward", "fir4"),
    Probe("fir4.join", "D skip, branch", "backward", "fir4"),
    Probe("fir4.chain", "D conv0 + blur", "forward", "fir4"),
    Probe("fir4.slope", "G conv0, FIR + layer", "backward", "fir4"),
    Probe("fir4.source", "D conv0 + blur", "backward", "fir4"),
    Probe("fir4.tangent", "G conv0, FIR + layer", "double", "fir4"),
    Probe("upfirdn2d", "2-d filter", "forward", "general"),
    Probe("to_rgb.project", "toRGB", "forward", "project"),
    Probe("to_rgb.gradient", "toRGB", "backward", "gradient"),
    Probe("bias_act_to_rgb.forward", "G layer + toRGB", "forward", "forward"),
    Probe("bias_act_to_rgb.gradient", "G layer + toRGB", "backward", "gradient"),
    Probe("demodulation.modulate", "G conv1, weight", "forward", "modulate"),
    Probe("demodulation.modulate", "G conv0, weight", "forward", "modulate"),
    Probe("demodulation.rows", "G conv1, weight", "backward", "rows"),
    Probe("demodulation.columns", "G conv1, weight", "backward", "columns"),
    Probe("demodulation.second", "G conv1, weight", "double", "second_rows"),
    Probe("feature_match.tiles", "HSR, mse", "forward", "pool_kernel"),
    Probe("feature_match.pool", "HSR, mse", "forward", "pool_kernel"),
    Probe("feature_match.dx", "HSR, mse", "backward", "dx_kernel"),
    Probe("feature_match.dw", "HSR, mse", "backward", "dw_kernel"),
    Probe("feature_match.distance", "HSR, mse", "forward", "distance_kernel"),
    Probe("feature_match.grow", "HSR, mse", "backward", "grow_gradient_kernel"),
)


@dataclass(frozen=True)
class Slot:
    """One thing that the table is asked: kernel, class of shapes, bytes, chip; and a case that asks it."""

    kernel: str
    shape: str
    bytes: int
    chip: str
    case: Case
    tf32: bool
    function: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.kernel, self.shape, self.bytes, self.chip


def calls(channels: int, resolution: int) -> Iterator[Call]:
    for op in kernel_shapes.OPS:
        yield from op(BATCH, channels, resolution)
    x, f = (BATCH, channels, resolution, resolution), (4, 4)
    yield Call("2-d filter", "upfirdn2d", {"x": x, "f": f}, {"padding": 1}, constants=("f",))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = launch.tf32_allowed()
    launch.allow_tf32(allowed)
    try:
        yield
    finally:
        launch.allow_tf32(before)


def slots(probes: Iterable[Probe], chip: str, places: Iterable[tuple[int, int]] = PLACES) -> list[Slot]:
    """What the probes' kernels ask the table on a chip, each once. Nothing runs."""
    found: dict[tuple, Slot] = {}
    for place in places:
        by_name = {call.name: call for call in calls(*place)}
        for probe in probes:
            for size, dtype in DTYPES.items():
                for allowed in (False, True) if size == 4 and probe.kernel.startswith("feature_match") else (False,):
                    if probe.call not in by_name:
                        continue
                    case = Case(by_name[probe.call], dtype, probe.mode)
                    with tf32(allowed), blocks.using(()) as asked, launch.record(chip):
                        kernel_timing.prepare(case, getattr(kernels, case.call.op), case.call.make(dtype))()
                    for key in asked:
                        if key[0] == probe.kernel:
                            found.setdefault(key, Slot(*key, case, allowed, probe.function))
    return list(found.values())


def candidates(row: Row) -> list[Row]:
    """The row itself, and each of its sizes halved and doubled (stages: one less, one more), one at a time."""
    found = [row]
    for name, value in row.sizes:
        near = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        limits = {"num_warps": (1, 8), "num_stages": (1, 4), "unroll": (1, 4), "rows": (2, 64), "BR": (1, 64)}
        limits |= {"span": (2, 4), "samples": (1, 16)}
        if row.kernel.startswith("demodulation.") and row.kernel != "demodulation.columns":
            limits |= {"outputs": (1, 8), "inputs": (64, 512)}
        least, most = limits.get(name, (1, 8192) if name in ("elements", "values") else (16, 256))
        if name == "registers":
            continue
        for other in near:
            if least <= other <= most:
                found.append(replace(row, sizes=tuple((n, other if n == name else v) for n, v in row.sizes)))
    return found


def tune(
    slot: Slot, device: str, stopwatch: Callable[[Callable[[], Any]], dict[str, float]], source: str
) -> tuple[Row | None, str]:
    """(the row to write, or None if today's sizes are as good; what happened, in words)."""
    today = blocks.row_for(*slot.key)
    exact = replace(today, shape=slot.shape, bytes=(slot.bytes,), chip=slot.chip, source=source)
    with tf32(slot.tf32):
        unit = f"{slot.kernel} {slot.shape}, {slot.bytes} bytes"
        best, what = kernel_timing.fastest(
            slot.case, candidates(exact), lambda row: blocks.using([row]), device, stopwatch, unit
        )
    if best is None:
        return None, what
    changed = ", ".join(f"{n} {v}" for n, v in best.sizes if dict(exact.sizes)[n] != v)
    return best, f"{what} with {changed}"


def merged(rows: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """New rows first, in place of older ones for the same kernel, shape, bytes and chip."""
    new = list(new)
    places = {(row.kernel, row.shape, row.bytes, row.chip) for row in new}
    return new + [row for row in rows if (row.kernel, row.shape, row.bytes, row.chip) not in places]


def check(rows: Iterable[Row], probes: Iterable[Probe], targets: list[str], jobs: int) -> tuple[list[str], int]:
    """(what is wrong with the rows, how many kernels were built) on the targets."""
    probes = list(probes)
    wrong, count, used = [], 0, set()
    for target in track(targets, "building", console=Console(stderr=True), transient=True):
        launches, owners = [], []
        for slot in slots(probes, target):
            with tf32(slot.tf32), launch.record(target) as recorded:
                op, tensors = getattr(kernels, slot.case.call.op), slot.case.call.make(slot.case.dtype)
                kernel_timing.prepare(slot.case, op, tensors)()
            own = [each for each in recorded if each.kernel.__name__ == slot.function]
            launches += own
            owners += [slot] * len(own)
            used.add(blocks.row_for(*slot.key))
        for (i, _), build in builds.build_each(launches, [target], jobs).items():
            slot = owners[i]
            where = f"{name(blocks.row_for(*slot.key))}: on {target}, x {list(slot.case.call.sizes['x'])}"
            wrong += [f"{where}, {slot.function} {each}" for each in build.problems()]
        count += len(launches)
    if set(targets) == set(builds.TARGETS):
        named = {probe.kernel for probe in probes}
        reached = [row for row in rows if any(fnmatchcase(target, row.chip) for target in targets)]
        wrong += [f"{name(row)}: never used" for row in reached if row.kernel in named and row not in used]
    return list(dict.fromkeys(wrong)), count


def name(row: Row) -> str:
    return f"{row.kernel}, shape {row.shape}, {' or '.join(map(str, row.bytes))} bytes, chip {row.chip}"


app = CommandLine()


@app.command()
def main(
    kernel: Annotated[str, typer.Option(help="Only these kernels of the table, by commas.")] = "",
    check_only: Annotated[bool, typer.Option("--check", help="Build every row ahead of time; time nothing.")] = False,
    target: Annotated[list[str], typer.Option(help="Of --check; may be repeated.")] = list(builds.TARGETS),  # noqa: B006
    jobs: Annotated[int, typer.Option(min=0, help="Processes of --check; 0: one a core.")] = 0,
    table: Annotated[Path, typer.Option(help="The table that is read and written.")] = blocks.PATH,
) -> None:
    """Time the block sizes of the Triton kernels on this GPU, and write those that are faster into the table.

    Examples:

      python tools/tune_kernels.py --kernel bias_act.forward

      python tools/tune_kernels.py --check --target sm_90
    """
    known = [*(probe.kernel for probe in PROBES), CONVOLUTION]
    wanted = [each.strip() for each in kernel.split(",") if each.strip()] or known
    for each in wanted:
        if each not in known:
            raise UserError(f"--kernel {each}: there are {', '.join(known)}")
    for each in target:
        if each not in builds.TARGETS:
            raise UserError(f"--target {each}: there are {', '.join(builds.TARGETS)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
    probes = [probe for probe in PROBES if probe.kernel in wanted]
    if not (check_only or torch.cuda.is_available()):
        raise UserError("no GPU here: nothing was timed, and the table is as it was; --check needs none")
    try:
        rows = blocks.read(table)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--table {table}: cannot be read as a table of block sizes: {error}") from None
    with blocks.using(rows):
        if check_only:
            wrong, count = check(rows, probes, target, jobs)
            for line in wrong:
                typer.echo(line)
            typer.echo(f"{len(rows)} rows, {count} builds, {len(wrong)} problems")
            raise typer.Exit(1 if wrong else 0)
        measured(rows, probes, table, CONVOLUTION in wanted)


def measured(rows: tuple[Row, ...], probes: list[Probe], table: Path, convolutions: bool) -> None:
    """Ctrl-C writes what has been found by then."""
    device, triton = torch.cuda.get_device_name(), importlib.metadata.version("triton")
    source = f"measured on {device}, {date.today().isoformat()}, triton {triton}"
    console, stopwatch, new, new_convolutions = Console(stderr=True), kernel_timing.Stopwatch(), [], []
    chip = launch.chip(torch.empty(0, device="cuda"))
    work = [(slot, tune, new) for slot in slots(probes, chip)]
    if convolutions:
        work += [(slot, tune_convolutions.tune, new_convolutions) for slot in tune_convolutions.slots(chip)]
    stopped = wrong = False
    try:
        for slot, tuned, found in track(work, "timing", console=console):
            try:
                row, what = tuned(slot, "cuda", stopwatch, source)
            except UserError as error:  # today's is wrong: said, and the others are tuned
                row, what, wrong = None, f"not timed: {error}", True
            console.print(what)
            found += [] if row is None else [row]
    except KeyboardInterrupt:
        stopped = True
    beside = table.with_name(conv_table.PATH.name)
    if new:
        _write(table, blocks.text(merged(rows, new)))
    if new_convolutions:
        old = conv_table.read(beside) if beside.exists() else ()
        _write(beside, conv_table.text(tune_convolutions.merged(old, new_convolutions)))
    typer.echo(f"{len(new)} rows of {table} and {len(new_convolutions)} of {beside} are new for {chip} ({device})")
    if stopped or wrong:
        raise typer.Exit(130 if stopped else 1)


def _write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()
