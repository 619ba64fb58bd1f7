"""Ops under watch: memory poisoned, launches counted; interpreted, addresses checked and bf16 rounded as on GPUs."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hsrgan.kernels import launch

aten = torch.ops.aten
UNINITIALISED = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.empty_permuted.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
COPIES = {aten.clone.default, aten.copy_.default, aten._to_copy.default}


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def device() -> str:
    return "cpu" if interpreted() or not torch.cuda.is_available() else "cuda"


@dataclass
class Watch:
    """What happened inside `watched`: launches since the last level, by level; addresses outside; copies by size."""

    launches: int = 0
    levels: dict[str, int] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    copies: list[tuple[str, int]] = field(default_factory=list)
    kernel: str = ""
    extents: list[tuple[int, int]] = field(default_factory=list)  # first and one past the last byte of every tensor

    def level(self, name: str) -> None:
        self.levels[name], self.launches = self.launches, 0


@contextmanager
def watched(fill: float = torch.nan) -> Iterator[Watch]:
    """Ops take the triton backend; what torch.empty hands out holds `fill` (integers their largest value).

    An interpreted kernel's accesses outside of its tensors are noted and not carried out: memory stays whole.
    """
    watch = Watch()
    with ExitStack() as stack:
        stack.enter_context(launch.use_backend("triton"))
        stack.enter_context(mock.patch.object(launch, "run", _counted(launch.run, watch)))
        if interpreted():
            stack.enter_context(rounding())
            stack.enter_context(_bounded(watch))
        stack.enter_context(_Poison(fill, watch))
        yield watch


class _Poison(TorchDispatchMode):
    def __init__(self, fill: float, watch: Watch) -> None:
        super().__init__()
        self.fill, self.watch = fill, watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in UNINITIALISED and out.device.type != "meta":
            if out.dtype.is_floating_point or out.dtype.is_complex:
                out.fill_(self.fill)
            else:
                out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max)
        if func in COPIES:
            self.watch.copies.append((str(func), out.numel()))
        return out


def _counted(run, watch: Watch):
    def counted(kernel, grid, *arguments, **options):
        watch.launches += 0 not in grid
        watch.kernel = getattr(kernel, "__name__", str(kernel))
        watch.extents = [_extent(t) for t in arguments if isinstance(t, Tensor) and t.numel()]
        with _disable_current_modes():  # the interpreter copies storages to and fro
            return run(kernel, grid, *arguments, **options)

    return counted


def _extent(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


@contextmanager
def _bounded(watch: Watch) -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def inside(pointers, mask, verb):
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        address = pointers.data
        ok = np.zeros(address.shape, dtype=bool)
        for first, end in watch.extents:
            ok |= (address >= np.uint64(first)) & (address + np.uint64(size) <= np.uint64(end))
        outside = mask.data & ~ok
        if outside.any():
            watch.outside.append(f"{watch.kernel} {verb} {int(outside.sum())} elements outside of its tensors")
        return type(mask)(mask.data & ok, mask.dtype)

    def create_masked_load(self, pointers, mask, *rest, **options):
        return load(self, pointers, inside(pointers, mask, "reads"), *rest, **options)

    def create_masked_store(self, pointers, value, mask, *rest, **options):
        return store(self, pointers, value, inside(pointers, mask, "writes"), *rest, **options)

    with mock.patch.multiple(
        InterpreterBuilder, create_masked_load=create_masked_load, create_masked_store=create_masked_store
    ):
        yield


@contextmanager
def rounding() -> Iterator[None]:
    """fp32 → bf16 rounds to nearest even, as every GPU does; the interpreter as it comes cuts the low bits off.

    A cut is off by up to a whole last place instead of half of one, always towards zero: twice the error of a rounding
    in the root mean square, which is all that the contract allows and says nothing about the kernel.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return truncate(self, source, target)
        bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32).astype(np.uint64)
        even = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        quiet = (bits >> np.uint64(16)) | np.uint64(0x40)
        rounded = np.where(np.isnan(source.data), quiet, even).astype(np.uint16)
        return TensorHandle(rounded.reshape(source.data.shape), target.scalar)

    with mock.patch.object(InterpreterBuilder, "create_fp_trunc", create_fp_trunc):
        yield
