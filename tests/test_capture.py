"""Files of captured activations: what is written is read back, and every file that cannot be used says why."""

import doctest
import json
import os

import numpy as np
import pytest
import safetensors.numpy

import cyflash.capture
from cyflash import quant
from cyflash.capture import load_capture, save_capture

SUFFIXES = (".npz", ".safetensors")


def arrays(*shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(dtype) for _ in "qkv")


def write(path, entries, options=None):
    """A file as a user writes it, without save_capture."""
    if path.suffix == ".npz":
        extra = {} if options is None else {"options": options}
        np.savez(path, **entries, **extra)
    else:
        entries = {name: np.ascontiguousarray(x) for name, x in entries.items()}
        safetensors.numpy.save_file(entries, path, metadata=None if options is None else {"options": options})
    return path


def entries_of(qkv, layer=""):
    return {f"{layer}{part}": x for part, x in zip("qkv", qkv, strict=True)}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_one_layer_is_named_as_its_file(tmp_path, suffix, shape, dtype):
    qkv = arrays(*shape, dtype=dtype)
    capture = load_capture(write(tmp_path / f"mine{suffix}", entries_of(qkv)))
    assert list(capture) == ["mine"]
    assert capture.options == {}
    assert capture.stored == {"mine": dtype}
    for got, x in zip(capture["mine"], qkv, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, x.astype(np.float32))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_several_layers_come_in_natural_order(tmp_path, suffix):
    layers = {name: arrays(3, 4, seed=seed) for seed, name in enumerate(["b.layer10", "b.layer2", "a"])}
    entries = {}
    for name, qkv in layers.items():
        entries |= entries_of(qkv, f"{name}.")
    capture = load_capture(write(tmp_path / f"x{suffix}", entries))
    assert list(capture) == ["a", "b.layer2", "b.layer10"]
    assert len(capture) == 3
    for name, qkv in layers.items():
        for got, x in zip(capture[name], qkv, strict=True):
            np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save_and_load_keep_values_dtypes_and_options(tmp_path, suffix):
    layers = {"l0": arrays(2, 6, 4, dtype=np.float16), "l1": arrays(2, 6, 4, dtype=np.float64)}
    options = dict(
        causal=True, causal_align="top-left", scale=0.3, window=(4, -1), softcap=20.0,
        alibi_slopes=np.array([0.5, 0.25], np.float32), sinks=[1.0, 2.0],
    )  # fmt: skip
    capture = load_capture(save_capture(tmp_path / f"x{suffix}", layers, **options))
    assert capture.stored == {"l0": "float16", "l1": "float64"}
    for name, qkv in layers.items():
        for got, x in zip(capture[name], qkv, strict=True):
            np.testing.assert_array_equal(got, x.astype(np.float32))
    assert capture.options.keys() == options.keys()
    for name, value in options.items():
        np.testing.assert_array_equal(capture.options[name], value)
    assert isinstance(capture.options["window"], tuple)
    assert capture.options["sinks"].dtype == np.float32


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_layer_can_be_saved_without_a_name(tmp_path, suffix):
    capture = load_capture(save_capture(tmp_path / f"solo{suffix}", arrays(3, 4)))
    assert list(capture) == ["solo"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_options_are_read_from_a_file_made_by_hand(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", entries_of(arrays(3, 4)), json.dumps({"causal": True, "window": [2, 0]}))
    assert load_capture(path).options == {"causal": True, "window": (2, 0)}


def test_other_metadata_of_safetensors_is_no_option(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(entries_of(arrays(3, 4)), path, metadata={"format": "np"})
    assert load_capture(path).options == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("axes", [(0, 1), (1, 0, 2), (0, 2, 1, 3)])
def test_layout_blhd_gives_views_in_the_order_of_the_library(tmp_path, suffix, axes):
    qkv = arrays(*(2, 3, 5, 4)[-len(axes) :])
    path = write(tmp_path / f"x{suffix}", entries_of(tuple(x.transpose(axes) for x in qkv)))
    for got, x in zip(load_capture(path, layout="blhd")["x"], qkv, strict=True):
        np.testing.assert_array_equal(got, x)


def test_grouped_heads_and_another_value_size_are_read(tmp_path):
    q, k, v = arrays(4, 6, 8)[0], arrays(2, 9, 8)[1], arrays(2, 9, 3)[2]
    layer = load_capture(write(tmp_path / "x.npz", entries_of((q, k, v))))["x"]
    assert [x.shape for x in layer] == [(4, 6, 8), (2, 9, 8), (2, 9, 3)]


def test_big_endian_and_fortran_order_are_read(tmp_path):
    q, k, v = arrays(3, 4)
    layer = load_capture(write(tmp_path / "x.npz", entries_of((q.astype(">f4"), np.asfortranarray(k), v))))["x"]
    np.testing.assert_array_equal(layer.q, q)
    np.testing.assert_array_equal(layer.k, k)
    assert layer.q.dtype == np.dtype("float32")


BAD_SHAPES = {
    "one batch size": ((2, 4, 5, 8), (1, 4, 5, 8), (1, 4, 5, 8)),
    "heads that divides": ((4, 5, 8), (3, 5, 8), (3, 5, 8)),
    "one number of heads": ((4, 5, 8), (4, 5, 8), (2, 5, 8)),
    "one length": ((4, 5, 8), (4, 6, 8), (4, 7, 8)),
    "one head_dim": ((5, 8), (5, 9), (5, 8)),
    r"all \(L, D\)": ((4, 5, 8), (5, 8), (5, 8)),
    r"or \(B, H, L, D\)": ((8,), (8,), (8,)),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("message", BAD_SHAPES)
def test_shapes_that_do_not_fit_are_shown(tmp_path, suffix, message):
    shapes = BAD_SHAPES[message]
    qkv = tuple(np.zeros(shape, np.float32) for shape in shapes)
    path = write(tmp_path / f"x{suffix}", entries_of(qkv, "l."))
    with pytest.raises(ValueError, match=message) as error:
        load_capture(path)
    assert "layer 'l'" in str(error.value) and str(shapes[1]) in str(error.value)


def test_shapes_that_fit_the_other_layout_say_so(tmp_path):
    shapes = (5, 4, 8), (9, 2, 8), (9, 2, 8)  # (L, H, D)
    path = write(tmp_path / "x.npz", {n: np.zeros(s, np.float32) for n, s in zip("qkv", shapes, strict=True)})
    with pytest.raises(ValueError, match="--layout blhd"):
        load_capture(path)
    assert load_capture(path, layout="blhd")["x"].k.shape == (2, 9, 8)
    with pytest.raises(ValueError, match="expected one of bhld, blhd, got 'dlhb'"):
        load_capture(path, layout="dlhb")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("a.q a.v", "layer 'a' has no k"),
        ("q", "the layer has no k and no v"),
        ("a.q a.k a.v b.q b.k", "layer 'b' has no v"),
        ("q k v mask", "unexpected entry 'mask'"),
        ("q k v a.q a.k a.v", "mixes"),
        ("", "no layer"),
    ],
)
def test_missing_and_unknown_entries_are_named(tmp_path, suffix, entries, message):
    path = write(tmp_path / f"x{suffix}", {name: np.zeros((3, 4), np.float32) for name in entries.split()})
    with pytest.raises(ValueError, match=message):
        load_capture(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([], "found no entries"),
        (["query", "key"], "found key, query"),
        (["a.q", "a.v"], "found a.q, a.v"),
        ([f"l{i}.weight" for i in range(9)], "found l0.weight, l1.weight, .*, l8.weight"),
        ([f"l{i}.weight" for i in range(40)], "found l0.weight, l1.weight, .*, l7.weight and 32 more"),
        ([f"l{i}.q" for i in range(40)], "found l0.q, l1.q, .*, l7.q and 32 more"),
    ],
)
def test_a_file_without_q_k_v_says_what_was_found(tmp_path, suffix, entries, found):
    path = write(tmp_path / f"x{suffix}", {name: np.zeros((3, 4), np.float32) for name in entries})
    with pytest.raises(ValueError, match=f"{found}$"):
        load_capture(path)


def test_captures_are_saved_and_loaded_from_the_toolkit():
    assert quant.save_capture is save_capture and quant.load_capture is load_capture
    assert {"save_capture", "load_capture"} <= set(quant.__all__)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_dtypes_are_named(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", {name: np.zeros((3, 4), np.int8) for name in "qkv"})
    with pytest.raises(TypeError, match=r"q: expected float32, float16, float64, got (int8|I8)"):
        load_capture(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"casual": True}, "'casual' is not one of causal"),
        ({"causal": "yes"}, 'causal: expected true or false, got "yes"'),
        ({"window": 4}, "window: expected .left, right., two whole numbers, got 4"),
        ({"window": [1, 2, 3]}, "window: expected"),
        ({"softcap": "big"}, "softcap: expected a number"),
        ({"scale": True}, "scale: expected a number"),
        ({"sinks": ["a"]}, "sinks: expected a list of numbers"),
        ([1], "expected a JSON object"),
    ],
)
def test_options_that_cannot_be_used_are_named(tmp_path, suffix, options, message):
    path = write(tmp_path / f"x{suffix}", entries_of(arrays(3, 4)), json.dumps(options))
    with pytest.raises(ValueError, match=message):
        load_capture(path)


def test_options_that_are_not_json_are_shown(tmp_path):
    with pytest.raises(ValueError, match="options: not JSON"):
        load_capture(write(tmp_path / "x.npz", entries_of(arrays(3, 4)), "causal=True"))


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.npz or \.safetensors"):
        load_capture(tmp_path / "x.bin")
    for suffix in SUFFIXES:
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_capture(tmp_path / f"absent{suffix}")
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"these are no arrays at all")
        with pytest.raises(ValueError, match=f"not a readable {suffix} file"):
            load_capture(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_short_is_an_error(tmp_path, suffix):
    path = save_capture(tmp_path / f"x{suffix}", arrays(3, 4))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a readable"):
        load_capture(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_in_an_npz_is_an_error_that_names_it(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, **dict(zip("qkv", arrays(2000, 16), strict=True)))
    data, r = path.read_bytes(), np.random.default_rng(0)
    for place in r.integers(100, len(data), 40):
        damaged = bytearray(data)
        damaged[place] ^= 1 << r.integers(8)
        path.write_bytes(damaged)
        try:
            list(load_capture(path).values())
        except ValueError as error:
            assert str(path) in str(error)
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"x\.npz: not a readable \.npz file"):
        list(load_capture(path).values())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["layer\u00b2", "1\u00b2", "\u0663", "9" * 5000])
def test_names_with_digits_of_any_kind(tmp_path, suffix, name):
    path = save_capture(tmp_path / f"x{suffix}", {"layer10": arrays(3, 4), name: arrays(3, 4), "layer9": arrays(3, 4)})
    assert [x for x in load_capture(path) if x != name] == ["layer9", "layer10"]
    assert name in load_capture(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_cannot_be_read_is_not_written(tmp_path, suffix):
    path = save_capture(tmp_path / f"x{suffix}", arrays(3, 4))
    before = path.read_bytes()
    q, k, v = arrays(3, 4)
    for bad in ((q, k[:2], v), (q, k, v.astype(np.int32))):
        with pytest.raises((ValueError, TypeError)):
            save_capture(path, {"a": bad})
    with pytest.raises(ValueError, match="'dropout_p' is not one of"):
        save_capture(path, (q, k, v), dropout_p=0.5)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_layer_is_read_only_when_asked_for(tmp_path, monkeypatch):
    capture = load_capture(save_capture(tmp_path / "x.npz", {"a": arrays(3, 4), "b": arrays(3, 4)}))
    read = []
    monkeypatch.setattr(capture._format, "read", staticmethod(lambda _, names: read.append(names) or arrays(3, 4)))
    capture["b"]
    assert read == [("b.q", "b.k", "b.v")]


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(cyflash.capture).failed == 0
