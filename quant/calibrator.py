"""Calibrator: streams queries, keys and values, keeps integers and a few tiles, and computes static scales from them.

    observe(name, q, k, v, ...)     -> a Layer per name (layer.py)
    merge(other), save, load           exactly as if one had observed everything, in any order
    compute(method), plan(...)      -> Scales, by clipping.py, search.py and planning.py
"""

import math
import numbers
import operator

from cyflash import arrays
from cyflash.capture import natural
from cyflash.foreign import any_kind
from cyflash.plan import make_plan
from cyflash.quant import search, state
from cyflash.quant.clipping import METHODS
from cyflash.quant.layer import OPERANDS, PARTS, Layer, shared_options
from cyflash.quant.planning import plan_layer
from cyflash.quant.scales import Scales
from cyflash.quantized import checked_granularity

__all__ = ["Calibrator"]

MEGABYTE = 1e6


class Calibrator:
    """Observes real attention inputs, layer by layer, and finds static int8 scales for them.

    Parameters
    ----------
    granularity : {"tensor", "head", "token"} or a triple of them for (q, k, v), default "tensor"
        One scale for a layer, or one for each head. "token" cannot be static: that operand is left to be quantised in
        the call, each token by its own scale.
    fp32_sinks : int, default 0
        The first so many keys and values will be used in float32; they are left out of the scales.
    smooth_k : {"auto", True, False}, default "auto"
        Whether keys lose their mean before they are quantised. "auto": where that makes the error less, decided for
        each layer, or each head with granularity "head". Keys with granularity "token" always do, in the call.
    reservoir_mb : float, default 64
        Megabytes (10^6 bytes) for tiles of real (q, k, v), for each layer: "output" and `plan` measure on them.
    nonfinite : {"raise", "ignore"}, default "raise"
        NaN, infinities and tensors of zeros raise, or are counted (`summary`) and left out.
    seed : int, default 0
        Decides which tiles are kept, and which of them are held out.

    Attributes
    ----------
    layers : tuple of str
        Names of the layers observed, in natural order.

    Raises
    ------
    ValueError
        For an option.

    Notes
    -----
    What is kept per head is a histogram of |q|, |k|, |k - mean of its sequence| and |v| with fixed bins, 25 kB each,
    counts and sums exact integers; sums of the channels of k in fixed point; and the tiles with the smallest hashes of
    their content. So the order of the observations does not matter, nor how they are split among calibrators that are
    merged: scales are the same to the bit. Each sequence of a batch is an observation of its own. Rows that see no key
    and keys that no row sees are left out. Observations of equal content count once among the tiles.

    Not safe for calls from several threads at the same time: give each its own, and merge.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.quant import Calibrator
    >>> import cyflash
    >>> rng = np.random.default_rng(0)
    >>> calibrator = Calibrator()
    >>> for _ in range(4):
    ...     q, k, v = (rng.standard_normal((2, 128, 64), dtype=np.float32) for _ in range(3))
    ...     calibrator.observe("layer0", q, k, v, causal=True)
    >>> scales = calibrator.compute()
    >>> out = cyflash.flash_attention_int8(q, k, v, causal=True, quant=scales["layer0"])
    >>> scales.about["layer0"]["error"]["held_out"]["rel_l1"] < 0.03
    True
    """

    def __init__(
        self, granularity="tensor", *, fp32_sinks=0, smooth_k="auto", reservoir_mb=64, nonfinite="raise", seed=0
    ):
        self.granularity = _granularities(granularity)
        self.fp32_sinks = _index("fp32_sinks", fp32_sinks, 0)
        if not (smooth_k == "auto" or isinstance(smooth_k, bool)):
            raise ValueError(f"smooth_k: expected 'auto', True or False, got {smooth_k!r}")
        if smooth_k is False and self.granularity[1] == "token":
            raise ValueError("smooth_k: a k with granularity 'token' is smoothed in the call; expected 'auto' or True")
        self.smooth_k = smooth_k
        self.reservoir_mb = _positive("reservoir_mb", reservoir_mb)
        if nonfinite not in ("raise", "ignore"):
            raise ValueError(f"nonfinite: expected 'raise' or 'ignore', got {nonfinite!r}")
        self.nonfinite = nonfinite
        self.seed = _index("seed", seed, 0)
        self._layers = {}

    @property
    def settings(self):
        """What the constructor was given, as JSON holds it."""
        return {
            "granularity": self.granularity[0] if len(set(self.granularity)) == 1 else list(self.granularity),
            "fp32_sinks": self.fp32_sinks, "smooth_k": self.smooth_k,
            "reservoir_mb": self.reservoir_mb, "nonfinite": self.nonfinite, "seed": self.seed,
        }  # fmt: skip

    @property
    def layers(self):
        return tuple(sorted(self._layers, key=natural))

    def __repr__(self):
        return f"Calibrator(granularity={self.granularity}, layers={len(self._layers)})"

    # Observing

    @any_kind
    def observe(
        self, name, q, k, v, *, causal=False, causal_align="bottom-right", scale=None, window=None, softcap=0.0,
        bias=None, mask=None, alibi_slopes=None, sinks=None,
    ):  # fmt: skip
        """Take in the arguments of one call of attention of layer `name`. The arrays are neither changed nor kept.

        Parameters
        ----------
        name : str
            The layer.
        q, k, v : ndarray of float32, float16 or bfloat16
            As in `cyflash.flash_attention`: (L, D), (H, L, D) or (B, H, L, D), any strides. 16 bits are converted piece
            by piece, and count exactly as the same values in float32.
        causal, causal_align, scale, window, softcap, bias, mask, alibi_slopes, sinks
            As in `cyflash.flash_attention`; they say what is seen, and the output's error is measured with them.
            `bias` and `mask` may differ from call to call, the others belong to the layer.

        Raises
        ------
        TypeError, ValueError
            As `cyflash.flash_attention`; where heads, head_dim or options are not those of the layer so far; for NaN,
            infinities and tensors of zeros with nonfinite="raise". Nothing was taken in then.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, the name of a layer, got {type(name).__name__} {name!r}")
        if not (name and name.isprintable()):
            raise ValueError(f"name: expected the name of a layer, printable and not empty, got {name!r}")
        try:
            new = self._observed(
                q, k, v,
                dict(causal=causal, causal_align=causal_align, scale=scale, window=window, softcap=softcap, bias=bias,
                     mask=mask, alibi_slopes=alibi_slopes, sinks=sinks),
            )  # fmt: skip
            for layer in new:
                _require_same(self._layers.get(name, new[0]), layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {name!r}: {error}") from None
        for layer in new:
            self._add(name, layer)

    def _observed(self, q, k, v, options):
        """One Layer for each sequence of a call."""
        for operand, x in (("q", q), ("k", k), ("v", v)):
            arrays.require_float(operand, x, (2, 3, 4))
        plan, ndim = make_plan(q, k, v, **options), q.ndim
        q, k, v = (arrays.four_axes(arrays.rows_in_place(x)) for x in (q, k, v))
        return [
            Layer.observed(
                q[b], k[b], v[b], plan, b, shared_options(plan, b, options), fp32_sinks=self.fp32_sinks,
                reservoir_bytes=self.reservoir_mb * MEGABYTE, seed=self.seed, ignore=self.nonfinite == "ignore",
                ndim=ndim,
            )
            for b in range(plan.B)
        ]  # fmt: skip

    def _add(self, name, layer):
        if name in self._layers:
            self._layers[name].add(layer)
        else:
            self._layers[name] = layer

    def merge(self, other):
        """Take in all that `other`, with the same settings, has observed.

        Parameters
        ----------
        other : Calibrator
            It is not changed.

        Returns
        -------
        Calibrator
            This one.

        Raises
        ------
        TypeError, ValueError
            For anything but a Calibrator, for other settings, or for layers that do not fit. Nothing was taken in.
        """
        if not isinstance(other, Calibrator):
            raise TypeError(f"other: expected a Calibrator, got {type(other).__name__}")
        for setting, value in self.settings.items():
            if other.settings[setting] != value:
                raise ValueError(f"other: expected {setting}={value!r} as here, got {other.settings[setting]!r}")
        for name, layer in other._layers.items():
            if name in self._layers:
                try:
                    _require_same(self._layers[name], layer)
                except ValueError as error:
                    raise ValueError(f"other: layer {name!r}: {error}") from None
        for name, layer in other._layers.items():
            self._layers.setdefault(name, layer.empty()).add(layer)
        return self

    # What was seen

    def summary(self):
        """What was observed, one dict per layer, for `pandas.DataFrame` as it is.

        Returns
        -------
        list of dict
            layer, heads, kv_heads, head_dim, v_head_dim; observations; for each of q, k, v: values (finite ones that
            count), max, nonfinite (values) and all_zero (tensors) that were left out; tiles_training, tiles_held_out;
            options.
        """
        rows = []
        for name in self.layers:
            layer = self._layers[name]
            row = {"layer": name, **_sizes(layer), "observations": layer.observations}
            for operand in OPERANDS:
                histogram = layer.counts[operand].histogram()
                row |= {f"{operand}_values": histogram.count, f"{operand}_max": histogram.max}
                row[f"{operand}_nonfinite"] = layer.nonfinite[operand]
                row[f"{operand}_all_zero"] = layer.all_zero[operand]
            training, held_out = layer.reservoir.halves()
            row |= {"tiles_training": len(training), "tiles_held_out": len(held_out)}
            rows.append(row | {"options": {n: x for n, x in layer.options.items() if x is not None}})
        return rows

    def histogram(self, name, part, head=None):
        """The histogram of |q|, |k|, |v|, or |k minus its mean over the sequence|.

        Parameters
        ----------
        name : str
            The layer.
        part : {"q", "k", "k_centred", "v"}
        head : int, optional
            Default: all heads together.

        Returns
        -------
        Histogram

        Raises
        ------
        KeyError
            For a layer that was not observed.
        ValueError
            For another part or head.
        """
        if part not in PARTS:
            raise ValueError(f"part: expected one of {', '.join(map(repr, PARTS))}, got {part!r}")
        counts = self._layer(name).counts[part]
        if head is not None and _index("head", head, 0) >= len(counts.top):
            raise ValueError(f"head: expected one of the {len(counts.top)} heads of {part}, got {head!r}")
        return counts.histogram(head)

    def tiles(self, name):
        """(training, held out): two lists of `Tile`, the pieces of real attention that errors are measured on."""
        return self._layer(name).reservoir.halves()

    def _layer(self, name):
        if name not in self._layers:
            raise KeyError(f"{name!r}: no such layer; observed are: {', '.join(self.layers) or 'none'}")
        return self._layers[name]

    # Scales

    def compute(self, method="output", *, percentile=99.9999, objective="rel_l1", progress=None):
        """Static scales of every layer.

        Parameters
        ----------
        method : {"output", "max", "percentile", "mse", "octav", "entropy"}, default "output"
            "output" searches, from those of "max", the scales that make the error of the attention's output least,
            measured with the kernel itself on the training tiles. "max" saturates nothing that was seen. The others
            clip where the tensor's own error or divergence is least, whatever that does to the attention; "entropy" is
            not recommended (see the figures in `cyflash.quant.clipping`).
        percentile : float, default 99.9999
            Of "percentile": the share of values that is not clipped, in percent, above 0 and up to 100.
        objective : {"rel_l1", "rmse", "worst_row"}, default "rel_l1"
            What "output" makes least; as in `compare`, over all training tiles.
        progress : callable, optional
            Called with the name of each layer when it is done.

        Returns
        -------
        Scales
            With the error on the training and the held-out tiles in `about`.

        Raises
        ------
        ValueError
            For a method or an option; without observations; for "output", with fewer than two different ones in a
            layer.

        Notes
        -----
        No pass over the data is needed for another method. The search is coordinate descent over the scales of q, k
        and v, in steps down to 2^(1/8). A step must gain 1 % and more than its standard error over tiles and heads,
        leave the worst row below 1.5 times what it was with "max", and clip nothing that the training tiles have less
        of than all observations (`cyflash.quant.evidence`). Held-out tiles are not read by it.
        """
        if method != "output" and method not in METHODS:
            expected = ", ".join(map(repr, ("output", *METHODS)))
            raise ValueError(f"method: expected one of {expected}, got {method!r}")
        percentile = _positive("percentile", percentile)
        if percentile > 100:
            raise ValueError(f"percentile: expected at most 100, got {percentile!r}")
        search.check_objective(objective)
        settings = {"method": method, **self.settings}
        settings |= {"percentile": percentile} if method == "percentile" else {}
        settings |= {"objective": objective} if method == "output" else {}

        def found(layer, training, held_out):
            if method == "output":
                search.require_halves(layer, training, held_out)
                return search.output_scales(layer, training, self.granularity, self.smooth_k, objective), {}
            return search.clipped_scales(layer, self.granularity, self.smooth_k, method, percentile), {}

        return self._scales(found, settings, progress)

    def plan(self, *, rel_l1=0.02, worst=0.05, progress=None):
        """For each layer and kv head, the cheapest rung of a ladder that keeps the error of the output below a target.

        Parameters
        ----------
        rel_l1 : float, default 0.02
            The relative L1 error that each head may have on the held-out tiles.
        worst : float, default 0.05
            What the worst row of each head may have: sum|O - O'| over the row's sum|O|, or over the head's mean row sum
            where that is greater.
        progress : callable, optional
            Called with the name of each layer when it is done.

        Returns
        -------
        Scales
            Its layers have `parts` where heads take different rungs; `about` says which rung each takes, its errors
            and its measured time.

        Raises
        ------
        ValueError
            Where heads miss the target even in float32, with their errors; otherwise as `compute("output")`.

        Notes
        -----
        The ladder: int8; with smooth-K, the first 4 keys in fp32, or a scale per token of V, then two and all of them;
        the second product in bf16, alone and with smooth-K and keys in fp32; all in fp32. The first that is good enough
        is taken. Scales are those of "output". Times are medians of calls as long as the longest that was observed,
        and do not change the plan. Each distinct rung of a layer is a call of its own, which takes some 0.1 ms more: on
        layers of less than a millisecond that can be what int8 gains; `about[layer]["time"]` is that of the whole.
        """
        target = {"rel_l1": _positive("rel_l1", rel_l1), "worst": _positive("worst", worst)}
        settings = {"method": "plan", **self.settings, "target": target}

        def found(layer, training, held_out):
            search.require_halves(layer, training, held_out)
            return plan_layer(layer, training, held_out, self.granularity, self.smooth_k, target)

        return self._scales(found, settings, progress)

    def _scales(self, found, settings, progress):
        if not self._layers:
            raise ValueError("the calibrator has observed nothing: call observe(name, q, k, v) first")
        layers, about, problems = {}, {}, {}
        for name in self.layers:
            layer = self._layers[name]
            training, held_out = self.tiles(name)
            try:
                scales, more = found(layer, training, held_out)
            except ValueError as error:  # all layers are heard
                problems.setdefault(str(error), []).append(repr(name))
                continue
            layers[name] = scales
            about[name] = {
                **_sizes(layer),
                "options": {option: x for option, x in layer.options.items() if x is not None},
                "observations": layer.observations,
                "values": {operand: layer.counts[operand].histogram().count for operand in OPERANDS},
                "tiles": {"training": len(training), "held_out": len(held_out)},
                "error": {"training": search.error(training, scales), "held_out": search.error(held_out, scales)},
                **more,
            }
            if progress is not None:
                progress(name)
        if problems:
            lines = (f"layer{'s' * (len(names) > 1)} {', '.join(names)}: {text}" for text, names in problems.items())
            raise ValueError("; ".join(lines))
        return Scales(layers, settings=settings, about=about)

    # Files

    def save(self, path):
        """Write all that was observed to a .safetensors file, which appears when it is complete; return its path."""
        return state.save(path, self.settings, {name: self._layers[name] for name in self.layers})

    @classmethod
    def load(cls, path):
        """The Calibrator that `save` wrote.

        Raises
        ------
        FileNotFoundError
        ValueError
            For a file that is something else, damaged, or of a newer version.
        """
        settings, layers = state.load(path)
        try:
            calibrator = cls(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        calibrator._layers = layers
        return calibrator


def _sizes(layer):
    H, Hk, D, Dv = layer.shape
    return {"heads": H, "kv_heads": Hk, "head_dim": D, "v_head_dim": Dv}


def _require_same(layer, new):
    if new.shape != layer.shape:
        raise ValueError(f"expected {layer.shape}, as observed before, got {new.shape}")
    for option, value in layer.options.items():
        if new.options[option] != value:
            raise ValueError(f"{option}: expected {value!r}, as observed before, got {new.options[option]!r}")


def _granularities(granularity):
    three = tuple(granularity) if isinstance(granularity, (tuple, list)) else (granularity,) * 3
    if len(three) != 3:
        raise ValueError(f"granularity: expected one or three for (q, k, v), got {granularity!r}")
    three = tuple(checked_granularity(one) for one in three)
    if three == ("token",) * 3:
        raise ValueError("granularity: 'token' for all of q, k and v leaves nothing to calibrate; expected another one")
    return three


def _index(name, value, least):
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return number


def _positive(name, value):
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not good:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)
