"""tools/pack.py at scale: processes, interruptions, memory, the cost beside the codec, and --verify."""

import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_pack import SCRIPT, encode, folder, run

from hsrgan.engine import shards
from hsrgan.engine.errors import UserError
from hsrgan.tools import pack_images, pack_shards, pack_sources


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough work to be interrupted in, and what it should become."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)
    source = folder(root / "src", [f"{i}.png" for i in range(100)], lambda i: np.roll(noise, i, 0))
    return source, run(source, root / "dst", "--resolution", 256, "--shard-size", 10)[1]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_packing_leaves_nothing_that_looks_complete(many, tmp_path, kill):
    source, truth = many
    dest = tmp_path / "dst"
    command = [sys.executable, SCRIPT, source, dest, "--resolution", "256", "--shard-size", "10"]
    # the tests may run in a shell's background, where SIGINT is ignored
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as packer:
        while not (dest / "00002.tar").exists():
            assert packer.poll() is None, packer.stderr.read()
            time.sleep(0.001)
        packer.send_signal(kill)
        errors = packer.communicate(timeout=20)[1]
    assert packer.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
    assert "Traceback" not in errors and ("interrupted" in errors) == (kill == signal.SIGINT)
    assert not (dest / "manifest.json").exists()
    with pytest.raises(UserError, match="is not finished: run the same"):
        shards.load_manifest(dest)
    recorded = [json.loads(line) for line in (dest / "manifest.json.part").read_text().splitlines()[1:]]
    kept = {row["shard"]["name"]: os.stat(dest / row["shard"]["name"]).st_mtime_ns for row in recorded}
    assert kept and len(kept) < 10
    if kill != signal.SIGKILL:  # what is left is what is finished
        both = {name for shard in kept for name in (shard, shard.replace("tar", "npy"))}
        assert {*os.listdir(dest)} == {".lock", "manifest.json.part", *both}
    (dest / "00099.tar.part").touch()  # of a longer run that was killed before
    with open(dest / "manifest.json.part", "a") as record:
        record.write('{"number": 9, "sha')  # torn
    output, manifest = run(source, dest, "--resolution", 256, "--shard-size", 10)
    assert f"going on after {len(kept)} finished shards" in output and manifest.sha256 == truth.sha256
    assert sorted(os.listdir(dest)) == sorted(os.listdir(truth.root))
    assert kept == {name: os.stat(dest / name).st_mtime_ns for name in kept}  # not written again


def test_another_packing_does_not_go_on_with_what_is_there(tmp_path):
    names = [f"{i}.png" for i in range(9)]
    source = folder(tmp_path / "src", names)
    for change in (["--seed", 1], ["--shard-size", 4], ["--channels", 1], None):
        dest = tmp_path / str(change)
        run(source, dest, "--shard-size", 3)
        record = shards_record(dest)
        if change is None:
            (source / "0.png").rename(source / "00.png")
        output, manifest = run(source, dest, "--shard-size", 3, *(change or []))
        assert "starting over: what" in output and record
        assert manifest.sha256 == run(source, tmp_path / f"{change} new", "--shard-size", 3, *(change or []))[1].sha256


def shards_record(dest):
    """Make a finished packing look as if it had been killed before its last step -> the record."""
    manifest = shards.load_manifest(dest)
    done = [pack_shards.Done(i, shard) for i, shard in enumerate(manifest.shards)]
    record = dest / "manifest.json.part"
    record.write_text("\n".join(['{"of": "before"}', *(json.dumps(dataclasses.asdict(d)) for d in done)]))
    (dest / "manifest.json").unlink()
    return record


def test_the_number_of_processes_changes_nothing(tmp_path):
    source = folder(tmp_path / "src", [f"{i % 3}/{i:03d}.png" for i in range(60)])
    for i in (5, 21, 22, 23):
        (source / f"{i % 3}/{i:03d}.png").write_bytes(b"no image")
    results = {}
    for processes in (1, 3):
        output, manifest = run(source, tmp_path / str(processes), "--shard-size", 4, "--processes", processes)
        assert "; 4 skipped" in output
        results[processes] = {
            path.name: path.read_bytes() for path in manifest.root.iterdir() if path.name != ".lock"
        }
    assert results[1] == results[3] and len(results[1]) >= 2 * 14 + 1
    assert sum(shard.count for shard in manifest.shards) == manifest.count == sum(manifest.class_counts) == 56


PACK = """
import sys
from pathlib import Path
from hsrgan.tools import pack, pack_shards, pack_sources
assert "torch" not in sys.modules, "torch alone is 400 MB"
def peak():  # VmHWM in kB; ru_maxrss would be that of whoever started us
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
peaks = []
real = pack_shards.pack_shard
def packed(job):
    done = real(job)
    done.size = peak()
    return done
pack.pack_shard = packed
record = pack.Record.add
pack.Record.add = lambda self, done: (peaks.append(done.size), record(self, done))
try:
    pack.app()
finally:
    print(peak(), max(peaks))
"""


def test_a_million_labelled_images_take_less_than_500_mb(tmp_path):
    """Grown from 2,000 to 12,000 images of 8×8 in a zip with a dataset.json: what one more costs, in this process and
    in those that pack, times a million, with what the program takes by itself. Listing alone, which is the most, is
    counted exactly. Labels only add to it."""
    png = encode(np.zeros((8, 8, 3), np.uint8))
    peaks = []
    for count in (2000, 12_000):
        with zipfile.ZipFile(tmp_path / f"{count}.zip", "w") as archive:
            for i in range(count):
                archive.writestr(f"{i // 1000:05d}/img{i:08d}.png", png)
            labels = [[f"{i // 1000:05d}/img{i:08d}.png", i % 1000] for i in range(count)]
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
        command = [sys.executable, "-c", PACK, tmp_path / f"{count}.zip", tmp_path / str(count), "--resolution", "8",
                   "--processes", "2"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        peaks.append([int(word) * 1024 for word in done.stdout.split()])
    growth = [(after - before) / 10_000 for before, after in zip(*peaks, strict=True)]  # bytes an image
    tracemalloc.start()
    source = pack_sources.open_source(tmp_path / "12000.zip", labels=True, resolution=8)
    peak = tracemalloc.get_traced_memory()[1] / 12_000
    kept = sum(part.nbytes for part in (source.names.ends, source.labels, source.entries)) + len(source.names.text)
    tracemalloc.stop()
    assert len(source.names) == 12_000 and kept / 12_000 < 64
    assert len(source.class_names) == 1000
    main, packing = peaks[1]
    print(f"{main / 1e6:.0f} MB + {growth[0]:.0f} B an image, {peak:.0f} B in listing; {packing / 1e6:.0f} MB each")
    assert main + 1e6 * max(growth[0], peak) + 2 * packing < 500e6
    assert growth[1] < 50  # nothing of the list is in the processes that pack


def test_packing_costs_little_more_than_the_codec(tmp_path):
    """CPU time of one shard of 64×64 photographs, against decoding, resizing and encoding them and nothing else."""
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)
    source = folder(tmp_path / "src", [f"{i}.png" for i in range(150)], lambda i: np.roll(np.asarray(base), i, 0))
    crop, resize, png = pack_images.Crop.none, pack_images.Filter.lanczos, pack_images.Format.png
    recipe = pack_images.Recipe((64, 64), crop, resize, 3, png, None)
    listed = pack_sources.open_source(source, labels=None, resolution=64)
    (job,) = pack_shards.jobs_of(listed, recipe, tmp_path, seed=0, limit=150, shard_size=150, finished=set())

    def codec():
        for name in job.names:
            image = Image.open(source / name).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
            image.save(io.BytesIO(), "png", compress_level=3)

    def cpu(work):
        times = []
        for _ in range(3):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return min(times)

    assert cpu(lambda: pack_shards.pack_shard(job)) < 1.5 * cpu(codec)


def spoil(root, wrong):
    if wrong == "a bit of an image":
        raw = bytearray((root / "00001.tar").read_bytes())
        raw[int(np.load(root / "00001.npy")[2]) + 1540] ^= 1
        (root / "00001.tar").write_bytes(raw)
    elif wrong == "cut":
        os.truncate(root / "00001.tar", 3000)
    elif wrong == "gone":
        (root / "00001.tar").unlink()
    elif wrong == "offsets":
        np.save(root / "00001.npy", np.arange(9, dtype=np.uint64))
    elif wrong == "one more":
        (root / "00077.tar").write_bytes(b"")
    else:
        content = json.loads((root / "manifest.json").read_text())
        if wrong == "class counts":
            content["labels"]["class_counts"] = [11, 9]
        else:
            content["shards"][1]["count"] -= 1
            content["count"] -= 1
        (root / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("wrong", "lines"),
    [
        ("a bit of an image", ["00001.tar: its SHA-256 is not", "00001.tar: sample 2 is no whole png image"]),
        ("cut", ["00001.tar: 3000 bytes, its manifest", "00001.tar: damaged, not a tar from byte 2560 on"]),
        ("gone", ["00001.tar: cannot be read (No such file"]),
        ("offsets", ["00001.tar: 00001.npy has other offsets than the tar"]),
        ("count", ["00001.tar: 8 samples, its manifest says 7"]),
        ("class counts", ["class 0: 10 images, its manifest says 11", "class 1: 10 images, its manifest says 9"]),
        ("one more", ["00077.tar: not in the manifest"]),
        ("nothing", []),
    ],
)
def test_verify_lists_what_is_wrong(tmp_path, wrong, lines):
    names = [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(20)]
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    source = folder(tmp_path / "src", names, lambda i: np.roll(noise, i, 0))
    run(source, tmp_path / "dst", "--shard-size", 8)
    if wrong != "nothing":
        spoil(tmp_path / "dst", wrong)
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "dst", "--verify", "--processes", "2"],
                          capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})  # fmt: skip
    said = [line for line in done.stderr.splitlines() if not line.startswith("checking")]
    for line, wanted in zip(said, lines, strict=False):
        assert line.startswith(wanted), done.stderr
    if lines:
        assert done.returncode == 2 and len(said) == len(lines) + 1
        assert said[-1].startswith(f"error: {tmp_path / 'dst'} has {len(lines)} problem")
    else:
        assert done.returncode == 0 and said == [f"{tmp_path / 'dst'}: 3 shards, 20 images, all as the manifest says"]
