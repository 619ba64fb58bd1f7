"""The head and the distance of hierarchical semantic regularisation (HSR, arXiv 2208.03764).

    hidden = √2·relu(w1 ⋆ x + b1);   prediction = resize(w2 ⋆ hidden + b2);   loss = distance(prediction, target)

resize is the area resize (adaptive average pooling) to the target's grid. It is linear with weights that sum to one, so
it commutes with the second convolution: the hidden map is pooled first when that shrinks it, and the prediction after
when it does not.
"""

import torch.nn.functional as F
from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import SQRT2

DISTANCES = ("mse", "cosine")


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


def feature_match(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, target: Tensor, *, distance: str = "mse"
) -> Tensor:
    """The HSR loss of one resolution → scalar.

    x [N, C, H, W] features; w1 [K, C, 1, 1] and w2 [Ct, K, 1, 1] already scaled (equalised learning rate), b1 [K], b2
    [Ct]; target [N, Ct, h, w], a constant. First order only: differentiating a gradient raises.
    """
    launch.check_images(x)
    launch.check_shape(w1, "w1", w1.shape[0], x.shape[1], 1, 1)
    launch.check_shape(b1, "b1", w1.shape[0])
    launch.check_shape(w2, "w2", w2.shape[0], w1.shape[0], 1, 1)
    launch.check_shape(b2, "b2", w2.shape[0])
    launch.check(target.ndim == 4, f"target must be [N, Ct, h, w]; got {list(target.shape)}")
    launch.check_shape(target, "target", x.shape[0], w2.shape[0], *target.shape[2:])
    launch.check(distance in DISTANCES, f"distance must be one of {', '.join(DISTANCES)}; got {distance!r}")
    launch.backend()
    return feature_match_torch(x, w1, b1, w2, b2, target, distance=distance)
