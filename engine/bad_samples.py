"""Samples that could not be used, counted over all ranks, named in the log, and too many of them."""

from __future__ import annotations

import torch.distributed as dist

from hsrgan.engine.errors import UserError
from hsrgan.engine.shards import Manifest
from hsrgan.engine.stats import RunLog, read_log

BAD = "bad_sample"  # the event's name in log.jsonl
ENOUGH = 1000  # images to read before a share of them means something; the whole set where it is smaller


class DataFaults:
    """What this rank's stream had to replace. `collect`, at every tick, names and judges it for all ranks.

    Without `collect` nothing is named, and this rank's own share is judged at every batch.
    """

    def __init__(self, manifest: Manifest, *, collected: bool = False):
        self.manifest, self._collected = manifest, collected
        self._read = self._replaced = 0
        self._news: list[dict] = []
        self._named: set[tuple[str, int]] | None = None

    def note(self, read: int, replaced: int, news: list[dict]) -> None:
        """A batch of `read` images has come, `replaced` of them in place of others, with events for the log."""
        self._read += read
        self._replaced += replaced
        if self._collected:
            self._news += news
        elif replaced:
            self._judge(self._read, self._replaced, news)

    def collect(self, log: RunLog) -> dict[str, float]:
        """Name what is new in the log; the share of images replaced so far, if any, as a scalar. A collective.

        Raises `UserError`, on every rank, above the manifest's `max_bad`.
        """
        parts = [(self._read, self._replaced, self._news)]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts *= dist.get_world_size()
            dist.all_gather_object(parts, (self._read, self._replaced, self._news))
        self._news = []
        read, replaced = (sum(part[i] for part in parts) for i in (0, 1))
        news = [row for part in parts for row in part[2]]
        if news and self._named is None:
            rows = read_log(log.run_dir / "log.jsonl")
            self._named = {(row["shard"], row["sample"]) for row in rows if row.get("event") == BAD}
        for row in news:
            place = row.get("shard"), row.get("sample")
            if row["event"] != BAD or place not in self._named:
                log.event(row["event"], **{key: value for key, value in row.items() if key != "event"})
            if row["event"] == BAD:
                self._named.add(place)
        if not replaced:
            return {}
        self._judge(read, replaced, news)
        return {"bad_share": replaced / read}

    def _judge(self, read: int, replaced: int, news: list[dict]) -> None:
        limit = self.manifest.max_bad
        if read >= min(ENOUGH, self.manifest.count) and replaced > limit * read:
            named = "see the log"
            for row in news:
                if row["event"] == BAD:
                    named = f"such as sample {row['sample']} of {row['shard']}, which {row['reason']}"
            raise UserError(
                f"{replaced} of {read} images from {self.manifest.root} could not be used, which is above data.max_bad "
                f"= {limit:g} ({named}): mend the shards, see tools/pack.py --verify, or raise data.max_bad"
            )
