"""Everything that reads a file which somebody else may have made, and a small valid file for each."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cyflash import KVCache, LayerScales, PagedKVCache, QuantizedTensor, observing, quantize
from cyflash.capture import load_capture, save_capture
from cyflash.quant import Calibrator, Scales


class Reader(NamedTuple):
    make: Callable  # path -> writes the file
    read: Callable  # path -> reads all of it
    name: str = "x.safetensors"
    absent: bool = False  # whether no file is as good as an empty one
    packed: bool = False  # whether the file is compressed
    text: str | None = None  # the key of the metadata whose JSON the sha256 covers


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _scales(path):
    planned = LayerScales(parts=[([0], LayerScales(0.1, 0.2, 0.3)), ([1], None)])
    Scales({"a": LayerScales(0.1, 0.2, 0.3, k_mean=[0.5, 1.0]), "b": planned}, settings={"n": 1}).save(path)


def _cache(dtype, **settings):
    def make(path):
        cache = KVCache(2, 1, 4, 20, dtype, **settings)
        cache.append(normal(2, 1, 5, 4), normal(2, 1, 5, 4), lengths=[5, 3])
        cache.save(path)
    return make


def _paged(path):
    cache = PagedKVCache(4, 16, 1, 4)
    for _ in range(2):
        cache.add()
    cache.append(normal(2, 1, 5, 4), normal(2, 1, 5, 4), lengths=[5, 3])
    cache.fork(0)
    cache.save(path)


def _calibrator(path):
    calibrator = Calibrator(reservoir_mb=0.01)
    calibrator.observe("a", normal(2, 8, 4), normal(1, 8, 4), normal(1, 8, 4), causal=True)
    calibrator.save(path)


HOW = observing.How({"granularity": "tensor"}, "bhld", {})


def _observations(path):
    one = observing.Observations(path, HOW)
    calibrator = Calibrator(**HOW.settings)
    calibrator.observe("a", normal(1, 8, 4), normal(1, 8, 4), normal(1, 8, 4))
    one.take(calibrator, {"name": "x", "size": 3, "sha256": "0"})


def _capture(path):
    save_capture(path, {"a": (normal(2, 3, 4), normal(1, 3, 4), normal(1, 3, 4))}, causal=True, sinks=[0.5, 1.0])


def _packed(path):
    q, k, v = normal(2, 3, 4), normal(1, 3, 4), normal(1, 3, 4)
    np.savez_compressed(path, q=q, k=k, v=v, options=np.array(json.dumps({"causal": True})))


def _vllm(folder):
    Scales({"model.layers.0.attn": LayerScales(0.1, 0.2, 0.3)}).to_vllm(folder)


def read_vllm(path):
    """path: one of the files of a folder, which is read whole."""
    return Scales.from_vllm(Path(path).parent)


def _vllm_file(name):
    def make(path):
        folder = Path(path).parent
        _vllm(folder)
        if name == "model.safetensors.index.json":
            weights = {f"model.layers.0.attn.{x}_scale": "kv_cache_scales.safetensors" for x in "qkv"}
            (folder / name).write_text(json.dumps({"weight_map": weights}))
    return make


READERS = {
    "Scales": Reader(_scales, Scales.load, text="scales"),
    "QuantizedTensor": Reader(
        lambda path: quantize(normal(2, 3, 4), "token", smooth=True, fp32_sinks=1).save(path), QuantizedTensor.load),
    "Calibrator": Reader(_calibrator, Calibrator.load, text="calibrator"),
    "KVCache": Reader(_cache("float32"), KVCache.load, text="cache"),
    "KVCache of codes": Reader(_cache("int8", fp32_sinks=2, k_mean=normal(1, 1, 4)), KVCache.load, text="cache"),
    "KVCache in a window": Reader(_cache("bfloat16", window=(4, 0)), KVCache.load, text="cache"),
    "PagedKVCache": Reader(_paged, PagedKVCache.load, text="cache"),
    "observations": Reader(_observations, lambda path: observing.Observations.resume(Path(path), HOW),
                           absent=True),
    "capture": Reader(_capture, lambda path: list(load_capture(path).values())),
    "capture in .npz": Reader(_capture, lambda path: list(load_capture(path).values()), "x.npz"),
    "packed .npz": Reader(_packed, lambda path: list(load_capture(path).values()), "x.npz", packed=True),
    "vLLM's scales": Reader(
        _vllm_file("kv_cache_scales.safetensors"), read_vllm, "kv_cache_scales.safetensors"),
    "vLLM's config": Reader(_vllm_file("config.json"), read_vllm, "config.json"),
    "vLLM's index": Reader(
        _vllm_file("model.safetensors.index.json"), read_vllm, "model.safetensors.index.json", absent=True),
}
