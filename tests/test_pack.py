"""tools/pack.py: every kind of source, labels, bad images, and packing that is interrupted."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hsrgan.tools.pack as pack_tool
from hsrgan.engine import data, shard_writer, shards, tar_index
from hsrgan.engine.errors import UserError

SCRIPT = Path(pack_tool.__file__)


def encode(image, kind="png", **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def picture(i, height=16, width=16):
    """Grey of value 4·i, so that packing keeps it whatever the filter."""
    return np.full((height, width, 3), 4 * i, np.uint8)


def folder(root, names, make=picture):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(make(i), compress_level=1))
    return root


def run(source, dest, *options):
    """Pack in this process -> (what it printed, manifest). Raises UserError with the line of a mistake."""
    arguments = [str(source), str(dest), "--resolution", "16", *map(str, options)]
    result = CliRunner().invoke(pack_tool.app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    if result.exit_code == 2:
        raise UserError(result.stderr.removeprefix("error: ").removesuffix("\n"))
    assert result.exit_code == 0, result.output
    return result.output, shards.load_manifest(dest)


def stream(manifest):
    """All images (float [n,H,W], channels averaged) and labels, once."""
    images, labels = next(data.open_stream(manifest, seed=0, start=0, global_batch=manifest.count))
    return images.float().mean(1), labels


def values(manifest):
    return sorted((stream(manifest)[0].mean((1, 2)) / 4).round().int().tolist())


def by_value(manifest):
    images, labels = stream(manifest)
    return dict(zip((images.mean((1, 2)) / 4).round().int().tolist(), labels.argmax(1).tolist(), strict=True))


def test_sub_folders_are_labels(tmp_path):
    names = [f"{('cat', 'dog', 'emu')[i % 3]}/{'deep/' * (i % 2)}{i}.png" for i in range(20)]
    output, manifest = run(folder(tmp_path / "src", names), tmp_path / "dst", "--shard-size", 8)
    assert manifest.class_names == ("cat", "dog", "emu") and manifest.class_counts == (7, 7, 6)
    assert [shard.count for shard in manifest.shards] == [8, 8, 4]
    assert by_value(manifest) == {i: i % 3 for i in range(20)}
    assert "20 images of 16x16, 3 classes" in output and "skipped" not in output
    for shard in manifest.shards:
        assert hashlib.sha256((manifest.root / shard.name).read_bytes()).hexdigest() == shard.sha256


def test_no_labels_where_there_is_nothing_to_tell_apart(tmp_path):
    one = folder(tmp_path / "one", ["only/a.png", "only/b.png"])
    mixed = folder(tmp_path / "mixed", ["a/a.png", "b/b.png", "c.png"])
    two = folder(tmp_path / "two", ["a/a.png", "b/b.png"])
    assert run(one, tmp_path / "1")[1].num_classes == run(mixed, tmp_path / "2")[1].num_classes == 0
    assert run(two, tmp_path / "3", "--no-labels")[1].num_classes == 0
    for source in (one, mixed):
        with pytest.raises(UserError, match="has no labels: they come from"):
            run(source, tmp_path / "4", "--labels")


def nvidia_zip(path, count=12, labels=None):
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(f"{i % 2:05d}/img{i:08d}.png", encode(picture(i)))
        archive.writestr("__MACOSX/._img.png", b"junk")
        if labels:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_zip_with_the_labels_of_dataset_json(tmp_path):
    labels = [[f"{i % 2:05d}/img{i:08d}.png", (i * i) % 5] for i in range(12)]  # classes 0, 1, 4: ids are kept
    source = nvidia_zip(tmp_path / "a.zip", labels=labels)
    _, manifest = run(source, tmp_path / "dst")
    assert manifest.class_names == ("0", "1", "2", "3", "4") and manifest.class_counts == (3, 5, 0, 0, 4)
    assert by_value(manifest) == {i: (i * i) % 5 for i in range(12)}
    assert run(source, tmp_path / "plain", "--no-labels")[1].num_classes == 0


def test_sub_folders_of_a_zip_are_labels_on_demand(tmp_path):
    source = nvidia_zip(tmp_path / "a.zip")
    assert run(source, tmp_path / "1")[1].num_classes == 0
    assert run(source, tmp_path / "2", "--labels")[1].class_names == ("00000", "00001")


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ([["00000/img00000000.png", 1]], "dataset.json in .* does not list 00000/img00000002.png"),
        ([[f"{i % 2:05d}/img{i:08d}.png", i / 2] for i in range(12)], "label 0.0, no whole number"),
        ({"a": 1}, "is not of the form"),
    ],
)
def test_bad_dataset_json_is_one_clear_line(tmp_path, labels, line):
    with pytest.raises(UserError, match=line):
        run(nvidia_zip(tmp_path / "a.zip", labels=labels), tmp_path / "dst")


def make_lmdb(path, items):
    with lmdb.open(str(path), map_size=1 << 24) as base, base.begin(write=True) as transaction:
        for key, value in items:
            transaction.put(key, value)
    return path


def test_lmdb_with_plain_keys_and_with_sizes(tmp_path):
    plain = make_lmdb(tmp_path / "plain", [(os.urandom(20) + b"\xff", encode(picture(i), "webp")) for i in range(9)])
    assert values(run(plain, tmp_path / "1")[1]) == list(range(9))
    sized = [(f"{size}-{i:05d}".encode(), encode(picture(i, size, size))) for i in range(5) for size in (8, 16, 32)]
    source = make_lmdb(tmp_path / "sized", [*sized, (b"length", b"5")])
    output, manifest = run(source, tmp_path / "2")
    assert values(manifest) == list(range(5)) and "enlarged" not in output
    assert run(source, tmp_path / "3", "--resolution", 64)[0].count("5 smaller than 64x64 and enlarged") == 1


def test_corrupt_images_are_listed_skipped_and_counted(tmp_path):
    source = folder(tmp_path / "src", [f"{i}.png" for i in range(10)])
    (source / "text.png").write_text("hello")
    (source / "empty.jpg").touch()
    rng = np.random.default_rng(0)
    (source / "half.png").write_bytes(encode(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))[:400])
    (source / "gone.png").symlink_to(tmp_path / "nowhere")
    (source / "notes.txt").write_text("no image, not even a corrupt one")
    output, manifest = run(source, tmp_path / "dst")
    assert manifest.count == 10 and values(manifest) == list(range(10))
    for line in ("text.png: no known image format", "empty.jpg: no known", "half.png: ", "gone.png: No such file"):
        assert f"skipped {line}" in output
    assert "; 4 skipped" in output and "notes.txt" not in output
    for name in os.listdir(source):
        if name[0].isdigit():
            os.remove(source / name)
    with pytest.raises(UserError, match="none of the 4 images can be used"):
        run(source, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_crop_and_resize(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200
    (tmp_path / "src").mkdir()
    (tmp_path / "src/wide.png").write_bytes(encode(wide))
    with pytest.raises(UserError, match=r"wide.png is 40x20, not square: give --crop center .*--crop skip"):
        run(tmp_path / "src", tmp_path / "dst")
    images, _ = stream(run(tmp_path / "src", tmp_path / "dst", "--crop", "center")[1])
    assert images.min() == images.max() == 200
    (tmp_path / "src/square.png").write_bytes(encode(picture(3)))
    output, manifest = run(tmp_path / "src", tmp_path / "skip", "--crop", "skip")
    assert values(manifest) == [3] and "skipped wide.png: 40x20 is not square" in output
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 30:] = 255
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge/edge.png").write_bytes(encode(edge))
    for name in ("box", "bilinear", "bicubic", "lanczos"):
        images, _ = stream(run(tmp_path / "edge", tmp_path / name, "--resize", name)[1])
        truth = Image.fromarray(edge).resize((16, 16), Image.Resampling[name.upper()])
        assert (images[0].numpy() == np.asarray(truth)[..., 0]).all()


def modes():
    clear = np.zeros((16, 16, 4), np.uint8)  # transparent black lies over white
    upright = Image.fromarray(np.repeat(np.array([[[0]], [[255]]], np.uint8), 8, 0).repeat(16, 1)[..., 0])
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    return {
        "grey": (encode(picture(25)[..., 0]), 100),
        "palette": (encode(Image.fromarray(picture(25)).quantize(4)), 100),
        "16 bit": (encode(np.full((16, 16), 100 * 257, np.uint16)), 100),
        "clear": (encode(clear), 255),
        "cmyk": (encode(Image.fromarray(picture(25)).convert("CMYK"), "jpeg"), 100),
        "turned": (encode(upright, "jpeg", quality=100, exif=exif), None),
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", modes())
def test_all_modes_become_grey_or_colour(tmp_path, mode, channels):
    raw, value = modes()[mode]
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.png").write_bytes(raw)
    _, manifest = run(tmp_path / "src", tmp_path / "dst", "--channels", channels)
    images, _ = next(data.open_stream(manifest, seed=0, start=0, global_batch=1))
    assert images.shape == (1, channels, 16, 16)
    if value is None:
        assert images[:, :, :7].min() > 250 and images[:, :, 9:].max() < 5
    else:
        assert (images.int() - value).abs().max() <= 4


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_lossy_formats_and_their_quality(tmp_path, image_format):
    rng = np.random.default_rng(0)
    source = folder(
        tmp_path / "src",
        [f"{i}.png" for i in range(5)],
        lambda i: picture(i) + rng.integers(0, 9, (16, 16, 3), np.uint8),
    )
    sizes = {}
    for quality in (20, 95):
        options = ["--format", image_format, *(["--quality", 20] if quality == 20 else [])]
        _, manifest = run(source, tmp_path / f"q{quality}", *options)
        assert manifest.image_format == image_format and manifest.count == 5
        assert json.loads((manifest.root / "manifest.json").read_text())["encoding"]["quality"] == quality
        assert (stream(manifest)[0].mean((1, 2)) < 30).all()
        sizes[quality] = sum(len(read) for read in fragments(manifest, image_format))
    assert sizes[20] < sizes[95]


def fragments(manifest, suffix):
    for shard in manifest.shards:
        raw, offsets = (manifest.root / shard.name).read_bytes(), np.load(manifest.root / shard.offsets_name)
        for begin, end in itertools.pairwise(offsets):
            yield tar_index.read_fragment(raw[int(begin) : int(end)])[suffix]


def test_packing_permutes_by_seed_and_repeats_exactly(tmp_path):
    source = folder(tmp_path / "src", [f"{i:03d}.png" for i in range(60)])
    first, again, other = (run(source, tmp_path / n, "--seed", seed)[1] for n, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first.sha256 == again.sha256 != other.sha256

    def order(manifest):
        return [int(np.asarray(Image.open(io.BytesIO(raw)))[0, 0, 0]) // 4 for raw in fragments(manifest, "png")]

    assert sorted(order(first)) == sorted(order(other)) == list(range(60))
    assert sum(map(int.__eq__, order(first), range(60))) < 10 > sum(map(int.__eq__, order(first), order(other)))
    some = run(source, tmp_path / "d", "--max-images", 7)[1]
    assert some.count == 7 and order(some) == order(first)[:7]


def test_a_complete_data_set_is_replaced_only_by_force(tmp_path):
    source = folder(tmp_path / "src", [f"{i}.png" for i in range(9)])
    _, before = run(source, tmp_path / "dst", "--shard-size", 2)
    with pytest.raises(UserError, match=r"already holds a complete data set: .* --force"):
        run(source, tmp_path / "dst")
    assert shards.load_manifest(tmp_path / "dst") == before
    (tmp_path / "dst" / "README").write_text("mine")
    run(source, tmp_path / "dst", "--force")
    assert sorted(os.listdir(tmp_path / "dst")) == [".lock", "00000.npy", "00000.tar", "README", "manifest.json"]


def test_shards_of_others_are_never_touched(tmp_path):
    source = folder(tmp_path / "src", ["a.png"])
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/00000.tar").write_text("somebody's")
    for options in ([], ["--force"], []):
        with pytest.raises(UserError, match=r"holds 00000\.tar that hsrgan did not pack"):
            run(source, tmp_path / "dst", *options)
    assert (tmp_path / "dst/00000.tar").read_text() == "somebody's"


def test_two_packers_do_not_share_a_folder(tmp_path):
    source = folder(tmp_path / "src", ["a.png"])
    held = shard_writer.folder_lock(tmp_path / "dst", wait=False)
    with held, pytest.raises(UserError, match="another process is packing"):
        run(source, tmp_path / "dst")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--resolution", "100"], "--resolution is 100, allowed: .*nearest: 104 and 96"),
        (["--resolution", "16x24x3"], "--resolution 16x24x3: write the side, or height x width"),
        (["--channels", "2"], r"--channels 2: 3 \(colour\), 1 \(grey\) or 4"),
        (["--channels", "4", "--format", "jpg"], "jpg has no alpha"),
        (["--channels", "1", "--format", "webp"], "webp has no grey"),
        (["--quality", "90"], "only with --format jpg or webp"),
        (["--quality", "101", "--format", "jpg"], "--quality 101: 1 to 100"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path, options, line):
    with pytest.raises(UserError, match=line):
        run(folder(tmp_path / "src", ["a.png"]), tmp_path / "dst", *options)
    assert not (tmp_path / "dst").exists()


def test_bad_sources_and_targets_are_one_clear_line(tmp_path):
    source = folder(tmp_path / "src", ["a.png"])
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for bad_source, line in (
        (tmp_path / "no", "there is no"),
        (tmp_path / "file", "is no folder, no zip and no LMDB"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "no.lmdb", "cannot open the LMDB"),
    ):
        with pytest.raises(UserError, match=line):
            run(bad_source, tmp_path / "dst")
    for bad_target, line in (
        (tmp_path / "file", "is a file: name a folder"),
        (source, "is the source itself"),
        (Path("/proc/shards"), "/proc/shards: "),
    ):
        with pytest.raises(UserError, match=line):
            run(source, bad_target)


def test_a_mistake_ends_the_script_with_one_line_and_exit_2(tmp_path):
    source = folder(tmp_path / "src", ["a.png"], lambda i: picture(i, 16, 20))
    done = subprocess.run(
        [sys.executable, SCRIPT, source, tmp_path / "dst", "--resolution", "16"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "error" in line] == [done.stderr.splitlines()[-1]]
    assert "Traceback" not in done.stderr and "a.png is 20x16, not square" in done.stderr
