"""`hsrgan TOOL …`: every tool of this folder by its name, and `hsrgan train RECIPE`.

A tool is a module here that makes a Typer `app`; it is found by reading, not by importing, so that `hsrgan --help` is
quick, and only the tool that was asked for is loaded.
"""

from __future__ import annotations

import ast
import importlib
import io
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hsrgan.engine.errors import UserError, user_errors

TRAIN = "train"


def summary(source: str) -> str | None:
    """The first sentence of a tool's docstring; None for a module that is no tool."""
    tree = ast.parse(source)
    assigned = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
                if isinstance(target, ast.Name)}  # fmt: skip
    if "app" not in assigned:
        return None
    first = (ast.get_docstring(tree) or "").split("\n")[0]
    return first.partition(": `")[0].rstrip(".")


def tools(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """name: summary of every tool, in the order of the alphabet."""
    found = {path.stem: summary(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))}
    return {name: text for name, text in found.items() if text is not None}


def _help() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a locale that knows ASCII alone
    console = Console(highlight=False, soft_wrap=True)
    console.print("Usage: hsrgan TOOL [ARGUMENTS]…\n\nhsrgan TOOL --help says more; "
                  "hsrgan TOOL is python tools/TOOL.py.\n", markup=False)  # fmt: skip
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(TRAIN, "Train from a recipe in this process alone; on several GPUs: deepspeed engine/train.py RECIPE")
    for name, text in tools().items():
        table.add_row(name, text)
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("--help", "-h"):
        _help()
        return
    name = arguments[0].replace("-", "_")
    with user_errors():
        if name != TRAIN and name not in tools():
            raise UserError(f"there is no tool {arguments[0]!r}: hsrgan --help lists them")
    module = "hsrgan.engine.train" if name == TRAIN else f"hsrgan.tools.{name}"
    sys.argv = [f"hsrgan {name}", *arguments[1:]]  # what a tool writes down as the command that was given
    importlib.import_module(module).app(arguments[1:], prog_name=sys.argv[0])


if __name__ == "__main__":
    main()
