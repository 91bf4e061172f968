"""Where the error of one layer comes from, head by head, and what other settings would give and cost.

    diagnose(tiles, layer)                          error of each head; how much of it the codes of QK, P and V cause
    alternatives(layer, tiles)                      {rung: LayerScales}: the layer as it is, and with other settings
    measure(tiles, rungs) -> cheapest_under(...)    error and time of each; the cheapest that is good enough

Everything is measured with the kernels that calls use, against attention in float64; results are what JSON holds.
"""

import statistics
import time
from dataclasses import replace

import numpy as np

from cyflash import reference
from cyflash.attention import flash_attention, flash_attention_int8
from cyflash.quant.layer import LADDER_SINKS as SINKS
from cyflash.quant.metrics import pooled
from cyflash.quantized import LayerScales, quantize

__all__ = [
    "AS_IT_IS",
    "CAUSES",
    "FP32",
    "RUNGS",
    "alternatives",
    "cheapest_under",
    "diagnose",
    "exact_outputs",
    "measure",
    "parts_of",
]

CAUSES = ("qk", "p", "v")
AS_IT_IS, FP32 = "as it is", "fp32"
# The rungs of `alternatives`, and what they are.
RUNGS = {
    AS_IT_IS: "the scales as the file has them",
    "smooth-K": "the mean of the keys subtracted before they are quantised",
    "fp32 sinks": f"the first {SINKS} keys and values in float32, and left out of the scales",
    "V per token": "a scale for each token of V, found in the call",
    "all three": "smooth-K, fp32 sinks and V per token",
    "bf16 PV": "smooth-K and fp32 sinks, and the second product in bfloat16 with V itself",
    "dynamic": "nothing static: a scale for each token of Q, K and V, found in the call, and smooth-K",
    FP32: "no quantisation",
}
LARGEST_CODE = 127
LEAST_CALLS = 3
PER_HEAD_OPTIONS = {"alibi_slopes": -1, "sinks": -1, "bias": -3, "mask": -3}  # the axis of query heads


def exact_outputs(tiles):
    """Attention of each tile in float64: the `exact` of the functions below, for several of them on the same tiles."""
    return [reference.attention(tile.q, tile.k, tile.v, **tile.options) for tile in tiles]


# Where the error comes from


def diagnose(tiles, layer, *, exact=None, num_threads=None):
    """Measure the error of a layer's scales, and split it among the codes of Q and K, of P, and of V.

    Parameters
    ----------
    tiles : list of Tile
        (q, k, v, options) of the layer; H, Hk, D and Dv the same in all.
    layer : LayerScales
        With or without parts.
    exact : list of ndarray, optional
        `exact_outputs(tiles)`, where that is at hand.
    num_threads : int, optional
        As in `flash_attention`.

    Returns
    -------
    dict
        - error: `compare` of all tiles together, as a dict
        - heads: one dict per query head:

          - head, kv_head
          - rel_l1, cosine, rmse, max_abs, worst_row: `compare` of the head, all tiles together
          - qk, p, v: relative L1 error that remains when only the codes of Q and K are used (V exact, P in float32),
            only those of P (the difference that rounding P makes, on the same codes of the others), only those of V
          - cause: the largest of the three, "qk", "p" or "v"; None for a head that runs in fp32
          - saturated: {"q", "k", "v"}: share of the tiles' values beyond the largest code; None where that is found in
            the call, so that nothing saturates

    Raises
    ------
    ValueError
        Without tiles; or where the scales do not fit them.

    Notes
    -----
    The three parts need not add up to the whole: errors partly cancel, so it is at most about their sum.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.quant import LayerScales
    >>> from cyflash.quant.diagnosis import diagnose
    >>> from cyflash.quant.tiles import Tile
    >>> rng = np.random.default_rng(0)
    >>> tile = Tile(*(rng.standard_normal((2, 64, 32), dtype=np.float32) for _ in "qkv"), {"causal": True})
    >>> heads = diagnose([tile], LayerScales(0.03, 0.03, 0.3))["heads"]  # the scale of v is ten times too large
    >>> [head["cause"] for head in heads]
    ['v', 'v']
    """
    if not tiles:
        raise ValueError("tiles: expected at least one, got none")
    exact = exact_outputs(tiles) if exact is None else exact
    H, Hk = tiles[0].q.shape[0], tiles[0].k.shape[0]
    group = H // Hk
    heads = [None] * H
    outputs = [np.empty(x.shape, np.float32) for x in exact]
    for kv_heads, part in parts_of(layer, Hk):
        own = _query_heads(kv_heads, group)
        own_tiles = [_gathered(tile, kv_heads) for tile in tiles]
        own_exact = [x[own] for x in exact]
        own_outputs = [_attend(tile, part, num_threads) for tile in own_tiles]
        for output, x in zip(outputs, own_outputs, strict=True):
            output[own] = x
        blame = _blame(own_tiles, part, own_exact, num_threads)
        saturated = _saturated(own_tiles, part)
        for n, head in enumerate(own):
            split = {cause: float(blame[cause][n]) for cause in CAUSES}
            heads[head] = {
                "head": int(head),
                "kv_head": int(head) // group,
                **_of_head(own_outputs, own_exact, n),
                **split,
                "cause": None if part is None else max(CAUSES, key=split.get),
                "saturated": {name: None if x is None else float(x[n]) for name, x in saturated.items()},
            }
    return {"error": _pooled(outputs, exact)._asdict(), "heads": heads}


def parts_of(layer, Hk):
    """((kv heads, LayerScales or None for fp32), ...): those of a planned layer; else one of all heads."""
    return ((tuple(range(Hk)), layer),) if layer.parts is None else layer.parts


def _query_heads(kv_heads, group):
    return np.concatenate([np.arange(group) + head * group for head in kv_heads])


def _gathered(tile, kv_heads):
    """The tile of some kv heads, with their query heads and options."""
    Hk = tile.k.shape[0]
    if tuple(kv_heads) == tuple(range(Hk)):
        return tile
    kv_heads, own = list(kv_heads), _query_heads(kv_heads, tile.q.shape[0] // Hk)
    options = dict(tile.options)
    for name, axis in PER_HEAD_OPTIONS.items():
        x = options.get(name)
        if x is not None and np.ndim(x) >= -axis and np.shape(x)[axis] > 1:
            options[name] = np.take(x, own, axis)
    return tile._replace(q=tile.q[own], k=tile.k[kv_heads], v=tile.v[kv_heads], options=options)


def _attend(tile, layer, num_threads, v=None):
    v = tile.v if v is None else v
    if layer is None:
        return flash_attention(tile.q, tile.k, v, **tile.options, num_threads=num_threads)
    return flash_attention_int8(tile.q, tile.k, v, quant=layer, **tile.options, num_threads=num_threads)


def _blame(tiles, layer, exact, num_threads):
    """{cause: relative L1 per head} of a layer without parts."""
    size = sum(np.abs(x).sum(axis=(1, 2)) for x in exact)
    if layer is None:
        return dict.fromkeys(CAUSES, np.zeros_like(size))
    error = {cause: np.zeros_like(size) for cause in CAUSES}
    for tile, right in zip(tiles, exact, strict=True):
        for cause, difference in _differences(tile, layer, right, num_threads).items():
            error[cause] += np.abs(difference).sum(axis=(1, 2), dtype=np.float64)
    return {cause: np.divide(x, size, out=np.where(x > 0, np.inf, 0.0), where=size > 0) for cause, x in error.items()}


def _differences(tile, layer, exact, num_threads):
    """{cause: what it changes in the output}; nothing of V or P that is not rounded."""
    scores_only = replace(layer, v_scale=None, pv="fp32")
    differences = {"qk": _attend(tile, scores_only, num_threads) - exact}
    v = tile.v
    if layer.pv == "int8" or layer.v_scale is not None:
        v = _codes_of_v(tile, layer)
        differences["v"] = _attend(tile, None, num_threads, v.dequantize()) - exact
    if layer.pv != "fp32":
        exactly_p = _attend(tile, scores_only, num_threads, v)
        differences["p"] = _attend(tile, replace(layer, v_scale=None), num_threads, v) - exactly_p
    return differences


def _codes_of_v(tile, layer):
    """As the call quantises it."""
    if layer.v_scale is None:
        return quantize(tile.v, "token", fp32_sinks=layer.fp32_sinks)
    return quantize(tile.v, scale=layer.v_scale, fp32_sinks=layer.fp32_sinks)


def _saturated(tiles, layer):
    """{"q", "k", "v"}: per query head, the share of values whose code is cut off; None where scales are dynamic."""
    if layer is None:
        return dict.fromkeys("qkv")
    n, group = layer.fp32_sinks, tiles[0].q.shape[0] // tiles[0].k.shape[0]
    mean = 0 if layer.k_mean is None else layer.k_mean
    values = {
        "q": ([tile.q for tile in tiles], layer.q_scale, 1),
        "k": ([(tile.k - mean)[:, n:] for tile in tiles], layer.k_scale, group),
        "v": ([tile.v[:, n:] for tile in tiles], layer.v_scale, group),
    }
    return {name: None if x[1] is None else _share_beyond(*x) for name, x in values.items()}


def _share_beyond(arrays, scale, group):
    beyond = sum((np.abs(x) > (LARGEST_CODE + 0.5) * scale).sum(axis=(1, 2)) for x in arrays)
    count = sum(x[0].size for x in arrays)
    return np.repeat(beyond / max(count, 1), group)


def _of_head(outputs, exact, n):
    error = _pooled([x[n] for x in outputs], [x[n] for x in exact])._asdict()
    return {name: error[name] for name in ("rel_l1", "cosine", "rmse", "max_abs", "worst_row")}


def _pooled(outputs, exact):
    return pooled(zip(outputs, exact, strict=True))


# What else could be done


def alternatives(layer, tiles):
    """The rungs that a layer's heads could stand on: as it is, and with other settings.

    Parameters
    ----------
    layer : LayerScales
    tiles : list of Tile
        The maxima over these are the scales, and their mean that of the keys, where a rung needs others than the
        layer's. Not those that measure the error.

    Returns
    -------
    dict of str to LayerScales or None
        One for each of RUNGS; None is fp32. A rung that changes nothing is the layer itself. Beside a planned layer,
        whose heads differ, the other rungs have the maxima as scales, one per head.

    Raises
    ------
    ValueError
        Without tiles.
    """
    if not tiles:
        raise ValueError("tiles: expected at least one, got none")
    base = layer if layer.parts is None else _with_maxima(tiles, "qkv", LayerScales(), per_head=True)
    n = min(SINKS, *(tile.k.shape[1] for tile in tiles))
    smooth = {} if base.k_mean is not None or base.k_scale is None else {"k_mean": _mean_key(tiles)}
    sinks = {} if base.fp32_sinks >= n else {"fp32_sinks": n}
    by_token = {"v_scale": None}
    changes = {
        "smooth-K": smooth,
        "fp32 sinks": sinks,
        "V per token": by_token,
        "all three": smooth | sinks | by_token,
        "bf16 PV": smooth | sinks | by_token | {"pv": "bf16"},
    }
    rungs = {AS_IT_IS: layer}
    rungs |= {name: _changed(base, change, tiles) for name, change in changes.items()}
    return rungs | {"dynamic": LayerScales(), FP32: None}


def _changed(layer, change, tiles):
    """The layer with other fields, and with scales for the values that are then left; itself where nothing changes."""
    change = {field: x for field, x in change.items() if x is not getattr(layer, field)}
    if not change:
        return layer
    changed = replace(layer, **change)
    anew = [name for name in "kv" if ("fp32_sinks" in change or (name == "k" and "k_mean" in change))]
    anew = [name for name in anew if getattr(changed, f"{name}_scale") is not None]
    return _with_maxima(tiles, anew, changed) if anew else changed


def _with_maxima(tiles, names, layer, per_head=False):
    """The layer with scales that saturate nothing of the tiles, where they have one value as fine as it was."""
    mean = 0 if layer.k_mean is None else layer.k_mean
    scales = {}
    for name in names:
        first = 0 if name == "q" else layer.fp32_sinks
        arrays = (getattr(tile, name) - (mean if name == "k" else 0) for tile in tiles)
        top = np.max([np.abs(x[:, first:]).max(axis=(1, 2), keepdims=True, initial=0.0) for x in arrays], axis=0)
        own = getattr(layer, f"{name}_scale")
        top = top if per_head or (own is not None and own.size > 1) else top.max()
        scales[f"{name}_scale"] = np.maximum(top / np.float32(LARGEST_CODE), np.finfo(np.float32).tiny)
    return replace(layer, **scales)


def _mean_key(tiles):
    """Of the keys that something sees: the others are 0."""
    count = sum(tile.k.any(axis=(0, 2)).sum() for tile in tiles)
    total = sum(tile.k.sum(axis=1, keepdims=True, dtype=np.float64) for tile in tiles)
    return (total / max(count, 1)).astype(np.float32)


def measure(tiles, rungs, *, exact=None, num_threads=None, rounds=7, seconds=0.003):
    """Error and time of a layer on each of some rungs.

    Parameters
    ----------
    tiles : list of Tile
    rungs : dict of str to LayerScales or None
        None: `flash_attention`; always measured, as times are set against it.
    exact : list of ndarray, optional
        `exact_outputs(tiles)`, where that is at hand.
    num_threads : int, optional
        As in `flash_attention`.
    rounds : int, default 7
        How often each rung has its turn; its time is the median of the turns' shortest calls.
    seconds : float, default 0.003
        Length of a turn.

    Returns
    -------
    list of dict
        One per rung: rung (its name), error (`compare` of all tiles together, as a dict), heads (a list of {"rel_l1",
        "worst_row"}, one per query head), seconds (of one call, all heads of the largest tile; quantisation included),
        time (these seconds over those of fp32).
    """
    if not tiles:
        raise ValueError("tiles: expected at least one, got none")
    exact = exact_outputs(tiles) if exact is None else exact
    largest = max(tiles, key=lambda tile: tile.work)
    once = {id(layer): layer for layer in [*rungs.values(), None]}  # rungs that are the same are measured once
    calls = {key: lambda layer=layer: _attend(largest, layer, num_threads) for key, layer in once.items()}
    seconds_of = _interleaved(calls, rounds, seconds)
    errors = {id(layer): _errors(tiles, layer, exact, num_threads) for layer in rungs.values()}
    return [
        {
            "rung": name,
            **errors[id(layer)],
            "seconds": seconds_of[id(layer)],
            "time": seconds_of[id(layer)] / seconds_of[id(None)],
        }
        for name, layer in rungs.items()
    ]


def _errors(tiles, layer, exact, num_threads):
    outputs = [_attend(tile, layer, num_threads) for tile in tiles]
    heads = (_of_head(outputs, exact, n) for n in range(len(exact[0])))
    return {
        "error": _pooled(outputs, exact)._asdict(),
        "heads": [{key: head[key] for key in ("rel_l1", "worst_row")} for head in heads],
    }


def cheapest_under(rows, head, rel_l1):
    """The row of `measure` of the fastest rung on which that query head's relative L1 is at most `rel_l1`, or None."""
    good = [row for row in rows if row["heads"][head]["rel_l1"] <= rel_l1]
    return min(good, key=lambda row: row["seconds"], default=None)


def _interleaved(calls, rounds, seconds):
    """{name: median over rounds of the shortest call of a turn}, in turns so that a slow moment hits all."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_shortest(call, seconds))
    return {name: statistics.median(x) for name, x in times.items()}


def _shortest(call, seconds):
    """Of the calls of a turn, at least LEAST_CALLS: most of them are not interrupted, even on a busy machine."""
    times, start = [], time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
