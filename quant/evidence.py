"""Whether what a candidate clips is there in the training tiles, as often as in all that was observed.

A search on few tiles finds that the values which they lack can be clipped for nothing: those of a token that ends every
text, say. The histograms know better. A clip is only tried where the mean square of what it cuts off is, in everything
that was observed, at most twice that in the training tiles, or too small to matter beside rounding.
"""

import numpy as np

from cyflash.quant.histogram import ABOVE, BELOW, BINS, EDGES, Counts

__all__ = ["Evidence"]

EXCESS = 2.0
BESIDE_ROUNDING = 0.01
LEVELS = 127
MIDDLES = (EDGES[:-1] + EDGES[1:]) / 2.0


class Evidence:
    """Of one operand: the histograms of its units, of all observations and of the training tiles.

    Parameters
    ----------
    observed : Counts
        Of all observations, by head.
    tiles : list of ndarray of float32, shape (heads, tokens, channels)
        The training tiles' part.
    mean : ndarray of float32, shape (heads, channels), optional
        What is subtracted from them.
    units : int
        1, or the number of heads.
    greatest : ndarray, shape (heads,)
        Values beyond are not of interest: those of keys in fp32.
    """

    def __init__(self, observed, tiles, mean, units, greatest):
        training = Counts.zeros(len(observed.top))
        for tile in tiles:
            training.observe(tile, mean)
        self._all, self._training = (_by_unit(counts, units, greatest) for counts in (observed, training))

    def holds(self, clips):
        """For each unit, whether it may be clipped at clips (units,)."""
        everywhere, here = (_cut_off(counts, clips) for counts in (self._all, self._training))
        return (everywhere <= EXCESS * here) | (everywhere <= BESIDE_ROUNDING * np.square(clips / LEVELS) / 12.0)


def _by_unit(counts, units, greatest):
    """(units, bins) of finite values: below, the bins, above; none beyond `greatest` of their head."""
    own = counts.counts[:, BELOW : ABOVE + 1].astype(np.float64)
    own[:, 1:] *= np.append(EDGES[:-1], EDGES[-1]) <= greatest[:, None]
    return own.reshape(units, -1, BINS + 2).sum(axis=1)


def _cut_off(counts, clips):
    """Mean square of what lies beyond the clip, over all values of each unit."""
    beyond = np.maximum(np.concatenate([[0.0], MIDDLES, EDGES[-1:]]) - clips[:, None], 0.0)
    return (counts * np.square(beyond)).sum(axis=1) / np.maximum(counts.sum(axis=1), 1.0)
