"""Compile every Triton kernel ahead of time, for GPUs that need not be there: registers, shared memory, spills.

    python tools/kernel_builds.py
    python tools/kernel_builds.py --target sm_90 --dtype bfloat16 --model ffhq1024 --json builds.json

What is compiled is what the ops launch at the layer shapes of tools/kernel_shapes.py, forward, backward and twice
differentiated. Exit code 1: a kernel spills, needs more shared memory than the chip has, or does not compile.

issue: the time that the instructions take at one a clock and scheduler, by the time that the bytes take, both at the
data sheet's rates. Above 1 instructions are the bound, not bytes; near 1 latency shows. Kernels with at most one loop,
whose turns their constants tell; those of matrix products are left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.kernels import builds, launch
from hsrgan.kernels.builds import GPUS, TARGETS, Build
from hsrgan.tools import kernel_shapes
from hsrgan.tools.kernel_shapes import Call

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

WIDTH = 144  # columns of the table, with the longest name of a kernel; a pipe has 80

app = CommandLine()


def record(calls: list[Call], dtypes: list[torch.dtype], chip: str = "") -> list[tuple[str, launch.Launch]]:
    """The launches of every call in every dtype on a chip, each with where it came from. Nothing runs."""
    found = []
    for call in calls:
        for dtype in dtypes:
            with launch.record(chip) as launches:
                kernel_shapes.passes(call, dtype)
            where = f"{call.op} {call.name} {str(dtype).removeprefix('torch.')}"
            found += [(where, each) for each in launches]
    return found


def build(calls: list[Call], dtypes: list[str], targets: list[str], jobs: int = 0) -> list[dict]:
    """A row for each distinct build: the fields of `Build`, where it is launched first, how often, its problems."""
    rows: dict[Build, dict] = {}
    for target in targets:
        recorded = record(calls, [DTYPES[name] for name in dtypes], target)
        for (i, _), one in builds.build_each([each for _, each in recorded], [target], jobs).items():
            where, first = recorded[i]
            facts = {**asdict(one), "first": where, "launches": 0, "problems": one.problems()}
            facts["issue"] = issue(one, first)
            rows.setdefault(one, facts)["launches"] += 1
    return list(rows.values())


def issue(one: Build, launch: launch.Launch) -> float:
    """How long a GPU of NVIDIA's issues the launch's instructions, by how long it moves the bytes; 0: not known."""
    gpu = next(gpu for gpu in GPUS.values() if gpu.target == one.target)
    return builds.issue_seconds(one, launch, gpu) / builds.floor_seconds(builds.bytes_moved(launch), 0, gpu)


def print_rows(rows: list[dict], console: Console) -> None:
    """One line a kernel, warps, stages and target, with the worst of its variants; then what must not be."""
    table = Table(title="Kernels, compiled ahead of time: the worst of each kernel's variants")
    figures = ("warps", "variants", "registers", "shared", "spills", "matrix", "occupancy", "issue")
    for heading in ("kernel", "target", *figures):
        table.add_column(heading, justify="left" if heading in ("kernel", "target", "matrix") else "right")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["num_warps"], row["target"]), []).append(row)
    for (kernel, warps, target), group in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1])):
        worst = {key: max(row[key] for row in group) for key in ("registers", "shared", "spills")}
        gpu = next(gpu for gpu in GPUS.values() if gpu.target == target)
        fields = Build.__dataclass_fields__
        least = min(builds.occupancy(Build(**{k: row[k] for k in fields}), gpu).share for row in group)
        matrix = " ".join(sorted({row["matrix"] for row in group}))
        figures = (f"{len(group)}", f"{worst['registers']}", f"{worst['shared']:,}", f"{worst['spills']}", matrix)
        slots = max(row["issue"] for row in group)
        table.add_row(
            kernel, target, f"{warps}", *figures, f"{least:.0%} of {gpu.name}", f"{slots:.2f}" if slots else ""
        )
    console.print(table)
    for row in rows:
        fixed = " ".join(word for word in row["variant"].split() if "=" in word)
        for problem in row["problems"]:
            console.print(f"{row['kernel']} for {row['target']} {problem}: {row['first']} ({fixed})", soft_wrap=True)


@app.command()
def main(
    target: Annotated[list[str], typer.Option(help="An architecture; may be repeated.")] = list(TARGETS),  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Of the activations; may be repeated.")] = list(DTYPES),  # noqa: B006
    model: Annotated[list[str], typer.Option(help="Whose layers; may be repeated.")] = list(kernel_shapes.MODELS),  # noqa: B006
    op: Annotated[list[str], typer.Option(help="Only calls of this op; may be repeated.")] = [],  # noqa: B006
    resolution: Annotated[list[int], typer.Option(help="Only layers of this resolution; may be repeated.")] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where every build goes as a row.")] = None,
) -> None:
    """Compile every Triton kernel for GPUs that need not be there, and print what each takes.

    Example:

      python tools/kernel_builds.py --target sm_90 --dtype bfloat16
    """
    known_model = [name for name in model if name in kernel_shapes.MODELS]
    calls = kernel_shapes.calls({name: kernel_shapes.MODELS[name] for name in known_model})
    for value, known, name in (
        (target, TARGETS, "target"),
        (dtype, DTYPES, "dtype"),
        (model, kernel_shapes.MODELS, "model"),
        (op, dict.fromkeys(call.op for call in calls), "op"),
        (resolution, dict.fromkeys(call.resolution for call in calls), "resolution"),
    ):
        for one in value:
            if one not in known:
                raise UserError(f"--{name} {one}: there are {', '.join(map(str, known))}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
    calls = [
        call
        for call in calls
        if call.op in (op or [call.op]) and call.resolution in (resolution or [call.resolution])
    ]
    rows = build(calls, dtype, target, jobs)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_rows(rows, Console(width=max(Console().width, WIDTH)))
    bad = sum(bool(row["problems"]) for row in rows)
    typer.echo(f"{len(rows)} builds, {bad} of them not fit to ship")
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    app()
