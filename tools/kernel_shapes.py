"""The calls of every op at the layer shapes of real models: what is built ahead of time, and what is timed.

A new op is one function here that yields its calls, added to OPS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hsrgan import kernels

MODELS = {"ffhq256": (256, 16384), "ffhq1024": (1024, 32768)}  # resolution, channel_base (numerics of the presets)
CHANNEL_MAX = 512
CLAMP = 256.0
HIDDEN, TEACHER, GRID = 4096, 768, 14  # HSR: hidden channels of a head; ViT-B/16's features and their grid


@dataclass(frozen=True)
class Call:
    """One op at one layer. Sizes of its tensors by argument name; the first is x.

    low: which are in the activations' dtype (the others are fp32). constants: which never need a gradient. order: how
    often a training step differentiates it. flops of the forward pass.
    """

    name: str
    op: str  # in hsrgan.kernels; its definition is there as <op>_torch
    sizes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    low: tuple[str, ...] = ("x",)
    constants: tuple[str, ...] = ()
    order: int = 2
    flops: float = 0
    stand_ins: tuple[int, ...] = ()  # results that have a gradient and no values
    resolution: int = 0  # of the block that the layer belongs to

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x, or of the first tensor of an op without one."""
        return self.sizes.get("x", next(iter(self.sizes.values())))

    def make(self, dtype: torch.dtype, device: str = "meta") -> dict[str, Tensor]:
        """The tensors, normal, images in channels_last; those that can have a gradient require one."""
        tensors = {}
        for name, size in self.sizes.items():
            t = torch.randn(size, dtype=dtype if name in self.low else torch.float32, device=device)
            image = t.ndim == 4 and name != "weight"  # which is kept as PyTorch makes it
            t = t.contiguous(memory_format=torch.channels_last) if image else t
            tensors[name] = t.requires_grad_(name not in self.constants)
        return tensors

    def function(self, op: Callable[..., Any] | None = None) -> Callable[..., tuple[Tensor, ...]]:
        """The public op (or another with its arguments), as a function of the tensors by name; all its results."""
        op = getattr(kernels, self.op) if op is None else op

        def function(**tensors: Tensor) -> tuple[Tensor, ...]:
            results = op(**tensors, **self.options)
            return (results,) if isinstance(results, Tensor) else results

        return function


def passes(call: Call, dtype: torch.dtype, device: str = "meta") -> None:
    """Run a call as training does: forward and backward; R1 (by x) and path length (by all) with their backward."""
    function = call.function()
    tensors = call.make(dtype, device)
    leaves = [t for t in tensors.values() if t.requires_grad]
    ys = function(**tensors)
    ys = [y for y in ys if y.requires_grad]
    torch.autograd.grad(ys, leaves, [torch.empty_like(y) for y in ys])
    if call.order < 2:
        return
    for inner in (leaves[:1], leaves):
        ys = [y for y in function(**tensors) if y.requires_grad]
        gs = [torch.empty_like(y).requires_grad_() for y in ys]
        first = torch.autograd.grad(ys, inner, gs, create_graph=True)
        torch.autograd.grad(first, [*leaves, *gs], [torch.empty_like(t) for t in first], allow_unused=True)


def channels(resolution: int, base: int) -> int:
    return min(base // resolution, CHANNEL_MAX)


def resolutions(top: int) -> list[int]:
    """4, 8, …, top."""
    return [2**k for k in range(2, int(math.log2(top)) + 1)]


def bias_act(n: int, c: int, r: int) -> Iterator[Call]:
    x, g_gain = (n, c, r, r), {"clamp": CLAMP}
    layer = {"x": x, "bias": (c,), "demod": (n, c), "noise": (n, 1, r, r), "strength": (1,)}
    yield Call("G layer", "bias_act", layer, g_gain)
    yield Call("G layer, next style", "bias_act", {**layer, "next_style": (n, c)}, g_gain)
    yield Call("G style alone", "bias_act", {"x": x, "demod": (n, c)}, {"act": "linear"})
    yield Call("D conv0", "bias_act", {"x": x, "bias": (c,)}, g_gain)
    residual = {"x": x, "bias": (c,), "residual": x}
    yield Call("D conv1 + skip", "bias_act", residual, {"gain": 1.0, "clamp": CLAMP * 0.5**0.5}, ("x", "residual"))


def upfirdn2d(n: int, c: int, r: int) -> Iterator[Call]:
    constants = ("f",)
    if r > 4:
        up = {"x": (n, c, r + 1, r + 1), "f": (4,)}
        yield Call("G conv0, up", "upfirdn2d", up, {"padding": 1, "gain": 4.0}, constants=constants)
        yield Call("G image, up", "upsample2d", {"x": (n, 3, r // 2, r // 2), "f": (4,)}, low=(), constants=constants)
    yield Call("D conv1, blur", "upfirdn2d", {"x": (n, c, r, r), "f": (4,)}, {"padding": 2}, constants=constants)
    yield Call("D skip, down", "downsample2d", {"x": (n, c, r, r), "f": (4,)}, constants=constants)
    yield Call("D skip, branch", "downsample2d_branch", {"x": (n, c, r, r), "f": (4,)}, constants=constants)


def fir_chain(n: int, c: int, r: int) -> Iterator[Call]:
    if r > 4:
        behind = {"x": (n, c, r + 1, r + 1), "f": (4,), "bias": (c,), "demod": (n, c), "noise": (n, 1, r, r)}
        behind["strength"] = (1,)
        if r < 512:  # above, conv1 has its style from its own kernel (kernels/conv_table.py)
            behind["next_style"] = (n, c)
        options = {"padding": 1, "gain": 4.0, "clamp": CLAMP}
        yield Call("G conv0, FIR + layer", "fir_bias_act", behind, options, constants=("f", "noise"))
    before = {"x": (n, c, r, r), "f": (4,), "bias": (c,)}
    yield Call("D conv0 + blur", "bias_act_fir", before, {"padding": 2, "clamp": CLAMP}, constants=("f",))


def to_rgb(n: int, c: int, r: int) -> Iterator[Call]:
    sizes = {"x": (n, c, r, r), "weight": (3, c, 1, 1), "style": (n, c), "bias": (3,)}
    if r > 4:
        sizes |= {"image": (n, 3, r // 2, r // 2), "f": (4,)}
    yield Call("toRGB", "to_rgb", sizes, {"clamp": CLAMP}, constants=("f",), flops=2 * 3 * c * n * r * r)


def modulation(n: int, c: int, r: int) -> Iterator[Call]:
    """Of x only dtype and format count. The style comes first: path length wants its gradient differentiated. Below 64
    channels tiles are those of 64, cut down.
    """
    if c < 64:
        return

    def call(name: str, inputs: int, **options: bool) -> Call:
        sizes = {"x": (n, inputs, 1, 1), "style": (n, inputs), "weight": (c, inputs, 3, 3)}
        return Call(name, "modulation", sizes, options, constants=("x",), stand_ins=(0,), flops=2 * n * c * inputs)

    yield call("G conv1, weight", c, normalise=True)
    if r > 4:
        yield call("G conv0, weight", min(2 * c, CHANNEL_MAX), transposed=True, normalise=False)


def weight_gradient(n: int, c: int, r: int) -> Iterator[Call]:
    """From 128² on: below, the library keeps it. G's conv0 has the sizes of D's conv1, x and g exchanged."""
    if r < 128:
        return
    low, wide, flops = ("x", "g"), min(2 * c, CHANNEL_MAX), 2 * 9 * n * c * r * r
    same = {"x": (n, c, r, r), "g": (n, c, r, r), "x_scale": (n, c), "g_scale": (n, c)}
    options = {"k": 3, "stride": 1, "padding": 1}
    yield Call("G conv1, dw", "weight_gradient", same, options, low, order=1, flops=flops * c)
    down = {"x": (n, c, r + 1, r + 1), "g": (n, wide, r // 2, r // 2)}
    options = {"k": 3, "stride": 2, "padding": 0}
    yield Call("D conv1, dw", "weight_gradient", down, options, low, order=1, flops=flops * wide / 4)


def bias_act_to_rgb(n: int, c: int, r: int) -> Iterator[Call]:
    sizes = {"x": (n, c, r, r), "weight": (3, c, 1, 1), "style": (n, c), "bias": (c,), "rgb_bias": (3,)}
    sizes |= {"demod": (n, c), "noise": (n, 1, r, r), "strength": (1,)}
    if c > 64:  # fewer have the top, and what a conv0 reads that takes its style itself (kernels/conv_table.py)
        sizes["next_style"] = (n, c)
    constants = ("noise",)
    if r > 4:
        sizes |= {"image": (n, 3, r // 2, r // 2), "f": (4,)}
        constants += ("f",)
    options = {"clamp": CLAMP, "rgb_clamp": CLAMP}
    flops = 2 * 3 * c * n * r * r
    yield Call("G layer + toRGB", "bias_act_to_rgb", sizes, options, constants=constants, flops=flops)


def feature_match(n: int, c: int, r: int) -> Iterator[Call]:
    if not 8 <= r <= 64:
        return
    sizes = {
        "x": (n, c, r, r),
        "w1": (HIDDEN, c, 1, 1),
        "b1": (HIDDEN,),
        "w2": (TEACHER, HIDDEN, 1, 1),
        "b2": (TEACHER,),
        "target": (n, TEACHER, GRID, GRID),
    }
    pixels = (r * r * c + min(r, GRID) ** 2 * TEACHER) * HIDDEN
    low = tuple(sizes)
    for distance in ("mse", "cosine"):
        options = {"distance": distance}
        yield Call(f"HSR, {distance}", "feature_match", sizes, options, low, ("target",), order=1, flops=2 * n * pixels)


def convolution(n: int, c: int, r: int) -> Iterator[Call]:
    """G's and D's convolutions with what follows them; half the resolution has twice the channels."""
    wide, pixels = min(2 * c, CHANNEL_MAX), n * r * r

    def call(name: str, op: str, sizes: dict, options: dict, size: int, **more: Any) -> Call:
        """size: of the side that the convolution's taps are counted on."""
        outputs, inputs, k, _ = sizes["weight"]
        return Call(name, op, sizes, options, flops=2 * k * k * inputs * outputs * size, **more)

    def layer(inputs: int, size: int) -> dict[str, tuple[int, ...]]:
        noise = {"noise": (n, 1, r, r), "strength": (1,), "bias": (c,)}
        return {"x": (n, inputs, size, size), "weight": (c, inputs, 3, 3), "style": (n, inputs), **noise}

    clamp, fir = {"clamp": CLAMP}, {"f": (4,)}
    x, constants = {"x": (n, c, r, r)}, ("f", "noise")
    if r > 4:
        up = layer(wide, r // 2) | fir
        yield call("G conv0", "modulated_conv2d", up, {**clamp, "up": 2}, pixels // 4, constants=constants)
    yield call("G conv1", "modulated_conv2d", layer(c, r), clamp, pixels, constants=constants)
    if r >= 256:
        rgb = {"x": (n, 3, r, r), "weight": (c, 3, 1, 1), "bias": (c,)}
        yield call("D fromRGB", "conv2d_bias_act", rgb, clamp, pixels)
    if r == 4:  # with the minibatch standard deviation as one channel more
        last = {"x": (n, c + 1, r, r), "weight": (c, c + 1, 3, 3), "bias": (c,)}
        yield call("D conv", "conv2d_bias_act", last, clamp, pixels)
    else:
        yield call("D conv0, product", "conv2d", {**x, "weight": (c, c, 3, 3)}, {}, pixels)
        down = {**x, "weight": (wide, c, 3, 3), "bias": (wide,), "residual": (n, wide, r // 2, r // 2), **fir}
        low = ("x", "residual")
        options = {"down": 2, "gain": 1.0, "clamp": CLAMP * 0.5**0.5}
        yield call("D conv1", "conv2d_bias_act", down, options, pixels // 4, low=low, constants=constants)
        skip = {**x, "weight": (wide, c, 1, 1), **fir}
        yield call("D skip", "conv2d", skip, {"down": 2}, pixels // 4, constants=constants)


def styles(n: int, c: int, r: int) -> Iterator[Call]:
    """All layers of a network of this resolution and these channels at the top."""
    if r < 256:
        return
    sizes, which = [], []
    for i, each in enumerate(resolutions(r)):
        wide, own = (channels(size, c * r) for size in (each // 2, each))
        sizes += [own] * 2 if i == 0 else [wide, own, own]
        which += [0, 1] if i == 0 else [2 * i - 1, 2 * i, 2 * i + 1]
    tensors = {"ws": (n, which[-1] + 1, 512), "weight": (sum(sizes), 512), "bias": (sum(sizes),)}
    gains = [1.0] * len(sizes)
    gains[1::3] = [c**-0.5 for c in sizes[1::3]]
    options = {"sizes": sizes, "which": which, "gains": gains}
    yield Call("G styles", "packed_styles", tensors, options, low=(), flops=2 * n * 512 * sum(sizes))


OPS: list[Callable[[int, int, int], Iterator[Call]]] = [
    bias_act, upfirdn2d, fir_chain, to_rgb, bias_act_to_rgb, modulation, convolution, weight_gradient, feature_match,
    styles,
]  # fmt: skip


def calls(models: dict[str, tuple[int, int]] = MODELS, batch: int = 8) -> list[Call]:
    """Every op at every resolution of the models, named "<model> <resolution> <layer>"."""
    found = []
    for model, (top, base) in models.items():
        for r in resolutions(top):
            for op in OPS:
                for call in op(batch, channels(r, base), r):
                    found.append(replace(call, name=f"{model} {r} {call.name}", resolution=r))
    return found
