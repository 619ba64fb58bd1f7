"""Where the tests of kernels put their tensors, where there is a GPU and TRITON_INTERPRET=0: on it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from watched import device

DRAWS = (torch.randn, torch.rand, torch.randint, torch.randperm)


class Placed(TorchFunctionMode):
    """What is made without a device is made on this one. What is drawn has the values that the interpreter's tests
    draw: some bounds hold for these.
    """

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if func in DRAWS:
            wanted = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs, device="cpu").to(self.place).requires_grad_(wanted)
        return func(*args, **kwargs, device=self.place)


@contextlib.contextmanager
def placed(path: Path) -> Iterator[None]:
    """Inside, what a test of kernels (test_*_triton.py) makes is on the GPU, if kernels run there; the definitions that
    they are compared with then multiply fp32 in full, too.
    """
    if device() == "cpu" or not path.stem.endswith("_triton"):
        yield
        return
    with Placed("cuda"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
