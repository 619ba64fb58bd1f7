"""The networks that `tools/import_weights.py stylegan --all` writes, built again from their files."""

import json
from pathlib import Path

from torch import nn

from hsrgan.engine.network_file import FORMAT
from hsrgan.engine.network_shapes import build
from hsrgan.engine.tensor_files import read_safetensors


def load_network(path: Path, network: str) -> nn.Module:
    state, metadata = read_safetensors(path, "network file", "")
    assert (metadata["format"], metadata["network"]) == (FORMAT, network)
    result = build(network, json.loads(metadata["constructor"]))
    result.load_state_dict(state)
    return result
