"""What `--edit name=strength` adds to ws, and layer ranges such as 0-6, out of the words of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.attributes import nearest
from hsrgan.engine.metrics.directions import Directions, Layers, load_directions
from hsrgan.engine.model import Generator
from hsrgan.engine.tensor_files import sha256_of

MOST = 1000.0  # standard deviations, of an edit


@dataclass(frozen=True)
class Edits:
    """fixed [num_ws, w_dim] is added to every ws; so is s · step, for each s between low and high, where an edit was
    given as a range (`name`; step [num_ws, w_dim] is one standard deviation along its direction).
    """

    fixed: Tensor
    name: str = ""
    step: Tensor | None = None
    low: float = 0.0
    high: float = 0.0

    def at(self, strength: float) -> Tensor:
        """Of the range, at one strength: what to add to ws, [num_ws, w_dim]."""
        return self.fixed if self.step is None else self.fixed + strength * self.step


def read_edits(edits: Sequence[str], files: Sequence[Path], generator: Generator, snapshot: Path) -> Edits:
    """`name=2` and at most one range `name=-3:3`, along the directions in `files`. Raises `UserError`."""
    fixed = torch.zeros(generator.num_ws, generator.w_dim)
    if not edits:
        if files:
            raise UserError(f"--directions {files[0]} without --edit changes nothing: add --edit name=2, or leave it "
                            "out")
        return Edits(fixed)
    if not files:
        raise UserError(f"--edit {edits[0]} needs --directions FILE: make it with tools/directions.py")
    known = _directions(files, generator, snapshot)
    swept: dict = {}
    for edit in edits:
        name, _, text = edit.rpartition("=")
        try:
            strengths = [float(part) for part in text.split(":")]
        except ValueError:
            strengths = []
        if not name or not 1 <= len(strengths) <= 2 or not all(abs(s) <= MOST for s in strengths):
            raise UserError(f"--edit {edit}: write it like smile=2, or smile=-3:3 for a range, in standard deviations "
                            f"of w, {MOST:g} at most")
        if name not in known:
            raise UserError(f"there is no direction {name!r}{nearest(name, list(known))}")
        if len(strengths) == 1:
            fixed += known[name].edit(name, strengths[0], generator.num_ws)
        elif swept:
            raise UserError(f"--edit {edit}: {swept['name']} has a range already; give this one a single strength")
        else:
            step = known[name].edit(name, 1.0, generator.num_ws)
            swept = {"name": name, "step": step, "low": strengths[0], "high": strengths[1]}
    return Edits(fixed, **swept)


def _directions(files: Sequence[Path], generator: Generator, snapshot: Path) -> dict[str, Directions]:
    """By the names of the directions, those of the file that each is in."""
    known: dict[str, Directions] = {}
    of: dict[str, Path] = {}
    sha256 = sha256_of(snapshot)
    for file in files:
        found = load_directions(file)
        found.expect(num_ws=generator.num_ws, w_dim=generator.w_dim, snapshot=sha256, path=file)
        for name in found.names:
            if name in known:
                raise UserError(f"--directions {of[name]} and --directions {file} both have {name!r}: python "
                                f"tools/directions.py name {file} {name}=other gives one another name")
            known[name], of[name] = found, file
    return known


def parse_layers(text: str, num_ws: int, option: str) -> Layers:
    """`0-6` → (0, 6), `3` → (3, 3): numbers of ws. Raises `UserError`."""
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < num_ws):
        raise UserError(f"{option} {text}: write it like 0-{min(6, num_ws - 1)}; the snapshot has the ws 0 to "
                        f"{num_ws - 1}")
    return int(first), int(last)
