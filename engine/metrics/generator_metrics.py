"""Metrics of a generator alone, by their published names: path length, separability and attribute linearity.

Each class is made once for all generators and all its metrics, with the rank's world and the caller's `extras`
(`attributes`: a classifier's file; `allow_weak`), loads what it needs and raises `UserError` where that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from hsrgan.engine.distributed import World
from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import ClassCounts
from hsrgan.engine.metrics.als import STRENGTH, Measured, als_report, als_tables, images_of, measure, write_als
from hsrgan.engine.metrics.attributes import AttributeClassifier, load_attributes
from hsrgan.engine.metrics.extractor import load_lpips
from hsrgan.engine.metrics.linear_separability import linear_separability
from hsrgan.engine.metrics.names import Metric
from hsrgan.engine.metrics.path_length import EPSILON, PROTOCOLS, SIDE, path_distances, path_length
from hsrgan.engine.metrics.positions import Progress, Told, counter
from hsrgan.engine.metrics.sequences import FRAMES, random_samples
from hsrgan.engine.model import Generator
from hsrgan.engine.tensor_files import sha256_of

SMALLEST = 16  # pixels that LPIPS's four poolings leave something of


@dataclass(frozen=True)
class Job:
    """What a metric is given, on every rank. label: of the generator; class_counts: of the data set, for its labels."""

    metric: Metric
    generator: Generator
    label: str
    seed: int
    world: World
    class_counts: ClassCounts
    progress: Progress

    @property
    def drawn(self) -> dict[str, Any]:
        return {"seed": self.seed, "world": self.world, "class_counts": self.class_counts}

    def told(self, what: str, total: int) -> Told:
        return counter(self.progress, what, total, self.world)


@dataclass(frozen=True)
class Outcome:
    """values by name, the main one first; fakes: images made; protocol: what the values depend on, text → text;
    details: what else is worth knowing, JSON-able.
    """

    values: dict[str, float]
    fakes: int
    protocol: dict[str, str]
    details: dict[str, Any] = field(default_factory=dict)


class GeneratorMetric:
    """Called with a job: its outcome, a collective."""

    def __init__(self, world: World, extras: Mapping[str, Any]) -> None:
        raise NotImplementedError  # every metric below defines it

    def check(self, metric: Metric, generator: Generator, name: str) -> None:
        """Raise `UserError` for a generator, called `name`, that cannot be scored."""

    def __call__(self, job: Job) -> Outcome:
        raise NotImplementedError  # every metric below defines it

    def report(self, metric: Metric, folder: Path) -> tuple[list[Table], list[Path]]:
        """What only all generators together tell: tables, and files made in `folder`. On the first rank."""
        return [], []


class PathLength(GeneratorMetric):
    def __init__(self, world: World, extras: Mapping[str, Any]) -> None:
        self.lpips = load_lpips().to(world.device)

    def check(self, metric: Metric, generator: Generator, name: str) -> None:
        side = SMALLEST * (2 if PROTOCOLS[metric.kind].crop else 1)
        if (smaller := min(generator.img_shape[1:])) < side:
            raise UserError(
                f"{name} makes images of {smaller} pixels and {metric.name} needs {side}: LPIPS "
                "would have nothing left to compare; leave it out"
            )

    def __call__(self, job: Job) -> Outcome:
        kind, count = job.metric.kind, job.metric.fakes
        told = job.told(f"{job.metric.name}: pairs", count)
        distances = path_distances(job.generator, self.lpips.distance, kind, count=count, told=told, **job.drawn)
        space, full, crop = PROTOCOLS[kind]
        side = min(job.generator.img_shape[1:])
        protocol = {
            **self.lpips.protocol,
            "resize": f"mean to {side // (side // SIDE)}" if side >= 2 * SIDE else "none",
            "crop": "rows 3/8-7/8, columns 2/8-6/8" if crop else "none",
            "space": space,
            "t": "uniform" if full else "0",
            "epsilon": str(EPSILON),
            "percentiles": "1-99",
            "psi": "1",
            "noise": "random, the same for both of a pair",
        }
        return Outcome({job.metric.name: path_length(distances)}, 2 * count, protocol, {"pairs": count})


class OfAttributes(GeneratorMetric):
    """classifier: of the attributes that it can tell."""

    def __init__(self, world: World, extras: Mapping[str, Any]) -> None:
        file = extras.get("attributes")
        if file is None:
            raise UserError(
                "ls and als need a classifier of attributes: give --attributes FILE (metrics.attributes in a recipe), "
                "made by tools/fit_attributes.py or tools/import_attributes.py"
            )
        whole = load_attributes(file)
        self.classifier: AttributeClassifier = whole.restricted(allow_weak=extras.get("allow_weak", False))
        self.classifier.to(world.device)
        self.protocol = {
            "network": "attributes",
            "weights_sha256": sha256_of(Path(file)),
            "attributes": ", ".join(self.classifier.names),
            "dtype": "float32",
            "psi": "1",
        }


class Separability(OfAttributes):
    def __call__(self, job: Job) -> Outcome:
        count, name, names = job.metric.fakes, job.metric.name, self.classifier.names
        told = job.told(f"{name}: images", count)
        found = random_samples(job.generator, self.classifier, count=count, told=told, **job.drawn)
        told = job.told(f"{name}: attributes", len(names))
        details = linear_separability(found.w.numpy(), found.logits.numpy(), names, job.world, told=told)
        protocol = self.protocol | {"noise": "random", "space": "w", "svm": "linear, C 1, judged on its own samples"}
        return Outcome({name: details.pop("ls")}, count, protocol, details)


class Linearity(OfAttributes):
    """measured: by the metric's name, then by the generator's label."""

    def __init__(self, world: World, extras: Mapping[str, Any]) -> None:
        super().__init__(world, extras)
        self.measured: dict[str, dict[str, Measured]] = {}

    def __call__(self, job: Job) -> Outcome:
        count, name = job.metric.fakes, job.metric.name
        total = images_of(count, len(self.classifier.names))
        one = measure(
            job.generator, self.classifier, label=job.label, count=count, told=job.told(f"{name}: images", total),
            **job.drawn,
        )  # fmt: skip
        self.measured.setdefault(name, {})[job.label] = one
        (kinds,) = als_report({job.label: one})["models"].values()
        own = {kind: kinds[kind]["own"] for kind in ("pairs", "edits")}
        details = {"sequences": count, "direction_accuracy": kinds["direction_accuracy"]}
        for kind, scores in own.items():
            attributes = {attribute: entry["als"] for attribute, entry in scores["attributes"].items()}
            details[kind] = {"interval": scores["interval"], "attributes": attributes}
        protocol = self.protocol | {
            "noise": "random, the same within a sequence",
            "sigma": "the model's own",
            "frames": str(FRAMES),
            "edit": f"{STRENGTH:g} standard deviations of w",
        }
        values = {f"{name}_{kind}": scores["als"] for kind, scores in own.items()}
        return Outcome(values, total, protocol, details)

    def report(self, metric: Metric, folder: Path) -> tuple[list[Table], list[Path]]:
        measured = self.measured[metric.name]
        report = als_report(measured)
        return als_tables(report), write_als(folder, report, measured)


GENERATOR_METRICS: dict[str, type[GeneratorMetric]] = {
    **dict.fromkeys(PROTOCOLS, PathLength),
    "ls": Separability,
    "als": Linearity,
}
