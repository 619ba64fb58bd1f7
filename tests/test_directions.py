"""Directions in W, the edits they make in the sampler, and linear separability."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from hsrgan.engine.distributed import World
from hsrgan.engine.edits import read_edits
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.attributes import AttributeClassifier, save_attributes
from hsrgan.engine.metrics.directions import (
    Directions,
    fit_directions,
    load_directions,
    save_directions,
)
from hsrgan.engine.metrics.linear_separability import (
    conditional_entropy,
    linear_separability,
    separation_entropy,
)
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import image_grid
from hsrgan.engine.sampler import draw
from hsrgan.engine.snapshot import load_snapshot, save_snapshot
from hsrgan.engine.teacher import create_timm
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools import directions as directions_tool
from hsrgan.tools import sample

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}


def run(app, *arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def line(result) -> str:
    """The one line of a user's mistake."""
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def planted():
    """5000 w of unequal spread and two attributes that are noisy projections of them."""
    noise = np.random.default_rng(0)
    w = noise.standard_normal((5000, 16)) * np.linspace(0.5, 2, 16)
    true = noise.standard_normal((2, 16))
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    logits = w @ true.T + 0.3 * noise.standard_normal((5000, 2))
    logits[:, 1] = -3 * logits[:, 1] + 100  # another scale, and present where the projection is small
    return w, true * np.array([[1], [-1]]), logits


def test_a_planted_direction_is_found_and_points_to_present(planted):
    w, true, logits = planted
    told = []
    found = fit_directions(w, logits, ["smile", "hat"], seed=0, snapshot="abc", progress=told.append)
    assert found.names == ("smile", "hat") and found.samples == 5000 and found.snapshot == "abc" and told == [1, 1]
    cosines = (found.vectors.numpy() * true).sum(1)
    assert (cosines > 0.95).all(), cosines
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(2))
    assert min(found.quality) > 0.9
    assert found.std == pytest.approx((w @ found.vectors.double().numpy().T).std(0), rel=1e-5)
    torch.testing.assert_close(found.shift("hat", -2.0), -2 * found.std[1] * found.vectors[1])


def test_a_direction_is_a_function_of_the_seed_and_noise_is_told_from_it(planted):
    w, _, logits = planted
    one, same, other = (fit_directions(w, logits, ["a", "b"], seed=s, snapshot="") for s in (0, 0, 1))
    assert torch.equal(one.vectors, same.vectors) and not torch.equal(one.vectors, other.vectors)
    nothing = np.random.default_rng(1).standard_normal((5000, 1))
    assert fit_directions(w, nothing, ["x"], seed=0, snapshot="").quality[0] < 0.75
    with pytest.raises(UserError, match="499 samples leave 9 at each end of an attribute: take 500"):
        fit_directions(w[:499], logits[:499], ["a", "b"], seed=0, snapshot="")


def directions(snapshot="0" * 64, w_dim=8) -> Directions:
    vectors = torch.eye(w_dim)[:2]
    return Directions(("smile", "hat"), vectors, (0.9, 0.8), (1.5, 0.5), snapshot, 700)


def test_a_file_keeps_everything(tmp_path):
    path = tmp_path / "d.safetensors"
    save_directions(path, directions(), command="how")
    loaded = load_directions(path)
    assert torch.equal(loaded.vectors, directions().vectors)
    assert (loaded.names, loaded.quality, loaded.std) == (("smile", "hat"), (0.9, 0.8), (1.5, 0.5))
    assert (loaded.snapshot, loaded.samples) == ("0" * 64, 700)
    assert load_file(path).keys() == {"smile", "hat"}
    with safe_open(path, "pt") as file:
        assert file.metadata()["command"] == "how"


@pytest.mark.parametrize(("change", "says"), [
    (lambda t, m: m.pop("format"), "holds no directions"),
    (lambda t, m: m.pop("std"), "are damaged"),
    (lambda t, m: m.update(names='["smile"'), "are damaged"),
    (lambda t, m: t.pop("hat"), "are damaged.*hat"),
    (lambda t, m: t.update(extra=torch.zeros(8)), "are damaged"),
    (lambda t, m: t.update(hat=torch.zeros(9)), "are damaged"),
    (lambda t, m: m.update(w_dim="9"), "are damaged"),
])  # fmt: skip
def test_a_damaged_file_is_one_line(tmp_path, change, says):
    path = tmp_path / "d.safetensors"
    save_directions(path, directions(), command="how")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=says):
        load_directions(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A snapshot, directions that belong to it, and where they lie."""
    folder = tmp_path_factory.mktemp("edits")
    torch.manual_seed(0)
    save_snapshot(folder / "m.safetensors", Generator(**TINY), recipe_json="{}", kimg=1, dataset={})
    save_directions(folder / "d.safetensors", directions(sha256_of(folder / "m.safetensors")), command="how")
    return folder


def pictures(out) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.iterdir())]


def test_the_sampler_edits_and_a_strength_of_zero_changes_no_bit(model, tmp_path):
    plain = ("m.safetensors", "--seeds", "0-2", "--psi", "0.7")
    for name, extra in {"plain": (), "zero": ("--edit", "smile=0", "--edit", "hat=-0.0"), "two": ("--edit", "smile=2"),
                        "both": ("--edit", "smile=2", "--edit", "hat=-1.5")}.items():  # fmt: skip
        file = ("--directions", model / "d.safetensors") if extra else ()
        result = run(sample.app, model / plain[0], *plain[1:], *file, *extra, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert pictures(tmp_path / "plain") == pictures(tmp_path / "zero")
    for a, b in (("plain", "two"), ("two", "both")):
        assert all(x != y for x, y in zip(pictures(tmp_path / a), pictures(tmp_path / b), strict=True))

    generator, _ = load_snapshot(model / "m.safetensors")
    shift = read_edits(["smile=2", "hat=-1.5"], [model / "d.safetensors"], generator, model / "m.safetensors").fixed
    assert shift.tolist() == [[3.0, -0.75] + [0.0] * 6] * 6  # strength · std along each unit vector, in all ws
    z, _ = draw([1], generator)
    ws = generator.mapping(z, None, truncation_psi=0.7) + shift
    expected = image_grid(generator.synthesis(ws, noise_mode="const"), scale=1)
    assert np.array_equal(Image.open(tmp_path / "both/seed0001.png"), expected)


def test_directions_of_several_files_add_up_and_their_names_differ(model, tmp_path):
    for name in ("pose", "hat"):
        other = Directions((name,), torch.eye(8)[2:3], (0.5,), (2.0,), sha256_of(model / "m.safetensors"), 9, "pca",
                           ((0, 1),))  # fmt: skip
        save_directions(tmp_path / f"{name}.safetensors", other, command="")
    generator, _ = load_snapshot(model / "m.safetensors")
    files = [model / "d.safetensors", tmp_path / "pose.safetensors"]
    shift = read_edits(["smile=2", "pose=-1"], files, generator, model / "m.safetensors").fixed
    assert shift.tolist() == [[3.0, 0.0, -2.0] + [0.0] * 5] * 2 + [[3.0] + [0.0] * 7] * 4

    def sampled(*paths, edits=("smile=1", "pose=-1:1")):
        options = [*(("--directions", path) for path in paths), *(("--edit", edit) for edit in edits)]
        words = [word for option in options for word in option]
        return run(sample.app, model / "m.safetensors", "--seeds", "0", *words, "--out", tmp_path / "out")

    assert "no direction 'psoe': did you mean pose?" in line(sampled(*files, edits=["psoe=1"]))
    twice = line(sampled(*files, tmp_path / "hat.safetensors"))
    assert f"--directions {files[0]} and --directions {tmp_path / 'hat.safetensors'} both have 'hat'" in twice
    assert not (tmp_path / "out").exists()
    result = sampled(*files)
    assert result.exit_code == 0 and (tmp_path / "out/seed0000-pose+1.00.png").is_file(), result.output


def test_mistakes_in_edits_are_one_line(model, tmp_path):
    def say(*extra, directions_file="d.safetensors", snapshot="m.safetensors"):
        file = ("--directions", model / directions_file) if directions_file else ()
        return line(run(sample.app, model / snapshot, *file, *extra, "--out", tmp_path / "out"))

    assert "no direction 'smiel': did you mean smile?" in say("--edit", "smiel=2")
    assert "no direction 'x': it has smile, hat" in say("--edit", "x=2")
    for bad in ("smile", "smile=", "smile=much", "=2", "smile=nan"):
        assert f"--edit {bad}: write it like smile=2" in say("--edit", bad)
    assert "needs --directions FILE" in say("--edit", "smile=2", directions_file=None)
    assert "without --edit changes nothing" in say()
    assert "does not exist: make them with tools/directions.py" in say("--edit", "a=1", directions_file="gone")
    assert "holds no directions" in say("--edit", "a=1", directions_file="m.safetensors")

    save_directions(model / "wide.safetensors", directions(w_dim=9), command="")
    assert "have 9 dimensions, the snapshot's w has 8" in say("--edit", "smile=1", directions_file="wide.safetensors")
    torch.manual_seed(1)
    save_snapshot(model / "other.safetensors", Generator(**TINY), recipe_json="{}", kimg=1, dataset={})
    assert "belong to another snapshot (sha256" in say("--edit", "smile=1", snapshot="other.safetensors")
    assert not (tmp_path / "out").exists()


def test_directions_svm_writes_a_file_that_the_sampler_takes(model, tmp_path):
    torch.manual_seed(0)
    net = create_timm("test_resnet", num_classes=3).eval()
    half = (0.5, 0.5, 0.5)
    judge = AttributeClassifier(net, ["smile", "hat", "poor"], input_size=(32, 32), mean=half, std=half,
                                balanced_accuracy=[0.95, None, 0.7])  # fmt: skip
    attributes, out = tmp_path / "attributes.safetensors", tmp_path / "d.safetensors"
    save_attributes(attributes, judge, model="test_resnet", kwargs={"num_classes": 3}, source="")
    arguments = (model / "m.safetensors", "--attributes", attributes, "--samples", 500, "--seeds", 0, "--out", out)
    result = run(directions_tool.app, "svm", *arguments)
    assert result.exit_code == 0 and "500 samples" in result.output, result.output
    found = load_directions(out)
    assert found.names == ("smile", "hat") and found.samples == 500
    assert found.snapshot == sha256_of(model / "m.safetensors")
    result = run(sample.app, model / "m.safetensors", "--directions", out, "--edit", "hat=1", "--seeds", "0",
                 "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.output

    unknown = run(directions_tool.app, "svm", *arguments, "--name", "smil")
    assert "knows no attribute 'smil': did you mean smile?" in line(unknown)
    weak = line(run(directions_tool.app, "svm", *arguments, "--name", "poor"))
    assert "attribute poor: held-out balanced accuracy 0.700 is below 0.8" in weak and "--allow-weak" in weak
    many = line(run(directions_tool.app, "svm", *arguments, "--samples", 10**15))
    assert "--samples 1000000000000000: so many take 37,252,903.0 GiB, and " in many  # 8 w and 2 logits of 4 bytes
    result = run(directions_tool.app, "svm", *arguments, "--name", "poor", "--allow-weak")
    assert result.exit_code == 0 and load_directions(out).names == ("poor",)


def in_bits(p: np.ndarray) -> float:
    """H(Y) − I(X; Y) in bits of joint frequencies p [x, y]: the reference code's way to H(Y | X)."""
    px, py = p.sum(1), p.sum(0)
    information = sum(p[x, y] * math.log2(p[x, y] / (px[x] * py[y])) for x in (0, 1) for y in (0, 1) if p[x, y])
    return -sum(q * math.log2(q) for q in py if q) - information


def test_conditional_entropy():
    noise = np.random.default_rng(0)
    y = np.arange(1000) % 2 == 0
    assert conditional_entropy(y, y) == conditional_entropy(~y, y) == 0
    assert conditional_entropy(np.zeros(1000, bool), y) == pytest.approx(math.log(2))
    wrong = np.arange(1000) % 20 < 2  # a tenth of both sides
    assert conditional_entropy(y ^ wrong, y) == pytest.approx(-0.1 * math.log(0.1) - 0.9 * math.log(0.9))
    x, y = noise.random(500) < 0.3, noise.random(500) < 0.6
    joint = np.array([[np.mean((x == a) & (y == b)) for b in (0, 1)] for a in (0, 1)])
    assert math.exp(conditional_entropy(x, y)) == pytest.approx(2 ** in_bits(joint))


def test_separability_of_what_is_separable_and_what_is_not():
    noise = np.random.default_rng(0)
    w = noise.standard_normal((4000, 6))
    told = []
    apart = np.stack([w[:, 0] - w[:, 1], -5 * w[:, 3]], 1)
    result = linear_separability(w, apart, ["a", "b"], ALONE, told=told.append)
    assert result["ls"] == pytest.approx(1, abs=1e-3) and (result["samples"], result["kept"]) == (4000, 2000)
    assert told == [1, 1]
    halves = [linear_separability(w, apart, ["a", "b"], World(rank, 2, rank, 2, ALONE.device)) for rank in range(2)]
    for name, (of_rank, of_other) in {"a": halves, "b": halves[::-1]}.items():
        assert of_rank["entropies"][name] == result["entropies"][name] and of_other["entropies"][name] == 0
    ring = (np.square(w).sum(1) - 5.35)[:, None]  # no plane tells inside from outside
    assert linear_separability(w, ring, ["ring"], ALONE)["ls"] == pytest.approx(2, abs=0.05)
    both = linear_separability(w, np.concatenate([apart, ring, ring], 1), ["a", "b", "c", "d"], ALONE)
    assert both["ls"] == pytest.approx(4, abs=0.2) and both["entropies"]["a"] < 1e-3 < both["entropies"]["c"]
    assert both["ls"] == pytest.approx(math.exp(sum(both["entropies"].values())))


def test_the_least_sure_half_is_dropped():
    noise = np.random.default_rng(0)
    w = noise.standard_normal((2000, 4))
    logits = np.where(np.abs(w[:, 0]) > np.median(np.abs(w[:, 0])), 10 * w[:, 0], noise.standard_normal(2000) * 1e-3)
    assert linear_separability(w, logits[:, None], ["a"], ALONE)["ls"] == pytest.approx(1, abs=1e-3)
    assert linear_separability(w, logits[:, None], ["a"], ALONE, keep=1.0)["ls"] > 1.3
    assert separation_entropy(w, np.ones(2000, bool)) == separation_entropy(w, np.zeros(2000, bool)) == 0


def test_a_classifier_of_nothing_but_weak_attributes_says_so():
    judge = AttributeClassifier(nn.Identity(), ["a"], input_size=(1, 1), mean=[0.5], std=[0.5], balanced_accuracy=[0.5])
    with pytest.raises(UserError, match=r"tells none of its attributes with balanced accuracy 0\.8"):
        judge.restricted()
    assert judge.restricted(allow_weak=True).names == ("a",)
