"""Builds of modulated_weight_gradients at layers of the FFHQ models, as JSON: run by test_conv_wgrad_triton.py.

In a process of its own, where @triton.jit compiles.
"""

import json
import sys

import torch

from hsrgan import kernels
from hsrgan.kernels import builds, launch

# Channels of x and of g, size of x, stride: FFHQ-1024's conv1 at three resolutions, and conv0 (x and g exchanged). The
# targets are those whose registers or shared memory each tile fills most; dw alone is built for all by test_builds.py.
LAYERS = {
    "1024 conv1": (32, 32, 1024, 1, ("sm_90",)),
    "512 conv1": (64, 64, 512, 1, ("sm_100",)),
    "256 conv1": (128, 128, 256, 1, ("sm_90", "sm_100", "gfx942")),
    "1024 conv0": (32, 64, 1025, 2, ("sm_80",)),
}


def recorded(cin, cout, size, stride, target):
    padding = 2 - stride
    out = (size + 2 * padding - 3) // stride + 1
    shapes = (8, cin, size, size), (8, cout, out, out)
    x, g = (
        torch.empty(s, dtype=torch.float16, device="meta").contiguous(memory_format=torch.channels_last) for s in shapes
    )
    rest = [torch.empty(s, device="meta") for s in ((cout, cin, 3, 3), (8, cin), (8, cout))]
    with launch.record(target) as launches:
        kernels.modulated_weight_gradients(x, g, *rest, stride, padding)
    return launches[0]


rows = []
for name, (*sizes, targets) in LAYERS.items():
    for target in targets:
        one = recorded(*sizes, target)
        found = builds.instructions(one, target) if target.startswith("sm_") else {}
        rows.append(
            {"layer": name, "target": target, "problems": builds.build(one, target).problems(), "instructions": found}
        )
json.dump(rows, sys.stdout)
