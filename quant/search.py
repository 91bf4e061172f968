"""Static scales of one layer: from its histograms alone, or searched for the least error of the attention's output.

    clipped_scales(layer, ...)   clip each tensor where a method of clipping.py says
    output_scales(layer, ...)    coordinate descent on the training tiles, every candidate run by the kernel itself
    error(tiles, scales)         what `flash_attention_int8` loses on tiles, against attention in float64

A *unit* is what shares one scale: all heads of a layer, or one head of q, or one of k and v with its group of q's.
Units of one operand partition the heads, so one call of the kernel tries a step for all of them.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cyflash import reference
from cyflash.attention import flash_attention, flash_attention_int8
from cyflash.cpu import threads
from cyflash.quant.clipping import clip, square_error
from cyflash.quant.evidence import Evidence
from cyflash.quant.layer import Layer
from cyflash.quant.metrics import pooled
from cyflash.quantized import LayerScales, scale_of

__all__ = [
    "OBJECTIVES", "Point", "Trials", "check_objective", "clipped_scales", "error", "exact", "output_scales",
    "over_tiles", "require_halves", "run", "searched",
]  # fmt: skip

STEPS = 8  # per octave: the finest step of the search is 2^(1/8)
COARSE = tuple(range(-4 * STEPS, STEPS // 2 + 1, STEPS // 2))  # from a 16th of the greatest value to 1.4 times it
FINE = ((-2, 2), (-1, 1))
SWEEPS = 3
GAIN = 0.01  # a step must make the error at least so much smaller: less does not carry over to other data
WORST_ROW = 1.5  # a step must not make a unit's worst row so many times as bad as at the start: a mean hides it
MOST_WORK = 4e9  # FLOPs of one candidate: about 40 ms; a search has up to 150


# From histograms


def clipped_scales(layer, granularity, smooth_k, method, percentile):
    """LayerScales by a method of clipping.py."""
    clips = {
        part: _units(layer, part, by, lambda histogram: clip(method, histogram, percentile))
        for part, by in _parts(granularity).items()
    }
    smooth = np.zeros(1, bool)
    if clips["k"] is not None:
        smooth = _smooth_units(layer, granularity[1], smooth_k, clips)
        clips["k"] = np.where(smooth, clips["k_centred"], clips["k"])
    return _layer_scales(layer, clips, smooth, layer.fp32_sinks)


def _parts(granularity):
    q, k, v = granularity
    return {"q": q, "k": k, "k_centred": k, "v": v}


def _units(layer, part, by, clip_of):
    """The clip of each unit: (1,) or (heads,); None where the operand is quantised in the call."""
    if by == "token":
        return None
    counts = layer.counts[part]
    if part != "q" and layer.longest[1] <= layer.fp32_sinks:
        raise ValueError(
            f"{part}: expected a sequence of more keys than fp32_sinks={layer.fp32_sinks}, got {layer.longest[1]} at "
            "most: all of them are in float32, and nothing is left to be scaled"
        )
    whole = clip_of(counts.histogram()) if counts.counts.any() else 0.0
    if whole == 0.0 and part != "k_centred":  # keys that are all alike are zero without their mean
        raise ValueError(f"{part}: no value other than 0 was seen, which says nothing about a scale")
    if by == "tensor":
        return np.array([whole])
    own = np.array([clip_of(counts.histogram(head)) for head in range(len(counts.top))])
    return np.where(own > 0.0, own, whole)  # a head that was 0 so far need not stay so


def _smooth_units(layer, by, smooth_k, clips):
    if smooth_k != "auto":
        return np.full(len(clips["k"]), smooth_k)
    heads = [None] if by == "tensor" else range(layer.shape.Hk)
    return np.array([
        _rounding(layer, "k_centred", head, clips["k_centred"][i]) < _rounding(layer, "k", head, clips["k"][i])
        for i, head in enumerate(heads)
    ])  # fmt: skip


def _rounding(layer, part, head, clip):
    return square_error(layer.counts[part].histogram(head), clip) if clip > 0.0 else 0.0


def _layer_scales(layer, clips, smooth, fp32_sinks):
    """LayerScales from the clip of each unit; smooth: for each unit of k, or for each kv head."""
    scales = {}
    for operand in "qkv":
        units = clips[operand]
        # A step may widen the clip of values that are near the greatest float32.
        scale = None if units is None else scale_of(np.minimum(units, np.finfo(np.float32).max).astype(np.float32))
        one = scale is not None and len(scale) == 1
        scales[f"{operand}_scale"] = scale[0] if one else None if scale is None else scale[:, None, None]
    k_mean = None
    if clips["k"] is not None and smooth.any():
        k_mean = np.where(smooth[:, None, None], layer.k_mean, np.float32(0))
    return LayerScales(**scales, k_mean=k_mean, fp32_sinks=fp32_sinks)


# Measured on tiles


def check_objective(objective):
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(map(repr, OBJECTIVES))}, got {objective!r}")


def require_halves(layer, training, held_out):
    """ValueError if one of the halves of the tiles is empty."""
    if not (training and held_out):
        few = len(training)
        raise ValueError(
            f"expected at least two different observations, one to search on and one to judge by, got {few} with "
            f"finite values that fit reservoir_mb={layer.reservoir.limit / 1e6:g} (of {layer.observations} observed); "
            "observe more, or use a method that needs no tiles, such as 'max'"
        )


def output_scales(layer, training, granularity, smooth_k, objective):
    """LayerScales that make the error of the output least on the training tiles."""
    trials = Trials(training, layer.shape, objective)
    options = [False, True] if smooth_k == "auto" and granularity[1] != "token" else [smooth_k is True]
    return best_of(searched(layer, trials, granularity, smooth, layer.fp32_sinks) for smooth in options).scales()


@dataclass(frozen=True, eq=False)
class Point:
    """A point of the search: the clips of each operand's units, and what is smoothed, each kv head on its own."""

    layer: Layer
    trials: "Trials"
    granularity: dict
    clips: dict
    smooth: np.ndarray
    fp32_sinks: int
    evidence: dict
    start: np.ndarray | None = None
    """The errors of where the search began."""

    @cached_property
    def errors(self):
        """As `Trials.errors`."""
        return self.trials.errors(self.scales())

    def scales(self):
        return _layer_scales(self.layer, self.clips, self.smooth, self.fp32_sinks)

    def shares(self, by, operand="k"):
        """What each tile and head adds to the error of each unit of an operand: (units, n)."""
        return self.trials.shares(self.errors, by, operand)

    def moved(self, operand, steps):
        clips = self.clips | {operand: self.clips[operand] * 2.0 ** (steps / STEPS)}
        return replace(self, clips=clips, start=self.errors if self.start is None else self.start)

    def holds(self, operand):
        """For each unit of an operand: is its clip one that the training tiles can tell of, and no row much worse?"""
        known = self.evidence[operand].holds(self.clips[operand])
        if not known.any():  # no need to run it
            return known
        by = self.granularity[operand]
        worst, before = (self.trials.worst(errors, by, operand) for errors in (self.errors, self.start))
        return known & (worst <= WORST_ROW * before)


def searched(layer, trials, granularity, smooth, fp32_sinks):
    """Coordinate descent from the greatest values on: the `Point` where no step helps.

    The worst row, one of many, is a rugged function, on which descent gets stuck: it also begins at the clips of least
    square error. For the means that finds little more, and more of what holds for the training tiles alone.
    """
    parts = {"q": "q", "k": "k_centred" if smooth else "k", "v": "v"}
    by = dict(zip("qkv", granularity, strict=True))
    tops = {operand: _tops(layer, part, by[operand], fp32_sinks) for operand, part in parts.items()}
    evidence = {
        operand: _evidence(layer, trials.tiles, operand, part, len(tops[operand]), fp32_sinks)
        for operand, part in parts.items() if tops[operand] is not None
    }  # fmt: skip
    starts = [tops]
    if trials.objective == "worst_row":
        least = {
            operand: _units(layer, part, by[operand], lambda histogram: clip("mse", histogram))
            for operand, part in parts.items()
        }
        starts.append({operand: x if x is None else np.minimum(x, least[operand]) for operand, x in tops.items()})
    smooth = np.full(layer.shape.Hk, smooth)
    return best_of(
        _descended(Point(layer, trials, by, clips, smooth, fp32_sinks, evidence)) for clips in starts
    )


def _evidence(layer, tiles, operand, part, units, fp32_sinks):
    first = 0 if operand == "q" else fp32_sinks
    arrays = [getattr(tile, operand)[:, first:] for tile in tiles]
    mean = layer.k_mean[:, 0] if part == "k_centred" else None
    return Evidence(layer.counts[part], arrays, mean, units, _greatest(layer, part, fp32_sinks))


def _descended(point):
    operands = [operand for operand in "kqv" if point.clips[operand] is not None]
    for sweep in range(SWEEPS):
        before = point
        for operand in operands:
            for moves in (COARSE if sweep == 0 else (-4, 4), *FINE):
                point = _best_step(point, operand, [move for move in moves if move])
        if point is before:
            break
    return point


def _best_step(point, operand, moves):
    """The point after the best of `moves` for each unit of an operand; the same one where none helps.

    What a move gains counts less its standard error over tiles and heads: a rare outlier that happens not to matter
    where it was measured is no reason to clip.
    """
    by = point.granularity[operand]
    now = point.shares(by, operand)
    best, steps = -GAIN * now.sum(axis=1), np.zeros(len(now), int)
    for move in moves:
        moved = point.moved(operand, np.full(len(now), move))
        holds = moved.holds(operand)
        if not holds.any():
            continue
        change = moved.shares(by, operand) - now
        score = np.where(holds, change.sum(axis=1) + _standard_error(change), np.inf)
        steps = np.where(score < best, move, steps)
        best = np.minimum(score, best)
    return point.moved(operand, steps) if steps.any() else point


def _standard_error(x):
    """Of the sums of rows; 0 where there is nothing to tell it from."""
    n = x.shape[1]
    return x.std(axis=1, ddof=1) * np.sqrt(n) if n > 1 else np.zeros(len(x))


def _tops(layer, part, by, fp32_sinks):
    """The greatest value of each unit, without the keys that are in fp32."""
    if by == "token":
        return None
    own = _greatest(layer, part, fp32_sinks).astype(np.float64)
    whole = own.max(initial=0.0)
    if whole == 0.0 and part != "k_centred":
        raise ValueError(f"{part}: no value other than 0 was seen, which says nothing about a scale")
    return np.array([whole]) if by == "tensor" else np.where(own > 0.0, own, whole)


def _greatest(layer, part, fp32_sinks):
    """The greatest value of each head, without the keys that are in fp32."""
    return layer.counts[part].top if part == "q" or fp32_sinks == layer.fp32_sinks else layer.rest[part]


def best_of(points):
    """The first point, or a later one that is clearly better; for each kv head its own where heads share no scale."""
    best, *others = points
    by = "tensor" if "tensor" in best.granularity.values() else "head"
    for point in others:
        change = point.shares(by) - best.shares(by)
        better = change.sum(axis=1) + _standard_error(change) < 0.0
        best = _mixed(best, point, np.broadcast_to(better, best.layer.shape.Hk))
    return best


def _mixed(a, b, take_b):
    """Point b for the kv heads where take_b says so, with their query heads; point a for the others."""
    if take_b.all() or not take_b.any():
        return b if take_b.all() else a
    choice = {"q": np.repeat(take_b, a.layer.shape.H // a.layer.shape.Hk), "k": take_b, "v": take_b}
    clips = {
        operand: None if x is None else np.where(choice[operand], b.clips[operand], x) for operand, x in a.clips.items()
    }
    return replace(a, clips=clips, smooth=np.where(take_b, b.smooth, a.smooth))


class Trials:
    """Tiles with their exact outputs: runs candidates on them."""

    def __init__(self, tiles, shape, objective="rel_l1"):
        self.shape, self.objective = shape, objective
        self.tiles = _affordable(tiles)
        self.exact = over_tiles(exact, self.tiles)

    def errors(self, scales):
        """What the errors of units are put together from: (tiles, 3, H), error, size and worst row of each head."""
        outputs = over_tiles(lambda tile: run(tile, scales), self.tiles)
        measure = OBJECTIVES[self.objective][0]
        return np.array([[*measure(*pair), _worst_row(*pair)] for pair in zip(outputs, self.exact, strict=True)])

    def shares(self, errors, by, operand):
        """(units, n): for units of all heads, of the heads of q, or of the groups of kv heads."""
        error, size, _ = self._of_units(errors, by, operand)
        return OBJECTIVES[self.objective][1](error, size)

    def worst(self, errors, by, operand):
        """The worst row of each unit."""
        return self._of_units(errors, by, operand)[2].max(axis=1)

    def _of_units(self, errors, by, operand):
        units = 1 if by == "tensor" else self.shape.H if operand == "q" else self.shape.Hk
        return errors.transpose(1, 2, 0).reshape(3, units, -1)


def over_tiles(function, tiles):
    """[function(tile)], on as many threads as calls get by default: one each, for tiles are small."""
    with ThreadPoolExecutor(max(1, min(len(tiles), threads.count()))) as pool:
        return list(pool.map(function, tiles))


def run(tile, scales):
    """The output of int8 attention on a tile."""
    return flash_attention_int8(*tile[:3], quant=scales, num_threads=1, **tile.options)


def exact(tile):
    """The output of fp32 attention on a tile."""
    return flash_attention(*tile[:3], num_threads=1, **tile.options)


def error(tiles, scales):
    """A Comparison, as a dict, of int8 attention on all tiles with attention in float64.

    None without tiles, and where int8 gives NaN or infinities for values too large for float32 arithmetic.
    """
    if not tiles:
        return None
    pairs = over_tiles(lambda tile: (run(tile, scales), reference.attention(*tile[:3], **tile.options)), tiles)
    if not all(np.isfinite(x).all() for pair in pairs for x in pair):
        return None
    return pooled(pairs)._asdict()


def _affordable(tiles):
    """The first tiles, at least one, whose work together is affordable for each candidate."""
    work = np.cumsum([tile.work for tile in tiles])
    return tiles[: max(1, int(np.searchsorted(work, MOST_WORK, "right")))]


# Objectives: (error and size of each head of one tile, what these add to the error of a unit). For "rmse" errors are
# mean squares, which are least where their root is.


def _l1(output, exact):
    return (np.abs(x).sum(axis=(1, 2), dtype=np.float64) for x in (output - exact, exact))


def _squares(output, exact):
    difference = (output - exact).astype(np.float64)
    return np.square(difference).sum(axis=(1, 2)), np.full(len(exact), float(exact[0].size))


def _worst_row(output, exact):
    rows, sizes = (np.abs(x).sum(axis=2, dtype=np.float64) for x in (output - exact, exact))
    sizes = np.maximum(sizes, sizes.mean(axis=1, keepdims=True))
    return (rows / np.where(sizes > 0.0, sizes, 1.0)).max(axis=1, initial=0.0)


def _part_of_whole(error, size):
    whole = size.sum(axis=1, keepdims=True)
    return error / np.where(whole > 0.0, whole, 1.0)


def _largest(error, size):
    return error.max(axis=1, keepdims=True)


OBJECTIVES = {
    "rel_l1": (_l1, _part_of_whole),
    "rmse": (_squares, _part_of_whole),
    "worst_row": (lambda output, exact: (_worst_row(output, exact), np.ones(len(exact))), _largest),
}
