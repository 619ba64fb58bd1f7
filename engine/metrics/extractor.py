"""Features of images by the name of their network: one interface for every metric.

| spec | features | resize | network |
|-|-|-|-|
| inception | 2048 | tf1 or clean to 299 | FID, KID, IS: TensorFlow's Inception of 2015 |
| vgg16 | 4096 | tf1 or clean to 224 | precision and recall: the second hidden layer |
| dinov2 | 1024 | bicubic to 224 | FD-DINOv2: ViT-L/14, class token |
| timm:MODEL:FILE | the model's | bicubic to the model's | any timm backbone, pooled, before its classifier |
| FILE.safetensors | the teacher's | area | a file of tools/fit_teacher.py, last map averaged |

Rectangles are squeezed into the network's square, grey is repeated and RGBA lies over mid-grey, reals and fakes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hsrgan.engine.alpha import over_grey
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import dinov2, inception, vgg16
from hsrgan.engine.metrics.fp32 import exact_fp32
from hsrgan.engine.metrics.perceptual import LPIPS
from hsrgan.engine.metrics.resize import RESIZES
from hsrgan.engine.metrics.weights import load_weights
from hsrgan.engine.teacher import Teacher, open_timm, read_teacher_file
from hsrgan.engine.tensor_files import sha256_of

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of images in [0, 1]


class Extractor(nn.Module):
    """φ: uint8 images → features, in eval mode and without gradients, in full fp32 on any device.

    name: of the network, without file names; dim of a feature; protocol: what its figures depend on, text → text
    (`network`, `resize`, `weights_sha256`, `dtype`), for results and cache keys.
    """

    def __init__(self, name: str, net: nn.Module, prepare: Prepare, dim: int, weights_sha256: str, *,
                 own: bool = False) -> None:
        super().__init__()
        self.name, self.dim = name, dim
        self.protocol = {
            "network": f"{name} (own weights)" if own else name,
            "resize": prepare.resize,
            "weights_sha256": weights_sha256,
            "dtype": "float32",
        }
        self.net, self.prepare = net, prepare
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Extractor:
        """Stays in eval mode, whatever the module that holds it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images uint8 [N, 1, 3 or 4, H, W] → fp32 [N, dim]."""
        with exact_fp32(images.device):
            return self.net(self.prepare(images))


class InceptionExtractor(Extractor):
    """Features and, in the same pass, the 1008 logits of the Inception Score."""

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images uint8 [N, 1, 3 or 4, H, W] → fp32 [N, 2048] and [N, 1008], logits without bias."""
        with exact_fp32(images.device):
            features = self.net(self.prepare(images))
            return features, self.net.logits(features)

    def logits(self, images: Tensor) -> Tensor:
        """fp32 [N, 1008], without bias."""
        return self.features_and_logits(images)[1]


class Prepare(nn.Module):
    """uint8 images → what a network takes: RGBA over mid-grey, resized to size², grey repeated, (level − mean)/std.

    resize: a name of RESIZES, or "area" for networks that resize by themselves.
    """

    def __init__(self, resize: str, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.resize, self.size = resize, size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}: quantise them to uint8 first, as published figures do")
        if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
            raise ValueError(f"images are {list(images.shape)}: [N, 3, H, W], grey [N, 1, …] or RGBA are needed")
        images = over_grey(images)
        x = images.float() if self.resize == "area" else RESIZES[self.resize](images, self.size)
        return (x - self.mean) / self.std  # grey is repeated by broadcasting


def load_extractor(spec: str, *, resize: str = "tf1", cache: Path | None = None) -> Extractor:
    """The extractor of a spec (see above), on the CPU. cache: the folder of imported weights, if not the usual one.

    resize: "tf1" or "clean", for inception and vgg16; the other networks have only one way of resizing.
    Raises UserError: no such network or file, weights not imported yet, damaged or of another network.
    """
    if resize not in ("tf1", "clean"):
        raise UserError(f"resize {resize!r}: tf1 (TensorFlow 1's bilinear) or clean (bicubic with antialias)")
    if spec == "inception":
        prepare = Prepare(resize, inception.INPUT_SIZE, [128.0] * 3, [128.0] * 3)
        return _published(InceptionExtractor, spec, inception.InceptionV3, prepare, inception.FEATURES, cache)
    if spec == "vgg16":
        prepare = _unit_statistics(resize, vgg16.INPUT_SIZE, *IMAGENET)
        return _published(Extractor, spec, vgg16.VGG16, prepare, vgg16.FEATURES, cache)
    if spec == "dinov2":
        prepare = _unit_statistics("bicubic", dinov2.INPUT_SIZE, *IMAGENET)
        return _published(Extractor, spec, dinov2.DINOv2, prepare, dinov2.FEATURES, cache)
    if spec.startswith("timm:"):
        return _timm_extractor(spec)
    if spec.endswith(".safetensors"):
        return _teacher_extractor(Path(spec))
    raise UserError(f"features {spec!r}: inception, vgg16, dinov2, timm:MODEL:FILE, or a teacher's .safetensors file")


def load_lpips(cache: Path | None = None) -> LPIPS:
    """LPIPS on VGG-16, on the CPU, frozen; its `protocol` is like an Extractor's.

    The trunk is the imported vgg16; the heads are the lpips package's, unless others were imported.
    Raises UserError as load_extractor does.
    """
    trunk, heads = load_weights("vgg16", cache), load_weights("lpips", cache)
    net = LPIPS()
    net.load_published(trunk.tensors, heads.tensors)
    net.protocol = {
        "network": "lpips-vgg (own weights)" if trunk.own or heads.own else "lpips-vgg",
        "weights_sha256": f"{trunk.sha256} {heads.sha256}",
        "dtype": "float32",
    }
    return net.requires_grad_(False).eval()


def _published(kind: type[Extractor], name: str, build: Callable[[], nn.Module], prepare: Prepare, dim: int,
               cache: Path | None) -> Extractor:
    weights = load_weights(name, cache)
    with torch.device("meta"):  # no time is spent on initial values
        net = build()
    net.load_published(weights.tensors)
    return kind(name, net, prepare, dim, weights.sha256, own=weights.own)


def _timm_extractor(spec: str) -> Extractor:
    model, _, file = spec.removeprefix("timm:").partition(":")
    if not model or not file:
        raise UserError(f"features {spec!r}: write timm:MODEL:FILE, such as timm:resnet50:weights/resnet50.safetensors")
    backbone = open_timm(model, file)
    (height, width), net = backbone.input_size, _Pooled(backbone.net)
    if height != width:
        raise UserError(f"features {spec!r}: {model} takes {height}x{width} images; only square ones are scored")
    prepare = _unit_statistics("bicubic", height, backbone.mean, backbone.std)
    return _probed(f"timm:{model}", net, prepare, Path(file), height)


def _teacher_extractor(path: Path) -> Extractor:
    net, size, mean, std = read_teacher_file(path)
    with torch.no_grad():  # in eval mode, or batch norms would learn from this image
        maps = net.eval().forward_intermediates(torch.zeros(1, len(mean), *size), intermediates_only=True)
    teacher = Teacher(net, {0: len(maps) - 1}, size, mean, std)
    prepare = Prepare("area", size[0], [127.5], [127.5])  # to [−1, 1]: a teacher resizes and normalises by itself
    return _probed("teacher", _LastMap(teacher), prepare, path, size[0])


def _probed(name: str, net: nn.Module, prepare: Prepare, file: Path, size: int) -> Extractor:
    """An extractor whose dim is read off what comes out of it."""
    extractor = Extractor(name, net, prepare, 0, sha256_of(file))
    extractor.dim = extractor(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
    return extractor


class _Pooled(nn.Module):
    """A timm network up to where its classifier would begin."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)


class _LastMap(nn.Module):
    """The mean over places of a teacher's only map."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.teacher(x).values())).mean((2, 3))


def _unit_statistics(resize: str, size: int, mean: Sequence[float], std: Sequence[float]) -> Prepare:
    """Prepare from the mean and standard deviation of images in [0, 1]."""
    return Prepare(resize, size, [255 * m for m in mean], [255 * s for s in std])
