"""The cheapest way to run each kv head of a layer that keeps its error below a target: a ladder, measured rung by rung.

    plan_layer(layer, ...)  search scales for each rung on the training tiles -> errors of each head on the held-out
                            ones, times -> for each kv head the cheapest rung that is good enough -> LayerScales

The order of the ladder is the order of the work; times are measured for the reader and change nothing: a plan does not
depend on how busy the machine was. Errors are of query heads, against attention in float64: sum|O - O'| / sum|O| over
all tiles, and that of the worst row, whose sum|O| counts as the head's mean row where it is less. A kv head is as bad
as the worst query head of its group.
"""

import dataclasses
import itertools
import statistics
import time
from typing import NamedTuple

import numpy as np

from cyflash import reference
from cyflash.quant.layer import LADDER_SINKS, as_arguments
from cyflash.quant.metrics import pooled
from cyflash.quant.search import Trials, exact, over_tiles, run, searched
from cyflash.quant.tiles import Tile
from cyflash.quantized import LayerScales

__all__ = ["Rung", "plan_layer", "rungs"]

ROUNDS = 5
TIMED_WORK = 4e9  # FLOPs of a call that is timed: some 20 ms in fp32


class Rung(NamedTuple):
    """A way to run a head; scales: None for fp32."""

    name: str
    scales: LayerScales | None


def plan_layer(layer, training, held_out, granularity, smooth_k, target):
    """(LayerScales, {"parts", "rungs"}); target: {"rel_l1", "worst"}."""
    ladder = rungs(layer, training, granularity, smooth_k)
    truths = over_tiles(lambda tile: reference.attention(*tile[:3], **tile.options), held_out)
    found = [_errors(layer.shape, held_out, truths, rung) for rung in ladder]
    relative = _times(layer, ladder)
    choice = [_choose(head, found, target) for head in range(layer.shape.Hk)]
    if missed := [head for head, rung in enumerate(choice) if rung is None]:
        raise ValueError(_missed(missed, ladder, found, target))

    parts, about = [], []
    for rung in sorted(set(choice)):
        heads = tuple(head for head, chosen in enumerate(choice) if chosen == rung)
        parts.append((heads, _of_heads(ladder[rung].scales, heads, layer.shape)))
        worst = {name: float(values[list(heads)].max()) for name, values in found[rung].items()}
        about.append({"kv_heads": list(heads), "rung": ladder[rung].name, **worst, "time": relative[rung]})
    everything = [
        {"rung": rung.name, "time": cost, **{name: [float(x) for x in values] for name, values in errors.items()}}
        for rung, cost, errors in zip(ladder, relative, found, strict=True)
    ]
    plain = len(parts) == 1 and parts[0][1] is not None
    scales = parts[0][1] if plain else LayerScales(parts=tuple(parts))
    return scales, {"parts": about, "rungs": everything, "time": _time_of(layer, Rung("planned", scales))}


def rungs(layer, training, granularity, smooth_k):
    """The ladder, cheapest first by the work it is: int8 with more and more help, then bf16 P.V, then fp32."""
    smooths = [smooth_k] if smooth_k != "auto" else [False, True]
    if granularity[1] == "token":
        smooths = [False]  # such keys are smoothed in the call
    sinks = [layer.fp32_sinks]
    if layer.fp32_sinks == 0 and all(top.any() for top in layer.rest.values()):
        sinks.append(LADDER_SINKS)
    trials = Trials(training, layer.shape)
    points = {
        (smooth, n): searched(layer, trials, granularity, smooth, n) for smooth, n in itertools.product(smooths, sinks)
    }
    int8, bf16 = [], []
    for (smooth, n), point in points.items():
        names = ["smooth-K"] * (smooth and len(smooths) > 1) + [f"{n} fp32 sinks"] * (n > 0 and len(sinks) > 1)
        scales = point.scales()
        int8.append((names, scales))
        if scales.v_scale is not None:
            int8.append(([*names, "V per token"], dataclasses.replace(scales, v_scale=None)))
        bf16.append((names, dataclasses.replace(scales, v_scale=None, pv="bf16")))
    int8.sort(key=lambda one: len(one[0]))
    bf16.sort(key=lambda one: len(one[0]))
    return [
        *(Rung(", ".join(["int8", *names]), scales) for names, scales in int8),
        *(Rung(", ".join(["int8, bf16 PV", *names]), scales) for names, scales in bf16),
        Rung("fp32", None),
    ]


def _run(tile, rung):
    return exact(tile) if rung.scales is None else run(tile, rung.scales)


def _errors(shape, tiles, truths, rung):
    """{"rel_l1", "worst"} of each kv head."""
    outputs = over_tiles(lambda tile: _run(tile, rung), tiles)
    by_head = [
        pooled((output[head, None], truth[head, None]) for output, truth in zip(outputs, truths, strict=True))
        for head in range(shape.H)
    ]
    found = {"rel_l1": [one.rel_l1 for one in by_head], "worst": [one.worst_row for one in by_head]}
    return {name: np.reshape(values, (shape.Hk, -1)).max(axis=1) for name, values in found.items()}


def _time_of(layer, rung):
    """Time of a rung for the whole layer over that of fp32."""
    tile = _longest(layer, layer.shape.Hk)
    seconds = _seconds(tile, [rung, Rung("fp32", None)], rounds=3)
    return seconds[0] / seconds[1]


def _times(layer, ladder):
    """Times of rungs over that of the last one, on as many heads as are quickly run."""
    H, Hk, D, Dv = layer.shape
    Lq, Lk = layer.longest
    n = min(Hk, max(1, int(TIMED_WORK / (2 * H // Hk * Lq * Lk * (D + Dv)))))
    ladder = [rung._replace(scales=_of_heads(rung.scales, range(n), layer.shape)) for rung in ladder]
    seconds = _seconds(_longest(layer, n), ladder, ROUNDS)
    return [one / seconds[-1] for one in seconds]


def _longest(layer, n):
    """Noise of the longest call's shape, for the first n kv heads; without masks and biases, which belong to calls."""
    H, Hk, D, Dv = layer.shape
    Lq, Lk = layer.longest
    r, group = np.random.default_rng(0), H // Hk
    shapes = ((group * n, Lq, D), (n, Lk, D), (n, Lk, Dv))
    options = {
        name: x[: group * n] if isinstance(x, np.ndarray) else x for name, x in as_arguments(layer.options).items()
    }
    return Tile(*(r.standard_normal(shape, dtype=np.float32) for shape in shapes), options)


def _seconds(tile, ladder, rounds):
    """Median seconds of each rung on one thread, measured in turns."""
    seconds = [[] for _ in ladder]
    for _ in range(1 + rounds):
        for times, rung in zip(seconds, ladder, strict=True):
            begin = time.perf_counter()
            _run(tile, rung)
            times.append(time.perf_counter() - begin)
    return [statistics.median(times[1:]) for times in seconds]  # the first round warms up


def _choose(head, found, target):
    """The first rung that is good enough for one kv head, or None."""
    for rung, errors in enumerate(found):
        if all(errors[name][head] <= most for name, most in target.items()):
            return rung
    return None


def _missed(heads, ladder, found, target):
    last = found[-1]
    best = [
        f"kv head {head}: {last['rel_l1'][head]:.2e}, worst row {last['worst'][head]:.2e} in {ladder[-1].name}"
        for head in heads
    ]
    return (
        f"no rung of the ladder reaches rel_l1={target['rel_l1']:g} and worst={target['worst']:g}; at best "
        f"{'; '.join(best)}"
    )


def _of_heads(scales, kv_heads, shape):
    """LayerScales of some kv heads and their query heads alone."""
    if scales is None:
        return None
    group = shape.H // shape.Hk
    q_heads = [head * group + i for head in kv_heads for i in range(group)]

    def own(x, heads):
        return x if x is None or x.size == 1 else x[list(heads)]

    return dataclasses.replace(
        scales, q_scale=own(scales.q_scale, q_heads), k_scale=own(scales.k_scale, kv_heads),
        v_scale=own(scales.v_scale, kv_heads),
        k_mean=None if scales.k_mean is None else scales.k_mean[list(kv_heads)],
    )  # fmt: skip
