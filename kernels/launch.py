"""Which implementation an op runs, which gradients it must compute, and how it refuses its arguments."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("torch",)

_requested = os.environ.get("HSRGAN_BACKEND") or "torch"


def backend() -> str:
    """The backend the next op runs on: HSRGAN_BACKEND, or what `use_backend` set. ValueError if there is none."""
    if _requested not in BACKENDS:
        if _requested == "triton":
            raise ValueError("the triton backend does not exist yet; unset HSRGAN_BACKEND or set it to torch")
        raise ValueError(f"unknown backend {_requested!r}; HSRGAN_BACKEND takes one of: {', '.join(BACKENDS)}")
    return _requested


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on backend `name`; ValueError if it does not exist."""
    global _requested
    before, _requested = _requested, name
    try:
        backend()
        yield
    finally:
        _requested = before


def wanted(ctx: torch.autograd.function.FunctionCtx) -> list[bool]:
    """Inside a Function's backward: for each input of its forward, will anybody use the gradient?

    ctx.needs_input_grad only says which inputs require grad: under R1's and path length's autograd.grad it asks for
    every weight gradient although the engine throws them away. The engine tells which nodes it will run.
    """
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return [needed and _will_run(next(nodes)) for needed in ctx.needs_input_grad]


def _will_run(node: torch.autograd.graph.Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for a leaf that autograd.grad was asked about
        return True


def check(ok: bool, message: str) -> None:
    """ValueError(message) unless ok. Messages name the argument."""
    if not ok:
        raise ValueError(message)


def check_images(x: Tensor, name: str = "x") -> None:
    """x must be a floating-point tensor [N, C, H, W]; ValueError otherwise."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor [N, C, H, W]; got {x.dtype} of shape {list(x.shape)}")


def check_shape(t: Tensor | None, name: str, *shape: int) -> None:
    """t (None passes) must have exactly this shape; ValueError otherwise."""
    if t is not None and t.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(t.shape)}")
