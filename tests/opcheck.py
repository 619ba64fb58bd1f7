"""The op contract: what every Triton op must hold, as named checks, so that a failure says which one caught it.

    case = OpCase("bias_act", bias_act, bias_act_torch, make)
    check(case)                                             # every check, one message with all that failed
    @pytest.mark.parametrize("name", CHECKS)                # or one test a check
    def test_contract(name): check(case, name)

The truth is `op_torch` in fp64; `op_cases` runs both.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from layouts import FORMATS
from op_cases import OpCase, assert_equal, derivatives, layout_sweep, sweep, truth_and_op
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from watched import watched

FREE = 4 * torch.finfo(torch.float32).eps  # of the norm, in every dtype: sums are taken in another order


def _compare(case: OpCase, level: str) -> None:
    for run in sweep(case):
        if run.error is not None and not any(name.startswith(level) for name in run.fast):
            raise AssertionError(f"{run.size}: {level}: {run.error!r}") from run.error
        assert_equal(run.truth, run.fast, f"{run.size}", level)


def check_launches(case: OpCase) -> None:
    """Triton runs: something is launched in the forward pass and in every derivative up to the op's order."""
    tensors = case.tensors(case.gradcheck_size)
    with watched() as watch:
        derivatives(case.op, tensors, case.free(len(tensors)), case.order, watch=watch)
    for level, count in watch.levels.items():
        assert count > 0, f"nothing was launched in {level}"


def check_bounds(case: OpCase) -> None:
    """No interpreted kernel reads or writes outside the tensors it was given."""
    for run in sweep(case):
        assert not run.watch.outside, f"{run.size}: {run.watch.outside[0]}"


def check_poison(case: OpCase) -> None:
    """Every output is written in full: finite, and the same whether torch.empty hands out NaN or 3."""
    for run in sweep(case):
        for name, value in run.fast.items():
            finite = value.isfinite() | ~run.truth[name].isfinite()
            assert finite.all(), f"{run.size}: {name} holds what torch.empty left there"
        tensors = case.tensors(run.size)
        with watched(3.0):
            other = derivatives(case.op, tensors, case.free(len(tensors)), case.order)
        assert_equal(run.fast, other, f"{run.size}, depending on what torch.empty left there")


def check_values(case: OpCase) -> None:
    """y of op_torch, in fp64, at every ragged size, N = 0 and N = 1."""
    _compare(case, "y")


def check_gradients(case: OpCase) -> None:
    """First gradients of op_torch, in fp64, at every ragged size."""
    _compare(case, "order 1")


def check_second(case: OpCase) -> None:
    """Second derivatives (and higher up to the op's order) of op_torch, in fp64, at every ragged size."""
    for k in range(2, case.order + 1):
        _compare(case, f"order {k}")


def check_order(case: OpCase) -> None:
    """One derivative more than promised raises RuntimeError or is right: a penalty never reads a silent zero."""
    tensors = case.tensors(case.gradcheck_size)
    try:
        truth, fast, _ = truth_and_op(case, tensors, case.order + 1)
    except RuntimeError:
        return
    assert_equal(truth, fast, f"order {case.order + 1} neither raises nor is right", f"order {case.order + 1}")


def check_partial(case: OpCase) -> None:
    """All derivatives when one input alone needs a gradient, and when one alone needs none (create_graph included)."""
    tensors = case.tensors(case.gradcheck_size)
    free = case.free(len(tensors))
    choices = {(i,) for i in free} | {tuple(j for j in free if j != i) for i in free}
    for wanted in sorted(choices - {()}):
        truth, fast, _ = truth_and_op(case, tensors, case.order, wanted)
        assert_equal(truth, fast, f"gradients for inputs {list(wanted)} alone")
    with watched(), torch.no_grad():
        assert not case.op(*tensors).requires_grad


def check_layouts(case: OpCase) -> None:
    """Right at every layout of inputs and output gradient; y and the gradient of x come in the memory format of x."""
    for run in layout_sweep(case):
        assert_equal(run.truth, run.fast, run.what)
        memory_format = FORMATS.get(run.layout.removeprefix("sliced "))
        for key in ("y", "order 1, input 0"):
            value = run.fast.get(key)
            if memory_format is not None and value is not None and value.ndim == 4:
                ok = value.is_contiguous(memory_format=memory_format)
                assert ok, f"{run.what}: {key} is not {run.layout[-4:]} but has strides {value.stride()}"


def check_copies(case: OpCase) -> None:
    """No layout makes op copy a tensor as large as x, forward or backward."""
    if case.may_copy:
        return
    for run in layout_sweep(case):
        large = [copied for copied, numel in run.watch.copies if numel >= run.numel]
        assert not large, f"{run.what}: {large[0]} copies as much as x holds"


def check_inputs(case: OpCase) -> None:
    """Neither the inputs nor the output gradient are written to."""
    for size in (case.layout_sizes[0], case.sizes[0]):
        tensors = case.tensors(size)
        seen = {f"input {i}": (t, t.clone()) for i, t in enumerate(tensors)}

        def note(g, seen=seen):
            seen["the output gradient"] = (g, g.clone())
            return g

        with watched():
            derivatives(case.op, tensors, case.free(len(tensors)), case.order, gradient=note)
        for name, (now, before) in seen.items():
            assert torch.equal(now, before), f"{size}: {name} was written to"


def check_determinism(case: OpCase) -> None:
    """Two runs give the same bits, in fp32 and bf16, in every derivative."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = _rounded(case, case.tensors(case.determinism_size), dtype)
        runs = []
        for _ in range(2):
            with watched():
                runs.append(derivatives(case.op, tensors, case.free(len(tensors)), case.order))
        for name, first in runs[0].items():
            same = torch.equal(first.nan_to_num(), runs[1][name].nan_to_num())
            assert same, f"{name} differs between two runs in {dtype}"


def check_precision(case: OpCase) -> None:
    """‖op − truth‖ ≤ 2·‖op_torch − truth‖ + 4 fp32 roundings, for y and the gradients, in fp32, fp16 and bf16.

    Norms are over all elements of three draws. The truth is op_torch in fp64 on the same rounded inputs.
    """
    for dtype, size in itertools.product(case.dtypes, case.precision_sizes):
        own, fast, scale = Counter(), Counter(), Counter()
        for seed in range(3):
            tensors = _rounded(case, case.tensors(size, seed), dtype)
            wanted = case.free(len(tensors))
            as_given = derivatives(case.op_torch, tensors, wanted, case.precise_order, seed=seed)
            exact = [t.double() for t in tensors]
            truth = derivatives(case.op_torch, exact, wanted, case.precise_order, seed=seed)
            with watched():
                ours = derivatives(case.op, tensors, wanted, case.precise_order, seed=seed)
            for name, expected in truth.items():
                assert ours[name].dtype == as_given[name].dtype, f"{dtype}: {name} is {ours[name].dtype}"
                assert ours[name].isfinite().all(), f"{dtype}, {size}: {name} is not finite"
                own[name] += (as_given[name].double() - expected).square().sum().item()
                fast[name] += (ours[name].double() - expected).square().sum().item()
                scale[name] += expected.square().sum().item()
        for name, square in scale.items():
            norm = max(square**0.5, 1e-300)
            ours, theirs = fast[name] ** 0.5 / norm, own[name] ** 0.5 / norm
            what = f"{dtype}, {size}: {name}"
            assert ours <= 2 * theirs + FREE, f"{what} is off by {ours:.2e} (relative), op_torch by {theirs:.2e}"


def check_gradcheck(case: OpCase) -> None:
    """torch's gradcheck in fp64: a random projection in both formats, and every entry of a tiny case."""
    _numerical(case, gradcheck)


def check_gradgradcheck(case: OpCase) -> None:
    """torch's gradgradcheck in fp64: a random projection in both formats, and every entry of a tiny case."""
    if case.order >= 2:
        _numerical(case, gradgradcheck)


def _numerical(case: OpCase, checker: Callable[..., bool]) -> None:
    runs = [(case.gradcheck_size, f, True) for f in FORMATS.values()] + [(case.slow_size, FORMATS["nhwc"], False)]
    for size, memory_format, fast_mode in runs:
        tensors = case.tensors(size)
        tensors = [t.contiguous(memory_format=memory_format) if t.ndim == 4 else t for t in tensors]
        leaves = [t.detach().requires_grad_(i not in case.constants) for i, t in enumerate(tensors)]
        with watched():
            try:
                checker(case.op, leaves, fast_mode=fast_mode)
            except RuntimeError as error:  # torch's message: which output, which input, both Jacobians
                raise AssertionError(f"{size}: {error}") from error


def _rounded(case: OpCase, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype if i in case.low else torch.float32) for i, t in enumerate(tensors)]


CHECKS: dict[str, Callable[[OpCase], None]] = {
    "launches": check_launches,
    "bounds": check_bounds,
    "poison": check_poison,
    "values": check_values,
    "gradients": check_gradients,
    "second": check_second,
    "order": check_order,
    "partial": check_partial,
    "layouts": check_layouts,
    "copies": check_copies,
    "inputs": check_inputs,
    "determinism": check_determinism,
    "precision": check_precision,
    "gradcheck": check_gradcheck,
    "gradgradcheck": check_gradgradcheck,
}


def failures(case: OpCase, *names: str) -> dict[str, str]:
    """What each of the named checks (all by default) has to complain of: nothing for an op that holds the contract."""
    found = {}
    for name in names or CHECKS:
        try:
            CHECKS[name](case)
        except (AssertionError, RuntimeError, IndexError) as error:
            found[name] = f"{error}" or type(error).__name__
    return found


def check(case: OpCase, *names: str) -> None:
    """AssertionError with every check (of `names`; all by default) that the op fails, and why."""
    found = failures(case, *names)
    assert not found, "\n".join(f"{case.name} fails {name}: {why}" for name, why in found.items())
