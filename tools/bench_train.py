"""Time whole training steps.

    python tools/bench_train.py                             on a GPU --model ffhq256,ffhq1024, else the CPU
    python tools/bench_train.py --resolutions 32,64         the CPU, beside plain PyTorch (train_cpu.py)
    python tools/bench_train.py --model ffhq256,ffhq1024    a GPU (train_gpu.py): HSR, kernels, CUDA graphs on and off;
                                                            beside NVIDIA's networks with --stylegan3 PATH
    python tools/bench_train.py --model ffhq1024 --gpu B200 without a GPU: the same table from the static model
                                                            (train_model.py), in which NOTHING IS TIMED

Results are compared before they are timed: what is wrong is named, and the exit code is 1. torch.compile is not among
the choices: it refuses the outer derivative of R1 and path length, and whether it would win in the other phases has not
been measured.
"""

from __future__ import annotations

import csv
import itertools
import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.kernels.builds import GPUS
from hsrgan.tools import train_cpu, train_gpu, train_model, train_stylegan3
from hsrgan.tools.bench_kernels import OUT, chosen, now, versions
from hsrgan.tools.kernel_shapes import MODELS
from hsrgan.tools.train_variants import KEYS, variants

PRECISIONS = ("fp16", "bf16", "fp32")
WIDTH = 118
PHASES = ("Gmain", "Greg", "Dmain", "Dreg", "rest")


def write(rows: list[dict], stem: Path) -> None:
    """stem.json and stem.csv."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, KEYS)
        table.writeheader()
        table.writerows(rows)


def print_rows(rows: list[dict], title: str, console: Console) -> None:
    headings = ("model", "with", "img/s", "step ms", *PHASES, "peak GB", "run", "launched")
    caption = "step: median (p20–p80); phases: ms, each once; kernels run, and launches by the host: of one step"
    table = Table(*headings, title=title, caption=caption)
    for r in rows:
        step = f"{1000 * r['step_p50']:.1f}"
        if r["timed"]:
            step += f" ({1000 * r['step_p20']:.1f}–{1000 * r['step_p80']:.1f})"
        switches = [name for name, key in (("HSR", "hsr"), ("kernels", "kernels"), ("graphs", "graphs")) if r[key]]
        table.add_row(
            r["model"], ", ".join(switches) if r["provider"] == "hsrgan" else r["provider"], f"{r['img_s']:.0f}", step,
            *(f"{1000 * r[name]:.1f}" for name in PHASES), f"{r['peak_bytes'] / 1e9:.1f}",
            f"{r['kernels_per_step']}", f"{r['host_launches_per_step']}",
        )  # fmt: skip
    console.print(table)


def on_cpu(resolutions: str, turns: int, json_file: Path | None, console: Console) -> None:
    sizes = [int(text) for text in resolutions.split(",") if text.strip().isdecimal()]
    if not sizes or any(size not in train_cpu.SIZES for size in sizes):
        raise UserError(f"--resolutions {resolutions}: give some of {', '.join(map(str, train_cpu.SIZES))}")
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor()}")
    rows = [row for size in sizes for row in train_cpu.bench(size, turns, console)]
    train_cpu.print_rows(rows, console)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


app = CommandLine()


@app.command()
def main(
    resolutions: Annotated[str, typer.Option(help="Time the CPU at some of 32, 64.")] = "",
    models: Annotated[str, typer.Option("--model", help=f"On a GPU, some of {', '.join(MODELS)}.")] = "",
    turns: Annotated[int, typer.Option(min=5, help="Timed turns of every form; on a GPU of 16 steps.")] = 15,
    batch: Annotated[int, typer.Option(min=2, help="Images a step, for --model.")] = 8,
    precision: Annotated[str, typer.Option(help=f"For --model: {', '.join(PRECISIONS)}.")] = "fp16",
    num_fp16_res: Annotated[int, typer.Option(min=1, help="Highest resolutions in half precision, for --model.")] = 4,
    tf32: Annotated[bool, typer.Option("--tf32", help="What is fp32 on tensor cores, for --model.")] = False,
    stylegan3: Annotated[Path | None, typer.Option(help="A checkout whose networks become a rival, on a GPU.")] = None,
    gpu: Annotated[str, typer.Option(help=f"Of the static model: {', '.join(GPUS)}.")] = "H200",
    json_file: Annotated[Path | None, typer.Option("--json", help="Of the CPU: write the rows there too.")] = None,
    out: Annotated[Path | None, typer.Option(help="For --model: where rows go, without suffix.")] = None,
) -> None:
    """Whole training steps: this GPU's, this CPU's, or the static model of a GPU that is not there.

    Examples:

      python tools/bench_train.py --model ffhq256,ffhq1024 --stylegan3 ../stylegan3

      python tools/bench_train.py --resolutions 32,64 --json train_cpu.json
    """
    there = torch.cuda.is_available()
    console = Console(width=max(Console().width, WIDTH))  # the table's; a pipe has 80
    if resolutions and models:
        raise UserError("--resolutions is the CPU's and --model a GPU's: give one of them")
    if resolutions or not (models or there):
        on_cpu(resolutions or "32,64", turns, json_file, console)
        return
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: there are {', '.join(GPUS)}")
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: there are {', '.join(PRECISIONS)}")
    if batch % 2:
        raise UserError(f"--batch {batch}: path length works on half of it, so it must be even")
    if stylegan3 is not None and not there:
        raise UserError("--stylegan3 is timed on a GPU, and there is none here: leave it out")
    wanted = variants(chosen(models or ",".join(MODELS), MODELS, "model"), precision, num_fp16_res, tf32, batch)
    device = torch.cuda.get_device_name() if there else f"{gpu} (data sheet)"
    facts = {"device": device, "versions": versions(), "date": now()}
    wrong: list[str] = []
    probes = train_gpu.Gpu()
    if stylegan3 is not None:
        train_stylegan3.ready(stylegan3, precision, probes)
    found = train_gpu.bench(wanted, turns, probes, wrong.append) if there else train_model.model(wanted, GPUS[gpu])
    what = "timing" if there else "counting"
    if stylegan3 is not None:
        found = itertools.chain(found, train_stylegan3.bench(stylegan3, wanted, turns, probes, wrong.append))
    rows, stopped = [], False
    try:
        for each in track(found, what, total=len(wanted), console=Console(stderr=True), transient=True):
            rows.append(each | facts)
    except KeyboardInterrupt:
        stopped = True
    except UserError as error:  # of the rival, which comes last: ours is kept
        if not rows and not wrong:
            raise
        wrong.append(str(error))
    if rows and (there or out is not None):
        write(rows, out or OUT / f"train_{device.lower().replace(' ', '_').replace('/', '_')}")
    title = f"{device}, {wanted[0].numbers}, batch {batch}"
    if rows:
        print_rows(rows, title if there else f"{title}: the static model's floors. NOTHING WAS TIMED", console)
    for line in wrong:
        console.print(line, style="bold", soft_wrap=True)
    if not there:
        console.print(f"No GPU here: nothing was timed. Floors are {gpu}'s data sheet, not a measurement.")
    if stopped:
        console.print(f"stopped: {len(rows)} rows, of {len(wanted)}")
    if stopped or wrong:
        raise typer.Exit(130 if stopped else 1)


if __name__ == "__main__":
    app()
