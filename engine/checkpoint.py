"""The state that a run resumes from: one folder of safetensors and `state.json`, complete or absent, the same for any
number of ranks and ZeRO stage.

checkpoints/000040960/        images seen
    G.safetensors             generator (published keys below `generator.`) and HSR heads (`heads.`)
    D.safetensors  G_ema.safetensors
    G_adam.safetensors  D_adam.safetensors      `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`
    state.json                format, images, pl_mean, Adam's steps, the resolved recipe
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from hsrgan.engine.distributed import Sharded, barrier, gathered
from hsrgan.engine.errors import UserError

FORMAT = "hsrgan-checkpoint-1"
TENSOR_FILES = ("G", "D", "G_ema", "G_adam", "D_adam")


@dataclass(frozen=True)
class Checkpoint:
    """One read checkpoint: state dicts by file name without suffix, and state.json."""

    path: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict

    def fill(self, part: str, module: nn.Module, prefix: str = "") -> None:
        """Load `part` (those keys that begin with `prefix`) into a module; every key must fit."""
        tensors = {
            key.removeprefix(prefix): value for key, value in self.tensors[part].items() if key.startswith(prefix)
        }
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


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def checkpoint_folders(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    return sorted(path for path in folder.glob("[0-9]*") if (path / "state.json").is_file()) if folder.is_dir() else []


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check one checkpoint folder. Raises UserError naming the file that is missing or damaged."""
    path = Path(path)
    remedy = (
        "name a folder that holds state.json, such as runs/<name>/checkpoints/000500000; "
        "if it is damaged, delete it and use the one before"
    )
    try:
        state = json.loads((path / "state.json").read_text())
        if state.get("format") != FORMAT:
            raise UserError(
                f"{path / 'state.json'} has format {state.get('format')!r}, this version reads {FORMAT!r}; {remedy}"
            )
        tensors = {part: load_file(path / f"{part}.safetensors") for part in TENSOR_FILES}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({error}); {remedy}") from None
    return Checkpoint(path, tensors, state)


def write_checkpoint(
    run_dir: str | Path,
    g: Sharded,
    d: Sharded,
    g_ema: nn.Module,
    *,
    images: int,
    pl_mean: torch.Tensor,
    recipe: dict,
    keep: int,
    rank: int,
) -> Path:
    """Write one checkpoint aside, rename it, then drop all but the newest `keep`. All ranks must call it; rank 0
    writes.
    """
    folder = Path(run_dir) / "checkpoints"
    final = folder / f"{images:09d}"
    with gathered(g, d):
        parts = {
            "G": _on_host(g.module.state_dict()),
            "D": _on_host(d.module.state_dict()),
            "G_ema": _on_host(g_ema.state_dict()),
        }
    parts |= {"G_adam": g.optimizer_state(), "D_adam": d.optimizer_state()}
    state = {
        "format": FORMAT,
        "images": images,
        "pl_mean": pl_mean.item(),
        "adam_steps": {"G": g.optimizer_step(), "D": d.optimizer_step()},
        "recipe": recipe,
    }
    if rank == 0:
        aside = folder / f".{final.name}.part"
        for leftover in folder.glob(".*.part"):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
        for part, tensors in parts.items():
            _write_synced(
                aside / f"{part}.safetensors", save({key: value.contiguous() for key, value in tensors.items()})
            )
        _write_synced(aside / "state.json", json.dumps(state, indent=1).encode())
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync_folder(folder)
        for old in checkpoint_folders(run_dir)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu() for key, value in tensors.items()}


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
