"""What `data.shards` may say, as a `Manifest`.

    photos/  photos/manifest.json            a packed data set on this machine
    https://host/photos/manifest.json        a packed data set elsewhere (or https://host/photos/)
    shards/                                  every .tar of a folder without a manifest, by name
    shards/{00000..00127}.tar                a brace pattern, of paths or URLs
    list.txt                                 a path or URL a line, # begins a comment; the file may be a URL too
    a.tar::https://host/{b,c}.tar            several of these

Shards without a manifest are read through once, to count and find their samples; what was found is kept in the cache
folder by path, size and time of a file, by the address of a URL. Remote ones stay in the cache while there is room. A
manifest spares that: it is what makes a start over many remote shards quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import urllib.parse
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from hsrgan.engine.aside import writable, written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import FILES, MOST_CLASSES, Label, LabelSets, counts_of, from_text, read_label, to_text
from hsrgan.engine.shard_cache import GB, ShardCache, claimed
from hsrgan.engine.shards import IMAGE_FORMATS, MANIFEST, Manifest, Shard, load_manifest, parse_manifest
from hsrgan.engine.sizes import in_words
from hsrgan.engine.tar_index import sample_offsets
from hsrgan.engine.transport import CHUNK, check_scheme, fetch_text, scheme_of

_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
_THREADS = 8  # shards that are indexed at a time


def open_shards(
    spec: str,
    *,
    cache: str | os.PathLike | None = None,
    cache_gb: float = 64,
    allow_shell: bool = False,
    max_bad: float = 0.0,
    quiet: bool = False,
) -> Manifest:
    """The data set that `spec` names. cache: folder for fetched shards and indexes, by default ~/.cache/hsrgan/shards.

    Every process may call it at once: what has to be fetched or read is, by one. Raises `UserError`, one line.
    """
    folder = Path(cache or "~/.cache/hsrgan/shards").expanduser()
    single = spec if "::" not in spec and "{" not in spec else ""
    for prefix in ("file://", "file:"):
        single = single.removeprefix(prefix)
    if scheme_of(single):
        check_scheme(single, allow_shell=allow_shell)
    if single and _is_manifest(single):
        if not scheme_of(single):
            return dataclasses.replace(load_manifest(single), max_bad=max_bad)
        url = single + MANIFEST if single.endswith("/") else single
        manifest = parse_manifest(fetch_text(url, allow_shell=allow_shell), url.rpartition("/")[0], url)
        store = ShardCache(folder, int(cache_gb * GB), allow_shell=allow_shell)
        return dataclasses.replace(manifest, cache=store, max_bad=max_bad)
    locations = _locations(spec, allow_shell)
    store = ShardCache(folder, int(cache_gb * GB), allow_shell=allow_shell)
    return dataclasses.replace(_indexed(spec, locations, store, quiet=quiet), max_bad=max_bad)


def _is_manifest(single: str) -> bool:
    """Whether this is a packed data set (perhaps an unfinished or missing one) rather than shards."""
    if scheme_of(single):
        is_list = _url_path(single).endswith((".tar", ".txt"))
        return not is_list and scheme_of(single) in ("http", "https", "s3", "gs", "hf")
    path = Path(single)
    if path.is_dir() and not any((path / name).exists() for name in (MANIFEST, f"{MANIFEST}.part")):
        return not any(path.glob("*.tar"))
    return not single.endswith((".tar", ".txt"))


def _url_path(url: str) -> str:
    return urllib.parse.urlsplit(url).path


def _locations(spec: str, allow_shell: bool) -> list[str]:
    """Paths and URLs of the shards, in the order in which they are listed."""
    from braceexpand import UnbalancedBracesError, braceexpand

    found = []
    for part in spec.split("::"):
        try:
            found += braceexpand(part)
        except UnbalancedBracesError:
            text = f"data.shards: {part}: a brace is not closed; a pattern is like shards/{{00..12}}.tar"
            raise UserError(text) from None
    listed: list[str] = []
    for location in found:
        if location.endswith(".txt"):
            listed += _lines(location, allow_shell)
        elif not scheme_of(location) and Path(location).is_dir():
            listed += sorted(str(path) for path in Path(location).glob("*.tar"))
        else:
            listed.append(location)
    for i, location in enumerate(listed):
        if scheme_of(location) == "file":
            listed[i] = urllib.parse.unquote(_url_path(location))
        elif scheme_of(location):
            check_scheme(location, allow_shell=allow_shell)
    if not listed:
        raise UserError(f"data.shards: {spec} names no shards")
    twice = [location for location, times in Counter(listed).items() if times > 1]
    if twice:
        raise UserError(f"data.shards: {spec} names {twice[0]} twice")
    return listed


def _lines(location: str, allow_shell: bool) -> list[str]:
    if scheme_of(location):
        text = fetch_text(location, allow_shell=allow_shell).decode("utf-8", "replace")
    else:
        try:
            text = Path(location).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.shards: cannot read {location}: {error}") from None
    return [line for raw in text.splitlines() if (line := raw.partition("#")[0].strip())]


@dataclass
class _Entry:
    """What is kept of one shard. labels: how many samples have each, as text. image: [suffix, width, height, channels]
    of the first image that opens."""

    count: int
    sha256: str
    bytes: int
    labels: dict[str, int]
    image: list | None


def _indexed(spec: str, locations: list[str], store: ShardCache, *, quiet: bool) -> Manifest:
    index = store.folder / "index"
    with writable(index, "name another folder with data.cache"):
        index.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False, quiet=quiet)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = pool.map(lambda location: _entry(location, index, store), locations)
        steps = track(entries, "indexing shards", total=len(locations), console=console, transient=True)
        entries = list(steps)
    images = Counter(tuple(entry.image) for entry in entries if entry.image)
    if not images:
        raise UserError(f"{spec} holds no image of the formats {', '.join(IMAGE_FORMATS)} in 8-bit grey, RGB or RGBA")
    (image_format, width, height, channels), _ = images.most_common(1)[0]
    count = sum(entry.count for entry in entries)
    labels: Counter[Label] = Counter()
    for entry in entries:
        labels.update({from_text(text): found for text, found in entry.labels.items()})
    if sum(labels.values()) <= count / 2:
        labels.clear()
    classes = 1 + max((label[-1] for label in labels if label), default=-1)
    drawn = counts_of(labels, classes)
    sets = drawn if isinstance(drawn, LabelSets) and classes else None
    shards = [Shard(w, e.count, e.sha256, e.bytes) for w, e in zip(locations, entries, strict=True) if e.count]
    name = hashlib.sha256(json.dumps([shard.sha256 for shard in shards]).encode()).hexdigest()
    console.print(
        f"{spec}: {len(shards)} shards, {count} samples of {in_words((height, width))}, {image_format}, "
        f"{classes or 'no'} classes",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    return Manifest(
        root=spec, resolution=(height, width), channels=channels, count=count, image_format=image_format, source=spec,
        num_classes=classes, class_names=tuple(map(str, range(classes))),
        class_counts=sets.class_counts if sets else drawn if classes else (), label_sets=sets, shards=tuple(shards),
        sha256=name, index=index, cache=store,
    )  # fmt: skip


def _entry(location: str, index: Path, store: ShardCache) -> _Entry:
    """From the index, or by reading the shard through."""
    key = location
    if not scheme_of(location):
        try:
            status = os.stat(location)
        except OSError as error:
            text = f"data.shards: {location} is missing ({error.strerror}): list the shards that there are"
            raise UserError(text) from None
        key = f"{os.path.abspath(location)}\0{status.st_size}\0{status.st_mtime_ns}"
    path = index / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    with claimed(path.with_suffix(".part")):  # or every process would read it
        try:
            entry = _Entry(**json.loads(path.read_bytes()))
            if scheme_of(location) or (index / f"{entry.sha256}.cls.npy").exists():
                return entry
        except (OSError, ValueError, TypeError):
            pass
        entry = _read_through(location, index, store)
        with written_aside(path) as aside:
            aside.write_text(json.dumps(asdict(entry)))
    return entry


def _read_through(location: str, index: Path, store: ShardCache) -> _Entry:
    labels: dict[int, tuple[str, Label]] = {}  # of a sample: the file that said so, and what
    image: list | None = None

    def look(sample: int, suffix: str, read: Callable[[], bytes]) -> None:
        nonlocal image
        if suffix in FILES and labels.get(sample, ("",))[0] != FILES[0]:
            with contextlib.suppress(ValueError):  # told when its turn comes
                label = read_label({suffix: read()})
                if not label or label[-1] < MOST_CLASSES:
                    labels[sample] = suffix, label
        elif image is None and suffix in IMAGE_FORMATS:
            image = _facts(suffix, read())

    if scheme_of(location):
        descriptor, sha256, size = store.adopt(location)
    else:
        descriptor = os.open(location, os.O_RDONLY)
        size, digest = os.fstat(descriptor).st_size, hashlib.sha256()
        for at in range(0, size, CHUNK):
            digest.update(os.pread(descriptor, CHUNK, at))
        sha256 = digest.hexdigest()
    with open(descriptor, "rb") as file:
        try:
            offsets = sample_offsets(file, look)
        except ValueError as error:
            raise UserError(f"data.shards: {location} is damaged ({error}): mend it or leave it out") from None
    if not scheme_of(location):  # those of a remote shard are kept beside it
        classes = np.full(len(offsets) - 1, -1, np.int32)
        for sample, (_, label) in labels.items():
            classes[sample] = label[0] if len(label) == 1 else -1
        with claimed(index / f"{sha256}.part"):  # a copy of the shard, elsewhere, may be read at the same time
            for suffix, array in ((".npy", offsets), (".cls.npy", classes)):
                with written_aside(index / f"{sha256}{suffix}") as aside, open(aside, "wb") as file:
                    np.save(file, array)
    found = Counter(to_text(label) for _, label in labels.values())
    return _Entry(len(offsets) - 1, sha256, size, dict(found), image)


def _facts(suffix: str, data: bytes) -> list | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return [suffix, *image.size, _CHANNELS[image.mode]]
    except Exception:  # PIL raises nearly anything; the sample is reported when its turn comes
        return None
