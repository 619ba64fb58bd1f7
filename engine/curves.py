"""The curves of a run as one PNG: losses, regularisers and scores over thousands of images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from hsrgan.engine.aside import written_aside

PANELS = {"loss": "loss", "penalty": "regulariser", "score": "D's score"}  # panel: its vertical axis
MOST_POINTS = 500  # of one curve
NOT_CURVES = frozenset({"kimg", "images", "seconds", "img_s", "ram_gib", "gpu_gib", "since_best", "bad_share"})
METRIC = "metric/"  # begins the names of published metrics, each with a panel of its own: their scales differ


def draw_curves(rows: list[dict], path: Path) -> None:
    """Draw the ticks of a run (`stats.read_log`) to `path`, one panel for each kind of scalar.

    `loss/…` and `score/…` have panels of their own, and so has each `metric/…`; every other scalar is taken for a
    regulariser (r1, path_length).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = curves_of(rows)
    panels: dict[str, list[str]] = {}
    for name in curves:
        kind = name if name.startswith(METRIC) else name.split("/")[0]
        known = kind in PANELS or kind.startswith(METRIC)
        panels.setdefault(kind if known else "penalty", []).append(name)
    if not panels:
        return

    figure = Figure(figsize=(9, 3 * len(panels)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(len(panels), squeeze=False)[:, 0], sorted(panels), strict=True):
        for name in panels[kind]:
            marker = "." if len(curves[name][0]) < 40 else None
            axes.plot(*thinned(*curves[name]), label=name, linewidth=1.2, marker=marker)
        _fit_height(axes, np.concatenate([curves[name][1] for name in panels[kind]]))
        axes.set_ylabel(PANELS.get(kind, kind.removeprefix(METRIC)))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set_xlabel("thousands of real images shown (kimg)")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def curves_of(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (kimg, value)} of the ticks in which it was logged and finite: a lazy term is absent from some."""
    ticks = [row for row in rows if "event" not in row]
    kimg = np.array([row["kimg"] for row in ticks])
    curves = {}
    for name in dict.fromkeys(name for row in ticks for name in row if _is_curve(name)):
        values = np.array([_number(row.get(name)) for row in ticks])
        there = np.isfinite(values)
        curves[name] = kimg[there], values[there]
    return curves


def _is_curve(name: str) -> bool:
    return name not in NOT_CURVES and not name.endswith("_std")  # a metric's spread is no curve


def _number(value: object) -> float:
    """A logged value as a float; absent or null (not finite) as NaN."""
    return float(value) if isinstance(value, int | float) else math.nan


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of equal runs of points, so that at most `MOST_POINTS` are left: more become a band that hides the rest."""
    run = -(-len(x) // MOST_POINTS) or 1
    starts = np.arange(0, len(x), run)
    if run == 1:
        return x, y
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _fit_height(axes, values: np.ndarray) -> None:
    """Leave single spikes out of the frame: they would flatten everything else into a line."""
    if len(values) < 40:
        return
    low, high = np.percentile(values, [0.5, 99.5])
    margin = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
