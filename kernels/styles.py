"""The styles of all layers of G, each an affine map of its own w (StyleGAN, arXiv 1812.04948, §2: "A").

    style_i[n, c] = gain_i·(Σ_k weight_i[c, k]·ws[n, which_i, k] + bias_i[c])

One matrix product a layer is 20 to 26 launches forward and four times as many backward, of a few microseconds each
whatever little they compute. In Triton the weights lie one under another, rows of one matrix, and all layers are one
launch; their gradients are two. Every derivative is one of these three again (styles_triton.py).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hsrgan.kernels import launch


def packed_styles_torch(
    ws: Tensor, weight: Tensor, bias: Tensor, *, sizes: Sequence[int], which: Sequence[int], gains: Sequence[float]
) -> Tensor:
    """The definition of `packed_styles`."""
    layers = zip(weight.split(list(sizes)), bias.split(list(sizes)), which, gains, strict=True)
    return torch.cat([(gain * torch.addmm(b, ws[:, i], w.t())).flatten() for w, b, i, gain in layers])


def packed_styles(
    ws: Tensor, weight: Tensor, bias: Tensor, *, sizes: Sequence[int], which: Sequence[int], gains: Sequence[float]
) -> Tensor:
    """The styles [N, sizes[i]] of every layer, one behind another: [N·R] for R rows.

    ws [N, L, K]; weight [R, K] and bias [R], of sizes[i] rows for layer i, which reads ws[:, which[i]] and multiplies
    with gains[i]; which does not decrease. All of one dtype, fp32 or fp64. Differentiable any number of times.
    ValueError names an argument that does not fit.
    """
    launch.check(ws.ndim == 3 and ws.is_floating_point(), f"ws must be [N, L, K]; got {ws.dtype} {list(ws.shape)}")
    rows = sum(sizes)
    launch.check_shape(weight, "weight", rows, ws.shape[2])
    launch.check_shape(bias, "bias", rows)
    launch.check_devices(ws, weight=weight, bias=bias)
    for name, t in (("weight", weight), ("bias", bias)):
        launch.check(t.dtype == ws.dtype, f"{name} must have the dtype of ws, {ws.dtype}; got {t.dtype}")
    for name, each in (("which", which), ("gains", gains)):
        launch.check(len(each) == len(sizes), f"{name} must have one for each of {len(sizes)} layers; got {len(each)}")
    launch.check(all(0 <= i < ws.shape[1] for i in which), f"which must lie in 0 … {ws.shape[1] - 1}; got {which}")
    launch.check(all(a <= b for a, b in pairwise(which)), f"which must not decrease; got {which}")
    if launch.backend(ws) == "triton":
        from hsrgan.kernels.styles_triton import Layers, Styles

        return Styles.apply(ws, weight, bias, Layers(tuple(sizes), tuple(which), tuple(gains)))
    return packed_styles_torch(ws, weight, bias, sizes=sizes, which=which, gains=gains)


def styles(
    ws: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], which: Sequence[int], gains: Sequence[float]
) -> tuple[Tensor, ...]:
    """The style [N, C_i] of each layer: weights[i] [C_i, K] and biases[i] [C_i] of ws[:, which[i]], ws [N, L, K]."""
    if launch.backend(ws) != "triton":  # nothing to gain: a matrix is not copied to be multiplied with
        each = ws.unbind(1)
        found = (torch.addmm(b, each[i], w.t()) for w, b, i in zip(weights, biases, which, strict=True))
        return tuple(t if gain == 1 else t * gain for t, gain in zip(found, gains, strict=True))
    sizes = [len(w) for w in weights]
    flat = packed_styles(
        ws, torch.cat(list(weights)), torch.cat(list(biases)), sizes=sizes, which=which, gains=gains
    )  # fmt: skip
    return tuple(t.view(len(ws), -1) for t in flat.split([len(ws) * size for size in sizes]))
