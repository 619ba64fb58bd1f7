"""StyleGAN2's networks read literally, in fp64: per-sample weights in a grouped convolution, FIRs with all 16 taps."""

import math

import torch
import torch.nn.functional as F

F2D = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64).outer(torch.tensor([1.0, 3, 3, 1], dtype=torch.float64)) / 64


def fir(x, pad, up=1, down=1, gain=1.0):
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h * up, w * up)
    z[:, :, ::up, ::up] = x
    z = F.pad(z, (pad[0], pad[1], pad[0], pad[1]))
    return F.conv2d(z, (F2D * gain).repeat(c, 1, 1, 1), groups=c)[:, :, ::down, ::down]


def lrelu(x, gain, clamp):
    return (torch.where(x > 0, x, 0.2 * x) * gain).clamp(-clamp, clamp)


def fc(p, name, x, lr=1.0):
    w = p[f"{name}.weight"]
    return x @ (w * lr / math.sqrt(w.shape[1])).T + p[f"{name}.bias"] * lr


def moment(x):
    return x / ((x * x).mean(1, keepdim=True) + 1e-8).sqrt()


def mapping(p, z, c, layers=2):
    x = [] if z is None else [moment(z)]
    if c is not None:
        x.append(moment(fc(p, "mapping.embed", c)))
    x = torch.cat(x, 1)
    for i in range(layers):
        x = fc(p, f"mapping.fc{i}", x, 0.01)
        x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    return x


def modulated(x, weight, style, up, demodulate):
    n, cin, height, width = x.shape
    cout, k = weight.shape[0], weight.shape[2]
    w = weight[None] * style[:, None, :, None, None]
    if demodulate:
        w = w / ((w * w).sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    x = x.reshape(1, n * cin, height, width)
    if up == 1:
        y = F.conv2d(x, w.reshape(n * cout, cin, k, k), padding=k // 2, groups=n)
        return y.reshape(n, cout, height, width)
    w = w.transpose(1, 2).reshape(n * cin, cout, k, k)
    y = F.conv_transpose2d(x, w, stride=2, groups=n).reshape(n, cout, 2 * height + 1, 2 * width + 1)
    return fir(y, [1, 1], gain=4)


def reference_g(p, architecture, ws, noise, clamp, features=None):
    def conv(name, x, w, z, up, scale=1.0):
        x = modulated(x, p[f"{name}.weight"], fc(p, f"{name}.affine", w), up, True)
        x = x + z * p[f"{name}.noise_strength"] + p[f"{name}.bias"][:, None, None]
        return lrelu(x, math.sqrt(2) * scale, clamp * scale)

    n = len(ws)
    height, width = p["synthesis.b4.const"].shape[1:]
    sizes = [(height << k, width << k) for k in (0, 1, 1, 2, 2)]
    noise = iter(noise.split([h * w for h, w in sizes], dim=1))
    noise = iter([z.reshape(n, 1, *size) for z, size in zip(noise, sizes, strict=True)])
    img = None
    for k, r in enumerate((4, 8, 16)):
        b = f"synthesis.b{r}"
        if r == 4:
            x = conv(f"{b}.conv1", p[f"{b}.const"].repeat(n, 1, 1, 1), ws[:, 0], next(noise), 1)
            w_rgb = ws[:, 1]
        else:
            y = x
            x = conv(f"{b}.conv0", x, ws[:, 2 * k - 1], next(noise), 2)
            scale = math.sqrt(0.5) if architecture == "resnet" else 1.0
            x = conv(f"{b}.conv1", x, ws[:, 2 * k], next(noise), 1, scale)
            w_rgb = ws[:, 2 * k + 1]
            if architecture == "resnet":
                w = p[f"{b}.skip.weight"]
                x = x + fir(F.conv2d(y, w / math.sqrt(w.shape[1])), [2, 1], up=2, gain=4) * math.sqrt(0.5)
        if architecture == "skip" or r == 16:
            w = p[f"{b}.torgb.weight"]
            style = fc(p, f"{b}.torgb.affine", w_rgb) / math.sqrt(w.shape[1])
            rgb = (modulated(x, w, style, 1, False) + p[f"{b}.torgb.bias"][:, None, None]).clamp(-clamp, clamp)
            img = rgb if img is None else fir(img, [2, 1], up=2, gain=4) + rgb
        if features is not None:
            features[r] = x
    return img


def reference_d(p, architecture, img, c, clamp, group):
    def conv(name, x, down=1, scale=1.0, clamp=clamp):
        w = p[f"{name}.weight"]
        k = w.shape[2]
        w = w / math.sqrt(w.shape[1] * k * k)
        x = F.conv2d(fir(x, [2, 2]), w, stride=2) if down == 2 else F.conv2d(x, w, padding=k // 2)
        return lrelu(x + p[f"{name}.bias"][:, None, None], math.sqrt(2) * scale, clamp * scale)

    scale = math.sqrt(0.5) if architecture == "resnet" else 1.0
    x = 0.0
    for r in (16, 8):
        if r == 16 or architecture == "skip":
            x = x + conv(f"b{r}.fromrgb", img)
            img = fir(img, [1, 1], down=2)
        if architecture == "resnet":
            w = p[f"b{r}.skip.weight"]
            y = F.conv2d(fir(x, [1, 1], down=2), w / math.sqrt(w.shape[1])) * scale
        x = conv(f"b{r}.conv1", conv(f"b{r}.conv0", x), down=2, scale=scale)
        if architecture == "resnet":
            x = x + y
    if architecture == "skip":
        x = x + conv("b4.fromrgb", img, clamp=math.inf)
    n = len(x)
    group = min(group, n)
    std = torch.empty(n, 1, *x.shape[2:], dtype=x.dtype)
    for start in range(n // group):
        members = x[start :: n // group]
        assert len(members) == group
        deviation = ((members - members.mean(0)).square().mean(0) + 1e-8).sqrt()
        std[start :: n // group] = deviation.mean()
    x = conv("b4.conv", torch.cat([x, std], 1))
    x = fc(p, "b4.fc", x.reshape(n, -1))
    x = fc(p, "b4.out", torch.where(x > 0, x, 0.2 * x) * math.sqrt(2))
    if c is not None:
        cmap = mapping(p, None, c)
        x = (x * cmap).sum(1, keepdim=True) / math.sqrt(cmap.shape[1])
    return x
