"""data.balanced: every class equally often, in an order that is a function of seed and position."""

import collections
import dataclasses
import hashlib
import itertools
import shutil

import numpy as np
import pytest
import torch
from forked import RECIPE, train
from labelled_sets import CPU, pack_several, pack_uneven, recipe
from shard_fixtures import numbers, pack
from test_pack import folder, run
from typer.testing import CliRunner

from hsrgan.engine import assembly, balanced, data, shard_sources, shards
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.tools import pack as pack_tool


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return pack_several(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return pack_uneven(tmp_path_factory.mktemp("uneven"))


def read(manifest, batches, **options):
    """(number, class, flipped) in order of position, over all ranks."""
    world = options.get("world", 1)
    given = {"seed": 3, "start": 0, "global_batch": 20, "window": 2, "balanced": True} | options
    streams = [data.open_stream(manifest, rank=rank, **given) for rank in range(world)]
    images, c = zip(*(next(s) for _ in range(batches) for s in streams), strict=True)
    images, c = torch.cat(images), torch.cat(c)
    return list(zip(numbers(images), c.argmax(1).tolist(), (images[:, 0, 0, 0] == 0).tolist(), strict=True))


def test_balanced_classes_are_equally_frequent(uneven):
    rows = read(uneven, 20)  # 400 images
    found = collections.Counter(c for _, c, _ in rows)
    assert found == {0: 200, 2: 200}
    assert collections.Counter(c for _, c, _ in read(uneven, 20, balanced=False))[2] < 50
    for number, c, _ in rows:
        assert c == (0 if number % 11 else 2)
    for c, size in ((0, 100), (2, 10)):  # each image of a class once before any comes again, in another order
        order = [number for number, found, _ in rows if found == c]
        rounds = [order[i : i + size] for i in range(0, 200, size)]
        assert all(len(set(each)) == size for each in rounds)
        assert len({tuple(each) for each in rounds}) == len(rounds) and sorted(rounds[0]) not in rounds
    firsts = collections.Counter(c for _, c, _ in rows[::2])
    assert 70 < firsts[0] < 130  # within a round the classes' order is drawn


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_balanced_order_is_a_function_of_seed_and_position(uneven):
    truth = read(uneven, 12, mirror=True)
    assert read(uneven, 12, mirror=True, world=2, workers=2) == truth
    assert read(uneven, 8, mirror=True, start=80, global_batch=5, workers=3) == truth[80:120]
    assert read(uneven, 12, seed=4) != truth
    assert 0.4 < np.mean([flip for _, _, flip in truth]) < 0.6 and not any(f for _, _, f in read(uneven, 3))
    plan = balanced.BalancedPlan(uneven, 3)
    assert plan[10**15] == balanced.BalancedPlan(uneven, 3)[10**15]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 100, 1000])
def test_permutations_are_permutations(size):
    orders = [tuple(balanced.permuted(i, size, 7, epoch) for i in range(size)) for epoch in range(2)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size >= 100:
        assert orders[0] != orders[1]
        for a, b in itertools.combinations([*orders, range(size)], 2):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / size**0.5
        assert abs(np.mean(np.abs(np.diff(orders[0]))) / size - 1 / 3) < 0.08  # neighbours are no neighbours


def test_the_balanced_order_is_pinned(uneven):
    """A checkpoint of today resumes in the same order tomorrow."""
    plan = balanced.BalancedPlan(uneven, 3)
    assert hashlib.sha256(repr([plan[p] for p in range(300)]).encode()).hexdigest()[:16] == "2141e54eb28c1d6c"


def test_balanced_needs_the_index_of_classes_which_verify_makes(uneven, several, tmp_path):
    shutil.copytree(uneven.root, tmp_path / "old")
    for file in (tmp_path / "old").glob("*.cls.npy"):
        file.unlink()
    old = shards.load_manifest(tmp_path / "old")
    assert len(read(old, 1, balanced=False)) == 20
    with pytest.raises(UserError, match=r"00000.cls.npy is missing, .*: python tools/pack.py .*old --verify makes it"):
        read(old, 1)
    done = CliRunner().invoke(pack_tool.app, [str(tmp_path / "old"), "--verify", "--processes", "1"])
    assert done.exit_code == 0 and "10 of 10 shards had no index of classes: it is made" in done.output
    assert read(old, 4) == read(uneven, 4)
    again = CliRunner().invoke(pack_tool.app, [str(tmp_path / "old"), "--verify", "--processes", "1"])
    assert again.exit_code == 0 and "it is made" not in again.output
    np.save(tmp_path / "old/00003.cls.npy", np.zeros(11, np.int32))
    wrong = CliRunner().invoke(pack_tool.app, [str(tmp_path / "old"), "--verify", "--processes", "1"])
    assert "00003.cls.npy has other classes than the tar" in wrong.output and wrong.exit_code != 0
    np.save(tmp_path / "old/00003.cls.npy", np.zeros(3, np.int32))
    with pytest.raises(UserError, match=r"00003.cls.npy is damaged \(int32 \(3,\) instead of int32 \(11,\)\): remove"):
        read(old, 1)
    with pytest.raises(UserError, match=r"is multi-label but data\.balanced is true"):
        read(several[1], 1)
    with pytest.raises(UserError, match=r"holds no labels but data\.balanced is true"):
        read(pack(tmp_path / "none", 20, classes=0), 1)
    remote = dataclasses.replace(uneven, root="https://localhost/x")
    with pytest.raises(UserError, match=r"is remote but data\.balanced is true"):
        balanced.check_balanced(remote)
    cache = tmp_path / "cache"  # shards without a manifest are indexed as they are listed
    bare = shard_sources.open_shards(f"{uneven.root}/{{00000..00009}}.tar", cache=cache, quiet=True)
    assert read(bare, 4) == read(uneven, 4)


def test_balanced_in_a_recipe(uneven, tmp_path):
    with pytest.raises(UserError, match=r"data.balanced is true, allowed: with data.resampled: false"):
        recipe(tmp_path, "data.balanced=true", "data.resampled=true")
    plain, even = (recipe(tmp_path, f"data.balanced={b}").data for b in ("false", "true"))
    assert assembly.fake_labels(plain, uneven) == (100, 0, 10) and assembly.fake_labels(even, uneven) == (1, 0, 1)
    share = Draws(0, CPU, assembly.fake_labels(even, uneven)).latents(0, range(600), 1).c.mean(0)
    assert share[1] == 0 and abs(share[0] - 0.5) < 0.07


def tell_labels():
    """In the run: print the class of each real, and of ten fakes, at each step."""
    from hsrgan.engine import train as program

    real = program.run_phase

    def told(phase, t, images, reals, real_c):
        fake_c = t.draws.latents(0, range(10 * images, 10 * images + 10), 8).c
        print("labels", *real_c.argmax(1).tolist(), "fakes", *fake_c.argmax(1).tolist())
        real(phase, t, images, reals, real_c)

    program.run_phase = told


def test_a_balanced_run_sees_every_class_equally_often(tmp_path):
    names = [f"{'b' if i % 11 == 0 else 'a'}/{i:03d}.png" for i in range(110)]
    run(folder(tmp_path / "src", names, lambda i: np.full((16, 16, 3), i, np.uint8)), tmp_path / "dst", "--channels", 1)
    text = RECIPE.replace("builtin: digits", "shards: dst").replace("checkpoint_kimg: 0.016", "checkpoint_kimg: 9")
    (tmp_path / "recipe.yaml").write_text(text.replace("snapshot_kimg: 100.0", "snapshot_kimg: 9"))
    for given in ("true", "false"):
        said = train(tmp_path, "kimg=0.064", f"data.balanced={given}", f"run_dir=run-{given}", plant=tell_labels)
        lines = [line.split()[1:] for line in said.splitlines() if line.startswith("labels")]
        assert len(lines) >= 8
        reals, fakes = (np.array([row[part] for row in lines], int).mean() for part in (slice(8), slice(9, None)))
        assert (reals == 0.5 and fakes > 0.3) if given == "true" else (reals < 0.2 and fakes < 0.3)
