"""The weights behind published figures: which files they are, and the cache of safetensors made from the user's copies.

Nothing is downloaded. `tools/import_weights.py` checks a file that the user has and converts it; metrics then find it
by name in the cache folder: `$HSRGAN_CACHE`, or `~/.cache/hsrgan/weights`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from hsrgan.engine.aside import writable, written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import perceptual
from hsrgan.engine.metrics.dinov2 import DINOv2
from hsrgan.engine.metrics.inception import InceptionV3
from hsrgan.engine.metrics.vgg16 import VGG16
from hsrgan.engine.tensor_files import misfit, read_safetensors, read_state_dict, sha256_of

FORMAT = "hsrgan-weights-1"


@dataclass(frozen=True)
class Published:
    """A file that published figures were computed with. sha256, size (bytes): None where we know no published one.

    tensors: names and shapes of its tensors, on the meta device.
    """

    file: str
    publisher: str
    tensors: Callable[[], Mapping[str, Tensor]]
    sha256: str | None = None
    size: int | None = None


class Weights(NamedTuple):
    """fp32 tensors; the sha256 of the file they were imported from; own: it is not the published file."""

    tensors: dict[str, Tensor]
    sha256: str
    own: bool


PUBLISHED = {
    "inception": Published(
        "weights-inception-2015-12-05-6726825d.pth",
        "torch-fidelity release v0.2.0, https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
        lambda: InceptionV3().state_dict(),
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
    ),
    "vgg16": Published(
        "vgg16-397923af.pth",
        "torchvision, https://download.pytorch.org/models/vgg16-397923af.pth",
        lambda: VGG16().state_dict(),
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "lpips": Published(
        "vgg.pth",
        "the lpips package 0.1.4, lpips/weights/v0.1/vgg.pth",
        perceptual.published_heads,
    ),
    "dinov2": Published(
        "dinov2_vitl14_pretrain.pth",
        "Meta, https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        lambda: DINOv2().published_tensors(),
    ),
}


def cache_folder() -> Path:
    return Path(os.environ.get("HSRGAN_CACHE") or "~/.cache/hsrgan/weights").expanduser()


def load_weights(name: str, cache: Path | None = None) -> Weights:
    """The weights of PUBLISHED[name] from the cache; `lpips`, unless imported, from the installed package.

    UserError: not imported yet (says which file, whose, and the command), or a damaged cache file.
    """
    path = (cache or cache_folder()) / f"{name}.safetensors"
    if not path.is_file():
        if name == "lpips":
            return read_weights(name, packaged_heads())
        known = PUBLISHED[name]
        option = f" --cache {cache}" if cache else ""
        raise UserError(f"{path} does not exist: get {known.file} ({known.publisher}; sha256 "
                        f"{known.sha256 or 'not published'}) and run: "
                        f"python tools/import_weights.py {name} {known.file}{option}")
    again = f"import it again with tools/import_weights.py {name}"
    tensors, metadata = read_safetensors(path)
    if (metadata.get("format"), metadata.get("network")) != (FORMAT, name):
        raise UserError(f"{path} was not made by tools/import_weights.py {name}: {again}")
    if metadata.get("tensors_sha256") != _sha256_of_tensors(tensors):
        raise UserError(f"{path} is damaged (its tensors are not those that were imported): {again}")
    return Weights(tensors, metadata["sha256"], metadata["own"] == "yes")


def import_weights(name: str, file: Path, *, cache: Path | None = None, own: bool = False) -> tuple[Path, Weights]:
    """Check `file` and write it to the cache as safetensors, whole or not at all. Arguments as of read_weights."""
    weights = read_weights(name, file, own=own)
    path = (cache or cache_folder()) / f"{name}.safetensors"
    metadata = {
        "format": FORMAT,
        "network": name,
        "source": file.name,
        "sha256": weights.sha256,
        "own": "yes" if weights.own else "no",
        "tensors_sha256": _sha256_of_tensors(weights.tensors),
    }
    with writable(path, "name another folder with HSRGAN_CACHE or --cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_bytes(save(weights.tensors, metadata))  # save_file has errors of its own
    return path, weights


def read_weights(name: str, file: Path, *, own: bool = False) -> Weights:
    """`file` (.pth of plain tensors, or .safetensors) as the weights of PUBLISHED[name].

    own: accept another file than the published one. UserError: another size or sha256 without `own`; a file that would
    execute something; tensors that are not the network's; values that are no numbers.
    """
    known = PUBLISHED[name]
    if not os.path.isfile(file):
        raise UserError(f"{file} does not exist: get {known.file} from {known.publisher}")
    remedy = f"get {known.file} again from {known.publisher}, or give --own-weights for a network of your own"
    size = file.stat().st_size
    if not own and known.size not in (None, size):
        raise UserError(f"{file} has {size:,} bytes and {known.file} {known.size:,}: {remedy}")
    sha256 = sha256_of(file)
    if not own and known.sha256 not in (None, sha256):
        raise UserError(f"{file} has sha256 {sha256} and {known.file} {known.sha256}: {remedy}")
    state = read_state_dict(file)
    with torch.device("meta"):
        want = _without_counters(known.tensors())
    state = _without_counters(state)
    if detail := misfit(want, state):
        raise UserError(f"{file} is no {name} network: {detail}; {name} means {known.file} from {known.publisher}")
    tensors = {k: v.to(torch.float32, copy=True).contiguous() for k, v in state.items()}
    if bad := [k for k, v in tensors.items() if not v.isfinite().all()]:
        raise UserError(f"{file}: {bad[0]} holds values that are no finite numbers: the file is damaged, copy it again")
    return Weights(tensors, sha256, own and (known.sha256 is None or sha256 != known.sha256))


def packaged_heads() -> Path:
    """LPIPS's heads inside the installed lpips package, which need not be imported for it."""
    spec = importlib.util.find_spec("lpips")
    if spec is None:
        raise UserError("the package lpips is not installed, and it brings LPIPS's heads: pip install lpips")
    return Path(spec.submodule_search_locations[0], "weights", "v0.1", "vgg.pth")


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batch norm counts its training batches, which scores need not, and old files lack."""
    return {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}


def _sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().numpy().data)
    return digest.hexdigest()
