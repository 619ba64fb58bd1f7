"""Attribute classifiers: images → one logit for each named attribute, positive = present.

A file (.safetensors) holds the weights and, as metadata (text → text): format, model (a timm name, or that of the
imported StyleGAN1 discriminators), kwargs, names, input_size, mean, std, balanced_accuracy (held out, one for each
name; null where whoever trained it did not state it) and source (the command, or the files it was made from).
Attributes are told apart by name, never by position. Made by tools/fit_attributes.py and tools/import_attributes.py.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from hsrgan.engine.alpha import over_grey
from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.fp32 import exact_fp32
from hsrgan.engine.teacher import FILE_KWARGS, create_timm
from hsrgan.engine.tensor_files import misfit, one_line, read_safetensors

FORMAT = "hsrgan-attributes-1"
DISCRIMINATORS = "stylegan1-discriminators"
WEAK = 0.8  # held-out balanced accuracy below which an attribute is not told well enough to score by


class AttributeClassifier(nn.Module):
    """net: images as it was trained on them [N, 3, h, w] → logits [N, A]; frozen, in eval mode.

    names: A of them. input_size (h, w); mean, std of the images in [0, 1]. balanced_accuracy: held out, None where it
    is not known.
    """

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        *,
        input_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        balanced_accuracy: Sequence[float | None],
    ) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.names, self.input_size = tuple(names), tuple(input_size)
        self.mean, self.std, self.balanced_accuracy = tuple(mean), tuple(std), tuple(balanced_accuracy)
        mean_c, std_c = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
        self.register_buffer("scale", (0.5 / std_c).float(), persistent=False)  # ((x + 1)/2 − mean)/std
        self.register_buffer("shift", ((0.5 - mean_c) / std_c).float(), persistent=False)
        self.columns: list[int] | None = None  # of the net's logits; None: all
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [N, C, H, W] in [−1, 1], C 1, 3 or 4 (then over mid-grey), area-resized where they are of another size
        → logits [N, A].
        """
        images = over_grey(images)
        if images.shape[2:] != self.input_size:
            images = F.adaptive_avg_pool2d(images, self.input_size)
        with exact_fp32(images.device):
            logits = self.net(images * self.scale + self.shift)  # a grey image is repeated by broadcasting
        return logits if self.columns is None else logits[:, self.columns]

    def restricted(self, names: Sequence[str] | None = None, *, allow_weak: bool = False) -> AttributeClassifier:
        """The classifier of `names`, in that order; of all that it can tell if None (see `weak` for the others).

        Raises `UserError` for an unknown name, and for one whose held-out balanced accuracy is below WEAK, unless
        `allow_weak`.
        """
        weak = {} if allow_weak else self.weak()
        for name in names or ():
            if name not in self.names:
                raise UserError(f"the classifier knows no attribute {name!r}{nearest(name, self.names)}")
            if name in weak:
                raise UserError(f"attribute {name}: held-out balanced accuracy {weak[name]:.3f} is below {WEAK}, too "
                                "weak to score by: leave it out, or give --allow-weak")
        chosen = [name for name in self.names if name not in weak] if names is None else list(names)
        if not chosen:
            raise UserError(f"the classifier tells none of its attributes with balanced accuracy {WEAK}: give "
                            "--allow-weak, or train a better one")
        columns = [self.names.index(name) for name in chosen]
        facts = {"input_size": self.input_size, "mean": self.mean, "std": self.std}
        accuracy = [self.balanced_accuracy[column] for column in columns]
        if isinstance(self.net, Discriminators):  # a network for each attribute: run only those asked for
            net = Discriminators(0)
            net.nets.extend(self.net.nets[column] for column in columns)
            return AttributeClassifier(net, chosen, balanced_accuracy=accuracy, **facts).to(self.scale.device)
        result = AttributeClassifier(self.net, chosen, balanced_accuracy=accuracy, **facts).to(self.scale.device)
        result.columns = columns if self.columns is None else [self.columns[column] for column in columns]
        return result

    def weak(self) -> dict[str, float]:
        """Attributes whose held-out balanced accuracy is known to be below WEAK, and that."""
        known = zip(self.names, self.balanced_accuracy, strict=True)
        return {name: accuracy for name, accuracy in known if accuracy is not None and accuracy < WEAK}


class Discriminators(nn.Module):
    """StyleGAN1's discriminator at 256² without minibatch std, one for each of `count` attributes: [N, 3, 256, 256] in
    [−1, 1] → [N, count].

    1812.04948's networks, as its CelebA-HQ attribute classifiers are built: 64 channels at 256², doubling to 512; each
    resolution is conv 3×3, lrelu, conv 3×3, 2×2 mean, lrelu. The equalised learning rate's factors are in the weights.
    """

    RESOLUTIONS = (256, 128, 64, 32, 16, 8)

    def __init__(self, count: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(self._one() for _ in range(count))

    @classmethod
    def _one(cls) -> nn.Sequential:
        def channels(resolution: int) -> int:
            return min(8192 * 2 // resolution, 512)

        layers: list[nn.Module] = [nn.Conv2d(3, channels(256), 1), nn.LeakyReLU(0.2)]
        for r in cls.RESOLUTIONS:
            here, below = channels(r), channels(r // 2)
            layers += [nn.Conv2d(here, here, 3, padding=1), nn.LeakyReLU(0.2)]
            layers += [nn.Conv2d(here, below, 3, padding=1), nn.AvgPool2d(2), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(512, 512, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten()]
        layers += [nn.Linear(512 * 16, 512), nn.LeakyReLU(0.2), nn.Linear(512, 1)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.nets], dim=1)


def nearest(name: str, known: Sequence[str]) -> str:
    """What to say of an unknown name: the nearest known one, or all of them."""
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f": did you mean {lower[close[0]]}?" if close else f": it has {', '.join(known)}"


def save_attributes(
    path: Path, classifier: AttributeClassifier, *, model: str, kwargs: Mapping[str, object], source: str
) -> None:
    """Write `classifier`, whose net is timm.create_model(model, **kwargs) or Discriminators, whole or not at all."""
    facts = {"kwargs": dict(kwargs), "names": classifier.names, "input_size": classifier.input_size}
    facts |= {"mean": classifier.mean, "std": classifier.std, "balanced_accuracy": classifier.balanced_accuracy}
    metadata = {"format": FORMAT, "model": model, "source": source}
    metadata |= {key: json.dumps(value) for key, value in facts.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in classifier.net.state_dict().items()}
    with written_aside(path) as aside:
        aside.write_bytes(save(tensors, metadata))  # save_file has errors of its own


def load_attributes(path: Path | str) -> AttributeClassifier:
    """The classifier of a file, on the CPU. Raises `UserError` for one that is absent, damaged or something else."""
    path = Path(path)
    state, metadata = read_safetensors(path, "attribute classifier", "make one with tools/fit_attributes.py, or import "
                                       "one with tools/import_attributes.py")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no attribute classifier (its format is {metadata.get('format')!r}, not "
                        f"{FORMAT!r}): make one with tools/fit_attributes.py or tools/import_attributes.py")
    try:
        model, names = metadata["model"], json.loads(metadata["names"])
        kwargs, input_size = json.loads(metadata["kwargs"]), json.loads(metadata["input_size"])
        mean, std, accuracy = (json.loads(metadata[key]) for key in ("mean", "std", "balanced_accuracy"))
        if len(accuracy) != len(names):
            raise ValueError(f"{len(names)} names, {len(accuracy)} accuracies")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"attribute classifier {path} has unreadable metadata ({one_line(error)}): make it "
                        "again") from None
    if refused := sorted(FILE_KWARGS & kwargs.keys()):
        raise UserError(f"attribute classifier {path}: its metadata passes {refused} to timm, which a file must not")
    if model == DISCRIMINATORS:
        net: nn.Module = Discriminators(len(names))
    else:
        net = create_timm(model, role="attribute classifier", **kwargs)
    if detail := misfit(net.state_dict(), state):
        raise UserError(f"attribute classifier {path} does not hold the {model} of its metadata: {detail}; make it "
                        "again")
    net.load_state_dict(state)
    return AttributeClassifier(net, names, input_size=input_size, mean=mean, std=std, balanced_accuracy=accuracy)


def balanced_accuracies(logits: Tensor, labels: Tensor) -> list[float | None]:
    """For each attribute of logits [N, A] and labels [N, A] (1 present, 0 not): the mean of the shares of present and
    of absent ones that the logit's sign tells; None where the labels have one side only.
    """
    says, present = logits > 0, labels > 0.5
    result: list[float | None] = []
    for a in range(logits.shape[1]):
        sides = [says[present[:, a], a], ~says[~present[:, a], a]]
        missing = any(len(side) == 0 for side in sides)
        result.append(None if missing else sum(side.float().mean().item() for side in sides) / 2)
    return result
