"""A snapshot as the quickstart's run leaves it: its architecture, classes and dataset facts; the weights are random."""

import inspect
from pathlib import Path

import torch

from hsrgan.engine.config import load_recipe
from hsrgan.engine.model import Generator
from hsrgan.engine.snapshot import save_snapshot

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def save_quickstart(path: Path, *overrides: str, labels: bool = False, recipe_json: str | None = None) -> Path:
    """Write it to `path`, of the recipe with `overrides`; with labels, as `data.labels=true` would have it.
    recipe_json: what it says that its recipe was.

    Noise strengths, w_avg and the mapping's biases, which begin at zero, are moved, so that noise modes, truncation and
    seeds tell.
    """
    recipe = load_recipe(RECIPE, [f"data.labels={str(labels).lower()}", *overrides], world_size=1)
    known = inspect.signature(Generator).parameters
    sizes = {key: value for key, value in recipe.generator.model_dump().items() if key in known}
    torch.manual_seed(0)
    shape = {"img_resolution": recipe.data.resolution, "img_channels": recipe.data.channels}
    generator = Generator(**sizes, **shape, c_dim=10 if labels else 0)
    with torch.no_grad():
        for name, value in generator.named_parameters():
            if name.endswith("noise_strength"):
                value.fill_(0.3)
            elif name.startswith("mapping.fc") and name.endswith("bias"):
                value.normal_(0, 30)  # times the learning rate multiplier, 0.01
    generator.mapping.w_avg.normal_(0, 0.2)
    facts = {"resolution": [16, 16], "class_names": [str(i) for i in range(10)], "sha256": "0" * 64}
    save_snapshot(path, generator, recipe_json=recipe_json or recipe.to_json(), kimg=160, dataset=facts)
    return path
