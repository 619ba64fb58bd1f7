"""ADA's whole pipe against a literal reading of it, image by image in fp64 and with ADA's data-dependent margins; and
DiffAugment's three operations against loops over pixels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from hsrgan.engine import augment_geometry, diffaugment
from hsrgan.engine.augment import Pipe
from hsrgan.engine.augment_filter import SYM2
from hsrgan.engine.augment_numbers import NORMAL, UNIFORM
from hsrgan.engine.draws import Draws
from hsrgan.engine.sections import PIPES

F64, CPU = torch.float64, torch.device("cpu")
V = torch.full((3,), 3**-0.5, dtype=F64)


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(4)) * 2 - 1


def drawn(n: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    draws = Draws(7, CPU)
    return draws.augmentation(2, range(n), len(UNIFORM), len(NORMAL)), draws.pixels(2, range(n), shape)


# The literal reading


def shifted(x: float, y: float) -> torch.Tensor:
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=F64)


def scaled(x: float, y: float) -> torch.Tensor:
    return torch.diag(torch.tensor([x, y, 1], dtype=F64))


def turned(a: float) -> torch.Tensor:
    return torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]], dtype=F64)


def inverse_of(v: dict[str, float], p: float, groups: tuple[str, ...], height: int, width: int) -> torch.Tensor:
    """G⁻¹ of one image."""
    steps, half = [], 1 - math.sqrt(1 - p)
    if "blit" in groups:
        steps += [("flip", p, scaled(1 - 2 * math.floor(2 * v["flip"]), 1)),
                  ("turn", p, turned(math.floor(4 * v["turn"]) * math.pi / 2)),
                  ("jump", p, shifted(*(-round((v[name] - 0.5) / 4 * size)
                                        for name, size in (("jump_x", width), ("jump_y", height)))))]  # fmt: skip
    if "geom" in groups:
        s, a = 2 ** (0.2 * v["scale"]), 2 ** (0.2 * v["stretch"])
        steps += [("scale", p, scaled(1 / s, 1 / s)), ("spin", half, turned((2 * v["spin"] - 1) * math.pi)),
                  ("stretch", p, scaled(1 / a, a)), ("respin", half, turned((2 * v["respin"] - 1) * math.pi)),
                  ("move", p, shifted(-v["move_x"] / 8 * width, -v["move_y"] / 8 * height))]  # fmt: skip
    g = torch.eye(3, dtype=F64)
    for name, chance, matrix in steps:
        if v[f"{name}?"] < chance:
            g = g @ matrix
    return g


def color_of(v: dict[str, float], p: float, channels: int) -> torch.Tensor:
    c, luma = torch.eye(4, dtype=F64), torch.outer(V, V)
    one = torch.eye(3, dtype=F64)
    a, cross = (2 * v["hue"] - 1) * math.pi, torch.linalg.cross(one, V.expand(3, 3))
    steps = [("brightness", one, 0.2 * v["brightness"]), ("contrast", one * 2 ** (0.5 * v["contrast"]), 0),
             ("luma", one - 2 * math.floor(2 * v["luma"]) * luma, 0)]  # fmt: skip
    if channels > 1:
        steps += [("hue", math.cos(a) * one + math.sin(a) * cross + (1 - math.cos(a)) * luma, 0),
                  ("saturation", luma + (one - luma) * 2 ** v["saturation"], 0)]  # fmt: skip
    for name, matrix, offset in steps:
        if v[f"{name}?"] < p:
            step = torch.eye(4, dtype=F64)
            step[:3, :3], step[:3, 3] = matrix, offset
            c = step @ c
    return c


def reach(g: torch.Tensor, height: int, width: int) -> list[int]:
    """ADA's margins: left, right, top, bottom, as far as the corners of any image of the batch come from."""
    x, y = (width - 1) / 2, (height - 1) / 2
    corners = g @ torch.tensor([[-x, -y, 1], [x, -y, 1], [x, y, 1], [-x, y, 1]], dtype=F64).T
    far = [(-corners[:, 0]).max() + 6 - x, corners[:, 0].max() + 6 - x,
           (-corners[:, 1]).max() + 6 - y, corners[:, 1].max() + 6 - y]  # fmt: skip
    return [math.ceil(min(max(float(m), 0), s - 1)) for m, s in zip(far, (width, width, height, height), strict=True)]


def literal_warp(x: torch.Tensor, g: torch.Tensor, margins: list[int]) -> torch.Tensor:
    n, c, height, width = x.shape
    h = torch.tensor(augment_geometry.SYM6, dtype=F64)
    h = h / h.sum()
    left, right, top, bottom = margins
    x = F.pad(x, margins, mode="reflect")
    g = shifted((left - right) / 2, (top - bottom) / 2) @ g
    up = x.new_zeros(n, c, 2 * x.shape[2], 2 * x.shape[3])
    up[:, :, ::2, ::2] = x
    planes = F.conv2d(F.pad(up, (6, 5, 6, 5)).flatten(0, 1)[:, None], 2 * h.flip(0)[None, None, None])
    x = F.conv2d(planes, 2 * h.flip(0)[None, None, :, None]).unflatten(0, (n, c))[:, :, 0]
    g = scaled(2, 2) @ g @ scaled(0.5, 0.5)
    g = shifted(-0.5, -0.5) @ g @ shifted(0.5, 0.5)
    size = (2 * (height + 6), 2 * (width + 6))
    theta = scaled(2 / x.shape[3], 2 / x.shape[2]) @ g @ scaled(size[1] / 2, size[0] / 2)
    grid = F.affine_grid(theta[:, :2], [n, c, *size], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 1:-1, 1:-1]
    x = F.conv2d(x.flatten(0, 1)[:, None], torch.outer(h, h)[None, None])
    return x[:, 0, ::2, ::2].unflatten(0, (n, c))


def literal_bands(v: dict[str, float], p: float) -> torch.Tensor:
    """The filter of one image, [43]."""
    low = torch.tensor(SYM2, dtype=F64)
    high = low * torch.tensor([1.0, -1, 1, -1], dtype=F64)
    auto = [F.conv1d(F.pad(a[None, None], (3, 3)), a[None, None])[0, 0] / 2 for a in (low, high)]
    bank = torch.zeros(4, 1, dtype=F64)
    bank[0] = 1
    for band in (1, 2, 3):
        spread = torch.zeros(4, 2 * bank.shape[1] - 1, dtype=F64)
        spread[:, ::2] = bank
        bank = F.conv1d(F.pad(spread[:, None], (6, 6)), auto[0].flip(0)[None, None])[:, 0]
        middle = bank.shape[1] // 2
        bank[band, middle - 3 : middle + 4] += auto[1]
    gains = torch.ones(4, dtype=F64)
    for band in range(4):
        if v[f"band{band}?"] < p:
            t = torch.ones(4, dtype=F64)
            t[band] = 2 ** v[f"band{band}"]
            gains *= t / (t.square() @ torch.tensor([10.0, 1, 1, 1], dtype=F64) / 13).sqrt()
    return gains @ bank


def literal(x: torch.Tensor, values: torch.Tensor, p: float, field: torch.Tensor, pipe: str, widest: bool = False):
    """ADA's images of a batch. widest: with the margins' upper bound."""
    height, width = x.shape[2:]
    groups = PIPES[pipe]
    rows = [dict(zip(UNIFORM + NORMAL, row, strict=True)) for row in values.double().tolist()]
    if {"blit", "geom"} & set(groups):
        g = torch.stack([inverse_of(v, p, groups, height, width) for v in rows])
        bounds = [width - 1, width - 1, height - 1, height - 1]
        x = literal_warp(x, g, bounds if widest else reach(g, height, width))
    x = x.clone()
    for image, v, noise in zip(x, rows, field.double(), strict=True):
        if "color" in groups:
            c = color_of(v, p, len(image))
            if len(image) == 1:
                image *= c[:3, :3].sum() / 3
                image += c[:3, 3].mean()
            else:
                image[:3] = torch.einsum("ij,jhw->ihw", c[:3, :3], image[:3]) + c[:3, 3, None, None]
        if "filter" in groups:
            kernel = literal_bands(v, p)
            wide = F.pad(image[None], (21, 21, 21, 21), mode="reflect")[0][:, None]
            image[:] = F.conv2d(F.conv2d(wide, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]
        if "noise" in groups and v["noise?"] < p:
            image += noise * abs(v["noise"]) * 0.1
        if "cutout" in groups and v["cutout?"] < p:
            near_x = ((torch.arange(width) + 0.5) / width - v["cutout_x"]).abs() < 0.25
            near_y = ((torch.arange(height) + 0.5) / height - v["cutout_y"]).abs() < 0.25
            image[:, near_y[:, None] & near_x] = 0
    return x


def ours(x, values, p, field, pipe, dtype=F64):
    inputs = (t.to(dtype) for t in (x, values, torch.tensor(p, dtype=F64), field))
    return Pipe(pipe, CPU, dtype)(*inputs)


@pytest.mark.parametrize(
    ("pipe", "shape"), [*((pipe, (3, 28, 24)) for pipe in PIPES), ("bgcfnc", (1, 24, 24)), ("bgcfnc", (4, 22, 34))]
)
def test_images_are_adas(pipe, shape):
    """With the widest of ADA's margins: to 1e-4 of the largest value (contrast goes beyond 1) in fp32."""
    values, field = drawn(4, shape)
    x = picture(4, *shape)
    for p in (0.3, 1.0):
        exact = literal(x, values, p, field, pipe, widest=True)
        assert (ours(x, values, p, field, pipe) - exact).abs().max() < 1e-9
        error = (ours(x, values, p, field, pipe, torch.float32) - exact).abs().max()
        assert error < 1e-4 * max(1, exact.abs().max())


def test_batch_dependent_margins_matter_at_the_rim_only():
    """ADA's margins leave out what its filters reach beyond the corners of an image that is made smaller: it reads
    zeros there, we read the mirrored image. Nothing else differs; what is read is told by an image of ones.
    """
    n, shape = 48, (1, 24, 24)
    values, field = drawn(n, shape)
    x, one = picture(n, *shape), torch.ones(n, *shape, dtype=F64)
    worst, touched = 0.0, 0.0
    for first in range(0, n, 8):
        part = slice(first, first + 8)
        adas = literal(x[part], values[part], 1.0, field[part], "bg")
        mine = ours(x[part], values[part], 1.0, field[part], "bg", torch.float32)
        rim = (literal(one[part], values[part], 1.0, field[part], "bg") - 1).abs() > 1e-9
        rim = rim != ((ours(one[part], values[part], 1.0, field[part], "bg") - 1).abs() > 1e-9)
        difference = (mine - adas).abs()
        assert difference.masked_fill(rim, 0).max() < 1e-4
        worst, touched = max(worst, float(difference.max())), touched + float(rim.double().mean()) / (n // 8)
    print(f"{touched:.3%} of the pixels differ, by {worst:.1e} at most")
    assert touched < 0.01


def test_an_image_does_not_depend_on_its_batch_nor_on_the_canvas(monkeypatch):
    values, field = drawn(5, (3, 16, 16))
    x = picture(5, 3, 16, 16).float()
    whole = ours(x, values, 1.0, field, "bgcfnc", torch.float32)
    monkeypatch.setattr(augment_geometry, "CANVAS", 1)  # image by image
    apart = ours(x, values, 1.0, field, "bgcfnc", torch.float32)
    assert (whole - apart).abs().max() < 1e-5
    alone = ours(x[3:4], values[3:4], 1.0, field[3:4], "bgcfnc", torch.float32)
    assert (whole[3:4] - alone).abs().max() < 1e-5


def test_nothing_of_the_canvas_is_kept():
    """Autograd keeps less than four images at twice the resolution, where the canvas is 36 images large."""
    values, field = drawn(2, (3, 32, 32))
    kept = []
    x = picture(2, 3, 32, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x, values, 1.0, field, "bg")
    sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert 0 < sum(sizes.values()) < 4 * 4 * x.numel() * x.element_size()


# DiffAugment


def u(**numbers: float) -> torch.Tensor:
    return torch.tensor([[numbers.get(name, 0.5) for name in diffaugment.UNIFORM]], dtype=F64)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_diffaugment_color(channels):
    x = picture(1, channels, 4, 6)
    y = diffaugment.color(x, u(brightness=0.7, saturation=0.25, contrast=0.9))[0]
    rgb = x[0, :3] + 0.2
    rgb = rgb.mean(0) + (rgb - rgb.mean(0)) * 0.5
    rgb = rgb.mean() + (rgb - rgb.mean()) * 1.4
    assert (y[:3] - rgb).abs().max() < 1e-12 and torch.equal(y[3:], x[0, 3:])
    assert (diffaugment.color(x, u()) - x).abs().max() < 1e-12


def test_diffaugment_translation():
    """±⅛ of 16 and of 24: −2 … 2 down, −3 … 3 to the right, uniformly."""
    x = picture(1, 2, 16, 24) + 3
    for dy, dx in ((-2, 3), (0, 0), (1, -3), (2, 1)):
        y = diffaugment.translation(x, u(shift_x=(dx + 3.5) / 7, shift_y=(dy + 2.5) / 5))
        for i in range(16):
            for j in range(24):
                inside = 0 <= i - dy < 16 and 0 <= j - dx < 24
                assert torch.equal(y[0, :, i, j], x[0, :, i - dy, j - dx] if inside else torch.zeros(2, dtype=F64))


@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 6)])
def test_diffaugment_cutout(height, width):
    """Rows first … first + hole − 1, hole = round half up of height / 2, first from −hole // 2 up."""
    x = picture(1, 2, height, width) + 3
    for share in (0.0, 0.4, 0.999):
        y = diffaugment.cutout(x, u(cutout_x=share, cutout_y=1 - share - 0.001))
        holes = []
        for size, at in ((height, 1 - share - 0.001), (width, share)):
            hole = (size + 1) // 2
            first = math.floor(at * (size + (1 if hole % 2 == 0 else 0))) - hole // 2
            holes.append({k for k in range(size) if first <= k < first + hole})
        for i in range(height):
            for j in range(width):
                assert (y[0, 0, i, j] == 0) == (i in holes[0] and j in holes[1])
        assert torch.equal(y[y != 0], x[y != 0])


def test_diffaugment_reaches_every_place_as_often():
    numbers = Draws(1, CPU).augmentation(0, range(4000), len(diffaugment.UNIFORM), 0)
    x = torch.zeros(4000, 1, 8, 8)
    x[:, :, 4, 4] = 1
    at = diffaugment.translation(x, numbers).mean((0, 1))
    assert (at[3:6, 3:6] - 1 / 9).abs().max() < 0.03 and at.sum() == pytest.approx(1, abs=1e-4)
    kept = diffaugment.cutout(torch.ones(4000, 1, 8, 8), numbers).mean((0, 1))
    assert (kept[2:6, 2:6] - (1 - (4 / 9) ** 2)).abs().max() < 0.04
    colors = diffaugment.color(torch.full((4000, 1, 1, 2), 0.25), numbers)[:, 0, 0, 0] - 0.25
    assert abs(colors.mean()) < 0.03 and abs(colors.var() - 1 / 12) < 0.01


@pytest.mark.parametrize("policy", diffaugment.POLICY)
def test_derivatives_of_diffaugment(policy):
    numbers = torch.tensor([[0.8, 0.2, 0.9, 0.9, 0.1, 0.3, 0.6]], dtype=F64)
    x = picture(1, 3, 4, 5).requires_grad_()
    change = diffaugment.POLICY[policy]
    assert (change(x, numbers) - x).abs().max() > 1e-2
    assert gradcheck(lambda t: change(t, numbers), x)
    assert gradgradcheck(lambda t: change(t, numbers).tanh(), x, fast_mode=True)
