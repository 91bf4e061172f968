"""The schemes that are compared: what each calls, how they are chosen, and how their calls reach other processes."""

import numpy as np
import pytest

import cyflash
from cyflash import schemes
from cyflash.plain import plain_attention
from cyflash.schemes import SCHEMES


def arrays(*shape):
    rng = np.random.default_rng(3)
    return tuple(rng.standard_normal(shape, dtype=np.float32) for _ in "qkv")


CALLS = {
    "numpy fp32": lambda *qkv, **options: plain_attention(*qkv, **options),
    "cyflash fp32": cyflash.flash_attention,
    "int8 tensor": lambda *qkv, **options: cyflash.flash_attention_int8(
        *qkv, granularity="tensor", smooth_k=False, **options
    ),
    "int8 head": lambda *qkv, **options: cyflash.flash_attention_int8(
        *qkv, granularity=("head", "head", "token"), smooth_k=True, **options
    ),
    "int8 token": cyflash.flash_attention_int8,
    "int8 token, bf16 PV": lambda *qkv, **options: cyflash.flash_attention_int8(*qkv, pv="bf16", **options),
    "int8 token, fp32 PV": lambda *qkv, **options: cyflash.flash_attention_int8(*qkv, pv="fp32", **options),
}


def test_every_scheme_is_the_call_of_its_name():
    qkv, options = arrays(2, 3, 50, 16), {"causal": True, "softcap": 3.0}
    assert list(CALLS) == list(SCHEMES)
    outputs = {name: scheme(qkv, options, 1) for name, scheme in SCHEMES.items()}
    for name, call in CALLS.items():
        np.testing.assert_array_equal(outputs[name], call(*qkv, **options))
    assert len({output.tobytes() for output in outputs.values()}) == len(SCHEMES)  # and no two are the same


def test_the_options_are_those_of_the_functions():
    assert set(schemes.OPTIONS) == {
        "causal", "causal_align", "scale", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks"
    }  # fmt: skip
    assert set(schemes.INT8_OPTIONS) == {
        "q_scale", "k_scale", "v_scale", "granularity", "smooth_k", "fp32_sinks", "pv", "quant"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*"], list(SCHEMES)),
        (["int8 token", "numpy fp32"], ["numpy fp32", "int8 token"]),
        (["int8 token*"], ["int8 token", "int8 token, bf16 PV", "int8 token, fp32 PV"]),
        (["*PV", "int8 h*"], ["int8 head", "int8 token, bf16 PV", "int8 token, fp32 PV"]),
    ],
)
def test_select(patterns, names):
    chosen = schemes.select(patterns)
    assert list(chosen) == names
    assert all(chosen[name] is SCHEMES[name] for name in names)


@pytest.mark.parametrize("patterns", [["int8 token", "int7"], [""], []])
def test_select_refuses_what_fits_none(patterns):
    with pytest.raises(ValueError, match="schemes: expected"):
        schemes.select(patterns)


def test_schemes_of_ones_own():
    (scheme,) = schemes.int8_schemes({"mine": {"granularity": "head", "pv": "fp32"}}).values()
    qkv = arrays(2, 50, 16)
    expected = cyflash.flash_attention_int8(*qkv, granularity="head", pv="fp32", causal=True)
    np.testing.assert_array_equal(scheme(qkv, {"causal": True}, 1), expected)


@pytest.mark.parametrize(
    ("labelled", "error", "message"),
    [
        ({}, ValueError, "expected at least one"),
        ({"cyflash fp32": {}}, ValueError, "choose another label"),
        ({"mine": "head"}, TypeError, "'mine': expected a dict of options, got str"),
        ({"mine": {"granulairty": "head"}}, TypeError, "'mine': expected options of q_scale, .*; got granulairty$"),
        ({"mine": {"causal": True}}, TypeError, "got causal; those of the attention are arguments of evaluate"),
    ],
)
def test_schemes_of_ones_own_are_checked(labelled, error, message):
    with pytest.raises(error, match=message):
        schemes.int8_schemes(labelled)


def test_a_call_reaches_another_process_as_it_is(tmp_path):
    B, H, Lq, Lk, D = 2, 3, 24, 40, 8
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (*arrays(B, Lq, H, D)[:1], *arrays(B, Lk, H, D)[1:]))
    bias = np.broadcast_to(np.linspace(-1, 1, Lk, dtype=np.float32), (B, H, Lq, Lk))
    options = {"bias": bias, "window": (9, -1), "scale": 0.3}
    path = tmp_path / "call"
    schemes.save_call(path, (q, k, v), options, SCHEMES)
    assert path.stat().st_size < bias.size * 4  # what is broadcast is written once
    for name, scheme in SCHEMES.items():
        got = schemes.prepare_call(str(path), name, 1)()
        np.testing.assert_array_equal(got, scheme((q, k, v), options, 1), err_msg=name)


@pytest.mark.parametrize(
    "x",
    [
        np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
        np.arange(24.0).reshape(2, 3, 4)[:, ::-1, ::2],
        np.broadcast_to(np.arange(3.0)[:, None], (5, 3, 4)),
        np.broadcast_to(np.arange(3.0)[:, None], (5, 3, 4)).transpose(2, 1, 0),
        np.zeros((0, 3)).T,
        np.array(3.0),
    ],
)
def test_arrays_keep_the_order_of_their_axes(tmp_path, x):
    import pickle

    schemes.save_call(tmp_path / "x", (x,), {}, {})
    with open(tmp_path / "x", "rb") as file:
        ((got,), *_) = pickle.load(file)
    np.testing.assert_array_equal(got, x)
    assert got.dtype == x.dtype

    def order(x):
        return [axis for axis in np.argsort([-abs(stride) for stride in x.strides], kind="stable") if x.shape[axis] > 1]

    if x.size:
        assert order(got) == order(x)
        assert [stride == 0 for stride in got.strides] == [stride == 0 for stride in x.strides]


def test_the_build_in_use_is_that_of_the_other_process(tmp_path):
    with cyflash.set_implementation("baseline"):
        schemes.save_call(tmp_path / "call", arrays(8, 4), {}, SCHEMES)
    with cyflash.set_implementation(None):
        schemes.prepare_call(str(tmp_path / "call"), "cyflash fp32", 1)
        assert cyflash.cpu_info()["implementation"] == "baseline"
