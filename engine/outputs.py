"""What a training run leaves behind: sample grids, snapshots for everybody else, checkpoints for itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hsrgan.engine import checkpoint
from hsrgan.engine.aside import writable
from hsrgan.engine.augment import REALS_STREAM
from hsrgan.engine.distributed import from_first
from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import Label, multi_hot, name_of
from hsrgan.engine.model import Generator
from hsrgan.engine.power_ema import part_name
from hsrgan.engine.run_state import Round, Training
from hsrgan.engine.shards import Manifest
from hsrgan.engine.sizes import plain
from hsrgan.engine.snapshot import save_snapshot

PICTURES = 64  # images in a grid
MOST_ROWS, COLUMNS = 16, 8  # of a grid with a row for each class
GRID_STREAM = 4  # the draws of the grid's latents; 0–3 and 5–7 are the phases'


@dataclass
class Outputs:
    """The run's state, from which everything here is written. Every rank may call everything."""

    t: Training
    manifest: Manifest
    g_ema: Generator
    power: dict[float, Generator]  # EDM2's averages by their length, on G's device: fp32 copies of G
    best_images: int | None = None  # what the G with the best score had seen
    retention: checkpoint.Retention = field(init=False)

    def __post_init__(self) -> None:
        recipe = self.t.recipe
        self.retention = checkpoint.Retention(recipe.keep_checkpoints, recipe.keep_every_kimg, [])
        self._rows = self._rows_of_labels() if recipe.data.labels else []

    def _rows_of_labels(self) -> list[Label]:
        """The first classes that have images, or the sets of classes that most images have."""
        if sets := self.manifest.label_sets:
            often = sorted(zip(sets.counts, sets.sets, strict=True), key=lambda row: (-row[0], row[1]))
            return [label for _, label in often[:MOST_ROWS]]
        return [(i,) for i, count in enumerate(self.manifest.class_counts) if count][:MOST_ROWS]

    @property
    def row_names(self) -> list[str]:
        """What the rows of `pictures` are, of a model with labels."""
        return [name_of(label, self.manifest.class_names) for label in self._rows]

    def take_up(self, resumed: checkpoint.Checkpoint) -> int:
        """Go on from a checkpoint: the images that it has seen."""
        folders = checkpoint.checkpoint_folders(self.t.recipe.run_dir)
        self.retention.own = [path.name for path in folders if path.name <= resumed.path.name]
        images = resumed.state["images"]
        if self.t.world.first:  # later ones belong to a branch that is left: tools/ema.py would mix the two
            with writable(self.power_folder):
                for path in self.power_folder.glob("[0-9]*.safetensors"):
                    if int(path.name[:9]) > images:
                        path.unlink()
        return images

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
        """Samples of the averaged G from the run's fixed latents in [−1, 1]: [PICTURES, C, H, W], or of a model with
        labels [rows · COLUMNS, C, H, W], a row for each label, in each column the same latent.
        """
        latents = self.t.draws.latents(GRID_STREAM, range(COLUMNS if self._rows else PICTURES), self.g_ema.z_dim)
        zs, cs = latents.z, latents.c
        if self._rows:
            rows = torch.from_numpy(multi_hot(self._rows, self.g_ema.c_dim)).to(cs.device)
            zs, cs = zs.repeat(len(rows), 1), rows.repeat_interleave(COLUMNS, 0)
        batch = self.t.recipe.batch
        with torch.no_grad():
            pairs = zip(zs.split(batch), cs.split(batch), strict=True)
            return torch.cat([self.g_ema(z, c, noise_mode="const") for z, c in pairs]).cpu()

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
        for length, average in self.power.items():
            path = self.power_folder / f"{images:09d}-{length:.3f}.safetensors"
            self._save(path, images, average=average, power={"length": length, "images": images})

    def best(self, images: int, score: dict) -> None:
        """The snapshot with the best score so far, in place of the one before."""
        self._save(self.best_path, images, score)
        self.best_images = images

    def snapshot_path(self, images: int) -> Path:
        return Path(self.t.recipe.run_dir) / "snapshots" / f"{images:09d}.safetensors"

    @property
    def best_path(self) -> Path:
        return Path(self.t.recipe.run_dir) / "snapshots" / "best.safetensors"

    @property
    def power_folder(self) -> Path:
        return Path(self.t.recipe.run_dir) / "power"

    def _save(
        self, path: Path, images: int, score: dict | None = None, average: Generator | None = None,
        power: dict | None = None,
    ) -> None:
        if self.t.world.first:
            manifest, recipe = self.manifest, self.t.recipe.to_json()
            facts = {"class_names": manifest.class_names, "sha256": manifest.sha256}
            facts |= {"resolution": plain(manifest.resolution), "multi_label": manifest.label_sets is not None}
            with writable(path.parent):
                path.parent.mkdir(exist_ok=True)
            save_snapshot(
                path, average or self.g_ema, recipe_json=recipe, kimg=images / 1000, dataset=facts, score=score,
                power=power,
            )

    def checkpoint(self, images: int) -> None:
        averages = {"G_ema": self.g_ema} | {part_name(length): average for length, average in self.power.items()}
        facts = {
            "class_names": list(self.manifest.class_names),
            "teachers": {name: teacher.sha256 for name, teacher in self.t.teachers.items()},
        }
        checkpoint.write_checkpoint(
            self.t.recipe.run_dir, self.t.g, self.t.d, averages, images=images, training=self.t.state() | facts,
            recipe=self.t.recipe.model_dump(mode="json"), retention=self.retention, best=self.best_images,
            rank=self.t.world.rank,
        )  # fmt: skip
