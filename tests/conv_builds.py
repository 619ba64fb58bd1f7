"""Builds of every tile of kernels/conv_table.py for its own architecture, and of layers: conv_builds.py [--json ROWS].

Run by test_builds.py in a process of its own, where @triton.jit compiles.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from hsrgan.kernels import builds, launch
from hsrgan.kernels.bias_act import Tail
from hsrgan.kernels.conv_gemm_triton import launch_gemm
from hsrgan.kernels.conv_table import TILES
from hsrgan.tools import kernel_shapes

DTYPES = {"half": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


def record(kind, tile, chip, every_form):
    """A forward pass with all of prologue and epilogue, an input gradient with its sums; and the other forms."""
    dtype, c, size = DTYPES[kind], tile.outputs, (64, 64)

    def empty(*shape, dtype=torch.float32):
        t = torch.empty(shape, dtype=dtype, device="meta")
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    x, w, pairs = empty(2, c, *size, dtype=dtype), empty(c, c, 3, 3, dtype=dtype), empty(2, c)
    tail = Tail(empty(c), pairs, empty(2, 1, *size), empty(1), clamp=256.0)
    of_style = Tail(demod=pairs, act="linear")
    launch.allow_tf32(kind == "tf32")
    with launch.record(chip) as launches:
        launch_gemm(x, w, size, tile, stride=1, padding=1, transposed=False, scale=pairs, tail=tail)
        if kind == "half" and tile.outputs >= 128:
            launch_gemm(x, w, size, tile, stride=1, padding=1, transposed=True, tail=of_style, ref=x)
        if every_form:
            up = empty(2, c, 129, 129, dtype=dtype)
            launch_gemm(x, w, (129, 129), tile, stride=2, padding=0, transposed=True, scale=pairs)
            launch_gemm(up, w, size, tile, stride=2, padding=0, transposed=False, tail=of_style, ref=x)
            skip = Tail(empty(c), clamp=256.0, residual=x)
            launch_gemm(up, w, size, tile, stride=2, padding=0, transposed=False, tail=skip)
    return launches


def layers(chip):
    """What the layers that the rule gives to the GEMM launch at 1024², penalties included, and no other op builds."""
    launches = []
    for call in kernel_shapes.convolution(8, 32, 1024):
        with launch.record(chip) as some:
            kernel_shapes.passes(call, torch.float16)
        launches += some
    return [one for one in launches if one.kernel.__name__ == "conv_gemm" or _takes_x_from_y(one.constants)]


def _takes_x_from_y(constants):
    return constants.get("FROM_Y") and (constants.get("WANT_DEMOD") or constants.get("GIVEN_DEMOD"))


if __name__ == "__main__":
    rows = []
    for built in builds.build_all(layers("sm_100"), ["sm_100"]):  # the one that spills first
        rows.append({"kind": "layer", "tile": [], **asdict(built), "problems": built.problems()})
    for (kind, architecture), tiles in TILES.items():
        for chip in [architecture] if architecture else builds.TARGETS if kind in DTYPES else []:
            for i, tile in enumerate(tiles):
                launches = record(kind, tile, chip, kind == "half" and i == 0 and chip in ("sm_90", "gfx942"))
                for one in launches:
                    built = builds.build(one, chip)
                    row = {"kind": kind, "tile": tile, **asdict(built), "problems": built.problems()}
                    if kind == "half" and chip == "sm_90" and one is launches[0]:
                        row["copies"] = builds.instructions(one, chip)
                    rows.append(row)
                    shared = f"{built.registers} registers, {built.shared:,} bytes shared"
                    print(f"{chip} {kind} {tuple(tile)}: {shared}, {built.matrix or 'no matrix unit'}")
    if "--json" in sys.argv:
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(rows))
