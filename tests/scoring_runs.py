"""A small data set, a generator and a stand-in for a published network, and the scores of them."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import torch
from metric_fixtures import digits, kaiming
from PIL import Image
from torch import nn

from hsrgan.engine.distributed import World
from hsrgan.engine.metrics.inception import LOGITS
from hsrgan.engine.metrics.names import parse_metrics
from hsrgan.engine.metrics.positions import UNIT
from hsrgan.engine.metrics.registry import Scorer, needed_extractors
from hsrgan.engine.model import Generator
from hsrgan.engine.shard_writer import ShardWriter
from hsrgan.engine.shards import load_manifest

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


def reorder(shards: Path, folder: Path) -> Path:
    """The same shards in another folder, listed in another order."""
    shutil.copytree(shards, folder)
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


def reference_of(shards: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    return values(scorer(shards, batch=64).score(generator()))


def assert_same(found: dict[str, float], reference: dict[str, float]) -> None:
    assert found.keys() == reference.keys()
    assert {name: value for name, value in found.items() if abs(value - reference[name]) > 1e-9} == {}
