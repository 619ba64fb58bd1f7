"""What a training run leaves behind: sample grids, snapshots for everybody else, checkpoints for itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hsrgan.engine import checkpoint
from hsrgan.engine.augment import REALS_STREAM
from hsrgan.engine.distributed import from_first
from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Generator
from hsrgan.engine.phases import Round, Training
from hsrgan.engine.shards import Manifest
from hsrgan.engine.snapshot import save_snapshot

PICTURES = 64  # images in a grid
GRID_STREAM = 4  # the draws of the grid's latents; 0–3 are the phases'


@dataclass
class Outputs:
    """The run's state, from which everything here is written. Every rank may call everything."""

    t: Training
    manifest: Manifest
    g_ema: Generator
    best_images: int | None = None  # what the G with the best score had seen
    retention: checkpoint.Retention = field(init=False)

    def __post_init__(self) -> None:
        recipe = self.t.recipe
        self.retention = checkpoint.Retention(recipe.keep_checkpoints, recipe.keep_every_kimg, [])

    def take_up(self, resumed: checkpoint.Checkpoint) -> int:
        """Go on from a checkpoint: the images that it has seen."""
        folders = checkpoint.checkpoint_folders(self.t.recipe.run_dir)
        self.retention.own = [path.name for path in folders if path.name <= resumed.path.name]
        return resumed.state["images"]

    def roll_back(self, diverged: str, tried: checkpoint.Checkpoint | None) -> str:
        """The line `diverged`, if the recipe wants a rollback and there is a checkpoint to try: one other than `tried`,
        from which the run has diverged before. Else a UserError. Every rank calls it.
        """
        newest = from_first(self.retention.own[-1:])
        if self.t.recipe.faults.diverged == "stop":
            why = "faults.diverged is stop"
        elif not newest:
            why = "there is no checkpoint to go back to"
        elif tried and tried.path.name == newest[0]:
            why = f"it has diverged again since checkpoint {newest[0]}"
        else:
            return diverged
        raise UserError(f"{diverged}; {why}: lower generator.lr and discriminator.lr or raise r1.gamma, and resume")

    def pictures(self) -> torch.Tensor:
        """Samples of the averaged G from the run's fixed latents, [PICTURES, C, R, R] in [−1, 1]."""
        latents = self.t.draws.latents(GRID_STREAM, range(PICTURES), self.g_ema.z_dim)
        with torch.no_grad():
            return torch.cat(
                [
                    self.g_ema(z, c, noise_mode="const")
                    for z, c in zip(
                        latents.z.split(self.t.recipe.batch), latents.c.split(self.t.recipe.batch), strict=True
                    )
                ]
            ).cpu()

    def augmented(self, reals: torch.Tensor, seen: int) -> torch.Tensor:
        """This rank's reals of the step after `seen` images as Dmain has shown them to D, at the p of now; at most
        PICTURES.
        """
        reals, world = reals[:PICTURES], self.t.world
        first = seen + world.rank * (self.t.recipe.batch // world.size)
        fields = self.t.augment.inputs([REALS_STREAM], range(first, first + len(reals)), reals.shape[1:])
        return self.t.augment(reals, Round(**fields))

    def snapshot(self, images: int) -> None:
        self._save(self.snapshot_path(images), images)

    def best(self, images: int, score: dict) -> None:
        """The snapshot with the best score so far, in place of the one before."""
        self._save(self.best_path, images, score)
        self.best_images = images

    def snapshot_path(self, images: int) -> Path:
        return Path(self.t.recipe.run_dir) / "snapshots" / f"{images:09d}.safetensors"

    @property
    def best_path(self) -> Path:
        return Path(self.t.recipe.run_dir) / "snapshots" / "best.safetensors"

    def _save(self, path: Path, images: int, score: dict | None = None) -> None:
        if self.t.world.first:
            manifest, recipe = self.manifest, self.t.recipe.to_json()
            facts = {"resolution": manifest.resolution, "class_names": manifest.class_names, "sha256": manifest.sha256}
            path.parent.mkdir(exist_ok=True)
            save_snapshot(path, self.g_ema, recipe_json=recipe, kimg=images / 1000, dataset=facts, score=score)

    def checkpoint(self, images: int) -> None:
        checkpoint.write_checkpoint(
            self.t.recipe.run_dir, self.t.g, self.t.d, self.g_ema, images=images, training=self.t.state(),
            recipe=self.t.recipe.model_dump(mode="json"), retention=self.retention, best=self.best_images,
            rank=self.t.world.rank,
        )  # fmt: skip
