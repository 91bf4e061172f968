"""Types of the specification's public names."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from cyflash import LayerScales, QuantizedTensor
from cyflash.annotations import Align, Array, Granularity, Product, Scale

__all__ = ["attention", "attention_int8"]

@overload
def attention(
    q: Array, k: Array, v: Array, *, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[False] = False,
) -> NDArray[np.float64]: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: Literal[True],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, causal: bool | None = None, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None, return_lse: bool = False,
) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def attention_int8(
    q: Array | QuantizedTensor, k: Array | QuantizedTensor, v: Array | QuantizedTensor, *,
    q_scale: Scale | None = None, k_scale: Scale | None = None, v_scale: Scale | None = None,
    granularity: Granularity | Sequence[Granularity] | None = None, smooth_k: bool | None = None,
    fp32_sinks: int | None = None, pv: Product | None = None, quant: LayerScales | None = None, block_size: int = 256,
    return_lse: bool = False, return_codes: bool = False, **options: Any,
) -> Any: ...

# Shared with reference_int8.py.

class Head(NamedTuple):
    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    distance: NDArray[Any]
    visible: NDArray[Any]
    scale: float
    softcap: float
    bias: NDArray[Any]
    slope: float
    sink: float

def heads(
    q: Array, k: Array, v: Array, *, causal: bool = False, causal_align: Align = "bottom-right",
    scale: float | None = None, window: tuple[int, int] | None = None, softcap: float = 0.0,
    bias: Array | None = None, mask: Array | None = None, alibi_slopes: Array | Sequence[float] | None = None,
    sinks: Array | Sequence[float] | None = None,
) -> Iterator[tuple[int, int, Head]]: ...
def head_scores(head: Head, products: NDArray[Any] | None = None) -> NDArray[Any]: ...
def softmax(scores: NDArray[Any], sink: float = ...) -> tuple[NDArray[Any], NDArray[Any]]: ...
def weighted_sum(weights: NDArray[Any], seen: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]: ...
