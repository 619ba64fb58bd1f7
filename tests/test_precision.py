"""fp16 and bf16 beside fp32: losses and gradients of the four phases within the format's bounds, what fp16's range
costs and the loss scale saves, how often a weight is cast, and training at ten times the learning rate.

The bound on a gradient. L layers with leaky ReLU compute in half precision. Each makes three roundings (input, weight,
output) of relative size ε/2 at most, so √(ε²/12) on average; behind ℓ layers a pre-activation u ~ N(0, σ²) is off by
s = ε·√(3ℓ/12)·σ. With probability √(2/π)·φ(0)·s/σ = 0.318·s/σ that changes its sign, and lrelu's derivative there from
1 to 0.2 or back: (1 − 0.2)² = 0.64, against a mean square of (1 + 0.04)/2 = 0.52. Summed over ℓ = 1 … L, with
Σ√ℓ = ⅔·L^1.5, the gradient's relative error is √(0.13·L^1.5·ε). The roundings themselves add about ε·√L, which is
less. Path length and R1 differentiate a gradient that already has this error: twice the bound, and for the loss, which
is quadratic in that gradient, twice as well. The loss of a main phase is off by no more than the logits: ε·√L.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from test_graphs import CPU, DIGITS, HSR
from test_graphs import recipe as small_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from hsrgan.engine import distributed, phases
from hsrgan.engine.config import Recipe
from hsrgan.engine.layers import Conv, SynthesisLayer, ToRGB
from hsrgan.engine.phases import build_phases, rounds, run_phase
from hsrgan.engine.teacher import load_teacher
from hsrgan.tools.plain_training import plain_training

EPS = {"fp16": 2.0**-10, "bf16": 2.0**-7}
SMALLEST_NORMAL = 2.0**-14  # of fp16


def prepared(recipe: Recipe):
    """The run's phases on fp32 parameters that are the same in every precision, and one batch of reals."""
    teachers = {"hsr": load_teacher(str(DIGITS), layers=HSR["layers"])} if recipe.hsr else {}
    t = plain_training(recipe, CPU, teachers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for net in (t.g.module, t.d.module):
            for name, parameter in net.named_parameters():
                if name.endswith(("bias", "noise_strength")):
                    parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    side = recipe.data.resolution
    coarse = torch.randn(recipe.batch, 1, 8, 8, generator=generator)
    reals = torch.nn.functional.interpolate(coarse, side, mode="bilinear").tanh()
    return t, build_phases(t), reals.contiguous(memory_format=torch.channels_last)


def gradients(prepared, name: str):
    """Loss, and gradients by the parameters' names, of the phase's first round."""
    t, all_phases, reals = prepared
    (phase,) = [phase for phase in all_phases if phase.name == name]
    net, other = (t.g, t.d) if phase.network == "G" else (t.d, t.g)
    other.module.requires_grad_(False)
    found, told = phase.gradients(next(rounds(phase, t, 100_000, reals, torch.zeros(len(reals), 0))))
    other.module.requires_grad_(True)
    names = [key for key, _ in net.module.named_parameters()]
    return told.loss, {key: g for key, g in zip(names, found, strict=True) if g is not None}


def error(found: dict, truth: dict) -> float:
    """‖found − truth‖ / ‖truth‖ over all parameters."""
    square = sum((found[key].double() - truth[key].double()).square().sum() for key in truth)
    return float((square / sum(value.double().square().sum() for value in truth.values())) ** 0.5)


# ---- bounds


def sixteen(precision: str, half: str) -> Recipe:
    """test_graphs.py's small networks; `half`: in which of them the resolutions 8 and 16 are in half precision."""
    base = small_recipe(precision=precision, hsr={**HSR, "start_kimg": 0.0, "ramp_kimg": 0.0})
    changed = {
        name: getattr(base, name).model_copy(update={"num_fp16_res": 3 if letter in half else 0})
        for name, letter in (("generator", "G"), ("discriminator", "D"))
    }
    return base.model_copy(update=changed)


LAYERS = {"G": 4, "D": 5}  # in half precision at 16×16: two convolutions a resolution, and fromrgb
PASSES = {"Gmain": "GD", "Greg": "G", "Dmain": "GD", "Dreg": "D"}  # the networks that a phase computes


@pytest.fixture(scope="module")
def truths():
    """Loss and gradients of each phase in fp32."""
    whole = prepared(sixteen("fp32", "GD"))
    return {name: gradients(whole, name) for name in PASSES}


@pytest.mark.parametrize("half", ["GD", "G", "D"])
def test_losses_and_gradients_are_those_of_fp32_within_the_format(truths, half):
    """Measured: 3 to 60 times below the gradients' bounds; -s prints it. Where nothing is half, no bit differs; where
    something is, fp16, of three bits more, is nearer.
    """
    off = {}
    for precision, eps in EPS.items():
        made = prepared(sixteen(precision, half))
        for name, networks in PASSES.items():
            true_loss, truth = truths[name]
            loss, found = gradients(made, name)
            layers = sum(LAYERS[letter] for letter in networks if letter in half)
            gradient_error = error(found, truth)
            loss_error = float((loss - true_loss).abs() / true_loss.abs().clamp(min=0.1))
            twice = 2 if name in ("Greg", "Dreg") else 1
            bound = twice * (0.13 * layers**1.5 * eps) ** 0.5
            loss_bound = eps * layers**0.5 if twice == 1 else bound
            shown = f"gradient {gradient_error:.1e} of {bound:.1e}, loss {loss_error:.1e} of {loss_bound:.1e}"
            print(f"{precision} {half:<2} {name:<5} {shown}")
            assert gradient_error <= bound and loss_error <= loss_bound
            assert gradient_error > eps / 16 if layers else gradient_error == loss_error == 0
            off[precision, name] = gradient_error
    assert all(off["bf16", name] > 2 * off["fp16", name] or off["bf16", name] == 0 for name in PASSES)


# ---- the range of fp16


class Watched(TorchDispatchMode):
    """Looks at the fp16 gradients of convolutions that `torch.autograd.grad` makes: how many values are zero, below the
    smallest normal, and infinite.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts, real = torch.zeros(4), torch.autograd.grad

        def grad(*args, **kwargs):
            with self:
                return real(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", grad)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else [out]:
            if "convolution" in func.name() and x is not None and x.dtype == torch.float16:
                size = x.float().abs()
                found = (size.numel(), (size == 0).sum(), (size < SMALLEST_NORMAL).sum(), (~size.isfinite()).sum())
                self.counts += torch.tensor([float(n) for n in found])
        return out

    def shares(self) -> tuple[float, float, float]:
        total, zero, small, infinite = self.counts.tolist()
        return zero / total, (small - zero) / total, infinite / total


def large(precision: str) -> Recipe:
    widths = {"num_fp16_res": 4, "conv_clamp": 256.0, "mapping_layers": 2,
              "lr": 0.002}  # fmt: skip
    return Recipe.model_validate({
        "run_dir": "none", "kimg": 1.0, "batch": 32, "seed": 3, "accumulation": 16,
        "precision": precision, "data": {"builtin": "digits", "resolution": 256, "channels": 1},
        "generator": {"z_dim": 32, "w_dim": 32, "channel_base": 1024, "channel_max": 16, **widths},
        "discriminator": {"mbstd_group_size": 2, "channel_base": 2048, "channel_max": 16, **widths},
        "adam": {}, "r1": {"gamma": 1.0}, "path_length": {}, "ema": {"kimg": 1.0},
    })  # fmt: skip


@pytest.fixture(scope="module")
def at_256():
    """Two of the 32 images of a step at 256²; in path length, which works on half a batch, of 16."""
    return {precision: prepared(large(precision)) for precision in ("fp32", "fp16")}


@pytest.mark.parametrize("name", PASSES)
def test_the_loss_scale_stands_where_it_brings_fp16_nearer_to_fp32(at_256, name, monkeypatch):
    """Under a scale of 2¹² next to nothing is below fp16's range, and rounding is the same: what another scale changes
    is what it loses to the range. -s prints it, and the distance from fp32.
    """
    _, truth = gradients(at_256["fp32"], name)
    assert all(phase.scale == 1 for phase in at_256["fp32"][1])
    (phase,) = [phase for phase in at_256["fp16"][1] if phase.name == name]
    assert phase.scale == (256 if name in ("Gmain", "Dmain") else 1)
    found, shares = {}, {}
    for scale in (1, 2**8, 2**12):
        monkeypatch.setattr(phase, "scale", float(scale))
        with monkeypatch.context() as patch:
            watched = Watched(patch)
            _, found[scale] = gradients(at_256["fp16"], name)
        shares[scale] = watched.shares()
    off = {scale: error(gradient, truth) for scale, gradient in found.items()}
    lost = {scale: error(gradient, found[2**12]) for scale, gradient in found.items()}
    for scale, (zero, subnormal, infinite) in shares.items():
        values = f"zero {zero:.1%}, subnormal {subnormal:.1%}"
        print(f"{name} at 256², scale {scale}: {values}; lost {lost[scale]:.1e}, off fp32 by {off[scale]:.1e}")
        assert infinite == 0
    if name == "Greg":
        assert lost[1] < 4 * EPS["fp16"]
    else:
        assert lost[1] > 16 * EPS["fp16"] and lost[2**8] < lost[1] / 2
    assert (off[2**8] < off[1] / 2) == (name in ("Gmain", "Dmain"))


def test_the_loss_scale_rounds_nothing():
    """With no resolution in half precision a recipe of fp16 has fp32's bits."""
    settings = sixteen("fp16", "").model_copy(update={"hsr": None})
    made, whole = prepared(settings), prepared(settings.model_copy(update={"precision": "fp32"}))
    assert {phase.scale for phase in made[1]} == {1, 256}
    for name in PASSES:
        (loss, found), (true_loss, truth) = gradients(made, name), gradients(whole, name)
        assert torch.equal(loss, true_loss) and all(torch.equal(found[key], value) for key, value in truth.items())


# ---- casts


class Casts(TorchDispatchMode):
    """Counts the weights that are cast to half precision, and those that are normalised for fp16, by their sizes."""

    def __init__(self):
        super().__init__()
        self.cast, self.normalized = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        casts = (torch.ops.aten._to_copy.default, torch.ops.aten.mul.out)  # the second: scaled and cast at once
        into = self.cast if func in casts else self.normalized if func == torch.ops.aten.amax.default else None
        if into is not None and args[0].shape[2:] in ((1, 1), (3, 3)):
            into[sizes(args[0])] += func == torch.ops.aten.amax.default or out.itemsize < args[0].itemsize
        return out


def sizes(weight: torch.Tensor) -> tuple[int, ...]:
    """In order: an up-convolution's weight is cast transposed."""
    return tuple(sorted(weight.shape))


def weights(net: torch.nn.Module, *kinds: type) -> Counter:
    """Sizes of the weights that meet half-precision activations."""
    blocks = [block for block in net.modules() if getattr(block, "half_dtype", None)]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, kinds)]
    return Counter(sizes(layer.weight) for layer in layers)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", EPS)
def test_a_step_casts_each_weight_once_a_phase_and_round(precision, accumulation):
    """R1 and path length take their second derivatives with what the forward pass has cast."""
    t, all_phases, reals = prepared(small_recipe(precision=precision, accumulation=accumulation, hsr=None))
    modulated, in_g, in_d = (weights(net.module, *kinds) for net, *kinds in (
        (t.g, SynthesisLayer), (t.g, SynthesisLayer, ToRGB), (t.d, Conv)))  # fmt: skip
    assert modulated.total() == LAYERS["G"] and in_d.total() == LAYERS["D"] + 2  # and two skips
    for phase in all_phases:
        with Casts() as casts:
            run_phase(phase, t, 0, reals, torch.zeros(len(reals), 0))
        used = [net for letter, net in (("G", in_g), ("D", in_d)) if letter in PASSES[phase.name]]
        assert casts.cast == sum(used * accumulation, Counter()), phase.name
        used = [modulated] if precision == "fp16" and "G" in PASSES[phase.name] else []
        assert casts.normalized == sum(used * accumulation, Counter()), phase.name


# ---- ten times the learning rate


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


def count_steps(file: str, scale: float | None = None) -> None:
    """Count the steps that are not finite, independently of the run; scale: fp16's, in place of its own."""
    real, counts = distributed.Sharded.step, {"G": 0, "D": 0, "steps": 0}

    def step(net, found, loss):
        bad = not loss.isfinite() or any(g is not None and not g.isfinite().all() for g in found)
        counts["G" if net.names[0].startswith("generator") else "D"] += bad
        counts["steps"] += 1
        Path(file).write_text(json.dumps(counts))
        real(net, found, loss)

    distributed.Sharded.step = step
    if scale:
        phases.Main.fp16_scale = scale


def trained(workspace: Path, name: str, precision: str, steps: int, **plant) -> tuple[dict, dict, dict]:
    """Independent counts, the log's counts, and the last parameters and averages."""
    options = ("batch=4", f"kimg={steps * 0.004}", "tick_kimg=0.4", "checkpoint_kimg=100", "path_length.interval=4",
               "r1.interval=8", "faults.max_nonfinite=1", "generator.lr=0.02", "discriminator.lr=0.02")  # fmt: skip
    plant = partial(count_steps, f"{name}.json", **plant)
    forked.train(workspace, f"run_dir={name}", f"precision={precision}", *options, plant=plant)
    counts = json.loads((workspace / f"{name}.json").read_text())
    assert counts.pop("steps") == steps * 2 + steps // 4 + steps // 8
    rows = [json.loads(line) for line in (workspace / name / "log.jsonl").read_text().splitlines()]
    logged = {net: sum(row.get(f"nonfinite/{net}", 0) for row in rows) for net in counts}
    said = [row["text"][0] for row in rows if row.get("event") == "nonfinite"]
    assert set(said) == {net for net, count in logged.items() if count}
    (checkpoint,) = (workspace / name / "checkpoints").glob("[0-9]*")
    values = {f"{f.stem}/{k}": v for f in checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}
    return counts, logged, values


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=forked.only_if_all), "bf16", "fp16"])
def test_two_hundred_steps_at_ten_times_the_learning_rate_hide_nothing(workspace, precision):
    counts, logged, values = trained(workspace, precision, precision, 200)
    print(f"{precision}: {counts['G']} and {counts['D']} steps of G and D were not finite")
    assert logged == counts
    assert all(value.isfinite().all() for value in values.values()) and len(values) > 100


def test_gradients_beyond_fp16_are_counted_and_change_nothing(workspace):
    """A loss scale of 2⁴⁰ makes every gradient of fp16 of the main phases infinite."""
    counts, logged, values = trained(workspace, "overflow", "fp16", 16, scale=2.0**40)
    assert logged == counts == {"G": 16, "D": 16}
    assert all(value.isfinite().all() for value in values.values())
