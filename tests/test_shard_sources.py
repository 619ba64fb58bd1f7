"""What data.shards may say, and shards that hsrgan did not pack."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from shard_fixtures import encode, numbers, pack, picture

from hsrgan.engine import data, shard_sources, tar_index
from hsrgan.engine.errors import UserError
from hsrgan.engine.shard_sources import open_shards


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def bare(packed, tmp_path):
    """The shards alone, without manifest and offsets."""
    (tmp_path / "bare").mkdir()
    for shard in packed.shards:
        shutil.copy(packed.root / shard.name, tmp_path / "bare")
    return tmp_path / "bare"


def opened(spec, tmp_path, **options):
    return open_shards(str(spec), cache=tmp_path / "cache", quiet=True, **options)


def sequence(manifest, batches=8):
    stream = data.open_stream(manifest, seed=7, start=0, global_batch=16, window=3)
    parts = [next(stream) for _ in range(batches)]
    return [pair for images, labels in parts for pair in zip(numbers(images), labels.argmax(1).tolist(), strict=True)]


def as_list(packed, bare, tmp_path):
    lines = ["# the shards", *(f"{bare}/{shard.name}  # one" for shard in packed.shards[:6]), ""]
    (tmp_path / "list.txt").write_text("\n".join([*lines, *(f"file://{bare}/{s.name}" for s in packed.shards[6:])]))
    return tmp_path / "list.txt"


SPECS = {
    "manifest": lambda packed, bare, tmp_path: packed.root / "manifest.json",
    "packed folder": lambda packed, bare, tmp_path: packed.root,
    "folder": lambda packed, bare, tmp_path: bare,
    "pattern": lambda packed, bare, tmp_path: f"{bare}/{{00000..00010}}.tar",
    "list": as_list,
    "several": lambda packed, bare, tmp_path: f"{bare}/0000{{0..8}}.tar::{bare}/00009.tar::file:{bare}/00010.tar",
}


@pytest.mark.parametrize("form", SPECS)
def test_every_form_streams_the_same_images(packed, bare, tmp_path, form):
    manifest = opened(SPECS[form](packed, bare, tmp_path), tmp_path)
    assert (manifest.count, manifest.resolution, manifest.channels, manifest.image_format) == (103, (4, 4), 3, "png")
    assert manifest.class_counts == packed.class_counts and manifest.num_classes == 5
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in packed.shards]
    assert sequence(manifest) == sequence(packed)
    manifest.expect(resolution=4, channels=3, labels=True)


def test_shards_are_read_through_once(bare, tmp_path, monkeypatch):
    first, read = opened(bare, tmp_path), []
    real = shard_sources.sample_offsets
    monkeypatch.setattr(shard_sources, "sample_offsets", lambda *a: read.append(a) or real(*a))
    assert opened(f"{bare}/{{00000..00010}}.tar", tmp_path).shards == first.shards and not read
    os.utime(bare / "00003.tar", (1, 1))  # another file, for all that one can see
    assert opened(bare, tmp_path).sha256 == first.sha256 and len(read) == 1


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("{bare}/{{0..3.tar", "a brace is not closed"),
        ("{bare}/{{00009..00012}}.tar", "00011.tar is missing .*: list the shards that there are"),
        ("{bare}/00001.tar::{bare}/00001.tar", "names .*00001.tar twice"),
        ("{bare}/no.txt", "cannot read .*no.txt"),
        ("{bare}/empty.txt", "names no shards"),
        ("{bare}/none", "there is no .*manifest.json: make it"),
        ("{bare}/cut.tar", r"cut.tar is damaged \(.*\): mend it or leave it out"),
        ("{bare}/middle.tar", r"middle.tar is damaged \(not a tar from byte \d+ on\)"),
        ("{bare}/text.tar", "text.tar is damaged"),
        ("{bare}/words.tar", "holds no image of the formats png, jpg, webp"),
    ],
)
def test_what_cannot_be_is_one_line(bare, tmp_path, spec, line):
    (bare / "none").mkdir()
    (bare / "empty.txt").write_text("# nothing\n")
    whole = (bare / "00001.tar").read_bytes()
    (bare / "cut.tar").write_bytes(whole[:6000])
    (bare / "middle.tar").write_bytes(whole[:4096] + b"x" * 512 + whole[4608:])
    (bare / "text.tar").write_text("no tar " * 500)
    foreign(bare / "words.tar", [("a.txt", b"hello")])
    with pytest.raises(UserError, match=line) as caught:
        opened(spec.format(bare=bare), tmp_path)
    assert "\n" not in str(caught.value)


def foreign(path, files, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, value in files:
            member = tarfile.TarInfo(name)
            if value is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size, member.mtime = len(value), 1.5  # which costs a PAX header a file
                tar.addfile(member, io.BytesIO(value))
    return path


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_of_others_are_read(tmp_path, form):
    """Folders, dots in folder names, long names, .jpeg and .JPG, several files a sample, and junk between them."""
    long = "/".join(["a" * 60] * 3)
    files = [("data.v1/", None)]
    for i in range(8):
        suffix = ("jpg", "jpeg", "JPG")[i % 3]
        key = f"{long}/{i}" if i % 2 else f"data.v1/{i}"
        image = encode(np.full((16, 16, 3), 20 * i, np.uint8), "jpg")
        files += [(f"{key}.{suffix}", image), (f"{key}.json", b"{}"), (f"{key}.cls", f"{i % 2}\n".encode())]
    files[7:7] = [("junk/", None)]
    foreign(tmp_path / "a.tar", files, form)
    foreign(tmp_path / "b.tar", [*files[1:4], ("README", b"hello"), *files[4:7]], form)
    manifest = opened(f"{tmp_path}/{{a,b}}.tar", tmp_path, max_bad=0.5)
    assert (manifest.image_format, manifest.resolution, manifest.num_classes) == ("jpg", (16, 16), 2)
    assert [shard.count for shard in manifest.shards] == [8, 3]  # the README too, until its turn comes
    stream = data.open_stream(manifest, seed=0, start=0, global_batch=11)
    images, labels = next(stream)
    found = sorted((images.float().mean((1, 2, 3)) / 20).round().int().tolist())
    assert found in (sorted([*range(8), 0, 1, 1]), sorted([*range(8), 0, 0, 1]))
    assert labels.argmax(1).tolist() == [round(v / 20) % 2 for v in images.float().mean((1, 2, 3)).tolist()]


def test_offsets_are_those_that_packing_writes(packed):
    for shard in packed.shards:
        with open(packed.root / shard.name, "rb") as file:
            assert (tar_index.sample_offsets(file) == np.load(packed.root / shard.offsets_name)).all()


def test_both_readers_of_a_fragment_agree(packed):
    raw = (packed.root / "00000.tar").read_bytes()
    offsets = np.load(packed.root / "00000.npy").astype(int)
    for i in range(10):
        fragment = raw[offsets[i] : offsets[i + 1]]
        files = tar_index.read_fragment(fragment)
        assert files == tar_index._by_tarfile(fragment) == {"cls": str(i % 5).encode(), "png": encode(picture(i))}
    for wrong in (fragment[:700], fragment[:-512], b"x" * 1024, b"", fragment[512:]):
        with pytest.raises(ValueError):
            tar_index.read_fragment(wrong)


def test_copies_of_a_shard_are_indexed_at_once(packed, tmp_path):
    """Sidecars are named by what is in a shard: eight threads write the same ones."""
    (tmp_path / "copies").mkdir()
    for i in range(16):
        shutil.copy(packed.root / packed.shards[0].name, tmp_path / "copies" / f"{i}.tar")
    assert opened(tmp_path / "copies", tmp_path).count == 16 * packed.shards[0].count
