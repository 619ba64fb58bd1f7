"""Heads on a frozen teacher against their definitions, in fp64, and the gradient that passes through it."""

import pytest
import timm
import torch
import torch.nn.functional as F

from hsrgan.engine.projected import ProjectedHeads, VisionAidedHeads
from hsrgan.engine.teacher import Teacher

CHANNELS, GRIDS = {0: 3, 2: 5, 3: 4}, {0: (16, 12), 2: (8, 6), 3: (8, 6)}


def f64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def maps(n: int = 4) -> dict[int, torch.Tensor]:
    return {layer: f64(n, c, *GRIDS[layer], seed=layer) for layer, c in CHANNELS.items()}


def projected(c_dim: int = 0) -> ProjectedHeads:
    torch.manual_seed(0)
    return ProjectedHeads(CHANNELS, GRIDS, c_dim, width=4).double()


def vision_aided(c_dim: int = 0) -> VisionAidedHeads:
    torch.manual_seed(0)
    return VisionAidedHeads(CHANNELS, c_dim, hidden=6).double()


def test_random_projections_mix_channels_and_then_scales():
    heads, seen = projected(), maps()
    found = heads.projections(seen)
    mixed = {layer: torch.einsum("oc,nchw->nohw", heads.get_buffer(f"mix_channels{layer}")[..., 0, 0], seen[layer])
             for layer in CHANNELS}  # fmt: skip
    out = {layer: heads.get_buffer(f"mix_scales{layer}")[..., 0, 0] for layer in CHANNELS}
    last = torch.einsum("oc,nchw->nohw", out[3], mixed[3])
    middle = torch.einsum("oc,nchw->nohw", out[2], F.interpolate(mixed[2] + last, (16, 12), mode="bilinear",
                                                                 align_corners=True))  # fmt: skip
    first = torch.einsum("oc,nchw->nohw", out[0], F.interpolate(mixed[0] + middle, (32, 24), mode="bilinear",
                                                                align_corners=True))  # fmt: skip
    for layer, want in {3: last, 2: middle, 0: first}.items():
        torch.testing.assert_close(found[layer], want, rtol=1e-10, atol=1e-12)
    assert [m.shape[1] for m in mixed.values()] == [4, 8, 16] and [m.shape[1] for m in found.values()] == [8, 4, 4]
    assert not any("mix" in name for name, _ in heads.named_parameters())


def plain_weight(layer) -> torch.Tensor:
    """W / σ₁(W), by singular values."""
    w = layer.parametrizations.weight.original.detach()
    return w / torch.linalg.matrix_norm(w.flatten(1), ord=2)


def settled(heads, rounds: int = 300):
    for _ in range(rounds):
        heads.settle(torch.tensor(False))
    return heads


@pytest.mark.parametrize("c_dim", [0, 3])
def test_projected_discriminators_equal_their_definition(c_dim):
    heads, seen, c = settled(projected(c_dim)), maps(), f64(4, c_dim, seed=9)
    found = heads(seen, c)
    for logits, (layer, x) in zip(found, sorted(heads.projections(seen).items()), strict=True):
        head = heads.heads[str(layer)]
        grid = (32, 24) if layer == 0 else (16, 12) if layer == 2 else (8, 6)
        assert x.shape[2:] == grid
        convs = [m for m in head.blocks if hasattr(m, "parametrizations")]
        for conv in convs:
            down = conv.kernel_size == (4, 4)
            y = F.conv2d(x, plain_weight(conv), stride=2 if down else 1, padding=1)
            grouped = y.unflatten(1, (max(y.shape[1] // 16, 1), -1))
            mean = grouped.mean((2, 3, 4), keepdim=True)
            variance = grouped.var((2, 3, 4), unbiased=False, keepdim=True)
            x = F.leaky_relu(((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2), 0.2)
        assert [convs[-1].out_channels, x.shape[1]] == [32, 32] and min(x.shape[2:]) < 14
        y = F.conv2d(x, plain_weight(head.out)).flatten(2)
        if c_dim:
            y = (y * head.embed(c)[:, :, None]).sum(1, keepdim=True) / 64**0.5
        torch.testing.assert_close(logits, y.flatten(1), rtol=1e-6, atol=1e-8)


def test_the_papers_maps_get_the_papers_discriminators():
    """EfficientNet's four maps of a 224² image: 64, 64, 128, 256 channels in, 512 out, 4, 3, 2 and 1 halvings."""
    heads = ProjectedHeads(dict.fromkeys(range(4), 8), {0: (56, 56), 1: (28, 28), 2: (14, 14), 3: (7, 7)}, 0, width=64)
    widths = [[m.out_channels for m in head.blocks if hasattr(m, "out_channels")] for head in heads.heads.values()]
    assert widths == [[64, 128, 256, 512], [128, 256, 512], [256, 512], [512]]
    assert [head.blocks[0].in_channels for head in heads.heads.values()] == [64, 64, 128, 256]
    seen = {layer: torch.zeros(1, 8, *heads.grids[layer]) for layer in range(4)}
    assert [logits.shape for logits in heads(seen, torch.zeros(1, 0))] == [(1, 16)] * 4


@pytest.mark.parametrize("c_dim", [0, 3])
def test_the_vision_aided_discriminator_equals_its_definition(c_dim):
    heads, seen, c = settled(vision_aided(c_dim)), maps(), f64(4, c_dim, seed=9)
    with torch.no_grad():
        for name, p in heads.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    found = heads(seen, c)
    for logits, layer in zip(found, (0, 2), strict=False):
        conv, out = heads.convs[str(layer)], heads.outs[str(layer)]
        x = F.leaky_relu(F.conv2d(seen[layer], plain_weight(conv), conv.bias, padding=1), 0.2)
        torch.testing.assert_close(logits, F.conv2d(F.avg_pool2d(x, 2), plain_weight(out), out.bias).flatten(1),
                                   rtol=1e-6, atol=1e-8)
    hidden = F.leaky_relu(seen[3].mean((2, 3)) @ plain_weight(heads.pooled).T + heads.pooled.bias, 0.2)
    want = hidden @ plain_weight(heads.out).T + heads.out.bias
    if c_dim:
        want = want + (heads.embed(c) * hidden).sum(1, keepdim=True)
    torch.testing.assert_close(found[2], want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", [projected, vision_aided])
def test_heads_score_each_image_alone_and_a_forward_changes_nothing(make):
    heads, seen, c = make(3).train(), maps(), f64(4, 3, seed=9)
    before = {key: value.clone() for key, value in heads.state_dict().items()}
    whole = heads(seen, c)
    halves = [heads({k: m[rows] for k, m in seen.items()}, c[rows]) for rows in (slice(0, 2), slice(2, 4))]
    for logits, *parts in zip(whole, *halves, strict=True):
        torch.testing.assert_close(logits, torch.cat(parts), rtol=1e-12, atol=1e-13)
    after = heads.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for skip in (True, False):
        before = {key: value.clone() for key, value in heads.state_dict().items()}
        heads.settle(torch.tensor(skip))
        moved = {key for key, value in heads.state_dict().items() if not torch.equal(value, before[key])}
        vectors = {key for key, value in before.items() if key.endswith(("_u", "_v")) and len(value) > 1}
        assert moved == (set() if skip else vectors)


def small_teacher() -> Teacher:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    return Teacher(net, {0: 0, 1: 1}, (16, 16), (0.5,) * 3, (0.5,) * 3).double()


def test_the_gradient_passes_through_the_teacher_and_leaves_it_alone():
    """Of every head's logits by the image, against finite differences; through `forward` nothing passes."""
    teacher = small_teacher()
    heads = ProjectedHeads(teacher.channels, teacher.grids, 0, width=2).double()
    img, direction = f64(2, 3, 20, 12).mul(0.3).requires_grad_(), f64(2, 3, 20, 12, seed=1)
    score = lambda x: sum(logits.sum() for logits in heads(teacher.features(x), torch.zeros(2, 0)))  # noqa: E731
    (gradient,) = torch.autograd.grad(score(img), img)
    with torch.no_grad():
        slope = (score(img + 1e-5 * direction) - score(img - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9)
    assert not any(m.requires_grad for m in teacher(img).values())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_the_gradient_through_a_teacher_in_bf16_is_that_of_fp32_within_the_format():
    found = []
    teacher, img = small_teacher().float(), f64(2, 3, 16, 16).mul(0.3).float().requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(sum(m.square().mean() for m in teacher.features(img).values()), img)
        found.append(gradient)
        teacher.to_bf16()
    assert found[1].dtype == torch.float32
    assert 0 < float((found[1] - found[0]).norm() / found[0].norm()) < 25 * 2**-8
