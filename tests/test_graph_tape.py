"""What a recording keeps: the calls of PyTorch's kernels, with the numbers and the memory that they had.

Python does not run again, so that a number of one step, kept on the host, would be that of every later one.
"""

import dataclasses

import pytest
import test_graphs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hsrgan.engine.graphs import Graphs, direct


class Tape(TorchDispatchMode):
    """Every call and its result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Taped:
    """A graph backend for the CPU: a replay makes the recorded calls again, and nothing else."""

    def record(self, run):
        with Tape() as tape:
            outputs = run()
        calls = [call for call in tape.calls if made(call)]
        for call in calls:
            for t in made(call):
                if t.is_floating_point():
                    t.fill_(torch.nan)  # a replay that needs what only the recording computed shows

        def replay():
            for func, args, kwargs, out in calls:
                found = func(*args, **kwargs)
                for old, new in zip(tensors(out), tensors(found), strict=True):
                    if old.data_ptr() != new.data_ptr():  # not written in place
                        old.copy_(new)

        return torch.no_grad()(replay), outputs


def tensors(tree: object) -> list[Tensor]:
    """Without a graph."""
    return [t.detach() for t in test_graphs.tensors([tree])]


def made(call) -> list[Tensor]:
    """What a call wrote: all but views of what it was given."""
    func, *_, out = call
    return [] if func.is_view else tensors(out)


ADA = {"mode": "ada", "pipe": "bgcfnc", "p": 0.3, "target": 0.6, "kimg": 0.1, "interval": 1}
DIFFERENT = {
    "plain": {"accumulation": 2, "path_length": {"interval": 2, "parity": True}},
    "critics and ADA": {**test_graphs.CRITICS, **test_graphs.R3GAN, "augment": ADA},
    "hinge and DiffAugment": {
        "objective": {"loss": "hinge"}, "precision": "bf16",
        "augment": {"mode": "diffaugment", "policy": "color,translation,cutout"},
        "hsr": test_graphs.HSR | {"distance": "cosine", "weights_per_res": {8: 0.5, 16: 2.0}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_nothing_of_a_step_is_kept_in_a_recording(name):
    """Five steps: p, cutoffs, singular vectors and the mean path length move, λ appears in the fourth and grows."""
    eager, means = test_graphs.trained(direct, 5, **DIFFERENT[name])
    taped, taped_means = test_graphs.trained(Graphs(Taped(), only_changes), 5, **DIFFERENT[name])
    assert not [key for key, value in eager.items() if not torch.equal(value, taped[key])] and means == taped_means
    assert "loss/hsr" in means


def only_changes(line: str) -> None:
    assert "Gmain changes" in line, line


def test_a_number_of_one_step_is_caught():
    """The cutoff, taken to the host: the recorded step's is not the next one's."""

    class Reading(Graphs):
        def __call__(self, name, function, inputs):
            def read(given):
                return function(dataclasses.replace(given, cutoff=int(given.cutoff)))

            return super().__call__(name, function if inputs.cutoff is None else read, inputs)

    eager, _ = test_graphs.trained(direct, 2, hsr=None)
    taped, _ = test_graphs.trained(Reading(Taped(), only_changes), 2, hsr=None)
    again, _ = test_graphs.trained(Reading(test_graphs.Replayed(), only_changes), 2, hsr=None)
    differ = [[key for key in eager if not torch.equal(eager[key], found[key])] for found in (taped, again)]
    assert differ[0] and not differ[1]  # a backend that runs Python again sees nothing
