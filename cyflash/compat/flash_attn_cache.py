"""What flash_attn_with_kvcache does with the caller's caches: where keys lie, rotating, writing, attending in place.

    cache_seqlens, cache_batch_idx, block_table -> how many keys each row has, and the Places of all of them
    k, v -> rotated -> written at the places after each row's keys
    q -> rotated -> attention.attend_stored, which reads the caches where they are
"""
from typing import NamedTuple

import numpy as np

from cyflash import arrays, attention
from cyflash.compat.flash_attn_checks import check_range, checked_index, checked_integers, errors_name
from cyflash.plan import make_plan
from cyflash.stored import KEYS_UNIT, Stored


class Places(NamedTuple):
    """Key j of row b is row j % page_size of page table[b, j // page_size], in caches (pages, page_size, Hk, D)."""

    table: np.ndarray  # (B, P), int64
    page_size: int | None  # None: one page for each row

    def write(self, cache, new, begin):
        """Put new (B, L, Hk, D) into the cache, from key begin[b] of each row."""
        keys = begin[:, None] + np.arange(new.shape[1])
        page_size = self.page_size or max(1, cache.shape[1])
        pages = np.take_along_axis(self.table, keys // page_size, axis=1)
        cache[pages, keys % page_size] = new

    def of_rows(self, rows):
        return self._replace(table=self.table[rows])


def places_in(k_cache, cache_seqlens, cache_batch_idx, block_table, B, L):
    """(keys of each row before the new ones, (B,) int64; Places). L: how many are new, or None without k."""
    if block_table is None:
        lengths = _lengths(cache_seqlens, B, L, k_cache.shape[1])
        return lengths, _places_of_rows(k_cache, cache_batch_idx, B)
    if cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: expected None with block_table, which says where the keys of each row are")
    table = checked_table("k_cache", k_cache, block_table, B)
    lengths = _lengths(cache_seqlens, B, L, table.shape[1] * k_cache.shape[1])
    return lengths, places_of_pages(k_cache, table, lengths + (L or 0))


def _places_of_rows(k_cache, cache_batch_idx, B):
    """Each row of the caches is one page."""
    rows = k_cache.shape[0]
    if cache_batch_idx is not None:
        index = checked_integers("cache_batch_idx", cache_batch_idx, (B,), f"({B},), one of each row of q")
        check_range("cache_batch_idx", index, 0, rows - 1, "the rows of the caches")
    elif rows < B:
        raise ValueError(f"k_cache: expected at least {B} rows, as many as q has, got {k_cache.shape}")
    else:
        index = np.arange(B)
    return Places(index[:, None], None)


def checked_table(name, cache, block_table, B):
    """block_table as int64, for B rows of the pages of `cache`, which is called `name`."""
    if cache.shape[1] % KEYS_UNIT or cache.shape[1] == 0:
        raise ValueError(
            f"{name}: expected a page_size that is a multiple of {KEYS_UNIT}, got {cache.shape[1]} in {cache.shape}"
        )
    return checked_integers("block_table", block_table, (B, None), f"({B}, most pages of a row)")


def places_of_pages(cache, table, keys):
    """Pages of a pool. What the table holds beyond the keys of each row is not looked at."""
    pages, page_size = cache.shape[:2]
    needed = -(-keys // page_size)
    if needed.max(initial=0) > table.shape[1]:
        raise ValueError(f"block_table: expected {needed.max()} pages for {keys.max()} keys, got shape {table.shape}")
    is_needed = np.arange(table.shape[1]) < needed[:, None]
    table = np.where(is_needed, table, 0)
    check_range("block_table", table, 0, np.where(is_needed, pages - 1, 0), "the pages there are")
    return Places(table, page_size)


def _lengths(cache_seqlens, B, L, capacity):
    if cache_seqlens is None:
        if L is not None:
            raise ValueError("cache_seqlens: expected how many keys each row has before the new k, got None")
        return np.full(B, capacity)
    if isinstance(cache_seqlens, np.ndarray):
        lengths = checked_integers("cache_seqlens", cache_seqlens, (B,), f"({B},), one of each row of q")
    else:
        lengths = np.full(B, checked_index("cache_seqlens", cache_seqlens))
    room = f"the capacity {capacity}" + (f" less {L} new keys" if L else "")
    check_range("cache_seqlens", lengths, 0, capacity - (L or 0), room)
    return lengths


def check_cache(name, x):
    """Caches are read where they are."""
    if arrays.rows_in_place(x) is not x:
        raise ValueError(
            f"{name}: expected an aligned array whose last axis is contiguous, since it is used in place, got strides "
            f"{x.strides}; pass np.ascontiguousarray({name}) and keep that"
        )


def check_writable(k_cache, v_cache, **inputs):
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.flags.writeable:
            raise ValueError(f"{name}: expected a writable array for the new keys, got a read-only one")
        if arrays.overlaps_itself(cache):
            raise ValueError(
                f"{name}: expected elements that do not overlap, got strides {cache.strides} for shape {cache.shape}"
            )
        for other, x in inputs.items():
            if arrays.overlap(cache, x):
                raise ValueError(f"{name}: expected memory of its own, got an array that overlaps {other}")
    if arrays.overlap(k_cache, v_cache):
        raise ValueError("v_cache: expected memory of its own, got an array that overlaps k_cache")


def check_options(B, q, k_cache, v_cache, options):
    """What attention would raise about options of B rows, before anything is written."""
    q, k, v = (np.broadcast_to(np.float32(0), (B, x.shape[-2], 1, x.shape[-1])) for x in (q, k_cache, v_cache))
    with errors_name():
        make_plan(q, k, v, **options)


def rotated(q, k, cos, sin, begin, moving, interleaved):
    """(q, k) with their first 2 r channels rotated; cos, sin (positions, r).

    begin: the position of each row's first new key. moving: queries stand at the positions after it too, else at it.
    """
    _check_rotary(q, k, cos, sin)
    q_positions = begin[:, None] + (np.arange(q.shape[1]) if moving else 0)
    k_positions = begin[:, None] + np.arange(k.shape[1])
    last = max(q_positions.max(initial=-1), k_positions.max(initial=-1))
    if last >= len(cos):
        raise ValueError(f"rotary_cos: expected at least {last + 1} positions for these cache_seqlens, got {cos.shape}")
    return tuple(
        _rotate(x, cos[positions], sin[positions], interleaved)
        for x, positions in ((q, q_positions), (k, k_positions))
    )


def _check_rotary(q, k, cos, sin):
    if k is None:
        raise ValueError("rotary_cos: expected None without new k and v, got an array")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x is None:
            raise ValueError(f"{name}: expected an array, since rotary_cos and rotary_sin are given together, got None")
        arrays.require_array(name, x, (2,))
        if x.dtype not in (q.dtype, arrays.FLOAT32):
            raise TypeError(
                f"{name}: expected {q.dtype.name} as in q, or float32, got {arrays.dtype_name(x.dtype)}; "
                f"write {name}.astype(np.float32)"
            )
    if cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= q.shape[3]:
        raise ValueError(
            f"rotary_cos, rotary_sin: expected one shape (positions, rotary_dim / 2) with rotary_dim of 2 to "
            f"{q.shape[3]}, the head_dim of q, got {cos.shape} and {sin.shape}"
        )


def _rotate(x, cos, sin, interleaved):
    """x (B, L, H, D); cos, sin (B, L or 1, r). In float32, then rounded to x's dtype."""
    r = cos.shape[-1]
    pairs = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if interleaved else (slice(r), slice(r, 2 * r))
    a, b = (x[..., one].astype(np.float32) for one in pairs)
    cos, sin = (y[:, :, None].astype(np.float32) for y in (cos, sin))
    turned = np.array(x)
    turned[..., pairs[0]] = a * cos - b * sin
    turned[..., pairs[1]] = a * sin + b * cos
    return turned


def attend(q, k_cache, v_cache, places, keys, options, return_lse, leftpad=None):
    """(out (B, Lq, H, Dv), lse (B, H, Lq) or None): each row of q over the first `keys` keys of its row, of which those
    before leftpad are hidden."""
    out = np.empty((*q.shape[:3], v_cache.shape[3]), q.dtype)
    q, k, v, heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k_cache, v_cache, out))
    mask = None if leftpad is None else np.arange(keys.max(initial=0)) >= leftpad[:, None, None, None]
    kind = arrays.kind_of(k.dtype)
    stored = Stored(kind, places.page_size, k, v, D=k.shape[3], Dv=v.shape[3], v_kind=kind)
    with errors_name():
        _, lse = attention.attend_stored(
            q, stored, places.table, keys, mask=mask, **options, return_lse=return_lse, out=heads_first
        )
    return out, lse
