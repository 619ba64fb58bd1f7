"""Files that the importers must refuse, by name: pickles that would do something, bombs, and damage.

Each is made by a function of `mark`, a path that appears where anything in the file is executed.
"""

import gzip
import io
import pickle
import struct
import zipfile

import stylegan_pickles as pickles
import torch
from small_networks import make_g


def text(value: str) -> bytes:
    """The opcode that pushes text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(module: str, name: str, *args: bytes) -> bytes:
    """Opcodes that call module.name with what `args` push."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def touch(mark) -> bytes:
    return call("posix", "system", text(f"touch {mark}"))


def whole(opcodes: bytes) -> bytes:
    return b"\x80\x04" + opcodes + b"."


def g_ema(opcodes: bytes) -> bytes:
    """A pickled dict with these opcodes in the place of the network."""
    return whole(b"}" + text("G_ema") + opcodes + b"s")


def persistent(**state: bytes) -> bytes:
    """Opcodes of a persistent object with this state."""
    items = b"".join(text(key) + value for key, value in state.items())
    meta = b"}(" + text("type") + text("class") + text("state") + b"}(" + items + b"u" + b"u"
    return b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(" + meta + b"tR"


def network(parameter: bytes) -> bytes:
    """A network with one parameter."""
    synthesis = persistent(_parameters=b"}" + text("const") + parameter + b"s")
    return g_ema(persistent(_init_kwargs=b"}", _modules=b"}" + text("synthesis") + synthesis + b"s"))


def tensor(data: bytes, size=b"(K\x04t", stride=b"(K\x01t", offset=b"K\x00") -> bytes:
    storage = call("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(data)) + data)
    return call("torch._utils", "_rebuild_tensor_v2", storage, offset, size, stride)


def former(value) -> bytes:
    """What torch.save writes in its former format, as NVIDIA's pickles hold storages."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def storage() -> bytes:
    return former(torch.storage.TypedStorage(wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32,
                                             _internal=True))  # fmt: skip


class Runs:
    def __init__(self, mark, function="system"):
        self.mark, self.function = mark, function

    def __reduce__(self):
        import os

        return getattr(os, self.function), (f"touch {self.mark}",)


class Looks:
    """A class that a file may not bring."""


Looks.__module__ = "argparse"
Looks.__qualname__ = Looks.__name__ = "ArgumentParser"


def rewritten(content: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with another data.pkl."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return stream.getvalue()


def zipped(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def checkpoint() -> bytes:
    return zipped({"g_ema": {"input.input": torch.arange(4.0)}})


def valid() -> bytes:
    return pickles.dumps(pickles.content(pickles.generator(make_g())))


def in_place(state) -> bytes:
    """A valid pickle but for what `state` does to the attributes of its generator."""
    top = pickles.generator(make_g())
    state(top.meta["state"])
    return pickles.dumps(pickles.content(top))


def cycle(state) -> None:
    synthesis = state["_modules"]["synthesis"].meta["state"]["_modules"]
    synthesis["b4"] = state["_modules"]["synthesis"]


def twice(state) -> None:
    state["_modules"]["another"] = state["_modules"]["mapping"]


def laughs() -> bytes:
    """2³⁰ leaves, were it written out: 30 modules, each twice the child of the next."""
    opcodes = persistent()
    for i in range(30):
        child = opcodes + b"q" + bytes([i])  # memoised, then taken again
        opcodes = persistent(_modules=b"}(" + text("a") + child + text("b") + b"h" + bytes([i]) + b"u")
    return g_ema(persistent(_init_kwargs=b"}", _modules=b"}(" + text("synthesis") + persistent() + text("x") + opcodes
                            + b"u"))  # fmt: skip


DEEP_KEY = b"}" + b")" + b"\x85" * 400_000 + b"Ns"  # the hash of tuples this deep overflows C's stack
CALLS = r"wants to call {}, which no published network does; nothing in it was executed"

PICKLES = {
    "os.system": (lambda mark: whole(touch(mark)), CALLS.format(r"posix\.system")),
    "os.system, protocol 2": (lambda mark: pickle.dumps(Runs(mark), 2), CALLS.format(r"(posix|nt)\.system")),
    "os.popen by stack": (lambda mark: pickle.dumps(Runs(mark, "popen"), 4), CALLS.format(r"os\.popen")),
    "eval": (
        lambda mark: g_ema(call("builtins", "eval", text(f"open('{mark}', 'w')"))),
        CALLS.format(r"builtins\.eval"),
    ),
    "exec deep in a module": (
        lambda mark: g_ema(persistent(x=call("builtins", "exec", text(f"open('{mark}', 'w')")))),
        CALLS.format(r"builtins\.exec"),
    ),
    "getattr": (lambda mark: whole(call("builtins", "getattr", b"N", text("x"))), CALLS.format(r"builtins\.getattr")),
    "Popen as a new object": (
        lambda mark: g_ema(b"csubprocess\nPopen\n(" + text(f"touch {mark}") + b"t\x81"),
        CALLS.format(r"subprocess\.Popen"),
    ),
    "import": (
        lambda mark: whole(call("importlib", "import_module", text("this"))),
        CALLS.format("importlib.import_module"),
    ),
    "torch.load": (lambda mark: whole(call("torch", "load", text(str(mark)))), CALLS.format(r"torch\.load")),
    "method of a layer": (
        lambda mark: whole(call("torch.nn.modules.container.os", "system", text(f"touch {mark}"))),
        CALLS.format(r"torch\.nn\.modules\.container\.os\.system"),
    ),
    "instance of protocol 0": (
        lambda mark: b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.",
        r"wants to make a os system, which no pickle",
    ),
    "class on the stack": (
        lambda mark: whole(b"(cnumpy\ndtype\n" + text("f8") + b"o"),
        "wants what its opcode OBJ does, which no pickle",
    ),
    "new object with keywords": (lambda mark: whole(b"cnumpy\ndtype\n)}\x92"), "wants what its opcode NEWOBJ_EX does"),
    "registered extension": (lambda mark: whole(b"\x82\x01"), "wants what its opcode EXT1 does"),
    "buffer from outside": (lambda mark: whole(b"\x97"), "wants what its opcode NEXT_BUFFER does"),
    "persistent id": (lambda mark: whole(text("x") + b"Q"), "refers to data outside itself"),
    "state of a function": (lambda mark: whole(b"cnumpy\ndtype\n}b"), "wants to change a Name"),
    "call of a result": (lambda mark: whole(call("numpy", "dtype") + b")R"), "wants to call a Call"),
    "escape codes in a name": (
        lambda mark: whole(call("os\x1b[31m", "sys\x07tem")),
        CALLS.format(r"os\?\[31m\.sys\?tem"),
    ),
    "name of 100,000 letters": (lambda mark: whole(call("a" * 100_000, "b")), r"call a{79}…, which"),
    "name that is a number": (lambda mark: whole(b"K\x01K\x02\x93"), "names something to call by no name"),
    "hostile values": (
        lambda mark: network(tensor(whole(touch(mark)))),
        r"wants to call posix\.system, in the place of a tensor's values",
    ),
    "hostile values in torch's format": (
        lambda mark: network(tensor(former(Runs(mark)))),
        r"wants to call (posix|nt)\.system, in the place of a tensor's",
    ),
    "values in a zip": (lambda mark: network(tensor(checkpoint())), "is not what torch.save writes|is not imported"),
    "values that are short": (lambda mark: network(tensor(storage()[:-9])), "values of a tensor in it are damaged"),
    "values that are no bytes": (
        lambda mark: network(
            call(
                "torch._utils",
                "_rebuild_tensor_v2",
                call("torch.storage", "_load_from_bytes", b"N"),
                b"K\x00",
                b"(K\x04t",
                b"(K\x01t",
            )
        ),
        "tensor values that are no bytes",
    ),
    "2⁴⁰ values declared": (
        lambda mark: network(tensor(storage().replace(b"K\x04N", b"\x8a\x06\0\0\0\0\0\x01N"))),
        r"declares 1099511627776 values in \d+ bytes",
    ),
    "2⁴⁰ values of one": (
        lambda mark: network(tensor(storage(), b"(\x8a\x05\0\0\0\0\x01t", b"(K\x00t")),
        "reaches beyond",
    ),
    "shape below zero": (lambda mark: network(tensor(storage(), b"(J\xff\xff\xff\xfft")), "no proper shape"),
    "shape of text": (lambda mark: network(tensor(storage(), b"(" + text("a") + b"t")), "no proper shape"),
    "offset beyond": (lambda mark: network(tensor(storage(), offset=b"K\x01")), "reaches beyond its values"),
    "stride beyond": (lambda mark: network(tensor(storage(), stride=b"(K\x02t")), "reaches beyond its values"),
    "no tensor": (lambda mark: network(text("x")), "has x in the place of a tensor"),
    "memo of 16 GB": (lambda mark: whole(b"Nr\xff\xff\xff\x7f"), "is no dict with a G_ema"),
    "bytes of 2⁶⁰": (lambda mark: whole(b"\x8e" + struct.pack("<Q", 2**60)), "is not imported"),
    "text of 4 GB": (lambda mark: whole(b"X\xff\xff\xff\xff"), "is not imported"),
    "frame of 2⁶²": (lambda mark: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "is no dict with a G_ema"),
    "tuples 400,000 deep as a key": (lambda mark: whole(DEEP_KEY), "has a tuple as a key"),
    "lists 400,000 deep": (lambda mark: whole(b"]" * 400_000 + b"a" * 399_999), "is no dict with a G_ema"),
    "dicts 100,000 deep": (
        lambda mark: g_ema(b"}" + (text("a") + b"}") * 100_000 + b"s" * 100_000),
        "is no dict with a G",
    ),
    "too many opcodes": (lambda mark: b"\x80\x04" + b"N0" * 500_001 + b"N.", "has more than 1,000,000 opcodes"),
    "protocol for ever": (lambda mark: b"\x80\x04" * 1_000_001, "has more than 1,000,000 opcodes"),
    "integer of 8 million bits": (
        lambda mark: whole(b"\x8b\x40\x42\x0f\x00" + b"\x7f" * 1_000_000),
        "integer of 7,999,999",
    ),
    "integer of 100,000 digits": (lambda mark: b"I" + b"9" * 100_000 + b"\n.", "is not imported"),
    "module in itself": (lambda mark: in_place(cycle), "has a module in two places"),
    "module twice": (lambda mark: in_place(twice), "has a module in two places"),
    "a billion laughs": (lambda mark: laughs(), "has a module in two places"),
    "module that is text": (
        lambda mark: in_place(lambda s: s["_modules"].update(mapping="x")),
        "x in the place of a net",
    ),
    "modules by number": (lambda mark: in_place(lambda s: s["_modules"].update({3: None})), "modules are in disorder"),
    "tensors by number": (
        lambda mark: in_place(lambda s: s["_parameters"].update({3: None})),
        "tensors are in disorder",
    ),
    "tensors in a list": (lambda mark: in_place(lambda s: s.update(_buffers=[1])), "tensors are in disorder"),
    "arguments by number": (
        lambda mark: in_place(lambda s: s.update(_init_kwargs={3: 3})),
        "arguments are in disorder",
    ),
    "100 arguments": (
        lambda mark: in_place(lambda s: s.update(_init_args=(1,) * 100)),
        "constructor has 100 arguments",
    ),
    "list as a key": (lambda mark: whole(b"}]Ns"), "has a list as a key"),
    "append to a dict": (lambda mark: whole(b"}Na"), "wants to append to a dict"),
    "items of a list": (lambda mark: whole(b"]NNs"), "wants to set items of a list"),
    "odd items": (lambda mark: whole(b"}(Nu"), "wants to set items of a dict"),
    "nothing to take": (lambda mark: whole(b"0"), "the pickle is damaged"),
    "memo that is not there": (lambda mark: whole(b"h\x05"), "the pickle is damaged"),
    "no end": (lambda mark: b"\x80\x04N", "is not imported: "),
    "first half": (lambda mark: valid()[: len(valid()) // 2], "is not imported: "),
    "last half": (lambda mark: valid()[len(valid()) // 2 :], "is not imported: "),
    "empty": (lambda mark: b"", "is not imported: "),
    "zeros": (lambda mark: bytes(10_000), "is not imported: "),
    "a page of HTML": (lambda mark: b"<!DOCTYPE html><title>404</title>", "is not imported: "),
    "a Git LFS pointer": (
        lambda mark: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "is not imported: ",
    ),
    "a picture": (lambda mark: b"\x89PNG\r\n\x1a\n" + bytes(100), "is not imported: "),
    "gzip": (lambda mark: gzip.compress(valid(), 1), "is not imported: "),
    "safetensors": (lambda mark: struct.pack("<Q", 2) + b"{}", "is not imported: "),
}

CHECKPOINTS = {  # torch.save's, which every importer reads by the same function
    "os.system": (
        lambda mark: zipped({"g_ema": Runs(mark)}),
        r"its pickle calls (posix|nt)\.system, and could run any",
    ),
    "os.system, former format": (lambda mark: former({"g_ema": Runs(mark)}), r"its pickle calls (posix|nt)\.system"),
    "a class of argparse": (
        lambda mark: rewritten(checkpoint(), lambda data: whole(b"cargparse\nArgumentParser\n)\x81")),
        "more than tensors|calls",
    ),
    "2²⁸ values declared": (
        lambda mark: rewritten(checkpoint(), lambda data: data.replace(b"K\x04tq", b"J\0\0\0\x10tq")),
        r"declares 268435456 values in [\d,]+ bytes",
    ),
    "2⁴⁰ values declared, former format": (
        lambda mark: former({"g_ema": torch.arange(4.0)}).replace(b"K\x04N", b"\x8a\x06\0\0\0\0\0\x01N"),
        r"declares 1099511627776 values in [\d,]+ bytes",
    ),
    "compressed 1,000 times": (
        lambda mark: rewritten(checkpoint(), lambda data: b"N" * 50_000_000, zipfile.ZIP_DEFLATED),
        "records are compressed",
    ),
    "tuples 400,000 deep as a key": (
        lambda mark: rewritten(checkpoint(), lambda data: whole(DEEP_KEY)),
        "tuple as a key",
    ),
    "too many opcodes": (
        lambda mark: rewritten(checkpoint(), lambda data: b"\x80\x02" * 1_000_001),
        "has more than 1,000,000 opcodes",
    ),
    "cut short": (lambda mark: former({"g_ema": torch.arange(4.0)})[:-9], "cannot be read as plain tensors"),
    "zip without its end": (lambda mark: checkpoint()[:-30], "is not imported|cannot be read as plain tensors"),
    "zip of nothing": (lambda mark: b"PK\x05\x06" + bytes(18), "is not imported|cannot be read as plain tensors"),
    "record flipped": (
        lambda mark: rewritten(checkpoint(), lambda data: data[:40] + b"\xff" + data[41:]),
        "cannot be read",
    ),
}
