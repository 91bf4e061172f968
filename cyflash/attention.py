"""The public attention functions: validate -> plan -> allocate -> route to a kernel."""
import functools
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np

from cyflash import arrays, cpu, operands, parts
from cyflash.cpu import threads
from cyflash.cpu.team import Team
from cyflash.flops import pairs_at
from cyflash.foreign import same_kind_or_gpu
from cyflash.gpu.where import on_gpu
from cyflash.plan import UNBOUNDED, Plan, make_plan, with_config
from cyflash.quantized import checked_product
from cyflash.stored import Stored

# Waking a thread costs some microseconds: each should have about as much work, here 10 us at 200 GFLOP/s.
FLOPS_PER_THREAD = 2e6

# Fewer query rows take as long as so many: they wait for keys and values from memory.
FEW_ROWS = 8


class Work(NamedTuple):
    """What a call did: visible FLOPs, bytes of scratch of one thread, the tile sizes and the SIMD build used."""

    flops: int
    tile_bytes: int
    block_size_q: int
    block_size_kv: int
    implementation: str


@same_kind_or_gpu
def flash_attention(
    q, k, v, *, causal=None, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None, mask=None,
    alibi_slopes=None, sinks=None, dropout_p=None, seed=None, return_lse=False, out=None, config=None, num_threads=None,
):
    """Exact softmax attention, tile by tile, without the (Lq, Lk) score matrix.

    Scores are ``scale * q @ k.T``, then softcap, then bias and ALiBi, then masks; all options combine. A row that sees
    no key gives 0 (and an LSE of -inf, or the sink). Arrays on a GPU are computed there: see the notes.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (Lq, D), (H, Lq, D) or (B, H, Lq, D)
        Queries. Any strides; used in place when the last axis is contiguous, as are k, v and out. bfloat16 is that of
        ml_dtypes. 16 bits are converted tile by tile, and all sums are in float32.
    k : ndarray of float32, float16 or bfloat16, shape (Lk, D), (Hk, Lk, D) or (B, Hk, Lk, D)
        Keys. Hk must divide H: query head h reads kv head h // (H // Hk).
    v : ndarray of float32, float16 or bfloat16, shape (Lk, Dv), (Hk, Lk, Dv) or (B, Hk, Lk, Dv)
        Values. Dv may differ from D.
    causal : bool, optional
        Hide keys j > i + offset from query i. Default: config's, else False.
    causal_align : {"bottom-right", "top-left"}
        Query i stands at key position i + offset, where offset is Lk - Lq or 0. It counts for causal, window and ALiBi.
    scale : float, optional
        Default: config's, else 1 / sqrt(D).
    window : (int, int), optional
        (left, right): only keys from position - left to position + right are visible; -1 is unbounded. A window of W
        tokens that includes the query's own is (W - 1, 0).
    softcap : float
        cap * tanh(score / cap); 0 for none.
    bias : ndarray of float32, optional
        Added to the scores; broadcasts by NumPy's rules to q.shape[:-1] + (Lk,) and is never expanded. -inf hides.
    mask : ndarray of bool, optional
        True keeps. Broadcasts like bias.
    alibi_slopes : ndarray of float32 or list of float, shape (H,) or (B, H), optional
        Adds -slope * abs(position - j) to the scores (Press et al. 2022).
    sinks : ndarray of float32 or list of float, shape (H,), optional
        One extra logit per head in the softmax's denominator, without a value; neither scaled nor softcapped.
    dropout_p : float, optional
        Only 0 is implemented. Default: config's, else 0.
    seed : int, optional
        For dropout; has no effect without it.
    return_lse : bool
        Also return the log-sum-exp of each row's scores.
    out : ndarray of q's dtype, shape q.shape[:-1] + (Dv,), optional
        Where to write the output. It must not overlap an input.
    config : FlashAttentionConfig, optional
        Tile sizes and defaults. An argument that is given wins over it. Its head_dim must be q's.
    num_threads : int, optional
        Default: `set_num_threads`, CYFLASH_NUM_THREADS, or what this process may use. Bits do not depend on it.

    Returns
    -------
    out : ndarray of q's dtype, shape q.shape[:-1] + (Dv,)
    lse : ndarray of float32, shape q.shape[:-1]
        Natural logarithm. Only with return_lse.

    Raises
    ------
    TypeError
        For a dtype. Use `cyflash.reference.attention` for float64.
    ValueError
        For a shape or an option.
    NotImplementedError
        For dropout.
    MemoryError
        When the output or the tiles cannot be allocated.

    Notes
    -----
    The algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691) with the online softmax of Milakov and Gimelshein
    (2018, arXiv:1805.02867). Memory beyond inputs and output is a few hundred kilobytes for each thread, whatever the
    lengths. Where query rows are few enough for one tile, keys are cut into chunks of 1024 or so, whose results are
    merged; these take Dv + 3 floats for each row and chunk.

    Where q, k and v all are bfloat16 and the build multiplies it (avx512_bf16), both products are of bfloat16, with
    weights rounded to it as the output is, unless query rows are few. Everywhere else 16 bits are computed as the
    float32 numbers that they stand for.

    Arrays of other libraries in the host's memory (torch's tensors, JAX's arrays, what has DLPack or ``__array__``) are
    read where they are as well, and results are arrays of q's library; the others of a call may be of NumPy. torch's
    bfloat16 needs ml_dtypes. There is no backward pass: a tensor that requires a gradient raises ValueError, unless
    torch computes none.

    Arrays of CuPy, torch on CUDA, and whatever has ``__cuda_array_interface__`` or DLPack on CUDA are read where they
    are, on the current stream of q's library, and results are arrays of that library. All arrays of a call must be on
    one GPU, with contiguous last axes; D is at most 256, Dv is D, and num_threads must not be given. float32 is
    computed in float32; both products of float16 and bfloat16 are of 16 bits, with sums in float32; q, k and v of
    unlike dtypes are copied to float32 first. A config's block sizes are of the CPU path. `gpu_status` says whether
    there is a GPU.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 8, 128, 64), dtype=np.float32) for _ in range(3))
    >>> cyflash.flash_attention(q, k, v, causal=True).shape
    (2, 8, 128, 64)
    """
    out, lse, _ = attend(
        q, k, v, causal=causal, causal_align=causal_align, scale=scale, window=window, softcap=softcap, bias=bias,
        mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed, return_lse=return_lse,
        out=out, config=config, num_threads=num_threads,
    )
    return (out, lse) if return_lse else out


@same_kind_or_gpu
def flash_attention_int8(
    q, k, v, *, q_scale=None, k_scale=None, v_scale=None, granularity=None, smooth_k=None, fp32_sinks=None, pv=None,
    quant=None, causal=None, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None, mask=None,
    alibi_slopes=None, sinks=None, return_lse=False, out=None, config=None, num_threads=None,
):
    """Attention on int8 codes: both products (by `pv`, only the first) in exact integers, all between them in float32.

    q, k and v are taken independently. A float array is quantised in the call (with a given scale: statically), int8
    arrays come with their scale, a `QuantizedTensor` brings it. Options are those of `flash_attention`.

    Parameters
    ----------
    q : ndarray of float32, float16, bfloat16 or int8, or QuantizedTensor
        Queries, of shape (Lq, D), (H, Lq, D) or (B, H, Lq, D). Any strides, as in `flash_attention`.
    k : ndarray of float32, float16, bfloat16 or int8, or QuantizedTensor
        Keys, of shape (Lk, D), (Hk, Lk, D) or (B, Hk, Lk, D). Hk must divide H.
    v : ndarray of float32, float16, bfloat16 or int8, or QuantizedTensor
        Values, of shape (Lk, Dv), (Hk, Lk, Dv) or (B, Hk, Lk, Dv).
    q_scale, k_scale, v_scale : float or array_like, optional
        x ~ code * scale. A number, or an array that broadcasts as in NumPy: (H, 1, 1) or (B, H, 1, 1) per head,
        (H, L, 1) or (B, H, L, 1) per token. Required for an int8 array; makes the quantisation of a float array
        static: what lies beyond 127 * scale saturates.
    granularity : {"tensor", "head", "token"} or a triple of them for (q, k, v), optional
        Of scales that are found in the call: one for each sequence, for each of its heads, or for each token.
        Default: "token", the most accurate. Of no effect on operands that bring a scale.
    smooth_k : bool, optional
        Subtract the mean of the keys over their tokens before quantising; the result is exactly compensated. Default:
        True for float keys without a given scale; else what the QuantizedTensor or quant carries.
    fp32_sinks : int, optional
        Compute the first keys in float32 and leave them out of the scales: attention sinks often have outliers.
        Default: quant's, or that of the QuantizedTensors, else 0. It does not change what is visible.
    pv : {"int8", "bf16", "fp32"}, optional
        Arithmetic of the second product. With "bf16" and "fp32" a float v without a given scale is not quantised (but
        rounded to bfloat16 by the former).
        Default: quant's, else "int8".
    quant : LayerScales, optional
        Scales, mean of the keys, fp32_sinks and pv of a calibrated layer. A planned one (`LayerScales.parts`) is run
        part by part: q, k and v must be float arrays then, and no other argument may say how to quantise them.
    causal, causal_align, scale, window, softcap, bias, mask, alibi_slopes, sinks, return_lse, out, config, num_threads
        As in `flash_attention`. A config's block_size_kv above 64 is rounded up to a multiple of 64; a smaller one
        shortens the parts of the notes.

    Returns
    -------
    out : ndarray of q's dtype, or float32 where q is int8, shape q.shape[:-1] + (Dv,)
    lse : ndarray of float32, shape q.shape[:-1]
        Natural logarithm. Only with return_lse.

    Raises
    ------
    NotImplementedError
        For a config whose dropout_p is not 0.
    TypeError
        For a dtype.
    ValueError
        For a shape or an option, for NaN or infinity in a float array (wherever it is, masked or not), and for scales,
        means and settings that contradict each other.
    MemoryError
        When the output, the codes or the tiles cannot be allocated.

    Notes
    -----
    Codes are symmetric, in [-127, 127], rounded half to even. The weights of each part of at most 64 keys are rounded
    to 0..255 of that part's own greatest weight in the row, after the scales of V's tokens were multiplied in; the
    denominator is summed from the weights before they are rounded. Subtracting the mean of the keys is from
    SageAttention (Zhang et al. 2024, arXiv:2410.02367). `cyflash.reference.attention_int8` states the whole scheme.

    On a GPU, as in `flash_attention`, nothing waits for values: a token with NaN or infinity does not raise, its scale
    becomes NaN, and so does what is computed from it. pv="bf16" multiplies float16 values in float16, all others in
    bfloat16, codes as the numbers that they stand for; pv="fp32" multiplies everything in float32, on units that are
    many times slower. fp32_sinks are a call of their own, which is merged with that of the other keys.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((8, 256, 64), dtype=np.float32) for _ in range(3))
    >>> error = cyflash.flash_attention_int8(q, k, v) - cyflash.flash_attention(q, k, v)
    >>> bool(np.abs(error).max() < 0.01)
    True
    """
    out, lse, _ = attend_int8(
        q, k, v, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, granularity=granularity, smooth_k=smooth_k,
        fp32_sinks=fp32_sinks, pv=pv, quant=quant, causal=causal, causal_align=causal_align, scale=scale,
        window=window, softcap=softcap, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks,
        return_lse=return_lse, out=out, config=config, num_threads=num_threads,
    )
    return (out, lse) if return_lse else out


def attend(q, k, v, *, config=None, **options):
    """(out, lse or None, Work): what `flash_attention` and the engine of config.py share."""
    if on_gpu(q):
        from cyflash.gpu import attention as gpu

        return gpu.attend(q, k, v, config=config, **options)
    for name, x in (("q", q), ("k", k), ("v", v)):
        arrays.require_float(name, x, (2, 3, 4))
    kinds = kinds_of(k, v)
    call = describe(q, k, v, (q, k, v), config, kinds=kinds, **options)
    q, k, v = (arrays.four_axes(arrays.rows_in_place(x)) for x in (q, k, v))
    return run(call, q, floats(k, v, kinds))


def attend_int8(
    q, k, v, *, q_scale=None, k_scale=None, v_scale=None, granularity=None, smooth_k=None, fp32_sinks=None, pv=None,
    quant=None, config=None, codes=None, **options,
):
    """(out, lse or None, Work): `flash_attention_int8`. codes: uint8 zeros (B, H, Lq, Lk), C order, to receive those of
    P with pv="int8"; where keys are skipped or in float32 they stay 0."""
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    if on_gpu(q):
        from cyflash.gpu import attention as gpu

        if codes is not None:
            raise NotImplementedError("codes: expected None with arrays on a GPU, which keeps no codes of P")
        return gpu.attend_int8(
            q, k, v, **scales, granularity=granularity, smooth_k=smooth_k, fp32_sinks=fp32_sinks, pv=pv, quant=quant,
            config=config, **options,
        )
    if parts.are_in(quant):
        how = scales | {"granularity": granularity}
        how |= {"smooth_k": smooth_k, "fp32_sinks": fp32_sinks, "pv": pv, "codes": codes}
        return _attend_parts(q, k, v, quant, how, config, **options)
    for name, x in (("q", q), ("k", k), ("v", v)):
        operands.require_operand(name, x)
    how = getattr(quant, "pv", None) if pv is None else pv
    memory = [operands.memory_of(x) for x in (q, k, v)]
    call = describe(q, k, v, memory, config, kinds=("int8", "int8"), pv=how, **options)
    settings = operands.settle(
        q, k, v, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, granularity=granularity, smooth_k=smooth_k,
        fp32_sinks=fp32_sinks, pv=pv, quant=quant,
    )
    if codes is not None and settings.pv != "int8":
        raise ValueError(f"codes: expected None with pv={settings.pv!r}, which has no codes of P")
    if settings.fp32_sinks == call.plan.Lk:  # nothing is left for codes
        q, k, v = operands.float_operands(q, k, v, settings)
        return run(call, q, floats(k, v, kinds_of(k, v)))
    others = call.out.nbytes + call.threads.most * call.tile_bytes(
        k_kind="int8", v_kind="int8", product=settings.pv, precise=settings.fp32_sinks
    )
    q, stored, ready = operands.prepare(q, k, v, settings, call.build, call.threads, others)
    return run(call, q, stored, ready._replace(trace=codes))


def attend_stored(
    q, stored, table, keys, queries=None, *, q_scale=None, pv=None, append=None, config=None,
    causal_align="bottom-right", **options,
):
    """(out, lse or None): attention of sequences whose keys and values are kept in pages.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (n, H, Lq, D)
    stored : Stored
    table : ndarray of int, shape (n, P)
        Page numbers; those beyond a sequence's keys are not looked at.
    keys : ndarray of int, shape (n,)
        How many keys each sequence has.
    queries : ndarray of int, shape (n,), optional
        How many of the Lq queries count, the first ones; outputs of the others are 0, their LSE -inf. Default: all.
    q_scale : ndarray, optional
        A static scale of q where keys are codes. Default: one for each token.
    pv : {"int8", "bf16", "fp32"}, optional
        Where keys are codes. Default: "int8".
    append : function, optional
        Called when nothing about the arguments can raise any more: writes the last keys and values, which `keys` counts
        already, and returns the (stored, table) to read.

    The options are those of `flash_attention`; bias and mask broadcast to (n, H, Lq, max(keys)). The caller has checked
    table, keys and queries.
    """
    n, _, Lq, _ = arrays.require_float("q", q, (4,)).shape
    keys = np.asarray(keys)
    longest = int(keys.max(initial=0))
    Hk = stored.k.shape[1]
    k, v = arrays.Shape((n, Hk, longest, stored.D)), arrays.Shape((n, Hk, longest, stored.Dv))
    coded = stored.kind == "int8"
    kinds = stored.kind, stored.v_kind
    call = describe(q, k, v, (q,), config, kinds=kinds, pv=pv, causal_align=causal_align, **options)
    if pv is not None and not coded:
        raise ValueError(f"pv: expected None where keys and values are floats, got {pv!r}")
    ready = None
    q = arrays.rows_in_place(q)
    if coded:
        ready = operands.prepare_queries(
            q, q_scale, "int8" if pv is None else checked_product(pv), call.build, call.threads
        )
    if append is not None:
        stored, table = append()
    sequences = np.zeros((n, 5), np.intp)
    sequences[:, 0] = sequences[:, 1] = np.arange(n)
    sequences[:, 2] = Lq if queries is None else queries
    sequences[:, 3] = keys
    if causal_align == "bottom-right":
        sequences[:, 4] = sequences[:, 3] - sequences[:, 2]
    if queries is not None:
        for row in np.flatnonzero(sequences[:, 2] < Lq):
            call.out[row, :, sequences[row, 2] :] = 0
            if call.lse is not None:
                call.lse[row, :, sequences[row, 2] :] = -np.inf
    return run(call, q, stored, ready, sequences=sequences, pages=np.ascontiguousarray(table, np.intp))[:2]


def kinds_of(k, v):
    """What keys and values hold, as `arrays.kind_of` calls it."""
    return arrays.kind_of(k.dtype), arrays.kind_of(v.dtype)


def floats(k, v, kinds):
    """Arrays (B, Hk, L, D) of floats of these kinds as the kernels read them."""
    return Stored(kinds[0], None, k, v, k.shape[3], v.shape[3], kinds[1])


def _attend_parts(q, k, v, quant, how, config, *, num_threads=None, **options):
    """`attend_int8` of a planned layer: a call for each part, on its heads, into its heads of out and lse."""
    parts.require_alone(q, k, v, how)
    call = describe(q, k, v, (q, k, v), config, kinds=("int8", "int8"), num_threads=num_threads, **options)
    works = []
    for part in parts.split(quant, q, k, v, call.out, call.lse, call.plan, options):
        run = attend if part.quant is None else partial(attend_int8, quant=part.quant)
        with part.named_in_errors():
            out, lse, work = run(*part.qkv, **part.options, config=config, num_threads=num_threads)
        part.write(out, lse)
        works.append(work)
    flops, *largest, builds = zip(*works, strict=True)
    return call.out, call.lse, Work(sum(flops), *map(max, largest), builds[0])


class _Call(NamedTuple):
    """A checked call: its plan, where to write, and with which tiles and threads."""

    plan: Plan
    out: np.ndarray
    lse: np.ndarray | None
    flops: int
    build: ModuleType
    Br: int
    Bc: int
    threads: Team
    native: bool  # both products are of bfloat16
    top_left: bool  # of plan.py's causal_align, where offsets differ between sequences

    def tile_bytes(self, **kinds):
        """Of one thread; kinds: as the kernels' tile_bytes takes them."""
        return self.build.tile_bytes(self.Br, self.Bc, self.plan.D, self.plan.Dv, **kinds)


def describe(
    q, k, v, memory, config, *, kinds, pv=None, causal=None, scale=None, return_lse=False, out=None, num_threads=None,
    dropout_p=None, seed=None, dtype=None, out_shape=None, pairs=None, out_is_new=False, **options,
):
    """Check the options that all precisions share, and allocate the output. Tile sizes are cut to the problem's, which
    changes no bit, so that small calls stay small.

    memory: the arrays that q, k and v lie in. kinds: of keys and values as they are stored; pv: how codes of values are
    multiplied. Where q, k and v are only the shapes that the sequences fit in, dtype and out_shape are those of the
    output, and pairs is the sum of Lq * Lk. out_is_new: our own caller made out for this call, as it has to be.
    """
    causal, scale = with_config(config, q, causal, scale, dropout_p, seed)
    blocks = (None, None) if config is None else (config.block_size_q, config.block_size_kv)
    dtype = output_dtype(q) if dtype is None else dtype
    build = cpu.active()
    plan, Br, Bc, native, visible = _settled(
        q.shape, k.shape, v.shape, build, (*kinds, arrays.kind_of(dtype), pv), blocks,
        causal=False if causal is None else causal, scale=scale, **options,
    )
    shape = (*q.shape[:-1], plan.Dv) if out_shape is None else out_shape
    if out is None:
        out = np.empty(shape, dtype)
    elif not out_is_new:
        _check_out(out, shape, dtype, memory, options)
    lse = np.empty(shape[:-1], np.float32) if return_lse else None
    flops = visible if pairs is None else 2 * (plan.D + plan.Dv) * plan.H * pairs
    work = flops if plan.Lq >= FEW_ROWS else flops * FEW_ROWS // max(plan.Lq, 1)
    count = threads.for_call(1 + int(work / FLOPS_PER_THREAD), num_threads)
    return _Call(plan, out, lse, flops, build, Br, Bc, count, native, options.get("causal_align") == "top-left")


def _settled(*shapes_and_kinds, window=None, bias=None, mask=None, alibi_slopes=None, sinks=None, **options):
    """`_settle`, remembered for calls without arrays among their options: a model makes the same one again and again,
    and between its products the code and the data of a dozen checks have to come from memory each time."""
    if bias is mask is alibi_slopes is sinks is None:
        # True and 1 are equal, but not as good, in a window too: lru_cache tells types apart, though not within tuples
        sides = window if not isinstance(window, tuple) else (*window, *map(type, window))
        try:
            return _remembered(*shapes_and_kinds, sides, window=window, **options)
        except TypeError:  # an option that cannot be hashed
            pass
    return _settle(
        *shapes_and_kinds, window=window, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, **options
    )


def _settle(q_shape, k_shape, v_shape, build, kinds, blocks, sides=None, **options):
    """(Plan, Br, Bc, whether products are of bfloat16, visible FLOPs); kinds: of k, v and the output, and pv."""
    plan = make_plan(*map(arrays.Shape, (q_shape, k_shape, v_shape)), **options)
    k, v, out, pv = kinds
    native = k == v == out == "bf16" and build.SHAPE["BF16_GROUP"] == 2
    kind = "bf16" if native else "int8" if k == "int8" else "fp32"
    converts = (k, v) not in (("fp32", "fp32"), ("int8", "int8")) or (kind == "int8" and pv not in (None, "int8"))
    Br, Bc = cpu.tile_sizes_of(build, *blocks, kind, converts)
    panel, rows = build.SHAPE["PANEL"], build.SHAPE["ROWS"]
    Br = min(Br, -(-plan.Lq // panel) * panel) or panel
    Bc = min(Bc, -(-plan.Lk // rows) * rows) or rows
    return plan, Br, Bc, native, visible_flops(plan)


_remembered = functools.lru_cache(maxsize=256, typed=True)(_settle)


def output_dtype(q):
    """The output's: q's, float32 for codes."""
    dtype = operands.memory_of(q).dtype
    return arrays.FLOAT32 if dtype == np.int8 else dtype


@functools.lru_cache(maxsize=64)
def _dense(B, Lq, Lk, offset):
    """(sequences, pages) of B sequences of the same lengths, see `forward` in cpu/driver.pxi."""
    number = np.arange(B, dtype=np.intp)
    sequences = np.empty((B, 5), np.intp)
    sequences[:, 0] = sequences[:, 1] = number
    sequences[:, 2:] = Lq, Lk, offset
    return sequences, number[:, None]


def run(call, q, stored, codes=None, sequences=None, pages=None, ragged=False):
    """One kernel call. q: with four axes, or None; sequences, pages: default those of dense arrays."""
    plan, out, lse = call.plan, call.out, call.lse
    if sequences is None:
        sequences, pages = _dense(plan.B, plan.Lq, plan.Lk, plan.offset)
    direct = arrays.rows_in_place(out)  # out itself, unless its last axis is strided
    kinds = None if q is None else arrays.kind_of(q.dtype), arrays.kind_of(out.dtype)
    tile_bytes, keys = 0, call.Bc
    if out.size:
        with call.threads as count:
            tile_bytes, keys = call.build.forward(
                q, kinds[0] or "fp32", stored, sequences, pages, codes, arrays.four_axes(direct), kinds[1],
                None if lse is None else arrays.four_axes(lse[..., None])[..., 0], plan, ragged, call.native,
                call.Br, call.Bc, count,
            )
    if direct is not out:
        out[...] = direct
    return out, lse, Work(call.flops, tile_bytes, call.Br, keys, cpu.name_of(call.build))


def visible_flops(plan):
    left, right = (-1 if side >= UNBOUNDED else side for side in (plan.left, plan.right))
    pairs = pairs_at(plan.offset, plan.Lq, plan.Lk, left, right)
    return 2 * (plan.D + plan.Dv) * pairs * plan.B * plan.H


def _check_out(out, shape, dtype, memory, options):
    arrays.require_array("out", out, dtype=f"np.{dtype.name}")
    if out.dtype != dtype:
        raise TypeError(f"out: expected {dtype.name}, got {arrays.dtype_name(out.dtype)}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape q.shape[:-1] + (Dv,) = {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")
    if arrays.overlaps_itself(out):
        raise ValueError(f"out: expected elements that do not overlap, got strides {out.strides} for shape {out.shape}")
    for name, x in (*zip("qkv", memory, strict=False), *options.items()):
        if isinstance(x, np.ndarray) and arrays.overlap(out, x):
            raise ValueError(f"out: expected memory of its own, got an array that overlaps {name}; pass {name}.copy()")
