"""Reads a packed data set again, all of it: hashes, offsets, counts, every image, every label."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hsrgan.engine.samples import BadSample, decode
from hsrgan.engine.shards import Manifest, Shard
from hsrgan.engine.tar_index import sample_offsets
from hsrgan.tools.pack_shards import Packers, step


@dataclass
class Found:
    """Of one shard: a line for each problem, and how many images of each class there are."""

    problems: list[str] = field(default_factory=list)
    classes: Counter = field(default_factory=Counter)


def verify_shard(job: tuple[Manifest, Shard]) -> Found:
    manifest, shard = job
    found = Found()

    def problem(text: str) -> None:
        found.problems.append(f"{shard.name}: {text}")

    try:
        with open(manifest.root / shard.name, "rb") as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            if size != shard.bytes:
                problem(f"{size} bytes, its manifest says {shard.bytes}")
            elif digest.hexdigest() != shard.sha256:
                problem("its SHA-256 is not that of its manifest")
            try:
                offsets = sample_offsets(file)
            except ValueError as error:
                problem(f"damaged, {error}")
                return found
            _check_offsets(manifest, shard, offsets, problem)
            for i, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
                step()
                try:
                    found.classes[decode(os.pread(file.fileno(), end - begin, begin), manifest)[1]] += 1
                except BadSample as error:
                    problem(f"sample {i} {error}")
    except OSError as error:
        problem(f"cannot be read ({error.strerror})")
    return found


def _check_offsets(manifest: Manifest, shard: Shard, offsets: np.ndarray, problem: Callable[[str], None]) -> None:
    if len(offsets) != shard.count + 1:
        problem(f"{len(offsets) - 1} samples, its manifest says {shard.count}")
    try:
        written = np.load(manifest.offsets_path(shard), allow_pickle=False)
        if not np.array_equal(written, offsets):
            problem(f"{shard.offsets_name} has other offsets than the tar")
    except (OSError, ValueError, EOFError) as error:
        problem(f"{shard.offsets_name} cannot be read ({error})")


def verify(manifest: Manifest, packers: Packers, tell: Callable[[str], None], progress: Callable[[int], None]) -> int:
    """Say every problem and return how many there are."""
    count, classes = 0, Counter()
    for found, images in packers.run(verify_shard, ((manifest, shard) for shard in manifest.shards)):
        progress(images)
        if found is not None:
            for line in found.problems:
                tell(line)
            count += len(found.problems)
            classes += found.classes
    listed = {name for shard in manifest.shards for name in (shard.name, shard.offsets_name)}
    for path in sorted(manifest.root.iterdir()):
        if path.suffix in (".tar", ".npy") and path.name not in listed:
            tell(f"{path.name}: not in the manifest")
            count += 1
    if manifest.num_classes and not count:
        for label, wanted in enumerate(manifest.class_counts):
            if classes[label] != wanted:
                tell(f"class {label}: {classes[label]} images, its manifest says {wanted}")
                count += 1
    return count
