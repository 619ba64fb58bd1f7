"""Activations are channels_last from the first layer to the last gradient: nothing is copied into another order."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hsrgan.engine.config import Recipe
from hsrgan.engine.phases import build_phases, rounds
from hsrgan.engine.teacher import Teacher
from hsrgan.tools.plain_training import plain_training, random_teacher

aten = torch.ops.aten
BATCH = 10  # no number of channels
COPIES = {aten.clone.default, aten.copy_.default, aten._to_copy.default, aten.contiguous.default}
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}


class LayoutCopies(TorchDispatchMode):
    """Notes every copy of activations into another order, and every convolution that is given activations in another
    order than channels_last (it would reorder them out of sight).

    Activations: [BATCH or 2·BATCH, C > 1, above 4×4]. At 4×4 D flattens to the published order of its weights.
    """

    def __init__(self):
        super().__init__()
        self.wrong, self.seen = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = [t for t in args if is_activation(t)]
        after = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if is_activation(t)]
        self.seen += len(after)
        if func in COPIES and before and len({is_nhwc(t) for t in [*before, *after]}) > 1:
            self.wrong.append(f"{func} {[list(t.shape) for t in before]}")
        if func in CONVOLUTIONS and not all(is_nhwc(t) for t in [*before, *after]):
            self.wrong.append(f"{func} of {[(list(t.shape), t.stride()) for t in [*before, *after]]}")
        return out


def is_activation(t: object) -> bool:
    return isinstance(t, Tensor) and t.ndim == 4 and len(t) in (BATCH, 2 * BATCH) and t.shape[1] > 1 and t.shape[2] > 4


def is_nhwc(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


class Quiet(nn.Module):
    """A teacher whose inside is timm's affair and not watched."""

    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, img: Tensor) -> dict[int, Tensor]:
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            return self.teacher(img)


def watched(phase_name: str, precision: str, spoil=lambda t: None) -> LayoutCopies:
    """One round of a phase at 64×64: fp32 up to 16, above in `precision`, RGB, as at 256×256."""
    widths = {"channel_base": 256, "channel_max": 24, "num_fp16_res": 2, "mapping_layers": 1, "lr": 0.002}
    recipe = Recipe.model_validate({
        "run_dir": "none", "kimg": 1.0, "batch": BATCH, "precision": precision,
        "data": {"builtin": "digits", "resolution": 64}, "adam": {}, "r1": {"gamma": 1.0}, "ema": {"kimg": 1.0},
        "path_length": {"batch_shrink": 1}, "hsr": {"teacher": "random", "layers": {8: 1, 32: 0}, "hidden": 12},
        "generator": {"z_dim": 8, "w_dim": 8, "conv_clamp": 256.0, **widths},
        "discriminator": {"conv_clamp": 256.0, "mbstd_group_size": 2, **widths},
    })  # fmt: skip
    teacher = random_teacher({8: 1, 32: 0}, "vit_tiny_patch16_224", depth=2, embed_dim=8, num_heads=2)
    t = plain_training(recipe, torch.device("cpu"), {"hsr": teacher})
    t.teachers = {"hsr": Quiet(teacher)}
    phase = next(p for p in build_phases(t) if p.name == phase_name)
    (t.d if phase.network == "G" else t.g).module.requires_grad_(False)
    reals = torch.rand(BATCH, 3, 64, 64).to(memory_format=torch.channels_last)
    (batch,) = rounds(phase, t, 0, reals, torch.zeros(BATCH, 0))
    spoil(batch)
    with LayoutCopies() as mode:
        phase.gradients(batch)
    return mode


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("phase", ["Gmain", "Greg", "Dmain", "Dreg"])
def test_no_phase_copies_activations_into_another_order(phase, precision):
    mode = watched(phase, precision)
    assert mode.wrong == [] and mode.seen > 50


@pytest.mark.parametrize(("phase", "field"), [("Greg", "y"), ("Dmain", "reals")])
def test_an_input_in_another_order_is_noticed(phase, field):
    def spoil(batch):
        object.__setattr__(batch, field, getattr(batch, field).contiguous())

    assert watched(phase, "fp32", spoil).wrong
