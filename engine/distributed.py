"""Ranks, and the two DeepSpeed engines of a GAN.

One `Sharded` holds one network. The trainer takes its derivatives itself (`torch.autograd.grad`, any number of
rounds, double backwards included) and hands the finished gradients over once per phase; DeepSpeed averages them over
the ranks and steps the sharded Adam. So ZeRO 0–3 see the same single, ordinary backward, and every parameter has a
gradient in every phase: zero where the phase does not use it, as in StyleGAN2's own training.

ZeRO 3 partitions parameters between phases only (`gathered`): a GAN's phase differentiates twice through parameters
that ZeRO 3 would have taken away between the two passes. Its saving is therefore in what lies between phases; the
peak inside a phase is that of ZeRO 2.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hsrgan.engine import rendezvous
from hsrgan.engine.errors import RankError, UserError
from hsrgan.engine.finite import Finite

MOMENTS = ("exp_avg", "exp_avg_sq")
COLLECTIVE = datetime.timedelta(minutes=10)  # the longest that one rank may wait for another


@dataclass(frozen=True)
class World:
    """This process among all: rank, world_size, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def world_from_environment(device: str = "auto") -> World:
    """Read what `deepspeed` or `torchrun` has set; a plain `python engine/train.py` is a world of one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU here: look for its driver, or set device=cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    return World(
        rank, size, local_rank, local_size, torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    )


def start(world: World, patience: float = rendezvous.PATIENCE) -> None:
    """Join the process group (NCCL on GPUs, gloo elsewhere; `rendezvous.meet`), and share the cores among the ranks of
    this machine.
    """
    with rendezvous.before_meeting(world.rank, world.size):
        if world.device.type == "cuda":
            if world.local_rank >= (count := torch.cuda.device_count()):
                raise UserError(
                    f"there is no cuda:{world.local_rank}: {socket.gethostname()} has {count} GPUs; start as many "
                    "ranks there, or set device=cpu"
                )
            torch.cuda.set_device(world.device)
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed's engine asks for it even where nobody launched it
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if world.device.type == "cpu":
        # A faster all-reduce between CPU processes, compiled for half a minute at first use: not worth a compiler. On a
        # GPU nothing asks for this table, and to make it takes seconds, compilers and warnings.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    rendezvous.meet(world.rank, world.size, backend, patience, COLLECTIVE)
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE, verbose=False)


def stop() -> None:
    """Leave the process group, all ranks together."""
    if torch.distributed.is_initialized():
        # A thread of gloo's may still have to free the last collective's tensors, for which it needs the interpreter:
        # on its way out that aborts the process, after all its work. While this one waits here, the thread gets it.
        barrier()
        torch.distributed.destroy_process_group()


def barrier() -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """All-reduced sum, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(value)
    return value


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """All-reduced mean, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        sum_over_ranks(value)
        value /= torch.distributed.get_world_size()
    return value


def max_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """All-reduced maximum, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return value


def from_first(value: Any) -> Any:
    """Rank 0's value (anything that pickles), on every rank."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        (value,) = box
    return value


def copy_from_first(*modules: nn.Module) -> None:
    """Rank 0's parameters and buffers into these modules on every rank."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for value in (value for module in modules for value in module.state_dict().values()):
            whole = value.contiguous()
            torch.distributed.broadcast(whole, src=0)
            value.copy_(whole)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A `UserError` on any rank inside is raised on every rank at the end: none waits for one that has left, and the
    first rank, which speaks for all, has something to say. No collective may stand inside.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    failures = [failure]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        failures *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure)
    for failure in failures:
        if failure is not None:
            raise UserError(str(failure)) if isinstance(failure, RankError) else failure  # all ranks know it now


def lazy_adam(
    parameters: Iterable[nn.Parameter], lr: float, beta1: float, beta2: float, eps: float, interval: float
) -> torch.optim.Adam:
    """The one Adam that a network's main and lazy phases share: lr·k/(k+1) and β^(k/(k+1)), k the lazy interval, or
    the mean number of main steps for each lazy one (0: no lazy phase, nothing scaled).

    Source: StyleGAN2 (arXiv 1912.04958), appendix B, "Lazy regularization".
    """
    ratio = interval / (interval + 1) if interval else 1.0
    # beta1 = 0 stays 0; ** is safe for both
    return torch.optim.Adam(parameters, lr=lr * ratio, betas=(beta1**ratio, beta2**ratio), eps=eps, fused=True)


def mended(gradients: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """With NaN → 0 and ±inf → ±1e5 (StyleGAN2's training)."""
    return [torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5) for gradient in gradients]


class _Deliver(torch.autograd.Function):
    """A scalar 0 whose gradient with respect to each parameter is the tensor given for it."""

    @staticmethod
    def forward(ctx, gradients, *parameters):
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        gradients, ctx.gradients = ctx.gradients, None
        return None, *gradients


class Sharded:
    """One network and its optimiser under a DeepSpeed engine.

    module: its parameters must hold their starting values, all of them require gradients and none is 0-dim (DeepSpeed
    refuses those). micro_batch: images per rank and round; DeepSpeed wants the number, nothing here depends on it.
    skip: a step that is not finite changes nothing; without it, its gradients are mended.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Adam, *, zero_stage: int, micro_batch: int, skip: bool = True
    ):
        import deepspeed

        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = list(module.parameters())
        self.module, self.zero_stage, self.skip = module, zero_stage, skip
        self.finite = Finite(self.names, self.parameters[0].device)
        zero: dict[str, object] = {"stage": zero_stage, "overlap_comm": False}
        # DeepSpeed's default is a buffer of 5·10⁸ gradients, 2 GB of it per network, which stage 3 never gives back
        zero["reduce_bucket_size"] = sum(parameter.numel() for parameter in self.parameters)
        if zero_stage in (1, 2):
            zero["compute_grad_norm"] = False  # not used here, and read to the host in every step
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0 and clips in silence
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            # its hook on the module's forward waits for the device, and no CUDA graph can be recorded through that
            "timers": {"throughput": {"enabled": False}},
            "zero_optimization": zero,
        }
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        if zero_stage == 3:
            # The module's own gather hooks would take parameters away between inner and outer backward; `gathered`
            # replaces them.
            self.engine.optimizer.parameter_offload._remove_module_hooks()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self.engine.optimizer.optimizer if self.zero_stage else self.engine.optimizer

    def step(self, gradients: Sequence[torch.Tensor | None], loss: torch.Tensor) -> None:
        """Average over ranks and take one Adam step. gradients: one per parameter, in order; None counts as zero.
        loss []: what they are the gradients of.

        If one of them is not finite on any rank, the step changes neither parameters nor moments; without `skip`, NaN
        becomes 0 and ±inf ±1e5 instead, as in StyleGAN2's training, here before the ranks' mean.
        """
        whole = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient, parameter in zip(gradients, self.parameters, strict=True)
        ]
        found = self.finite.count(max_over_ranks(self.finite.check(whole, loss)))
        if self.skip:
            self._adam.found_inf = found  # the fused Adam's own switch, for loss scaling: nothing waits for the host
        if not self.skip or self.zero_stage == 3:  # whose own check would look for what is not finite, and say so
            whole = mended(whole)
        self.engine.backward(_Deliver.apply(whole, *self.parameters))
        self.engine.step()

    def moved(self) -> torch.Tensor | None:
        """[] on the device: 1 if a step since the last call has changed the parameters, 0 if all were skipped; None
        where no step ever is.
        """
        return self.finite.moved() if self.skip else None

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Both Adam moments of every parameter in full, as `{moment}.{name}`, on every rank. All ranks must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        state = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for moment in MOMENTS:
                if self.zero_stage == 0:
                    value = self._adam.state[parameter][moment]
                else:
                    value = safe_get_full_optimizer_state(parameter, moment)
                state[f"{moment}.{name}"] = value.detach().view(_full_shape(parameter)).cpu().clone()
        return state

    def optimizer_step(self) -> int:
        """Adam's count of steps."""
        return int(next(iter(self._adam.state.values()))["step"])

    def load_optimizer_state(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Set moments and step count from `optimizer_state()` of any number of ranks and any ZeRO stage. All ranks
        must call it.
        """
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        # A step of lr 0 on zero gradients makes DeepSpeed create the state to be filled, and changes no parameter.
        groups = self._adam.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        with gathered(self):
            shapes = [parameter.shape for parameter in self.parameters]
            finite = [torch.zeros_like(parameter) for parameter in self.parameters]
            self.engine.backward(_Deliver.apply(finite, *self.parameters))
        self.engine.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

        for name, parameter, shape in zip(self.names, self.parameters, shapes, strict=True):
            for moment in MOMENTS:
                value = state[f"{moment}.{name}"].view(shape).to(parameter.device)
                if self.zero_stage == 0:
                    self._adam.state[parameter][moment].copy_(value)
                elif self.zero_stage == 3:
                    safe_set_local_optimizer_state(parameter, _shard(value, parameter), moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)
        for entry in self._adam.state.values():
            entry["step"] = torch.full_like(entry["step"], step) if torch.is_tensor(entry["step"]) else step


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _shard(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's slice of a ZeRO 3 parameter's flattened value, zero-padded to equal lengths."""
    size = parameter.ds_tensor.numel()
    first = size * torch.distributed.get_rank()
    flat = value.new_zeros(size)
    mine = value.flatten()[first : first + size]
    flat[: mine.numel()] = mine
    return flat


@contextlib.contextmanager
def gathered(*networks: Sharded) -> Iterator[None]:
    """All parameters of these networks are whole inside; does nothing below ZeRO 3."""
    sharded = [parameter for network in networks if network.zero_stage == 3 for parameter in network.parameters]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield
