"""On a Dask cluster: calibration as a map-reduce, and attention to keys and values that lie in shards on its workers.

    observe(calibrator, source)         a Calibrator for each piece of the source -> merged as a tree -> the caller's
    flash_attention(q, shards)          (out, lse) of each shard -> merge_states as a tree -> the caller's arrays

Both give the same bits whatever the workers do: which of them computes what, how many there are, and whether some die
on the way. Needs the extra "dask". dask_cluster.py submits and waits.
"""
import os
import re

import numpy as np
import numpy.ma  # NumPy imports it when first asked, which threads of a worker can see half done

try:
    import distributed
    from dask.base import is_dask_collection
except ImportError:
    raise ImportError("cyflash.compat.dask needs Dask; install it with: pip install 'cyflash-attn[dask]'") from None

from cyflash import arrays
from cyflash.attention import attend
from cyflash.compat.dask_cluster import Cluster
from cyflash.merge import merge_states
from cyflash.observing import How, observe_layers, renamed
from cyflash.plan import make_plan, with_config
from cyflash.quant import Calibrator

__all__ = ["flash_attention", "observe"]


# Calibration


def observe(calibrator, source, *, client=None, layout="bhld", rename=(), progress=False, timeout=60.0, **options):
    """Let the workers of a cluster observe, and take all of it in.

    Parameters
    ----------
    calibrator : Calibrator
        Its settings are those of the workers'. What it has observed before stays.
    source : list of path, Future or Delayed; or dask.bag.Bag
        A path is a capture file, .npz or .safetensors, that the workers can read; its layers are observed by different
        workers. A Future or Delayed, and a partition of a bag, holds (layer, q, k, v) or an iterable of these, where
        layer is a str and the arrays are as `Calibrator.observe` takes them; a fifth entry is a dict of options.
    client : distributed.Client, optional
        Default: the one made last.
    layout : {"bhld", "blhd"}
        The order of axes in capture files.
    rename : list of (str, str)
        (pattern, replacement): regular expressions for the layers' names, one after the other.
    progress : bool
        Show a bar on stderr while it lasts, where that is a terminal.
    timeout : float
        Seconds to wait for a worker while the cluster has none.
    **options
        Of the attention, as `Calibrator.observe` takes them; they win over those of a file or an entry.

    Returns
    -------
    Calibrator
        The one given.

    Raises
    ------
    TypeError, ValueError, OSError
        As `Calibrator.observe` and `load_capture`, with the file where there is one. Nothing was taken in then.
    RuntimeError
        When the scheduler is gone, there is no worker for `timeout` seconds, or a piece kills several workers.

    Notes
    -----
    What a Calibrator keeps are exact counts and tiles chosen by their content, so that the result has the same bits as
    one that observed everything itself. When a worker dies, its pieces are observed again by others.

    Examples
    --------
    >>> import numpy as np
    >>> from distributed import Client
    >>> from cyflash.compat import dask as cyflash_dask
    >>> from cyflash.quant import Calibrator
    >>> def piece(seed):
    ...     r = np.random.default_rng(seed)
    ...     return "layer0", *(r.standard_normal((2, 64, 32), dtype=np.float32) for _ in range(3))
    >>> with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0") as client:
    ...     calibrator = cyflash_dask.observe(Calibrator(), client.map(piece, range(4)), causal=True)
    >>> calibrator.summary()[0]["observations"]
    4
    """
    if not isinstance(calibrator, Calibrator):
        raise TypeError(f"calibrator: expected a Calibrator, got {type(calibrator).__name__}")
    how = How(calibrator.settings, layout, options, _checked_renames(rename))
    with Cluster(client, "observing", progress, timeout).errors() as cluster:
        pieces = _pieces(source, how, cluster)
        if pieces:
            root = cluster.tree(_merged, pieces)
            calibrator.merge(cluster.results([root])[0])
    return calibrator


def _pieces(source, how, cluster):
    """The Futures of a Calibrator for each piece of the source; those of one layer of files beside each other."""
    if is_dask_collection(source):
        if not hasattr(source, "to_delayed") or hasattr(source, "chunks"):
            raise TypeError(f"source: expected a list or a Bag, got a dask {type(source).__name__}")
        source = source.to_delayed()
    if isinstance(source, (str, bytes, os.PathLike, distributed.Future)) or not np.iterable(source):
        raise TypeError(f"source: expected a list of files, Futures or Delayed, or a Bag, got {source!r}; pass a list")
    files, places, held = [], [], []
    for i, one in enumerate(source):
        if isinstance(one, (str, os.PathLike)):
            files.append(os.path.abspath(one))
        elif isinstance(one, distributed.Future) or is_dask_collection(one):
            places.append(f"source[{i}]")
            held.append(one)
        else:
            raise TypeError(f"source[{i}]: expected a path, a Future or something delayed, got {type(one).__name__}")
    held = cluster.futures(held)
    pieces = [cluster.submit(_observe_entries, *one, how) for one in zip(places, held, strict=True)]
    del held
    names = cluster.results([cluster.submit(_layers, path, how) for path in files])
    layers = [(layer, path) for path, own in zip(files, names, strict=True) for layer in own]
    order = sorted(layers, key=lambda one: renamed(one[0], how.renames))
    return [cluster.submit(_observe_layer, path, layer, how) for layer, path in order] + pieces


def _checked_renames(rename):
    for one in rename:
        try:
            pattern, replacement = one
            re.compile(pattern + "|").sub(replacement, "")
        except (TypeError, ValueError, re.error, IndexError) as error:
            raise ValueError(f"rename: expected (pattern, replacement), got {one!r}: {error}") from None
    return tuple(map(tuple, rename))


# In the workers


def _layers(path, how):
    return list(how.load(path))


def _observe_layer(path, layer, how):
    return observe_layers(path, how.load(path), how, [layer])


def _observe_entries(where, entries, how):
    calibrator = Calibrator(**how.settings)
    single = isinstance(entries, tuple) and len(entries) > 1 and isinstance(entries[0], str)
    if not np.iterable(entries):
        raise TypeError(f"{where}: expected entries (layer, q, k, v), got {_shown(entries)}")
    for entry in [entries] if single else entries:
        if not (isinstance(entry, (tuple, list)) and len(entry) in (4, 5) and isinstance(entry[0], str)):
            raise TypeError(f"{where}: expected entries (layer, q, k, v), got {_shown(entry)}")
        layer, q, k, v, *more = entry
        try:
            calibrator.observe(renamed(layer, how.renames), q, k, v, **{**(more[0] if more else {}), **how.options})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
    return calibrator


def _merged(*calibrators):
    """A new one: results of tasks are not to be changed."""
    new = Calibrator(**calibrators[0].settings)
    for one in calibrators:
        new.merge(one)
    return new


# Attention


def flash_attention(
    q, shards, *, client=None, progress=False, timeout=60.0, causal=None, causal_align="bottom-right", scale=None,
    window=None, softcap=0.0, bias=None, mask=None, alibi_slopes=None, sinks=None, return_lse=False, config=None,
    num_threads=None,
):
    """Exact attention to keys and values that are spread over a cluster along the sequence.

    Each shard is attended where it lies, with q sent there; what comes back is as large as the output. A shard knows
    its place in the sequence: causal, windows and ALiBi need no mask, and shards that no query sees are left alone.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (Lq, D), (H, Lq, D) or (B, H, Lq, D)
        Queries, on this machine.
    shards : list, or (k, v) of two dask.array.Array
        In a list, in order of the sequence: Futures or Delayed of (k, v), or pairs (k, v) of them or of ndarrays; k of
        (B, Hk, L, D) and v of (B, Hk, L, Dv), or with the fewer axes of q, where L may differ from shard to shard and
        be 0. Of dask arrays, chunks along the sequence are the shards; all other axes are in one chunk.
    client, progress, timeout
        As in `observe`.
    causal, causal_align, scale, window, softcap, bias, mask, alibi_slopes, sinks, return_lse, config, num_threads
        As in `cyflash.flash_attention`, where Lk is the length of all shards together. bias and mask are cut along
        their last axis. num_threads is of each task; workers of Dask have one by default.

    Returns
    -------
    out : ndarray of q's dtype, shape q.shape[:-1] + (Dv,)
    lse : ndarray of float32, shape q.shape[:-1]
        Only with return_lse.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `cyflash.flash_attention`, and for shards that do not fit q or each other. Nothing was computed then.
    RuntimeError
        As `observe`; and where a shard was scattered to a worker that died, for it cannot be computed again.

    Notes
    -----
    Shards are computed in float32 and merged in one fixed tree, so that the bits depend on how the sequence is cut, and
    on the SIMD builds of the workers, but on nothing else. 16-bit outputs are rounded once, at the end.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> from distributed import Client
    >>> from cyflash.compat import dask as cyflash_dask
    >>> q, k, v = (np.random.default_rng(i).standard_normal((4, 96, 32), dtype=np.float32) for i in range(3))
    >>> with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0") as client:
    ...     shards = [(k[:, i : i + 32], v[:, i : i + 32]) for i in (0, 32, 64)]
    ...     out = cyflash_dask.flash_attention(q, shards, causal=True)
    >>> bool(np.abs(out - cyflash.flash_attention(q, k, v, causal=True)).max() < 1e-6)
    True
    """
    arrays.require_float("q", q, (2, 3, 4))
    causal, scale = with_config(config, q, causal, scale, None, None)
    options = {"causal": False if causal is None else causal, "scale": scale, "window": window, "softcap": softcap}
    options |= {"alibi_slopes": alibi_slopes}
    whole = {"causal_align": causal_align, "bias": bias, "mask": mask, "sinks": sinks}
    with Cluster(client, "attention", progress, timeout).errors() as cluster:
        held = _held(shards, cluster)
        sizes = cluster.results([cluster.submit(_sizes, i, *one) for i, one in enumerate(held)])
        lengths, key_shape, value_shape = _joined(sizes, q)
        plan = make_plan(q, arrays.Shape(key_shape), arrays.Shape(value_shape), **options, **whole)
        seen = _seen(plan, lengths)
        sent = cluster.submit(_same, q)
        options |= {"config": config, "num_threads": num_threads}
        parts = [
            cluster.submit(
                _attend, sent, plan.offset - start,
                options | _cut(whole, start, stop) | {"sinks": sinks if i == seen[0][0] else None}, *held[i],
            )
            for i, start, stop in seen
        ]  # fmt: skip
        del sent
        ((out, lse),) = cluster.results([cluster.tree(_merged_states, parts, 2)])
    out = out.astype(q.dtype, copy=False)
    return (out, lse) if return_lse else out


def _held(shards, cluster):
    """What each shard is on the cluster: (future of (k, v),) or (k, v), each of them a Future or an ndarray."""
    if isinstance(shards, tuple) and len(shards) == 2 and all(hasattr(x, "chunks") for x in shards):
        shards = _chunks(*shards)
    if not isinstance(shards, (list, tuple)) or not shards:
        raise TypeError(f"shards: expected a list of (k, v), or (k, v) of two dask arrays, got {_shown(shards)}")
    pairs = [tuple(one) if isinstance(one, (tuple, list)) else (one,) for one in shards]
    for i, pair in enumerate(pairs):
        far = [isinstance(x, distributed.Future) or is_dask_collection(x) for x in pair]
        here = [isinstance(x, np.ndarray) for x in pair]
        if not (far == [True] or (len(pair) == 2 and np.logical_or(far, here).all())):
            raise TypeError(f"shards[{i}]: expected (k, v) or a Future or Delayed of it, got {_shown(shards[i])}")
    held = iter(cluster.futures([x for pair in pairs for x in pair]))
    return [tuple(next(held) for _ in pair) for pair in pairs]


def _chunks(k, v):
    """[(k, v)] of Delayed, chunk by chunk along the sequence."""
    for name, x in (("k", k), ("v", v)):
        if x.ndim < 2 or any(len(own) > 1 for axis, own in enumerate(x.chunks) if axis != x.ndim - 2):
            sequence = {axis: -1 for axis in range(x.ndim) if axis != x.ndim - 2}
            raise ValueError(
                f"{name}: expected chunks along the sequence only, got {x.numblocks} of them; write "
                f"{name}.rechunk({sequence})"
            )
    if k.chunks[-2] != v.chunks[-2]:
        raise ValueError(f"v: expected k's chunks {k.chunks[-2]} along the sequence, got {v.chunks[-2]}")
    return list(zip(*([*x.to_delayed().ravel()] for x in (k, v)), strict=True))


def _joined(sizes, q):
    """(length of each shard, shape of all keys, shape of all values)."""
    for i, ((key, key_dtype), (value, value_dtype)) in enumerate(sizes):
        for name, shape, dtype, first in (("k", key, key_dtype, sizes[0][0]), ("v", value, value_dtype, sizes[0][1])):
            if len(shape) != q.ndim:
                raise ValueError(f"shards[{i}]: {name}: expected {q.ndim} axes as in q {q.shape}, got {shape}")
            if shape[:-2] + shape[-1:] != first[0][:-2] + first[0][-1:] or dtype != first[1]:
                raise ValueError(
                    f"shards[{i}]: {name}: expected {first[1]} {first[0]} as in shards[0] but for the length, got "
                    f"{dtype} {shape}"
                )
        if key[-2] != value[-2]:
            raise ValueError(f"shards[{i}]: expected k and v of one length, got {key} and {value}")
    lengths = [key[-2] for (key, _), _ in sizes]
    return lengths, *((*shape[:-2], sum(lengths), shape[-1]) for shape, _ in sizes[0])


def _seen(plan, lengths):
    """[(i, start, stop)] of the shards with keys that causal and the window let any query see; one at least."""
    first, last = plan.offset - plan.left, plan.offset + plan.Lq - 1 + plan.right
    stops = np.cumsum(lengths).tolist()
    places = [(i, stop - length, stop) for i, (length, stop) in enumerate(zip(lengths, stops, strict=True))]
    seen = [(i, start, stop) for i, start, stop in places if start < stop and start <= last and stop > first]
    return seen or places[:1]


def _cut(whole, start, stop):
    """Bias and mask of a shard."""
    return {name: _columns(whole[name], start, stop) for name in ("bias", "mask")}


def _columns(x, start, stop):
    return x if x is None or x.shape[-1:] in ((), (1,)) else np.ascontiguousarray(x[..., start:stop])


def _shown(x):
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list)) else type(x).__name__


# In the workers


def _same(x):
    return x


def _pair(shard):
    pair = shard[0] if len(shard) == 1 else shard
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise TypeError(f"shards: expected (k, v), got {_shown(pair)}")
    return pair


def _sizes(i, *shard):
    """(shape, dtype) of k and of v."""
    sizes = []
    for name, x in zip("kv", _pair(shard), strict=True):
        try:
            arrays.require_float(name, x, (2, 3, 4))
        except (TypeError, ValueError) as error:
            raise type(error)(f"shards[{i}]: {error}") from None
        sizes.append((x.shape, x.dtype.name))
    return tuple(sizes)


def _attend(q, offset, options, *shard):
    """(out, lse) of one shard, in float32, which 16 bits become without loss."""
    q = q.astype(np.float32, copy=False)
    return attend(q, *_pair(shard), offset=offset, return_lse=True, **options)[:2]


def _merged_states(a, b):
    return merge_states(*a, *b)
