"""What a training run leaves behind: sample grids, snapshots for everybody else, checkpoints for itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hsrgan.engine import checkpoint
from hsrgan.engine.model import Generator
from hsrgan.engine.phases import Training
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

    def snapshot(self, images: int) -> None:
        self._save(self.snapshot_path(images), images)

    def best(self, images: int, score: dict) -> None:
        """The snapshot with the best score so far, in place of the one before."""
        self._save(self.best_path, images, score)

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
            self.t.recipe.run_dir, self.t.g, self.t.d, self.g_ema, images=images, pl_mean=self.t.pl_mean,
            recipe=self.t.recipe.model_dump(mode="json"), keep=self.t.recipe.keep_checkpoints, rank=self.t.world.rank,
        )  # fmt: skip
