"""What the launches of gpu_fake.py compute, in float64: from params, the variant and tensor maps alone.

    compute(launch, room)   one launch of any kernel; room: bytes of the workspace

Few rows: decode.cu leaves for each chunk of the keys m, l and O, which merge.cu joins, in the workspace as they have
it; m is of scores here.
"""
import numpy as np

TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


def kinds_of(variant):
    """Names of the dtypes of q and k, of v, and of out, as far as the kernel has them."""
    macros = dict(variant.macros)
    if variant.source == "ffma.cu":
        return ("float32",) * 3
    return tuple(TYPES[macros[name]] for name in ("QK_TYPE", "V_TYPE", "OUT_TYPE") if name in macros)


def compute(launch, room=0):
    p, variant = launch.params, launch.variant
    if variant.source == "turned.cu":
        _turn(p, launch.grid)
    elif variant.source == "decode.cu":
        _decode(p, variant, launch.grid, room)
    elif variant.source == "merge.cu":
        _merge(p, variant, launch.grid, room)
    else:
        B, H, Lq = (int(p[name]) for name in ("B", "H", "Lq"))
        assert launch.grid == (variant.blocks(B, H, Lq),)
        _write(p, variant, *_softmax(*_scores(p, variant, launch.maps), _sinks(p)))


class _Memory:
    def __init__(self, **interface):
        self.__array_interface__ = {"version": 3, **interface}


def at(address, shape, dtype, strides=None):
    """The array at an address; strides in bytes."""
    if 0 in shape:
        return np.empty(shape, dtype)
    dtype = np.dtype(dtype)
    return np.asarray(_Memory(data=(int(address), False), shape=tuple(map(int, shape)), typestr=dtype.str,
                              strides=None if strides is None else tuple(map(int, strides))))


def floats(bits):
    """bfloat16, as uint16, in float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _bits(x):
    import ml_dtypes

    return x.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def _sizes(p, names):
    return [int(p[name]) for name in names.split()]


def _place(p, name, shape, kind=None, dtype=np.float32):
    dtype = np.dtype(dtype if kind is None else DTYPES[kind])
    return at(p[name], shape, dtype, np.concatenate([
        p[f"{name}_stride"] * dtype.itemsize, [dtype.itemsize] * (len(shape) - len(p[f"{name}_stride"]))
    ]))


def _numbers(x, kind):
    return floats(x) if kind == "bfloat16" else x.astype(np.float64)


def _read(p, name, shape, kind=None, dtype=np.float32):
    return _numbers(_place(p, name, shape, kind, dtype), kind)


def _operands(p, kind, pv, maps, boxes):
    """q, k and v as they lie, v not scaled: of tensor maps, where the kernel has them."""
    B, H, Hk, Lq, Lk, D = _sizes(p, "B H Hk Lq Lk D")
    shapes = (B, H, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, D)
    if not maps:
        return [_read(p, name, shape, t) for name, shape, t in zip("qkv", shapes, (kind, kind, pv), strict=True)]
    found = []
    for one, shape, t, (rows, row_bytes) in zip(maps, shapes, (kind, kind, pv), boxes, strict=True):
        turned = one is maps[2] and t == "int8"
        if turned:
            shape = B, Hk, D, -(-Lk // 16) * 16
        size = np.dtype(DTYPES[t]).itemsize
        assert (one.shape, one.size, one.box) == (shape[::-1], size, (row_bytes // size, rows))
        x = _numbers(at(one.address, shape, DTYPES[t], (*one.strides[::-1], size)), t)
        found.append(x[..., np.argsort(_order(x.shape[3]))][..., :Lk].swapaxes(2, 3) if turned else x)
    return found


def _scores(p, variant, maps=()):
    """Scores (B, H, Lq, Lk) with -inf where a key is hidden, and values (B, H, Lk, D)."""
    flags = dict(variant.macros)
    kind, pv = kinds_of(variant)[:2]
    B, H, Hk, Lq, Lk = _sizes(p, "B H Hk Lq Lk")
    q, k, v = _operands(p, kind, pv, maps, variant.boxes)
    if kind == "int8":
        q = q * _read(p, "q_scale", (B, H, Lq))[..., None]
        k = k * _read(p, "k_scale", (B, Hk, Lk))[..., None]
    if pv == "int8":
        v = v * _read(p, "v_scale", (B, Hk, Lk))[..., None]
    k, v = (np.repeat(x, H // Hk, axis=1) for x in (k, v))
    distance = np.arange(Lq)[:, None] + int(p["offset"]) - np.arange(Lk)
    with np.errstate(all="ignore"):
        s = float(p["scale"]) * (q @ k.swapaxes(-1, -2))
        if p["shift"]:
            s = s + at(p["shift"], (B, H, Lq, 1), np.float32).astype(float)
        if flags["SOFTCAP"]:
            s = float(p["softcap"]) * np.tanh(s / float(p["softcap"]))
        if flags["ALIBI"]:
            s = s - _read(p, "slopes", (B, H))[..., None, None] * abs(distance)
        if flags["BIAS"]:
            s = s + _read(p, "bias", (B, H, Lq, Lk))
        if flags["MASK"]:
            s = np.where(_read(p, "mask", (B, H, Lq, Lk), dtype=np.uint8) != 0, s, -np.inf)
        if flags["EDGES"]:
            s = np.where((distance <= int(p["left"])) & (-distance <= int(p["right"])), s, -np.inf)
    return s, v


def _sinks(p):
    H = int(p["H"])
    return np.full((H, 1), -np.inf) if not p["sinks"] else at(p["sinks"], (H, 1), np.float32).astype(float)


def _state(s, v):
    """m, l and O of some keys."""
    with np.errstate(all="ignore"):
        m = s.max(axis=-1, initial=-np.inf)
        w = np.exp(s - np.where(np.isneginf(m), 0, m)[..., None])
        return m, w.sum(axis=-1), w @ v


def _joined(states, sink):
    """out and lse of the states of pieces of the keys."""
    with np.errstate(all="ignore"):
        top = sink
        for m, _, _ in states:
            top = np.maximum(top, m)
        base = np.where(np.isneginf(top), 0, top)
        total, out = np.exp(sink - base), 0
        for m, weight, o in states:
            share = np.exp(m - base)
            total = total + weight * share
            out = out + np.where(weight == 0, 0, share)[..., None] * o
        return out / np.where(total == 0, 1, total)[..., None], base + np.log(total)


def _softmax(s, v, sink):
    return _joined([_state(s, v)], sink)


def _write(p, variant, out, lse):
    written = kinds_of(variant)[-1]
    B, H, Lq, D = _sizes(p, "B H Lq D")
    if p["lse"]:
        at(p["lse"], (B, H, Lq), np.float32)[...] = lse
    _place(p, "out", (B, H, Lq, D), written)[...] = _bits(out) if written == "bfloat16" else out


# Few rows


def _chunks(p, variant, room):
    """[(keys of a chunk, its m and l, its O)], views of the workspace."""
    B, H, Lq, Lk, D, chunk, chunks = _sizes(p, "B H Lq Lk D chunk chunks")
    rounded = dict(variant.macros)["HEAD_DIM"]
    assert chunk > 0 and chunk % 32 == 0 and chunks == max(-(-Lk // chunk), 1) and rounded >= D
    rows = B * H * Lq
    assert p["workspace"] % 16 == 0 and room == 4 * rows * chunks * (rounded + 2)
    o = at(p["workspace"], (B, H, Lq, chunks, rounded), np.float32)
    state = at(p["workspace"] + np.uint64(o.nbytes), (B, H, Lq, chunks, 2), np.float32)
    return [(slice(c * chunk, (c + 1) * chunk), state[..., c, :], o[..., c, :D]) for c in range(chunks)]


def _decode(p, variant, grid, room):
    B, H, Hk, Lq, chunks = _sizes(p, "B H Hk Lq chunks")
    assert grid == (B * Hk * chunks * -(-(H // Hk * Lq) // 16),)
    s, v = _scores(p, variant)
    for keys, state, o in _chunks(p, variant, room):
        state[..., 0], state[..., 1], o[...] = _state(s[..., keys], v[:, :, keys])


def _merge(p, variant, grid, room):
    B, H, Lq = _sizes(p, "B H Lq")
    assert grid == (B * H * Lq,)
    states = [(x[..., 0].astype(float), x[..., 1].astype(float), o.astype(float))
              for _, x, o in _chunks(p, variant, room)]
    _write(p, variant, *_joined(states, _sinks(p)))


# Transposed values


def _order(keys):
    """Which key each byte of a row is, as turned.cu says."""
    byte = np.arange(16)
    t, e = byte // 4, byte % 4
    order = 8 * (e // 2) + 2 * t + e % 2
    return (np.arange(0, keys, 16)[:, None] + order).reshape(-1)


def _turn(p, grid):
    B, Hk, Lk, D = _sizes(p, "B Hk Lk D")
    v = _place(p, "v", (B, Hk, Lk, D), "int8")
    keys = -(-Lk // 16) * 16
    assert grid == (-(-B * Hk * keys // 16 * D // 128),)
    filled = np.zeros((B, Hk, keys, D), np.int8)
    filled[:, :, :Lk] = v
    strides = [*p["out_stride"], 1]
    at(p["out"], (B, Hk, D, keys), np.int8, strides)[...] = filled.swapaxes(2, 3)[..., _order(keys)]
