"""Random calls: shapes, strides, options, builds, threads and tile sizes together, against the reference."""
import bounds
import cases
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cyflash
from cyflash import FlashAttentionConfig, flash_attention

length = st.one_of(st.integers(0, 20), st.integers(1, 150))
block = st.one_of(st.none(), st.integers(1, 200))
layout = st.sampled_from([None, *cases.LAYOUTS])


@st.composite
def shapes(draw):
    """B, H, Hk, Lq, Lk, D, Dv"""
    Hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = st.integers(1, 70)
    return draw(st.integers(1, 3)), Hk * group, Hk, draw(length), draw(length), draw(head_dim), draw(head_dim)


@st.composite
def broadcast_shapes(draw, full):
    """A shape that broadcasts to `full`."""
    shape = tuple(n if draw(st.booleans()) else 1 for n in full)
    return shape[draw(st.integers(0, len(full))) :]


@st.composite
def calls(draw):
    """(q, k, v), options."""
    B, H, Hk, Lq, Lk, D, Dv = draw(shapes())
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.01, 1.0, 10.0]))
    arrays = [np.float32(size) * cases.arrays(B, H, Hk, Lq, Lk, D, Dv, seed=i)[i] for i in range(3)]
    options = {}
    if draw(st.booleans()):
        options["causal"] = draw(st.booleans())
    if draw(st.booleans()):
        options["causal_align"] = draw(st.sampled_from(["bottom-right", "top-left"]))
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1, 1))
    if draw(st.booleans()):
        options["window"] = (draw(st.integers(-1, 160)), draw(st.integers(-1, 160)))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.0, 0.5, 3.0, 50.0]))
    if draw(st.booleans()):
        shape = draw(broadcast_shapes((B, H, Lq, Lk)))
        hidden = r.random(shape) < draw(st.sampled_from([0, 0.3]))
        options["bias"] = np.where(hidden, -np.inf, r.standard_normal(shape)).astype(np.float32)
    if draw(st.booleans()):
        shape = draw(broadcast_shapes((B, H, Lq, Lk)))
        options["mask"] = np.asarray(r.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.95])))
    if draw(st.booleans()):
        options["alibi_slopes"] = r.random(draw(st.sampled_from([(H,), (B, H)]))).astype(np.float32)
    if draw(st.booleans()):
        options["sinks"] = r.standard_normal(H).astype(np.float32)
    for i, change in enumerate(draw(st.tuples(layout, layout, layout))):
        arrays[i] = cases.LAYOUTS[change](arrays[i]) if change else arrays[i]
    for name in ("bias", "mask"):
        change = draw(layout)
        if change and name in options and options[name].ndim == 4:
            options[name] = cases.LAYOUTS[change](options[name])
    return arrays, options


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls(), st.sampled_from(cyflash.cpu.runnable()), st.integers(1, 3), st.tuples(block, block), layout)
def test_any_call(call, build, threads, blocks, out_layout):
    (q, k, v), options = call
    config = None
    if None not in blocks:
        config = FlashAttentionConfig(head_dim=q.shape[-1], num_heads=q.shape[1], block_size_q=blocks[0],
                                      block_size_kv=blocks[1])
    out = np.full((*q.shape[:-1], v.shape[-1]), np.nan, np.float32)
    out = out if out_layout in (None, "read-only") else cases.LAYOUTS[out_layout](out)
    with cyflash.set_implementation(build):
        got, lse = flash_attention(q, k, v, **options, config=config, num_threads=threads, out=out, return_lse=True)
    assert got is out
    bounds.Case(q, k, v, **options).check(out, lse, rms=False)  # any size of scores, so no fair statistic
