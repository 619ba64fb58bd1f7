"""Attribute classifiers: fitted to labelled images, read from a file, imported from what others published."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.attributes import (
    AttributeClassifier,
    balanced_accuracies,
    load_attributes,
    save_attributes,
)
from hsrgan.engine.teacher import create_timm
from hsrgan.tools import fit_attributes, import_attributes, pack
from hsrgan.tools.fit_teacher import read_images

FIT = fit_attributes.app
HALF = (0.5, 0.5, 0.5)


def run(app, *arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def line(result) -> str:
    """The one line of a user's mistake."""
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_the_ten_digits_as_attributes(tmp_path, monkeypatch):
    """On a fifth of the digits that took no part: chance is 0.5."""
    monkeypatch.chdir(tmp_path)
    result = run(FIT, "digits", "--kimg", "7", "--out", "a.safetensors")
    assert result.exit_code == 0 and "359 held-out images" in result.output, result.output
    classifier = load_attributes("a.safetensors")
    assert classifier.names == tuple("0123456789") and classifier.input_size == (16, 16)
    accuracy = classifier.balanced_accuracy
    assert sum(value >= 0.95 for value in accuracy) >= 8 and min(accuracy) > 0.88, accuracy

    images = read_images("datasets/digits-16x16x1", 16)  # most of them seen in the fit
    logits = classifier(images.unit() * 2 - 1)
    assert (logits.argmax(1) == images.labels).float().mean() > 0.94
    larger = F.interpolate(images.unit(slice(50)), size=32) * 2 - 1  # averaged down to 16
    torch.testing.assert_close(classifier(larger), logits[:50], rtol=1e-3, atol=1e-3)
    colour = images.unit(slice(9)).expand(-1, 3, -1, -1) * 2 - 1
    torch.testing.assert_close(classifier(colour), logits[:9], rtol=1e-3, atol=1e-3)

    some = classifier.restricted(["7", "3"])
    torch.testing.assert_close(some(larger), classifier(larger)[:, [7, 3]])
    assert some.names == ("7", "3") and some.balanced_accuracy == (accuracy[7], accuracy[3])
    torch.testing.assert_close(some.restricted(["3"])(larger), classifier(larger)[:, [3]])
    with safe_open("a.safetensors", "pt") as file:
        assert file.metadata()["source"].startswith("python tools/fit_attributes.py")


@pytest.fixture
def photos(tmp_path):
    """Forty 16×16 pictures: `warm` ones are red in the left half, `lit` ones white at the top."""
    folder, noise = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    table = {}
    for i in range(40):
        pixels = noise.integers(0, 60, (16, 16, 3))
        table[f"{i}.png"] = {"warm": i % 2, "lit": i // 2 % 2}
        pixels[:, :8, 0] += 150 * (i % 2)
        pixels[:6] += 150 * (i // 2 % 2)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder, table


def as_text(table: dict, kind: str) -> str:
    if kind == "json":
        return json.dumps(table)
    rows = [(name, *row.values()) for name, row in table.items()]
    if kind == "csv":
        return "\n".join(["file,warm,lit", *(",".join(map(str, row)) for row in rows)]) + "\n"
    celeba = [f"{name}  {'  '.join(str(2 * value - 1) for value in values)}" for name, *values in rows]
    return "\n".join([str(len(rows)), "warm lit", *celeba]) + "\n"


SHORT = ("--batch", "8", "--kimg", "0.4", "--rotation", "0")


@pytest.mark.parametrize("kind", ["csv", "json", "txt"])
def test_a_table_of_several_attributes_for_images_in_a_folder(photos, tmp_path, kind):
    folder, table = photos
    file, out = tmp_path / f"table.{kind}", tmp_path / "made" / "a.safetensors"
    file.write_text(as_text(table, kind))
    names, rows = fit_attributes.read_table(file)
    assert names == ["warm", "lit"] and rows == {name: list(map(float, row.values())) for name, row in table.items()}
    if kind == "csv":
        result = run(FIT, folder, "--table", file, "--resolution", "16", "--out", out, *SHORT)
        assert result.exit_code == 0, result.output
        assert load_attributes(out).names == ("warm", "lit")
        assert min(load_attributes(out).balanced_accuracy) > 0.9


def test_a_table_for_packed_shards_goes_by_the_samples_keys(photos, tmp_path):
    """Packing shuffles; the table's rows must meet their images all the same."""
    folder, table = photos
    shards = tmp_path / "shards"
    typer_app = typer.Typer()
    typer_app.command()(pack.pack)
    assert run(typer_app, folder, shards, "--resolution", "16", "--shard-size", "7").exit_code == 0
    images = read_images(str(shards), 16)
    originals = {Image.open(folder / name).tobytes(): row for name, row in table.items()}
    by_key = {}
    for pixels, key in zip(images.pixels, images.names, strict=True):
        by_key[key] = originals[pixels.permute(1, 2, 0).numpy().tobytes()]
    assert sorted(by_key) == [f"{i:08d}" for i in range(40)]
    import webdataset as wds

    stored = {s["__key__"]: s["png"] for f in sorted(shards.glob("*.tar"))
              for s in wds.WebDataset(str(f), shardshuffle=False).decode("rgb8")}  # fmt: skip
    for pixels, key in zip(images.pixels, images.names, strict=True):
        assert np.array_equal(stored[key], pixels.permute(1, 2, 0).numpy())
    file = tmp_path / "t.json"
    file.write_text(json.dumps(by_key))
    result = run(FIT, shards, "--table", file, "--out", tmp_path / "a.safetensors", *SHORT)
    assert result.exit_code == 0, result.output
    assert min(load_attributes(tmp_path / "a.safetensors").balanced_accuracy) > 0.9


def test_mistakes_in_fitting_are_one_line(photos, tmp_path, monkeypatch):
    folder, table = photos
    file = tmp_path / "t.csv"

    def say(content: str, *extra, suffix=".csv"):
        path = file.with_suffix(suffix)
        path.write_text(content)
        out = tmp_path / "a.safetensors"
        return line(run(FIT, folder, "--table", path, "--resolution", "16", "--out", out, *extra))

    good = as_text(table, "csv")
    assert "lacks 1 of the 40 images" in say(good.replace("\n7.png,", "\n77.png,")) and "first 7.png" in say(
        good.replace("\n7.png,", "\n77.png,")
    )
    assert "'yes' is none of 1, 0, -1" in say(good.replace("7.png,1,1", "7.png,1,yes"))
    assert "7.png has not 2 values" in say(good.replace("7.png,1,1", "7.png,1"))
    assert "is no table of attributes" in say("") and "is no table of attributes" in say("{", suffix=".json")
    assert "names no attributes, or one twice" in say(good.replace("warm,lit", "lit,lit"))
    always = {name: {**row, "lit": 1} for name, row in table.items()}
    assert "attribute lit is present in every image of 32" in say(as_text(always, "csv"))
    assert "did you mean resnet18" in say(good, "--model", "resnett18")
    resolution = ("--resolution", "16")
    assert "t.gone cannot be read" in line(run(FIT, folder, "--table", tmp_path / "t.gone", *resolution))
    assert "one label for each image: pack it with --labels, or give --table" in line(run(FIT, folder, *resolution))
    assert "give --resolution" in line(run(FIT, folder))
    (tmp_path / "file").touch()
    assert "Not a directory; name another --out" in line(run(FIT, folder, "--out", tmp_path / "file" / "a.safetensors"))
    assert not (tmp_path / "a.safetensors").exists()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_attributes, "fit", interrupted)
    file.write_text(good)
    result = run(FIT, folder, "--table", file, "--resolution", "16", "--out", tmp_path / "a.safetensors")
    assert result.exit_code != 0 and not list(tmp_path.glob("*a.st*"))


def test_balanced_accuracy_is_the_mean_over_both_sides():
    labels = torch.tensor([[1.0, 1, 0]] * 2 + [[0.0, 1, 0]] * 8)
    logits = torch.tensor([[1.0, 1, 1], [-1.0, 1, 1]] + [[-1.0, 1, 1]] * 6 + [[1.0, 1, 1]] * 2)
    assert balanced_accuracies(logits, labels) == [pytest.approx((1 / 2 + 6 / 8) / 2), None, None]


def small_file(path, **facts):
    torch.manual_seed(0)
    kwargs = {"num_classes": 3}
    classifier = AttributeClassifier(create_timm("test_resnet", **kwargs), ["a", "b", "c"], input_size=(32, 32),
                                     mean=(0.1, 0.2, 0.3), std=HALF, balanced_accuracy=[0.9, 0.7, None])  # fmt: skip
    save_attributes(path, classifier, model="test_resnet", kwargs=kwargs, source="here", **facts)
    return classifier


def test_a_file_keeps_everything_and_weak_attributes_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    saved = small_file(path)
    loaded = load_attributes(path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded(images), saved(images)) and not any(p.requires_grad for p in loaded.parameters())
    by_hand = saved.net(((images + 1) / 2 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5)
    torch.testing.assert_close(loaded(images), by_hand, rtol=1e-4, atol=1e-5)
    assert loaded.balanced_accuracy == (0.9, 0.7, None) and loaded.weak() == {"b": 0.7}
    assert loaded.restricted().names == ("a", "c") and loaded.restricted(allow_weak=True).names == ("a", "b", "c")
    torch.testing.assert_close(loaded.restricted()(images), saved(images)[:, [0, 2]])
    with pytest.raises(UserError, match=r"attribute b: held-out balanced accuracy 0\.700 is below 0\.8"):
        loaded.restricted(["b"])
    assert loaded.restricted(["b"], allow_weak=True).names == ("b",)
    with pytest.raises(UserError, match="knows no attribute 'd': it has a, b, c"):
        loaded.restricted(["d"])


@pytest.mark.parametrize(("change", "says"), [
    (lambda t, m: m.pop("format"), "is no attribute classifier"),
    (lambda t, m: m.pop("mean"), "unreadable metadata"),
    (lambda t, m: m.update(names='["a"]'), "unreadable metadata.*1 names, 3 accuracies"),
    (lambda t, m: m.update(kwargs='{"num_classes": 3, "checkpoint_path": "/x"}'), "passes .*checkpoint_path"),
    (lambda t, m: m.update(model="test_resnett"), "did you mean test_resnet"),
    (lambda t, m: m.update(kwargs='{"num_classes": 4}'), r"fc.weight is \[3, .* there and \[4"),
    (lambda t, m: t.pop("fc.bias"), "lacks 1 of .* tensors, first fc.bias"),
    (lambda t, m: t.update(more=torch.zeros(1)), "1 tensors are none of the model's, first more"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_one_line(tmp_path, change, says):
    path = tmp_path / "a.safetensors"
    small_file(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=says):
        load_attributes(path)


def randomised(net: nn.Module) -> dict[str, torch.Tensor]:
    """A state whose norms matter: fresh ones hide a missing norm."""
    torch.manual_seed(0)
    return {k: v + torch.rand_like(v) * 0.2 if v.ndim == 1 else v for k, v in net.state_dict().items()}


def test_anycost_gan_predictor(tmp_path):
    """Its file: {"state_dict": torchvision's resnet50 with fc [80, 2048]}; view(-1, 40, 2), column 1 is *present*."""
    theirs = create_timm("resnet50", num_classes=80).eval()
    theirs.load_state_dict(randomised(theirs))
    file, out = tmp_path / "attribute_predictor.pt", tmp_path / "made" / "a.safetensors"
    torch.save({"state_dict": theirs.state_dict()}, file)
    result = run(import_attributes.app, "anycost", file, "--out", out)
    assert result.exit_code == 0, result.output
    classifier = load_attributes(out)
    assert len(classifier.names) == 40 and set(classifier.balanced_accuracy) == {None}
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        pairs = theirs(image).view(-1, 40, 2)
    log_odds = pairs.softmax(-1)[:, :, 1].logit()
    smiling = classifier.restricted(["Smiling", "5_o_Clock_Shadow", "Young"])  # CelebA's numbers 31, 0 and 39
    torch.testing.assert_close(smiling(image), log_odds[:, [31, 0, 39]], rtol=1e-3, atol=1e-4)
    doubled = F.interpolate(image, scale_factor=2)
    torch.testing.assert_close(smiling(doubled), smiling(image), rtol=1e-3, atol=1e-4)

    def say(content, name="p.pt"):
        torch.save(content, tmp_path / "p.pt")
        return line(run(import_attributes.app, "anycost", tmp_path / name, "--out", tmp_path / "b"))

    state, norm = dict(theirs.state_dict()), "layer1.0.bn1.bias"
    assert "is [3] there and [64] here" in say({"state_dict": {**state, norm: torch.zeros(3)}})
    assert "are none of the model's, first head" in say({"state_dict": {**state, "head": torch.zeros(3)}})
    del state[norm]
    assert "lacks 1 of" in say({"state_dict": state})
    assert "holds no state_dict of tensors" in say({"state_dict": {"x": 1}})
    assert "cannot be read as plain tensors" in say({"state_dict": nn.Linear(1, 1)})  # a class: would run code
    assert "does not exist: get it from mit-han-lab/anycost-gan" in say({}, name="gone.pt")
    assert not (tmp_path / "b").exists()


def published_state() -> dict[str, torch.Tensor]:
    """Random tensors under the names and in the shapes of chail/gan-ensembling's net_best.pth."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"fromrgb_lod0.conv.conv": (64, 3, 1, 1)}
    for r, conv0, conv1 in ((256, 64, 128), (128, 128, 256), (64, 256, 512), *((r, 512, 512) for r in (32, 16, 8))):
        shapes[f"{r}x{r}.conv0.conv"] = (conv0, conv0, 3, 3)
        shapes[f"{r}x{r}.conv1.conv"] = (conv1, conv0, 3, 3)
    shapes |= {"4x4.conv.conv": (512, 512, 3, 3), "4x4.dense0.linear": (512, 8192), "4x4.dense1.linear": (1, 512)}
    state = {"lod_in": torch.tensor(0.0, dtype=torch.float64)}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=draw)
        bias = name.rpartition(".")[0] + ".wscale.b"
        state[bias] = torch.randn(shape[0], generator=draw) * 0.1
    return state


def published_forward(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Equalised layers y = (W·x)·gain/√fan_in + b; each resolution conv0, lrelu, conv1, mean of 2×2, lrelu."""

    def layer(name, x, gain=2**0.5):
        if "dense" in name:
            weight = state[f"{name}.linear.weight"]
            return x @ weight.T * (gain / math.sqrt(weight.shape[1])) + state[f"{name}.wscale.b"]
        weight = state[f"{name}.conv.weight"]
        y = F.conv2d(x, weight, padding=weight.shape[2] // 2) * (gain / math.sqrt(weight[0].numel()))
        return y + state[f"{name}.wscale.b"].view(1, -1, 1, 1)

    def act(x):
        return F.leaky_relu(x, 0.2)

    x = act(layer("fromrgb_lod0.conv", x))
    for r in (256, 128, 64, 32, 16, 8):
        x = act(layer(f"{r}x{r}.conv0", x))
        x = act(F.avg_pool2d(layer(f"{r}x{r}.conv1", x), 2))
    x = act(layer("4x4.conv", x)).flatten(1)
    return layer("4x4.dense1", act(layer("4x4.dense0", x)), gain=1)


def test_gan_ensembling_discriminators(tmp_path):
    """*present* is softmax([ℓ, −ℓ])[1], so ours has the other sign; attributes go by their folder's name."""
    folder, out = tmp_path / "celebahq", tmp_path / "a.safetensors"
    state = published_state()

    def write(name, **changed):
        (folder / name).mkdir(parents=True, exist_ok=True)
        content = {"state_dict": {**state, **changed}, "optimizer": {"state": {}}, "epoch": 3, "valacc": 0.9}
        torch.save(content, folder / name / "net_best.pth")

    write("Smiling")
    write("Bald", **{"4x4.dense1.wscale.b": torch.tensor([7.0])})
    result = run(import_attributes.app, "gan-ensembling", folder, "--out", out)
    assert result.exit_code == 0, result.output
    classifier = load_attributes(out)
    assert classifier.names == ("Bald", "Smiling")  # the folder's order; nothing goes by position
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        theirs = published_forward(state, image)
    smiling = classifier.restricted(["Smiling"])
    assert len(smiling.net.nets) == 1
    torch.testing.assert_close(smiling(image), -theirs, rtol=1e-3, atol=1e-4)
    present = torch.cat([theirs, -theirs], 1).softmax(1)[0, 1]
    assert (smiling(image)[0, 0] > 0) == (present > 0.5)
    bias = classifier.restricted(["Bald"]).net.nets[0][-1].bias
    assert bias.item() == -7

    out.unlink()
    assert "has no Smilling/net_best.pth: did you mean Smiling?" in line(
        run(import_attributes.app, "gan-ensembling", folder, "--attribute", "Smilling", "--out", out)
    )
    for changed, says in (({"4x4.dense0.linear.weight": torch.zeros(512, 512)}, "is [512, 512] there"),
                          ({"fromrgb_lod1.conv.conv.weight": torch.zeros(1)}, "are none of the model's")):  # fmt: skip
        write("Bald", **changed)
        assert says in line(run(import_attributes.app, "gan-ensembling", folder, "--out", out, "--attribute", "Bald"))
    (folder / "Bald").rename(folder / "bald_W")
    assert "did you mean Bald?" in line(run(import_attributes.app, "gan-ensembling", folder, "--out", out))
    assert "has no <attribute>/net_best.pth" in line(run(import_attributes.app, "gan-ensembling", tmp_path))
    assert not out.exists()
