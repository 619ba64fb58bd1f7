"""Stream packed shards: an endless, shuffled sequence that depends on nothing but the seed.

Position p counts images; epoch e = p // n. In every epoch the shards are permuted and cut into blocks of `window`
shards, and the samples of each block are permuted together, by the bits of Philox(seed, e, block). So the image at
position p is a pure function of (seed, p): ranks and workers share positions out, they never choose, and resuming is
starting at another position. One `pread` brings one sample.
"""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import mmap
import multiprocessing
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hsrgan.engine.bad_samples import BAD, DataFaults
from hsrgan.engine.balanced import BalancedPlan
from hsrgan.engine.errors import RankError, UserError
from hsrgan.engine.labels import Label, multi_hot
from hsrgan.engine.samples import BadSample, decode
from hsrgan.engine.shard_cache import Ahead
from hsrgan.engine.shards import Manifest, Shard
from hsrgan.engine.transport import scheme_of

_SHARD_ORDER, _SAMPLE_ORDER, _MIRROR, _DRAW = range(4)  # streams of random bits, kept apart in Philox's counter
_REMEDY = "copy it again, or pack the data set again with tools/pack.py"

Place = tuple[int, int, bool]  # shard number, sample in the shard, flipped left to right or not
Item = tuple[np.ndarray, Label, bool, list[dict]]  # uint8 [H,W,C], classes, whether replaced, what there is to tell


class Plan:
    """Where the image of each position lies. Remembers the block it was last asked about; a new one costs a sort.

    resampled: block b holds `window` shards drawn with replacement by the bits of Philox(seed, b), in as many
    positions as the average window has samples: of a larger draw some are left out, of a smaller one some come twice.
    """

    def __init__(self, counts: list[int], seed: int, window: int, *, resampled: bool = False):
        self.counts = np.array(counts, np.int64)
        self.total = int(self.counts.sum())
        self.seed, self.window, self.resampled = seed, window, resampled
        self._epoch = self._block = -1
        self.keep = 2 * window  # shards to keep open: a batch may straddle two blocks
        self._draw_size = max(1, round(self.total * window / len(counts)))

    @property
    def block(self) -> tuple[int, int]:
        """Which block was last asked about."""
        return self._epoch, self._block

    def next_shards(self) -> list[int]:
        """The shards of the block after it."""
        if self.resampled:
            return self._drawn(self._epoch + 1).tolist()
        first = (self._block + 1) * self.window
        if first < len(self.counts):
            return self._shards[first : first + self.window].tolist()
        return self._order(len(self.counts), _SHARD_ORDER, epoch=self._epoch + 1)[: self.window].tolist()

    def _bits(self, size: int, stream: int, block: int = 0, epoch: int | None = None) -> np.ndarray:
        """uint64 [size]. Raw Philox and a stable sort: unlike Generator.permutation, NumPy never changes them."""
        key = np.array([self.seed, self._epoch if epoch is None else epoch], np.uint64)
        return np.random.Philox(key=key, counter=np.array([0, 0, stream, block], np.uint64)).random_raw(size)

    def _order(self, size: int, stream: int, block: int = 0, epoch: int | None = None) -> np.ndarray:
        return np.argsort(self._bits(size, stream, block, epoch), kind="stable")

    def _drawn(self, draw: int) -> np.ndarray:
        return (self._bits(self.window, _DRAW, epoch=draw) % np.uint64(len(self.counts))).astype(np.int64)

    def _enter_draw(self, draw: int) -> None:
        """A draw is an epoch of one block."""
        self._epoch = draw
        self._shards = self._drawn(draw)
        self._starts = np.array([0])
        self._enter_block(0)

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
        if self.resampled:
            draw, i = divmod(position, self._draw_size)
            if draw != self._epoch:
                self._enter_draw(draw)
            i %= len(self._shard_of)
            return int(self._shard_of[i]), int(self._sample_of[i]), bool(self._flip_of[i])
        epoch, at = divmod(position, self.total)
        if epoch != self._epoch:
            self._enter_epoch(epoch)
        block = int(np.searchsorted(self._starts, at, side="right")) - 1
        if block != self._block:
            self._enter_block(block)
        i = at - self._starts[block]
        return int(self._shard_of[i]), int(self._sample_of[i]), bool(self._flip_of[i])


def _places(plan: Plan | BalancedPlan, start: int, global_batch: int, rank: int, world: int) -> Iterator[Place]:
    """This rank's share of every batch; in worker w of N, of every N-th one, since the DataLoader takes turns."""
    worker = get_worker_info()
    number, step = (worker.id, worker.num_workers) if worker else (0, 1)
    share = global_batch // world
    while True:
        first = start + number * global_batch + rank * share
        for position in range(first, first + share):
            yield plan[position]
        number += step


class Reader:
    """Pipeline stage: places -> items, with one `pread` a sample.

    Keeps the descriptors and offsets of the shards used last, as many as the plan says.
    A sample that cannot be used gives way to the next one in its shard that can, and a shard's first follows on its
    last: a function of the place alone, so that any number of ranks and workers sees the same.
    """

    def __init__(self, manifest: Manifest, plan: Plan | BalancedPlan, mirror: bool):
        self.manifest, self.plan, self.mirror = manifest, plan, mirror
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __call__(self, places: Iterator[Place]) -> Iterator[Item]:
        ahead, block = Ahead(self.manifest) if self.manifest.cache else None, None
        worker = get_worker_info()
        mine = slice(worker.id, None, worker.num_workers) if worker else slice(None)
        try:
            for number, index, flip in places:
                if ahead and self.plan.block != block:
                    block = self.plan.block
                    ahead.want(self.plan.next_shards()[mine])
                yield self._item(number, index, flip)
        finally:
            if ahead:
                ahead.close()
            while self._open:
                os.close(self._open.popitem()[1][0])

    def _item(self, number: int, index: int, flip: bool) -> Item:
        shard, news = self.manifest.shards[number], []
        for step in range(shard.count):
            at = (index + step) % shard.count
            try:
                pixels, label = decode(self._fragment(number, shard, at), self.manifest)
                break
            except BadSample as fault:
                where = self.manifest.location(shard)
                if not self.manifest.max_bad:
                    raise UserError(f"sample {at} of {where} {fault}: {_REMEDY}") from None
                news.append({"event": BAD, "shard": shard.name, "sample": at, "reason": str(fault)})
        else:
            raise UserError(f"no sample of {where} can be used, the last {news[-1]['reason']}: {_REMEDY}")
        if self.manifest.cache:
            news += [self.manifest.cache.news.popleft() for _ in range(len(self.manifest.cache.news))]
        return (pixels[:, ::-1] if self.mirror and flip else pixels), label, bool(step), news

    def _fragment(self, number: int, shard: Shard, index: int) -> bytes:
        descriptor, offsets = self._shard(number, shard)
        begin, end = int(offsets[index]), int(offsets[index + 1])
        try:
            return os.pread(descriptor, end - begin, begin)
        except OSError as error:
            raise UserError(f"cannot read {self.manifest.location(shard)} ({error.strerror}): {_REMEDY}") from None

    def _shard(self, number: int, shard: Shard) -> tuple[int, np.ndarray]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        where = self.manifest.location(shard)
        if scheme_of(where):
            self._open[number] = self.manifest.cache.open(shard, where)
        else:
            offsets = _load_offsets(self.manifest, shard)
            try:
                self._open[number] = os.open(where, os.O_RDONLY), offsets
            except OSError as error:
                raise UserError(f"cannot open {where} ({error.strerror}): {_REMEDY}") from None
        if len(self._open) > self.plan.keep:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[number]


def _load_offsets(manifest: Manifest, shard: Shard) -> np.ndarray:
    file = manifest.offsets_path(shard)
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


def _collate(items: list[Item]) -> tuple[torch.Tensor, list[Label], int, list[dict]]:
    # Labels stay numbers until they reach the main process: a second shared tensor would double the cost of a batch.
    pixels, labels, replaced, news = zip(*items, strict=True)
    return torch.from_numpy(np.stack(pixels)), list(labels), sum(replaced), list(itertools.chain.from_iterable(news))


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
    """Raise `UserError` for a shard here that is missing or not of the size its manifest states: one `stat` a file."""
    for shard in manifest.shards:
        path = manifest.location(shard)
        if scheme_of(path):
            continue  # checked as it is fetched
        try:
            size = os.stat(path).st_size
            os.stat(manifest.offsets_path(shard))
        except OSError as error:
            raise UserError(f"{error.filename} is missing ({error.strerror}): {_REMEDY}") from None
        if size != shard.bytes:
            kind = "truncated" if size < shard.bytes else "altered"
            raise UserError(f"{path} has {size} bytes, its manifest says {shard.bytes}: it is {kind}; {_REMEDY}")


_leaving = mmap.mmap(-1, 1)  # shared with the workers, which are forked: not 0 once the main process ends


@atexit.register  # runs before multiprocessing's own end, which sends the workers SIGTERM and waits for them
def _leave() -> None:
    if multiprocessing.parent_process() is None:
        _leaving[0] = 1


def _start_worker(_number: int) -> None:
    # Ctrl-C reaches every process of a terminal, but the main one alone decides what it means; workers leave with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So it is with a request to leave, which the launcher sends to every process: the main one saves and ends the
    # workers. One that hangs is not to hold it up for ever. A main process that is on its way out means it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if _leaving[0] else signal.alarm(60))
    # Batches reach the main process through a socket that a thread here serves: one that breaks off has been told why.
    sys.excepthook = lambda kind, error, trace: (
        None if issubclass(kind, ConnectionError) else sys.__excepthook__(kind, error, trace)
    )
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
    resampled: bool = False,
    balanced: bool = False,
    faults: DataFaults | None = None,
    pinned: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (images uint8 [M,C,H,W], labels float32 [M,num_classes] of 0 and 1), M = global_batch / world.

    Batch b holds positions [start + b·G, start + (b+1)·G), G = global_batch, of which this rank gets the contiguous
    slice [rank·M, (rank+1)·M). The sequence is the same for any number of ranks and workers; to resume, give `start`
    the images seen so far. mirror: half of the positions, fixed by seed and position, are flipped left to right.
    The images are in channels_last memory (how decoders write them); pinned: for a GPU, as a copy out of any other
    memory would first wait for it. Batches read ahead are not counted anywhere.

    Shards are checked for presence and size before this returns, remote ones as they come. A sample that cannot be
    used is replaced (`Reader`) where the manifest's `max_bad` is not 0, and told to `faults`, whose owner decides; with
    neither, and for everything else, `UserError`. resampled: the shards of every block are drawn anew, with
    replacement, so that there is no epoch. balanced: every class equally often (`BalancedPlan`). Workers start here and
    decode ahead at once, so open the stream before the long part of a start-up.

    Workers are forked, on purpose: they start in milliseconds, whereas a spawned or fork-served worker would import the
    launching script with torch and DeepSpeed again. What makes a fork of such a process unsafe stays unused in them:
    no CUDA, no OpenMP region (the DataLoader sets one torch thread), no logging, no console.
    """
    if global_batch % world:
        raise ValueError(f"global_batch {global_batch} is not divisible by world {world}")
    check_shards(manifest)
    if manifest.cache:
        manifest.cache.check(manifest, window)
    if balanced:
        plan = BalancedPlan(manifest, seed)
    else:
        plan = Plan([shard.count for shard in manifest.shards], seed, window, resampled=resampled)
    pipeline = wds.DataPipeline(
        functools.partial(_places, plan, start, global_batch, rank, world),
        Reader(manifest, plan, mirror),
        wds.batched(global_batch // world, collation_fn=_collate, partial=False),
    )
    loader = DataLoader(
        _ErrorsAsItems(pipeline),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
        pin_memory=pinned,
    )
    faults = faults or DataFaults(manifest)
    return _batches(iter(loader), manifest.num_classes, faults, f"rank {rank}: " if world > 1 else "")


def _batches(
    items: Iterator, num_classes: int, faults: DataFaults, whose: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    try:
        for item in items:
            if isinstance(item, UserError):
                raise RankError(f"{whose}{item}") from None
            images, labels, replaced, news = item
            faults.note(len(labels), replaced, news)
            yield images.permute(0, 3, 1, 2), torch.from_numpy(multi_hot(labels, num_classes))
    finally:
        del items  # ends the workers now; the traceback of an error would keep them until it is collected
