"""Time every op beside its rivals on a GPU; without one, print what can be said without timing anything.

    python tools/bench_kernels.py
    python tools/bench_kernels.py --model ffhq1024 --op bias_act --dtype float16 --stylegan3 ../stylegan3
    python tools/bench_kernels.py --shapes shapes.yaml --gpu MI300X

Rivals: eager PyTorch (the definition of the op), torch.compile of it, NVIDIA's CUDA ops out of a checkout of stylegan3.
All of a run is checked against the definition in fp64 before the first stopwatch starts: what is wrong is named and not
timed, and the exit code is 1. Rows go to benchmarks/kernels_<device>.csv and .json, with a roofline plot. The largest
layers come first, and Ctrl-C keeps what has been timed.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hsrgan import kernels
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.tensor_files import one_line
from hsrgan.kernels import builds, launch
from hsrgan.kernels.builds import GPUS, Gpu
from hsrgan.kernels.conv_table import IMPLEMENTATIONS
from hsrgan.tools import kernel_shapes, kernel_timing
from hsrgan.tools.kernel_shapes import Call
from hsrgan.tools.kernel_timing import MODES, Case, LibraryCall, Providers

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OUT = Path(__file__).parents[1] / "benchmarks"
KEYS = (
    "op", "provider", "shape", "dtype", "mode", "p20", "p50", "p80", "graph", "gb_s", "tflop_s", "roof_share",
    "peak_memory", "bytes", "flops", "floor", "device", "versions", "date",
)  # fmt: skip


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> str:
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    return f"torch {torch.__version__}, triton {triton}, cuda {torch.version.cuda or torch.version.hip}"


def read_shapes(path: Path) -> list[Call]:
    """The calls of a YAML list of {op, batch, channels, resolution}; UserError naming the entry that is wrong."""
    ops = {op.__name__: op for op in kernel_shapes.OPS}
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--shapes {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--shapes {path}: not YAML: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--shapes {path}: must be a list of {{op, batch, channels, resolution}}")
    found = []
    for i, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or set(entry) != {"op", "batch", "channels", "resolution"}:
            raise UserError(f"--shapes {path}: entry {i} must have op, batch, channels and resolution; got {entry}")
        if entry["op"] not in ops:
            raise UserError(f"--shapes {path}: entry {i} has op {entry['op']!r}; there are {', '.join(ops)}")
        sizes = [entry[key] for key in ("batch", "channels", "resolution")]
        if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            raise UserError(f"--shapes {path}: entry {i}: batch, channels and resolution are whole numbers above 0")
        calls = list(ops[entry["op"]](*sizes))
        if not calls:
            raise UserError(f"--shapes {path}: entry {i}: {entry['op']} has no layer at resolution {sizes[2]}")
        found += [Call(**{**call.__dict__, "name": f"{sizes[2]} {call.name}"}) for call in calls]
    return found


Result = tuple[str, str, str]  # op, name of the case, provider


def check_all(cases: list[Case], providers: Providers, device: str) -> dict[Result, str]:
    """What is wrong, with which result. Nothing of this may be timed."""
    wrong = {}
    for case in track(cases, "checking", console=Console(stderr=True), transient=True):
        truth = kernel_timing.Truth(case, device)
        for name, provider in providers.items():
            op = provider(case.call) if kernel_timing.possible(name, case) else None
            with kernel_timing.implementation(name):
                complaint = "" if op is None else truth.gate(op)
            if complaint:
                wrong[case.call.op, case.name, name] = complaint
    return wrong


def bench(
    cases: list[Case],
    providers: Providers,
    device: str,
    stopwatch: Callable[[Callable[[], Any]], dict[str, Any]],
    roofs: dict[str, float],
    wrong: Container[Result] = (),
    say: Callable[[str], None] = print,
    peak: Callable[[Callable[[], Any]], int] = kernel_timing.peak_memory,
) -> Iterator[dict]:
    """A row a case and provider, without those that `check_all` found wrong; roofs: of `kernel_timing.roofs`. say takes
    a line for one that fails while it is timed.
    """
    for case in track(cases, "timing", console=Console(stderr=True), transient=True):
        for name, provider in providers.items():
            left_out = (case.call.op, case.name, name) in wrong or not kernel_timing.possible(name, case)
            op = None if left_out else provider(case.call)
            if op is None:
                continue
            moved = kernel_timing.bytes_of(case)
            floor = max(moved / roofs["copy"], case.flops / roofs[str(case.dtype).removeprefix("torch.")])
            try:
                with kernel_timing.implementation(name):
                    run = kernel_timing.prepare(case, op, case.call.make(case.dtype, device))
                    used, times = peak(run), stopwatch(run)
            except RuntimeError as error:  # what a GPU refuses, want of memory included
                say(f"not timed: {name} {case.call.op}, {case.name}: {one_line(error)}")
                continue
            yield (row(case, name, moved, floor, torch.cuda.get_device_name() if device == "cuda" else device)
                   | times | {"gb_s": moved / times["p50"] / 1e9, "tflop_s": case.flops / times["p50"] / 1e12,
                              "roof_share": floor / times["p50"], "peak_memory": used})  # fmt: skip


def row(case: Case, provider: str, moved: int, floor: float, device: str) -> dict:
    """The columns that need no stopwatch; seconds, bytes and FLOP. The others are empty: nothing was timed."""
    known = {
        "op": case.call.op, "provider": provider, "shape": f"{case.call.name} {list(case.call.shape)}",
        "dtype": str(case.dtype).removeprefix("torch."), "mode": case.mode, "bytes": moved, "flops": case.flops,
        "floor": floor, "device": device, "versions": versions(), "date": now(),
    }  # fmt: skip
    return {key: known.get(key) for key in KEYS}


def launches_of(case: Case, chip: str) -> tuple[list[launch.Launch], list[LibraryCall]]:
    """What our op launches in the mode itself on a chip, and which products it leaves to the libraries."""
    with launch.record(chip) as launches, kernel_timing.LibraryCalls() as calls:
        run = kernel_timing.prepare(case, getattr(kernels, case.call.op), case.call.make(case.dtype))
        before = len(launches), len(calls.found)
        run()
    return launches[before[0] :], calls.found[before[1] :]


def model(cases: list[Case], gpu: Gpu, jobs: int = 0) -> list[dict]:
    """A row a case (of a convolution: a case and implementation) with its bytes, FLOP and floor on gpu, the kernels
    that our op launches, compiled for it, and the sum of the floors of all that it launches."""
    work = []
    for case in cases:
        if case.call.op not in kernel_timing.CONVOLUTIONS:
            work.append((case, "hsrgan", *launches_of(case, gpu.target)))
            continue
        chosen = {each.kernel.__name__ for each in launches_of(case, gpu.target)[0]} & set(kernel_timing.GEMMS)
        for name in IMPLEMENTATIONS:
            with kernel_timing.implementation(name):
                label = name + (" (chosen)" if (name == "gemm") == bool(chosen) else "")
                work.append((case, label, *launches_of(case, gpu.target)))
    built = iter(builds.build_each([x for *_, some, _ in work for x in some], [gpu.target], jobs).values())
    rows = []
    for case, provider, some, calls in work:
        moved, kind = kernel_timing.bytes_of(case), launch.kind_of(case.dtype)
        floor = builds.floor_seconds(moved, case.flops, gpu, kind)
        parts = [(builds.bytes_moved(each), kernel_timing.flops_of(each)) for each in some] + calls
        compiled = [next(built) for _ in some]
        found = [
            {"kernel": b.kernel, "registers": b.registers, "shared": b.shared, "spills": b.spills, "error": b.error,
             "occupancy": 0.0 if b.error else builds.occupancy(b, gpu).share}
            for b in compiled
        ]  # fmt: skip
        found_floors = sum(builds.floor_seconds(*part, gpu, kind) for part in parts)
        rows.append(row(case, provider, moved, floor, f"{gpu.name} (data sheet)") | {
            "kernels": found, "library_calls": len(calls), "floors": found_floors,
        })  # fmt: skip
    return rows


def write(rows: list[dict], stem: Path, roofs: dict[str, float]) -> None:
    """stem.csv, stem.json and stem.png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({"roofs": roofs, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, KEYS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    plot(rows, stem.with_suffix(".png"), roofs)


def plot(rows: list[dict], path: Path, roofs: dict[str, float]) -> None:
    """Roofline: what was reached (or, untimed, the floor) over FLOP a byte; one FLOP a byte where an op has none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for provider in dict.fromkeys(r["provider"] for r in rows):
        own = [r for r in rows if r["provider"] == provider]
        work = [r["flops"] or r["bytes"] for r in own]
        seconds = [r["p50"] or r["floor"] for r in own]
        intensity = [w / r["bytes"] for w, r in zip(work, own, strict=True)]
        reached = [w / s / 1e12 for w, s in zip(work, seconds, strict=True)]
        axes.scatter(intensity, reached, s=14, label=provider if own[0]["p50"] else f"{provider}: floor, nothing timed")
    x = [10 ** (i / 20) for i in range(-20, 90)]
    for name, rate in roofs.items():
        if name != "copy":
            axes.plot(x, [min(v * roofs["copy"], rate) / 1e12 for v in x], lw=1, label=f"roof, {name}")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s", title=rows[0]["device"])
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_timed(rows: list[dict], roofs: dict[str, float], console: Console) -> None:
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in roofs.items() if name != "copy")
    console.print(f"roofs measured in this run: copy {roofs['copy'] / 1e12:.2f} TB/s, {rates}")
    headings = ("op", "shape", "dtype", "mode", "provider", "µs", "GB/s", "TFLOP/s", "of the roof", "peak MB")
    table = Table(*headings, title=rows[0]["device"])
    for r in rows:
        table.add_row(
            r["op"], r["shape"], r["dtype"], r["mode"], r["provider"],
            f"{r['p50'] * 1e6:.1f} ({r['p20'] * 1e6:.1f}–{r['p80'] * 1e6:.1f})", f"{r['gb_s']:.0f}",
            f"{r['tflop_s']:.1f}", f"{r['roof_share']:.0%}", f"{r['peak_memory'] / 1e6:.1f}",
        )  # fmt: skip
    console.print(table)


def print_model(rows: list[dict], gpu: Gpu, console: Console) -> None:
    title = f"{gpu.name} by its data sheet and by ahead-of-time builds for {gpu.target}: NOTHING WAS TIMED"
    headings = ("op", "shape", "dtype", "mode", "provider", "MB", "GFLOP", "floor µs", "launched µs", "kernels",
                "registers", "spills", "warps")  # fmt: skip
    caption = (
        "launched: sum of the floors of all that is launched; warps: share of those that a multiprocessor holds"
    )
    table = Table(*headings, title=title, caption=caption)
    for r in rows:
        found = r["kernels"]
        of = [f"{max(k[key] for k in found)}" for key in ("registers", "spills")] if found else ["", ""]
        names = dict.fromkeys(k["kernel"].rpartition(".")[2] for k in found)
        table.add_row(
            r["op"], r["shape"], r["dtype"], r["mode"], r["provider"], f"{r['bytes'] / 1e6:.2f}",
            f"{r['flops'] / 1e9:.2f}", f"{r['floor'] * 1e6:.2f}", f"{r['floors'] * 1e6:.2f}",
            " ".join([*names, *["library"] * (r["library_calls"] > 0)]), *of,
            f"{min(k['occupancy'] for k in found):.0%}" if found else "",
        )  # fmt: skip
    console.print(table)
    console.print(f"No GPU here: nothing was timed. Floors are {gpu.name}'s data sheet, not a measurement.")


def chosen(values: str, known: dict[str, Any] | tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in values.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--{option} {name}: there are {', '.join(known)}")
    if not names:
        raise UserError(f"--{option}: give some of {', '.join(known)}")
    return names


app = CommandLine()


@app.command()
def main(
    model_names: Annotated[str, typer.Option("--model", help="Whose layers, by commas.")] = "ffhq256,ffhq1024",
    shapes: Annotated[Path | None, typer.Option(help="YAML list of {op, batch, channels, resolution}.")] = None,
    ops: Annotated[str, typer.Option("--op", help="Only these ops, by commas.")] = "",
    dtypes: Annotated[str, typer.Option("--dtype", help="Of the activations, by commas.")] = "float16",
    modes: Annotated[str, typer.Option("--mode", help="By commas.")] = ",".join(MODES),
    batch: Annotated[int, typer.Option(min=1, help="Images, for --model's layers.")] = 8,
    stylegan3: Annotated[Path | None, typer.Option(help="A checkout whose CUDA ops become a rival.")] = None,
    providers: Annotated[str, typer.Option("--provider", help="Only these of ours and the rivals, by commas.")] = "",
    tf32: Annotated[bool, typer.Option("--tf32", help="fp32 products on tensor cores, everybody's.")] = False,
    gpu: Annotated[str, typer.Option(help=f"Of the static model: {', '.join(GPUS)}.")] = "H200",
    jobs: Annotated[int, typer.Option(min=0, help="Processes that compile for the static model; 0: one a core.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where rows and plot go, without suffix.")] = None,
) -> None:
    """Time every op beside its rivals; on a machine without a GPU print the static model of --gpu instead.

    Examples:

      python tools/bench_kernels.py --model ffhq1024 --op bias_act --dtype float16 --stylegan3 ../stylegan3

      python tools/bench_kernels.py --shapes shapes.yaml --gpu MI300X
    """
    calls = kernel_shapes.calls(
        {name: kernel_shapes.MODELS[name] for name in chosen(model_names, kernel_shapes.MODELS, "model")}, batch
    ) if shapes is None else read_shapes(shapes)  # fmt: skip
    there = tuple(dict.fromkeys(call.op for call in calls))
    wanted = chosen(ops, there, "op") if ops else there
    calls = [call for call in calls if call.op in wanted]
    types = [DTYPES[name] for name in chosen(dtypes, DTYPES, "dtype")]
    cases = kernel_timing.cases(calls, types, chosen(modes, MODES, "mode"))
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: there are {', '.join(GPUS)}")
    who = kernel_timing.providers(stylegan3)
    who = {name: who[name] for name in chosen(providers, who, "provider")} if providers else who
    launch.allow_tf32(tf32)
    launch.sum_in_fp32()
    console = Console()
    console.width = max(console.width, 160)  # a pipe has 80 columns, too few for the table
    if not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise UserError("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
        if stylegan3 is not None or providers:
            raise UserError("--stylegan3 and --provider are of what is timed, and there is no GPU here: leave them out")
        rows = model(cases, GPUS[gpu], jobs)
        if out is not None:
            rates = {name: GPUS[gpu].rate(launch.kind_of(dtype)) for name, dtype in DTYPES.items()}
            write(rows, out, {"copy": GPUS[gpu].bandwidth} | rates)
        print_model(rows, GPUS[gpu], console)
        return
    cases.sort(key=lambda case: -math.prod(case.call.shape))
    stopwatch, rows = kernel_timing.Stopwatch(), []
    wrong = check_all(cases, who, "cuda")
    for (op, case, name), complaint in wrong.items():
        console.print(f"not timed: {name} {op}, {case}: {complaint}", style="bold", soft_wrap=True)
    roofs = kernel_timing.roofs(stopwatch, types)
    stopped, failed = False, []
    try:
        for each in bench(cases, who, "cuda", stopwatch, roofs, wrong, failed.append):
            rows.append(each)
    except KeyboardInterrupt:
        stopped = True
    if rows:
        device = torch.cuda.get_device_name().lower().replace(" ", "_").replace("/", "_")
        write(rows, out or OUT / f"kernels_{device}", roofs)
        print_timed(rows, roofs, console)
    for line in failed:
        console.print(line, style="bold", soft_wrap=True)
    if stopped:
        console.print(f"stopped: {len(rows)} rows timed, of {len(cases)} cases")
    if stopped or wrong or failed:
        raise typer.Exit(130 if stopped else 1)


if __name__ == "__main__":
    app()
