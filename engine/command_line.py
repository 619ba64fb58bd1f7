"""A Typer app whose every mistake is one line: one that Typer finds (an unknown option, a value out of its range) as
well as a `UserError` of the command itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperCommand, TyperGroup

from hsrgan.engine.errors import UserError, user_errors

_click = sys.modules[typer.BadParameter.__module__]  # click's exceptions, which newer Typers have a copy of


class CommandLine(typer.Typer):
    """A command whose `--help` is plain text, unless `rich_markup_mode` says otherwise."""

    def __init__(self, **settings: Any) -> None:
        defaults = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
        super().__init__(cls=_Group, **defaults | settings)

    def command(self, *args: Any, **settings: Any):
        return super().command(*args, cls=_Command, **settings)


class _OneLine:
    def make_context(self, *args: Any, **settings: Any) -> Any:
        with _mistakes():
            return super().make_context(*args, **settings)

    def invoke(self, *args: Any) -> Any:
        with _mistakes():
            return super().invoke(*args)


class _Command(_OneLine, TyperCommand):
    pass


class _Group(_OneLine, TyperGroup):
    pass


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    with user_errors(quiet=os.environ.get("LOCAL_RANK", "0") != "0"):  # one line a machine
        try:
            yield
        except _click.UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # the help of a command that was given nothing
                raise
            raise UserError(_sentence(error)) from None


def _sentence(error: Exception) -> str:
    text = error.format_message().rstrip(".")
    if isinstance(error.__cause__, ValidationError):  # of a newer Typer, which rarely names the value
        given = str(error.__cause__.errors()[0]["input"])
        text += "" if repr(given) in text else f", not {given!r}"
    return f"{text} ({error.ctx.command_path} --help says more)" if error.ctx else text
