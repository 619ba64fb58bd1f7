"""One network as one .safetensors file that training can start from: what `tools/import_weights.py --all` writes.

fp32 tensors under the published keys. Metadata (text → text): `format`, `network` ("G", "D", "G_ema" or "heads"),
`constructor` (JSON of its arguments) and `source` (JSON: kind, file, sha256). Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from hsrgan.engine.aside import written_aside

FORMAT = "hsrgan-network-1"


def save_network(
    path: Path, network: str, constructor: Mapping[str, object], state: Mapping[str, Tensor], source: Mapping[str, str]
) -> None:
    """Write `network` of these arguments and tensors, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "network": network,
        "constructor": json.dumps(constructor),
        "source": json.dumps(source),
    }
    with written_aside(path) as aside:
        aside.write_bytes(save(dict(state), metadata))
