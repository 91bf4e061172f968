"""Bad input: a clear error that names the argument, what was expected and what came; nothing written, nothing lost."""
import re

import cases
import numpy as np
import pytest

import cyflash
from cyflash import FlashAttentionConfig, flash_attention

B, H, Hk, Lq, Lk, D = 2, 4, 2, 10, 12, 8
F32 = np.float32


def good():
    return dict(zip("qkv", cases.arrays(B, H, Hk, Lq, Lk, D), strict=True))


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def read_only():
    x = zeros(B, H, Lq, D)
    x.flags.writeable = False
    return x


def of_dtype(dtype):
    return {name: x.astype(dtype) for name, x in good().items()}


CASES = {
    "q float64": (TypeError, {"q": zeros(B, H, Lq, D, dtype="f8")}, ["q: expected float32", "got float64", "astype"]),
    "k float64": (TypeError, {"k": zeros(B, Hk, Lk, D, dtype="f8")}, ["k: ", "float32", "float64"]),
    "v float64": (TypeError, {"v": zeros(B, Hk, Lk, D, dtype="f8")}, ["v: ", "float32", "float64"]),
    "all float64": (TypeError, of_dtype("f8"), ["q: ", "float64"]),
    "integers": (TypeError, of_dtype("i4"), ["q: ", "int32"]),
    "complex": (TypeError, of_dtype("c8"), ["q: ", "complex64"]),
    "bool": (TypeError, of_dtype("?"), ["q: ", "bool"]),
    "big-endian": (TypeError, of_dtype(">f4"), ["q: ", "float32", ">f4"]),
    "k big-endian": (TypeError, {"k": zeros(B, Hk, Lk, D, dtype=">f4")}, ["k: ", ">f4"]),
    "None": (TypeError, {"k": None}, ["k: "]),
    "a string": (TypeError, {"q": "query"}, ["q: "]),
    "rank 1": (ValueError, {name: zeros(4) for name in "qkv"}, ["q: expected", "2 or 3 or 4", "(4,)"]),
    "rank 5": (ValueError, {name: zeros(1, 1, 1, 4, 4) for name in "qkv"}, ["q: ", "(1, 1, 1, 4, 4)"]),
    "rank of k": (ValueError, {"k": zeros(Hk, Lk, D)}, ["k: ", "(2, 12, 8)"]),
    "rank of v": (ValueError, {"v": zeros(Hk, Lk, D)}, ["v: ", "(2, 12, 8)"]),
    "rank of q": (ValueError, {"q": zeros(H, Lq, D)}, ["(4, 10, 8)"]),
    "head_dim": (ValueError, {"k": zeros(B, Hk, Lk, D + 1)}, ["k: expected", "D=8", "(2, 2, 12, 9)"]),
    "head_dim 0": (ValueError, {name: zeros(3, 0) for name in "qkv"}, ["q: ", "(3, 0)"]),
    "batch": (ValueError, {"k": zeros(3, Hk, Lk, D), "v": zeros(3, Hk, Lk, D)}, ["k: ", "B=2", "(3, 2, 12, 8)"]),
    "batch of v": (ValueError, {"v": zeros(3, Hk, Lk, D)}, ["v: expected", "(3, 2, 12, 8)"]),
    "heads do not divide": (ValueError, {"k": zeros(B, 3, Lk, D), "v": zeros(B, 3, Lk, D)}, ["k: ", "4", "3"]),
    "more kv heads": (ValueError, {"k": zeros(B, 8, Lk, D), "v": zeros(B, 8, Lk, D)}, ["k: ", "4", "8"]),
    "no kv heads": (ValueError, {"k": zeros(B, 0, Lk, D), "v": zeros(B, 0, Lk, D)}, ["k: ", "0"]),
    "heads of v": (ValueError, {"v": zeros(B, 4, Lk, D)}, ["v: expected", "(2, 4, 12, 8)"]),
    "length of v": (ValueError, {"v": zeros(B, Hk, Lk + 1, D)}, ["v: expected", "12", "(2, 2, 13, 8)"]),
    "bias shape": (ValueError, {"bias": zeros(Lq, Lk + 1)}, ["bias: expected", "(2, 4, 10, 12)", "(10, 13)"]),
    "bias transposed": (ValueError, {"bias": zeros(Lk, Lq)}, ["bias: expected", "(2, 4, 10, 12)", "(12, 10)"]),
    "bias rank": (ValueError, {"bias": zeros(1, B, H, Lq, Lk)}, ["bias: expected", "(1, 2, 4, 10, 12)"]),
    "bias of more": (ValueError, {"bias": zeros(3, H, Lq, Lk)}, ["bias: expected", "(3, 4, 10, 12)"]),
    "bias bool": (TypeError, {"bias": np.ones((Lq, Lk), bool)}, ["bias: expected float32", "bool", "mask"]),
    "bias a list": (TypeError, {"bias": [0.0] * Lk}, ["bias: expected", "list", "np.asarray(bias, dtype=np.float32)"]),
    "bias integer": (TypeError, {"bias": zeros(Lq, Lk, dtype="i8")}, ["bias: expected float32", "int64"]),
    "mask shape": (ValueError, {"mask": np.ones((Lq, Lk + 1), bool)}, ["mask: expected", "(2, 4, 10, 12)", "(10, 13)"]),
    "mask rank": (ValueError, {"mask": np.ones((1, B, H, Lq, Lk), bool)}, ["mask: expected", "(1, 2, 4, 10, 12)"]),
    "mask float": (TypeError, {"mask": zeros(Lq, Lk)}, ["mask: expected bool", "float32", "bias"]),
    "mask True": (TypeError, {"mask": True}, ["mask: expected", "got bool; write np.asarray(mask, dtype=bool)"]),
    "mask a list": (TypeError, {"mask": [True] * Lk}, ["mask: expected", "list", "np.asarray(mask, dtype=bool)"]),
    "mask integer": (TypeError, {"mask": zeros(Lq, Lk, dtype="i8")}, ["mask: expected bool", "int64"]),
    "window int": (ValueError, {"window": 4}, ["window: expected", "(left, right)", "4", "(3, 0)"]),
    "window 0": (ValueError, {"window": 0}, ["window: expected", "the integer 0", "(W-1, 0)$"]),
    "window of one": (ValueError, {"window": (4,)}, ["window: expected", "(4,)"]),
    "window of three": (ValueError, {"window": (4, 0, 1)}, ["window: expected", "(4, 0, 1)"]),
    "window left": (ValueError, {"window": (-2, 0)}, ["window: expected", "-1", "(-2, 0)"]),
    "window right": (ValueError, {"window": (0, -7)}, ["window: expected", "-1", "(0, -7)"]),
    "window fraction": (ValueError, {"window": (1.5, 0)}, ["window: expected", "1.5"]),
    "softcap negative": (ValueError, {"softcap": -1.0}, ["softcap: expected", "-1.0"]),
    "softcap nan": (ValueError, {"softcap": float("nan")}, ["softcap: expected", "nan"]),
    "softcap inf": (ValueError, {"softcap": float("inf")}, ["softcap: expected", "inf"]),
    "scale nan": (ValueError, {"scale": float("nan")}, ["scale: expected", "nan"]),
    "scale inf": (ValueError, {"scale": float("inf")}, ["scale: expected", "inf"]),
    "scale beyond float32": (ValueError, {"scale": 1e39}, ["scale: expected", "float32", "1e+39"]),
    "scale beyond float32, negative": (ValueError, {"scale": -1e39}, ["scale: expected", "float32", "-1e+39"]),
    "scale beyond float": (ValueError, {"scale": 10**400}, ["scale: expected", "1000000"]),
    "softcap beyond float": (ValueError, {"softcap": 10**400}, ["softcap: expected", "1000000"]),
    "causal_align array": (ValueError, {"causal_align": np.array(["top-left", "x"])}, ["causal_align: ", "top-left"]),
    "causal_align": (ValueError, {"causal_align": "left"}, ["causal_align: ", "bottom-right", "top-left", "'left'"]),
    "slopes of kv heads": (ValueError, {"alibi_slopes": zeros(Hk)}, ["alibi_slopes: ", "(4,)", "(2, 4)", "(2,)"]),
    "slopes transposed": (ValueError, {"alibi_slopes": zeros(H, B)}, ["alibi_slopes: expected", "(4, 2)"]),
    "slopes scalar": (ValueError, {"alibi_slopes": zeros()}, ["alibi_slopes: expected", "()"]),
    "sinks of kv heads": (ValueError, {"sinks": zeros(Hk)}, ["sinks: expected", "(4,)", "(2,)"]),
    "sinks per batch": (ValueError, {"sinks": zeros(B, H)}, ["sinks: expected", "(4,)", "(2, 4)"]),
    "sinks integer": (TypeError, {"sinks": zeros(H, dtype="i8")}, ["sinks: expected float32", "int64"]),
    "sinks of words": (TypeError, {"sinks": ["a"] * H}, ["sinks: expected", "numbers", "'a'"]),
    "sinks of None": (TypeError, {"sinks": [None] * H}, ["sinks: expected", "numbers", "None"]),
    "ragged slopes": (TypeError, {"alibi_slopes": [[1.0], [1.0, 2.0]]}, ["alibi_slopes: expected", "numbers"]),
    "a masked array": (TypeError, {"k": np.ma.zeros((B, Hk, Lk, D), F32)}, ["k: expected", "MaskedArray", "`mask`"]),
    "config head_dim": (ValueError, {"config": FlashAttentionConfig(head_dim=16)}, ["config", "head_dim", "16", "8"]),
    "config of another type": (TypeError, {"config": {"head_dim": 8}}, ["config: ", "FlashAttentionConfig", "dict"]),
    "dropout": (NotImplementedError, {"dropout_p": 0.1}, ["dropout_p"]),
    "dropout of config": (NotImplementedError, {"config": FlashAttentionConfig(head_dim=8, num_heads=H, dropout_p=0.1)},
                          ["dropout_p"]),
    "dropout above 1": (ValueError, {"dropout_p": 1.5}, ["dropout_p: expected", "1.5"]),
    "dropout negative": (ValueError, {"dropout_p": -0.1}, ["dropout_p: expected", "-0.1"]),
    "no threads": (ValueError, {"num_threads": 0}, ["num_threads: expected", "0"]),
    "negative threads": (ValueError, {"num_threads": -1}, ["num_threads: expected", "-1"]),
    "half a thread": ((TypeError, ValueError), {"num_threads": 1.5}, ["num_threads: expected", "1.5"]),
    "unknown option": (TypeError, {"attn_mask": None}, ["attn_mask"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments(name):
    error, change, parts = CASES[name]
    out = np.full((B, H, Lq, D), 7, F32)
    with pytest.raises(error) as caught:
        flash_attention(**(good() | change), out=out)
    said = str(caught.value)
    for part in parts:
        assert said.endswith(part[:-1]) if part.endswith("$") else part in said, (part, said)
    assert (out == 7).all()
    flash_attention(**good(), out=out)


def test_models_of_messages():
    """The two that the design words in full."""
    with pytest.raises(TypeError) as caught:
        flash_attention(*of_dtype("f8").values())
    for part in ("q: expected float32", "got float64", "q.astype(np.float32)", "cyflash.reference.attention"):
        assert part in str(caught.value), str(caught.value)
    with pytest.raises(ValueError) as caught:
        flash_attention(zeros(2, 8, 128, 64), zeros(2, 128, 8, 32), zeros(2, 128, 8, 32))
    for part in ("k: expected (B, Hk, Lk, D) with B=2, D=64 as in q (2, 8, 128, 64), got (2, 128, 8, 32)",
                 "x.transpose(0, 2, 1, 3)"):
        assert part in str(caught.value), str(caught.value)


def outs():
    call = good()
    yield "read-only", ValueError, call, read_only(), ["out: expected", "read-only"]
    yield "shape", ValueError, call, zeros(B, H, Lq, D + 1), ["out: expected", "(2, 4, 10, 8)", "(2, 4, 10, 9)"]
    yield "rank", ValueError, call, zeros(H, Lq, D), ["out: expected", "(2, 4, 10, 8)", "(4, 10, 8)"]
    yield "dtype", TypeError, call, zeros(B, H, Lq, D, dtype="f8"), ["out: expected float32", "float64"]
    yield "big-endian", TypeError, call, zeros(B, H, Lq, D, dtype=">f4"), ["out: expected float32", ">f4"]
    yield "a list", TypeError, call, [[0.0]], ["out: expected", "list"]
    yield "q itself", ValueError, call, call["q"], ["out: ", "overlap", "q"]
    yield "a view of q", ValueError, call, call["q"][:, ::-1], ["out: ", "overlap", "q"]
    for name in ("k", "v"):
        call = dict(zip("qkv", cases.arrays(B, H, H, Lq, Lq, D), strict=True))
        yield f"{name} itself", ValueError, call, call[name], ["out: ", "overlap", name]
    memory = np.zeros(B * H * Lq * D + 5, F32)
    part = memory[5:].reshape(B, H, Lq, D)
    yield "shifted by five", ValueError, good() | {"q": memory[:-5].reshape(B, H, Lq, D)}, part, ["out: ", "overlap"]
    bias = zeros(B, H, Lq, D)
    square = dict(zip("qkv", cases.arrays(B, H, H, Lq, D, D), strict=True))
    yield "bias", ValueError, square | {"bias": bias}, bias, ["out: ", "overlap", "bias"]
    one = np.lib.stride_tricks.as_strided(zeros(Lq, D), (B, H, Lq, D), (0, 0, 4 * D, 4))
    yield "itself", ValueError, good(), one, ["out: ", "overlap"]


@pytest.mark.parametrize("name", [case[0] for case in outs()])
def test_bad_out(name):
    _, error, call, out, parts = next(case for case in outs() if case[0] == name)
    before = np.array(out, copy=True)
    with pytest.raises(error) as caught:
        flash_attention(**call, out=out)
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))
    assert np.array_equal(out, before)


def test_out_between_the_inputs_is_no_overlap():
    """q, k, v and out interleaved in one buffer share its extent but no element."""
    packed = np.zeros((2, 10, 4, 3, 8), F32)
    packed[:, :, :3] = np.random.default_rng(0).standard_normal((2, 10, 3, 3, 8))
    q, k, v, out = packed.transpose(2, 0, 3, 1, 4)
    expected = flash_attention(q.copy(), k.copy(), v.copy())
    assert flash_attention(q, k, v, out=out) is out
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("good_one, bad_one", [
    ({"causal": True}, {"causal": 1}), ({"window": (1, 0)}, {"window": (True, False)}),
    ({"scale": 1}, {"scale": True}), ({"softcap": 1.0}, {"softcap": True}),
], ids=str)
def test_what_is_equal_to_a_good_option_is_not_as_good(good_one, bad_one):
    """A plan is remembered by its options, and True == 1."""
    for function in (flash_attention, cyflash.flash_attention_int8):
        function(**good(), **good_one)
        with pytest.raises(ValueError, match=next(iter(bad_one))):
            function(**good(), **bad_one)
        function(**good(), **good_one)


def test_positional_options_are_refused():
    with pytest.raises(TypeError):
        flash_attention(*good().values(), True)


@pytest.mark.parametrize("n", [0, -1, 1.5, "2"])
def test_set_num_threads(n):
    with pytest.raises((ValueError, TypeError), match=re.escape(str(n))):
        cyflash.set_num_threads(n)


@pytest.mark.parametrize("change", [
    {"head_dim": 0}, {"head_dim": -1}, {"num_heads": 0}, {"block_size_q": 0}, {"block_size_kv": -8}, {"dropout_p": 1.0},
    {"dropout_p": -0.5}, {"scale": float("nan")},
], ids=str)
def test_bad_config(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        FlashAttentionConfig(**change)
