"""CUDA's own graphs, where there is a GPU: phases replayed as they run eagerly, and a recording that is broken off."""

import gc

import pytest
import test_graphs
import torch
from watched import device

from hsrgan.engine.assembly import load_teachers
from hsrgan.engine.graphs import Cuda, Graphs, direct
from hsrgan.engine.phases import build_phases
from hsrgan.tools.plain_training import plain_training, run_step
from hsrgan.tools.train_gpu import Gpu

pytestmark = pytest.mark.skipif(device() == "cpu", reason="there is no GPU, or TRITON_INTERPRET is not 0")
AUGMENT = {"mode": "diffaugment", "policy": "color,translation,cutout"}


def trained(call, steps: int = 5, spoil=lambda t: None, **changes) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """HSR begins in the fourth step; the networks and means after the last one."""
    settings = test_graphs.recipe(**changes)
    teachers = {name: teacher.to(Gpu.device).to_bf16() for name, teacher in load_teachers(settings).items()}
    t = plain_training(settings, Gpu.device, teachers, num_classes=3)
    t.call = call
    spoil(t)
    phases, generator = build_phases(t), torch.Generator().manual_seed(5)
    for step in range(steps):
        reals = torch.rand(8, 1, 16, 16, generator=generator).to(memory_format=torch.channels_last) * 2 - 1
        labels = torch.eye(3)[torch.arange(8) % 3]
        run_step(t, phases, step * 8, reals.to(Gpu.device), labels.to(Gpu.device))
    state = {f"{name}.{key}": value.clone() for name, net in (("G", t.g), ("D", t.d))
             for key, value in net.module.state_dict().items()}  # fmt: skip
    return state | {"pl_mean": t.pl_mean}, t.meter.collect()


@pytest.mark.parametrize("changes", [
    {"precision": "fp16", "accumulation": 2}, {"precision": "bf16", **test_graphs.R3GAN}, {"augment": AUGMENT},
], ids=["fp16", "other objectives", "augmented"])  # fmt: skip
def test_replayed_phases_train_as_eager_ones(changes):
    said = []
    eager, means = trained(direct, **changes)
    graphed, graphed_means = trained(Graphs(Cuda(), said.append), **changes)
    assert [line for line in said if "Gmain changes" not in line] == []
    differ = {key: float((value - graphed[key]).abs().max()) for key, value in eager.items()}
    assert not {key: by for key, by in differ.items() if by}
    assert means == graphed_means and "loss/hsr" in means


def test_a_recording_that_is_broken_off_leaves_nothing_behind():
    """D waits for the GPU, which no capture may. G's path length has been recorded by then."""

    def waits(t):
        t.d.module.register_forward_pre_hook(lambda *_: torch.cuda.synchronize() if said_at else None)

    said, said_at = [], []
    order = {"Greg": said_at.append}  # from the second phase on D waits

    class Late(Graphs):
        def __call__(self, name, function, inputs):
            order.get(name, lambda _: None)(1)
            return super().__call__(name, function, inputs)

    eager, _ = trained(direct, 3)
    graphed, _ = trained(Late(Cuda(), said.append), 3, waits)
    assert len(said) == 1 and said[0].startswith("cuda_graphs: off, Dmain cannot be recorded")
    assert all(torch.equal(value, graphed[key]) for key, value in eager.items())
    gc.collect()
    torch.cuda.empty_cache()  # frees nothing while the allocator believes in a capture
    assert {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()} <= {(0, 0)}
