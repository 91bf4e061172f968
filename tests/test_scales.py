"""Scales: a mapping that never makes a scale up, and a file that comes back to the bit or not at all."""
import doctest
import json

import cases
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import cyflash
import cyflash.quant.scales
from cyflash.quant import LayerScales, Scales

F32 = np.float32
FIELDS = ("q_scale", "k_scale", "v_scale", "k_mean")
r = np.random.default_rng(0)


def scale(*shape):
    return np.exp(r.standard_normal(shape) * 5).astype(F32)


LAYERS = {
    "layer2": LayerScales(
        scale(4, 1, 1), scale(2, 1, 1), scale(2, 1, 1), k_mean=scale(2, 1, 8), fp32_sinks=4, pv="bf16",
    ),
    "layer10": LayerScales(scale(), scale(), None),
    "model.layers.0.self_attn": LayerScales(None, scale(1, 2, 1, 1), scale(2, 6, 1), pv="fp32"),
    "all dynamic": LayerScales(k_mean=-scale(1, 8)),
    "planned": LayerScales(parts=[
        ((0, 3), LayerScales(scale(4, 1, 1), scale(2, 1, 1), None, k_mean=scale(2, 1, 8), fp32_sinks=2)),
        ((1,), None),
        ((2,), LayerScales(0.1, 0.2, scale(1, 9, 1), pv="bf16")),
    ]),
    "schicht, größer": LayerScales(np.finfo(F32).tiny, np.finfo(F32).max, np.nextafter(F32(1), F32(2))),
}
SETTINGS = {"method": "output", "percentile": 99.9999, "seed": 2**63 + 1, "tiny": 5e-324, "list": [1, [2.5, None]]}
ABOUT = {"layer2": {"é": True, "observations": 2**60 + 1, "error": {"held_out": {"rel_l1": 0.1 + 0.2}}, "tiles": None}}


@pytest.fixture
def scales():
    return Scales(LAYERS, settings=SETTINGS, about=ABOUT)


@pytest.fixture
def path(scales, tmp_path):
    return scales.save(tmp_path / "scales.safetensors")


def assert_same_layer(a, b):
    assert (a.parts is None) == (b.parts is None)
    if a.parts is not None:
        assert [heads for heads, _ in a.parts] == [heads for heads, _ in b.parts]
        for (_, one), (_, other) in zip(a.parts, b.parts, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same_layer(one, other)
    assert (a.fp32_sinks, a.pv) == (b.fp32_sinks, b.pv)
    for field in FIELDS:
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.shape == y.shape and x.dtype == y.dtype == F32 and x.tobytes() == y.tobytes(), field


# The mapping


def test_mapping(scales):
    natural = ["all dynamic", "layer2", "layer10", "model.layers.0.self_attn", "planned", "schicht, größer"]
    assert list(scales) == natural
    assert len(scales) == 6 and "layer2" in scales and "layer3" not in scales and 2 not in scales
    assert scales["layer2"] is LAYERS["layer2"] and dict(scales) == LAYERS
    assert scales.get("layer3") is None
    assert scales.settings == SETTINGS and scales.about["layer2"] == ABOUT["layer2"] and scales.about["planned"] == {}
    assert repr(scales).count("\n") == 0 and "6 layers" in repr(scales)


@pytest.mark.parametrize("name", ["layer3", "", None, 0, ["layer2"]])
def test_an_absent_layer_is_an_error_that_lists_what_is_there(scales, name):
    with pytest.raises(KeyError) as error:
        scales[name]
    assert repr(name) in error.value.args[0] and "6 layers: all dynamic, layer2" in error.value.args[0]


def test_long_lists_are_shortened():
    scales = Scales({f"layer{i}": LayerScales() for i in range(100)})
    with pytest.raises(KeyError, match=r"100 layers: layer0, layer1, layer2, layer3, \.\.\., layer98, layer99"):
        scales["layer100"]
    assert len(repr(scales)) < 120


def test_it_is_independent_of_the_order(scales, tmp_path):
    other = Scales(dict(reversed(LAYERS.items())), settings=dict(reversed(SETTINGS.items())), about=ABOUT)
    assert other == scales and list(other) == list(scales)
    assert other.save(tmp_path / "a.safetensors").read_bytes() == scales.save(tmp_path / "b.safetensors").read_bytes()


def test_equal_is_of_every_bit(scales):
    assert Scales(LAYERS, settings=SETTINGS, about=ABOUT) == scales
    assert Scales(LAYERS, about=ABOUT) != scales and Scales(LAYERS, settings=SETTINGS) != scales
    a, b, c = LayerScales(1.0), LayerScales(np.nextafter(F32(1), F32(2))), LayerScales(np.ones((1, 1)))
    assert Scales({"x": a}) != Scales({"x": b}) and Scales({"x": a}) != Scales({"x": c})
    assert Scales({"x": a}) != Scales({"y": a}) and Scales({"x": a}) != {"x": a}


def test_settings_are_plain():
    settings = {"percentile": np.float64(99.5), "n": np.int64(3), "slopes": np.float32([0.5, 0.25]), "window": (1, 2)}
    scales = Scales({"x": LayerScales()}, settings=settings, about={"x": {"causal": np.bool_(True)}})
    assert scales.settings == {"percentile": 99.5, "n": 3, "slopes": [0.5, 0.25], "window": [1, 2]}
    assert scales.about == {"x": {"causal": True}}
    settings["n"] = 4
    assert scales.settings["n"] == 3


@pytest.mark.parametrize(("kind", "arguments", "message"), [
    (TypeError, {"layers": {}}, "layers: expected a mapping"),
    (TypeError, {"layers": [LayerScales()]}, "layers: expected a mapping"),
    (TypeError, {"layers": {"x": 0.1}}, r"layers\['x'\]: expected a LayerScales, got float"),
    (TypeError, {"layers": {"x": None}}, "expected a LayerScales, got NoneType"),
    (TypeError, {"layers": {0: LayerScales()}}, "expected names.*got 0"),
    (TypeError, {"layers": {"": LayerScales()}}, "expected names"),
    (TypeError, {"layers": {"a\nb": LayerScales()}}, "expected names"),
    (TypeError, {"layers": {"x": LayerScales()}, "settings": "max"}, "settings: expected a mapping, got 'max'"),
    (TypeError, {"layers": {"x": LayerScales()}, "settings": {"f": print}}, "settings: expected what JSON can hold"),
    (ValueError, {"layers": {"x": LayerScales()}, "about": {"y": {}}}, "about: expected the layers' names, got 'y'"),
    (TypeError, {"layers": {"x": LayerScales()}, "about": {"x": 1}}, r"about\['x'\]: expected a mapping, got 1"),
    (
        ValueError,
        {"layers": {"x": LayerScales(parts=[([0], LayerScales(0.1))]), "x.parts.0": LayerScales(0.1)}},
        "'x.parts.0.q_scale' is of two layers",
    ),
])
def test_wrong_arguments(kind, arguments, message):
    with pytest.raises(kind, match=message):
        Scales(**arguments)


# The file


def test_round_trip(scales, path):
    loaded = Scales.load(path)
    assert list(loaded) == list(scales)
    for name, layer in loaded.items():
        assert_same_layer(layer, LAYERS[name])
    assert loaded.settings == scales.settings and loaded.about == scales.about and loaded == scales
    assert loaded["layer10"].v_scale is None and loaded["planned"].parts[1] == ((1,), None)


def test_same_bytes(scales, path, tmp_path):
    """Metadata too are in order: safetensors itself does not promise that."""
    for i in range(30):
        assert scales.save(tmp_path / f"{i}.safetensors").read_bytes() == path.read_bytes()
    again = Scales.load(path).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_what_the_file_holds(path):
    """Readable without cyflash."""
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    assert np.array_equal(tensors["layer2.k_mean"], LAYERS["layer2"].k_mean)
    assert "planned.parts.0.k_mean" in tensors and "layer10.v_scale" not in tensors
    assert metadata["format"] == "cyflash.Scales"
    whole = json.loads(metadata["scales"])
    assert whole["schema"] == 1 and whole["convention"] == "scale = amax / 127"
    assert whole["cyflash"] == cyflash.__version__ and whole["settings"] == SETTINGS
    assert whole["layers"]["layer10"] == {"fp32_sinks": 0, "pv": "int8", "k_mean": False, "dynamic": ["v"], "about": {}}
    assert whole["layers"]["planned"]["parts"][1] == {"kv_heads": [1], "layer": None}


def test_loaded_layers_run_as_the_saved_ones(scales, path):
    q, k, v = cases.arrays(1, 8, 4, 20, 9, 8)
    loaded = Scales.load(path)
    a, b = (cyflash.flash_attention_int8(q, k, v, quant=x["planned"], return_lse=True) for x in (scales, loaded))
    cases.assert_same_bits(a, b)


def test_an_error_leaves_the_old_file(scales, path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(safetensors.numpy, "save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scales.save(path)
    assert path.read_bytes() == before and [x.name for x in path.parent.iterdir()] == [path.name]


def test_paths(scales, tmp_path):
    assert scales.save(str(tmp_path / "x.SafeTensors")) == tmp_path / "x.SafeTensors"
    with pytest.raises(ValueError, match=r"expected a file that ends in \.safetensors"):
        scales.save(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"expected a file that ends in \.safetensors"):
        Scales.load(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Scales.load(tmp_path / "y.safetensors")
    with pytest.raises(OSError):
        scales.save(tmp_path / "no" / "x.safetensors")


# Damage


def refused(path, *message):
    with pytest.raises(ValueError) as error:
        Scales.load(path)
    assert str(error.value).startswith(f"{path}: "), error.value
    for part in message:
        assert part in str(error.value), error.value


def test_truncated(path, tmp_path):
    whole = path.read_bytes()
    target = tmp_path / "short.safetensors"
    for size in {*range(0, 64), *range(0, len(whole), 37), *range(len(whole) - 40, len(whole))}:
        target.write_bytes(whole[:size])
        refused(target)
    target.write_bytes(whole + b"\0")
    refused(target)


def test_flipped_bits(tmp_path):
    path = Scales({"a": LayerScales(0.1, 0.2, 0.3, k_mean=[0.5])}, settings={"n": 1}).save(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    for i in range(len(whole)):
        for bit in (0, 2, 5, 7) if i % 2 else (1, 3, 4, 6):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :])
            refused(path)


def tampered(path, *, tensors=None, metadata=None, **whole):
    """Write the file again with other tensors ({name: None} removes), metadata, or top entries of its JSON."""
    with safetensors.safe_open(path, "numpy") as file:
        old = file.metadata()
    text = json.loads(old["scales"])
    for key, value in whole.items():
        text = value(text) if key == "edit" else text | {key: value}
    held = safetensors.numpy.load_file(path) | (tensors or {})
    held = {name: x for name, x in held.items() if x is not None}
    metadata = old | {"scales": json.dumps(text, sort_keys=True)} | (metadata or {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    safetensors.numpy.save_file(held, path, metadata=metadata)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 1e-39])
@pytest.mark.parametrize("name", ["layer2.k_scale", "planned.parts.0.q_scale", "layer10.q_scale"])
def test_bad_scales(path, name, value):
    held = safetensors.numpy.load_file(path)[name]
    held[(-1, *(0,) * (held.ndim - 1)) if held.ndim else ()] = value
    tampered(path, tensors={name: held})
    layer, field = (name.split(".")[0], name.split(".")[-1])
    refused(path, f"layer {layer!r}", f"{field}: expected positive finite")


def test_bad_mean(path):
    tampered(path, tensors={"layer2.k_mean": np.full((2, 1, 8), np.nan, F32)})
    refused(path, "layer 'layer2'", "k_mean: expected finite")


@pytest.mark.parametrize("name", ["layer2.k_scale", "layer10.q_scale", "planned.parts.2.v_scale", "layer2.k_mean"])
def test_missing_tensors(path, name):
    tampered(path, tensors={name: None})
    layer, field = (name.split(".")[0], name.split(".")[-1])
    refused(path, f"layer {layer!r}", f"{field}: missing")


def test_changed_by_less_than_shows(path):
    """Good numbers, but others."""
    held = safetensors.numpy.load_file(path)["layer10.q_scale"]
    tampered(path, tensors={"layer10.q_scale": np.array(np.nextafter(held, F32(0)))})
    refused(path, "damaged", "sha256")


def of_layer(name, **change):
    def edit(whole):
        entry = whole["layers"][name] | change
        whole["layers"][name] = {key: value for key, value in entry.items() if value != "gone"}
        return whole

    return {"edit": edit}


def of_part(i, **change):
    def edit(whole):
        whole["layers"]["planned"]["parts"][i] |= change
        return whole

    return {"edit": edit}


ONE = np.ones((), F32)
TAMPERED = {
    "newer schema": ({"schema": 2, "cyflash": "9.9"}, ["schema", "got 2", "cyflash 9.9, a newer one"]),
    "schema 0": ({"schema": 0}, ["schema", "got 0"]),
    "schema true": ({"schema": True}, ["schema", "got True"]),
    "schema as text": ({"schema": "1"}, ["schema", "got '1'"]),
    "other convention": ({"convention": "scale = amax / 127.5"}, ["convention", "amax / 127.5"]),
    "no layers": ({"layers": {}}, ["layers", "at least one"]),
    "layers as a list": ({"layers": ["layer2"]}, ["layers", "at least one"]),
    "unknown entry": ({"more": 1}, ["unknown more"]),
    "settings as a list": ({"settings": []}, ["settings"]),
    "not an object": ({"edit": lambda whole: [whole]}, ["schema"]),
    "unknown tensor": ({"tensors": {"layer2.p_scale": ONE}}, ["layer2.p_scale"]),
    "tensor of no layer": ({"tensors": {"layer3.q_scale": ONE}}, ["layer3.q_scale", "6 layers"]),
    "tensor of a part in fp32": ({"tensors": {"planned.parts.1.q_scale": ONE}}, ["planned.parts.1.q_scale"]),
    "tensor of a dynamic operand": ({"tensors": {"layer10.v_scale": ONE}}, ["layer 'layer10'", "v_scale: there"]),
    "a mean too many": ({"tensors": {"layer10.k_mean": np.ones(8, F32)}}, ["layer 'layer10'", "k_mean: there"]),
    "float64": ({"tensors": {"layer2.q_scale": np.ones(())}}, ["layer2.q_scale", "F64"]),
    "shape": ({"tensors": {"layer2.q_scale": np.ones((4, 1, 8), F32)}}, ["layer 'layer2'", "q_scale"]),
    "layer removed": (
        {"edit": lambda whole: whole | {"layers": {k: v for k, v in whole["layers"].items() if k != "layer2"}}},
        ["layer2.k_mean"],
    ),
    "layer added": (of_layer("layer2") | {"edit": lambda whole: whole | {
        "layers": whole["layers"] | {"layer3": whole["layers"]["layer10"]},
    }}, ["layer 'layer3'", "q_scale: missing"]),
    "entry is a number": ({"edit": lambda whole: whole | {"layers": {"layer2": 1}}}, ["layer 'layer2'", "got 1"]),
    "no pv": (of_layer("layer2", pv="gone"), ["layer 'layer2'", "no pv"]),
    "pv": (of_layer("layer2", pv="int4"), ["layer 'layer2'", "pv", "int4"]),
    "fp32_sinks": (of_layer("layer2", fp32_sinks=-1), ["layer 'layer2'", "fp32_sinks", "-1"]),
    "fp32_sinks is true": (of_layer("layer2", fp32_sinks=True), ["layer 'layer2'", "fp32_sinks", "True"]),
    "dynamic": (of_layer("layer10", dynamic=["v", "p"]), ["layer 'layer10'", "dynamic", "p"]),
    "dynamic as text": (of_layer("layer10", dynamic="v"), ["layer 'layer10'", "dynamic"]),
    "less dynamic": (of_layer("layer10", dynamic=[]), ["layer 'layer10'", "v_scale: missing"]),
    "k_mean": (of_layer("layer2", k_mean=1), ["layer 'layer2'", "k_mean", "1"]),
    "no mean": (of_layer("layer2", k_mean=False), ["layer 'layer2'", "k_mean: there"]),
    "about": (of_layer("layer2", about=[]), ["about['layer2']"]),
    "no about": (of_layer("layer2", about="gone"), ["layer 'layer2'", "no about"]),
    "field of its own": (of_layer("layer2", rung=1), ["layer 'layer2'", "unknown rung"]),
    "parts": (of_layer("planned", parts=None), ["layer 'planned'", "parts"]),
    "parts and more": (of_layer("planned", pv="int8"), ["layer 'planned'", "unknown pv"]),
    "heads twice": (of_part(1, kv_heads=[3]), ["layer 'planned'", "parts[1]", "got 3 also in parts[0]"]),
    "heads as text": (of_part(1, kv_heads=["1"]), ["layer 'planned'", "parts[1]"]),
    "another layer": (of_part(2, layer=None), ["planned.parts.2"]),
    "changed settings": ({"settings": {"method": "max"}}, ["damaged", "sha256"]),
    "changed heads": (of_part(1, kv_heads=[4]), ["layer 'planned'", "got none with 1"]),
    "no sha256": ({"metadata": {"sha256": None}}, ["damaged", "sha256"]),
    "another sha256": ({"metadata": {"sha256": "0" * 64}}, ["damaged", "sha256"]),
    "no JSON": ({"metadata": {"scales": "{"}}, ["scales: not JSON"]),
    "JSON missing": ({"metadata": {"scales": None}}, ["scales: not JSON"]),
    "another format": ({"metadata": {"format": "cyflash.QuantizedTensor"}}, ["a file that Scales.save wrote"]),
    "no format": ({"metadata": {"format": None}}, ["a file that Scales.save wrote", "layer2.k_mean"]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered(path, name):
    change, message = TAMPERED[name]
    tampered(path, **change)
    refused(path, *message)


def test_tampering_by_nothing_is_read(scales, path):
    """That the cases above fail for what they change."""
    tampered(path)
    assert Scales.load(path) == scales


def test_other_files(tmp_path):
    path = tmp_path / "x.safetensors"
    for contents in (b"", b"{}", b"\0" * 100, b"PK\x03\x04" + b"\0" * 100, (10**9).to_bytes(8, "little") + b"{}" * 50):
        path.write_bytes(contents)
        refused(path, "not a readable .safetensors file")
    safetensors.numpy.save_file({"layer0.k_scale": ONE}, path)
    refused(path, "expected a file that Scales.save wrote", "layer0.k_scale")
    with pytest.raises(ValueError, match=r"QuantizedTensor\.save"):
        cyflash.QuantizedTensor.load(Scales({"x": LayerScales(0.1)}).save(path))


def test_documented_examples():
    assert doctest.testmod(cyflash.quant.scales).failed == 0
