"""Pickles of StyleGAN2-ADA, StyleGAN3 --cfg=stylegan2 and HSR: what comes in, bit for bit, and what it computes."""

import json
import re

import pytest
import stylegan_pickles as pickles
import torch
from literal_networks import mapping, reference_g
from network_files import load_network
from safetensors import safe_open
from small_networks import labels, make_d, make_g, stir
from typer.testing import CliRunner

from hsrgan.engine.errors import UserError
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.import_stylegan import read_stylegan
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.tools import import_weights

PRECISION = {"num_fp16_res": 2, "conv_clamp": 1.5}  # low, so that every clamp acts
WIDTHS = {"channel_base": 128, "channel_max": 12}


def run(*arguments):
    return CliRunner().invoke(import_weights.app, ["stylegan", *map(str, arguments)])


def line(result):
    """The one line of a user's mistake."""
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def write(path, value, **options):
    path.write_bytes(pickles.dumps(value, **options))
    return path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def networks(architecture="skip", c_dim=0, **more):
    g_ema = stir(make_g(architecture, c_dim, **PRECISION, **more))
    g = stir(stir(make_g(architecture, c_dim, **PRECISION, **more)))  # makers seed alike
    of_d = "resnet" if architecture == "skip" else architecture
    return g, g_ema, stir(make_d(of_d, c_dim, mbstd_group_size=3, **PRECISION))


def expected_image(state, z, c, noise, architecture, psi, clamp):
    """The literal reading of StyleGAN2 in fp64."""
    p = {key: value.double() for key, value in state.items()}
    w = mapping(p, z.double(), None if c is None else c.double())
    w = p["mapping.w_avg"] + psi * (w - p["mapping.w_avg"])
    return reference_g(p, architecture, w[:, None].repeat(1, 6, 1), noise.double(), clamp)


@pytest.mark.parametrize(("style", "architecture", "c_dim", "protocol"), [
    ("ada", "skip", 0, 3), ("ada", "resnet", 5, 4), ("sg3", "skip", 5, 4), ("sg3", "orig", 0, 5),
])  # fmt: skip
def test_a_pickle_comes_in_bit_for_bit_and_computes_the_published_image(tmp_path, style, architecture, c_dim, protocol):
    g, g_ema, d = networks(architecture, c_dim)
    mark = tmp_path / "executed"
    source = f"open({str(mark)!r}, 'w')"
    file = write(tmp_path / "network-snapshot-000240.pkl", pickles.content(
        pickles.generator(g_ema, style, source), G=pickles.generator(g, style, source),
        D=pickles.discriminator(d, source, architecture=d_architecture(d), **WIDTHS, **PRECISION),
    ), protocol=protocol)  # fmt: skip
    out = tmp_path / "out.safetensors"
    result = run(file, out, "--all")
    assert result.exit_code == 0, result.stderr
    assert not mark.exists()
    with pickles.their_modules():  # that the source does what it is feared for
        pickles._reconstruct_persistent_obj({"module_src": source})
    assert mark.exists()

    imported, metadata = load_snapshot(out)
    assert imported.init_kwargs == g_ema.init_kwargs and same(imported.state_dict(), g_ema.state_dict())
    assert metadata["kimg"] == 240 and metadata["recipe"]["imported"]["file"] == file.name
    again = load_network(tmp_path / "out.G.safetensors", "G")
    assert isinstance(again, Generator) and again.init_kwargs == g.init_kwargs
    assert same(again.state_dict(), g.state_dict()) and not same(again.state_dict(), g_ema.state_dict())
    again = load_network(tmp_path / "out.D.safetensors", "D")
    assert isinstance(again, Discriminator) and same(again.state_dict(), d.state_dict())
    image, label = torch.randn(6, 3, 16, 16), labels(6).float() if c_dim else None
    assert torch.equal(again(image, label), d(image, label))  # group size, clamp and architecture too

    torch.manual_seed(5)
    z, noise, c = torch.randn(3, 10), torch.randn(3, 656), labels(3).float() if c_dim else None
    expected = expected_image(g_ema.state_dict(), z, c, noise, architecture, 0.7, PRECISION["conv_clamp"])
    got = imported(z, c, truncation_psi=0.7, noise=noise)
    assert (got - expected).abs().max() < 1e-5 and expected.std() > 0.1
    assert (imported(z, c, truncation_psi=1, noise=noise) - expected).abs().max() > 1e-2


def d_architecture(d):
    return "orig" if d.b16.skip is None else "resnet"


def test_what_is_read_is_said(tmp_path):
    g, g_ema, d = networks(c_dim=5)
    pipe = pickles.module("AugmentPipe", "", {})
    file = write(tmp_path / "mine.pkl", pickles.content(
        pickles.generator(g_ema), G=pickles.generator(g), augment_pipe=pipe,
        D=pickles.discriminator(d, **WIDTHS, **PRECISION)))  # fmt: skip
    out = tmp_path / "out.safetensors"
    result = run(file, out)
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.pkl", "out.safetensors"]
    said = " ".join(result.stdout.split())
    assert "mine.pkl is stylegan2-ada-pytorch; kimg not stated in the file (0 is written)" in said
    assert "c_dim 5, w_dim 6, img_resolution 16, img_channels 3, mapping_layers 2, architecture skip" in said
    assert "not imported: augment_pipe, training_set_kwargs, G, D" in said


def test_what_the_constructor_was_not_told_is_each_class_own_default(tmp_path):
    net = make_g()
    for style, precision in (("ada", (0, None)), ("sg3", (4, 256))):
        kwargs = pickles.kwargs_of_g(net, style)
        for key in ("num_fp16_res", "conv_clamp", "architecture"):
            kwargs.get("synthesis_kwargs", kwargs).pop(key)
        file = write(tmp_path / "a.pkl", pickles.content(pickles.generator(net, style, kwargs=kwargs)))
        found = read_stylegan(file)
        told = found.networks["G_ema"].constructor
        assert (told["num_fp16_res"], told["conv_clamp"], told["architecture"]) == (*precision, "skip")
        assert found.kind.startswith("stylegan3" if style == "sg3" else "stylegan2-ada")
        assert {k: told[k] for k in ("channel_base", "channel_max")} == WIDTHS  # not what shapes alone would say
    assert Generator(**told).init_kwargs == told


def test_positional_arguments_are_read_by_the_published_order(tmp_path):
    net = stir(make_g(**PRECISION))
    top = pickles.generator(net)
    kwargs = top.meta["state"]["_init_kwargs"]
    top.meta["state"]["_init_args"] = tuple(kwargs.pop(k) for k in ("z_dim", "c_dim", "w_dim", "img_resolution"))
    found = read_stylegan(write(tmp_path / "a.pkl", pickles.content(top)))
    assert found.networks["G_ema"].constructor == net.init_kwargs
    top.meta["state"]["_init_args"] = (10, 0, 6, 32)
    with pytest.raises(UserError, match="says img_resolution 32, but its tensors say 16"):
        read_stylegan(write(tmp_path / "a.pkl", pickles.content(top)))


def change(**more):
    def kwargs(g):
        result = pickles.kwargs_of_g(g, "sg3")
        return {**result, **{k: v(result) if callable(v) else v for k, v in more.items()}}

    return kwargs


@pytest.mark.parametrize(("kwargs", "says"), [
    (change(z_dim=11), "G_ema says z_dim 11, but its tensors say 10"),
    (change(c_dim=3), "says c_dim 3, but its tensors say 0"),
    (change(img_channels=4), "says img_channels 4, but its tensors say 3"),
    (change(mapping_kwargs={"num_layers": 8}), "says mapping_layers 8, but its tensors say 2"),
    (change(architecture="orig"), "says architecture orig, but its tensors say skip"),
    (change(channel_base=64), "says channel_base 64, but its tensors say 128"),
    (change(channel_max="many"), "has channel_max many, not a whole number from 1"),
    (change(num_fp16_res=-1), "has num_fp16_res -1, not a whole number from 0"),
    (change(conv_clamp=float("nan")), "has conv_clamp nan, not a number above 0"),
    (change(activation="relu"), "has activation relu; only lrelu is computed here"),
    (change(mapping_kwargs={"lr_multiplier": 1}), "has lr_multiplier 1; only 0.01 is computed here"),
    (change(mapping_kwargs=7), "has mapping_kwargs 7, not a dict"),
    (change(use_noise=False), "has use_noise False; only True"),
    (change(resample_filter=[1, 2, 1]), r"has resample_filter a list; only \[1, 3, 3, 1\]"),
    (change(attention=True), "has an argument attention, which StyleGAN2's networks have not"),
])  # fmt: skip
def test_arguments_that_contradict_the_tensors_are_refused(tmp_path, kwargs, says):
    net = make_g()
    file = write(tmp_path / "a.pkl", pickles.content(pickles.generator(net, "sg3", kwargs=kwargs(net))))
    assert re.search(says, line(run(file, tmp_path / "out.safetensors")))
    assert not (tmp_path / "out.safetensors").exists()


def without(*keys):
    return lambda state: {k: v for k, v in state.items() if k not in keys}


@pytest.mark.parametrize(("damage", "says"), [
    (without("synthesis.b8.conv0.bias", "mapping.w_avg"), r"lacks 2 of 56 tensors, first synthesis\.b8\.conv0\.bias"),
    (lambda s: {**s, "more.a": torch.zeros(1), "more.b": torch.zeros(1)}, "2 tensors are none of the model's, first m"),
    (lambda s: {**s, "synthesis.b8.conv0.bias": torch.zeros(11), "synthesis.b8.torgb.bias": torch.zeros(4)},
     r"conv0\.bias is \[11\] there and \[12\] here \(and 1 more differ\)"),
    (without("synthesis.b4.conv1.weight"), r"lacks synthesis\.b4\.conv1\.weight"),
    (lambda s: {k: v for k, v in s.items() if ".b8." not in k}, r"has blocks at \[4, 16\], not at 4, 8"),
    (lambda s: {**s, "mapping.w_avg": torch.full((6,), torch.inf)}, "w_avg of its G_ema holds values that are no fin"),
    (lambda s: {**s, "mapping.w_avg": torch.zeros(6, dtype=torch.int64)}, "w_avg of its G_ema is torch.int64"),
    (lambda s: {**s, "synthesis.b8.resample_filter": torch.ones(4, 4)}, r"resample_filter .* not the \[1, 3, 3, 1\]"),
    (lambda s: {**s, "synthesis.b16.conv1.weight": torch.zeros(13, 8, 3, 3)}, "no min.channel_base / r, channel_max"),
], ids=["missing", "extra", "shape", "no conv", "no block", "inf", "int", "filter", "width"])  # fmt: skip
def test_tensors_that_are_not_the_network_are_one_line(tmp_path, damage, says):
    net = make_g()
    top = pickles.generator(net, state=damage(net.state_dict()))
    file = write(tmp_path / "a.pkl", pickles.content(top))
    said = line(run(file, tmp_path / "out.safetensors"))
    assert re.search(says, said), said
    assert not (tmp_path / "out.safetensors").exists()


def hsr_content(net, heads, **others):
    theirs = {}
    for i, r in enumerate(heads.resolutions):
        for key, value in heads.heads[str(r)].state_dict().items():
            theirs[f"synthesis.feat_transfer_list.{i}.{key}"] = value
        for conv in ("conv1x1_1", "conv1x1_2"):
            theirs[f"synthesis.feat_transfer_list.{i}.{conv}.resample_filter"] = net.synthesis.b8.resample_filter
    kwargs = pickles.kwargs_of_g(net, "ada")
    kwargs["synthesis_kwargs"]["pred_feat_dims"] = [7] * 4
    return pickles.content(pickles.generator(net, kwargs=kwargs, state={**net.state_dict(), **theirs}), **others)


def test_hsr_heads_are_imported_or_said_to_be_left_out(tmp_path):
    net = stir(make_g(channel_base=512))
    heads = stir(HSRHeads({8: 12, 16: 12}, {8: 7, 16: 9}, hidden=5))
    file, out = write(tmp_path / "hsr.pkl", hsr_content(net, heads)), tmp_path / "out.safetensors"
    result = run(file, out)
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "hsr.pkl is HSR" in said and "predictor heads at 8, 16" in said and "G (not in the file)" in said
    assert same(load_snapshot(out)[0].state_dict(), net.state_dict())
    assert [p.name for p in tmp_path.glob("out*")] == ["out.safetensors"]

    result = run(file, out, "--all")
    assert result.exit_code == 0 and "predictor heads" not in result.stdout
    again = load_network(tmp_path / "out.heads.safetensors", "heads")
    assert again.resolutions == (8, 16) and same(again.state_dict(), heads.state_dict())


def test_the_unused_layer_of_hsr_control_arm_is_left_out_aloud(tmp_path):
    net = make_g()
    more = {"synthesis.feat_transfer.weight": torch.zeros(5, 7, 1, 1), "synthesis.feat_transfer.bias": torch.zeros(5)}
    file = write(tmp_path / "a.pkl", pickles.content(pickles.generator(net, state={**net.state_dict(), **more})))
    found = read_stylegan(file)
    assert "G_ema.synthesis.feat_transfer" in found.dropped and found.kind == "HSR"


def test_stylegan3_t_and_tensorflow_are_recognised_and_refused(tmp_path):
    state = {"synthesis.input.weight": torch.zeros(4, 4), "synthesis.L0_36_12.weight": torch.zeros(4, 4, 1, 1)}
    file = write(tmp_path / "t.pkl", pickles.content(pickles.generator(make_g(), "sg3", state=state)))
    said = line(run(file, tmp_path / "out.safetensors"))
    assert "StyleGAN3 (config t or r), whose layers are not StyleGAN2's" in said
    (tmp_path / "tf.pkl").write_bytes(b"\x80\x03cdnnlib.tflib.network\nNetwork\n)\x81.")
    assert "is a StyleGAN of TensorFlow (dnnlib.tflib.network.Network); convert it" in line(
        run(tmp_path / "tf.pkl", tmp_path / "out.safetensors"))  # fmt: skip


def test_names_of_files(tmp_path):
    file = write(tmp_path / "a.pkl", pickles.content(pickles.generator(make_g())))
    assert "must end in .safetensors" in line(run(file, tmp_path / "out.pkl"))
    assert "No such file" in line(run(tmp_path / "absent.pkl", tmp_path / "out.safetensors"))
    assert "cannot write" in line(run(file, tmp_path / "absent/out.safetensors"))
    assert "name another one to write" in line(run(tmp_path / "a.safetensors", tmp_path / "a.safetensors"))
    assert "Is a directory" in line(run(tmp_path, tmp_path / "out.safetensors"))
    (tmp_path / "walk.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    assert "it is no pickle, or a damaged one" in line(run(tmp_path / "walk.mp4", tmp_path / "out.safetensors"))


def test_a_network_file_says_what_it_is(tmp_path):
    file = write(tmp_path / "a.pkl", pickles.content(pickles.generator(make_g()), G=pickles.generator(make_g())))
    assert run(file, tmp_path / "out.safetensors", "--all").exit_code == 0
    with safe_open(tmp_path / "out.G.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["network"]) == ("hsrgan-network-1", "G")
    assert json.loads(metadata["source"])["kind"] == "stylegan2-ada-pytorch"
    assert json.loads(metadata["constructor"])["z_dim"] == 10
    assert load_snapshot(tmp_path / "out.safetensors")[1]["kimg"] == 0
