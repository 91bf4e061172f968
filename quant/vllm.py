"""Scales as compressed-tensors writes and vLLM reads them: what is behind `Scales.to_vllm` and `Scales.from_vllm`.

    folder/kv_cache_scales.safetensors      <layer>.q_scale, .k_scale, .v_scale in float32: (1,), or (heads, 1, 1)
    folder/config.json                      quantization_config.kv_cache_scheme: 8 bits, symmetric int, static;
                                            strategy "tensor" or "attn_head"
    folder/model.safetensors.index.json     lists the former, where a checkpoint in several files has such an index

An int8 scale is absmax / 127.5 there, for codes -128..127, and absmax / 127 here: the range stays, the number changes.

The form follows, in vllm-project/compressed-tensors, quantization/lifecycle/initialize.py (names, shapes),
quantization/utils/helpers.py (absmax / 127.5), quantization/quant_args.py and quant_config.py (the scheme); in
vllm-project/vllm, layers/quantization/compressed_tensors/compressed_tensors.py (what is loaded and how),
model_loader/weight_utils.py (names, the index); in vllm-project/llm-compressor, examples/quantization_kv_cache.
"""

import json
from pathlib import Path

import numpy as np

from cyflash.files import existing_file, open_safetensors, parsed_json, replacing, write_safetensors
from cyflash.quantized import SMALLEST_SCALE, LayerScales

SCALES, CONFIG, INDEX = "kv_cache_scales.safetensors", "config.json", "model.safetensors.index.json"
METHOD = "compressed-tensors"
RATIO = 127 / 127.5  # of their scale to ours, for one range
SCHEME = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
STRATEGIES = ("tensor", "attn_head")
FIELDS = ("q_scale", "k_scale", "v_scale")
DTYPES = ("F32", "F16", "BF16", "F64")


# Writing


def write(scales, folder):
    """`Scales.to_vllm`: the path of the scales' file. Everything is checked before anything is written."""
    folder = Path(folder)
    plain = {name: _exportable(name, layer) for name, layer in scales.items()}
    per_head = any(x.size > 1 for fields in plain.values() for x in fields.values())
    tensors = {
        f"{name}.{field}": _theirs(x, _heads(name, field, fields, scales.about[name]) if per_head else None)
        for name, fields in plain.items() for field, x in fields.items()
    }
    config = _merged_config(folder, SCHEME | {"strategy": "attn_head" if per_head else "tensor"})
    index = _merged_index(folder, tensors)

    folder.mkdir(exist_ok=True)
    write_safetensors(folder / SCALES, tensors, {"format": "pt"})  # the framework: transformers asks for it
    if index is not None:
        _write_json(folder / INDEX, index)
    _write_json(folder / CONFIG, config)
    return folder / SCALES


def _exportable(name, layer):
    """{field: scales as (n,)} of a layer; ValueError for what the form cannot say."""
    where = f"layer {name!r}"
    if layer.parts is not None:
        raise ValueError(f"{where}: parts: the form has one setting for all layers, not a plan for each head")
    if layer.k_mean is not None:
        raise ValueError(
            f"{where}: k_mean: its k_scale is of keys without their mean, and a runtime that does not subtract that "
            "would saturate; calibrate with smooth_k=False"
        )
    if layer.fp32_sinks:
        raise ValueError(
            f"{where}: fp32_sinks: its scales leave out the first {layer.fp32_sinks} keys and values, which a runtime "
            "would quantise with them; calibrate with fp32_sinks=0"
        )
    fields = {field: getattr(layer, field) for field in FIELDS if getattr(layer, field) is not None}
    for field in ("k_scale", "v_scale"):
        if field not in fields:
            raise ValueError(f"{where}: {field}: dynamic, and a runtime would take 1.0 for a missing one; calibrate it")
    for field, x in fields.items():
        if x.ndim >= 2 and x.shape[-2] > 1:
            raise ValueError(f"{where}: {field}: expected one for all tokens, got shape {x.shape}")
        if x.ndim == 4 and x.shape[0] > 1:
            raise ValueError(f"{where}: {field}: expected one for all sequences, got shape {x.shape}")
    return {field: x.reshape(-1) for field, x in fields.items()}


def _heads(name, field, fields, about):
    """How many heads the scales of `field` are for: what calibration noted, or what other scales show."""
    key, same = ("heads", ("q_scale",)) if field == "q_scale" else ("kv_heads", ("k_scale", "v_scale"))
    sizes = {fields[one].size for one in same if one in fields and fields[one].size > 1}
    if isinstance(about.get(key), int):
        sizes.add(about[key])
    if not sizes:
        raise ValueError(
            f"layer {name!r}: {field}: one number, where other scales are per head; for the same form for all, give "
            f"Scales its about={{{name!r}: {{{key!r}: number of heads}}}}"
        )
    if len(sizes) > 1:
        raise ValueError(f"layer {name!r}: {field}: expected scales for as many heads, got {sorted(sizes)}")
    return sizes.pop()


def _theirs(x, heads):
    """Our scales (n,) in their convention and shape; heads: how many, None for the whole tensor."""
    x = np.maximum((x.astype(np.float64) * RATIO).astype(np.float32), np.float32(SMALLEST_SCALE))
    return x if heads is None else np.array(np.broadcast_to(x[:, None, None], (heads, 1, 1)))


def _merged_config(folder, scheme):
    path = folder / CONFIG
    config = _read_json(path) if path.exists() else {}
    fresh = {"config_groups": {}, "format": "dense", "ignore": [], "quantization_status": "compressed"}
    own = config.get("quantization_config") or {"quant_method": METHOD} | fresh
    if not isinstance(own, dict) or own.get("quant_method") != METHOD:
        raise ValueError(f"{path}: expected no quantization_config, or one of {METHOD}, got {_short(own)}")
    before = own.get("kv_cache_scheme")
    again = (folder / SCALES).exists() and before in [scheme | {"strategy": one} for one in STRATEGIES]
    if before not in (None, scheme) and not again:
        raise ValueError(
            f"{path}: expected no kv_cache_scheme, or that of these scales, got {_short(before)}; remove it, and the "
            "scales that belong to it"
        )
    return config | {"quantization_config": own | {"kv_cache_scheme": scheme}}


def _merged_index(folder, tensors):
    """The index with our tensors in it, or None where there is none; ValueError where others have their names."""
    path = folder / INDEX
    index = _read_index(path) if path.exists() else None
    where = index["weight_map"] if index else {name: file.name for file, name in _entries(_files(folder))}
    for name in tensors:
        if where.get(name, SCALES) != SCALES:
            raise ValueError(f"{folder / where[name]}: has a {name} already; remove it, or export to another folder")
    if index is None:
        return None
    others = {name: file for name, file in where.items() if file != SCALES}
    return index | {"weight_map": others | dict.fromkeys(tensors, SCALES)}


def _write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Reading


def read(folder):
    """`Scales.from_vllm`: ({layer: LayerScales}, settings)."""
    folder = Path(folder)
    strategy = _strategy(folder / CONFIG)
    found, others, seen = {}, [], {}
    for path, name in _entries(_files(folder)):
        layer, _, field = name.rpartition(".")
        if field in (*FIELDS, "q_zero_point", "k_zero_point", "v_zero_point"):
            if name in seen:
                raise ValueError(f"{path}: {name} is also in {seen[name].name}")
            seen[name] = path
            found.setdefault(layer, {})[field] = path
        elif "scale" in field:
            others.append(name)
    if not found:
        got = f"; of scales there are {_short(sorted(others))}" if others else ""
        raise ValueError(f"{folder}: expected tensors <layer>.k_scale and <layer>.v_scale, got none{got}")
    layers = {name: _imported(name, fields, strategy) for name, fields in found.items()}
    return layers, {"source": METHOD, "strategy": strategy}


def _strategy(path):
    """How the scales are shared, after checking that they are those of symmetric static int8."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it says what the scales mean")
    own = _read_json(path).get("quantization_config")
    if not isinstance(own, dict) or own.get("quant_method", METHOD) != METHOD:
        raise ValueError(f"{path}: expected a quantization_config of {METHOD}, got {_short(own)}")
    scheme = own.get("kv_cache_scheme")
    if not isinstance(scheme, dict):
        raise ValueError(f"{path}: expected a kv_cache_scheme in quantization_config, got {_short(scheme)}")
    for key, expected in SCHEME.items():
        value = scheme.get(key, expected)  # their defaults are these values
        if type(value) is not type(expected) or value != expected:
            hint = "; scales of fp8 are for other codes: calibrate again" if (key, value) == ("type", "float") else ""
            raise ValueError(f"{path}: kv_cache_scheme: {key}: expected {expected!r}, got {value!r}{hint}")
    strategy = scheme.get("strategy") or "tensor"
    if strategy not in STRATEGIES:
        raise ValueError(f"{path}: kv_cache_scheme: strategy: expected 'tensor' or 'attn_head', got {strategy!r}")
    return strategy


def _imported(name, fields, strategy):
    """The LayerScales of one layer; fields: {field: path of its file}."""
    for field in ("k_scale", "v_scale"):
        if field not in fields:
            path = next(iter(fields.values()))
            raise ValueError(f"{path}: layer {name!r}: no {field}, beside {', '.join(sorted(fields))}")
    scales = {}
    for field, path in fields.items():
        x = _numbers(path, f"{name}.{field}")
        if field.endswith("zero_point"):
            if x.any():
                raise ValueError(f"{path}: {name}.{field}: expected zeros, as the scheme is symmetric, got {_first(x)}")
            continue
        good = np.isfinite(x) & (x > 0)
        if not good.all():
            raise ValueError(f"{path}: {name}.{field}: expected finite numbers above 0, got {_first(x[~good])}")
        if x.size == 0 or x.shape not in ((), (x.size,), (x.size, 1, 1)) or (strategy == "tensor" and x.size > 1):
            expected = "one number" if strategy == "tensor" else "(heads, 1, 1) or (heads,)"
            raise ValueError(f"{path}: {name}.{field}: expected {expected} for {strategy!r}, got shape {x.shape}")
        with np.errstate(over="ignore"):
            ours = (x / RATIO).astype(np.float32)
        scales[field] = ours.reshape(()) if strategy == "tensor" else ours.reshape(-1, 1, 1)
    heads = {field: x.size for field, x in sorted(scales.items())}
    if heads["k_scale"] != heads["v_scale"] or heads.get("q_scale", 0) % heads["k_scale"]:
        sizes = ", ".join(f"{field} {n}" for field, n in heads.items())
        raise ValueError(f"{path}: layer {name!r}: expected scales of one number of kv heads, got {sizes}")
    try:
        return LayerScales(**scales)
    except ValueError as error:
        raise ValueError(f"{path}: layer {name!r}: {error}") from None


def _numbers(path, name):
    """One tensor as float64."""
    with open_safetensors(path) as file:
        dtype = file.get_slice(name).get_dtype()
        if name.endswith("zero_point") and dtype in ("I8", "U8", "I32", "I64"):
            return file.get_tensor(name).astype(np.float64)
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {dtype}")
        if dtype != "BF16":
            return file.get_tensor(name).astype(np.float64)
    with open(path, "rb") as file:  # NumPy has no bfloat16
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + size + begin)
        words = np.frombuffer(file.read(end - begin), "<u2").astype(np.uint32)
    return (words << 16).view(np.float32).astype(np.float64).reshape(entry["shape"])


# Folders


def _files(folder):
    """The .safetensors files that count: those of the index, where there is one."""
    if not folder.is_dir():
        return []
    if (folder / INDEX).exists():
        return [folder / name for name in sorted(set(_read_index(folder / INDEX)["weight_map"].values()))]
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def _entries(paths):
    """(path, name) of every tensor."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, though {INDEX} lists it")
        with open_safetensors(path) as file:
            names = list(file.keys())
        yield from ((path, name) for name in names)


def _read_index(path):
    index = _read_json(path)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{path}: expected a weight_map")
    for name in index["weight_map"].values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path}: weight_map: expected names of files beside it, got {_short(name)}")
    return index


def _read_json(path):
    try:
        value = parsed_json(existing_file(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {_short(value)}")
    return value


def _first(x):
    return x.reshape(-1)[0]


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
