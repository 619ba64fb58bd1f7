"""Train a classifier of image attributes on labelled images: what ALS, LS and edit directions are measured with.

    python tools/fit_attributes.py digits --out attributes.safetensors

The labels are the classes of the data set, each against the rest, or a table of any attributes (--table): a CSV file
with a heading line `name,smile,hat`, a JSON object {"name": {"smile": 1, "hat": 0}}, or CelebA's list_attr_celeba.txt.
1 is present, 0 or −1 absent. Names are those of the images: the path inside a folder or zip, or the key of the sample
in packed shards (its eight-digit number). Attributes are separate yes-or-no questions to one timm network, trained with
present and absent weighted alike, so a logit of 0 is the border when both are equally likely. A fifth of the images
takes no part; balanced accuracy (the mean of the shares told of present and of absent) is measured on it.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.attributes import WEAK, AttributeClassifier, balanced_accuracies, save_attributes
from hsrgan.engine.shards import MANIFEST, load_manifest
from hsrgan.tools import options
from hsrgan.tools.fit_teacher import Images, Views, build, channel_statistics, hold_out, parse_args, read_images

DIGITS_RESOLUTION = 16
TRUTH = {"1": 1.0, "0": 0.0, "-1": 0.0}


def read_table(path: Path) -> tuple[list[str], dict[str, list[float]]]:
    """The attributes' names and, by image name, 1 or 0 for each. Raises `UserError` for a table that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--table {path} cannot be read ({error}): name a CSV or JSON file") from None
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
            attributes = list(next(iter(rows.values())))
            cells = {name: [str(int(row[attribute])) for attribute in attributes] for name, row in rows.items()}
            if uneven := [name for name, row in rows.items() if len(row) != len(attributes)]:
                raise ValueError(f"{uneven[0]} has other attributes than the first image")
        else:
            lines = text.splitlines()
            if lines[0].strip().isdecimal():  # CelebA's: a count, the attributes, then rows with blanks between
                attributes, body = lines[1].split(), [line.split() for line in lines[2:] if line.strip()]
            else:
                (_, *attributes), *body = csv.reader(lines)
            if uneven := [row[0] for row in body if len(row) != 1 + len(attributes)]:
                raise ValueError(f"{uneven[0]} has not {len(attributes)} values")
            cells = {name: [value.strip() for value in values] for name, *values in body}
        table = {name: [TRUTH[value] for value in values] for name, values in cells.items()}
        if not attributes or not table or len(set(attributes)) < len(attributes):
            raise ValueError("it names no attributes, or one twice")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        detail = f"{error} is none of 1, 0, -1" if isinstance(error, KeyError) else error
        raise UserError(f"--table {path} is no table of attributes ({detail}): write a heading line name,smile,… and "
                        "lines of a name and 1 or 0") from None
    return attributes, table


def labelled(images: Images, table: Path | None, data: str) -> tuple[list[str], Tensor]:
    """The attributes' names and the labels [M, A] of images, 1 present, 0 absent."""
    if table is not None:
        names, rows = read_table(table)
        if absent := [name for name in images.names if name not in rows]:
            raise UserError(f"--table {table} lacks {len(absent)} of the {len(images.names)} images of {data}, first "
                            f"{absent[0]}: add them, or leave those images out")
        return names, torch.tensor([rows[name] for name in images.names])
    if images.labels is None:
        raise UserError(f"{data} does not have one label for each image: pack it with --labels, or give --table")
    return list(images.class_names), F.one_hot(images.labels, len(images.class_names)).float()


def fit(
    net: nn.Module, images: Images, labels: Tensor, mean: Tensor, std: Tensor, views: Views, *,
    kimg: float, batch: int, lr: float, console: Console,
) -> None:  # fmt: skip
    """Train net in place for kimg thousand images, AdamW with warm-up and a cosine decay."""
    device = mean.device
    present = labels.sum(0)
    weight = ((len(labels) - present) / present).to(device)  # of a present one's loss: as much as all absent ones
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    steps = max(1, round(kimg * 1000 / batch))
    net.train()
    began = time.perf_counter()
    with Progress(TextColumn("fitting"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn(),
                  TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps, status="")
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = lr * min((step + 1) / (0.1 * steps), 1) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            index = torch.randint(len(images.pixels), (batch,))
            seen = views.draw(images.unit(index).to(device), views.geometry(batch, device))
            logits = net((seen - mean) / std)
            loss = F.binary_cross_entropy_with_logits(logits, labels[index].to(device), pos_weight=weight)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            done = (step + 1) * batch
            rate = done / (time.perf_counter() - began)
            progress.update(task, advance=1, status=f"{done / 1000:.1f} kimg  {rate:.0f} img/s")
    console.print(f"loss of the last batch {loss.item():.3f}")


def _resolution(data: str, given: int | None) -> int:
    if given is not None:
        return given
    path = Path(data)
    if path.name == MANIFEST or (path / MANIFEST).is_file():
        return min(load_manifest(path).resolution)
    if data == "digits":
        return DIGITS_RESOLUTION
    raise UserError(f"{data} is not packed, so its images have no one size: give --resolution")


def _report(classifier: AttributeClassifier, labels: Tensor) -> Table:
    table = Table(title=f"{len(labels)} held-out images")
    for heading in ("attribute", "present", "balanced accuracy", ""):
        table.add_column(heading, justify="left" if heading == "attribute" else "right")
    rows = zip(classifier.names, labels.mean(0).tolist(), classifier.balanced_accuracy, strict=True)
    for name, share, accuracy in rows:
        note = "too weak to score by" if accuracy < WEAK else ""
        table.add_row(name, f"{share:.1%}", f"{accuracy:.3f}", note)
    return table


app = CommandLine()


@app.command()
def main(
    data: Annotated[str, typer.Argument(help="packed shards; a folder, zip or LMDB of images; or the word digits")],
    out: Annotated[Path, typer.Option(help="the classifier file to write")] = Path("attributes.safetensors"),
    table: Annotated[
        Path | None, typer.Option(help="attributes of each image, CSV or JSON; by default the classes")
    ] = None,
    model: Annotated[str, typer.Option(help="timm model; for photographs resnet18 or a larger one")] = "test_resnet",
    model_args: Annotated[str, typer.Option(help="arguments of the timm model, key=value,…")] = "",
    resolution: Annotated[int | None, typer.Option(min=8, help="side of its input; by default that of the shards")] = (
        None
    ),
    kimg: Annotated[float, typer.Option(min=0.001, help="thousands of images to fit on")] = 20,
    batch: Annotated[int, typer.Option(min=4)] = 64,
    lr: Annotated[float, typer.Option(min=0, help="peak learning rate")] = 4e-3,
    rotation: Annotated[float, typer.Option(min=0, max=180, help="largest turn in augmentation, degrees")] = 10,
    mirror: Annotated[bool, typer.Option(help="images may be flipped left to right: not for digits")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train an attribute classifier on labelled images and say how well it tells each attribute.

    Examples:

      python tools/fit_attributes.py digits

      python tools/fit_attributes.py img_align_celeba/ --table list_attr_celeba.txt --resolution 128 --model resnet18 --kimg 2000 --mirror
    """  # noqa: E501 (a command to copy)
    console = Console()
    options.check_model_file(out)
    side = _resolution(data, resolution)
    images = read_images(data, side)
    names, labels = labelled(images, table, data)
    facts = {**parse_args(model_args), "num_classes": len(names)}
    net, kwargs = build(model, facts, side, seed, role="classifier")

    order = torch.arange(len(images.pixels))
    halves = hold_out(Images(images.pixels, order, (), images.names), seed)
    (train, test), (train_labels, test_labels) = halves, [labels[half.labels] for half in halves]
    for a, name in enumerate(names):
        for part in (train_labels, test_labels):
            if part[:, a].sum() in (0, len(part)):
                share = "every" if part[:, a].any() else "no"
                raise UserError(f"attribute {name} is present in {share} image of {len(part)}: it cannot be learnt "
                                "and judged on these; give more images, or leave it out of the table")
    mean, std = channel_statistics(train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"{len(images.pixels)} images, {len(train.pixels)} of them to fit on; {len(names)} attributes; "
                  f"{model} of {sum(p.numel() for p in net.parameters()):,} parameters at {side}x{side}")

    mean_c, std_c = (torch.tensor(v).view(1, 3, 1, 1).to(device) for v in (mean, std))
    views = Views(rotation, mirror)
    fit(net.to(device), train, train_labels, mean_c, std_c, views, kimg=kimg, batch=batch, lr=lr,
        console=console)

    def classifier(accuracy: Sequence[float | None]) -> AttributeClassifier:
        return AttributeClassifier(net, names, input_size=(side, side), mean=mean, std=std,
                                   balanced_accuracy=accuracy).to(device)

    untold = classifier([None] * len(names))
    batches = torch.arange(len(test.pixels)).split(256)
    logits = torch.cat([untold(test.unit(part).to(device) * 2 - 1).cpu() for part in batches])
    fitted = classifier(balanced_accuracies(logits, test_labels))
    options.make_folder(out)
    save_attributes(out, fitted, model=model, kwargs=kwargs,
                    source=shlex.join(["python", "tools/fit_attributes.py", *sys.argv[1:]]))
    console.print(_report(fitted, test_labels))
    if weak := fitted.weak():
        console.print(f"{len(weak)} of {len(names)} attributes are below {WEAK} and are not scored without "
                      "--allow-weak")
    console.print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    app()
