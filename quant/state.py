"""A calibrator's observations in one .safetensors file: Calibrator.save and Calibrator.load.

    tensor                                   holds
    `<layer>/<part>/counts`, `/sums`         the columns of the histograms from the first to the last that is not empty
    `<layer>/<part>/top`, `/rest`            greatest values of all keys, and of those after the first few
    `<layer>/k_sum`, `<layer>/k_tokens`      fixed-point sums of the keys, in words of 32 bits
    `<layer>/tile/<hash>/q`, `/k`, ...       tiles, with their mask and bias

    metadata "calibrator"                    JSON: schema, settings; per layer its shape, options, counters and hashes
    metadata "sha256"                        of the above and of the tensors
"""

import hashlib
import json

import numpy as np

from cyflash.files import parsed_json, read_safetensors, safetensors_path, write_safetensors
from cyflash.quant.layer import PARTS, Layer, Shape, as_arguments
from cyflash.quant.tiles import Tile

__all__ = ["load", "save"]

FORMAT = "cyflash.Calibrator"
SCHEMA = 1
WORDS = 13  # of 32 bits: 192 below the point, 128 for the greatest float, and how many there are
COUNTERS = ("observations", "longest", "nonfinite", "all_zero")


def save(path, settings, layers):
    """Write {name: Layer}; the same observations give the same bytes."""
    path = safetensors_path(path)
    tensors, about = {}, {}
    for name, layer in layers.items():
        first = {}
        for part in PARTS:
            counts = layer.counts[part]
            for kind, x in (("counts", counts.counts), ("sums", counts.sums)):
                begin, end = _filled(x)
                first[f"{part}/{kind}"] = begin
                tensors[f"{name}/{part}/{kind}"] = x[:, begin:end]
            tensors[f"{name}/{part}/top"] = counts.top
            if part in layer.rest:
                tensors[f"{name}/{part}/rest"] = layer.rest[part]
        tensors |= {f"{name}/k_sum": _as_words(layer.k_sum), f"{name}/k_tokens": layer.k_tokens}
        tiles = {}
        for key, tile in layer.reservoir.tiles.items():
            arrays = {"q": tile.q, "k": tile.k, "v": tile.v}
            arrays |= {option: tile.options[option] for option in ("bias", "mask") if option in tile.options}
            tensors |= {f"{name}/tile/{key}/{part}": x for part, x in arrays.items()}
            tiles[key] = {"causal_align": tile.options["causal_align"], "arrays": sorted(arrays)}
        about[name] = {
            "shape": list(layer.shape), "options": layer.options, "first": first, "tiles": tiles,
            "end": layer.reservoir.end,
            **{counter: getattr(layer, counter) for counter in COUNTERS},
        }  # fmt: skip
    text = json.dumps({"schema": SCHEMA, "settings": settings, "layers": about}, sort_keys=True)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    write_safetensors(path, tensors, {"format": FORMAT, "calibrator": text, "sha256": _digest(text, tensors)})
    return path


def load(path):
    """(settings, {name: Layer}) of a file that `save` wrote; ValueError for any other."""
    metadata, tensors = read_safetensors(path, FORMAT, "Calibrator.save")
    text, left = metadata.get("calibrator", ""), dict(tensors)
    try:
        about = parsed_json(text)
        schema = about["schema"]
        if schema != SCHEMA:
            newer = "; it is of a newer cyflash" if isinstance(schema, int) and schema > SCHEMA else ""
            raise ValueError(f"expected schema {SCHEMA}, got {schema!r}{newer}")
        settings = about["settings"]
        layers = {name: _layer(name, one, settings, left) for name, one in about["layers"].items()}
        if left:
            raise ValueError(f"unknown tensor {min(left)!r}")
        if metadata.get("sha256") != _digest(text, tensors):
            raise ValueError("damaged: its contents are not those that its sha256 was taken of")
        return settings, layers
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def _digest(text, tensors):
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\n{name} {x.dtype} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()


def _filled(x):
    """(first, end) of the columns that are not all 0."""
    filled = np.flatnonzero(x.any(axis=0))
    return (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)


def _layer(name, about, settings, tensors):
    """A Layer from its metadata and its tensors, which are taken out of `tensors`."""
    shape = Shape(*about["shape"])  # which tensors have to show, before anything is as large as it says
    for part in PARTS:
        if tensors[f"{name}/{part}/top"].shape != (shape.H if part == "q" else shape.Hk,):
            raise ValueError(f"{name}/{part}/top: expected one for each head of {shape}")
    if tensors[f"{name}/k_sum"].shape != (WORDS, shape.Hk, shape.D):
        raise ValueError(f"{name}/k_sum: expected sums for {shape}, got shape {tensors[f'{name}/k_sum'].shape}")
    layer = Layer(shape, about["options"], settings["fp32_sinks"], settings["reservoir_mb"] * 1e6)
    for counter in COUNTERS:
        setattr(layer, counter, about[counter])
    for part in PARTS:
        counts = layer.counts[part]
        for kind, x in (("counts", counts.counts), ("sums", counts.sums)):
            key = f"{name}/{part}/{kind}"
            begin = about["first"][f"{part}/{kind}"]
            columns = tensors[key].shape[-1]
            if not 0 <= begin <= begin + columns <= x.shape[1]:
                raise ValueError(f"{key}: expected columns within {x.shape[1]}, got {begin} to {begin + columns}")
            _take(tensors, key, x[:, begin : begin + columns])
            if (x < 0).any():
                raise ValueError(f"{key}: expected counts of at least 0")
        _take(tensors, f"{name}/{part}/top", counts.top)
        if part in layer.rest:
            _take(tensors, f"{name}/{part}/rest", layer.rest[part])
        if not (np.isfinite(counts.top) & (counts.top >= 0)).all():
            raise ValueError(f"{name}/{part}/top: expected finite values of at least 0")
    words = _as_words(layer.k_sum)
    _take(tensors, f"{name}/k_sum", words)
    layer.k_sum = _from_words(words)
    _take(tensors, f"{name}/k_tokens", layer.k_tokens)
    tiles = {key: _tile(f"{name}/tile/{key}", one, layer, tensors) for key, one in about["tiles"].items()}
    layer.reservoir.add(tiles, about["end"])
    if list(layer.reservoir.tiles) != sorted(tiles):
        raise ValueError(f"{name}: expected tiles that fit {layer.reservoir.limit / 1e6:g} MB")
    return layer


def _take(tensors, key, out):
    x = tensors.pop(key)
    if x.shape != out.shape or x.dtype != out.dtype:
        raise ValueError(f"{key}: expected {out.dtype} {out.shape}, got {x.dtype} {x.shape}")
    out[...] = x


def _as_words(x):
    """Python's integers as int64 (WORDS, ...): 32 bits in each but the last, which has the sign."""
    low = [(x >> 32 * i) & 0xFFFFFFFF for i in range(WORDS - 1)]
    return np.stack([*low, x >> 32 * (WORDS - 1)]).astype(np.int64)


def _from_words(words):
    return sum(word.astype(object) << 32 * i for i, word in enumerate(words))


def _tile(prefix, about, layer, tensors):
    H, Hk, D, Dv = layer.shape
    arrays = {part: tensors.pop(f"{prefix}/{part}") for part in about["arrays"]}
    q, k, v = (arrays.pop(part) for part in "qkv")
    R, T = q.shape[1:2], k.shape[1:2]
    for part, x, shape in (("q", q, (H, *R, D)), ("k", k, (Hk, *T, D)), ("v", v, (Hk, *T, Dv))):
        if x.shape != shape or x.dtype != np.float32 or not np.isfinite(x).all():
            raise ValueError(f"{prefix}/{part}: expected finite float32 {shape}, got {x.dtype} {x.shape}")
    for option, x in arrays.items():
        if option not in ("bias", "mask") or np.broadcast_shapes(x.shape, (H, *R, *T)) != (H, *R, *T):
            raise ValueError(f"{prefix}/{option}: expected a bias or a mask for {(H, *R, *T)}, got {x.shape}")
    return Tile(q, k, v, as_arguments(layer.options) | {"causal_align": about["causal_align"]} | arrays)
