"""Fit a small teacher for HSR on images alone, without labels: seconds to minutes on a CPU.

Two views of every image (moved, turned, zoomed, with other contrast, blur and noise) go through one timm network. Their
last maps must agree, as a whole and point by point: since the views' geometry is known, a point of one map is compared
with the same point of the scene in the other (VICRegL, Bardes et al., arXiv 2210.01571). What keeps the features from
collapsing is VICReg's (arXiv 2105.04906): every projected dimension varies over the batch, and no two do together.
A fifth of the images takes no part; the closing figures are measured on it.
"""

from __future__ import annotations

import copy
import io
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from hsrgan.engine.alpha import over_grey
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.data import Plan, open_stream
from hsrgan.engine.digits import ensure_digits
from hsrgan.engine.errors import UserError
from hsrgan.engine.shards import MANIFEST, load_manifest
from hsrgan.engine.teacher import Teacher, create_timm, load_teacher, save_teacher
from hsrgan.tools import options
from hsrgan.tools.pack_sources import open_source, reader

SMALL_VIT = "vit_tiny_patch16_224"
# 205,000 parameters, 0.8 MB: 4 ms for 32 images of 16×16 on two cores, the cheapest grid that still says where.
SMALL_VIT_ARGS = "patch_size=4,embed_dim=64,depth=4,num_heads=4,class_token=false,global_pool=avg,fc_norm=false"
MAX_BYTES = 2 << 30  # images are held in memory as bytes; what is beyond this is not needed for a small network
HELD_OUT = 0.2
WINDOW = 16  # shards that are shuffled together while they are read
MAX_JUDGED = 5000  # images on each side of the closing figures, whose cost is their product


@dataclass(frozen=True)
class Images:
    """pixels uint8 [M, C, R, R]; labels int64 [M], or None, and what the classes are called; names of the M images:
    file names in their source, or the keys of the samples in shards (00000000, …).
    """

    pixels: Tensor
    labels: Tensor | None
    class_names: Sequence[str]
    names: Sequence[str]

    def part(self, index: Tensor) -> Images:
        labels = None if self.labels is None else self.labels[index]
        return Images(self.pixels[index], labels, self.class_names, [self.names[i] for i in index.tolist()])

    def unit(self, index: Tensor | slice = slice(None)) -> Tensor:
        """float [m, C, R, R] in [0, 1]."""
        return self.pixels[index].float() / 255


def read_images(data: str, resolution: int) -> Images:
    """Every image of `data`, up to MAX_BYTES, area-resized to resolution².

    data: packed shards (rectangles squeezed and RGBA over mid-grey, as a teacher sees fakes), anything that
    tools/pack.py packs (cropped to a square here), or the word "digits".
    """
    path = ensure_digits("datasets", max(resolution, 8), 1) if data == "digits" else Path(data)
    if path.name == MANIFEST or (path / MANIFEST).is_file():
        return _read_shards(path, resolution)
    source = open_source(path, labels=None, resolution=resolution)
    pixels, labels, names, skipped = [], [], [], 0
    read = reader(source.kind, str(source.path))
    for at in range(_fitting(len(source.names), 3 * resolution**2)):
        name = source.names[at]
        try:
            image = Image.open(io.BytesIO(read(name, None if source.entries is None else source.entries[at])))
            image = image.convert("RGB")
        except Exception:  # a damaged image makes PIL raise nearly anything
            skipped += 1
            continue
        pixels.append(np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.BOX)))
        labels.append(-1 if source.labels is None else int(source.labels[at]))
        names.append(name)
    if skipped:
        print(f"skipped {skipped} damaged images", file=sys.stderr)
    if not pixels:
        raise UserError(f"{data} holds no readable image: name a folder, zip or LMDB of images, or packed shards")
    stack = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    one_each = source.labels is not None and source.label_sets is None
    return Images(stack, torch.tensor(labels) if one_each else None, source.class_names, names)


def _fitting(count: int, size: int) -> int:
    """How many of `count` images of `size` bytes MAX_BYTES holds; said where that is not all."""
    fitting = max(1, min(count, MAX_BYTES // size))
    if fitting < count:
        print(f"{fitting} of {count} images are used: {MAX_BYTES >> 30} GiB of memory hold no more", file=sys.stderr)
    return fitting


def _read_shards(path: Path, resolution: int) -> Images:
    manifest = load_manifest(path)
    count = _fitting(manifest.count, manifest.channels * resolution**2)
    pixels, labels = [], []
    stream = open_stream(manifest, seed=0, start=0, global_batch=1, window=WINDOW)
    for images, one_hot in stream:  # one epoch, each image once
        small = over_grey(images)
        if small.shape[2:] != (resolution, resolution):
            small = F.adaptive_avg_pool2d(small.float(), resolution)
        pixels.append(small.round().to(torch.uint8))
        labels.append(one_hot)
        if len(pixels) == count:
            break
    plan, first = Plan([s.count for s in manifest.shards], seed=0, window=WINDOW), [0]
    for shard in manifest.shards:
        first.append(first[-1] + shard.count)
    places = (plan[position] for position in range(count))
    names = [f"{first[shard] + sample:08d}" for shard, sample, _ in places]
    known = torch.cat(labels).argmax(1) if manifest.num_classes and manifest.label_sets is None else None
    return Images(torch.cat(pixels), known, manifest.class_names, names)


def hold_out(images: Images, seed: int) -> tuple[Images, Images]:
    """The images to fit on and the fifth of them to judge by, drawn by seed."""
    order = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(seed))
    kept = round(len(order) * (1 - HELD_OUT))
    return images.part(order[:kept]), images.part(order[kept:])


@dataclass(frozen=True)
class Views:
    """How two views of one image may differ. rotation in degrees; mirror: left-right flips."""

    rotation: float
    mirror: bool

    def geometry(self, n: int, device: torch.device) -> Tensor:
        """[n, 3, 3]: a view's coordinates → the image's, both in [−1, 1]."""
        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(n, device=device).uniform_(low, high)

        angle = uniform(-self.rotation, self.rotation) * (math.pi / 180)
        zoom, stretch, shear = uniform(-0.3, 0.2).exp(), uniform(-0.15, 0.15).exp(), uniform(-0.2, 0.2)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([cos, -sin, sin, cos], 1).view(n, 2, 2)
        scale = torch.stack([zoom, shear * zoom, torch.zeros_like(zoom), zoom * stretch], 1).view(n, 2, 2)
        affine = torch.eye(3, device=device).repeat(n, 1, 1)
        affine[:, :2, :2] = turn @ scale
        affine[:, :2, 2] = torch.stack([uniform(-0.2, 0.2), uniform(-0.2, 0.2)], 1)
        if self.mirror:
            affine[:, :, 0] *= torch.where(uniform(0, 1) < 0.5, -1.0, 1.0).view(n, 1)
        return affine

    def draw(self, img: Tensor, affine: Tensor) -> Tensor:
        """img [n, C, R, R] in [0, 1] seen through affine, with other colours, blur, contrast, brightness and noise."""
        n = len(img)

        def uniform(low: float, high: float, channels: int = 1) -> Tensor:
            return torch.empty(n, channels, 1, 1, device=img.device).uniform_(low, high)

        grid = F.affine_grid(affine[:, :2], list(img.shape), align_corners=False)
        x = F.grid_sample(img, grid, padding_mode="border", align_corners=False)
        if img.shape[1] == 3:
            x = x * uniform(-0.2, 0.2, 3).exp()
            x = x.lerp(x.mean(1, keepdim=True), (uniform(0, 1) < 0.2).float())
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = x.lerp(blurred, uniform(0, 0.8) * (uniform(0, 1) < 0.5))
        x = 0.5 + (x - 0.5) * uniform(-0.5, 0.4).exp() + uniform(-0.15, 0.15)
        return (x + torch.randn_like(x) * uniform(0, 0.075)).clamp(0, 1)


class Projector(nn.Sequential):
    """Features [M, C] → the space in which two views must agree; dropped after the fit."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(nn.Linear(channels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    """VICReg of two projections [M, D] of the same M things: invariance 25, variance 25, covariance 1."""
    loss = 25 * F.mse_loss(a, b)
    for z in (a - a.mean(0), b - b.mean(0)):
        loss = loss + 12.5 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        covariance = z.T @ z / (len(z) - 1)
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
    return loss


def same_points(a: Tensor, b: Tensor, affine_a: Tensor, affine_b: Tensor, points: int = 8) -> tuple[Tensor, Tensor]:
    """Features [M, C] of both maps [n, C, h, w] at random places of the scene that both views show."""
    at_b = torch.rand(len(a), points, 2, device=a.device) * 1.6 - 0.8
    homogeneous = torch.cat([at_b, torch.ones_like(at_b[..., :1])], 2)
    at_a = (homogeneous @ (torch.linalg.inv(affine_a) @ affine_b).transpose(1, 2))[..., :2]
    seen = at_a.abs().amax(2) < 0.9
    found_a, found_b = (  # "border": beyond the outermost cells' centres there is nothing to mix with
        F.grid_sample(m, at[:, None], padding_mode="border", align_corners=False)[:, :, 0].transpose(1, 2)
        for m, at in ((a, at_a), (b, at_b)))
    return found_a[seen], found_b[seen]


def fit(net: nn.Module, images: Images, mean: Tensor, std: Tensor, views: Views, *, kimg: float, batch: int, lr: float,
        console: Console) -> None:
    """Train net in place for kimg thousand images (each seen as two views), AdamW with warm-up and a cosine decay."""
    device = mean.device
    channels = _last_map(net, (images.unit(slice(2)).to(device) - mean) / std).shape[1]
    whole, local = Projector(channels, 256).to(device), Projector(channels, 128).to(device)
    optimiser = torch.optim.AdamW([p for m in (net, whole, local) for p in m.parameters()], lr=lr, weight_decay=0.05)
    steps = max(1, round(kimg * 1000 / batch))
    net.train()
    began = time.perf_counter()
    with Progress(TextColumn("fitting"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn(),
                  TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps, status="")
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = lr * min((step + 1) / (0.1 * steps), 1) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            img = images.unit(torch.randint(len(images.pixels), (batch,))).to(device)
            affine_a, affine_b = views.geometry(batch, device), views.geometry(batch, device)
            pair = torch.cat([views.draw(img, affine_a), views.draw(img, affine_b)])
            map_a, map_b = _last_map(net, (pair - mean) / std).chunk(2)
            whole_loss = vicreg(whole(map_a.mean((2, 3))), whole(map_b.mean((2, 3))))
            point_a, point_b = same_points(map_a, map_b, affine_a, affine_b)
            local_loss = vicreg(local(point_a), local(point_b))
            optimiser.zero_grad()
            (whole_loss + local_loss).backward()
            optimiser.step()
            seen = (step + 1) * batch
            status = f"{seen / 1000:.1f} kimg  {seen / (time.perf_counter() - began):.0f} img/s"
            progress.update(task, advance=1, status=status)
            if step % max(steps // 10, 1) == 0 or step == steps - 1:
                progress.console.print(f"{status}  loss {whole_loss.item():.2f} whole, {local_loss.item():.2f} points")


def _last_map(net: nn.Module, x: Tensor) -> Tensor:
    return net.forward_intermediates(x.expand(-1, 3, -1, -1), indices=1, norm=True, intermediates_only=True)[-1]


@torch.no_grad()
def features(teacher: Teacher, img: Tensor) -> Tensor:
    """[m, C]: the mean over places of the teacher's only map, of img [m, C, H, W] in [0, 1]."""
    return torch.cat([next(iter(teacher(part * 2 - 1).values())).mean((2, 3)) for part in img.split(256)])


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 5) -> float:
    """Share of test rows whose k nearest training rows (cosine, centred) vote for their label."""
    centre = train.mean(0)
    nearest = (F.normalize(test - centre) @ F.normalize(train - centre).T).topk(min(k, len(train))).indices
    return (train_labels[nearest].mode(1).values == test_labels).float().mean().item()


def few_label_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Mean over 10 draws of the nearest neighbour's accuracy when only 10 training images of each class bear labels."""
    generator, scores = torch.Generator().manual_seed(0), []
    for _ in range(10):
        order = torch.randperm(len(train), generator=generator)
        few = torch.cat([order[train_labels[order] == c][:10] for c in train_labels.unique()])
        scores.append(knn_accuracy(train[few], train_labels[few], test, test_labels, k=1))
    return sum(scores) / len(scores)


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a linear probe: ridge regression (0.01) on standardised features to one-hot labels."""
    centre, spread = train.mean(0), train.std(0) + 1e-4
    rows, questions = (F.pad(((x - centre) / spread).double(), (0, 1), value=1.0) for x in (train, test))
    gram = rows.T @ rows + 0.01 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, rows.T @ F.one_hot(train_labels).double())
    return ((questions @ weights).argmax(1) == test_labels).float().mean().item()


def view_retrieval(teacher: Teacher | None, img: Tensor, views: Views) -> float:
    """Without labels: share of images (1,000 at most) whose second view is nearest to their own first view."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pair = [views.draw(img[:1000], views.geometry(len(img[:1000]), img.device)) for _ in range(2)]
    a, b = (p.flatten(1) if teacher is None else features(teacher, p) for p in pair)
    return knn_accuracy(a, torch.arange(len(a)), b, torch.arange(len(b)), k=1)


def judge(teachers: dict[str, Teacher], train: Images, test: Images, views: Views) -> Table:
    """What the features know of images that took no part in the fit, beside the raw pixels."""
    train, test = (part.part(torch.arange(min(len(part.pixels), MAX_JUDGED))) for part in (train, test))
    table = Table(title=f"{len(test.pixels)} held-out images, last layer averaged over places")
    scores = [] if train.labels is None else [("5 nearest neighbours", knn_accuracy),
                                              ("10 labels a class", few_label_accuracy),
                                              ("linear probe", probe_accuracy)]
    for heading in ("features", *(name for name, _ in scores), "own view found"):
        table.add_column(heading)
    for name, teacher in [*teachers.items(), ("raw pixels", None)]:
        rows = [part.unit().flatten(1) if teacher is None else features(teacher, part.unit()) for part in (train, test)]
        found = [score(rows[0], train.labels, rows[1], test.labels) for _, score in scores]
        table.add_row(name, *(f"{value:.1%}" for value in (*found, view_retrieval(teacher, test.unit(), views))))
    return table


def parse_args(text: str) -> dict[str, object]:
    """`a=1,b=true,c=avg` → {"a": 1, "b": True, "c": "avg"}."""
    out: dict[str, object] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--model-args {item!r} is not key=value: write it like {SMALL_VIT_ARGS}")
        try:
            out[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            out[key.strip()] = value
    return out


def build(
    model: str, kwargs: dict[str, object], resolution: int, seed: int, role: str = "teacher"
) -> tuple[nn.Module, dict[str, object]]:
    """The timm model for images of resolution², its weights drawn by `seed`; and its kwargs, with the size among them
    where the model needs it.
    """
    torch.manual_seed(seed)
    net = create_timm(model, role, **kwargs)
    if hasattr(net, "set_input_size"):  # its position table must be made for this size
        kwargs = {**kwargs, "img_size": resolution}
        torch.manual_seed(seed)
        net = create_timm(model, role, **kwargs)
    return net, kwargs


def channel_statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the images' three channels, in [0, 1]."""
    pixels = images.unit().expand(-1, 3, -1, -1)
    mean = [round(v, 4) for v in pixels.mean((0, 2, 3)).tolist()]
    return mean, [max(round(v, 4), 1e-3) for v in pixels.std((0, 2, 3)).tolist()]


app = CommandLine()


@app.command()
def main(
    data: Annotated[str, typer.Argument(help="packed shards; a folder, zip or LMDB of images; or the word digits")],
    out: Annotated[Path, typer.Option(help="the teacher file to write")] = Path("teacher.safetensors"),
    model: Annotated[str, typer.Option(help="timm model, built without its pretrained weights")] = SMALL_VIT,
    model_args: Annotated[str, typer.Option(help="arguments of the timm model, key=value,…; the default suits the "
                                                 "default model, any other starts with none")] = "",
    resolution: Annotated[int, typer.Option(min=4, help="side of the teacher's input in pixels")] = 16,
    kimg: Annotated[float, typer.Option(min=0.001, help="thousands of images to fit on")] = 180,
    batch: Annotated[int, typer.Option(min=4)] = 128,
    lr: Annotated[float, typer.Option(min=0, help="peak learning rate")] = 2e-3,
    rotation: Annotated[float, typer.Option(min=0, max=180, help="largest turn of a view, degrees")] = 20,
    mirror: Annotated[bool, typer.Option(help="views may be flipped left to right: not for digits or letters")] = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Fit a small teacher for HSR on images, self-supervised, and say what its features are worth.

    Examples:

      python tools/fit_teacher.py digits --out recipes/digits_teacher.safetensors

      python tools/fit_teacher.py photos/ --resolution 32 --kimg 500 --mirror

      python tools/fit_teacher.py shards/ --model resnet10t --resolution 64
    """
    console = Console()
    options.check_model_file(out)
    kwargs = {**parse_args(model_args or (SMALL_VIT_ARGS if model == SMALL_VIT else "")), "num_classes": 0}
    net, kwargs = build(model, kwargs, resolution, seed)
    images = read_images(data, resolution)
    if len(images.pixels) < 10:
        raise UserError(f"{data} holds {len(images.pixels)} images: give ten at least, better thousands")
    train, test = hold_out(images, seed)
    mean, std = channel_statistics(train)
    console.print(f"{len(images.pixels)} images, {len(train.pixels)} of them to fit on; {model} of "
                  f"{sum(p.numel() for p in net.parameters()):,} parameters at {resolution}x{resolution}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = Views(rotation, mirror)
    last = len(net.forward_intermediates(torch.zeros(2, 3, resolution, resolution), intermediates_only=True)) - 1
    statistics = [torch.tensor(v).view(1, 3, 1, 1).to(device) for v in (mean, std)]
    untrained = Teacher(copy.deepcopy(net), {resolution: last}, (resolution, resolution), mean, std)
    fit(net.to(device), train, *statistics, views, kimg=kimg, batch=batch, lr=lr, console=console)
    options.make_folder(out)
    save_teacher(out, net, model=model, kwargs=kwargs, input_size=(resolution, resolution), mean=mean, std=std,
                 command=shlex.join(["python", "tools/fit_teacher.py", *sys.argv[1:]]))
    fitted = load_teacher(str(out), layers={resolution: last})  # judged as it will be used: from the file
    console.print(judge({"fitted": fitted, "untrained": untrained}, train, test, views))
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB, layers 0 to {last}; in a recipe: hsr.teacher={out}")


if __name__ == "__main__":
    app()
