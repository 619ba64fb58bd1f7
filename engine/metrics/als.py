"""ALS of one or several models from end to end: sequences, scores with intervals, table, curves and strips.

    measured = {label: measure(generator, classifier, label=label, …) for each model}     every rank calls it
    report = als_report(measured)                                                         then the first rank alone
    write_als(folder, report, measured)

Two kinds of sequence, apart: `pairs` (random w0 → w1) and `edits` (w → w + α·d_a, d_a from an SVM in the model's own W,
α = `strength` standard deviations of w along it). The formula and its intervals are in `attribute_linearity`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from hsrgan.engine.aside import writable, written_aside
from hsrgan.engine.distributed import World, from_first
from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import ClassCounts
from hsrgan.engine.metrics.als_pictures import draw_linearity, draw_strips, extremes, small
from hsrgan.engine.metrics.attribute_linearity import linearity, nonlinearity, shared_sigma, spread
from hsrgan.engine.metrics.attributes import AttributeClassifier
from hsrgan.engine.metrics.directions import FEWEST, SHARE, Directions, fit_directions
from hsrgan.engine.metrics.positions import Told, silent
from hsrgan.engine.metrics.sequences import FRAMES, attribute_edits, random_pairs, random_samples, strip

STRENGTH = 2.0  # standard deviations of w: the edit ends where w still is at home
STRIPS = 3  # of each end, in the picture
SIGMAS = {"own": "each model's own σ", "shared": "one σ for all models"}


@dataclass(frozen=True)
class Measured:
    """Of one model: logits of pairs [n, T, a] and of edits [n, e, T, a], where edit e is along `directions.names[e]`,
    which is attribute e; and what they were drawn with. strips: the STRIPS straightest edits and as many of the most
    bent, by Σ_t δ² averaged over attributes: a caption and frames [T, C, R, R] uint8.
    """

    pairs: Tensor
    edits: Tensor
    directions: Directions
    strength: float
    seed: int
    strips: list[tuple[str, Tensor]]


def samples_of(count: int) -> int:
    """Random images that directions are fitted to, where there are `count` sequences: as many as `directions` needs."""
    return max(20 * count, round(FEWEST / SHARE))


def images_of(count: int, attributes: int) -> int:
    """How many images `measure` makes, over all ranks: the total of its progress."""
    return samples_of(count) + count * FRAMES * (1 + attributes)


def measure(
    generator: nn.Module,
    classifier: AttributeClassifier,
    *,
    label: str,
    count: int,
    seed: int,
    world: World,
    strength: float = STRENGTH,
    class_counts: ClassCounts = (),
    told: Told = silent,
) -> Measured:
    """Make and classify the sequences of one model. A collective: every rank calls it, and every rank has the result.

    classifier: of the attributes to score (`AttributeClassifier.restricted`), on the rank's device, as the generator.
    label: what the model is called. count: sequences of each kind, and of each edit. told of images.
    """
    drawn = {"seed": seed, "world": world, "class_counts": class_counts, "told": told}
    found = random_samples(generator, classifier, count=samples_of(count), **drawn)
    directions = None
    if world.first:
        w, logits = found.w.numpy(), found.logits.numpy()
        directions = fit_directions(w, logits, classifier.names, seed=seed, snapshot=label)
    directions = from_first(directions)
    shifts = torch.stack([directions.shift(name, strength) for name in directions.names])
    pairs = random_pairs(generator, classifier, count=count, **drawn)
    edits = attribute_edits(generator, classifier, shifts, count=count, **drawn)

    bends, strips = nonlinearity(edits).mean(-1), []  # [n, e]
    for kind, indices in zip(("straightest", "most bent"), extremes(bends.flatten(), STRIPS), strict=True):
        for position, e in (divmod(index, len(shifts)) for index in indices):
            place = {"seed": seed, "device": world.device, "class_counts": class_counts}
            frames = strip(generator, position, shifts[e], **place)
            caption = f"{kind}: {classifier.names[e]} +{strength:g} std, bend {bends[position, e]:.3g}"
            strips.append((f"{label}, {caption}", small(frames)))
    return Measured(pairs, edits, directions, strength, seed, strips)


def als_report(measured: Mapping[str, Measured]) -> dict:
    """JSON-able: for each model's label and each kind, `own` (σ of the model) and, for several models, `shared` (one σ
    for all of them), each as `attribute_linearity.linearity` gives it. Edits also have, in each attribute, `along`: ALS
    and interval of the attribute along its own edit alone.

    Raises `UserError` for models that were measured with different attributes or seeds.
    """
    first = next(iter(measured.values()))
    names = first.directions.names
    for label, one in measured.items():
        if (one.directions.names, one.seed) != (names, first.seed):
            raise UserError(f"{label} was measured with other attributes or another seed than the rest: they cannot be "
                            "compared; measure all of them alike")
    report: dict = {"seed": first.seed, "frames": FRAMES, "strength": first.strength, "models": {}}
    shared = {kind: shared_sigma([getattr(one, kind) for one in measured.values()]) for kind in ("pairs", "edits")}
    for label, one in measured.items():
        kinds = {}
        for kind in ("pairs", "edits"):
            logits = getattr(one, kind)
            scores = {"own": linearity(logits, names, seed=one.seed)}
            if len(measured) > 1:
                scores["shared"] = linearity(logits, names, shared[kind], seed=one.seed)
            kinds[kind] = scores
        for scores, sigma in (("own", spread(one.edits)), ("shared", shared["edits"])):
            if scores in kinds["edits"]:
                for e, name in enumerate(names):
                    alone = linearity(one.edits[:, e, :, e : e + 1], [name], sigma[e : e + 1], seed=one.seed)
                    along = {key: alone[key] for key in ("als", "interval")}
                    kinds["edits"][scores]["attributes"][name]["along"] = along
        kinds["direction_accuracy"] = dict(zip(names, one.directions.quality, strict=True))
        report["models"][label] = kinds
    return report


def als_tables(report: dict) -> list[Table]:
    """ALS and its 95 % interval for each kind of sequence and each σ: a row for each attribute, a column a model."""

    def cell(entry: dict) -> str:
        low, high = entry["interval"]
        return f"{entry['als']:.3f} [{low:.3f}, {high:.3f}]"

    tables = []
    for kind, sigma in itertools.product(("pairs", "edits"), SIGMAS):
        columns = {label: kinds[kind][sigma] for label, kinds in report["models"].items() if sigma in kinds[kind]}
        if columns:
            first = next(iter(columns.values()))
            title = f"ALS of {first['sequences']} {kind}, {SIGMAS[sigma]}"
            caption = "0 = linear; [95 % interval]"
            table = Table("attribute", title=title, title_justify="left", caption=caption, caption_justify="left")
            for label in columns:
                table.add_column(label, justify="right")
            for name in first["attributes"]:
                table.add_row(name, *(cell(result["attributes"][name]) for result in columns.values()))
            table.add_section()
            table.add_row("mean", *(cell(result) for result in columns.values()))
            tables.append(table)
    return tables


def write_als(folder: Path, report: dict, measured: Mapping[str, Measured]) -> list[Path]:
    """Write als.json, curves of each kind (als_pairs.png, als_edits.png; one σ for all models where there are several)
    and, for each model, the straightest and the most bent edits (als_strips_<n>.png). Returns the files.
    """
    with writable(folder, "name another --out"):
        folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "als.json"]
    with written_aside(files[0]) as aside:
        aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for kind in ("pairs", "edits"):
        files.append(folder / f"als_{kind}.png")
        curves = {label: kinds[kind].get("shared", kinds[kind]["own"]) for label, kinds in report["models"].items()}
        count, sigma = next(iter(curves.values()))["sequences"], "shared" if len(curves) > 1 else "own"
        title = f"how far the logit is from its chord, mean of {count} {kind}; {SIGMAS[sigma]}"
        draw_linearity(curves, title, files[-1])
    for number, one in enumerate(measured.values()):
        files.append(folder / f"als_strips_{number}.png")
        draw_strips(one.strips, files[-1])
    return files
