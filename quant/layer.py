"""What a calibrator keeps of one attention layer: integers, greatest values, and a few tiles.

    Layer.observed(...)  one sequence -> a Layer of its own      ┐ sums of integers, greatest values, smallest hashes:
    Layer.add(other)     and adding it to what was seen before   ┘ no order and no split of the work shows in the result
"""

import hashlib
import sys
from typing import NamedTuple

import numpy as np

from cyflash import arrays
from cyflash.cpu import observe
from cyflash.cpu.threads import for_call
from cyflash.quant.histogram import INVALID, Counts
from cyflash.quant.tiles import Reservoir, tile_of
from cyflash.quant.visibility import seen

__all__ = ["LADDER_SINKS", "OPERANDS", "PARTS", "Layer", "Shape", "as_arguments", "shared_options"]

OPERANDS = ("q", "k", "v")
PARTS = ("q", "k", "k_centred", "v")
LADDER_SINKS = 4  # keys that a plan may compute in fp32
VALUES_PER_THREAD = 1 << 18
SUM_BITS = 40  # of the greatest value of a sequence, in the fixed point of its own sums
MOST_ROWS = 1 << 22  # of one sequence: their sums fit 63 bits
UNIT = 192  # sums of all sequences are multiples of 2^-192, finer than 40 bits of the least float32


class Shape(NamedTuple):
    """What all observations of a layer have in common."""

    H: int
    Hk: int
    D: int
    Dv: int

    def __str__(self):
        return f"{self.H} heads of q, {self.Hk} of k and v, head_dim {self.D} and {self.Dv} of v"


def shared_options(plan, b, options):
    """The options of a call that its layer shares, in one form for each meaning; JSON holds them as they are."""
    window = options["window"]
    return {
        "causal": bool(options["causal"]),
        "causal_align": str(options["causal_align"]),
        "scale": plan.scale,
        "window": None if window is None or tuple(window) == (-1, -1) else [int(side) for side in window],
        "softcap": plan.softcap,
        "alibi_slopes": None if plan.alibi_slopes is None else plan.alibi_slopes[b].tolist(),
        "sinks": None if plan.sinks is None else plan.sinks.tolist(),
    }


def as_arguments(options):
    """Shared options as keyword arguments of `flash_attention`."""
    convert = {"window": tuple, "alibi_slopes": np.float32, "sinks": np.float32}
    return {
        name: convert[name](value) if name in convert else value for name, value in options.items() if value is not None
    }


class Layer:
    """Statistics of one layer.

    Attributes
    ----------
    shape : Shape
    options : dict
        As `shared_options` gives them.
    counts : dict of str to Counts
        Histograms of "q" (H heads), "k", "k_centred" (minus the mean of its own sequence) and "v" (Hk heads each).
        Without the first `fp32_sinks` keys, and without what nothing sees.
    rest : dict of str to ndarray of float32, shape (Hk,)
        Greatest values of keys from LADDER_SINKS on.
    k_sum : ndarray of int (Python's, of any size), shape (Hk, D)
        Sum of each channel of the keys that are seen, in units of 2^-192. Each sequence adds multiples of the 40th bit
        of its greatest value.
    k_tokens : ndarray of int64, shape (Hk,)
        How many keys were summed.
    observations : int
    longest : list of int
        The most rows and the most keys that one had.
    nonfinite, all_zero : dict of str to int
        Values and tensors that were left out.
    reservoir : Reservoir
    """

    def __init__(self, shape, options, fp32_sinks, reservoir_bytes):
        self.shape, self.options, self.fp32_sinks = shape, options, fp32_sinks
        self.counts = {part: Counts.zeros(shape.H if part == "q" else shape.Hk) for part in PARTS}
        self.rest = {part: np.zeros(shape.Hk, np.float32) for part in PARTS[1:]}
        self.k_sum = np.full((shape.Hk, shape.D), 0, object)
        self.k_tokens = np.zeros(shape.Hk, np.int64)
        self.observations = 0
        self.longest = [0, 0]
        self.nonfinite = dict.fromkeys(OPERANDS, 0)
        self.all_zero = dict.fromkeys(OPERANDS, 0)
        self.reservoir = Reservoir(reservoir_bytes)

    @classmethod
    def observed(cls, q, k, v, plan, b, options, *, fp32_sinks, reservoir_bytes, seed, ignore, ndim):
        """The Layer of one sequence; q, k, v: (H, L, D), last axes contiguous; ndim: the caller's axes."""
        new = cls(Shape(plan.H, plan.Hk, plan.D, plan.Dv), options, fp32_sinks, reservoir_bytes)
        new.observations = 1
        new.longest = [plan.Lq, plan.Lk]
        rows, keys = seen(plan, b)
        new._count("q", q, rows)
        new._count("k", k, keys)
        new._count("v", v, keys)
        usable = True
        for operand, x, visible in (("q", q, rows), ("k", k, keys), ("v", v, keys)):
            usable &= new._settle(operand, ignore, lambda x=x, visible=visible: _first_bad(x, visible, b, ndim))
        if new.counts["k"].counts.any():
            new._centre(k, keys)
        if usable:
            new._keep_tile(q, k, v, plan, b, (rows, keys), seed)
        return new

    def add(self, other):
        """Take in what another Layer of the same shape and options has seen."""
        for part in PARTS:
            self.counts[part].add(other.counts[part])
        for part, top in self.rest.items():
            np.maximum(top, other.rest[part], out=top)
        self.k_sum += other.k_sum
        self.k_tokens += other.k_tokens
        self.observations += other.observations
        self.longest = [max(pair) for pair in zip(self.longest, other.longest, strict=True)]
        for mine, its in ((self.nonfinite, other.nonfinite), (self.all_zero, other.all_zero)):
            for operand in OPERANDS:
                mine[operand] += its[operand]
        self.reservoir.add(other.reservoir.tiles, other.reservoir.end)

    def empty(self):
        """A Layer of the same kind that has seen nothing."""
        return Layer(self.shape, self.options, self.fp32_sinks, self.reservoir.limit)

    @property
    def k_mean(self):
        """Mean of each channel of the keys, float32 (Hk, 1, D)."""
        tokens = np.maximum(self.k_tokens, 1).astype(object)[:, None]
        return (self.k_sum / (tokens << UNIT)).astype(np.float32)[:, None]

    @property
    def nbytes(self):
        """Of the statistics; the reservoir has its own limit."""
        held = (self.k_sum, self.k_tokens, *self.rest.values(), *(x for counts in self.counts.values() for x in counts))
        return sum(x.nbytes for x in held) + sum(map(sys.getsizeof, self.k_sum.flat))

    # One sequence

    def _count(self, part, x, visible, mean=None):
        counts = self.counts[part]
        if part == "q":
            return counts.observe(x, mean, visible, _threads(x))
        first = self.fp32_sinks or LADDER_SINKS
        later = None if visible is None else visible[:, first:]
        counts._replace(top=self.rest[part]).observe(x[:, first:], mean, later, _threads(x))
        earlier = None if visible is None else visible[:, :first]
        if self.fp32_sinks:  # they count for no scale, but have to be finite
            counts.counts[:, INVALID] += _wrong(x[:, :first], earlier).sum(axis=(1, 2))
        else:
            counts.observe(x[:, :first], mean, earlier, _threads(x))
        np.maximum(counts.top, self.rest[part], out=counts.top)

    def _settle(self, operand, ignore, first_bad):
        """Raise for what is not finite or all zero, or count it and leave it out; whether it can be in a tile."""
        counts = self.counts[operand]
        invalid = int(counts.counts[:, INVALID].sum())
        way_out = 'Calibrator(nonfinite="ignore")'
        if invalid:
            if not ignore:
                raise ValueError(
                    f"{operand}: expected finite values where they are seen, got {first_bad()}, {invalid} in all; "
                    f"{way_out} counts such values and leaves them out"
                )
            self.nonfinite[operand] = invalid
            counts.counts[:, INVALID] = 0
            return False
        if counts.counts.any() and not counts.top.any():
            if not ignore:
                raise ValueError(
                    f"{operand}: expected values other than 0, got a tensor of zeros (in what is seen); {way_out} "
                    "counts such tensors and leaves them out"
                )
            self.all_zero[operand] = 1
            counts.counts[...] = 0
            return False
        return bool(counts.counts.any())

    def _centre(self, k, visible):
        if k.shape[1] > MOST_ROWS:
            raise ValueError(f"k: expected at most {MOST_ROWS} keys in one sequence, got {k.shape[1]}; observe parts")
        finite = np.where(arrays.finite(k), k, k.dtype.type(0)) if self.nonfinite["k"] else k
        flags = None if visible is None else visible.view(np.uint8)
        in_fp32 = finite[:, : self.fp32_sinks]
        in_fp32 = in_fp32 if visible is None else in_fp32[visible[:, : self.fp32_sinks]]
        greatest = max(self.counts["k"].top.max(), np.float32(np.abs(in_fp32).max(initial=0)))
        shift = SUM_BITS - int(np.frexp(greatest)[1])
        total = np.zeros(self.k_sum.shape, np.int64)
        with _threads(k) as count:
            observe.sum_channels(finite, flags, 2.0**shift, total, count)
        self.k_sum += total.astype(object) << (UNIT - shift)
        self.k_tokens[:] = k.shape[1] if visible is None else visible.sum(axis=1)
        self._count("k_centred", k, visible, np.ascontiguousarray(self.k_mean[:, 0]))
        self.counts["k_centred"].counts[:, INVALID] = 0

    def _keep_tile(self, q, k, v, plan, b, visible, seed):
        digest = hashlib.blake2b(repr((seed, self.shape, q.shape, k.shape)).encode(), digest_size=16)
        for x, shown in ((q, visible[0]), (k, visible[1]), (v, visible[1])):
            prints = np.zeros(len(x), np.uint64)
            with _threads(x) as count:
                observe.fingerprints(x, None if shown is None else shown.view(np.uint8), prints, count)
            digest.update(prints)
        for x in (plan.bias, plan.mask):
            if x is not None:
                digest.update(np.array(arrays.once(x[b]), order="C"))
        number = int.from_bytes(digest.digest()[:8], "little")
        tile = tile_of(q, k, v, plan, b, as_arguments(self.options), visible, number, self.reservoir.tile_limit)
        self.reservoir.add({digest.hexdigest(): tile})


def _threads(x):
    return for_call(1 + x.size // VALUES_PER_THREAD)


def _first_bad(x, visible, b, ndim):
    """The first NaN or infinity that is seen, with its place in the caller's array."""
    place = tuple(int(i) for i in np.argwhere(_wrong(x, visible))[0])
    return f"{x[place]} at {(b, *place)[4 - ndim :]}"


def _wrong(x, visible):
    """Where x is NaN or infinite, of what is seen."""
    wrong = ~arrays.finite(x)
    return wrong if visible is None else wrong & visible[..., None]
