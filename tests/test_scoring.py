"""Scoring generators: the same value for any ranks, batch size and order of shards; real statistics kept; a training
run left as it was."""

import dataclasses
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from metric_fixtures import StandInLPIPS, attributes_file, digits, kaiming
from PIL import Image
from torch import nn

from hsrgan.engine import distributed
from hsrgan.engine.distributed import World, failing_together, from_first
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import generator_metrics, registry, sampling
from hsrgan.engine.metrics.inception import LOGITS
from hsrgan.engine.metrics.names import parse_metrics
from hsrgan.engine.metrics.positions import UNIT, firsts
from hsrgan.engine.metrics.real_cache import RealCache
from hsrgan.engine.metrics.registry import Scorer, needed_extractors
from hsrgan.engine.model import Generator
from hsrgan.engine.shards import ShardWriter, load_manifest

REALS = 210
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class StandIn(nn.Module):
    """A small network in place of a published one; counts the images that it is shown."""

    name, dim = "stand-in", 24

    def __init__(self, resize: str = "none"):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 32, 5, 2), nn.ReLU(), nn.Conv2d(32, 24, 3, 2), nn.ReLU())
        self.head = nn.Linear(24, LOGITS, bias=False)
        kaiming(self)
        self.protocol = {"network": self.name, "resize": resize}
        self.seen = 0

    def features_and_logits(self, images):
        assert images.dtype == torch.uint8 and len(images) == UNIT
        self.seen += len(images)
        features = self.net(images[:, :1].float() / 127.5 - 1).mean((2, 3))
        return features, self.head(features)

    def forward(self, images):
        return self.features_and_logits(images)[0]


def generator(c_dim: int = 10) -> Generator:
    torch.manual_seed(0)
    sizes = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 128, "channel_max": 8}
    made = Generator(c_dim=c_dim, img_resolution=16, img_channels=1, **sizes).eval().requires_grad_(False)
    for name, value in made.named_parameters():
        if name.endswith("noise_strength"):
            value.fill_(0.3)
    return made


def pack(folder: Path, count: int = REALS) -> Path:
    with ShardWriter(folder, resolution=(16, 16), channels=1, class_names=[str(i) for i in range(10)],
                     shard_size=50) as writer:  # fmt: skip
        for i, image in enumerate(digits(count, 16)):
            data = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(data, "PNG")
            writer.add(data.getvalue(), i % 7 % 3)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("shards") / "a")


@pytest.fixture(scope="module")
def reordered(shards, tmp_path_factory) -> Path:
    """The same shards in another folder, listed in another order."""
    folder = Path(shutil.copytree(shards, tmp_path_factory.mktemp("reordered") / "b"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"].reverse()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def several() -> list:
    """Every kind of metric, of few images."""
    *others, pr = parse_metrics("fid300_full,fid100,kid300_full,is300,pr1k3_full")
    return [*others, dataclasses.replace(pr, fakes=300)]


def scorer(folder: Path, metrics=None, net: nn.Module | None = None, world: World = ALONE, **options) -> Scorer:
    metrics, net = metrics or several(), net or StandIn()
    extractors = dict.fromkeys(needed_extractors(metrics, None), net)
    return Scorer(metrics, extractors, load_manifest(folder), world, seed=3, **options)


def values(results) -> dict[str, float]:
    return {name: value for result in results for name, value in result["values"].items()}


@pytest.fixture(scope="module")
def reference(shards) -> dict[str, float]:
    torch.set_num_threads(1)
    return values(scorer(shards, batch=64).score(generator()))


def assert_same(found: dict[str, float], reference: dict[str, float]) -> None:
    assert found.keys() == reference.keys()
    assert {name: value for name, value in found.items() if abs(value - reference[name]) > 1e-9} == {}


def test_the_values_are_of_the_images(shards, reference):
    """Everything once more by hand: images made one at a time by the same draws, features in one go."""
    from test_metrics_math import brute_force

    from hsrgan.engine.metrics.frechet import frechet_distance

    g, net, draws = generator(), StandIn(), Draws(3, torch.device("cpu"), load_manifest(shards).class_counts)
    fakes = []
    for position in range(300):
        latents = draws.latents(sampling.STREAM, [position], 8)
        image = g(latents.z, latents.c, noise=draws.noise(sampling.STREAM, [position], g.synthesis.noise_size))
        fakes.append(np.clip(np.floor(image.double().numpy() * 127.5 + 128), 0, 255).astype(np.uint8))
    sides = [torch.from_numpy(np.concatenate(fakes)), digits(REALS, 16)]
    with torch.no_grad():
        x, y = (net.net(side.float() / 127.5 - 1).mean((2, 3)).double() for side in sides)
    truth = frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert reference["fid300_full"] == pytest.approx(truth, rel=1e-4)  # of 8 bits, few pixels may round otherwise
    assert reference["pr1k3_full_precision"] == pytest.approx(brute_force(x.numpy(), y.numpy()), abs=0.01)
    assert reference["pr1k3_full_recall"] == pytest.approx(brute_force(y.numpy(), x.numpy()), abs=0.01)
    assert len(set(reference.values())) == len(reference) and 0 < reference["pr1k3_full_recall"] < 1


@pytest.mark.parametrize("batch", [1, 40, 1000])
def test_any_batch_size_gives_the_same(shards, reference, batch):
    assert_same(values(scorer(shards, batch=batch, workers=batch == 40).score(generator())), reference)


def test_any_order_of_shards_gives_the_same(reordered, reference):
    assert_same(values(scorer(reordered).score(generator())), reference)


OF_GENERATORS = "ppl_zfull40,ls100,als20"  # not whole units


def of_generators(folder: str, attributes: Path, world: World, batch: int) -> list[dict]:
    """Results of OF_GENERATORS; a stand-in for LPIPS takes the 8 pixels that the crop leaves."""
    metrics = parse_metrics(OF_GENERATORS)
    made = scorer(Path(folder), metrics, world=world, batch=batch, extras={"attributes": attributes})
    return made.score(generator(), "the model")


@pytest.fixture(scope="module")
def attributes(tmp_path_factory) -> Path:
    return attributes_file(tmp_path_factory.mktemp("attributes") / "attributes.safetensors")


@pytest.fixture(scope="module")
def reference_of_generators(shards, attributes) -> list[dict]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_metrics, "load_lpips", StandInLPIPS)
        return of_generators(str(shards), attributes, ALONE, 64)


def _rank(rank: int, store: str, folder: str, attributes: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = World(rank, 2, rank, 2, torch.device("cpu"))
    found = []
    for batch in (16, 100):  # the second time from the cache, whose features are dealt otherwise
        found.append(values(scorer(Path(folder), world=world, batch=batch,
                                   cache=RealCache(world, Path(out, "cache"))).score(generator())))  # fmt: skip
    generator_metrics.load_lpips = StandInLPIPS
    alone = of_generators(folder, Path(attributes), world, 100)
    failures = []
    for failing in (0, 1):
        try:
            with failing_together():
                if rank == failing:
                    raise UserError(f"of rank {rank}")
        except UserError as error:
            failures.append(str(error))
    Path(out, f"{rank}.json").write_text(json.dumps([*found, alone, failures, from_first(rank)]))
    distributed.stop()


def test_two_ranks_give_the_same(shards, reference, attributes, reference_of_generators, tmp_path):
    """Metrics of a generator alone to the last bit."""
    mp.spawn(_rank, (str(tmp_path / "store"), str(shards), str(attributes), str(tmp_path)), nprocs=2)
    for rank in range(2):
        *found, alone, failures, first = json.loads((tmp_path / f"{rank}.json").read_text())
        for one in found:
            assert_same(one, reference)
        for one, truth in zip(alone, reference_of_generators, strict=True):
            assert one | {"seconds": 0} == truth | {"seconds": 0}
        assert failures == ["of rank 0", "of rank 1"] and first == 0
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("size", [1, 2])
def test_every_real_once_and_as_it_is(shards, size):
    """Unflipped; a rank sees those of its own units, in an order that is not the shards'."""
    seen = []
    for rank in range(size):
        world = World(rank, size, rank, size, torch.device("cpu"))
        units = list(sampling.reals(load_manifest(shards), REALS, 20, world))
        assert [first for _, first in units] == list(firsts(REALS, 20, world))
        seen += [image.numpy().tobytes() for images, first in units for image in images[: max(REALS - first, 0)]]
    truth = [image.numpy().tobytes() for image in digits(REALS, 16)]
    assert sorted(seen) == sorted(truth) and seen != truth


def test_one_pass_for_all_metrics_of_a_network(shards):
    net = StandIn()
    scorer(shards, net=net).score(generator())
    assert net.seen == 2 * (304 + 224)  # as inception and as vgg16: whole units of 300 fakes and of 210 reals


def test_fid_infinity_is_the_fit_of_the_fids(shards, monkeypatch):
    counts = (50, 75, 120, 300)
    monkeypatch.setattr(registry, "INFINITY_COUNTS", counts)
    infinity = dataclasses.replace(parse_metrics("fid_infinity")[0], fakes=300)
    fids = parse_metrics(",".join(f"fid{n}_full" for n in counts))
    found = values(scorer(shards, [infinity, *fids]).score(generator()))
    fit = np.polyfit([1 / n for n in counts], [found[f"fid{n}_full"] for n in counts], 1)
    assert found["fid_infinity"] == pytest.approx(fit[1], rel=1e-9) and fit[0] > 0


def test_results_of_a_generator_alone(reference_of_generators, shards, attributes):
    """What they say, and that each is the metric's own arithmetic on its own draws."""
    from hsrgan.engine.metrics import als, linear_separability, path_length, sequences
    from hsrgan.engine.metrics.attribute_linearity import attribute_linearity_score
    from hsrgan.engine.metrics.attributes import load_attributes

    ppl, ls, alinearity = reference_of_generators
    drawn = {"seed": 3, "world": ALONE, "class_counts": load_manifest(shards).class_counts}
    g, judge = generator(), load_attributes(attributes)
    pairs = path_length.path_distances(g, StandInLPIPS().distance, "ppl_zfull", count=40, **drawn)
    assert (ppl["value"], ppl["fakes"], ppl["details"]) == (path_length.path_length(pairs), 80, {"pairs": 40})
    assert ppl["protocol"]["network"] == "stand-in" and ppl["protocol"]["epsilon"] == "0.0001"
    assert (ppl["protocol"]["space"], ppl["protocol"]["t"]) == ("z", "uniform") and "3/8" in ppl["protocol"]["crop"]

    found = sequences.random_samples(g, judge, count=100, **drawn)
    truth = linear_separability.linear_separability(found.w.numpy(), found.logits.numpy(), judge.names, ALONE)
    assert ls["value"] == truth.pop("ls") and ls["details"] == truth and truth["kept"] == 50

    logits = sequences.random_pairs(g, judge, count=20, **drawn)
    assert alinearity["values"].keys() == {"als20_pairs", "als20_edits"}
    assert alinearity["value"] == attribute_linearity_score(logits).mean().item()
    assert alinearity["fakes"] == als.images_of(20, 2) == 500 + 20 * 11 * 3
    low, high = alinearity["details"]["edits"]["interval"]
    assert low < alinearity["values"]["als20_edits"] < high
    assert alinearity["protocol"]["attributes"] == "a0, a1" and len(alinearity["protocol"]["weights_sha256"]) == 64
    assert all(result["seed"] == 3 and result["seconds"] > 0 for result in reference_of_generators)


def test_what_metrics_of_a_generator_need_is_missed_at_once(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HSRGAN_CACHE", str(tmp_path))
    for name, line in {
        "ppl2_wend": "import_weights.py vgg16 vgg16-397923af.pth",
        "als": "ls and als need a classifier of attributes: give --attributes FILE",
        "ls": "ls and als need",
    }.items():
        with pytest.raises(UserError, match=line):
            scorer(shards, parse_metrics(name))
    weak = attributes_file(tmp_path / "weak.safetensors", (0.7, 0.95, 0.6))
    for allowed, names in ((False, "a1"), (True, "a0, a1, a2")):
        extras = {"attributes": weak, "allow_weak": allowed}
        metric = scorer(shards, parse_metrics("ls"), extras=extras).of_generator["ls"]
        assert metric.protocol["attributes"] == names
    monkeypatch.setattr(generator_metrics, "load_lpips", StandInLPIPS)
    cropped = scorer(shards, parse_metrics("ppl2_wend,ppl_wend"))
    with pytest.raises(UserError, match="g makes images of 16 pixels and ppl_wend needs 32: LPIPS"):
        cropped.check(generator(), "g")


def test_progress_counts_every_image(shards):
    seen = {}

    def note(what, done, total):
        seen.setdefault(what, []).append((done, total))

    scorer(shards, progress=note).score(generator())
    names = "fid300_full, fid100, kid300_full, is300, pr1k3_full"
    assert list(seen) == [f"reals for {names.replace('is300, ', '')}", f"fakes for {names}", "kid300_full: subsets",
                          "pr1k3_full: neighbours"]  # fmt: skip
    for steps in seen.values():
        assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    assert seen[f"fakes for {names}"][:2] == [(0, 300), (16, 300)]


# Real statistics


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
            arguments[0].write_text("half")
        raise KeyboardInterrupt

    if where == "while writing":
        monkeypatch.setattr(Path, "write_bytes", interrupted)
    else:
        monkeypatch.setattr(registry.Moments, "reduce", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scorer(shards, cache=RealCache(ALONE, tmp_path)).score(generator())
    assert [path.name for path in tmp_path.iterdir()] in ([], [".lock"])


# What a training run may not notice


def test_scoring_leaves_a_training_run_as_it_was(shards, tmp_path):
    torch.manual_seed(5)
    np.random.seed(6)
    random.seed(7)
    training = generator().train().requires_grad_(True)
    training.mapping.w_avg.fill_(0.25)
    torch.backends.cudnn.benchmark = True

    def state():
        flags = torch.backends.cudnn
        tensors = {key: value.clone() for key, value in training.state_dict().items()}
        return (
            torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate(), torch.is_grad_enabled(),
            (flags.benchmark, flags.deterministic, flags.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
            [(module.training) for module in training.modules()],
            [(parameter.requires_grad, parameter.grad is None) for parameter in training.parameters()],
        ), tensors  # fmt: skip

    try:
        before, tensors = state()
        with sampling.undisturbed(training):
            copy = sampling.fp32_copy(training)
            scorer(shards, cache=RealCache(ALONE, tmp_path), workers=1).score(copy)
            np.random.rand(), random.random(), torch.rand(1)
            assert not torch.backends.cudnn.benchmark and not torch.is_grad_enabled()
        after, tensors_after = state()
    finally:
        torch.backends.cudnn.benchmark = False
    assert before == after
    assert all(torch.equal(value, tensors_after[key]) for key, value in tensors.items())
    assert not copy.training and torch.equal(copy.mapping.w_avg, training.mapping.w_avg)


def test_half_precision_generators_are_scored_in_fp32(shards, reference):
    sizes = generator().init_kwargs
    half = Generator(**sizes, half_dtype=torch.bfloat16)
    half.load_state_dict(generator().state_dict())
    with torch.no_grad():
        assert_same(values(scorer(shards).score(sampling.fp32_copy(half))), reference)
        assert abs(values(scorer(shards).score(half.eval()))["fid300_full"] - reference["fid300_full"]) > 1e-6
