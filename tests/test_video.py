"""tools/video.py on a snapshot of the quickstart: what is decoded again is what was to be shown."""

import builtins

import av
import numpy as np
import pytest
import torch
from PIL import Image
from quickstart_snapshot import save_quickstart
from typer.testing import CliRunner

from hsrgan.engine import video_file
from hsrgan.engine.errors import UserError
from hsrgan.engine.latent_paths import KeyFrames, swing
from hsrgan.engine.latents import Latents, save_latents
from hsrgan.engine.metrics.directions import Directions, save_directions
from hsrgan.engine.pictures import image_grid, opaque
from hsrgan.engine.sampler import generate, layer_noise, ws_of_seeds
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools import video

CODEC_ERROR = 4  # grey levels, mean over a frame: crf 16 leaves about 1


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return save_quickstart(tmp_path_factory.mktemp("quickstart") / "m.safetensors")


@pytest.fixture(scope="module")
def generator(snapshot):
    return load_snapshot(snapshot)[0]


@pytest.fixture(scope="module")
def directions(snapshot):
    found = Directions(("a",), torch.eye(64)[:1], (0.5,), (1.0,), sha256_of(snapshot), 9, "pca", ((0, 3),))
    save_directions(snapshot.parent / "d.safetensors", found, command="")
    return snapshot.parent / "d.safetensors"


def call(*arguments):
    return CliRunner().invoke(video.app, [str(argument) for argument in arguments])


def frames(*arguments, out) -> np.ndarray:
    """What the tool writes, decoded: [T, H, W, 3]."""
    result = call(*arguments, "--out", out)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "frames" in result.output
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]).astype(int)


def apart(a, b) -> float:
    return float(np.abs(a - np.asarray(b, dtype=int)).mean())


def shown(generator, ws, noise=None) -> np.ndarray:
    """The frame of ws [cells, num_ws, w_dim] in one row."""
    image = generator.synthesis(ws, noise_mode="const" if noise is None else "random", noise=noise)
    return np.asarray(image_grid(image, cols=len(ws)).convert("RGB"), dtype=int)


def test_seeds_are_key_frames_and_a_loop_closes(snapshot, generator, tmp_path):
    film = frames(snapshot, "--seeds", "3-6", "--seconds-per-key", 1, "--fps", 8, "--psi", 0.8, out=tmp_path / "v.mp4")
    assert film.shape == (4 * 8, 64, 64, 3)
    for key, seed in enumerate(range(3, 7)):
        right = image_grid(generate(generator, [seed], psi=0.8, noise_mode="const")).convert("RGB")
        assert apart(film[8 * key], right) < CODEC_ERROR
    steps = [apart(a, b) for a, b in zip(film, np.roll(film, -1, axis=0), strict=True)]
    assert steps[-1] < 1.5 * max(steps[:-1])  # from the last frame to the first, as from any to the next
    assert apart(film[0], film[8]) > 3 * CODEC_ERROR
    assert steps[-1] < apart(film[0], film[8]) / 2
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_a_grid_deals_out_its_keys_and_an_open_end_ends_at_the_last(snapshot, generator, tmp_path):
    film = frames(snapshot, "--seeds", "0-3", "--grid", "2x1", "--no-loop", "--seconds-per-key", 0.5, "--fps", 8,
                  "--noise", "random", "--batch", 5, out=tmp_path / "v.mp4")  # fmt: skip
    assert film.shape == (5, 64, 128, 3)
    noise = layer_noise([0, 2], generator)  # of each cell's first seed, and held
    for frame, seeds in ((0, [0, 2]), (-1, [1, 3])):
        assert apart(film[frame], shown(generator, ws_of_seeds(generator, seeds), noise)) < CODEC_ERROR
    assert apart(film[0], film[-1]) > 3 * CODEC_ERROR
    assert call(snapshot, "--seeds", "0-3", "--grid", "1x2", "--seconds-per-key", 0.1, "--fps", 10,
                "--out", tmp_path / "made" / "tall.mp4").exit_code == 0  # fmt: skip
    with av.open(str(tmp_path / "made" / "tall.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 128)


def test_a_class_for_each_key_frame_and_a_seed_through_several(tmp_path):
    snapshot = save_quickstart(tmp_path / "m.safetensors", labels=True)
    generator = load_snapshot(snapshot)[0]
    options = (snapshot, "--no-loop", "--seconds-per-key", 0.5, "--fps", 4)
    for seeds, labels, sources, classes in (
        ("5", [3, 7, 3], [5, 5, 5], [3, 7, 3]),
        ("5-7", [3, 7, 0], [5, 6, 7], [3, 7, 0]),
        ("5", ["all"], [5] * 10, range(10)),
        ("5-6", [3], [5, 6], [3, 3]),
    ):
        named = (part for label in labels for part in ("--label", label))
        film = frames(*options, "--seeds", seeds, *named, out=tmp_path / "v.mp4")
        assert len(film) == 2 * len(sources) - 1
        for key, (seed, label) in enumerate(zip(sources, classes, strict=True)):
            right = shown(generator, ws_of_seeds(generator, [seed], torch.eye(10)[[label]]))
            assert apart(film[2 * key], right) < CODEC_ERROR
        assert apart(film[0], film[2]) > 3 * CODEC_ERROR
    few = call(*options, "--seeds", "0-3", "--label", 3, "--label", 7, "--out", tmp_path / "v.mp4")
    assert few.exit_code == 2 and "--label names 2 classes for 4 key frames: give one for all" in few.stderr


def test_an_edit_swings_around_a_latent_of_a_file(snapshot, generator, directions, tmp_path):
    ws = ws_of_seeds(generator, [5])
    noise = layer_noise([9], generator)
    save_latents(tmp_path / "w.safetensors", Latents(ws, noise))
    film = frames(snapshot, "--w", tmp_path / "w.safetensors", "--directions", directions, "--edit", "a=-4:4",
                  "--seconds-per-key", 1, "--fps", 8, out=tmp_path / "v.mp4")  # fmt: skip
    assert len(film) == 8
    for frame, strength in ((0, -4), (2, 0), (4, 4), (6, 0)):
        edited = ws.clone()
        edited[:, :4, 0] += strength
        assert apart(film[frame], shown(generator, edited, noise)) < CODEC_ERROR
    assert apart(film[0], film[4]) > 3 * CODEC_ERROR


def test_paths_are_smooth_through_their_keys():
    torch.manual_seed(0)
    ws = torch.randn(5, 3, 2)
    for loop in (True, False):
        path = KeyFrames(ws, loop=loop)
        assert path.length == (5 if loop else 4)
        torch.testing.assert_close(path.at(torch.arange(5)), ws)
        fine = path.at(torch.linspace(0, path.length, 2001, dtype=torch.float64)).double()
        bend = (fine[2:] - 2 * fine[1:-1] + fine[:-2]) * (2000 / path.length) ** 2
        if loop:  # value and second derivative meet
            torch.testing.assert_close(fine[-1], fine[0])
            bend = torch.cat([bend, bend[:1]])
        else:  # a natural spline's ends are straight
            assert bend[[0, -1]].abs().max() < 0.05 * bend.abs().max()
        assert (bend[1:] - bend[:-1]).abs().max() < 0.05 * bend.abs().max()  # no jump at any key
    assert torch.equal(KeyFrames(ws[:1], loop=True).at(torch.arange(3)), ws[:1].expand(3, -1, -1))


def test_swing():
    assert [swing(-2, 4, share, loop=True) for share in (0, 0.25, 0.5, 0.75)] == pytest.approx([-2, 1, 4, 1])
    assert [swing(-2, 4, share, loop=False) for share in (0, 0.5, 1)] == pytest.approx([-2, 1, 4])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_odd_sizes_alpha_and_either_codec(tmp_path, monkeypatch, codec):
    if codec == "libx264" and codec not in av.codecs_available:
        pytest.skip("this PyAV was built without libx264")
    monkeypatch.setattr(av, "codecs_available", {codec})
    pixels = np.zeros((33, 47, 4), np.uint8)
    pixels[..., 0], pixels[:, :24, 3] = 200, 255
    picture = Image.fromarray(pixels)
    with video_file.mp4(tmp_path / "v.mp4", 10) as writer:
        for _ in range(3):
            writer.add(picture)
    assert writer.codec == codec
    with av.open(str(tmp_path / "v.mp4")) as container:
        found = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(found) == 3 and found[0].shape == (34, 48, 3)
    right = np.asarray(opaque(picture), dtype=int)
    assert right[0, 0].tolist() == [200, 0, 0] and right[0, 40, 0] in (102, 153)
    assert np.abs(found[0][:33, :47] - right).mean() < 12  # yuv420p halves the resolution of colour
    assert np.array_equal(video_file.even(picture)[33, :47], right[32])


def test_a_video_that_fails_leaves_the_former_one(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"before")
    with pytest.raises(RuntimeError), video_file.mp4(tmp_path / "v.mp4", 10) as writer:
        writer.add(Image.new("L", (64, 64)))
        raise RuntimeError("the GPU fell over")
    with pytest.raises(UserError, match="cannot write"), video_file.mp4(tmp_path / "no" / "v.mp4", 10) as writer:
        writer.add(Image.new("L", (64, 64)))
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    assert (tmp_path / "v.mp4").read_bytes() == b"before"


def test_mistakes_are_one_line(snapshot, directions, tmp_path, monkeypatch):
    def say(*arguments, out="v.mp4"):
        result = call(*arguments, "--out", tmp_path / out)
        assert result.exit_code == 2 and not isinstance(result.exception, Exception), (result.output, result.exception)
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    assert "let its name end in .mp4" in say(snapshot, out="v.avi")
    assert "nothing moves" in say(snapshot, "--seeds", "0", out="made/v.mp4")
    assert "--grid 3: write it like 3x2" in say(snapshot, "--grid", "3")
    assert "--grid 0x2: write it" in say(snapshot, "--grid", "0x2")
    uneven = say(snapshot, "--seeds", "0-6", "--grid", "3x1")
    assert "7 key frames cannot be dealt out to 3 videos; give 6 or 9" in uneven
    assert "nothing moves" in say(snapshot, "--seeds", "0")
    assert "nothing moves" in say(snapshot, "--seeds", "0", "--directions", directions, "--edit", "a=2")
    assert "has 6 ws" in say(snapshot, "--cutoff", "7")
    assert "was trained without labels" in say(snapshot, "--label", "all")
    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: _gone() if name == "av" else imported(name, *rest))
    assert 'pip install "hsrgan[video]"' in say(snapshot)
    assert not any(tmp_path.iterdir())


def _gone():
    raise ImportError("No module named 'av'")
