"""Where to clip, from a histogram of |x| alone: greatest value, percentile, least square error, or least KL divergence.

    clip("mse", histogram, percentile) -> the greatest magnitude that int8 is to represent; scale = clip / 127

None of these looks at the attention; `cyflash.quant.search` does. Mean relative L1 error of the attention output, all
per tensor: on eight fresh draws of a fixture after calibrating on eight others, and on each of two shipped texts after
calibrating on the other:

    data          max     percentile 99.9999   mse     octav   entropy   output
    normal        0.020   0.019                0.018   0.018   0.019     0.018
    fa3_outlier   0.134   0.131                0.221   0.233   0.391     0.097
    student_t     0.155   0.113                0.092   0.091   0.174     0.100
    sink9         0.246   0.240                0.207   0.200   0.236     0.057
    llm_like      0.683   0.626                0.451   0.443   0.572     0.114
    shipped       0.019   0.019                0.019   0.019   0.019     0.017

Outliers of Q and K carry the scores: to clip them can be worse than coarse steps. "entropy" is here to compare with
other tools; it is not recommended.
"""

import numpy as np

__all__ = ["METHODS", "clip", "square_error"]

LEVELS = 127
CODES = LEVELS + 1  # magnitudes of codes, 0 among them
LINEAR_BINS = 2048
EMPTY = 1e-4  # what counts for nothing in a bin that the tail was added to
SEARCHED_OCTAVES = 8  # below the greatest value


def clip(method, histogram, percentile=99.9999):
    """The magnitude to clip at; 0 for a histogram without values other than 0.

    Parameters
    ----------
    method : {"max", "percentile", "mse", "octav", "entropy"}
    histogram : Histogram
    percentile : float
        Of "percentile" only.

    Returns
    -------
    float
        At most the greatest value.
    """
    if histogram.max == 0.0 or not histogram.counts.any():  # nothing, or nothing that the bins resolve
        return histogram.max
    found = percentile_clip(histogram, percentile) if method == "percentile" else METHODS[method](histogram)
    return float(min(found, histogram.max))


def max_clip(histogram):
    return histogram.max


def percentile_clip(histogram, percentile):
    """The value that `percentile` % of all do not exceed, interpolated within its bin."""
    edges = np.minimum(histogram.edges, histogram.max)
    reached = histogram.below + np.concatenate([[0], np.cumsum(histogram.counts)])
    wanted = histogram.count * (percentile / 100.0)
    if wanted <= reached[0]:
        return edges[0]
    if wanted > reached[-1]:
        return histogram.max
    i = int(np.searchsorted(reached, wanted)) - 1
    return edges[i] + (edges[i + 1] - edges[i]) * (wanted - reached[i]) / histogram.counts[i]


def mse_clip(histogram):
    """The clip of least mean square error, among the edges of the bins and the greatest value."""
    candidates = _candidates(histogram)
    return candidates[int(np.argmin([square_error(histogram, candidate) for candidate in candidates]))]


def octav_clip(histogram):
    """The fixed point of OCTAV (Sakr et al., ICML 2022): Newton's steps to the least square error of uniform noise.

        s <- sum of |x| beyond s / (4^-8 / 3 * count within s + count beyond s)
    """
    edges, counts = np.minimum(histogram.edges, histogram.max), np.append(histogram.counts, histogram.above)
    sums = np.append(histogram.sums, histogram.above * histogram.max)
    beyond = np.append(np.cumsum(counts[::-1])[::-1], 0)
    beyond_sum = np.append(np.cumsum(sums[::-1])[::-1], 0.0)
    nonzero = beyond[0]  # what is below all bins is as good as 0
    s = beyond_sum[0] / nonzero
    for _ in range(100):
        i = int(np.searchsorted(edges, s, "right"))  # the first bin that s does not cut
        low, high = (edges[i - 1], edges[i]) if 0 < i < len(edges) else (s, s)
        cut = counts[i - 1] * (high - s) / (high - low) if high > low else 0.0
        count = beyond[i] + cut
        total = beyond_sum[i] + cut * (s + high) / 2.0
        new = total / (4.0**-8 / 3.0 * (nonzero - count) + count)
        if abs(new - s) <= 1e-6 * s:
            break
        s = new
    return new


def entropy_clip(histogram):
    """The clip of least KL divergence between the values and their 128 levels, as TensorRT introduced it.

    On 2048 equal bins, one candidate for each from 128 on; prefix sums make a candidate 128 steps instead of 2048.
    """
    counts = _equal_bins(histogram)
    mass, filled = (np.concatenate([[0.0], np.cumsum(x)]) for x in (counts, counts > 0))
    surprise = np.concatenate([[0.0], np.cumsum(counts * _log(counts))])
    best, best_divergence = LINEAR_BINS, np.inf
    for end in range(CODES, LINEAR_BINS + 1):
        if mass[end] == 0.0:
            continue
        last, tail = counts[end - 1], mass[-1] - mass[end]
        # P: the bins up to `end`, what is beyond in the last of them. Q: their levels, spread over filled bins.
        bounds = np.arange(CODES + 1) * end // CODES
        level, width = np.diff(mass[bounds]), np.diff(filled[bounds])
        spread = np.divide(level, width, out=np.zeros(CODES), where=width > 0)
        spread[-1] = max(spread[-1], EMPTY)
        own = surprise[end] - last * _log(last) + (last + tail) * _log(last + tail)
        cross = level @ _log(spread) + tail * _log(spread[-1])
        divergence = (own - cross) / mass[-1] + np.log(mass[end] / mass[-1])
        if divergence < best_divergence:
            best, best_divergence = end, divergence
    return histogram.max * best / LINEAR_BINS


METHODS = {
    "max": max_clip, "percentile": percentile_clip, "mse": mse_clip, "octav": octav_clip, "entropy": entropy_clip,
}  # fmt: skip


def square_error(histogram, clip):
    """Sum of squared errors of all values when int8 represents magnitudes up to `clip`, bins taken as evenly filled."""
    step = clip / LEVELS
    low, high = np.minimum(histogram.edges[:-1], histogram.max), np.minimum(histogram.edges[1:], histogram.max)
    filled = histogram.counts > 0
    low, high, counts = low[filled], high[filled], histogram.counts[filled]
    low = np.where(high > low, low, histogram.edges[:-1][filled])
    width = np.where(high > low, high - low, 1.0)
    mean = np.where(high > low, (_square_rounding(high, step) - _square_rounding(low, step)) / width,
                    (low - step * np.minimum(np.rint(low / step), LEVELS)) ** 2)  # fmt: skip
    return float(counts @ mean) + histogram.above * (histogram.max - clip) ** 2


def _square_rounding(x, step):
    """Integral from 0 to x of the squared distance to the nearest code: step * n for n up to 127."""
    n = np.minimum(np.rint(x / step), LEVELS)
    rest = x - n * step
    return n * step**3 / 12.0 + rest**3 / 3.0


def _candidates(histogram):
    edges = histogram.edges
    inside = edges[(edges < histogram.max) & (edges > histogram.max / 2**SEARCHED_OCTAVES)]
    return np.append(inside, histogram.max)


def _equal_bins(histogram):
    """The histogram in 2048 bins of equal width up to the greatest value; a bin that is cut gives its parts to each."""
    edges = np.minimum(histogram.edges, histogram.max)
    reached = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    wanted = np.linspace(0.0, histogram.max, LINEAR_BINS + 1)
    end = int(np.searchsorted(edges, histogram.max))  # beyond it edges repeat
    counts = np.diff(np.interp(wanted, edges[: end + 1], reached[: end + 1]))
    counts[-1] += histogram.above
    return counts


def _log(x):
    return np.log(x, out=np.zeros_like(np.asarray(x, np.float64)), where=np.asarray(x) > 0)
