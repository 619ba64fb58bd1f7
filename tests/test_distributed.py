"""The engines' own arithmetic on one rank; whole runs over ranks and ZeRO stages are in test_training.py."""

import pytest
import torch
from torch import nn

from hsrgan.engine import distributed
from hsrgan.engine.distributed import Sharded, lazy_adam
from hsrgan.engine.errors import UserError


@pytest.fixture(scope="module")
def one_rank():
    """DeepSpeed keeps its groups for the life of a process, so all tests here share one."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
            patch.setenv(name, "")  # so that what `start` sets is undone afterwards
            patch.delenv(name)
        distributed.start(distributed.world_from_environment("cpu"))
        yield
        distributed.stop()
    torch.set_num_threads(threads)


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device is cuda, but torch sees no GPU here: .* set device=cpu"):
        distributed.world_from_environment("cuda")
    assert distributed.world_from_environment("auto").device.type == "cpu"


def test_lazy_adam_scales_rate_and_betas():
    parameter = nn.Parameter(torch.zeros(1))
    (group,) = lazy_adam([parameter], 0.002, 0.5, 0.99, 1e-8, 16).param_groups
    assert group["lr"] == pytest.approx(0.002 * 16 / 17)
    assert group["betas"] == pytest.approx((0.5 ** (16 / 17), 0.99 ** (16 / 17))) and group["eps"] == 1e-8
    (group,) = lazy_adam([parameter], 0.002, 0.0, 0.99, 1e-8, 0).param_groups
    assert group["lr"] == 0.002 and group["betas"] == (0.0, 0.99)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_skip_a_step_is_plain_adam_on_mended_gradients(one_rank, stage):
    """NaN counts as 0, infinities as ±1e5, a parameter without gradient as one with zeros; nothing is clipped."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    plain = [nn.Parameter(p.detach().clone()) for p in module.parameters()]
    reference = lazy_adam(plain, 0.1, 0.0, 0.99, 1e-8, 4)
    adam = lazy_adam(module.parameters(), 0.1, 0.0, 0.99, 1e-8, 4)
    sharded = Sharded(module, adam, zero_stage=stage, micro_batch=1, skip=False)
    nan, inf = float("nan"), float("inf")
    first = torch.tensor([[nan, inf, -inf], [1.0, -200.0, 0.0]])
    for weight, bias in ((first, None), (torch.ones(2, 3), torch.tensor([3.0, nan]))):
        with distributed.gathered(sharded):
            sharded.step([weight, bias], torch.tensor(1.0))
        plain[0].grad = weight.nan_to_num(nan=0.0, posinf=1e5, neginf=-1e5)
        plain[1].grad = torch.zeros(2) if bias is None else bias.nan_to_num(nan=0.0)
        reference.step()
    with distributed.gathered(sharded):
        for mine, theirs in zip(module.parameters(), plain, strict=True):
            assert torch.equal(mine, theirs)
    assert sharded.optimizer_step() == 2
    state = sharded.optimizer_state()
    assert torch.equal(state["exp_avg_sq.weight"], reference.state[plain[0]]["exp_avg_sq"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing(one_rank, stage):
    """Parameters, moments and count are to the last bit those of a run without it; it is counted and named."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    plain = [nn.Parameter(p.detach().clone()) for p in module.parameters()]
    reference = lazy_adam(plain, 0.1, 0.5, 0.99, 1e-8, 4)
    adam = lazy_adam(module.parameters(), 0.1, 0.5, 0.99, 1e-8, 4)
    sharded = Sharded(module, adam, zero_stage=stage, micro_batch=1)
    nan, inf, fine = float("nan"), float("inf"), torch.tensor(1.0)
    good = [torch.full_like(p, 0.3) for p in plain]
    for gradients, loss in (
        ([None, None, None, None], fine),  # nothing wrong: an ordinary step, of zeros
        ([good[0], good[1], good[2] * nan, good[3] * inf], fine),
        (good, torch.tensor(nan)),
        (good, fine),
    ):
        with distributed.gathered(sharded):
            sharded.step(gradients, loss)
        if sharded.finite.found == 0:
            for parameter, gradient in zip(plain, gradients, strict=True):
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            reference.step()
    assert sharded.optimizer_step() == 2
    with distributed.gathered(sharded):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(module.parameters(), plain, strict=True))
    state = sharded.optimizer_state()
    for name, theirs in zip(sharded.names, plain, strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[f"{moment}.{name}"], reference.state[theirs][moment])
    found = sharded.finite.collect()
    assert (found.count, found.steps, found.first, found.of) == (2, 4, "1.weight", 2)
    assert sharded.finite.collect().count == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_step_waits_for_the_device(one_rank, monkeypatch, stage):
    """DeepSpeed hooks the module's forward, which runs inside of a CUDA graph: to wait there ends the recording."""
    from deepspeed.accelerator import get_accelerator

    module, waits = nn.Linear(3, 2), []
    adam = lazy_adam(module.parameters(), 0.1, 0.0, 0.99, 1e-8, 4)
    sharded = Sharded(module, adam, zero_stage=stage, micro_batch=1)
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda self, device=None: waits.append(device))
    for _ in range(4):
        with distributed.gathered(sharded):
            loss = module(torch.ones(1, 3)).sum()
            sharded.step(torch.autograd.grad(loss, sharded.parameters), loss.detach())
    assert not waits
