"""A generator's weights for others: a folder for the Hugging Face Hub with a model card, or a PyTorch state dict."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Generator
from hsrgan.engine.pretrained import CONFIG, FORMAT, WEIGHTS
from hsrgan.engine.snapshot import own_copy, save_snapshot

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def write_hf(folder: Path, generator: Generator, metadata: dict, precision: str) -> Generator:
    """Fill an empty folder with config.json, model.safetensors (a snapshot too: all tools read it) and README.md.

    Returns the generator that `from_pretrained` makes of it. metadata: the snapshot's, as loaded; what could be a path
    or an address of ours is shortened to its last part in all files.
    """
    public = {key: _public(metadata[key]) for key in ("recipe", "dataset", "score") if key in metadata}
    config = {"format": FORMAT, "library_name": "hsrgan", "model_type": "stylegan2", "kimg": metadata["kimg"],
              "generator": generator.init_kwargs, **public}  # fmt: skip
    _refuse_overflow(generator, precision)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_snapshot(
        folder / WEIGHTS, generator, recipe_json=json.dumps(public["recipe"]), kimg=metadata["kimg"],
        dataset=public["dataset"], score=public.get("score"), dtype=DTYPES[precision],
    )  # fmt: skip
    (folder / "README.md").write_text(model_card(generator, config, precision), encoding="utf-8")
    return Generator.from_pretrained(folder)


def write_pt(path: Path, generator: Generator, metadata: dict, precision: str) -> Generator:
    """{"state_dict": published StyleGAN2 keys, "config": JSON text}, which torch.load reads with weights_only=True.

    Returns the generator made of the file.
    """
    _refuse_overflow(generator, precision)
    config = json.dumps({"generator": generator.init_kwargs, "kimg": metadata["kimg"]})
    tensors = {key: own_copy(value, DTYPES[precision]) for key, value in generator.state_dict().items()}
    buffer = io.BytesIO()  # PyTorch's writer ends the process where the disk is full
    torch.save({"state_dict": tensors, "config": config}, buffer)
    path.write_bytes(buffer.getbuffer())
    content = torch.load(path, weights_only=True)
    loaded = Generator(**json.loads(content["config"])["generator"])
    loaded.load_state_dict(content["state_dict"])
    return loaded.eval().requires_grad_(False)


def check_weights(loaded: Generator, generator: Generator, precision: str, what: str) -> None:
    """UserError unless `loaded` holds the generator's values bit by bit, rounded to the precision of the file."""
    state = loaded.state_dict()
    for key, value in generator.state_dict().items():
        if not torch.equal(state[key], own_copy(value, DTYPES[precision]).float()):
            raise UserError(f"{what}: {key} is read back with other values, and the export was not kept: try again, "
                            "and test the disk if it stays so")


def _refuse_overflow(generator: Generator, precision: str) -> None:
    limit = torch.finfo(DTYPES[precision]).max
    for key, value in generator.state_dict().items():
        if value.abs().max() > limit:
            raise UserError(f"{key} reaches {value.abs().max():.3g}, and {precision} ends at {limit:g}: export with "
                            "--precision fp32")


def _public(value: object) -> object:
    """Without what tells of the machine: of texts with a slash (paths, addresses) only the last part is kept."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and "/" in value:
        return value.split("?")[0].rstrip("/").rpartition("/")[2]
    return value


def model_card(generator: Generator, config: dict, precision: str) -> str:
    """README.md of the folder. The licence is the publisher's to state."""
    channels = {1: "grey", 3: "RGB", 4: "RGBA"}.get(generator.img_channels, f"{generator.img_channels} channels")
    with torch.no_grad():
        ws = generator.mapping.w_avg.expand(1, generator.num_ws, -1)
        *_, height, width = generator.synthesis(ws, noise_mode="none").shape
    names = config["dataset"].get("class_names") or []
    parameters = sum(p.numel() for p in generator.parameters())
    facts = {
        "images": f"{height}×{width}, {channels}",
        "latents": f"z [N, {generator.z_dim}], w [N, {generator.num_ws}, {generator.w_dim}]",
        "labels": f"c [N, {generator.c_dim}]: {', '.join(map(str, names))}" if generator.c_dim else "none",
        "parameters": f"{parameters:,}, {precision}",
        "trained for": f"{config['kimg']:g} thousand images",
    }
    if (score := config.get("score")) is not None:
        values = ", ".join(f"{name} {value:.6g}" for name, value in score["values"].items())
        facts["scores"] = f"{values} (all about it: `score` in {CONFIG})"
    labels = ", torch.eye(generator.c_dim)[[0, 0, 0, 0]]" if generator.c_dim else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    recipe = json.dumps(config["recipe"], indent=2, ensure_ascii=False)
    return f"""---
library_name: hsrgan
pipeline_tag: unconditional-image-generation
tags: [stylegan2, gan, hsrgan]
# license: not stated; whoever publishes this model names one here
---

# StyleGAN2 generator, {height}×{width}

| | |
|-|-|
{rows}

## Use

```python
import torch
from hsrgan.engine.model import Generator

generator = Generator.from_pretrained(".")  # this folder, or hf://OWNER/NAME once it is on the Hub
images = generator(torch.randn(4, generator.z_dim){labels}, truncation_psi=0.7)  # [4, {generator.img_channels}, \
{height}, {width}], about −1 … 1
```

`{WEIGHTS}` holds the published StyleGAN2 keys, and is a snapshot: `python tools/sample.py {WEIGHTS} --seeds 0-63`.

## Training

<details><summary>The recipe, without paths</summary>

```json
{recipe}
```

</details>
"""
