"""The rival of bench_train.py: StyleGAN2 in plain PyTorch, as it is usually written.

NCHW tensors, depthwise convolutions for every FIR, the built-in conv2d and conv_transpose2d and their built-in
gradients, modulation by scaling the input and the output. Skip generator, residual discriminator, unconditional, fp32.
Same keys and same arithmetic as engine.model: bench_train.py loads one state dict into both and compares before it
times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQRT2 = 2**0.5


def lrelu(x: Tensor, gain: float = SQRT2, clamp: float | None = None) -> Tensor:
    x = F.leaky_relu(x, 0.2) * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def fir_filter() -> Tensor:
    f = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(f, f) / 64


def blur(x: Tensor, f: Tensor, pad: int, stride: int = 1, gain: float = 1.0) -> Tensor:
    c = x.shape[1]
    return F.conv2d(x, (f * gain).expand(c, 1, 4, 4), padding=pad, stride=stride, groups=c)


def upsample(x: Tensor, f: Tensor) -> Tensor:
    c = x.shape[1]
    return F.conv_transpose2d(x, (f * 4).expand(c, 1, 4, 4), stride=2, padding=1, groups=c)


class Linear(nn.Module):
    def __init__(self, n_in: int, n_out: int, lr_mult: float = 1.0, bias: float = 0.0, act: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lr_mult)
        self.bias = nn.Parameter(torch.full((n_out,), bias))
        self.weight_gain, self.bias_gain, self.act = lr_mult / n_in**0.5, lr_mult, act

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return lrelu(x) if self.act else x


class Mapping(nn.Module):
    def __init__(self, z_dim: int, w_dim: int, num_ws: int, layers: int):
        super().__init__()
        self.num_ws, self.layers = num_ws, layers
        for i in range(layers):
            self.add_module(f"fc{i}", Linear(w_dim if i else z_dim, w_dim, lr_mult=0.01, act=True))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for i in range(self.layers):
            x = getattr(self, f"fc{i}")(x)
        return x.unsqueeze(1).repeat(1, self.num_ws, 1)


class SynthesisLayer(nn.Module):
    def __init__(self, n_in: int, n_out: int, w_dim: int, resolution: int, up: int, clamp: float | None):
        super().__init__()
        self.up, self.clamp = up, clamp
        self.affine = Linear(w_dim, n_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", fir_filter())

    def forward(self, x: Tensor, w: Tensor, noise_mode: str) -> Tensor:
        style = self.affine(w)
        demod = (style.square() @ self.weight.square().sum((2, 3)).t() + 1e-8).rsqrt()
        x = x * style[:, :, None, None]
        if self.up == 2:
            x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
            x = blur(x, self.resample_filter, pad=1, gain=4)
        else:
            x = F.conv2d(x, self.weight, padding=1)
        x = x * demod[:, :, None, None]
        if noise_mode == "random":
            noise = torch.randn(x.shape[0], 1, *x.shape[2:])
        else:
            noise = self.noise_const
        x = x + noise * self.noise_strength + self.bias[:, None, None]
        return lrelu(x, clamp=self.clamp)


class ToRGB(nn.Module):
    def __init__(self, n_in: int, n_out: int, w_dim: int, clamp: float | None):
        super().__init__()
        self.clamp = clamp
        self.affine = Linear(w_dim, n_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) / x.shape[1] ** 0.5
        x = F.conv2d(x * style[:, :, None, None], self.weight, self.bias)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, w_dim: int, resolution: int, img_channels: int, clamp: float | None):
        super().__init__()
        self.first = resolution == 4
        if self.first:
            self.const = nn.Parameter(torch.randn(n_out, 4, 4))
        else:
            self.conv0 = SynthesisLayer(n_in, n_out, w_dim, resolution, 2, clamp)
        self.conv1 = SynthesisLayer(n_out, n_out, w_dim, resolution, 1, clamp)
        self.torgb = ToRGB(n_out, img_channels, w_dim, clamp)
        self.register_buffer("resample_filter", fir_filter())


class Synthesis(nn.Module):
    def __init__(self, w_dim: int, resolution: int, img_channels: int, base: int, most: int, clamp: float | None):
        super().__init__()
        self.resolutions = [2**i for i in range(2, resolution.bit_length())]
        self.num_ws = 2 * len(self.resolutions)
        width = {r: min(base // r, most) for r in self.resolutions}
        for r in self.resolutions:
            block = SynthesisBlock(width.get(r // 2, 0), width[r], w_dim, r, img_channels, clamp)
            self.add_module(f"b{r}", block)

    def forward(self, ws: Tensor, noise_mode: str = "random") -> Tensor:
        ws = ws.unbind(1)
        block = self.b4
        x = block.conv1(block.const.expand(ws[0].shape[0], -1, -1, -1), ws[0], noise_mode)
        img = block.torgb(x, ws[1])
        for k, r in enumerate(self.resolutions[1:], start=1):
            block = getattr(self, f"b{r}")
            x = block.conv0(x, ws[2 * k - 1], noise_mode)
            x = block.conv1(x, ws[2 * k], noise_mode)
            img = upsample(img, block.resample_filter) + block.torgb(x, ws[2 * k + 1])
        return img


class PlainGenerator(nn.Module):
    """z [N, z_dim] → mapping → synthesis → images [N, img_channels, R, R]; the keys of engine.model.Generator."""

    def __init__(
        self,
        z_dim: int = 512,
        w_dim: int = 512,
        img_resolution: int = 256,
        img_channels: int = 3,
        *,
        mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.synthesis = Synthesis(w_dim, img_resolution, img_channels, channel_base, channel_max, conv_clamp)
        self.num_ws = self.synthesis.num_ws
        self.mapping = Mapping(z_dim, w_dim, self.num_ws, mapping_layers)


class Conv(nn.Module):
    def __init__(self, n_in: int, n_out: int, k: int, down: int = 1, bias: bool = True, act: bool = True, clamp=None):
        super().__init__()
        self.k, self.down, self.act, self.clamp = k, down, act, clamp
        self.weight = nn.Parameter(torch.randn(n_out, n_in, k, k))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.weight_gain = 1 / (n_in * k * k) ** 0.5
        self.register_buffer("resample_filter", fir_filter())

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        weight = self.weight * self.weight_gain
        if self.down == 1:
            x = F.conv2d(x, weight, self.bias, padding=self.k // 2)
        elif self.k == 1:
            x = F.conv2d(blur(x, self.resample_filter, pad=1, stride=2), weight, self.bias)
        else:
            x = F.conv2d(blur(x, self.resample_filter, pad=2), weight, self.bias, stride=2)
        if not self.act:
            return x * gain
        return lrelu(x, SQRT2 * gain, None if self.clamp is None else self.clamp * gain)


class DiscriminatorBlock(nn.Module):
    def __init__(self, n_img: int, n_in: int, n_out: int, clamp: float | None):
        super().__init__()
        if n_img:
            self.fromrgb = Conv(n_img, n_in, 1, clamp=clamp)
        self.conv0 = Conv(n_in, n_in, 3, clamp=clamp)
        self.conv1 = Conv(n_in, n_out, 3, down=2, clamp=clamp)
        self.skip = Conv(n_in, n_out, 1, down=2, bias=False, act=False)
        self.register_buffer("resample_filter", fir_filter())

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "fromrgb"):
            x = self.fromrgb(x)
        y = self.skip(x, gain=0.5**0.5)
        return y + self.conv1(self.conv0(x), gain=0.5**0.5)


class DiscriminatorEpilogue(nn.Module):
    def __init__(self, n_in: int, mbstd_group_size: int, clamp: float | None):
        super().__init__()
        self.group = mbstd_group_size
        self.conv = Conv(n_in + 1, n_in, 3, clamp=clamp)
        self.fc = Linear(n_in * 16, n_in, act=True)
        self.out = Linear(n_in, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        group = min(self.group, n)
        std = (x.reshape(group, -1, c, h, w).var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        x = torch.cat([x, std.reshape(-1, 1, 1, 1).repeat(group, 1, h, w)], 1)
        return self.out(self.fc(self.conv(x).flatten(1)))


class PlainDiscriminator(nn.Module):
    """Images [N, img_channels, R, R] → logits [N, 1]; the keys of engine.model.Discriminator."""

    def __init__(
        self,
        img_resolution: int = 256,
        img_channels: int = 3,
        *,
        channel_base: int = 32768,
        channel_max: int = 512,
        conv_clamp: float | None = None,
        mbstd_group_size: int = 4,
    ):
        super().__init__()
        self.resolutions = [2**i for i in range(img_resolution.bit_length() - 1, 2, -1)]
        width = [min(channel_base // r, channel_max) for r in [*self.resolutions, 4]]
        for i, r in enumerate(self.resolutions):
            self.add_module(f"b{r}", DiscriminatorBlock(0 if i else img_channels, width[i], width[i + 1], conv_clamp))
        self.b4 = DiscriminatorEpilogue(width[-1], mbstd_group_size, conv_clamp)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        for r in self.resolutions:
            img = getattr(self, f"b{r}")(img)
        return self.b4(img)
