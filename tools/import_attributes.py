"""Turn published PyTorch predictors of CelebA's 40 attributes into an attribute classifier file.

    python tools/import_attributes.py anycost attribute_predictor.pt
    python tools/import_attributes.py gan-ensembling pretrained_classifiers/celebahq

anycost: mit-han-lab/anycost-gan's ResNet50 with 40 pairs of logits (absent, present) in CelebA's order, trained on
256² images in [−1, 1]. The logit here is present − absent.
gan-ensembling: chail/gan-ensembling's `<attribute>/net_best.pth`, one StyleGAN1 discriminator at 256² for each
attribute, called by its folder. Theirs say *present* by a negative logit; here its sign is turned.

Nothing is unpickled but tensors. Names and shapes of all tensors must be exactly the published ones. Neither source
states a held-out balanced accuracy, so the file has none and the attributes are scored without that check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.attributes import (
    DISCRIMINATORS,
    AttributeClassifier,
    Discriminators,
    nearest,
    save_attributes,
)
from hsrgan.engine.teacher import create_timm
from hsrgan.engine.tensor_files import misfit, read_pth, sha256_of
from hsrgan.tools import options

CELEBA = [  # in the order of CelebA's own list_attr_celeba.txt
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
]  # fmt: skip
SIDE = 256
BEST = "net_best.pth"
_WHAT = "attribute predictor"

app = CommandLine()


def read_state(path: Path, publisher: str) -> dict[str, Tensor]:
    """The tensors below `state_dict`, as both publishers save them."""
    content = read_pth(path, _WHAT, f"get it from {publisher}")
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{_WHAT} {path} holds no state_dict of tensors: it is not the file that {publisher} publishes")
    return state


def refuse_misfit(path: Path, expected: Mapping[str, Tensor], state: Mapping[str, Tensor], publisher: str) -> None:
    if detail := misfit(expected, state):
        raise UserError(f"{_WHAT} {path} is not the network that {publisher} publishes: {detail}")


def classifier_of(net: nn.Module, names: list[str]) -> AttributeClassifier:
    half = (0.5, 0.5, 0.5)
    unknown = [None] * len(names)
    return AttributeClassifier(net, names, input_size=(SIDE, SIDE), mean=half, std=half, balanced_accuracy=unknown)


def from_anycost(path: Path) -> AttributeClassifier:
    """attribute_predictor.pt: torchvision's ResNet50 (timm's has the same tensors), fc [80, 2048] read as (40, 2)."""
    publisher = "mit-han-lab/anycost-gan"
    state = read_state(path, publisher)
    net = create_timm("resnet50", num_classes=2 * len(CELEBA))
    refuse_misfit(path, net.state_dict(), state, publisher)
    pairs = {key: state[key].unflatten(0, (len(CELEBA), 2)) for key in ("fc.weight", "fc.bias")}
    net = create_timm("resnet50", num_classes=len(CELEBA))
    net.load_state_dict({**state, **{key: pair[:, 1] - pair[:, 0] for key, pair in pairs.items()}})
    return classifier_of(net, CELEBA)


def published_discriminator(template: nn.Sequential) -> dict[str, tuple[str, float]]:
    """Published prefix → (index of the layer in `template`, gain of its equalised learning rate), by layer."""
    layers = ["fromrgb_lod0.conv"]
    layers += [f"{r}x{r}.{conv}" for r in Discriminators.RESOLUTIONS for conv in ("conv0", "conv1")]
    layers += ["4x4.conv", "4x4.dense0", "4x4.dense1"]
    ours = [str(i) for i, layer in enumerate(template) if hasattr(layer, "weight")]
    return {name: (i, 1.0 if name == layers[-1] else math.sqrt(2)) for name, i in zip(layers, ours, strict=True)}


def from_gan_ensembling(path: Path) -> dict[str, Tensor]:
    """net_best.pth as the state of one of our Discriminators, its sign turned.

    Published: y = W·x·gain/√fan_in + b, gain √2, and 1 in the last layer; `lod_in` is the progressive growing's, of no
    use at full resolution.
    """
    publisher = "chail/gan-ensembling"
    state = read_state(path, publisher)
    with torch.device("meta"):  # shapes alone
        template = Discriminators(1).nets[0]
    names = {}
    for name, (i, gain) in published_discriminator(template).items():
        kind = "linear" if "dense" in name else "conv"
        names[f"{name}.{kind}.weight"] = f"{i}.weight", gain
        names[f"{name}.wscale.b"] = f"{i}.bias", 1.0
    shapes = template.state_dict()
    expected = {theirs: shapes[ours] for theirs, (ours, _) in names.items()}
    refuse_misfit(path, {**expected, "lod_in": torch.zeros(())}, state, publisher)
    result = {}
    for theirs, (ours, gain) in names.items():
        value = state[theirs].float()
        scale = gain / math.sqrt(value[0].numel()) if ours.endswith("weight") else 1.0
        result[ours] = value * (-scale if theirs.startswith("4x4.dense1") else scale)
    return result


@app.callback()
def _main() -> None:
    """Turn published predictors of CelebA's attributes into a classifier file.

    Examples:

      python tools/import_attributes.py anycost attribute_predictor.pt

      python tools/import_attributes.py gan-ensembling celebahq/ --attribute Smiling
    """


@app.command()
def anycost(
    file: Annotated[Path, typer.Argument(help="attribute_predictor.pt of mit-han-lab/anycost-gan.")],
    out: Annotated[Path, typer.Option(help="The classifier file to write.")] = Path("attributes.safetensors"),
) -> None:
    """Import the ResNet50 of anycost-gan: all 40 attributes of CelebA."""
    classifier = from_anycost(file)
    source = f"mit-han-lab/anycost-gan {file.name} sha256 {sha256_of(file)}"
    options.make_folder(out)
    save_attributes(out, classifier, model="resnet50", kwargs={"num_classes": len(CELEBA)}, source=source)
    typer.echo(f"{len(CELEBA)} attributes in {out}; their held-out accuracy is not stated by the publisher")


@app.command()
def gan_ensembling(
    folder: Annotated[Path, typer.Argument(help="Folder with <attribute>/net_best.pth.")],
    attribute: Annotated[
        list[str] | None, typer.Option(help="Only this attribute, repeatable; by default every sub-folder.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The classifier file to write.")] = Path("attributes.safetensors"),
) -> None:
    """Import the StyleGAN1 discriminators of gan-ensembling, one network (92 MB) for each attribute."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{BEST}"))
    if not found:
        raise UserError(f"{folder} has no <attribute>/{BEST}: name the folder celebahq of the unpacked "
                        "pretrained_classifiers.zip of chail/gan-ensembling")
    for name in attribute or ():
        if name not in found:
            raise UserError(f"{folder} has no {name}/{BEST}{nearest(name, found)}")
    chosen = list(attribute or found)
    if unknown := [name for name in chosen if name not in CELEBA]:
        raise UserError(f"{folder / unknown[0]} is called by no attribute of CelebA{nearest(unknown[0], CELEBA)}; "
                        "give --attribute for those that are")
    net, digests = Discriminators(len(chosen)), []
    for one, name in zip(net.nets, track(chosen, "importing"), strict=True):
        one.load_state_dict(from_gan_ensembling(folder / name / BEST))
        digests.append(f"{name} sha256 {sha256_of(folder / name / BEST)}")
    source = f"chail/gan-ensembling {', '.join(digests)}"
    options.make_folder(out)
    save_attributes(out, classifier_of(net, chosen), model=DISCRIMINATORS, kwargs={}, source=source)
    typer.echo(f"{len(chosen)} attributes in {out}; their held-out accuracy is not stated by the publisher")


if __name__ == "__main__":
    app()
