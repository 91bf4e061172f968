"""Captured activations on disk: Q, K, V of one or several layers in a .npz or .safetensors file, with their options.

    entry                           holds
    `q`, `k`, `v`                   the only layer of the file (named as the file)
    `<layer>.q`, `.k`, `.v`         one of several layers
    `options`                       a JSON object such as {"causal": true, "scale": 0.125}, for all layers:
                                    in a .npz a string entry, in a .safetensors a key of the metadata
"""

import io
import json
import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cyflash.files import existing_file, open_safetensors, parsed_json, replacing, tensor_of
from cyflash.foreign import as_numpy

__all__ = ["OPTIONS", "Capture", "Layer", "load_capture", "natural", "save_capture"]

LAYOUTS = {
    "bhld": {2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 2, 3)},
    "blhd": {2: (0, 1), 3: (1, 0, 2), 4: (0, 2, 1, 3)},
}
DTYPES = ("float32", "float16", "float64")


class Layer(NamedTuple):
    """One layer's float32 arrays, all (L, D), all (H, L, D) or all (B, H, L, D)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


class Capture(Mapping):
    """The layers of one file, {name: Layer}: what `load_capture` returns. A layer is read when it is asked for.

    Attributes
    ----------
    path : Path
        The file.
    options : dict
        The options of `cyflash.flash_attention` that the file carries.
    stored : dict of str to str
        Each layer's dtype in the file: "float32", "float16", "float64", or several joined by "/".
    """

    def __init__(self, path, layout="bhld"):
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.path = Path(path)
        self._format = _format(self.path)
        self._layout = layout
        existing_file(self.path)
        entries, options = self._format.header(self.path)
        self.options = _decode_options(self.path, options)
        self._entries = _layers(self.path, entries)
        self.stored = _check(self.path, self._entries, entries, layout)

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)

    def __getitem__(self, name):
        arrays = self._format.read(self.path, self._entries[name])
        return Layer(*(self._transposed(x.astype(np.float32, copy=False)) for x in arrays))

    def _transposed(self, x):
        return x.transpose(LAYOUTS[self._layout][x.ndim])


def load_capture(path, layout="bhld"):
    """Open a file of captured activations.

    Parameters
    ----------
    path : str or path
        A `.npz` or `.safetensors` file with entries `q`, `k`, `v`, or `<layer>.q`, `<layer>.k`, `<layer>.v`; each
        (L, D), (H, L, D) or (B, H, L, D); float32, float16 or float64.
    layout : {"bhld", "blhd"}, default "bhld"
        The order of the stored axes. "blhd": (L, D), (L, H, D) or (B, L, H, D).

    Returns
    -------
    Capture
        A mapping {name: Layer(q, k, v)} in natural order of the names, with `.options`. Arrays are float32 and in the
        order (B, H, L, D), whatever the file has: float16 is widened exactly, float64 rounded (`.stored` tells).

    Raises
    ------
    FileNotFoundError
        No such file.
    TypeError
        An entry of another dtype.
    ValueError
        Another suffix, an unreadable file, an entry missing or unknown, shapes that do not fit, an unknown option.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from cyflash.capture import load_capture, save_capture
    >>> x = np.ones((2, 8, 4), np.float16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_capture(os.path.join(folder, "model.safetensors"), {"layer0": (x, x, x)}, causal=True)
    ...     capture = load_capture(path)
    ...     list(capture), capture["layer0"].q.shape, capture.options
    (['layer0'], (2, 8, 4), {'causal': True})
    """
    return Capture(path, layout)


def save_capture(path, layers, **options):
    """Write captured activations, so that `load_capture` and `cyflash compare` read them.

    Parameters
    ----------
    path : str or path
        Ends in `.npz` or `.safetensors`. The file appears only when it is complete.
    layers : mapping of str to (q, k, v), or one (q, k, v)
        Each (L, D), (H, L, D) or (B, H, L, D); float32, float16 or float64, stored as they are.
    **options
        Options of `cyflash.flash_attention` that these layers were computed with: `causal`, `causal_align`, `scale`,
        `window`, `softcap`, `alibi_slopes`, `sinks`.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    TypeError, ValueError
        As `load_capture`: what cannot be read is not written.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from cyflash.capture import save_capture
    >>> q, kv = np.ones((8, 16, 4), np.float32), np.ones((2, 16, 4), np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_capture(os.path.join(folder, "x.npz"), {"a": (q, kv, kv), "b": (q, kv, kv)}, window=(7, 0)).name
    'x.npz'
    """
    path = Path(path)
    file_format = _format(path)
    if not isinstance(layers, Mapping):
        layers = {"": layers}
    arrays = {}
    for name, qkv in layers.items():
        q, k, v = (np.asarray(as_numpy(part, x)) for part, x in zip("qkv", qkv, strict=True))
        arrays |= {(f"{name}.{part}" if name else part): x for part, x in zip("qkv", (q, k, v), strict=True)}
    text = json.dumps({name: _encode(value) for name, value in options.items() if value is not None})
    _decode_options(path, text)
    entries = {entry: (x.shape, x.dtype.name) for entry, x in arrays.items()}
    _check(path, _layers(path, entries), entries, "bhld")

    with replacing(path) as temporary:
        file_format.write(temporary, arrays, text)
    return path


def _layers(path, entries):
    """{layer: (entry of q, entry of k, entry of v)} in natural order of the layers' names."""
    found = {}
    for entry in entries:
        name, _, part = entry.rpartition(".")
        if part not in ("q", "k", "v"):
            raise ValueError(
                f"{path}: unexpected entry {entry!r}: a capture holds q, k, v, or <layer>.q, <layer>.k, <layer>.v; "
                f"{_found(entries)}"
            )
        found.setdefault(name, {})[part] = entry
    if not found:
        raise ValueError(f"{path}: no layer: expected q, k, v, or <layer>.q, <layer>.k, <layer>.v; {_found(entries)}")
    if "" in found and len(found) > 1:
        raise ValueError(f"{path}: mixes q, k, v without a layer and with one ({max(found)!r}): give each a layer")
    for name, parts in found.items():
        if missing := [part for part in "qkv" if part not in parts]:
            label = f"layer {name!r}" if name else "the layer"
            lacking = " and no ".join(missing)
            raise ValueError(f"{path}: {label} has no {lacking}: expected q, k and v; {_found(entries)}")
    return {name or path.stem: tuple(found[name][part] for part in "qkv") for name in sorted(found, key=natural)}


def _found(entries):
    """The names of the entries, shortened: found a, b, c and 5 more."""
    names = sorted(map(str, entries), key=natural)
    shown = 8 if len(names) > 9 else len(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"found {', '.join(names[:shown]) or 'no entries'}{more}"


def natural(name):
    """A sort key that puts layer2 before layer10."""
    parts = re.split("([0-9]+)", name)  # every other one is digits: the longer the greater
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(parts)], name


def _check(path, layers, entries, layout):
    """Raise if a layer's dtypes or shapes cannot be attended; else return {layer: its dtype(s)}."""
    stored = {}
    for name, parts in layers.items():
        shapes, dtypes = zip(*(entries[part] for part in parts), strict=True)
        for part, dtype in zip(parts, dtypes, strict=True):
            if dtype not in DTYPES:
                raise TypeError(f"{path}: {part}: expected {', '.join(DTYPES)}, got {dtype}; save it as float32")
        if problem := _misfit(shapes, layout):
            other = "bhld" if layout == "blhd" else "blhd"
            hint = f"; it fits as layout {other!r} (`--layout {other}`)" if not _misfit(shapes, other) else ""
            raise ValueError(f"{path}: layer {name!r}: {problem}{hint}")
        stored[name] = "/".join(sorted(set(dtypes)))
    return stored


def _misfit(shapes, layout):
    """What is wrong with the shapes of q, k and v, or None."""
    got = "q {}, k {}, v {}".format(*shapes)
    if len({len(shape) for shape in shapes}) > 1 or len(shapes[0]) not in LAYOUTS[layout]:
        axes = "(L, D), (H, L, D) or (B, H, L, D)" if layout == "bhld" else "(L, D), (L, H, D) or (B, L, H, D)"
        return f"expected q, k and v all {axes}, got {got}"
    order = LAYOUTS[layout][len(shapes[0])]
    q, k, v = ([1, 1, *(shape[axis] for axis in order)][-4:] for shape in shapes)
    if not q[0] == k[0] == v[0]:
        return f"expected one batch size, got {got}"
    if k[1] != v[1] or k[1] == 0 or q[1] % k[1]:
        return f"expected k and v with one number of heads that divides q's, got {got}"
    if k[2] != v[2]:
        return f"expected k and v of one length, got {got}"
    if q[3] != k[3]:
        return f"expected q and k of one head_dim (the last axis), got {got}"
    return None


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_list(x):
    return isinstance(x, list) and all(_is_list(item) or _is_number(item) for item in x)


def _is_window(x):
    return isinstance(x, list) and [type(n) for n in x] == [int, int]


def _float32(x):
    return np.array(x, np.float32)


# The options a file may carry: what their JSON is checked with, how that is called, and their form as an argument.
OPTIONS = {
    "causal": (lambda x: isinstance(x, bool), "true or false", bool),
    "causal_align": (lambda x: isinstance(x, str), "a string", str),
    "scale": (_is_number, "a number", float),
    "window": (_is_window, "[left, right], two whole numbers", tuple),
    "softcap": (_is_number, "a number", float),
    "alibi_slopes": (_is_list, "a list of numbers", _float32),
    "sinks": (_is_list, "a list of numbers", _float32),
}


def _encode(value):
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _decode_options(path, text):
    try:
        options = parsed_json(text or "{}")
    except ValueError as error:
        raise ValueError(f"{path}: options: not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: options: expected a JSON object such as {{\"causal\": true}}, got {text}")
    decoded = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"{path}: options: {name!r} is not one of {', '.join(OPTIONS)}")
        fits, expected, convert = OPTIONS[name]
        if value is None:
            continue
        if not fits(value):
            raise ValueError(f"{path}: options: {name}: expected {expected}, got {json.dumps(value)}")
        decoded[name] = convert(value)
    return decoded


# The two formats: header(path) -> {entry: (shape, dtype)}, options; read(path, entries) -> arrays; write.


# What zipfile and NumPy raise for damaged files: checksums, broken compression, flags that make no sense, ...
BAD_NPZ = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, RuntimeError, struct.error, TypeError,
           SyntaxError, tokenize.TokenError)
# A member may unpack to so many bytes, and beyond to so many times what it takes packed: activations are numbers that
# hardly pack at all, while a megabyte of nothing but zeros unpacks to a gigabyte.
MOST_UNPACKED, MOST_TIMES = 64 << 20, 100
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MOST_TEXT = 1 << 20  # bytes of the options
NPY_HEADER = 1 << 16  # bytes that a header is within; NumPy takes 10,000 at most


class _Npz:
    @staticmethod
    def header(path):
        entries, options = {}, ""
        with _reading(path), zipfile.ZipFile(path) as archive:
            _check_packing(path, archive.infolist())
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    if name == "options":
                        options = _text(file, member)
                    else:
                        entries[name] = _npy_header(file, member)
        return entries, options

    @staticmethod
    def read(path, names):
        with _reading(path), np.load(path, allow_pickle=False) as archive:
            return [archive[name] for name in names]

    @staticmethod
    def write(path, arrays, options):
        with open(path, "wb") as file:
            np.savez(file, **arrays, options=np.array(options))


@contextmanager
def _reading(path):
    """What damage raises as a ValueError that names the file."""
    try:
        yield
    except (*BAD_NPZ, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # of the file itself, not of what it says
            raise
        raise ValueError(f"{path}: not a readable .npz file: {error}") from None
    except MemoryError as error:
        raise MemoryError(f"{path}: arrays for which there is no memory: {error}") from None


def _check_packing(path, members):
    """Raise ValueError where members say that they are larger than they can be: as much memory would be taken."""
    size = path.stat().st_size
    if sum(member.compress_size for member in members) > size:
        raise ValueError(f"its members take more than the {size} bytes of the file")
    for member in members:
        if member.compress_type not in PACKINGS:  # of others zipfile unpacks more at a time than it is asked for
            raise ValueError(f"{member.filename} is packed in another way than numpy.savez and savez_compressed do")
        packed = member.compress_type != zipfile.ZIP_STORED
        most = max(MOST_UNPACKED, MOST_TIMES * member.compress_size) if packed else member.compress_size
        if member.file_size > most:
            raise ValueError(
                f"{member.filename} unpacks from {member.compress_size} to {member.file_size} bytes, expected at most "
                f"{most}; save it with numpy.savez, which does not pack"
            )


def _text(file, member):
    """The string that a member holds."""
    if member.file_size > MOST_TEXT:
        raise ValueError(f"options: expected at most {MOST_TEXT} bytes, got {member.file_size}")
    data = io.BytesIO(file.read())
    shape, dtype = _npy_header(data, member)
    if shape or not dtype.startswith("str"):
        raise ValueError(f"options: expected one string, got {dtype} of shape {shape}")
    data.seek(0)
    return str(np.lib.format.read_array(data, allow_pickle=False))


def _npy_header(file, member):
    """(shape, dtype's name) of a .npy stream, without reading its data, which has to be as long as they say."""
    start = io.BytesIO(file.read(NPY_HEADER))
    try:
        version = np.lib.format.read_magic(start)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(start)
    except (RecursionError, MemoryError):  # of brackets in brackets
        raise ValueError(f"{member.filename}: its header cannot be read") from None
    size, held = math.prod(shape) * dtype.itemsize, member.file_size - start.tell()
    if size != held and not dtype.hasobject:
        raise ValueError(f"{member.filename}: expected {size} bytes of {dtype.name} {shape}, got {held}")
    return shape, dtype.name


SAFETENSORS_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}


class _Safetensors:
    @staticmethod
    def header(path):
        with open_safetensors(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            entries = {
                name: (tuple(x.get_shape()), SAFETENSORS_DTYPES.get(x.get_dtype(), x.get_dtype()))
                for name, x in slices.items()
            }
            return entries, (file.metadata() or {}).get("options", "")

    @staticmethod
    def read(path, names):
        with open_safetensors(path) as file:
            return [tensor_of(file, path, name) for name in names]

    @staticmethod
    def write(path, arrays, options):
        import safetensors.numpy

        arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
        safetensors.numpy.save_file(arrays, path, metadata={"options": options})


FORMATS = {".npz": _Npz, ".safetensors": _Safetensors}


def _format(path):
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a file that ends in {' or '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]
