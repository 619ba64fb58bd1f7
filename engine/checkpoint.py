"""The state that a run resumes from: folders of safetensors and `state.json`, complete or absent, the same for any
number of ranks and ZeRO stage.

checkpoints/latest            the name of the newest one, moved last
checkpoints/000040960/        images seen
    G.safetensors             generator (published keys below `generator.`) and HSR heads (`heads.`)
    D.safetensors             D, and its heads on teachers (`projected.`, `vision_aided.`)
    G_ema.safetensors         and, where ema.power asks for them, G_power-<length>.safetensors
    G_adam.safetensors  D_adam.safetensors      `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`
    state.json                format, images, pl_mean, ADA's p, Adam's steps, the recipe, the data's class names, and
                              the sha256 of the teachers' files by section (null where timm found the weights)
    SHA256SUMS                of all these, as sha256sum writes and checks it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from hsrgan.engine.aside import sync_folder, writable, write_synced, written_aside
from hsrgan.engine.distributed import Sharded, World, barrier, failing_together, from_first, gathered
from hsrgan.engine.errors import UserError
from hsrgan.engine.tensor_files import sha256_of

FORMAT = "hsrgan-checkpoint-2"
TENSOR_FILES = ("G", "D", "G_ema", "G_adam", "D_adam")
SUMS = "SHA256SUMS"
REMEDY = "name a folder that holds state.json, such as runs/<name>/checkpoints/000500000"


@dataclass(frozen=True)
class Checkpoint:
    """One read checkpoint: state dicts by file name without suffix, and state.json. passed_over: a line for each newer
    one that is damaged.
    """

    path: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict
    passed_over: tuple[str, ...] = ()

    def fill(self, part: str, module: nn.Module) -> None:
        """Load `part` into a module; every key must fit."""
        if part not in self.tensors:
            raise UserError(
                f"checkpoint {self.path} has no {part}.safetensors: give ema.power the lengths of that run, or train "
                "from the start in another run_dir"
            )
        tensors = self.tensors[part]
        wanted = {key: value.shape for key, value in module.state_dict().items()}
        found = {key: value.shape for key, value in tensors.items()}
        wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if wrong:
            key = wrong[0]
            raise UserError(
                f"{self.path / part}.safetensors does not fit the recipe's network: {key} is {_shape(found.get(key))} "
                f"there and {_shape(wanted.get(key))} here ({len(wrong)} keys differ); use the recipe of that run, or "
                "another run_dir"
            )
        module.load_state_dict(tensors)

    def without_heads(self) -> Checkpoint:
        """For a run that goes on without HSR: G alone."""
        generator = {key: value for key, value in self.tensors["G"].items() if not key.startswith("heads.")}
        return replace(self, tensors={**self.tensors, "G": generator})


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def checkpoint_folders(run_dir: str | Path) -> list[Path]:
    """A run's checkpoints up to the one that `latest` names, oldest first, whole or not; the last may be missing."""
    folder = Path(run_dir) / "checkpoints"
    found = sorted(path for path in folder.glob("[0-9]*") if path.is_dir()) if folder.is_dir() else []
    with contextlib.suppress(OSError, UnicodeDecodeError):  # a lost pointer: then the newest it is
        newest = (folder / "latest").read_text().strip()
        if newest.isdigit():
            # what lies beyond was written before its name could be, or belongs to a branch that was left
            found = [path for path in found if path.name < newest] + [folder / newest]
    return found


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint: the file that is missing or differs from its checksum; None if nothing is."""
    files = {"state.json", *(f"{part}.safetensors" for part in TENSOR_FILES)}
    try:
        text = (path / SUMS).read_text()
        sums = {name: digest for digest, name in map(str.split, text.splitlines())}
        if not text.endswith("\n"):
            return f"{SUMS} is cut off"
        for name in sorted(files | sums.keys()):
            if name not in sums:
                return f"{SUMS} does not name {name}"
            if sha256_of(path / name) != sums[name]:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except ValueError:
        return f"{SUMS} is garbled"
    return None


def read_checkpoint(path: str | Path, *, checked: bool = False) -> Checkpoint:
    """Read one checkpoint folder. Raises UserError naming the file that is missing or damaged. checked: it was found
    to have no `damage`.
    """
    path = Path(path)
    try:
        state = json.loads((path / "state.json").read_text())
        if state.get("format") != FORMAT:
            raise UserError(
                f"{path / 'state.json'} has format {state.get('format')!r}, this version reads {FORMAT!r}; {REMEDY}"
            )
        if not checked and (fault := damage(path)):
            raise UserError(f"checkpoint {path} is damaged ({fault}); use the one before")
        parts = [*TENSOR_FILES, *(power.stem for power in sorted(path.glob("G_power-*.safetensors")))]
        tensors = {part: load_file(path / f"{part}.safetensors") for part in parts}
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {path} cannot be read ({error}); {REMEDY}") from None
    return Checkpoint(path, tensors, state)


def newest_whole(run_dir: str | Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest undamaged checkpoint (None where there is no checkpoint at all), and a line for each newer one.

    Raises UserError where all are damaged: to begin anew in silence would throw the run away.
    """
    folders, passed_over = checkpoint_folders(run_dir)[::-1], []
    for path in folders:
        fault = damage(path)
        if fault is None:
            return path, tuple(passed_over)
        passed_over.append(f"checkpoint {path} is damaged ({fault}): falling back to the one before")
    if folders:
        raise UserError(
            f"checkpoint {folders[0]} is damaged ({damage(folders[0])}), and no older one is whole: put a copy there, "
            f"or delete {folders[0].parent} to start anew"
        )
    return None, ()


def resume_point(run_dir: str | Path, world: World) -> Checkpoint | None:
    """What the run goes on from, the same on every rank; None at its first start. All ranks must call it: rank 0
    checks and decides.
    """
    found: tuple[Path | None, tuple[str, ...]] = None, ()
    with failing_together():
        if world.first:
            found = newest_whole(run_dir)
    path, passed_over = from_first(found)
    checkpoint = None
    with failing_together():
        if path and not path.is_dir():
            raise UserError(
                f"rank {world.rank} on {socket.gethostname()} does not see {path}: run_dir must lie on a file system "
                "that all machines share"
            )
        if path:
            read = read_checkpoint(path, checked=True)
            checkpoint = Checkpoint(path, read.tensors, read.state, passed_over)
    return checkpoint


@dataclass
class Retention:
    """Which checkpoints of a run are kept: the newest `last`, the first one after each multiple of `every_kimg`, and
    the first one that holds the best score.

    own: the names of those that the run stands on; others belong to a branch that was left, or are damaged.
    """

    last: int
    every_kimg: float | None
    own: list[str]

    def add(self, folder: Path, best: int | None) -> None:
        """Count in a checkpoint that was just written to `folder`, and delete what need not be kept. best: images that
        the best-scoring G had seen.
        """
        self.own = [name for name in self.own if name < folder.name] + [folder.name]
        self.own = [name for i, name in enumerate(self.own) if i >= len(self.own) - self.last or self._kept(i, best)]
        for other in sorted(folder.parent.glob("[0-9]*")):
            if other.name not in self.own:
                # by another name first: what a kill leaves of it is no checkpoint
                shutil.rmtree(other.rename(folder.parent / f".{other.name}.part"))

    def _kept(self, i: int, best: int | None) -> bool:
        before, images = int(self.own[i - 1]) if i else 0, int(self.own[i])
        if best is not None and before < best <= images:
            return True
        every = self.every_kimg and self.every_kimg * 1000
        return bool(every) and int(images / every) > int(before / every)


def write_checkpoint(
    run_dir: str | Path,
    g: Sharded,
    d: Sharded,
    averages: dict[str, nn.Module],
    *,
    images: int,
    training: dict,
    recipe: dict,
    retention: Retention,
    best: int | None,
    rank: int,
) -> None:
    """Write one checkpoint, then drop those that need not be kept. All ranks must call it; rank 0 writes.

    averages: of G, by the part's name. training: `Training.state()`, and what else goes into state.json.

    Raises CannotWrite, on rank 0, where the file system refuses; what was there before is then as it was.
    """
    with gathered(g, d):
        parts = {
            "G": _on_host(g.module.state_dict()),
            "D": _on_host(d.module.state_dict()),
        } | {part: _on_host(average.state_dict()) for part, average in averages.items()}
    parts |= {"G_adam": g.optimizer_state(), "D_adam": d.optimizer_state()}
    state = {
        "format": FORMAT,
        "images": images,
        "adam_steps": {"G": g.optimizer_step(), "D": d.optimizer_step()},
        "recipe": recipe,
        **training,
    }
    try:
        if rank == 0:
            folder = Path(run_dir) / "checkpoints" / f"{images:09d}"
            with writable(folder, "free space there; the checkpoint before it is whole"):
                write_folder(folder, _files(parts, state))
                retention.add(folder, best)
    finally:
        barrier()  # or the first rank to leave would have the launcher end this one


def _files(parts: dict[str, dict[str, torch.Tensor]], state: dict) -> Iterator[tuple[str, bytes]]:
    for part, tensors in parts.items():
        yield f"{part}.safetensors", save({key: value.contiguous() for key, value in tensors.items()})
    yield "state.json", json.dumps(state, indent=1).encode()


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write `files` and their checksums aside, on disk before their folder takes its name, and that before `latest`
    names it. Whatever happens on the way, `latest` names a whole folder.
    """
    parent, aside = folder.parent, folder.with_name(f".{folder.name}.part")
    for leftover in parent.glob(".*.part"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    try:
        aside.mkdir(parents=True)
        sums = ""
        for name, data in files:
            write_synced(aside / name, data)
            sums += f"{hashlib.sha256(data).hexdigest()}  {name}\n"
        write_synced(aside / SUMS, sums.encode())
        sync_folder(aside)
        if folder.exists():  # damaged, or of a branch that was left
            folder.rename(folder.with_name(f".{folder.name}.old.part"))
        os.replace(aside, folder)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with written_aside(parent / "latest") as pointer:
        pointer.write_text(folder.name + "\n")
    sync_folder(parent)


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu() for key, value in tensors.items()}
