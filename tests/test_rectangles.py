"""Networks of any size: which sizes there are, shapes, arithmetic against the literal reference, gradients."""

import json
import math

import pytest
import torch
from literal_networks import mapping, reference_d, reference_g
from small_networks import WIDTHS, as_function, close, make_d, make_g, one_thread, stir  # noqa: F401  (a fixture)

from hsrgan.engine import losses
from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.sizes import MAX_RESOLUTION, MAX_START, START, block_sizes, in_words, plain, sides

ARCHITECTURES = ("skip", "orig", "resnet")


# ---- sizes


@pytest.mark.parametrize(
    ("size", "start", "top"),
    [
        (256, (4, 4), 256), (1024, (4, 4), 1024), (8, (4, 4), 8), (448, (7, 7), 256), (80, (5, 5), 64),
        (96, (6, 6), 64),
        ([512, 768], (4, 6), 512), ([768, 512], (6, 4), 512), ([576, 1024], (9, 16), 256), ([64, 256], (4, 16), 64),
        ((16, 16), (4, 4), 16), (4096, (4, 4), 4096),
    ],
)  # fmt: skip
def test_a_size_is_its_start_block_doubled(size, start, top):
    blocks = block_sizes(size)
    assert list(blocks) == [4 << level for level in range(len(blocks))] and list(blocks)[-1] == top
    assert blocks[4] == start and blocks[top] == sides(size)
    for below, above in zip(list(blocks)[:-1], list(blocks)[1:], strict=True):
        assert blocks[above] == (2 * blocks[below][0], 2 * blocks[below][1])


def test_there_are_as_many_levels_as_leave_a_whole_start_block():
    for n in range(1, 5):
        for h in range(START, MAX_START + 1):
            for w in range(START, MAX_START + 1):
                blocks = block_sizes([h << n, w << n])
                h0, w0 = blocks[4]
                assert h0 % 2 or w0 % 2 or min(h0, w0) < 2 * START  # no further halving
                assert len(blocks) >= n + 1 and max(h0, w0) <= MAX_START


@pytest.mark.parametrize("size", [4, 9, 100, 1000, 8192, [500, 700], [720, 1280], [16, 300]])
def test_what_is_no_size_is_refused_with_the_nearest(size):
    with pytest.raises(UserError) as error:
        block_sizes(size, "data.resolution")
    line = str(error.value)
    assert line.startswith(f"data.resolution is {size}, allowed: sides of 4 to 16 pixels") and "\n" not in line
    near = [json.loads(text) for text in line.partition("the nearest: ")[2].split(" and ")]

    def far(other):
        (h, w), (height, width) = sides(other), sides(size)
        return abs(math.log(h / height)) + abs(math.log(w / width))

    every = [
        (h << n, w << n)
        for n in range(1, 11)
        for h in range(START, MAX_START + 1)
        for w in (range(START, MAX_START + 1) if isinstance(size, list) else [h])
        if max(h, w) << n <= MAX_RESOLUTION
    ]
    assert [far(x) for x in near] == sorted({x: far(x) for x in every}.values())[:2]


def test_sizes_as_files_and_messages_have_them():
    assert plain((16, 16)) == plain([16, 16]) == plain(16) == 16 and plain((16, 24)) == [16, 24]
    assert in_words(16) == "16x16" and in_words([16, 24]) == "16x24 (height x width)"
    for wrong in (True, "16", 16.0, [16], [16, True], [16, 0], None, {}):
        with pytest.raises(UserError, match=r"must be a side in pixels or \[height, width\]"):
            sides(wrong)


# ---- networks


def test_parameters_of_512x768():
    """4×6 · 2⁷: those of 512², and what the start block adds: 512·8 of the constant, 512·512·8 of D's first Linear."""
    with torch.device("meta"):
        square, wide = ([net(img_resolution=size) for net in (Generator, Discriminator)] for size in (512, [512, 768]))
    added = [
        sum(p.numel() for p in b.parameters()) - sum(p.numel() for p in a.parameters())
        for a, b in zip(square, wide, strict=True)
    ]
    assert added == [512 * 8, 512 * 512 * 8]
    g, d = wide
    assert g.img_shape == d.img_shape == (3, 512, 768) and g.img_resolution == d.img_resolution == [512, 768]
    assert g.num_ws == square[0].num_ws == 16
    # the other way round, published squares are what they were
    assert square[0].img_resolution == 512 and square[0].img_shape == (3, 512, 512)
    shapes = [{k: tuple(v.shape) for k, v in net.state_dict().items()} for net in (square[0], g)]
    assert shapes[0].keys() == shapes[1].keys()
    other = {k for k in shapes[0] if shapes[0][k] != shapes[1][k]}
    assert other == {"synthesis.b4.const"} | {k for k in shapes[0] if k.endswith("noise_const")}
    assert shapes[1]["synthesis.b256.conv0.noise_const"] == (256, 384)
    assert g.synthesis.noise_size == sum(h * w * (1 if r == 4 else 2) for r, (h, w) in block_sizes([512, 768]).items())


SIZES = {"16×24, 4 channels": ((16, 24), 4), "24×16, 1 channel": ((24, 16), 1), "20×20, 3 channels": (20, 3)}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_networks_equal_the_literal_reference(architecture, case):
    size, channels = SIZES[case]
    (h, w), clamp = sides(size), 1.5
    g = stir(make_g(architecture, size=size, channels=channels, conv_clamp=clamp)).double()
    d = stir(make_d(architecture, size=size, channels=channels, conv_clamp=0.8, mbstd_group_size=3)).double()
    assert g.init_kwargs["img_resolution"] == plain(size) and g.img_shape == d.img_shape == (channels, h, w)
    noise = torch.randn(3, g.synthesis.noise_size, dtype=torch.float64)
    ws, features = torch.randn(3, g.num_ws, 6, dtype=torch.float64), {}
    image, got = g.synthesis(ws, noise=noise, return_features=(8, 16))  # named by block, whatever their size
    p = g.state_dict()
    expected = reference_g(p, architecture, ws, noise, clamp, features)
    assert image.shape == (3, channels, h, w)
    close(image, expected)
    for r in got:
        close(got[r], features[r])
    z = torch.randn(3, 10, dtype=torch.float64)
    close(g.mapping(z, None)[:, 0], mapping(p, z, None))
    close(d(image), reference_d(d.state_dict(), architecture, image, None, 0.8, 3))
    const = g.synthesis(ws, noise_mode="const")
    buffers = torch.cat([b.flatten() for n, b in g.named_buffers() if n.endswith("noise_const")])
    close(const, g.synthesis(ws, noise=buffers.repeat(3, 1)))


def test_a_rebuilt_generator_takes_the_tensors():
    g = make_g(size=[16, 24], channels=4)
    again = Generator(**g.init_kwargs)
    again.load_state_dict(g.state_dict())
    z = torch.randn(2, 10)
    assert torch.equal(again(z, noise_mode="const"), g(z, noise_mode="const"))
    with pytest.raises(ValueError, match=r"img must be \[N, 4, 16, 24\], got \[2, 4, 24, 16\]"):
        make_d(size=[16, 24], channels=4)(torch.zeros(2, 4, 24, 16))


# ---- gradients of a 4×6 · 2 image of 4 channels, first and second order, by finite differences in fp64

TINY = {"mapping_layers": 1, "channel_base": 16, "channel_max": 2}


def wild(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator_gradients(architecture):
    torch.manual_seed(3)
    g = stir(Generator(2, 0, 3, [8, 12], 4, architecture=architecture, **TINY)).double()
    noise = torch.randn(2, g.synthesis.noise_size, dtype=torch.float64)
    function, values = as_function(g, lambda g, z: g(z, noise=noise))
    inputs = (*values, wild(2, 2))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_gradients(architecture):
    torch.manual_seed(4)
    d = stir(Discriminator(0, [12, 8], 4, architecture=architecture, mbstd_group_size=2, **TINY)).double()
    function, values = as_function(d, lambda d, img: d(img))
    inputs = (*values, wild(2, 4, 12, 8))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_penalties_of_a_rectangle():
    """R1 and path length, whose scale is 1/√(H·W), by finite differences in every parameter."""
    torch.manual_seed(5)
    d = stir(Discriminator(0, [8, 12], 4, mbstd_group_size=2, **TINY)).double()
    img = wild(2, 4, 8, 12)
    function, values = as_function(d, lambda d: losses.r1_penalty(d(img), img, 1.0))
    assert torch.autograd.gradcheck(function, values, fast_mode=True)

    g = stir(Generator(2, 0, 3, [12, 8], 4, **TINY)).double()
    y, z = torch.randn(2, 4, 12, 8, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    noise = torch.randn(2, g.synthesis.noise_size, dtype=torch.float64)

    class PathLength(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.g = g

        def forward(self):
            ws = self.g.mapping(z, None)
            lengths = losses.path_lengths(self.g.synthesis(ws, noise=noise), ws, y / 96**0.5)
            return losses.path_penalty(lengths, torch.tensor(0.1, dtype=torch.float64))

    function, values = as_function(PathLength(), lambda module: module())
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_half_blocks_are_counted_from_the_top():
    g = Generator(8, 0, 8, [40, 24], 3, mapping_layers=1, num_fp16_res=2, half_dtype=torch.bfloat16, **WIDTHS)
    assert [r for r in g.synthesis.resolutions if getattr(g.synthesis, f"b{r}").half_dtype] == [8, 16]
    assert g.img_shape == (3, 40, 24) and g(torch.randn(2, 8)).dtype == torch.float32
