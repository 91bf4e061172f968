"""Types of the public names. What is defined elsewhere has its signature here once more, which the tests compare."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from cyflash import reference as reference
from cyflash.annotations import Align, Array, ArrayT, Granularity, Product, Scale
from cyflash.gpu.status import GPUStatus

__version__: str
__all__ = [
    "FlashAttention",
    "FlashAttentionConfig",
    "FlashAttentionOutput",
    "GPUUnavailableError",
    "KVCache",
    "LayerScales",
    "MemorySavings",
    "PagedKVCache",
    "QuantizedTensor",
    "cpu_info",
    "flash_attention",
    "flash_attention_int8",
    "flash_attention_int8_varlen",
    "flash_attention_varlen",
    "flash_attention_with_kvcache",
    "gpu_status",
    "merge_states",
    "quantize",
    "reference",
    "scaled_dot_product_attention",
    "set_implementation",
    "set_num_threads",
]

@overload
def flash_attention(
    q: ArrayT, k: Array, v: Array, *, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, dropout_p: float | None = None, seed: int | None = None,
    return_lse: Literal[False] = False, out: Array | None = None, config: FlashAttentionConfig | None = None,
    num_threads: int | None = None,
) -> ArrayT: ...
@overload
def flash_attention(
    q: ArrayT, k: Array, v: Array, *, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, dropout_p: float | None = None, seed: int | None = None,
    return_lse: Literal[True], out: Array | None = None, config: FlashAttentionConfig | None = None,
    num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention(
    q: ArrayT, k: Array, v: Array, *, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, dropout_p: float | None = None, seed: int | None = None,
    return_lse: bool = False, out: Array | None = None, config: FlashAttentionConfig | None = None,
    num_threads: int | None = None,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention_int8(
    q: ArrayT, k: Array | QuantizedTensor, v: Array | QuantizedTensor, *, q_scale: Scale | None = None,
    k_scale: Scale | None = None, v_scale: Scale | None = None,
    granularity: Granularity | Sequence[Granularity] | None = None, smooth_k: bool | None = None,
    fp32_sinks: int | None = None, pv: Product | None = None, quant: LayerScales | None = None,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[False] = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> ArrayT: ...
@overload
def flash_attention_int8(
    q: ArrayT, k: Array | QuantizedTensor, v: Array | QuantizedTensor, *, q_scale: Scale | None = None,
    k_scale: Scale | None = None, v_scale: Scale | None = None,
    granularity: Granularity | Sequence[Granularity] | None = None, smooth_k: bool | None = None,
    fp32_sinks: int | None = None, pv: Product | None = None, quant: LayerScales | None = None,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[True], out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention_int8(
    q: ArrayT, k: Array | QuantizedTensor, v: Array | QuantizedTensor, *, q_scale: Scale | None = None,
    k_scale: Scale | None = None, v_scale: Scale | None = None,
    granularity: Granularity | Sequence[Granularity] | None = None, smooth_k: bool | None = None,
    fp32_sinks: int | None = None, pv: Product | None = None, quant: LayerScales | None = None,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: bool = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention_int8(
    q: QuantizedTensor, k: Array | QuantizedTensor, v: Array | QuantizedTensor, *, q_scale: Scale | None = None,
    k_scale: Scale | None = None, v_scale: Scale | None = None,
    granularity: Granularity | Sequence[Granularity] | None = None, smooth_k: bool | None = None,
    fp32_sinks: int | None = None, pv: Product | None = None, quant: LayerScales | None = None,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[False] = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> NDArray[np.float32]: ...
@overload
def flash_attention_int8(
    q: QuantizedTensor, k: Array | QuantizedTensor, v: Array | QuantizedTensor, *, q_scale: Scale | None = None,
    k_scale: Scale | None = None, v_scale: Scale | None = None,
    granularity: Granularity | Sequence[Granularity] | None = None, smooth_k: bool | None = None,
    fp32_sinks: int | None = None, pv: Product | None = None, quant: LayerScales | None = None,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[True], out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
@overload
def flash_attention_int8(
    q: QuantizedTensor, k: Array | QuantizedTensor, v: Array | QuantizedTensor, *, q_scale: Scale | None = None,
    k_scale: Scale | None = None, v_scale: Scale | None = None,
    granularity: Granularity | Sequence[Granularity] | None = None, smooth_k: bool | None = None,
    fp32_sinks: int | None = None, pv: Product | None = None, quant: LayerScales | None = None,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: bool = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]: ...
@overload
def flash_attention_varlen(
    q: ArrayT, k: Array, v: Array, cu_seqlens_q: Array | Sequence[int], cu_seqlens_k: Array | Sequence[int], *,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[False] = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> ArrayT: ...
@overload
def flash_attention_varlen(
    q: ArrayT, k: Array, v: Array, cu_seqlens_q: Array | Sequence[int], cu_seqlens_k: Array | Sequence[int], *,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[True], out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention_varlen(
    q: ArrayT, k: Array, v: Array, cu_seqlens_q: Array | Sequence[int], cu_seqlens_k: Array | Sequence[int], *,
    causal: bool | None = None, causal_align: Align = "bottom-right", scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float = 0.0, bias: Array | None = None,
    mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: bool = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention_int8_varlen(
    q: ArrayT, k: Array | QuantizedTensor, v: Array | QuantizedTensor, cu_seqlens_q: Array | Sequence[int],
    cu_seqlens_k: Array | Sequence[int], *, q_scale: Scale | None = None, k_scale: Scale | None = None,
    v_scale: Scale | None = None, granularity: Granularity | Sequence[Granularity] | None = None,
    smooth_k: bool | None = None, fp32_sinks: int | None = None, pv: Product | None = None,
    quant: LayerScales | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[False] = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> ArrayT: ...
@overload
def flash_attention_int8_varlen(
    q: ArrayT, k: Array | QuantizedTensor, v: Array | QuantizedTensor, cu_seqlens_q: Array | Sequence[int],
    cu_seqlens_k: Array | Sequence[int], *, q_scale: Scale | None = None, k_scale: Scale | None = None,
    v_scale: Scale | None = None, granularity: Granularity | Sequence[Granularity] | None = None,
    smooth_k: bool | None = None, fp32_sinks: int | None = None, pv: Product | None = None,
    quant: LayerScales | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[True], out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention_int8_varlen(
    q: ArrayT, k: Array | QuantizedTensor, v: Array | QuantizedTensor, cu_seqlens_q: Array | Sequence[int],
    cu_seqlens_k: Array | Sequence[int], *, q_scale: Scale | None = None, k_scale: Scale | None = None,
    v_scale: Scale | None = None, granularity: Granularity | Sequence[Granularity] | None = None,
    smooth_k: bool | None = None, fp32_sinks: int | None = None, pv: Product | None = None,
    quant: LayerScales | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: bool = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention_int8_varlen(
    q: QuantizedTensor, k: Array | QuantizedTensor, v: Array | QuantizedTensor, cu_seqlens_q: Array | Sequence[int],
    cu_seqlens_k: Array | Sequence[int], *, q_scale: Scale | None = None, k_scale: Scale | None = None,
    v_scale: Scale | None = None, granularity: Granularity | Sequence[Granularity] | None = None,
    smooth_k: bool | None = None, fp32_sinks: int | None = None, pv: Product | None = None,
    quant: LayerScales | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[False] = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> NDArray[np.float32]: ...
@overload
def flash_attention_int8_varlen(
    q: QuantizedTensor, k: Array | QuantizedTensor, v: Array | QuantizedTensor, cu_seqlens_q: Array | Sequence[int],
    cu_seqlens_k: Array | Sequence[int], *, q_scale: Scale | None = None, k_scale: Scale | None = None,
    v_scale: Scale | None = None, granularity: Granularity | Sequence[Granularity] | None = None,
    smooth_k: bool | None = None, fp32_sinks: int | None = None, pv: Product | None = None,
    quant: LayerScales | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[True], out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
@overload
def flash_attention_int8_varlen(
    q: QuantizedTensor, k: Array | QuantizedTensor, v: Array | QuantizedTensor, cu_seqlens_q: Array | Sequence[int],
    cu_seqlens_k: Array | Sequence[int], *, q_scale: Scale | None = None, k_scale: Scale | None = None,
    v_scale: Scale | None = None, granularity: Granularity | Sequence[Granularity] | None = None,
    smooth_k: bool | None = None, fp32_sinks: int | None = None, pv: Product | None = None,
    quant: LayerScales | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: bool = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]: ...
@overload
def flash_attention_with_kvcache(
    q: ArrayT, cache: KVCache, k: Array | None = None, v: Array | None = None, *,
    rows: Array | Sequence[int] | None = None, lengths: Array | Sequence[int] | None = None,
    pv: Product | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[False] = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> ArrayT: ...
@overload
def flash_attention_with_kvcache(
    q: ArrayT, cache: KVCache, k: Array | None = None, v: Array | None = None, *,
    rows: Array | Sequence[int] | None = None, lengths: Array | Sequence[int] | None = None,
    pv: Product | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[True], out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def flash_attention_with_kvcache(
    q: ArrayT, cache: KVCache, k: Array | None = None, v: Array | None = None, *,
    rows: Array | Sequence[int] | None = None, lengths: Array | Sequence[int] | None = None,
    pv: Product | None = None, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: bool = False, out: Array | None = None,
    config: FlashAttentionConfig | None = None, num_threads: int | None = None,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
def merge_states(
    out_a: ArrayT, lse_a: ArrayT, out_b: ArrayT, lse_b: ArrayT, *, lse_base: Literal["e", 2] = "e"
) -> tuple[ArrayT, ArrayT]: ...
def scaled_dot_product_attention(
    query: ArrayT,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ArrayT: ...
def quantize(
    x: Array,
    granularity: Granularity = "tensor",
    *,
    scale: Scale | None = None,
    smooth: bool = False,
    fp32_sinks: int = 0,
) -> QuantizedTensor: ...
def cpu_info() -> dict[str, Any]: ...
def gpu_status() -> GPUStatus: ...
def set_implementation(name: str | None) -> AbstractContextManager[None]: ...
def set_num_threads(n: int | None) -> None: ...

class GPUUnavailableError(RuntimeError): ...

@dataclass(frozen=True)
class FlashAttentionConfig:
    head_dim: int = 64
    num_heads: int = 8
    block_size_q: int = 64
    block_size_kv: int = 64
    causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    @classmethod
    def new(cls, head_dim: int, num_heads: int) -> Self: ...
    @classmethod
    def for_head_dim(cls, head_dim: int) -> Self: ...
    @classmethod
    def for_long_sequence(cls, head_dim: int) -> Self: ...
    @classmethod
    def auto(
        cls,
        head_dim: int,
        num_heads: int = 8,
        *,
        seq_len: int | None = None,
        precision: Literal["fp32", "bf16", "int8"] = "fp32",
    ) -> Self: ...
    def with_causal(self, causal: bool) -> Self: ...
    def with_dropout(self, dropout_p: float) -> Self: ...
    def softmax_scale(self) -> float: ...

@dataclass(frozen=True)
class FlashAttention:
    config: FlashAttentionConfig
    def forward(self, q: Array, k: Array, v: Array, **options: Any) -> FlashAttentionOutput: ...
    def forward_multi_head(self, q: Array, k: Array, v: Array, **options: Any) -> FlashAttentionOutput: ...
    def memory_savings(self, seq_len: int) -> MemorySavings: ...

@dataclass(frozen=True, eq=False)
class FlashAttentionOutput:
    output: Any
    logsumexp: Any
    flops: int
    peak_tile_bytes: int
    block_size_q: int
    block_size_kv: int
    implementation: str

@dataclass(frozen=True)
class MemorySavings:
    naive_bytes: int
    flash_bytes: int
    reduction_factor: float
    seq_len: int

@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    data: NDArray[np.int8]
    scale: NDArray[np.float32]
    mean: NDArray[np.float32] | None = None
    fp32_rows: NDArray[np.float32] | None = None
    granularity: str | None = None
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def dequantize(self) -> NDArray[np.float32]: ...
    def save(self, path: str | PathLike[str]) -> Any: ...
    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self: ...

@dataclass(frozen=True, eq=False)
class LayerScales:
    q_scale: Any = None
    k_scale: Any = None
    v_scale: Any = None
    k_mean: Any = field(default=None, kw_only=True)
    fp32_sinks: int = field(default=0, kw_only=True)
    pv: str = field(default="int8", kw_only=True)
    parts: tuple[Any, ...] | None = field(default=None, kw_only=True)

class KVCache:
    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: object = "float32",
        *,
        v_head_dim: int | None = None,
        granularity: Granularity | Sequence[Granularity] = "token",
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        k_mean: Array | None = None,
        quant: LayerScales | None = None,
        fp32_sinks: int = 0,
        window: tuple[int, int] | None = None,
        grow: bool = False,
    ) -> None: ...
    @property
    def lengths(self) -> NDArray[np.int64]: ...
    @property
    def batch(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def window(self) -> tuple[int, int] | None: ...
    @property
    def page_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def append(
        self,
        k: Array,
        v: Array,
        *,
        rows: Array | Sequence[int] | None = None,
        lengths: Array | Sequence[int] | None = None,
    ) -> None: ...
    def truncate(self, lengths: Array | Sequence[int], *, rows: Array | Sequence[int] | None = None) -> None: ...
    def reset(self, *, rows: Array | Sequence[int] | None = None) -> None: ...
    def reorder(self, rows: Array | Sequence[int]) -> None: ...
    def save(self, path: str | PathLike[str]) -> Any: ...
    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self: ...

class PagedKVCache(KVCache):
    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: object = "float32",
        *,
        v_head_dim: int | None = None,
        granularity: Granularity | Sequence[Granularity] = "token",
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        k_mean: Array | None = None,
        quant: LayerScales | None = None,
        fp32_sinks: int = 0,
        window: tuple[int, int] | None = None,
    ) -> None: ...
    @property
    def rows(self) -> NDArray[np.intp]: ...
    @property
    def pages(self) -> int: ...
    @property
    def free_pages(self) -> int: ...
    @property
    def block_table(self) -> NDArray[np.int64]: ...
    def add(self) -> int: ...
    def fork(self, row: int) -> int: ...
    def free(self, row: int) -> None: ...
