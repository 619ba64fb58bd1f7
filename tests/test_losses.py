"""Losses against closed forms and finite differences, in fp64."""

import itertools
import math

import pytest
import torch
from torch import nn

from hsrgan.engine import losses


def f64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_logistic_losses_are_minus_log_likelihoods():
    logits = f64(6, 1) * 4
    real, fake = torch.sigmoid(logits), 1 - torch.sigmoid(logits)
    torch.testing.assert_close(losses.logistic_d_real(logits), -real.log().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.logistic_d_fake(logits), -fake.log().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.logistic_g(logits), -real.log().mean(), rtol=1e-12, atol=0)


def test_logistic_losses_stay_finite_where_the_likelihood_underflows():
    assert losses.logistic_d_fake(torch.tensor([[1000.0]])) == 1000
    assert losses.logistic_g(torch.tensor([[-1000.0]])) == 1000


def by_hand(loss, fake, real):
    """(G's loss, D's loss) of logits as lists of numbers, as the papers write them."""
    def softplus(t):
        return math.log(1 + math.exp(t))

    n = len(fake)
    if loss == "logistic":
        return (sum(softplus(-f) for f in fake) / n,
                sum(softplus(f) for f in fake) / n + sum(softplus(-r) for r in real) / n)
    if loss == "hinge":
        return (-sum(fake) / n, sum(max(0, 1 + f) for f in fake) / n + sum(max(0, 1 - r) for r in real) / n)
    pairs = list(zip(fake, real, strict=True))
    return sum(softplus(-(f - r)) for f, r in pairs) / n, sum(softplus(-(r - f)) for f, r in pairs) / n


@pytest.mark.parametrize("loss", losses.ADVERSARIAL)
def test_adversarial_losses_equal_the_papers_with_gradients_of_the_right_sign(loss):
    fake, real = (2 * f64(7, 1, seed=seed) for seed in (1, 2))  # on both sides of hinge's corners
    g, d, paired = losses.ADVERSARIAL[loss]
    assert paired == (loss == "relativistic")
    want = by_hand(loss, fake.flatten().tolist(), real.flatten().tolist())
    for player, expected, signs in ((g, want[0], (-1, 1)), (d, want[1], (1, -1))):
        seen = [t.clone().requires_grad_() for t in (fake, real)]
        value = player(*seen)
        assert value.item() == pytest.approx(expected, rel=1e-12)
        gradients = torch.autograd.grad(value, seen, allow_unused=True)
        if player is g and not paired:
            assert gradients[1] is None  # reals say nothing to G
            assert torch.equal(value, g(fake, None))
        for i, (gradient, sign) in enumerate(zip(gradients, signs, strict=True)):
            if gradient is not None:  # downhill, G raises D(G(z)) and D lowers it; D raises D(x), G lowers it if it can
                assert (sign * gradient >= 0).all() and gradient.abs().sum() > 0
                direction = f64(7, 1, seed=3 + i)
                others = [t.detach() for t in seen]
                step = [1e-5 * direction if k == i else 0 for k in range(2)]
                up, down = (player(*(t + sign * s for t, s in zip(others, step, strict=True))) for sign in (1, -1))
                torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-7, atol=1e-10)


def test_relativistic_losses_stay_finite_and_depend_on_the_pairing_alone():
    fake, real = f64(5, 1), f64(5, 1, seed=1)
    assert losses.relativistic_d(torch.tensor([[900.0]]), torch.tensor([[-100.0]])) == 1000
    torch.testing.assert_close(losses.relativistic_g(fake + 7, real + 7), losses.relativistic_g(fake, real))
    assert losses.relativistic_d(fake, real) != losses.relativistic_d(fake, real.roll(1, 0))


def test_r1_of_a_quadratic_in_closed_form():
    # D(x) = ½ Σ a x²  →  ∂D/∂x = a x;  d(penalty)/da = γ/N Σ a x²
    x, a = f64(3, 2, 4, 4).requires_grad_(), f64(2, 4, 4, seed=1).requires_grad_()
    penalty = losses.r1_penalty((a * x.square() / 2).sum((1, 2, 3)).unsqueeze(1), x, gamma=10.0)
    expected = 5.0 * (a * x).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(got, 10.0 / 3 * (a * x.square()).sum(0), rtol=1e-12, atol=1e-14)


def _small_net(seed: int, sizes: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(seed)
    steps = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.Softplus())]
    return nn.Sequential(*steps[:-1]).double()


def _difference(f, at: torch.Tensor, direction: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return (f(at + eps * direction) - f(at - eps * direction)) / (2 * eps)


def test_r1_and_its_weight_gradient_by_finite_differences():
    net, x = _small_net(0, (12, 7, 1)), f64(2, 3, 2, 2)
    logits = lambda image: net(image.flatten(1))  # noqa: E731

    slopes = torch.stack([_difference(lambda i: logits(i).sum(), x, e.view_as(x)) for e in torch.eye(24).double()])
    real = x.clone().requires_grad_()
    penalty = losses.r1_penalty(logits(real), real, gamma=3.0)
    torch.testing.assert_close(penalty, 1.5 * slopes.square().sum() / 2, rtol=1e-7, atol=0)

    weight, direction = net[0].weight, f64(7, 12, seed=3)
    (gradient,) = torch.autograd.grad(penalty, weight)

    def penalty_at(value):
        weight.data.copy_(value)
        return losses.r1_penalty(logits(real), real, gamma=3.0).detach()

    torch.testing.assert_close((gradient * direction).sum(), _difference(penalty_at, weight.data.clone(), direction),
                               rtol=1e-6, atol=0)


def test_path_lengths_of_a_linear_synthesis_in_closed_form():
    # img = Σ_l A_l ws_l  →  ∂Σ(img·y)/∂ws_l = A_lᵀ y
    ws, y, a = f64(5, 3, 4).requires_grad_(), f64(5, 2, 3, 3, seed=1), f64(3, 18, 4, seed=2).requires_grad_()
    lengths = losses.path_lengths(torch.einsum("lpw,nlw->np", a, ws).view(5, 2, 3, 3), ws, y)
    jacobian = torch.einsum("lpw,np->nlw", a, y.flatten(1))
    expected = jacobian.square().sum(2).mean(1).sqrt()
    assert lengths.shape == (5,)
    torch.testing.assert_close(lengths, expected, rtol=1e-12, atol=0)
    got, want = (torch.autograd.grad(v.sum(), a, retain_graph=True)[0] for v in (lengths, expected))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_path_lengths_and_their_weight_gradient_by_finite_differences():
    net, ws, y = _small_net(1, (6, 9, 8)), f64(2, 2, 3), f64(2, 2, 2, 2, seed=4)

    def lengths_at(value):
        w = value.clone().requires_grad_()
        return losses.path_lengths(net(w.flatten(1)).view(2, 2, 2, 2), w, y)

    slopes = torch.stack([_difference(lambda w: (net(w.flatten(1)) * y.flatten(1)).sum(), ws, e.view_as(ws))
                          for e in torch.eye(12).double()]).view(2, 2, 3)
    torch.testing.assert_close(lengths_at(ws), slopes.square().sum(2).mean(1).sqrt(), rtol=1e-7, atol=0)

    weight, direction = net[0].weight, f64(9, 6, seed=5)
    (gradient,) = torch.autograd.grad(losses.path_penalty(lengths_at(ws), torch.tensor(0.3)), weight)

    def penalty_at(value):
        weight.data.copy_(value)
        return losses.path_penalty(lengths_at(ws), torch.tensor(0.3)).detach()

    torch.testing.assert_close((gradient * direction).sum(), _difference(penalty_at, weight.data.clone(), direction),
                               rtol=1e-6, atol=0)


def test_path_penalty_does_not_depend_on_how_the_batch_is_split():
    lengths, pl_mean = f64(8).abs(), torch.tensor(0.4, dtype=torch.float64)
    whole = losses.path_penalty(lengths, pl_mean)
    halves = torch.stack([losses.path_penalty(half, pl_mean) for half in lengths.chunk(2)]).mean()
    torch.testing.assert_close(whole, halves, rtol=1e-14, atol=0)


def test_parity_penalty_differentiates_through_the_moving_mean():
    # a = .99 p + .01 m(ℓ): d/dℓ_i of mean (ℓ − a)² = 2/N (ℓ_i − a) − .02/N · mean(ℓ − a)
    lengths, pl_mean = f64(4).abs().requires_grad_(), torch.tensor(0.4, dtype=torch.float64)
    moved = losses.path_mean(pl_mean, lengths.mean(), 0.01)
    torch.testing.assert_close(moved, 0.99 * pl_mean + 0.01 * lengths.mean(), rtol=1e-14, atol=0)
    (got,) = torch.autograd.grad(losses.path_penalty(lengths, moved), lengths)
    apart = lengths - moved
    torch.testing.assert_close(got, 2 / 4 * apart - 0.02 / 4 * apart.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kimg", "expected"), [(0, 0), (99.9, 0), (100, 0), (125, 0.5), (150, 1), (200, 2), (900, 2)])
def test_hsr_weight_ramps_linearly(kimg, expected):
    assert math.isclose(losses.hsr_weight(kimg, 2.0, start_kimg=100, ramp_kimg=100), expected)


def test_hsr_weight_without_a_ramp_is_a_step():
    assert [losses.hsr_weight(k, 0.7, start_kimg=5) for k in (0, 4.9, 5, 6)] == [0, 0, 0.7, 0.7]
    assert losses.hsr_weight(0, 0.7) == 0.7
