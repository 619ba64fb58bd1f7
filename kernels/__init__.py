"""The operations StyleGAN2 and HSR spend their time in, each beside its definition in plain PyTorch.

Every op is `op(…)`, fast, and `op_torch(…)`, the definition it is tested against. All are differentiable twice or more,
as their docstrings say (feature_match once), so that R1 and path length need nothing special. Imports torch only.
"""

from hsrgan.kernels.bias_act import bias_act, bias_act_torch
from hsrgan.kernels.bias_act_to_rgb import bias_act_to_rgb, bias_act_to_rgb_torch
from hsrgan.kernels.conv2d import blur_padding, conv2d, conv2d_torch
from hsrgan.kernels.conv2d_bias_act import conv2d_bias_act, conv2d_bias_act_torch, finishes
from hsrgan.kernels.conv_table import use_convolution
from hsrgan.kernels.conv_wgrad import (
    modulated_weight_gradients,
    modulated_weight_gradients_torch,
    weight_gradient,
    weight_gradient_torch,
)
from hsrgan.kernels.demodulation import modulation, modulation_torch
from hsrgan.kernels.feature_match import feature_match, feature_match_torch
from hsrgan.kernels.fir_chain import bias_act_fir, bias_act_fir_torch, fir_bias_act, fir_bias_act_torch
from hsrgan.kernels.launch import backend, use_backend
from hsrgan.kernels.modulated_conv2d import modulated_conv2d, modulated_conv2d_torch, modulated_convolution
from hsrgan.kernels.to_rgb import to_rgb, to_rgb_torch
from hsrgan.kernels.upfirdn2d import (
    downsample2d,
    downsample2d_branch,
    downsample2d_branch_torch,
    downsample2d_torch,
    upfirdn2d,
    upfirdn2d_torch,
    upsample2d,
    upsample2d_torch,
)

__all__ = [
    "backend",
    "bias_act",
    "bias_act_fir",
    "bias_act_fir_torch",
    "bias_act_to_rgb",
    "bias_act_to_rgb_torch",
    "bias_act_torch",
    "blur_padding",
    "conv2d",
    "conv2d_bias_act",
    "conv2d_bias_act_torch",
    "conv2d_torch",
    "downsample2d",
    "downsample2d_branch",
    "downsample2d_branch_torch",
    "downsample2d_torch",
    "feature_match",
    "feature_match_torch",
    "finishes",
    "fir_bias_act",
    "fir_bias_act_torch",
    "modulated_conv2d",
    "modulated_conv2d_torch",
    "modulated_convolution",
    "modulated_weight_gradients",
    "modulated_weight_gradients_torch",
    "modulation",
    "modulation_torch",
    "to_rgb",
    "to_rgb_torch",
    "upfirdn2d",
    "upfirdn2d_torch",
    "upsample2d",
    "upsample2d_torch",
    "use_backend",
    "use_convolution",
    "weight_gradient",
    "weight_gradient_torch",
]
