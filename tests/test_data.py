"""The stream of packed shards: one order for all ranks and workers, exact resuming, and one clear line for bad data."""

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import webdataset as wds
from shard_fixtures import COUNT, encode, numbers, pack, picture

from hsrgan.engine import data, digits, shards
from hsrgan.engine.errors import UserError, user_errors

WINDOW = 3  # so that the last block has 2 shards


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def own(manifest, tmp_path):
    """A copy of the shards to damage."""
    shutil.copytree(manifest.root, tmp_path / "own")
    return tmp_path / "own"


def open_stream(manifest, **options):
    return data.open_stream(manifest, **({"seed": 7, "start": 0, "global_batch": 16, "window": WINDOW} | options))


def read(manifest, batches, **options):
    """Numbers, labels and flips of the first batches, over all ranks of one stream each, in order of position."""
    world = options.get("world", 1)
    streams = [open_stream(manifest, rank=rank, **options) for rank in range(world)]
    images, labels = zip(*(next(stream) for _ in range(batches) for stream in streams), strict=True)
    images, labels = torch.cat(images), torch.cat(labels)
    return list(zip(numbers(images), labels.argmax(1).tolist(), (images[:, 0, 0, 0] == 0).tolist(), strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_workers_share_one_sequence(manifest, world, workers):
    # Positions 5 … 245: two epochs' ends and every block are crossed.
    truth = read(manifest, 15, start=5, mirror=True)
    shared = read(manifest, 15, start=5, mirror=True, world=world, workers=workers)
    assert shared == truth
    assert sorted(n for n, _, _ in shared[COUNT - 5 : 2 * COUNT - 5]) == list(range(COUNT))  # epoch 1, each image once


@pytest.mark.parametrize("start", [1, 16, 77, 102, 103, 104, 1000])
def test_resuming_anywhere_continues_the_sequence(manifest, start):
    straight = list(itertools.islice(data._places(data.Plan([10] * 10 + [3], 7, WINDOW), 0, 1, 0, 1), 1200))
    resumed = list(itertools.islice(data._places(data.Plan([10] * 10 + [3], 7, WINDOW), start, 1, 0, 1), 150))
    assert resumed == straight[start : start + 150]
    images = read(manifest, 4, start=start, mirror=True, workers=2)
    assert images == [(s * 10 + i, (s * 10 + i) % 5, flip) for s, i, flip in straight[start : start + 64]]


def test_every_image_comes_once_an_epoch_in_another_order(manifest):
    epochs = [[n for n, _, _ in read(manifest, 1, global_batch=COUNT, start=e * COUNT)] for e in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    other_seed = [n for n, _, _ in read(manifest, 1, global_batch=COUNT, seed=8)]
    orders = [*epochs, other_seed, list(range(COUNT))]
    assert all(sum(map(int.__eq__, a, b)) < 15 for a, b in itertools.combinations(orders, 2))


def test_samples_mix_within_the_window_only(manifest):
    plan = data.Plan([10] * 10 + [3], 7, WINDOW)
    block = [plan[p][0] for p in range(30)]
    assert len(set(block[:10])) == len(set(block)) == WINDOW


def test_labels_belong_to_their_images(manifest):
    for number, label, _ in read(manifest, 10):
        assert label == number % 5
    assert next(open_stream(manifest))[1].sum(1).tolist() == [1.0] * 16


def test_mirror_is_half_of_the_positions_and_off_by_default(manifest):
    flips = [flip for _, _, flip in read(manifest, 40, mirror=True)]
    assert 0.42 < np.mean(flips) < 0.58
    assert not any(flip for _, _, flip in read(manifest, 7))
    images = [next(open_stream(manifest, mirror=mirror))[0] for mirror in (False, True)]
    for plain, mirrored, flip in zip(*images, flips, strict=False):
        assert torch.equal(mirrored, plain.flip(-1) if flip else plain)


def test_the_order_is_pinned():
    """A checkpoint of today resumes in the same order tomorrow: a change of these numbers breaks everybody's runs."""
    plan = data.Plan([10] * 10 + [3], 7, WINDOW)
    assert hashlib.sha256(repr([plan[p] for p in range(300)]).encode()).hexdigest()[:16] == "5fa67b3dd7241735"


def rank_correlation(order):
    return abs(np.corrcoef(np.arange(len(order)), order)[0, 1])  # Spearman's: both are ranks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_stream_order_is_not_file_order(seed, epoch):
    """Spearman's |ρ| between file order and stream order, over an epoch. Of files that tools/pack.py permuted (second),
    it is that of any permutation, 1/√n; of shards in the order they were found, whole windows move together.
    """
    counts = [5 + i % 3 for i in range(4000)]  # uneven; 4,000 shards in windows of 16
    plan, first = data.Plan(counts, seed, 16), np.cumsum(counts) - counts
    stream = np.array([first[s] + i for s, i, _ in (plan[epoch * plan.total + p] for p in range(plan.total))])
    assert sorted(stream.tolist()) == list(range(plan.total))
    packed = np.random.Generator(np.random.Philox(seed)).permutation(plan.total)
    assert rank_correlation(stream) < 0.05 and rank_correlation(packed[stream]) < 0.05
    # neighbours in the stream are no neighbours in the files: |difference| is n/3 for a uniform choice
    assert 0.32 < np.abs(np.diff(packed[stream])).mean() / plan.total < 0.345


@pytest.mark.parametrize("start", [0, 29, 103, 777, 9_990])
def test_resuming_reads_nothing_of_the_epoch_up_to_there(manifest, start, monkeypatch):
    """An image costs one open, one file of offsets and one pread, and webdataset's `batched` takes one image more; a
    batch costs a pread an image and at most an open a shard of its windows."""
    calls = []
    for name in ("open", "pread"):
        real = getattr(os, name)
        monkeypatch.setattr(data.os, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    next(open_stream(manifest, start=start, global_batch=1))
    assert calls.count("pread") == 2 >= calls.count("open")
    calls.clear()
    next(open_stream(manifest, start=start))
    assert calls.count("pread") == 17 and calls.count("open") <= 2 * WINDOW


def test_resampled_shards_are_endless_and_resume_anywhere(manifest):
    counts = [10] * 10 + [3]
    plan = data.Plan(counts, 7, WINDOW, resampled=True)
    places = [plan[p] for p in range(28 * 500)]
    assert all(0 <= i < counts[s] for s, i, _ in places)
    assert [data.Plan(counts, 7, WINDOW, resampled=True)[p] for p in (0, 27, 28, 13_999)] == [
        places[p] for p in (0, 27, 28, 13_999)
    ]
    draws = [{s for s, _, _ in places[b * 28 : (b + 1) * 28]} for b in range(500)]
    assert max(map(len, draws)) == WINDOW and len({frozenset(d) for d in draws}) > 100  # drawn anew every time
    times = np.zeros(103)
    for s, i, _ in places:
        times[s * 10 + i] += 1
    assert times.min() > 60 and times.max() < 220  # 136 each in the mean
    assert not all(len(set(places[e * 103 : (e + 1) * 103])) == 103 for e in range(3))  # no epochs
    truth = read(manifest, 15, start=5, resampled=True)
    assert read(manifest, 15, start=5, resampled=True, world=2, workers=2) == truth != read(manifest, 15, start=5)


def test_a_hundred_million_images_cost_no_more_than_their_block():
    begin = time.perf_counter()
    plan = data.Plan([1000] * 100_000, 3, 16)
    assert 0 <= plan[12_345_678_901][1] < 1000
    assert time.perf_counter() - begin < 0.5


def test_batches_are_uint8_channels_last_and_float_labels(manifest, tmp_path):
    images, labels = next(open_stream(manifest, workers=1))
    assert images.shape == (16, 3, 4, 4) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (16, 5) and labels.dtype == torch.float32
    unlabelled = pack(tmp_path / "grey", classes=0, channels=1, picture=lambda i: picture(i)[..., 0])
    images, labels = next(open_stream(unlabelled))
    assert images.shape == (16, 1, 4, 4) and labels.shape == (16, 0)


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_lossy_formats_come_back_close(tmp_path, image_format):
    manifest = pack(tmp_path, 20, picture=lambda i: np.full((4, 4, 3), 10 * i, np.uint8), image_format=image_format)
    images, labels = next(open_stream(manifest, global_batch=20))
    assert sorted((images.float().mean((1, 2, 3)) / 10).round().int().tolist()) == list(range(20))
    assert labels.argmax(1).tolist() == [round(v / 10) % 5 for v in images.float().mean((1, 2, 3)).tolist()]


def test_stock_webdataset_reads_the_same_shards(manifest):
    urls = [str(manifest.root / shard.name) for shard in manifest.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [np.asarray(sample["png"])[0, 0, 0] - 1 for sample in samples] == list(range(COUNT))
    assert [sample["cls"] for sample in samples] == [i % 5 for i in range(COUNT)]


def test_manifest_counts_and_hashes(manifest):
    assert (manifest.count, manifest.resolution, manifest.channels) == (COUNT, (4, 4), 3)
    assert manifest.class_names == ("c0", "c1", "c2", "c3", "c4") and manifest.class_counts == (21, 21, 21, 20, 20)
    assert [shard.count for shard in manifest.shards] == [10] * 10 + [3]
    for shard in manifest.shards:
        raw = (manifest.root / shard.name).read_bytes()
        assert (hashlib.sha256(raw).hexdigest(), len(raw)) == (shard.sha256, shard.bytes)
    assert shards.load_manifest(manifest.root / "manifest.json") == manifest


def replace_sample(root, image, label=b"1"):
    """Put another file into sample 4 of shard 00002, keeping sizes, offsets and the manifest true."""
    members = [(f"{i:08d}", image if i == 4 else encode(picture(i)), label if i == 4 else b"0") for i in range(10)]
    offsets = [0]
    with open(root / "00002.tar", "wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as tar:
        for key, png, cls in members:
            tar.write({"__key__": key, "png": png, "cls": cls})
            offsets.append(tar.tarstream.offset)
    np.save(root / "00002.npy", np.array(offsets, np.uint64))
    edit_manifest(root, lambda m: m["shards"][2].update(bytes=os.path.getsize(root / "00002.tar")))


def edit_manifest(root, edit):
    content = json.loads((root / "manifest.json").read_text())
    edit(content)
    (root / "manifest.json").write_text(json.dumps(content))


def cut(file, size):
    os.truncate(file, os.path.getsize(file) + size)


def overwrite(file, at, raw):
    with open(file, "r+b") as f:
        f.seek(at)
        f.write(raw)


GREY = encode(np.zeros((4, 4), np.uint8))
BIG = encode(np.zeros((8, 8, 3), np.uint8))
DAMAGE = {
    "missing shard": (lambda r: (r / "00002.tar").unlink(), "00002.tar is missing"),
    "missing offsets": (lambda r: (r / "00002.npy").unlink(), "00002.npy is missing"),
    "truncated tar": (lambda r: cut(r / "00002.tar", -100), "00002.tar has .* truncated"),
    "altered tar": (lambda r: cut(r / "00002.tar", 100), "00002.tar has .* altered"),
    "header overwritten": (lambda r: overwrite(r / "00002.tar", 0, b"x" * 512), "sample 0 of .*00002.tar is damaged"),
    "image overwritten": (lambda r: overwrite(r / "00002.tar", 1536, b"x" * 64), "sample 0 of .*00002.tar is no whole"),
    "offsets of another": (lambda r: np.save(r / "00002.npy", np.arange(11, dtype=np.uint64)), "00002.tar is damaged"),
    "offsets too short": (lambda r: np.save(r / "00002.npy", np.arange(4, dtype=np.uint64)), "00002.npy is damaged"),
    "no offsets at all": (lambda r: (r / "00002.npy").write_bytes(b""), "00002.npy is damaged"),
    "another resolution": (lambda r: replace_sample(r, BIG), "sample 4 of .*00002.tar is 8x8, .* says 4x4"),
    "grey among colour": (lambda r: replace_sample(r, GREY), "sample 4 of .*00002.tar is a L image, .* 3 channel"),
    "half an image": (lambda r: replace_sample(r, GREY[:40]), "sample 4 of .*00002.tar is no whole png"),
    "label out of range": (lambda r: replace_sample(r, encode(picture(4)), b"5"), "sample 4 .* label 5, .* 0 to 4"),
    "label not a number": (lambda r: replace_sample(r, encode(picture(4)), b"cat"), "sample 4 of .* label b'cat'"),
    "no manifest": (lambda r: (r / "manifest.json").unlink(), "there is no .*manifest.json: make it"),
    "no hash": (lambda r: edit_manifest(r, lambda m: m["shards"][0].update(sha256="../x")), "00000.tar has no SHA-256"),
    "shard by URL": (lambda r: edit_manifest(r, lambda m: m["shards"][0].update(name="pipe:cat x.tar")), "misnamed"),
    "unfinished": (lambda r: (r / "manifest.json").rename(r / "manifest.json.part"), "is not finished"),
    "manifest cut": (lambda r: cut(r / "manifest.json", -30), "manifest.json is damaged"),
    "manifest not ours": (lambda r: (r / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "manifest lacks a key": (lambda r: edit_manifest(r, lambda m: m.pop("channels")), "no entry 'channels'"),
    "manifest lost a shard": (lambda r: edit_manifest(r, lambda m: m["shards"].pop()), "do not add up to 103"),
    "shard outside": (lambda r: edit_manifest(r, lambda m: m["shards"][0].update(name="../a.tar")), "misnamed"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_data_is_one_clear_line(own, damage, workers):
    inflict, line = DAMAGE[damage]
    inflict(own)
    with pytest.raises(UserError, match=line) as caught:
        stream = open_stream(shards.load_manifest(own), workers=workers)
        for _ in range(8):  # one epoch and a little
            next(stream)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    assert "again" in message or "tools/pack.py" in message


def test_expect_names_the_recipe_key_and_the_remedy(manifest, tmp_path):
    manifest.expect(resolution=4, channels=3, labels=True)
    with pytest.raises(UserError, match=r"4x4 .*data\.resolution is 8.*--resolution 8, or set data\.resolution=4"):
        manifest.expect(resolution=8, channels=3, labels=False)
    with pytest.raises(UserError, match=r"3 channel.*data\.channels is 1.*--channels 1"):
        manifest.expect(resolution=4, channels=1, labels=False)
    with pytest.raises(UserError, match=r"no labels.*data\.labels is true"):
        pack(tmp_path, 3, classes=0).expect(resolution=4, channels=3, labels=True)


def test_few_descriptors_stay_open(manifest):
    stream = open_stream(manifest, window=1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        next(stream)
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    stream.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_rank_that_alone_meets_bad_data_says_so_itself(own, capsys):
    """All others are told by the first rank, and would wait for its line in vain."""
    overwrite(own / "00002.tar", 1536, b"x" * 64)
    with pytest.raises(SystemExit), user_errors(quiet=True):
        for _ in open_stream(shards.load_manifest(own), rank=1, world=2):
            pass
    assert capsys.readouterr().err.startswith("error: rank 1: sample 0 of ")
    with pytest.raises(SystemExit), user_errors(quiet=True):
        raise UserError("what every rank has met")
    assert capsys.readouterr().err == ""


# As in training: OpenMP threads run in the main process before, while and after workers are forked; handlers are set.
TRAINING = """
import signal, sys, torch
from hsrgan.engine import data, shards
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
x = torch.randn(400, 400)
(x @ x).relu().sum()
stream = data.open_stream(shards.load_manifest(sys.argv[1]), seed=0, start=0, global_batch=16, workers=2)
for step in range(int(sys.argv[2])):
    next(stream)
    (x @ x).relu().sum()
    if step == 5:
        print("running", flush=True)
"""


def children(pid):
    return subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()


def test_workers_beside_openmp_end_with_the_program(manifest):
    done = subprocess.run([sys.executable, "-c", TRAINING, manifest.root, "300"], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_workers_survive_a_ctrl_c_that_the_main_process_handles(manifest):
    """So that a trainer can end its step and save when a terminal interrupts the whole group."""
    stream = open_stream(manifest, workers=2)
    for _ in range(2):  # so that both have begun to ignore it
        next(stream)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(50):
        next(stream)


def test_ctrl_c_is_one_keyboard_interrupt_and_leaves_nobody(manifest):
    command = [sys.executable, "-c", TRAINING, manifest.root, "1000000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as main:
        assert main.stdout.readline() == "running\n"
        workers = children(main.pid)
        assert len(workers) == 2
        for pid in [*workers, main.pid]:  # a terminal sends it to all of them
            os.kill(int(pid), signal.SIGINT)
        try:
            errors = main.communicate(timeout=20)[1]
        finally:
            main.kill()  # or else a failure waits for it without end
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_an_error_ends_the_workers_at_once(own):
    overwrite(own / "00002.tar", 1536, b"x" * 64)
    with pytest.raises(UserError) as caught:  # whose traceback lives on
        for _ in open_stream(shards.load_manifest(own), workers=2):
            pass
    assert not multiprocessing.active_children() and caught.value.__traceback__


@pytest.mark.parametrize(("resolution", "rms_allowed"), [(8, 0.6), (16, 1.5), (32, 3.5)])
def test_digits_keep_their_originals(tmp_path, resolution, rms_allowed):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    manifest = shards.load_manifest(digits.ensure_digits(tmp_path, resolution, channels=1))
    assert (manifest.count, manifest.resolution) == (1797, (resolution, resolution))
    assert manifest.class_names == tuple("0123456789")
    images, labels = next(open_stream(manifest, global_batch=1797))
    small = torch.nn.functional.adaptive_avg_pool2d(images.double(), 8)[:, 0] * (16 / 255)
    distance = torch.cdist(small.flatten(1), torch.from_numpy(bunch.images).flatten(1))
    nearest = distance.argmin(1)
    assert len(set(nearest.tolist())) > 1790  # a few originals are nearly alike
    assert (torch.from_numpy(bunch.target)[nearest] == labels.argmax(1)).double().mean() > 0.999
    assert (distance.amin(1) ** 2).mean().div(64).sqrt() * (255 / 16) < rms_allowed


def test_digits_are_packed_once_by_whoever_comes_first(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        homes = pool.starmap(digits.ensure_digits, [(tmp_path, 16, 3)] * 3)
    assert len(set(homes)) == 1
    written = os.stat(homes[0] / "manifest.json").st_mtime_ns
    assert digits.ensure_digits(tmp_path, 16, 3) == homes[0] != digits.ensure_digits(tmp_path, 16, 1)
    assert os.stat(homes[0] / "manifest.json").st_mtime_ns == written


@pytest.mark.parametrize("resolution", [4, 24])
def test_digits_refuse_sizes_they_cannot_have(tmp_path, resolution):
    with pytest.raises(UserError, match=f"{resolution}: the built-in digits need a power of two"):
        digits.ensure_digits(tmp_path, resolution)
