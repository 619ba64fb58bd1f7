"""Score snapshots: `python tools/eval.py SNAPSHOT… --data shards/ --metrics fid50k_full,kid50k_full`.

Under `deepspeed tools/eval.py …` the work is shared out among the GPUs; the figures stay the same.
"""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hsrgan.engine import distributed
from hsrgan.engine.aside import check_writable, writable
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError, user_errors
from hsrgan.engine.metrics.extractor import load_extractor
from hsrgan.engine.metrics.names import Metric, parse_metrics
from hsrgan.engine.metrics.real_cache import RealCache
from hsrgan.engine.metrics.registry import Scorer, needed_extractors
from hsrgan.engine.metrics.report import Bars, comparison_chart, comparison_table, short_names
from hsrgan.engine.model import Generator
from hsrgan.engine.peers import AGAIN, Peers
from hsrgan.engine.rendezvous import before_meeting
from hsrgan.engine.shards import load_manifest
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools import options

app = CommandLine()


class Resize(str, enum.Enum):
    """How inception and vgg16 are given images of another size."""

    tf1 = "tf1"
    clean = "clean"


class Covariance(str, enum.Enum):
    """What a covariance is divided by."""

    n_minus_1 = "n-1"
    n = "n"


@app.command()
def main(
    snapshots: Annotated[list[Path], typer.Argument(help="Files of a run's snapshots folder.")],
    metrics: Annotated[
        str, typer.Option(help="Published names, as fid50k_full,kid50k_full; any number of images, as fid10k_full.")
    ] = "fid50k_full",
    data: Annotated[Path | None, typer.Option(help="Packed shards of the real images.")] = None,
    features: Annotated[
        str | None, typer.Option(help="Score images by another network: timm:MODEL:FILE, or a teacher's .safetensors.")
    ] = None,
    resize: Annotated[Resize, typer.Option(help="For inception and vgg16: published (tf1), or clean-fid's.")] = (
        Resize.tf1
    ),
    attributes: Annotated[
        Path | None, typer.Option(help="For ls and als: a file of tools/fit_attributes.py or import_attributes.py.")
    ] = None,
    allow_weak: Annotated[
        bool, typer.Option("--allow-weak", help="Also score by attributes that the classifier tells poorly.")
    ] = False,
    covariance: Annotated[Covariance, typer.Option(help="Over N − 1, or over N as NVIDIA's StyleGANs.")] = (
        Covariance.n_minus_1
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of latents, noise, labels and subsets.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images dealt to a process at a time; changes no figure.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode reals, for each process that scores.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Append the results to this .jsonl as well.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="End with a table, and a bar chart beside --out (or compare.png).")
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Score snapshots by published metrics; one line of JSON a result.

    Examples:

      python tools/eval.py run/snapshots/best.safetensors --data shards/ --metrics fid50k_full,kid50k_full,pr50k3_full

      deepspeed tools/eval.py a.safetensors b.safetensors --data shards/ --compare --out results.jsonl

      python tools/eval.py a.safetensors b.safetensors --metrics als,ppl2_wend10k --attributes attributes.safetensors
    """
    world = distributed.world_from_environment()
    with user_errors(quiet=not world.first), Bars(quiet=not world.first) as bars:
        with before_meeting(world.rank, world.size):
            if out is not None:
                options.spare_snapshot(out)
        results = []
        scorer, generators = _prepared(
            world, snapshots, metrics, data, features, resize.value, progress=bars, seed=seed, batch=batch,
            covariance=covariance.value, workers=workers,
            extras={"attributes": attributes, "allow_weak": allow_weak},
        )  # fmt: skip
        with Peers(world, remedy=AGAIN):
            first = distributed.from_first([facts for _, facts in generators])
            with distributed.failing_together():
                for (_, facts), there in zip(generators, first, strict=True):
                    if facts != there:
                        raise _replaced(facts["snapshot"])
                if out is not None and world.first:
                    _check_appendable(out)
            for label, (generator, facts) in zip(short_names(snapshots), generators, strict=True):
                for result in scorer.score(generator.to(world.device), label):
                    results.append(result | facts)
                    if world.first:
                        _tell(results[-1], out)
                generator.cpu()
            if world.first:
                tables, files = scorer.report(lambda name: out.with_name(f"{out.stem}_{name}") if out else Path(name))
                if compare:
                    chart = (out or Path("compare")).with_suffix(".png")
                    comparison_chart(results, chart)
                    tables, files = [comparison_table(results), *tables], [chart, *files]
                for table in tables:
                    Console().print(table)
                for file in files:
                    typer.echo(file)
            distributed.stop()


def _prepared(
    world: distributed.World,
    snapshots: list[Path],
    metrics: str,
    data: Path | None,
    features: str | None,
    resize: str,
    **options: Any,
) -> tuple[Scorer, list[tuple[Generator, dict]]]:
    """Everything that can be refused is, before anything is computed. Generators with what results say of them."""
    with before_meeting(world.rank, world.size):
        parsed = parse_metrics(metrics)
        _check_features(features, parsed, quiet=not world.first)
        manifest = load_manifest(data) if data else None
        generators = [_load(path) for path in snapshots]
        extractors = {spec: load_extractor(spec, resize=resize) for spec in needed_extractors(parsed, features)}
        scorer = Scorer(parsed, extractors, manifest, world, features=features, cache=RealCache(world), **options)
        for path, (generator, _) in zip(snapshots, generators, strict=True):
            scorer.check(generator, str(path))
    if world.size > 1:
        distributed.start(world)
    for extractor in extractors.values():
        extractor.to(world.device)
    return scorer, generators


def _check_features(features: str | None, metrics: list[Metric], *, quiet: bool) -> None:
    """A UserError where `--features` changes no metric, a line on stderr where it leaves a path length as it is."""
    without = [metric.name for metric in metrics if not metric.features]
    paths = [name for name in without if name.startswith("ppl")]
    if features and len(without) == len(metrics):
        raise UserError(f"--features {features} has no say in {', '.join(without)}: path lengths are LPIPS's, on "
                        "VGG-16, and ls and als ask --attributes; leave it out")
    if features and paths and not quiet:
        typer.echo(f"--features has no say in {', '.join(paths)}: path lengths are LPIPS's, on VGG-16", err=True)


def _load(path: Path) -> tuple[Generator, dict]:
    sha256 = sha256_of(path) if path.is_file() else ""
    generator, metadata = load_snapshot(path)
    if sha256_of(path) != sha256:
        raise _replaced(path)
    return generator, {"snapshot": str(path), "snapshot_sha256": sha256, "kimg": metadata["kimg"]}


def _replaced(path: Path | str) -> UserError:
    return UserError(f"snapshot {path} was replaced while it was read, as a run does with its best: score a copy of it")


def _check_appendable(out: Path) -> None:
    """UserError where no line could be added to `out`, of which nothing is made before there is a result."""
    if os.path.lexists(out):
        with writable(out, options.REMEDY), out.open("a"):
            pass
    else:
        check_writable(out.parent, options.REMEDY, make=False)


def _tell(result: dict, out: Path | None) -> None:
    """One line of JSON on stdout, and at the end of `out`, where what was there stays."""
    line = json.dumps(result)
    typer.echo(line)
    if out is not None:
        options.make_folder(out)
        with writable(out, "free space there"), out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    app()
