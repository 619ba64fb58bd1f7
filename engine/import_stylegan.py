"""StyleGAN2 networks out of the pickles of stylegan2-ada-pytorch, stylegan3 (--cfg=stylegan2) and val-iisc/HSR.

Such a pickle is a dict of G, D, G_ema, training_set_kwargs and augment_pipe. A network in it is a persistent object:
a call of torch_utils.persistence that would run the source code it brings. Here it is read as data
(`engine/safe_pickle.py`): the source stays text, and only tensors, names and constructor arguments are taken.
"""

from __future__ import annotations

import io
import mmap
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsrgan.engine.errors import UserError
from hsrgan.engine.network_shapes import as_network, shape_of_d, shape_of_g, shape_of_heads
from hsrgan.engine.safe_pickle import Call, Name, PersistentId, read_pickle, shown
from hsrgan.engine.tensor_files import LEGACY_MAGIC, one_line

PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
STORAGE = ("torch.storage", "_load_from_bytes")
TENSOR = ("torch._utils", "_rebuild_tensor_v2")
PARAMETERS = (("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state"))
KNOWN = {
    PERSISTENT, STORAGE, TENSOR, *PARAMETERS,
    ("collections", "OrderedDict"), ("dnnlib.util", "EasyDict"), ("builtins", "set"), ("builtins", "frozenset"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
}  # fmt: skip
LAYERS = re.compile(r"torch\.nn\.modules\.\w+")  # HSR has plain layers in its networks; they too stay data
ITEM_SIZES = {"FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "DoubleStorage": 8,
              "LongStorage": 8, "IntStorage": 4, "ByteStorage": 1, "BoolStorage": 1}  # fmt: skip

# Constructor arguments by position, and what a class takes where the pickle names none
G_ARGS = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "mapping_kwargs", "synthesis_kwargs")
D_ARGS = ("c_dim", "img_resolution", "img_channels", "architecture", "channel_base", "channel_max", "num_fp16_res",
          "conv_clamp", "cmap_dim", "block_kwargs", "mapping_kwargs", "epilogue_kwargs")  # fmt: skip
ADA = {"num_fp16_res": 0, "conv_clamp": None}
SG3 = {"num_fp16_res": 4, "conv_clamp": 256}
GROUPS = ("mapping_kwargs", "synthesis_kwargs", "block_kwargs", "epilogue_kwargs")
ONLY = {"activation": "lrelu", "lr_multiplier": 0.01, "use_noise": True, "kernel_size": 3, "mbstd_num_channels": 1,
        "resample_filter": [1, 3, 3, 1]}  # fmt: skip
NOT_COMPUTED = {"fp16_channels_last", "channels_last", "fused_modconv_default", "w_avg_beta", "freeze_layers",
                "pred_feat_dims"}  # fmt: skip
IN_SHAPES = {"embed_features", "layer_features", "cmap_dim"}  # another than the default shows in the tensors' shapes


@dataclass(frozen=True)
class Network:
    """Constructor arguments (JSON-able) and fp32 tensors of one network, which fit."""

    constructor: dict[str, object]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Imported:
    """What a file held: its kind, its networks (G_ema, and if asked for G, D, heads), what was left out and why."""

    kind: str
    networks: dict[str, Network]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kimg: float | None = None


def read_stylegan(path: Path, *, every: bool = False) -> Imported:
    """The networks of a pickle. every: G, D and HSR's heads too, not G_ema alone.

    UserError, one line: a pickle that would call anything unknown, is damaged, or holds another network.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _imported(read_pickle(content, _vet), path, len(content), every)
    except OSError as error:
        raise UserError(f"network pickle {path}: {error.strerror or error}; check its name") from None
    except ValueError as error:
        raise UserError(f"network pickle {path} is not imported: {error}") from None


def _vet(name: Name) -> None:
    if name.module.startswith("dnnlib.tflib"):
        raise ValueError(f"it is a StyleGAN of TensorFlow ({name}); convert it first with legacy.py of "
                         "stylegan2-ada-pytorch")
    if (name.module, name.name) not in KNOWN and not LAYERS.fullmatch(name.module):
        raise ValueError(f"it wants to call {name}, which no published network does; nothing in it was executed")


def _imported(content: Any, path: Path, size: int, every: bool) -> Imported:
    if not isinstance(content, dict) or not isinstance(content.get("G_ema"), Call):
        raise ValueError("it is no dict with a G_ema, as training writes it")
    weights = _Weights(size)
    generator = _module(content["G_ema"])
    children = _children(generator)
    synthesis = _module(children.get("synthesis"))
    if any(name == "input" or re.match(r"L\d+_", name) for name in _children(synthesis)):
        raise ValueError("it is a generator of StyleGAN3 (config t or r), whose layers are not StyleGAN2's; "
                         "of stylegan3 only --cfg=stylegan2 is imported")
    sg3 = "num_fp16_res" in synthesis and "synthesis_kwargs" not in _kwargs(generator)
    networks: dict[str, Network] = {}
    kind = "stylegan3 --cfg=stylegan2" if sg3 else "stylegan2-ada-pytorch"
    dropped = [shown(key) for key in content if key not in ("G", "D", "G_ema") and content[key] is not None]
    for name in ("G_ema", "G", "D"):
        if content.get(name) is None:
            dropped.append(f"{name} (not in the file)")
        elif name != "G_ema" and not every:
            dropped.append(name)
        else:
            state = weights.of(content[name])
            heads, state, plain = _split(state)
            network = _network(name, _kwargs(_module(content[name])), state, SG3 if sg3 else ADA)
            networks[name] = network
            if heads or plain:
                kind = "HSR"
            if plain:
                dropped.append(f"{name}.synthesis.feat_transfer")
            if heads and name == "G_ema":
                constructor = shape_of_heads(heads)
                if every:
                    networks["heads"] = Network(constructor, as_network("heads", constructor, heads))
                else:
                    dropped.append(f"predictor heads at {', '.join(constructor['channels'])}")
    found = re.fullmatch(r"network-snapshot-(\d+)\.pkl", path.name)
    return Imported(kind, networks, tuple(dropped), (), float(found[1]) if found else None)


def _network(name: str, kwargs: Mapping[str, Any], state: dict[str, Tensor], defaults: Mapping[str, Any]) -> Network:
    """A network by its tensors, compared with what its constructor was told."""
    told = dict(kwargs)
    groups = {group: _dict(name, group, told.pop(group, {})) for group in GROUPS}
    if name == "D":
        told["mbstd_group_size"] = groups["epilogue_kwargs"].pop("mbstd_group_size", 4)
    if "num_layers" in groups["mapping_kwargs"]:
        told["mapping_layers"] = groups["mapping_kwargs"].pop("num_layers")
    for group in groups.values():
        told |= group
    told = {**defaults, **told}
    for key in [key for key in told if key in ONLY or key in NOT_COMPUTED or key in IN_SHAPES]:
        value = told.pop(key)
        if key in ONLY and (list(value) if isinstance(value, tuple) else value) != ONLY[key]:
            raise ValueError(f"its {name} has {key} {shown(value)}; only {ONLY[key]} is computed here")
    declared = {key: _integer(name, key, told[key]) for key in ("channel_base", "channel_max") if key in told}
    declared = {"channel_base": 32768, "channel_max": 512, **declared}
    facts = (shape_of_d if name == "D" else shape_of_g)(state, declared)
    constructor = {**facts, "num_fp16_res": _integer(name, "num_fp16_res", told.pop("num_fp16_res"), least=0)}
    clamp = told.pop("conv_clamp")
    if clamp is not None and (isinstance(clamp, bool) or not isinstance(clamp, int | float) or not clamp > 0):
        raise ValueError(f"its {name} has conv_clamp {shown(clamp)}, not a number above 0")
    constructor["conv_clamp"] = clamp
    if name == "D":
        constructor["mbstd_group_size"] = _integer(name, "mbstd_group_size", told.pop("mbstd_group_size"))
        told = {k: v for k, v in told.items() if k != "mapping_layers" or facts["c_dim"]}  # without labels, no mapping
    for key, value in told.items():
        if key not in constructor:
            raise ValueError(f"its {name} has an argument {shown(key)}, which StyleGAN2's networks have not")
        if value != constructor[key]:
            raise ValueError(f"its {name} says {key} {shown(value)}, but its tensors say {constructor[key]}")
    return Network(constructor, as_network(name, constructor, state))


def _integer(name: str, key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ValueError(f"its {name} has {key} {shown(value)}, not a whole number from {least}")
    return value


def _dict(name: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {name} has {key} {shown(value)}, not a dict")
    return dict(value)


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """HSR's tensors out of a generator's: its predictors under our keys, the rest, and whether `feat_transfer` was."""
    heads, rest, plain = {}, {}, False
    for key, value in state.items():
        if found := re.fullmatch(r"synthesis\.feat_transfer_list\.([0-3])\.(conv1x1_[12])\.(weight|bias)", key):
            heads[f"heads.{8 << int(found[1])}.{found[2]}.{found[3]}"] = value
        elif key in ("synthesis.feat_transfer.weight", "synthesis.feat_transfer.bias"):
            plain = True  # the control arm's, which nothing uses
        elif not re.fullmatch(r"synthesis\.feat_transfer_list\.[0-3]\.conv1x1_[12]\.resample_filter", key):
            rest[key] = value
    return heads, rest, plain


# ---- modules and tensors of the pickle


def _module(node: Any) -> dict[str, Any]:
    """The attributes of a module: a persistent one, or a layer of PyTorch."""
    state = None
    if isinstance(node, Call) and (node.name.module, node.name.name) == PERSISTENT:
        meta = node.args[0] if len(node.args) == 1 and isinstance(node.args[0], dict) else {}
        state = meta.get("state") if meta.get("type") == "class" else None
    elif isinstance(node, Call) and LAYERS.fullmatch(node.name.module):
        state = node.state
    if not isinstance(state, dict):
        raise ValueError(f"it has {shown(node)} in the place of a network")
    return state


def _children(module: Mapping[str, Any]) -> dict[str, Any]:
    children = module.get("_modules", {})
    if not isinstance(children, dict) or not all(isinstance(key, str) for key in children):
        raise ValueError("its modules are in disorder")
    return children


def _kwargs(module: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments by name."""
    args, kwargs = module.get("_init_args", ()), module.get("_init_kwargs", {})
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise ValueError("its constructor's arguments are in disorder")
    names: Sequence[str] = G_ARGS if "synthesis" in _children(module) else D_ARGS
    if len(args) > len(names):
        raise ValueError(f"its constructor has {len(args)} arguments")
    return {**dict(zip(names, args, strict=False)), **kwargs}


class _Weights:
    """Tensors of a pickle of `size` bytes, which are together no larger than it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.storages: dict[int, Tensor] = {}
        self.seen: set[int] = set()

    def of(self, network: Any) -> dict[str, Tensor]:
        """The state dict of a network."""
        result: dict[str, Tensor] = {}
        left, waiting = self.size, [("", network)]
        while waiting:
            prefix, node = waiting.pop()
            if id(node) in self.seen:
                raise ValueError("it has a module in two places")
            self.seen.add(id(node))
            module = _module(node)
            passing = module.get("_non_persistent_buffers_set", [])
            for kind in ("_parameters", "_buffers"):
                values = module.get(kind, {})
                if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
                    raise ValueError("its tensors are in disorder")
                for key, value in values.items():
                    if value is None or (kind == "_buffers" and isinstance(passing, list) and key in passing):
                        continue
                    tensor = result[shown(f"{prefix}{key}")] = self.tensor(value)
                    left -= tensor.nbytes
                    if left < 0:
                        raise ValueError("it declares more values than it holds")
            waiting += [(f"{prefix}{key}.", child) for key, child in _children(module).items() if child is not None]
        return result

    def tensor(self, node: Any) -> Tensor:
        if isinstance(node, Call) and (node.name.module, node.name.name) in PARAMETERS and node.args:
            node = node.args[0]
        if not isinstance(node, Call) or (node.name.module, node.name.name) != TENSOR or len(node.args) < 4:
            raise ValueError(f"it has {shown(node)} in the place of a tensor")
        storage, (offset, size, stride) = self.storage(node.args[0]), node.args[1:4]
        numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [None]
        if len(numbers) > 17 or any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
            raise ValueError("a tensor of it has no proper shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
        count = 1
        for n in size:
            count *= n
        if len(size) != len(stride) or not 0 < count <= len(storage) or last >= len(storage):
            raise ValueError("a tensor of it reaches beyond its values")
        return storage.as_strided(size, stride, offset)

    def storage(self, node: Any) -> Tensor:
        """The values [n] that `torch.storage._load_from_bytes` would give."""
        if not isinstance(node, Call) or (node.name.module, node.name.name) != STORAGE:
            raise ValueError(f"it has {shown(node)} in the place of a tensor's values")
        if id(node) not in self.storages:
            if len(node.args) != 1 or not isinstance(node.args[0], bytes):
                raise ValueError("it has tensor values that are no bytes")
            self.storages[id(node)] = _values(node.args[0])
        return self.storages[id(node)]


def _values(data: bytes) -> Tensor:
    """The one storage that torch.save wrote to `data`, its declared size checked before it is allocated."""
    stream, found = io.BytesIO(data), []
    magic, *_ = (read_pickle(stream, _vet_storage, found.append) for _ in range(4))
    pid = found[0].value if len(found) == 1 and isinstance(found[0], PersistentId) else None
    if magic != LEGACY_MAGIC or not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], Name):
        raise ValueError("the values of a tensor in it are not what torch.save writes")
    if type(pid[4]) is not int or not 0 <= pid[4] * ITEM_SIZES[pid[1].name] <= len(data):
        raise ValueError(f"a tensor of it declares {shown(pid[4])} values in {len(data):,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's thoughts on its former storages
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return torch.empty(0, dtype=storage.dtype).set_(storage)
    except Exception as error:
        raise ValueError(f"the values of a tensor in it are damaged ({one_line(error)})") from None


def _vet_storage(name: Name) -> None:
    if name.module != "torch" or name.name not in ITEM_SIZES:
        raise ValueError(f"it wants to call {name}, in the place of a tensor's values; nothing in it was executed")
