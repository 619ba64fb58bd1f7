"""feature_match in plain PyTorch: against its definition and a literal area resize, in parts, and what it computes."""

import sys

import pytest
import torch
import torch.nn.functional as F
from op_inputs import _one_thread  # noqa: F401  (a fixture)

from hsrgan import kernels

feature_match_module = sys.modules["hsrgan.kernels.feature_match"]


def hsr_tensors(n, c, size, grid, dtype=torch.float64):
    shapes = ((n, c, *size), (40, c, 1, 1), (40,), (7, 40, 1, 1), (7,), (n, 7, *grid))
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


def literal_bins(size, bins):
    return [range(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 64), (14, 14)), ((16, 16), (14, 14)), ((8, 8), (14, 14)), ((8, 8), (8, 8)), ((6, 9), (4, 12))],
    ids=lambda s: "x".join(map(str, s)),
)
def test_feature_match_equals_its_definition(size, grid, distance):
    *inputs, target = hsr_tensors(3, 5, size, grid)
    results = []
    for op in (kernels.feature_match, kernels.feature_match_torch):
        leaves = [t.detach().requires_grad_() for t in inputs]
        loss = op(*leaves, target, distance=distance)
        results.append([loss, *torch.autograd.grad(loss * 3, leaves)])
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-10, atol=1e-12)


def test_feature_match_pools_by_area():
    x, w1, b1, w2, b2, target = hsr_tensors(2, 3, (8, 5), (14, 3))
    hidden = F.relu(F.conv2d(x, w1, b1)) * 2**0.5
    prediction = F.conv2d(hidden, w2, b2)
    pooled = torch.empty_like(target)
    for i, rows in enumerate(literal_bins(8, 14)):
        for j, columns in enumerate(literal_bins(5, 3)):
            cells = [prediction[:, :, r, c] for r in rows for c in columns]
            pooled[:, :, i, j] = torch.stack(cells).mean(0)
    expected = (pooled - target).square().mean()
    torch.testing.assert_close(kernels.feature_match(x, w1, b1, w2, b2, target), expected, rtol=1e-12, atol=0)


def test_feature_match_of_a_few_images_at_a_time(monkeypatch):
    """Cut into chunks of 2, 2 and 1 images the loss and its gradients stay the same."""
    *inputs, target = hsr_tensors(5, 3, (6, 6), (4, 4))
    results = []
    for hidden_values in (2**24, 2 * 40 * 36):
        monkeypatch.setattr(feature_match_module, "HIDDEN_VALUES", hidden_values)
        leaves = [t.detach().requires_grad_() for t in inputs]
        loss = kernels.feature_match(*leaves, target)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)


def test_feature_match_computes_what_is_wanted_and_no_second_order():
    *inputs, target = hsr_tensors(2, 3, (6, 6), (4, 4))
    target.requires_grad_()
    heads = [t.requires_grad_() for t in inputs[1:]]
    loss = kernels.feature_match(inputs[0], *heads, target)  # the control arm: x detached
    loss.backward()
    assert inputs[0].grad is None and target.grad is None
    assert all(t.grad.abs().sum() > 0 for t in heads)
    assert not kernels.feature_match(*[t.detach() for t in inputs], target).requires_grad
    with pytest.raises(RuntimeError, match="differentiable once only"):
        torch.autograd.grad(kernels.feature_match(inputs[0], *heads, target), heads[0], create_graph=True)
