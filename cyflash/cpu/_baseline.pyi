"""What every SIMD build has: the same kernel, compiled for other instructions (driver.pxi and what it includes)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cyflash.quantized import Encoding

KINDS: dict[str, int]
SHAPE: dict[str, int]
PACKINGS: dict[str | None, int]

def forward(
    q: NDArray[Any] | None,
    q_kind: str,
    stored: Any,
    sequences: NDArray[np.intp],
    pages: NDArray[np.intp],
    codes: Any,
    out: NDArray[Any],
    out_kind: str,
    lse: NDArray[np.float32] | None,
    options: Any,
    ragged: bool,
    native: bool,
    Br: int,
    Bc: int,
    threads: int,
) -> tuple[int, int]: ...
def tile_bytes(
    Br: int,
    Bc: int,
    D: int,
    Dv: int,
    k_kind: str = "fp32",
    v_kind: str = "fp32",
    product: str = "fp32",
    precise: int = 0,
    native: bool = False,
    page_size: int | None = None,
) -> int: ...
def find_range(
    x: NDArray[Any], skip: int, smooth: bool, mean: NDArray[np.float32] | None, top: NDArray[np.float32], threads: int
) -> bool: ...
def encode(encodings: Sequence[Encoding], threads: int) -> list[int]: ...
def pack_keys(
    codes: NDArray[np.int8],
    k: NDArray[np.int8],
    correction: NDArray[np.int32],
    table: NDArray[np.intp],
    begin: NDArray[np.intp],
    count: NDArray[np.intp],
    threads: int,
) -> None: ...
def pack_values(
    codes: NDArray[np.int8],
    v: NDArray[np.int32],
    table: NDArray[np.intp],
    begin: NDArray[np.intp],
    count: NDArray[np.intp],
    threads: int,
) -> None: ...
def store_floats(
    x: NDArray[np.uint8],
    x_kind: str,
    pool: NDArray[np.uint8],
    pool_kind: str,
    table: NDArray[np.intp],
    begin: NDArray[np.intp],
    count: NDArray[np.intp],
    threads: int,
) -> None: ...

# For tests and `cyflash bench`.
def integer_scores(q: NDArray[np.int8], k: NDArray[np.int8], few: bool = False) -> NDArray[np.float32]: ...
def integer_values(p: NDArray[np.uint8], v: NDArray[np.int8], few: bool = False) -> NDArray[np.float32]: ...
def load_bits(x: NDArray[np.uint16], out: NDArray[np.float32], kind: str) -> None: ...
def store_bits(x: NDArray[np.float32], out: NDArray[np.uint16], kind: str) -> None: ...
def elementary(name: str, x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...
def fma_rate(seconds: float) -> float: ...
def dot_rate(seconds: float) -> float: ...
def read_words(x: NDArray[np.int32], threads: int) -> int: ...
