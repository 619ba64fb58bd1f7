"""Perceptual path length where it is known exactly, and its independence of how it is computed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import path_length, positions
from hsrgan.engine.model import Generator
from hsrgan.kernels import launch

TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}


class Linear(nn.Module):
    """G(w) = A·w + noise, the mapping the identity; as much of Generator's interface as path length uses."""

    def __init__(self, z_dim: int = 8, resolution: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.z_dim, self.w_dim, self.c_dim, self.img_resolution = z_dim, z_dim, 0, resolution
        self.A = nn.Parameter(torch.randn(3, resolution, resolution, z_dim, generator=generator))
        self.synthesis = self
        self.noise_size = resolution**2

    def mapping(self, z, c):
        return z.to(self.A.dtype).unsqueeze(1).expand(-1, 4, -1)

    def __call__(self, ws, *, noise):
        image = torch.einsum("chwz,nz->nchw", self.A, ws.mean(1))
        return image + noise.view(-1, 1, self.img_resolution, self.img_resolution).to(image)


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
    found = path_length.path_distances(linear, squared, name, count=count, seed=seed, batch=64)
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
    return path_length.path_distances(generator, squared, name, **{"count": 21, "seed": 1, "batch": 8, **kwargs})


def test_neither_batch_nor_ranks_change_a_pair():
    """fp64, since ε amplifies fp32's rounding, which the shape of a batch may change, ten thousand times."""
    generator = tiny().double()
    whole = distances(generator)
    torch.testing.assert_close(distances(generator, batch=3), whole, rtol=1e-8, atol=0)
    parts = [distances(generator, rank=rank, world_size=3) for rank in range(3)]
    torch.testing.assert_close(positions.merged(parts), whole, rtol=1e-8, atol=0)
    assert path_length.path_length(torch.cat(parts)) == pytest.approx(path_length.path_length(whole), rel=1e-9)
    assert distances(generator, rank=5, world_size=6, count=3).shape == (0,)
    assert not torch.equal(distances(generator, seed=2), whole)
    in_fp32 = path_length.path_length(distances(tiny()))
    assert in_fp32 == pytest.approx(path_length.path_length(whole), rel=1e-2)


def test_shares_of_all_ranks_are_gathered_in_order(monkeypatch):
    whole = torch.arange(14.0).view(7, 2)
    parts = [whole[rank::3] for rank in range(3)]
    assert torch.equal(positions.gathered(whole), whole)  # one process

    def all_gather_object(target, local):
        assert torch.equal(local, parts[1])
        target[:] = parts

    for name, replacement in {"is_initialized": lambda: True, "get_world_size": lambda: 3,
                              "all_gather_object": all_gather_object}.items():  # fmt: skip
        monkeypatch.setattr(positions.dist, name, replacement)
    assert torch.equal(positions.gathered(parts[1]), whole)


def test_all_batches_of_a_share_have_one_length():
    assert list(positions.shares(7, 2, 1, 2)) == [([1, 3], 2), ([5, 5], 1)]
    assert list(positions.shares(3, 8, 0, 1)) == [([0, 1, 2], 3)]
    assert list(positions.shares(3, 8, 3, 4)) == []


def test_progress_counts_every_pair():
    told = []
    distances(tiny(), progress=told.append)
    assert told == [8, 8, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_with_the_reason(dtype):
    half = tiny(half_dtype=dtype)
    for generator in (half, tiny().to(dtype)):
        with pytest.raises(UserError, match=rf"needs fp32 .* in {str(dtype)[6:]}: .*rounding would be measured"):
            distances(generator)
    with path_length.fp32_activations(half):
        inside = distances(half)
    assert torch.equal(inside, distances(tiny())) and half.synthesis.b16.half_dtype is dtype


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
        path_length.path_distances(tiny(), watching, "ppl2_wend", count=2, seed=0, batch=2)
        assert seen == [(False, False, False)] and switches() == (before[0], before[1], True)
    finally:
        torch.backends.cudnn.allow_tf32 = before[2]


def test_mistakes_are_one_line():
    conditional = tiny(c_dim=3)
    with pytest.raises(UserError, match="has 3 classes, the data set 0"):
        distances(conditional)
    assert distances(conditional, class_counts=[1, 2, 3], count=2).shape == (2,)
    broken = tiny()
    broken.synthesis.b16.torgb.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        distances(broken)
    with pytest.raises(ValueError, match=r"distance must give \[8\]"):
        path_length.path_distances(tiny(), lambda a, b: squared(a, b)[:, None], "ppl_wend", count=8, seed=0, batch=8)
