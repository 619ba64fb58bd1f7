"""A network's constructor arguments from its tensors, under the published keys, and whether both agree wholly."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.layers import TAPS
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.tensor_files import misfit

NETWORKS = {"G": Generator, "G_ema": Generator, "D": Discriminator, "heads": HSRHeads}


def shape_of_g(state: Mapping[str, Tensor], declared: Mapping[str, int] | None = None) -> dict[str, object]:
    """What the tensors of a generator tell of its constructor. declared: as of `_widths`. ValueError: no generator."""
    resolutions = _resolutions(state, "synthesis.b")
    top = f"synthesis.b{resolutions[-1]}"
    w_dim = _size(state, "synthesis.b4.conv1.affine.weight", 1)
    c_dim = _size(state, "mapping.embed.weight", 1) if "mapping.embed.weight" in state else 0
    embedded = _size(state, "mapping.embed.weight", 0) if c_dim else 0
    architecture = "skip" if "synthesis.b4.torgb.weight" in state else "orig"
    return {
        "z_dim": _size(state, "mapping.fc0.weight", 1) - embedded,
        "c_dim": c_dim,
        "w_dim": w_dim,
        "img_resolution": resolutions[-1],
        "img_channels": _size(state, f"{top}.torgb.weight", 0),
        "mapping_layers": _mapping_layers(state),
        "architecture": "resnet" if f"{top}.skip.weight" in state else architecture,
        **_widths({r: _size(state, f"synthesis.b{r}.conv1.weight", 0) for r in resolutions}, declared),
    }


def shape_of_d(state: Mapping[str, Tensor], declared: Mapping[str, int] | None = None) -> dict[str, object]:
    """The same of a discriminator, whose group size no tensor tells."""
    resolutions = _resolutions(state, "b")
    top = f"b{resolutions[-1]}"
    architecture = "skip" if "b4.fromrgb.weight" in state else "orig"
    channels = {r: _size(state, f"b{r}.{'conv' if r == 4 else 'conv0'}.weight", 0) for r in resolutions}
    facts = {
        "c_dim": _size(state, "mapping.embed.weight", 1) if "mapping.embed.weight" in state else 0,
        "img_resolution": resolutions[-1],
        "img_channels": _size(state, f"{top}.fromrgb.weight", 1),
        "architecture": "resnet" if f"{top}.skip.weight" in state else architecture,
        **_widths(channels, declared),
    }
    return facts | ({"mapping_layers": _mapping_layers(state)} if facts["c_dim"] else {})


def shape_of_heads(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The same of HSR's predictors, keys as of `HSRHeads`; JSON has text for the keys of its dicts."""
    resolutions = sorted({int(found[1]) for key in state if (found := re.match(r"heads\.(\d{1,4})\.", key))})
    first, second = "heads.{}.conv1x1_1.weight", "heads.{}.conv1x1_2.weight"
    return {
        "channels": {str(r): _size(state, first.format(r), 1) for r in resolutions},
        "targets": {str(r): _size(state, second.format(r), 0) for r in resolutions},
        "hidden": _size(state, first.format(resolutions[0]), 0),
    }


def build(network: str, constructor: Mapping[str, object]) -> torch.nn.Module:
    """NETWORKS[network] from its arguments, as JSON gives them."""
    if network == "heads":
        by_resolution = {k: {int(r): v for r, v in constructor[k].items()} for k in ("channels", "targets")}
        constructor = {**constructor, **by_resolution}
    return NETWORKS[network](**constructor)


def as_network(network: str, constructor: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` as fp32 tensors of their own, exactly those of the network. ValueError: other names, shapes or values."""
    with torch.device("meta"):
        want = build(network, constructor).state_dict()
    if detail := misfit(want, state):
        raise ValueError(f"its {network} is not the network that it says: {detail}")
    result = {}
    for key in want:
        value = state[key]
        if not value.is_floating_point():
            raise ValueError(f"{key} of its {network} is {value.dtype}, not floating-point")
        if not value.isfinite().all():
            raise ValueError(f"{key} of its {network} holds values that are no finite numbers")
        result[key] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        if key.endswith("resample_filter") and not is_filter(result[key], 1):
            raise ValueError(f"{key} of its {network} is not the [1, 3, 3, 1] filter, all that is computed here")
    return result


def is_filter(kernel: Tensor, gain: float) -> bool:
    """Whether `kernel` is [1, 3, 3, 1]⊗[1, 3, 3, 1]/64·gain."""
    taps = torch.tensor(TAPS)
    return kernel.shape == (4, 4) and torch.allclose(kernel.float(), taps.outer(taps) * gain, atol=1e-6)


def _resolutions(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """[4, 8, …, R] of the blocks' names."""
    found = sorted({int(m[1]) for key in state if (m := re.match(rf"{re.escape(prefix)}(\d{{1,5}})\.", key))})
    if len(found) < 2 or found != [4 << i for i in range(len(found))]:
        raise ValueError(f"it has blocks at {found or 'no resolution'}, not at 4, 8, … as StyleGAN2's")
    return found


def _mapping_layers(state: Mapping[str, Tensor]) -> int:
    return sum(re.fullmatch(r"mapping\.fc\d+\.weight", key) is not None for key in state)


def _widths(channels: Mapping[int, int], declared: Mapping[str, int] | None) -> dict[str, int]:
    """channel_base and channel_max, min(base // r, max) = channels {r: C_r}; `declared` ones where they do it."""
    widest = max(channels.values())
    narrow = [c * r for r, c in channels.items() if c < widest]
    guesses = [dict(declared)] if declared else []
    guesses.append({"channel_base": max(narrow, default=widest * max(channels)), "channel_max": widest})
    for guess in guesses:
        if all(min(guess["channel_base"] // r, guess["channel_max"]) == c for r, c in channels.items()):
            return guess
    raise ValueError(f"its channels by resolution, {dict(channels)}, are no min(channel_base / r, channel_max)")


def _size(state: Mapping[str, Tensor], key: str, axis: int) -> int:
    if key not in state:
        raise ValueError(f"it lacks {key}")
    if state[key].ndim <= axis or 0 in state[key].shape:
        raise ValueError(f"its {key} is {list(state[key].shape)}")
    return state[key].shape[axis]
