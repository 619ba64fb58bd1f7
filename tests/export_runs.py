"""Snapshots to export, and tools/export.py called on them."""

from pathlib import Path

import torch
from typer.testing import CliRunner

from hsrgan.engine.model import Generator
from hsrgan.engine.snapshot import save_snapshot
from hsrgan.tools import export

TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}
SCORE = {"metric": "fid1000_full", "values": {"fid1000_full": 12.25}, "data": "/home/me/shards"}


def write(path: Path, recipe_json: str = "{}", **kwargs: object) -> Path:
    """A snapshot with random weights in which every input changes the image."""
    torch.manual_seed(0)
    generator = Generator(**kwargs).eval()
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            value.data.fill_(0.5)
    generator.mapping.w_avg.normal_()
    names = [f"n{i}" for i in range(generator.c_dim)]
    save_snapshot(path, generator, recipe_json=recipe_json, kimg=160, dataset={"class_names": names}, score=SCORE)
    return path


def run(snapshot: Path, to: str, *options: object):
    return CliRunner().invoke(export.app, [str(snapshot), "--to", to, *map(str, options)])


def exported(snapshot: Path, to: str, out: Path, *options: object) -> str:
    """What the tool says of a successful export."""
    result = run(snapshot, to, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "checked at batch 1, 3, 5" in result.stdout
    return result.stdout


def line(result) -> str:
    """The one line of a user's mistake."""
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), (result.output, result.exception)
    messages = [text for text in result.stderr.splitlines() if not text.startswith(("writing: ", "checking: "))]
    assert len(messages) == 1 and messages[0].startswith("error: "), result.stderr
    return messages[0]
