"""Pieces of real attention that are kept, to measure errors of the output on: the same ones whatever the order.

    tile_of(...)     a piece of one sequence: up to 256 rows with the keys that they see
    Reservoir        the pieces with the smallest hashes, as many as fit; half are to search on, half to judge by
"""

import math
from typing import NamedTuple

import numpy as np

from cyflash import arrays
from cyflash.plan import UNBOUNDED

__all__ = ["Reservoir", "Tile", "tile_of"]

ROWS = 256
SHARE = 4  # a tile is at most this part of the reservoir


class Tile(NamedTuple):
    """A piece of one observed sequence, on its own a call of `flash_attention`.

    Attributes
    ----------
    q, k, v : ndarray of float32, shapes (H, R, D), (Hk, T, D), (Hk, T, Dv)
        Rows and keys that nothing saw are 0.
    options : dict
        Keyword arguments of the call.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict

    @property
    def nbytes(self):
        held = (*self[:3], *(x for x in self.options.values() if isinstance(x, np.ndarray)))
        return sum(x.nbytes for x in held)

    @property
    def work(self):
        """Multiplications and additions of one call, masks aside."""
        (H, R, D), (_, T, Dv) = self.q.shape, self.v.shape
        return 2 * H * R * T * (D + Dv)


def tile_of(q, k, v, plan, b, options, seen, number, limit):
    """The piece of a sequence that is kept.

    Parameters
    ----------
    q, k, v : ndarray of float32, float16 or bfloat16, shapes (H, Lq, D), (Hk, Lk, D), (Hk, Lk, Dv)
    plan : Plan
        Of the call.
    b : int
        Which sequence of it this is.
    options : dict
        Of the call: those that a layer shares.
    seen : (rows, keys)
        As `visibility.seen` gives them.
    number : int
        Not negative; decides which rows are taken where there are more than fit.
    limit : float
        Bytes. Where rows and their keys are more, the keys are cut (which is no longer what the call computed, but
        still a piece of the same data).

    Returns
    -------
    Tile
    """
    rows, keys, align = _cut(plan, number, limit)
    qkv = [
        _copy(x, part, visible)
        for x, part, visible in ((q, rows, seen[0]), (k, keys, seen[1]), (v, keys, seen[1]))
    ]  # fmt: skip
    own = dict(options, causal_align=align)
    for name, x in (("bias", plan.bias), ("mask", plan.mask)):
        if x is not None:
            piece = np.array(arrays.once(x[b, :, rows, keys]), order="C")
            own[name] = piece if name == "bias" else piece.view(np.bool_)
    if plan.alibi_slopes is not None:
        own["alibi_slopes"] = plan.alibi_slopes[b].copy()
    return Tile(*qkv, own)


def _cut(plan, number, limit):
    """(rows, keys, causal_align) of the tile: slices of the sequence.

    The tile's last row must stand where it stood. With align "bottom-right" it stands at the tile's last key, so a
    block of rows takes the keys up to its last row's own position: those that a causal row does not see anyway.
    """
    row_bytes, key_bytes, pair_bytes = 4 * plan.H * plan.D, 4 * plan.Hk * (plan.D + plan.Dv), 0
    for x in (plan.bias, plan.mask):
        if x is not None:
            size = x.itemsize * (1 if x.strides[1] == 0 else plan.H)
            by_row, by_key = (stride != 0 for stride in x.strides[2:])
            row_bytes += size * (by_row and not by_key)
            key_bytes += size * (by_key and not by_row)
            pair_bytes += size * (by_row and by_key)
    R = min(plan.Lq, ROWS, int(limit / 2 / row_bytes))
    if pair_bytes:
        R = min(R, int(math.sqrt(limit / 2 / pair_bytes)))  # as many keys as rows, or more
    R = max(1, R)
    most = max(1, int((limit - R * row_bytes) / (key_bytes + R * pair_bytes)))
    by_position = min(plan.left, plan.right) < UNBOUNDED or plan.alibi_slopes is not None
    last = plan.Lq - R  # of the first rows
    align = "bottom-right" if plan.offset == plan.Lk - plan.Lq else "top-left"
    # Where blocks may begin that see a key and end within the keys:
    least, greatest = max(0, 1 - R - plan.offset), min(last, plan.Lk - R - plan.offset)
    if plan.right == 0 and least <= greatest and plan.Lq > R:
        greatest = min(greatest, max(least, most - R - plan.offset))
        begin = least + number % (greatest - least + 1)
        end, align = begin + R + plan.offset, "bottom-right"
        return slice(begin, begin + R), slice(max(0, end - most), end), align
    if by_position:
        begin = last if align == "bottom-right" else 0
        keys = slice(max(0, plan.Lk - most), plan.Lk) if align == "bottom-right" else slice(0, min(plan.Lk, most))
        return slice(begin, begin + R), keys, align
    begin = number % (last + 1)
    return slice(begin, begin + R), slice(0, min(plan.Lk, most)), align


def _copy(x, part, visible):
    x = np.array(x[:, part], np.float32, order="C")
    if visible is not None:
        x[~visible[:, part]] = 0.0
    return x


class Reservoir:
    """The tiles of one layer with the smallest hashes that fit into a number of bytes.

    Which tiles these are depends on what was observed, not on its order or on how it was split: those before the first
    hash, in the order of all, that does not fit. Nothing from there on is ever taken again, however small it is. Sorted
    by hash, every other one is held out.

    Attributes
    ----------
    limit : float
        Bytes.
    tiles : dict of str to Tile
        Sorted by hash.
    end : str or None
        The first hash that did not fit.
    """

    def __init__(self, limit):
        self.limit = limit
        self.tiles = {}
        self.end = None

    @property
    def tile_limit(self):
        return self.limit / SHARE

    def add(self, tiles, end=None):
        """Take {hash: Tile} as well, those of a reservoir with this `end`, and keep what fits."""
        together, room = self.tiles | tiles, self.limit
        self.end = min((x for x in (self.end, end) if x is not None), default=None)
        self.tiles = {}
        for key in sorted(together):
            room -= together[key].nbytes
            if room < 0:
                self.end = key if self.end is None else min(self.end, key)
            if self.end is not None and key >= self.end:
                break
            self.tiles[key] = together[key]

    def halves(self):
        """(training, held out), two lists."""
        tiles = list(self.tiles.values())
        return tiles[::2], tiles[1::2]
