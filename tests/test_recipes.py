"""Every shipped recipe, shrunk to 16×16, for 200 steps: finite, saved, sampled, and each of its options left a trace.

What is shrunk: sizes, widths, batch, lengths and the teacher, and γ with the number of pixels; never what an option is.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import forked
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shard_fixtures import pack

from hsrgan.engine.config import Recipe, load_recipe
from hsrgan.engine.sections import R1, PathLength
from hsrgan.engine.sizes import sides
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.stats import read_log

FOLDER = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TEACHER = FOLDER / "digits_teacher.safetensors"
STEPS, BATCH = 200, 4
IMAGES = f"{STEPS * BATCH:09d}"
BRANCHES = {  # recipe → the one whose run it starts from here, and what of it
    "ffhq_256": ("ffhq_256_baseline", f"checkpoints/{IMAGES}"),
    "metfaces_1024": ("ffhq_1024", f"snapshots/{IMAGES}.safetensors"),
    "transfer_256": ("ffhq_256_baseline", f"checkpoints/{IMAGES}"),
}
SMALL = (
    "device=cpu", "data.workers=0", f"kimg={STEPS * BATCH / 1000}", f"batch={BATCH}", "tick_kimg=0.2", "image_kimg=100",
    "checkpoint_kimg=100", "snapshot_kimg=100", "generator.z_dim=8", "generator.w_dim=8", "generator.mapping_layers=1",
    "generator.channel_base=64", "generator.channel_max=8", "discriminator.channel_base=64",
    "discriminator.channel_max=8", "discriminator.mapping_layers=1", "ema.kimg=0.1",
)  # fmt: skip
SCORE = "fid64_full"
PENALTIES = {"path_length": "loss/path", "r1": "loss/r1", "r2": "loss/r2"}


def shape_of(recipe: Recipe) -> tuple[int, int]:
    """16×16, or a rectangle of the same start block with 16 as its longer side."""
    height, width = sides(recipe.data.resolution)
    return 16 * height // max(height, width), 16 * width // max(height, width)


def shrunk(recipe: Recipe, data: Path) -> list[str]:
    (height, width), (full_height, full_width) = shape_of(recipe), sides(recipe.data.resolution)
    small = height * width / (full_height * full_width)
    found = [*SMALL, f"data.resolution={16 if height == width else [height, width]}"]
    found += [f"r1.gamma={recipe.r1.gamma * small}"] + [f"r2.gamma={recipe.r2.gamma * small}"] * recipe.r2.active
    if recipe.data.shards:
        found += [f"data.shards={data / f'{height}x{width}'}"]
    if recipe.hsr:
        found += [f"hsr.teacher={TEACHER}", "hsr.layers={8: 3, 16: 1}", "hsr.hidden=8", "hsr.ramp_kimg=0"]
        found += [f"hsr.start_kimg={0.4 if recipe.hsr.start_kimg else 0}"]
    if recipe.projected:
        found += [f"projected.teacher={TEACHER}", "projected.layers=[1, 3]", "projected.channels=4"]
    if recipe.vision_aided:
        found += [f"vision_aided.teacher={TEACHER}", "vision_aided.layers=[0, 2]", "vision_aided.hidden=8"]
    if recipe.augment and recipe.augment.mode == "ada":
        found += ["augment.kimg=0.1", "augment.p=0.5"]  # each move of p is one of .16
    if recipe.freeze:
        found += ["freeze.d=4"]
    if recipe.metrics:
        found += [f"metrics.names={SCORE}", f"metrics.features={TEACHER}"]
    return found


def picture(height: int, width: int) -> Callable[[int], np.ndarray]:
    """The i-th RGB image: a disc on a ground; colours, place and size by its number, the hue by its class i % 10."""
    y, x = np.mgrid[:height, :width]

    def draw(i: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(i))
        inside = (y - rng.uniform(4, height - 4)) ** 2 + (x - rng.uniform(4, width - 4)) ** 2 < rng.uniform(2, 5) ** 2
        colour = np.array([25 * (i % 10), 128, 255 - 25 * (i % 10)])
        return np.where(inside[..., None], colour, rng.uniform(0, 90)).astype(np.uint8)

    return draw


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """100 images in ten classes, of each shape that a recipe has here."""
    folder = tmp_path_factory.mktemp("data")
    for size in {shape_of(load_recipe(FOLDER / f"{name}.yaml")) for name in NAMES}:
        pack(folder / "{}x{}".format(*size), count=100, classes=10, picture=picture(*size), resolution=size)
    return folder


class Run(NamedTuple):
    folder: Path
    recipe: Recipe          # as it ran
    init_from: Path | None


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, data) -> Callable[[str], Run]:
    """The run of a recipe, made when first asked for, after that of the recipe which it starts from."""
    workspace, runs = tmp_path_factory.mktemp("runs"), {}

    def run(name: str) -> Run:
        if name not in runs:
            source, folder, init_from = FOLDER / f"{name}.yaml", workspace / name, None
            overrides = shrunk(load_recipe(source), data)
            if name in BRANCHES:
                other, part = BRANCHES[name]
                init_from = run(other).folder / part
                overrides.append(f"init_from={init_from}")
            folder.mkdir()
            (folder / "recipe.yaml").write_text(source.read_text())
            forked.train(folder, *overrides)
            runs[name] = Run(folder / "runs" / name, load_recipe(source, overrides), init_from)
        return runs[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_source_is_named(name):
    """Where the values of a recipe are from; the quickstart's were chosen for it."""
    head = (FOLDER / f"{name}.yaml").read_text().partition("\nrun_dir:")[0]
    assert ("\n# Source: " in head) != (name == "quickstart")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_every_option_leaves_its_trace(run_of, name):
    run = run_of(name)
    recipe, log = run.recipe, read_log(run.folder / "log.jsonl")
    rows, scores = ([row for row in log if "event" not in row and key in row] for key in ("loss/G", f"metric/{SCORE}"))
    assert [row["kimg"] for row in rows] == [0.2, 0.4, 0.6, 0.8]
    assert not {row["event"] for row in log if "event" in row} - {"rows", "scores"}     # such as nonfinite, rollback
    assert all(np.isfinite(value) for row in rows + scores for value in row.values())
    steps = json.loads((run.folder / f"checkpoints/{IMAGES}/state.json").read_text())["adam_steps"]
    assert steps == {"G": STEPS + taken(recipe.path_length), "D": STEPS + taken(recipe.r1) + taken(recipe.r2)}
    assert_logged(recipe, rows)
    assert_sampled(run)
    assert (run.folder / "samples/augmented.png").exists() == bool(recipe.augment)
    assert (run.folder / "snapshots/best.safetensors").exists() == bool(scores) == bool(recipe.metrics)
    if run.init_from:
        assert_taken_over(run)


def taken(penalty: R1 | PathLength) -> int:
    """Steps of a lazy phase, the first of which is the run's first."""
    return -(-STEPS // penalty.interval) if penalty.active else 0


def assert_logged(recipe: Recipe, rows: list[dict]) -> None:
    traces = {key: getattr(recipe, section).active for section, key in PENALTIES.items()}
    traces |= {f"loss/{network}_{section}": bool(getattr(recipe, section))
               for section in ("projected", "vision_aided") for network in "GD"}  # fmt: skip
    traces |= {"loss/hsr": bool(recipe.hsr), "augment/p": bool(recipe.augment and recipe.augment.pipe)}
    logged = set().union(*rows)
    assert {key: key in logged for key in traces} == traces
    if recipe.hsr:
        assert all(("loss/hsr" in row) == (row["kimg"] > recipe.hsr.start_kimg) for row in rows)
    if traces["augment/p"]:
        course = [row["augment/p"] for row in rows]
        if recipe.augment.mode == "ada":
            assert any(p != pytest.approx(recipe.augment.p) for p in course)
        else:
            assert course == pytest.approx([recipe.augment.p] * len(rows))
    if not recipe.init_from:  # D is new: softplus(0) = ln 2 once where each fake meets a real, else twice, and falling
        assert (rows[0]["loss/D"] < 1.2 * np.log(2)) == (recipe.objective.loss == "relativistic")


def assert_sampled(run: Run) -> None:
    recipe = run.recipe
    generator, metadata = load_snapshot(run.folder / f"snapshots/{IMAGES}.safetensors")
    assert metadata["recipe"] == json.loads(recipe.to_json())
    assert generator.c_dim == (10 if recipe.data.labels else 0)
    assert generator.img_shape == (recipe.data.channels, *shape_of(recipe))
    z = torch.randn(4, generator.z_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = [generator(z, c[: generator.c_dim].expand(4, -1), noise_mode="none") for c in torch.eye(10)[:2]]
    assert images[0].shape == (4, *generator.img_shape) and torch.isfinite(images[0]).all()
    assert images[0].std(0).mean() > 1e-3                               # of other latents, another image
    assert torch.equal(*images) != recipe.data.labels                   # of another class too
    first, *_, last = sorted((run.folder / "samples").glob("fakes-*.png"))
    assert first.read_bytes() != last.read_bytes()


def assert_taken_over(run: Run) -> None:
    fates = json.loads((run.folder / "transfer.json").read_text())["tensors"]
    for network in ("G", "D", "G_ema"):
        fate = {entry["tensor"]: entry["what"] for entry in fates if entry["network"] == network}
        trunk = "b" if network == "D" else ("mapping.", "synthesis.b")      # HSR's heads are new
        new = network == "D" and run.init_from.is_file()                # a snapshot has no D
        assert {what for key, what in fate.items() if key.startswith(trunk)} == {"new" if new else "loaded"}
    if run.recipe.freeze:
        folders = run.init_from, run.folder / f"checkpoints/{IMAGES}"
        before, after = (load_file(folder / "D.safetensors") for folder in folders)
        learnt = [key for key in before if key.endswith(("weight", "bias"))]
        same = {key.rpartition(".")[0] for key in learnt if torch.equal(before[key], after[key])}
        assert same == {"b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip"}


REFUSED = {  # what cannot go together: recipe, overrides, ranks → what the one line says
    "a fixed p that is to adapt": ("r3gan_ffhq_256", ["augment.target=0.6"], 8, "augment.target is 0.6, allowed"),
    "DiffAugment with ADA's pipe": ("low_shot_256", ["augment.pipe=bgc"], 1, "augment.pipe is bgc, allowed in mode"),
    "two sources of images": ("quickstart", ["data.shards=x"], 1, "exactly one of data.shards and data.builtin"),
    "balanced and resampled": (
        "cifar10", ["data.balanced=true", "data.resampled=true"], 2,
        "data.balanced is true, allowed: with data.resampled: false",
    ),
    "digits as a rectangle": ("quickstart", ["data.resolution=[16, 24]"], 1, "allowed for the built-in digits"),
    "sides that no start block gives": (
        "lsun_car_384x512", ["data.resolution=[500, 700]"], 8, "the nearest: [512, 704]",
    ),
    "HSR in a block that is not there": ("church_256", ["hsr.layers={512: 2}"], 8, "names resolution 512, allowed"),
    "HSR after the end": ("ffhq_1024", ["kimg=500"], 8, "hsr.start_kimg is 500, allowed: below kimg = 500"),
    "Freeze-D beyond D": ("transfer_256", ["freeze.d=20"], 8, "allowed for this discriminator: 0 to 19"),
    "a branch in its own folder": (
        "ffhq_256", ["run_dir=runs/ffhq_256_baseline"], 2, "lies in run_dir: a run resumes by itself",
    ),
    "a batch that ranks cannot share": ("metfaces_1024", [], 3, "batch is 32, allowed: a multiple of 3 ranks"),
    "half of a batch that ranks cannot share": ("low_shot_256", [], 8, "path_length.batch_shrink is 2"),
    "a group that does not divide": (
        "auto", ["batch=12", "discriminator.mbstd_group_size=8"], 1, "mbstd_group_size is 8, allowed: a divisor",
    ),
    "weights for a teacher that has its own": (
        "projected_256", ["projected.teacher=x.safetensors", "projected.weights=y.pth"], 8,
        "holds its own: drop the key",
    ),
    "more half resolutions than there are": ("cifar10", ["generator.num_fp16_res=5"], 2, "num_fp16_res is 5, allowed"),
    "a classifier's score without one": ("auto", ["metrics.names=als"], 1, "with metrics.attributes from"),
}  # fmt: skip

REFUSE = """
import json, sys
from hsrgan.engine.config import load_recipe
from hsrgan.engine.errors import UserError
said = {}
for name, (path, overrides, ranks) in json.load(sys.stdin).items():
    try:
        load_recipe(path, overrides, world_size=ranks)
    except UserError as error:
        said[name] = str(error)
print(json.dumps([said, "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    """What is said of each bad combination, in a process that knows no torch."""
    cases = {name: (str(FOLDER / f"{recipe}.yaml"), *rest) for name, (recipe, *rest, _) in REFUSED.items()}
    done = subprocess.run(
        [sys.executable, "-c", REFUSE], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    said, torch_is_there = json.loads(done.stdout)
    assert not torch_is_there
    return said


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_combination_is_one_line_before_torch_is_there(refusals, case):
    assert case in refusals, "taken"
    assert REFUSED[case][-1] in refusals[case] and len(refusals[case].splitlines()) == 1


def test_a_refused_run_leaves_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text((FOLDER / "afhq_512.yaml").read_text())
    (run,) = forked.start(tmp_path, "augment.target=null")
    assert run.ends() == 2
    assert len(run.said.splitlines()) == 1 and "augment.target is null, allowed in mode ada" in run.said
    assert {path.suffix for path in tmp_path.iterdir()} == {".yaml", ".txt"}    # the recipe and what was said
