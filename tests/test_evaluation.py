"""evaluate(): the numbers of `cyflash compare` for arrays at hand, for schemes of one's own and every option."""

import doctest
from functools import partial

import numpy as np
import pytest
from broken_schemes import ONE_NAN
from made_up_costs import MadeUp

import cyflash
from cyflash import measure, schemes
from cyflash.quant import compare, evaluate, evaluation

KEYS = [
    "scheme", "rel_l1", "cosine", "rmse", "max_abs", "worst_head", "worst_row", "seconds", "memory", "speedup",
    "speedup_over_fp32", "memory_ratio", "problem",
]  # fmt: skip
FIELDS = KEYS[1:7]


@pytest.fixture(autouse=True)
def costs(request, monkeypatch):
    """Of one short round, where a test is marked to measure them; else they are made up."""
    monkeypatch.setattr(evaluation, "interleaved_times", partial(measure.interleaved_times, rounds=1, seconds=0.0))
    if not request.node.get_closest_marker("measured"):
        monkeypatch.setattr(evaluation, "CallProcess", MadeUp)


@pytest.fixture
def qkv():
    rng = np.random.default_rng(5)
    return tuple(rng.standard_normal((heads, 60, 16), dtype=np.float32) for heads in (4, 2, 2))


@pytest.mark.measured
def test_the_default_is_every_scheme_of_the_command(qkv):
    rows = evaluate(*qkv)
    assert [row["scheme"] for row in rows] == list(schemes.SCHEMES)
    by_name = {row["scheme"]: row for row in rows}
    for row in rows:
        assert list(row) == KEYS
        assert row["problem"] is None
        assert row["speedup"] == by_name["numpy fp32"]["seconds"] / row["seconds"] > 0
        assert row["speedup_over_fp32"] == by_name["cyflash fp32"]["seconds"] / row["seconds"] > 0
        assert row["memory"] >= 0
    assert by_name["numpy fp32"]["speedup"] == by_name["cyflash fp32"]["speedup_over_fp32"] == 1.0
    assert by_name["int8 tensor"]["rel_l1"] > by_name["int8 token, fp32 PV"]["rel_l1"] > 1e-3


OPTIONS = {
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_align": "top-left"},
    "scale": {"scale": 0.7},
    "window": {"window": (5, 3)},
    "softcap": {"softcap": 1.0},
    "bias": {"bias": np.linspace(-3, 3, 4 * 60, dtype=np.float32).reshape(4, 1, 60)},
    "mask": {"mask": np.arange(60) % 3 > 0},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.1, 0.0]},
    "sinks": {"sinks": [1.0, 2.0, 3.0, 4.0]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_calls_and_of_the_reference(qkv, name):
    q, k, v = qkv
    if name == "top-left":
        k, v = k[:, :40], v[:, :40]
    options = OPTIONS[name]
    fp32, int8 = evaluate(q, k, v, schemes=["cyflash fp32", "int8 token"], num_threads=1, **options)
    reference = cyflash.reference.attention(q, k, v, **options)
    for row, attend in ((fp32, cyflash.flash_attention), (int8, cyflash.flash_attention_int8)):
        expected = compare(attend(q, k, v, **options), reference)
        assert tuple(row[name] for name in FIELDS) == expected
    assert fp32["rel_l1"] < 1e-6 < int8["rel_l1"] < 0.05


@pytest.mark.measured
def test_schemes_of_ones_own(qkv):
    scales = cyflash.LayerScales(q_scale=0.03, k_scale=0.03, v_scale=0.03)
    mine = {"per head": {"granularity": "head"}, "static": {"quant": scales}}
    rows = evaluate(*qkv, schemes=mine, causal=True)
    reference = cyflash.reference.attention(*qkv, causal=True)
    assert [row["scheme"] for row in rows] == list(mine)
    for row, options in zip(rows, mine.values(), strict=True):
        expected = compare(cyflash.flash_attention_int8(*qkv, causal=True, **options), reference)
        assert tuple(row[name] for name in FIELDS) == expected
        assert row["seconds"] > 0 and row["speedup"] > 0 and row["speedup_over_fp32"] > 0


def test_a_name_alone_or_a_pattern_will_do(qkv):
    assert [row["scheme"] for row in evaluate(*qkv, schemes="int8 h*")] == ["int8 head"]


@pytest.mark.parametrize("shape", [(30, 16), (2, 30, 16), (2, 2, 30, 16)])
def test_shapes(shape):
    rng = np.random.default_rng(6)
    (row,) = evaluate(*(rng.standard_normal(shape, dtype=np.float32) for _ in "qkv"), schemes=["int8 token"])
    assert 1e-3 < row["rel_l1"] < 0.05


def test_rows_that_see_nothing_are_defined(qkv):
    mask = np.ones((60, 60), bool)
    mask[7] = False
    for row in evaluate(*qkv, schemes=["numpy fp32", "int8 token"], mask=mask):
        assert np.isfinite([row[name] for name in FIELDS]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schemes": ["int7"]}, ValueError, "schemes: expected names of 'numpy fp32'.*got 'int7'"),
        ({"schemes": {"x": {"pv": "int7"}}}, ValueError, "^x: pv"),
        ({"schemes": {"x": {"granularity": "row"}}}, ValueError, "^x: granularity"),
        ({"granularity": "head"}, TypeError, "granularity: expected options of the attention.*schemes={label"),
        ({"out": None}, TypeError, "out: expected options of the attention"),
        ({"softcap": -1.0}, ValueError, "^softcap"),
        ({"window": (-2, 0)}, ValueError, "^window"),
        ({"num_threads": 0}, ValueError, "^num_threads"),
    ],
)
def test_bad_arguments_are_named(qkv, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate(*qkv, **arguments)


def test_bad_arrays_are_named(qkv):
    q, k, v = qkv
    with pytest.raises(TypeError, match=r"k: expected float32.* got float64"):
        evaluate(q, k.astype(np.float64), v)
    with pytest.raises(TypeError, match="v: expected a NumPy array, got list"):
        evaluate(q, k, v.tolist())
    with pytest.raises(ValueError, match=r"^k: expected"):
        evaluate(q, k[..., :8], v)


def test_nan_where_the_reference_has_none_raises(qkv, monkeypatch):
    monkeypatch.setitem(schemes.SCHEMES, "int8 token", ONE_NAN)
    with pytest.raises(ValueError, match=r"^int8 token: output: expected NaN and infinities exactly where"):
        evaluate(*qkv)


def test_nan_that_int8_refuses_raises_and_fp32_may_have_it(qkv):
    q, k, v = qkv
    k[1, 7, 3] = np.nan
    with pytest.raises(ValueError, match=r"^int8 token: .*(?i:nan)"):
        evaluate(q, k, v, schemes=["int8 token"])
    rows = evaluate(q, k, v, schemes=["*fp32"])
    assert all(row["rel_l1"] < 1e-6 for row in rows)


def test_what_does_not_fit_into_memory_is_said(qkv, monkeypatch):
    monkeypatch.setattr(evaluation, "_available_memory", lambda: 40_000)
    numpy, int8 = evaluate(*qkv, schemes=["numpy fp32", "int8 token"])
    assert "its scores alone need 57.6 kB, and 40.0 kB are free" in numpy["problem"]
    assert numpy["seconds"] is None
    assert "the float64 reference needs" in int8["problem"]
    assert int8["seconds"] > 0 and int8["rel_l1"] is None and int8["speedup"] is None
    assert int8["speedup_over_fp32"] > 0


def test_the_inputs_are_not_written(qkv):
    before = [x.copy() for x in qkv]
    evaluate(*qkv, schemes=["int8*"], causal=True)
    for x, y in zip(qkv, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(evaluation).failed == 0
