"""Shards that are fetched while they stream, from a server that stalls, cuts, errs and serves what it should not."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from http_shards import serving
from shard_fixtures import numbers, pack

from hsrgan.engine import bad_samples, data, shard_cache, transport
from hsrgan.engine.errors import UserError
from hsrgan.engine.shard_sources import open_shards

WINDOW = 3
GB = 1e9


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(transport, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(transport, "BACK_OFF", 0.01)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def server(packed, tmp_path):
    shutil.copytree(packed.root, tmp_path / "served")
    with serving(tmp_path / "served") as server:
        yield server


def remote(server, tmp_path, cap=10**6, **options):
    return open_shards(f"{server.url}/set/manifest.json", cache=tmp_path / "cache", cache_gb=cap / GB, **options)


def sequence(manifest, batches, **options):
    """Numbers and labels over all ranks, in order of position."""
    world = options.get("world", 1)
    options = {"seed": 7, "start": 0, "global_batch": 16, "window": WINDOW} | options
    streams = [data.open_stream(manifest, rank=rank, **options) for rank in range(world)]
    parts = [next(stream) for _ in range(batches) for stream in streams]
    for stream in streams:
        stream.close()
    return [pair for images, labels in parts for pair in zip(numbers(images), labels.argmax(1).tolist(), strict=True)]


def in_cache(tmp_path):
    """Sizes of the files by name; shards come and go meanwhile."""
    found = {}
    for path in (tmp_path / "cache").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.suffix in (".tar", ".part") and ".npy" not in path.name:
                found[path.name] = path.stat().st_size
    return found


def test_four_processes_against_every_fault_get_all_bytes_right(packed, server, tmp_path):
    """Each shard is fetched once apart from its retries, though two ranks of two workers each want it."""
    for shard, fault in zip(packed.shards, (["stall"], ["cut", "cut"], ["500"] * 3, ["corrupt"], ["short"],
                                            ["stall", "500", "cut", "short", "corrupt"]), strict=False):  # fmt: skip
        server.faults[shard.name] = list(fault)
    expected = {name: len(wanted) + 1 for name, wanted in server.faults.items()}
    manifest, began = remote(server, tmp_path), time.monotonic()
    assert sequence(manifest, 15, world=2, workers=2) == sequence(packed, 15)
    assert time.monotonic() - began < 25  # a stalled answer would take 30 s to end by itself
    wanted = {shard.name: expected.get(shard.name, 1) for shard in packed.shards}
    assert server.requests == {"manifest.json": 1} | wanted
    assert sorted(in_cache(tmp_path)) == sorted(f"{shard.sha256}.tar" for shard in packed.shards)
    for shard in packed.shards:  # by the way: the offsets found here are those that packing wrote
        assert (np.load(tmp_path / f"cache/{shard.sha256}.npy") == np.load(packed.root / shard.offsets_name)).all()
    assert sequence(manifest, 15, start=48) == sequence(packed, 15, start=48)
    assert sum(server.requests.values()) == 1 + len(packed.shards) + sum(n - 1 for n in expected.values())


def test_the_cache_stays_under_its_cap(packed, server, tmp_path):
    """Room for two windows of three shards; all eleven pass through it, two and a half times."""
    cap = sum(sorted((shard.bytes for shard in packed.shards), reverse=True)[: 2 * WINDOW]) + 20_000
    manifest, most = remote(server, tmp_path, cap=cap), []
    options = {"seed": 7, "start": 0, "global_batch": 16, "window": WINDOW, "world": 2, "workers": 2}
    streams = [data.open_stream(manifest, rank=rank, **options) for rank in range(2)]
    got = []
    for _ in range(16):
        for stream in streams:
            got += numbers(next(stream)[0])
            most.append(sum(in_cache(tmp_path).values()))
    for stream in streams:
        stream.close()
    assert got == [n for n, _ in sequence(packed, 16)]
    assert cap / 2 < max(most) <= cap
    assert sum(server.requests.values()) > len(packed.shards) + 5  # so some had to be fetched again


def test_what_is_read_outlives_its_removal(packed, server, tmp_path):
    store, shard = remote(server, tmp_path).cache, packed.shards[0]
    descriptor, offsets = store.open(shard, f"{server.url}/{shard.name}")
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    raw = (packed.root / shard.name).read_bytes()
    assert os.pread(descriptor, int(offsets[-1]), 0) == raw[: int(offsets[-1])]


def test_whoever_was_opened_longest_ago_goes_first(packed, server, tmp_path):
    size = packed.shards[0].bytes
    store = remote(server, tmp_path, cap=3 * size + 5000).cache
    a, b, c, d = packed.shards[:4]
    for shard in (a, b, c, a, d):
        os.close(store.open(shard, f"{server.url}/{shard.name}")[0])
        time.sleep(0.02)
    assert set(in_cache(tmp_path)) == {f"{shard.sha256}.tar" for shard in (a, c, d)}


def test_what_a_killed_process_left_is_no_obstacle(packed, server, tmp_path):
    """Its half shard is locked by nobody: the room is taken back and the shard fetched anew."""
    manifest = remote(server, tmp_path, cap=200_000)
    context = multiprocessing.get_context("fork")
    server.faults[packed.shards[0].name] = ["stall"]
    process = context.Process(target=manifest.cache.open, args=(packed.shards[0], manifest.location(packed.shards[0])))
    process.start()
    part = tmp_path / f"cache/{packed.shards[0].sha256}.part"
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (tmp_path / "cache/strange.part").write_bytes(b"x" * 190_000)
    assert sequence(manifest, 7) == sequence(packed, 7)
    for _ in range(100):  # what is fetched ahead may still be on its way
        if not (left := [name for name in in_cache(tmp_path) if name.endswith(".part")]):
            break
        time.sleep(0.05)
    assert not left


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_stays_bad_ends_in_one_line(packed, server, tmp_path, workers):
    server.faults["00002.tar"] = "corrupt"
    with pytest.raises(UserError) as caught:
        sequence(remote(server, tmp_path, max_bad=0.5), 7, workers=workers)
    line = str(caught.value)
    assert line.startswith(f"cannot fetch {server.url}/set/00002.tar after 6 attempts (the last: its bytes are not ")
    assert "manifest's SHA-256" in line and "start again" in line and "\n" not in line
    assert f"{packed.shards[2].sha256}.tar" not in in_cache(tmp_path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("404", "answers 404"), ("ftp://127.0.0.1/x.tar", "sends on to ftp:"), ("file:///etc/passwd", "302 Found")],
)
def test_what_cannot_change_is_not_tried_again(packed, server, tmp_path, fault, words):
    server.faults["00002.tar"] = fault
    store, shard = remote(server, tmp_path).cache, packed.shards[2]
    with pytest.raises(UserError, match=rf"cannot fetch {server.url}/00002.tar \(.*{words}.*\): mend the address"):
        store.open(shard, f"{server.url}/{shard.name}")
    assert server.requests["00002.tar"] == 1


def test_nobody_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot fetch http://127.0.0.1:9/manifest.json after 6 attempts .*refused"):
        open_shards("http://127.0.0.1:9/", cache=tmp_path)


def test_retries_are_said_and_logged(packed, server, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(shard_cache, "SLOW_SECONDS", 0.0)
    server.faults["00003.tar"] = ["500", "cut"]
    found = bad_samples.DataFaults(manifest := remote(server, tmp_path), collected=True)
    stream = data.open_stream(manifest, seed=7, start=0, global_batch=103, window=WINDOW, workers=1, faults=found)
    next(stream)
    said = capfd.readouterr().err.splitlines()
    url = f"{server.url}/set/00003.tar"
    assert [row for row in found._news if row["url"] == url] == [
        {"event": "shard_retry", "url": url, "reason": "the server answers 500 Internal Server Error; attempt 1 of 6"},
        {"event": "shard_retry", "url": url, "reason": f"{packed.shards[3].bytes // 2} of {packed.shards[3].bytes} "
         "bytes came; attempt 2 of 6"},
    ]  # fmt: skip
    assert sum(line.startswith(f"fetching again: {url}: ") for line in said) == 2
    assert sum(line.startswith(f"waiting for {url}: ") for line in said) == 1


def test_a_cap_below_two_windows_is_refused_at_the_start(packed, server, tmp_path):
    manifest = remote(server, tmp_path, cap=50_000)
    with pytest.raises(UserError, match=r"data.cache_gb is 5e-05, two windows of 3 shards take .* GB: set data.cache"):
        sequence(manifest, 1)
    assert server.requests == {"manifest.json": 1}


def test_a_full_disk_is_one_line(packed, server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_cache.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*cache: No space left on device; free space there, lower data"):
        sequence(remote(server, tmp_path), 1)


def test_a_manifest_that_lies_about_its_shard_is_one_line(packed, server, tmp_path):
    content = json.loads((server.root / "manifest.json").read_text())
    content["shards"][2]["count"] -= 1
    content["count"] -= 1
    (server.root / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"set/00002.tar holds 10 samples, its manifest says 9: pack it again"):
        sequence(remote(server, tmp_path), 7)


class Bucket(MemoryFileSystem):
    protocol = "s3"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("s3://"))


def test_object_stores_are_read_through_fsspec(packed, tmp_path, monkeypatch):
    """A stand-in for s3fs, which is not installed: no real bucket has been tried."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
    bucket = Bucket()
    for path in packed.root.iterdir():
        bucket.pipe(f"s3://bucket/set/{path.name}", path.read_bytes())
    manifest = open_shards("s3://bucket/set/manifest.json", cache=tmp_path, cache_gb=1e-3)
    assert sequence(manifest, 8) == sequence(packed, 8)
    with pytest.raises(UserError, match=r"cannot fetch s3://bucket/no/manifest.json \(.*\): mend the address"):
        open_shards("s3://bucket/no/", cache=tmp_path)

    def missing(*_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "open", missing)
    with pytest.raises(UserError, match=r"gs://b/manifest.json needs the package gcsfs: pip install gcsfs"):
        open_shards("gs://b/", cache=tmp_path)


SHELL = ["pipe:touch {mark}", "pipe:touch {mark}; cat x.tar", "ais://x/touch.tar", "scp://host/x.tar", "xyz:x.tar"]


@pytest.mark.parametrize("url", SHELL)
@pytest.mark.parametrize("way", ["alone", "among others", "in a list", "in a remote list"])
def test_nothing_reaches_a_shell_without_leave(server, tmp_path, url, way):
    mark = tmp_path / "mark"
    url = url.format(mark=mark)
    spec = {"alone": url, "among others": f"{server.url}/00000.tar::{url}"}.get(way, f"{tmp_path}/list.txt")
    (tmp_path / "list.txt").write_text(f"# shards\n{server.url}/00000.tar\n{url}\n")
    if way == "in a remote list":
        shutil.copy(tmp_path / "list.txt", server.root)
        spec = f"{server.url}/list.txt"
    with pytest.raises(UserError, match=r"may run a program on this machine; data.allow_shell: true allows that"):
        open_shards(spec, cache=tmp_path / "cache")
    assert not mark.exists() and not server.requests["00000.tar"]
    with pytest.raises(UserError, match="may run a program"):
        transport.open_url(url, allow_shell=False)


def test_with_leave_a_pipe_is_read(packed, tmp_path):
    spec = "::".join(f"pipe:cat {packed.root / shard.name}" for shard in packed.shards)
    manifest = open_shards(spec, cache=tmp_path, cache_gb=1e-3, allow_shell=True)
    assert sequence(manifest, 8) == sequence(packed, 8)
    with pytest.raises(UserError, match="nothing here knows the scheme xyz:"):
        open_shards("xyz:x.tar", cache=tmp_path, allow_shell=True)


def test_http_starts_no_process(packed, server, tmp_path):
    code = (
        "import sys\n"
        "def refuse(event, args):\n"
        "    if event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn'): raise SystemExit(event)\n"
        "from hsrgan.engine.shard_sources import open_shards\n"
        "from hsrgan.engine import data\n"
        "sys.addaudithook(refuse)\n"
        "manifest = open_shards(sys.argv[1], cache=sys.argv[2])\n"
        "next(data.open_stream(manifest, seed=0, start=0, global_batch=16))\n"
    )
    command = [sys.executable, "-c", code, f"{server.url}/", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and server.requests["00000.tar"] == 1


def test_a_list_of_urls_is_indexed_once(packed, server, tmp_path):
    spec = f"{server.url}/{{00000..00010}}.tar"
    server.faults["00005.tar"] = ["cut"]
    manifest = open_shards(spec, cache=tmp_path / "cache", cache_gb=1e-3)
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in packed.shards]
    assert manifest.class_counts == packed.class_counts and manifest.resolution == (4, 4)
    assert sequence(manifest, 8) == sequence(packed, 8)
    assert open_shards(spec, cache=tmp_path / "cache", cache_gb=1e-3) == manifest
    assert server.requests == {f"{i:05d}.tar": 1 + (i == 5) for i in range(11)}


def test_fetching_ahead_follows_the_plan():
    """What is fetched while a block is read is the next block, over an epoch's end and in draws too."""
    for resampled in (False, True):
        plan = data.Plan([10] * 10 + [3], 7, WINDOW, resampled=resampled)
        blocks = []  # (what was said to come, what came)
        for p in range(310):
            shard, _, _ = plan[p]
            if not blocks or plan.block != blocks[-1][0]:
                blocks.append((plan.block, set(plan.next_shards()), set()))
            blocks[-1][2].add(shard)
        assert len(blocks) >= 9
        for before, after in itertools.pairwise(blocks[:-1]):
            assert after[2] <= before[1] and (resampled or after[2] == before[1])


def test_a_fork_does_not_lock_itself_out(tmp_path):
    """A process forked while a shard is claimed has the claim's descriptor too. When it waits for that very shard, the
    claim must end with the one who made it, or it would wait for itself."""
    with shard_cache.claimed(tmp_path / "a.part") as mine:
        with shard_cache.claimed(tmp_path / "a.part", wait=False) as second:
            assert mine is not None and second is None
        pid = os.fork()
        if pid == 0:
            with shard_cache.claimed(tmp_path / "a.part"):
                os._exit(0)
        time.sleep(0.3)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    try:
        for _ in range(100):
            if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                break
            time.sleep(0.05)
        assert ended == (pid, 0)
    finally:
        if not ended[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_room_that_others_are_filling_is_waited_for(packed, server, tmp_path):
    manifest = remote(server, tmp_path, cap=100_000)
    shard = packed.shards[0]
    fetch = threading.Thread(target=lambda: os.close(manifest.cache.open(shard, manifest.location(shard))[0]))
    with shard_cache.claimed(tmp_path / "cache/other.part") as other:
        os.ftruncate(other, 99_000)
        fetch.start()
        fetch.join(0.5)
        assert fetch.is_alive() and sum(in_cache(tmp_path).values()) <= 100_000
    fetch.join(10)
    assert not fetch.is_alive() and list(in_cache(tmp_path)) == [f"{shard.sha256}.tar"]


def test_shards_of_unknown_length_do_not_wait_for_one_another(tmp_path, monkeypatch):
    """Three that all fit alone have each filled a third of the room before any of them is whole."""
    met, all_there = [], threading.Barrier(3)

    class Slow(io.BytesIO):
        def read(self, size=-1):
            if self.tell() == 9000 and len(met) < 3:
                met.append(self)
                all_there.wait(5)
            return super().read(size)

    monkeypatch.setattr(transport, "CHUNK", 1000)
    monkeypatch.setattr(transport, "open_url", lambda url, allow_shell: (Slow(url[-1:].encode() * 20_000), None))
    cache, sizes = shard_cache.ShardCache(tmp_path / "cache", 30_000), []

    def adopt(url):
        descriptor, _, size = cache.adopt(url)
        os.close(descriptor)
        sizes.append(size)

    threads = [threading.Thread(target=adopt, args=(f"pipe:{i}",), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sizes == [20_000] * 3
