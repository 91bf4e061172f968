"""A program of a user, for mypy: never run. Each type is what the documentation says."""

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import cyflash
from cyflash import quant
from cyflash.annotations import Array, ArrayT

Floats = NDArray[np.float32]


class Tensor:
    """Of another library: what comes in comes out."""

    shape: tuple[int, ...]
    dtype: object


def attention(q: Floats, k: Floats, v: Floats, both: bool) -> None:
    assert_type(cyflash.flash_attention(q, k, v, causal=True, window=(127, 0)), Floats)
    assert_type(cyflash.flash_attention(q, k, v, return_lse=True), tuple[Floats, Floats])
    assert_type(cyflash.flash_attention(q, k, v, return_lse=both), Floats | tuple[Floats, Floats])
    assert_type(cyflash.flash_attention_varlen(q, k, v, [0, 3], [0, 3]), Floats)
    assert_type(cyflash.scaled_dot_product_attention(q, k, v, is_causal=True), Floats)
    assert_type(cyflash.reference.attention(q, k, v), NDArray[np.float64])
    out, lse = cyflash.flash_attention(q, k, v, return_lse=True)
    assert_type(cyflash.merge_states(out, lse, out, lse), tuple[Floats, Floats])


def int8(q: Floats, k: Floats, v: Floats) -> None:
    k8 = cyflash.quantize(k, "token", smooth=True)
    assert_type(k8, cyflash.QuantizedTensor)
    assert_type(k8.shape, tuple[int, ...])
    assert_type(k8.dequantize(), Floats)
    assert_type(cyflash.flash_attention_int8(q, k8, v, granularity=("token", "head", "token"), pv="bf16"), Floats)
    assert_type(cyflash.flash_attention_int8(k8, k8, v), Floats)


def other_library(q: Tensor, k: Tensor, v: Floats) -> None:
    assert_type(cyflash.flash_attention(q, k, v), Tensor)
    assert_type(cyflash.flash_attention_int8(q, k, v, return_lse=True), tuple[Tensor, Tensor])


def generic(q: ArrayT, kv: Array) -> ArrayT:
    return cyflash.flash_attention(q, kv, kv)


def caches(q: Floats, k: Floats, v: Floats) -> None:
    cache = cyflash.KVCache(2, 2, 64, 4096, "int8", window=(1023, 0))
    assert_type(cyflash.flash_attention_with_kvcache(q, cache, k, v, lengths=[3, 4]), Floats)
    pages = cyflash.PagedKVCache(pages=8, page_size=64, kv_heads=2, head_dim=64)
    assert_type(pages.fork(pages.add()), int)
    assert_type(cache.lengths, NDArray[np.int64])
    assert_type(cyflash.KVCache.load("x.safetensors"), cyflash.KVCache)


def engine(q: Floats, k: Floats, v: Floats) -> None:
    config = cyflash.FlashAttentionConfig.auto(head_dim=64, seq_len=4096).with_causal(True)
    assert_type(config, cyflash.FlashAttentionConfig)
    result = cyflash.FlashAttention(config).forward_multi_head(q, k, v)
    assert_type(result.flops, int)
    with cyflash.set_implementation("avx2"):
        assert_type(cyflash.cpu_info(), dict[str, Any])
    assert_type(cyflash.gpu_status().available, bool)


def calibration(q: Floats, k: Floats, v: Floats) -> None:
    calibrator = quant.Calibrator(granularity="head")
    calibrator.observe("layer0", q, k, v, causal=True)
    scales = calibrator.merge(quant.Calibrator()).compute("percentile", percentile=99.9)
    assert_type(scales, quant.Scales)
    assert_type(scales["layer0"], cyflash.LayerScales)
    assert_type(cyflash.flash_attention_int8(q, k, v, quant=scales["layer0"]), Floats)
    assert_type(quant.compare(q, q).rel_l1, float)
    for row in quant.evaluate(q, k, v, schemes=["int8*"]):
        assert_type(row, dict[str, Any])


def mistakes(q: Floats, k: Floats, v: Floats) -> None:
    cyflash.flash_attention(q, k, v, causal_align="left")  # type: ignore[call-overload]
    cyflash.flash_attention(q, k, v, windw=(3, 0))  # type: ignore[call-overload]
    cyflash.flash_attention(q, k)  # type: ignore[call-overload]
    cyflash.flash_attention(3.0, k, v)  # type: ignore[call-overload]
    cyflash.quantize(q, "row")  # type: ignore[arg-type]
    cyflash.FlashAttentionConfig(head_dim="64")  # type: ignore[arg-type]
    quant.Calibrator().compute("best")  # type: ignore[arg-type]
