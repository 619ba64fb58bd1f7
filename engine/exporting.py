"""A generator as a graph for other runtimes: ONNX, torch.export, AOTInductor. Any batch, and checked against PyTorch.

Traced on the torch backend, in which a modulated convolution scales its input, convolves with one weight for all
samples and scales the output (`kernels/modulated_conv2d.py`): nothing depends on the batch.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Generator
from hsrgan.engine.tensor_files import one_line
from hsrgan.kernels.launch import use_backend

PARTS = ("whole", "mapping", "synthesis")
BATCHES = (1, 3, 5)
BOUNDS = {"fp32": 1e-4, "fp16": 1e-2}  # of the error, measured as by `check`

Run = Callable[[dict[str, Tensor]], Tensor]  # inputs by name → output


class Graph(nn.Module):
    """What is exported of a generator: a function of named tensors, all fp32.

    z [N, z_dim]      latents                                  part whole, mapping
    c [N, c_dim]      labels, of a conditional generator       part whole, mapping
    psi []            truncation, unless `psi` is a number     part whole, mapping
    ws [N, num_ws, w_dim]                                      part synthesis
    noise [N, noise_size]    of all layers, noise_mode random  part whole, synthesis

    → image [N, C, H, W], or ws of part mapping.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        part: str = "whole",
        psi: float | None = None,
        cutoff: int | None = None,
        noise_mode: str = "const",
    ) -> None:
        super().__init__()
        self.generator, self.part, self.psi, self.cutoff, self.noise_mode = generator, part, psi, cutoff, noise_mode
        self.output = "ws" if part == "mapping" else "image"

    def with_half(self) -> Graph:
        """The same with all of synthesis but 4×4 in fp16; parameters stay fp32."""
        kwargs = self.generator.init_kwargs | {"num_fp16_res": len(self.generator.synthesis.resolutions)}
        half = Generator(**kwargs, half_dtype=torch.float16).to(next(self.generator.parameters()).device)
        half.load_state_dict(self.generator.state_dict())
        half.eval().requires_grad_(False)
        return Graph(half, part=self.part, psi=self.psi, cutoff=self.cutoff, noise_mode=self.noise_mode)

    def forward(
        self,
        z: Tensor | None = None,
        c: Tensor | None = None,
        psi: Tensor | None = None,
        ws: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        if self.part != "synthesis":
            psi = self.psi if psi is None else psi
            ws = self.generator.mapping(z, c, truncation_psi=psi, truncation_cutoff=self.cutoff)
        if self.part == "mapping":
            return ws
        return self.generator.synthesis(ws, noise=noise, noise_mode=self.noise_mode)

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """On the backend that is exported, without a graph of gradients."""
        with torch.no_grad(), use_backend("torch"):
            return self(**inputs)

    @torch.no_grad()
    def example(self, batch: int) -> dict[str, Tensor]:
        """Inputs of one batch size, another psi for each."""
        generator, random = self.generator, torch.Generator().manual_seed(batch)
        z = torch.randn(batch, generator.z_dim, generator=random)
        c = torch.eye(generator.c_dim)[torch.arange(batch) % generator.c_dim] if generator.c_dim else None
        device = next(generator.parameters()).device
        if self.part == "synthesis":
            inputs = {"ws": generator.mapping(z.to(device), None if c is None else c.to(device)).contiguous()}
        else:
            inputs = {"z": z} | ({} if c is None else {"c": c})
            if self.psi is None:
                inputs["psi"] = torch.tensor(1.1 - batch / 5)  # from 0.9 down to 0.1
        if self.noise_mode == "random" and self.part != "mapping":
            inputs["noise"] = torch.randn(batch, generator.synthesis.noise_size, generator=random)
        return {name: x.to(device) for name, x in inputs.items()}

    def facts(self) -> dict[str, object]:
        """What the file is, JSON-able, for those who find it without its snapshot."""
        settings = {"part": self.part, "psi": self.psi, "cutoff": self.cutoff, "noise_mode": self.noise_mode}
        return {"format": "hsrgan-export-1", **settings, "generator": self.generator.init_kwargs}


@torch.no_grad()
def check(run: Run, truth: Graph, bound: float, what: str, progress: Callable[[str, int, int], None]) -> float:
    """The largest error of `run` at batch 1, 3 and 5: max |run − truth| / max(1, max |truth|).

    UserError where it passes `bound`, is not a number, or where `run` fails or gives another shape.
    """
    worst = 0.0
    for done, batch in enumerate(BATCHES, start=1):
        inputs = truth.example(batch)
        expected = truth.run(inputs)
        try:
            found = run(inputs)
        except Exception as error:  # whatever its runtime raises
            raise UserError(f"{what} does not run at batch {batch} and was not kept: {one_line(error)}") from error
        if found.shape != expected.shape:
            raise UserError(f"{what} gives {list(found.shape)} at batch {batch} where PyTorch gives "
                            f"{list(expected.shape)}, and was not kept")
        error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
        if not error <= bound:
            raise UserError(f"{what} is {error:.2g} from PyTorch at batch {batch}, more than {bound:g}, and was not "
                            "kept: try another version of torch, or --precision fp32 if that was fp16")
        worst = max(worst, error)
        progress("checking", done, len(BATCHES))
    return worst


def need(packages: tuple[str, ...], what: str) -> None:
    """UserError unless all of `packages` are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{what} needs {", ".join(missing)}: pip install -e ".[export]"')


def need_compiler(what: str) -> None:
    """UserError unless there is the C++ compiler that AOTInductor calls."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"{what} needs a C++ compiler, and {compiler} is not on the path: install g++ or set CXX")


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """`graph` for any batch. No line or path of our code is left in it."""
    inputs = graph.example(2)
    batch = torch.export.Dim("batch")
    dynamic = {name: {0: batch} if x.ndim else None for name, x in inputs.items()}
    with torch.no_grad(), use_backend("torch"):
        program = torch.export.export(graph, (), inputs, dynamic_shapes=dynamic, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    return program


def write_onnx(graph: Graph, path: Path, facts: dict[str, object]) -> Run:
    """An ONNX file, weights inside; in fp16 the weights of half-precision layers are stored as fp16."""
    import onnxruntime
    import onnxscript.optimizer

    program = trace(graph)
    dynamic = {name: {0: "batch"} if x.ndim else None for name, x in graph.example(2).items()}
    converted = torch.onnx.export(
        program, dynamo=True, external_data=False, verbose=False, output_names=[graph.output], dynamic_shapes=dynamic
    )  # fmt: skip
    if graph.generator.synthesis.b8.half_dtype is not None:  # its casts and norms of weights, however large these are
        onnxscript.optimizer.optimize_ir(converted.model, input_size_limit=2**40, output_size_limit=2**40)
    converted.model.metadata_props["hsrgan"] = json.dumps(facts)
    converted.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        (found,) = session.run(None, {name: x.cpu().numpy() for name, x in inputs.items()})
        return torch.from_numpy(found)

    return run


def write_torch_export(graph: Graph, path: Path, facts: dict[str, object]) -> Run:
    """What `torch.export.load` reads."""
    buffer = io.BytesIO()  # PyTorch's writer ends the process where the disk is full
    torch.export.save(trace(graph), buffer, extra_files={"hsrgan.json": json.dumps(facts)})
    path.write_bytes(buffer.getbuffer())
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


def write_aoti(graph: Graph, path: Path, facts: dict[str, object]) -> Run:
    """Machine code for the device that the graph is on: what `torch._inductor.aoti_load_package` reads."""
    import torch._inductor

    with tempfile.TemporaryDirectory() as folder:  # loaders insist on the suffix
        package = Path(folder) / "model.pt2"
        options = {"aot_inductor.metadata": {"hsrgan": json.dumps(facts)}}
        try:
            torch._inductor.aoti_compile_and_package(
                trace(graph), package_path=str(package), inductor_configs=options
            )  # fmt: skip
        except torch._inductor.exc.CppCompileError as error:
            raise UserError(f"the C++ compiler failed ({one_line(error)}): install g++ and Python's headers") from error
        loaded = torch._inductor.aoti_load_package(str(package))
        shutil.copyfile(package, path)
    return lambda inputs: loaded(**inputs)
