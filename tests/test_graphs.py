"""Phases as recorded graphs: the eager step's bits through static buffers, and nothing in them that a graph forbids."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hsrgan.engine import graphs
from hsrgan.engine.assembly import load_teachers
from hsrgan.engine.config import Recipe
from hsrgan.engine.distributed import World
from hsrgan.engine.phases import build_phases, rounds
from hsrgan.engine.run_state import Round
from hsrgan.kernels import launch
from hsrgan.tools.plain_training import on_meta, plain_training, random_teacher, run_step

DIGITS = Path(__file__).parents[1] / "recipes" / "digits_teacher.safetensors"
CPU = torch.device("cpu")
HSR = {"teacher": str(DIGITS), "layers": {8: 3, 16: 1}, "hidden": 8, "start_kimg": 0.024, "ramp_kimg": 0.016}
CRITICS = {
    "projected": {"teacher": str(DIGITS), "layers": [1, 3], "channels": 4},
    "vision_aided": {"teacher": str(DIGITS), "layers": [0, 2], "hidden": 8},
}
R3GAN = {"objective": {"loss": "relativistic"}, "r2": {"gamma": 1.0, "interval": 2}}


def recipe(**changes) -> Recipe:
    """Four images a step of 16×16, HSR from the fourth step on, growing for two; R1 and path length every other one."""
    widths = {"channel_base": 64, "channel_max": 8, "mapping_layers": 2, "lr": 0.002}
    return Recipe.model_validate({
        "run_dir": "none", "kimg": 1.0, "batch": 8, "seed": 3,
        "data": {"builtin": "digits", "resolution": 16, "channels": 1},
        "generator": {"z_dim": 8, "w_dim": 8, "num_fp16_res": 3, "conv_clamp": 256.0, "mixing_prob": 0.6, **widths},
        "discriminator": {"num_fp16_res": 3, "conv_clamp": 256.0, "mbstd_group_size": 2, **widths},
        "adam": {}, "r1": {"gamma": 1.0, "interval": 2}, "path_length": {"interval": 2}, "ema": {"kimg": 1.0},
        "hsr": HSR, **changes,
    })  # fmt: skip


class Replayed:
    """A graph backend for the CPU: recording computes nothing that can be seen, a replay works on the same memory."""

    def __init__(self):
        self.recorded = []

    def record(self, run):
        outputs = run()
        into = list(tensors(outputs))
        for t in into:
            t.fill_(torch.nan)
        self.recorded.append(into)

        def replay():
            for mine in self.recorded:  # graphs share their memory: another's outputs end here
                if mine is not into:
                    for t in mine:
                        t.fill_(torch.nan)
            for old, new in zip(into, tensors(run()), strict=True):
                old.copy_(new)

        return replay, outputs


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors(value)


def trained(call, steps: int = 7, **changes) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    settings = recipe(**changes)
    t = plain_training(settings, CPU, load_teachers(settings), num_classes=3)
    t.call = call
    phases = build_phases(t)
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        reals = torch.rand(8, 1, 16, 16, generator=generator).to(memory_format=torch.channels_last) * 2 - 1
        labels = torch.eye(3)[torch.arange(8) % 3]
        run_step(t, phases, step * 8, reals, labels)
    state = {f"{name}.{key}": value.clone() for name, net in (("G", t.g), ("D", t.d))
             for key, value in net.module.state_dict().items()}  # fmt: skip
    return state | {"pl_mean": t.pl_mean}, t.meter.collect()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replayed_phases_train_bitwise_as_eager_ones(accumulation):
    """Seven steps: cutoffs change, R1 and path length take turns, HSR begins in the fourth and its weight grows."""
    backend, said = Replayed(), []
    eager, eager_means = trained(graphs.direct, accumulation=accumulation)
    graphed, graphed_means = trained(graphs.Graphs(backend, said.append), accumulation=accumulation)
    assert eager.keys() == graphed.keys() and all(torch.equal(eager[key], graphed[key]) for key in eager)
    assert eager_means == graphed_means and "loss/hsr" in eager_means
    assert len(backend.recorded) == 5  # four phases, and Gmain again where HSR begins
    assert len(said) == 1 and "Gmain changes" in said[0] and "hsr_weight" in said[0]
    assert eager["pl_mean"] > 0 and eager["G.generator.mapping.w_avg"].abs().sum() > 0


def test_other_objectives_replay_bitwise():
    """Five steps with critics on teachers, a loss that pairs, and R2: singular vectors move outside of the graphs."""
    backend, said = Replayed(), []
    eager, means = trained(graphs.direct, 5, **CRITICS, **R3GAN)
    graphed, graphed_means = trained(graphs.Graphs(backend, said.append), 5, **CRITICS, **R3GAN)
    assert all(torch.equal(eager[key], graphed[key]) for key in eager) and means == graphed_means
    assert len(backend.recorded) == 6 and {"loss/r2", "loss/G_projected", "score/real_vision_aided"} <= means.keys()


def test_a_refused_recording_is_said_once_and_training_goes_on_eagerly():
    class Refusing(Replayed):
        def record(self, run):
            if self.recorded:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            return super().record(run)

    said = []
    caller = graphs.Graphs(Refusing(), said.append)
    graphed, _ = trained(caller, steps=2)
    eager, _ = trained(graphs.direct, steps=2)
    assert all(torch.equal(eager[key], graphed[key]) for key in eager)
    assert said == ["cuda_graphs: off, Greg cannot be recorded (operation not permitted when stream is capturing)"]
    assert not caller._recorded  # the memory of what had been recorded is free again


def test_the_callers_tensors_stay_its_own():
    """What it gave to the first call is not what the second one is copied into."""
    call = graphs.Graphs(Replayed(), pytest.fail)
    first, second = (Round(z=torch.full((2,), value)) for value in (1.0, 2.0))
    assert [float(call("double", lambda batch: 2 * batch.z, each).sum()) for each in (first, second)] == [4, 8]
    assert torch.equal(first.z, torch.ones(2))


def test_who_is_recorded():
    said = []
    gpu = World(0, 1, 0, 1, torch.device("cuda", 0))
    assert graphs.caller(True, World(0, 1, 0, 1, CPU), 0, said.append) is graphs.direct
    assert graphs.caller(False, gpu, 0, said.append) is graphs.direct and said == []
    assert graphs.caller(True, gpu, 3, said.append) is graphs.direct
    assert len(said) == 1 and "zero_stage 3" in said[0]


def test_fresh_leaves_share_memory_and_leave_no_trace():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    own = list(module.parameters())
    with pytest.raises(RuntimeError), graphs.fresh_leaves(module) as leaves:
        assert [t.data_ptr() for t in leaves] == [t.data_ptr() for t in own]
        assert all(a is b and a is not p for a, b, p in zip(leaves, (module[0].weight, module[0].bias,
                   module[1].weight, module[1].bias), own, strict=True))  # fmt: skip
        gradients = torch.autograd.grad(module(torch.ones(1, 2)).sum(), leaves)
        assert all(g.abs().sum() > 0 for g in gradients[2:])
        raise RuntimeError
    assert all(a is b for a, b in zip(module.parameters(), own, strict=True)) and all(p.grad is None for p in own)
    with graphs.fresh_leaves(module, {"0.bias", "1.weight"}) as leaves:
        assert [leaf.requires_grad for leaf in leaves] == [True, False, False, True]


class NothingListed(TorchFunctionMode):
    """Raises where a tensor of the device is made from a list: on a GPU that is a copy from the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and out.is_meta:
            raise RuntimeError(f"{func} makes a tensor on meta from the host's values")
        return out


class NothingCrosses(TorchDispatchMode):
    """Raises where a tensor of the host's is taken to the device; the way back raises by itself on meta."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.device.type for t in tensors([args, kwargs or {}])}
        made = {t.device.type for t in tensors(out)}
        if "meta" in made and "cpu" in given:
            raise RuntimeError(f"{func} takes a tensor of the host's to meta")
        self.seen += "meta" in made
        return out


def on_device(backend: str, phase_name: str, precision: str, spoil=lambda t: None, **changes) -> int:
    """Run a phase's gradients on meta tensors, which have no values to read; the number of calls seen."""
    meta = torch.device("meta")
    settings = recipe(precision=precision, data={"builtin": "digits", "resolution": 16, "channels": 3}, **changes)
    with meta:
        teachers = {name: random_teacher(HSR["layers"] if name == "hsr" else {i: i for i in section.layers},
                                         "vit_tiny_patch16_224")
                    for name, section in settings.on_teachers.items()}  # fmt: skip
    t = plain_training(settings, meta, teachers, num_classes=3)
    spoil(t)
    phase = next(p for p in build_phases(t) if p.name == phase_name)
    other = t.d if phase.network == "G" else t.g
    other.module.requires_grad_(False)
    reals = torch.zeros(8, 3, 16, 16).to(memory_format=torch.channels_last)
    (batch,) = (on_meta(batch) for batch in rounds(phase, t, 64, reals, torch.zeros(8, 3)))
    with NothingListed(), NothingCrosses() as mode:
        if backend == "triton":
            with launch.record("sm_90") as launches:
                gradients, _ = phase.gradients(batch)
            assert launches
        else:
            gradients, _ = phase.gradients(batch)
    assert any(g is not None for g in gradients)
    return mode.seen


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("phase", ["Gmain", "Greg", "Dmain", "Dreg"])
def test_no_phase_reads_from_or_copies_to_the_device(phase, backend):
    assert on_device(backend, phase, "fp16") > 100


@pytest.mark.parametrize("phase", ["Gmain", "Dmain", "Dr2"])
def test_no_other_objective_reads_from_or_copies_to_the_device(phase):
    assert on_device("torch", phase, "fp16", **CRITICS, **R3GAN) > 100


@pytest.mark.parametrize("augment", [
    {"mode": "ada", "pipe": "bgcfnc", "p": 0.0, "target": 0.6, "kimg": 500.0, "interval": 4},
    {"mode": "diffaugment", "policy": "color,translation,cutout"},
], ids=lambda augment: augment["mode"])  # fmt: skip
@pytest.mark.parametrize(("phase", "backend"), [("Gmain", "torch"), ("Dmain", "torch"), ("Dreg", "torch"),
                                                ("Dreg", "triton")])  # fmt: skip
def test_nor_does_augmentation(phase, backend, augment):
    assert on_device(backend, phase, "fp16", augment=augment) > 100


def test_replayed_phases_augment_bitwise_as_eager_ones():
    """p moves in every step, which a recording takes as an input."""
    augment = {"mode": "ada", "pipe": "bgcfnc", "p": 0.5, "target": 0.3, "kimg": 0.1, "interval": 1}
    eager, eager_means = trained(graphs.direct, steps=3, augment=augment, hsr=None)
    graphed, graphed_means = trained(graphs.Graphs(Replayed(), print), steps=3, augment=augment, hsr=None)
    assert not [key for key in eager if not torch.equal(eager[key], graphed[key])] and eager_means == graphed_means
    without, _ = trained(graphs.direct, steps=3, hsr=None)
    assert any(not torch.equal(eager[key], without[key]) for key in eager)


def test_a_read_and_a_copy_are_caught():
    class Reading(nn.Module):
        def forward(self, x, c, parts):
            return x.flatten(1)[:, :1] * float(x.detach().mean())

    class Copying(nn.Module):
        def forward(self, x, c, parts):
            return x.flatten(1)[:, :1] * torch.tensor([2.0], device=x.device)

    for spoiler in (Reading(), Copying()):
        with pytest.raises(RuntimeError, match="meta"):
            on_device("torch", "Gmain", "fp16", lambda t, bad=spoiler: setattr(t.d, "module", bad))
