"""What is made of a valid file, and what was never one. Each variant: (label, bytes or a function of a path, fatal).

fatal: the reader has to raise; others may be read, where the damage is in numbers that any file could have.
"""
import io
import json
import os
import struct
import zipfile

import numpy as np

from cyflash import cachefile
from cyflash.quant import scales, state

DEEP = 100_000
NUMBERS = [-1, 0, 1, 7, 2**31, 2**40, 2**63, 2**70, 1e308, float("nan"), float("inf"), True, None, "", "x", [], {},
           [[]], "DEEP"]


def cut_and_flipped(r, data, most):
    """Cut at every length, or `most` of them; bits flipped; bytes behind the end. r: random.Random."""
    lengths = range(len(data)) if len(data) <= most else sorted({*range(32), *r.sample(range(len(data)), most)})
    for n in lengths:
        yield f"cut to {n}", data[:n], n < len(data.rstrip(b"\n"))
    for n in range(len(data)) if len(data) <= most else r.sample(range(len(data)), most):
        bit = r.randrange(8)
        yield f"bit {bit} of byte {n}", data[:n] + bytes([data[n] ^ 1 << bit]) + data[n + 1 :], False
    for n in (1, 8, 4096):
        yield f"{n} bytes more", data + bytes(n), False
    for _ in range(4):
        begin, count = r.randrange(len(data)), r.randrange(1, 16)
        yield f"{count} bytes twice from {begin}", data[: begin + count] + data[begin:], False
        garbage = bytes(r.randrange(256) for _ in range(count))
        yield f"garbage {garbage.hex()} at {begin}", data[:begin] + garbage + data[begin + count :], False


# .safetensors


def safetensors(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(dtype="F32", shape=(4,), begin=0, end=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def hostile_headers(metadata):
    """Headers that lie. metadata: of a valid file, so that its reader goes on to the tensors."""
    meta, body = {"__metadata__": metadata}, bytes(64)
    for length in (2**63, 2**64 - 1, 2**63 - 1, 2**40, 2**31, 100_000_001, 0, 1):
        yield f"header length {length}", safetensors(b"{}", body, length), True
    yield "header of brackets", safetensors(b"[" * DEEP), True
    yield "deep header", safetensors(b'{"a":' * DEEP + b"1" + b"}" * DEEP), True
    yield "not UTF-8", safetensors(b'{"\xff\xfe": 1}'), True
    yield "metadata of numbers", safetensors({"__metadata__": {"format": 3}}), True
    yield "metadata is a list", safetensors({"__metadata__": []}), True
    for name in ("q", "data", "live", "a.k_scale"):
        once = json.dumps({name: tensor()})[1:-1]
        head = json.dumps(meta)[1:-1]
        yield f"{name} twice", safetensors(f"{{{head},{once},{once}}}".encode(), bytes(16)), True
        for what, x in {
            "out of range": tensor(end=2**40), "far out of range": tensor(begin=2**63 - 16, end=2**63),
            "reversed": tensor(begin=16, end=0), "negative": tensor(begin=-16, end=0), "fraction": tensor(end=16.5),
            "too short": tensor(end=8), "of 2^63 values": tensor(shape=(2**31, 2**32)),
            "of 2^64 values": tensor(shape=(2**32, 2**32)), "of 2^66 bytes": tensor(shape=(2**62, 4)),
            "negative shape": tensor(shape=(-4,)), "long shape": tensor(shape=(1,) * 5000 + (4,)),
            "of no dtype": tensor(dtype="X7"), "of bool": tensor(dtype="BOOL", shape=(16,)),
            "of F8": tensor(dtype="F8_E4M3", shape=(16,)), "of BF16": tensor(dtype="BF16", shape=(8,)),
            "empty, of 2^62 rows": tensor(shape=(2**62, 0), end=0), "is null": None, "is text": "x",
        }.items():
            yield f"{name} {what}", safetensors(meta | {name: x}, bytes(16)), True
        overlapping = {name: tensor(end=16), name + "2": tensor(begin=8, end=24)}
        yield f"{name} overlaps", safetensors(meta | overlapping, bytes(24)), True


def parts(data):
    """(header, body) of a valid .safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def tampered_text(data, key):
    """Another number, or no number, in each place of the JSON of its metadata, and a sha256 that fits."""
    digest = {"cache": cachefile._digest, "scales": scales._digest, "calibrator": state._digest}[key]
    header, body = parts(data)
    arrays = {name: array(x, body) for name, x in header.items() if name != "__metadata__"}
    whole = json.loads(header["__metadata__"][key])
    for path in places(whole):
        for value in NUMBERS:
            text = replaced(whole, path, value)
            metadata = header["__metadata__"] | {key: text, "sha256": digest(text, arrays)}
            yield f"{key} {path} = {value!r}", safetensors(header | {"__metadata__": metadata}, body), False
    for text in ("", "[", "null", "3", "[]", "{}", "[" * DEEP, '{"a":' * DEEP, "9" * 5000):
        metadata = header["__metadata__"] | {key: text, "sha256": digest(text, arrays)}
        yield f"{key} = {text[:20]!r}", safetensors(header | {"__metadata__": metadata}, body), True


def array(entry, body):
    dtype = {"F32": "<f4", "I64": "<i8", "I32": "<i4", "I8": "i1", "U16": "<u2", "BOOL": "?", "F64": "<f8",
             "U64": "<u8", "U8": "u1", "U32": "<u4", "F16": "<f2"}[entry["dtype"]]
    begin, end = entry["data_offsets"]
    return np.frombuffer(body[begin:end], dtype).reshape(entry["shape"])


def tampered_tensors(data, key):
    """A tensor that is gone, of another shape, or full of another number, and a sha256 that fits."""
    digest = {"cache": cachefile._digest, "scales": scales._digest, "calibrator": state._digest}[key]
    from safetensors.numpy import save

    header, body = parts(data)
    metadata = header["__metadata__"]
    arrays = {name: array(x, body) for name, x in header.items() if name != "__metadata__"}
    for name, x in arrays.items():
        rest = {other: y for other, y in arrays.items() if other != name}
        new = {"gone": None, "flat": x.reshape(-1)[:-1], "higher": x[None, None], "complex": x.astype(np.complex64)}
        values = (np.nan, np.inf, -1.0, 0.0, 1e-45) if x.dtype.kind == "f" else (-1, 2**30, np.iinfo(x.dtype).max) if (
            x.dtype.kind in "iu") else ()
        for value in values:
            with np.errstate(over="ignore"):
                new[f"all {value}"] = np.full_like(x, np.array(value).astype(x.dtype))
        for what, y in new.items():
            held = rest if y is None else rest | {name: np.ascontiguousarray(y)}
            try:
                yield f"{name} {what}", save(held, metadata | {"sha256": digest(metadata[key], held)}), False
            except (ValueError, KeyError):
                continue


def places(x, path=()):
    """The path of every value in nested lists and objects."""
    yield path
    if isinstance(x, (dict, list)):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from places(value, (*path, key))


def replaced(x, path, value):
    """JSON of x with another value at a path."""
    copy = json.loads(json.dumps(x))
    if path:
        inner = copy
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    else:
        copy = value
    return json.dumps(copy).replace('"DEEP"', "[" * DEEP + "]" * DEEP)


def tampered_json(data):
    """The same of a file that is JSON."""
    whole = json.loads(data)
    for path in places(whole):
        for value in NUMBERS:
            yield f"{path} = {value!r}", replaced(whole, path, value).encode(), False
    for text in (b"", b"[", b"null", b"[]", b"[" * DEEP, b'{"a":' * DEEP, b"\xff\xfe", b"9" * 5000):
        yield f"{text[:20]!r}", text, True


# .npz


def npy(shape, dtype="<f4", data=b"", version=(1, 0), length=None, header=None):
    text = header or f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + text + data


def npz(members, how=zipfile.ZIP_STORED):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", how) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, data)
    return memory.getvalue()


def claiming(size, dtype="<f4"):
    """An archive whose directory, and the header of its arrays, say that each is of `size` bytes, and is not packed."""
    head = npy((1, (size - 128) // 4), dtype)
    data = bytearray(npz({f"{name}.npy": head.ljust(4096, b"\0") for name in "qkv"}))
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 20 : at + 28] = struct.pack("<II", len(head) + size - 128, len(head) + size - 128)
        at = data.find(b"PK\x01\x02", at + 1)
    return bytes(data)


def hostile_npz(bombs):
    """Archives that unpack to much more than they are, or to code. bombs: those that take seconds to make, too."""
    x = npy((1, 3, 4), data=bytes(48))
    good = {"q.npy": x, "k.npy": x, "v.npy": x}
    packed = zipfile.ZIP_DEFLATED

    class Harm:
        def __reduce__(self):
            return os.system, ("touch pickles-are-run",)

    memory = io.BytesIO()
    np.savez(memory, q=np.array([Harm()], object), k=np.zeros(3), v=np.zeros(3))
    yield "pickled", memory.getvalue(), True
    memory = io.BytesIO()
    np.savez(memory, q=np.zeros((3, 4)), k=np.zeros((3, 4)), v=np.zeros((3, 4)), options=np.array([Harm()], object))
    yield "pickled options", memory.getvalue(), True
    if bombs:  # 256 MB of zeros in 256 KB
        yield "zip bomb", Bomb(npy((1, 1 << 24, 4)), 1 << 28, ("q", "k", "v")), True
        yield "bomb in the options", Bomb(npy((1 << 26,)), 1 << 28, ("options",), good), True
        yield "bomb in a header", Bomb(npy((3, 4), version=(2, 0), length=2**28), 1 << 28, ("q",), good), True
    for how in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"packed by method {how}", npz(good, how), True
    yield "sizes beyond the file", claiming(1 << 30), True
    yield "options of 2^40", npz(good | {"options.npy": npy((2**40,), "<U1")}), True
    yield "options of a long string", npz(good | {"options.npy": npy((), "<U2000000000")}), True
    yield "deep options", npz(good | {"options.npy": npy((), f"<U{DEEP}", ("[" * DEEP).encode("utf-32-le"))}), True
    for shape in ((2**63,), (2**62, 4), (2**40, 4), (-3, 4), (2**31, 2**32), (0, 2**62), (10**30, 4)):
        for version in ((1, 0), (2, 0), (3, 0), (9, 9)):
            yield f"shape {shape} {version}", npz({name: npy(shape, version=version) for name in good}), True
    for dtype in ("|O", "<V8", "<c8", "<M8[s]", "<U4", ">f4x", [("a", "<f4")], "<f4" * 3000):
        yield f"dtype {str(dtype)[:20]}", npz({name: npy((3, 4), dtype, bytes(48)) for name in good}), True
    for header in (b"", b"{", b"[" * DEEP, b"{'descr': __import__('os')}", b"(" * 5000, b"9" * 9000, b"\xff" * 100,
                   b"-" * 9000 + b"1", b"{'shape': (3,)}", b"{'descr': '<f4', 'fortran_order': 2, 'shape': 3}"):
        if len(header) < 65536:
            yield f"header {header[:12]!r}", npz({name: npy(0, header=header) for name in good}), True
    yield "header length 65535", npz({name: npy((3, 4), length=65535) for name in good}), True
    yield "no data", npz({name: npy((3, 4)) for name in good}), True
    yield "names that leave", npz({"../q.npy": x, "/k.npy": x, "C:\\v.npy": x}), True
    yield "a member twice", npz([*good.items(), ("q.npy", npy((9, 9), data=bytes(324)))]), False
    yield "many members", npz([(f"{n}.q.npy", b"") for n in range(3000)]), True
    yield "nested", npz({"q.npy": npz(good, packed), "k.npy": x, "v.npy": x}), True
    for place, value in ((6, 1), (8, 99)):  # encrypted; a compression that nobody knows
        data = bytearray(npz(good))
        for sign, offset in ((b"PK\x03\x04", place), (b"PK\x01\x02", place + 2)):
            at = data.find(sign)
            data[at + offset] = value
        yield f"flag {place}", bytes(data), True


class Bomb:
    """A .npz whose members are a head and many zeros, written piece by piece."""

    def __init__(self, head, size, names, others=()):
        self.head, self.size, self.names, self.others = head, size, names, dict(others)

    def __call__(self, path):
        piece = bytes(1 << 20)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in self.others.items():
                if name.removesuffix(".npy") not in self.names:
                    archive.writestr(name, data)
            for name in self.names[:1]:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    file.write(self.head)
                    for _ in range(self.size // len(piece)):
                        file.write(piece)
            for name in self.names[1:]:
                archive.writestr(f"{name}.npy", npy((1, 3, 4), data=bytes(48)))


# No files


def no_files():
    yield "nothing there", lambda path: None, True
    yield "empty", b"", True
    yield "a directory", os.mkdir, True
    yield "a link to itself", lambda path: os.symlink(path, path), True
    yield "a link to nowhere", lambda path: os.symlink(f"{path}.absent", path), True
    if hasattr(os, "mkfifo"):
        yield "a pipe", os.mkfifo, True
        yield "a link to zeros without end", lambda path: os.symlink("/dev/zero", path), True
        yield "a link to a terminal", lambda path: os.symlink("/dev/tty", path), True
    yield "text", b"these are no arrays at all", True
    yield "zeros", bytes(5000), True
