"""Whole training steps on a GPU that is not there: tensors without values that say they are on cuda:0, kernels that are
noted instead of launched. What would read from a GPU, mix its tensors with the host's or make it wait raises.
"""

import copy
from pathlib import Path

import on_gpu
import pytest
import test_graphs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hsrgan.engine import graphs
from hsrgan.engine.ema import update_ema
from hsrgan.engine.phases import build_phases
from hsrgan.kernels import launch
from hsrgan.tools.plain_training import plain_training, random_teacher, run_step

CUDA = torch.device("cuda", 0)


class Gpu(TorchFunctionMode):
    """Python sees meta as cuda:0, and cuda is meta to PyTorch. training: from here on nothing is made of a list."""

    training = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.device.__get__:
            found = func(*args)
            return CUDA if found.type == "meta" else found
        if func == Tensor.is_cuda.__get__:
            return Tensor.is_meta.__get__(*args)
        if func is Tensor.pin_memory:  # marked, for `Crossings`
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        args, kwargs = _on_meta(args), {key: _on_meta(value) for key, value in (kwargs or {}).items()}
        out = func(*args, **kwargs)
        if self.training and func in (torch.tensor, torch.as_tensor, torch.asarray) and out is not args[0]:
            assert not Tensor.is_meta.__get__(out), "a tensor of the GPU's is made of the host's values: it waits"
        return out


def _on_meta(value):
    if (isinstance(value, torch.device) and value.type == "cuda") or (isinstance(value, str) and value == "cuda"):
        return torch.device("meta")
    return type(value)(map(_on_meta, value)) if type(value) in (list, tuple) else value


class Crossings(TorchDispatchMode):
    """Refuses what has tensors of both, but a copy out of pinned memory that does not wait."""

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = list(test_graphs.tensors([args, kwargs]))
        on_gpu = any(t.is_meta for t in [*given, *test_graphs.tensors(out)])
        if on_gpu and (host := [t for t in given if not t.is_meta and t.numel()]):
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            assert func in self.COPIES and not waits and hasattr(host[0], "pinned"), f"{func} of a tensor of the host's"
        return out


class HostGenerator(torch.Generator):
    """Of any device's, which need not be there."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Recorder:
    """A graph backend that runs what it records once."""

    def record(self, run):
        return lambda: None, run()


@pytest.fixture
def gpu(monkeypatch):
    """The modes, and the names of the kernels that were launched."""
    launched = []

    def run(kernel, grid, *arguments, **options):
        assert all(t.is_cuda for t in arguments if isinstance(t, Tensor)), f"{kernel} is given a tensor of the host's"
        launched.append(kernel.__name__)

    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(launch, "run", run)
    launch._chip_of.cache_clear()
    mode, backward = Gpu(), torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):
        with mode:  # autograd.grad has been taken out of it
            return backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    with mode:
        yield mode, launched
    launch._chip_of.cache_clear()


AUGMENTS = [
    {"mode": "ada", "pipe": "bgcfnc", "p": 0.0, "target": 0.6, "kimg": 500.0, "interval": 1},
    {"mode": "diffaugment", "policy": "color,translation,cutout"},
    None,
    {"mode": "fixed", "pipe": "bgc", "p": 0.5},
]
NETWORKS = test_graphs.recipe().model_dump()
RARE = {
    "objective": {"loss": "hinge"}, "path_length": {"interval": 2, "parity": True},
    "generator": NETWORKS["generator"] | {"architecture": "resnet"},
    "discriminator": NETWORKS["discriminator"] | {"architecture": "skip"},
    "hsr": test_graphs.HSR | {"distance": "cosine", "weights_per_res": {8: 0.5, 16: 2.0}},
}  # fmt: skip
OTHERS = [{}, test_graphs.CRITICS | test_graphs.R3GAN, {"accumulation": 2}, RARE]
PRECISIONS = ["fp16", "bf16", "fp32", "fp16"]


def steps(mode: Gpu, spoil=lambda t: None, **changes) -> None:
    """Two steps of all phases, the first of which may fill what is kept."""
    settings = test_graphs.recipe(data={"builtin": "digits", "resolution": 16, "channels": 3}, **changes)
    with CUDA:
        teachers = {
            name: random_teacher(
                test_graphs.HSR["layers"] if name == "hsr" else {i: i for i in section.layers}, "vit_tiny_patch16_224"
            )
            for name, section in settings.on_teachers.items()
        }
    t = plain_training(settings, CUDA, teachers, num_classes=3)
    spoil(t)
    t.call = graphs.Graphs(Recorder(), lambda line: pytest.fail(line) if "off" in line else None)
    average = copy.deepcopy(t.generator).requires_grad_(False)
    phases = build_phases(t)
    every = 2
    for step in (2 * every, 3 * every):  # R1 and path length take their turn in both, HSR is on
        reals = torch.zeros(8, 3, 16, 16, device=CUDA).to(memory_format=torch.channels_last)
        with Crossings():
            run_step(t, phases, step * 8, reals, torch.zeros(8, 3, device=CUDA))
            for beta in (0.3, 0.9):
                update_ema(average, t.generator, beta, t.g.finite.moved())
        mode.training = True


@pytest.mark.parametrize(("augment", "others", "precision"), [*zip(AUGMENTS, OTHERS, PRECISIONS, strict=True)])
def test_a_step_neither_waits_for_the_gpu_nor_takes_it_a_tensor_of_the_hosts(gpu, augment, others, precision):
    mode, launched = gpu
    steps(mode, augment=augment, precision=precision, **others)
    assert len(set(launched)) > 5


def _sends_without_pinning(t):
    t.draws.device = torch.device("meta")  # what `sent` takes for no GPU


def _makes_of_lists(t):
    t.scalar = lambda value, dtype=torch.float32: torch.tensor(value, dtype=dtype, device=CUDA)


def _reads(t):
    t.meter.add = lambda name, value: float(value.sum())


def _mixes(t):
    t.pl_mean = torch.zeros(())


@pytest.mark.parametrize("spoil", [_sends_without_pinning, _makes_of_lists, _reads, _mixes])
def test_what_would_wait_is_caught(gpu, spoil):
    with pytest.raises((AssertionError, RuntimeError), match=r"host|meta"):
        steps(gpu[0], spoil, hsr=None)


def test_tests_of_kernels_put_on_a_gpu_what_they_would_draw_on_the_cpu(monkeypatch):
    real_placed = on_gpu.Placed
    torch.manual_seed(0)
    drawn = torch.randn(3)
    with on_gpu.Placed("meta"):
        leaf = torch.randn(3, requires_grad=True)
        assert torch.zeros(2).is_meta and leaf.is_meta and leaf.is_leaf and not torch.zeros(2, device="cpu").is_meta
    torch.manual_seed(0)
    with on_gpu.Placed("cpu"):
        assert torch.equal(torch.randn(3), drawn)
    monkeypatch.setattr(on_gpu, "device", lambda: "cuda")
    monkeypatch.setattr(on_gpu, "Placed", lambda place: real_placed("meta" if place == "cuda" else place))
    for path, there in (("test_to_rgb_triton.py", True), ("test_to_rgb.py", False)):
        with on_gpu.placed(Path(path)):
            assert torch.zeros(2).is_meta == there
