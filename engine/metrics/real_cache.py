"""Statistics of real images, kept between runs by what the images are and how they were seen, never by their path.

Each is `<key>.safetensors`, with the facts that the key is the hash of beside it in `<key>.json`, for people. Both are
written aside and renamed when they are whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hsrgan.engine.aside import writable, written_aside
from hsrgan.engine.distributed import World, failing_together, sum_over_ranks
from hsrgan.engine.metrics.features import Features
from hsrgan.engine.metrics.moments import Gaussian
from hsrgan.engine.metrics.weights import cache_folder
from hsrgan.engine.shards import folder_lock

FORMAT = "hsrgan-real-statistics-1"
ROWS = 4096  # that travel to the first rank at a time


class RealCache:
    """folder: made if missing; `UserError` where it cannot be. Every method is a collective; the first rank writes."""

    def __init__(self, world: World, folder: Path | None = None) -> None:
        self.world, self.folder = world, folder or cache_folder() / "reals"
        if world.first:
            with writable(self.folder, "name another folder with HSRGAN_CACHE"):
                self.folder.mkdir(parents=True, exist_ok=True)

    def gaussian(self, facts: Mapping[str, object]) -> Gaussian | None:
        """Moments of `facts` if every rank finds them."""
        path = self._path("moments", facts)
        tensors = self._agreed(_read(path, "total", "outer", "count"))
        return tensors and Gaussian(int(tensors["count"]), tensors["total"], tensors["outer"])

    def keep_gaussian(self, facts: Mapping[str, object], value: Gaussian) -> None:
        count = torch.tensor(value.count)
        self._write("moments", facts, {"total": value.total, "outer": value.outer, "count": count})

    def features(self, facts: Mapping[str, object], empty: Features) -> Features | None:
        """`empty` filled with this rank's rows of the features of `facts`, if every rank finds them."""
        tensors = self._agreed(_read(self._path("features", facts), "features"))
        if tensors is None:
            return None
        torch.index_select(tensors["features"], 0, empty.positions, out=empty.values)
        return empty

    def keep_features(self, facts: Mapping[str, object], value: Features) -> None:
        whole = torch.empty(value.count, value.dim) if self.world.first else None
        for block in value.blocks(ROWS):
            rows = value.rows(block)
            if whole is not None:
                whole[block.start : block.stop] = rows.cpu()
        self._write("features", facts, {"features": whole})

    def _path(self, kind: str, facts: Mapping[str, object]) -> Path:
        text = json.dumps({"format": FORMAT, "kind": kind, **facts}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.safetensors"

    def _agreed(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """None unless every rank has found them: machines may not share the folder."""
        found = torch.tensor(int(tensors is not None), device=self.world.device)
        return tensors if int(sum_over_ranks(found)) == self.world.size else None

    def _write(self, kind: str, facts: Mapping[str, object], tensors: dict[str, Tensor]) -> None:
        with failing_together():  # where a run goes on without what cannot be written, all ranks go on together
            if self.world.first:
                self._write_here(self._path(kind, facts), {"format": FORMAT, "kind": kind, **facts}, tensors)

    def _write_here(self, path: Path, facts: Mapping[str, object], tensors: dict[str, Tensor]) -> None:
        content = save({key: value.contiguous() for key, value in tensors.items()}, {"format": FORMAT})
        with writable(self.folder, "name another folder with HSRGAN_CACHE"):
            lock = folder_lock(self.folder, wait=True)  # another run may be at the same
            with lock, written_aside(path.with_suffix(".json")) as beside, written_aside(path) as aside:
                beside.write_text(json.dumps(facts, indent=1), encoding="utf-8")
                aside.write_bytes(content)  # save_file has errors of its own for a full disk


def _read(path: Path, *keys: str) -> dict[str, Tensor] | None:
    """These tensors of a file; None where it is not there, or not whole (it is then written again)."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError):
        return None
