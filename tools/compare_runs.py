"""Curves of several runs in one picture: `python tools/compare_runs.py runs/a runs/b --out compared.png`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from hsrgan.engine.aside import written_aside
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.curves import curves_of, thinned
from hsrgan.engine.errors import UserError
from hsrgan.engine.stats import read_log

END = 0.1  # the last tenth of a curve is its end: one tick alone is noise

app = CommandLine()

Curve = tuple[np.ndarray, np.ndarray]  # kimg and value


def compared(runs: Sequence[Path], keys: Sequence[str] = ()) -> dict[str, dict[str, Curve]]:
    """{key: {name of a run: its curve}}, of what any of the runs has logged, or of `keys` alone.

    Raises `UserError` for a folder without a log, for a key that no run has logged, and for a run given twice.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError(f"a run is given twice: {', '.join(map(str, runs))}")
    curves: dict[str, dict[str, Curve]] = {}
    for name, run in zip(_names(runs), runs, strict=True):
        of_run = curves_of(read_log(run / "log.jsonl"))
        if not of_run:
            raise UserError(f"{run}/log.jsonl is missing or has no figures: name the run_dir of a run")
        for key, curve in of_run.items():
            if len(curve[0]):
                curves.setdefault(key, {})[name] = curve
    if unknown := [key for key in keys if key not in curves]:
        raise UserError(f"--keys names {', '.join(unknown)}, which no run has logged; there are {', '.join(curves)}")
    return {key: curves[key] for key in keys or curves}


def end(curve: Curve) -> float:
    """The mean over the last tenth of its ticks."""
    values = curve[1]
    return float(values[-max(1, round(len(values) * END)) :].mean())


def draw(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """One panel a key, two side by side; the same colour for the same run everywhere."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for of_key in curves.values() for name in of_key))
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(6 * columns, 2.8 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels, drawn = figure.subplots(rows, columns, squeeze=False).flat, {}
    for (key, of_key), axes in zip(curves.items(), panels, strict=False):
        for name, curve in of_key.items():
            axes.plot(*thinned(*curve), label=name, linewidth=1.1, color=f"C{names.index(name)}")
        axes.set_title(key, fontsize=10)
        axes.grid(alpha=0.3)
        drawn |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn, loc="outside upper center", ncols=len(names), frameon=False)
    for axes in list(panels):  # the rest of the last row
        axes.axis("off")
    figure.supxlabel("thousands of real images shown (kimg)", fontsize=9)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names, or as they were given where two are alike."""
    own = [run.resolve().name for run in runs]
    return own if len(set(own)) == len(own) else [str(run) for run in runs]


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(help="The run_dir of each run.")],
    out: Annotated[Path, typer.Option(help="The picture; the figures go beside it as .json.")] = Path("compared.png"),
    keys: Annotated[str, typer.Option(help="What to compare, as loss/G,score/real; empty: all that was logged.")] = "",
) -> None:
    """Overlay what runs have logged, one panel for each kind of figure.

    Example:

      python tools/compare_runs.py runs/fp32 runs/bf16 --keys score/real,score/fake --out compared.png
    """
    if out.suffix != ".png":
        raise UserError(f"--out is {out}, allowed: a name that ends in .png")
    curves = compared(runs, [key for key in keys.split(",") if key])
    draw(curves, out)
    figures = {
        key: {name: {"end": end(c), "kimg": c[0].tolist(), "value": c[1].tolist()} for name, c in of_key.items()}
        for key, of_key in curves.items()
    }
    with written_aside(out.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    table = Table("end of run", *_names(runs))
    for key, of_key in curves.items():
        table.add_row(key, *(f"{end(of_key[name]):.4g}" if name in of_key else "–" for name in _names(runs)))
    Console().print(table)
    typer.echo(f"curves in {out}, figures in {out.with_suffix('.json')}")


if __name__ == "__main__":
    app()
