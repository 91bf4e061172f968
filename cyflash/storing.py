"""What the pages of a cache hold: floats, or codes with their scales; and how new tokens become that.

    ready(k, v, ...)    everything that can fail for the numbers in k and v: quantises
    write(ready, ...)   into the pages that the rows' table names; nothing is read or packed again later

`Floats` and `Codes` have the same methods; a cache (kvcache.py) holds the arrays that they describe.
"""
import operator

import numpy as np

from cyflash import arrays, cpu, quantized
from cyflash.cpu import threads
from cyflash.quantized import LayerScales, checked_granularity, checked_scale, quantise_call
from cyflash.stored import Stored

# Of a copy: some 10 us of a thread's time. Below that, waking another one does not pay.
NUMBERS_PER_THREAD = 1 << 16


def threads_for(x, num_threads):
    """The threads that copy or quantise x."""
    return threads.for_call(1 + x.size // NUMBERS_PER_THREAD, num_threads)


def store(x, pages, table, begins, counts, num_threads):
    """Write floats (n, Hk, L, D) to their places in the pages (pages, Hk, page_size, D), in the precision of these."""
    with threads_for(x, num_threads) as count:
        cpu.active().store_floats(
            x.view(np.uint8), arrays.kind_of(x.dtype), pages.view(np.uint8), arrays.kind_of(pages.dtype), table, begins,
            counts, count,
        )


def format_of(
    kv_heads, head_dim, v_head_dim, dtype, granularity="token", k_scale=None, v_scale=None, k_mean=None, quant=None,
    fp32_sinks=0,
):
    """The Floats or Codes that the arguments of a cache ask for."""
    kv_heads, head_dim = checked_count("kv_heads", kv_heads), checked_count("head_dim", head_dim)
    v_head_dim = head_dim if v_head_dim is None else checked_count("v_head_dim", v_head_dim)
    dtype = arrays.checked_dtype("dtype", dtype)
    fp32_sinks, granularity = checked_count("fp32_sinks", fp32_sinks, 0), checked_granularity(granularity)
    if dtype == arrays.INT8:
        return Codes(kv_heads, head_dim, v_head_dim, granularity, k_scale, v_scale, k_mean, quant, fp32_sinks)
    given = {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean, "quant": quant, "fp32_sinks": fp32_sinks or None}
    given["granularity"] = None if granularity == "token" else granularity
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected its default with dtype {dtype.name}, got {value!r}; it is for 'int8'")
    return Floats(dtype, kv_heads, head_dim, v_head_dim)


def checked_count(name, value, least=1):
    """`value` as an int of at least `least`, else ValueError."""
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if count < least or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return count


class Floats:
    """Keys and values as floats of one type. They are rounded to it half to even."""

    fp32_sinks = 0
    pv = None
    q_scale = None

    def __init__(self, dtype, kv_heads, D, Dv):
        self.dtype, self.kv_heads, self.D, self.Dv = dtype, kv_heads, D, Dv
        self.kind = arrays.kind_of(dtype)

    def page_shapes(self, page_size):
        """{name: (shape of one page, dtype)} of what pages hold."""
        shape = self.kv_heads, page_size
        return {"k": ((*shape, self.D), self.dtype), "v": ((*shape, self.Dv), self.dtype)}

    def row_shapes(self):
        """The same of what is kept for each row beside the pages."""
        return {}

    def constants(self):
        """{name: array} of what is the same for all tokens."""
        return {}

    def clear(self, name, pages, places):
        """0 in places of some pages of the array `name`; places: bool (pages, page_size)."""
        pages.swapaxes(1, 2)[places] = 0

    def ready(self, k, v, begins, counts, padded, num_threads):
        """What write() takes. padded: some rows get fewer than all of their tokens."""
        return arrays.rows_in_place(k), arrays.rows_in_place(v)

    def write(self, ready, pages, by_row, rows, table, begins, counts, num_threads):
        """rows: numbers of the rows in `by_row`, one for each row of the table."""
        store(ready[0], pages["k"], table, begins, counts, num_threads)
        store(ready[1], pages["v"], table, begins, counts, num_threads)

    def stored(self, pages, by_row, page_size):
        """The `Stored` of these arrays; by_row: entries of the rows that are read, in their order."""
        return Stored(self.kind, page_size, pages["k"], pages["v"], self.D, self.Dv, self.kind)


class Codes:
    """Keys and values as int8 codes, quantised when they come; the first tokens of each row in float32."""

    dtype = np.dtype(np.int8)
    kind = "int8"

    def __init__(self, kv_heads, D, Dv, granularity, k_scale, v_scale, k_mean, quant, fp32_sinks):
        self.kv_heads, self.D, self.Dv, self.granularity = kv_heads, D, Dv, granularity
        self.quant, self.pv, source = quant, "int8", ""
        if quant is not None:
            _check_quant(quant, {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean})
            if fp32_sinks not in (0, quant.fp32_sinks):
                raise ValueError(f"fp32_sinks: expected quant's {quant.fp32_sinks} or none, got {fp32_sinks}")
            k_scale, v_scale, k_mean, fp32_sinks = quant.k_scale, quant.v_scale, quant.k_mean, quant.fp32_sinks
            self.pv, source = quant.pv, "quant."
        self.q_scale = None if quant is None else quant.q_scale  # of queries that read the codes
        self.fp32_sinks = fp32_sinks
        self.k_scale = self._static_scale(f"{source}k_scale", k_scale)  # (Hk, 1, 1), None where it is per token
        self.v_scale = self._static_scale(f"{source}v_scale", v_scale)
        self.k_mean = None  # or (Hk, 1, D)
        if k_mean is not None:
            k_mean = LayerScales(k_mean=k_mean).k_mean  # its checks of the numbers
            self.k_mean = _of_heads(f"{source}k_mean", k_mean, (kv_heads, 1, D))

    def _static_scale(self, name, scale):
        """Given scales decide what they are for; granularity says what is found where there are none."""
        if scale is None:
            if self.granularity != "token":
                raise ValueError(
                    f"{name}: expected a scale with granularity {self.granularity!r}, since codes that are kept cannot "
                    "follow one that changes as tokens come, got None; pass k_scale and v_scale, or quant, or use "
                    "granularity='token'"
                )
            return None
        scale = checked_scale(name, arrays.require_host(name, scale))
        if self.granularity == "tensor" and scale.size != 1:
            raise ValueError(f"{name}: expected a number with granularity 'tensor', got shape {scale.shape}")
        return _of_heads(name, scale, (self.kv_heads, 1, 1))

    def page_shapes(self, page_size):
        shape = self.kv_heads, page_size
        shapes = {
            "k": ((*shape, -(-self.D // 4) * 4), np.int8),
            "v": ((self.kv_heads, page_size // 4, -(-self.Dv // 16) * 16), np.int32),
            "k_correction": (shape, np.int32),
        }
        if self.k_scale is None:
            shapes["k_scale"] = (shape, np.float32)
        if self.v_scale is None:
            shapes["v_scale"] = (shape, np.float32)
        return shapes

    def row_shapes(self):
        if not self.fp32_sinks:
            return {}
        shape = self.kv_heads, self.fp32_sinks
        return {"float_k": ((*shape, self.D), np.float32), "float_v": ((*shape, self.Dv), np.float32)}

    def constants(self):
        held = {"q_scale": self.q_scale, "k_scale": self.k_scale, "v_scale": self.v_scale, "k_mean": self.k_mean}
        return {name: x for name, x in held.items() if x is not None}

    def clear(self, name, pages, places):
        if name == "v":  # in groups of 4 tokens
            n, Hk, groups, columns = pages.shape
            codes = pages.view(np.int8).reshape(n, Hk, groups, columns, 4)
            codes.transpose(0, 2, 4, 1, 3)[places.reshape(n, groups, 4)] = 0
        else:
            pages.swapaxes(1, 2)[places] = 0

    def ready(self, k, v, begins, counts, padded, num_threads):
        """(k, v, codes and scales of both, what watchers are told)."""
        told = {} if quantized.watched.get(self.quant) else None
        by_row = padded or (self.fp32_sinks and begins.min(initial=self.fp32_sinks) < self.fp32_sinks)
        encode = self._encode_rows if by_row else self._encode
        coded = [
            encode("k", k, self.k_scale, self.k_mean, begins, counts, told, num_threads),
            encode("v", v, self.v_scale, None, begins, counts, told, num_threads),
        ]
        return k, v, *coded, told

    def _encode(self, name, x, scale, mean, begins, counts, told, num_threads):
        """(codes, scales for each token or None) of all tokens."""
        x, saturated, scale = arrays.rows_in_place(x), _counter(scale, told), None if scale is None else scale[None]
        codes, found, _ = quantise_call(
            name, x, "token", scale=scale, mean=mean, threads=threads_for(x, num_threads), saturated=saturated
        )
        if saturated is not None:
            told[name] = (int(saturated[0]), x.size)
        return codes, None if scale is not None else found

    def _encode_rows(self, name, x, scale, mean, begins, counts, told, num_threads):
        """The same, row by row: of the tokens that count, and are not among the first, which stay in float32."""
        x, saturated, scale = arrays.rows_in_place(x), _counter(scale, told), None if scale is None else scale[None]
        codes, found = np.empty(x.shape, np.int8), np.empty((*x.shape[:3], 1), np.float32)
        total = values = 0
        for i, count in enumerate(counts.tolist()):
            first = min(max(self.fp32_sinks - int(begins[i]), 0), count)
            one = np.s_[i : i + 1, :, :count]
            _, found[one], _ = quantise_call(
                f"{name}[{i}]", x[one], "token", scale=scale, mean=mean, fp32_sinks=first,
                threads=threads_for(x[one], num_threads), ndim=3, codes=codes[one], saturated=saturated,
            )
            if saturated is not None:
                total, values = total + int(saturated[0]), values + (count - first) * x[i, :, 0].size
        if saturated is not None:
            told[name] = (total, values)
        return codes, None if scale is not None else found

    def write(self, ready, pages, by_row, rows, table, begins, counts, num_threads):
        k, v, (k_codes, k_scale), (v_codes, v_scale), told = ready
        build = cpu.active()
        with threads_for(k, num_threads) as count:
            build.pack_keys(k_codes, pages["k"], pages["k_correction"], table, begins, counts, count)
            build.pack_values(v_codes, pages["v"], table, begins, counts, count)
        if k_scale is not None:
            store(k_scale, pages["k_scale"][..., None], table, begins, counts, num_threads)
        if v_scale is not None:
            store(v_scale, pages["v_scale"][..., None], table, begins, counts, num_threads)
        if self.fp32_sinks:
            for i in np.flatnonzero(begins < self.fp32_sinks):
                begin, end = begins[i], min(self.fp32_sinks, begins[i] + counts[i])
                by_row["float_k"][rows[i], :, begin:end] = k[i, :, : end - begin]
                by_row["float_v"][rows[i], :, begin:end] = v[i, :, : end - begin]
        if told:
            for tell in quantized.watched.get(self.quant, ()):
                tell(told)

    def stored(self, pages, by_row, page_size):
        by_head = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return Stored(
            self.kind, page_size, pages["k"], pages["v"], self.D, self.Dv, self.kind, pages["k_correction"],
            **{name: pages[name] if x is None else x[None, ..., 0] for name, x in by_head.items()},
            k_mean=None if self.k_mean is None else self.k_mean[None, :, 0],
            fp32_sinks=self.fp32_sinks, float_k=by_row.get("float_k"), float_v=by_row.get("float_v"),
        )


def _of_heads(name, x, shape):
    """x, which broadcasts to `shape`, (Hk, 1, columns), in that shape."""
    try:
        return np.array(np.broadcast_to(x[0] if x.ndim == 4 and len(x) == 1 else x, shape))
    except ValueError:
        raise ValueError(
            f"{name}: expected a number or a shape that broadcasts to {shape}, the same for all tokens, got {x.shape}"
        ) from None


def _counter(scale, told):
    """Where quantise_call counts what saturates, if somebody watches and anything can."""
    return np.zeros(1, np.intp) if told is not None and scale is not None else None


def _check_quant(quant, others):
    if not isinstance(quant, LayerScales):
        raise TypeError(f"quant: expected a LayerScales, got {type(quant).__name__}")
    if quant.parts is not None:
        raise ValueError(
            "quant: expected a LayerScales without parts, since a cache keeps all heads in one way; make a cache for "
            "the kv heads of each part"
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}: expected None beside quant, which has its own; pass one of the two")
