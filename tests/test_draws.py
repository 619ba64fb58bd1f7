"""Random numbers belong to an image of the run, not to the rank or round that happens to process it."""

import torch

from hsrgan.engine.draws import Draws, interleaved


def test_draws_do_not_depend_on_the_split():
    draws = Draws(3, torch.device("cpu"), [5, 0, 7])
    whole, first, second = (draws.latents(1, range(a, b), 6) for a, b in ((10, 18), (10, 13), (13, 18)))
    for all_, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(all_, torch.cat([a, b]))
    assert torch.equal(draws.noise(1, [4, 9], 33)[1], draws.noise(1, [9], 33)[0])
    assert torch.equal(draws.uniform(1, [4, 9])[1:], draws.uniform(1, [9]))
    assert torch.equal(draws.augmentation(1, [4, 9], 3, 2)[1:], draws.augmentation(1, [9], 3, 2))
    assert torch.equal(draws.pixels(1, [4, 9], (3, 2, 2))[1:], draws.pixels(1, [9], (3, 2, 2)))


def test_augmentations_numbers_are_uniform_then_normal():
    numbers = Draws(0, torch.device("cpu")).augmentation(0, range(4000), 2, 3)
    assert numbers.shape == (4000, 5) and numbers[:, :2].min() >= 0 and numbers[:, :2].max() < 1
    assert (numbers[:, :2].mean(0) - 0.5).abs().max() < 0.03 and (numbers[:, :2].var(0) - 1 / 12).abs().max() < 0.006
    assert numbers[:, 2:].mean(0).abs().max() < 0.08 and (numbers[:, 2:].std(0) - 1).abs().max() < 0.06
    assert (torch.corrcoef(numbers.T) - torch.eye(5)).abs().max() < 0.08


def test_streams_seeds_and_positions_differ():
    cpu = torch.device("cpu")
    base = Draws(0, cpu).latents(0, [0], 64).z
    for other in (
        Draws(1, cpu).latents(0, [0], 64),
        Draws(0, cpu).latents(1, [0], 64),
        Draws(0, cpu).latents(0, [1], 64),
    ):
        assert (base - other.z).abs().min() > 0
    draws = Draws(0, cpu)
    assert not torch.equal(draws.noise(0, [0], 64), draws.directions(0, [0], (8, 8)).flatten(1))
    values = draws.noise(0, range(64), 4096)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    uniform = draws.uniform(0, range(4000))
    assert uniform.min() >= 0 and uniform.max() < 1 and uniform.unique().numel() == 4000
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.005


def test_labels_follow_the_class_counts():
    labels = Draws(0, torch.device("cpu"), [10, 0, 30]).latents(0, range(4000), 1).c
    assert labels.shape == (4000, 3) and torch.equal(labels.sum(1), torch.ones(4000))
    share = labels.mean(0)
    assert share[1] == 0 and abs(share[2] - 0.75) < 0.03


def test_mixing_cutoff_is_uniform_where_it_is_drawn():
    draws = Draws(0, torch.device("cpu"))
    cutoffs = torch.tensor([draws.mixing_cutoff(0, 16 * i, 6, 0.9) for i in range(4000)])
    share = torch.bincount(cutoffs, minlength=7) / len(cutoffs)
    assert share[0] == 0 and abs(share[6] - 0.1) < 0.02
    assert all(abs(share[i] - 0.9 / 5) < 0.03 for i in range(1, 6))
    assert {draws.mixing_cutoff(0, i, 6, 0.0) for i in range(50)} == {6}


def test_interleaved_makes_strided_groups_of_consecutive_images():
    order = torch.tensor(interleaved(12, 4))
    groups = order.view(4, 3)  # D's group n holds samples n, n + 3, n + 6, n + 9
    assert groups.T.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(order.sort().values, torch.arange(12))
