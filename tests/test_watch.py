"""What a watch counts, against NumPy and to the last value; and that nothing else is counted."""
import dataclasses
import doctest
import threading

import cases
import numpy as np
import pytest

from cyflash import KVCache, cpu, flash_attention_int8
from cyflash.quant import LayerScales, Scales, quantize, watch, watching
from cyflash.quantized import Encoding

F32 = np.float32
NOTHING = {"q": (0, 0), "k": (0, 0), "v": (0, 0)}
BIG = 3e38


def arrays(B=2, H=6, Hk=2, Lq=70, Lk=300, D=40, Dv=24, seed=0):
    return cases.arrays(B, H, Hk, Lq, Lk, D, Dv, seed)


def expected(x, scale, mean=0, skip=0):
    """(values that saturate, values), in float32, rounded after every step, as the codes are."""
    with np.errstate(over="ignore"):
        codes = np.rint((x - F32(mean)) * (F32(1) / np.asarray(scale, F32)))[..., skip:, :]
    return int((np.abs(codes) > 127).sum()), codes.size


def counted(q, k, v, layer, **options):
    with watch({"layer": layer}) as w:
        flash_attention_int8(q, k, v, quant=layer, **options)
    return w.counts["layer"]


# Against NumPy


@pytest.mark.parametrize("D", [1, 3, 8, 16, 17, 40, 63, 64, 65, 100, 128, 200])
@pytest.mark.parametrize("sinks", [0, 3])
def test_counts_are_exact_for_any_head_dim(build, D, sinks):
    q, k, v = arrays(D=D, Dv=D)
    got = counted(q, k, v, LayerScales(0.01, 0.012, 0.008, fp32_sinks=sinks))
    assert got == {"q": expected(q, 0.01), "k": expected(k, 0.012, skip=sinks), "v": expected(v, 0.008, skip=sinks)}
    assert all(0 < saturated < values for saturated, values in got.values()) or D < 8


@pytest.mark.parametrize("sinks", [0, 1, 16, 20, 255, 256, 290])
def test_counts_are_exact_for_any_length_and_any_sinks(build, sinks):
    for L in (1, 15, 16, 17, 255, 256, 257, 600):
        if sinks < L:
            q, k, v = arrays(B=1, H=2, Hk=1, Lq=L, Lk=L)
            k[..., :sinks, :] *= 50  # would saturate
            got = counted(q, k, v, LayerScales(0.01, 0.012, 0.008, fp32_sinks=sinks))
            assert got == {
                "q": expected(q, 0.01), "k": expected(k, 0.012, skip=sinks), "v": expected(v, 0.008, skip=sinks),
            }


def test_every_shape_of_a_scale_and_a_mean(build):
    r = np.random.default_rng(1)
    q, k, v = arrays()
    scales = {
        "head": [r.uniform(0.005, 0.02, (H, 1, 1)).astype(F32) for H in (6, 2, 2)],
        "sequence": [r.uniform(0.005, 0.02, (2, H, 1, 1)).astype(F32) for H in (6, 2, 2)],
        "token": [r.uniform(0.005, 0.02, (2, *x.shape[1:3], 1)).astype(F32) for x in (q, k, v)],
    }
    for q_scale, k_scale, v_scale in scales.values():
        for mean in (r.standard_normal(40), r.standard_normal((2, 1, 40)), r.standard_normal((2, 2, 1, 40))):
            got = counted(q, k, v, LayerScales(q_scale, k_scale, v_scale, k_mean=mean, fp32_sinks=2))
            assert got == {
                "q": expected(q, q_scale), "k": expected(k, k_scale, mean, skip=2), "v": expected(v, v_scale, skip=2),
            }


def test_a_value_saturates_from_127_and_a_half_on(build):
    edge = np.array([127.5, np.nextafter(F32(127.5), F32(0)), -127.5, 127, -128, 1e30, BIG, -BIG, 0, -127.49], F32)
    x = edge.reshape(1, 1, -1)
    assert counted(x, x, x, LayerScales(1.0, 1.0, 1.0)) == dict.fromkeys("qkv", (6, 10))
    assert counted(x, x, x, LayerScales(2.5, 2.0**-126, 1e38)) == {"q": (3, 10), "k": (9, 10), "v": (0, 10)}


def test_differences_that_overflow_saturate_unless_they_are_in_fp32(build):
    x = np.full((1, 20, 4), BIG, F32)
    y = np.ones((1, 20, 4), F32)
    for sinks in (0, 3, 16, 17):
        got = counted(y * 0, x, y, LayerScales(1.0, 3e36, 1.0, k_mean=[-BIG] * 4, fp32_sinks=sinks))
        assert got["k"] == (4 * (20 - sinks), 4 * (20 - sinks))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_any_layout(build, layout):
    q, k, v = (cases.LAYOUTS[layout](x) for x in arrays())
    layer = LayerScales(0.01, 0.012, 0.008)
    assert counted(q, k, v, layer) == {"q": expected(q, 0.01), "k": expected(k, 0.012), "v": expected(v, 0.008)}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(build, threads):
    q, k, v = arrays(Lq=900, Lk=1100)
    layer = LayerScales(0.01, 0.012, 0.008, fp32_sinks=1)
    got = counted(q, k, v, layer, num_threads=threads)
    assert got == {"q": expected(q, 0.01), "k": expected(k, 0.012, skip=1), "v": expected(v, 0.008, skip=1)}


@pytest.mark.parametrize("pv", ["int8", "bf16", "fp32"])
def test_any_product(build, pv):
    q, k, v = arrays()
    assert counted(q, k, v, LayerScales(0.01, 0.012, 0.008, pv=pv))["v"] == expected(v, 0.008)


def test_masked_keys_count(build):
    q, k, v = arrays()
    layer = LayerScales(0.01, 0.012, 0.008)
    assert counted(q, k, v, layer, causal=True, window=(3, 0)) == counted(q, k, v, layer)


@pytest.mark.parametrize("lengths", [None, [300, 7], [2, 1]])
@pytest.mark.parametrize("sinks", [0, 5])
def test_appended_tokens(build, sinks, lengths):
    """Those that count, and are codes."""
    _, k, v = arrays()
    layer = LayerScales(0.01, 0.012, 0.008, fp32_sinks=sinks)
    cache = KVCache(2, 2, 40, 400, "int8", v_head_dim=24, quant=layer)
    with watch({"layer": layer}) as w:
        cache.append(k, v, lengths=lengths)
    for name, x, scale in (("k", k, 0.012), ("v", v, 0.008)):
        of_rows = [expected(x[i, :, :n], scale, skip=min(sinks, n)) for i, n in enumerate(lengths or (300, 300))]
        assert w.counts["layer"][name] == tuple(map(sum, zip(*of_rows, strict=True)))


@pytest.mark.parametrize("ndim", [2, 3])
def test_fewer_axes(build, ndim):
    q, k, v = (x[0] if ndim == 3 else x[0, 0] for x in arrays())
    assert counted(q, k, v, LayerScales(0.01, 0.012, 0.008))["k"] == expected(k, 0.012)


def test_watching_changes_no_bit(build):
    q, k, v = arrays()
    layer = LayerScales(0.01, 0.012, 0.008, k_mean=np.ones(40), fp32_sinks=5)
    plain = flash_attention_int8(q, k, v, quant=layer)
    with watch({"layer": layer}):
        np.testing.assert_array_equal(flash_attention_int8(q, k, v, quant=layer), plain)


@pytest.mark.parametrize("skip", [0, 7])
def test_the_pass_writes_the_same_codes_when_it_counts(build, skip):
    x = arrays()[1]
    scale, mean = np.full(x.shape[:3], 0.01, F32), np.ones((2, 2, 40), F32)
    codes = [np.empty(x.shape, np.int8) for _ in range(2)]
    how = [Encoding(x, one, mean, scale, None, skip, bool(counted)) for counted, one in enumerate(codes)]
    assert cpu.active().encode(how, 2) == [0, expected(x, 0.01, 1, skip)[0]]
    np.testing.assert_array_equal(*codes)


def test_a_planned_layer_is_counted_part_by_part(build):
    q, k, v = arrays(Hk=3)  # query heads 0 and 1 read kv head 0
    first, last = LayerScales(0.01, 0.012, 0.008), LayerScales(0.02, [[[0.01]]], fp32_sinks=2)
    planned = LayerScales(parts=[([0], first), ([1], None), ([2], last)])
    got = counted(q, k, v, planned)
    parts = {
        "q": [expected(q[:, :2], 0.01), expected(q[:, 4:], 0.02)],
        "k": [expected(k[:, :1], 0.012), expected(k[:, 2:], 0.01, skip=2)],
        "v": [expected(v[:, :1], 0.008)],
    }
    assert got == {name: tuple(map(sum, zip(*pairs, strict=True))) for name, pairs in parts.items()}


def test_scales_that_were_saved_and_loaded(tmp_path):
    q, k, v = arrays()
    scales = Scales.load(Scales({"a": LayerScales(0.01), "b": LayerScales(0.02)}).save(tmp_path / "x.safetensors"))
    with watch(scales) as w:
        flash_attention_int8(q, k, v, quant=scales["b"])
    assert w.counts == {"a": NOTHING, "b": NOTHING | {"q": expected(q, 0.02)}}


# What is not counted


def test_only_float_arrays_with_static_scales_are_counted():
    q, k, v = arrays()
    assert counted(q, k, v, LayerScales(0.01)) == NOTHING | {"q": expected(q, 0.01)}
    assert counted(q, k, v, LayerScales(v_scale=0.01, pv="bf16")) == NOTHING | {"v": expected(v, 0.01)}
    assert counted(q, k, v, LayerScales()) == NOTHING
    layer = LayerScales(0.01, 0.012, 0.008)
    codes = quantize(k, scale=0.012)
    assert counted(q, codes, v, layer) == {"q": expected(q, 0.01), "k": (0, 0), "v": expected(v, 0.008)}
    assert counted(q, codes.data, v, layer) == {"q": expected(q, 0.01), "k": (0, 0), "v": expected(v, 0.008)}


def test_keys_that_are_all_in_fp32_are_not_counted():
    q, k, v = arrays(Lk=5)
    assert counted(q, k, v, LayerScales(0.01, 0.012, 0.008, fp32_sinks=5)) == NOTHING


def test_empty_arrays_count_nothing():
    layer = LayerScales(0.01, 0.012, 0.008)
    assert counted(*arrays(Lk=0), layer) == NOTHING
    q, k, v = arrays(Lq=0)
    assert counted(q, k, v, layer) == {"q": (0, 0), "k": expected(k, 0.012), "v": expected(v, 0.008)}
    assert counted(*arrays(B=0), layer) == NOTHING


def test_other_calls_are_not_counted():
    q, k, v = arrays()
    layer = LayerScales(0.01, 0.012, 0.008)
    flash_attention_int8(q, k, v, quant=layer)
    with watch({"layer": layer}) as w:
        flash_attention_int8(q, k, v)
        flash_attention_int8(q, k, v, q_scale=0.01, k_scale=0.012, v_scale=0.008)
        flash_attention_int8(q, k, v, quant=LayerScales(0.01, 0.012, 0.008))
    flash_attention_int8(q, k, v, quant=layer)
    assert w.counts == {"layer": NOTHING}
    assert w.rates == {"layer": {"q": None, "k": None, "v": None}}


# Layers, watches, threads


def test_layers_are_told_apart_and_calls_add_up():
    q, k, v = arrays()
    scales = {"a": LayerScales(0.01, 0.01, 0.01), "b": LayerScales(0.01, 0.01, 0.01), "c": LayerScales(1.0)}
    with watch(scales) as w:
        for name in "aab":
            flash_attention_int8(q, k, v, quant=scales[name])
    once = {"q": expected(q, 0.01), "k": expected(k, 0.01), "v": expected(v, 0.01)}
    assert w.counts == {"a": {name: (2 * n, 2 * m) for name, (n, m) in once.items()}, "b": once, "c": NOTHING}
    assert list(w.counts) == list(scales)
    assert w.rates["b"]["k"] == once["k"][0] / once["k"][1] == w.rates["a"]["k"]


def test_watches_inside_each_other_count_for_themselves():
    q, k, v = arrays()
    scales = {"a": LayerScales(0.01), "b": LayerScales(0.02)}
    of_q = {name: expected(q, layer.q_scale) for name, layer in scales.items()}

    def call():
        for layer in scales.values():
            flash_attention_int8(q, k, v, quant=layer)

    with watch(scales) as outer:
        call()
        with watch({"other name": scales["a"]}) as inner:
            call()
        call()
    call()
    assert inner.counts == {"other name": NOTHING | {"q": of_q["a"]}}
    assert outer.counts == {name: NOTHING | {"q": (3 * n, 3 * m)} for name, (n, m) in of_q.items()}


def test_watches_may_end_in_any_order():
    q, k, v = arrays()
    scales = {"a": LayerScales(0.01)}
    first, second = watch(scales), watch(scales)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    flash_attention_int8(q, k, v, quant=scales["a"])
    second.__exit__(None, None, None)
    flash_attention_int8(q, k, v, quant=scales["a"])
    assert first.counts == {"a": NOTHING}
    assert second.counts == {"a": NOTHING | {"q": expected(q, 0.01)}}


def test_a_watch_goes_on_when_it_is_entered_again():
    q, k, v = arrays()
    scales = {"a": LayerScales(0.01)}
    w = watch(scales)
    for _ in range(2):
        with w:
            flash_attention_int8(q, k, v, quant=scales["a"])
    n, m = expected(q, 0.01)
    assert w.counts["a"]["q"] == (2 * n, 2 * m)
    with w, pytest.raises(RuntimeError, match="runs already"):
        w.__enter__()


def test_calls_of_all_threads_are_counted():
    q, k, v = arrays(Lq=20, Lk=60)
    scales = {"a": LayerScales(0.01, 0.01, 0.01), "b": LayerScales(0.01, 0.01, 0.01)}
    once = {"q": expected(q, 0.01), "k": expected(k, 0.01), "v": expected(v, 0.01)}
    own, start = [], threading.Barrier(4)

    def run(name):
        start.wait()
        for _ in range(25):
            with watch({name: scales[name]}) as w:  # comes and goes while others count
                flash_attention_int8(q, k, v, quant=scales[name], num_threads=1)
            own.append((name, w.counts[name]))

    with watch(scales) as w:
        threads = [threading.Thread(target=run, args=(name,)) for name in "aabb"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert w.counts == {layer: {name: (50 * n, 50 * m) for name, (n, m) in once.items()} for layer in "ab"}
    assert len(own) == 100
    for _, counts in own:  # its own call, and whole calls of the other thread with these scales
        calls = counts["q"][1] // once["q"][1]
        assert calls >= 1 and counts == {name: (calls * n, calls * m) for name, (n, m) in once.items()}


def test_a_call_that_outlives_the_watch_is_not_counted(monkeypatch):
    q, k, v = arrays()
    scales = {"a": LayerScales(0.01)}
    w = watch(scales)
    encode = cpu.active().encode

    def ends_the_watch(*args):
        w.__exit__(None, None, None)
        return encode(*args)

    monkeypatch.setattr(cpu.active(), "encode", ends_the_watch)
    w.__enter__()
    flash_attention_int8(q, k, v, quant=scales["a"])
    assert w.counts == {"a": NOTHING}


def test_nothing_stays_behind():
    from cyflash import quantized

    scales = {"a": LayerScales(0.01)}
    with pytest.raises(KeyError), watch(scales):
        assert list(quantized.watched) == [scales["a"]]
        raise KeyError("of the user")
    assert quantized.watched == {}


def test_a_call_that_raises_counts_nothing():
    q, k, v = arrays()
    layer = LayerScales(0.01, 0.01, 0.01)
    v[1, 1, 7, 3] = np.inf
    with watch({"layer": layer}) as w:
        with pytest.raises(ValueError, match="v: expected finite values"):
            flash_attention_int8(q, k, v, quant=layer)
        assert w.counts == {"layer": NOTHING}
        flash_attention_int8(q, k, k, quant=layer)
    assert w.counts["layer"]["q"] == expected(q, 0.01)


# How it looks, and what it is given


def test_counts_are_copies():
    w = watch({"a": LayerScales(0.01)})
    w.counts["a"]["q"] = (1, 1)
    assert w.counts == {"a": NOTHING}


def test_the_table():
    q, k, v = arrays()
    scales = {"model.layers.0": LayerScales(0.01, 1.0, 1e-6), "[bold]1": LayerScales(0.01)}
    with watch(scales) as w:
        flash_attention_int8(q, k, v, quant=scales["model.layers.0"])
        assert repr(w).startswith("<Watch of 2 layers, running: ")
    header, _, first, second = str(w).splitlines()
    assert header.split() == ["layer", *(word for name in "qkv" for word in (name, "saturated")), "values"]
    share = 100 * w.rates["model.layers.0"]["q"]
    values = q.size + k.size + v.size
    assert first.split() == ["model.layers.0", f"{share:.2g}" if share < 10 else f"{share:.0f}", "%", "0", "%",
                             "100", "%", f"{values:,}"]  # fmt: skip
    assert second.split() == ["[bold]1", "-", "-", "-", "0"]


def test_scales_that_are_none_are_named():
    layer = LayerScales(0.01)
    with pytest.raises(TypeError, match="scales: expected a mapping of layers to LayerScales, got LayerScales"):
        watch(layer)
    with pytest.raises(TypeError, match=r"scales\['b'\]: expected a LayerScales, got float"):
        watch({"a": layer, "b": 0.5})
    with pytest.raises(ValueError, match="'a' and 'b' share, whose calls cannot be told apart"):
        watch({"a": layer, "b": layer})
    watch({"a": layer, "b": dataclasses.replace(layer)})


def test_the_example_runs():
    assert doctest.testmod(watching).failed == 0
