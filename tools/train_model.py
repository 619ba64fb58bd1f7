"""The static model of a whole training step: what can be said about a GPU from shapes alone.

Every phase runs on tensors without values. Each call of PyTorch's and each launch of a Triton kernel counts as one
kernel, whose time is at least its bytes at the data sheet's bandwidth (each tensor read or written once) or its
products at the data sheet's rate; the phase's floor is their sum. Nothing is faster than that; how near it a GPU comes
is not said. Launches cost no time here, so graphs change their number alone. Products that the definitions have and no
counted kernel accounts for (toRGB's) are added at the data sheet's rate.

Peak memory counts parameters, Adam's moments, the averaged G, the teacher and, within the hungriest phase, every live
tensor (activations, gradients, inputs); with graphs also all phases' static inputs and gradients. It leaves out
fragmentation, the libraries' workspaces and the CUDA context. The teacher's products count as bf16, its attention as
PyTorch's unfused one.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hsrgan.engine.ema import update_ema
from hsrgan.engine.phases import Phase, build_phases, rounds
from hsrgan.engine.run_state import Round, Training
from hsrgan.kernels import builds, launch
from hsrgan.kernels.builds import Gpu
from hsrgan.kernels.launch import Launch, use_backend
from hsrgan.tools.plain_training import on_meta, plain_training, random_teacher
from hsrgan.tools.train_variants import HSR_LAYERS, Variant, recipe, row

aten = torch.ops.aten
FREE = {  # calls that launch nothing and are no views by their schema
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.empty_permuted.default,
    aten.new_empty.default, aten.new_empty_strided.default, aten._unsafe_view.default, aten.lift_fresh.default,
    aten.detach.default, aten.alias.default,
}  # fmt: skip


@dataclass
class Cost:
    """kernels launched, their floor in seconds on a GPU, bytes moved; products by whether their factors are halves."""

    kernels: float = 0
    seconds: float = 0.0
    moved: float = 0.0
    half: float = 0.0
    full: float = 0.0

    def add(self, moved: float, flops: float, is_half: bool, gpu: Gpu) -> None:
        self.kernels += 1
        self.moved += moved
        self.half, self.full = self.half + flops * is_half, self.full + flops * (not is_half)
        self.seconds += builds.floor_seconds(moved, flops, gpu, kind_of(is_half))

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        return Cost(*(a + b * times for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def kind_of(is_half: bool) -> str:
    """How products are taken, of halves or of fp32; as the kernels and PyTorch do."""
    return launch.kind_of(torch.float16 if is_half else torch.float32)


class Counter(TorchDispatchMode):
    """Adds up what runs inside into `cost`, and follows how many bytes of tensors are alive."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu, self.cost, self.narrow = gpu, Cost(), False
        self.alive, self.now, self.peak = {}, 0, 0
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.drain()
        out = func(*args, **(kwargs or {}))
        made = [t for t in tensors(out) if t.is_meta]
        for t in made:
            self.follow(t)
        if made and not func.is_view and func not in FREE:
            given = [t for t in tensors([args, kwargs or {}]) if t.is_meta]
            factors = [t for t in given if t.is_floating_point()]
            is_half = self.narrow or (bool(factors) and factors[0].itemsize == 2)
            moved = sum(builds._elements(t) * (t.itemsize / 2 if self.narrow else t.itemsize) for t in [*given, *made])
            self.cost.add(moved, products(func, args, kwargs, out), is_half, self.gpu)
        return out

    def follow(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def drain(self) -> None:
        """Count the launches recorded so far, and let go of their tensors."""
        for one in self.launches:
            first = next(t for t in one.arguments if isinstance(t, Tensor))
            self.cost.add(builds.bytes_moved(one), launch_products(one), first.itemsize == 2, self.gpu)
        self.launches.clear()


def tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors(value)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))


def products(func, args, kwargs, out) -> float:
    """Multiplications and additions of a matrix product or convolution; none of a depthwise one, which is a FIR."""
    if func._overloadpacket not in flop_registry:
        return 0.0
    if func in (aten.convolution.default, aten.convolution_backward.default):
        weight = args[1] if func is aten.convolution.default else args[2]
        if weight.shape[1] == 1 and args[-1 if func is aten.convolution.default else -2] > 1:
            return 0.0
    return float(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out))


def launch_products(one: Launch) -> float:
    """Of convolutions and of HSR's kernels (feature_pool_triton); others' products are told by the definitions."""
    if one.kernel.__name__ == "conv_gemm":  # every tap at every pixel of the smaller side
        x, w, y = one.arguments[0], one.arguments[1], one.arguments[3]
        return 2.0 * w.numel() * min(t.numel() // max(t.shape[1], 1) for t in (x, y))
    if one.kernel.__name__ == "wgrad_kernel":
        x, g = one.arguments[:2]
        return 2.0 * one.constants["K"] ** 2 * x.shape[1] * g.numel()
    if one.kernel.fn.__module__ == "hsrgan.kernels.styles_triton":
        matrix = next(t for t in one.arguments if isinstance(t, Tensor) and t.ndim == 2)
        return 2.0 * matrix.numel() * next(n for n in one.arguments if isinstance(n, int))  # samples
    places = {"pool_kernel": (0, 1), "dx_kernel": (4, 0), "dw_kernel": (0, 1)}  # of the map and of what has K
    function = one.kernel.fn
    if function.__module__ != "hsrgan.kernels.feature_pool_triton":
        return 0.0
    image, hidden = (one.arguments[i] for i in places[function.__name__])
    k = hidden.shape[0] if function.__name__ == "pool_kernel" else hidden.shape[-1]
    return 2.0 * image.numel() * k


class NarrowTeacher(nn.Module):
    """A teacher whose work counts as bf16: meta tensors know no autocast."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.counters = teacher, []

    def forward(self, img: Tensor) -> dict[int, Tensor]:
        for counter in self.counters:
            counter.narrow = True
        try:
            return self.teacher(img)
        finally:
            for counter in self.counters:
                counter.narrow = False


@contextmanager
def counting(t: Training, gpu: Gpu, backend: str) -> Iterator[Counter]:
    """The ops of `backend` on meta tensors, counted."""
    counter = Counter(gpu)
    teachers = [teacher for teacher in t.teachers.values() if isinstance(teacher, NarrowTeacher)]
    with ExitStack() as stack:
        if backend == "triton":
            counter.launches = stack.enter_context(launch.record(gpu.target))
        else:
            stack.enter_context(use_backend("torch"))
        for teacher in teachers:
            teacher.counters.append(counter)
            stack.callback(teacher.counters.remove, counter)
        stack.enter_context(counter)
        yield counter
        counter.drain()


@dataclass(frozen=True)
class PhaseCost:
    """One phase once: its gradients, the step behind them, the peak of live bytes, bytes of inputs and gradients."""

    gradients: Cost
    step: Cost
    peak: int
    static: int


def missing_seconds(found: Cost, definition: Cost, gpu: Gpu) -> float:
    """The time of the products that the definitions have and no counted kernel accounts for."""
    half, full = max(0.0, definition.half - found.half), max(0.0, definition.full - found.full)
    return half / gpu.rate(kind_of(True)) + full / gpu.rate(kind_of(False))


def phase_cost(t: Training, phase: Phase, batch: Round, gpu: Gpu, backend: str) -> PhaseCost:
    net, other = (t.g, t.d) if phase.network == "G" else (t.d, t.g)
    other.module.requires_grad_(False)
    inputs = sum(value.nbytes for value in vars(batch).values() if value is not None)
    with counting(t, gpu, backend) as counter:
        gradients, told = phase.gradients(batch)
    found, peak = counter.cost, counter.peak
    if backend == "triton":
        with counting(t, gpu, "torch") as definition:
            phase.gradients(batch)
        found.seconds += missing_seconds(found, definition.cost, gpu)
    with counting(t, gpu, backend) as counter:
        net.deliver(gradients, told.loss)
        net.optimizer.zero_grad(set_to_none=True)
    # Adam is one kernel: reads the gradient, reads and writes the parameter and both moments
    counter.cost.add(7 * sum(p.nbytes for p in net.parameters), 0, False, gpu)
    other.module.requires_grad_(True)
    static = inputs + sum(g.nbytes for g in gradients if g is not None)
    return PhaseCost(found, counter.cost, peak + inputs, static)


def model(variants: list[Variant], gpu: Gpu) -> Iterator[dict]:
    """A row for each variant. Phases are counted once for both settings of graphs."""
    known: dict[Variant, tuple] = {}
    for variant in variants:
        key = replace(variant, graphs=False)
        if key not in known:
            known[key] = _costs(variant, gpu)
        yield _row(variant, *known[key])


def _costs(variant: Variant, gpu: Gpu) -> tuple[Training, dict[str, tuple[float, PhaseCost]], Cost, int]:
    """The training, {phase: (share of steps, cost)}, the rest of a step, bytes that are always there."""
    settings = recipe(variant)
    launch.allow_tf32(variant.tf32)
    teacher = None
    if variant.hsr:
        with torch.device("meta"):
            teacher = NarrowTeacher(random_teacher(HSR_LAYERS))
            teacher.channels = teacher.teacher.channels
    t = plain_training(settings, torch.device("meta"), {} if teacher is None else {"hsr": teacher})
    reals = torch.empty(variant.batch, 3, settings.data.resolution, settings.data.resolution)
    reals, labels = reals.to(memory_format=torch.channels_last), torch.empty(variant.batch, 0)
    costs = {}
    for phase in build_phases(t):
        (batch,) = (on_meta(one) for one in rounds(phase, t, 0, reals, labels))
        costs[phase.name] = (1 / phase.interval, phase_cost(t, phase, batch, gpu, variant.backend))
    average = copy.deepcopy(t.generator).requires_grad_(False)
    with counting(t, gpu, variant.backend) as rest:
        update_ema(average, t.generator, 0.999)
    state = sum(p.nbytes for net in (t.g, t.d) for p in net.parameters) * 3  # and Adam's two moments
    state += sum(p.nbytes for p in average.parameters())
    if teacher is not None:
        state += sum(p.nbytes for p in teacher.parameters()) // 2
    return t, costs, rest.cost, state


def _row(variant: Variant, t: Training, costs: dict[str, tuple[float, PhaseCost]], rest: Cost, state: int) -> dict:
    steps = sum((share for share, _ in costs.values()), 0.0)
    work = Cost()
    after = rest
    for share, cost in costs.values():
        work, after = work.plus(cost.gradients, share), after.plus(cost.step, share)
    total = work.seconds + after.seconds
    static = sum(cost.static for _, cost in costs.values()) if variant.graphs else 0
    return row(
        variant, img_s=variant.batch / total, step_p50=total,
        **{name: cost.gradients.seconds for name, (_, cost) in costs.items()}, rest=after.seconds,
        peak_bytes=state + static + max(cost.peak for _, cost in costs.values()),
        kernels_per_step=math.ceil(work.kernels + after.kernels),
        host_launches_per_step=math.ceil((steps if variant.graphs else work.kernels) + after.kernels), timed=False,
    )  # fmt: skip
