"""Rectangles, RGBA and grey from pictures to figures: pack, train, resume, sample and score; and each part alone."""

import io
import itertools
import json
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from metric_fixtures import StandInLPIPS, attributes_file
from PIL import Image
from safetensors.torch import load_file
from test_training import TEACHER, last_checkpoint
from typer.testing import CliRunner

from hsrgan.engine import samples, shard_writer, shards
from hsrgan.engine.alpha import over_grey
from hsrgan.engine.config import load_recipe
from hsrgan.engine.data import open_stream
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import generator_metrics, sampling
from hsrgan.engine.metrics.als_pictures import CAPTION, draw_strips, small
from hsrgan.engine.metrics.attributes import load_attributes
from hsrgan.engine.metrics.extractor import load_extractor
from hsrgan.engine.metrics.path_length import _seen
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import image_grid, opaque
from hsrgan.engine.shard_sources import open_shards
from hsrgan.engine.snapshot import load_snapshot, save_snapshot
from hsrgan.engine.stats import read_log
from hsrgan.engine.teacher import load_teacher
from hsrgan.tools import eval as eval_tool
from hsrgan.tools import pack, sample, score_digits
from hsrgan.tools.fit_teacher import read_images

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HSRGAN_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def run(app, *arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeded(result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def pictures(folder: Path, height: int, width: int, channels: int, count: int = 24) -> Path:
    """Discs on a ramp; where there is an alpha the disc is opaque and the ramp nearly clear."""
    folder.mkdir()
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (2 + i % 5) ** 2
        levels = np.stack([disc * 200, 8 * y + i, 8 * x, 40 + disc * 200], -1).clip(0, 255).astype(np.uint8)
        levels = levels[..., 0] if channels == 1 else levels[..., :channels]
        Image.fromarray(levels).save(folder / f"{i:03}.png")
    return folder


# ---- from pictures to figures

RECIPE = """
run_dir: run
seed: 1
kimg: 0.008           # 2 steps
batch: 4
device: cpu
tick_kimg: 0.004
checkpoint_kimg: 0.004
image_kimg: 100.0
snapshot_kimg: 100.0
data: {shards: shards, resolution: SIZE, channels: CHANNELS, workers: 0, mirror: true}
generator: {z_dim: 8, w_dim: 8, mapping_layers: 1, channel_base: 64, channel_max: 8, lr: 0.002}
discriminator: {channel_base: 64, channel_max: 8, mbstd_group_size: 2, lr: 0.002}
r1: {gamma: 1.0, interval: 2}
path_length: {interval: 2}
ema: {kimg: 0.5, rampup: null}
hsr: {teacher: TEACHER, layers: {8: 3, 16: 1}, hidden: 16}
"""
SETS = {"16x24 RGB": (16, 24, 3), "24x16 RGBA": (24, 16, 4), "16x16 grey": (16, 16, 1)}


@pytest.mark.parametrize("case", SETS)
def test_pack_train_resume_sample_and_score(case, tmp_path, monkeypatch):
    height, width, channels = SETS[case]
    resolution = height if height == width else [height, width]
    folder = pictures(tmp_path / "pictures", height, width, channels)
    option = f"{height}x{width}" if height != width else height
    succeeded(run(pack.app, folder, tmp_path / "shards", "--resolution", option, "--channels", channels))
    text = RECIPE.replace("SIZE", str(resolution)).replace("CHANNELS", str(channels)).replace("TEACHER", str(TEACHER))
    (tmp_path / "recipe.yaml").write_text(text)

    forked.train(tmp_path)
    assert "resuming at 0.008 kimg" in forked.train(tmp_path, "kimg=0.012")
    rows = read_log(tmp_path / "run" / "log.jsonl")
    phases = {name for row in rows for name in row if name.startswith("loss/")}
    assert {"loss/G", "loss/D", "loss/r1", "loss/path", "loss/hsr"} <= phases
    if channels == 4:
        forked.train(tmp_path, "kimg=0.012", "run_dir=straight")
        ends = [last_checkpoint(tmp_path / name) for name in ("straight", "run")]
        for file in ("G.safetensors", "D.safetensors", "G_ema.safetensors"):
            once, twice = (load_file(end / file) for end in ends)
            assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)
    grid = Image.open(next((tmp_path / "run" / "samples").glob("*.png")))
    assert grid.mode == MODES[channels] and grid.width * height == grid.height * width  # 8 by 8 of them
    assert Image.open(tmp_path / "run" / "reals.png").mode == MODES[channels]

    snapshot = next((tmp_path / "run" / "snapshots").glob("*.safetensors"))
    generator, metadata = load_snapshot(snapshot)
    assert metadata["generator"]["img_resolution"] == metadata["dataset"]["resolution"] == resolution
    assert metadata["recipe"]["data"]["resolution"] == resolution and generator.img_shape == (channels, height, width)

    succeeded(run(sample.app, snapshot, "--seeds", "0-1", "--out", tmp_path / "made"))
    made = Image.open(tmp_path / "made" / "seed0001.png")
    assert made.mode == MODES[channels] and made.size == (width, height)
    if channels == 4:
        assert len(np.unique(np.asarray(made)[..., 3])) > 1  # G makes the alpha too

    monkeypatch.setattr(generator_metrics, "load_lpips", StandInLPIPS)
    metrics = "fid20_full,ppl2_wend16" if channels == 1 else "fid20_full,kid20_full,ppl2_wend16"
    options = ("--features", TEACHER, "--workers", 0)
    scored = run(eval_tool.app, snapshot, "--data", tmp_path / "shards", "--metrics", metrics, *options)
    results = [json.loads(line) for line in succeeded(scored).splitlines() if line.startswith("{")]
    assert len(results) == metrics.count(",") + 1
    for result in results:
        assert np.isfinite(result["value"])
        assert result["protocol"].get("alpha") == ("over mid-grey (127.5)" if channels == 4 else None)

    if case == "24x16 RGBA":  # what does not fit is one line
        others = pictures(tmp_path / "others", 16, 24, 3)
        succeeded(run(pack.app, others, tmp_path / "wide", "--resolution", "16,24"))
        wrong = run(eval_tool.app, snapshot, "--data", tmp_path / "wide", "--metrics", "fid20_full", *options)
        assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1
        assert "makes 24x16 (height x width) images of 4 channel(s) and" in wrong.stderr
        assert "holds 16x24 (height x width) of 3" in wrong.stderr


# ---- packing


def decoded(manifest: shards.Manifest) -> torch.Tensor:
    """Every image of the first shard, uint8 [N, H, W, C]."""
    offsets = np.load(manifest.offsets_path(manifest.shards[0]))
    tar = (manifest.root / manifest.shards[0].name).read_bytes()
    pixels = [samples.decode(tar[a:b], manifest)[0] for a, b in itertools.pairwise(offsets)]
    return torch.from_numpy(np.stack(pixels))


def packed(source: Path, *options: object) -> shards.Manifest:
    target = source.with_name(f"{source.name}-packed")
    succeeded(run(pack.app, source, target, "--processes", 1, "--force", *options))
    return shards.load_manifest(target)


def test_alpha_survives_packing_bit_by_bit(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (5, 16, 24, 4), np.uint8)  # colours under alpha 0 too
    (tmp_path / "src").mkdir()
    for i, levels in enumerate(truth):
        levels[0, 0] = 0, 0, i, 255
        Image.fromarray(levels).save(tmp_path / "src" / f"{i}.png")
    manifest = packed(tmp_path / "src", "--resolution", "16x24", "--channels", 4)
    assert (manifest.resolution, manifest.channels) == ((16, 24), 4)
    found = decoded(manifest).numpy()
    assert np.array_equal(found[np.argsort(found[:, 0, 0, 2])], truth)
    images, _ = next(open_stream(manifest, seed=0, start=0, global_batch=5))
    assert images.shape == (5, 4, 16, 24)
    assert np.array_equal(images[images[:, 2, 0, 0].argsort()].permute(0, 2, 3, 1).numpy(), truth)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_pictures_without_alpha_are_opaque_in_an_rgba_set(tmp_path, image_format):
    source = pictures(tmp_path / "src", 16, 16, 3, count=3)
    manifest = packed(source, "--resolution", 16, "--channels", 4, "--format", image_format)
    found = decoded(manifest)
    assert found.shape == (3, 16, 16, 4) and (found[..., 3] == 255).all() and found[..., :3].float().std() > 20
    with shard_writer.ShardWriter(tmp_path / "wrong", resolution=(16, 16), channels=1) as writer:
        writer.add((source / "000.png").read_bytes())
    with pytest.raises(samples.BadSample, match="is a RGB image, its manifest says 1 channel"):
        decoded(shards.load_manifest(tmp_path / "wrong"))


def test_colours_of_clear_pixels_do_not_bleed_when_resized(tmp_path):
    """Red and clear green side by side: a mean that forgot the alpha would be brown."""
    levels = np.zeros((32, 32, 4), np.uint8)
    levels[:, ::2] = 255, 0, 0, 255
    levels[:, 1::2] = 0, 255, 0, 0
    (tmp_path / "src").mkdir()
    Image.fromarray(levels).save(tmp_path / "src/a.png")
    manifest = packed(tmp_path / "src", "--resolution", 16, "--channels", 4, "--resize", "box")
    pixel = decoded(manifest)[0, 8, 8].tolist()
    assert pixel[0] >= 253 and pixel[1] == 0 and pixel[3] in (127, 128)


def test_rectangles_are_cut_from_the_middle(tmp_path):
    levels = np.zeros((40, 90, 3), np.uint8)
    levels[:, 15:75] = 200  # 40x60 in the middle
    (tmp_path / "src").mkdir()
    Image.fromarray(levels).save(tmp_path / "src/wide.png")
    refused = run(pack.app, tmp_path / "src", tmp_path / "dst", "--resolution", "16x24").stderr
    assert "wide.png is 40x90 (height x width), not of the shape 16x24 (height x width): give --crop center" in refused
    for text in ("16x24", "16,24"):
        found = decoded(packed(tmp_path / "src", "--resolution", text, "--crop", "center"))
        assert found.shape == (1, 16, 24, 3) and found.min() == found.max() == 200
    tall = decoded(packed(tmp_path / "src", "--resolution", "24x16", "--crop", "center"))  # 40 high, 27 wide
    assert tall.shape == (1, 24, 16, 3) and tall.min() == 200
    Image.fromarray(levels[:, :60]).save(tmp_path / "src/fits.png")
    said = succeeded(run(pack.app, tmp_path / "src", tmp_path / "skip", "--resolution", "48x72", "--crop", "skip"))
    assert shards.load_manifest(tmp_path / "skip").count == 1 and said == ""
    box = packed(tmp_path / "src", "--resolution", "16x24", "--crop", "skip", "--resize", "box")
    truth = Image.fromarray(levels[:, :60]).resize((24, 16), Image.Resampling.BOX)
    assert np.array_equal(decoded(box)[0].numpy(), np.asarray(truth))  # the whole of it


def test_manifests_of_both_forms_are_read(tmp_path):
    manifest = packed(pictures(tmp_path / "src", 16, 16, 1, count=2), "--resolution", 16, "--channels", 1)
    file = manifest.root / "manifest.json"
    content = json.loads(file.read_text())
    assert content["resolution"] == 16
    file.write_text(json.dumps(content | {"resolution": [16, 16]}))  # as before there were rectangles
    assert shards.load_manifest(file).resolution == manifest.resolution == (16, 16)
    file.write_text(json.dumps(content | {"resolution": [16, 16, 3]}))
    with pytest.raises(UserError, match=r"damaged .resolution is .*must be a side in pixels or"):
        shards.load_manifest(file)
    with pytest.raises(UserError, match=r"holds 16x16 images but data.resolution is \[16, 24\]: pack with .*"
                                        r"--resolution 16x24, or set data.resolution=16"):  # fmt: skip
        manifest.expect(resolution=[16, 24], channels=1, labels=False)


# ---- recipes


def test_presets_reckon_with_a_rectangles_pixels(tmp_path):
    def load(*overrides):
        (tmp_path / "r.yaml").write_text("run_dir: r\npreset: auto\ndata: {shards: s, resolution: 512}\n")
        return load_recipe(tmp_path / "r.yaml", overrides)

    square, wide = load(), load("data.resolution=[512, 768]")
    assert wide.data.resolution == [512, 768] and load("data.resolution=[512, 512]").data.resolution == 512
    assert wide.r1.gamma == pytest.approx(1.5 * square.r1.gamma) and wide.batch == square.batch
    assert wide.generator == square.generator and wide.discriminator == square.discriminator
    assert load("data.resolution=[16, 24]").generator.num_fp16_res == 3
    assert load("data.resolution=[576, 1024]", "hsr={teacher: t, layers: {256: 1}}").hsr.layers == {256: 1}
    with pytest.raises(UserError, match="layers names resolution 512, allowed in this network: 8, 16, 32, 64, 128,"):
        load("data.resolution=[576, 1024]", "hsr={teacher: t, layers: {512: 1}}")


# ---- alpha


def test_alpha_over_grey_is_the_blend_it_says():
    levels = torch.tensor([[[[0, 255, 200, 10]]] * 3 + [[[255, 255, 0, 51]]]]).reshape(1, 4, 1, 4).to(torch.uint8)
    blend = over_grey(levels)
    assert blend.dtype == torch.uint8 and blend[0, 0, 0].tolist() == [0, 255, 128, 104]  # 0.2·10 + 0.8·127.5 = 104
    as_float = over_grey(levels.float() / 127.5 - 1)
    torch.testing.assert_close(as_float, (torch.tensor([0, 255, 127.5, 104]) / 127.5 - 1).expand(1, 3, 1, 4))
    beyond = torch.tensor([0.5, 0.5, 0.5, -1.7]).view(1, 4, 1, 1)  # a generator's alpha may pass its range
    assert over_grey(beyond).abs().max() == 0
    rgb = torch.rand(2, 3, 4, 4)
    assert over_grey(rgb) is rgb


def test_networks_see_rgba_over_grey_alone():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 4, 24, 16), dtype=torch.uint8)
    extractor, clear = load_extractor(str(TEACHER)), images.clone()
    clear[:, 3] = 0
    assert torch.equal(extractor(images), extractor(over_grey(images)))
    assert torch.equal(extractor(clear), extractor(torch.full((3, 3, 24, 16), 128, dtype=torch.uint8)))
    assert not torch.equal(extractor(images), extractor(clear))
    teacher, fakes = load_teacher(str(TEACHER), layers={8: 3}), images.float() / 127.5 - 1
    torch.testing.assert_close(teacher(fakes)[8], teacher(over_grey(fakes))[8])
    assert teacher(fakes)[8].shape == teacher(fakes[..., :16, :])[8].shape
    assert not torch.allclose(teacher(fakes)[8], teacher(fakes[:, :3])[8])


def test_path_length_sees_rectangles():
    images = torch.randn(2, 4, 16, 24)
    seen = _seen(images, crop=True)
    assert torch.equal(seen, over_grey(images)[:, :, 6:14, 6:18])
    assert _seen(torch.zeros(1, 1, 512, 768), crop=False).shape == (1, 3, 256, 384)
    assert _seen(torch.zeros(1, 3, 1024, 512), crop=False).shape == (1, 3, 512, 256)


@pytest.mark.parametrize(
    ("shape", "piece"), [((3, 192, 224), 8), ((3, 256, 256), 8), ((3, 512, 768), 4), ((3, 8, 12), 16)]
)
def test_fakes_are_made_in_pieces_that_divide_a_unit(shape, piece):
    """Every image by its own noise, whatever the size: 16 of them are not cut into 12 and 4."""
    asked = []

    class Echo:
        img_shape = shape

        def synthesis(self, ws, noise):
            asked.append(len(ws))
            return ws + noise

    ws, noise = torch.arange(16.0)[:, None], 100 * torch.arange(16.0)[:, None]
    assert torch.equal(torch.cat(list(sampling.synthesised(Echo(), ws, noise))), ws + noise)
    assert asked == [piece] * (16 // piece)


def test_a_teacher_is_fitted_on_what_it_will_be_shown(tmp_path):
    """Rectangular RGBA shards: over grey and squeezed into its square."""
    manifest = packed(pictures(tmp_path / "src", 24, 16, 4, count=4), "--resolution", "24x16", "--channels", 4)
    found = read_images(str(manifest.root), 8).pixels
    whole = over_grey(decoded(manifest).permute(0, 3, 1, 2)).float()
    truth = torch.nn.functional.adaptive_avg_pool2d(whole, 8).round().to(torch.uint8)
    assert found.shape == (4, 3, 8, 8)
    assert sorted(x.flatten().tolist() for x in found) == sorted(x.flatten().tolist() for x in truth)


def test_alpha_in_pictures():
    images = torch.zeros(3, 4, 16, 24, dtype=torch.uint8)
    images[0, 0], images[:2, 3] = 255, 255
    grid = image_grid(images, cols=2, scale=1)
    assert grid.mode == "RGBA" and grid.size == (48, 32)
    flat = opaque(grid)
    assert flat.mode == "RGB" and flat.getpixel((0, 0)) == (255, 0, 0) and flat.getpixel((30, 5)) == (0, 0, 0)
    squares = {flat.getpixel((x, 20)) for x in range(24)}  # of the clear one
    assert len(squares) == 2 and all(r == g == b for r, g, b in squares)
    rgb = image_grid(images[:, :3])
    assert opaque(rgb) is rgb


def test_tensorboard_is_shown_no_alpha(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hsrgan.engine.stats import RunLog

    with RunLog(tmp_path, total_kimg=1) as log:
        log.fakes(torch.full((1, 4, 16, 24), -1.0), 0.0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Images("fakes")
    shown = Image.open(io.BytesIO(event.encoded_image_string))
    assert shown.mode == "RGB" and len(shown.getcolors()) == 2
    assert Image.open(next((tmp_path / "samples").glob("*.png"))).mode == "RGBA"


# ---- the other tools


def test_rgba_shards_of_others_are_read(tmp_path):
    """Listed one by one, without a manifest: size and channels are those of the images."""
    manifest = packed(pictures(tmp_path / "src", 24, 16, 4, count=3), "--resolution", "24x16", "--channels", 4)
    (manifest.root / "manifest.json").unlink()
    found = open_shards(str(manifest.root), cache=tmp_path / "cache", quiet=True)
    assert (found.resolution, found.channels, found.count) == ((24, 16), 4, 3)
    assert next(open_stream(found, seed=0, start=0, global_batch=3))[0].shape == (3, 4, 24, 16)


def made(path: Path, **changes) -> Path:
    torch.manual_seed(0)
    widths = {"z_dim": 8, "w_dim": 8, "mapping_layers": 1, "channel_base": 64, "channel_max": 8}
    save_snapshot(path, Generator(**widths | changes), recipe_json="{}", kimg=1, dataset={})
    return path


def test_what_a_rectangle_or_alpha_cannot_be_scored_by_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(generator_metrics, "load_lpips", StandInLPIPS)
    for changes, says in (
        ({"img_resolution": [16, 24]}, "makes 16x24 (height x width) images of 3 channel(s); digits need a"),
        ({"img_resolution": 16, "img_channels": 4}, "makes 16x16 images of 4 channel(s); digits need"),
    ):
        refused = run(score_digits.app, made(tmp_path / "a.safetensors", **changes))
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and says in refused.stderr
    flat = made(tmp_path / "b.safetensors", img_resolution=[8, 32])
    refused = run(eval_tool.app, flat, "--metrics", "ppl2_wend10")
    assert refused.exit_code == 2 and "makes images of 8 pixels and ppl2_wend10 needs 16" in refused.stderr


def test_attributes_of_rgba_rectangles(tmp_path):
    """ALS sees fakes over mid-grey; its strips keep a rectangle's proportions and show the alpha."""
    classifier = load_attributes(attributes_file(tmp_path / "attributes.safetensors"))
    images = torch.rand(2, 4, 24, 16) * 2 - 1
    assert torch.equal(classifier(images), classifier(over_grey(images)))
    draw_strips([("bent", torch.zeros(11, 4, 24, 16, dtype=torch.uint8))], tmp_path / "strips.png")
    strips = Image.open(tmp_path / "strips.png")
    assert strips.mode == "RGB" and strips.size == (11 * 16 * 2, 24 * 2 + CAPTION)  # enlarged to 48x32
    assert {strips.getpixel((x, 60)) for x in range(64)} == {(102,) * 3, (153,) * 3}  # all clear: the checkerboard
    for size, shown in (((768, 512), (256, 170)), ((512, 768), (170, 256)), ((1024, 1024), (256, 256))):
        assert small(torch.zeros(1, 4, *size, dtype=torch.uint8)).shape[2:] == shown
