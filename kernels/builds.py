"""Ahead-of-time builds of recorded launches for GPUs that need not be there, and what can be said without timing them.

    with launch.record() as launches:
        op(x)                                   # x on the meta device
    for build in build_all(launches): ...       # registers, shared memory, spills

Needs @triton.jit to compile: a process without TRITON_INTERPRET.
"""

import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hsrgan.kernels.launch import Launch, check
from hsrgan.kernels.launch import options as launch_options


@dataclass(frozen=True)
class Target:
    """An architecture. max_shared: bytes of shared memory that one program may have (a launch above it fails)."""

    name: str
    backend: str
    arch: int | str
    warp: int  # threads
    max_shared: int
    max_registers: int  # per thread


# Shared memory: NVIDIA's CUDA Programming Guide, compute capabilities 8.0, 9.0, 10.0 (163 and 227 KiB a block); AMD's
# CDNA 3 instruction set manual (64 KiB of LDS a work group; 512 vector registers, half of them accumulation registers).
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912, 255),
        Target("sm_90", "cuda", 90, 32, 232_448, 255),
        Target("sm_100", "cuda", 100, 32, 232_448, 255),
        Target("gfx942", "hip", "gfx942", 64, 65_536, 512),
    )
}


@dataclass(frozen=True)
class Gpu:
    """A device for the static model: what the programs on one unit (SM or CU) share; bytes/s and FLOP/s of it all."""

    name: str
    target: str
    units: int
    warps: int  # resident, per unit
    programs: int  # resident, per unit
    registers: int  # 32 bits each, per unit
    shared: int  # bytes per unit
    reserved: int  # bytes of it that every program costs on top of its own
    bandwidth: float
    matrix: float  # fp16 and bf16 products with fp32 sums, dense
    vector: float  # fp32

    def rate(self, kind: str) -> float:
        """FLOP/s of products of a kind (`launch.kind_of`). tf32 is half of fp16 on each of these data sheets."""
        return {"half": self.matrix, "tf32": self.matrix / 2, "ieee": self.vector}[kind]


# Residency: the manuals named above (CDNA 3: 8 waves on each of 4 SIMDs; 512 registers × 64 lanes × 4 SIMDs).
# Rates: the data sheets of the A100 80GB SXM, H100 SXM, H200 SXM, B200 (HGX) and MI300X, without sparsity.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "sm_80", 108, 64, 32, 65_536, 167_936, 1024, 2.039e12, 312e12, 19.5e12),
        Gpu("H200", "sm_90", 132, 64, 32, 65_536, 233_472, 1024, 4.8e12, 989e12, 67e12),
        Gpu("H100", "sm_90", 132, 64, 32, 65_536, 233_472, 1024, 3.35e12, 989e12, 67e12),
        Gpu("B200", "sm_100", 148, 64, 32, 65_536, 233_472, 1024, 7.7e12, 2250e12, 75e12),
        Gpu("MI300X", "gfx942", 304, 32, 32, 131_072, 65_536, 0, 5.3e12, 1307e12, 163e12),
    )
}


@dataclass(frozen=True)
class Build:
    """One compiled kernel. registers per thread; shared bytes per program; spills: bytes of stack per thread; matrix:
    the instruction of the matrix units that its products are, as the disassembly names it, or "". executed: NVIDIA."""

    kernel: str  # module.function
    target: str
    variant: str  # argument types and constexprs
    num_warps: int
    num_stages: int
    registers: int
    shared: int
    spills: int
    error: str = ""  # what the compiler said, when there is no build
    matrix: str = ""
    executed: int = 0  # instructions of a thread, loops as often as they run; 0: not known

    def problems(self) -> list[str]:
        """Why this kernel must not be shipped for this target; empty if it may."""
        target = TARGETS[self.target]
        if self.error:
            return [f"does not compile: {self.error}"]
        found = [f"spills {self.spills} bytes a thread"] if self.spills else []
        if self.shared > target.max_shared:
            found.append(f"needs {self.shared:,} bytes of shared memory; {self.target} has {target.max_shared:,}")
        return found


@dataclass(frozen=True)
class Occupancy:
    """What runs on one unit of a GPU at a time, and what keeps more from running."""

    programs: int
    warps: int
    share: float  # of the warps that the unit can hold
    limit: str


def build(launch: Launch, target: Target | str) -> Build:
    """Compile one recorded launch as Triton would at its first call, on the target. A failed build has `error` set."""
    target = TARGETS[target] if isinstance(target, str) else target
    source, options, variant, _ = _specialised(launch, target)
    from triton import compile as triton_compile

    name = f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"
    facts = (name, target.name, variant, launch.num_warps, launch.num_stages)
    try:
        compiled = triton_compile(source, target=_gpu_target(target), options=options)
    except Exception as error:  # the compiler raises whatever its passes raise
        return Build(*facts, 0, 0, 0, f"{type(error).__name__}: {error}".strip().splitlines()[-1])
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    registers, spills, matrix = read(compiled.asm)
    executed = _executed(_disassembled(compiled.asm), turns(launch)) if target.backend == "cuda" else 0
    return Build(*facts, registers, compiled.metadata.shared, spills, matrix=matrix, executed=executed)


def turns(launch: Launch) -> int:
    """How often the loop of a kernel runs whose constants say so: rows, tiles, or blocks of channels; else 0."""
    of = launch.constants
    return of["ROWS"] // of["UNROLL"] if "UNROLL" in of else of.get("TILES", of.get("BLOCKS", 0))


def _executed(sass: str, turns: int) -> int:
    """Instructions of a thread that takes no forward branch; 0 where loops are nested or nobody knows their turns.

    A loop is a branch backwards, to a label. (A branch to itself ends the code.)
    """
    count, labels, loops = 0, {}, []
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_\w+):", line):
            labels[found[1]] = count
        elif found := _INSTRUCTION.match(line):
            if found[1] == "NOP":
                continue
            count += 1
            to = labels.get(found[3]) if found[1].startswith("BRA") else None
            if to is not None and to < count - 1:
                loops.append(count - to)
    if not loops:
        return count
    return count + loops[0] * (turns - 1) if len(loops) == 1 and turns else 0


_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*?(\.L_\w+))?")


def instructions(launch: Launch, target: str) -> Counter[str]:
    """How often each instruction, modifiers and all ("HGMMA.64x64x16.F32"), stands in a launch's code for sm_·."""
    source, options, *_ = _specialised(launch, TARGETS[target])
    from triton import compile as triton_compile

    compiled = triton_compile(source, target=_gpu_target(TARGETS[target]), options=options)
    found = map(_INSTRUCTION.match, _disassembled(compiled.asm).splitlines())
    return Counter(each[1] for each in found if each)


def build_all(launches: Iterable[Launch], targets: Sequence[str] = tuple(TARGETS), jobs: int = 1) -> list[Build]:
    """Every distinct build of the launches on every target, in their order; jobs: processes (0: one a core)."""
    return list(dict.fromkeys(build_each(list(launches), targets, jobs).values()))


def build_each(launches: Sequence[Launch], targets: Sequence[str], jobs: int = 1) -> dict[tuple[int, str], Build]:
    """(index of the launch, target) → its build. Launches that specialise alike are compiled once."""
    global _work
    for name in targets:
        check(name in TARGETS, f"unknown target {name!r}; there are: {', '.join(TARGETS)}")
    keys, _work = {}, {}
    for i, launch in enumerate(launches):
        for name in targets:
            keys[i, name] = key = (launch.kernel, name, _specialised(launch, TARGETS[name])[3])
            _work.setdefault(key, (launch, name))
    jobs = min(jobs or os.cpu_count() or 1, len(_work))
    indices = range(len(_work))
    if jobs <= 1:
        built = [_build_nth(i) for i in indices]
    else:  # forked, because a kernel does not pickle: the children find the launches in _work
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            built = list(pool.map(_build_nth, indices))
    by_key = dict(zip(_work, built, strict=True))
    return {place: by_key[key] for place, key in keys.items()}


_work: dict[tuple, tuple[Launch, str]] = {}


def _build_nth(i: int) -> Build:
    return build(*list(_work.values())[i])


def _gpu_target(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, target.warp)


def _specialised(launch: Launch, target: Target) -> tuple[Any, dict, str, str]:
    """The source, the options, the variant in words, and all that tells builds apart; as Triton would at a call.

    A 1 becomes a constant; pointers and numbers divisible by 16 are known to be (meta tensors stand at address 0);
    do_not_specialize is respected.
    """
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = launch.kernel
    what = (
        f"{getattr(kernel, '__name__', kernel)} is no compiled kernel: builds need a process without TRITON_INTERPRET"
    )
    check(isinstance(kernel, JITFunction), what)
    backend = make_backend(_gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(
        *launch.arguments,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(launch.registers, amd=target.name.startswith("gfx")),
    )
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    names = list(signature)
    fixed = {names[path[0]]: value for path, value in constants.items()}
    aligned = {names[path[0]] for path, value in attributes.items() if value}
    words = [
        f"{name}={fixed[name]}" if name in fixed else f"{name}:{kind}{'/16' if name in aligned else ''}"
        for name, kind in signature.items()
    ]
    return source, parsed.__dict__, " ".join(words), f"{signature} {constants} {attributes} {options}"


def _read_cubin(asm: dict) -> tuple[int, int, str]:
    """Registers and stack bytes of the largest function, and its matrix instruction; the stack of a Triton kernel holds
    spilled registers.

    The assembler reserves eight bytes now and then that no instruction touches: those are no spill.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        used = re.findall(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", file.name))
        registers, stack = (max(map(int, numbers)) for numbers in zip(*used, strict=True))
        products = re.search(r"\b(wgmma|tcgen05|mma)\.", asm["ptx"]) is not None
        sass = _tool("nvdisasm", file.name) if stack or products else ""
        if stack and not re.search(r"\b(STL|LDL)\b", sass):
            stack = 0
    found = re.search(r"\b(HGMMA|UTC\w*MMA|HMMA|DMMA)\b", sass)
    return registers, stack, found[1] if found else ""


def _disassembled(asm: dict) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        return _tool("nvdisasm", file.name)


def _tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools that Triton's package carries prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read_amdgcn(asm: dict) -> tuple[int, int, str]:
    """Vector registers (accumulation registers are among them), bytes of scratch memory, and the matrix instruction."""
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", asm["amdgcn"], re.MULTILINE)}
    found = re.search(r"\bv_(mfma)_", asm["amdgcn"])
    scratch = max(fields["private_segment_fixed_size"], 4 * fields["vgpr_spill_count"])
    return fields["vgpr_count"], scratch, found[1].upper() if found else ""


def occupancy(build: Build, gpu: Gpu | str) -> Occupancy:
    """Resident programs and warps on one unit of gpu, from registers, shared memory and the unit's own limits.

    NVIDIA hands registers out in 256s a warp, to four warps at a time, and shared memory in 128 bytes; CDNA 3 in eights
    a thread on each of four SIMDs.
    """
    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    check(gpu.target == build.target, f"build is for {build.target}; {gpu.name} is {gpu.target}")
    warp, registers = TARGETS[gpu.target].warp, max(build.registers, 1)
    a_warp = math.ceil(registers / 8) * 8 * warp
    quarter = gpu.registers // 4 // a_warp  # warps that the registers of one of the four schedulers hold
    limits = {
        "programs": gpu.programs,
        "warps": gpu.warps // build.num_warps,
        "registers": 4 * quarter // build.num_warps,
    }
    if build.shared + gpu.reserved:
        limits["shared memory"] = gpu.shared // (math.ceil(build.shared / 128) * 128 + gpu.reserved)
    programs = min(limits.values())
    warps = programs * build.num_warps
    return Occupancy(programs, warps, warps / gpu.warps, min(limits, key=limits.get))


def bytes_moved(launch: Launch) -> int:
    """Bytes of memory that a launch must move: each of its tensors once, elements of an expanded tensor once.

    A lower bound on reads and writes for a kernel that looks at all its tensors, and what a roofline divides by.
    """
    tensors = {_identity(t): t for t in launch.arguments if isinstance(t, Tensor)}
    return sum(t.itemsize * _elements(t) for t in tensors.values())


def _identity(t: Tensor) -> tuple:
    return t.untyped_storage()._cdata, t.storage_offset(), t.dtype, tuple(t.shape), t.stride()


def _elements(t: Tensor) -> int:
    return math.prod(n if s else min(n, 1) for n, s in zip(t.shape, t.stride(), strict=True))


def floor_seconds(moved: float, flops: float, gpu: Gpu | str, kind: str = "ieee") -> float:
    """The time below which no kernel can be on gpu: bytes at full bandwidth or flops at the full rate of their kind."""
    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    return max(moved / gpu.bandwidth, flops / gpu.rate(kind))


def issue_seconds(build: Build, launch: Launch, gpu: Gpu | str) -> float:
    """The time below which no NVIDIA gpu is that must issue what the launch executes: one instruction a clock from each
    scheduler, for 32 threads, a fused multiply-add counting two FLOPs of `vector`. 0: not known.
    """
    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    return build.executed * 32 * build.num_warps * math.prod(launch.grid) / (gpu.vector / 2)
