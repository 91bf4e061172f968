"""Histograms of |x| with bins that are fixed beforehand, and exact: counts and sums are integers.

    Counts       what observing adds to: one histogram for each head, in the layout of cpu/observe.pyx
    Histogram    one of them, or all heads together, as numbers to look at and to clip by

A bin is the 16th part of an octave: the exponent of a float32 and the top 4 bits of its mantissa. Nothing depends on
the order of what was seen, nothing grows, and histograms add up; DDSketch (Masson et al., 2019) is a relative.
"""

from typing import NamedTuple

import numpy as np

from cyflash.cpu import observe
from cyflash.cpu.team import Team

__all__ = ["Counts", "Histogram"]

BINS, PER_OCTAVE, FIRST_EXPONENT = (observe.LAYOUT[name] for name in ("bins", "bins_per_octave", "first_exponent"))
BELOW, ABOVE, INVALID = 0, BINS + 1, BINS + 2  # columns of Counts.counts, beside the bins

_octaves, _parts = np.divmod(np.arange(BINS + 1), PER_OCTAVE)
EDGES = np.ldexp(1.0 + _parts / PER_OCTAVE, FIRST_EXPONENT + _octaves)
EDGES.flags.writeable = False
# What a step of the mantissa's low bits is worth in each bin.
LOW_STEP = np.ldexp(1.0, FIRST_EXPONENT + _octaves[:-1] - 23)


class Counts(NamedTuple):
    """Histograms of several heads: all integers, but the greatest value of each."""

    counts: np.ndarray
    """(heads, BINS + 3) int64: smaller values, the bins, larger values, NaN and inf."""
    sums: np.ndarray
    """(heads, BINS) int64: of the bits of each value that its bin does not tell."""
    top: np.ndarray
    """(heads,) float32: greatest finite value."""

    @classmethod
    def zeros(cls, heads):
        counts, sums = (np.zeros((heads, columns), np.int64) for columns in (BINS + 3, BINS))
        return cls(counts, sums, np.zeros(heads, np.float32))

    def observe(self, x, mean=None, seen=None, threads=None):
        """Add |x - mean| of x (H, L, D); seen: (H, L) bool, the rows that count. threads: a Team; default one."""
        seen = None if seen is None else np.array(seen, order="C").view(np.uint8)
        with threads or Team(1) as count:
            observe.count_values(x, mean, seen, *self, count)

    def add(self, other):
        self.counts[...] += other.counts
        self.sums[...] += other.sums
        np.maximum(self.top, other.top, out=self.top)

    def histogram(self, head=None):
        """One head's `Histogram`, or that of all together."""
        if head is None:
            return Histogram(self.counts.sum(axis=0), self.sums.sum(axis=0), float(self.top.max(initial=0)))
        return Histogram(self.counts[head].copy(), self.sums[head].copy(), float(self.top[head]))


class Histogram:
    """How many values of |x| have which size.

    Attributes
    ----------
    edges : ndarray of float64, shape (BINS + 1,)
        Lower edges of the bins, and the end of the last: 2^-64 to 2^32, 16 bins an octave.
    counts : ndarray of int64, shape (BINS,)
    sums : ndarray of float64, shape (BINS,)
        Sum of |x| in each bin: an exact integer multiple of a power of two, rounded once.
    below, above : int
        How many are smaller than the first edge (zeros among them), or beyond the last.
    count : int
        Of all finite values.
    nonfinite : int
        How many NaN and infinities there were, which `count` leaves out.
    max : float
        Greatest finite |x|, exact.
    """

    edges = EDGES

    def __init__(self, counts, sums, greatest):
        self.counts = counts[1 : BINS + 1]
        self.sums = (self.counts.astype(np.float64) * (EDGES[:-1] / LOW_STEP) + sums) * LOW_STEP
        self.below, self.above, self.nonfinite = (int(counts[column]) for column in (BELOW, ABOVE, INVALID))
        self.count = self.below + self.above + int(self.counts.sum())
        self.max = greatest

    def __repr__(self):
        return f"Histogram(count={self.count}, max={self.max:.6g})"

    def saturated(self, scale):
        """The share of values that a scale saturates, |x| > 127.5 * scale; a bin that this cuts counts in part."""
        limit = 127.5 * float(scale)
        if self.count == 0 or self.max <= limit:
            return 0.0
        inside = np.clip((limit - EDGES[:-1]) / np.diff(EDGES), 0.0, 1.0)
        return float((((1.0 - inside) * self.counts).sum() + self.above) / self.count)
