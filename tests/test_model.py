"""Generator and discriminator: keys, counts, initialisation, modes, half precision, errors."""

import copy
import json
import math

import pytest
import torch
from small_networks import ARCHITECTURES, close, make_d, make_g, one_thread, stir  # noqa: F401  (a fixture)

from hsrgan.engine.errors import UserError
from hsrgan.engine.layers import append_minibatch_std
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.sizes import RULE

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
