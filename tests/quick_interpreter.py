"""Triton's interpreter without the millisecond that it takes for every call of a device function.

Interpreted, each call of one @triton.jit function by another walks through triton.language to patch it again. Once a
launch has begun that has been done, unless the callee sees a module the launch has not: then it is done as ever.
"""

import functools
import inspect


def install() -> None:
    """Patch the interpreter, once and for all; nothing happens where triton is missing."""
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return

    @functools.cache
    def modules(function):
        return [m for m in function.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)]

    def call(self, *args, **kwargs):
        if any(tl.core.is_builtin(module.load) for module in modules(self.fn)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
