"""What people see of scores: bars while they are made, then a table and a chart that compare snapshots."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from hsrgan.engine.aside import written_aside


class Bars:
    """A bar with count, rate and time to go for each thing that is being done, on stderr. Call it to move one.

    Without a terminal, one plain line for each that is finished. quiet: nothing at all. A context manager.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._console = quiet, Console(stderr=True, highlight=False)
        rate = TextColumn("{task.fields[rate]:.1f}/s")
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()]
        self._progress = Progress(*columns, console=self._console, disable=quiet or not self._console.is_terminal)
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, text: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if text not in self._tasks:
            self._tasks[text] = self._progress.add_task(text, total=total, rate=0.0), now
        task, began = self._tasks[text]
        rate = done / max(now - began, 1e-9)
        self._progress.update(task, completed=done, rate=rate)
        if done >= total:
            del self._tasks[text]
            if not self._quiet and not self._console.is_terminal:
                line = f"{text}: {total} in {now - began:.1f} s, {rate:.1f}/s"
                self._console.print(line, markup=False, soft_wrap=True)


def short_names(snapshots: Sequence[Path]) -> list[str]:
    """For each path the end of it that tells it from the others, without its suffix."""
    parts = [path.with_suffix("").parts for path in snapshots]
    distinct = len(set(parts))
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == distinct:
            break
    return names


def shown(result: dict) -> str:
    """The values of one result, short: each with the part of its name that is not the metric's."""
    parts = [(name.removeprefix(result["metric"]).strip("_"), value) for name, value in result["values"].items()]
    return " ".join(f"{'±' if part == 'std' else part} {value:.4g}".strip() for part, value in parts)


def comparison_table(results: Sequence[dict]) -> Table:
    """A row for each snapshot, a column for each metric."""
    metrics = list(dict.fromkeys(result["metric"] for result in results))
    snapshots = list(dict.fromkeys(result["snapshot"] for result in results))
    table = Table("snapshot", *metrics)
    for snapshot, name in zip(snapshots, short_names([Path(snapshot) for snapshot in snapshots]), strict=True):
        cells = {result["metric"]: shown(result) for result in results if result["snapshot"] == snapshot}
        table.add_row(name, *(cells[metric] for metric in metrics))
    return table


def comparison_chart(results: Sequence[dict], path: Path) -> None:
    """A panel for each value, a bar for each snapshot, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    snapshots = list(dict.fromkeys(result["snapshot"] for result in results))
    names = list(dict.fromkeys(name for r in results for name in r["values"] if not name.endswith("_std")))
    labels = short_names([Path(snapshot) for snapshot in snapshots])
    figure = Figure(figsize=(9, len(names) * (0.8 + 0.35 * len(snapshots))), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        by_snapshot = {r["snapshot"]: r for r in results if name in r["values"]}
        found = {snapshot: r["values"][name] for snapshot, r in by_snapshot.items()}
        spread = [r["values"].get(f"{r['metric']}_std", 0.0) for r in map(by_snapshot.get, snapshots) if r]
        heights = [found.get(snapshot, 0.0) for snapshot in snapshots]
        whiskers = spread if any(spread) and len(spread) == len(snapshots) else None
        bars = axes.barh(labels, heights, xerr=whiskers, color="tab:blue", height=0.6)
        axes.bar_label(bars, [f"{found[s]:.4g}" if s in found else "–" for s in snapshots], padding=3)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.set_title(name, loc="left", fontsize=10)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")
