"""What the tests of metrics share: networks of random weights that show a wrong resize, and real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsrgan.engine.metrics.attributes import AttributeClassifier, save_attributes
from hsrgan.engine.metrics.inception import InceptionV3
from hsrgan.engine.metrics.weights import import_weights
from hsrgan.engine.teacher import create_timm


@torch.no_grad()
def kaiming(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep the signal's size through every layer, and batch norms and biases that do something.

    PyTorch's default ones shrink it until a wrong resize changes the features by only 6e-8.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.8, 1.2, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    return net


def kaiming_inception(folder: Path) -> Path:
    """An Inception of random weights as a .pth with torch-fidelity's and pytorch-fid's keys, in `folder`."""
    path = folder / "kaiming_inception.pth"
    torch.save(kaiming(InceptionV3()).state_dict(), path)
    return path


def imported(name: str, file: Path) -> Path:
    """Import `file` as the weights `name`; the cache folder, for load_extractor(…, cache=)."""
    cache = file.parent / "cache"
    import_weights(name, file, cache=cache, own=True)
    return cache


class StandInLPIPS(nn.Module):
    """In place of the published distance: the mean square."""

    protocol = {"network": "stand-in", "weights_sha256": "none", "dtype": "float32"}  # noqa: RUF012 (as the real one)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.float32
        return (a - b).square().mean((1, 2, 3))


def attributes_file(path: Path, accuracy: Sequence[float | None] = (None, None)) -> Path:
    """A small classifier of random weights, of the attributes a0, a1, … with these held-out accuracies, at `path`."""
    kwargs = {"num_classes": len(accuracy), "layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    net, half = kaiming(create_timm("resnet10t", **kwargs)), (0.5, 0.5, 0.5)
    names = [f"a{i}" for i in range(len(accuracy))]
    judge = AttributeClassifier(net, names, input_size=(16, 16), mean=half, std=half, balanced_accuracy=accuracy)
    save_attributes(path, judge, model="resnet10t", kwargs=kwargs, source="random")
    return path


def photographs() -> list[Tensor]:
    """scikit-learn's two: uint8 [3, 427, 640] each, a temple and a flower."""
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in load_sample_images().images]


def crops(count: int, size: int, seed: int = 0) -> Tensor:
    """uint8 [count, 3, size, size]: random places of the photographs, by turns."""
    pictures, generator = photographs(), np.random.Generator(np.random.Philox(seed))
    cut = []
    for i in range(count):
        picture = pictures[i % 2]
        top, left = (int(generator.integers(0, side - size + 1)) for side in picture.shape[1:])
        cut.append(picture[:, top : top + size, left : left + size])
    return torch.stack(cut)


def digits(count: int, size: int) -> Tensor:
    """uint8 [count, 1, size, size]: scikit-learn's handwritten digits (1,797 of 8×8), enlarged by pixel repetition."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images[:count] * (255 / 16)).round().to(torch.uint8)
    return F.interpolate(images[:, None].float(), size=size, mode="nearest").to(torch.uint8)


def pictures_of_many_sizes(count: int = 2000) -> list[Tensor]:
    """`count` images, uint8 [n, 3, R, R], one batch a size: digits at 16, crops at 32, 64, 160, 320; a fifth each."""
    share = count // 5
    batches = [digits(share, 16).expand(-1, 3, -1, -1).contiguous()]
    return batches + [crops(share, size, seed=size) for size in (32, 64, 160, 320)]
