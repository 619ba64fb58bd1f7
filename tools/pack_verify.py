"""Reads a packed data set again, all of it: hashes, offsets, counts, every image, every label."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hsrgan.engine.aside import written_aside
from hsrgan.engine.labels import Label, LabelSets, to_text
from hsrgan.engine.samples import BadSample, decode
from hsrgan.engine.shards import Manifest, Shard
from hsrgan.engine.tar_index import sample_offsets
from hsrgan.tools.pack_shards import Packers, step


@dataclass
class Found:
    """Of one shard: a line for each problem, how many images have each label, and whether their index was made."""

    problems: list[str] = field(default_factory=list)
    labels: Counter[Label] = field(default_factory=Counter)
    indexed: bool = False


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
            labels = []
            for i, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
                step()
                try:
                    labels.append(decode(os.pread(file.fileno(), end - begin, begin), manifest)[1])
                except BadSample as error:
                    problem(f"sample {i} {error}")
            found.labels.update(labels)
            if manifest.num_classes and manifest.label_sets is None and not found.problems:
                found.indexed = _check_classes(manifest, shard, labels, problem)
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


def _check_classes(
    manifest: Manifest, shard: Shard, labels: list[Label], problem: Callable[[str], None]
) -> bool:
    """Whether the index of classes was missing and is now written."""
    path, classes = manifest.classes_path(shard), np.array([label for (label,) in labels], np.int32)
    if not path.exists():
        with written_aside(path) as aside, open(aside, "wb") as file:
            np.save(file, classes)
        return True
    try:
        if not np.array_equal(np.load(path, allow_pickle=False), classes):
            problem(f"{shard.classes_name} has other classes than the tar: remove it, and verify again")
    except (OSError, ValueError, EOFError) as error:
        problem(f"{shard.classes_name} cannot be read ({error}): remove it, and verify again")
    return False


def verify(manifest: Manifest, packers: Packers, tell: Callable[[str], None], progress: Callable[[int], None]) -> int:
    """Say every problem and return how many there are."""
    count, indexed, labels = 0, 0, Counter()
    for found, images in packers.run(verify_shard, ((manifest, shard) for shard in manifest.shards)):
        progress(images)
        if found is not None:
            for line in found.problems:
                tell(line)
            count += len(found.problems)
            labels += found.labels
            indexed += found.indexed
    if indexed:
        tell(f"{indexed} of {len(manifest.shards)} shards had no index of classes: it is made")
    listed = {name for shard in manifest.shards for name in shard.file_names}
    for path in sorted(manifest.root.iterdir()):
        if path.suffix in (".tar", ".npy") and path.name not in listed:
            tell(f"{path.name}: not in the manifest")
            count += 1
    if manifest.num_classes and not count:
        sets = manifest.label_sets or LabelSets(
            manifest.num_classes, tuple((i,) for i in range(manifest.num_classes)), manifest.class_counts
        )
        wanted = dict(zip(sets.sets, sets.counts, strict=True))
        for label in sorted(wanted.keys() | labels.keys()):
            if labels[label] != wanted.get(label, 0):
                tell(f"class {to_text(label)}: {labels[label]} images, its manifest says {wanted.get(label, 0)}")
                count += 1
    return count
