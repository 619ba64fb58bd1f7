"""Generator and discriminator: keys, counts, arithmetic against a literal fp64 reference, gradients, modes, errors."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from hsrgan.engine.errors import UserError
from hsrgan.engine.layers import append_minibatch_std
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.sizes import RULE

ARCHITECTURES = ("skip", "orig", "resnet")
WIDTHS = {"channel_base": 128, "channel_max": 12}  # 12 channels at 4 and 8, 8 at 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and waiting threads cost minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_g(architecture="skip", c_dim=0, size=16, channels=3, **kwargs):
    torch.manual_seed(1)
    return Generator(10, c_dim, 6, size, channels, mapping_layers=2, architecture=architecture, **{**WIDTHS, **kwargs})


def make_d(architecture="resnet", c_dim=0, size=16, channels=3, **kwargs):
    torch.manual_seed(2)
    return Discriminator(c_dim, size, channels, architecture=architecture, mapping_layers=2, **{**WIDTHS, **kwargs})


@torch.no_grad()
def stir(net):
    """Move every parameter and w_avg off its initial value, so that a forgotten bias or strength shows."""
    for p in net.parameters():
        p.add_(0.3 * p.std(correction=0).clamp(min=0.5) * torch.randn_like(p))
    if isinstance(net, Generator):
        net.mapping.w_avg.normal_()
    return net


# ---- counts, keys, initialisation


@pytest.mark.parametrize(
    ("kwargs", "count_g", "count_d"),
    [
        pytest.param({"img_resolution": 256, "channel_base": 16384}, 24_767_458, 24_001_089, id="paper256"),
        pytest.param({"img_resolution": 1024}, 30_370_060, 29_012_513, id="1024"),
    ],
)
def test_parameter_counts_are_the_published_ones(kwargs, count_g, count_d):
    with torch.device("meta"):
        g, d = Generator(**kwargs), Discriminator(**kwargs)
    assert sum(p.numel() for p in g.parameters()) == count_g
    assert sum(p.numel() for p in d.parameters()) == count_d
    assert g.num_ws == {256: 14, 1024: 18}[g.img_resolution]


def layer_shapes(name, cin, cout, r, w=6):
    return {
        f"{name}.weight": [cout, cin, 3, 3], f"{name}.bias": [cout], f"{name}.noise_strength": [],
        f"{name}.noise_const": [r, r], f"{name}.resample_filter": [4, 4],
        f"{name}.affine.weight": [cin, w], f"{name}.affine.bias": [cin],
    }  # fmt: skip


def conv_shapes(name, cin, cout, k, bias=True):
    shapes = {f"{name}.weight": [cout, cin, k, k], f"{name}.resample_filter": [4, 4]}
    return {**shapes, f"{name}.bias": [cout]} if bias else shapes


def linear_shapes(name, cin, cout):
    return {f"{name}.weight": [cout, cin], f"{name}.bias": [cout]}


def expected_g(architecture, c_dim):
    embed = linear_shapes("mapping.embed", c_dim, 6) if c_dim else {}
    keys = {
        "mapping.w_avg": [6], **embed,
        **linear_shapes("mapping.fc0", 16 if c_dim else 10, 6), **linear_shapes("mapping.fc1", 6, 6),
        "synthesis.b4.const": [12, 4, 4], "synthesis.b4.resample_filter": [4, 4],
        "synthesis.b8.resample_filter": [4, 4], "synthesis.b16.resample_filter": [4, 4],
        **layer_shapes("synthesis.b4.conv1", 12, 12, 4),
        **layer_shapes("synthesis.b8.conv0", 12, 12, 8), **layer_shapes("synthesis.b8.conv1", 12, 12, 8),
        **layer_shapes("synthesis.b16.conv0", 12, 8, 16), **layer_shapes("synthesis.b16.conv1", 8, 8, 16),
    }  # fmt: skip
    for r, channels in ((4, 12), (8, 12), (16, 8)):
        if architecture == "skip" or r == 16:
            name = f"synthesis.b{r}.torgb"
            keys |= {f"{name}.weight": [3, channels, 1, 1], f"{name}.bias": [3]}
            keys |= linear_shapes(f"{name}.affine", 6, channels)
    if architecture == "resnet":
        keys |= conv_shapes("synthesis.b8.skip", 12, 12, 1, bias=False)
        keys |= conv_shapes("synthesis.b16.skip", 12, 8, 1, bias=False)
    return keys


def expected_d(architecture, c_dim):
    keys = {
        **conv_shapes("b16.fromrgb", 3, 8, 1),
        **conv_shapes("b16.conv0", 8, 8, 3), **conv_shapes("b16.conv1", 8, 12, 3),
        **conv_shapes("b8.conv0", 12, 12, 3), **conv_shapes("b8.conv1", 12, 12, 3),
        "b16.resample_filter": [4, 4], "b8.resample_filter": [4, 4],
        **conv_shapes("b4.conv", 13, 12, 3), **linear_shapes("b4.fc", 192, 12),
        **linear_shapes("b4.out", 12, 12 if c_dim else 1),
    }  # fmt: skip
    if architecture == "skip":
        keys |= conv_shapes("b8.fromrgb", 3, 12, 1) | conv_shapes("b4.fromrgb", 3, 12, 1)
    if architecture == "resnet":
        keys |= conv_shapes("b16.skip", 8, 12, 1, bias=False) | conv_shapes("b8.skip", 12, 12, 1, bias=False)
    if c_dim:
        keys |= linear_shapes("mapping.embed", c_dim, 12)
        keys |= linear_shapes("mapping.fc0", 12, 12) | linear_shapes("mapping.fc1", 12, 12)
    return keys


@pytest.mark.parametrize("c_dim", [0, 5], ids=["plain", "conditional"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_and_shapes_are_the_published_ones(architecture, c_dim):
    g, d = make_g(architecture, c_dim), make_d(architecture, c_dim)
    assert {k: list(v.shape) for k, v in g.state_dict().items()} == expected_g(architecture, c_dim)
    assert {k: list(v.shape) for k, v in d.state_dict().items()} == expected_d(architecture, c_dim)
    assert all(p.ndim > 0 for p in g.parameters())  # DeepSpeed refuses 0-dim parameters


def test_state_dict_round_trip_and_published_shapes():
    a, b = stir(make_g()), make_g()
    state = a.state_dict()
    assert state["synthesis.b8.conv0.noise_strength"].shape == ()
    b.load_state_dict(state, strict=True)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(a.buffers(), b.buffers(), strict=True))
    assert b.synthesis.b8.conv0.noise_strength.shape == (1,)

    state["synthesis.b8.conv0.resample_filter"] = torch.full([4, 4], 1 / 16)
    with pytest.raises(RuntimeError, match=r"b8\.conv0\.resample_filter is not the \[1, 3, 3, 1\] filter"):
        b.load_state_dict(state)


def test_initialisation():
    torch.manual_seed(0)
    g = Generator(64, 3, 64, 16, 3, channel_base=1024, channel_max=64, mapping_layers=2)
    d = Discriminator(3, 16, 3, channel_base=1024, channel_max=64, mapping_layers=2)
    for name, t in {**g.state_dict(), **d.state_dict()}.items():
        if name.endswith("resample_filter"):
            taps = torch.tensor([1.0, 3, 3, 1])
            assert torch.equal(t, taps.outer(taps) / 64)
        elif name.endswith("affine.bias"):
            assert (t == 1).all(), name
        elif name.endswith(("bias", "noise_strength", "w_avg")):
            assert (t == 0).all(), name
        else:  # weight, const, noise_const
            std = 100 if "mapping.fc" in name else 1
            assert abs(t.std().item() / std - 1) < 6 / math.sqrt(2 * t.numel()), name


def test_init_kwargs_rebuild_the_generator():
    g = make_g("resnet", 5, num_fp16_res=1, conv_clamp=None, half_dtype=torch.bfloat16)
    again = Generator(**json.loads(json.dumps(g.init_kwargs)))
    again.load_state_dict(g.state_dict(), strict=True)
    assert again.init_kwargs == g.init_kwargs


# ---- literal reference, fp64: per-sample weights in a grouped convolution, FIRs with all 16 taps

F2D = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64).outer(torch.tensor([1.0, 3, 3, 1], dtype=torch.float64)) / 64


def fir(x, pad, up=1, down=1, gain=1.0):
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h * up, w * up)
    z[:, :, ::up, ::up] = x
    z = F.pad(z, (pad[0], pad[1], pad[0], pad[1]))
    return F.conv2d(z, (F2D * gain).repeat(c, 1, 1, 1), groups=c)[:, :, ::down, ::down]


def lrelu(x, gain, clamp):
    return (torch.where(x > 0, x, 0.2 * x) * gain).clamp(-clamp, clamp)


def fc(p, name, x, lr=1.0):
    w = p[f"{name}.weight"]
    return x @ (w * lr / math.sqrt(w.shape[1])).T + p[f"{name}.bias"] * lr


def moment(x):
    return x / ((x * x).mean(1, keepdim=True) + 1e-8).sqrt()


def mapping(p, z, c, layers=2):
    x = [] if z is None else [moment(z)]
    if c is not None:
        x.append(moment(fc(p, "mapping.embed", c)))
    x = torch.cat(x, 1)
    for i in range(layers):
        x = fc(p, f"mapping.fc{i}", x, 0.01)
        x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    return x


def modulated(x, weight, style, up, demodulate):
    n, cin, height, width = x.shape
    cout, k = weight.shape[0], weight.shape[2]
    w = weight[None] * style[:, None, :, None, None]
    if demodulate:
        w = w / ((w * w).sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    x = x.reshape(1, n * cin, height, width)
    if up == 1:
        y = F.conv2d(x, w.reshape(n * cout, cin, k, k), padding=k // 2, groups=n)
        return y.reshape(n, cout, height, width)
    w = w.transpose(1, 2).reshape(n * cin, cout, k, k)
    y = F.conv_transpose2d(x, w, stride=2, groups=n).reshape(n, cout, 2 * height + 1, 2 * width + 1)
    return fir(y, [1, 1], gain=4)


def reference_g(p, architecture, ws, noise, clamp, features=None):
    def conv(name, x, w, z, up, scale=1.0):
        x = modulated(x, p[f"{name}.weight"], fc(p, f"{name}.affine", w), up, True)
        x = x + z * p[f"{name}.noise_strength"] + p[f"{name}.bias"][:, None, None]
        return lrelu(x, math.sqrt(2) * scale, clamp * scale)

    n = len(ws)
    height, width = p["synthesis.b4.const"].shape[1:]
    sizes = [(height << k, width << k) for k in (0, 1, 1, 2, 2)]
    noise = iter(noise.split([h * w for h, w in sizes], dim=1))
    noise = iter([z.reshape(n, 1, *size) for z, size in zip(noise, sizes, strict=True)])
    img = None
    for k, r in enumerate((4, 8, 16)):
        b = f"synthesis.b{r}"
        if r == 4:
            x = conv(f"{b}.conv1", p[f"{b}.const"].repeat(n, 1, 1, 1), ws[:, 0], next(noise), 1)
            w_rgb = ws[:, 1]
        else:
            y = x
            x = conv(f"{b}.conv0", x, ws[:, 2 * k - 1], next(noise), 2)
            scale = math.sqrt(0.5) if architecture == "resnet" else 1.0
            x = conv(f"{b}.conv1", x, ws[:, 2 * k], next(noise), 1, scale)
            w_rgb = ws[:, 2 * k + 1]
            if architecture == "resnet":
                w = p[f"{b}.skip.weight"]
                x = x + fir(F.conv2d(y, w / math.sqrt(w.shape[1])), [2, 1], up=2, gain=4) * math.sqrt(0.5)
        if architecture == "skip" or r == 16:
            w = p[f"{b}.torgb.weight"]
            style = fc(p, f"{b}.torgb.affine", w_rgb) / math.sqrt(w.shape[1])
            rgb = (modulated(x, w, style, 1, False) + p[f"{b}.torgb.bias"][:, None, None]).clamp(-clamp, clamp)
            img = rgb if img is None else fir(img, [2, 1], up=2, gain=4) + rgb
        if features is not None:
            features[r] = x
    return img


def reference_d(p, architecture, img, c, clamp, group):
    def conv(name, x, down=1, scale=1.0, clamp=clamp):
        w = p[f"{name}.weight"]
        k = w.shape[2]
        w = w / math.sqrt(w.shape[1] * k * k)
        x = F.conv2d(fir(x, [2, 2]), w, stride=2) if down == 2 else F.conv2d(x, w, padding=k // 2)
        return lrelu(x + p[f"{name}.bias"][:, None, None], math.sqrt(2) * scale, clamp * scale)

    scale = math.sqrt(0.5) if architecture == "resnet" else 1.0
    x = 0.0
    for r in (16, 8):
        if r == 16 or architecture == "skip":
            x = x + conv(f"b{r}.fromrgb", img)
            img = fir(img, [1, 1], down=2)
        if architecture == "resnet":
            w = p[f"b{r}.skip.weight"]
            y = F.conv2d(fir(x, [1, 1], down=2), w / math.sqrt(w.shape[1])) * scale
        x = conv(f"b{r}.conv1", conv(f"b{r}.conv0", x), down=2, scale=scale)
        if architecture == "resnet":
            x = x + y
    if architecture == "skip":
        x = x + conv("b4.fromrgb", img, clamp=math.inf)
    n = len(x)
    group = min(group, n)
    std = torch.empty(n, 1, *x.shape[2:], dtype=x.dtype)
    for start in range(n // group):
        members = x[start :: n // group]
        assert len(members) == group
        deviation = ((members - members.mean(0)).square().mean(0) + 1e-8).sqrt()
        std[start :: n // group] = deviation.mean()
    x = conv("b4.conv", torch.cat([x, std], 1))
    x = fc(p, "b4.fc", x.reshape(n, -1))
    x = fc(p, "b4.out", torch.where(x > 0, x, 0.2 * x) * math.sqrt(2))
    if c is not None:
        cmap = mapping(p, None, c)
        x = (x * cmap).sum(1, keepdim=True) / math.sqrt(cmap.shape[1])
    return x


def labels(n):
    return F.one_hot(torch.arange(n) % 5, 5).double()


@pytest.mark.parametrize("c_dim", [0, 5], ids=["plain", "conditional"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator_equals_the_literal_reference(architecture, c_dim):
    clamp = 1.5  # low, so that every clamp acts
    g = stir(make_g(architecture, c_dim, conv_clamp=clamp)).double()
    z = torch.randn(3, 10, dtype=torch.float64)
    c = labels(3) if c_dim else None
    noise = torch.randn(3, 656, dtype=torch.float64)
    assert g.synthesis.noise_size == 656
    p = g.state_dict()
    w = mapping(p, z, c)
    features = {}
    ws = p["mapping.w_avg"] + 0.7 * (w - p["mapping.w_avg"])
    expected = reference_g(p, architecture, ws[:, None].repeat(1, 6, 1), noise, clamp, features)
    close(g.mapping(z, c), w[:, None].repeat(1, 6, 1))
    close(g(z, c, truncation_psi=0.7, noise=noise), expected)

    ws = torch.randn(3, 6, 6, dtype=torch.float64)  # all different: an index in the wrong place shows
    expected = reference_g(p, architecture, ws, noise, clamp, features)
    image, got = g.synthesis(ws, noise=noise, return_features=(8, 16))
    close(image, expected)
    assert sorted(got) == [8, 16]
    close(got[8], features[8])
    close(got[16], features[16])


@pytest.mark.parametrize("c_dim", [0, 5], ids=["plain", "conditional"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_equals_the_literal_reference(architecture, c_dim):
    d = stir(make_d(architecture, c_dim, conv_clamp=0.8, mbstd_group_size=3)).double()
    img = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    c = labels(6) if c_dim else None
    close(d(img, c), reference_d(d.state_dict(), architecture, img, c, 0.8, 3))
    close(d(img[:2], None if c is None else c[:2]),
          reference_d(d.state_dict(), architecture, img[:2], None if c is None else c[:2], 0.8, 3))  # fmt: skip


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-10 * max(1, expected.abs().max())


# ---- gradients, first and second order, against finite differences in fp64


def tiny_g(architecture, c_dim=0):
    torch.manual_seed(3)
    g = Generator(2, c_dim, 3, 8, 1, mapping_layers=1, channel_base=16, channel_max=2, architecture=architecture)
    return stir(g).double()


def tiny_d(architecture, c_dim=0):
    torch.manual_seed(4)
    d = Discriminator(
        c_dim, 8, 1, mapping_layers=1, channel_base=16, channel_max=2, architecture=architecture, mbstd_group_size=2
    )
    return stir(d).double()


def as_function(net, forward):
    """(function of every parameter and the inputs, its parameters): what gradcheck wants."""
    names = [name for name, _ in net.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in net.parameters())

    def function(*tensors):
        weights = dict(zip(names, tensors, strict=False))
        return forward(lambda *args, **kw: functional_call(net, weights, args, kw), *tensors[len(names) :])

    return function, values


def wild(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator_gradients(architecture):
    noise = torch.randn(2, 144, dtype=torch.float64)
    function, values = as_function(tiny_g(architecture), lambda g, z: g(z, noise=noise))
    inputs = (*values, wild(2, 2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_gradients(architecture):
    function, values = as_function(tiny_d(architecture), lambda d, img: d(img))
    inputs = (*values, wild(2, 1, 8, 8))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_conditional_gradients():
    c = torch.eye(2, dtype=torch.float64)
    function, values = as_function(tiny_g("skip", 2), lambda g, z: g(z, c, noise_mode="const"))
    assert torch.autograd.gradcheck(function, (*values, wild(2, 2)), fast_mode=True)
    function, values = as_function(tiny_d("resnet", 2), lambda d, img: d(img, c))
    assert torch.autograd.gradgradcheck(function, (*values, wild(2, 1, 8, 8)), fast_mode=True)


@pytest.mark.parametrize("architecture", ["resnet", "orig"])
def test_gradient_penalty_of_the_discriminator(architecture):
    img = wild(2, 1, 8, 8)

    def penalty(d):
        (grad,) = torch.autograd.grad(d(img).sum(), img, create_graph=True)
        return grad.square().sum()

    function, values = as_function(tiny_d(architecture), penalty)
    assert torch.autograd.gradcheck(function, values)


def test_path_length_of_the_generator():
    torch.manual_seed(5)
    noise = torch.randn(2, 144, dtype=torch.float64)
    y = torch.randn(2, 1, 8, 8, dtype=torch.float64) / 8
    z = torch.randn(2, 2, dtype=torch.float64)
    g = tiny_g("skip")

    class PathLength(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.g = g

        def forward(self):
            ws = self.g.mapping(z, None)
            (grad,) = torch.autograd.grad((self.g.synthesis(ws, noise=noise) * y).sum(), ws, create_graph=True)
            return (grad.square().sum(2).mean(1).sqrt() - 0.1).square().mean()

    function, values = as_function(PathLength(), lambda module: module())
    assert torch.autograd.gradcheck(function, values)


# ---- modes


def test_truncation_moves_the_first_ws_only():
    g = stir(make_g())
    z = torch.randn(4, 10)
    w = g.mapping(z, None)
    average = g.mapping.w_avg
    torch.testing.assert_close(g.mapping(z, None, truncation_psi=0)[:, 0], average.expand(4, 6))
    half = g.mapping(z, None, truncation_psi=0.5, truncation_cutoff=2)
    torch.testing.assert_close(half[:, :2], average + 0.5 * (w[:, :2] - average))
    assert torch.equal(half[:, 2:], w[:, 2:])


def test_w_avg_changes_only_when_told():
    g = stir(make_g())
    before = g.mapping.w_avg.clone()
    w = g.mapping(torch.randn(4, 10), None)[:, 0]
    g(torch.randn(2, 10))
    assert torch.equal(g.mapping.w_avg, before)
    g.mapping.update_w_avg(w, 0.9)
    torch.testing.assert_close(g.mapping.w_avg, 0.9 * before + 0.1 * w.mean(0))


def test_noise_modes():
    g = stir(make_g())
    ws = g.mapping(torch.randn(2, 10), None)
    const = torch.cat([b.flatten() for n, b in g.named_buffers() if n.endswith("noise_const")])
    image = g.synthesis(ws, noise_mode="const")
    torch.testing.assert_close(image, g.synthesis(ws, noise=const.expand(2, -1)))
    none = g.synthesis(ws, noise_mode="none")
    torch.testing.assert_close(none, g.synthesis(ws, noise=torch.zeros(2, 656)))
    assert not torch.allclose(image, none)
    torch.manual_seed(0)
    first = g.synthesis(ws)
    torch.manual_seed(0)
    assert torch.equal(first, g.synthesis(ws))
    assert not torch.allclose(first, g.synthesis(ws))


def test_a_sample_does_not_depend_on_its_batch():
    g = stir(make_g()).double()
    z, noise = torch.randn(4, 10).double(), torch.randn(4, 656).double()
    whole = g(z, noise=noise)
    parts = [g(z[i : i + 2], noise=noise[i : i + 2]) for i in (0, 2)]
    close(torch.cat(parts), whole)


def test_minibatch_std_groups_are_strided():
    x = torch.zeros(6, 2, 4, 4)
    x[[0, 3]] = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)  # G = 2: groups {0, 3}, {1, 4}, {2, 5}
    y = append_minibatch_std(x, 2)
    assert torch.equal(y[:, :2], x)
    expected = torch.tensor([1, 1e-4, 1e-4, 1, 1e-4, 1e-4]).view(6, 1, 1).expand(6, 4, 4)
    torch.testing.assert_close(y[:, 2], expected)
    assert append_minibatch_std(x[:1], 4).shape == (1, 3, 4, 4)  # one sample is its own group
    with pytest.raises(ValueError, match=r"batch of 6 cannot be cut into groups of 4 \(mbstd_group_size\)"):
        append_minibatch_std(x, 4)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_parts_of_a_batch_are_scored_as_if_alone(n):
    d = stir(make_d(mbstd_group_size=4)).double()
    first, second = torch.randn(2, n, 3, 16, 16).double()
    both = d(torch.cat([first, second]), parts=2)
    close(both, torch.cat([d(first), d(second)]))
    with pytest.raises(ValueError, match="a batch of 5 cannot be cut into 2 parts"):
        append_minibatch_std(torch.zeros(5, 1, 4, 4), 4, parts=2)


def test_deepcopy_is_independent():
    g = stir(make_g())
    twin = copy.deepcopy(g)
    z, noise = torch.randn(2, 10), torch.randn(2, 656)
    before = g(z, noise=noise)
    assert torch.equal(twin(z, noise=noise), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(g(z, noise=noise), before)
    assert not twin(z, noise=noise).any()


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_activations_stay_near_fp32(architecture, dtype):
    """Forward, the error is a few roundings ε of the dtype. A gradient may be off by about √ε: rounding puts a share of
    about ε of the values on the other side of lrelu's kink, and each changes its derivative by a whole step."""
    g, d = stir(make_g(architecture)), stir(make_d(architecture))
    g_half, d_half = make_g(architecture, half_dtype=dtype), make_d(architecture, half_dtype=dtype)
    g_half.load_state_dict(g.state_dict())
    d_half.load_state_dict(d.state_dict())
    z, noise = torch.randn(4, 10), torch.randn(4, 656)
    results = []
    for net_g, net_d in ((g, d), (g_half, d_half)):
        img, features = net_g.synthesis(net_g.mapping(z, None), noise=noise, return_features=(4, 8, 16))
        logits = net_d(img)
        assert img.dtype == logits.dtype == torch.float32
        assert all(f.dtype == torch.float32 for f in features.values())
        leaf = img.detach().requires_grad_()
        (r1,) = torch.autograd.grad(net_d(leaf).sum(), leaf, create_graph=True)
        (logits.sum() + r1.square().sum()).backward()
        both = {**dict(net_g.synthesis.named_parameters()), **dict(net_d.named_parameters())}
        assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in both.values())
        results.append({"img": img.detach(), "logits": logits.detach(), "r1": r1.detach(),
                        **{f"f{r}": f.detach() for r, f in features.items()},
                        **{k: p.grad for k, p in both.items() if p.numel() > 100}})  # fmt: skip
    eps = torch.finfo(dtype).eps
    errors = {k: ((results[1][k] - v).norm() / v.norm()).item() for k, v in results[0].items()}
    assert errors["f4"] == 0  # 4×4 never computes in half precision
    assert errors["f16"] > 0
    assert max(errors[k] for k in ("img", "logits", "f8", "f16")) < 8 * eps
    assert max(errors.values()) < 4 * eps**0.5, max(errors, key=errors.get)


def test_which_resolutions_are_half():
    def half(**kwargs):
        with torch.device("meta"):
            g = Generator(channel_base=1024, half_dtype=torch.float16, **kwargs)
            d = Discriminator(channel_base=1024, half_dtype=torch.float16, **kwargs)
        of_g = [r for r in g.synthesis.resolutions if getattr(g.synthesis, f"b{r}").half_dtype]
        assert of_g == [r for r in reversed(d.resolutions) if getattr(d, f"b{r}").half_dtype]
        return of_g

    assert half(img_resolution=256) == [32, 64, 128, 256]
    assert half(img_resolution=1024, num_fp16_res=4) == [128, 256, 512, 1024]
    assert half(img_resolution=32, num_fp16_res=9) == [8, 16, 32]
    assert half(img_resolution=32, num_fp16_res=0) == []


def test_every_layer_gets_channels_last():
    """Whatever format z's or the image's tensor has; that an op keeps the format of its x is the kernels' own test."""
    seen = []

    def look(name):
        return lambda module, args: seen.append((name, args[0].is_contiguous(memory_format=torch.channels_last)))

    g, d = make_g(), make_d()
    for net in (g.synthesis, d):
        for name, module in net.named_modules():
            if type(module).__name__ in ("SynthesisLayer", "ToRGB", "Conv"):
                module.register_forward_pre_hook(look(name))
    d(g(torch.randn(4, 10)).contiguous())
    assert len(seen) == (5 + 3) + 8
    assert [name for name, ok in seen if not ok] == []


# ---- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Generator(img_resolution=100), f"img_resolution is 100, allowed: {RULE}; the nearest: 104 and 96"),
        (lambda: Discriminator(img_resolution=4), f"img_resolution is 4, allowed: {RULE}; the nearest: 8 and 10"),
        (lambda: make_g("residual"), "architecture is 'residual', but must be one of skip, orig, resnet"),
        (lambda: make_d("residual"), "architecture is 'residual', but must be one of skip, orig, resnet"),
        (lambda: make_g(channel_base=8), "channel_base 8 leaves no channel at 16×16; raise it"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with torch.device("meta"), pytest.raises(UserError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_g()(torch.zeros(2, 9)), "z must be [N, 10], got [2, 9]"),
        (lambda: make_g(c_dim=5)(torch.zeros(2, 10), torch.zeros(2, 4)),
         "labels c must be [N, 5] for this conditional network, got [2, 4]"),
        (lambda: make_g(c_dim=5)(torch.zeros(2, 10)),
         "labels c must be [N, 5] for this conditional network, got None"),
        (lambda: make_g()(torch.zeros(2, 10), torch.zeros(2, 5)),
         "this network is unconditional (c_dim 0) and takes no labels, got [2, 5]"),
        (lambda: make_g().synthesis(torch.zeros(2, 5, 6)), "ws must be [N, 6, 6], got [2, 5, 6]"),
        (lambda: make_g().synthesis(torch.zeros(2, 6, 6), noise_mode="fixed"),
         "noise_mode is 'fixed', but must be one of random, const, none"),
        (lambda: make_g().synthesis(torch.zeros(2, 6, 6), noise=torch.zeros(1, 656)),
         "noise must be [2, 656] and goes with noise_mode 'random'; got [1, 656] with 'random'"),
        (lambda: make_g().synthesis(torch.zeros(2, 6, 6), return_features=(8, 32)),
         "return_features has [32], but the blocks are at [4, 8, 16]"),
        (lambda: make_d()(torch.zeros(2, 3, 8, 8)), "img must be [N, 3, 16, 16], got [2, 3, 8, 8]"),
        (lambda: make_d(c_dim=5)(torch.zeros(2, 3, 16, 16), torch.zeros(2, 4)),
         "labels c must be [N, 5] for this conditional network, got [2, 4]"),
        (lambda: make_d()(torch.zeros(2, 3, 16, 16), torch.zeros(2, 5)),
         "this network is unconditional (c_dim 0) and takes no labels, got [2, 5]"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
