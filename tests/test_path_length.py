"""Perceptual path length where it is known exactly, and its independence of how it is computed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hsrgan.engine.distributed import World
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import path_length
from hsrgan.engine.metrics.sampling import fp32_copy
from hsrgan.engine.model import Generator
from hsrgan.kernels import launch

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}


class Linear(nn.Module):
    """G(w) = A·w + noise, the mapping the identity; as much of Generator's interface as path length uses."""

    def __init__(self, z_dim: int = 8, resolution: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.z_dim, self.w_dim, self.c_dim, self.img_shape = z_dim, z_dim, 0, (3, resolution, resolution)
        self.A = nn.Parameter(torch.randn(3, resolution, resolution, z_dim, generator=generator))
        self.synthesis = self
        self.noise_size = resolution**2

    def mapping(self, z, c):
        return z.to(self.A.dtype).unsqueeze(1).expand(-1, 4, -1)

    def __call__(self, ws, *, noise):
        image = torch.einsum("chwz,nz->nchw", self.A, ws.mean(1))
        return image + noise.view(-1, 1, *self.img_shape[1:]).to(image)


def squared(a, b):
    """A feature net that is the identity: Σ (a − b)²."""
    return (a - b).double().square().sum((1, 2, 3))


def trimmed_mean(values: np.ndarray) -> float:
    """Mean of what lies from the 1st percentile (rounded down) to the 99th (rounded up), by counting."""
    values = np.sort(values)
    low, high = math.floor(0.01 * (len(values) - 1)), math.ceil(0.99 * (len(values) - 1))
    return values[low : high + 1].mean()


@pytest.mark.parametrize("name", list(path_length.PROTOCOLS))
def test_a_linear_generators_path_length_is_known(name):
    """In W the image moves by A·(w1 − w0); in Z by A·dz/dt, z on the unit circle through both normalised latents."""
    linear, count, seed = Linear(), 300, 5
    found = path_length.path_distances(linear, squared, name, count=count, seed=seed, world=ALONE)
    draws = Draws(seed, torch.device("cpu"))
    latents = draws.latents(path_length._STREAM, range(count), linear.z_dim)
    a, b = (z.double() for z in (latents.z, latents.z_mix))
    if "_z" in name:
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        angle = torch.acos((a * b).sum(1, keepdim=True))
        across = (b - (a * b).sum(1, keepdim=True) * a) / angle.sin()
        t = draws.uniform(path_length._STREAM, range(count))[:, None] if "full" in name else torch.zeros(count, 1)
        velocity = angle * (across * (t * angle).cos() - a * (t * angle).sin())
    else:
        velocity = b - a
    seen = linear.A.double() if name == "ppl2_wend" else linear.A.double()[:, 6:14, 4:12]
    expected = torch.einsum("chwz,nz->nchw", seen, velocity).square().sum((1, 2, 3)).detach().numpy()
    assert path_length.path_length(found) == pytest.approx(trimmed_mean(expected), rel=1e-3)


def test_the_percentiles_are_inclusive_and_order_does_not_matter():
    values = np.random.default_rng(0).permutation(np.arange(250.0) ** 3)
    assert path_length.path_length(torch.from_numpy(values)) == trimmed_mean(values)
    assert path_length.path_length(torch.from_numpy(values[::-1].copy())) == trimmed_mean(values)
    assert trimmed_mean(np.arange(250.0)) == np.arange(2.0, 248.0).mean()


def test_large_images_are_averaged_to_256_and_grey_is_repeated():
    image = torch.rand(1, 1, 512, 512)
    pooled = image.view(1, 1, 256, 2, 256, 2).mean((3, 5))
    whole, middle = path_length._seen(image, crop=False), path_length._seen(image, crop=True)
    assert whole.shape == (1, 3, 256, 256) and middle.shape == (1, 3, 128, 128)
    torch.testing.assert_close(whole[:, 2:], pooled)
    torch.testing.assert_close(middle[:, :1], pooled[:, :, 96:224, 64:192])
    assert path_length._seen(image[..., :256, :256], crop=False).shape == (1, 3, 256, 256)


def tiny(**kwargs) -> Generator:
    torch.manual_seed(0)
    generator = Generator(**TINY, **kwargs).eval().requires_grad_(False)
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            value.fill_(0.5)
    return generator


def distances(generator, name="ppl_wfull", **kwargs):
    return path_length.path_distances(generator, squared, name, **{"count": 37, "seed": 1, "world": ALONE, **kwargs})


@pytest.mark.parametrize("name", ["ppl_wfull", "ppl_zend"])
def test_ranks_change_no_bit(name):
    whole = distances(tiny(), name)
    parts = [distances(tiny(), name, world=World(rank, 2, rank, 2, ALONE.device)) for rank in range(2)]
    assert torch.equal(sum(parts), whole) and all((part != 0).any() for part in parts)
    assert not (parts[0] * parts[1]).any()
    assert torch.equal(distances(tiny(), name, count=20), whole[:20])
    assert not torch.equal(distances(tiny(), name, seed=2), whole)


def test_fp32_is_enough():
    """ε divides rounding errors by 1e-4: they are a percent of a pair's distance here, and average out."""
    whole, in_fp64 = (path_length.path_length(distances(net)) for net in (tiny(), tiny().double()))
    assert whole == pytest.approx(in_fp64, rel=1e-2)


def test_progress_counts_every_pair():
    told = []
    distances(tiny(), told=told.append)
    assert told == [16, 16, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_with_the_reason(dtype):
    half = tiny(half_dtype=dtype)
    for generator in (half, tiny().to(dtype)):
        with pytest.raises(UserError, match=rf"needs fp32 .* in {str(dtype)[6:]}: .*rounding would be measured"):
            distances(generator)
    assert torch.equal(distances(fp32_copy(half)), distances(tiny()))


def test_the_distance_runs_without_tf32_and_the_switches_come_back(monkeypatch):
    seen = []

    def watching(a, b):
        seen.append((launch.tf32_allowed(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return squared(a, b)

    def switches():
        return launch.tf32_allowed(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = switches()
    torch.backends.cudnn.allow_tf32 = True
    try:
        path_length.path_distances(tiny(), watching, "ppl2_wend", count=2, seed=0, world=ALONE)
        assert seen == [(False, False, False)] and switches() == (before[0], before[1], True)
    finally:
        torch.backends.cudnn.allow_tf32 = before[2]


def test_mistakes_are_one_line():
    assert distances(tiny(c_dim=3), class_counts=[1, 2, 3], count=2).shape == (2,)
    broken = tiny()
    broken.synthesis.b16.torgb.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        distances(broken)
    with pytest.raises(ValueError, match=r"distance must give \[16\]"):
        path_length.path_distances(tiny(), lambda a, b: squared(a, b)[:, None], "ppl_wend", count=8, seed=0,
                                   world=ALONE)  # fmt: skip
