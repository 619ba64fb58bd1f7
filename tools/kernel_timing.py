"""What tools/bench_kernels.py times: one call of one op in one mode by one provider, checked first; and the roofs.

A mode is forward, backward (the gradients of all leaves) or double (the gradients of a gradient by x, as R1 takes
them). The bytes that are divided by are what any implementation must move, not what one does: forward reads the inputs
and writes the output; backward reads the inputs and the output's gradient and writes a gradient for each leaf; double
reads the inputs and both gradients and writes a gradient for each leaf and for the output's gradient.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hsrgan import kernels
from hsrgan.engine.errors import UserError
from hsrgan.engine.graphs import leave
from hsrgan.kernels import launch
from hsrgan.kernels.conv_table import IMPLEMENTATIONS, use_convolution
from hsrgan.tools.kernel_shapes import Call
from hsrgan.tools.stylegan3_checkout import build, checkout, gist

MODES = ("forward", "backward", "double")
# with two implementations: kernels/conv_table.py
CONVOLUTIONS = ("conv2d", "conv2d_bias_act", "modulated_conv2d", "weight_gradient")
GEMMS = ("conv_gemm", "wgrad_kernel")  # the Triton one's kernels
FREE = 1e-5  # of the norm: fp32 sums of millions of terms in another order
PRECISE = 2**27  # elements of the largest tensor up to which the truth is computed in fp64, above it in fp32

Op = Callable[..., Any]  # a result or several
Providers = Mapping[str, Callable[[Call], Op | None]]  # name → the op of a call, None where there is none


@dataclass(frozen=True)
class Case:
    call: Call
    dtype: torch.dtype
    mode: str

    @property
    def name(self) -> str:
        return f"{self.call.name}, {str(self.dtype).removeprefix('torch.')}, {self.mode}"

    @property
    def flops(self) -> float:
        """Of products: a backward pass has two for each of the forward pass's, and so on."""
        return self.call.flops * {"forward": 1, "backward": 2, "double": 4}[self.mode]


def cases(calls: list[Call], dtypes: list[torch.dtype], modes: list[str]) -> list[Case]:
    """Every call in every dtype and in every mode that it can be in."""
    return [
        Case(call, dtype, mode)
        for call in calls
        for dtype in dtypes
        for mode in modes
        if not (mode == "double" and call.order < 2)
    ]


def prepare(case: Case, op: Op, tensors: dict[str, Tensor]) -> Callable[[], list[Tensor | None]]:
    """Everything up to the mode's own work is done here; the result does that work, again at each call. None is a
    gradient of zeros that nobody computed."""
    function = case.call.function(op)
    leaves = [t for t in tensors.values() if t.requires_grad]
    if case.mode == "forward":
        return lambda: [y for i, y in enumerate(function(**tensors)) if i not in case.call.stand_ins]
    ys = [y for y in function(**tensors) if y.requires_grad]
    gs = [_like(y, 1) for y in ys]
    if case.mode == "backward":
        return lambda: list(torch.autograd.grad(ys, leaves, gs, retain_graph=True))
    gs = [g.requires_grad_() for g in gs]
    (first,) = torch.autograd.grad(ys, leaves[:1], gs, create_graph=True)
    v, sources = _like(first, 2), [*leaves, *gs]

    return lambda: list(torch.autograd.grad(first, sources, v, retain_graph=True, allow_unused=True))


def _like(t: Tensor, seed: int) -> Tensor:
    """Normal in t's shape and format, in steps that every dtype holds exactly."""
    if t.is_meta:
        return torch.empty_like(t)
    generator = torch.Generator(t.device).manual_seed(seed)
    values = torch.randn(t.shape, generator=generator, device=t.device)
    return torch.empty_like(t).detach().copy_((values * 32).round() / 32)


def implementation(provider: str) -> contextlib.AbstractContextManager[None]:
    """What a provider runs in, its gradients too: "gemm" and "library" are ours, made to take that one."""
    return use_convolution(provider) if provider in IMPLEMENTATIONS else contextlib.nullcontext()


def bytes_of(case: Case) -> int:
    """What any implementation must move, from the shapes alone."""
    tensors = case.call.make(case.dtype)
    ys = case.call.function(getattr(kernels, f"{case.call.op}_torch"))(**tensors)  # on meta tensors
    y = sum(y.nbytes for y in ys if y.requires_grad)
    inputs = sum(t.nbytes for t in tensors.values())
    leaves = sum(t.nbytes for t in tensors.values() if t.requires_grad)
    if case.mode == "forward":
        made = [y for i, y in enumerate(ys) if i not in case.call.stand_ins]
        return inputs + sum(y.nbytes for y in made if all(y is not t for t in tensors.values()))
    if case.mode == "backward":
        return inputs + y + leaves
    first = next(t for t in tensors.values() if t.requires_grad)  # by which `prepare` differentiates twice
    return inputs + y + first.nbytes + leaves + y


class Truth:
    """What a case's results must be, computed once for all who are held to it.

    The truth is the definition in fp64 (fp32 where that would not fit) on the same rounded inputs. Allowed, in norm:
    twice the definition's own error in the dtype.
    """

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case, self.tensors = case, case.call.make(case.dtype, device)
        definition = getattr(kernels, f"{case.call.op}_torch")
        largest = max(t.numel() for t in self.tensors.values())
        self.precise = torch.float64 if largest <= PRECISE else torch.float32
        exact, same = self._cast(self.precise), self._cast(case.dtype)
        self.expected = [None if t is None else t.detach() for t in prepare(case, definition, exact)()]
        own = prepare(case, definition, same if _needs_one_dtype(case.call) else self.tensors)()
        errors = [self.error(t, i) for i, t in enumerate(own)]
        # a single number (noise's strength) can be right by luck: it is allowed what the worst of the results is
        single = [t is not None and t.numel() == 1 for t in self.expected]
        self.allowed = [2 * (max(errors) if one else e) for one, e in zip(single, errors, strict=True)]

    def _cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in self.tensors.items()}

    def error(self, found: Tensor | None, i: int) -> float:
        """Of result i, relative, in norm."""
        expected = self.expected[i]
        if found is None or expected is None:
            there = found if expected is None else expected
            return math.inf if there is not None and there.any() else 0.0
        return float((found.detach().to(self.precise) - expected).norm()) / max(float(expected.norm()), 1e-30)

    def gate(self, op: Op) -> str:
        """"" if op's results in this mode are as near the truth as they must be; else what is wrong."""
        try:
            found = prepare(self.case, op, self.tensors)()
        except Exception as error:  # a provider that fails is not timed either, and the reason is the user's to read
            return f"raises {type(error).__name__}: {gist(error)}"
        if len(found) != len(self.expected):
            return f"gives {len(found)} results in place of {len(self.expected)}"
        for i, (ours, expected, allowed) in enumerate(zip(found, self.expected, self.allowed, strict=True)):
            if ours is not None and expected is not None and ours.shape != expected.shape:
                return f"result {i} has shape {list(ours.shape)}, not {list(expected.shape)}"
            error = self.error(ours, i)
            if not error <= allowed + FREE:
                return f"result {i} is off by {error:.1e} (relative); twice the definition's own error is {allowed:.1e}"
        return ""


def _needs_one_dtype(call: Call) -> bool:
    """PyTorch's own convolutions refuse half-precision features with fp32 weights."""
    return call.op == "feature_match"


LibraryCall = tuple[int, float]  # bytes of its tensors, FLOP


class LibraryCalls(TorchDispatchMode):
    """Notes the convolutions and products that PyTorch's libraries are called for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[LibraryCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.found.append((sum(t.nbytes for t in tensors), flops))
        return out


def flops_of(each: launch.Launch) -> float:
    """FLOP of the products of one launch of the convolutions' GEMMs; 0 for every other kernel."""
    if each.kernel.__name__ not in GEMMS:
        return 0
    x, y = each.arguments[0], each.arguments[3 if each.kernel.__name__ == "conv_gemm" else 1]
    return 2 * y.numel() * x.shape[1] * each.constants["K"] ** 2 / (4 if each.constants.get("TRANSPOSED") else 1)


GAIN = 0.98  # of the time of today, at most, to be written into a table


def fastest(
    case: Case, candidates: list[Any], using: Callable[[Any], contextlib.AbstractContextManager], device: str,
    stopwatch: Callable[[Callable[[], Any]], dict[str, Any]], unit: str,
) -> tuple[Any, str]:  # fmt: skip
    """(the candidate to write into a table, or None if the first, today's, is as good; what happened, in words).

    using(candidate): a block in which the op of the case takes it. What is wrong is not timed; UserError if today's is.
    """
    truth, op = Truth(case, device), getattr(kernels, case.call.op)
    times: list[tuple[float, int]] = []
    for i, candidate in enumerate(candidates):
        with using(candidate):
            complaint = truth.gate(op)
            if complaint and i == 0:
                raise UserError(f"{unit}, {case.name}: {complaint}")
            if not complaint:
                run = prepare(case, op, case.call.make(case.dtype, device))
                times.append((stopwatch(run)["p50"], i))
    (today, _), (best, i) = times[0], min(times)
    refused = len(candidates) - len(times)
    what = f"{unit}: {today * 1e6:.1f} µs, {len(times)} candidates timed" + (f", {refused} refused" if refused else "")
    if best > GAIN * today:
        return None, f"{what}: nothing is faster"
    return candidates[i], f"{what}: {best * 1e6:.1f} µs"


class Stopwatch:
    """Seconds of a function on the GPU by events, the L2 flushed before each run; replayed as a CUDA graph, as training
    does it, so that a small layer's time is the GPU's and not the host's.

    From its making on this thread works on a stream of its own: graphs cannot be recorded on the default one, and a
    gradient runs where its forward pass ran.
    """

    def __init__(self, device: str = "cuda", seconds: float = 0.1, least: int = 20) -> None:
        torch.cuda.set_stream(torch.cuda.Stream(device))
        properties = torch.cuda.get_device_properties(device)
        self.flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device=device)
        self.seconds, self.least = seconds, least

    def once(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def __call__(self, run: Callable[[], Any]) -> dict[str, Any]:
        """p20, p50 and p80 in seconds after three runs to warm up; graph: False where it could not be recorded."""
        for _ in range(3):
            self.once(run)
        graph = recorded(run)
        work = run if graph is None else graph.replay
        about = self.once(work)
        count = max(self.least, min(1000, int(self.seconds / max(about, 1e-6))))
        times = [self.once(work) for _ in range(count)]
        tenths = statistics.quantiles(times, n=10, method="inclusive")
        return {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7], "graph": graph is not None}


def recorded(run: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """run() as a graph on the current stream; None where CUDA or a library refuses."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    torch.cuda.synchronize()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    except RuntimeError:
        leave(pool)
        return None
    return graph


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes allocated at the most during run, beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def roofs(stopwatch: Callable[[Callable[[], Any]], dict[str, float]], dtypes: list[torch.dtype]) -> dict[str, float]:
    """{"copy": bytes/s of a 1 GiB copy, read and written; "<dtype>": FLOP/s of an 8192³ product}, on this device."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / stopwatch(lambda: target.copy_(source))["p50"]}
    for dtype in dtypes:
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * 8192**3 / stopwatch(lambda a=a, b=b: a @ b)["p50"]
    return found


def providers(stylegan3: Path | None) -> dict[str, Callable[[Call], Op | None]]:
    """Ours (a convolution by each implementation besides), PyTorch's eager and compiled definitions and, where a
    checkout is named, NVIDIA's own CUDA ops."""

    def of_compiled(call: Call) -> Op:
        torch._dynamo.reset()  # it compiles a function for eight shapes, and for the ninth is eager without a word
        return torch.compile(getattr(kernels, f"{call.op}_torch"), dynamic=False)

    found: dict[str, Callable[[Call], Op | None]] = {
        "hsrgan": lambda call: getattr(kernels, call.op),
        **dict.fromkeys(IMPLEMENTATIONS, lambda call: getattr(kernels, call.op) if call.op in CONVOLUTIONS else None),
        "eager": lambda call: getattr(kernels, f"{call.op}_torch"),
        "compiled": of_compiled,
    }
    if stylegan3 is not None:
        found["nvidia"] = nvidia(stylegan3)
    return found


def possible(provider: str, case: Case) -> bool:
    """torch.compile refuses an outer derivative of its backward pass; NVIDIA's CUDA has no bf16."""
    if provider == "nvidia":
        return case.dtype != torch.bfloat16
    return not (provider == "compiled" and case.mode == "double")


def nvidia(path: Path) -> Callable[[Call], Op | None]:
    """NVIDIA's ops out of the user's checkout of stylegan3, with what they leave out done by PyTorch around them."""
    names = ("bias_act", "conv2d_resample", "upfirdn2d", "fma")
    with checkout(path, *(f"torch_utils.ops.{name}" for name in names), "training.networks_stylegan2") as modules:
        theirs_act, conv2d_resample, theirs_fir, fma, networks = modules
        if torch.cuda.is_available():
            build(path, "cuda")

    @functools.lru_cache(maxsize=1)  # theirs is made once for a network, too
    def square(f):
        """As their networks have it: one pass of 4×4 taps. A filter of four taps would take them two passes."""
        return None if f is None else torch.outer(f, f)

    def bias_act(x, bias=None, *, demod=None, noise=None, strength=None, next_style=None, residual=None, **options):
        scale = None if demod is None else demod.to(x.dtype)[:, :, None, None]
        if noise is not None:  # with a scale, as in all of G's layers
            x = fma.fma(x, scale, (noise * strength).to(x.dtype))
        elif scale is not None:
            x = x * scale
        options.setdefault("act", "lrelu")
        y = theirs_act.bias_act(x, None if bias is None else bias.to(x.dtype), **options)
        if next_style is not None:
            y = y * next_style.to(y.dtype)[:, :, None, None]
        return y if residual is None else y + residual

    def conv2d(x, weight, *, up=1, down=1, f=None):
        return conv2d_resample.conv2d_resample(
            x=x, w=weight.to(x.dtype), f=square(f), up=up, down=down, padding=weight.shape[-1] // 2, flip_weight=up == 1
        )

    def conv2d_bias_act(x, weight, bias=None, *, up=1, down=1, f=None, residual=None, **options):
        return bias_act(conv2d(x, weight, up=up, down=down, f=f), bias, residual=residual, **options)

    def modulated_conv2d(x, weight, style, *, up=1, f=None, demodulate=True, noise=None, strength=None, bias=None,
                         **options):  # fmt: skip
        noise = None if noise is None else noise * strength
        x = networks.modulated_conv2d(
            x=x, weight=weight, styles=style, noise=noise, up=up, padding=weight.shape[-1] // 2, flip_weight=up == 1,
            resample_filter=square(f), demodulate=demodulate, fused_modconv=False,
        )  # fmt: skip
        return bias_act(x, bias, **options)

    ops: dict[str, Op] = {
        "bias_act": bias_act,
        "conv2d": conv2d,
        "conv2d_bias_act": conv2d_bias_act,
        "modulated_conv2d": modulated_conv2d,
        "upfirdn2d": lambda x, f, **options: theirs_fir.upfirdn2d(x, square(f), **options),
        "upsample2d": lambda x, f, **options: theirs_fir.upsample2d(x, square(f), **options),
        "downsample2d": lambda x, f, **options: theirs_fir.downsample2d(x, square(f), **options),
    }
    return lambda call: ops.get(call.op)
