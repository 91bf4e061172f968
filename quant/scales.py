"""Scales of a whole model, {layer: LayerScales}, and the file that they are kept in.

    Scales -> save -> one .safetensors: numbers as tensors, everything else as JSON in its metadata -> load -> Scales

    tensor                          holds, in float32
    <layer>.q_scale, .k_scale, .v_scale, .k_mean
    <layer>.parts.<i>.q_scale, ...  the same of the i-th part of a planned layer

    metadata                        holds
    format                          "cyflash.Scales"
    scales                          {"schema": 1, "convention": "scale = amax / 127", "cyflash": version, "settings",
                                    "layers": {layer: {"fp32_sinks", "pv", "k_mean", "dynamic", "about"}, of planned
                                    layers {"parts": [{"kv_heads", "layer"}], "about"}}}
    sha256                          of the above and of the tensors

What is missing must be missing on purpose: "dynamic" lists the operands without a scale, "k_mean" says whether there is
a mean, and a part whose "layer" is null runs in float32.
"""

import hashlib
import json
from collections.abc import Mapping

import numpy as np

import cyflash
from cyflash.capture import natural
from cyflash.files import existing_file, open_safetensors, parsed_json, safetensors_path, write_safetensors
from cyflash.quant import vllm
from cyflash.quantized import LayerScales

__all__ = ["Scales"]

FORMAT = "cyflash.Scales"
SCHEMA = 1
CONVENTION = "scale = amax / 127"
OPERANDS = ("q", "k", "v")


class Scales(Mapping):
    """Scales of the layers of a model: a mapping {layer: LayerScales}, in natural order of the names.

    Parameters
    ----------
    layers : mapping of str to LayerScales
        At least one.
    settings : mapping, optional
        How they were found; what JSON can hold. NumPy's numbers and arrays become plain ones and lists.
    about : mapping of str to mapping, optional
        The same of single layers, by name.

    Attributes
    ----------
    settings, about : dict
        As given, empty by default; every layer has an entry in `about`.

    Raises
    ------
    KeyError
        By ``scales[name]``, for a layer that is not there: it never gets a scale of 1.
    TypeError, ValueError
        For layers, settings or about that are not as above.

    Notes
    -----
    Two `Scales` are equal when their files are, bit for bit.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> import cyflash
    >>> from cyflash.quant import LayerScales, Scales
    >>> scales = Scales({"layer0": LayerScales(0.04, 0.04, 0.03), "layer1": LayerScales(0.05, 0.02, 0.03)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = scales.save(os.path.join(folder, "scales.safetensors"))
    ...     Scales.load(path) == scales
    True
    >>> q = np.ones((2, 8, 4), np.float32)
    >>> cyflash.flash_attention_int8(q, q, q, quant=scales["layer0"]).shape
    (2, 8, 4)
    """

    def __init__(self, layers, *, settings=None, about=None):
        if not isinstance(layers, Mapping) or not layers:
            raise TypeError(f"layers: expected a mapping of names to LayerScales, of at least one, got {layers!r}")
        for name, layer in layers.items():
            _check_layer(name, layer)
        names = sorted(layers, key=natural)
        self._layers = {name: layers[name] for name in names}
        self.settings = _plain("settings", settings)
        about = _plain("about", about)
        for name, entry in about.items():
            if name not in self._layers:
                raise ValueError(f"about: expected the layers' names, got {name!r}; there are {_listed(names)}")
            if not isinstance(entry, dict):
                raise TypeError(f"about[{name!r}]: expected a mapping, got {entry!r}")
        self.about = {name: about.get(name, {}) for name in names}
        self._tensors()  # every name once

    def __getitem__(self, name):
        try:
            return self._layers[name]
        except (KeyError, TypeError):
            raise KeyError(f"no layer {name!r}: there are {_listed(self._layers)}") from None

    def __contains__(self, name):
        return isinstance(name, str) and name in self._layers

    def __iter__(self):
        return iter(self._layers)

    def __len__(self):
        return len(self._layers)

    def __repr__(self):
        return f"Scales({_listed(self._layers)})"

    def __eq__(self, other):
        return self._contents() == other._contents() if isinstance(other, Scales) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def save(self, path):
        """Write to a `.safetensors` file, which appears only when it is complete. The same scales give the same bytes.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        Path
            The file written.

        Raises
        ------
        ValueError
            For another suffix.
        OSError
            Where it cannot be written.
        """
        path, (text, tensors) = safetensors_path(path), self._encoded()
        write_safetensors(path, tensors, {"format": FORMAT, "scales": text, "sha256": _digest(text, tensors)})
        return path

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        Scales

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            For another suffix, a file that holds something else, is damaged or is of a newer cyflash; for scales that
            are NaN, infinite, zero, negative or missing. The message names the layer and the field.
        """
        path = existing_file(safetensors_path(path))
        with open_safetensors(path) as file:
            try:
                return _decoded(cls, *_read(file))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from None

    def to_vllm(self, directory):
        """Write the scales into a model's directory in the form of compressed-tensors, which vLLM reads.

        Parameters
        ----------
        directory : str or path
            A checkpoint, or a new directory beside one. The names of the layers must be those of its attention modules,
            such as "model.layers.0.self_attn".

        Returns
        -------
        Path
            The file `kv_cache_scales.safetensors`, with <layer>.k_scale and .v_scale, and .q_scale of the layers that
            have one. config.json gets a quantization_config.kv_cache_scheme, and keeps what it has; so does the index
            of a checkpoint in several files.

        Raises
        ------
        ValueError
            For what this form cannot say, with the layer and the reason: smoothed keys (k_mean), fp32_sinks, planned
            layers, a k or v without a scale, scales per token. For a directory that has another quantization_config or
            kv_cache_scheme, or scales of the same names in another file.

        Notes
        -----
        int8 scales are absmax / 127.5 there, for codes from -128 to 127: they are converted. Where a scale of any layer
        is per head, all are written per head (strategy "attn_head"); the numbers of heads are those in `about`
        ("heads", "kv_heads"), or what other scales of the layer show. `pv`, `settings` and `about` are not kept: the
        form has no place for them.

        compressed-tensors writes a q_scale only where the attention itself is quantised, and vLLM uses one where it
        quantises queries: per head, the greatest of each group. Layers with a dynamic q have none, and vLLM then takes
        1.0. Its own kernels for caches with static scales are of fp8 at the time of writing, so check that yours has
        int8 ones.
        """
        return vllm.write(self, directory)

    @classmethod
    def from_vllm(cls, directory):
        """Read static int8 scales from a model's directory in the form of compressed-tensors.

        Parameters
        ----------
        directory : str or path
            With a config.json whose quantization_config.kv_cache_scheme is symmetric static int8, of strategy "tensor"
            or "attn_head", and .safetensors files with <layer>.k_scale and <layer>.v_scale in float32, float64,
            float16 or bfloat16.

        Returns
        -------
        Scales
            Converted to absmax / 127, with shape () or (heads, 1, 1). A layer without q_scale has a dynamic q.

        Raises
        ------
        FileNotFoundError
            No config.json, or a file missing that the index lists.
        ValueError
            For another scheme, such as fp8; for k_scale or v_scale missing, NaN, infinite, zero or negative (vLLM's
            mark of a missing one): never 1.0. The message names the file and the tensor.
        """
        layers, settings = vllm.read(directory)
        return cls(layers, settings=settings)

    def _tensors(self):
        tensors = {}
        for name, layer in self.items():
            for prefix, one in _each(name, layer):
                for field in (*(f"{x}_scale" for x in OPERANDS), "k_mean"):
                    if (array := getattr(one, field)) is not None:
                        entry = f"{prefix}.{field}"
                        if entry in tensors:
                            raise ValueError(f"layers: {entry!r} is of two layers; rename {name!r}")
                        tensors[entry] = np.array(array, order="C")
        return tensors

    def _encoded(self):
        """(JSON, tensors) of the file."""
        layers = {}
        for name, layer in self.items():
            if layer.parts is None:
                layers[name] = _entry(layer)
            else:
                parts = [{"kv_heads": heads, "layer": one and _entry(one)} for heads, one in layer.parts]
                layers[name] = {"parts": parts}
            layers[name]["about"] = self.about[name]
        whole = {"schema": SCHEMA, "convention": CONVENTION, "cyflash": cyflash.__version__}
        whole |= {"settings": self.settings, "layers": layers}
        return json.dumps(whole, sort_keys=True), self._tensors()

    def _contents(self):
        text, tensors = self._encoded()
        return text, {name: (x.shape, x.tobytes()) for name, x in tensors.items()}


def _check_layer(name, layer):
    if not isinstance(name, str) or not name or not name.isprintable():
        raise TypeError(f"layers: expected names, printable and not empty, got {name!r}")
    if not isinstance(layer, LayerScales):
        raise TypeError(f"layers[{name!r}]: expected a LayerScales, got {type(layer).__name__}")


def _listed(names):
    """How many layers, and their names, shortened."""
    names = list(names)
    shown = names if len(names) <= 8 else [*names[:4], "...", *names[-2:]]
    return f"{len(names)} layer{'s' * (len(names) != 1)}: {', '.join(shown)}"


def _plain(name, value):
    """A mapping as JSON gives it back."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {value!r}")
    try:
        return json.loads(json.dumps(dict(value), default=_numbers))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: expected what JSON can hold: {error}") from None


def _numbers(x):
    if isinstance(x, np.ndarray | np.generic):
        return x.tolist()
    if isinstance(x, Mapping):
        return dict(x)
    raise TypeError(f"got {x!r}")


def _each(name, layer):
    """(prefix of the tensors' names, LayerScales) of a layer or of its parts."""
    if layer.parts is None:
        yield name, layer
    else:
        yield from ((f"{name}.parts.{i}", one) for i, (_, one) in enumerate(layer.parts) if one is not None)


def _entry(layer):
    return {
        "fp32_sinks": layer.fp32_sinks,
        "pv": layer.pv,
        "k_mean": layer.k_mean is not None,
        "dynamic": [x for x in OPERANDS if getattr(layer, f"{x}_scale") is None],
    }


def _digest(text, tensors):
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\n{name} {x.shape}\n".encode())
        digest.update(x.astype("<f4").tobytes())
    return digest.hexdigest()


# Reading: everything is looked at, nothing is assumed


def _read(file):
    """({key: text}, {name: array}) of an open file."""
    metadata, names = file.metadata() or {}, file.keys()
    if metadata.get("format") != FORMAT:
        raise ValueError(f"expected a file that Scales.save wrote, got one with {_few(names)}")
    for name in names:
        if (dtype := file.get_slice(name).get_dtype()) != "F32":
            raise ValueError(f"{name}: expected float32 (F32), got {dtype}")
    return metadata, {name: file.get_tensor(name) for name in names}


def _decoded(cls, metadata, tensors):
    """The `Scales` of a file's metadata and tensors."""
    text = metadata.get("scales", "")
    try:
        whole = parsed_json(text)
    except ValueError as error:
        raise ValueError(f"scales: not JSON: {error}") from None
    _check_schema(whole)
    _check_keys("scales", whole, ("schema", "convention", "cyflash", "settings", "layers"))
    if not isinstance(whole["layers"], dict) or not whole["layers"]:
        raise ValueError("layers: expected an object of at least one layer")
    left = dict(tensors)
    layers, about = {}, {}
    for name, entry in whole["layers"].items():
        layers[name], about[name] = _layer(name, entry, left), entry["about"]
    if left:
        raise ValueError(f"expected the tensors of {_listed(layers)}; got others: {_few(left)}")
    scales = cls(layers, settings=whole["settings"], about=about)
    if metadata.get("sha256") != _digest(text, tensors):
        raise ValueError("damaged: its contents are not those that its sha256 was taken of")
    return scales


def _check_schema(whole):
    schema = whole.get("schema") if isinstance(whole, dict) else None
    if type(schema) is not int or schema < 1:
        raise ValueError(f"schema: expected {SCHEMA}, got {schema!r}")
    if schema > SCHEMA:
        raise ValueError(
            f"schema: expected at most {SCHEMA}, got {schema}: written by cyflash {whole.get('cyflash')}, a newer one; "
            "upgrade this one"
        )
    if whole.get("convention") != CONVENTION:
        raise ValueError(f"convention: expected {CONVENTION!r}, got {whole.get('convention')!r}")


def _check_keys(where, entry, expected):
    """Raise unless `entry` is a JSON object with exactly these keys."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(expected)}, got {entry!r}")
    if missing := [key for key in expected if key not in entry]:
        raise ValueError(f"{where}: no {' and no '.join(missing)}")
    if unknown := [key for key in entry if key not in expected]:
        raise ValueError(f"{where}: unknown {' and '.join(unknown)}")


def _layer(name, entry, left):
    """The LayerScales of a JSON entry; its tensors are taken out of `left`."""
    where = f"layer {name!r}"
    if not isinstance(entry, dict) or "parts" not in entry:
        return _single(where, name, entry, left, ("about",))
    _check_keys(where, entry, ("parts", "about"))
    if not isinstance(entry["parts"], list):
        raise ValueError(f"{where}: parts: expected a list, got {entry['parts']!r}")
    parts = []
    for i, part in enumerate(entry["parts"]):
        _check_keys(f"{where}: parts[{i}]", part, ("kv_heads", "layer"))
        one = part["layer"]
        if one is not None:
            one = _single(f"{where}: parts[{i}]", f"{name}.parts.{i}", one, left)
        parts.append((part["kv_heads"], one))
    return _made(where, parts=parts)


def _single(where, prefix, entry, left, more=()):
    _check_keys(where, entry, ("fp32_sinks", "pv", "k_mean", "dynamic", *more))
    dynamic, has_mean = entry["dynamic"], entry["k_mean"]
    if not isinstance(dynamic, list) or any(x not in OPERANDS for x in dynamic):
        raise ValueError(f"{where}: dynamic: expected a list of {', '.join(OPERANDS)}, got {dynamic!r}")
    if not isinstance(has_mean, bool):
        raise ValueError(f"{where}: k_mean: expected true or false, got {has_mean!r}")
    fields = {"fp32_sinks": entry["fp32_sinks"], "pv": entry["pv"]}
    wanted = {f"{x}_scale": (x not in dynamic, f"{x} is not listed as dynamic") for x in OPERANDS}
    wanted["k_mean"] = has_mean, "it is said to have one"
    for field, (expected, why) in wanted.items():
        array = left.pop(f"{prefix}.{field}", None)
        if (array is not None) != expected:
            problem = f"missing, though {why}" if expected else "there, though it is said not to be"
            raise ValueError(f"{where}: {field}: {problem}")
        fields[field] = array
    return _made(where, **fields)


def _made(where, **fields):
    try:
        return LayerScales(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _few(names):
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"
