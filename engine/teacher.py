"""A frozen feature extractor, for HSR and for D's heads: any timm backbone, with its own input size and statistics.

Three ways to name one:
- a file made by tools/fit_teacher.py (.safetensors whose metadata says which timm model it is);
- a timm name, whose published weights timm finds in its cache or downloads;
- a timm name and a weights file (.safetensors, or .pth of plain tensors; nothing is unpickled).
A timm name may end in `@SIZE`, the input size in pixels: `vit_base_patch14_dinov2.lvd142m@224` is fed 224, not its 518.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from hsrgan.engine.alpha import over_grey
from hsrgan.engine.errors import UserError
from hsrgan.engine.tensor_files import misfit, one_line, read_safetensors, read_state_dict, sha256_of

FORMAT = "hsrgan-teacher-1"
# What the code released with HSR normalises with: CLIP's mean beside ImageNet's standard deviation.
PARITY_MEAN, PARITY_STD = (0.48145466, 0.4578275, 0.40821073), (0.229, 0.224, 0.225)
# Arguments of timm.create_model that make it read or fetch other files; none may come out of a file.
FILE_KWARGS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


class Backbone(NamedTuple):
    """A timm network and what it is fed: input_size (h, w); mean and std of images in [0, 1], one value a channel."""

    net: nn.Module
    input_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]


class Teacher(nn.Module):
    """φ: images → feature maps of chosen layers, frozen and always in eval mode.

    net: a timm model; layers {r: index, 0-based, of a block (token models) or of a stage (convolutional ones)};
    input_size (h, w); mean, std of the images in [0, 1], one value per input channel of net.
    section: of the recipe, for messages. Several teachers may share one net. sha256: of the file that net came from.
    channels {r: C_t} and grids {r: (h, w)} say what comes out. Raises UserError for a layer that net lacks.
    """

    def __init__(self, net: nn.Module, layers: Mapping[int, int], input_size: tuple[int, int],
                 mean: Sequence[float], std: Sequence[float], section: str = "hsr", sha256: str | None = None) -> None:
        super().__init__()
        if not hasattr(net, "forward_intermediates"):
            raise UserError(f"{section}.teacher: timm gives no feature maps of {type(net).__name__}: choose another "
                            "model, such as a ViT, ResNet, ConvNeXt or EfficientNet")
        self.section, self.sha256 = section, sha256
        norm, pooled_norm = getattr(net, "norm", None), getattr(net, "fc_norm", None)
        if isinstance(norm, nn.Identity) and isinstance(pooled_norm, nn.LayerNorm):
            net.norm = pooled_norm  # models that average the tokens keep their final norm behind the average
        self.net = net.requires_grad_(False)
        self.layers = dict(sorted(layers.items()))
        self.indices = sorted(set(self.layers.values()))
        self.input_size = tuple(input_size)
        mean_c, std_c = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        # ((x + 1)/2 − mean)/std as one multiply-add: x·scale + shift
        self.register_buffer("scale", (0.5 / std_c).float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((0.5 - mean_c) / std_c).float().view(1, -1, 1, 1), persistent=False)
        self.in_bf16 = False
        self.train(False)
        maps = self._probe()
        self.channels = {r: m.shape[1] for r, m in maps.items()}
        self.grids = {r: tuple(m.shape[2:]) for r, m in maps.items()}

    def _probe(self) -> dict[int, Tensor]:
        if not self.layers or self.indices[0] < 0:
            raise UserError(f"{self.section}.layers is {self.layers}: name at least one layer, counted from 0")
        try:
            return self(torch.zeros(1, self.scale.shape[1], *self.input_size))
        except AssertionError as error:  # timm's word for an index past the last layer; it names the range
            raise UserError(f"{self.section}.layers: {error}; choose layers of this teacher, counted from 0") from None

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever the module that holds it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, img: Tensor) -> dict[int, Tensor]:
        """`features` of the image as constants: no gradient passes."""
        return self.features(img)

    def features(self, img: Tensor) -> dict[int, Tensor]:
        """img [N, C, H, W] in [−1, 1], any size, C = 1 or the teacher's → {r: [N, C_t, h, w]}. The gradient passes to
        img, once: fused attention has no second derivative.

        C = 4 lies over mid-grey for a teacher of three. Area-resized (adaptive average pooling) to input_size, which
        squeezes a rectangle into a teacher's square. Token models give their patch tokens, without class or
        register tokens, after the network's final norm; convolutional ones their map, normed where such a norm exists.
        """
        x = img.to(self.scale.dtype)
        if x.shape[1] != self.scale.shape[1]:
            x = over_grey(x)
        if x.shape[2:] != self.input_size:
            x = F.adaptive_avg_pool2d(x, self.input_size)
        if x.shape[1] not in (1, self.scale.shape[1]):
            raise ValueError(f"img has {x.shape[1]} channels; the teacher takes 1 or {self.scale.shape[1]}")
        x = x * self.scale + self.shift  # a grey image is repeated by broadcasting
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if self.in_bf16 else nullcontext():
            maps = self.net.forward_intermediates(x, indices=self.indices, norm=True, stop_early=True,
                                                  output_fmt="NCHW", intermediates_only=True)
        by_index = {index: m.to(x.dtype) for index, m in zip(self.indices, maps, strict=True)}
        return {r: by_index[index] for r, index in self.layers.items()}

    def to_bf16(self) -> Teacher:
        """From here on products take bf16 and sum in fp32, as is right for a GPU; norms, residual sums and what comes
        out stay fp32. The products' weights are held in bf16: constants, which autocast would cast in every call.

        Raises UserError where timm's fused attention is switched off.
        """
        slow = [name for name, m in self.net.named_modules() if getattr(m, "fused_attn", True) is False]
        if slow:
            raise UserError(f"{self.section}.teacher: timm's fused attention is off ({slow[0]}): unset TIMM_FUSED_ATTN")
        for m in self.net.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                m.to(torch.bfloat16)
        self.in_bf16 = True
        return self


def load_teacher(name_or_file: str, *, weights: str | None = None, layers: Mapping[int, int],
                 parity_normalize: bool = False, section: str = "hsr",
                 loaded: dict[tuple[str, str | None], Backbone] | None = None) -> Teacher:
    """The teacher of a recipe section's `teacher`, `weights` and `layers`, on the CPU in fp32.

    loaded: backbones by name and weights; one that is there is shared, another is added.
    parity_normalize: the released HSR code's mixture of two networks' statistics instead of the teacher's own.
    Raises UserError: no such model or file, a damaged file, weights of another architecture, no such layer.
    """
    loaded, key = {} if loaded is None else loaded, (name_or_file, weights)
    if key not in loaded:
        loaded[key] = _backbone(name_or_file, weights, section)
    net, size, mean, std = loaded[key]
    if parity_normalize:
        mean, std = PARITY_MEAN, PARITY_STD
    return Teacher(net, layers, size, mean, std, section, file_sha256(name_or_file, weights))


def file_sha256(name_or_file: str, weights: str | None) -> str | None:
    """Of the file that the weights of such a teacher are read from; None where timm finds them, or it is not there."""
    file = name_or_file if name_or_file.endswith(".safetensors") else weights
    return sha256_of(Path(file)) if file and os.path.isfile(file) else None


def _backbone(name_or_file: str, weights: str | None, section: str) -> Backbone:
    if name_or_file.endswith(".safetensors"):
        if weights is not None:
            raise UserError(f"{section}.weights goes with a timm name; {name_or_file} holds its own: leave "
                            f"{section}.weights out")
        return read_teacher_file(Path(name_or_file))
    if Path(name_or_file).is_file():
        raise UserError(f"{section}.teacher {name_or_file} is a weights file: put the timm name in {section}.teacher "
                        f"and the file in {section}.weights")
    return open_timm(name_or_file, weights, section)


def save_teacher(path: str | Path, net: nn.Module, *, model: str, kwargs: Mapping[str, object],
                 input_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], command: str) -> None:
    """Write net, made by timm.create_model(model, **kwargs), as a teacher file: aside first, then renamed.

    command: how the file was made, kept as metadata for whoever wants to make it again.
    """
    metadata = {"format": FORMAT, "model": model, "kwargs": json.dumps(dict(kwargs)), "command": command,
                "input_size": json.dumps(list(input_size)), "mean": json.dumps(list(mean)),
                "std": json.dumps(list(std))}
    aside = Path(f"{path}.tmp")
    # as bytes: safetensors' own writer makes files that only their owner can read
    aside.write_bytes(save({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}, metadata))
    os.replace(aside, path)


def create_timm(model: str, role: str = "model", **kwargs: object) -> nn.Module:
    """timm.create_model without weights; UserError when timm knows no such model or refuses the arguments.

    role: what the model is to be, in the message.
    """
    import timm  # here and below: kernels and trainer work without timm's dependencies

    if not timm.is_model(model):
        close = difflib.get_close_matches(model.split(".")[0], timm.list_models(), n=1)
        hint = f": did you mean {close[0]}?" if close else ""
        raise UserError(f"{role} {model!r} is neither a timm model nor a .safetensors file{hint}")
    try:
        return timm.create_model(model, pretrained=False, **kwargs)
    except Exception as error:  # timm raises whatever its constructors do
        raise UserError(f"timm cannot build {role} {model!r} with {kwargs}: {one_line(error)}") from None


def read_teacher_file(path: Path) -> Backbone:
    """The network of a file made by save_teacher; UserError when the file is anything else."""
    state, metadata = read_safetensors(path, "teacher file", "check its name, or make one with tools/fit_teacher.py")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no teacher file (its format is {metadata.get('format')!r}, not {FORMAT!r}): make "
                        "one with tools/fit_teacher.py, or give a timm name with this file as its weights")
    try:
        model, kwargs = metadata["model"], json.loads(metadata["kwargs"])
        size, mean, std = (json.loads(metadata[k]) for k in ("input_size", "mean", "std"))
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"teacher file {path}: unreadable metadata ({one_line(error)}): make the file again with "
                        "tools/fit_teacher.py") from None
    if refused := sorted(FILE_KWARGS & kwargs.keys()):
        raise UserError(f"teacher file {path}: its metadata passes {refused} to timm, which a teacher file must not")
    net = create_timm(model, **kwargs)
    _load_strictly(net, state, path, model, classifier=())
    return Backbone(net, tuple(size), mean, std)


def open_timm(name: str, weights: str | None, section: str = "hsr") -> Backbone:
    """The timm network `name` (perhaps with @SIZE) with the weights of a file, or None: what timm finds."""
    import timm

    model, _, size_text = name.partition("@")
    if size_text and not size_text.isdecimal():
        raise UserError(f"timm model {name!r}: after @ comes the input size in pixels, such as @224")
    # The model keeps its own classifier until the weights are in: another num_classes would turn strictness off.
    net = create_timm(model)
    cfg = net.pretrained_cfg
    if weights is None:
        try:
            net = timm.create_model(model, pretrained=True)
        except Exception as error:  # no weights published, no network, a damaged cache: many types, one meaning
            raise UserError(f"{section}.teacher {model!r}: timm could not get its weights ({one_line(error)}): set "
                            f"{section}.weights to a file that holds them") from None
    else:
        path = Path(weights)
        state = read_state_dict(path)
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        if convert is not None and state.keys() != net.state_dict().keys():
            try:
                state = convert(state, net)  # timm's reading of the original authors' key names
            except Exception as error:
                raise _wrong_architecture(path, model, one_line(error)) from None
        classifier = cfg.get("classifier") or ()
        _load_strictly(net, state, path, model, (classifier,) if isinstance(classifier, str) else tuple(classifier))
    size = (int(size_text),) * 2 if size_text else tuple(cfg["input_size"][1:])
    if size != tuple(cfg["input_size"][1:]) and hasattr(net, "set_input_size"):
        try:
            net.set_input_size(size)  # resamples the position table; convolutional nets need nothing
        except Exception as error:
            raise UserError(f"timm model {name!r} cannot take images of {size_text} px: {one_line(error)}") from None
    return Backbone(net, size, cfg["mean"], cfg["std"])


def _load_strictly(net: nn.Module, state: Mapping[str, Tensor], path: Path, model: str,
                   classifier: tuple[str, ...]) -> None:
    """Load every tensor but the classifier's, whose keys may be there or not; anything else amiss is a UserError."""
    def backbone(keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in keys.items() if not k.startswith(tuple(f"{c}." for c in classifier))}

    have = backbone(state)
    if detail := misfit(backbone(net.state_dict()), have):
        raise _wrong_architecture(path, model, detail)
    net.load_state_dict(have, strict=False)  # compared above; what remains is the unused classifier


def _wrong_architecture(path: Path, model: str, detail: str) -> UserError:
    return UserError(f"weights {path} are not of {model}: {detail}; give the timm name they belong to")
