"""What tools/bench_train.py compares on a GPU, and the row that it prints for each: timed, or by the static model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hsrgan.engine.config import Recipe
from hsrgan.tools.kernel_shapes import CHANNEL_MAX, CLAMP, HIDDEN, MODELS
from hsrgan.tools.plain_training import TEACHER

HSR_LAYERS = {8: 11, 16: 8, 32: 5, 64: 2}  # of recipes/ffhq_256.yaml
KEYS = (
    "model", "provider", "precision", "num_fp16_res", "tf32", "batch", "hsr", "kernels", "graphs", "img_s", "step_p20",
    "step_p50", "step_p80", "Gmain", "Greg", "Dmain", "Dreg", "rest", "peak_bytes", "kernels_per_step",
    "host_launches_per_step", "timed", "device", "versions", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One column of choices: a model of kernel_shapes.MODELS, its precision and batch, and what is switched on."""

    model: str
    precision: str
    num_fp16_res: int  # the highest resolutions, in half precision
    tf32: bool  # of what is fp32
    batch: int
    hsr: bool
    backend: str  # "triton" or "torch": kernels on or off
    graphs: bool

    @property
    def name(self) -> str:
        switches = {"HSR": self.hsr, "kernels": self.backend == "triton", "graphs": self.graphs}
        on = ", ".join(name for name, switch in switches.items() if switch) or "nothing"
        return f"{self.model} {self.numbers}, batch {self.batch}, with {on}"

    @property
    def numbers(self) -> str:
        """In which precision, in words."""
        highest = "" if self.precision == "fp32" else f" at the {self.num_fp16_res} highest resolutions"
        return f"{self.precision}{highest}{', tf32' if self.tf32 else ''}"


def variants(models: Sequence[str], precision: str, num_fp16_res: int, tf32: bool, batch: int) -> list[Variant]:
    """HSR off and on, kernels off and on, graphs off and on: eight for each model."""
    switches = [(hsr, backend, graphs) for hsr in (False, True) for backend in ("torch", "triton")
                for graphs in (False, True)]  # fmt: skip
    return [Variant(model, precision, num_fp16_res, tf32, batch, *of) for model in models for of in switches]


def recipe(variant: Variant) -> Recipe:
    """StyleGAN2's intervals, mixing in nine steps of ten."""
    resolution, base = MODELS[variant.model]
    widths = {"channel_base": base, "channel_max": CHANNEL_MAX, "num_fp16_res": variant.num_fp16_res,
              "conv_clamp": CLAMP, "lr": 0.002}  # fmt: skip
    hsr = {"teacher": TEACHER, "layers": HSR_LAYERS, "hidden": HIDDEN} if variant.hsr else None
    return Recipe.model_validate({
        "run_dir": "none", "kimg": 1.0, "batch": variant.batch, "precision": variant.precision, "tf32": variant.tf32,
        "data": {"builtin": "digits", "resolution": resolution}, "adam": {}, "r1": {"gamma": 1.0}, "path_length": {},
        "generator": widths, "ema": {"kimg": 10.0}, "hsr": hsr,
        "discriminator": {**widths, "mbstd_group_size": math.gcd(4, variant.batch)},
    })  # fmt: skip


def row(variant: Variant, provider: str = "hsrgan", **known: object) -> dict:
    """Every key of KEYS; seconds, bytes and counts of one step; None where nothing is known."""
    of_variant = {
        "model": variant.model, "provider": provider, "precision": variant.precision,
        "num_fp16_res": variant.num_fp16_res, "tf32": variant.tf32, "batch": variant.batch, "hsr": variant.hsr,
        "kernels": variant.backend == "triton", "graphs": variant.graphs,
    }  # fmt: skip
    return {key: None for key in KEYS} | of_variant | known
