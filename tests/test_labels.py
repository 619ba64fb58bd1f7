"""Labels: where they come from, several of an image, and a row for each in the sample grids."""

import collections
import dataclasses
import io
import itertools
import json
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import RECIPE, train
from labelled_sets import CPU, SETS, pack_several, pack_uneven, recipe, write_labels
from PIL import Image
from shard_fixtures import encode
from test_pack import by_value, folder, nvidia_zip, run, stream
from typer.testing import CliRunner

from hsrgan.engine import assembly, data, labels, outputs, shard_sources, shards, stats
from hsrgan.engine.distributed import World
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import registry
from hsrgan.engine.metrics.positions import UNIT
from hsrgan.engine.metrics.sampling import fakes
from hsrgan.engine.model import Discriminator, Generator
from hsrgan.tools import pack_labels, sample


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return pack_several(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return pack_uneven(tmp_path_factory.mktemp("uneven"))


def vector(label, number=float):
    return [number(i in label) for i in range(4)]  # a fourth class that no image has


def test_lists_of_classes_are_multi_label(several):
    output, manifest = several
    assert "3 classes in 4 sets (multi-label)" in output
    assert manifest.class_names == ("0", "1", "2") and manifest.class_counts == (10, 10, 10)
    assert dict(zip(manifest.label_sets.sets, manifest.label_sets.counts, strict=True)) == dict.fromkeys(SETS, 5)
    images, c = stream(manifest)
    assert c.shape == (20, 3) and c.dtype == torch.float32
    for value, row in zip(images.mean((1, 2)), c, strict=True):
        assert row.nonzero().flatten().tolist() == list(SETS[round(float(value) / 4) % 4])
    assert json.loads((manifest.root / "manifest.json").read_text())["format"] == "hsrgan-shards-2"
    assert shards.load_manifest(manifest.root) == manifest
    # of a bare shard the same is known from its .json members
    assert shard_sources.open_shards(str(manifest.root), quiet=True).label_sets == manifest.label_sets
    spec, cache = f"{manifest.root}/{{00000..00002}}.tar", manifest.root.parent / "cache"
    bare = shard_sources.open_shards(spec, cache=cache, quiet=True)
    assert bare.label_sets == manifest.label_sets and bare.class_counts == manifest.class_counts
    assert torch.equal(stream(bare)[1].sum(0), torch.tensor([10.0, 10, 10]))


@pytest.mark.parametrize(
    ("given", "classes", "found"),
    {
        "vectors": ([vector(SETS[i % 4]) for i in range(8)], 4, SETS),
        "vectors of whole numbers": ([vector(SETS[i % 4], int) for i in range(8)], 4, SETS),
        "one-hot vectors": ([vector((i % 3,)) for i in range(8)], 4, [(0,), (1,), (2,)]),
        "numbers beside lists": ([[2, 0], [], 1, [1, 0, 2]] * 2, 3, SETS),
        "lists of one": ([[i % 3] for i in range(8)], 3, [(0,), (1,), (2,)]),
    }.values(),
)
def test_what_a_label_may_be(tmp_path, given, classes, found):
    source = folder(tmp_path / "src", [f"{i}.png" for i in range(8)])
    write_labels(source, given)
    manifest = run(source, tmp_path / "dst")[1]
    assert manifest.num_classes == classes
    assert (manifest.label_sets is None) == (len(found) == 3)
    images, c = stream(manifest)
    for value, row in zip(images.mean((1, 2)), c, strict=True):
        assert row.nonzero().flatten().tolist() == list(found[round(float(value) / 4) % len(found)])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([[0, 1], [1, 0]], r"has lists like \[0, 1\], which may be class numbers or a 0 or 1 .*: write 0.0 and 1.0"),
        ([[0], [1]], "for one class its number alone"),
        ([[0, 3, 0], 1], r"list \[0, 3, 0\], which names a class twice"),
        ([[0.0, 0.5], [1.0, 0.0]], r"gives 0.png the label \[0.0, 0.5\], a vector of other values than 0 and 1"),
        ([[0.0, 1.0], [1.0, 0.0, 0.0]], "vectors of different lengths"),
        ([[0.0, 1.0], 3], "numbers beside vectors"),
        ([[0.0, 1.0], [1, 5]], "class numbers beside vectors"),
        ([[1, True], 3], "no list of whole numbers"),
        ([-1, 3], "the label -1, no whole number"),
        ([1_000_000_000, 3], "whose class is not below 100000"),
        ([[], []], "gives every image a list of no classes"),
    ],
)
def test_what_a_label_may_not_be_is_one_line(tmp_path, given, line):
    source = folder(tmp_path / "src", ["0.png", "1.png"])
    write_labels(source, given)
    with pytest.raises(UserError, match=line) as caught:
        run(source, tmp_path / "dst")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("mend it, or pack with --no-labels")
    assert not (tmp_path / "dst").exists()


def chunks(raw, size):
    return (raw[i : i + size] for i in range(0, len(raw), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_dataset_json_is_read_as_json_wherever_it_is_cut(size, monkeypatch):
    monkeypatch.setattr(pack_labels, "CHUNK", 1)
    rows = [["a\\b/é\u4e2d.png", 12], ["x \"y\".png", [10, 200]], ["z.png", [1.0, 0.0]]]
    content = {"about": {"n": [1, 2.5e3]}, "n": 123, "labels": rows, "last": [[]]}
    for raw in (json.dumps(content), json.dumps(content, ensure_ascii=False, indent=3)):
        found = list(pack_labels._pairs(chunks(raw.encode(), size)))
        assert found == [("a/b/é\u4e2d.png", 12), *map(tuple, rows[1:])]
        for cut in (5, len(raw) // 2, len(raw) - 1):
            with pytest.raises(ValueError, match=r"cut off|its end"):
                list(pack_labels._pairs(chunks(raw[:cut].encode(), size)))
    assert list(pack_labels._pairs(chunks(b'{"labels": null}', size))) == []
    with pytest.raises(ValueError, match="no list of labels"):
        list(pack_labels._pairs(chunks(b'{"label": [["a", 1]]}', size)))


def test_a_damaged_dataset_json_in_a_zip_is_one_line(tmp_path):
    path = nvidia_zip(tmp_path / "a.zip", labels=[[f"{i % 2:05d}/img{i:08d}.png", i] for i in range(12)])
    assert by_value(run(path, tmp_path / "whole")[1]) == {i: i for i in range(12)}
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'img00000007.png", 7', b'img00000007.png", 8'))
    with pytest.raises(UserError, match=r"dataset.json in .*a.zip cannot be read \(its checksum"):
        run(path, tmp_path / "dst")
    deflated = tmp_path / "b.zip"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name != "dataset.json":
                new.writestr(name, old.read(name))
        new.writestr("dataset.json", json.dumps({"labels": [[n, 3] for n in new.namelist() if n[0] == "0"]}))
    assert run(deflated, tmp_path / "b")[1].class_counts == (0, 0, 0, 12)


def tar_of(path, samples):
    """A tar of others: (key, {suffix: bytes}) each."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, value in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
    return path


def test_labels_from_the_json_of_a_shard(tmp_path):
    image = [encode(np.full((4, 4, 3), 20 * i, np.uint8)) for i in range(8)]
    one = [{"json": json.dumps({"label": i % 3, "caption": "x"}).encode(), "png": image[i]} for i in range(6)]
    one[4] = {"png": image[4], "json": b'{"label": 0}', "cls": b"1"}  # webdataset's own member goes first
    one += [{"json": b'{"label": "cat"}', "png": image[6]}, {"json": b"{", "png": image[7]}]
    tar_of(tmp_path / "one.tar", [(f"{i}", files) for i, files in enumerate(one)])
    manifest = shard_sources.open_shards(str(tmp_path / "one.tar"), cache=tmp_path, quiet=True, max_bad=0.5)
    assert manifest.class_counts == (2, 2, 2) and manifest.label_sets is None
    faults = collect()
    images, c = next(data.open_stream(manifest, seed=0, start=0, global_batch=8, faults=faults))
    given = (images.float().mean((1, 2, 3)) / 20).round().int().tolist()
    assert c.argmax(1).tolist() == [i % 3 for i in given] and set(given) == set(range(6))
    reasons = {row["sample"]: row["reason"] for row in faults.news}
    assert reasons[6].startswith("has the label 'cat', not of the form") and reasons[7].endswith("that is no JSON")
    files = [{"png": image[i], "json": json.dumps({"labels": [2, 0][: i % 3]}).encode()} for i in range(8)]
    tar_of(tmp_path / "many.tar", [(f"{i}", f) for i, f in enumerate(files)])
    manifest = shard_sources.open_shards(str(tmp_path / "many.tar"), cache=tmp_path, quiet=True)
    assert manifest.label_sets == labels.LabelSets(3, ((), (0, 2), (2,)), (3, 2, 3))


def collect():
    news = []
    return SimpleNamespace(note=lambda read, replaced, more: news.extend(more), news=news)


def test_multi_label_draws_are_those_of_random_items():
    sets = labels.LabelSets(4, ((), (0, 2), (1,)), (10, 30, 60))
    c = Draws(0, CPU, sets).latents(0, range(4000), 1).c
    assert c.shape == (4000, 4) and set(c.unique().tolist()) == {0.0, 1.0}
    found = collections.Counter(tuple(row.nonzero().flatten().tolist()) for row in c)
    assert found.keys() == set(sets.sets)
    assert all(abs(found[s] / 4000 - n / 100) < 0.03 for s, n in zip(sets.sets, sets.counts, strict=True))
    split = torch.cat([Draws(0, CPU, sets).latents(0, range(a, b), 1).c for a, b in ((0, 7), (7, 20))])
    assert torch.equal(split, c[:20])


TINY = {"z_dim": 8, "w_dim": 8, "mapping_layers": 1, "channel_base": 64, "channel_max": 8, "num_fp16_res": 0}


def generator(c_dim, resolution=8):
    torch.manual_seed(1)
    return Generator(c_dim=c_dim, img_resolution=resolution, img_channels=1, **TINY).eval().requires_grad_(False)


def test_networks_and_metrics_take_multi_hot_labels(monkeypatch):
    sets, seen = labels.LabelSets(3, tuple(sorted(SETS)), (5, 5, 5, 5)), []
    g = generator(3)
    g.mapping.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)
    images = torch.cat([images for images, _ in fakes(g, Draws(0, CPU, sets), 2 * UNIT, UNIT, world)])
    assert torch.equal(torch.cat(seen), Draws(0, CPU, sets).latents(5, range(2 * UNIT), 8).c)
    assert {tuple(row.nonzero().flatten().tolist()) for row in torch.cat(seen)} == set(SETS)
    seen.clear()  # and so it is in tools/eval.py
    content = SimpleNamespace(drawn_labels=sets)
    score = SimpleNamespace(
        seed=0, world=world, manifest=content, batch=UNIT, _needs=lambda fakes: {"x": SimpleNamespace(images=UNIT)},
        _label=lambda *_: "", _pass=lambda units, *_: list(units),
    )
    registry.Scorer._fake(score, g)
    assert torch.equal(seen[0], Draws(0, CPU, sets).latents(5, range(UNIT), 8).c)
    torch.manual_seed(0)
    d = Discriminator(c_dim=3, img_resolution=8, img_channels=1, channel_base=64, channel_max=8, num_fp16_res=0,
                      mbstd_group_size=1, mapping_layers=1)  # fmt: skip
    x = images[:1].float().repeat(4, 1, 1, 1)
    logits = d(x, torch.from_numpy(labels.multi_hot(SETS, 3))).flatten()
    assert len({round(value, 5) for value in logits.tolist()}) == 4  # the projection sees every class


def out_of(manifest, c_dim, recipe):
    draws = Draws(0, CPU, assembly.fake_labels(recipe.data, manifest))
    return outputs.Outputs(SimpleNamespace(recipe=recipe, draws=draws), manifest, generator(c_dim), {})


def test_grids_have_a_row_for_each_class_from_the_same_latents(uneven, several, tmp_path):
    settings = recipe(tmp_path)
    for manifest, rows, names in (
        (uneven, [(0,), (2,)], ["a", "c"]),
        (several[1], [(), (0, 1, 2), (0, 2), (1,)], ["none", "0+1+2", "0+2", "1"]),
    ):
        out = out_of(manifest, 3, settings)
        assert out.row_names == names
        images = out.pictures().unflatten(0, (len(rows), 8))
        z = out.t.draws.latents(outputs.GRID_STREAM, range(8), 8).z
        for label, row in zip(rows, images, strict=True):
            c = torch.from_numpy(labels.multi_hot([label] * 8, 3))
            assert torch.allclose(row, out.g_ema(z, c, noise_mode="const"), atol=1e-6)
        for a, b in itertools.combinations(images, 2):
            assert (a - b).abs().mean() > 1e-3  # row c differs by class
    twenty = dataclasses.replace(uneven, class_counts=tuple(range(20)), num_classes=20)
    assert out_of(twenty, 20, settings)._rows == [(i,) for i in range(1, 17)]


def test_grids_without_labels_are_what_they_were(uneven, tmp_path):
    out = out_of(uneven, 0, recipe(tmp_path, "data.labels=false"))
    latents = Draws(0, CPU).latents(outputs.GRID_STREAM, range(64), 8)
    before = torch.cat([out.g_ema(z, noise_mode="const") for z in latents.z.split(8)])
    assert torch.equal(out.pictures(), before) and out.row_names == []


def test_a_multi_label_run_from_packing_to_sampling(tmp_path, monkeypatch):
    """Train for two steps, resume for two more; grids, TensorBoard, and tools/sample.py --label 0,2."""
    source = folder(tmp_path / "src", [f"{i:02d}.png" for i in range(24)])
    write_labels(source, [list(SETS[i % 4]) for i in range(24)])
    run(source, tmp_path / "dst", "--shard-size", 8, "--channels", 1)
    text = RECIPE.replace("builtin: digits", "shards: dst").replace("image_kimg: 100.0", "image_kimg: 0.016")
    (tmp_path / "recipe.yaml").write_text(text)
    said = train(tmp_path, "kimg=0.016")
    assert "rows of samples/fakes-*.png: none, 0+1+2, 0+2, 1" in said
    assert "rows of" not in train(tmp_path, "kimg=0.032")
    run_dir = tmp_path / "run"
    grid = np.asarray(Image.open(run_dir / "samples/fakes-000000.0.png"))
    assert grid.shape == (4 * 64, 8 * 64)  # 16² enlarged four times
    tiles = grid.reshape(4, 64, 8, 64).transpose(0, 2, 1, 3).astype(int)
    assert all((tiles[0] != tiles[i]).any() for i in (1, 2, 3))
    (snapshot,) = [p for p in (run_dir / "snapshots").iterdir() if p.name.endswith("032.safetensors")]
    arguments = [str(snapshot), "--seeds", "0-1", "--out", str(tmp_path / "out")]
    for label, name in (("2, 0", "0+2"), ("1", "1")):
        done = CliRunner().invoke(sample.app, [*arguments, "--label", label], catch_exceptions=False)
        assert done.exit_code == 0 and (tmp_path / f"out/seed0001-class{name}.png").exists()
    files = [(tmp_path / f"out/seed0001-class{name}.png").read_bytes() for name in ("0+2", "1")]
    assert files[0] != files[1]
    wrong = CliRunner().invoke(sample.app, [*arguments, "--label", "0,3"])
    assert wrong.exit_code == 2 and "has the classes 0 to 2 (0, 1, 2), not '3'; give some of them" in wrong.output


def test_rows_are_named_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with stats.RunLog(tmp_path, total_kimg=1) as log:
        log.fakes(torch.zeros(16, 1, 8, 8), 0.0, ["cat", "dog"])
        log.fakes(torch.zeros(16, 1, 8, 8), 0.5, ["cat", "dog"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    said = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("fakes/rows/text_summary")]
    assert said == ["cat, dog"] * 2
    rows = [row for row in stats.read_log(tmp_path / "log.jsonl") if row.get("event") == "rows"]
    assert [row["text"] for row in rows] == ["rows of samples/fakes-*.png: cat, dog"]
    assert Image.open(tmp_path / "samples/fakes-000000.5.png").size == (8 * 64, 2 * 64)


def test_a_label_is_a_number_or_a_name():
    known = {"several": False, "where": "--label ?"}
    names = ["cat", "dog", "7"]
    assert labels.parse_label("dog", 3, names, **known) == labels.parse_label("1", 3, names, **known) == (1,)
    assert labels.parse_label("7", 3, names, **known) == (2,)
    assert labels.parse_label("dog, 0", 3, names, **known | {"several": True}) == (0, 1)
    line = r"--label \? has the classes 0 to 2 \(cat, dog, 7\), not .*; give one, or all"
    for text in ("0,1", "3", "-1", "cow", ""):
        with pytest.raises(UserError, match=line):
            labels.parse_label(text, 3, names, **known)
