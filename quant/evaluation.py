"""What schemes of attention lose and gain on one layer: error against float64, time and memory, each beside the others.

    measure_layer(layer, ...)   one dict per scheme, of use to `cyflash compare` as well
    evaluate(q, k, v, ...)      the same numbers for a notebook
"""

import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np

import cyflash
from cyflash import arrays
from cyflash.cpu import threads
from cyflash.foreign import any_kind
from cyflash.measure import CallProcess, blas_threads, interleaved_times
from cyflash.output import as_bytes
from cyflash.quant.metrics import Comparison, compare
from cyflash.schemes import FP32, NUMPY, OPTIONS, SCHEMES, int8_schemes, save_call, select

__all__ = ["call_threads", "evaluate", "measure_layer"]


@any_kind
def evaluate(q, k, v, *, schemes=None, num_threads=None, **options):
    """Measure what int8 attention loses and gains on these arrays: the numbers of `cyflash compare`.

    Parameters
    ----------
    q : ndarray of float32, shape (Lq, D), (H, Lq, D) or (B, H, Lq, D)
    k : ndarray of float32, shape (Lk, D), (Hk, Lk, D) or (B, Hk, Lk, D)
    v : ndarray of float32, shape (Lk, Dv), (Hk, Lk, Dv) or (B, Hk, Lk, Dv)
    schemes : list of str, or dict of str to dict, optional
        Names of the schemes of `cyflash compare`, or patterns such as "int8*"; or schemes of one's own, {label: options
        of `flash_attention_int8`}, as in {"per head": {"granularity": "head"}, "static": {"quant": scales}}. By default
        all of `cyflash compare`: "numpy fp32", "cyflash fp32", "int8 tensor", "int8 head", "int8 token" (the default
        call), "int8 token, bf16 PV", "int8 token, fp32 PV".
    num_threads : int, optional
        Threads of every call, NumPy's included. Default: as of `flash_attention`.
    **options
        Of the attention, for all schemes and for the reference: `causal`, `causal_align`, `scale`, `window`, `softcap`,
        `bias`, `mask`, `alibi_slopes`, `sinks`, as in `flash_attention`.

    Returns
    -------
    list of dict
        One per scheme, for `pandas.DataFrame` as it is:

        - scheme: its name or label
        - rel_l1, cosine, rmse, max_abs, worst_head, worst_row: the error against attention in float64, as `compare`
          gives it
        - seconds: median of one call, quantisation included
        - memory: bytes that one call, its output included, adds to the peak of a fresh process
        - speedup: the time of NumPy over this one's; speedup_over_fp32: that of `flash_attention` over this one's
        - memory_ratio: this memory over NumPy's
        - problem: why numbers are None, where they are: plain NumPy or the reference needs more memory than is free

        The two fp32 schemes are measured whether listed or not: the ratios are to them.

    Raises
    ------
    TypeError
        A dtype, or an unknown option.
    ValueError
        An unknown scheme, a shape or a value of an option; an output with NaN or infinities where the reference has
        none, with the name of the scheme.

    Notes
    -----
    Every scheme is timed in a process of its own, in turns with the others, so a call of `evaluate` takes seconds.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.quant import evaluate
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 256, 64), dtype=np.float32) for _ in range(3))
    >>> rows = evaluate(q, k, v, schemes=["cyflash fp32", "int8 token"], causal=True, num_threads=1)
    >>> [row["scheme"] for row in rows]
    ['cyflash fp32', 'int8 token']
    >>> rows[0]["rel_l1"] < 1e-6 < rows[1]["rel_l1"] < 0.02
    True
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        arrays.require_float32(name, x, (2, 3, 4))
    for name in options:
        if name not in OPTIONS:
            raise TypeError(
                f"{name}: expected options of the attention, {', '.join(OPTIONS)}; those of flash_attention_int8 are "
                "given by schemes={label: {option: value}}"
            )
    chosen = _chosen(schemes)
    count, _ = call_threads(num_threads)
    with blas_threads(count):
        rows = measure_layer((q, k, v), options, chosen, count)
    for row in rows:
        if isinstance(row["problem"], ValueError):
            raise ValueError(f"{row['scheme']}: {row['problem']}") from row["problem"]
    return [_flat(row) for row in rows]


def _chosen(schemes):
    if schemes is None:
        return SCHEMES
    if isinstance(schemes, Mapping):
        return int8_schemes(schemes)
    return select([schemes] if isinstance(schemes, str) else schemes)


def _flat(row):
    """A row without what is nested."""
    error = row["error"] or dict.fromkeys(Comparison._fields)
    return {
        "scheme": row["scheme"],
        **error,
        "seconds": row["seconds"],
        "memory": row["memory"] and row["memory"]["extra"],
        **{name: row[name] for name in ("speedup", "speedup_over_fp32", "memory_ratio")},
        "problem": row["problem"] and str(row["problem"]),
    }


# Measuring


def call_threads(asked=None):
    """(threads of every call, [what is to be said about them]): `asked`, or the default of `flash_attention`."""
    count = threads.count(asked)
    if asked is not None and asked > count:
        return count, ["cyflash was built without OpenMP: all run on one thread."]
    return count, []


def measure_layer(layer, options, schemes, num_threads, step=lambda what: lambda: None):
    """Errors, times and memory of schemes on one layer, beside those of the two in fp32.

    Parameters
    ----------
    layer : (q, k, v), ndarrays of float32
    options : dict
        Of the attention.
    schemes : dict of str to Scheme
    num_threads : int
        Of cyflash; those of NumPy's BLAS in this process are the caller's business (`blas_threads`).
    step : function
        Called with the name of each step when it begins; what it returns is called when that ends.

    Returns
    -------
    list of dict
        One per scheme: "scheme", "problem" (ValueError, MemoryError or None), "error" (as a dict) against float64,
        "seconds", "seconds_by_round", "memory" (a dict of bytes), "speedup", "speedup_over_fp32", "memory_ratio"; None
        where it could not be measured.
    """
    everything = {name: SCHEMES[name] for name in (FP32, NUMPY)} | schemes  # cyflash first: it checks what is asked
    problems = dict.fromkeys(everything)
    if why := _too_large(layer, 4):
        problems[NUMPY] = MemoryError(f"not run: its scores alone need {why}")
    done = step("error")
    outputs = _outputs(layer, options, everything, num_threads, problems)
    errors = _errors(layer, options, outputs, problems)
    runs = list(outputs)
    del outputs
    done()
    seconds_by_round, memory = _costs(layer, options, {name: everything[name] for name in runs}, num_threads, step)
    seconds = {name: statistics.median(chain(*rounds)) for name, rounds in seconds_by_round.items()}
    return [
        {
            "scheme": name,
            "problem": problems[name],
            "error": errors[name]._asdict() if name in errors else None,
            "seconds": seconds.get(name),
            "seconds_by_round": seconds_by_round.get(name),
            "memory": memory[name]._asdict() | {"extra": memory[name].extra} if name in memory else None,
            "speedup": _ratio(seconds, NUMPY, name),
            "speedup_over_fp32": _ratio(seconds, FP32, name),
            "memory_ratio": _ratio({name: x.extra for name, x in memory.items()}, name, NUMPY),
        }
        for name in schemes
    ]


def _outputs(layer, options, schemes, num_threads, problems):
    """{scheme: output} of those without a problem; int8 may find more, such as NaN in what it is to quantise."""
    outputs = {}
    for name, scheme in schemes.items():
        if problems[name]:
            continue
        try:
            outputs[name] = scheme(layer, options, num_threads)
        except ValueError as error:
            if name in (FP32, NUMPY):
                raise
            problems[name] = error
    return outputs


def _errors(layer, options, outputs, problems):
    """{scheme: Comparison with attention in float64}; what went wrong is added to the problems."""
    if why := _too_large(layer, 7 * 8, heads=1):
        problems |= dict.fromkeys(outputs, MemoryError(f"no error: the float64 reference needs {why}"))
        return {}
    reference = cyflash.reference.attention(*layer, **options)
    errors = {}
    for name, output in outputs.items():
        try:
            errors[name] = compare(output, reference)
        except ValueError as error:  # NaN or infinities where the reference has none
            problems[name] = error
    return errors


def _costs(layer, options, schemes, num_threads, step):
    """({scheme: [seconds of each call, by round]}, {scheme: Memory}), each in a fresh process."""
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "call.pickle")
        save_call(path, layer, options, schemes)
        processes = {}
        for name in schemes:
            done = step(f"memory of {name}")
            process = CallProcess("cyflash.schemes:prepare_call", path=str(path), scheme=name, num_threads=num_threads)
            processes[name] = stack.enter_context(process)
            done()
        done = step("time")
        times = interleaved_times(processes)
        done()
    return times, {name: process.memory for name, process in processes.items()}


def _too_large(layer, bytes_per_score, heads=None):
    """Why (Lq, Lk) arrays of that many bytes per score do not fit the memory that is free; None if they do."""
    q, k, _ = layer
    *outer, Lq, _ = q.shape
    heads = int(np.prod(outer)) if heads is None else heads
    need, free = bytes_per_score * heads * Lq * k.shape[-2], _available_memory()
    return f"{as_bytes(need)}, and {as_bytes(free)} are free" if free is not None and need > 0.9 * free else None


def _available_memory():
    """Bytes that can still be used, by the system's and the container's account; None where that is not known."""
    limits = []
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
        used, most = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.current", "memory.max"))
        limits.append(int(most) - int(used))
    except (OSError, ValueError, KeyError):
        pass
    return min(limits, default=None)


def _ratio(values, above, below):
    """values[above] / values[below]; None where there is nothing to divide."""
    if above not in values or not values.get(below):
        return None
    return values[above] / values[below]
