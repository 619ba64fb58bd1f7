"""A phase's loss and gradients as one CUDA graph: recorded once for each shape of its inputs, replayed in every step.

What is recorded is a pure function of tensors: it reads its inputs, the parameters and the running path-length mean,
changes none of them, reads nothing to the host and draws no random number. Draws, reductions over ranks, the meter and
DeepSpeed's step stay outside. Eager and graphed training call the same function; `direct` is the eager caller.

A graph holds addresses. Those of parameters stay the same under ZeRO 0–2: DeepSpeed 0.19.8 makes every parameter a view
of one flat buffer when it is initialised, steps and gathers into that buffer in place, and afterwards points the
parameters at the same slices of it again (runtime/zero/stage_1_and_2.py, step and _update_model_bit16_weights; only its
offload_states moves the buffer, which nothing here calls). ZeRO 3 gives whole parameters new memory for each phase.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hsrgan.engine.distributed import World

WARM_UPS = 2  # of a function before it is recorded: kernels compile, libraries choose and make their workspaces

Function = Callable[[Any], Any]  # a dataclass of tensors or None → anything that holds tensors


def direct(name: str, function: Function, inputs: Any) -> Any:
    """Call function(inputs)."""
    return function(inputs)


class Backend(Protocol):
    """record(run) → (replay, outputs): run() once recorded, what does the same work again on the same memory, and the
    outputs that each replay fills. Recording itself fills nothing.
    """

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]: ...


class Cuda:
    """CUDA's (or HIP's) graphs. All share one pool of memory, and so overlap: a graph's outputs hold until another one
    is replayed, and no two run at a time.
    """

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        # the outer block gives the stream back even if the capture fails on its way out
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                run()
            try:
                # thread_local: the thread that pins the loader's images and NCCL's watchdog may go on
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    outputs = run()
            except RuntimeError:
                leave(self.pool)
                raise
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay, outputs


def leave(pool: tuple[int, int]) -> None:
    """A capture that CUDA broke off PyTorch does not end: its allocator would go on in it, which holds the pool's
    memory and, where memory is wanted, frees none that is cached.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # it has ended as it should
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


class Graphs:
    """A caller like `direct`, with static inputs: the caller's tensors are copied into them before each replay.

    Outputs are static too: read or copy them before the next call. say takes a line when a function is recorded again,
    for other shapes or fields, and one if recording fails, after which every call is direct.
    """

    def __init__(self, backend: Backend, say: Callable[[str], None]) -> None:
        self._backend, self._say = backend, say
        self._recorded: dict[tuple, tuple[Any, Callable[[], object], Any]] = {}
        self._failed = False

    def __call__(self, name: str, function: Function, inputs: Any) -> Any:
        given = {field: value for field, value in vars(inputs).items() if value is not None}
        key = (name, *((field, value.dtype, tuple(value.shape), value.stride()) for field, value in given.items()))
        if not self._failed and key not in self._recorded:
            self._record(name, key, function, inputs, given)
        if self._failed:
            return function(inputs)
        static, replay, outputs = self._recorded[key]
        for field, value in given.items():
            getattr(static, field).copy_(value)
        replay()
        return outputs

    def _record(self, name: str, key: tuple, function: Function, inputs: Any, given: dict[str, Tensor]) -> None:
        if any(name == known for known, *_ in self._recorded):
            self._say(f"cuda_graphs: {name} changes, so it is recorded again, with {', '.join(given)}")
        static = dataclasses.replace(inputs, **{field: value.clone() for field, value in given.items()})
        try:
            self._recorded[key] = (static, *self._backend.record(lambda: function(static)))
        except RuntimeError as error:  # what CUDA or a library refuses, want of memory included
            self._failed = True
            self._recorded.clear()
            self._say(f"cuda_graphs: off, {name} cannot be recorded ({' '.join(str(error).split())[:200]})")


def caller(wanted: bool, world: World, zero_stage: int, say: Callable[[str], None]) -> Callable[..., Any]:
    """`Graphs` where they are wanted and possible, else `direct`; says so where they are wanted on a GPU in vain.

    say: a line of the log; ranks that have none print.
    """
    if not wanted or world.device.type != "cuda":
        return direct
    if zero_stage == 3:
        say("cuda_graphs: off, zero_stage 3 gathers the parameters into new memory in every phase (0 to 2 do not)")
        return direct
    return Graphs(Cuda(), say if world.first else lambda text: print(f"rank {world.rank}: {text}", flush=True))


@contextlib.contextmanager
def fresh_leaves(module: nn.Module, frozen: Collection[str] = ()) -> Iterator[list[Tensor]]:
    """Inside, the module computes with new leaves on its parameters' memory, yielded in the order of parameters(). All
    require gradients but those of the names in `frozen`.

    DeepSpeed keeps the parameters' own autograd nodes, which belong to the stream that they were made on: a gradient
    that ended there would tie a capture to that stream, which CUDA refuses.
    """
    slots = [
        (m._parameters, name, p, f"{path}.{name}" if path else name)
        for path, m in module.named_modules()
        for name, p in m._parameters.items()
        if p is not None
    ]
    leaves = [p.detach().requires_grad_(full not in frozen) for _, _, p, full in slots]
    try:
        for (parameters, name, *_), leaf in zip(slots, leaves, strict=True):
            parameters[name] = leaf
        yield leaves
    finally:
        for parameters, name, parameter, _ in slots:
            parameters[name] = parameter
