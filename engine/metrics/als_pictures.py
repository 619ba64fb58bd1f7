"""What ALS found, as pictures: the curves m(t) of every attribute, and the straightest and the most bent edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hsrgan.engine.aside import written_aside
from hsrgan.engine.pictures import image_grid, opaque, save_png

CAPTION = 16  # pixels above each strip
LARGEST = 256  # pixels of a frame: eleven of 1024 would be no picture to look at
_COLUMNS = 5


def draw_linearity(results: Mapping[str, dict], title: str, path: Path) -> None:
    """Plot the curves of `attribute_linearity.linearity` to `path`, a panel for each attribute and one for their mean.

    results: by the model's label, all of the same attributes. 0 along the whole curve is a straight edit.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(next(iter(results.values()))["attributes"])
    panels = ["mean of attributes", *names]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.4 + 2.6 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for label, result in results.items():
            if panel in result["attributes"]:
                values, score = result["attributes"][panel]["curve"], result["attributes"][panel]["als"]
            else:
                curves = [attribute["curve"] for attribute in result["attributes"].values()]
                values, score = torch.tensor(curves).mean(0), result["als"]
            axes.plot(torch.linspace(0, 1, len(values)), values, marker=".", label=f"{label}  ALS {score:.3g}")
        axes.set_title(panel, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    grid[0, 0].set_ylim(bottom=0)  # of all panels, once all curves are there
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes in grid.flat[max(len(panels) - columns, 0) : len(panels)]:  # the lowest of each column
        axes.set_xlabel("t")
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("m(t), in σ")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def extremes(scores: Tensor, count: int) -> tuple[list[int], list[int]]:
    """Indices of the `count` lowest of scores [n] and of as many highest ones, each from its end inwards."""
    order = scores.argsort(stable=True).tolist()
    count = min(count, len(order) // 2) or 1
    return order[:count], order[: -count - 1 : -1]


def draw_strips(strips: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Save strips (a caption and its frames [T, C, H, W], uint8) to `path`, one below the other."""
    rows = [opaque(image_grid(frames, cols=len(frames))).convert("RGB") for _, frames in strips]
    picture = Image.new("RGB", (rows[0].width, sum(row.height + CAPTION for row in rows)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    y = 0
    for (caption, _), row in zip(strips, rows, strict=True):
        pen.text((4, y + 1), caption, fill="black", font=font)
        picture.paste(row, (0, y + CAPTION))
        y += row.height + CAPTION
    save_png(picture, path)


def small(frames: Tensor) -> Tensor:
    """Frames [T, C, H, W] uint8, at most LARGEST pixels high and wide."""
    side = max(frames.shape[2:])
    if side <= LARGEST:
        return frames
    return F.avg_pool2d(frames.float(), -(-side // LARGEST)).round().to(torch.uint8)
