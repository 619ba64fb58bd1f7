"""Small networks to start a run from, and the files that hold them."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file

from hsrgan.engine import checkpoint, transfer
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.run_state import GeneratorWithHeads
from hsrgan.engine.snapshot import save_snapshot

WIDTHS = {"channel_base": 64, "channel_max": 8}
LATENT = {"z_dim": 6, "w_dim": 8, "mapping_layers": 2}


def networks(seed, *, heads=(), latent=LATENT, **shape):
    """G with heads, D and G_ema; every tensor that training moves is random, G_ema is not G."""
    torch.manual_seed(seed)
    shape = {"img_resolution": 16, **WIDTHS, **shape}
    g, d = Generator(**latent, **shape), Discriminator(**shape, mapping_layers=2)
    g_module = GeneratorWithHeads(g, HSRHeads(dict.fromkeys(heads, 8), dict.fromkeys(heads, 5), 7) if heads else None)
    ema = copy.deepcopy(g)
    for module in (g_module, d, ema):
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for module in (g, ema):
        module.mapping.w_avg.normal_()
    return {"G": g_module, "D": d, "G_ema": ema}


def state(module):
    return {transfer.published(key): value.clone() for key, value in module.state_dict().items()}


def saved(folder: Path, nets, classes=()) -> str:
    """A checkpoint of these networks; its Adams are empty."""
    parts = {name: module.state_dict() for name, module in nets.items()} | {"G_adam": {}, "D_adam": {}}
    checkpoint.write_folder(folder, checkpoint._files(parts, {"format": checkpoint.FORMAT, "class_names": classes}))
    return str(folder)


def snapshot_of(path: Path, generator, classes=()) -> str:
    save_snapshot(path, generator, recipe_json="{}", kimg=1.0, dataset={"class_names": classes})
    return str(path)


def network_file(path: Path, module, network: str) -> str:
    tensors = {key: value.contiguous().clone() for key, value in module.state_dict().items()}
    save_file(tensors, path, {"format": transfer.FORMAT, "network": network, "constructor": "{}"})
    return str(path)


def start(init_from, nets, classes=()):
    return transfer.start_from(init_from, nets["G"], nets["D"], nets["G_ema"], classes)


def fates(report, network, what):
    return {fate.tensor for fate in report.fates if (fate.network, fate.what) == (network, what)}


def of_block(module, *starts):
    return {key for key in state(module) if key.startswith(starts)}
