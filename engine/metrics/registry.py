"""Score generators: several metrics by their published names, in one pass over the fakes and one over the reals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from hsrgan.engine import alpha
from hsrgan.engine.distributed import World, failing_together, from_first
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import sampling
from hsrgan.engine.metrics.features import Features
from hsrgan.engine.metrics.frechet import INFINITY_COUNTS, fid_infinity, frechet_distance
from hsrgan.engine.metrics.generator_metrics import GENERATOR_METRICS, GeneratorMetric, Job, Outcome
from hsrgan.engine.metrics.inception_score import InceptionScore
from hsrgan.engine.metrics.kid import kid
from hsrgan.engine.metrics.moments import Gaussian, Moments
from hsrgan.engine.metrics.names import Metric
from hsrgan.engine.metrics.positions import Progress, counter
from hsrgan.engine.metrics.precision_recall import precision_recall
from hsrgan.engine.metrics.real_cache import RealCache
from hsrgan.engine.model import Generator
from hsrgan.engine.shards import Manifest
from hsrgan.engine.sizes import in_words

DDOF = {"n-1": 1, "n": 0}  # what covariances are divided by: N − 1, or N as in NVIDIA's StyleGANs


@dataclass
class Statistics:
    """What one side, reals or fakes, leaves of one network's pass."""

    gaussians: dict[int, Gaussian] = field(default_factory=dict)
    features: Features | None = None
    scores: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """Of one side and one network: moments of the first N images for each N, features of the first so many (0: none),
    Inception Scores of the first N.
    """

    moments: tuple[int, ...]
    features: int
    scores: tuple[int, ...] = ()

    @property
    def images(self) -> int:
        return max((*self.moments, self.features, *self.scores), default=0)


class Scorer:
    """Scores any number of generators against one data set. Every rank makes one and calls the same methods.

    extractors: for each spec in `needed_extractors`, on the rank's device. manifest None: only metrics without reals.
    progress: told what the pass is for, and how far all ranks are, as this rank sees it. extras: for GENERATOR_METRICS.
    Raises `UserError` for fewer reals than a metric asks for, and for a metric that cannot be taken of these features.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        extractors: Mapping[str, nn.Module],
        manifest: Manifest | None,
        world: World,
        *,
        features: str | None = None,
        seed: int = 0,
        batch: int = 64,
        covariance: str = "n-1",
        workers: int = 0,
        cache: RealCache | None = None,
        progress: Progress = lambda *_: None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self.metrics, self.extractors, self.manifest, self.world = list(metrics), extractors, manifest, world
        self.spec = {metric.name: spec_of(metric, features) for metric in metrics}
        self.seed, self.batch, self.covariance, self.workers = seed, batch, covariance, workers
        self.cache, self.progress = cache, progress
        self.real_statistics: dict[str, Statistics] | None = None
        self.of_generator: dict[str, GeneratorMetric] = {}
        made: dict[type[GeneratorMetric], GeneratorMetric] = {}
        for metric in self.metrics:
            if metric.reals and manifest is None:
                raise UserError(f"{metric.name} compares with real images: name their shards with --data")
            if metric.kind == "is" and not hasattr(extractors[self.spec[metric.name]], "features_and_logits"):
                raise UserError(
                    f"{metric.name} needs the logits of inception, which {self.spec[metric.name]} has not: leave "
                    f"{metric.name} or the other features out"
                )
            if not metric.features:
                kind = GENERATOR_METRICS[metric.kind]
                if kind not in made:
                    made[kind] = kind(world, extras or {})
                self.of_generator[metric.name] = made[kind]
        self.reals = {metric.name: self._reals_of(metric) for metric in self.metrics}

    def _reals_of(self, metric: Metric) -> int:
        return metric.reals_of(self.manifest.count, str(self.manifest.root)) if metric.reals else 0

    def check(self, generator: Generator, name: str) -> None:
        """Raise `UserError` unless `generator`, called `name`, makes images like the reals and has their classes."""
        manifest = self.manifest
        if generator.c_dim and (manifest is None or manifest.num_classes != generator.c_dim):
            have = f"{manifest.root} has {manifest.num_classes or 'none'}" if manifest else "no --data is given"
            raise UserError(
                f"{name} draws from {generator.c_dim} classes and {have}: labels are drawn as the data set has them, "
                "so give the labelled shards that it was trained on"
            )
        if any(metric.reals for metric in self.metrics):
            channels, *size = generator.img_shape
            if (tuple(size), channels) != (manifest.resolution, manifest.channels):
                raise UserError(
                    f"{name} makes {in_words(size)} images of {channels} channel(s) and {manifest.root} holds "
                    f"{in_words(manifest.resolution)} of {manifest.channels}: give the shards that it was trained on"
                )
        for metric in self.metrics:
            if metric.name in self.of_generator:
                self.of_generator[metric.name].check(metric, generator, name)

    def score(self, generator: Generator, label: str = "G") -> list[dict[str, Any]]:
        """One JSON-able result for each metric, the same on every rank. generator: fp32, eval mode, on the device.

        label: what pictures of several generators call this one.
        `seconds` are of the passes, which metrics of one call share, and of the metric's own arithmetic.
        """
        began = time.perf_counter()
        with sampling.undisturbed(generator):
            real = self._real()
            fake = self._fake(generator)
            shared = time.perf_counter() - began
            results = []
            for metric in self.metrics:
                began = time.perf_counter()
                if metric.features:
                    spec = self.spec[metric.name]
                    outcome = self._compare(metric, real.get(spec), fake[spec], self.extractors[spec].protocol)
                    spent = shared
                else:
                    class_counts = self.manifest.drawn_labels if generator.c_dim else ()
                    job = Job(metric, generator, label, self.seed, self.world, class_counts, self.progress)
                    outcome, spent = self.of_generator[metric.name](job), 0.0
                if generator.img_channels == 4:
                    outcome.protocol["alpha"] = alpha.PROTOCOL
                results.append(self._result(metric, outcome, spent + time.perf_counter() - began))
        return from_first(results)

    def report(self, folder_of: Callable[[str], Path]) -> tuple[list[Table], list[Path]]:
        """What all generators scored so far tell together: tables, and files in `folder_of(a metric's name)`. On the
        first rank.
        """
        tables, files = [], []
        for metric in self.metrics:
            if metric.name in self.of_generator:
                more_tables, more_files = self.of_generator[metric.name].report(metric, folder_of(metric.name))
                tables += more_tables
                files += more_files
        return tables, files

    def _result(self, metric: Metric, outcome: Outcome, seconds: float) -> dict[str, Any]:
        result = {
            "metric": metric.name,
            "value": next(iter(outcome.values.values())),
            "values": outcome.values,
            "reals": self.reals[metric.name],
            "fakes": outcome.fakes,
            "protocol": outcome.protocol,
            "seed": self.seed,
            "seconds": round(seconds, 3),
            "dataset_sha256": self.manifest.sha256 if self.manifest else None,
        }
        return result | ({"details": outcome.details} if outcome.details else {})

    def _compare(self, metric: Metric, real: Statistics | None, fake: Statistics, protocol: dict) -> Outcome:
        """Ranks but the first leave out what is not a collective; `score` hands them the first one's results."""
        keys, first = metric.values, self.world.first
        protocol = {**protocol, "psi": "1", "noise": "random"}
        if metric.kind in ("fid", "fid_infinity"):
            protocol["covariance"] = self.covariance
            numbers = INFINITY_COUNTS if metric.kind == "fid_infinity" else (metric.fakes,)
            distances = [0.0] * len(numbers)
            if first:
                reals = real.gaussians[self.reals[metric.name]]
                distances = [self._distance(reals, fake.gaussians[n]) for n in numbers]
            values = [fid_infinity(numbers, distances) if metric.kind == "fid_infinity" else distances[0]]
        elif metric.kind == "kid":
            label = f"{metric.name}: subsets"
            sides = self._kept(metric, real, fake)
            values = kid(*sides, seed=self.seed, progress=lambda done, of: self.progress(label, done, of))
        elif metric.kind == "pr":
            label = f"{metric.name}: neighbours"
            sides = self._kept(metric, real, fake)
            values = precision_recall(*sides, progress=lambda done, of: self.progress(label, done, of))
        else:
            values = fake.scores[metric.fakes]
        return Outcome(dict(zip(keys, values, strict=True)), metric.fakes, protocol)

    def _kept(self, metric: Metric, real: Statistics, fake: Statistics) -> tuple[Features, Features]:
        return fake.features.first(metric.fakes), real.features.first(self.reals[metric.name])

    def _distance(self, real: Gaussian, fake: Gaussian) -> float:
        ddof = DDOF[self.covariance]
        return frechet_distance(real.mean, real.covariance(ddof), fake.mean, fake.covariance(ddof))

    def _real(self) -> dict[str, Statistics]:
        """Of each network, from memory, from the cache, or from a pass over the reals."""
        if self.real_statistics is None:
            needs = self._needs(fakes=False)
            found = {spec: self._cached(spec, need) for spec, need in needs.items()}
            missing = {spec: need for spec, need in needs.items() if found[spec] is None}
            if missing:
                count = max(need.images for need in missing.values())
                units = sampling.reals(self.manifest, count, self.batch, self.world, self.workers)
                made = self._pass(units, missing, self._label("reals", missing))
                for spec, statistics in made.items():
                    self._keep(spec, missing[spec], statistics)
                found |= made
            self.real_statistics = found
        return self.real_statistics

    def _fake(self, generator: Generator) -> dict[str, Statistics]:
        needs = self._needs(fakes=True)
        if not needs:
            return {}
        draws = Draws(self.seed, self.world.device, self.manifest.drawn_labels if generator.c_dim else ())
        count = max(need.images for need in needs.values())
        units = sampling.fakes(generator, draws, count, self.batch, self.world)
        return self._pass(units, needs, self._label("fakes", needs))

    def _label(self, side: str, needs: Iterable[str]) -> str:
        taking = [m.name for m in self.metrics if self.spec[m.name] in needs and (m.reals or side == "fakes")]
        return f"{side} for {', '.join(taking)}"

    def _needs(self, *, fakes: bool) -> dict[str, Needs]:
        needs = {}
        for spec in dict.fromkeys(spec for spec in self.spec.values() if spec):
            moments, features, scores = set(), 0, set()
            for metric in (m for m in self.metrics if self.spec[m.name] == spec):
                count = metric.fakes if fakes else self.reals[metric.name]
                if metric.kind == "fid_infinity":
                    moments |= set(INFINITY_COUNTS) if fakes else {count}
                elif metric.kind == "fid":
                    moments.add(count)
                elif metric.kind == "is":
                    scores |= {count} if fakes else set()
                else:
                    features = max(features, count)
            if moments or features or scores:
                needs[spec] = Needs(tuple(sorted(moments)), features, tuple(sorted(scores)))
        return needs

    def _pass(self, units: Iterable[tuple[Tensor, int]], needs: dict[str, Needs], label: str) -> dict[str, Statistics]:
        """Show units of images to the networks, and sum up what they see over the ranks."""
        passes = {spec: NetworkPass(self.extractors[spec], need, self) for spec, need in needs.items()}
        told = counter(self.progress, label, max(need.images for need in needs.values()), self.world)
        with failing_together():
            for images, first in units:
                images = images.to(self.world.device, non_blocking=True)
                for one in passes.values():
                    one.see(images, first)
                told(len(images))
        return {spec: one.statistics() for spec, one in passes.items()}

    def _facts(self, spec: str, images: int) -> dict[str, object]:
        content = sampling.content_sha256(self.manifest)
        return {"dataset": content, "images": images, "protocol": self.extractors[spec].protocol}

    def _cached(self, spec: str, need: Needs) -> Statistics | None:
        """All that is needed, or None."""
        found = Statistics()
        if self.cache is None:
            return None
        for count in need.moments:
            gaussian = self.cache.gaussian(self._facts(spec, count))
            if gaussian is None:
                return None
            found.gaussians[count] = gaussian
        if need.features:
            empty = Features(need.features, self.extractors[spec].dim, self.batch, self.world)
            found.features = self.cache.features(self._facts(spec, need.features), empty)
            if found.features is None:
                return None
        return found

    def _keep(self, spec: str, need: Needs, statistics: Statistics) -> None:
        if self.cache is not None:
            for count, gaussian in statistics.gaussians.items():
                self.cache.keep_gaussian(self._facts(spec, count), gaussian)
            if statistics.features is not None:
                self.cache.keep_features(self._facts(spec, need.features), statistics.features)


class NetworkPass:
    """One network's view of one side's images."""

    def __init__(self, extractor: nn.Module, need: Needs, scorer: Scorer) -> None:
        self.extractor, device = extractor, scorer.world.device
        self.moments = Moments(extractor.dim, need.moments, device) if need.moments else None
        self.kept = Features(need.features, extractor.dim, scorer.batch, scorer.world) if need.features else None
        self.scores = {count: InceptionScore(count, device) for count in need.scores}
        self.images = need.images

    def see(self, images: Tensor, first: int) -> None:
        """A whole unit of images, of which those below the count of this network's need count."""
        if first >= self.images:
            return
        if self.scores:
            features, logits = self.extractor.features_and_logits(images)
            for score in self.scores.values():
                score.add(logits, first)
        else:
            features = self.extractor(images)
        if self.moments:
            self.moments.add(features, first)
        if self.kept:
            self.kept.add(features, first)

    def statistics(self) -> Statistics:
        """A collective."""
        gaussians = self.moments.reduce() if self.moments else {}
        return Statistics(gaussians, self.kept, {count: score.reduce() for count, score in self.scores.items()})


def spec_of(metric: Metric, features: str | None) -> str | None:
    """The network that a metric takes: the user's, where one is named and the metric takes any, or its own."""
    return metric.features and (features or metric.features)


def needed_extractors(metrics: Sequence[Metric], features: str | None) -> list[str]:
    return list(dict.fromkeys(spec for metric in metrics if (spec := spec_of(metric, features))))
