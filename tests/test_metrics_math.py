"""The arithmetic of metrics on given features: closed forms, brute force, and two libraries' formulas."""

import itertools

import numpy as np
import pytest
import torch

from hsrgan.engine.distributed import World
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import precision_recall as pr
from hsrgan.engine.metrics.features import Features
from hsrgan.engine.metrics.frechet import INFINITY_COUNTS, fid_infinity, frechet_distance
from hsrgan.engine.metrics.inception_score import InceptionScore
from hsrgan.engine.metrics.kid import kid, mmd2
from hsrgan.engine.metrics.moments import Moments
from hsrgan.engine.metrics.names import ALL, MOST_KEPT, PUBLISHED, parse_metrics
from hsrgan.engine.metrics.positions import UNIT, firsts

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).standard_normal(shape))


def rotation(dim: int) -> torch.Tensor:
    return torch.linalg.qr(draw(dim, dim, seed=9)).Q


def gaussian(features: torch.Tensor, ddof: int = 1):
    moments = Moments(features.shape[1], [len(features)], "cpu")
    moments.add(features, 0)
    found = moments.reduce()[len(features)]
    return found.mean, found.covariance(ddof)


def stored(features: torch.Tensor) -> Features:
    kept = Features(len(features), features.shape[1], 64, ALONE)
    for first in range(0, len(features), 50):
        kept.add(features[first : first + 50].float(), first)
    return kept


def test_frechet_of_gaussians_that_share_their_axes():
    """Σ1 = QaQᵀ, Σ2 = QbQᵀ: ‖μ1 − μ2‖² + Σ(√a − √b)²; zeros in a and b make both singular."""
    dim, q = 64, rotation(64)
    a, b = (draw(dim, seed=s).square() for s in (1, 2))
    a[:10], b[5:20] = 0, 0
    mean1, mean2 = draw(dim, seed=3), draw(dim, seed=4)
    truth = (mean1 - mean2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(mean1, q @ a.diag() @ q.T, mean2, q @ b.diag() @ q.T)
    assert found == pytest.approx(truth.item(), rel=1e-12)


def test_frechet_of_one_dimension_against_another():
    """Σ1 = s·uuᵀ, Σ2 = t·vvᵀ at an angle: tr (Σ1Σ2)^½ = √(st)·|u·v|."""
    u, v = (torch.nn.functional.normalize(draw(30, seed=s), dim=0) for s in (1, 2))
    zero = torch.zeros(30, dtype=torch.float64)
    found = frechet_distance(zero, 3 * torch.outer(u, u), zero, 5 * torch.outer(v, v))
    assert found == pytest.approx(8 - 2 * 15**0.5 * abs((u @ v).item()), rel=1e-12)


@pytest.mark.parametrize("count", [60, 500])
def test_frechet_of_features_against_the_nuclear_norm_of_their_product(count):
    """With centred features X, Y [n, d], tr (Σ1Σ2)^½ = ‖X·Yᵀ‖_* / (n − 1), also where n < d."""
    x, y = draw(count, 200, seed=1) * 3 + 7, draw(count, 200, seed=2).square() + 5
    (mean1, cov1), (mean2, cov2) = gaussian(x), gaussian(y)
    cross = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum() / (count - 1)
    truth = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * cross
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(truth.item(), rel=1e-9)


@pytest.mark.parametrize("count", [100, 2000])
def test_frechet_to_itself_is_zero(count):
    """Also with fewer images than features, and a mean far larger than the spread."""
    mean, cov = gaussian(draw(count, 384, seed=1) * 0.3 + 1)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-9


def test_fid_against_torch_fidelity_and_torchmetrics():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    mixing = draw(96, 96, seed=5) / 10
    x, y = (draw(900, 96, seed=1) @ mixing).relu() + 0.3, (draw(700, 96, seed=2) @ mixing.T).relu()
    ours = frechet_distance(*gaussian(x), *gaussian(y))
    sides = [fid_features_to_statistics(side) for side in (x, y)]
    theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-8)

    identity = torch.nn.Identity()
    identity.num_features = 96
    metric = FrechetInceptionDistance(feature=identity, normalize=True).set_dtype(torch.float64)
    for side, real in ((x, True), (y, False)):
        metric.update(side, real=real)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-5)


def test_covariance_over_n_is_a_switch():
    x = draw(50, 8, seed=1)
    (_, over_less), (_, over_n) = gaussian(x), gaussian(x, ddof=0)
    assert np.allclose(over_less, np.cov(x.numpy(), rowvar=False), rtol=1e-12)
    assert np.allclose(over_n, np.cov(x.numpy(), rowvar=False, ddof=0), rtol=1e-12)


def test_moments_of_prefixes_however_features_arrive():
    x = draw(100, 5, seed=1)
    moments = Moments(5, [100, 30, 31, 5], "cpu")
    for first, last in itertools.pairwise([0, 16, 32, 99, 112]):
        moments.add(x[first:last], first)
    for bound, found in moments.reduce().items():
        assert found.count == bound
        assert torch.allclose(found.mean, x[:bound].mean(0), rtol=1e-13)
        assert torch.allclose(found.covariance(), x[:bound].T.cov(), rtol=1e-12, atol=1e-14)


def test_fid_infinity_is_the_intercept():
    assert INFINITY_COUNTS[0] == 5000 and INFINITY_COUNTS[-1] == 50_000 and len(INFINITY_COUNTS) == 15
    assert fid_infinity(list(INFINITY_COUNTS), [2.5 + 1234 / n for n in INFINITY_COUNTS]) == pytest.approx(2.5)


def test_kid_against_torch_fidelity():
    """The same subsets, since both draw them from the same frozen stream; theirs in float32."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = draw(400, 64, seed=1).relu().float(), (draw(300, 64, seed=2) + 0.2).relu().float()
    theirs = kid_features_to_metric(x, y, kid_subset_size=300, kid_subsets=100, rng_seed=3, verbose=False)
    mean, std = kid(stored(x), stored(y), seed=3)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-4) and mean > 1e-2
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-4) and std > 1e-3


def test_mmd2_against_its_definition():
    x, y = draw(7, 3, seed=1), draw(7, 3, seed=2)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    pairs = list(itertools.permutations(range(7), 2))
    within = sum(k(s[i], s[j]) for s in (x, y) for i, j in pairs) / len(pairs)
    between = sum(k(a, b) for a in x for b in y) / 49
    assert mmd2(x, y).item() == pytest.approx(within - 2 * between, rel=1e-12)


def test_inception_score_against_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = draw(1003, 40, seed=1).float() * 3  # splits of 100 and 101
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    score = InceptionScore(1003, "cpu", classes=40)
    for first in range(0, 1008, UNIT):
        score.add(torch.cat([logits, torch.full((5, 40), 1e4)])[first : first + UNIT], first)  # what passes count
    mean, std = score.reduce()
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9) and mean > 2
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def brute_force(points, centres, k=3):
    """Literally: share of points in the ball of any centre, whose radius is its (k + 1)-th smallest distance."""
    inside = 0
    radii = [sorted(np.linalg.norm(c - other) for other in centres)[k] for c in centres]
    for p in points:
        inside += any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
    return inside / len(points)


def test_precision_and_recall_against_brute_force(monkeypatch):
    """In blocks that do not divide the sets; five twins make a ball of radius 0, which holds another twin."""
    monkeypatch.setattr(pr, "BLOCK", 17)
    reals, fakes = draw(90, 6, seed=1).float(), draw(70, 6, seed=2).float() * 1.1 + 0.7
    reals[40:45] = reals[40] + 10
    fakes[7] = reals[40]
    seen = []
    found = pr.precision_recall(stored(fakes), stored(reals), progress=lambda done, total: seen.append((done, total)))
    truth = [brute_force(a.double().numpy(), b.double().numpy()) for a, b in ((fakes, reals), (reals, fakes))]
    assert list(found) == truth and all(0.1 < value < 0.95 for value in truth)
    assert seen[-1] == (320, 320)


def test_twins_are_no_distance_apart():
    """In products of 512 terms their |a|² + |b|² − 2ab is not 0 but for rounding."""
    x = draw(300, 512, seed=1) * 30
    assert (x.square().sum(1) + x.square().sum(1) - 2 * (x @ x.T).diagonal() != 0).any()
    distances = pr.squared_distances(x, x)
    assert (distances.diagonal() == 0).all() and (distances != 0).sum() == 300 * 299
    assert distances[0, 1].item() == pytest.approx((x[0] - x[1]).square().sum().item(), rel=1e-12)


def test_units_cover_every_position_once_for_any_ranks_and_batch():
    for count, batch, size in itertools.product((1, 16, 100, 333), (1, 16, 40, 1000), (1, 2, 3)):
        worlds = [World(rank, size, rank, size, torch.device("cpu")) for rank in range(size)]
        starts = sorted(first for world in worlds for first in firsts(count, batch, world))
        assert starts == list(range(0, count, UNIT))


def test_what_is_held_for_fifty_thousand_images():
    """Below 2 GB beyond the networks, each metric alone, at the widths of Inception and VGG-16; 70,000 reals."""
    def size(*parts):
        return sum(t.numel() * t.element_size() for part in parts for t in vars(part).values() if torch.is_tensor(t))

    def kept(dim):
        return size(*(Features(count, dim, 64, ALONE) for count in (50_000, 70_000)))  # memory that is never touched

    held = {
        "fid50k_full": size(*(Moments(2048, [count], "meta") for count in (50_000, 70_000))),
        "fid_infinity": size(*(Moments(2048, counts, "meta") for counts in (INFINITY_COUNTS, [70_000]))),
        "is50k": size(InceptionScore(50_000, "meta")),
        "kid50k_full": kept(2048),
        "pr50k3_full": kept(4096),
    }
    print({name: f"{n / 1e9:.3f} GB" for name, n in held.items()})
    assert held["fid50k_full"] < 0.07e9 and held["is50k"] < 1e6 and max(held.values()) < 2e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_name_is_known(name):
    (metric,) = parse_metrics(name)
    assert metric.name == name and metric.values


def test_names_say_how_many():
    text = "fid10k_full, fid1000_full,kid5k,pr20k3_full,is3000,fd_dinov2_10k_full"
    by_name = {m.name: m for m in parse_metrics(text)}
    assert [m.fakes for m in by_name.values()] == [10_000, 1000, 5000, 20_000, 3000, 10_000]
    assert [m.reals for m in by_name.values()] == [ALL, ALL, 5000, MOST_KEPT, 0, ALL]
    assert by_name["fid10k_full"].reals_of(1797, "x") == 1797
    assert [m.name for m in parse_metrics("fid50k,fid50k")] == ["fid50k"]

    of_generators = parse_metrics("ppl2_wend,ppl2_wend2k,ppl_zfull300,ls,ls20k,als,als50")
    assert [(m.kind, m.fakes) for m in of_generators] == [
        ("ppl2_wend", 50_000), ("ppl2_wend", 2000), ("ppl_zfull", 300), ("ls", 200_000), ("ls", 20_000), ("als", 1000),
        ("als", 50),
    ]  # fmt: skip
    assert of_generators[1].values == ("ppl2_wend2k",) and of_generators[-1].values == ("als50_pairs", "als50_edits")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fid50k_ful", "unknown metric 'fid50k_ful': did you mean fid50k_full?"),
        ("ppl_wen", "did you mean ppl_wend?"),
        ("fid1.5k", "unknown metric"),
        ("", "unknown metric ''"),
        ("fid3_full", "it needs 10 or more"),
        ("als9", "it needs 10 or more"),
    ],
)
def test_unknown_names_get_the_nearest(name, line):
    with pytest.raises(UserError, match=line.replace("?", r"\?")):
        parse_metrics(name)


@pytest.mark.parametrize("name", ["fid50k", "kid2k", "pr5k3"])
def test_too_few_reals_name_the_metric_that_takes_them(name):
    with pytest.raises(UserError, match=rf"shards holds 1,797: {name}_full takes all"):
        parse_metrics(name)[0].reals_of(1797, "shards")
    with pytest.raises(UserError, match="needs 10 real images or more and shards holds 9"):
        parse_metrics(f"{name}_full")[0].reals_of(9, "shards")
