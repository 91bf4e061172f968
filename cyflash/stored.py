"""Keys and values as the kernels read them: in pages.

Key j of a sequence is row j % page_size of page `table[sequence][j // page_size]`. A dense array is one page for each
sequence; sequences that lie one after another are pages that begin at their first tokens.
"""
from typing import NamedTuple

import numpy as np

# Pages and packed arrays hold a multiple of so many keys, and so whole groups of those that a kernel reads together.
KEYS_UNIT = 16


class Stored(NamedTuple):
    """What the pages hold; the table and the lengths of the sequences are passed beside it."""

    kind: str  # of keys: "fp32", "fp16", "bf16" or "int8"
    page_size: int | None  # a multiple of KEYS_UNIT; None: each sequence is one page
    # (pages, Hk, page_size, D), the last axis contiguous; int8: D rounded up to 4, with 0 beyond D, pages contiguous
    k: np.ndarray
    # (pages, Hk, page_size, Dv); int8: int32 (pages, Hk, page_size // 4, Dv rounded up to 16), with 0 beyond Dv: byte i
    # of a word is the code of key 4 g + i
    v: np.ndarray
    D: int
    Dv: int
    v_kind: str  # as `kind`, which it can differ from
    # The rest is for int8 only. Scales, the finite numbers of tokens that are not there included: float32
    # (pages, Hk, page_size), or (sequences or 1, Hk, 1) where there is one for each head.
    k_correction: np.ndarray | None = None  # int32 (pages, Hk, page_size), -128 times the sum of each key's codes
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None  # where values are codes
    k_mean: np.ndarray | None = None  # float32 (sequences or 1, Hk, D), subtracted from the keys
    fp32_sinks: int = 0  # so many first keys of each sequence are in float32 ...
    float_k: np.ndarray | None = None  # ... here, (sequences, Hk, at least fp32_sinks, D)
    float_v: np.ndarray | None = None  # ... and here, (sequences, Hk, at least fp32_sinks, Dv)
