"""Train StyleGAN2 + HSR:  deepspeed engine/train.py recipes/ffhq_1024.yaml [key=value …]

Read from top to bottom: the world, the recipe, the data, the networks, the engines, the loop. Running the same
command again resumes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hsrgan.engine import assembly, checkpoint, distributed, graphs
from hsrgan.engine.aside import check_writable, held
from hsrgan.engine.bad_samples import DataFaults
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.config import Recipe, check_paths, check_same_networks, load_recipe
from hsrgan.engine.data import open_stream
from hsrgan.engine.draws import sent
from hsrgan.engine.dry_run import dry_run
from hsrgan.engine.ema import ema_beta, update_ema
from hsrgan.engine.errors import EXIT_RESUME
from hsrgan.engine.faults import Preemption, Writing, not_finite
from hsrgan.engine.freezing import frozen_otherwise, frozen_parameters
from hsrgan.engine.outputs import PICTURES, Outputs
from hsrgan.engine.peers import Peers
from hsrgan.engine.phases import build_phases, run_phase
from hsrgan.engine.power_ema import part_name, power_beta
from hsrgan.engine.rendezvous import before_meeting
from hsrgan.engine.run_state import GeneratorWithHeads, Training
from hsrgan.engine.scoring import Scoring
from hsrgan.engine.shards import Manifest
from hsrgan.engine.stats import RunLog
from hsrgan.kernels import launch


def train(recipe_path: Path, overrides: list[str]) -> None:
    world = distributed.world_from_environment()
    with before_meeting(world.rank, world.size):
        recipe = load_recipe(recipe_path, overrides, world_size=world.size)
        world = distributed.world_from_environment(recipe.device)
        launch.allow_tf32(recipe.tf32)
        launch.sum_in_fp32()
        if not recipe.dry_run:
            check_paths(recipe)
            manifest = assembly.dataset(recipe.data)
            check_writable(Path(recipe.run_dir))  # last: what is refused before leaves no folder
    if recipe.dry_run:
        return dry_run(recipe, world)
    distributed.start(world, recipe.faults.rendezvous_timeout)
    hold = held(Path(recipe.run_dir)) if world.first else contextlib.nullcontext()
    with Peers(world, recipe.faults.rank_timeout), Preemption(world) as preemption, hold:
        assembly.check_alike(recipe, world, manifest)
        diverged = ""
        while diverged := _run(recipe, world, manifest, preemption, diverged):
            gc.collect()  # the engines of the run that is rolled back
        distributed.stop()


def _run(recipe: Recipe, world: distributed.World, manifest: Manifest, preemption: Preemption, diverged: str) -> str:
    """Train from the last checkpoint to the end, or until the run diverges: then a line that says where, to roll back
    by another call. diverged: the line of the call before.
    """
    resumed = checkpoint.resume_point(recipe.run_dir, world)
    if resumed:
        check_same_networks(json.dumps(resumed.state["recipe"]), recipe, checkpoint=resumed.path)
        resumed = resumed if recipe.hsr else resumed.without_heads()
    generator, discriminator, heads, teachers = assembly.networks(recipe, manifest, world)
    g_module, g_ema = GeneratorWithHeads(generator, heads), copy.deepcopy(generator).requires_grad_(False).eval()
    frozen = frozen_parameters(recipe.freeze, g_module, discriminator)
    if resumed:
        resumed.fill("G", g_module)
        resumed.fill("D", discriminator)
        resumed.fill("G_ema", g_ema)
    else:
        assembly.first_values(recipe, world, manifest, g_module, discriminator, g_ema, frozen)
    power = {length: copy.deepcopy(generator).requires_grad_(False).eval() for length in recipe.ema.power}
    for length, average in power.items() if resumed else ():
        resumed.fill(part_name(length), average)

    t = assembly.training(recipe, world, manifest, g_module, discriminator, teachers, frozen)
    if resumed:
        t.take_up(resumed.state)
        t.anew = frozen_otherwise(resumed.state["recipe"], frozen, g_module, discriminator)
        for name, net in (("G", t.g), ("D", t.d)):
            if name not in t.anew:
                net.load_optimizer_state(resumed.tensors[f"{name}_adam"], resumed.state["adam_steps"][name])
    return _loop(t, Outputs(t, manifest, g_ema, power), resumed, preemption, diverged)


def _loop(
    t: Training, out: Outputs, resumed: checkpoint.Checkpoint | None, preemption: Preemption, diverged: str
) -> str:
    recipe, world, batch, manifest = t.recipe, t.world, t.recipe.batch, out.manifest
    images = out.take_up(resumed) if resumed else 0
    bad_samples = DataFaults(manifest, collected=True)
    stream = assembly.stream(recipe, world, manifest, images, bad_samples)
    phases, total = build_phases(t), round(recipe.kimg * 1000)
    score = Scoring(out, images) if recipe.metrics else None
    log = RunLog(recipe.run_dir, total_kimg=recipe.kimg, start_kimg=images / 1000, rank=world.rank)
    with contextlib.closing(stream), log:  # or the loader's workers would outlive a request to leave
        t.call = graphs.caller(recipe.cuda_graphs, world, recipe.zero_stage, partial(log.note, "cuda_graphs"))
        writing = Writing(recipe.faults, log.message)
        if resumed:
            for line in resumed.passed_over:
                log.note("fallback", line)
            why = f"{diverged}: rolled back, " if diverged else ""
            anew = f"; freeze has changed, so Adam begins anew for {' and '.join(t.anew)}" if t.anew else ""
            dropped = resumed.state["recipe"].get("hsr") and not recipe.hsr
            hsr = "; HSR is off, so its heads are dropped" if dropped else ""
            others = assembly.changed_teachers(resumed.state, t.teachers)
            other = f"; the teacher of {' and '.join(others)} is another file than the checkpoint's" if others else ""
            log.note("rollback" if diverged else "resume", f"{why}resuming at {images / 1000:g} kimg{anew}{hsr}{other}")
        else:
            log.reals(next(open_stream(manifest, seed=recipe.seed, start=0, global_batch=PICTURES))[0])
            log.fakes(out.pictures(), 0.0, out.row_names)
        for reals_uint8, real_c in stream:
            if images >= total:
                break
            reals = assembly.to_float(reals_uint8, world.device)
            real_c = sent(real_c[:, : t.generator.c_dim], world.device)
            step = images // batch
            for phase in phases:
                if step % phase.interval == 0:
                    run_phase(phase, t, images, reals, real_c)
            if t.augment:
                t.augment.adapt(step)
            moved = t.g.moved()
            with distributed.gathered(t.g):
                update_ema(out.g_ema, t.generator, ema_beta(batch, images, recipe.ema.kimg, recipe.ema.rampup), moved)
                for length, average in out.power.items():
                    update_ema(average, t.generator, power_beta(batch, images, length), moved)
            seen, images = images, images + batch
            last, leaving = images >= total, preemption.asked()

            log.step(images)
            if last or leaving or _crossed(recipe.tick_kimg, seen, images):
                counts, lines, now_diverged = not_finite(t)
                means = t.meter.collect() | (t.augment.told() if t.augment else {})
                with writing():
                    means |= bad_samples.collect(log)
                with writing():
                    log.tick(images, means | counts)
                    for line in lines:
                        log.note("nonfinite", line)
                if now_diverged:
                    return out.roll_back(now_diverged, resumed if diverged else None)
            if last or _crossed(recipe.image_kimg, seen, images):
                with writing():
                    log.fakes(out.pictures(), images / 1000, out.row_names)
                    if t.augment:
                        log.augmented(out.augmented(reals, seen), images)
            if last or _crossed(recipe.snapshot_kimg, seen, images):
                with writing():
                    out.snapshot(images)
            if score and (last or (not leaving and _crossed(recipe.metrics_kimg, seen, images))):
                with writing():
                    score(images, log)
            if last or leaving or _crossed(recipe.checkpoint_kimg, seen, images):
                with writing():
                    out.checkpoint(images)
            if leaving and not last:
                with writing():
                    log.note("preempted", f"{leaving} at {images / 1000:g} kimg: the same command resumes the run")
                distributed.stop()
                raise SystemExit(EXIT_RESUME)
        with writing():
            log.finish({"snapshot": out.snapshot_path(images)} | ({"best": out.best_path} if score else {}))
    return ""


def _crossed(every_kimg: float, before: int, after: int) -> bool:
    """Whether a multiple of `every_kimg` lies in (before, after]."""
    return int(after / (every_kimg * 1000)) > int(before / (every_kimg * 1000))


app = CommandLine(rich_markup_mode="rich")


@app.command()
def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Recipe keys to change, such as kimg=10 data.workers=0.")
    ] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Train a StyleGAN2 with HSR from a recipe. The same command again resumes the run."""
    train(recipe, overrides or [])


if __name__ == "__main__":
    app()
