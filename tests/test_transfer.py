"""init_from: what is carried out of another run's networks, and that these then compute what those did."""

import copy
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hsrgan.engine import checkpoint, transfer
from hsrgan.engine.errors import UserError
from hsrgan.engine.hsr import HSRHeads
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.engine.projected import ProjectedHeads, VisionAidedHeads
from hsrgan.engine.run_state import GeneratorWithHeads
from hsrgan.engine.snapshot import save_snapshot

WIDTHS = {"channel_base": 64, "channel_max": 8}
LATENT = {"z_dim": 6, "w_dim": 8, "mapping_layers": 2}
CLASSES = ("ant", "bee", "cow")


def networks(seed, *, heads=(), latent=LATENT, **shape):
    """G with heads, D and G_ema; every tensor that training moves is random, G_ema is not G."""
    torch.manual_seed(seed)
    shape = {"img_resolution": 16, **WIDTHS, **shape}
    g, d = Generator(**latent, **shape), Discriminator(**shape, mapping_layers=2)
    g_module = GeneratorWithHeads(g, HSRHeads(dict.fromkeys(heads, 8), dict.fromkeys(heads, 5), 7) if heads else None)
    ema = copy.deepcopy(g)
    for module in (g_module, d, ema):
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for module in (g, ema):
        module.mapping.w_avg.normal_()
    return {"G": g_module, "D": d, "G_ema": ema}


def state(module):
    return {transfer.published(key): value.clone() for key, value in module.state_dict().items()}


def saved(folder: Path, nets, classes=()) -> str:
    """A checkpoint of these networks; its Adams are empty."""
    parts = {name: module.state_dict() for name, module in nets.items()} | {"G_adam": {}, "D_adam": {}}
    checkpoint.write_folder(folder, checkpoint._files(parts, {"format": checkpoint.FORMAT, "class_names": classes}))
    return str(folder)


def snapshot_of(path: Path, generator, classes=()) -> str:
    save_snapshot(path, generator, recipe_json="{}", kimg=1.0, dataset={"class_names": classes})
    return str(path)


def network_file(path: Path, module, network: str) -> str:
    tensors = {key: value.contiguous().clone() for key, value in module.state_dict().items()}
    save_file(tensors, path, {"format": transfer.FORMAT, "network": network, "constructor": "{}"})
    return str(path)


def start(init_from, nets, classes=()):
    return transfer.start_from(init_from, nets["G"], nets["D"], nets["G_ema"], classes)


def images(generator, labels=None, seed=5, n=1):
    torch.manual_seed(seed)
    z = torch.randn(n, generator.z_dim)
    c = None if labels is None else torch.eye(generator.c_dim)[labels].expand(n, -1)
    with torch.no_grad():
        return generator(z, c, noise_mode="none")


def logits(discriminator, img, label=None):
    c = None if label is None else torch.eye(discriminator.c_dim)[label][None]
    with torch.no_grad():
        return discriminator(img, c)


def same_function(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


CHANGES = {
    "the same": ({}, {}),
    "16 → 32": ({}, {"img_resolution": 32}),
    "32 → 16": ({"img_resolution": 32}, {}),
    "labels 0 → 3": ({}, {"c_dim": 3}),
    "labels 3 → 0": ({"c_dim": 3}, {}),
    "labels 3 → 5": ({"c_dim": 3}, {"c_dim": 5}),
    "wider": ({}, {"channel_base": 128, "channel_max": 12}),
    "narrower": ({"channel_base": 128, "channel_max": 12}, {}),
    "RGB → RGBA": ({}, {"img_channels": 4}),
    "RGB → grey": ({}, {"img_channels": 1}),
    "D orig, G resnet": ({}, {"architecture": "resnet"}),
    "z, w and depth": ({"c_dim": 3}, {"c_dim": 3, "latent": {"z_dim": 9, "w_dim": 5, "mapping_layers": 3}}),
    "heads": ({"heads": (8, 16)}, {"heads": (8,)}),
    "everything": (
        {"c_dim": 3, "heads": (8,)},
        {"img_resolution": 32, "c_dim": 4, "channel_base": 128, "channel_max": 12, "img_channels": 1, "heads": (16,)},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_tensor_of_either_side_is_told_once_and_rightly(tmp_path, change):
    there, here = (networks(seed, **shape) for seed, shape in enumerate(CHANGES[change]))
    before = {name: state(module) for name, module in here.items()}
    report = start(saved(tmp_path / "1", there), here)
    for network in transfer.NETWORKS:
        old, was, now = state(there[network]), before[network], state(here[network])
        fates = {fate.tensor: fate for fate in report.fates if fate.network == network}
        told = Counter(fate.tensor for fate in report.fates if fate.network == network)
        assert told == Counter(old.keys() | was.keys())
        for key, fate in fates.items():
            there_shape, here_shape = (list(side[key].shape) if key in side else None for side in (old, was))
            assert (fate.there, fate.here) == (there_shape, here_shape)
            if fate.what == "loaded":
                assert torch.equal(now[key], old[key]) and fate.count == now[key].numel() and not fate.why, key
            elif fate.what == "new":
                assert torch.equal(now[key], was[key]) and fate.count == now[key].numel() and fate.why, key
            elif fate.what == "dropped":
                assert key not in now and fate.count == old[key].numel() and fate.why, key
            else:
                changed = not torch.equal(now[key], was[key]) and not torch.equal(was[key], old[key])
                assert fate.what == "partly" and changed and 0 < fate.count <= now[key].numel() and fate.why, key
    if change == "the same":
        assert {fate.what for fate in report.fates} == {"loaded"}


def fates(report, network, what):
    return {fate.tensor for fate in report.fates if (fate.network, fate.what) == (network, what)}


def of_block(module, *starts):
    return {key for key in state(module) if key.startswith(starts)}


def test_a_higher_resolution_has_the_low_blocks_to_the_last_bit(tmp_path):
    there, here = networks(0), networks(1, img_resolution=32)
    report = start(saved(tmp_path / "1", there), here)
    for network in ("G", "G_ema"):
        assert fates(report, network, "new") == of_block(here[network], "synthesis.b32.")
        assert not fates(report, network, "partly") and not fates(report, network, "dropped")
    assert fates(report, "D", "new") == of_block(here["D"], "b32.")
    assert fates(report, "D", "dropped") == of_block(there["D"], "b16.fromrgb.") and not fates(report, "D", "partly")
    ws = torch.randn(2, 8)
    with torch.no_grad():
        features = [
            net.synthesis(ws[:, None].expand(-1, net.num_ws, -1), noise_mode="const", return_features=(4, 8, 16))[1]
            for net in (there["G_ema"], here["G_ema"])
        ]
    assert all(torch.equal(features[0][r], features[1][r]) for r in (4, 8, 16))
    torch.manual_seed(5)
    z = torch.randn(2, 6)
    assert torch.equal(there["G_ema"].mapping(z, None)[:, 0], here["G_ema"].mapping(z, None)[:, 0])


def test_a_lower_resolution_has_its_blocks_to_the_last_bit(tmp_path):
    there, here = networks(0, img_resolution=32), networks(1)
    report = start(saved(tmp_path / "1", there), here)
    for network in ("G", "G_ema"):
        assert fates(report, network, "dropped") == of_block(there[network], "synthesis.b32.")
        assert not fates(report, network, "partly") and not fates(report, network, "new")
    assert fates(report, "D", "dropped") == of_block(there["D"], "b32.")
    assert fates(report, "D", "new") == of_block(here["D"], "b16.fromrgb.") and not fates(report, "D", "partly")


def test_wider_networks_start_as_the_functions_that_the_narrow_ones_were(tmp_path):
    there, here = networks(0), networks(1, channel_base=128, channel_max=12)
    start(saved(tmp_path / "1", there), here)
    for a, b in ((there["G"].generator, here["G"].generator), (there["G_ema"], here["G_ema"])):
        assert same_function(images(a), images(b)) and images(a).std() > 0.1
        conv, old = (net.synthesis.b8.conv1.weight for net in (b, a))  # demodulated: no factor
        assert torch.equal(conv[:8, :8], old) and not conv[:8, 8:].any()
    img = torch.randn(1, 3, 16, 16)  # alone: minibatch std, which sees new channels, is that of one image
    assert same_function(logits(there["D"], img), logits(here["D"], img))


def test_a_wider_network_trains_in_all_its_channels(tmp_path):
    """Weights of 0 are left by the first step; what feeds them follows."""
    there, here = networks(0), networks(1, channel_base=128, channel_max=12)
    start(saved(tmp_path / "1", there), here)
    g = here["G"].generator
    adam, first = torch.optim.Adam(g.parameters(), lr=0.01), state(g)
    for seed in range(2):
        torch.manual_seed(seed)
        adam.zero_grad()
        g(torch.randn(4, 6)).square().mean().backward()
        adam.step()
    still = [key for key, p in g.named_parameters() if (p.detach() == first[key].reshape(p.shape)).any()]
    assert not still


def test_a_wider_resnet_generator_and_skip_discriminator_too(tmp_path):
    for architecture, parts in (("resnet", "G"), ("skip", "D")):
        there, here = (networks(i, architecture=architecture, **wide) for i, wide in
                       enumerate(({}, {"channel_base": 128, "channel_max": 12})))  # fmt: skip
        start(saved(tmp_path / architecture, there), here)
        img = torch.randn(1, 3, 16, 16)
        if parts == "G":
            assert same_function(images(there["G_ema"]), images(here["G_ema"]))
        assert same_function(logits(there["D"], img), logits(here["D"], img))


def test_a_narrower_network_has_the_first_channels_as_they_were(tmp_path):
    there, here = networks(0, channel_base=128, channel_max=12), networks(1)
    start(saved(tmp_path / "1", there), here)
    g_there, g_here = state(there["G_ema"]), state(here["G_ema"])
    for key in ("b8.conv0.weight", "b8.torgb.weight", "b4.const", "b8.conv1.bias"):
        key = f"synthesis.{key}"
        now = g_here[key]
        assert torch.equal(now, g_there[key][tuple(slice(n) for n in now.shape)]), key
    conv, old = here["D"].b4.conv.weight, there["D"].b4.conv.weight
    assert torch.equal(conv[:, :-1], old[:8, :8]) and torch.equal(conv[:, -1], old[:8, -1])  # minibatch std stays last
    fc, old = (net["D"].b4.fc.weight.unflatten(1, (-1, 16)) for net in (here, there))
    assert torch.equal(fc, old[:8, :8])


def test_labels_start_without_effect(tmp_path):
    """0 → 3 classes: whatever the label, G's images are the unconditional ones; the latent half of fc0 is loaded."""
    there, here = networks(0), networks(1, c_dim=3)
    report = start(saved(tmp_path / "1", there), here)
    for label in range(3):
        assert same_function(images(there["G_ema"]), images(here["G_ema"], label))
    assert fates(report, "G", "partly") == {"mapping.fc0.weight"}
    assert fates(report, "G", "new") == {"mapping.embed.weight", "mapping.embed.bias"}
    assert fates(report, "D", "new") == of_block(here["D"], "mapping.", "b4.out.")


def test_labels_are_matched_by_name(tmp_path):
    """A class that both have keeps its images and its logits, wherever it stands among the others."""
    names = ("cow", "dog", "elk", "bee")
    there, here = networks(0, c_dim=3), networks(1, c_dim=4)
    initial = here["G_ema"].mapping.embed.weight.detach().clone()
    report = start(saved(tmp_path / "1", there, CLASSES), here, names)
    for name in ("bee", "cow"):
        old, new = CLASSES.index(name), names.index(name)
        img = images(there["G_ema"], old)
        assert same_function(img, images(here["G_ema"], new))
        assert same_function(logits(there["D"], img, old), logits(here["D"], img, new))
    assert torch.equal(here["G_ema"].mapping.embed.weight[:, 1:3], initial[:, 1:3])
    whys = {fate.why for fate in report.fates if fate.tensor == "mapping.embed.weight"}
    assert whys == {"2 of 4 classes, by name, from 3, times √(4/3)"}


@pytest.mark.parametrize(
    ("there", "here", "carried"),
    [
        (CLASSES, CLASSES, [0, 1, 2]),
        (CLASSES, CLASSES[::-1], [2, 1, 0]),
        ((), CLASSES, [0, 1, 2]),  # nobody knows: by position
        (CLASSES, ("x", "y", "z"), None),
        (("a", "a", "b"), CLASSES, [0, 1, 2]),  # no names to tell classes by
    ],
)
def test_as_many_labels(tmp_path, there, here, carried):
    old, new = networks(0, c_dim=3), networks(1, c_dim=3)
    initial = new["G_ema"].mapping.embed.weight.detach().clone()
    start(snapshot_of(tmp_path / "s.safetensors", old["G_ema"], there), new, here)
    expected = initial if carried is None else old["G_ema"].mapping.embed.weight[:, carried]
    assert torch.equal(new["G_ema"].mapping.embed.weight, expected)


def test_alpha_is_new_and_colours_stay(tmp_path):
    there, here = networks(0), networks(1, img_channels=4)
    start(saved(tmp_path / "1", there), here)
    assert same_function(images(there["G_ema"]), images(here["G_ema"])[:, :3])
    img = torch.randn(1, 4, 16, 16)
    assert same_function(logits(there["D"], img[:, :3]), logits(here["D"], img))


def with_critics(nets, c_dim=0, width=4, layers=(1, 3)):
    """nets, D with heads on a teacher."""
    channels, grids = dict.fromkeys(layers, 6), dict.fromkeys(layers, (4, 4))
    nets["D"].add_module("projected", ProjectedHeads(channels, grids, c_dim, width))
    nets["D"].add_module("vision_aided", VisionAidedHeads(channels, c_dim, width))
    return nets


def judged(discriminator, c=None):
    """The logits of D's heads for the same maps."""
    torch.manual_seed(3)
    maps = {layer: torch.randn(2, 6, 4, 4) for layer in discriminator.projected.layers}
    c = torch.zeros(2, 0) if c is None else c
    with torch.no_grad():
        return torch.cat([logits for heads in ("projected", "vision_aided")
                          for logits in getattr(discriminator, heads)(maps, c)], 1)  # fmt: skip


def fates_of_critics(report):
    return Counter(f.what for f in report.fates if f.network == "D" and f.tensor.startswith(("projected", "vision_")))


@pytest.mark.parametrize("change", [{"width": 8}, {"c_dim": 3}, {"layers": (0, 1, 3)}], ids=str)
def test_heads_of_d_that_do_not_all_fit_are_as_initialised(tmp_path, change):
    """A part of a random projection, or a spectral norm's vectors beside another weight, would be worse than none."""
    there = with_critics(networks(0))
    here = with_critics(networks(1, c_dim=change.get("c_dim", 0)), **change)
    c = torch.eye(3)[:2] if "c_dim" in change else None
    initial = judged(here["D"], c)
    report = start(saved(tmp_path / "1", there), here, CLASSES if "c_dim" in change else ())
    assert torch.equal(judged(here["D"], c), initial) and fates_of_critics(report)["new"] >= 20
    assert not {"loaded", "partly"} & fates_of_critics(report).keys()


def test_heads_of_d_come_and_go_and_find_their_labels_by_name(tmp_path):
    there = with_critics(networks(0, c_dim=3), c_dim=3)
    here = with_critics(networks(1, c_dim=4), c_dim=4)
    start(saved(tmp_path / "1", there, CLASSES), here, ("dog", *reversed(CLASSES)))
    assert same_function(judged(there["D"], torch.eye(3)[[0, 2]]), judged(here["D"], torch.eye(4)[[3, 1]]))
    bare, source = networks(2, c_dim=3), state(there["D"])
    assert fates_of_critics(start(str(tmp_path / "1"), bare, CLASSES)).keys() == {"dropped"}
    assert torch.equal(bare["D"].b16.conv0.weight, source["b16.conv0.weight"])
    back = with_critics(networks(3, c_dim=3), c_dim=3)
    initial = judged(back["D"], torch.eye(3)[:2])
    assert fates_of_critics(start(saved(tmp_path / "2", bare, CLASSES), back, CLASSES)).keys() == {"new"}
    assert torch.equal(judged(back["D"], torch.eye(3)[:2]), initial)


def test_a_latent_of_another_size_keeps_its_part_apart_from_the_labels(tmp_path):
    there, here = networks(0, c_dim=3), networks(1, c_dim=3, latent={**LATENT, "z_dim": 9})
    start(saved(tmp_path / "1", there), here)
    old, new = there["G_ema"].mapping.fc0.weight, here["G_ema"].mapping.fc0.weight
    factor = (17 / 14) ** 0.5
    assert torch.allclose(new[:, :6], old[:, :6] * factor) and torch.allclose(new[:, 9:], old[:, 6:] * factor)
    assert not new[:, 6:9].any()
    # z 6 and labels 8 wide are as many inputs as z 14 without labels, and not the same ones
    other = networks(2, latent={**LATENT, "z_dim": 14})
    start(saved(tmp_path / "2", there), other)
    assert torch.equal(other["G_ema"].mapping.fc0.weight[:, :6], old[:, :6])
    assert not other["G_ema"].mapping.fc0.weight[:, 6:].any()


def test_other_pixels_are_new(tmp_path):
    """What a rectangle's networks hold in another shape: by shapes alone."""
    here, there = networks(0), networks(1)
    others = {name: state(module) for name, module in there.items()}
    others["G_ema"]["synthesis.b8.conv0.noise_const"] = torch.zeros(12, 8)
    others["G_ema"]["synthesis.b4.const"] = torch.zeros(8, 4, 6)
    others["D"]["b4.fc.weight"] = torch.zeros(8, 8 * 24)
    initial = {name: state(module) for name, module in here.items()}
    for name in ("G_ema", "D"):
        path = tmp_path / ("s.safetensors" if name == "G_ema" else "s.D.safetensors")
        save_file(others[name], path, {"format": transfer.FORMAT, "network": name})
    report = start(str(tmp_path / "s.safetensors"), here)
    assert fates(report, "G_ema", "new") == {"synthesis.b8.conv0.noise_const", "synthesis.b4.const"}
    assert fates(report, "D", "new") == {"b4.fc.weight"}
    assert torch.equal(state(here["D"])["b4.fc.weight"], initial["D"]["b4.fc.weight"])


# Where it comes from


def test_a_snapshot_alone_starts_both_generators_and_says_that_d_is_new(tmp_path):
    there, here = networks(0), networks(1, heads=(8,))
    before = state(here["D"])
    report = start(snapshot_of(tmp_path / "s.safetensors", there["G_ema"]), here)
    old = state(there["G_ema"])
    for network in ("G", "G_ema"):
        now = state(here[network])
        assert all(torch.equal(now[key], value) for key, value in old.items())
    assert all(torch.equal(state(here["D"])[key], value) for key, value in before.items())
    assert {fate.why for fate in report.fates if fate.network == "D"} == {"init_from has no D"}
    assert fates(report, "G", "new") == of_block(here["G"], "heads.")


def test_networks_beside_a_snapshot_come_along(tmp_path):
    there, here = networks(0, heads=(8,)), networks(1, heads=(8,))
    path = snapshot_of(tmp_path / "out.safetensors", there["G_ema"])
    network_file(tmp_path / "out.G.safetensors", there["G"].generator, "G")
    network_file(tmp_path / "out.D.safetensors", there["D"], "D")
    network_file(tmp_path / "out.heads.safetensors", there["G"].heads, "heads")
    report = start(path, here)
    assert all(torch.equal(a, b) for name in there for a, b in zip(state(there[name]).values(),
               state(here[name]).values(), strict=True))  # fmt: skip
    assert report.files["D"].endswith("out.D.safetensors") and report.files["G"].endswith("out.G.safetensors")
    assert not torch.equal(there["G"].generator.mapping.fc0.weight, there["G_ema"].mapping.fc0.weight)
    only_d = networks(2)
    report = start(str(tmp_path / "out.D.safetensors"), only_d)
    assert torch.equal(only_d["D"].b4.out.weight, there["D"].b4.out.weight)
    assert {fate.what for fate in report.fates if fate.network != "D"} == {"new"}
    network_file(tmp_path / "out.D.safetensors", there["G_ema"], "G_ema")
    with pytest.raises(UserError, match=r"out\.D\.safetensors holds G_ema, not D"):
        start(path, networks(1))


def test_heads_of_the_same_shape_come_along(tmp_path):
    there, here = networks(0, heads=(8, 16)), networks(1, heads=(8, 16))
    there["G"].heads.heads["16"].conv1x1_2.weight = nn.Parameter(torch.zeros(6, 7, 1, 1))  # of another teacher
    report = start(saved(tmp_path / "1", there), here)
    assert fates(report, "G", "new") == {"heads.16.conv1x1_2.weight"}
    assert torch.equal(here["G"].heads.heads["8"].conv1x1_1.weight, there["G"].heads.heads["8"].conv1x1_1.weight)


def test_the_report_is_written_and_shown(tmp_path, capsys):
    from rich.console import Console

    there, here = networks(0), networks(1, img_resolution=32, c_dim=2)
    report = start(saved(tmp_path / "1", there), here)
    report.write(tmp_path)
    written = json.loads((tmp_path / "transfer.json").read_text())
    assert written["init_from"] == str(tmp_path / "1") and "Adam" in written["anew"]
    assert len(written["tensors"]) == len(report.fates) > 100
    fc0 = next(t for t in written["tensors"] if (t["network"], t["tensor"]) == ("G", "mapping.fc0.weight"))
    assert fc0 == {
        "network": "G", "tensor": "mapping.fc0.weight", "what": "partly", "count": 48, "there": [8, 6],
        "here": [8, 14], "why": "8×6 of 8×14, from 8×6, times √(14/6)",
    }  # fmt: skip
    Console(width=120).print(report.table())
    shown = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in rows] == [
        ["G, G_ema", "loaded"], ["", "partly"], ["", "new"], ["D", "loaded"], ["", "new"], ["", "dropped"]
    ]  # fmt: skip
    assert rows[1][2:] == ["1", "48", "mapping"] and rows[2][4] == "b32 mapping" and rows[5][4] == "b16"


# Refusals


def spoilt(path: Path, change, metadata=None) -> str:
    tensors = {key: value.clone() for key, value in networks(0)["G_ema"].state_dict().items()}
    change(tensors)
    default = {"format": "hsrgan-snapshot-1", "dataset": "{}"}
    save_file(tensors, path, default if metadata is None else metadata)
    return str(path)


def nothing(tensors):
    pass


def poison(tensors):
    tensors["synthesis.b8.conv0.bias"][0] = torch.nan


def other_filter(tensors):
    tensors["synthesis.b8.resample_filter"] = torch.eye(4)


def rename(tensors):
    for key in list(tensors):
        tensors[f"x.{key}"] = tensors.pop(key)


def only_buffers(tensors):
    for key in list(tensors):
        if not key.endswith(("resample_filter", "noise_const")):
            del tensors[key]


def pickle(path: Path) -> str:
    path.with_suffix(".pkl").write_bytes(b"anything")
    return str(path.with_suffix(".pkl"))


REFUSALS = {
    "nan": (partial(spoilt, change=poison), "synthesis.b8.conv0.bias is not finite numbers"),
    "filter": (partial(spoilt, change=other_filter), "synthesis.b8.resample_filter is not the .1, 3, 3, 1. filter"),
    "foreign": (partial(spoilt, change=rename), "none of its tensors is one of the recipe's networks"),
    "buffers": (partial(spoilt, change=only_buffers), "none of its tensors is one of the recipe's networks"),
    "no format": (partial(spoilt, change=nothing, metadata={}), "its format is not stated; give a checkpoint folder"),
    "format": (partial(spoilt, change=nothing, metadata={"format": "hsrgan-teacher-1"}), "format is hsrgan-teacher-1"),
    "no facts": (partial(spoilt, change=nothing, metadata={"format": "hsrgan-snapshot-1"}), "not a snapshot's"),
    "cut": (lambda path: path.write_bytes(b"\x00" * 9) and str(path), "damaged or no safetensors file"),
    "absent": (str, "does not exist: give a checkpoint folder"),
    "folder": (lambda path: str(path.parent), "cannot be read.*holds state.json"),
    "no folder": (lambda path: str(path.with_suffix("")), "cannot be read.*holds state.json"),
    "pickle": (pickle, "is no .safetensors file; give .* of tools/import_weights.py"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_start_is_refused_and_changes_nothing(tmp_path, case):
    make, message = REFUSALS[case]
    here = networks(1)
    before = {name: state(module) for name, module in here.items()}
    with pytest.raises(UserError, match=message) as refusal:
        start(make(tmp_path / "s.safetensors"), here)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert all(torch.equal(state(here[name])[key], value) for name in here for key, value in before[name].items())
