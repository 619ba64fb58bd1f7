"""An op under test and how it is run: its tensors, and its derivatives of any order beside those of its definition.

Kernels run in Triton's interpreter (TRITON_INTERPRET=1), or on the GPU where there is one and TRITON_INTERPRET=0. While
an op runs, `watched` fills everything that torch.empty and its kin hand out with NaN, and lets no interpreted kernel
touch memory outside its tensors.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from layouts import FORMATS, GRADIENT_LAYOUTS, LAYOUTS
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from watched import Watch, device, watched

RAGGED = (1, 3, 7, 63, 100, 129)  # around the usual tiles of 64 and 128, and far below them
SIZES = (
    *((1, c, 2, 3) for c in RAGGED),
    *((2, 2, 1, w) for w in RAGGED),
    *((1, 3, h, 2) for h in (7, 63)),
    (3, 33, 5, 7),
    (0, 3, 4, 5),
)
LAYOUT_SIZES = ((2, 5, 4, 6), (2, 17, 3, 5))
HALVES_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OpCase:
    """One op with one set of options.

    op, op_torch: called with the tensors of `make`, in that order; op as the user calls it (it chooses Triton itself).
    make(n, c, h, w): fp64 tensors on the CPU, from torch's generator; the first is x. low: which of them are in the
    dtype under test in `precision` (the others stay fp32, as weights and styles do). constants: which never need a
    gradient (a filter, a target). order: how often the op is differentiable; beyond it must raise or be right.
    may_copy: op may copy tensors as large as x. precise_order: up to which derivative `precision` looks.
    """

    name: str
    op: Callable[..., Tensor]
    op_torch: Callable[..., Tensor]
    make: Callable[[int, int, int, int], Sequence[Tensor]]
    low: tuple[int, ...] = (0,)
    constants: tuple[int, ...] = ()
    order: int = 2
    precise_order: int = 1
    may_copy: bool = False
    sizes: tuple[tuple[int, int, int, int], ...] = SIZES
    layout_sizes: tuple[tuple[int, int, int, int], ...] = LAYOUT_SIZES
    precision_sizes: tuple[tuple[int, int, int, int], ...] = ((2, 16, 6, 5), (1, 7, 9, 8))
    determinism_size: tuple[int, int, int, int] = (2, 3, 9, 15)
    gradcheck_size: tuple[int, int, int, int] = (2, 3, 3, 2)
    slow_size: tuple[int, int, int, int] = (1, 2, 1, 2)
    dtypes: tuple[torch.dtype, ...] = HALVES_AND_SINGLE

    def tensors(self, size: Sequence[int], seed: int = 0) -> list[Tensor]:
        torch.manual_seed(seed)
        return [t.to(device()) for t in self.make(*size)]

    def free(self, count: int) -> list[int]:
        """The indices that may need a gradient."""
        return [i for i in range(count) if i not in self.constants]


Results = dict[str, Tensor]


def derivatives(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    wanted: Sequence[int],
    order: int,
    *,
    seed: int = 0,
    gradient: Callable[[Tensor], Tensor] = lambda g: g,
    watch: Watch | None = None,
    results: Results | None = None,
) -> Results:
    """y; the gradients of <y, g>; the gradients of <those, v> by every input and by g; and so on up to `order`.

    g and v are fixed random tensors, `gradient` puts g into another layout. A derivative that autograd does not reach
    is zero here, as it would be in a penalty. watch counts launches by level under its `levels`. `results` is filled
    as far as it goes before something raises.
    """
    results = {} if results is None else results
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    y = function(*leaves)
    results["y"] = y.detach()
    if watch:
        watch.level("forward")
    sources = {f"input {i}": leaves[i] for i in wanted}
    if order == 0 or not sources:
        return results
    generator = torch.Generator().manual_seed(seed + 1)

    def like(t: Tensor) -> Tensor:
        """Normal, in steps of 1/32: every dtype holds it exactly."""
        return (torch.randn(t.shape, generator=generator, dtype=torch.float64) * 32).round().div(32).to(t)

    with _disable_current_modes():  # what is made here is not the op's doing
        upstream = gradient(like(y)).detach().requires_grad_(order > 1)
    level = [(y, upstream)]
    for k in range(1, order + 1):
        outputs = [(o, v) for o, v in level if o.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(sources)
        if outputs:
            found = torch.autograd.grad(
                [o for o, _ in outputs],
                list(sources.values()),
                [v for _, v in outputs],
                create_graph=k < order,
                allow_unused=True,
            )
        if watch:
            watch.level("gradients" if k == 1 else f"order {k}")
        level = []
        for (name, source), value in zip(sources.items(), found, strict=True):
            value = torch.zeros_like(source) if value is None else value
            results[f"order {k}, {name}"] = value.detach()
            with _disable_current_modes():
                level.append((value, like(value)))
        sources.setdefault("output gradient", upstream)
    return results


def truth_and_op(
    case: OpCase, tensors: Sequence[Tensor], order: int, wanted: Sequence[int] | None = None, **options
) -> tuple[Results, Results, Watch]:
    """`derivatives` of op_torch and of op on fp64 tensors, op watched."""
    wanted = case.free(len(tensors)) if wanted is None else wanted
    truth = derivatives(case.op_torch, tensors, wanted, order, **options)
    with watched() as watch:
        fast = derivatives(case.op, tensors, wanted, order, watch=watch, **options)
    return truth, fast, watch


def assert_equal(truth: Results, fast: Results, what: str, level: str = "") -> None:
    """Element by element within 1e-10 of the mean size (at least of 1): fp64 sums in any order."""
    for name, expected in truth.items():
        if not name.startswith(level):
            continue
        value = fast[name]
        shapes = f"shape {list(value.shape)}, not {list(expected.shape)}"
        assert value.shape == expected.shape, f"{what}: {name} has {shapes}"
        assert value.dtype == expected.dtype, f"{what}: {name} is {value.dtype}, not {expected.dtype}"
        if expected.numel() == 0:
            continue
        known = expected.isfinite()  # the mean over no image at all is NaN in the definition too
        bound = 1e-10 * (1 + expected[known].abs().sum() / max(int(known.sum()), 1))
        bad = known & ~((value - expected).abs() <= bound)
        at = bad.nonzero()[:1].tolist()
        assert not bad.any(), f"{what}: {name} is wrong in {int(bad.sum())} of {bad.numel()} places, first {at}"


@dataclass
class Run:
    """One size of the sweep that several checks look at: the truth, the op's results as far as it came, the watch."""

    size: tuple[int, ...]
    truth: Results
    fast: Results
    watch: Watch
    error: Exception | None = None


@functools.lru_cache(maxsize=1)
def sweep(case: OpCase) -> list[Run]:
    """Every size of the case in fp64, up to the order of the op, torch.empty full of NaN."""
    runs = []
    for size in case.sizes:
        tensors = case.tensors(size)
        wanted = case.free(len(tensors))
        run = Run(size, derivatives(case.op_torch, tensors, wanted, case.order), {}, Watch())
        with watched() as run.watch:
            try:
                derivatives(case.op, tensors, wanted, case.order, results=run.fast)
            except Exception as error:  # the check that looks at what is missing will raise it
                run.error = error
        runs.append(run)
    return runs


@dataclass
class LayoutRun:
    """One size with one layout of the inputs (a key of LAYOUTS) and one of the output gradient."""

    what: str
    layout: str
    numel: int  # of x
    truth: Results
    fast: Results
    watch: Watch


@functools.lru_cache(maxsize=1)
def layout_sweep(case: OpCase) -> list[LayoutRun]:
    """Every layout of the inputs; for the two memory formats every layout of the output gradient, too."""
    runs = []
    for size, (name, layout) in itertools.product(case.layout_sizes, LAYOUTS.items()):
        tensors = [layout(t, i) for i, t in enumerate(case.tensors(size))]
        for g_name, g_layout in GRADIENT_LAYOUTS.items():
            if g_name == "as y" or name in FORMATS:
                results = truth_and_op(case, tensors, case.order, gradient=g_layout)
                what = f"{size}, inputs {name}, output gradient {g_name}"
                runs.append(LayoutRun(what, name, tensors[0].numel(), *results))
    return runs
