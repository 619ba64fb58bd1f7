"""The resizes in front of the metrics' networks against their definitions and other people's."""

import metric_fixtures
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hsrgan.engine.metrics import resize


def literal_tf1(image: torch.Tensor, size: int) -> torch.Tensor:
    """src = dst·in/out; lo = ⌊src⌋; hi = min(lo+1, in−1), in fp32 as TensorFlow has it, place by place."""
    scale = [np.float32(n) / np.float32(size) for n in image.shape]
    out = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            y, x = np.float32(i) * scale[0], np.float32(j) * scale[1]
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            dy, dx = float(y - np.float32(top)), float(x - np.float32(left))
            upper = float(image[top, left]) * (1 - dx) + float(image[top, right]) * dx
            lower = float(image[bottom, left]) * (1 - dx) + float(image[bottom, right]) * dx
            out[i, j] = upper * (1 - dy) + lower * dy
    return out


@pytest.mark.parametrize("shape", [(5, 9), (8, 8), (31, 14), (1, 3)])
def test_tf1_is_tensorflows_asymmetric_bilinear(shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = resize.tf1(image[None, None], 13)[0, 0]
    assert (ours - literal_tf1(image, 13)).abs().max() < 1e-4


def test_tf1_puts_every_pixel_of_any_size_where_torch_fidelity_does():
    """One pixel into the wrong cell is an error of grey levels; exact arithmetic would put some there."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    for side in (*range(1, 40), 224, 256, 299, 300, 512, 1024):
        ramp = (torch.arange(side).square() % 251).to(torch.uint8).expand(1, 1, 1, side)
        theirs = interpolate_bilinear_2d_like_tensorflow1x(ramp.float(), size=(299, 299), align_corners=False)
        assert (resize.tf1(ramp, 299) - theirs).abs().max() < 1e-4, side


def bicubic_weights(old: int, new: int) -> torch.Tensor:
    """float64 [new, old]: Keys' kernel with a = −½, as wide as the step when shrinking, normalised within the image."""

    def keys(x: float) -> float:
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    table, stretch = torch.zeros(new, old, dtype=torch.float64), max(old / new, 1)
    for i in range(new):
        centre = (i + 0.5) * old / new
        for j in range(old):
            table[i, j] = keys((j + 0.5 - centre) / stretch)
    return table / table.sum(1, keepdim=True)


@pytest.mark.parametrize("side", [8, 64, 300])
def test_clean_is_separable_bicubic_with_antialias_clamped_and_not_rounded(side):
    images = metric_fixtures.crops(1, side) if side > 8 else metric_fixtures.digits(2, 8)
    table = bicubic_weights(side, 96)
    direct = table @ images.double() @ table.T
    assert direct.min() < 0 or direct.max() > 255 or side == 64  # the clamp has something to do
    ours = resize.clean(images, 96)
    assert (ours - direct.clamp(0, 255)).abs().max() < 2e-3
    closed = F.interpolate(images.float(), size=(96, 96), mode="bicubic", antialias=True).clamp(0, 255)
    assert torch.equal(ours, closed) and not torch.equal(ours, ours.round())
    assert (resize.bicubic(images, 96) - direct).abs().max() < 2e-3


def test_clean_is_pillows_bicubic_channel_by_channel():
    """clean-fid's own definition: Pillow, mode F."""
    for images in (metric_fixtures.crops(1, 400), metric_fixtures.crops(1, 64), metric_fixtures.digits(1, 8)):
        channel = Image.fromarray(images[0, 0].numpy().astype(np.float32))
        theirs = np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
        assert np.abs(resize.clean(images, 299)[0, 0].numpy() - theirs).max() < 5e-3
