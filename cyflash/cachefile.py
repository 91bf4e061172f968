"""A cache in one .safetensors file: KVCache.save and KVCache.load.

Options are JSON in the metadata. Tensors are the pages in use, as they are in memory; the rows' tables, which number
these pages, so that rows that share them do so after loading as well; and what each row has beside them. Nothing of it
depends on the machine or the SIMD build. A sha256 over all of it makes damage an error.
"""
import hashlib
import json

import numpy as np

from cyflash.files import parsed_json, read_safetensors, safetensors_path, write_safetensors
from cyflash.quantized import LayerScales
from cyflash.stored import KEYS_UNIT
from cyflash.storing import checked_count, format_of


def write(cache, path):
    """Save `cache`; returns the path."""
    path = safetensors_path(path)
    rows, pool = cache._rows, cache._rows.pool
    used = np.flatnonzero(pool.references)
    number = np.full(pool.pages + 1, -1)  # of each page in the file; -1 stays -1
    number[used] = np.arange(len(used))
    tensors = {"live": cache._live, "lengths": rows.lengths.astype(np.int64), "first": rows.first.astype(np.int64)}
    tensors["table"] = number[rows.table[:, : rows.width]].astype(np.int64)
    unused = ~rows.places()[used]
    for name, x in pool.arrays.items():
        x = x[used]
        cache._format.clear(name, x, unused)  # tokens that were forgotten are not in the file
        tensors[f"pages.{name}"] = _as_saved(x)
    for name, x in cache._by_row.items():
        token = np.arange(x.shape[2])
        kept = (token >= rows.first[:, None]) & (token < rows.lengths[:, None])
        tensors[f"rows.{name}"] = np.where(kept[:, None, :, None], x, np.float32(0))
    tensors |= {f"constants.{name}": x for name, x in cache._format.constants().items()}
    text = json.dumps(_options(cache))
    metadata = {"format": _format(type(cache)), "cache": text, "sha256": _digest(text, tensors)}
    write_safetensors(path, tensors, metadata)
    return path


def read(cls, path):
    """The cache of class `cls` that was saved; ValueError for another file."""
    metadata, tensors = read_safetensors(path, _format(cls), f"{cls.__name__}.save")
    try:
        if metadata["sha256"] != _digest(metadata["cache"], tensors):
            raise ValueError("damaged: its contents are not those that its sha256 was taken of")
        return _restored(cls, parsed_json(metadata["cache"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file as {cls.__name__}.save writes it: {error}") from None
    except MemoryError as error:
        raise MemoryError(f"{path}: a cache for which there is no memory: {error}") from None


def _digest(text, tensors):
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\n{name} {x.dtype.str} {x.shape}\n".encode())
        digest.update(x.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _format(cls):
    return f"cyflash.{cls.__name__}"


def _options(cache):
    how = cache._format
    return {
        "kv_heads": how.kv_heads, "head_dim": how.D, "v_head_dim": how.Dv, "dtype": how.dtype.name,
        "fp32_sinks": how.fp32_sinks, "pv": how.pv, "page_size": cache.page_size, "pages": cache._rows.pool.pages,
        "capacity": cache.capacity, "left": cache._left, "grows": cache._grows,
    }  # fmt: skip


def _restored(cls, options, tensors):
    how = options | {name: checked_count(name, options[name]) for name in ("page_size", "pages", "capacity")}
    if how["left"] is not None:
        checked_count("left", how["left"], 0)
    if how["page_size"] % KEYS_UNIT or not isinstance(how["grows"], bool):
        raise ValueError(f"page_size, grows: expected a multiple of {KEYS_UNIT} and a bool, got {options}")
    quant = None
    if how["dtype"] == "int8":
        quant = LayerScales(
            **{name: tensors.get(f"constants.{name}") for name in ("q_scale", "k_scale", "v_scale", "k_mean")},
            fp32_sinks=how["fp32_sinks"], pv=how["pv"],
        )
    if tensors["pages.k"].shape[1:2] != (how["kv_heads"],):  # before anything is as large as it says
        raise ValueError(f"pages.k: expected {how['kv_heads']} kv heads, got shape {tensors['pages.k'].shape}")
    cache = cls.__new__(cls)
    kept = format_of(how["kv_heads"], how["head_dim"], how["v_head_dim"], how["dtype"], quant=quant)
    n = len(tensors["live"])
    for kind, shapes in (("pages", kept.page_shapes(how["page_size"])), ("rows", kept.row_shapes())):
        for name, (shape, _) in shapes.items():
            if tensors[f"{kind}.{name}"].shape[1:] != shape:
                raise ValueError(f"{kind}.{name}: expected {shape} in each, got {tensors[f'{kind}.{name}'].shape}")
    cache._begin(kept, n, how["pages"], how["page_size"], how["capacity"], how["left"], how["grows"])
    rows, pool = cache._rows, cache._rows.pool
    _fill("live", cache._live, tensors)
    _fill("lengths", rows.lengths, tensors)
    _fill("first", rows.first, tensors)
    for name, x in cache._by_row.items():
        _fill(f"rows.{name}", x, tensors)
    used = len(tensors["pages.k"])
    for name, x in pool.arrays.items():
        _fill(f"pages.{name}", x[:used], tensors)
    rows.restore(tensors["table"], used)
    cache._rows_changed()
    return cache


def _as_saved(x):
    """bfloat16 as the integers of its bits: not every reader of these files knows it."""
    return x.view(np.uint16) if x.dtype.name == "bfloat16" else x


def _fill(name, x, tensors):
    """x = the tensor of that name, which has x's shape and dtype."""
    saved, x = tensors[name], _as_saved(x)
    if saved.shape != x.shape or saved.dtype != x.dtype:
        raise ValueError(f"{name}: expected {x.dtype.name} {x.shape}, got {saved.dtype.name} {saved.shape}")
    x[...] = saved
