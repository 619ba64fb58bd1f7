"""Pickles read as data: the opcodes are walked, and nothing that they name is looked up, imported or called.

What a pickle would call becomes an inert `Call`; lists, dicts, text, numbers and bytes become themselves. Work and
memory are bounded: by the file's size, by MAX_OPCODES, and by keys that need no recursion to hash.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_OPCODES = 1_000_000  # G, D and G_ema at 1024² in one pickle take tens of thousands
MAX_INT_BITS = 128  # torch.save begins with a number of 80 bits

_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_DICTS = {("collections", "OrderedDict"), ("dnnlib.util", "EasyDict"), ("argparse", "Namespace")}
_KEYS = str | int | float | bytes | None  # bool is an int


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """What a pickle names to call it or to make an instance of it."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


@dataclass(slots=True, eq=False)
class Call:
    """What a pickle would have called, and the state it would have given to the result."""

    name: Name
    args: tuple
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """How torch.save refers to a storage outside the pickle."""

    value: Any


def shown(value: object) -> str:
    """A value of a file for a message: no control characters, at most 80 characters."""
    if not isinstance(value, str):
        value = repr(value) if isinstance(value, _KEYS) else f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else "?" for c in value[:81])
    return text if len(text) <= 80 else text[:79] + "…"


def read_pickle(
    stream: BinaryIO, vet: Callable[[Name], None] | None = None, see: Callable[[PersistentId], None] | None = None
) -> Any:
    """The pickle at the position of `stream`, which is left behind it.

    vet: called with every name before it is used, to raise where it is not wanted; None only to look at what torch.load
    is to judge.  see: called with every persistent id; a pickle that has one is refused without it.
    ValueError: damaged, refused by `vet` or `see`, or unlike anything that pickles of networks hold.
    """
    return _Reader(vet, see).read(stream)


class _Reader:
    """The stack machine of pickle, protocols 0 to 5, as far as networks need it."""

    def __init__(self, vet: Callable[[Name], None] | None, see: Callable[[PersistentId], None] | None) -> None:
        self.vet, self.see = vet, see
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what stood on the stack before each MARK
        self.memo: dict[int, Any] = {}

    def read(self, stream: BinaryIO) -> Any:
        try:
            for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
                if count == MAX_OPCODES:
                    raise ValueError(f"it has more than {MAX_OPCODES:,} opcodes")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, arg)
        except ValueError as error:
            if str(error).startswith("at position"):  # genops' own words
                raise ValueError("it is no pickle, or a damaged one") from None
            raise
        except (IndexError, KeyError):  # of stack and memo
            raise ValueError("the pickle is damaged") from None
        except (OverflowError, AssertionError) as error:  # of genops on absurd lengths
            raise ValueError(f"the pickle is damaged ({type(error).__name__})") from None
        raise ValueError("the pickle ends too early")

    def step(self, op: str, arg: Any) -> None:
        stack = self.stack
        if op in _VALUES:
            if isinstance(arg, int) and arg.bit_length() > MAX_INT_BITS:
                raise ValueError(f"it holds an integer of {arg.bit_length():,} bits")
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(arg)] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(arg)])
        elif op == "MARK":
            self.below.append(stack)
            self.stack = []
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            self.to_mark()
        elif op not in ("PROTO", "FRAME"):
            getattr(self, f"do_{op.lower()}", self.unknown(op))(arg)

    def unknown(self, op: str) -> Callable[[Any], None]:
        def refuse(arg: Any) -> None:
            wants = f"to make a {shown(arg)}" if op == "INST" else f"what its opcode {op} does"
            raise ValueError(f"it wants {wants}, which no pickle of a network needs")

        return refuse

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    # ---- containers; sets are lists here, for no one asks them anything

    def do_empty_list(self, _: Any) -> None:
        self.stack.append([])

    do_empty_set = do_empty_list

    def do_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def do_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def do_list(self, _: Any) -> None:
        items = self.to_mark()
        self.stack.append(items)

    do_frozenset = do_list

    def do_tuple(self, _: Any) -> None:
        items = self.to_mark()
        self.stack.append(tuple(items))

    def do_tuple1(self, _: Any, count: int = 1) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def do_tuple2(self, _: Any) -> None:
        self.do_tuple1(_, 2)

    def do_tuple3(self, _: Any) -> None:
        self.do_tuple1(_, 3)

    def do_dict(self, _: Any) -> None:
        items = self.to_mark()
        self.stack.append({})
        self.set_items(items)

    def do_append(self, _: Any) -> None:
        self.extend([self.stack.pop()])

    def do_appends(self, _: Any) -> None:
        self.extend(self.to_mark())

    do_additems = do_appends

    def do_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def do_setitems(self, _: Any) -> None:
        self.set_items(self.to_mark())

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError(f"it wants to append to {shown(self.stack[-1])}")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"it wants to set items of {shown(target)}")
        for key in keys:
            if not isinstance(key, _KEYS):  # the hash of deeply nested tuples overflows the C stack
                raise ValueError(f"it has {shown(key)} as a key")
        target.update(zip(keys, items[1::2], strict=True))

    # ---- what would be executed

    def do_global(self, arg: str) -> None:
        self.push_name(*arg.split(" ", 1))

    def do_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_name(module, name)

    def push_name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it names something to call by no name")
        result = Name(module, name)
        if self.vet is not None:
            self.vet(result)
        self.stack.append(result)

    def do_reduce(self, _: Any) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise ValueError(f"it wants to call {shown(name)}")
        self.stack.append({} if (name.module, name.name) in _DICTS and not args else Call(name, args))

    do_newobj = do_reduce

    def do_build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif not isinstance(target, dict):  # what hangs on a dict besides its items is of no use
            raise ValueError(f"it wants to change {shown(target)}")

    def do_persid(self, arg: Any) -> None:
        if self.see is None:
            raise ValueError("it refers to data outside itself")
        result = PersistentId(arg)
        self.see(result)
        self.stack.append(result)

    def do_binpersid(self, _: Any) -> None:
        self.do_persid(self.stack.pop())
