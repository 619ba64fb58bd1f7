"""ALS: its formula, its interval, and the sequences it is measured on."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hsrgan.engine.distributed import World
from hsrgan.engine.draws import Draws
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import als, sequences
from hsrgan.engine.metrics import attribute_linearity as linearity
from hsrgan.engine.metrics.als_pictures import CAPTION, draw_strips, extremes, small
from hsrgan.engine.metrics.attributes import AttributeClassifier
from hsrgan.engine.metrics.sampling import quantised
from hsrgan.engine.model import Generator

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
TINY = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}
T = torch.linspace(0, 1, 11, dtype=torch.float64)


def random_logits(n=40, attributes=3, seed=0) -> torch.Tensor:
    return torch.randn(n, 11, attributes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(1)


def by_the_formula(logits) -> list[float]:
    """The formula of the module's docstring, symbol by symbol."""
    scores = []
    for a in range(logits.shape[2]):
        values = logits[:, :, a].double().tolist()
        frames = [value for sequence in values for value in sequence]
        mean = sum(frames) / len(frames)
        sigma = math.sqrt(sum((value - mean) ** 2 for value in frames) / len(frames))
        score = 0.0
        for k in range(11):
            t = k / 10
            delta = [((1 - t) * sequence[0] + t * sequence[10] - sequence[k]) / sigma for sequence in values]
            score += (sum(abs(d) for d in delta) / len(delta)) ** 2
        scores.append(score)
    return scores


def test_it_is_the_formula():
    logits = random_logits()
    torch.testing.assert_close(
        linearity.attribute_linearity_score(logits), torch.tensor(by_the_formula(logits), dtype=torch.float64)
    )


def test_straight_logits_score_zero_and_a_parabola_its_closed_form():
    ends = torch.randn(2, 30, 1, 2, dtype=torch.float64)
    straight = ends[0] + (ends[1] - ends[0]) * T[None, :, None]
    assert linearity.attribute_linearity_score(straight).max() < 1e-28
    parabola = (T * (1 - T)).view(1, 11, 1).expand(7, -1, -1) * torch.tensor([1.0, -40.0])
    # Σ t²(1 − t)² = 0.3333 over the eleven frames, whose t(1 − t) have the mean 0.15 and the variance 0.0303 − 0.15²
    expected = torch.full([2], 0.3333 / 0.0078, dtype=torch.float64)
    torch.testing.assert_close(linearity.attribute_linearity_score(parabola), expected)


def test_shift_and_scale_of_a_logit_do_not_matter():
    logits = random_logits()
    moved = logits * torch.tensor([3.0, -0.01, 500.0]) + torch.tensor([10.0, -2.0, 0.5])
    torch.testing.assert_close(
        linearity.attribute_linearity_score(moved), linearity.attribute_linearity_score(logits), rtol=1e-9, atol=0
    )


def test_one_sigma_for_all_models():
    one, other = random_logits(seed=1), random_logits(seed=2, n=25) * 3
    sigma = linearity.shared_sigma([one, other])
    expected = torch.cat([one, other]).flatten(0, 1).std(0, correction=0)
    torch.testing.assert_close(sigma, expected)
    own = linearity.attribute_linearity_score(one)
    ratio = (one.flatten(0, 1).std(0, correction=0) / expected) ** 2
    torch.testing.assert_close(linearity.attribute_linearity_score(one, sigma), own * ratio)


def test_groups_are_sequences_like_others():
    logits = random_logits(n=24)
    grouped = logits.unflatten(0, (6, 4))
    torch.testing.assert_close(
        linearity.attribute_linearity_score(grouped), linearity.attribute_linearity_score(logits)
    )
    assert linearity.nonlinearity(grouped).shape == (6, 4, 3)
    by_hand = linearity.deviation(logits)[5, :, 1].square().sum() / logits[..., 1].var(correction=0)
    torch.testing.assert_close(linearity.nonlinearity(logits)[5, 1], by_hand)


@pytest.mark.parametrize("shared", [False, True])
def test_the_bootstrap_is_the_score_of_resampled_sequences(shared):
    logits = random_logits(n=20, attributes=2) + 100  # far from 0, where a careless variance would cancel
    sigma = torch.tensor([1.0, 3.0], dtype=torch.float64) if shared else None
    found = linearity.bootstrap(logits, sigma, seed=3, draws=150)
    generator = np.random.Generator(np.random.Philox(3))
    chosen = np.concatenate([generator.integers(20, size=(n, 20)) for n in (100, 50)])
    expected = [linearity.attribute_linearity_score(logits[torch.from_numpy(row)], sigma) for row in chosen]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0)
    assert torch.equal(found, linearity.bootstrap(logits, sigma, seed=3, draws=150))
    assert not torch.equal(found, linearity.bootstrap(logits, sigma, seed=4, draws=150))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    def sample(n, seed):
        draw = torch.Generator().manual_seed(seed)
        slope, bend = torch.randn(2, n, 1, 1, generator=draw, dtype=torch.float64)
        t = T[None, :, None]
        return slope * t + bend * t * (1 - t) + 0.1 * torch.randn(n, 11, 1, generator=draw, dtype=torch.float64)

    truth = linearity.attribute_linearity_score(sample(200_000, 0)).item()
    covered = 0
    for seed in range(1, 81):
        low, high = linearity.linearity(sample(150, seed), ["x"], draws=200)["interval"]
        covered += low <= truth <= high
    assert 0.86 <= covered / 80 <= 1


def test_the_report_of_one_model_and_an_attribute_that_never_changes():
    logits = random_logits(attributes=2)
    report = linearity.linearity(logits, ["smile", "hat"], seed=1, draws=100)
    scores = linearity.attribute_linearity_score(logits)
    assert report["als"] == pytest.approx(scores.mean().item()) and report["sequences"] == 40
    smile = report["attributes"]["smile"]
    assert smile["als"] == scores[0].item() and sum(m**2 for m in smile["curve"]) == pytest.approx(smile["als"])
    assert smile["interval"][0] < smile["als"] < smile["interval"][1]
    assert smile["sigma"] == pytest.approx(logits[..., 0].std(correction=0).item())
    logits[..., 1] = 4.0
    with pytest.raises(UserError, match="attribute hat is the same in all frames"):
        linearity.linearity(logits, ["smile", "hat"])


class Bright(nn.Module):
    """Two attributes: the brightness of an image's left half, and of its upper half."""

    def forward(self, x):
        return torch.stack([x[..., :8].mean((1, 2, 3)), x[:, :, :8].mean((1, 2, 3)) * 50], dim=1)


def classifier() -> AttributeClassifier:
    half = (0.5, 0.5, 0.5)
    return AttributeClassifier(Bright(), ["left", "top"], input_size=(16, 16), mean=half, std=half,
                               balanced_accuracy=[0.9, None])  # fmt: skip


def generator(seed=0, **kwargs) -> Generator:
    torch.manual_seed(seed)
    result = Generator(**TINY, **kwargs).eval().requires_grad_(False)
    for name, value in result.named_parameters():
        if name.endswith("noise_strength"):
            value.fill_(0.5)
    return result


def ranks(count: int) -> list[World]:
    return [World(rank, count, rank, count, ALONE.device) for rank in range(count)]


def test_pairs_do_not_depend_on_ranks_and_start_from_the_same_z_for_every_model():
    model, judge = generator(), classifier()
    told = []
    whole = sequences.random_pairs(model, judge, count=19, seed=4, world=ALONE, told=told.append)
    assert whole.shape == (19, 11, 2) and told == [16 * 11, 3 * 11]
    parts = [sequences.random_pairs(model, judge, count=19, seed=4, world=world) for world in ranks(2)]
    assert torch.equal(sum(parts), whole) and all(part.any() for part in parts)
    assert torch.equal(sequences.random_pairs(model, judge, count=2, seed=4, world=ALONE), whole[:2])
    assert not torch.allclose(sequences.random_pairs(model, judge, count=19, seed=5, world=ALONE), whole)

    # one grey level of one pixel is 1/255 · 2/384 here, times 50 in `top`
    close = {"rtol": 0, "atol": 3e-3}
    frames = sequences.strip(model, 5, seed=4, device=ALONE.device).float() / 127.5 - 1
    torch.testing.assert_close(judge(frames), whole[5], **close)

    # by hand: both ends from the draws, a straight line in W between them, one noise for all frames
    draws = Draws(4, ALONE.device)
    latents = draws.latents(sequences._PAIRS, [2], 8)
    ws = torch.cat([model.mapping(latents.z, None) * (1 - t) + model.mapping(latents.z_mix, None) * t
                    for t in T.float()])  # fmt: skip
    noise = draws.noise(sequences._PAIRS, [2], model.synthesis.noise_size).expand(11, -1)
    by_hand = judge(quantised(model.synthesis(ws, noise=noise)).float() / 127.5 - 1)
    torch.testing.assert_close(by_hand, whole[2], **close)


def test_edits_are_straight_lines_in_w_from_common_starts():
    model, judge = generator(), classifier()
    shifts = torch.stack([torch.zeros(8), torch.linspace(-1, 1, 8)])
    whole = sequences.attribute_edits(model, judge, shifts, count=18, seed=1, world=ALONE)
    assert whole.shape == (18, 2, 11, 2)
    close = {"rtol": 0, "atol": 3e-3}
    torch.testing.assert_close(whole[:, 0], whole[:, 0, :1].expand(-1, 11, -1), **close)  # a shift of 0 stands still
    torch.testing.assert_close(whole[:, 1, 0], whole[:, 0, 0], **close)
    assert (whole[:, 1, 10] - whole[:, 1, 0]).abs().min() > 0
    parts = [sequences.attribute_edits(model, judge, shifts, count=18, seed=1, world=world) for world in ranks(2)]
    assert torch.equal(sum(parts), whole) and all(part.any() for part in parts)
    frames = sequences.strip(model, 3, shifts[1], seed=1, device=ALONE.device).float() / 127.5 - 1
    torch.testing.assert_close(judge(frames), whole[3, 1], **close)


def test_samples_do_not_depend_on_ranks():
    model, judge = generator(c_dim=2), classifier()
    drawn = {"seed": 0, "class_counts": [3, 1]}
    whole = sequences.random_samples(model, judge, count=40, world=ALONE, **drawn)
    assert whole.w.shape == (40, 8) and whole.logits.shape == (40, 2)
    parts = [sequences.random_samples(model, judge, count=40, world=world, **drawn) for world in ranks(4)]
    for field in ("w", "logits"):
        assert torch.equal(sum(getattr(part, field) for part in parts), getattr(whole, field))
    assert not parts[3].logits.any() and parts[2].logits.any()  # the fourth of three units


def test_what_is_classified_has_eight_bits():
    assert quantised(torch.tensor([-3.0, -0.999, 0.1234, 1.2])).tolist() == [0, 0, 143, 255]  # ⌊127.5·x + 128⌋

    class Recording(Bright):
        def forward(self, x):
            grey = (x + 1) * 127.5
            assert (grey - grey.round()).abs().max() < 1e-3
            return super().forward(x)

    judge = classifier()
    judge.net = Recording()
    drawn = {"count": 1, "seed": 0, "world": ALONE}
    sequences.random_pairs(generator(), judge, **drawn)
    sequences.attribute_edits(generator(), judge, torch.ones(1, 8), **drawn)
    sequences.random_samples(generator(), judge, **drawn)


def test_images_that_are_not_finite_are_one_line():
    model = generator()
    model.synthesis.b16.torgb.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        sequences.random_pairs(model, classifier(), count=1, seed=0, world=ALONE)


@pytest.fixture(scope="module")
def measured():
    models = {"a": generator(0), "b": generator(1)}
    told = []
    found = {label: als.measure(model, classifier(), label=label, count=4, seed=2, world=ALONE, told=told.append)
             for label, model in models.items()}  # fmt: skip
    assert sum(told) == 2 * als.images_of(count=4, attributes=2) == 2 * (500 + 4 * 11 * 3)
    return models, found


def test_two_models_from_end_to_end(measured, tmp_path):
    _, found = measured
    report = als.als_report(found)
    assert report["models"].keys() == {"a", "b"}
    kinds = report["models"]["b"]
    for kind in ("pairs", "edits"):
        logits = getattr(found["b"], kind)
        own = linearity.attribute_linearity_score(logits)
        sigma = linearity.shared_sigma([getattr(found[label], kind) for label in "ab"])
        assert kinds[kind]["own"]["als"] == pytest.approx(own.mean().item())
        shared = linearity.attribute_linearity_score(logits, sigma)
        assert kinds[kind]["shared"]["attributes"]["top"]["als"] == pytest.approx(shared[1].item())
    along = linearity.attribute_linearity_score(found["b"].edits[:, 1], linearity.spread(found["b"].edits))
    assert kinds["edits"]["own"]["attributes"]["top"]["along"]["als"] == pytest.approx(along[1].item())

    files = als.write_als(tmp_path, report, found)
    assert [file.name for file in files] == ["als.json", "als_pairs.png", "als_edits.png", "als_strips_0.png",
                                             "als_strips_1.png"]  # fmt: skip
    assert json.loads((tmp_path / "als.json").read_text()) == report
    with Image.open(tmp_path / "als_strips_1.png") as picture:
        assert picture.size == (11 * 64, 6 * (64 + CAPTION))
    assert all(Image.open(file).size[0] > 300 for file in files[1:])
    tables = als.als_tables(report)
    assert [(table.row_count, [column.header for column in table.columns]) for table in tables] == 4 * [
        (3, ["attribute", "a", "b"])
    ]
    low, high = kinds["edits"]["shared"]["interval"]
    assert f"{kinds['edits']['shared']['als']:.3f} [{low:.3f}, {high:.3f}]" == list(tables[3].columns[2].cells)[-1]


def test_the_strips_are_the_straightest_and_the_most_bent(measured):
    _, found = measured
    strips = found["a"].strips
    bends = linearity.nonlinearity(found["a"].edits).mean(-1)
    assert strips[0][0].startswith(f"a, straightest: {found['a'].directions.names[bends.argmin() % 2]} +2 std")
    assert f"bend {bends.min():.3g}" in strips[0][0]
    assert f"most bent: {found['a'].directions.names[bends.argmax() % 2]} +2 std" in strips[3][0]
    position, e = divmod(bends.argmax().item(), 2)
    expected = classifier()(strips[3][1].float() / 127.5 - 1)
    torch.testing.assert_close(expected, found["a"].edits[position, e], rtol=0, atol=3e-3)
    assert extremes(torch.tensor([3.0, 1.0, 2.0, 0.0]), 5) == ([3, 1], [0, 2])


def test_strips_of_large_frames_are_made_smaller(tmp_path):
    draw_strips([("one", small(torch.zeros(2, 3, 512, 512, dtype=torch.uint8)))], tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").size == (512, 256 + CAPTION)


def test_models_that_were_not_measured_alike_are_not_compared(measured):
    _, found = measured
    other = als.measure(generator(1), classifier(), label="b", count=2, seed=3, world=ALONE)
    with pytest.raises(UserError, match="b was measured with other attributes or another seed"):
        als.als_report({"a": found["a"], "b": other})
