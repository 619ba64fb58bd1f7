"""Augmentation in training: D alone sees it, R1 goes through it, p follows D, however a run is split or killed."""

import json
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from test_graphs import DIGITS, HSR, recipe
from torch import nn

from hsrgan.engine import augment_geometry, diffaugment
from hsrgan.engine.augment import Augmentation, Pipe
from hsrgan.engine.config import Recipe
from hsrgan.engine.distributed import World
from hsrgan.engine.draws import Draws
from hsrgan.engine.phases import DReg, build_phases, rounds, run_phase
from hsrgan.engine.run_state import Training
from hsrgan.engine.sections import AUGMENT_DEFAULTS, PIPES
from hsrgan.engine.stats import read_log
from hsrgan.engine.teacher import load_teacher
from hsrgan.tools.plain_training import plain_training, run_step

CPU = torch.device("cpu")
MODES = {
    "none": None,
    "ada": {**AUGMENT_DEFAULTS["ada"], "mode": "ada", "kimg": 0.1},  # p moves by 8·4 / 100 = .32
    "fixed": {"mode": "fixed", "pipe": "bgcfnc", "p": 1.0},
    "diffaugment": {"mode": "diffaugment", "policy": "color,translation,cutout"},
}


def training(augment: dict | None, num_classes: int = 3, **changes) -> Training:
    settings = recipe(augment=augment, **{"hsr": None, **changes})
    teachers = {"hsr": load_teacher(str(DIGITS), layers=HSR["layers"])} if settings.hsr else {}
    return plain_training(settings, CPU, teachers, num_classes)


def batch_of(seed: int = 5, num_classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    reals = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return reals.to(memory_format=torch.channels_last), torch.eye(3)[torch.arange(8) % 3, :num_classes]


class Spied(nn.Module):
    """D, and what it was shown."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.shown = module, []

    def forward(self, images, *args, **kwargs):
        self.shown.append(images.detach().clone())
        return self.module(images, *args, **kwargs)


def seen(mode: str) -> dict[str, tuple[torch.Tensor, list]]:
    """What each phase shows D in its first round, and its gradients."""
    t = training(MODES[mode])
    found = {}
    for phase in build_phases(t):
        if phase.name == "Greg":
            continue
        t.d.module = spied = Spied(t.d.module)
        (batch,) = rounds(phase, t, 0, *batch_of())
        gradients, _ = phase.gradients(batch)
        t.d.module = spied.module
        found[phase.name] = spied.shown[0], [g for g in gradients if g is not None]
    return found


@pytest.fixture(scope="module")
def plain() -> dict:
    return seen("none")


@pytest.mark.parametrize("mode", ["fixed", "diffaugment"])
def test_d_sees_other_images_in_every_phase(plain, mode):
    """Every image, fakes and reals, and all gradients that they make."""
    for name, (images, gradients) in seen(mode).items():
        before, expected = plain[name]
        assert images.shape == before.shape and images.is_contiguous(memory_format=torch.channels_last)
        assert ((images - before).abs().amax((1, 2, 3)) > 1e-2).all(), name
        difference = sum((a - b).square().sum() for a, b in zip(gradients, expected, strict=True)) ** 0.5
        assert difference > 1e-2 * sum(b.square().sum() for b in expected) ** 0.5, name


def test_ada_begins_with_the_images_as_they_are(plain):
    for name, (images, gradients) in seen("ada").items():
        before, expected = plain[name]
        assert (images - before).abs().max() < 1e-4
        difference = sum((a - b).square().sum() for a, b in zip(gradients, expected, strict=True)) ** 0.5
        assert difference < 1e-2 * sum(b.square().sum() for b in expected) ** 0.5  # D computes in half precision


def test_reals_and_fakes_and_phases_are_augmented_apart():
    """Each from draws of its own; Dmain's reals are not moved as its fakes, nor as Dreg's."""
    t = training(MODES["fixed"])
    drawn = {phase.name: next(rounds(phase, t, 0, *batch_of())).augment for phase in build_phases(t)}
    assert drawn["Greg"] is None and len(drawn["Dmain"]) == 16
    parts = [drawn["Gmain"], *drawn["Dmain"].split(8), drawn["Dreg"]]
    assert all((a != b).all() for k, a in enumerate(parts) for b in parts[k + 1 :])


def test_hsr_sees_the_fake_as_it_is(monkeypatch):
    t = training(MODES["fixed"], hsr={**HSR, "start_kimg": 0.0, "ramp_kimg": 0.0})
    shown, made = [], []
    t.teachers["hsr"].register_forward_pre_hook(lambda module, args: shown.append(args[0].detach()))
    t.generator.synthesis.register_forward_hook(lambda module, args, out: made.append(out[0].detach()))
    t.d.module = spied = Spied(t.d.module)
    phase = build_phases(t)[0]
    (batch,) = rounds(phase, t, 0, *batch_of())
    phase.gradients(batch)
    assert torch.equal(shown[0], made[0])
    assert ((spied.shown[0] - made[0]).abs().amax((1, 2, 3)) > 1e-2).all()


def test_r1_is_of_the_image_before_the_augmentation():
    """For D(x) = ⟨w, x⟩ the gradient is Aᵀw, read off A's images of the unit vectors; and it can be differentiated."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3 * 64, generator=torch.Generator().manual_seed(0)))

        def forward(self, x, c):
            return x.flatten(1) @ self.w[:, None]

    data = {"builtin": "digits", "resolution": 8, "channels": 3}
    t = training({"mode": "fixed", "pipe": "bgcfnc", "p": 1.0}, data=data)
    t.d.module = d = Linear()
    (batch,) = rounds(DReg(t), t, 0, torch.rand(8, 3, 8, 8), torch.zeros(8, 3))
    penalty, _ = DReg(t).loss(batch)
    (slope,) = torch.autograd.grad(penalty, d.w)
    total, direct = 0.0, d.w.detach().clone().requires_grad_()
    units = torch.eye(3 * 64).view(-1, 3, 8, 8)
    for row in range(8):
        many = type(batch)(augment=batch.augment[row].expand(192, -1), augment_p=batch.augment_p,
                           augment_noise=batch.augment_noise[row].expand(192, -1, -1, -1))  # fmt: skip
        nothing = t.augmented(torch.zeros_like(units), many)
        matrix = (t.augmented(units, many) - nothing).flatten(1)  # its row k is A's image of unit vector k
        total = total + (matrix @ direct).square().sum() / 8 / 2
    assert penalty.item() == pytest.approx(total.item(), rel=1e-4)
    (expected,) = torch.autograd.grad(total, direct)
    assert (slope - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", "cutout,color"])
def test_a_policy_is_what_it_names_in_its_order(policy):
    t = training({"mode": "diffaugment", "policy": policy})
    (batch,) = rounds(DReg(t), t, 0, *batch_of())
    expected = batch.reals
    for name in policy.split(","):
        expected = diffaugment.POLICY[name](expected, batch.augment)
    assert torch.equal(t.augmented(batch.reals, batch), expected) and not torch.equal(expected, batch.reals)


@pytest.mark.parametrize("pipe", PIPES)
def test_a_pipe_is_what_the_recipe_names(pipe):
    t = training({"mode": "fixed", "pipe": pipe, "p": 0.7})
    (batch,) = rounds(DReg(t), t, 0, *batch_of())
    numbers = batch.augment, torch.tensor(0.7), batch.augment_noise
    assert torch.equal(t.augmented(batch.reals, batch), Pipe(pipe, CPU)(batch.reals, *numbers))
    assert (batch.augment_noise is None) == ("noise" not in PIPES[pipe])  # a field as large as the image


def test_the_generators_gradient_keeps_its_memory_format():
    t = training(MODES["fixed"])
    (batch,) = rounds(build_phases(t)[0], t, 0, *batch_of())
    x = torch.rand(8, 1, 16, 16).expand(8, 3, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    batch = type(batch)(augment=batch.augment, augment_p=batch.augment_p, augment_noise=torch.zeros_like(x))
    (gradient,) = torch.autograd.grad(t.augmented(x, batch).square().sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


# p


def confident(t: Training, side: float) -> None:
    """Unconditional D says `side` of everything."""
    with torch.no_grad():
        for parameter in t.d.module.parameters():
            parameter.zero_()
        t.d.module.b4.out.bias.fill_(side)


def steps(t: Training, count: int) -> list[float]:
    """p after each step, D's parameters held."""
    phases, found = [phase for phase in build_phases(t) if phase.network == "D"], []
    state = {key: value.clone() for key, value in t.d.module.state_dict().items()}
    for step in range(count):
        run_step(t, phases, step * 8, *batch_of(step, 0))
        t.d.module.load_state_dict(state)
        found.append(round(t.augment.p.item(), 6))
    return found


def test_p_rises_while_d_is_sure_of_reals_and_falls_when_it_is_not():
    t = training(MODES["ada"], 0)
    confident(t, 3.0)
    assert steps(t, 17) == [0, 0, 0, *[0.32] * 4, *[0.64] * 4, *[0.96] * 4, 1.0, 1.0]  # and no further than 1
    assert next(rounds(build_phases(t)[0], t, 0, *batch_of(0, 0))).augment_p == 1  # what the next step is made with
    confident(t, -3.0)
    assert steps(t, 4)[-1] == 0.68
    means = t.meter.collect()
    assert means["augment/sign"] == pytest.approx((17 + 9 - 4 - 2) / 32)  # Dreg in every other step
    assert t.augment.told() == {"augment/p": pytest.approx(0.68)}


def test_p_follows_the_mean_over_main_and_lazy_reals():
    """Sums of signs decide, against the target times their number: 5 of 8 up is a mean of .25."""
    settings = {**MODES["ada"], "interval": 1, "kimg": 1.0}
    for target, up, expected in ((0.2, 5, 0.508), (0.3, 5, 0.492), (0.25, 5, 0.5)):
        t = training({**settings, "target": target, "p": 0.5})
        signs = torch.ones(8, 1)
        signs[up:] = -1
        t.augment.hear(signs[:3])
        t.augment.hear(signs[3:])
        t.augment.settle(torch.tensor(False))
        t.augment.adapt(0)
        assert t.augment.p.item() == pytest.approx(expected)
        t.augment.adapt(1)  # nothing heard since
        assert t.augment.p.item() == pytest.approx(expected)


def test_p_follows_how_far_reals_are_above_fakes_where_the_loss_compares_them():
    """What a relativistic D gives to everything alike is left open by its loss: p must not follow it."""
    t = training({**MODES["ada"], "interval": 1}, 0, objective={"loss": "relativistic"})
    signs = []
    for level in (0.0, 100.0, -100.0):
        with torch.no_grad():
            t.d.module.b4.out.bias.fill_(level)
        phases = {phase.name: phase for phase in build_phases(t)}
        (batch,) = rounds(phases["Dmain"], t, 0, *batch_of(0, 0))
        told = phases["Dmain"].loss(batch)[1].means
        assert torch.equal(told["augment/sign"], (told["score/real"] - told["score/fake_d"]).sign())
        signs.append(told["augment/sign"].flatten().tolist())
        (batch,) = rounds(phases["Dreg"], t, 0, *batch_of(0, 0))
        assert "augment/sign" not in phases["Dreg"].loss(batch)[1].means  # no fake to compare with
    assert signs[0] == signs[1] == signs[2]


def test_a_step_that_is_not_finite_does_not_move_p():
    t = training({**MODES["ada"], "interval": 1, "p": 0.5}, 0)
    confident(t, 3.0)
    phase = next(phase for phase in build_phases(t) if phase.name == "Dmain")
    reals, labels = batch_of(0, 0)
    run_phase(phase, t, 0, torch.full_like(reals, torch.nan), labels)
    assert t.augment.state()["signs"] == [0, 0]
    t.augment.adapt(0)
    assert t.augment.p == 0.5
    run_phase(phase, t, 0, reals, labels)
    assert t.augment.state()["signs"] == [8, 8]
    t.augment.adapt(1)
    assert t.augment.p > 0.5


def test_other_modes_adapt_nothing():
    t = training({**MODES["fixed"], "p": 0.3}, 0)
    confident(t, 3.0)
    assert set(steps(t, 5)) == {0.3} and t.augment.state() == {}
    t.augment.take_up({"p": 0.9, "signs": [1, 1]})  # of a run that had adapted it
    assert t.augment.p.item() == pytest.approx(0.3)


def test_state_goes_on_and_counts_once_over_ranks():
    def augmentation(rank: int) -> Augmentation:
        settings: Recipe = recipe(augment=MODES["ada"])
        return Augmentation(settings, Draws(0, CPU), World(rank, 2, rank, 2, CPU), CPU)

    first, second = augmentation(0), augmentation(1)
    for a in (first, second):
        a.take_up(json.loads(json.dumps({"p": 0.1 + 0.2, "signs": [5.0, 8.0]})))
        assert a.p == torch.tensor(0.1 + 0.2)
    assert (first._signs + second._signs).tolist() == [5, 8]
    first.take_up({})  # of a run without: the recipe's
    assert first.p == torch.tensor(0.1 + 0.2)


# Whole runs

ADA = "augment={mode: ada, pipe: bgcfnc, kimg: 0.1, interval: 3, p: 0.5, target: 0.3}"  # p moves by .24


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("augmented")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


def state(run: Path) -> dict:
    return json.loads(sorted((run / "checkpoints").glob("[0-9]*"))[-1].joinpath("state.json").read_text())


def networks(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("[0-9]*"))[-1]
    return {f"{file.stem}/{k}": v for file in newest.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def reference(workspace) -> Path:
    forked.train(workspace, "run_dir=reference", ADA, "checkpoint_kimg=0.064", "image_kimg=0.032")
    return workspace / "reference"


def test_a_run_tells_of_its_augmentation(workspace, reference):
    rows = [row for row in read_log(reference / "log.jsonl") if "event" not in row]
    ps = [row["augment/p"] for row in rows]
    moved = [round(abs(b - a), 4) for a, b in zip([0.5, *ps[:-1]], ps, strict=True)]
    assert moved == [0, 0.24, 0.24, 0]  # steps 3 and 6 move it; a row is two steps
    assert all(-1 <= row["augment/sign"] <= 1 for row in rows)
    assert (reference / "samples" / "augmented.png").stat().st_size > 500
    assert state(reference)["augment"]["p"] == ps[-1] and state(reference)["augment"]["signs"][1] == 24  # steps 6, 7

    forked.train(workspace, "run_dir=without", "checkpoint_kimg=0.064")
    without = networks(workspace / "without")
    assert state(workspace / "without")["augment"] == {}
    assert any((value - without[key]).norm() > 0.1 * value.norm() for key, value in networks(reference).items())


def test_p_and_networks_survive_a_stop_bitwise(workspace, reference):
    """At step 5 of 8, between two moves."""
    forked.train(workspace, "run_dir=stopped", ADA, "kimg=0.04")
    assert state(workspace / "stopped")["augment"]["signs"][1] > 0
    assert "resuming" in forked.train(workspace, "run_dir=stopped", ADA, "kimg=0.064")
    first, second = networks(reference), networks(workspace / "stopped")
    assert first.keys() == second.keys() and not [key for key in first if not torch.equal(first[key], second[key])]
    assert state(workspace / "stopped")["augment"] == state(reference)["augment"]


@pytest.mark.parametrize(("ranks", "accumulation", "stage"), [(1, 2, 0), (2, 1, 2)])
def test_every_split_has_the_same_p_and_networks(workspace, reference, ranks, accumulation, stage):
    name = f"split-{ranks}-{accumulation}"
    forked.train(workspace, f"run_dir={name}", ADA, f"accumulation={accumulation}", f"zero_stage={stage}",
                 "checkpoint_kimg=0.064", ranks=ranks)  # fmt: skip
    assert state(workspace / name)["augment"] == state(reference)["augment"]
    first, second = networks(workspace / name), networks(reference)
    for part in ("G/", "D/", "G_ema/"):
        keys = [k for k in second if k.startswith(part) and not k.endswith(("noise_const", "resample_filter"))]
        error = sum((first[k].double() - second[k].double()).square().sum() for k in keys)
        assert (error / sum(second[k].double().square().sum() for k in keys)) ** 0.5 < 1e-5


def test_the_whole_warp_is_recorded_at_one_size():
    """No shape follows from what was drawn."""
    x, h = torch.rand(2, 1, 8, 8), augment_geometry.low_pass()
    shapes = []
    for angle in (0.0, 0.7):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.shape) or t, lambda t: t):
            augment_geometry.warp(x.requires_grad_(), augment_geometry.rotation(torch.full((2,), angle)), h)
        shapes.append(seen)
    assert shapes[0] == shapes[1] and shapes[0]
