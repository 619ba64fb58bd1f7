"""ALS of one or several models from end to end: sequences, scores with intervals, table, curves and strips.

    measured = {label: measure(generator, classifier, snapshot=sha256, …) for each model}     every rank calls it
    report = als_report(measured)                                                             then the first rank alone
    write_als(folder, report, measured, generators)

Two kinds of sequence, apart: `pairs` (random w0 → w1) and `edits` (w → w + α·d_a, d_a from an SVM in the model's own W,
α = `strength` standard deviations of w along it). The formula and its intervals are in `attribute_linearity`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.als_pictures import draw_linearity, draw_strips, extremes
from hsrgan.engine.metrics.attribute_linearity import linearity, nonlinearity, shared_sigma, spread
from hsrgan.engine.metrics.attributes import AttributeClassifier
from hsrgan.engine.metrics.directions import Directions, fit_directions
from hsrgan.engine.metrics.positions import gathered
from hsrgan.engine.metrics.sequences import FRAMES, attribute_edits, random_pairs, random_samples, strip

STRENGTH = 2.0  # standard deviations of w: the edit ends where w still is at home
STRIPS = 3  # of each end, in the picture


@dataclass(frozen=True)
class Measured:
    """Of one model, from all ranks: logits of pairs [n, T, a] and of edits [n, e, T, a], where edit e is along
    `directions.names[e]`, which is attribute e; and what they were drawn with.
    """

    pairs: Tensor
    edits: Tensor
    directions: Directions
    strength: float
    seed: int
    class_counts: tuple[int, ...]

    def shifts(self) -> list[Tensor]:
        """α·d [w_dim] of each edit."""
        return [self.directions.shift(name, self.strength) for name in self.directions.names]


def images_of(count: int, samples: int, attributes: int) -> int:
    """How many images `measure` makes, over all ranks: the total of its progress."""
    return samples + count * FRAMES * (1 + attributes)


def measure(
    generator: nn.Module,
    classifier: AttributeClassifier,
    *,
    snapshot: str,
    count: int,
    samples: int,
    seed: int,
    batch: int,
    strength: float = STRENGTH,
    rank: int = 0,
    world_size: int = 1,
    class_counts: Sequence[int] = (),
    progress: Callable[[int], None] = lambda images: None,
) -> Measured:
    """Make and classify the sequences of one model. A collective: every rank calls it, and every rank has the result.

    classifier: of the attributes to score (`AttributeClassifier.restricted`), on the generator's device. snapshot:
    sha256 of the model's file. count: sequences of each kind, and of each edit. samples: random images for the
    directions. batch: images at a time. progress is told of images newly done by this rank.
    """
    drawn = {"seed": seed, "batch": batch, "rank": rank, "world_size": world_size, "class_counts": class_counts}
    drawn |= {"progress": progress}
    found = random_samples(generator, classifier, count=samples, **drawn).gathered()
    directions = fit_directions(found.w.numpy(), found.logits.numpy(), classifier.names, seed=seed, snapshot=snapshot)
    shifts = torch.stack([directions.shift(name, strength) for name in directions.names])
    pairs = gathered(random_pairs(generator, classifier, count=count, **drawn))
    edits = gathered(attribute_edits(generator, classifier, shifts, count=count, **drawn))
    return Measured(pairs, edits, directions, strength, seed, tuple(class_counts))


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
        kinds["direction_accuracy"] = dict(zip(names, one.directions.accuracy, strict=True))
        report["models"][label] = kinds
    return report


def als_table(report: dict) -> Table:
    """ALS and its 95 % interval, a row for each attribute and a column for each model, kind and σ."""
    table = Table(title="attribute linearity score (0 = linear), 95 % interval by bootstrap over sequences")
    table.add_column("attribute")
    columns = []
    for label, kinds in report["models"].items():
        for kind in ("pairs", "edits"):
            for sigma, result in kinds[kind].items():
                table.add_column(f"{label}\n{kind}, {sigma} σ", justify="right")
                columns.append(result)

    def cell(entry: dict) -> str:
        low, high = entry["interval"]
        return f"{entry['als']:.3f} [{low:.3f}, {high:.3f}]"

    for name in columns[0]["attributes"]:
        table.add_row(name, *(cell(result["attributes"][name]) for result in columns))
    table.add_section()
    table.add_row("mean", *(cell(result) for result in columns))
    return table


def write_als(
    folder: Path, report: dict, measured: Mapping[str, Measured], generators: Mapping[str, nn.Module]
) -> list[Path]:
    """Write als.json, curves of each kind (als_pairs.png, als_edits.png; one σ for all models where there are several)
    and, for each model, the straightest and the most bent edits (als_strips_<n>.png). Returns the files.
    """
    files = [folder / "als.json"]
    with written_aside(files[0]) as aside:
        aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for kind in ("pairs", "edits"):
        files.append(folder / f"als_{kind}.png")
        curves = {label: kinds[kind].get("shared", kinds[kind]["own"]) for label, kinds in report["models"].items()}
        draw_linearity(curves, files[-1])
    for number, (label, one) in enumerate(measured.items()):
        files.append(folder / f"als_strips_{number}.png")
        draw_strips(_strips(label, generators[label], one), files[-1])
    return files


def _strips(label: str, generator: nn.Module, one: Measured) -> list[tuple[str, Tensor]]:
    """The STRIPS straightest edits and the most bent ones, by Σ_t δ² averaged over attributes, with captions."""
    bends = nonlinearity(one.edits).mean(-1)  # [n, e]
    edits = bends.shape[1]
    shifts, names = one.shifts(), one.directions.names
    result = []
    for kind, indices in zip(("straightest", "most bent"), extremes(bends.flatten(), STRIPS), strict=True):
        for index in indices:
            position, e = divmod(index, edits)
            frames = strip(generator, position, shifts[e], seed=one.seed, class_counts=one.class_counts)
            caption = f"{label}: {kind}, {names[e]} +{one.strength:g} std, bend {bends[position, e]:.3g}"
            result.append((caption, frames))
    return result
