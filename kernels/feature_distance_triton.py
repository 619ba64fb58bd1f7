"""Triton kernels of `feature_match`'s narrow end: the distance of the prediction to the target, its reduction and its
gradient in one pass, with the area resize of the axes on which the target's grid is finer than the image.

    prediction[n, i, j, c] = b2[c] + mean over the cells (u, v) of target position (i, j) of s[u, v]·y[n, u, v, c]

y [N, h', w', Ct] is the second convolution of the bins' sums, h' = min(H, h) and w' = min(W, w); s = scale / (pixels of
bin (u, v)) makes them means. A grid axis is either resized before y or here, never both.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsrgan.kernels import blocks as table
from hsrgan.kernels import launch

EPS = 1e-8  # floor of a norm in torch's cosine_similarity


@triton.jit
def _bin(i, size, bins):
    """First position of bin i, and how many: ⌊i·size/bins⌋ … ⌈(i+1)·size/bins⌉ − 1."""
    first = i * size // bins
    return first, ((i + 1) * size + bins - 1) // bins - first


@triton.jit
def _to_mean(u, v, H, W, gh, gw, scale, ACC: tl.constexpr):
    """s of bin (u, v)."""
    _, rows = _bin(u, H, gh)
    _, columns = _bin(v, W, gw)
    return scale / (rows * columns).to(ACC)


@triton.jit
def _prediction(y, bias, r, c, rows, Ct, H, W, gh, gw, th, tw, scale, GROW: tl.constexpr, ACC: tl.constexpr):
    """[rows r, channels c] of the prediction; 0 outside."""
    n, i, j = (r // (th * tw)).to(tl.int64), r // tw % th, r % tw
    inside = (r < rows)[:, None] & (c < Ct)[None, :]
    u0, us = _bin(i, gh, th)
    v0, vs = _bin(j, gw, tw)
    p = tl.zeros([r.shape[0], c.shape[0]], ACC)
    taps: tl.constexpr = 2 if GROW else 1  # a finer grid's position covers two cells of an axis at most
    for tap in tl.static_range(taps * taps):
        u, v = u0 + tap // taps, v0 + tap % taps
        cell = inside & ((tap // taps < us) & (tap % taps < vs))[:, None]
        value = tl.load(y + ((n * gh + u) * gw + v)[:, None] * Ct + c[None, :], mask=cell, other=0).to(ACC)
        p += value * (_to_mean(u, v, H, W, gh, gw, scale, ACC) / (us * vs).to(ACC))[:, None]
    return tl.where(inside, p + tl.load(bias + c, mask=c < Ct, other=0).to(ACC)[None, :], 0.0)


@triton.jit
def _target(target, r, c, rows, Ct, th, tw, tn, tc, ti, tj, ACC: tl.constexpr):
    n, i, j = (r // (th * tw)).to(tl.int64), r // tw % th, r % tw
    at = (n * tn + i * ti + j * tj)[:, None] + c.to(tl.int64)[None, :] * tc
    return tl.load(target + at, mask=(r < rows)[:, None] & (c < Ct)[None, :], other=0).to(ACC)


@triton.jit
def distance_kernel(
    y, bias, target, loss, dy, dbias,
    rows, Ct, H, W, gh, gw, th, tw, tn, tc, ti, tj, scale, keep,
    BR: tl.constexpr, BC: tl.constexpr, COSINE: tl.constexpr, GROW: tl.constexpr, KEEP: tl.constexpr,
    ACC: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Program = BR of the rows = N·th·tw positions. loss [programs]: its sum of squared differences, or of 1 − cos.

    If KEEP also dy [N, gh, gw, Ct] (GROW: [N, th, tw, Ct], before the resize's own gradient) times `keep`, and dbias
    [programs, Ct]; both without the factor 2/(rows·Ct) (mse) or 1/(rows·Ct) (cosine).
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    total = tl.zeros([BR], ACC)
    if COSINE:
        pp, tt = tl.zeros([BR], ACC), tl.zeros([BR], ACC)
        for c0 in range(0, Ct, BC):
            c = c0 + tl.arange(0, BC)
            p = _prediction(y, bias, r, c, rows, Ct, H, W, gh, gw, th, tw, scale, GROW, ACC)
            t = _target(target, r, c, rows, Ct, th, tw, tn, tc, ti, tj, ACC)
            total += tl.sum(p * t, 1)
            pp += tl.sum(p * p, 1)
            tt += tl.sum(t * t, 1)
        length = tl.sqrt(pp)
        over_p = 1 / tl.maximum(length, FLOOR)
        over_t = 1 / tl.maximum(tl.sqrt(tt), FLOOR)
        cos = total * over_p * over_t
        radial = tl.where(length > 0, cos * over_p / tl.where(length > 0, length, 1.0), 0.0)
        total = tl.where(r < rows, 1 - cos, 0.0)
    if KEEP or not COSINE:
        for c0 in range(0, Ct, BC):
            c = c0 + tl.arange(0, BC)
            p = _prediction(y, bias, r, c, rows, Ct, H, W, gh, gw, th, tw, scale, GROW, ACC)
            t = _target(target, r, c, rows, Ct, th, tw, tn, tc, ti, tj, ACC)
            if COSINE:
                d = (p * radial[:, None] - t * (over_p * over_t)[:, None]) * Ct
            else:
                d = p - t
                total += tl.sum(d * d, 1)
            if KEEP:
                tl.store(dbias + tl.program_id(0) * Ct + c, tl.sum(d, 0), mask=c < Ct)
                if not GROW:
                    d *= _to_mean(r // tw % th, r % tw, H, W, gh, gw, scale, ACC)[:, None]
                at = r.to(tl.int64)[:, None] * Ct + c[None, :]
                tl.store(dy + at, (d * keep).to(dy.dtype.element_ty), mask=(r < rows)[:, None] & (c < Ct)[None, :])
    tl.store(loss + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def grow_gradient_kernel(
    d, dy, rows, Ct, H, W, gh, gw, th, tw, scale,
    BR: tl.constexpr, BC: tl.constexpr, UP: tl.constexpr, ACROSS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dy [N, gh, gw, Ct] gathered from d [N, th, tw, Ct], for rows = N·gh·gw cells. Program (BR cells; BC channels).

    A cell is part of at most UP × ACROSS target positions.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n, u, v = (r // (gh * gw)).to(tl.int64), r // gw % gh, r % gw
    i0, count_i = _bin(u, th, gh)  # the positions whose cells include u: the same bins, seen from the other side
    j0, count_j = _bin(v, tw, gw)
    inside = (r < rows)[:, None] & (c < Ct)[None, :]
    acc = tl.zeros([BR, BC], ACC)
    for tap in range(UP * ACROSS):
        i, j = i0 + tap // ACROSS, j0 + tap % ACROSS
        _, us = _bin(i, gh, th)
        _, vs = _bin(j, gw, tw)
        here = inside & ((tap // ACROSS < count_i) & (tap % ACROSS < count_j))[:, None]
        value = tl.load(d + ((n * th + i) * tw + j)[:, None] * Ct + c[None, :], mask=here, other=0).to(ACC)
        acc += value / (us * vs).to(ACC)[:, None]
    acc *= _to_mean(u, v, H, W, gh, gw, scale, ACC)[:, None]
    tl.store(dy + r.to(tl.int64)[:, None] * Ct + c[None, :], acc.to(dy.dtype.element_ty), mask=inside)


def distance_and_gradient(
    y: Tensor, bias: Tensor, target: Tensor, size: tuple[int, int], distance: str, scale: float, keep: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss [], dy like y, dbias [Ct]); without gradients if keep is None.

    y [N, h', w', Ct]; target [N, Ct, h, w] of any strides; size: the image's, (H, W). dy is `keep` times the gradient
    and dbias the gradient, both times N·h·w·Ct (mse: half of that): of the size of the distance itself, which half
    precision holds.
    """
    n, channels, th, tw = target.shape
    gh, gw = y.shape[1:3]
    rows, grow = n * th * tw, (gh, gw) != (th, tw)
    acc, tl_acc = (torch.float64, tl.float64) if y.dtype == torch.float64 else (torch.float32, tl.float32)
    blocks = table.sizes("feature_match.distance", y, "any")
    block_c = min(blocks.pop("BC"), triton.next_power_of_2(channels))
    block_r = max(1, min(blocks.pop("BR"), blocks.pop("values") // block_c))
    programs = -(-rows // block_r)
    loss = y.new_empty(programs, dtype=acc)
    dbias = y.new_empty((programs, channels) if keep else (1, 1), dtype=acc)
    d = y.new_empty((n, th, tw, channels) if keep else (1,), dtype=acc if grow else y.dtype)
    sizes = (*size, gh, gw, th, tw)
    launch.run(
        distance_kernel, (programs,), y, bias, target, loss, d, dbias, rows, channels, *sizes, *target.stride(), scale,
        float(keep or 0), BR=block_r, BC=block_c, COSINE=distance == "cosine", GROW=grow, KEEP=keep is not None,
        ACC=tl_acc, FLOOR=EPS, **blocks,
    )  # fmt: skip
    total = loss.sum() / max(1, rows * channels if distance == "mse" else rows)
    if keep is None:
        return total, None, None
    dy = d
    if grow:
        dy, cells = torch.empty_like(y), n * gh * gw
        blocks = table.sizes("feature_match.grow", y, "any")
        block_c, block_r = min(blocks.pop("BC"), block_c), blocks.pop("BR")
        up, across = _most_in_a_bin(th, gh), _most_in_a_bin(tw, gw)
        launch.run(
            grow_gradient_kernel, (-(-cells // block_r), -(-channels // block_c)),
            d, dy, cells, channels, *sizes, scale,
            BR=block_r, BC=block_c, UP=up, ACROSS=across, ACC=tl_acc, **blocks,
        )  # fmt: skip
    return total, dy, dbias.sum(0)


def _most_in_a_bin(size: int, bins: int) -> int:
    return max(math.ceil((i + 1) * size / bins) - i * size // bins for i in range(bins))
