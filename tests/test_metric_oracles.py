"""From pictures to scores, beside torch-fidelity and torchmetrics: one Inception of random weights, real digits and
photographs of five sizes.

100 pictures by default, and 32 of the 2,048 features in FID, whose reference takes a minute at full width. Everything,
2,000 pictures at full width (a quarter of an hour on one core):

    HSRGAN_ORACLE_FULL=1 pytest tests/test_metric_oracles.py -s
"""

import os
from dataclasses import dataclass

import metric_fixtures
import pytest
import torch
from torch import Tensor

from hsrgan.engine.distributed import World
from hsrgan.engine.metrics.extractor import load_extractor
from hsrgan.engine.metrics.features import Features
from hsrgan.engine.metrics.frechet import frechet_distance
from hsrgan.engine.metrics.inception_score import InceptionScore
from hsrgan.engine.metrics.kid import kid
from hsrgan.engine.metrics.moments import Moments

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FULL = pytest.mark.skipif(not os.environ.get("HSRGAN_ORACLE_FULL"),
                          reason="a quarter of an hour on one core: set HSRGAN_ORACLE_FULL=1")  # fmt: skip
FAKE = (1, 3)  # of the five sizes, crops of 32 and of 160 pixels; digits and crops of 64 and 320 are the reals


@dataclass
class Seen:
    """Of all pictures: features [N, 2048] and logits [N, 1008], ours and torch-fidelity's; which are fakes [N].

    width: of the features in FID.
    """

    ours: tuple[Tensor, Tensor]
    theirs: tuple[Tensor, Tensor]
    fake: Tensor
    width: int

    def sides(self, whose: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Features of the fakes and of the reals."""
        return whose[0][self.fake], whose[0][~self.fake]

    def narrow(self, whose: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [side[:, :: side.shape[1] // self.width].contiguous() for side in self.sides(whose)]


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(our cache, the .pth file)."""
    file = metric_fixtures.kaiming_inception(tmp_path_factory.mktemp("inception"))
    return metric_fixtures.imported("inception", file), file


@pytest.fixture(scope="module", params=[100, pytest.param(2000, marks=FULL)])
def seen(request, inception) -> Seen:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    cache, file = inception
    ours = load_extractor("inception", cache=cache)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    batches = metric_fixtures.pictures_of_many_sizes(request.param)
    sides = []
    for see in (ours.features_and_logits, theirs):
        with torch.no_grad():
            parts = [see(part) for images in batches for part in images.split(4)]
        sides.append(tuple(torch.cat(column) for column in zip(*parts, strict=True)))
    fake = torch.tensor([size in FAKE for size, images in enumerate(batches) for _ in images])
    return Seen(*sides, fake, width=32 if request.param == 100 else 2048)


def test_features_are_torch_fidelitys(seen):
    errors = [(a - b).abs().max().item() for a, b in zip(seen.ours, seen.theirs, strict=True)]
    print(f"{len(seen.fake)} pictures: features {errors[0]:.1e}, logits {errors[1]:.1e} apart")
    assert max(errors) < 1e-4


def test_features_are_torchmetricss(seen, inception):
    """A few of every size: it is the network above, behind torchmetrics' own preparation."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    net = NoTrainInceptionV3("x", ["2048"], str(inception[1]), antialias=False)
    batches = metric_fixtures.pictures_of_many_sizes(len(seen.fake))
    of_each = len(batches[0])
    for size, images in enumerate(batches):
        theirs = net(images[:2])
        assert (seen.ours[0][size * of_each : size * of_each + 2] - theirs).abs().max() < 1e-4


def test_fid_is_torch_fidelitys_and_torchmetricss(seen):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    gaussians = []
    for side in seen.narrow(seen.ours):
        moments = Moments(side.shape[1], [len(side)], "cpu")
        for first in range(0, len(side), 16):
            moments.add(side[first : first + 16], first)
        gaussians += list(moments.reduce().values())
    ours = frechet_distance(*(value for g in gaussians for value in (g.mean, g.covariance())))

    statistics = [fid_features_to_statistics(side) for side in seen.narrow(seen.theirs)]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    identity = torch.nn.Identity()
    identity.num_features = seen.width
    metric = FrechetInceptionDistance(feature=identity, normalize=True).set_dtype(torch.float64)
    for side, real in zip(seen.narrow(seen.theirs), (False, True), strict=True):
        metric.update(side.double(), real=real)
    metrics = metric.compute().item()
    print(f"{len(seen.fake)} pictures: FID {ours:.9g}, torch-fidelity {fidelity:.9g}, torchmetrics {metrics:.9g}")
    assert ours == pytest.approx(fidelity, rel=1e-5) and ours == pytest.approx(metrics, rel=1e-5) and ours > 0.01


def kept(features: Tensor) -> Features:
    result = Features(len(features), features.shape[1], 64, ALONE)
    result.add(features, 0)
    return result


def test_kid_is_torch_fidelitys(seen):
    from torch_fidelity.metric_kid import kid_features_to_metric

    fakes, reals = seen.sides(seen.theirs)
    size = min(len(fakes), len(reals), 1000)
    theirs = kid_features_to_metric(fakes, reals, kid_subset_size=size, kid_subsets=100, rng_seed=3, verbose=False)
    ours = kid(*(kept(side) for side in seen.sides(seen.ours)), seed=3)
    names = [f"kernel_inception_distance_{name}" for name in ("mean", "std")]
    print(f"{len(seen.fake)} pictures: KID {ours[0]:.6f} ± {ours[1]:.6f}, torch-fidelity "
          f"{theirs[names[0]]:.6f} ± {theirs[names[1]]:.6f}")  # fmt: skip
    for value, name in zip(ours, names, strict=True):
        assert value == pytest.approx(theirs[name], abs=1e-4)
    assert ours[0] > 1e-3


def test_inception_score_is_torch_fidelitys(seen):
    from torch_fidelity.metric_isc import isc_features_to_metric

    theirs = isc_features_to_metric(seen.theirs[1], splits=10, shuffle=False)
    score = InceptionScore(len(seen.fake), "cpu")
    for first in range(0, len(seen.fake), 16):
        score.add(seen.ours[1][first : first + 16], first)
    ours = score.reduce()
    names = [f"inception_score_{name}" for name in ("mean", "std")]
    print(f"{len(seen.fake)} pictures: IS {ours[0]:.6f} ± {ours[1]:.6f}, torch-fidelity "
          f"{theirs[names[0]]:.6f} ± {theirs[names[1]]:.6f}")  # fmt: skip
    for value, name in zip(ours, names, strict=True):
        assert value == pytest.approx(theirs[name], abs=1e-4)
    assert ours[0] > 1.001
