"""init_from: what is carried over into networks of another shape, and that these then compute what those did."""

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from transfer_networks import LATENT, fates, networks, of_block, saved, snapshot_of, start, state

from hsrgan.engine import transfer
from hsrgan.engine.projected import ProjectedHeads, VisionAidedHeads

CLASSES = ("ant", "bee", "cow")


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
