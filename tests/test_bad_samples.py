"""Samples that cannot be used: replaced alike for any ranks and workers, named, counted, and too many end the run."""

import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile

import numpy as np
import psutil
import pytest
from shard_fixtures import COUNT, encode, numbers, pack, picture
from test_training import expect_error, train, workspace  # noqa: F401  (a fixture)

from hsrgan.engine import bad_samples, data, samples, shard_sources, stats
from hsrgan.engine.errors import UserError

BAD = {  # sample: what is done to it
    3: "half an image",
    17: "another size",
    18: "no label",
    39: "junk for an image",
    55: "a member of another key",
    99: "no tar at all",
    101: "half an image",
}


def junk(i, image):
    """The files of sample i as they lie in the damaged set."""
    fault, key = BAD.get(i), f"{i:08d}"
    label = {f"{key}.cls": str(i % 5).encode()}
    if fault == "half an image":
        return {**label, f"{key}.png": image[: len(image) - 30]}
    if fault == "another size":
        return {**label, f"{key}.png": encode(np.zeros((8, 4, 3), np.uint8))}
    if fault == "no label":
        return {f"{key}.png": image}
    if fault == "junk for an image":
        return {**label, f"{key}.png": b"<html>404</html>"}
    if fault == "a member of another key":
        return {f"{key}.cls": b"0", "README": b"hello", f"{key}.png": image}
    return {**label, f"{key}.png": image}


def tar_of(files):
    """(members without the end mark, their size)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, value in files:
            member = tarfile.TarInfo(name)
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))
        size = tar.offset
    return out.getvalue()[:size], size


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The set of test_data.py with seven bad samples; sizes and hashes of the manifest are those of the damaged one."""
    root = tmp_path_factory.mktemp("damaged")
    pack(root)
    content = json.loads((root / "manifest.json").read_text())
    for number, shard in enumerate(content["shards"]):
        offsets, raw = [0], b""
        for i in range(number * 10, number * 10 + shard["count"]):
            sample, size = tar_of(junk(i, encode(picture(i))).items())
            raw += b"x" * size if BAD.get(i) == "no tar at all" else sample
            offsets.append(len(raw))
        (root / shard["name"]).write_bytes(raw)
        np.save(root / shard["name"].replace(".tar", ".npy"), np.array(offsets, np.uint64))
        shard["bytes"] = len(raw)
    (root / "manifest.json").write_text(json.dumps(content))
    return shard_sources.open_shards(str(root), max_bad=0.2)


def stream_of(manifest, rank=0, world=1, workers=0, batches=13, **options):
    found = bad_samples.DataFaults(manifest, collected=True)
    stream = data.open_stream(
        manifest, seed=7, start=0, global_batch=16, window=3, rank=rank, world=world, workers=workers, faults=found,
        **options,
    )  # fmt: skip
    pairs = [next(stream) for _ in range(batches)]
    return [numbers(images) for images, _ in pairs], [labels.argmax(1).tolist() for _, labels in pairs], found


def places_of(count):
    plan = data.Plan([10] * 10 + [3], 7, 3)
    return [shard * 10 + sample for shard, sample, _ in (plan[p] for p in range(count))]


def replacement(i):
    """The bad give way to the next good one of their shard, and a shard's first follows on its last."""
    first, count = i // 10 * 10, min(10, COUNT - i // 10 * 10)
    return next(j for t in range(count) if (j := first + (i - first + t) % count) not in BAD)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_bad_samples_are_replaced_alike_for_any_ranks_and_workers(damaged, world, workers):
    places = places_of(13 * 16)  # two epochs
    expected = [replacement(i) for i in places]
    streams = [stream_of(damaged, rank, world, workers) for rank in range(world)]
    for kind, wanted in ((0, expected), (1, [n % 5 for n in expected])):  # a label goes with its image
        got = [value for batch in zip(*(s[kind] for s in streams), strict=True) for part in batch for value in part]
        assert got == wanted
    assert sum(s[2]._replaced for s in streams) == sum(i in BAD for i in places) > len(BAD)
    assert {int(row["shard"][:5]) * 10 + row["sample"] for s in streams for row in s[2]._news} == set(BAD)


def test_reasons_are_told(damaged):
    *_, found = stream_of(damaged)
    reasons = {int(row["shard"][:5]) * 10 + row["sample"]: row["reason"] for row in found._news}
    for i, words in {
        3: "is no whole png image", 17: "is 8x4 (height x width), its manifest says 4x4", 18: "has no label",
        39: "is no whole png",
        55: "a file of another sample lies in it", 99: "no tar header",
    }.items():  # fmt: skip
        assert words in reasons[i]


def test_without_leave_the_first_bad_sample_is_an_error(damaged):
    with pytest.raises(UserError, match=r"sample \d of .*tar (is|has) .*: copy it again"):
        stream_of(dataclasses.replace(damaged, max_bad=0.0))


def test_a_shard_without_one_good_sample_is_an_error(damaged, tmp_path):
    root = tmp_path / "dead"
    shutil.copytree(damaged.root, root)
    size = os.path.getsize(root / "00001.tar")
    (root / "00001.tar").write_bytes(b"x" * size)
    with pytest.raises(UserError, match=r"no sample of .*00001.tar can be used, the last is damaged .*: copy it again"):
        stream_of(shard_sources.open_shards(str(root), max_bad=1.0))


def test_the_log_names_each_once_also_after_resuming_and_counts(damaged, tmp_path):
    for begin in (0.0, 0.208):
        with stats.RunLog(tmp_path, total_kimg=1, start_kimg=begin) as log:
            *_, found = stream_of(damaged)
            log.step(208)
            share = found.collect(log)
            assert share == {"bad_share": found._replaced / 208} and found.collect(log) == share
            log.tick(208, share)
    rows = stats.read_log(tmp_path / "log.jsonl")
    events = [row for row in rows if row.get("event") == "bad_sample"]
    assert len(events) == len(BAD) and set(events[0]) == {"event", "kimg", "seconds", "shard", "sample", "reason"}
    assert [row["bad_share"] for row in rows if "event" not in row] == [share["bad_share"]] * 2


def test_a_stream_that_nobody_collects_judges_itself(damaged):
    stream = data.open_stream(dataclasses.replace(damaged, max_bad=0.01), seed=7, start=0, global_batch=16, window=3)
    with pytest.raises(UserError, match=r"could not be used, which is above data.max_bad = 0.01 \(such as sample"):
        for _ in range(10):
            next(stream)


RANK = """
import sys, torch.distributed as dist
sys.path.insert(0, sys.argv[4])
from test_bad_samples import stream_of
from hsrgan.engine import shard_sources, stats
rank, port, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
with stats.RunLog(sys.argv[5], total_kimg=1, rank=rank) as log:
    for limit in (0.2, 0.01):
        *_, found = stream_of(shard_sources.open_shards(root, max_bad=limit), rank, 2)
        try:
            print(found.collect(log)["bad_share"])
        except ValueError as error:
            print(error)
dist.destroy_process_group()
"""


def test_two_ranks_count_together_and_stop_together(damaged, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = os.path.dirname(__file__)
    arguments = [port, str(damaged.root), here, str(tmp_path)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[0].splitlines()[-2:] for rank in ranks]
    assert said[0] == said[1]
    one = stream_of(damaged)[2]
    assert float(said[0][0]) == one._replaced / one._read
    assert said[0][1].startswith(f"{one._replaced} of {one._read} images from")
    events = [row["shard"] for row in stats.read_log(tmp_path / "log.jsonl") if row.get("event") == "bad_sample"]
    assert len(events) == len(BAD)  # those of rank 1 are in rank 0's log


@pytest.mark.parametrize(("limit", "line"), [(0.2, None), (0.01, "which is above data.max_bad = 0.01")])
def test_a_training_run_goes_on_below_the_share_and_stops_above_it(workspace, tmp_path, limit, line):  # noqa: F811
    """8 of 80 images are bad; with leave for a fifth the run ends well, with the default it ends with one line."""
    root = tmp_path / "grey"
    made = pack(root, 80, 10, lambda i: np.full((16, 16), i, np.uint8), resolution=(16, 16), channels=1)
    for shard in made.shards:
        with open(root / shard.name, "r+b") as file:
            file.seek(int(np.load(root / shard.offsets_name)[4]) + 1536)
            file.write(b"x" * 64)
    options = ["data.builtin=null", f"data.shards={root}", "kimg=0.16", f"run_dir={tmp_path / 'run'}"]
    if line is None:
        train(workspace, *options, f"data.max_bad={limit}")
    else:
        expect_error(workspace, *options, naming=line)
    rows = stats.read_log(tmp_path / "run" / "log.jsonl")
    assert len([row for row in rows if row.get("event") == "bad_sample"]) == 8
    assert [row["bad_share"] for row in rows if "event" not in row][-1:] == ([] if line else [0.1])


def test_a_sample_without_an_image_is_bad(damaged):
    raw = tar_of([("a.cls", b"1"), ("a.txt", b"hello")])[0]
    with pytest.raises(samples.BadSample, match=r"has no \.png image"):
        samples.decode(raw, damaged)


def test_memory_stays_flat_over_twenty_epochs(tmp_path):
    """103 images of 64×64, 12 kB each: keeping one in ten of them would add 2 MB in the last 15 epochs."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    manifest = pack(tmp_path, picture=lambda i: np.roll(noise, i, 0), resolution=(64, 64))
    stream = data.open_stream(manifest, seed=0, start=0, global_batch=COUNT, window=3)
    me, rss = psutil.Process(), []
    for _ in range(20):
        next(stream)
        rss.append(me.memory_info().rss)
    assert rss[-1] - rss[4] < 2e6 and me.num_fds() < 200
