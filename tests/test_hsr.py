"""HSR against a literal reading of its definition, in fp64; who gets a gradient and who does not."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from hsrgan.engine.hsr import HSRHeads, hsr_term
from hsrgan.engine.teacher import Teacher

CHANNELS = {4: 5, 8: 6, 16: 3}
GRID = {4: (8, 8), 8: (3, 5), 16: (7, 7)}  # grows; shrinks unevenly; shrinks with overlapping windows
CT = 10


def f64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def heads() -> HSRHeads:
    torch.manual_seed(0)
    made = HSRHeads(CHANNELS, dict.fromkeys(CHANNELS, CT), hidden=12).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return made


@pytest.fixture
def features() -> dict[int, torch.Tensor]:
    return {r: f64(2, c, r, r, seed=r).requires_grad_() for r, c in CHANNELS.items()}


@pytest.fixture
def targets() -> dict[int, torch.Tensor]:
    return {r: f64(2, CT, *GRID[r], seed=100 + r) for r in CHANNELS}


def window_mean(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """out_i = mean of in[⌊i·n/m⌋ … ⌈(i+1)·n/m⌉ − 1] on both axes, written out."""
    (h, w), (mh, mw) = x.shape[2:], grid
    rows = [[x[:, :, i * h // mh: math.ceil((i + 1) * h / mh), j * w // mw: math.ceil((j + 1) * w / mw)].mean((2, 3))
             for j in range(mw)] for i in range(mh)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def literal(heads, features, targets, weights, distance):
    """Numerics §2 written down: linear maps of every pixel, resized last."""
    total = 0
    for r, feature in features.items():
        p = {k: v for k, v in heads.heads[str(r)].named_parameters()}
        w1, w2 = p["conv1x1_1.weight"][:, :, 0, 0], p["conv1x1_2.weight"][:, :, 0, 0]
        hidden = torch.einsum("kc,nchw->nkhw", w1 / math.sqrt(w1.shape[1]), feature)
        hidden = (hidden + p["conv1x1_1.bias"].view(-1, 1, 1)).clamp(min=0) * math.sqrt(2)
        out = torch.einsum("tk,nkhw->nthw", w2 / math.sqrt(w2.shape[1]), hidden) + p["conv1x1_2.bias"].view(-1, 1, 1)
        out, target = window_mean(out, targets[r].shape[2:]), targets[r]
        if distance == "mse":
            value = ((out - target) ** 2).mean()
        else:
            value = (1 - (out * target).sum(1) / (out.norm(dim=1) * target.norm(dim=1))).mean()
        total = total + weights.get(r, 1.0) * value
    return total


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_loss_and_gradients_equal_the_definition(heads, features, targets, distance):
    weights = {4: 0.5, 16: 2.0}
    wanted = [*heads.parameters(), *features.values()]
    got = heads.loss(features, targets, weights=weights, distance=distance)
    want = literal(heads, features, targets, weights, distance)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(want, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (3, 5), (1, 1)])
def test_pooling_before_the_second_convolution_is_exact_when_it_shrinks(grid):
    hidden, w2, b2 = f64(2, 12, 16, 16), f64(CT, 12, 1, 1, seed=1), f64(CT, seed=2)
    after = window_mean(F.conv2d(hidden, w2, b2), grid)
    before = F.conv2d(F.adaptive_avg_pool2d(hidden, grid), w2, b2)
    torch.testing.assert_close(before, after, rtol=1e-12, atol=5e-14)


def test_parameters_at_paper256_widths():
    channels = {r: min(16384 // r, 512) for r in (8, 16, 32, 64)}
    with torch.device("meta"):
        made = HSRHeads(channels, dict.fromkeys(channels, 768))
    assert sum(p.numel() for p in made.parameters()) == 19_942_400
    assert made.state_dict()["heads.64.conv1x1_1.weight"].shape == (4096, 256, 1, 1)


def test_initialisation_is_unit_normal_weights_and_zero_biases():
    torch.manual_seed(0)
    for name, p in HSRHeads({8: 64}, {8: 32}, hidden=256).named_parameters():
        if name.endswith("bias"):
            assert p.count_nonzero() == 0
        else:
            assert abs(p.mean()) < 0.05 and abs(p.std() - 1) < 0.05


def test_detached_control_trains_the_heads_alone(heads, features, targets):
    heads.loss(features, targets, detach=True).backward()
    assert all(f.grad is None for f in features.values())
    assert all(p.grad.abs().sum() > 0 for p in heads.parameters())
    trained = [p.grad.clone() for p in heads.parameters()]
    heads.zero_grad()
    heads.loss(features, targets).backward()
    assert all(f.grad.abs().sum() > 0 for f in features.values())
    for a, p in zip(trained, heads.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=0, atol=0)


def test_the_target_is_a_constant(heads, features, targets):
    targets = {r: t.requires_grad_() for r, t in targets.items()}
    heads.loss(features, targets).backward()
    assert all(t.grad is None for t in targets.values())


def test_no_gradient_reaches_the_teacher_the_image_or_d():
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    teacher = Teacher(net, {4: 1, 8: 0}, (16, 16), (0.5,) * 3, (0.5,) * 3)
    heads = HSRHeads({4: 5, 8: 5}, teacher.channels, hidden=6)
    discriminator = torch.nn.Conv2d(3, 1, 16)
    w = torch.randn(2, 5, requires_grad=True)
    features = {4: w[:, :, None, None].expand(2, 5, 4, 4) * 2, 8: w[:, :, None, None].expand(2, 5, 8, 8) + 1}
    to_img = torch.nn.Linear(5, 3 * 16 * 16)
    img = to_img(w).view(2, 3, 16, 16)
    img.retain_grad()
    discriminator(img)
    hsr_term(heads, teacher, features, img).backward()
    assert w.grad.abs().sum() > 0 and all(p.grad is not None for p in heads.parameters())
    untouched = [*teacher.parameters(), *to_img.parameters(), *discriminator.parameters(), img]
    assert all(p.grad is None for p in untouched)


def test_a_resolution_of_weight_zero_is_not_run(heads, features, targets):
    only = heads.loss(features, targets, weights={4: 0.0, 8: 0.0})
    torch.testing.assert_close(only, literal(heads, {16: features[16]}, targets, {}, "mse"), rtol=1e-10, atol=0)
    assert torch.autograd.grad(only, features[4], allow_unused=True)[0] is None
    with pytest.raises(ValueError, match="every weight"):
        heads.loss(features, targets, weights=dict.fromkeys(CHANNELS, 0.0))


def test_heads_need_a_feature_for_every_target():
    with pytest.raises(ValueError, match=r"\[8\].*\[16\]"):
        HSRHeads({16: 4}, {8: 4})


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_heads_in_half_precision_are_those_of_fp32_within_the_format(heads, features, targets, distance):
    """Their products round features, weights, hidden values and predictions to 8 bits; parameters stay fp32. A ReLU
    that tips over moves a gradient by a whole term, of which there are few here.
    """
    heads = heads.float()
    features = {r: f.detach().float().requires_grad_() for r, f in features.items()}
    targets = {r: t.float() for r, t in targets.items()}
    wanted = [*heads.parameters(), *features.values()]
    found = []
    for half in (None, torch.bfloat16):
        heads.half_dtype = half
        loss = heads.loss(features, targets, distance=distance)
        found.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
    errors = [float((half - full).norm() / full.norm()) for full, half in zip(*found, strict=True)]
    assert errors[0] < 4 * 2**-8 and max(errors) < 25 * 2**-8
    assert all(half.dtype == torch.float32 for half in found[1])
    assert any(not torch.equal(full, half) for full, half in zip(*found, strict=True))
