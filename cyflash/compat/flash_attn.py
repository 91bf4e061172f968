"""The functions of FlashAttention-2 (the package flash_attn) on arrays of any library, with its signatures and layout.

    flash_attn_func, .._kvpacked_func, .._qkvpacked_func        (B, L, H, D) -> transposed views -> flash_attention
    flash_attn_varlen_func and the packed ones                  (total, H, D) -> flash_attention_varlen
    flash_attn_with_kvcache                                     writes the caller's caches -> attention.attend_stored

Write `from cyflash.compat.flash_attn import flash_attn_func` where `from flash_attn import flash_attn_func` was. What
differs from the original, besides the arrays:

- float32 is taken too, and any head_dim; v may have another than q and k.
- Dropout raises NotImplementedError.
- The third value of return_attn_probs=True is None: the original, too, has probabilities only beside dropout.
- Rows that see no key have the log-sum-exp -inf, which `cyflash.merge_states` takes; FlashAttention-2 has +inf there.
- Arguments that contradict each other, or reach outside an array, raise before anything is written.
"""
import numpy as np

import cyflash
from cyflash.attention import attend
from cyflash.compat import flash_attn_cache as cache
from cyflash.compat.flash_attn_checks import (
    as_options,
    check_dtypes,
    check_heads,
    check_longest,
    check_range,
    check_shape,
    checked_index,
    checked_integers,
    errors_name,
)
from cyflash.foreign import same_kind
from cyflash.plan import checked_flag
from cyflash.varlen import Lengths

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


@same_kind
def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):
    """Attention on arrays with the length before the heads.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (B, Lq, H, D)
        Queries.
    k : ndarray of q's dtype, shape (B, Lk, Hk, D)
        Keys. Hk divides H: query head h reads kv head h // (H // Hk).
    v : ndarray of q's dtype, shape (B, Lk, Hk, Dv)
        Values.
    dropout_p : float
        Only 0 is implemented.
    softmax_scale : float, optional
        Default: 1 / sqrt(D).
    causal : bool
        Hide keys j > i + Lk - Lq from query i (aligned to the bottom right).
    window_size : (int, int)
        (left, right): only keys from i + Lk - Lq - left to i + Lk - Lq + right are visible; -1 is unbounded.
    softcap : float
        cap * tanh(score / cap); 0 for none.
    alibi_slopes : ndarray of float32, shape (H,) or (B, H), optional
        Adds -slope * abs(i + Lk - Lq - j) to the scores.
    deterministic : bool
        Of no effect: results are always the same bits.
    return_attn_probs : bool
        Return (out, lse, None) instead of out.

    Returns
    -------
    out : ndarray of q's dtype, shape (B, Lq, H, Dv)
        0 in rows that see no key.
    lse : ndarray of float32, shape (B, H, Lq)
        Natural logarithm; -inf in rows that see no key. Only with return_attn_probs, as is the None after it.

    Raises
    ------
    TypeError
        For a dtype.
    ValueError
        For a shape or an option.
    NotImplementedError
        For dropout.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.compat.flash_attn import flash_attn_func
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 128, heads, 64), dtype=np.float32) for heads in (8, 2, 2))
    >>> flash_attn_func(q, k, v, causal=True).shape
    (2, 128, 8, 64)
    """
    options = as_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    sizes = {}
    for name, x, axes in (("q", q, "B Lq H D"), ("k", k, "B Lk Hk D"), ("v", v, "B Lk Hk Dv")):
        check_shape(name, x, axes, sizes)
    check_heads("k", k, sizes)
    check_dtypes(q, k=k, v=v)
    return _attend(q, k, v, options, return_attn_probs)


@same_kind
def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):
    """`flash_attn_func` with keys and values in one array.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (B, Lq, H, D)
        Queries.
    kv : ndarray of q's dtype, shape (B, Lk, 2, Hk, D)
        Keys and values, which are read in place.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`, as are results and errors.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.compat.flash_attn import flash_attn_kvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 1, 8, 64), dtype=np.float32)
    >>> kv = rng.standard_normal((2, 128, 2, 2, 64), dtype=np.float32)
    >>> flash_attn_kvpacked_func(q, kv).shape
    (2, 1, 8, 64)
    """
    options = as_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    sizes = {}
    for name, x, axes in (("q", q, "B Lq H D"), ("kv", kv, "B Lk 2 Hk D")):
        check_shape(name, x, axes, sizes)
    check_heads("kv", kv, sizes)
    check_dtypes(q, kv=kv)
    return _attend(q, kv[:, :, 0], kv[:, :, 1], options, return_attn_probs)


@same_kind
def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):
    """`flash_attn_func` with queries, keys and values in one array.

    Parameters
    ----------
    qkv : ndarray of float32, float16 or bfloat16, shape (B, L, 3, H, D)
        Read in place.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`, as are results and errors.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.compat.flash_attn import flash_attn_qkvpacked_func
    >>> qkv = np.random.default_rng(0).standard_normal((2, 128, 3, 8, 64), dtype=np.float32)
    >>> flash_attn_qkvpacked_func(qkv, causal=True).shape
    (2, 128, 8, 64)
    """
    options = as_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    check_shape("qkv", qkv, "B L 3 H D", {})
    return _attend(*(qkv[:, :, n] for n in range(3)), options, return_attn_probs)


@same_kind
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):
    """Attention on sequences of different lengths that lie one after another, without padding.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (total_q, H, D)
        Queries.
    k : ndarray of q's dtype, shape (total_k, Hk, D); with block_table (pages, page_size, Hk, D)
        Keys.
    v : ndarray of q's dtype, shape (total_k, Hk, Dv); with block_table (pages, page_size, Hk, Dv)
        Values.
    cu_seqlens_q : ndarray of int32 or int64, shape (B + 1,)
        Sequence b has the queries cu_seqlens_q[b] up to cu_seqlens_q[b + 1]; the first entry is 0. Empty sequences are
        allowed.
    cu_seqlens_k : ndarray of int32 or int64, shape (B + 1,)
        The same of keys; with block_table only their differences count, which are the lengths.
    max_seqlen_q, max_seqlen_k : int
        At least the length of the longest sequence, of queries and of keys.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`, with Lq and Lk of each sequence.
    block_table : ndarray of int32 or int64, shape (B, max pages of a sequence), optional
        Key j of sequence b is row j % page_size of page block_table[b, j // page_size]. page_size is a multiple of 16.
        Entries beyond a sequence's keys are not read.

    Returns
    -------
    out : ndarray of q's dtype, shape (total_q, H, Dv)
        0 in rows that see no key.
    lse : ndarray of float32, shape (H, total_q)
        Natural logarithm. Only with return_attn_probs, as is the None after it.

    Raises
    ------
    TypeError
        For a dtype.
    ValueError
        For a shape or an option, for cu_seqlens that decrease, do not start at 0 or reach beyond the arrays, for a
        max_seqlen below the longest sequence, and for a block_table that points outside the pages.
    NotImplementedError
        For dropout.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.compat.flash_attn import flash_attn_varlen_func
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((100, heads, 64), dtype=np.float32) for heads in (8, 2, 2))
    >>> cu_seqlens = np.array([0, 70, 70, 100], np.int32)
    >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 70, 70, causal=True).shape
    (100, 8, 64)
    """
    options = as_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    paged = "" if block_table is None else "pages page_size "
    sizes = {}
    check_shape("q", q, "total_q H D", sizes)
    check_shape("k", k, f"{paged or 'total_k '}Hk D", sizes)
    check_shape("v", v, f"{paged or 'total_k '}Hk Dv", sizes)
    check_heads("k", k, sizes)
    check_dtypes(q, k=k, v=v)
    check_longest("max_seqlen_q", max_seqlen_q, "cu_seqlens_q", cu_seqlens_q)
    check_longest("max_seqlen_k", max_seqlen_k, "cu_seqlens_k", cu_seqlens_k)
    if paged:
        return _attend_paged(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, options, return_attn_probs)
    return _attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, options, return_attn_probs)


@same_kind
def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):
    """`flash_attn_varlen_func` with keys and values in one array.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (total_q, H, D)
        Queries.
    kv : ndarray of q's dtype, shape (total_k, 2, Hk, D)
        Keys and values, which are read in place.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As in `flash_attn_varlen_func`, as are results and errors.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.compat.flash_attn import flash_attn_varlen_kvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((3, 8, 64), dtype=np.float32)
    >>> kv = rng.standard_normal((100, 2, 2, 64), dtype=np.float32)
    >>> cu_seqlens_q, cu_seqlens_k = np.array([0, 1, 3], np.int32), np.array([0, 70, 100], np.int32)
    >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, 2, 70, causal=True).shape
    (3, 8, 64)
    """
    options = as_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    sizes = {}
    check_shape("q", q, "total_q H D", sizes)
    check_shape("kv", kv, "total_k 2 Hk D", sizes)
    check_heads("kv", kv, sizes)
    check_dtypes(q, kv=kv)
    check_longest("max_seqlen_q", max_seqlen_q, "cu_seqlens_q", cu_seqlens_q)
    check_longest("max_seqlen_k", max_seqlen_k, "cu_seqlens_k", cu_seqlens_k)
    return _attend_varlen(q, kv[:, 0], kv[:, 1], cu_seqlens_q, cu_seqlens_k, options, return_attn_probs)


@same_kind
def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):
    """`flash_attn_varlen_func` with queries, keys and values in one array.

    Parameters
    ----------
    qkv : ndarray of float32, float16 or bfloat16, shape (total, 3, H, D)
        Read in place.
    cu_seqlens : ndarray of int32 or int64, shape (B + 1,)
        Sequence b is tokens cu_seqlens[b] up to cu_seqlens[b + 1].
    max_seqlen : int
        At least the length of the longest sequence.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_varlen_func`, as are results and errors.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.compat.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> qkv = np.random.default_rng(0).standard_normal((100, 3, 8, 64), dtype=np.float32)
    >>> flash_attn_varlen_qkvpacked_func(qkv, np.array([0, 70, 70, 100], np.int32), 70, causal=True).shape
    (100, 8, 64)
    """
    options = as_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    check_shape("qkv", qkv, "total 3 H D", {})
    check_longest("max_seqlen", max_seqlen, "cu_seqlens", cu_seqlens)
    with errors_name(cu_seqlens_q="cu_seqlens", cu_seqlens_k="cu_seqlens"):
        return _attend_varlen(*(qkv[:, n] for n in range(3)), cu_seqlens, cu_seqlens, options, return_attn_probs)


@same_kind
def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):
    """Write new keys and values into caches, in place, and attend to all that the caches then hold.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (B, Lq, H, D)
        Queries.
    k_cache : ndarray of q's dtype, shape (cache rows, capacity, Hk, D); with block_table (pages, page_size, Hk, D)
        Keys: any strides but along the last axis, which must be contiguous. Written if k is given.
    v_cache : ndarray of q's dtype, as k_cache with Dv for D
        Values.
    k : ndarray of q's dtype, shape (B, L, Hk, D), optional
        New keys: those of row b are written at cache_seqlens[b] and after.
    v : ndarray of q's dtype, shape (B, L, Hk, Dv), optional
        New values; both or none.
    rotary_cos, rotary_sin : ndarray of q's dtype or float32, shape (positions, rotary_dim / 2), optional
        Rotate the first rotary_dim channels of k, at the positions where it is written, and of q: with `causal` or
        a window at cache_seqlens + i for query i, else at cache_seqlens. Only together with k and v.
    cache_seqlens : int or ndarray of int32 or int64, shape (B,), optional
        How many keys each row has before the new ones. Default, without k only: as many as fit.
    cache_batch_idx : ndarray of int32 or int64, shape (B,), optional
        The row of the caches that belongs to each row of q. Default: 0 to B - 1. Where it names one twice, the last of
        them is written. Not with block_table.
    cache_leftpad : ndarray of int32 or int64, shape (B,), optional
        Hide the keys before this one. Positions do not change: they count from the cache's first key.
    block_table : ndarray of int32 or int64, shape (B, max pages of a row), optional
        Key j of row b is row j % page_size of page block_table[b, j // page_size]. page_size is a multiple of 16.
        Entries beyond a row's keys are not read.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`, where Lk is the number of keys of each row, the new ones included.
    rotary_interleaved : bool
        Channels are rotated in pairs (0, 1), (2, 3), ...; if False, in pairs (0, rotary_dim / 2),
        (1, rotary_dim / 2 + 1), ...
    num_splits : int
        Of no effect: how keys are split is decided by each row's own length.
    return_softmax_lse : bool
        Return (out, lse) instead of out.

    Returns
    -------
    out : ndarray of q's dtype, shape (B, Lq, H, Dv)
        0 in rows that see no key.
    lse : ndarray of float32, shape (B, H, Lq)
        Natural logarithm; only with return_softmax_lse.

    Raises
    ------
    TypeError
        For a dtype.
    ValueError
        For a shape or an option; for keys beyond the capacity, entries of cache_batch_idx or block_table that point
        outside the caches, caches that cannot be written or that overlap, too few rotary positions. Nothing was written
        then.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.compat.flash_attn import flash_attn_with_kvcache
    >>> rng = np.random.default_rng(0)
    >>> k_cache, v_cache = (np.zeros((2, 512, 2, 64), np.float32) for _ in range(2))
    >>> q, k, v = (rng.standard_normal((2, 100, heads, 64), dtype=np.float32) for heads in (8, 2, 2))
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=0, causal=True).shape
    (2, 100, 8, 64)
    >>> one = flash_attn_with_kvcache(q[:, :1], k_cache, v_cache, k[:, :1], v[:, :1], cache_seqlens=100, causal=True)
    >>> one.shape, bool((k_cache[:, 100] == k[:, 0]).all())
    ((2, 1, 8, 64), True)
    """
    options = as_options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    checked_flag("rotary_interleaved", rotary_interleaved)
    checked_index("num_splits", num_splits)
    sizes = {}
    rows = "cache_rows capacity" if block_table is None else "pages page_size"
    check_shape("q", q, "B Lq H D", sizes)
    for name, x, axes in (("k_cache", k_cache, f"{rows} Hk D"), ("v_cache", v_cache, f"{rows} Hk Dv")):
        check_shape(name, x, axes, sizes)
        cache.check_cache(name, x)
    check_heads("k_cache", k_cache, sizes)
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'}: expected an array, since k and v are given together, got None")
    if k is not None:
        check_shape("k", k, "B L Hk D", sizes)
        check_shape("v", v, "B L Hk Dv", sizes)
    check_dtypes(q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    B, L = sizes["B"], sizes.get("L")
    lengths, places = cache.places_in(k_cache, cache_seqlens, cache_batch_idx, block_table, B, L)
    if cache_leftpad is not None:
        cache_leftpad = checked_integers("cache_leftpad", cache_leftpad, (B,), f"({B},), one of each row of q")
        check_range("cache_leftpad", cache_leftpad, 0, lengths, "the keys of the row")
    cache.check_options(B, q, k_cache, v_cache, options)
    if rotary_cos is not None or rotary_sin is not None:
        moving = causal or any(side != -1 for side in window_size or ())
        q, k = cache.rotated(q, k, rotary_cos, rotary_sin, lengths, moving, rotary_interleaved)
    if k is not None:
        cache.check_writable(k_cache, v_cache, q=q, k=k, v=v)
        places.write(k_cache, k, lengths)
        places.write(v_cache, v, lengths)
    out, lse = cache.attend(
        q, k_cache, v_cache, places, lengths + (L or 0), options, bool(return_softmax_lse), leftpad=cache_leftpad
    )
    return (out, lse) if return_softmax_lse else out


def _attend(q, k, v, options, return_attn_probs):
    """Views of (B, L, H, D)."""
    out = np.empty((*q.shape[:3], v.shape[3]), q.dtype)
    q, k, v, heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v, out))
    with errors_name():
        _, lse, _ = attend(q, k, v, **options, return_lse=bool(return_attn_probs), out=heads_first)
    return (out, lse, None) if return_attn_probs else out


def _attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, options, return_attn_probs):
    with errors_name():
        result = cyflash.flash_attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, **options, return_lse=bool(return_attn_probs)
        )
    return (result[0], result[1].T, None) if return_attn_probs else result


def _attend_paged(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, options, return_attn_probs):
    """One call for all sequences of one number of queries: these are gathered, the pages are read where they are."""
    begins, queries, _, keys = Lengths.of(cu_seqlens_q, cu_seqlens_k, q)
    places = cache.places_of_pages(k, cache.checked_table("k", k, block_table, len(keys)), keys)
    cache.check_options(len(keys), q, k, v, options)
    out = np.zeros((*q.shape[:2], v.shape[3]), q.dtype)
    lse = np.full((q.shape[1], len(q)), -np.inf, np.float32)
    for Lq in np.unique(queries[queries > 0]):
        rows = np.flatnonzero(queries == Lq)
        tokens = begins[rows, None] + np.arange(Lq)
        own = options | {"alibi_slopes": _of_rows(options["alibi_slopes"], rows)}
        out[tokens], part = cache.attend(q[tokens], k, v, places.of_rows(rows), keys[rows], own, return_lse=True)
        lse[:, tokens] = part.transpose(1, 0, 2)
    return (out, lse, None) if return_attn_probs else out


def _of_rows(slopes, rows):
    """Slopes (B, H) of these sequences; (H,) are those of all."""
    return np.asarray(slopes, np.float32)[rows] if np.ndim(slopes) == 2 else slopes
