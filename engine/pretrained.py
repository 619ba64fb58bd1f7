"""Models in the Hugging Face Hub's form: a folder with `config.json` and `model.safetensors`, which needs no recipe.

`config.json` holds `format` and, under `generator`, the constructor's arguments; `model.safetensors` the state dict
under the published StyleGAN2 keys, fp32 or fp16. `engine/publishing.py` writes both.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hsrgan.engine.errors import UserError
from hsrgan.engine.tensor_files import misfit, one_line, read_safetensors

FORMAT = "hsrgan-pretrained-1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB = "hf://"


class Pretrained:
    """What gives a network its `from_pretrained`."""

    @classmethod
    def from_pretrained(cls, source: Path | str):
        """The network of a folder that `tools/export.py --to hf` wrote: fp32, on the CPU, in eval mode, no gradients.

        source: the folder, or hf://OWNER/NAME, which downloads those two files from the Hugging Face Hub. Nothing is
        unpickled or executed. UserError for what is missing, damaged, or does not fit together.
        """
        folder = _downloaded(str(source)) if str(source).startswith(HUB) else Path(source)
        if not folder.is_dir():
            raise UserError(f"pretrained model {folder}: no such folder; name one that holds {CONFIG} and {WEIGHTS} "
                            f"(a model of the Hugging Face Hub is written {HUB}OWNER/NAME)")
        kwargs = _read_config(folder / CONFIG)
        tensors, _ = read_safetensors(folder / WEIGHTS, what="pretrained model", remedy="export the snapshot again")
        try:
            with torch.device("meta"):  # absurd sizes in a damaged file cost nothing
                wanted = cls(**kwargs).state_dict()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"pretrained model {folder / CONFIG}: its generator cannot be built ({one_line(error)}); "
                            "export the snapshot again") from error
        if wrong := misfit(wanted, tensors):
            raise UserError(f"pretrained model {folder / WEIGHTS} does not fit its {CONFIG}: {wrong}; "
                            "the two are of different models: export the snapshot again")
        model = cls(**kwargs)
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False)


def _read_config(path: Path) -> dict:
    """The constructor's arguments in a config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"pretrained model {path} does not exist: export the snapshot again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"pretrained model {path} is damaged ({one_line(error)}): export the snapshot again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format", "not stated") if isinstance(config, dict) else "not stated"
        raise UserError(f"pretrained model {path}: its format is {found}, not {FORMAT}; tools/export.py --to hf makes "
                        "such a folder from a snapshot")
    if not isinstance(config.get("generator"), dict):
        raise UserError(f"pretrained model {path} has no generator: export the snapshot again")
    return config["generator"]


def _downloaded(source: str) -> Path:
    """The folder in the Hub's cache with the two files of hf://OWNER/NAME."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise UserError(f"{source} needs the package huggingface_hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(source.removeprefix(HUB), allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{source} cannot be fetched ({one_line(error)}): check the name and the network") from error
