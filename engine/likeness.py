"""How like two images are to a network: the perceptual distances that a projection (projection.py) may descend.

Both compare feature vectors scaled to length 1, at every place of a few layers (Zhang et al., 1801.03924, eq. 1):

    d(a, b) = Σ_l mean_hw Σ_c λ_lc · (φ̂_l(a) − φ̂_l(b))²

φ, λ: VGG-16 and the published heads (LPIPS), or a teacher of HSR (teacher.py) and λ = 1. `maps` gives φ̂, with the
gradient to the image; `between` compares two of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsrgan.engine.alpha import over_grey
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.extractor import load_lpips
from hsrgan.engine.metrics.perceptual import LPIPS, unit
from hsrgan.engine.sections import Hsr
from hsrgan.engine.teacher import Backbone, Teacher, load_teacher, open_timm, read_teacher_file
from hsrgan.engine.tensor_files import one_line

SIDE = 256  # pixels of the longer side that VGG is shown at most (StyleGAN2, appendix D)
LEAST = 16  # pixels of the shorter side that are left a place after VGG's four pools
LAYERS = 4  # of a network named without its layers: at the quarters of its depth


class VGGLikeness(nn.Module):
    """LPIPS of images [N, C, H, W] in about [−1, 1], RGBA over mid-grey, averaged down to SIDE."""

    name = "lpips-vgg"

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        self.lpips = lpips

    def maps(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[2:]
        if min(height, width) < LEAST:
            raise UserError(f"VGG-16 sees nothing in images of {height}x{width} pixels: compare them with a teacher, "
                            "--features FILE.safetensors")
        if max(height, width) > SIDE:
            size = [round(side * SIDE / max(height, width)) for side in (height, width)]
            images = F.interpolate(images, size=size, mode="area")
        return list(self.lpips.maps(over_grey(images)))

    def between(self, a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
        return self.lpips.between(a, b)


class TeacherLikeness(nn.Module):
    """The distance in a teacher's layers; the teacher resizes images itself, and lays RGBA over mid-grey."""

    def __init__(self, teacher: Teacher, name: str) -> None:
        super().__init__()
        self.teacher, self.name = teacher, name

    def maps(self, images: Tensor) -> list[Tensor]:
        return [unit(m) for m in self.teacher.features(images).values()]

    def between(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]).sum(0)


def likeness(named: str | None, recipe: dict, snapshot: Path) -> VGGLikeness | TeacherLikeness:
    """The network `named` on the command line: `vgg16` (imported before), a teacher's .safetensors, or
    timm:MODEL[:FILE]; for None the teacher of a snapshot's `recipe`, or VGG-16 where it has none. On the CPU, frozen.

    Raises `UserError` where that network cannot be had.
    """
    if named == "vgg16":
        return VGGLikeness(load_lpips())
    if named is not None:
        return TeacherLikeness(_spread(*_backbone(named)), named)
    if recipe.get("hsr"):
        try:
            hsr = Hsr.model_validate_json(json.dumps(recipe["hsr"]))
            teacher = load_teacher(hsr.teacher, weights=hsr.weights, layers=hsr.layers,
                                   parity_normalize=hsr.parity_normalize)
        except pydantic.ValidationError as error:
            raise UserError(f"snapshot {snapshot}: its recipe's hsr is not understood ({one_line(error)}): name a "
                            "network with --features") from None
        except UserError as error:
            raise UserError(f"the recipe of {snapshot} names a teacher that cannot be had: {error}; go where it was "
                            f"trained (this is {Path.cwd()}), or name one with --features") from None
        return TeacherLikeness(teacher, hsr.teacher)
    try:
        return VGGLikeness(load_lpips())
    except UserError as error:
        raise UserError(f"the recipe of {snapshot} has no teacher to compare images with: name one with --features, or "
                        f"import VGG-16: {error}") from None


def _backbone(named: str) -> Backbone:
    if named.startswith("timm:"):
        model, _, file = named.removeprefix("timm:").partition(":")
        return open_timm(model, file or None)
    if named.endswith(".safetensors"):
        return read_teacher_file(Path(named))
    raise UserError(f"--features {named}: write vgg16, a teacher's FILE.safetensors, timm:MODEL or timm:MODEL:FILE")


@torch.no_grad()
def _spread(net: nn.Module, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Teacher:
    """A teacher with the layers at the quarters of the depth of `net`."""
    depth = len(net.eval().forward_intermediates(torch.zeros(1, len(mean), *size), intermediates_only=True))
    last = sorted({-(-depth * quarter // LAYERS) - 1 for quarter in range(1, LAYERS + 1)})
    return Teacher(net, dict(enumerate(last)), size, mean, std)
