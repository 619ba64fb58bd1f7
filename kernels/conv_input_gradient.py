"""A convolution's input gradient as an op, and with it the style's gradient of a modulated one.

    y = w ⋆ (style·x)        u[n,i,q] = Σ_{o, tap} w[o,i,tap]·g[n,o,p], q = p·stride + tap − padding
    input_gradient:             u, the transpose of the convolution
    modulated_input_gradient:   gx = u·style;  gstyle[n,i] = Σ_q u·x

Of a transposed convolution the input gradient is a convolution, `conv2d`. Every derivative of these is one of them, a
convolution or `weight_gradient` again.
"""

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import pairs
from hsrgan.kernels.convolution import Convolution, Geometry, InputGradient, cast


def input_gradient_torch(g: Tensor, weight: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 0) -> Tensor:
    """The definition of `input_gradient`."""
    return conv2d_input((len(g), weight.shape[1], *size), weight.to(g.dtype), g, stride, padding)


def input_gradient(g: Tensor, weight: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 0) -> Tensor:
    """The gradient [N, Cin, *size] of a convolution's input of that size; dtype and memory format of g.

    g [N, Cout, h, w]; weight [Cout, Cin, k, k]. k is 1 or 3, padding at most k // 2; stride 1, or 2 for 3×3 without
    padding. Differentiable any number of times in g and weight. ValueError names an argument that does not fit.
    """
    geometry = _check(g, weight, size, stride, padding)
    like = g.new_empty(()).expand(len(g), weight.shape[1], *size)
    return Convolution.apply(g, weight, None, cast(weight, g), geometry.adjoint(like))


def modulated_input_gradient_torch(
    g: Tensor, x: Tensor, weight: Tensor, style: Tensor, stride: int = 1, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """The definition of `modulated_input_gradient`."""
    u = input_gradient_torch(g, weight, x.shape[2:], stride, padding)
    wide = torch.promote_types(x.dtype, torch.float32)
    return u * pairs(style, u), (u.to(wide) * x.to(wide)).sum((2, 3)).to(style.dtype)


def modulated_input_gradient(
    g: Tensor, x: Tensor, weight: Tensor, style: Tensor, stride: int = 1, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of style [N, Cin]; with the GEMM in one pass over g and x.

    g and weight as of `input_gradient`; x [N, Cin, H, W] is what the style multiplied, of the dtype of g.
    Differentiable any number of times in all four tensors.
    """
    launch.check_images(x)
    geometry = _check(g, weight, tuple(x.shape[2:]), stride, padding)
    launch.check(g.dtype == x.dtype, f"g must be {x.dtype} as x is; got {g.dtype}")
    launch.check_shape(x, "x", len(g), weight.shape[1], *x.shape[2:])
    launch.check_shape(style, "style", *x.shape[:2])
    launch.check_devices(x, g=g, style=style)
    return InputGradient.apply(g, x, weight, style, cast(weight, x), geometry)


def _check(g: Tensor, weight: Tensor, size: tuple[int, int], stride: int, padding: int) -> Geometry:
    launch.check_images(g, "g")
    launch.check(weight.ndim == 4, f"weight must be [Cout, Cin, k, k]; got {list(weight.shape)}")
    k = weight.shape[-1]
    launch.check_shape(weight, "weight", g.shape[1], weight.shape[1], k, k)
    launch.check_devices(g, weight=weight)
    launch.check(k in (1, 3), f"weight must be 1×1 or 3×3; got {k}×{k}")
    launch.check(stride in (1, 2), f"stride must be 1 or 2; got {stride}")
    launch.check(padding in range(k // 2 + 1), f"padding must lie in 0 … {k // 2}; got {padding}")
    fits = stride == 1 or (k, padding) == (3, 0)
    launch.check(fits, f"stride 2 is for 3×3 without padding; got {k}×{k} and {padding}")
    geometry = Geometry(k, stride, padding)
    found = geometry.size(g.new_empty(()).expand(1, 1, *size))
    launch.check_shape(g, "g", *g.shape[:2], *found)
    return geometry
