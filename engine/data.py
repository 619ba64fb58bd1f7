"""Stream packed shards: an endless, shuffled sequence that depends on nothing but the seed.

Position p counts images; epoch e = p // n. In every epoch the shards are permuted and cut into blocks of `window`
shards, and the samples of each block are permuted together, by the bits of Philox(seed, e, block). So the image at
position p is a pure function of (seed, p): ranks and workers share positions out, they never choose, and resuming is
starting at another position. One `pread` brings one sample.
"""

from __future__ import annotations

import functools
import gc
import io
import multiprocessing
import os
import signal
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hsrgan.engine.errors import UserError
from hsrgan.engine.shards import Manifest, Shard

_SHARD_ORDER, _SAMPLE_ORDER, _MIRROR = range(3)  # streams of random bits, kept apart in Philox's counter
_MODES = {1: "L", 3: "RGB"}
_PIL_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_REMEDY = "copy it again, or pack the data set again with tools/pack.py"

Place = tuple[int, int, bool]  # shard number, sample in the shard, flipped left to right or not


class Plan:
    """Where the image of each position lies. Remembers the block it was last asked about; a new one costs a sort."""

    def __init__(self, counts: list[int], seed: int, window: int):
        self.counts = np.array(counts, np.int64)
        self.total = int(self.counts.sum())
        self.seed, self.window = seed, window
        self._epoch = self._block = -1

    def _bits(self, size: int, stream: int, block: int = 0) -> np.ndarray:
        """uint64 [size]. Raw Philox and a stable sort: unlike Generator.permutation, NumPy never changes them."""
        key = np.array([self.seed, self._epoch], np.uint64)
        return np.random.Philox(key=key, counter=np.array([0, 0, stream, block], np.uint64)).random_raw(size)

    def _order(self, size: int, stream: int, block: int = 0) -> np.ndarray:
        return np.argsort(self._bits(size, stream, block), kind="stable")

    def _enter_epoch(self, epoch: int) -> None:
        self._epoch, self._block = epoch, -1
        self._shards = self._order(len(self.counts), _SHARD_ORDER)
        sizes = np.add.reduceat(self.counts[self._shards], np.arange(0, len(self.counts), self.window))
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def _enter_block(self, block: int) -> None:
        self._block = block
        shards = self._shards[block * self.window : (block + 1) * self.window]
        counts = self.counts[shards]
        size = int(counts.sum())
        order = self._order(size, _SAMPLE_ORDER, block)
        first = np.cumsum(counts) - counts
        self._shard_of = np.repeat(shards, counts)[order]
        self._sample_of = (np.arange(size) - np.repeat(first, counts))[order]
        self._flip_of = self._bits(size, _MIRROR, block) >> np.uint64(63)

    def __getitem__(self, position: int) -> Place:
        epoch, at = divmod(position, self.total)
        if epoch != self._epoch:
            self._enter_epoch(epoch)
        block = int(np.searchsorted(self._starts, at, side="right")) - 1
        if block != self._block:
            self._enter_block(block)
        i = at - self._starts[block]
        return int(self._shard_of[i]), int(self._sample_of[i]), bool(self._flip_of[i])


def _places(plan: Plan, start: int, global_batch: int, rank: int, world: int) -> Iterator[Place]:
    """This rank's share of every batch; in worker w of N, of every N-th one, since the DataLoader takes turns."""
    worker = get_worker_info()
    number, step = (worker.id, worker.num_workers) if worker else (0, 1)
    share = global_batch // world
    while True:
        first = start + number * global_batch + rank * share
        for position in range(first, first + share):
            yield plan[position]
        number += step


class Fetch:
    """Pipeline stage: places -> (webdataset sample, shard, sample number, flip), with one `pread` a sample.

    Keeps the descriptors and offsets of the shards used last: two windows, since a batch may straddle two blocks.
    """

    def __init__(self, manifest: Manifest, window: int):
        self.manifest = manifest
        self.keep = 2 * window
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __call__(self, places: Iterator[Place]) -> Iterator[tuple[dict, Shard, int, bool]]:
        for number, index, flip in places:
            shard = self.manifest.shards[number]
            yield self._sample(number, shard, index), shard, index, flip

    def _shard(self, number: int, shard: Shard) -> tuple[int, np.ndarray]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        offsets = _load_offsets(self.manifest, shard)
        try:
            descriptor = os.open(self.manifest.root / shard.name, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot open {self.manifest.root / shard.name} ({error.strerror}): {_REMEDY}") from None
        self._open[number] = descriptor, offsets
        if len(self._open) > self.keep:
            os.close(self._open.popitem(last=False)[1][0])
        return descriptor, offsets

    def _sample(self, number: int, shard: Shard, index: int) -> dict:
        descriptor, offsets = self._shard(number, shard)
        begin, end = int(offsets[index]), int(offsets[index + 1])
        fragment = os.pread(descriptor, end - begin, begin)
        try:
            return read_fragment(fragment)
        except ValueError as error:
            raise _bad_sample(self.manifest, shard, index, f"is damaged ({error})") from None


def read_fragment(fragment: bytes) -> dict[str, bytes]:
    """The files of one sample, by suffix: {"png": …, "cls": …}. Anything but whole ustar members is a `ValueError`.

    2 µs; tarfile under webdataset's expander takes 100, where decoding a 16×16 image takes 50.
    """
    files = {}
    at = 0
    while at < len(fragment):
        header = fragment[at : at + 512]
        if header[257:262] != b"ustar":
            raise ValueError("no tar header where its offset points")
        size = int(header[124:135], 8)
        begin, at = at + 512, at + 512 + -(-size // 512) * 512
        suffix = header[:100].rstrip(b"\0").partition(b".")[2].decode()
        files[suffix] = fragment[begin : begin + size]
    if at != len(fragment):
        raise ValueError("its tar members do not end at the next offset")
    return files


def _load_offsets(manifest: Manifest, shard: Shard) -> np.ndarray:
    file = manifest.root / shard.offsets_name
    try:
        offsets = np.load(file, allow_pickle=False)
        if offsets.shape != (shard.count + 1,) or offsets.dtype != np.uint64:
            raise ValueError(f"{offsets.dtype} {offsets.shape} instead of uint64 ({shard.count + 1},)")
        if (offsets[1:] <= offsets[:-1]).any() or offsets[-1] > shard.bytes:
            raise ValueError("its offsets do not fit the shard")
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file} is damaged ({reason}): {_REMEDY}") from None
    return offsets


def _bad_sample(manifest: Manifest, shard: Shard, index: int, fault: str) -> UserError:
    return UserError(f"sample {index} of {manifest.root / shard.name} {fault}: {_REMEDY}")


def _decode(item: tuple[dict, Shard, int, bool], manifest: Manifest, mirror: bool) -> tuple[np.ndarray, int]:
    """-> (uint8 [H,W,C], class; -1 without labels)."""
    sample, shard, index, flip = item
    bad = functools.partial(_bad_sample, manifest, shard, index)
    data = sample.get(manifest.image_format)
    if data is None:
        raise bad(f"has no .{manifest.image_format} image")
    try:
        image = Image.open(io.BytesIO(data), formats=[_PIL_FORMATS[manifest.image_format]])
        image.load()
    except Exception as error:  # a damaged image makes PIL raise nearly anything
        raise bad(f"is no whole {manifest.image_format} image ({error})") from None
    height, width = manifest.resolution
    if image.size != (width, height):
        raise bad(f"is {image.width}x{image.height}, its manifest says {width}x{height}")
    if image.mode != _MODES[manifest.channels]:
        raise bad(f"is a {image.mode} image, its manifest says {manifest.channels} channel(s)")
    label = -1
    if manifest.num_classes:
        text = sample.get("cls", b"")
        label = int(text) if text.isdigit() else -1
        if not 0 <= label < manifest.num_classes:
            raise bad(f"has the label {text!r}, its manifest says 0 to {manifest.num_classes - 1}")
    pixels = np.asarray(image).reshape(height, width, manifest.channels)
    return (pixels[:, ::-1] if mirror and flip else pixels), label


def _collate(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, list[int]]:
    # Labels stay integers until they reach the main process: a second shared tensor would double the cost of a batch.
    return torch.from_numpy(np.stack([pixels for pixels, _ in samples])), [label for _, label in samples]


class _ErrorsAsItems(IterableDataset):
    """Hand a user's mistake over as the last item: raised in a worker, it would come back wrapped in two tracebacks."""

    def __init__(self, pipeline: wds.DataPipeline):
        self.pipeline = pipeline

    def __iter__(self) -> Iterator:
        try:
            yield from self.pipeline
        except UserError as error:
            yield error


def check_shards(manifest: Manifest) -> None:
    """Raise `UserError` for a shard that is missing or not of the size its manifest states: one `stat` a file."""
    for shard in manifest.shards:
        path = manifest.root / shard.name
        try:
            size = os.stat(path).st_size
            os.stat(manifest.root / shard.offsets_name)
        except OSError as error:
            raise UserError(f"{error.filename} is missing ({error.strerror}): {_REMEDY}") from None
        if size != shard.bytes:
            kind = "truncated" if size < shard.bytes else "altered"
            raise UserError(f"{path} has {size} bytes, its manifest says {shard.bytes}: it is {kind}; {_REMEDY}")


def _start_worker(_number: int) -> None:
    # Ctrl-C reaches every process of a terminal, but the main one alone decides what it means; workers leave with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So it is with a request to leave, which the launcher sends to every process: the main one saves and ends the
    # workers. One that hangs is not to hold it up for ever.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))
    # What the fork inherited is never collected here: finalisers of the main process (of another stream, say) must
    # not run in a worker, and untouched pages stay shared.
    gc.freeze()


def open_stream(
    manifest: Manifest,
    *,
    seed: int,
    start: int,
    global_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    window: int = 16,
    mirror: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (images uint8 [M,C,H,W], labels float32 [M,num_classes] one-hot), M = global_batch / world.

    Batch b holds positions [start + b·G, start + (b+1)·G), G = global_batch, of which this rank gets the contiguous
    slice [rank·M, (rank+1)·M). The sequence is the same for any number of ranks and workers; to resume, give `start`
    the images seen so far. mirror: half of the positions, fixed by seed and position, are flipped left to right.
    The images are in channels_last memory (how decoders write them). Batches read ahead are not counted anywhere.

    Shards are checked for presence and size before this returns; a bad sample raises when its turn comes; both raise
    `UserError`. Workers start here and decode ahead at once, so open the stream before the long part of a start-up.

    Workers are forked, on purpose: they start in milliseconds, whereas a spawned or fork-served worker would import the
    launching script with torch and DeepSpeed again. What makes a fork of such a process unsafe stays unused in them:
    no CUDA, no OpenMP region (the DataLoader sets one torch thread), no logging, no console.
    """
    if global_batch % world:
        raise ValueError(f"global_batch {global_batch} is not divisible by world {world}")
    check_shards(manifest)
    plan = Plan([shard.count for shard in manifest.shards], seed, window)
    pipeline = wds.DataPipeline(
        functools.partial(_places, plan, start, global_batch, rank, world),
        Fetch(manifest, window),
        wds.map(functools.partial(_decode, manifest=manifest, mirror=mirror)),
        wds.batched(global_batch // world, collation_fn=_collate, partial=False),
    )
    loader = DataLoader(
        _ErrorsAsItems(pipeline),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
        pin_memory=torch.cuda.is_available(),  # or each copy to the GPU would first wait for it
    )
    return _batches(iter(loader), manifest.num_classes)


def _batches(items: Iterator, num_classes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            images, classes = item
            labels = torch.zeros(len(classes), num_classes)
            if num_classes:
                labels[torch.arange(len(classes)), torch.tensor(classes)] = 1
            yield images.permute(0, 3, 1, 2), labels
    finally:
        del items  # ends the workers now; the traceback of an error would keep them until it is collected
