"""Recipes as text, for tests."""

from pathlib import Path

from hsrgan.engine.config import load_recipe

PLAIN = """\
run_dir: runs/test
kimg: 100
batch: 32
data:
  builtin: digits
  resolution: 32
generator:
  lr: 0.002
discriminator:
  lr: 0.002
  mbstd_group_size: 4
r1:
  gamma: 1
ema:
  kimg: 10
hsr:
  teacher: teacher.safetensors
  layers: {8: 2, 16: 1}
"""
HEADED = PLAIN + "projected: {teacher: t.safetensors, layers: [1, 3]}\n"
MINIMAL = "run_dir: runs/test\ndata: {builtin: digits, resolution: 32}\n"


def from_text(text, *overrides, world_size=1):
    """A recipe, read as r.yaml in the working folder, so that messages are predictable."""
    Path("r.yaml").write_text(text)
    return load_recipe("r.yaml", list(overrides), world_size=world_size)
