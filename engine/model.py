"""The networks of StyleGAN2 (Karras et al. 2020, 1912.04958, and -ADA, 2006.06676): generator and discriminator.

State-dict keys, shapes and constructor arguments are the published ones, so that published weights load with no
mapping table. Beyond them `img_resolution` may be any size of sizes.py; a block b{r} then has the true size that
`block_sizes` says, and a resolution r is that block's name. Parameters are fp32; with `half_dtype` the activations of
the `num_fp16_res` highest resolutions (never below 8) are half precision. Nothing is cached between calls and no
forward changes a parameter or a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hsrgan.engine.blocks import DiscriminatorBlock, DiscriminatorEpilogue, SynthesisBlock
from hsrgan.engine.errors import UserError
from hsrgan.engine.layers import Linear, normalize_2nd_moment
from hsrgan.engine.pretrained import Pretrained
from hsrgan.engine.sizes import Resolution, block_sizes, plain
from hsrgan.kernels import styles

ARCHITECTURES = ("skip", "orig", "resnet")
NOISE_MODES = ("random", "const", "none")


def _channels(resolution: int, channel_base: int, channel_max: int) -> int:
    channels = min(channel_base // resolution, channel_max)
    if channels < 1:
        raise UserError(f"channel_base {channel_base} leaves no channel at {resolution}×{resolution}; raise it")
    return channels


def _half_from(top: int, num_fp16_res: int) -> int:
    """The lowest block that computes in half precision."""
    return max(2 * top >> num_fp16_res, 8)


def _check_architecture(name: str) -> None:
    if name not in ARCHITECTURES:
        raise UserError(f"architecture is {name!r}, but must be one of {', '.join(ARCHITECTURES)}")


class Mapping(nn.Module):
    """Mapping network: z [N, z_dim] and labels c [N, c_dim] → w.

    G's returns ws [N, num_ws, w_dim] (a broadcast view) and keeps `w_avg`; D's has neither z nor `w_avg`
    (z_dim = 0, num_ws = None) and returns [N, w_dim].
    """

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_ws: int | None, num_layers: int) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.num_ws, self.num_layers = z_dim, c_dim, num_ws, num_layers
        if c_dim > 0:
            self.embed = Linear(c_dim, w_dim)
        features = [z_dim + (w_dim if c_dim > 0 else 0), *[w_dim] * num_layers]
        for i in range(num_layers):
            self.add_module(f"fc{i}", Linear(features[i], features[i + 1], act="lrelu", lr_multiplier=0.01))
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None,
        *,
        truncation_psi: float | Tensor = 1,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """w ← w_avg + ψ·(w − w_avg), on the first `truncation_cutoff` of the ws only where that is given.

        ψ as a tensor [] stays an input of an exported graph.

        Raises ValueError where z or c has another width than the network was built for.
        """
        dtype = self.fc0.weight.dtype
        parts = []
        if self.z_dim > 0:
            if z is None or z.ndim != 2 or z.shape[1] != self.z_dim:
                raise ValueError(f"z must be [N, {self.z_dim}], got {_shape(z)}")
            parts.append(normalize_2nd_moment(z.to(dtype)))
        _check_labels(c, self.c_dim)
        if self.c_dim > 0:
            parts.append(normalize_2nd_moment(self.embed(c.to(dtype))))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        if self.num_ws is None:
            return x
        return self.truncated(x.unsqueeze(1).expand(-1, self.num_ws, -1), truncation_psi, truncation_cutoff)

    def truncated(self, ws: Tensor, psi: float | Tensor, cutoff: int | None = None) -> Tensor:
        """ws [N, num_ws, w_dim] nearer to w_avg by ψ, or the first `cutoff` of them; ψ = 1 changes nothing."""
        if not isinstance(psi, Tensor) and psi == 1:
            return ws
        if cutoff is None:
            return self.w_avg.lerp(ws, psi)
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], psi), ws[:, cutoff:]], dim=1)

    @torch.no_grad()
    def update_w_avg(self, w: Tensor, beta: float) -> None:
        """w_avg ← β·w_avg + (1−β)·mean over w [N, w_dim]. With several ranks, give their common mean as [1, w_dim]."""
        self.w_avg.copy_(w.mean(dim=0).lerp(self.w_avg, beta))


class Synthesis(nn.Module):
    """Synthesis network: ws [N, num_ws, w_dim] → image [N, img_channels, H, W], fp32."""

    def __init__(
        self,
        w_dim: int,
        img_resolution: Resolution,
        img_channels: int,
        *,
        channel_base: int,
        channel_max: int,
        num_fp16_res: int,
        conv_clamp: float | None,
        architecture: str,
        half_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _check_architecture(architecture)
        self.w_dim = w_dim
        sizes = block_sizes(img_resolution)
        self.resolutions = list(sizes)
        self.num_ws = 2 * len(sizes)
        half_from = _half_from(self.resolutions[-1], num_fp16_res)
        self.channels: dict[int, int] = {}  # of block b{r}'s features
        in_channels = 0
        for r, size in sizes.items():
            out_channels = self.channels[r] = _channels(r, channel_base, channel_max)
            block = SynthesisBlock(
                in_channels,
                out_channels,
                w_dim=w_dim,
                size=size,
                img_channels=img_channels,
                conv_clamp=conv_clamp,
                architecture=architecture,
                is_last=r == self.resolutions[-1],
                half_dtype=half_dtype if r >= half_from else None,
            )
            self.add_module(f"b{r}", block)
            in_channels = out_channels
        self.noise_sizes = [sizes[4], *(sizes[r] for r in self.resolutions[1:] for _ in range(2))]
        self.noise_size = sum(h * w for h, w in self.noise_sizes)  # values per sample

    def forward(
        self,
        ws: Tensor,
        *,
        noise: Tensor | None = None,
        noise_mode: str = "random",
        return_features: Sequence[int] = (),
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Image, or (image, {r: output of block b{r} [N, C_r, h, w] fp32}) where `return_features` names resolutions.

        noise: flat [N, noise_size], the noise of b4.conv1, b8.conv0, b8.conv1, … row by row, used in place of a draw
        in noise_mode "random". A sample's image depends on its own rows of ws and noise only.

        Raises ValueError for another shape of ws or noise, an unknown noise_mode or an unknown resolution.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws must be [N, {self.num_ws}, {self.w_dim}], got {_shape(ws)}")
        unknown = [r for r in return_features if r not in self.resolutions]
        if unknown:
            raise ValueError(f"return_features has {unknown}, but the blocks are at {self.resolutions}")
        dtype = self.b4.const.dtype
        noises = self._noises(ws.shape[0], noise, noise_mode, ws.device, dtype)
        below = image = None
        features = {}
        each, noises = iter(self._styles(ws.to(dtype))), iter(noises)
        blocks = [getattr(self, f"b{r}") for r in self.resolutions]
        styles = [[next(each) for _ in block.styled] for block in blocks]
        above = [*((block, own[0]) for block, own in zip(blocks[1:], styles[1:], strict=True)), None]
        for r, block, own, higher in zip(self.resolutions, blocks, styles, above, strict=True):
            below, image = block(below, image, own, [next(noises) for _ in block.layers], higher)
            if r in return_features:
                features[r] = below.x.to(dtype)
        return (image, features) if return_features else image

    def _styles(self, ws: Tensor) -> tuple[Tensor, ...]:
        """The style of every layer in order; a toRGB shares its w with the next block's conv0."""
        layers, which, first = [], [], 0
        for r in self.resolutions:
            block = getattr(self, f"b{r}")
            layers += block.styled
            which += range(first, first + len(block.styled))
            first += len(block.layers)
        gains = [layer.style_gain for layer in layers]
        return styles(
            ws / math.sqrt(self.w_dim), [layer.affine.weight for layer in layers],
            [layer.affine.bias for layer in layers], which, gains,
        )  # fmt: skip

    def _noises(
        self, n: int, noise: Tensor | None, mode: str, device: torch.device, dtype: torch.dtype
    ) -> list[Tensor | None]:
        """The noise of each layer in order, [n or 1, 1, h, w] or None."""
        if mode not in NOISE_MODES:
            raise ValueError(f"noise_mode is {mode!r}, but must be one of {', '.join(NOISE_MODES)}")
        if noise is not None and (mode != "random" or noise.shape != (n, self.noise_size)):
            raise ValueError(
                f"noise must be [{n}, {self.noise_size}] and goes with noise_mode 'random'; "
                f"got {_shape(noise)} with {mode!r}"
            )
        if mode == "none":
            return [None] * len(self.noise_sizes)
        if mode == "const":
            layers = (layer for r in self.resolutions for layer in getattr(self, f"b{r}").layers)
            return [layer.noise_const[None, None] for layer in layers]
        if noise is None:
            noise = torch.randn(n, self.noise_size, device=device, dtype=dtype)
        rows = noise.to(dtype).split([h * w for h, w in self.noise_sizes], dim=1)
        return [row.unflatten(1, (1, *size)) for row, size in zip(rows, self.noise_sizes, strict=True)]


class Generator(Pretrained, nn.Module):
    """StyleGAN2's generator: `mapping` and `synthesis`.

    img_resolution: an int, or [height, width]; `img_shape` is (C, H, W). half_dtype None computes in fp32 throughout;
    `conv_clamp` acts in every dtype unless None. `init_kwargs` holds all arguments but half_dtype, JSON-able: weights
    are fp32 and independent of the precision they were trained with. `from_pretrained` loads a folder that
    tools/export.py wrote.
    """

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        w_dim: int = 512,
        img_resolution: Resolution = 256,
        img_channels: int = 3,
        *,
        mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 4,
        conv_clamp: float | None = 256,
        architecture: str = "skip",
        half_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = plain(img_resolution), img_channels
        of_synthesis = {
            "channel_base": channel_base,
            "channel_max": channel_max,
            "num_fp16_res": num_fp16_res,
            "conv_clamp": conv_clamp,
            "architecture": architecture,
        }
        self.init_kwargs = {
            "z_dim": z_dim,
            "c_dim": c_dim,
            "w_dim": w_dim,
            "img_resolution": self.img_resolution,
            "img_channels": img_channels,
            "mapping_layers": mapping_layers,
            **of_synthesis,
        }
        self.synthesis = Synthesis(w_dim, img_resolution, img_channels, half_dtype=half_dtype, **of_synthesis)
        self.num_ws = self.synthesis.num_ws
        self.img_shape = (img_channels, *self.synthesis.noise_sizes[-1])
        self.mapping = Mapping(z_dim, c_dim, w_dim, self.num_ws, mapping_layers)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        *,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        noise_mode: str = "random",
        noise: Tensor | None = None,
    ) -> Tensor:
        """z [N, z_dim], c [N, c_dim] → image [N, *img_shape] fp32, about [−1, 1]."""
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, noise=noise, noise_mode=noise_mode)


class Discriminator(nn.Module):
    """StyleGAN2's discriminator: image [N, *img_shape], labels [N, c_dim] → logits [N, 1], fp32.

    Conditional logits are projections on the mapped label (Miyato & Koyama, 1802.05637).
    """

    def __init__(
        self,
        c_dim: int = 0,
        img_resolution: Resolution = 256,
        img_channels: int = 3,
        *,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 4,
        conv_clamp: float | None = 256,
        architecture: str = "resnet",
        mbstd_group_size: int = 4,
        mapping_layers: int = 8,
        half_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_architecture(architecture)
        sizes = block_sizes(img_resolution)
        self.c_dim, self.img_resolution, self.img_channels = c_dim, plain(img_resolution), img_channels
        self.resolutions = [*sizes][:0:-1]  # downwards, without 4
        top = self.resolutions[0]
        self.img_shape = (img_channels, *sizes[top])
        half_from = _half_from(top, num_fp16_res)
        common = {"img_channels": img_channels, "conv_clamp": conv_clamp, "architecture": architecture}
        for r in self.resolutions:
            block = DiscriminatorBlock(
                _channels(r, channel_base, channel_max),
                _channels(r // 2, channel_base, channel_max),
                is_first=r == top,
                half_dtype=half_dtype if r >= half_from else None,
                **common,
            )
            self.add_module(f"b{r}", block)
        channels = _channels(4, channel_base, channel_max)
        cmap_dim = channels if c_dim > 0 else 0
        self.mapping = Mapping(0, c_dim, cmap_dim, None, mapping_layers) if c_dim > 0 else None
        self.b4 = DiscriminatorEpilogue(
            channels, size=sizes[4], cmap_dim=cmap_dim, mbstd_group_size=mbstd_group_size, **common
        )

    def forward(self, img: Tensor, c: Tensor | None = None, parts: int = 1) -> Tensor:
        """`parts` batches of equal length, one after another in img and c, are scored as if each came alone.

        Raises ValueError for an image or labels of another shape, or a batch that minibatch std cannot group.
        """
        if img.ndim != 4 or img.shape[1:] != self.img_shape:
            raise ValueError(f"img must be [N, {', '.join(map(str, self.img_shape))}], got {_shape(img)}")
        _check_labels(c, self.c_dim)
        img = img.to(memory_format=torch.channels_last)
        x = None
        for r in self.resolutions:
            x, img = getattr(self, f"b{r}")(x, img)
        cmap = None if self.mapping is None else self.mapping(None, c)
        return self.b4(x, img, cmap, parts)


def _check_labels(c: Tensor | None, c_dim: int) -> None:
    if c_dim > 0 and (c is None or c.ndim != 2 or c.shape[1] != c_dim):
        raise ValueError(f"labels c must be [N, {c_dim}] for this conditional network, got {_shape(c)}")
    if c_dim == 0 and c is not None and c.shape[-1] != 0:
        raise ValueError(f"this network is unconditional (c_dim 0) and takes no labels, got {_shape(c)}")


def _shape(x: Tensor | None) -> str:
    return "None" if x is None else str(list(x.shape))
