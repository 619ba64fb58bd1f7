"""Projection into W and W+: its formulas against the paper's, what it recovers, and the distances it descends."""

import numpy as np
import pytest
import torch
from metric_fixtures import digits, kaiming

from hsrgan.engine import likeness, projection
from hsrgan.engine.errors import UserError
from hsrgan.engine.likeness import TeacherLikeness, VGGLikeness
from hsrgan.engine.metrics.perceptual import LPIPS, unit
from hsrgan.engine.model import Generator
from hsrgan.engine.projection import Settings, project
from hsrgan.engine.teacher import load_teacher

TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "mapping_layers": 2, "channel_base": 128, "channel_max": 8}
TEACHER, LAYERS = "recipes/digits_teacher.safetensors", {8: 3, 16: 1}


class Pixels:
    """A likeness that sees pixels."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def maps(self, images):
        return [images]

    def between(self, a, b):
        return self.weight * (a[0] - b[0]).square().mean((1, 2, 3))


def tiny(c_dim: int = 0) -> Generator:
    torch.manual_seed(0)
    generator = Generator(c_dim=c_dim, conv_clamp=None, **TINY).eval().requires_grad_(False)
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            value.fill_(0.05)  # zero in a new network, whose noise does nothing
    return generator


@pytest.fixture(scope="module")
def made():
    """A generator, three ws of its own, and their pictures with noise that nobody knows."""
    generator = tiny()
    ws = generator.mapping(torch.randn(3, 8), None)
    return generator, ws, generator.synthesis(ws, noise=torch.randn(3, generator.synthesis.noise_size))


def test_a_picture_of_the_generators_own_is_recovered(made):
    generator, ws, pictures = made
    steps = []
    found = project(generator, pictures, Pixels(), Settings(steps=100), told=lambda step, d: steps.append((step, d)))
    start = projection.w_statistics(generator, None, 0)[0]
    assert ((found.w - ws).norm(dim=(1, 2)) < 0.15 * (start - ws).norm(dim=(1, 2))).all()
    assert (found.distance[0] > 7 * found.distance[-1]).all()
    assert found.distance.shape == found.regulariser.shape == found.pixel.shape == (101, 3)
    assert torch.equal(found.w, found.w[:, :1].expand_as(found.w)) and found.w.shape == ws.shape
    # what is returned is what was judged last, and its noise is clean
    torch.testing.assert_close(generator.synthesis(found.w, noise=found.noise), found.image)
    torch.testing.assert_close(Pixels().between([found.image], [pictures]), found.distance[-1])
    sizes = generator.synthesis.noise_sizes
    torch.testing.assert_close(projection.noise_regulariser(found.noise, sizes), found.regulariser[-1])
    for n in found.noise.split([h * w for h, w in sizes], 1):
        torch.testing.assert_close(n.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(n.square().mean(1), torch.ones(3))
    assert steps[0][0] == 1 and steps[-1] == (100, pytest.approx(float(found.distance[99].mean()), rel=1e-5))


def test_w_plus_fits_what_no_single_w_makes(made):
    generator, *_ = made
    ws = generator.mapping(torch.randn(18, 8, generator=torch.Generator().manual_seed(1)), None)[:, 0]
    pictures = generator.synthesis(ws.view(3, 6, 8), noise_mode="none")
    w, w_plus = (project(generator, pictures, Pixels(), Settings(space=s, steps=60)) for s in projection.SPACES)
    assert (w_plus.distance[-1] < w.distance[-1] / 2).all()
    assert w_plus.w.shape == (3, 6, 8) and (w_plus.w[:, 0] - w_plus.w[:, 1]).abs().min() > 1e-4
    with pytest.raises(ValueError, match="space is 'z'"):
        project(generator, pictures, Pixels(), Settings(space="z"))


def test_a_seed_is_one_latent_whatever_the_other_images(made):
    generator, _, pictures = made

    def run(pictures, seed=0):
        return project(generator, pictures, Pixels(), Settings(steps=12, seed=seed))

    first, again, other = run(pictures), run(pictures), run(pictures, seed=1)
    assert torch.equal(first.w, again.w) and torch.equal(first.noise, again.noise)
    assert (first.w - other.w).abs().max() > 0.01 and (first.noise - other.noise).abs().max() > 1
    alone = run(pictures[1:2])
    torch.testing.assert_close(alone.w[0], first.w[1], atol=1e-3, rtol=1e-3)
    assert (first.w[0] - first.w[1]).abs().max() > 0.01


def test_every_term_acts(made, monkeypatch):
    """Without the distance w stays where it began; without L the noise takes up the picture; β lowers the square."""
    generator, _, pictures = made
    blind = project(generator, pictures, Pixels(0.0), Settings(steps=20))
    torch.testing.assert_close(blind.w, projection.w_statistics(generator, None, 0)[0].expand_as(blind.w))
    by_pixel = project(generator, pictures, Pixels(0.0), Settings(steps=60, pixel=2.0))
    by_likeness = project(generator, pictures, Pixels(2.0), Settings(steps=60))
    torch.testing.assert_close(by_pixel.w, by_likeness.w)
    assert (by_pixel.pixel[-1] < by_pixel.pixel[0] / 4).all()
    monkeypatch.setattr(projection, "NOISE_WEIGHT", 0.0)
    free = project(generator, pictures, Pixels(2.0), Settings(steps=60))
    assert (by_likeness.regulariser[-1] < 1e-3).all() and (free.regulariser[-1] > 0.05).all()


def test_a_search_that_diverges_is_one_line(made):
    generator, _, pictures = made
    with pytest.raises(UserError, match=r"left the finite numbers: lower --lr, which is 1e\+30"):
        project(generator, pictures, Pixels(), Settings(steps=12, rate=1e30))


def test_noise_regulariser_is_the_papers_equation():
    """Appendix D, in fp64 and element by element: 16×16 has two levels, 24×12 and 5×20 one, 4×4 itself."""
    sizes = [(4, 4), (16, 16), (16, 32), (9, 20)]
    noise = np.random.default_rng(0).normal(size=(2, sum(h * w for h, w in sizes)))

    def term(n):
        h, w = n.shape
        across = sum(n[y, x] * n[y, (x - 1) % w] for y in range(h) for x in range(w)) / (h * w)
        down = sum(n[y, x] * n[(y - 1) % h, x] for y in range(h) for x in range(w)) / (h * w)
        return across**2 + down**2

    def halved(n):
        return (n[::2, ::2] + n[1::2, ::2] + n[::2, 1::2] + n[1::2, 1::2]) / 4 * 2

    expected = np.zeros(2)
    for i, row in enumerate(noise):
        a, b, c, d = (part.reshape(size) for part, size in
                      zip(np.split(row, np.cumsum([h * w for h, w in sizes])[:-1]), sizes, strict=True))  # fmt: skip
        expected[i] = term(a) + term(b) + term(halved(b)) + term(c) + term(halved(c)) + term(d)
    ours = projection.noise_regulariser(torch.from_numpy(noise), sizes)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)
    flat = torch.from_numpy(noise[:1, :272]).requires_grad_()
    assert torch.autograd.gradcheck(lambda n: projection.noise_regulariser(n, sizes[:2]), flat)


def test_schedules_are_the_papers():
    """1000 steps: the rate rises over 50 and falls from 750 on; ε is a quarter by 375 and none from 750 on."""
    rate = [projection.learning_rate(step / 1000, 0.1) for step in (0, 10, 25, 50, 400, 750, 875, 1000)]
    assert rate == pytest.approx([0, 0.02, 0.05, 0.1, 0.1, 0.1, 0.05, 0], abs=1e-12)
    assert projection.learning_rate(0.9375, 1) == pytest.approx(0.5 - 0.5 * np.cos(np.pi / 4))
    jitter = [projection.jitter_scale(step / 1000) for step in (0, 375, 600, 750, 900)]
    assert jitter == pytest.approx([0.05, 0.0125, 0.002, 0, 0], abs=1e-12)


def test_w_is_shaken_as_scheduled_and_then_left_alone(made):
    """With a rate of nearly nothing w stays at the mean, and what reaches the generator is that and ε."""
    generator, _, pictures = made
    seen = []
    handle = generator.synthesis.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    project(generator, pictures, Pixels(), Settings(space="w+", steps=20, rate=1e-12))
    handle.remove()
    mean, spread = projection.w_statistics(generator, None, 0)
    epsilon = torch.stack(seen)[:, 0] - mean
    assert len(epsilon) == 21 and all(torch.equal(ws[0], ws[2]) for ws in seen)
    rms = epsilon.square().mean((1, 2)).sqrt() / spread
    expected = torch.tensor([0.05 * max(0, 1 - step / 15) ** 2 for step in range(20)])
    torch.testing.assert_close(rms[:10], expected[:10], rtol=0.4, atol=0)  # of 48 draws: one sigma is 10 %
    assert rms[:10].div(expected[:10]).mean() == pytest.approx(1, abs=0.1) and epsilon[15:].abs().max() < 1e-6


def test_the_start_is_the_mean_of_ten_thousand_latents():
    generator = tiny(c_dim=3).double()
    generator.mapping.fc0.weight.mul_(30)  # the label counts
    z = torch.from_numpy(np.random.RandomState(7).randn(10_000, 8)).double()
    found = {}
    for name, label in {"all": None, "two": torch.tensor([0.0, 0.0, 1.0])}.items():
        c = torch.eye(3).double()[torch.arange(10_000) % 3 if label is None else torch.full((10_000,), 2)]
        w = generator.mapping(z.float().double(), c)[:, 0]
        mean, spread = found[name] = projection.w_statistics(generator, label, 7)
        torch.testing.assert_close(mean, w.mean(0))
        assert spread == pytest.approx(float((w - w.mean(0)).norm(dim=1).square().mean().sqrt()), rel=1e-6)
    assert (found["all"][0] - found["two"][0]).abs().max() > 0.01


def test_rectangles_and_rgba_are_projected():
    torch.manual_seed(0)
    kwargs = TINY | {"img_resolution": [16, 24], "img_channels": 4}
    generator = Generator(conv_clamp=None, **kwargs).eval().requires_grad_(False)
    picture = generator.synthesis(generator.mapping(torch.randn(1, 8), None), noise_mode="const")
    judge = TeacherLikeness(load_teacher(TEACHER, layers=LAYERS), TEACHER)
    found = project(generator, picture, judge, Settings(steps=30, pixel=0.1))
    assert found.image.shape == (1, 4, 16, 24) and found.noise.shape == (1, generator.synthesis.noise_size)
    assert found.distance[-1] < found.distance[0] / 2 and found.pixel[-1] < found.pixel[0]


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    net = kaiming(LPIPS())
    for i in range(5):
        getattr(net, f"lin{i}").data.uniform_(0, 1, generator=torch.Generator().manual_seed(i))
    return net.requires_grad_(False)


def test_vgg_likeness_is_lpips_with_a_gradient(lpips, monkeypatch):
    judge = VGGLikeness(lpips)
    a, b = torch.rand(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(judge.between(judge.maps(a), judge.maps(b)), lpips.distance(a, b), rtol=0, atol=0)
    a.requires_grad_()
    gradient = torch.autograd.grad(judge.between(judge.maps(a), judge.maps(b)).sum(), a)[0]
    step = 1e-2 * gradient / gradient.norm()
    rise = (lpips.distance(a + step, b) - lpips.distance(a - step, b)).sum() / 2
    assert float(rise) == pytest.approx(float((gradient * step).sum()), rel=0.05) and rise > 0
    monkeypatch.setattr(likeness, "SIDE", 24)  # 48×32 is shown as 24×16
    small = torch.nn.functional.avg_pool2d(a.detach(), 2), torch.nn.functional.avg_pool2d(b, 2)
    torch.testing.assert_close(judge.between(judge.maps(a.detach()), judge.maps(b)), lpips.distance(*small))
    rgba = torch.cat([b, torch.zeros(2, 1, 32, 48)], 1)  # half transparent over mid-grey: half as strong
    torch.testing.assert_close(judge.between(judge.maps(rgba), judge.maps(b / 2)), torch.zeros(2), rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="sees nothing in images of 8x16 pixels"):
        judge.maps(a[:, :, :8, :16])


def test_a_place_where_no_feature_answers_has_a_finite_gradient():
    x = torch.zeros(1, 4, 2, 2)
    x[:, :, 0] = 1.0
    x.requires_grad_()
    gradient = torch.autograd.grad(unit(x)[:, 0].sum(), x)[0]
    assert gradient.isfinite().all() and gradient[:, :, 0].abs().min() > 0.1


def test_teacher_likeness_is_the_distance_of_unit_features_with_a_gradient():
    teacher = load_teacher(TEACHER, layers=LAYERS)
    judge = TeacherLikeness(teacher, TEACHER)
    a, b = (digits(4, 16).float() / 127.5 - 1).split(2)
    expected = np.zeros(2)
    for x, y in zip(teacher(a).values(), teacher(b).values(), strict=True):
        x, y = (m.double().numpy() for m in (x, y))
        x, y = (m / np.sqrt((m**2).sum(1, keepdims=True)) for m in (x, y))
        expected += ((x - y) ** 2).sum(1).mean((1, 2))
    a.requires_grad_()
    distance = judge.between(judge.maps(a), judge.maps(b))
    np.testing.assert_allclose(distance.detach().numpy(), expected, rtol=1e-4)
    assert torch.autograd.grad(distance.sum(), a)[0].abs().amax((1, 2, 3)).min() > 1e-4
    assert not any(m.requires_grad for m in teacher(a).values())  # HSR's targets stay constants
