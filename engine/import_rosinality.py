"""StyleGAN2 networks out of checkpoints of rosinality/stylegan2-pytorch: `.pt` with g_ema, g, d and latent_avg.

Both compute the same function; only names and leading axes differ. Checked against its published model.py: the
up-convolution is a transposed one with the weight as stored (no flip), then [1, 3, 3, 1]⊗[1, 3, 3, 1]/16 padded [1, 1];
to_rgb's 1/√in stands on the weight there and on the style here; noise comes before bias; nothing is clamped. One
difference remains: it demodulates weights scaled by 1/√(9·in), so its 1e-8 weighs 9·in times more than ours. That
matters only where a filter's weights are some 10⁻³ of their initial size.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hsrgan.engine.errors import UserError
from hsrgan.engine.import_stylegan import Imported, Network
from hsrgan.engine.layers import TAPS
from hsrgan.engine.model import Mapping as MappingNetwork
from hsrgan.engine.network_shapes import as_network, is_filter, shape_of_d, shape_of_g
from hsrgan.engine.safe_pickle import shown
from hsrgan.engine.tensor_files import misfit_of_names, read_pth

AVERAGED = 10_000  # latents for w_avg where the file has none
UNCLAMPED = {"num_fp16_res": 0, "conv_clamp": None}  # all fp32

# How a tensor differs: leading axes of 1 that ours lack, trailing ones, and filters, which ours hold elsewhere
PLAIN, LEADING, NOISE, FLAT, UP_FILTER, FILTER = "plain", "leading", "noise", "flat", "up filter", "filter"


def read_rosinality(path: Path, *, every: bool = False) -> Imported:
    """The networks of a checkpoint. every: g and d too. UserError, one line: damaged, hostile or another network."""
    content = read_pth(path, "network file", inert=[argparse.Namespace])  # training saves its command line
    try:
        if not isinstance(content, dict) or not isinstance(content.get("g_ema"), dict):
            raise ValueError("it is no dict with a g_ema, as training writes it")
        known = {"g_ema": "G_ema", "g": "G", "d": "D"}
        dropped = [shown(key) for key in content if key not in (*known, "latent_avg")]
        networks, notes = {}, []
        for theirs, name in known.items():
            if theirs not in content:
                dropped.append(f"{name} (not in the file)")
            elif name != "G_ema" and not every:
                dropped.append(name)
            elif name == "D":
                state = _tensors(content[theirs], theirs)
                ours = _renamed(state, _names_of_d(state), theirs)
                constructor = {**shape_of_d(ours), **UNCLAMPED, "mbstd_group_size": 4}
                networks[name] = Network(constructor, as_network(name, constructor, ours))
            else:
                networks[name], said = _generator(_tensors(content[theirs], theirs), content, theirs, name)
                notes += said
    except ValueError as error:
        raise UserError(f"network file {path} is not imported: {error}") from None
    return Imported("rosinality", networks, tuple(dropped), tuple(notes))


def _generator(
    state: dict[str, Tensor], content: Mapping[str, object], theirs: str, name: str
) -> tuple[Network, list[str]]:
    notes = []
    names = _names_of_g(state)
    if not any(key.startswith("noises.") for key in state):  # as in files of 2019
        names = {key: value for key, value in names.items() if not key.startswith("noises.")}
        notes.append(f"{name} has no constant noise in the file: drawn from seed 0")
    ours = _renamed(state, names, theirs)
    draws = torch.Generator().manual_seed(0)
    for _, (key, kind) in _names_of_g(state).items():
        if kind == NOISE and key not in ours:
            r = int(re.search(r"\.b(\d+)\.", key)[1])
            ours[key] = torch.randn(r, r, generator=draws)
    average = content.get("latent_avg")
    if average is not None:
        if not isinstance(average, Tensor):
            raise ValueError(f"its latent_avg is {shown(average)}, not a tensor")
        ours["mapping.w_avg"] = average.squeeze(0) if average.ndim == 2 else average
    constructor = {**shape_of_g(ours), **UNCLAMPED}
    if average is None:
        ours["mapping.w_avg"] = torch.zeros(constructor["w_dim"])
    result = Network(constructor, as_network(name, constructor, ours))
    if average is None:
        result.state["mapping.w_avg"] = _average(constructor, result.state)
        notes.append(f"{name} has no latent_avg in the file: w_avg is the mean w of {AVERAGED:,} latents of seed 0")
    return result, notes


@torch.no_grad()
def _average(constructor: Mapping[str, int], state: Mapping[str, Tensor]) -> Tensor:
    """The mean w [w_dim], as its `mean_latent` draws it."""
    net = MappingNetwork(constructor["z_dim"], 0, constructor["w_dim"], 1, constructor["mapping_layers"])
    net.load_state_dict({k.removeprefix("mapping."): v for k, v in state.items() if k.startswith("mapping.")})
    z = torch.randn(AVERAGED, constructor["z_dim"], generator=torch.Generator().manual_seed(0))
    return net(z, None).mean(dim=(0, 1))


def _names_of_g(state: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Every name of its generator → (ours, how it differs), for as many layers as `state` has."""
    names = {"input.input": ("synthesis.b4.const", LEADING)}
    for i in range(_count(state, r"style\.(\d+)\.weight")):
        for end in ("weight", "bias"):
            names[f"style.{i + 1}.{end}"] = (f"mapping.fc{i}.{end}", PLAIN)
    layers = [("conv1", "synthesis.b4.conv1")]
    colours = [("to_rgb1", "synthesis.b4.torgb")]
    for i in range(_count(state, r"to_rgbs\.(\d+)\.bias")):
        block = f"synthesis.b{8 << i}"
        layers += [(f"convs.{2 * i + j}", f"{block}.conv{j}") for j in range(2)]
        colours.append((f"to_rgbs.{i}", f"{block}.torgb"))
        names |= {f"convs.{2 * i}.conv.blur.kernel": ("", UP_FILTER), f"to_rgbs.{i}.upsample.kernel": ("", UP_FILTER)}
    for theirs, ours in layers + colours:
        names[f"{theirs}.conv.weight"] = (f"{ours}.weight", LEADING)
        for end in ("weight", "bias"):
            names[f"{theirs}.conv.modulation.{end}"] = (f"{ours}.affine.{end}", PLAIN)
    for i, (theirs, ours) in enumerate(layers):
        names[f"{theirs}.activate.bias"] = (f"{ours}.bias", PLAIN)
        names[f"{theirs}.noise.weight"] = (f"{ours}.noise_strength", LEADING)
        names[f"noises.noise_{i}"] = (f"{ours}.noise_const", NOISE)
    return names | {f"{theirs}.bias": (f"{ours}.bias", FLAT) for theirs, ours in colours}


def _names_of_d(state: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """The same for its discriminator."""
    count = _count(state, r"convs\.(\d+)\.conv1\.0\.weight")
    top = f"b{4 << count}"
    names = {"convs.0.0.weight": (f"{top}.fromrgb.weight", PLAIN), "convs.0.1.bias": (f"{top}.fromrgb.bias", PLAIN)}
    for i in range(count):
        theirs, ours = f"convs.{i + 1}", f"b{4 << count - i}"
        names |= {
            f"{theirs}.conv1.0.weight": (f"{ours}.conv0.weight", PLAIN),
            f"{theirs}.conv1.1.bias": (f"{ours}.conv0.bias", PLAIN),
            f"{theirs}.conv2.0.kernel": ("", FILTER),
            f"{theirs}.conv2.1.weight": (f"{ours}.conv1.weight", PLAIN),
            f"{theirs}.conv2.2.bias": (f"{ours}.conv1.bias", PLAIN),
            f"{theirs}.skip.0.kernel": ("", FILTER),
            f"{theirs}.skip.1.weight": (f"{ours}.skip.weight", PLAIN),
        }
    names |= {"final_conv.0.weight": ("b4.conv.weight", PLAIN), "final_conv.1.bias": ("b4.conv.bias", PLAIN)}
    for i, layer in enumerate(("fc", "out")):
        names |= {f"final_linear.{i}.{end}": (f"b4.{layer}.{end}", PLAIN) for end in ("weight", "bias")}
    return names


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, tuple[str, str]], network: str) -> dict[str, Tensor]:
    """The tensors under our names, with the filters that ours hold in every layer that resamples and beside it."""
    if detail := misfit_of_names(names, state):
        raise ValueError(f"its {network} is not rosinality's StyleGAN2: {detail}")
    result = {}
    for theirs, (ours, kind) in names.items():
        value = state[theirs]
        if kind in (FILTER, UP_FILTER):
            if not is_filter(value, 4 if kind == UP_FILTER else 1):
                raise ValueError(f"{theirs} of its {network} is not the [1, 3, 3, 1] filter, all that is computed here")
            continue
        ones = {PLAIN: (), LEADING: (0,), NOISE: (0, 1), FLAT: (0, 2, 3)}[kind]
        if any(axis >= value.ndim or value.shape[axis] != 1 for axis in ones):
            raise ValueError(f"{theirs} of its {network} is {list(value.shape)}")
        result[ours] = value.squeeze(ones) if ones else value
    taps = torch.tensor(TAPS)
    owners = {re.match(r"(synthesis\.)?b\d+", key)[0] for key in result if re.match(r"(synthesis\.)?b\d+\.", key)}
    owners = {owner for owner in owners if owner != "b4"}  # D's end has no filter of its own
    owners |= {key.removesuffix(".weight") for key in result
               if re.search(r"\.(conv|conv0|conv1|skip|fromrgb)\.weight$", key)}  # fmt: skip
    return result | {f"{owner}.resample_filter": taps.outer(taps) for owner in owners}


def _tensors(state: object, network: str) -> dict[str, Tensor]:
    """A state dict whose values are no larger than what the file holds."""
    if not isinstance(state, dict):
        raise ValueError(f"its {network} is {shown(state)}, not a state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"its {network} is no state dict of tensors: {shown(key)} is {shown(value)}")
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{shown(key)} of its {network} declares more values than it holds")
    return {shown(key): value for key, value in state.items()}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)
