"""The head and the distance of hierarchical semantic regularisation (HSR, arXiv 2208.03764).

    hidden = √2·relu(w1 ⋆ x + b1);   prediction = resize(w2 ⋆ hidden + b2);   loss = distance(prediction, target)

resize is the area resize (adaptive average pooling) to the target's grid. It is linear with weights that sum to one, so
it commutes with the second convolution: the hidden map is pooled first when that shrinks it, and the prediction after
when it does not. On a GPU (feature_match_triton) each axis is resized where it is smaller, and the hidden map never
reaches memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import SQRT2

DISTANCES = ("mse", "cosine")
HIDDEN_VALUES = 2**24  # of the hidden map that are alive at a time: one image of 64×64 at 4096 channels


def distance_torch(prediction: Tensor, target: Tensor, distance: str) -> Tensor:
    """mse: mean of squared differences. cosine: mean over positions of 1 − cos of the two channel vectors."""
    if distance == "mse":
        return (prediction - target).square().mean()
    return (1 - F.cosine_similarity(prediction, target, dim=1)).mean()


def feature_match_torch(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, target: Tensor, *, distance: str = "mse"
) -> Tensor:
    """The definition of `feature_match`, resized last."""
    hidden = F.relu(F.conv2d(x, w1, b1)) * SQRT2
    prediction = F.adaptive_avg_pool2d(F.conv2d(hidden, w2, b2), target.shape[2:])
    return distance_torch(prediction, target, distance)


class _FeatureMatch(torch.autograd.Function):
    """The loss, and with it at once its gradients, a few images at a time: the hidden map of a whole batch (67 MB an
    image at 64×64) is never held. Its backward has only to scale what is there; hence first order only.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, target, distance):
        wanted = ctx.needs_input_grad[:5]
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w1, b1, w2, b2), wanted, strict=True)]
        features, *weights = leaves
        pixels = max(x.shape[2] * x.shape[3], target.shape[2] * target.shape[3])
        chunk = max(1, HIDDEN_VALUES // (w1.shape[0] * pixels))
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, target.dtype))
        gradients = [torch.zeros_like(t) if need else None for t, need in zip(leaves, wanted, strict=True)]
        for i in range(0, len(x), chunk):
            part = features[i : i + chunk].detach().requires_grad_(wanted[0])
            inputs = [t for t in (part, *weights) if t.requires_grad]
            with torch.enable_grad():
                share = _pooled_first(part, *weights, target[i : i + chunk], distance) * (len(part) / len(x))
            loss += share.detach()
            if not inputs:
                continue
            found = iter(torch.autograd.grad(share, inputs))
            if wanted[0]:
                gradients[0][i : i + chunk] = next(found)
            for total in gradients[1:]:
                if total is not None:
                    total += next(found)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @launch.once_differentiable("feature_match")
    def backward(ctx, g):
        return *(None if t is None else t * g for t in ctx.saved_tensors), None, None


def _pooled_first(x, w1, b1, w2, b2, target, distance):
    """`feature_match_torch`, with the convolutions as matrix products over [..., channels], in the dtype of x, and the
    resize where it costs less.
    """
    grid = target.shape[2:]
    w1, b1, w2, b2 = ((w1.flatten(1) * SQRT2).to(x.dtype), (b1 * SQRT2).to(x.dtype),
                      w2.flatten(1).to(x.dtype), b2.to(x.dtype))  # fmt: skip
    hidden = F.relu(F.linear(x.permute(0, 2, 3, 1), w1, b1), inplace=True)
    if grid[0] * grid[1] < x.shape[2] * x.shape[3]:
        hidden = _area_resize(hidden, grid)
    prediction = F.linear(hidden, w2, b2)
    if prediction.shape[1:3] != grid:
        prediction = _area_resize(prediction, grid)
    return distance_torch(prediction.permute(0, 3, 1, 2), target, distance)


def _area_resize(x: Tensor, grid: torch.Size) -> Tensor:
    """Adaptive average pooling of x [N, H, W, C] to [N, h, w, C]: one small matrix for each axis, several times faster
    than PyTorch's own, above all in the gradient.
    """
    n, height, width, c = x.shape
    x = _bins(height, grid[0], x) @ x.reshape(n, height, width * c)
    x = _bins(width, grid[1], x) @ x.reshape(n * grid[0], width, c)
    return x.reshape(n, *grid, c)


def _bins(size: int, bins: int, like: Tensor) -> Tensor:
    """[bins, size]: row i averages positions ⌊i·size/bins⌋ … ⌈(i+1)·size/bins⌉ − 1."""
    i = torch.arange(bins, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    inside = ((position >= i * size // bins) & (position < -(-(i + 1) * size // bins))).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def feature_match(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, target: Tensor, *, distance: str = "mse"
) -> Tensor:
    """The HSR loss of one resolution → scalar.

    x [N, C, H, W] features; w1 [K, C, 1, 1] and w2 [Ct, K, 1, 1] already scaled (equalised learning rate), b1 [K], b2
    [Ct]; target [N, Ct, h, w], a constant. The products are in the dtype of x, which may be narrower than the weights'
    and the target's, in which the distance and the weights' gradients are. First order only: differentiating a gradient
    raises.
    """
    launch.check_images(x)
    launch.check_projection(w1, "w1", x.shape[1])
    launch.check_shape(b1, "b1", w1.shape[0])
    launch.check_projection(w2, "w2", w1.shape[0])
    launch.check_shape(b2, "b2", w2.shape[0])
    launch.check(target.ndim == 4, f"target must be [N, Ct, h, w]; got {list(target.shape)}")
    launch.check_shape(target, "target", x.shape[0], w2.shape[0], *target.shape[2:])
    for name, t in (("x", x), ("target", target)):
        launch.check(min(t.shape[2:]) > 0, f"{name} must have pixels; got {list(t.shape)}")
    launch.check_devices(x, w1=w1, b1=b1, w2=w2, b2=b2, target=target)
    launch.check(distance in DISTANCES, f"distance must be one of {', '.join(DISTANCES)}; got {distance!r}")
    if launch.backend(x) == "triton":
        from hsrgan.kernels.feature_match_triton import match

        return match(x, w1, b1, w2, b2, target.detach(), distance)
    return _FeatureMatch.apply(x, w1, b1, w2, b2, target.detach(), distance)
