"""Real statistics: found by content, made again where they are damaged, never half there, never in the way."""

import json
import resource
from pathlib import Path

import pytest
from scoring_runs import (
    ALONE,
    REALS,
    StandIn,
    assert_same,
    generator,
    pack,
    reference_of,
    reorder,
    scorer,
    values,
)

from hsrgan.engine.metrics import real_cache, registry, sampling
from hsrgan.engine.metrics.names import parse_metrics
from hsrgan.engine.metrics.real_cache import RealCache
from hsrgan.engine.shards import load_manifest


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("shards") / "a")


@pytest.fixture(scope="module")
def reordered(shards, tmp_path_factory) -> Path:
    return reorder(shards, tmp_path_factory.mktemp("reordered") / "b")


@pytest.fixture(scope="module")
def reference(shards) -> dict[str, float]:
    return reference_of(shards)


def no_reals(*_):
    raise AssertionError("the reals were read")


def test_real_statistics_are_found_by_content(shards, reordered, reference, tmp_path, monkeypatch):
    cache = RealCache(ALONE, tmp_path)
    first = scorer(shards, cache=cache)
    assert_same(values(first.score(generator())), reference)
    files = {path.name for path in tmp_path.iterdir()}
    assert len(files) == 7  # moments of 210 and of 100, features of 210, and their facts; the lock
    facts = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert facts["protocol"]["network"] == "stand-in" and str(shards) not in json.dumps(facts)

    monkeypatch.setattr(sampling, "reals", no_reals)
    assert_same(values(scorer(reordered, cache=cache).score(generator())), reference)
    assert_same(values(first.score(generator())), reference)
    with pytest.raises(AssertionError, match="were read"):
        scorer(shards, net=StandIn("clean"), cache=cache).score(generator())
    with pytest.raises(AssertionError, match="were read"):
        scorer(shards, parse_metrics("fid50_full,fid50"), cache=cache).score(generator())  # moments of 50 reals are new
    assert {path.name for path in tmp_path.iterdir()} == files


def test_other_images_have_other_statistics(shards, tmp_path):
    """One image fewer in the last shard."""
    content = {sampling.content_sha256(load_manifest(folder)) for folder in (shards, pack(tmp_path, REALS - 1))}
    assert len(content) == 2


def test_a_damaged_cache_is_made_again(shards, reference, tmp_path):
    scorer(shards, cache=RealCache(ALONE, tmp_path)).score(generator())
    whole = {}
    for path in tmp_path.glob("*.safetensors"):
        whole[path] = path.stat().st_size
        path.write_bytes(path.read_bytes()[: whole[path] // 2])
    assert_same(values(scorer(shards, cache=RealCache(ALONE, tmp_path)).score(generator())), reference)
    assert {path: path.stat().st_size for path in whole} == whole


@pytest.mark.parametrize("where", ["in the pass", "while writing"])
def test_ctrl_c_leaves_no_half_cache(shards, tmp_path, monkeypatch, where):
    def interrupted(*arguments):
        if where == "while writing":
            Path(arguments[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    if where == "while writing":
        monkeypatch.setattr(real_cache, "save_file", interrupted)
    else:
        monkeypatch.setattr(registry.Moments, "reduce", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scorer(shards, cache=RealCache(ALONE, tmp_path)).score(generator())
    assert [path.name for path in tmp_path.iterdir()] in ([], [".lock"])


@pytest.mark.parametrize("why", ["File exists", "Is a directory", "File too large"])
def test_a_cache_that_cannot_be_written_is_said_and_scores_go_on(shards, reference, tmp_path, capfd, why):
    """A folder that cannot be made, a lock that cannot be taken, a disk that is full after the first few bytes."""
    folder, no_limit = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    if why == "File exists":
        folder.write_text("a file")
    elif why == "Is a directory":
        (folder / ".lock").mkdir(parents=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, no_limit[1]))  # the facts fit, the statistics do not
    try:
        assert_same(values(scorer(shards, cache=RealCache(ALONE, folder)).score(generator())), reference)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"cannot write {folder}") and why in line and line.endswith("statistics are not kept")
    assert not folder.is_dir() or [path.name for path in folder.iterdir()] == [".lock"]
