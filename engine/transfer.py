"""A run's first networks out of another run's: `init_from`, whose networks may be of another resolution, label count or
channel width.

    a checkpoint folder     G with its HSR heads, D and G_ema
    a snapshot              G_ema, from which G starts too; D is new
    an imported network     out.safetensors (G_ema), and out.G, out.D, out.heads.safetensors beside it, where they are

Tensors are matched by name (`overlap.py` says what of one is carried into another shape): a block b{r} is the same
block at any resolution of the image, and toRGB and fromRGB belong to theirs. Heads on another teacher than here, or on
other layers of it, are new where a checkpoint tells (its recipe, and the sha256 of the teacher's file); a network's
file does not say what its own were on. Adam, the path-length mean and the count of images begin anew. What became of
every tensor of either side is told, and kept in run_dir/transfer.json.
"""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from hsrgan.engine import checkpoint, snapshot
from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.network_file import FORMAT
from hsrgan.engine.overlap import OtherFilter, Pair
from hsrgan.engine.teacher import file_sha256
from hsrgan.engine.tensor_files import read_safetensors

NETWORKS = ("G", "D", "G_ema")
SIBLINGS = ("G", "D", "heads")
REMEDY = "give a checkpoint folder, a snapshot, or a network of tools/import_weights.py"
LOADED, PARTLY, NEW, DROPPED = "loaded", "partly", "new", "dropped"
ANEW = "Adam, the path-length mean and the count of images begin anew"


class Target(NamedTuple):
    """What a head looks at: as recipes name it, and the sha256 of the network's file where that is known."""

    teacher: str
    weights: str | None
    layers: int | list[int]
    sha256: str | None = None

    def is_of(self, other: Target) -> bool:
        """Whether it is the same network, by whatever path, and the same layers."""
        if self.sha256 and other.sha256:  # by a file's name there may be another by now
            names = [target.weights and target.teacher for target in (self, other)]
            same = self.sha256 == other.sha256 and names[0] == names[1]
        else:
            same = all(_same_file(*pair) for pair in ((self.teacher, other.teacher), (self.weights, other.weights)))
        return same and self.layers == other.layers

    def __str__(self) -> str:
        file = f" (sha256 {self.sha256[:12]}…)" if self.sha256 else ""
        return f"{self.teacher}{file}, layer {self.layers}"


def _same_file(a: str | None, b: str | None) -> bool:
    return a == b or bool(a and b and os.path.isfile(a) and os.path.isfile(b) and filecmp.cmp(a, b, shallow=False))


def targets_of(recipe: Mapping[str, Any], sha256s: Mapping[str, str | None] | None = None) -> dict[str, Target]:
    """Of a recipe's JSON, the target of all heads on teachers, by the beginning of their tensors' names. sha256s: of
    the teachers' files, by section, as a checkpoint keeps them; None: of the files that are there.
    """
    found = {}
    for name in ("hsr", "projected", "vision_aided"):
        if section := recipe.get(name):
            layers = {f"heads.{r}.": i for r, i in section["layers"].items()} if name == "hsr" else {
                f"{name}.": section["layers"]}  # fmt: skip
            named = section["teacher"], section.get("weights")
            sha256 = file_sha256(*named) if sha256s is None else sha256s.get(name)
            found |= {key: Target(*named, value, sha256) for key, value in layers.items()}
    return found


@dataclass(frozen=True)
class Source:
    """State dicts there, by network, under published names (HSR's heads below `heads.`, with G), and the file of each.
    classes: the names of its labels, empty where they are not known. targets: of its recipe, where it has one.
    """

    tensors: dict[str, dict[str, Tensor]]
    files: dict[str, Path]
    classes: tuple[str, ...] = ()
    targets: Mapping[str, Target] = field(default_factory=dict)

    def of(self, network: str) -> tuple[dict[str, Tensor], Path | None]:
        """What a network starts from, and out of which file: G and G_ema do for one another."""
        for name in {"G": ("G", "G_ema"), "G_ema": ("G_ema", "G"), "D": ("D",)}[network]:
            if name in self.tensors:
                return self.tensors[name], self.files[name]
        return {}, None


@dataclass(frozen=True)
class Fate:
    """What became of one tensor. count: elements that were carried, or of the whole tensor where none was."""

    network: str
    tensor: str
    what: str
    count: int
    there: list[int] | None
    here: list[int] | None
    why: str = ""


def published(key: str) -> str:
    """The name of a parameter or buffer of `GeneratorWithHeads` under which files and recipes know it."""
    return key.removeprefix("generator.").removeprefix("heads.")


def read_source(init_from: str | Path) -> Source:
    """UserError, one line: a path that is none of the three, a damaged file, or a tensor that is not finite."""
    path = Path(init_from)
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"init_from {path} is no .safetensors file; {REMEDY}")
    source = _read_files(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    for network, tensors in source.tensors.items():
        for key, value in tensors.items():
            if not value.is_floating_point() or not torch.isfinite(value).all():
                raise UserError(f"init_from {source.files[network]}: {key} is not finite numbers; use an older one")
    return source


def _read_checkpoint(path: Path) -> Source:
    read = checkpoint.read_checkpoint(path)
    tensors = {part: {published(key): value for key, value in read.tensors[part].items()} for part in NETWORKS}
    files = {part: path / f"{part}.safetensors" for part in NETWORKS}
    targets = targets_of(read.state.get("recipe", {}), read.state.get("teachers", {}))
    return Source(tensors, files, tuple(read.state.get("class_names", ())), targets)


def _read_files(path: Path) -> Source:
    network, tensors, classes = _read_network(path)
    found, files = {network: tensors}, {network: path}
    if network == "G_ema":
        for name in SIBLINGS:
            beside = path.with_name(f"{path.stem}.{name}.safetensors")
            if beside.is_file():
                written, found[name], _ = _read_network(beside)
                files[name] = beside
                if written != name:
                    raise UserError(f"init_from {beside} holds {written}, not {name}: its name is another network's")
    if "heads" in found:
        heads = found.pop("heads")
        files.setdefault("G", files.pop("heads"))
        found["G"] = found.get("G", found.get("G_ema", {})) | heads
    return Source(found, files, classes)


def _read_network(path: Path) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    tensors, metadata = read_safetensors(path, "init_from", REMEDY)
    if metadata.get("format") == snapshot.FORMAT:
        try:
            return "G_ema", tensors, tuple(json.loads(metadata["dataset"]).get("class_names") or ())
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"init_from {path}: its metadata is not a snapshot's ({error!r}); save it again") from None
    network = metadata.get("network", "")
    if metadata.get("format") != FORMAT or network not in (*NETWORKS, "heads"):
        raise UserError(f"init_from {path}: its format is {metadata.get('format', 'not stated')}; {REMEDY}")
    return network, tensors, ()


@dataclass(frozen=True)
class Report:
    """The fate of every tensor of either side."""

    init_from: str
    files: dict[str, str]
    fates: list[Fate]

    def new(self, network: str) -> set[str]:
        """The tensors that start otherwise than `network` had them there, wholly or in part."""
        return {fate.tensor for fate in self.fates if fate.network == network and fate.what in (PARTLY, NEW)}

    def write(self, run_dir: str | Path) -> None:
        content = {"init_from": self.init_from, "files": self.files, "anew": ANEW}
        with written_aside(Path(run_dir) / "transfer.json") as aside:
            aside.write_text(json.dumps(content | {"tensors": [asdict(fate) for fate in self.fates]}, indent=1) + "\n")

    def table(self) -> Table:
        """A line for each network and fate."""
        table = Table(title=f"From {self.init_from}; {ANEW}", title_justify="left")
        for name in ("network", "", "tensors", "numbers", "of"):
            table.add_column(name, justify="right" if name in ("tensors", "numbers") else "left")
        rows = {network: list(self._rows(network)) for network in NETWORKS}
        same = rows["G"] == rows["G_ema"]
        for network in ("G", "D") if same else NETWORKS:
            label = "G, G_ema" if same and network == "G" else network
            for row in rows[network]:
                table.add_row(label, *row)
                label = ""
        return table

    def _rows(self, network: str) -> Iterator[tuple[str, ...]]:
        for what in (LOADED, PARTLY, NEW, DROPPED):
            fates = [fate for fate in self.fates if fate.network == network and fate.what == what]
            if fates:
                blocks = dict.fromkeys(fate.tensor.removeprefix("synthesis.").split(".")[0] for fate in fates)
                yield what, str(len(fates)), f"{sum(fate.count for fate in fates):,}", " ".join(blocks)


def start_from(
    init_from: str, g_module: nn.Module, discriminator: nn.Module, g_ema: nn.Module, class_names: Sequence[str],
    targets: Mapping[str, Target] | None = None,
) -> Report:  # fmt: skip
    """Fill the networks, which hold their initial values, from `init_from`, and tell what became of every tensor.

    class_names: of the labels that these networks take. targets: of their recipe; None takes all heads for the same.
    UserError where nothing would be carried.
    """
    source, targets = read_source(init_from), targets or {}
    strangers = {
        prefix: f"a head on {there}, there"
        for prefix, there in source.targets.items()
        if prefix in targets and not there.is_of(targets[prefix])
    }
    modules = {"G": g_module, "D": discriminator, "G_ema": g_ema}
    fates, filled = [], {}
    for network, module in modules.items():
        tensors, file = source.of(network)
        own = {published(key): (key, value) for key, value in module.state_dict().items()}
        here = {name: value for name, (_, value) in own.items()}
        try:
            found, carried = _match(network, Pair(here, tensors, class_names, source.classes, strangers))
        except OtherFilter as error:
            raise UserError(f"init_from {file}: {error} is not the [1, 3, 3, 1] filter, the only one that these layers "
                            "compute; give a network that was trained with it") from None
        fates += found
        filled[network] = {own[name][0]: value for name, value in carried.items()}
    if not any(fate.what in (LOADED, PARTLY) and _learned(fate.tensor) for fate in fates):
        raise UserError(f"init_from {init_from}: none of its tensors is one of the recipe's networks; {REMEDY}")
    for network, module in modules.items():
        module.load_state_dict(filled[network], strict=False)
    return Report(init_from, {name: str(path) for name, path in source.files.items()}, fates)


def _match(network: str, pair: Pair) -> tuple[list[Fate], dict[str, Tensor]]:
    fates, carried = [], {}
    for name in dict.fromkeys([*pair.here, *pair.there]):
        here, there = pair.here.get(name), pair.there.get(name)
        shapes = tuple(None if side is None else list(side.shape) for side in (there, here))
        if here is None:
            fates.append(Fate(network, name, DROPPED, there.numel(), *shapes, "not part of the recipe's network"))
        elif there is None:
            why = "not there" if pair.there else f"init_from has no {network}"
            fates.append(Fate(network, name, NEW, here.numel(), *shapes, why))
        else:
            found = pair.carry(name)
            if found.tensor is None:
                fates.append(Fate(network, name, NEW, here.numel(), *shapes, found.why))
            else:
                carried[name] = found.tensor
                fates.append(Fate(network, name, PARTLY if found.why else LOADED, found.count, *shapes, found.why))
    return fates, carried


def _learned(tensor: str) -> bool:
    return not tensor.endswith(("resample_filter", "noise_const"))
