"""Latents as files: what a projection found or a sampler kept, to be sampled and edited again.

`.safetensors` holds `w` [N, num_ws, w_dim] fp32 (or [N, w_dim]: one for all layers) and perhaps `noise` [N, noise_size]
fp32 (the layers' noise maps, as `Synthesis` takes them). Its metadata: `format`, `snapshot_sha256` (of the snapshot
whose W it is) and `space` ("w": all ws of a sample are equal, or "w+"). `.npz` holds `w` alone, as NVIDIA's
projected_w.npz does. Nothing is unpickled.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Generator
from hsrgan.engine.tensor_files import one_line, read_safetensors

FORMAT = "hsrgan-latents-1"
MOST_BYTES = 1 << 30  # of `w` in an .npz: 40,000 W+ latents of a 1024² generator
REMEDY = "give a .safetensors or .npz file that tools/project.py wrote"


@dataclass(frozen=True)
class Latents:
    """w [N, num_ws or 1, w_dim] and noise [N, noise_size] or None, fp32 on the CPU.

    snapshot_sha256 and space are None where the file does not say (an .npz).
    """

    w: Tensor
    noise: Tensor | None = None
    snapshot_sha256: str | None = None
    space: str | None = None

    def expect(self, generator: Generator, path: Path) -> None:
        """Raise `UserError` unless `generator` can take these latents; `path` is where they came from.

        Another snapshot of the same shape is no error: W survives fine-tuning.
        """
        num_ws, w_dim = generator.num_ws, generator.w_dim
        if self.w.shape[1:] not in ((num_ws, w_dim), (1, w_dim)):
            raise UserError(f"latents {path}: w is {list(self.w.shape)}, but the generator takes [N, {num_ws}, "
                            f"{w_dim}]: they belong to another model")
        size = generator.synthesis.noise_size
        if self.noise is not None and self.noise.shape[1:] != (size,):
            raise UserError(f"latents {path}: noise is {list(self.noise.shape)}, but the generator takes [N, {size}]: "
                            "they belong to another model")


def save_latents(path: Path, latents: Latents) -> None:
    """Write `latents` whole or not at all, in the format of the suffix: `.npz` keeps w only.

    Raises `UserError` for another suffix and where the folder refuses.
    """
    _check_suffix(path)
    w = latents.w.detach().to("cpu", torch.float32).contiguous()
    if path.suffix == ".npz":
        with written_aside(path) as aside, open(aside, "wb") as file:
            np.savez(file, w=w.numpy())
        return
    metadata = {"format": FORMAT, "snapshot_sha256": latents.snapshot_sha256, "space": latents.space}
    tensors = {"w": w}
    if latents.noise is not None:
        tensors["noise"] = latents.noise.detach().to("cpu", torch.float32).contiguous()
    with written_aside(path) as aside:
        aside.write_bytes(save(tensors, {key: value for key, value in metadata.items() if value is not None}))


def load_latents(path: Path) -> Latents:
    """The latents of a file. Raises `UserError` for one that is absent, damaged or something else."""
    _check_suffix(path)
    if path.suffix == ".npz":
        latents = Latents(_npz(path))
    else:
        tensors, metadata = read_safetensors(path, "latents", REMEDY)
        if metadata.get("format") != FORMAT or "w" not in tensors:
            raise UserError(f"{path} holds no latents (its format is {metadata.get('format')!r}, not {FORMAT!r}): "
                            f"{REMEDY}")
        facts = (metadata.get(key) for key in ("snapshot_sha256", "space"))
        latents = Latents(_ws(tensors["w"]), tensors.get("noise"), *facts)
    _check(path, latents)
    return latents


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(f"latents {path}: the name must end in .safetensors or .npz")


def _ws(w: Tensor) -> Tensor:
    """[N, w_dim] as [N, 1, w_dim]."""
    return w[:, None] if w.ndim == 2 else w


def _npz(path: Path) -> Tensor:
    if not os.path.isfile(path):
        raise UserError(f"latents {path} does not exist: {REMEDY}")
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("w.npy").file_size
        if size > MOST_BYTES:
            raise ValueError(f"its w unpacks to {size:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            return _ws(torch.from_numpy(file["w"].astype(np.float32)))
    except Exception as error:  # a damaged zip or array makes NumPy raise nearly anything
        raise UserError(f"latents {path} are no .npz with an array `w` of numbers ({one_line(error)}): {REMEDY}"
                        ) from None


def _check(path: Path, latents: Latents) -> None:
    w, noise = latents.w, latents.noise
    if w.ndim != 3 or not len(w) or w.dtype != torch.float32:
        raise UserError(f"latents {path}: w is {w.dtype} {list(w.shape)}, not float32 [N, num_ws, w_dim]: {REMEDY}")
    if noise is not None and (noise.ndim != 2 or len(noise) != len(w) or noise.dtype != torch.float32):
        raise UserError(f"latents {path}: noise is {noise.dtype} {list(noise.shape)}, not float32 [{len(w)}, "
                        f"noise_size]: {REMEDY}")
    if not w.isfinite().all() or (noise is not None and not noise.isfinite().all()):
        raise UserError(f"latents {path} hold values that are no finite numbers: make them again")
