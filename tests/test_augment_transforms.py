"""ADA's 18 transforms, each against its definition in fp64: what it does, that it does nothing at p = 0, how its
parameters are distributed, and its derivatives.

The definitions here are read off arXiv 2006.06676, appendix B, pixel by pixel, without the code under test.
"""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hsrgan.engine import augment_color, augment_filter, augment_geometry
from hsrgan.engine.augment import Pipe
from hsrgan.engine.augment_numbers import NORMAL, UNIFORM, Numbers
from hsrgan.engine.draws import Draws
from hsrgan.engine.sections import PIPES

F64 = torch.float64
COLUMNS = {name: k for k, name in enumerate(UNIFORM + NORMAL)}
DRAWS = 20_000


def pinned(n: int, p: float = 1.0, **values: float) -> Numbers:
    """n rows in which every gate is closed but those of `values`' names, which are open; normals 0."""
    rows = torch.zeros(n, len(COLUMNS), dtype=F64)
    rows[:, [k for name, k in COLUMNS.items() if name.endswith("?")]] = 2.0
    for name, value in values.items():
        rows[:, COLUMNS[name]] = torch.as_tensor(value, dtype=F64)
        gate = next(g for g in (f"{name}?", f"{name[:-2]}?") if g in COLUMNS)
        rows[:, COLUMNS[gate]] = 0.0
    return Numbers(rows, torch.tensor(p, dtype=F64))


def drawn(p: float) -> Numbers:
    values = Draws(5, torch.device("cpu")).augmentation(0, range(DRAWS), len(UNIFORM), len(NORMAL))
    return Numbers(values, torch.tensor(p))


@pytest.fixture(scope="module")
def draws() -> Numbers:
    return drawn(0.4)


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(3)) * 2 - 1


def warped(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return augment_geometry.warp(x, inverse, augment_geometry.low_pass())


def smooth(size: int) -> torch.Tensor:
    """[1, 2, size, size] from −2 to 2 without any symmetry, even about its outermost pixels."""
    at = torch.arange(size, dtype=F64) * (math.pi / (size - 1))
    return torch.stack([at.cos()[:, None] + (2 * at).cos(), (3 * at).cos()[:, None] - at.cos()])[None]


# 1–3 move whole pixels: an orthonormal low-pass gives them back exactly where they keep their orientation; sym6, which
# is nearly symmetric, moves what is mirrored by a tenth of a pixel


def test_x_flip():
    x = smooth(32)
    for u, expected, bound in ((0.7, x.flip(3), 0.07), (0.3, x, 1e-10)):
        assert (warped(x, augment_geometry.x_flip(pinned(1, flip=u), 32, 32)) - expected).abs().max() < bound
    assert (x.flip(3) - x).abs().max() > 1.9


def test_quarter_turns():
    x = smooth(32)
    for i in range(4):
        turned = warped(x, augment_geometry.quarter_turns(pinned(1, turn=i / 4 + 0.1), 32, 32))
        assert (turned - x.rot90(i, (2, 3))).abs().max() < (0.07 if i else 1e-10)
        assert all((turned - x.rot90(i + k, (2, 3))).abs().max() > 1.9 for k in (1, 2, 3))


def test_integer_shift():
    """9·.125·(2·.95 − 1) = 1.01 → 1 to the right, 17·.125·(2·.1 − 1) = −1.7 → 2 up; mirrored pixels move in."""
    x = picture(1, 3, 17, 9)
    shifted = warped(x, augment_geometry.integer_shift(pinned(1, jump_x=0.95, jump_y=0.1), 17, 9))
    columns, rows = [abs(j - 1) for j in range(9)], [i if i < 17 else 32 - i for i in range(2, 19)]
    assert (shifted - x[:, :, rows][:, :, :, columns]).abs().max() < 1e-10


# 4–7 against matrices


@pytest.mark.parametrize(
    ("transform", "numbers", "expected"),
    [
        ("scale", {"scale": 1.5}, [[2**-0.3, 0, 0], [0, 2**-0.3, 0]]),
        ("spin", {"spin": 0.75}, [[0, -1, 0], [1, 0, 0]]),
        ("respin", {"respin": 2 / 3}, [[0.5, -(0.75**0.5), 0], [0.75**0.5, 0.5, 0]]),
        ("stretch", {"stretch": -1.0}, [[2**0.2, 0, 0], [0, 2**-0.2, 0]]),
        ("shift", {"move_x": 0.8, "move_y": -0.4}, [[1, 0, -0.8 * 20 / 8], [0, 1, 0.4 * 12 / 8]]),
    ],
)
def test_matrix_of(transform, numbers, expected):
    found = getattr(augment_geometry, transform)(pinned(1, **numbers), 12, 20)[0]
    assert (found - torch.tensor([*expected, [0, 0, 1]], dtype=F64)).abs().max() < 1e-12


def test_geometry_is_composed_in_the_papers_order():
    """T₇(T₅′(T₆(T₅(T₄(T₃(T₂(T₁ point))))))), so the last undone is the first."""
    numbers = Numbers(torch.rand(4, len(COLUMNS), dtype=F64), torch.tensor(1.0, dtype=F64))
    order = ("x_flip", "quarter_turns", "integer_shift", "scale", "spin", "stretch", "respin", "shift")
    point = torch.tensor([1.5, -2.0, 1.0], dtype=F64).expand(4, 3)
    for name in order:
        point = torch.linalg.solve(getattr(augment_geometry, name)(numbers, 12, 20), point)
    whole = augment_geometry.inverse(numbers, augment_geometry.BLIT + augment_geometry.GEOMETRY, 12, 20)
    back = torch.einsum("nij,nj->ni", whole, point)
    assert (back - torch.tensor([1.5, -2.0, 1.0], dtype=F64)).abs().max() < 1e-10


# 8–12 on colours


@pytest.mark.parametrize(
    ("transform", "numbers", "definition"),
    [
        ("brightness", {"brightness": 1.5}, lambda rgb: rgb + 0.3),
        ("contrast", {"contrast": -1.0}, lambda rgb: rgb * 2**-0.5),
        ("luma_flip", {"luma": 0.6}, lambda rgb: rgb - 2 * rgb.mean(-1, keepdim=True)),
        ("luma_flip", {"luma": 0.4}, lambda rgb: rgb),
        ("hue", {"hue": 5 / 6}, lambda rgb: rgb.roll(1, -1)),  # 120° about the grey axis: r → g → b → r
        ("saturation", {"saturation": 1.0}, lambda rgb: 2 * rgb - rgb.mean(-1, keepdim=True)),
    ],
)
def test_colour_of(transform, numbers, definition):
    x = picture(2, 4, 3, 5)
    y = augment_color.recolor(x, augment_color.matrix(pinned(2, **numbers), (getattr(augment_color, transform),)))
    rgb = definition(x[:, :3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert (y[:, :3] - rgb).abs().max() < 1e-12
    assert torch.equal(y[:, 3], x[:, 3])  # alpha
    assert torch.equal(augment_color.recolor(x[:, :3], augment_color.COLOR[0](pinned(2))), x[:, :3])


def test_hue_between_thirds_is_a_rotation_about_grey():
    c = augment_color.hue(pinned(1, hue=0.61))[0, :3, :3]
    assert (c @ c.T - torch.eye(3, dtype=F64)).abs().max() < 1e-12 and torch.linalg.det(c) > 0
    assert (c.sum(1) - 1).abs().max() < 1e-12 and abs(c.trace() - 1 - 2 * math.cos(0.22 * math.pi)) < 1e-12


def test_colours_are_composed_in_order_and_grey_is_the_rows_mean():
    numbers = Numbers(torch.rand(3, len(COLUMNS), dtype=F64), torch.tensor(1.0, dtype=F64))
    x = picture(3, 3, 4, 4)
    step = x
    for transform in ("brightness", "contrast", "luma_flip", "hue", "saturation"):
        step = augment_color.recolor(step, getattr(augment_color, transform)(numbers))
    whole = augment_color.recolor(x, augment_color.matrix(numbers, augment_color.COLOR))
    assert (whole - step).abs().max() < 1e-12
    grey = augment_color.recolor(x[:, :1], augment_color.matrix(numbers, augment_color.GREY))
    of_rgb = augment_color.recolor(x[:, :1].expand(-1, 3, -1, -1), augment_color.matrix(numbers, augment_color.GREY))
    assert (grey - of_rgb.mean(1, keepdim=True)).abs().max() < 1e-12


# 13–16


def frequency_bands(size: int) -> torch.Tensor:
    """|H|² of each band at the frequencies of rfft, [4, size // 2 + 1]: a cascade of half-band filters of sym2."""
    omega = torch.arange(size // 2 + 1, dtype=F64) * (2 * math.pi / size)
    taps = torch.arange(4, dtype=F64)

    def power(w: torch.Tensor) -> torch.Tensor:
        wave = torch.exp(-1j * w[:, None] * taps)
        return (wave * torch.tensor(augment_filter.SYM2, dtype=F64)).sum(1).abs().square() / 2

    (l1, h1), (l2, h2), (l4, h4) = ((power(k * omega), power(k * omega + math.pi)) for k in (1, 2, 4))
    return torch.stack([l1 * l2 * l4, l1 * l2 * h4, l1 * h2, h1])


@pytest.mark.parametrize("band", range(4))
def test_band(band):
    """On a periodic signal a band's gain is that of its frequencies; the power of natural images stays."""
    gains = augment_filter.band_gains(pinned(1, **{f"band{band}": 1.5}))
    power = torch.tensor([10, 1, 1, 1], dtype=F64) / 13
    t = torch.ones(4, dtype=F64)
    t[band] = 2**1.5
    assert (gains[0] - t / (power * t.square()).sum().sqrt()).abs().max() < 1e-12
    kernel = (gains[0, :, None] * augment_filter.filter_bank()).sum(0)
    spectrum = torch.fft.rfft(torch.cat([kernel, kernel.new_zeros(64 - 43)]).roll(-21)).real
    assert (spectrum - (gains[0, :, None] * frequency_bands(64)).sum(0)).abs().max() < 1e-9


def test_bands_filter_both_axes_and_mirror_the_edges():
    x, gains = picture(2, 3, 7, 30), torch.rand(2, 4, dtype=F64) + 0.5  # 7 is less than the filter reaches
    y = augment_filter.amplify(x, gains, augment_filter.filter_bank())

    def mirror(k: int, size: int) -> int:
        k %= 2 * size - 2
        return min(k, 2 * size - 2 - k)

    for n in range(2):
        kernel = (gains[n, :, None] * augment_filter.filter_bank()).sum(0)
        rows, columns = (torch.zeros(size, size, dtype=F64) for size in (7, 30))
        for matrix, size in ((rows, 7), (columns, 30)):
            for i in range(size):
                for k in range(43):
                    matrix[i, mirror(i + k - 21, size)] += kernel[k]
        assert (y[n] - rows @ x[n] @ columns.T).abs().max() < 1e-12


# 17, 18


def test_noise():
    x, field = picture(2, 3, 4, 5), torch.randn(2, 3, 4, 5, dtype=F64)
    level = augment_filter.noise_level(pinned(2, noise=[-2.0, 1.0]))
    assert (level - torch.tensor([0.2, 0.1], dtype=F64)).abs().max() < 1e-12
    y = augment_filter.add_noise(x, level, field)
    assert (y[0] - x[0] - 0.2 * field[0]).abs().max() < 1e-12 and (y[1] - x[1] - 0.1 * field[1]).abs().max() < 1e-12


def test_cutout():
    mask = augment_filter.cutout_mask(pinned(1, cutout_x=0.5, cutout_y=0.1), 8, 12)[0, 0]
    for i in range(8):
        for j in range(12):
            inside = abs((j + 0.5) / 12 - 0.5) < 0.25 and abs((i + 0.5) / 8 - 0.1) < 0.25
            assert mask[i, j] == 1 - inside


# Distributions


def close(values: torch.Tensor, mean: float, std: float) -> None:
    """Mean and deviation of as many independent draws as there are, within five of their own deviations."""
    count = values.numel()
    assert abs(values.double().mean() - mean) < 5 * std / count**0.5
    assert abs(values.double().std() - std) < 5 * std / count**0.5


def opened(on: torch.Tensor, p: float) -> None:
    assert abs(on.double().mean() - p) < 5 * (p * (1 - p) / on.numel()) ** 0.5


def test_distribution_of_blits(draws):
    flips = augment_geometry.x_flip(draws, 64, 96)[:, 0, 0]
    assert set(flips.tolist()) == {-1.0, 1.0}
    opened(flips < 0, 0.4 / 2)
    turns = augment_geometry.quarter_turns(draws, 64, 64)
    for cosine, sine in ((0, 1), (-1, 0), (0, -1)):
        at = (turns[:, 0, 0].round() == cosine) & (turns[:, 1, 0].round() == sine)
        opened(at, 0.4 / 4)
    moved = -augment_geometry.integer_shift(draws, 64, 96)[:, :2, 2]
    assert torch.equal(moved, moved.round()) and moved[:, 0].abs().max() == 12 and moved[:, 1].abs().max() == 8
    on = draws["jump?"] < 0.4
    opened(on, 0.4)
    assert not moved[~on].any()
    close(moved[on, 0], 0, 96 * 0.25 / 12**0.5)
    close(moved[on, 1], 0, 64 * 0.25 / 12**0.5)


def test_distribution_of_geometry(draws):
    scales = -augment_geometry.scale(draws, 64, 64)[:, 0, 0].log2()
    opened(scales != 0, 0.4)
    close(scales[scales != 0], 0, 0.2)
    rate = 1 - 0.6**0.5
    turned = []
    for transform in (augment_geometry.spin, augment_geometry.respin):
        matrix = transform(draws, 64, 64)
        angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])
        turned.append(angle != 0)
        opened(turned[-1], rate)
        close(angle[angle != 0], 0, 2 * math.pi / 12**0.5)
    opened(turned[0] | turned[1], 0.4)  # which is why each is 1 − √(1 − p)
    stretch = augment_geometry.stretch(draws, 64, 64)
    opened(stretch[:, 0, 0] != 1, 0.4)
    assert (stretch[:, 0, 0] * stretch[:, 1, 1] - 1).abs().max() < 1e-5
    close(stretch[stretch[:, 0, 0] != 1, 1, 1].log2(), 0, 0.2)
    move = augment_geometry.shift(draws, 64, 96)[:, :2, 2]
    opened(move[:, 0] != 0, 0.4)
    assert torch.equal(move[:, 0] != 0, move[:, 1] != 0)
    close(move[move[:, 0] != 0, 0], 0, 0.125 * 96)
    close(move[move[:, 0] != 0, 1], 0, 0.125 * 64)


def test_distribution_of_colours(draws):
    offset = augment_color.brightness(draws)[:, 0, 3]
    opened(offset != 0, 0.4)
    close(offset[offset != 0], 0, 0.2)
    factor = augment_color.contrast(draws)[:, 0, 0].log2()
    opened(factor != 0, 0.4)
    close(factor[factor != 0], 0, 0.5)
    opened(augment_color.luma_flip(draws)[:, 0, 1] != 0, 0.2)
    hue = augment_color.hue(draws)
    angle = torch.atan2((hue[:, 1, 0] - hue[:, 0, 1]) * 3**0.5 / 2, (hue[:, 0, 0] * 3 - 1) / 2)
    opened(angle.abs() > 1e-4, 0.4)
    close(angle[angle.abs() > 1e-4], 0, 2 * math.pi / 12**0.5)
    saturation = augment_color.saturation(draws)
    factor = (saturation[:, 0, 0] - saturation[:, 0, 1]).log2()
    opened(factor.abs() > 1e-5, 0.4)
    close(factor[factor.abs() > 1e-5], 0, 1)


def test_distribution_of_corruptions(draws):
    for band in range(4):
        only = Numbers(draws.values.clone(), draws.p)
        for other in {0, 1, 2, 3} - {band}:
            only.values[:, COLUMNS[f"band{other}?"]] = 1
        gains = augment_filter.band_gains(only)
        t = (gains[:, band] / gains[:, band - 1]).log2()
        opened(t.abs() > 1e-5, 0.4)
        close(t[t.abs() > 1e-5], 0, 1)
    level = augment_filter.noise_level(draws)
    opened(level > 0, 0.4)
    assert abs(level[level > 0].square().mean().sqrt() - 0.1) < 0.003
    assert abs(level[level > 0].mean() - 0.1 * (2 / math.pi) ** 0.5) < 0.003
    holes = 1 - augment_filter.cutout_mask(Numbers(draws.values[:4000], draws.p), 16, 16)
    opened(holes.amax((1, 2, 3)), 0.4)
    middle = holes[:, 0, 4:12, 4:12].mean((1, 2))
    assert abs(middle.mean() / 0.4 - 0.5**2) < 0.02  # half of all centres are near, in either axis


def test_all_gates_are_independent(draws):
    gates = torch.stack([(draws[name] < 0.4).double() for name in UNIFORM if name.endswith("?")])
    correlation = torch.corrcoef(gates) - torch.eye(len(gates))
    assert len(gates) == 19 and correlation.abs().max() < 5 / DRAWS**0.5  # 18 transforms, 5 and 5′


# At p = 0, and derivatives


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_at_p_0_nothing_changes_and_at_p_1_everything_does(name, channels):
    """Bitwise, but 1e-5 in fp32 where the image is filtered or resampled at coordinates of 24 bits, 1e-10 in fp64."""
    shape = (3, channels, 10, 24)
    draws = Draws(2, torch.device("cpu"))
    values, field = draws.augmentation(0, range(3), len(UNIFORM), len(NORMAL)), draws.pixels(0, range(3), shape[1:])
    x = picture(*shape)
    for dtype, resampled in ((torch.float32, 1e-5), (F64, 1e-10)):
        pipe = Pipe(name, torch.device("cpu"), dtype)
        inputs = [t.to(dtype) for t in (x, values, torch.tensor(0.0), field)]
        bound = resampled if {"blit", "geom", "filter"} & set(PIPES[name]) else 0
        assert (pipe(*inputs) - inputs[0]).abs().max() <= bound
    inputs[2] = torch.tensor(1.0, dtype=F64)
    changed = (pipe(*inputs) - inputs[0]).abs().amax((1, 2, 3))
    assert (changed > 1e-3).all()


EACH = [
    ("geom", "flip", 0.7), ("geom", "turn", 0.3), ("geom", "jump_x", 0.99), ("geom", "scale", 0.7),
    ("geom", "spin", 0.4), ("geom", "stretch", 0.9), ("geom", "respin", 0.6), ("geom", "move_y", 0.8),
    ("color", "brightness", 0.5), ("color", "contrast", 0.5), ("color", "luma", 0.6), ("color", "hue", 0.3),
    ("color", "saturation", 0.5), *(("filter", f"band{k}", 0.6) for k in range(4)), ("noise", "noise", 0.5),
    ("cutout", "cutout_x", 0.4),
]  # fmt: skip


@pytest.mark.parametrize(("group", "number", "value"), EACH, ids=[f"{k + 1}-{e[1]}" for k, e in enumerate(EACH)])
def test_derivatives_of_each_transform(group, number, value):
    """Of A and of a non-linear function of it, which is what R1's second pass meets."""
    pipe = Pipe("bgc" if group in ("geom", "color") else group, torch.device("cpu"), F64)
    numbers, field = pinned(1, **{number: value}), picture(1, 3, 4, 5)
    x = picture(1, 3, 4, 5).requires_grad_()
    seen = pipe(x, numbers.values, numbers.p, field)
    assert (seen - x).abs().max() > 1e-3  # it is this transform that is differentiated
    assert gradcheck(lambda t: pipe(t, numbers.values, numbers.p, field), x, fast_mode=True)
    assert gradgradcheck(lambda t: pipe(t, numbers.values, numbers.p, field).tanh(), x, fast_mode=True)


def test_derivatives_of_the_whole_pipe():
    pipe = Pipe("bgcfnc", torch.device("cpu"), F64)
    values = Draws(1, torch.device("cpu")).augmentation(0, range(2), len(UNIFORM), len(NORMAL)).double()
    p, field, x = torch.tensor(1.0, dtype=F64), picture(2, 3, 3, 4), picture(2, 3, 3, 4).requires_grad_()
    assert gradcheck(lambda t: pipe(t, values, p, field), x)
    assert gradgradcheck(lambda t: pipe(t, values, p, field).tanh(), x, fast_mode=True)
