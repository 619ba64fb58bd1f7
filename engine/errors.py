"""How a program ends that could not do its work: one line that says what, where and what to do, and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

EXIT_USER_ERROR = 2
EXIT_RANK_LOST = 69  # EX_UNAVAILABLE: another rank died or hangs; the same command resumes from the last checkpoint
EXIT_RESUME = 75  # EX_TEMPFAIL: asked to leave by a signal, everything is saved; the same command goes on


class UserError(ValueError):
    """A mistake the user can mend. Its message is one line: what, where, and what to do about it."""


class RankError(UserError):
    """One that this process alone has met, in the middle of a run: it says so itself, whichever rank it is."""


class CannotWrite(UserError):
    """The file system refuses: it is full, read-only, or not ours."""


@contextlib.contextmanager
def user_errors(*, quiet: bool = False) -> Iterator[None]:
    """Turn a `UserError` into its one line on stderr and exit code 2; every other exception keeps its traceback.

    `quiet` exits without printing: on all ranks but the first, which says it for everybody. A `RankError` is printed.
    """
    try:
        yield
    except UserError as error:
        if not quiet or isinstance(error, RankError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None
