"""The engine with a configuration: FlashAttentionConfig (what to compute, in which tiles) and FlashAttention (runs it).

    FlashAttentionConfig --> FlashAttention.forward / .forward_multi_head --> attention.attend --> FlashAttentionOutput
                                            .memory_savings               --> MemorySavings

`flash_attention(..., config=...)` takes the same configuration; a given argument wins over the configuration's field.
"""

import functools
import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cyflash import cpu
from cyflash.cpu import cpu_info
from cyflash.cpu.threads import checked
from cyflash.foreign import as_numpy, same_kind_or_gpu
from cyflash.plan import _real, checked_flag

KIB, MIB = 1024, 1024**2
MOST_ROWS, LEAST_KEYS, MOST_KEYS = 512, 64, cpu.MAX_BLOCK_SIZE_KV  # limits of `FlashAttentionConfig.auto`
# Options of `flash_attention` that the engine sets itself.
TAKEN = {
    "config": "the engine has its own; make another one, FlashAttention(config)",
    "return_lse": "the engine always returns the log-sum-exp, as .logsumexp",
}

__all__ = ["FlashAttention", "FlashAttentionConfig", "FlashAttentionOutput", "MemorySavings"]


@dataclass(frozen=True)
class FlashAttentionConfig:
    """Options of attention that stay the same from call to call. Immutable: `with_*` and `dataclasses.replace` copy.

    Parameters
    ----------
    head_dim : int, default 64
        D, the last axis of q and k.
    num_heads : int, default 8
        H, the query heads; checked by `FlashAttention.forward_multi_head` only.
    block_size_q, block_size_kv : int, default 64
        Query rows and keys of one tile. Rounded up to what the registers of the SIMD build need, to at most 1024 rows
        and 512 keys; the sizes used are in `FlashAttentionOutput`. They change speed and memory, and results only
        within rounding.
    causal : bool, default False
        Each query sees the keys up to its own position.
    scale : float, optional
        Factor on the scores; None is 1/sqrt(head_dim).
    dropout_p : float, default 0.0
        Probability of dropping a weight, in [0, 1). Calls raise NotImplementedError where it is not 0.

    Raises
    ------
    ValueError
        For a field of another type or range; the message names it.

    Examples
    --------
    >>> config = FlashAttentionConfig.new(128, 16).with_causal(True)
    >>> config.causal, round(config.softmax_scale(), 4)
    (True, 0.0884)
    """

    head_dim: int = 64
    num_heads: int = 8
    block_size_q: int = 64
    block_size_kv: int = 64
    causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0

    def __post_init__(self):
        for name in ("head_dim", "num_heads", "block_size_q", "block_size_kv"):
            self._normalise(name, checked)
        self._normalise("causal", checked_flag)
        self._normalise("dropout_p", _real)
        if self.scale is not None:
            self._normalise("scale", _real)
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {self.dropout_p!r}")

    def _normalise(self, name, convert):
        """Check a field, and make NumPy's scalars plain int, float and bool."""
        object.__setattr__(self, name, convert(name, getattr(self, name)))  # how a frozen dataclass sets itself up

    @classmethod
    def new(cls, head_dim, num_heads):
        """Configure for `num_heads` heads of `head_dim`, everything else at its default.

        Parameters
        ----------
        head_dim, num_heads : int

        Returns
        -------
        FlashAttentionConfig

        Examples
        --------
        >>> FlashAttentionConfig.new(128, 16).block_size_q
        64
        """
        return cls(head_dim=head_dim, num_heads=num_heads)

    @classmethod
    def for_head_dim(cls, head_dim):
        """Configure tiles of 64 queries x 64 keys: the usual choice.

        Parameters
        ----------
        head_dim : int

        Returns
        -------
        FlashAttentionConfig
        """
        return cls(head_dim=head_dim, block_size_q=64, block_size_kv=64)

    @classmethod
    def for_long_sequence(cls, head_dim):
        """Configure tiles of 32 queries x 128 keys: longer runs over the keys, smaller state of the queries.

        Parameters
        ----------
        head_dim : int

        Returns
        -------
        FlashAttentionConfig

        Examples
        --------
        >>> config = FlashAttentionConfig.for_long_sequence(64)
        >>> config.block_size_q, config.block_size_kv
        (32, 128)
        """
        return cls(head_dim=head_dim, block_size_q=32, block_size_kv=128)

    @classmethod
    def auto(cls, head_dim, num_heads=8, *, seq_len=None, precision="fp32"):
        """Configure tiles that fit the caches of this machine.

        Parameters
        ----------
        head_dim : int
        num_heads : int, default 8
        seq_len : int, optional
            Queries per head. When given, tiles are not larger than the sequence, and there are enough of them to keep
            every thread busy.
        precision : {"fp32"}, default "fp32"

        Returns
        -------
        FlashAttentionConfig
            With block sizes as they will be used: already rounded for the SIMD build in use.

        Raises
        ------
        NotImplementedError
            For another precision.
        ValueError
            For a count below 1.

        Examples
        --------
        >>> config = FlashAttentionConfig.auto(64, seq_len=4096)
        >>> config.head_dim, config.num_heads
        (64, 8)
        """
        if precision != "fp32":
            raise NotImplementedError(f"precision: {precision!r} is not available; available: 'fp32'")
        D, H = checked("head_dim", head_dim), checked("num_heads", num_heads)
        info = cpu_info()
        most_rows = MOST_ROWS if seq_len is None else _most_rows(checked("seq_len", seq_len), H, info["threads"])
        Br, Bc = _tiles_for_caches(D, info["caches"], most_rows)
        return cls(head_dim=D, num_heads=H, block_size_q=Br, block_size_kv=Bc)

    def with_causal(self, causal):
        """Return a copy with `causal`, a bool."""
        return replace(self, causal=causal)

    def with_dropout(self, dropout_p):
        """Return a copy with `dropout_p`, a float in [0, 1)."""
        return replace(self, dropout_p=dropout_p)

    def softmax_scale(self):
        """Return the factor on the scores, a float: `scale`, or 1/sqrt(head_dim) where it is None."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale


@dataclass(frozen=True)
class FlashAttention:
    """Exact attention in tiles, with one configuration (FlashAttention-2, Dao 2023).

    Parameters
    ----------
    config : FlashAttentionConfig

    Examples
    --------
    >>> import numpy as np
    >>> engine = FlashAttention(FlashAttentionConfig.new(head_dim=64, num_heads=2))
    >>> q = np.ones((2, 10, 64), np.float32)
    >>> result = engine.forward_multi_head(q, q, q)
    >>> result.output.shape, result.logsumexp.shape, result.flops
    ((2, 10, 64), (2, 10), 51200)
    """

    config: FlashAttentionConfig

    def __post_init__(self):
        if not isinstance(self.config, FlashAttentionConfig):
            raise TypeError(f"config: expected a FlashAttentionConfig, got {type(self.config).__name__}")

    def forward(self, q, k, v, **options):
        """Compute attention of one head.

        Parameters
        ----------
        q : array, (Lq, D)
        k : array, (Lk, D)
        v : array, (Lk, Dv)
        **options
            Those of `flash_attention`; a given one wins over the configuration.

        Returns
        -------
        FlashAttentionOutput

        Raises
        ------
        ValueError
            When q is not of two axes, or as `flash_attention` raises.
        TypeError
            For `config` and `return_lse`, which the engine sets itself, or as `flash_attention` raises.

        Examples
        --------
        >>> import numpy as np
        >>> x = np.ones((10, 64), np.float32)
        >>> FlashAttention(FlashAttentionConfig.new(64, 1)).forward(x, x, x, causal=True).output.shape
        (10, 64)
        """
        shape = np.shape(as_numpy("q", q))
        if len(shape) != 2:
            raise ValueError(f"q: expected (L, D), got {tuple(shape)}; use forward_multi_head for several heads")
        return self._attend(q, k, v, options)

    def forward_multi_head(self, q, k, v, **options):
        """Compute attention of several heads, of one sequence or a batch.

        Parameters
        ----------
        q : array, (H, Lq, D) or (B, H, Lq, D)
            H is the configuration's `num_heads`.
        k, v : array, (Hk, Lk, D) and (Hk, Lk, Dv), or with B in front
            H % Hk == 0: each head of k and v serves H / Hk heads of q.
        **options
            Those of `flash_attention`; a given one wins over the configuration.

        Returns
        -------
        FlashAttentionOutput

        Raises
        ------
        ValueError
            When q is not of three or four axes or has other than `num_heads` heads, or as `flash_attention` raises.
        TypeError
            For `config` and `return_lse`, which the engine sets itself, or as `flash_attention` raises.

        Examples
        --------
        >>> import numpy as np
        >>> q, kv = np.ones((4, 10, 64), np.float32), np.ones((2, 10, 64), np.float32)
        >>> FlashAttention(FlashAttentionConfig.new(64, 4)).forward_multi_head(q, kv, kv).logsumexp.shape
        (4, 10)
        """
        shape, H = tuple(np.shape(as_numpy("q", q))), self.config.num_heads
        if len(shape) not in (3, 4):
            raise ValueError(f"q: expected (H, L, D) or (B, H, L, D), got {shape}; use forward for one head")
        if shape[-3] != H:
            raise ValueError(
                f"q: expected (H, L, D) or (B, H, L, D) with H={H} as in the configuration, got {shape}; "
                "if your arrays are (B, L, H, D), pass x.transpose(0, 2, 1, 3) (no copy is made)"
            )
        return self._attend(q, k, v, options)

    def memory_savings(self, seq_len):
        """Compare the memory that attention of one head needs beyond inputs and output, with and without tiles.

        `naive_bytes` is the float32 score matrix, 4 * seq_len**2. `flash_bytes` is what one thread allocates for its
        tiles at the block sizes in use, and the log-sum-exp that the engine returns, 4 * seq_len: maximum and sum of
        a row live in the tile and are gone when its rows are done. n threads hold n sets of tiles.

        Parameters
        ----------
        seq_len : int
            Queries, and keys.

        Returns
        -------
        MemorySavings

        Raises
        ------
        ValueError
            For a length below 1.

        Examples
        --------
        >>> FlashAttention(FlashAttentionConfig.new(64, 8)).memory_savings(2048).naive_bytes
        16777216
        """
        L, D = checked("seq_len", seq_len), self.config.head_dim
        # A call cuts its tiles to its lengths, so a short sequence holds less.
        Br, Bc = cpu.tile_sizes(min(L, self.config.block_size_q), min(L, self.config.block_size_kv))
        naive_bytes = 4 * L * L
        flash_bytes = cpu.tile_bytes(Br, Bc, D, D) + 4 * L
        return MemorySavings(naive_bytes, flash_bytes, naive_bytes / flash_bytes, L)

    def _attend(self, q, k, v, options):
        attend, allowed = _attend_and_its_options()
        for name in options:
            if name not in allowed:
                expected = TAKEN.get(name, f"expected an option of flash_attention ({', '.join(allowed)})")
                raise TypeError(f"{name}: {expected}")
        output, logsumexp, work = attend(q, k, v, config=self.config, return_lse=True, **options)
        return FlashAttentionOutput(
            output=output,
            logsumexp=logsumexp,
            flops=work.flops,
            peak_tile_bytes=work.tile_bytes,
            block_size_q=work.block_size_q,
            block_size_kv=work.block_size_kv,
            implementation=work.implementation,
        )


@dataclass(frozen=True, eq=False)
class FlashAttentionOutput:
    """What one forward pass computed, and what it took.

    Attributes
    ----------
    output : array, q.shape[:-1] + (Dv,)
        In q's dtype.
    logsumexp : array of float32, q.shape[:-1]
        Natural logarithm of the sum of exp(score) of each row, with sinks; -inf where a row sees no key.
    flops : int
        2 (D + Dv) for each pair of query and key that causal and window leave visible, over batch and query heads.
    peak_tile_bytes : int
        What one thread allocated for its tiles.
    block_size_q, block_size_kv : int
        Queries and keys per tile, as used.
    implementation : str
        Name of the SIMD build that ran.
    """

    output: Any
    logsumexp: Any
    flops: int
    peak_tile_bytes: int
    block_size_q: int
    block_size_kv: int
    implementation: str


@dataclass(frozen=True)
class MemorySavings:
    """Memory of attention without and with tiles; see `FlashAttention.memory_savings`.

    Attributes
    ----------
    naive_bytes : int
        Of the score matrix.
    flash_bytes : int
        Of the tiles of one thread and the log-sum-exp.
    reduction_factor : float
        naive_bytes / flash_bytes.
    seq_len : int

    Examples
    --------
    >>> print(MemorySavings(naive_bytes=16_777_216, flash_bytes=65_536, reduction_factor=256.0, seq_len=2048))
    seq_len=2048: naive=16.0MB, flash=64.0KB, 256x reduction
    """

    naive_bytes: int
    flash_bytes: int
    reduction_factor: float
    seq_len: int

    def __str__(self):
        return (
            f"seq_len={self.seq_len}: naive={self.naive_bytes / MIB:.1f}MB, "
            f"flash={self.flash_bytes / KIB:.1f}KB, {self.reduction_factor:.0f}x reduction"
        )


@functools.cache
def _attend_and_its_options():
    """What computes, and the names of the options it takes from callers of the engine."""
    # late: cyflash.attention takes configurations and imports this module
    from cyflash.attention import attend, flash_attention

    names = inspect.signature(flash_attention).parameters
    return same_kind_or_gpu(attend), [name for name in names if name not in (*"qkv", *TAKEN)]


def _tiles_for_caches(D, caches, most_rows):
    """Return (Br, Bc) for head_dim D and caches of these sizes; unknown ones count as small: 32 KiB and 256 KiB."""
    l1, l2 = caches["l1d"] or 32 * KIB, caches["l2"] or 256 * KIB
    rows, _ = cpu.tile_sizes(1, 1)  # one panel: the queries that fill the registers
    # L1: in the first product a panel's Q (4 * rows * D bytes) meets a block of keys and fills its scores (4 * rows *
    # Bc); in the second the panel's output takes the place of Q. K and V stream by, so a quarter is left to them:
    #     4 * rows * (D + Bc) <= 3/4 L1          (rows=48: D=64 takes 64 keys in 32 KiB, 128 in 48 KiB)
    # L2: each panel of the tile reads the block of K and V again, which gets a quarter:
    #     8 * Bc * D <= 1/4 L2                   (D=64 takes 128 keys in 256 KiB)
    # Never below 64: the output goes through the registers once a block, which then costs more than misses of L1.
    Bc = max(LEAST_KEYS, min(MOST_KEYS, 3 * l1 // (16 * rows) - D, l2 // (32 * D)))
    # L2 again: a panel comes back to its Q, scores and output at the next block. All of it shares one half with K and
    # V; the other half is left to the K and V that come next. More rows read K and V from beyond L2 less often:
    #     tile_bytes(Br, Bc) + 8 * Bc * D <= 1/2 L2, and at least one panel
    Br = rows
    while Br + rows <= most_rows and cpu.tile_bytes(Br + rows, Bc, D, D) + 8 * Bc * D <= l2 // 2:
        Br += rows
    return cpu.tile_sizes(Br, Bc)


def _most_rows(L, H, threads):
    """Return the most query rows of a tile: within the sequence, and with H heads four tiles for each thread."""
    return min(MOST_ROWS, L, L * H // (4 * threads))
