"""Pickles of the structure that stylegan2-ada-pytorch, stylegan3 and HSR publish, with the weights of our networks.

A stand-in for their torch_utils.persistence: it exists while a pickle is written, and never while one is read.
"""

import contextlib
import io
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch

BUFFERS = ("resample_filter", "noise_const", "w_avg")
HOOKS = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


class EasyDict(dict):
    """Their dict whose items are attributes too."""


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"


def _reconstruct_persistent_obj(meta):
    """What theirs does, and the importer must not."""
    exec(meta["module_src"], {})


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """An object that is pickled as their persistent classes are."""

    def __init__(self, class_name, source, **state):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,), None


@contextlib.contextmanager
def their_modules():
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    modules = {name: types.ModuleType(name) for name in names}
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def module(class_name, source, state, kwargs=None, **attributes):
    """A persistent module with the tensors of `state`, those with dots in their names in modules below it."""
    below = OrderedDict()
    for key in state:
        if "." in key:
            name, rest = key.split(".", 1)
            below.setdefault(name, {})[rest] = state[key]
    own = {key: value for key, value in state.items() if "." not in key}
    children = OrderedDict((name, module(name.rstrip("0123456789"), source, inner)) for name, inner in below.items())
    if "feat_transfer_list" in children:  # HSR holds its heads in a plain layer of PyTorch
        heads = children["feat_transfer_list"].meta["state"]["_modules"]
        for head in heads.values():
            head.meta["state"]["_modules"]["bn"] = torch.nn.Identity()
        plain = torch.nn.ModuleList()
        plain._modules.update(heads)
        children["feat_transfer_list"] = plain

    def parameter(value):  # convolutions of half precision may be channels_last
        return torch.nn.Parameter(value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value)

    return Persistent(
        class_name, source, training=False,
        _parameters=OrderedDict((k, parameter(v)) for k, v in own.items() if k not in BUFFERS),
        _buffers=OrderedDict((k, v) for k, v in own.items() if k in BUFFERS),
        _non_persistent_buffers_set=set(), **{name: OrderedDict() for name in HOOKS}, _modules=children,
        weight_gain=np.float64(0.25), _init_args=(), _init_kwargs=EasyDict(kwargs or {}), **attributes,
    )  # fmt: skip


def kwargs_of_g(net, style):
    """What their training gives the generator's constructor: "ada" nests what "sg3" has flat."""
    names = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
    own = {key: net.init_kwargs[key] for key in names}
    mapping = EasyDict(num_layers=net.init_kwargs["mapping_layers"])
    others = {k: v for k, v in net.init_kwargs.items() if k not in (*names, "mapping_layers")}
    if style == "ada":
        return {**own, "mapping_kwargs": mapping, "synthesis_kwargs": EasyDict(others)}
    return {**own, "mapping_kwargs": mapping, **others, "fused_modconv_default": "inference_only"}


def kwargs_of_d(net, **more):
    mapping = EasyDict(num_layers=net.mapping.num_layers) if net.c_dim else EasyDict()
    return {
        "c_dim": net.c_dim, "img_resolution": net.img_resolution, "img_channels": net.img_channels,
        "block_kwargs": EasyDict(freeze_layers=0), "mapping_kwargs": mapping,
        "epilogue_kwargs": EasyDict(mbstd_group_size=net.b4.mbstd_group_size), **more,
    }  # fmt: skip


def generator(net, style="ada", source="", kwargs=None, state=None):
    state = net.state_dict() if state is None else state
    top = module("Generator", source, state, kwargs_of_g(net, style) if kwargs is None else kwargs)
    if style == "sg3":
        top.meta["state"]["_modules"]["synthesis"].meta["state"]["num_fp16_res"] = net.init_kwargs["num_fp16_res"]
    return top


def discriminator(net, source="", **more):
    top = module("Discriminator", source, net.state_dict(), kwargs_of_d(net, **more))
    top.meta["state"]["_modules"]["b4"].meta["state"]["_modules"]["mbstd"] = module("MinibatchStdLayer", source, {})
    return top


def content(g_ema, **others):
    """The dict that training pickles."""
    data = EasyDict(class_name="training.dataset.ImageFolderDataset", path="ffhq.zip", use_labels=False)
    return {"G": None, "D": None, "G_ema": g_ema, "augment_pipe": None, "training_set_kwargs": data, **others}


def dumps(value, protocol=4):
    with their_modules():
        stream = io.BytesIO()
        pickle.dump(value, stream, protocol=protocol)
        return stream.getvalue()
