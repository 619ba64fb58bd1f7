"""How good generated digits are: the share that a digit classifier is sure of, and how they spread over the classes.

    python tools/score_digits.py SNAPSHOT --samples 1000

The classifier is scikit-learn's SVC(gamma=0.001) on its 1,797 digits of 8×8 pixels, with the calibration of LIBSVM
(Platt's sigmoid for each of the 45 pairs of classes, joined by Wu, Lin and Weng, JMLR 5, 2004, eq. 21), which is what
SVC(probability=True) does (equal to 0.045 on every input tried) and scikit-learn ≥ 1.9 deprecates. Its suggestion in
place of that, CalibratedClassifierCV around the ten-class SVC, is no measure of digits, since it is sure of anything.
Measured, shares above 0.9 of: real digits seen in training; the same in 5-fold cross-validation; uniform noise; noise
with the mean and deviation of every pixel of real digits; averages of two digits; half of one on half of another:

    calibration                          real, seen   real, unseen   noise   pixel noise   averages   halves
    pairs, sigmoid (this)                      99 %           87 %     0 %           2 %       18 %     20 %
    ten classes, sigmoid, one SVC              93 %           91 %    93 %          85 %       76 %     78 %
    ten classes, isotonic, five SVCs           99 %           98 %     1 %          31 %       76 %     68 %
    ten classes, temperature, five SVCs        99 %           99 %    63 %          77 %       82 %     81 %

So 99 % is what a model gets that repeats its training set; 87 % what a perfect one gets that makes new digits.
"""

from __future__ import annotations

import functools
import json
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hsrgan.engine.aside import written_aside
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.pictures import save_png, to_uint8
from hsrgan.engine.sampler import MAX_SEED, check_memory, check_psi, generate, place
from hsrgan.engine.sizes import in_words
from hsrgan.engine.snapshot import load_snapshot

CLASSES = 10
SIDE = 8  # pixels of the originals, whose values are whole numbers from 0 to 16
SURE = 0.9
SHOWN = 100  # samples in the picture
CAPTION = 14  # pixels below each of them

app = CommandLine()


class DigitClassifier:
    """SVC(gamma=0.001), calibrated pair by pair. Digits are [N, 64], values 0 … 16."""

    def __init__(self, digits: np.ndarray, labels: np.ndarray) -> None:
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.model_selection import StratifiedKFold
        from sklearn.svm import SVC

        folds = StratifiedKFold(5, shuffle=True, random_state=0)  # the data set's order is by writer
        self._pairs = {}
        for i, j in combinations(range(CLASSES), 2):
            pair = (labels == i) | (labels == j)
            model = CalibratedClassifierCV(SVC(gamma=0.001), ensemble=False, cv=folds)
            self._pairs[i, j] = model.fit(digits[pair], labels[pair] == i)

    def probabilities(self, digits: np.ndarray) -> np.ndarray:
        """[N, 10]: the p that minimises Σ_{i≠j} (r_ji·p_i − r_ij·p_j)² with Σp = 1, r_ij = P(class i | i or j)."""
        r = np.zeros((len(digits), CLASSES, CLASSES))
        for (i, j), model in self._pairs.items():
            r[:, i, j] = np.clip(model.predict_proba(digits)[:, 1], 1e-7, 1 - 1e-7)
            r[:, j, i] = 1 - r[:, i, j]
        system = np.ones((len(digits), CLASSES + 1, CLASSES + 1))  # Qp + b = 0 and Σp = 1
        system[:, :CLASSES, :CLASSES] = -r * r.transpose(0, 2, 1)
        system[:, range(CLASSES), range(CLASSES)] = (r**2).sum(1)
        system[:, CLASSES, CLASSES] = 0
        right = np.zeros((len(digits), CLASSES + 1, 1))
        right[:, CLASSES] = 1
        return np.linalg.solve(system, right)[:, :CLASSES, 0]


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 originals [1797, 64], values 0 … 16, and their classes."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


@functools.cache
def classifier() -> DigitClassifier:
    """Fitted on all real digits (about 1.2 s)."""
    return DigitClassifier(*real_digits())


def originals_scale(images: Tensor) -> np.ndarray:
    """Images [N, C, H, W] (uint8, or float in [−1, 1]; H = W, a multiple of 8) as [N, 64] on the originals' scale.

    Grey, averaged over H/8 squares, 0 … 16, and rounded, since the originals are whole numbers.
    """
    grey = to_uint8(images).cpu().double().mean(1, keepdim=True)
    small = torch.nn.functional.avg_pool2d(grey, images.shape[-1] // SIDE)
    return (small * (16 / 255)).round().flatten(1).numpy()


def nearest(digits: np.ndarray, *, among: np.ndarray | None = None) -> np.ndarray:
    """[N] Euclidean distance to the nearest of `among`; by default to the nearest other of `digits` itself."""
    distances = torch.cdist(torch.from_numpy(digits), torch.from_numpy(digits if among is None else among))
    if among is None:
        distances.fill_diagonal_(torch.inf)
    return distances.amin(1).numpy()


def _figures(probabilities: np.ndarray, distances: np.ndarray) -> dict:
    shares = np.bincount(probabilities.argmax(1), minlength=CLASSES) / len(probabilities)
    return {
        "samples": len(probabilities),
        "sure_share": float((probabilities.max(1) > SURE).mean()),
        "class_shares": shares.tolist(),
        "nearest_real": float(distances.mean()),
    }


def digit_score(images: Tensor) -> dict:
    """The figures of generated `images` (as `originals_scale` takes them), in 2 s for 1,000.

    samples: how many. sure_share: of them, those with a class of probability > 0.9. class_shares: ten, of all samples,
    by the likeliest class. nearest_real: mean distance to the nearest real digit, which lies 16.4 from its own nearest:
    far less means that training images are repeated.
    """
    digits = originals_scale(images)
    return _figures(classifier().probabilities(digits), nearest(digits, among=real_digits()[0]))


def real_score() -> dict:
    """The figures of the real digits, each judged by a classifier that has not seen it (5 folds, about 8 s)."""
    from sklearn.model_selection import StratifiedKFold

    digits, labels = real_digits()
    probabilities = np.zeros((len(digits), CLASSES))
    for seen, unseen in StratifiedKFold(5, shuffle=True, random_state=0).split(digits, labels):
        probabilities[unseen] = DigitClassifier(digits[seen], labels[seen]).probabilities(digits[unseen])
    seen_share = float((classifier().probabilities(digits).max(1) > SURE).mean())
    return {**_figures(probabilities, nearest(digits)), "sure_share_seen": seen_share}


def captioned(images: Tensor, probabilities: np.ndarray) -> Image.Image:
    """The first hundred images, ten a row, each with its likeliest class below: green where that is sure."""
    side, columns = 64, 10
    rows = -(-min(len(images), SHOWN) // columns)
    picture = Image.new("RGB", (columns * side, rows * (side + CAPTION)), "white")
    pen = ImageDraw.Draw(picture)
    for i, (image, probability) in enumerate(zip(images[:SHOWN], probabilities, strict=False)):
        x, y = i % columns * side, i // columns * (side + CAPTION)
        tile = Image.fromarray(to_uint8(image).float().mean(0).round().to(torch.uint8).cpu().numpy())
        picture.paste(tile.resize((side, side), Image.Resampling.NEAREST), (x, y))
        text = f"{probability.argmax()}  {probability.max():.2f}"
        pen.text((x + 8, y + side + 1), text, fill="green" if probability.max() > SURE else "gray")
    return picture


@app.command()
def main(
    snapshot: Annotated[Path, typer.Argument(help="A .safetensors file of a model trained on the built-in digits.")],
    samples: Annotated[int, typer.Option(min=1, help="How many samples to judge.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The first sample's seed; the others follow it.")] = 0,
    psi: Annotated[float, typer.Option(help="Truncation: 1 = none.")] = 1.0,
    json_file: Annotated[
        Path, typer.Option("--json", help="Where the figures go; the picture goes beside it as .png.")
    ] = Path("digit_score.json"),
) -> None:
    """Judge the digits of a snapshot by a classifier of real ones.

    Example:

      python tools/score_digits.py runs/quickstart/snapshots/000160000.safetensors --samples 1000
    """
    if seed + samples - 1 > MAX_SEED:
        raise UserError(f"--seed {seed}: with {samples} samples it passes the last seed, {MAX_SEED}; start lower")
    generator, metadata = load_snapshot(snapshot)
    channels, height, width = generator.img_shape
    if height != width or height % SIDE or channels == 4:
        made = f"{in_words((height, width))} images of {channels} channel(s)"
        raise UserError(f"{snapshot} makes {made}; digits need a multiple of {SIDE}x{SIDE}, grey or RGB")
    check_psi(psi)
    check_memory(samples, 4 * generator.num_ws * generator.w_dim + channels * height * width)
    images = generate(place(generator), range(seed, seed + samples), psi=psi, batch=64)
    score, real = digit_score(images), real_score()
    with written_aside(json_file) as aside:
        facts = {"snapshot": str(snapshot), "kimg": metadata["kimg"], "seed": seed, "psi": psi}
        aside.write_text(json.dumps({**facts, **score, "real": real}, indent=2) + "\n", encoding="utf-8")
    picture = json_file.with_suffix(".png")
    save_png(captioned(images, classifier().probabilities(originals_scale(images[:SHOWN]))), picture)
    _print(score, real)
    typer.echo(f"figures in {json_file}, the first {min(samples, SHOWN)} samples in {picture}")


def _print(score: dict, real: dict) -> None:
    table = Table()
    for heading in ("", "samples", "real digits"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("judged", f"{score['samples']}", f"{real['samples']}")
    real_sure = f"{real['sure_share']:.1%} unseen, {real['sure_share_seen']:.1%} seen"
    table.add_row(f"sure (> {SURE})", f"{score['sure_share']:.1%}", real_sure, end_section=True)
    for digit, (share, of_real) in enumerate(zip(score["class_shares"], real["class_shares"], strict=True)):
        table.add_row(f"class {digit}", f"{share:.1%}", f"{of_real:.1%}")
    Console(width=72).print(table)
    typer.echo(
        f"mean distance to the nearest real digit: samples {score['nearest_real']:.1f}, "
        f"real digits to another {real['nearest_real']:.1f} (far less would be copies)"
    )


if __name__ == "__main__":
    app()
