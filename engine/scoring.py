"""Scores in the middle of training: the recipe's metrics of the averaged G, and the snapshot that did best.

The run goes on as if nothing had happened, to the last bit: G is copied, random states and flags are put back.
"""

from __future__ import annotations

import time
from pathlib import Path

from hsrgan.engine.config import Recipe
from hsrgan.engine.distributed import World
from hsrgan.engine.errors import CannotWrite
from hsrgan.engine.metrics.extractor import load_extractor
from hsrgan.engine.metrics.names import parse_metrics
from hsrgan.engine.metrics.real_cache import RealCache
from hsrgan.engine.metrics.registry import Scorer, needed_extractors
from hsrgan.engine.metrics.report import shown
from hsrgan.engine.metrics.sampling import fp32_copy, undisturbed
from hsrgan.engine.model import Generator
from hsrgan.engine.outputs import Outputs
from hsrgan.engine.shards import Manifest
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.stats import RunLog, read_log

COMPARABLE = ("metric", "reals", "fakes", "protocol", "seed", "dataset_sha256")  # scores equal in these can be ranked


def scorer_of(
    recipe: Recipe, manifest: Manifest | None, world: World, generator: Generator, cache: RealCache | None = None
) -> Scorer:
    """Of the recipe's metrics, all that they need loaded; `UserError` for what is missing. manifest: None, in a dry
    run, leaves out the metrics that compare with reals, once their networks are found.
    """
    metrics, features = parse_metrics(recipe.metrics.names), recipe.metrics.features
    with undisturbed(generator):
        specs = needed_extractors(metrics, features)
        extractors = {spec: load_extractor(spec).to(world.device) for spec in specs}
    scorer = Scorer(
        [metric for metric in metrics if manifest or not metric.reals], extractors, manifest, world, features=features,
        seed=recipe.seed, workers=recipe.data.workers, cache=cache, extras={"attributes": recipe.metrics.attributes},
    )  # fmt: skip
    scorer.check(generator, "the recipe's generator")
    return scorer


class Scoring:
    """Made by every rank before training begins, so that what is missing is missed at once.

    images: where the run is taken up; the best of a resumed run stays the best until it is beaten. best: the result
    that the best snapshot had, with its `kimg`; since_best: evaluations after it.
    """

    def __init__(self, out: Outputs, images: int) -> None:
        self.out = out
        self.scorer = scorer_of(out.t.recipe, out.manifest, out.t.world, out.g_ema, RealCache(out.t.world))
        self.higher = self.scorer.metrics[0].higher
        self.best: dict | None = None
        self.since_best = 0
        if images and out.best_path.is_file():
            self._take_up(out.best_path, images)

    def _take_up(self, path: Path, images: int) -> None:
        self.best = load_snapshot(path)[1].get("score")
        if self.best:
            self.out.best_images = round(self.best["kimg"] * 1000)
            rows = read_log(Path(self.out.t.recipe.run_dir) / "log.jsonl")
            scored = [row["kimg"] for row in rows if f"metric/{next(iter(self.best['values']))}" in row]
            self.since_best = sum(self.best["kimg"] < kimg <= images / 1000 for kimg in scored)

    def __call__(self, images: int, log: RunLog) -> None:
        """Score, log, and keep the snapshot if the first metric says that none was better. Every rank calls it."""
        began = time.perf_counter()
        self.scorer.progress = log.working
        with undisturbed(self.out.g_ema):
            results = self.scorer.score(fp32_copy(self.out.g_ema))
        main, refused = results[0] | {"kimg": images / 1000}, None
        if self._better(main):
            try:
                self.out.best(images, main)
                self.best, self.since_best = main, 0
            except CannotWrite as error:  # the score is told all the same
                refused = error
        if self.best and images / 1000 > self.best["kimg"]:  # a resumed run may come to its best once more
            self.since_best += 1
        scalars = {f"metric/{name}": value for result in results for name, value in result["values"].items()}
        scores = ", ".join(f"{result['metric']} {shown(result)}" for result in results)
        since = f"{self.since_best} evaluation{'s' * (self.since_best != 1)} since"
        best = f"{shown(self.best)} at {self.best['kimg']:g} kimg, {since}" if self.since_best else "this one"
        log.message(f"{images / 1000:g} kimg: {scores}; best: {'this one, which is not kept' if refused else best}")
        log.scores(images, scalars | {"since_best": self.since_best}, time.perf_counter() - began)
        if refused:
            raise refused

    def _better(self, result: dict) -> bool:
        best = self.best
        if best is None or any(best[key] != result[key] for key in COMPARABLE):
            return True
        return result["value"] > best["value"] if self.higher else result["value"] < best["value"]
