"""That each objective of a recipe trains what it should, however the work is split."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from test_graphs import CPU, CRITICS, DIGITS, HSR, R3GAN, recipe
from test_training import last_checkpoint, relative_difference, tensors, train

from hsrgan.engine import teacher as teacher_module
from hsrgan.engine.assembly import critic_heads, load_teachers
from hsrgan.engine.config import load_recipe
from hsrgan.engine.errors import UserError
from hsrgan.engine.losses import ADVERSARIAL
from hsrgan.engine.objectives import Critic, discriminator_loss, generator_loss
from hsrgan.engine.phases import build_phases, rounds, run_phase
from hsrgan.engine.teacher import Teacher, load_teacher
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools.plain_training import plain_training, run_step


def f64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Critics


def test_losses_are_sums_over_critics_and_their_levels():
    logits = [f64(8, k, seed=k) for k in (1, 3, 5)]  # four fakes, four reals
    first = Critic("", lambda x, c, parts: (logits[0][: len(x)],), ADVERSARIAL["logistic"])
    other = Critic("_b", lambda x, c, parts: (logits[1][: len(x)], logits[2][: len(x)]), ADVERSARIAL["hinge"], 0.5)
    images, c = torch.zeros(8, 1), torch.zeros(8, 0)
    loss, told = discriminator_loss([first, other], images, c)
    fake, real = zip(*(x.chunk(2) for x in logits), strict=True)
    hinge = sum((1 + f).clamp(min=0).mean() for f in fake[1:]) + sum((1 - r).clamp(min=0).mean() for r in real[1:])
    logistic = (1 + fake[0].exp()).log().mean() + (1 + (-real[0]).exp()).log().mean()
    torch.testing.assert_close(loss, logistic + 0.5 * hinge)
    torch.testing.assert_close([told["loss/D"], told["loss/D_b"]], [logistic, hinge])
    assert told["score/real_b"].sum() == pytest.approx(float(real[1].sum() + real[2].sum()))
    loss, told = generator_loss([first, other], images[:4], c[:4])
    torch.testing.assert_close(told["loss/G_b"], -fake[1].mean() - fake[2].mean())
    torch.testing.assert_close(loss, (1 + (-fake[0]).exp()).log().mean() + 0.5 * told["loss/G_b"])


def test_a_paired_loss_compares_in_d_and_g_and_reals_are_constants_to_g():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = f64(6, 1)
    critic = Critic("", lambda images, c, parts: (images * weight,), ADVERSARIAL["relativistic"])
    apart = x[:3] - x[3:]
    loss, _ = discriminator_loss([critic], x, torch.zeros(6, 0))
    torch.testing.assert_close(loss, (1 + apart.exp()).log().mean())
    loss, _ = generator_loss([critic], x, torch.zeros(6, 0))
    torch.testing.assert_close(loss, (1 + (-apart).exp()).log().mean())
    (gradient,) = torch.autograd.grad(loss, weight)  # of D(G(z)) alone
    torch.testing.assert_close(gradient, (-torch.sigmoid(-apart) * x[:3]).mean())


# Teachers


def test_load_teacher_is_what_the_recipe_loads():
    """`load_teacher` alone and `load_teachers` give the same maps."""
    img = torch.rand(1, 1, 16, 16) * 2 - 1
    for layer, found in load_teachers(recipe(**CRITICS))["projected"](img).items():
        torch.testing.assert_close(found, load_teacher(str(DIGITS), layers={layer: layer})(img)[layer], rtol=0, atol=0)


def test_sections_that_name_the_same_teacher_share_its_network(monkeypatch, tmp_path):
    reads, read = [], teacher_module.read_teacher_file
    monkeypatch.setattr(teacher_module, "read_teacher_file", lambda path: reads.append(path) or read(path))
    teachers = load_teachers(recipe(**CRITICS))
    assert len(reads) == 1 and len({id(teacher.net) for teacher in teachers.values()}) == 1
    assert [list(teacher.grids) for teacher in teachers.values()] == [[8, 16], [1, 3], [0, 2]]
    other = shutil.copy(DIGITS, tmp_path / "other.safetensors")
    teachers = load_teachers(recipe(projected=CRITICS["projected"] | {"teacher": str(other)}))
    assert len(reads) == 3 and teachers["hsr"].net is not teachers["projected"].net


def test_teachers_that_cannot_judge_are_refused_by_the_sections_name():
    with pytest.raises(UserError, match=r"^projected\.layers: .*0 to 3"):
        load_teachers(recipe(projected=CRITICS["projected"] | {"layers": [9]}))
    with pytest.raises(UserError, match=r"^model 'no_such_net' is neither"):
        load_teachers(recipe(vision_aided=CRITICS["vision_aided"] | {"teacher": "no_such_net"}))
    net = timm.create_model("resnet10t", channels=(8, 8, 8, 8))
    with pytest.raises(UserError, match=r"layer 4 of .* has a map of 1×1"):
        critic_heads(recipe(projected=CRITICS["projected"]),
                     {"projected": Teacher(net, {4: 4}, (32, 32), (0.5,) * 3, (0.5,) * 3)}, 0)
    with pytest.raises(UserError, match=r"^projected\.teacher: timm gives no feature maps of Linear"):
        Teacher(torch.nn.Linear(1, 1), {0: 0}, (1, 1), (0.5,), (0.5,), section="projected")


# Training


def training(**changes):
    settings = recipe(**{"hsr": None, **changes})
    t = plain_training(settings, CPU, load_teachers(settings), num_classes=3)
    return t, {phase.name: phase for phase in build_phases(t)}


def batch_of(t, phase, images: int = 0):
    generator = torch.Generator().manual_seed(5)
    reals = torch.rand(8, 1, 16, 16, generator=generator).to(memory_format=torch.channels_last) * 2 - 1
    return next(rounds(phase, t, images, reals, torch.eye(3)[torch.arange(8) % 3]))


def gradients(phase_name: str, **changes) -> dict[str, torch.Tensor]:
    """A phase's gradients by name, of networks that are the same in every call; zero where there is none."""
    t, phases = training(**changes)
    phase = phases[phase_name]
    net, other = (t.g, t.d) if phase.network == "G" else (t.d, t.g)
    other.module.requires_grad_(False)
    found, _ = phase.gradients(batch_of(t, phase))
    named = zip(net.module.named_parameters(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}


def difference(a: dict, b: dict) -> float:
    """‖a − b‖ / ‖b‖ over the names of b."""
    both = [(a[name].double(), value.double()) for name, value in b.items()]
    return float(sum((x - y).square().sum() for x, y in both) / sum(y.square().sum() for _, y in both)) ** 0.5


@pytest.fixture(scope="module")
def default():
    return {phase: gradients(phase) for phase in ("Gmain", "Dmain", "Dreg")}


def one(name: str, **keys):
    return {name: CRITICS[name] | keys}


OPTIONS = {  # keys → the main phases whose gradient by D's trunk and by G they change
    "hinge": ({"objective": {"loss": "hinge"}}, {"Gmain", "Dmain"}),
    "relativistic": ({"objective": {"loss": "relativistic"}}, {"Gmain", "Dmain"}),
    "projected": (one("projected"), {"Gmain"}),
    "vision_aided": (one("vision_aided"), {"Gmain"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_objective_changes_what_it_should_and_trains_its_heads(default, option):
    changes, changed = OPTIONS[option]
    for phase in ("Gmain", "Dmain", "Dreg"):
        found = gradients(phase, **changes)
        apart = difference(found, default[phase])
        assert apart > 1e-3 if phase in changed else apart < 1e-6, (phase, apart)
        heads = {name: g for name, g in found.items() if name.startswith(("projected", "vision_aided"))}
        assert bool(heads) == (option in CRITICS and phase != "Gmain")
        assert all((g.abs().sum() > 0) == (phase == "Dmain") for g in heads.values())


def test_terms_add_up_with_their_weights():
    """Gmain's gradient is linear in the weights of HSR and of both critics, all there at once."""

    def weighed(hsr: float, first: float, second: float) -> dict[str, torch.Tensor]:
        of_hsr = {"hsr": HSR | {"start_kimg": 0.0, "ramp_kimg": 0.0, "weight": hsr}}
        return gradients("Gmain", **of_hsr, **one("projected", weight=first), **one("vision_aided", weight=second))

    base, *doubled = (weighed(*w) for w in ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 2.0)))
    assert all(difference(more, base) > 1e-2 for more in doubled)
    want = {name: g - 0.5 * (doubled[0][name] - g) + 2 * (doubled[1][name] - g) + 3 * (doubled[2][name] - g)
            for name, g in base.items()}  # fmt: skip
    assert difference(weighed(0.5, 3.0, 4.0), want) < 1e-5


@pytest.mark.parametrize(("name", "keys"), [
    ("projected", {"layers": [0, 3]}), ("projected", {"channels": 8}), ("vision_aided", {"layers": [2]}),
    ("vision_aided", {"hidden": 16}), ("projected", {"weight": 2.0}), ("vision_aided", {"weight": 2.0}),
], ids=str)  # fmt: skip
def test_keys_of_the_heads_do_something(name, keys):
    assert difference(gradients("Gmain", **one(name, **keys)), gradients("Gmain", **one(name))) > 1e-3


@pytest.mark.parametrize(("section", "override"), [
    ("hsr", "hsr.weight=0"), *((name, f"{name}={json.dumps({**CRITICS[name], 'weight': 0})}") for name in CRITICS),
])  # fmt: skip
def test_a_weight_of_zero_is_no_way_to_switch_a_section_off(section, override):
    with pytest.raises(UserError) as refused:
        load_recipe(DIGITS.with_name("quickstart.yaml"), [override])
    says = f"{section}.weight is 0, allowed: a number above 0; to train without it set the section to null"
    assert says in str(refused.value)


def test_a_lazy_phase_of_weight_or_interval_zero_is_left_out():
    for off in ({"gamma": 0.0}, {"gamma": 1.0, "interval": 0}):
        assert list(training(r1=off)[1]) == ["Gmain", "Greg", "Dmain"]
    for off in ({"weight": 0.0}, {"interval": 0}):
        assert list(training(path_length=off)[1]) == ["Gmain", "Dmain", "Dreg"]


def test_r2_is_r1_of_fakes_and_d_alone_learns_from_it():
    t, phases = training(r2={"gamma": 3.0, "interval": 2}, **one("projected"))
    assert list(phases) == ["Gmain", "Greg", "Dmain", "Dreg", "Dr2"] and "Dr2" not in training()[1]
    phase = phases["Dr2"]
    t.g.module.requires_grad_(False)
    batch = batch_of(t, phase)
    found, told = phase.gradients(batch)
    fakes = t.generator.synthesis(t.styles(batch), noise=batch.noise).detach().requires_grad_()
    (slope,) = torch.autograd.grad(t.discriminator(fakes, batch.c).sum(), fakes)
    assert told.means["loss/r2"].item() == pytest.approx(1.5 * float(slope.square().sum() / 8), rel=1e-5)
    assert told.loss.item() == pytest.approx(2 * told.means["loss/r2"].item(), rel=1e-6)  # lazily, × interval
    names = [name for name, _ in t.d.module.named_parameters()]
    learns = {name for name, g in zip(names, found, strict=True) if g is not None and g.abs().sum() > 0}
    assert "b16.conv0.weight" in learns and not any(name.startswith("projected") for name in learns)


def test_d_shares_its_rate_among_all_its_phases():
    rate = lambda **keys: training(**keys)[0].d.optimizer.param_groups[0]["lr"]  # noqa: E731
    assert rate() == 0.002 * (2 / 3)  # of Dmain and R1's every other step
    assert rate(r2={"gamma": 1.0, "interval": 2}) == pytest.approx(0.002 / 2)
    assert rate(r2={"gamma": 1.0, "interval": 1}, r1={"gamma": 1.0, "interval": 1}) == pytest.approx(0.002 / 3)
    assert rate(r2={"gamma": 1.0, "interval": 4}, r1={"gamma": 1.0, "interval": 0}) == pytest.approx(0.002 * 4 / 5)


@pytest.mark.parametrize("phase", ["Gmain", "Dmain"])
def test_pairs_share_the_reals_label(phase):
    for loss in ADVERSARIAL:
        t, phases = training(objective={"loss": loss})
        batch = batch_of(t, phases[phase])
        assert (batch.reals is None) == (phase == "Gmain" and loss != "relativistic")
        same = batch.real_c is not None and torch.equal(batch.c, batch.real_c)
        assert same == (loss == "relativistic") and batch.c.sum() == 8


@pytest.mark.parametrize("decay", [0.25, 1.0])
def test_the_recipes_decay_moves_the_mean_path_length(decay):
    t, phases = training(path_length={"interval": 1, "decay": decay})
    t.pl_mean.fill_(2.0)
    run_phase(phases["Greg"], t, 0, torch.zeros(8, 1, 16, 16), torch.zeros(8, 3))
    mean = t.meter.collect()["path_length"]
    assert mean < 1.5 and t.pl_mean.item() == pytest.approx(2.0 + decay * (mean - 2.0), rel=1e-5)


def test_any_split_gives_the_same_networks():
    """Four steps with everything on, in one round and in two."""
    hsr = HSR | {"start_kimg": 0.0}
    states = []
    for accumulation in (1, 2):
        t, phases = training(accumulation=accumulation, hsr=hsr, **CRITICS, **R3GAN)
        begun = {key: value.clone() for key, value in t.d.module.state_dict().items()}
        for step in range(4):
            reals = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
            run_step(t, phases.values(), step * 8, reals, torch.eye(3)[torch.arange(8) % 3])
        nets = {"G": t.g.module, "D": t.d.module}
        states.append({f"{name}.{key}": v for name, net in nets.items() for key, v in net.state_dict().items()})
        still = [key for key, value in begun.items() if torch.equal(value, states[-1][f"D.{key}"])]
        # a pair of one label cancels the logit's bias; a singular vector of one element has nowhere to go
        fixed = {key for key in still if key == "b4.out.bias" or key.endswith("resample_filter") or "mix_" in key}
        assert not [key for key in still if key not in fixed and len(begun[key]) > 1]
    assert difference(*states) < 1e-5


RECIPE = """
run_dir: run
seed: 1
kimg: 0.048           # 6 steps
batch: 8
precision: fp32
device: cpu
tick_kimg: 0.008
checkpoint_kimg: 0.024
image_kimg: 100.0
snapshot_kimg: 100.0
data: {builtin: digits, resolution: 16, channels: 1, labels: true, workers: 0}
generator: {z_dim: 8, w_dim: 8, mapping_layers: 1, channel_base: 64, channel_max: 8, lr: 0.002}
discriminator: {channel_base: 64, channel_max: 8, mbstd_group_size: 2, lr: 0.002, mapping_layers: 1}
objective: {loss: relativistic}
r1: {gamma: 1.0, interval: 2}
r2: {gamma: 1.0, interval: 2}
path_length: {interval: 4}
ema: {kimg: 0.5}
hsr: {teacher: TEACHER, layers: {8: 3}, hidden: 8}
projected: {teacher: TEACHER, layers: [1, 3], channels: 4}
vision_aided: {teacher: TEACHER, layers: [0, 3], hidden: 8}
"""


def test_a_run_with_heads_of_d_resumes_bitwise_and_goes_on_under_zero_3(tmp_path):
    """Under DeepSpeed: six steps; again from the third one's checkpoint; and from there in two rounds under ZeRO 3."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("TEACHER", str(DIGITS)))
    straight = train(tmp_path, "run_dir=straight")
    kept = json.loads((straight / "state.json").read_text())["teachers"]
    assert kept == dict.fromkeys(("hsr", "projected", "vision_aided"), sha256_of(DIGITS))
    for name in ("resumed", "moved"):
        shutil.copytree(tmp_path / "straight", tmp_path / name)
        shutil.rmtree(last_checkpoint(tmp_path / name))
        (tmp_path / name / "checkpoints" / "latest").write_text(f"{24:09d}\n")
    first, second = tensors(straight), tensors(train(tmp_path, "run_dir=resumed"))
    assert first.keys() == second.keys() and not [key for key in first if not torch.equal(first[key], second[key])]
    assert {"D/projected.mix_scales1", "D/vision_aided.out.parametrizations.weight.original",
            "D_adam/exp_avg_sq.projected.heads.3.out.parametrizations.weight.original"} <= first.keys()  # fmt: skip
    assert not [key for key in first if key.startswith("G_ema/") and "projected" in key]
    rows = [json.loads(line) for line in (Path(tmp_path) / "straight" / "log.jsonl").read_text().splitlines()]
    logged = {name for row in rows for name in row}
    assert {f"{name}{of}" for name in ("loss/G", "loss/D", "score/fake", "score/fake_d", "score/real")
            for of in ("", "_projected", "_vision_aided")} | {"loss/r2", "loss/hsr"} <= logged  # fmt: skip
    moved = train(tmp_path, "run_dir=moved", "zero_stage=3", "accumulation=2")
    assert all(relative_difference(moved, straight, part) < 1e-5 for part in ("G", "D", "G_ema"))
