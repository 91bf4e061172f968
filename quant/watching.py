"""How many values saturate against static scales while real calls run: `with watch(scales) as w: ...`, then `w.counts`.

The count is made where the codes are, in the pass of cpu/quantise.pxi over the rows at hand. Calls find who watches in
`cyflash.quantized.watched`, by the LayerScales object that they were given as `quant=`.
"""

import threading
from collections.abc import Mapping

from cyflash import quantized
from cyflash.quantized import LayerScales

__all__ = ["Watch", "watch"]

OPERANDS = ("q", "k", "v")

_registering = threading.Lock()


def watch(scales):
    """Count the values that saturate in calls of `flash_attention_int8(q, k, v, quant=scales[layer])`.

    Parameters
    ----------
    scales : mapping of str to LayerScales
        `Scales`, or a dict. Layers are told apart by the LayerScales objects themselves, so the calls have to be given
        these and no copies.

    Returns
    -------
    Watch
        For a `with` statement, which gives it back; it counts until the end of that.

    Raises
    ------
    TypeError
        For what is no mapping of LayerScales.
    ValueError
        Where two layers share one LayerScales: their calls cannot be told apart.

    Notes
    -----
    A value saturates if rint((x - mean) / scale) is beyond 127 in size, computed as the codes are: in float32,
    multiplied by 1 / scale. Counted are float arrays with a static scale, whatever a mask hides of them. Not counted:
    arrays that are quantised dynamically, which never saturate; int8 arrays and QuantizedTensors, whose values are
    gone; the first keys and values, where `fp32_sinks` keeps them in float32; heads that a plan computes in fp32.

    Calls of all threads are counted. Several watches, one inside the other or not, each count for themselves. A call
    that raises because of an array that is not finite counts nothing.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> from cyflash.quant import LayerScales, watch
    >>> x = np.ones((8, 16, 64), np.float32)
    >>> scales = {"layer0": LayerScales(1 / 127, 1 / 127, 0.9 / 127)}  # made for values up to 1, 1 and 0.9
    >>> with watch(scales) as w:
    ...     out = cyflash.flash_attention_int8(x, x, x, quant=scales["layer0"])
    >>> w.counts
    {'layer0': {'q': (0, 8192), 'k': (0, 8192), 'v': (8192, 8192)}}
    >>> w.rates["layer0"]
    {'q': 0.0, 'k': 0.0, 'v': 1.0}
    """
    return Watch(scales)


class Watch:
    """What `watch` returns. print() shows a table; so does `rich`.

    It can be entered again after its end, and goes on counting then.
    """

    def __init__(self, scales):
        if not isinstance(scales, Mapping):
            raise TypeError(f"scales: expected a mapping of layers to LayerScales, got {type(scales).__name__}")
        self._names = {}  # LayerScales: the name of its layer
        for name, layer in scales.items():
            if not isinstance(layer, LayerScales):
                raise TypeError(f"scales[{name!r}]: expected a LayerScales, got {type(layer).__name__}")
            for one in _with_parts(layer):
                if self._names.setdefault(one, name) != name:
                    raise ValueError(
                        f"scales: expected a LayerScales of its own for each layer, got one that {self._names[one]!r} "
                        f"and {name!r} share, whose calls cannot be told apart; write dataclasses.replace(layer)"
                    )
        self._counts = {name: dict.fromkeys(OPERANDS, (0, 0)) for name in scales}
        self._lock = threading.Lock()
        self._tellers = None

    def __enter__(self):
        with _registering:
            if self._tellers is not None:
                raise RuntimeError("this watch runs already; write another watch(scales) to count inside it")
            self._tellers = {layer: self._teller(name) for layer, name in self._names.items()}
            quantized.watched = _added(quantized.watched, self._tellers)
        return self

    def __exit__(self, *_):
        with _registering:
            quantized.watched = _removed(quantized.watched, self._tellers)
            with self._lock:
                self._tellers = None

    def _teller(self, name):
        """What calls of the layer `name` tell their counts."""

        def tell(counts):
            with self._lock:
                if self._tellers is None:  # the watch ended while the call ran
                    return
                for operand, (saturated, values) in counts.items():
                    before = self._counts[name][operand]
                    self._counts[name][operand] = (before[0] + saturated, before[1] + values)

        return tell

    @property
    def counts(self):
        """{layer: {"q", "k", "v": (values that saturated, values in all)}}; (0, 0) where nothing was counted."""
        with self._lock:
            return {name: dict(counts) for name, counts in self._counts.items()}

    @property
    def rates(self):
        """{layer: {"q", "k", "v": share of the values that saturated}}; None where nothing was counted."""
        return {
            name: {operand: saturated / values if values else None for operand, (saturated, values) in counts.items()}
            for name, counts in self.counts.items()
        }

    def __repr__(self):
        state = "ended" if self._tellers is None else "running"
        return f"<Watch of {len(self._counts)} layers, {state}: {sum(map(_saturated, self.counts.values()))} saturated>"

    def __str__(self):
        from rich.console import Console

        console = Console(width=1000, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __rich__(self):
        """A line per layer: what share of the values of q, k and v saturated, of how many values in all."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold")
        for operand in OPERANDS:
            table.add_column(f"{operand} saturated", justify="right", no_wrap=True)
        table.add_column("values", justify="right", no_wrap=True)
        for name, counts in self.counts.items():
            values = sum(values for _, values in counts.values())
            cells = (_share(*counts[operand]) for operand in OPERANDS)
            table.add_row(Text(name), *cells, f"{values:,}", style="bold" if _saturated(counts) else None)
        return table


def _with_parts(layer):
    """The LayerScales that calls of this layer are given: itself, or those of its plan, one for each part."""
    return [layer, *(scales for _, scales in layer.parts or () if scales is not None)]


def _added(watched, tellers):
    return watched | {layer: (*watched.get(layer, ()), tell) for layer, tell in tellers.items()}


def _removed(watched, tellers):
    left = {layer: tuple(one for one in told if one is not tellers.get(layer)) for layer, told in watched.items()}
    return {layer: told for layer, told in left.items() if told}


def _saturated(counts):
    return sum(saturated for saturated, _ in counts.values())


def _share(saturated, values):
    if not values:
        return "-"
    share = 100 * saturated / values
    return f"{share:.2g} %" if share < 10 else f"{share:.0f} %"
