"""Which implementation an op runs, how a Triton kernel is launched, and how an op refuses its arguments."""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")
OPTIONS = {"enable_fp_fusion": True}  # a·b + c in one instruction; Triton 3.10 changes the default

_requested = os.environ.get("HSRGAN_BACKEND") or None
_recording: list["Launch"] | None = None
_tf32 = False
_recorded_chip = ""
_has_triton = importlib.util.find_spec("triton") is not None


def backend(x: Tensor) -> str:
    """The backend of an op on x: what HSRGAN_BACKEND or `use_backend` asks for, else triton on a GPU, torch elsewhere.

    Triton takes CPU tensors in its interpreter only: TRITON_INTERPRET=1, set before the first op runs. ValueError for
    a backend that does not exist or cannot run on x.
    """
    if _requested not in (None, *BACKENDS):
        raise ValueError(f"unknown backend {_requested!r}; HSRGAN_BACKEND takes one of: {', '.join(BACKENDS)}")
    if _recording is not None:
        return "triton"
    if _requested is None:
        if not x.is_cuda:
            return "torch"
        if not _has_triton:
            _say_what_is_missing()
        return "triton" if _has_triton else "torch"
    if _requested == "triton":
        check(_has_triton, "the triton backend needs the package triton: pip install triton")
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        what = f"the triton backend runs on a GPU, or interpreted (TRITON_INTERPRET=1); x is on {x.device}"
        check(x.is_cuda or interpreted, what)
    return _requested


@functools.cache
def _say_what_is_missing() -> None:
    """Once in a process, whichever op comes first and whatever Python's filters of warnings repeat."""
    warnings.warn("triton is not installed: the ops run in plain PyTorch; pip install triton", stacklevel=4)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on backend `name`; ValueError if it does not exist."""
    global _requested
    check(name in BACKENDS, f"unknown backend {name!r}; there are: {', '.join(BACKENDS)}")
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def allow_tf32(allowed: bool = True) -> None:
    """fp32 products on tensor cores at 10 bits of mantissa, or not (the default): the kernels' and PyTorch's own."""
    global _tf32
    _tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def sum_in_fp32() -> None:
    """PyTorch's products of halves add up in fp32 from here on, as the kernels do: left alone, cuBLAS may round the
    partial sums that it splits a long sum into.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def tf32_allowed() -> bool:
    """What the last `allow_tf32` said."""
    return _tf32


def kind_of(dtype: torch.dtype) -> str:
    """How kernels multiply values of dtype: "half", "tf32" (fp32 where allowed) or "ieee" (fp32 else, and fp64)."""
    return "half" if dtype.itemsize == 2 else "tf32" if _tf32 and dtype.itemsize == 4 else "ieee"


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel as `record` saw it: what an ahead-of-time build needs, and the static model."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors (on the meta device) and numbers, in the kernel's order
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int | None = None


@contextmanager
def record(chip: str = "") -> Iterator[list[Launch]]:
    """Inside the block ops take the triton backend but write their launches to the list instead of running them.

    Meant for tensors on the meta device, which have shapes, strides and no memory. chip ("sm_90", "gfx942"): whose
    block sizes to take; none: those that fit every chip.
    """
    global _recording, _recorded_chip
    before, _recording, _recorded_chip = (_recording, _recorded_chip), [], chip
    try:
        yield _recording
    finally:
        _recording, _recorded_chip = before


def chip(x: Tensor) -> str:
    """"sm_90", "gfx942": the architecture whose block sizes a launch on x takes; "" where it is not known."""
    return _chip_of(x.device) if x.is_cuda else _recorded_chip


@functools.lru_cache
def _chip_of(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Launch a Triton kernel on the device of its first tensor; an empty grid launches nothing.

    arguments: all that is not constexpr, in the kernel's order; constants: the constexprs by name. registers: what a
    thread may take on NVIDIA, where ptxas otherwise aims lower by itself and now and then spills a pointer for that.
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages, registers))
        return
    first = next(t for t in arguments if isinstance(t, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        limit = options(registers, amd=torch.version.hip is not None)
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **limit, **constants)


def options(registers: int | None, *, amd: bool) -> dict[str, Any]:
    """What every compilation is told, and the limit of registers of this one."""
    return OPTIONS if registers is None or amd else {**OPTIONS, "maxnreg": registers}


def wanted(ctx: torch.autograd.function.FunctionCtx) -> list[bool]:
    """Inside a Function's backward: for each input of its forward, will anybody use the gradient?

    ctx.needs_input_grad only says which inputs require grad: under R1's and path length's autograd.grad it asks for
    every weight gradient although the engine throws them away. The engine tells which nodes it will run. A node may be
    run for another of its inputs than the one that a result's gradient goes to: a Function that has such results says
    so in ctx.passes_to, {number of the result: number of its one input, among the tensors}.
    """
    nodes = iter([node for node in ctx.next_functions if node[0] is not None])
    return [needed and _will_run(*next(nodes)) for needed in ctx.needs_input_grad]


def _will_run(node: torch.autograd.graph.Node | None, result: int) -> bool:
    if node is None:
        return False
    if (place := getattr(node, "passes_to", {}).get(result)) is not None:
        return _will_run(*node.next_functions[place])
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for a leaf that autograd.grad was asked about
        return True


def wants_gradient(t: Tensor | None) -> bool:
    """Will a gradient of t be recorded?"""
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def once_differentiable(op: str) -> Callable[..., Any]:
    """Decorator of a Function's backward that has no derivative of its own: it raises where one could be asked for,
    under create_graph=True.

    PyTorch's decorator of this name raises only if an incoming gradient requires grad and the engine walks to the end
    of the graph. Under autograd.grad(y.sum(), x, create_graph=True), or with autograd.grad for the penalty too, its
    results count as constants and the penalty's gradient is a silent zero.
    """

    def decorator(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx, *gradients):
            if torch.is_grad_enabled():
                raise RuntimeError(f"{op} is differentiable once only; leave it out of autograd.grad(create_graph)")
            return backward(ctx, *gradients)

        return wrapper

    return decorator


def check(ok: bool, message: str) -> None:
    """ValueError(message) unless ok. Messages name the argument."""
    if not ok:
        raise ValueError(message)


def check_devices(x: Tensor, **named: Tensor | None) -> None:
    """The named tensors (None passes) must be floating-point and on the device of x; ValueError otherwise."""
    for name, t in named.items():
        if t is not None:
            check(t.is_floating_point(), f"{name} must be floating-point; got {t.dtype}")
            check(t.device == x.device, f"{name} must be on the device of x, {x.device}; got {t.device}")


def check_images(x: Tensor, name: str = "x") -> None:
    """x must be a floating-point tensor [N, C, H, W]; ValueError otherwise."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor [N, C, H, W]; got {x.dtype} of shape {list(x.shape)}")


def check_projection(t: Tensor, name: str, inputs: int) -> None:
    """t must be the weight of a 1×1 convolution of so many channels; ValueError otherwise."""
    check(t.shape[1:] == (inputs, 1, 1), f"{name} must have shape [outputs, {inputs}, 1, 1]; got {list(t.shape)}")


def check_shape(t: Tensor | None, name: str, *shape: int) -> None:
    """t (None passes) must have exactly this shape; ValueError otherwise."""
    if t is not None and t.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(t.shape)}")
