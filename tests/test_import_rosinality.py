"""Checkpoints of rosinality/stylegan2-pytorch: the images and scores that its formulas give, and what is refused."""

import argparse
import math
import re

import pytest
import torch
import torch.nn.functional as F
from network_files import load_network
from typer.testing import CliRunner

from hsrgan.engine.errors import UserError
from hsrgan.engine.import_rosinality import AVERAGED, read_rosinality
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.tools import import_weights

STYLE, LAYERS, CHANNELS = 10, 3, {4: 12, 8: 12, 16: 8}  # channel_base 128, channel_max 12


# ---- its networks, as its model.py states them, in fp64


def filter_of(gain):
    row = torch.tensor([1.0, 3, 3, 1])
    square = row[None, :] * row[:, None]
    return square / square.sum() * gain


def resample(x, kernel, up=1, down=1, pad=(0, 0)):
    """Its upfirdn2d: zeros between, zeros around, convolution (the filter is its own mirror image), every down-th."""
    n, c, h, w = x.shape
    spread = torch.zeros(n, c, h, up, w, up, dtype=x.dtype)
    spread[:, :, :, 0, :, 0] = x
    padded = F.pad(spread.reshape(n, c, h * up, w * up), (*pad, *pad))
    rows = F.conv2d(padded.flatten(0, 1)[:, None], kernel.to(x.dtype).flip(0, 1)[None, None])
    return rows.reshape(n, c, *rows.shape[2:])[:, :, ::down, ::down]


def linear(p, name, x, multiplier=1.0, active=False):
    w, b = p[f"{name}.weight"], p[f"{name}.bias"] * multiplier
    y = x @ (w * multiplier / math.sqrt(w.shape[1])).T
    return F.leaky_relu(y + b, 0.2) * 2**0.5 if active else y + b


def modulated(p, name, x, w, demodulate=True, up=False):
    images = []
    for one, style in zip(x, linear(p, f"{name}.modulation", w), strict=True):  # sample by sample
        weight = p[f"{name}.weight"][0]
        weight = weight / math.sqrt(weight[0].numel()) * style[None, :, None, None]
        if demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum((1, 2, 3), keepdim=True) + 1e-8)
        if up:
            y = F.conv_transpose2d(one[None], weight.transpose(0, 1), stride=2)
            images.append(resample(y, p[f"{name}.blur.kernel"], pad=(1, 1)))
        else:
            images.append(F.conv2d(one[None], weight, padding=weight.shape[-1] // 2))
    return torch.cat(images)


def styled(p, name, x, w, noise, up=False):
    y = modulated(p, f"{name}.conv", x, w, up=up) + p[f"{name}.noise.weight"] * noise
    return F.leaky_relu(y + p[f"{name}.activate.bias"][:, None, None], 0.2) * 2**0.5


def to_rgb(p, name, x, w, skip=None):
    y = modulated(p, f"{name}.conv", x, w, demodulate=False) + p[f"{name}.bias"]
    return y if skip is None else y + resample(skip, p[f"{name}.upsample.kernel"], up=2, pad=(2, 1))


def latents(p, z):
    w = z * torch.rsqrt(z.pow(2).mean(1, keepdim=True) + 1e-8)
    for i in range(LAYERS):
        w = linear(p, f"style.{i + 1}", w, 0.01, active=True)
    return w


def image(p, ws):
    """ws [N, n_latent, STYLE], the constant noise."""
    x = styled(p, "conv1", p["input.input"].repeat(len(ws), 1, 1, 1), ws[:, 0], p["noises.noise_0"])
    skip = to_rgb(p, "to_rgb1", x, ws[:, 1])
    for i in range(len(CHANNELS) - 1):
        x = styled(p, f"convs.{2 * i}", x, ws[:, 2 * i + 1], p[f"noises.noise_{2 * i + 1}"], up=True)
        x = styled(p, f"convs.{2 * i + 1}", x, ws[:, 2 * i + 2], p[f"noises.noise_{2 * i + 2}"])
        skip = to_rgb(p, f"to_rgbs.{i}", x, ws[:, 2 * i + 3], skip)
    return skip


def score(p, x):
    def conv(name, x, kernel=None, bias=None):
        weight = p[f"{name}.weight"]
        size = weight.shape[-1]
        y = F.conv2d(x if kernel is None else resample(x, p[kernel], pad=(size // 2 + 1,) * 2),
                     weight / math.sqrt(weight[0].numel()), stride=1 if kernel is None else 2,
                     padding=size // 2 if kernel is None else 0)  # fmt: skip
        return y if bias is None else F.leaky_relu(y + p[bias][:, None, None], 0.2) * 2**0.5

    x = conv("convs.0.0", x, bias="convs.0.1.bias")
    for i in range(1, len(CHANNELS)):
        c = f"convs.{i}"
        y = conv(f"{c}.conv1.0", x, bias=f"{c}.conv1.1.bias")
        y = conv(f"{c}.conv2.1", y, f"{c}.conv2.0.kernel", f"{c}.conv2.2.bias")
        x = (y + conv(f"{c}.skip.1", x, f"{c}.skip.0.kernel")) / math.sqrt(2)
    groups = x.view(4, -1, *x.shape[1:])  # its batch of 4·m: samples n, n + m, … together
    deviation = torch.sqrt(groups.var(0, correction=0) + 1e-8).mean((1, 2, 3))
    x = torch.cat([x, deviation.repeat(4)[:, None, None, None].expand(-1, 1, 4, 4)], 1)
    x = conv("final_conv.0", x, bias="final_conv.1.bias").flatten(1)
    return linear(p, "final_linear.1", linear(p, "final_linear.0", x, active=True))


# ---- checkpoints


def generator(seed):
    """A state dict under its names, in its order, nothing at its initial value."""
    torch.manual_seed(seed)
    state = {}

    def affine(name, inputs, outputs, scale=1.0, bias=0.0):
        state[f"{name}.weight"] = torch.randn(outputs, inputs) * scale
        state[f"{name}.bias"] = torch.randn(outputs) * 0.3 + bias

    def conv(name, inputs, outputs, size, up=False):
        state[f"{name}.weight"] = torch.randn(1, outputs, inputs, size, size)
        if up:
            state[f"{name}.blur.kernel"] = filter_of(4)
        affine(f"{name}.modulation", STYLE, inputs, bias=1.0)

    def layer(name, inputs, outputs, up=False):
        conv(f"{name}.conv", inputs, outputs, 3, up)
        state[f"{name}.noise.weight"] = torch.randn(1)
        state[f"{name}.activate.bias"] = torch.randn(outputs)

    def colour(name, inputs, up=True):
        state[f"{name}.bias"] = torch.randn(1, 3, 1, 1)
        if up:
            state[f"{name}.upsample.kernel"] = filter_of(4)
        conv(f"{name}.conv", inputs, 3, 1)

    for i in range(LAYERS):
        affine(f"style.{i + 1}", STYLE, STYLE, 100.0)
    state["input.input"] = torch.randn(1, CHANNELS[4], 4, 4)
    layer("conv1", CHANNELS[4], CHANNELS[4])
    colour("to_rgb1", CHANNELS[4], up=False)
    for i, r in enumerate(list(CHANNELS)[1:]):
        layer(f"convs.{2 * i}", CHANNELS[r // 2], CHANNELS[r], up=True)
        layer(f"convs.{2 * i + 1}", CHANNELS[r], CHANNELS[r])
        colour(f"to_rgbs.{i}", CHANNELS[r])
    for i, r in enumerate((4, 8, 8, 16, 16)):
        state[f"noises.noise_{i}"] = torch.randn(1, 1, r, r)
    return state


def discriminator():
    torch.manual_seed(3)
    state = {"convs.0.0.weight": torch.randn(8, 3, 1, 1), "convs.0.1.bias": torch.randn(8)}
    for i, r in enumerate((16, 8)):
        a, b, c = CHANNELS[r], CHANNELS[r // 2], f"convs.{i + 1}"
        state |= {
            f"{c}.conv1.0.weight": torch.randn(a, a, 3, 3), f"{c}.conv1.1.bias": torch.randn(a),
            f"{c}.conv2.0.kernel": filter_of(1), f"{c}.conv2.1.weight": torch.randn(b, a, 3, 3),
            f"{c}.conv2.2.bias": torch.randn(b), f"{c}.skip.0.kernel": filter_of(1),
            f"{c}.skip.1.weight": torch.randn(b, a, 1, 1),
        }  # fmt: skip
    state |= {"final_conv.0.weight": torch.randn(12, 13, 3, 3), "final_conv.1.bias": torch.randn(12)}
    for i, (inputs, outputs) in enumerate(((192, 12), (12, 1))):
        state[f"final_linear.{i}.weight"] = torch.randn(outputs, inputs)
        state[f"final_linear.{i}.bias"] = torch.randn(outputs)
    return state


def checkpoint(**more):
    return {"g_ema": generator(1), "g": generator(2), "d": discriminator(), "latent_avg": torch.randn(STYLE), **more}


def double(state):
    return {key: value.double() for key, value in state.items()}


def run(*arguments):
    return CliRunner().invoke(import_weights.app, ["stylegan", *map(str, arguments)])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "former format"])
def test_images_and_scores_are_those_of_its_formulas(tmp_path, zipped):
    content = checkpoint(args=argparse.Namespace(size=16, iter=800000), ada_aug_p=0.1, g_optim={"state": {}})
    file, out = tmp_path / "550000.pt", tmp_path / "out.safetensors"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    result = run(file, out, "--all")
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "550000.pt is rosinality" in said and "not imported: args, ada_aug_p, g_optim" in said
    assert f"z_dim {STYLE}, c_dim 0, w_dim {STYLE}, img_resolution 16, img_channels 3, mapping_layers 3" in said
    assert "channel_base 128, channel_max 12, num_fp16_res 0, conv_clamp None" in said

    torch.manual_seed(7)
    z, ws = torch.randn(3, STYLE), torch.randn(3, 6, STYLE)  # ws all different: an index in the wrong place shows
    averaged, trained = load_snapshot(out)[0], load_network(tmp_path / "out.G.safetensors", "G")
    for net, state in ((averaged, content["g_ema"]), (trained, content["g"])):
        p = double(state)
        with torch.no_grad():
            expected = image(p, ws.double())
            assert (net.synthesis(ws, noise_mode="const") - expected).abs().max() < 1e-5 < expected.std()
            w = content["latent_avg"] + 0.6 * (latents(p, z.double()) - content["latent_avg"])
            expected = image(p, w[:, None].repeat(1, 6, 1))
            assert (net(z, truncation_psi=0.6, noise_mode="const") - expected).abs().max() < 1e-5
    d, x = load_network(tmp_path / "out.D.safetensors", "D"), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        expected = score(double(content["d"]), x.double())
        assert (d(x) - expected).abs().max() < 1e-5 < expected.std()


def test_without_all_only_the_averaged_generator_is_written(tmp_path):
    torch.save(checkpoint(), tmp_path / "a.pt")
    result = run(tmp_path / "a.pt", tmp_path / "out.safetensors")
    assert result.exit_code == 0 and "not imported: G, D" in result.stdout
    assert [p.name for p in tmp_path.glob("out*")] == ["out.safetensors"]


def test_a_file_without_latent_avg_and_noise_gets_them_from_seed_0_and_says_so(tmp_path):
    content = {"g_ema": {k: v for k, v in generator(1).items() if not k.startswith("noises.")}}
    torch.save(content, tmp_path / "a.pt")
    found = read_rosinality(tmp_path / "a.pt")
    again = read_rosinality(tmp_path / "a.pt").networks["G_ema"].state
    state = found.networks["G_ema"].state
    assert all(torch.equal(state[key], again[key]) for key in state)
    z = torch.randn(AVERAGED, STYLE, generator=torch.Generator().manual_seed(0))
    expected = latents(double(content["g_ema"]), z.double()).mean(0)
    assert (state["mapping.w_avg"] - expected).abs().max() < 1e-5
    assert state["synthesis.b16.conv1.noise_const"].std() > 0.5
    assert not torch.equal(state["synthesis.b16.conv1.noise_const"], state["synthesis.b16.conv0.noise_const"])
    assert len(found.notes) == 2 and "no constant noise" in found.notes[0] and "no latent_avg" in found.notes[1]


def g(**more):
    return lambda: {"g_ema": {**generator(1), **more}}


def g_without(*keys):
    return lambda: {"g_ema": {k: v for k, v in generator(1).items() if k not in keys}}


@pytest.mark.parametrize(("content", "says"), [
    (lambda: generator(1), "is no dict with a g_ema"),
    (lambda: [1, 2], "is no dict with a g_ema"),
    (lambda: {"g_ema": {"a": 3}}, "its g_ema is no state dict of tensors: a is 3"),
    (g_without("conv1.noise.weight", "convs.0.conv.weight"), r"lacks 2 of 53 tensors, first convs\.0\.conv\.weight"),
    (g_without("noises.noise_3"), r"lacks 1 of \d+ tensors, first noises\.noise_3"),
    (g(more=torch.zeros(1)), "1 tensors are none of the model's, first more"),
    (g(**{"conv1.conv.weight": torch.zeros(2, 12, 12, 3, 3)}), r"conv1\.conv\.weight of its g_ema is \[2, 12, 12, 3"),
    (g(**{"convs.2.conv.blur.kernel": filter_of(1)}), r"convs\.2\.conv\.blur\.kernel of its g_ema is not the \[1, 3"),
    (g(**{"to_rgbs.0.upsample.kernel": torch.ones(2, 2)}), r"to_rgbs\.0\.upsample\.kernel of its g_ema is not the"),
    (g(**{"conv1.activate.bias": torch.full((12,), torch.nan)}), r"conv1\.bias of its G_ema holds values that"),
    (g(**{"convs.1.activate.bias": torch.zeros(13)}), r"b8\.conv1\.bias is \[13\] there and \[12\] here"),
    (g(**{"style.2.weight": torch.zeros(1).expand(10, 10)}), r"style\.2\.weight of its g_ema declares more values"),
    (lambda: {"g_ema": generator(1), "latent_avg": 3}, "its latent_avg is 3, not a tensor"),
    (lambda: {"g_ema": generator(1), "latent_avg": torch.zeros(9)}, r"w_avg is \[9\] there and \[10\] here"),
])  # fmt: skip
def test_what_is_not_its_network_is_one_line(tmp_path, content, says):
    torch.save(content(), tmp_path / "a.pt")
    result = run(tmp_path / "a.pt", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.stderr
    assert re.search(says, result.stderr), result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_a_wrong_discriminator_is_refused_where_it_is_wanted(tmp_path):
    content = checkpoint()
    del content["d"]["final_conv.1.bias"]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"its d is not rosinality's .* lacks 1 of \d+ tensors, first final_conv"):
        read_rosinality(tmp_path / "a.pt", every=True)
    assert run(tmp_path / "a.pt", tmp_path / "out.safetensors", "--all").exit_code == 2
    assert not list(tmp_path.glob("out*"))
