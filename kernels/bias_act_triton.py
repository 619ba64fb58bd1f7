"""bias_act in Triton: one pass forward, one for its gradients, one for the gradients of those.

    p = x·demod + noise·strength + bias        y = clamp(act(p)·gain, ±clamp)        z = y·next_style + residual

First derivative, with f = ∂y/∂p and g = gz·next_style·f:

    gx = g·demod        gbias = Σ g        gdemod = Σ g·x        gstrength = Σ g·noise        gnoise = Σ g·strength
    gnext_style = Σ gz·y        gresidual = gz, itself

Second derivative: cotangents hx, hbias, … of those gradients are a direction, and h = hx·demod + hbias + hdemod·x +
hstrength·noise + hnoise·strength is the tangent of p along it. With a = gz·next_style·f'·h + gz·hnext_style·f

    ggz = next_style·f·h + y·hnext_style        gx = a·demod + g·hdemod        gbias = Σ a
    gdemod = Σ a·x + g·hx        gstrength = Σ a·noise + g·hnoise        gnoise = Σ a·strength + g·hstrength
    gnext_style = Σ gz·f·h

Sums are taken in the same pass: each program adds up its tiles in fp32 (fp64 for fp64) and writes one row of partial
sums, and PyTorch adds the rows: a fixed order, no atomics. Terms that are absent and gradients that nobody wants are
compiled away, and what only they need is not loaded.

Saved for the gradients: y where it tells the side and the clamp of a piecewise linear act (it is the next layer's
input, so that this costs nothing); x where y is not the output (next_style, residual), or a gradient of demod or a
smooth act needs x itself; nothing for the plain linear act. There is no division, so that a style of 0 is harmless.

`Finished` is the pass of a convolution that applies this chain itself and writes y, and z where there is a residual.
Where gdemod needs x, x = (p − noise·strength − bias) / demod is had back from y, p being y by the gain of its side: no
pass over memory, but y is rounded: in half precision gdemod is off by about max(1, |noise·strength + bias| / |demod·x|)
times what PyTorch's is. demod must not be zero (a demodulation never is).

Bytes moved per element of b bytes, of what is as large as x:

    forward              2b    x → z                              3b with residual
    gradient             3b    gz, x or y → gx                    2b for the plain linear act
    its gradient, R1     3b    y, hx → ggz
    …, path length       5b    gz, x, hx → ggz, gx

and for noise b/C, for partial sums 4/(pixels of a program) each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import bias_act_kernels as kernels
from hsrgan.kernels import blocks, launch
from hsrgan.kernels.bias_act import Tail
from hsrgan.kernels.pointwise_triton import SMOOTH, chain_of
from hsrgan.kernels.tiles import Walk, channels_fastest, tile, tiles_per_program, walk

SMALL = ("BIAS", "DEMOD", "NOISE", "STRENGTH", "STYLE")  # the order of these operands everywhere


class Chain(NamedTuple):
    """What the kernels of one call have in common."""

    constants: dict[str, Any]  # ACT, SLOPE, GAIN, CLAMP
    from_y: bool  # the gradients read y, not x
    shape: torch.Size
    strides: tuple[int, ...]  # of z, and of every gradient of its shape

    @property
    def smooth(self) -> bool:
        return self.constants["ACT"] in SMOOTH

    def empty(self, t: Tensor) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=t.dtype, device=t.device)


def bias_act_triton(x: Tensor, tail: Tail) -> Tensor:
    """`bias_act` of checked arguments. Differentiable twice; a third derivative raises RuntimeError."""
    constants = chain_of(tail, x.dtype)
    return _Forward.apply(x, *tail.operands, tail.next_style, tail.residual, constants)


class _Forward(Function):
    @staticmethod
    def forward(ctx, x, bias, demod, noise, strength, style, residual, constants):
        z = torch.empty_like(x)
        small = dense(bias, demod, noise, strength, style)
        piecewise = constants["ACT"] not in SMOOTH
        linear = piecewise and constants["SLOPE"] == 1 and constants["CLAMP"] is None
        told_by_z = linear or (piecewise and constants["GAIN"] > 0 and residual is None)
        from_y = told_by_z and style is None and not ctx.needs_input_grad[2]
        ctx.chain = chain = Chain(constants, from_y, x.shape, z.stride())
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None if from_y and linear else z if from_y else x, bias, demod, noise, strength, style)

        over = walk_over(chain, small, x, noise, residual, z)
        plan = _Plan(chain, over, x, "forward")
        launch.run(
            kernels.forward, plan.grid, *pointers(x, *small, residual, z),
            over.channels, over.pixels, over.width, plan.chunks, plan.blocks, *numbers(over),
            **plan.limits, **flags("HAS", *small), HAS_RESIDUAL=residual is not None,
            **constants, **plan.constants,
        )  # fmt: skip
        return z

    @staticmethod
    def backward(ctx, gz):
        *want, want_residual, _ = launch.wanted(ctx)
        if gz is None or not any(want):
            return (*(None,) * 6, gz if want_residual else None, None)
        ref, *small = ctx.saved_tensors
        if ctx.chain.from_y and ref is not None:
            ref = ref.detach()  # the mask is a constant: no gradient comes back through z
        return *First.apply(gz, ref, *small, ctx.chain, want, None), gz if want_residual else None, None


class Finished(Function):
    """`bias_act` of an x that was never written, because the kernel that made it wrote y at once.

    x: a stand-in that has the shape of x, and takes its gradient. With a residual that kernel wrote z too, the result;
    without one y is. A piecewise linear act, gain > 0. Differentiable twice, in x, bias, demod, noise, strength and
    residual.
    """

    @staticmethod
    def forward(ctx, x, y, bias, demod, noise, strength, residual, z, constants):
        ctx.chain = Chain(constants, True, y.shape, y.stride())
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, bias, demod, noise, strength)
        return y.view_as(y) if z is None else z.view_as(z)

    @staticmethod
    def backward(ctx, gz):
        want_x, _, *want, want_residual, _, _ = launch.wanted(ctx)
        gx, gsmall = None, (None,) * 4
        if gz is not None and any([want_x, *want]):
            x, y, *small = ctx.saved_tensors
            gx, *gsmall, _ = First.apply(gz, y, *small, None, ctx.chain, [want_x, *want, False], x)
        return gx, None, *gsmall, gz if want_residual else None, None, None


class First(Function):
    """gz, x or y, bias, demod, noise, strength, style → gradients of x, bias, demod, noise, strength, style.

    x: the stand-in of `Finished`, else None.
    """

    @staticmethod
    def forward(ctx, gz, ref, bias, demod, noise, strength, style, chain, want, x):
        small = dense(bias, demod, noise, strength, style)
        want_x, *want_small = want
        gx = chain.empty(gz) if want_x else None
        over = walk_over(chain, small, gz, ref, noise, gx)
        plan = _Plan(chain, over, gz, "sums" if sum(want_small) > 1 else "gradient", want_small)
        launch.run(
            kernels.first, plan.grid, *pointers(gz, ref, *small, gx, plan.sums, plan.maps),
            over.samples, over.channels, over.pixels, over.width, plan.chunks, plan.blocks, plan.plane,
            *numbers(over), **plan.limits, FROM_Y=chain.from_y, **flags("HAS", *small),
            WANT_X=want_x, **flags("WANT", *want_small), **chain.constants, **plan.constants, TILES=plan.tiles,
        )  # fmt: skip
        # the second derivative does not meet gz where z is piecewise linear in x and everything else is a constant
        keep = chain.smooth or style is not None or any(want[2:5]) or ctx.needs_input_grad[3]
        ctx.save_for_backward(gz if keep else None, ref, bias, demod, noise, strength, style)
        ctx.set_materialize_grads(False)
        ctx.chain = chain
        return gx, *plan.totals((bias, demod, noise, strength, style))

    @staticmethod
    def backward(ctx, *cotangents):
        wanted = launch.wanted(ctx)
        wanted[1] |= wanted[9]
        ggz, gx, *gsmall = second(ctx.saved_tensors, cotangents, ctx.chain, wanted[:7])
        gref, gx = (None, gx) if ctx.chain.from_y else (gx, None)
        return ggz, gref, *gsmall, None, None, gx


def second(
    operands: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], chain: Chain, want: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The gradients of what `First` takes (operands: gz … style) from the cotangents of what it gives, where wanted."""
    if all(h is None for h in cotangents):
        return (None,) * 7
    hx, _, hdemod, hnoise, hstrength, hstyle = [h is not None for h in cotangents]
    a = chain.smooth or hstyle  # else a is zero, and so is every gradient that has no other term
    terms = (True, a or hdemod, a, a or hx, a or hstrength, a or hnoise, True)
    want = [w and term for w, term in zip(want, terms, strict=True)]
    return Second.apply(*operands, *cotangents, chain, want) if any(want) else (None,) * 7


class Second(Function):
    """What `First` takes, and the cotangents of what it gives → the gradients of what it takes."""

    @staticmethod
    def forward(ctx, gz, ref, bias, demod, noise, strength, style, hx, hbias, hdemod, hnoise, hstrength, hstyle,
                chain, want):  # fmt: skip
        small = dense(bias, demod, noise, strength, style)
        given = dense(hbias, hdemod, hnoise, hstrength, hstyle)
        want_z, want_x, *want_small = want
        like = next(t for t in (gz, ref, hx, *given) if t is not None)  # gz is left out where only its dtype matters
        ggz = chain.empty(like) if want_z else None
        gx = chain.empty(like) if want_x else None
        over = walk_over(chain, small, gz, ref, noise, hx, hnoise, ggz, gx)
        plan = _Plan(chain, over, like, "sums", want_small)
        launch.run(
            kernels.second, plan.grid, *pointers(gz, ref, *small, hx, *given, ggz, gx, plan.sums, plan.maps),
            over.samples, over.channels, over.pixels, over.width, plan.chunks, plan.blocks, plan.plane,
            *numbers(over), **plan.limits, FROM_Y=chain.from_y, **flags("HAS", *small),
            GIVEN_X=hx is not None, **flags("GIVEN", *given), WANT_Z=want_z, WANT_X=want_x,
            **flags("WANT", *want_small), **chain.constants, **plan.constants, TILES=plan.tiles,
        )  # fmt: skip
        return ggz, gx, *plan.totals((bias, demod, noise, strength, style))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("bias_act has two derivatives in Triton; a third needs HSRGAN_BACKEND=torch")


def times_style(g: Tensor, y: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
    """g·style, and Σ g·y over pixels [N, C]: the gradients of y·style, in one pass."""
    want = [True, False, True, *[False] * 3]
    gy, _, gstyle, *_ = First.apply(g, y, None, style, None, None, None, _product(y), want, None)
    return gy, gstyle


def times_style_second(
    g: Tensor, y: Tensor, style: Tensor, hy: Tensor | None, hstyle: Tensor | None, want: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of g, y and style, where wanted, from the cotangents of what `times_style` gives."""
    cotangents, (want_g, want_y, want_style) = (hy, None, hstyle, None, None, None), want
    wanted = [want_g, want_y, False, want_style, False, False, False]
    gg, gy, _, gstyle, *_ = second((g, y, None, style, None, None, None), cotangents, _product(y), wanted)
    return gg, gy, gstyle


def _product(y: Tensor) -> Chain:
    """The chain of y·style, the style in the place of a demodulation."""
    return Chain(chain_of(Tail(act="linear"), y.dtype), False, y.shape, y.stride())


class _Plan:
    """The tiles of one launch, and the memory of its sums."""

    def __init__(self, chain: Chain, over: Walk, like: Tensor, kind: str, want: list[bool] | None = None) -> None:
        """kind: "forward", "gradient", or "sums" of programs that keep several. want: which of SMALL are summed."""
        self.over, self.chain, self.want = over, chain, want or [False] * 5
        noise = self.want[2]
        planes = sum(self.want) - noise
        acc = torch.float64 if like.dtype == torch.float64 else torch.float32
        # the gradient of noise is a sum over channels, of which a tile should hold many
        by_channels = noise or channels_fastest(chain.shape, chain.strides)
        self.limits = blocks.sizes(f"bias_act.{kind}", like)
        block_p, block_c = tile(over.channels, over.pixels, by_channels, self.limits.pop("elements"))
        self.blocks = -(-over.channels // block_c)
        chunks = -(-over.pixels // block_p)
        self.tiles = tiles_per_program(over.samples * chunks * self.blocks) if planes else 1
        self.chunks = -(-chunks // self.tiles)
        self.grid = (over.samples * self.chunks * self.blocks,)
        self.plane = over.samples * self.chunks * over.channels
        self.constants = {
            "ACC": tl.float64 if acc == torch.float64 else tl.float32,
            "SPLIT": over.split, "BLOCK_P": block_p, "BLOCK_C": block_c,
        }  # fmt: skip
        self.sums = self.maps = None
        if planes:
            sizes = (planes, over.samples, self.chunks, over.channels)
            self.sums = torch.empty(sizes, dtype=acc, device=like.device)
        if noise:
            self.maps = torch.empty((self.blocks, over.samples, over.pixels), dtype=acc, device=like.device)

    def totals(self, small: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradients of SMALL from the partial sums, each in the shape and dtype of its tensor; None: not wanted."""
        totals = iter([] if self.sums is None else sum_over(self.sums, 2))  # of each plane: [samples, channels]
        out: list[Tensor | None] = []
        for name, t, want in zip(SMALL, small, self.want, strict=True):
            if not want:
                out.append(None)
                continue
            if name == "NOISE":
                n, _, *pixels = self.chain.shape
                total = sum_over(self.maps, 0).reshape(n, 1, *pixels).sum_to_size(t.shape)
            else:
                total = next(totals)
                total = total if name in ("DEMOD", "STYLE") else sum_over(total, 0) if name == "BIAS" else total.sum()
            out.append(total.to(t.dtype).reshape(t.shape))
        return out


def sum_over(t: Tensor, dim: int) -> Tensor:
    """t.sum(dim), without a launch where there is one row."""
    return t.select(dim, 0) if t.shape[dim] == 1 else t.sum(dim)


def walk_over(chain: Chain, small: tuple[Tensor | None, ...], *large: Tensor | None) -> Walk:
    """large: in the kernel's order. Maps without channels are expanded; None has strides of 0."""
    expanded = [None if t is None else t.expand(chain.shape) for t in large]
    return walk(chain.shape, expanded, per_sample=small[1] is not None or small[4] is not None)


def numbers(over: Walk) -> tuple[int, ...]:
    return sum(over.strides, ())


def dense(*small: Tensor | None) -> tuple[Tensor | None, ...]:
    """Bias, demod, strength and next_style side by side in memory; noise, which may be large, keeps its strides."""
    return tuple(t if t is None or i == 2 else t.contiguous() for i, t in enumerate(small))


def pointers(*tensors: Tensor | None) -> list[Tensor]:
    """Something to point to instead of each None: what nothing is read from or written to."""
    some = next(t for t in tensors if t is not None)
    return [some if t is None else t for t in tensors]


def flags(prefix: str, *small: Tensor | bool | None) -> dict[str, bool]:
    return {f"{prefix}_{name}": t is not None and t is not False for name, t in zip(SMALL, small, strict=False)}
