"""A snapshot for other programs: `python tools/export.py SNAPSHOT --to onnx|torch_export|aoti|hf|pt`."""

from __future__ import annotations

import enum
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from hsrgan.engine import exporting, publishing
from hsrgan.engine.aside import check_writable, folder_written_aside, written_aside
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.exporting import BATCHES, BOUNDS, PARTS, Graph
from hsrgan.engine.metrics.fp32 import exact_fp32
from hsrgan.engine.metrics.report import Bars
from hsrgan.engine.sampler import Noise, check_psi
from hsrgan.engine.snapshot import load_snapshot


class Form(NamedTuple):
    """One value of --to."""

    what: str
    suffix: str  # of the default name; a file's --out ends with the last part of it
    write: Callable[..., object]
    is_graph: bool = True
    packages: tuple[str, ...] = ()


FORMS = {
    "onnx": Form("ONNX file", ".onnx", exporting.write_onnx, packages=("onnx", "onnxscript", "onnxruntime")),
    "torch_export": Form("torch.export program", ".pt2", exporting.write_torch_export),
    "aoti": Form("AOTInductor package", ".aoti.pt2", exporting.write_aoti),
    "hf": Form("Hugging Face folder", "-hf", publishing.write_hf, is_graph=False),
    "pt": Form("PyTorch state dict", ".pt", publishing.write_pt, is_graph=False),
}

To = enum.Enum("To", {name: name for name in FORMS}, type=str)
Part = enum.Enum("Part", {name: name for name in PARTS}, type=str)
Precision = enum.Enum("Precision", {name: name for name in BOUNDS}, type=str)

app = CommandLine()


def _check_options(
    to: str, part: str, psi: float | None, cutoff: int | None, noise: str | None, precision: str, num_ws: int
) -> None:
    """Refuse what the format or the part has no use for."""
    if not FORMS[to].is_graph:
        given = {"--part": part != "whole", "--psi": psi is not None, "--cutoff": cutoff is not None,
                 "--noise": noise is not None}  # fmt: skip
        for option, is_given in given.items():
            if is_given:
                raise UserError(f"{option} is of graphs, and --to {to} writes weights: leave it out")
    if part == "synthesis" and (psi is not None or cutoff is not None):
        raise UserError("--psi and --cutoff are the mapping network's; --part synthesis begins at ws; leave them out")
    if part == "mapping" and noise is not None:
        raise UserError("--noise is of the synthesis network, and --part mapping ends at ws: leave it out")
    if part == "mapping" and precision == "fp16":
        raise UserError("--precision fp16: the mapping network always computes in fp32; leave it out")
    if cutoff is not None and cutoff > num_ws:
        raise UserError(f"--cutoff {cutoff}: the snapshot has {num_ws} ws; give 1 to {num_ws}")


def _target(out: Path | None, snapshot: Path, to: str, part: str) -> Path:
    """Where to write, beside the snapshot by default; UserError before any work where that cannot be."""
    middle = "" if part == "whole" else f"-{part}"
    out = out or snapshot.with_name(f"{snapshot.stem}{middle}{FORMS[to].suffix}")
    if to == "hf":
        if os.path.lexists(out):
            raise UserError(f"--out {out} exists: remove it, or name another folder")
    elif out.suffix != (suffix := Path(f"x{FORMS[to].suffix}").suffix):
        raise UserError(f"--out {out}: its name must end with {suffix}, by which other programs know such a file")
    if os.path.isdir(out):
        raise UserError(f"--out {out} is a folder; name another file")
    check_writable(out.parent, "name another --out")
    return out


def usage(to: str, out: Path, graph: Graph) -> list[str]:
    """Three lines of Python that run the file at batch 4."""
    file, inputs, labels = repr(str(out)), graph.example(4), graph.generator.c_dim
    if to == "pt":
        return ["import json, torch", f"content = torch.load({file}, weights_only=True)",
                "weights, config = content['state_dict'], json.loads(content['config'])"]  # fmt: skip
    if to == "onnx":
        values = {key: f"np.random.randn{tuple(x.shape)}.astype('float32')" for key, x in inputs.items()}
        values |= {"psi": "np.array(0.7, 'float32')", "c": f"np.eye({labels}, dtype='float32')[[0] * 4]"}
        fed = ", ".join(f"{key!r}: {values[key]}" for key in inputs)
        return ["import numpy as np, onnxruntime", f"session = onnxruntime.InferenceSession({file})",
                f"({graph.output},) = session.run(None, {{{fed}}})"]  # fmt: skip
    values = {key: f"torch.randn{tuple(x.shape)}" for key, x in inputs.items()}
    values |= {"psi": "torch.tensor(0.7)", "c": f"torch.eye({labels})[[0] * 4]"}
    if to == "hf":
        arguments = ", ".join(values[key] for key in ("z", "c") if key in inputs)
        return ["import torch; from hsrgan.engine.model import Generator",
                f"generator = Generator.from_pretrained({file})",
                f"image = generator({arguments}, truncation_psi=0.7)"]  # fmt: skip
    load = "torch._inductor.aoti_load_package({})" if to == "aoti" else "torch.export.load({}).module()"
    device = next(graph.generator.parameters()).device.type
    fed = ", ".join(f"{key}={values[key]}" for key in inputs)
    return [f"import torch, torch._inductor; torch.set_default_device({device!r})", f"model = {load.format(file)}",
            f"{graph.output} = model({fed})"]  # fmt: skip


@app.command()
def main(
    snapshot: Annotated[Path, typer.Argument(help="A .safetensors file from a run's snapshots folder.")],
    to: Annotated[
        To,
        typer.Option(
            help="onnx: for ONNX runtimes. torch_export: a PyTorch program that needs none of our code. aoti: the same "
            "compiled to machine code for this device (needs a C++ compiler). hf: a folder for the Hugging Face Hub, "
            "read by Generator.from_pretrained. pt: a PyTorch state dict under the published StyleGAN2 keys, for other "
            "people's StyleGAN2 code."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="File or folder to write; by default beside the snapshot.")] = None,
    part: Annotated[
        Part,
        typer.Option(help="Export z → image, or one half of it, to edit ws in between: z → ws (mapping), ws → image "
                          "(synthesis)."),
    ] = Part.whole,
    psi: Annotated[
        float | None, typer.Option(help="Fix the truncation at this value. By default psi is an input of the graph.")
    ] = None,
    cutoff: Annotated[int | None, typer.Option(min=1, help="Truncate only this many ws, the coarsest.")] = None,
    noise: Annotated[
        Noise | None,
        typer.Option(help="Layer noise: the stored constant (the default), none, or random: the graph's input noise."),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="fp16: graphs compute all of synthesis but 4×4 in half precision (an ONNX file stores those "
                          "weights so too, the others in fp32); hf and pt store every weight in fp16. Inputs and "
                          "outputs are fp32 always."),
    ] = Precision.fp32,
) -> None:
    """Export a generator: any batch, checked against PyTorch before the file takes its name.

    Graphs are run at batch 1, 3 and 5; the largest error, max |Δ| / max(1, max |image|), must be at most 1e-4, or
    1e-2 in fp16 (about one grey level). Weights must come back bit by bit. A file that fails is not kept.

    Examples:

      python tools/export.py runs/quickstart/snapshots/000160000.safetensors --to onnx

      python tools/export.py model.safetensors --to onnx --psi 0.7 --precision fp16 --out model_fp16.onnx

      python tools/export.py model.safetensors --to torch_export --part synthesis --noise random

      python tools/export.py model.safetensors --to hf --out my-model
    """
    name, form, which = to.value, FORMS[to.value], part.value
    generator, metadata = load_snapshot(snapshot)
    _check_options(name, which, psi, cutoff, noise and noise.value, precision.value, generator.num_ws)
    exporting.need(form.packages, f"--to {name}")
    if name == "aoti":
        exporting.need_compiler(f"--to {name}")
    if psi is not None:
        check_psi(psi)
    out = _target(out, snapshot, name, which)
    if name in ("torch_export", "aoti") and torch.cuda.is_available():
        generator.cuda()  # the file runs where it was made
    truth = Graph(generator, part=which, psi=psi, cutoff=cutoff, noise_mode=noise.value if noise else "const")
    label, device = f"--to {name}: {out.name}", next(generator.parameters()).device
    with (
        Bars() as bars,
        exact_fp32(device),
        warnings.catch_warnings(),
        (folder_written_aside if name == "hf" else written_aside)(out) as aside,
    ):
        warnings.simplefilter("ignore")  # the exporters' own, about their insides
        bars("writing", 0, 1)
        if form.is_graph:
            facts = truth.facts() | {"precision": precision.value, "kimg": metadata["kimg"]}
            run = form.write(truth.with_half() if precision.value == "fp16" else truth, aside, facts)
        else:
            loaded = form.write(aside, generator, metadata, precision.value)
            publishing.check_weights(loaded, generator, precision.value, label)
            run = Graph(loaded).run
        bars("writing", 1, 1)
        worst = exporting.check(run, truth, BOUNDS[precision.value], label, bars)
    _tell(name, out, truth, f"{snapshot.name} ({metadata['kimg']:g} kimg)", precision.value, worst)


def _tell(name: str, out: Path, truth: Graph, source: str, precision: str, worst: float) -> None:
    """What was written, what goes in and out, and how to run it."""
    device = f", for {next(truth.generator.parameters()).device.type}" if name in ("torch_export", "aoti") else ""
    part = f", {truth.part}" if FORMS[name].is_graph else ""
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
    typer.echo(f"{out}: {FORMS[name].what} of {source}{part}, {precision}{device}, {size / 1e6:.1f} MB")
    if FORMS[name].is_graph:
        for key, x in truth.example(1).items():
            typer.echo(f"  in   {key:6} float32 {_any_batch(x)}")
        y = truth.run(truth.example(1))
        typer.echo(f"  out  {truth.output:6} float32 {_any_batch(y)}{', about −1 … 1' if y.ndim == 4 else ''}")
    batches = ", ".join(map(str, BATCHES))
    typer.echo(f"checked at batch {batches}: {f'within {worst:.1e} of' if worst else 'equal to'} PyTorch")
    typer.echo("run it:")
    for line in usage(name, out, truth):
        typer.echo(f"    {line}")


def _any_batch(x: torch.Tensor) -> str:
    return f"[{', '.join(['batch', *map(str, x.shape[1:])])}]" if x.ndim else "[]"


if __name__ == "__main__":
    app()
