"""One network as one .safetensors file that training can start from: what `tools/import_weights.py --all` writes.

fp32 tensors under the published keys. Metadata (text → text): `format`, `network` ("G", "D", "G_ema" or "heads"),
`constructor` (JSON of its arguments) and `source` (JSON: kind, file, sha256). Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.network_shapes import NETWORKS, as_network, build
from hsrgan.engine.tensor_files import one_line, read_safetensors

FORMAT = "hsrgan-network-1"


def save_network(
    path: Path, network: str, constructor: Mapping[str, object], state: Mapping[str, Tensor], source: Mapping[str, str]
) -> None:
    """Write NETWORKS[network] of these arguments and tensors, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "network": network,
        "constructor": json.dumps(constructor),
        "source": json.dumps(source),
    }
    with written_aside(path) as aside:
        aside.write_bytes(save(dict(state), metadata))


def load_network(path: Path, network: str) -> nn.Module:
    """The network of a file, fp32 on the CPU. UserError: absent, damaged, or another network than `network`."""
    state, metadata = read_safetensors(path, "network file", "make it with tools/import_weights.py stylegan … --all")
    if (metadata.get("format"), metadata.get("network")) != (FORMAT, network) or network not in NETWORKS:
        raise UserError(f"network file {path} holds no {network}: give one made by tools/import_weights.py stylegan "
                        "… --all")
    try:
        constructor = json.loads(metadata["constructor"])
        state = as_network(network, constructor, state)
        result = build(network, constructor)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"network file {path} does not hold what its metadata says ({one_line(error)}): import it "
                        "again") from None
    result.load_state_dict(state)
    return result
