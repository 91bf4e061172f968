"""Scales in the form of compressed-tensors: converted, complete, and refused where it cannot say what they mean."""
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import cyflash
from cyflash.quant import LayerScales, Scales

F32 = np.float32
SCHEME = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}
L0, L1, L10 = (f"model.layers.{i}.self_attn" for i in (0, 1, 10))
H, HK = 4, 2


def heads(*numbers):
    return np.float32(numbers)[:, None, None]


def per_tensor():
    return Scales({L0: LayerScales(0.5, 0.25, 0.125), L1: LayerScales(None, 0.1, 0.3), L10: LayerScales(1.0, 2.0, 3.0)})


def per_head():
    return Scales({
        L0: LayerScales(heads(1, 2, 3, 4), heads(0.1, 0.2), heads(0.3, 0.4)),
        L1: LayerScales(None, heads(0.1, 0.2), 0.3),
    })


def written(folder, tensors, scheme=SCHEME, *, name="model.safetensors", config=None):
    """A checkpoint by hand, as other tools write it."""
    safetensors.numpy.save_file({key: np.asarray(x) for key, x in tensors.items()}, folder / name)
    own = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    whole = {"model_type": "llama", "quantization_config": own}
    (folder / "config.json").write_text(json.dumps(whole if config is None else config))
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


GOOD = {f"{L0}.k_scale": F32([0.254]), f"{L0}.v_scale": F32([0.127])}


# Export


def test_export_per_tensor(tmp_path):
    path = per_tensor().to_vllm(tmp_path / "new")
    assert path == tmp_path / "new" / "kv_cache_scales.safetensors"
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {f"{L}.{x}_scale" for L in (L0, L1, L10) for x in "qkv"} - {f"{L1}.q_scale"}
    assert all(x.shape == (1,) and x.dtype == F32 for x in tensors.values())
    # the same greatest value: ours is 127 steps, theirs 127.5
    assert np.allclose(tensors[f"{L0}.k_scale"] * 127.5, 0.25 * 127, rtol=1e-7, atol=0)
    own = config_of(path.parent)["quantization_config"]
    assert own["quant_method"] == "compressed-tensors" and own["kv_cache_scheme"] == SCHEME
    assert own["config_groups"] == {} and own["format"] == "dense"
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_export_per_head(tmp_path):
    path = per_head().to_vllm(tmp_path)
    tensors = safetensors.numpy.load_file(path)
    assert {name: x.shape for name, x in tensors.items()} == {
        f"{L0}.q_scale": (H, 1, 1), f"{L0}.k_scale": (HK, 1, 1), f"{L0}.v_scale": (HK, 1, 1),
        f"{L1}.k_scale": (HK, 1, 1), f"{L1}.v_scale": (HK, 1, 1),
    }
    assert np.allclose(tensors[f"{L0}.q_scale"].ravel() * 127.5, np.array([1, 2, 3, 4]) * 127, rtol=1e-7, atol=0)
    assert len(set(tensors[f"{L1}.v_scale"].ravel().tolist())) == 1
    assert config_of(tmp_path)["quantization_config"]["kv_cache_scheme"] == SCHEME | {"strategy": "attn_head"}


def test_heads_that_calibration_noted(tmp_path):
    layers = dict(per_head()) | {L10: LayerScales(0.1, 0.2, 0.3)}
    with pytest.raises(ValueError, match=rf"layer '{L10}': q_scale: one number.*per head.*'heads'"):
        Scales(layers).to_vllm(tmp_path)
    assert not list(tmp_path.iterdir())
    scales = Scales(layers, about={L10: {"heads": H, "kv_heads": HK}})
    tensors = safetensors.numpy.load_file(scales.to_vllm(tmp_path))
    assert tensors[f"{L10}.q_scale"].shape == (H, 1, 1) and tensors[f"{L10}.k_scale"].shape == (HK, 1, 1)
    wrong = Scales(per_head(), about={L0: {"kv_heads": 3}})
    with pytest.raises(ValueError, match=rf"layer '{L0}': k_scale: expected scales for as many heads, got \[2, 3\]"):
        wrong.to_vllm(tmp_path)


@pytest.mark.parametrize("make", [per_tensor, per_head])
def test_round_trip(make, tmp_path):
    scales = make()
    scales.to_vllm(tmp_path)
    back = Scales.from_vllm(tmp_path)
    assert list(back) == list(scales)
    for name, layer in scales.items():
        for field in ("q_scale", "k_scale", "v_scale"):
            ours, theirs = getattr(layer, field), getattr(back[name], field)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert np.allclose(ours, theirs, rtol=2.0**-23, atol=0) and theirs.dtype == F32
                assert theirs.shape == (() if make is per_tensor else (theirs.size, 1, 1))
        assert back[name].fp32_sinks == 0 and back[name].k_mean is None
    strategy = "tensor" if make is per_tensor else "attn_head"
    assert back.settings == {"source": "compressed-tensors", "strategy": strategy}


def test_it_runs_after_the_journey(tmp_path):
    r = np.random.default_rng(0)
    q, k, v = (r.standard_normal((n, 40, 16), dtype=F32) for n in (H, HK, HK))
    scales = Scales({L0: LayerScales(*(np.abs(x).max((1, 2), keepdims=True) / 127 for x in (q, k, v)))})
    scales.to_vllm(tmp_path)
    a, b = (cyflash.flash_attention_int8(q, k, v, quant=x[L0]) for x in (scales, Scales.from_vllm(tmp_path)))
    assert np.abs(a - b).max() < 1e-2


def test_the_smallest_scale_stays_a_scale(tmp_path):
    """That of an array of zeros."""
    tiny = np.finfo(F32).tiny
    Scales({L0: LayerScales(tiny, tiny, tiny)}).to_vllm(tmp_path)
    assert (safetensors.numpy.load_file(tmp_path / "kv_cache_scales.safetensors")[f"{L0}.k_scale"] >= tiny).all()
    assert Scales.from_vllm(tmp_path)[L0].k_scale >= tiny


@pytest.mark.parametrize(("layer", "why"), [
    (LayerScales(0.1, 0.1, 0.1, k_mean=np.zeros((1, 8))), "k_mean: .* does not subtract"),
    (LayerScales(0.1, 0.1, 0.1, fp32_sinks=4), "fp32_sinks: .* first 4 keys"),
    (LayerScales(parts=[([0], LayerScales(0.1, 0.1, 0.1))]), "parts: .* not a plan"),
    (LayerScales(0.1, None, 0.1), "k_scale: dynamic"),
    (LayerScales(0.1, 0.1), "v_scale: dynamic"),
    (LayerScales(0.1, np.ones((2, 9, 1), F32), 0.1), r"k_scale: expected one for all tokens, got shape \(2, 9, 1\)"),
    (LayerScales(np.full((2, 4, 1, 1), 0.1, F32), 0.1, 0.1), "q_scale: expected one for all sequences"),
])
def test_refused_layers(layer, why, tmp_path):
    scales = Scales({L0: LayerScales(0.1, 0.1, 0.1), L1: layer})
    with pytest.raises(ValueError, match=rf"layer '{L1}': {why}"):
        scales.to_vllm(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_existing_config_is_kept(tmp_path):
    before = {"model_type": "llama", "größe": [1, 2], "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(before), encoding="utf-8")
    per_tensor().to_vllm(tmp_path)
    after = config_of(tmp_path)
    assert {key: after[key] for key in before} == before and list(after)[:3] == list(before)
    assert after["quantization_config"]["kv_cache_scheme"] == SCHEME


def test_quantised_weights_are_kept(tmp_path):
    weights = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"]}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": weights | {"kv_cache_scheme": None}}))
    per_tensor().to_vllm(tmp_path)
    assert config_of(tmp_path)["quantization_config"] == weights | {"kv_cache_scheme": SCHEME}


@pytest.mark.parametrize(("config", "message"), [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "expected no quantization_config, or one of .*gptq"),
    ({"quantization_config": {"bits": 4}}, "expected no quantization_config, or one of"),
    ({"quantization_config": [1]}, "expected no quantization_config, or one of"),
    (
        {"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME | {"type": "float"}}},
        "expected no kv_cache_scheme.*float",
    ),
    ([1], "expected a JSON object"),
    ("{", "not JSON"),
])
def test_config_of_others_is_not_touched(config, message, tmp_path):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        per_tensor().to_vllm(tmp_path)
    assert "config.json" in str(error.value)
    assert (tmp_path / "config.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_export_again(tmp_path):
    per_tensor().to_vllm(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    per_tensor().to_vllm(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    per_head().to_vllm(tmp_path)
    assert set(Scales.from_vllm(tmp_path)) == {L0, L1}


def checkpoint(folder, **more):
    """In two files with an index."""
    folder.mkdir()
    for name in "ab":
        safetensors.numpy.save_file({name: np.ones(3, F32)} | more.get(name, {}), folder / f"model-{name}.safetensors")
    index = {"metadata": {"total_size": 24}, "weight_map": {
        key: f"model-{name}.safetensors" for name in "ab" for key in (name, *more.get(name, {}))
    }}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_a_checkpoint_in_several_files(tmp_path):
    """vLLM reads the files of the index only."""
    folder = checkpoint(tmp_path / "model")
    per_tensor().to_vllm(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["a"] == "model-a.safetensors" and index["metadata"] == {"total_size": 24}
    assert index["weight_map"][f"{L10}.v_scale"] == "kv_cache_scales.safetensors"
    assert set(Scales.from_vllm(folder)) == {L0, L1, L10}
    per_head().to_vllm(folder)
    assert f"{L10}.v_scale" not in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(Scales.from_vllm(folder)) == {L0, L1}


def test_scales_of_others_are_not_shadowed(tmp_path):
    folder = checkpoint(tmp_path / "several", b=GOOD)
    with pytest.raises(ValueError, match=rf"model-b\.safetensors: has a {L0}.k_scale already"):
        per_tensor().to_vllm(folder)
    (tmp_path / "one").mkdir()
    safetensors.numpy.save_file(GOOD, tmp_path / "one" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: has a {L0}.k_scale already"):
        per_tensor().to_vllm(tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]


# Import


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_import_by_hand(tmp_path, dtype):
    tensors = {name: x.astype(dtype) for name, x in GOOD.items()} | {
        f"{L1}.k_scale": np.ones((), dtype), f"{L1}.v_scale": np.ones(1, dtype), f"{L1}.q_scale": np.ones(1, dtype),
        "model.layers.0.self_attn.q_proj.weight": np.ones((2, 2), dtype), "lm_head.weight_scale": np.zeros(1, dtype),
        f"{L0}.k_zero_point": np.zeros(1, np.int8),
    }
    scales = Scales.from_vllm(written(tmp_path, tensors))
    assert list(scales) == [L0, L1]
    assert scales[L0].k_scale.shape == () and scales[L0].q_scale is None and scales[L1].q_scale is not None
    expected = float(tensors[f"{L0}.k_scale"][0]) * 127.5 / 127
    assert scales[L0].k_scale == F32(expected)
    assert scales.settings == {"source": "compressed-tensors", "strategy": "tensor"}


def test_import_bfloat16(tmp_path):
    """What llm-compressor writes for models in bfloat16."""
    names = [f"{L0}.k_scale", f"{L0}.v_scale"]
    header = json.dumps({
        name: {"dtype": "BF16", "shape": [2, 1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)
    }).encode()
    header += b" " * (-len(header) % 8)
    words = (F32([1.5, 2.0, 0.25, 3.0]).view(np.uint32) >> 16).astype("<u2")
    written(tmp_path, {"x": F32([1])}, SCHEME | {"strategy": "attn_head"})
    (tmp_path / "scales.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + words.tobytes())
    layer = Scales.from_vllm(tmp_path)[L0]
    ratio = 127.5 / 127
    assert layer.k_scale.shape == (2, 1, 1) and layer.k_scale.ravel().tolist() == F32([1.5 * ratio, 2 * ratio]).tolist()
    assert layer.v_scale.ravel().tolist() == F32([0.25 * ratio, 3 * ratio]).tolist()


def test_import_with_their_defaults(tmp_path):
    """An empty scheme is 8 bits, int, symmetric, static, per tensor."""
    assert list(Scales.from_vllm(written(tmp_path, GOOD, {"observer": "minmax"}))) == [L0]


@pytest.mark.parametrize("shape", [(HK,), (HK, 1, 1)])
def test_import_per_head(tmp_path, shape):
    tensors = {f"{L0}.k_scale": np.full(shape, 0.5, F32), f"{L0}.v_scale": np.full(shape, 0.25, F32)}
    tensors[f"{L0}.q_scale"] = np.full((H, *shape[1:]), 0.25, F32)
    layer = Scales.from_vllm(written(tmp_path, tensors, SCHEME | {"strategy": "attn_head"}))[L0]
    assert layer.k_scale.shape == layer.v_scale.shape == (HK, 1, 1) and layer.q_scale.shape == (H, 1, 1)


def refused(folder, *message):
    with pytest.raises(ValueError) as error:
        Scales.from_vllm(folder)
    for part in (str(folder), *message):
        assert part in str(error.value), error.value


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_scale"])
def test_bad_numbers(tmp_path, name, value):
    """-1 is what vLLM starts from, and turns into 1."""
    refused(written(tmp_path, GOOD | {f"{L0}.{name}": F32([value])}), f"{L0}.{name}: expected finite numbers above 0",
            "model.safetensors")


@pytest.mark.parametrize("value", [1e-60, 1e300])
def test_numbers_beyond_float32(tmp_path, value):
    refused(written(tmp_path, GOOD | {f"{L0}.k_scale": np.float64([value])}), f"layer '{L0}'", "k_scale")


@pytest.mark.parametrize(("tensors", "message"), [
    ({f"{L0}.v_scale": None}, [f"layer '{L0}': no v_scale", "k_scale"]),
    ({f"{L0}.k_scale": None}, [f"layer '{L0}': no k_scale"]),
    ({f"{L1}.q_scale": F32([1])}, [f"layer '{L1}': no k_scale"]),
    ({f"{L1}.k_zero_point": F32([0])}, [f"layer '{L1}': no k_scale"]),
    ({f"{L0}.k_scale": F32([1, 1])}, [f"{L0}.k_scale: expected one number for 'tensor'", "(2,)"]),
    ({f"{L0}.k_scale": F32([])}, [f"{L0}.k_scale: expected one number"]),
    ({f"{L0}.k_scale": np.int32([1])}, [f"{L0}.k_scale", "I32"]),
    ({f"{L0}.k_zero_point": np.int8([3])}, [f"{L0}.k_zero_point: expected zeros"]),
    (dict.fromkeys(GOOD), ["expected tensors <layer>.k_scale", "got none"]),
    (dict.fromkeys(GOOD) | {f"{L0}.kv_scale": F32([1])}, ["got none", f"{L0}.kv_scale"]),
])
def test_bad_tensors(tmp_path, tensors, message):
    held = {name: x for name, x in (GOOD | tensors | {"x": F32([1])}).items() if x is not None}
    refused(written(tmp_path, held), *message)


@pytest.mark.parametrize(("tensors", "message"), [
    ({f"{L0}.k_scale": heads(1, 1), f"{L0}.v_scale": heads(1)}, ["one number of kv heads", "k_scale 2, v_scale 1"]),
    ({f"{L0}.k_scale": heads(1, 1), f"{L0}.v_scale": heads(1, 1), f"{L0}.q_scale": heads(1, 1, 1)}, ["q_scale 3"]),
    ({f"{L0}.k_scale": np.ones((2, 1), F32)}, ["expected (heads, 1, 1) or (heads,)", "(2, 1)"]),
])
def test_bad_heads(tmp_path, tensors, message):
    refused(written(tmp_path, GOOD | tensors, SCHEME | {"strategy": "attn_head"}), f"{L0}", *message)


@pytest.mark.parametrize(("scheme", "message"), [
    (SCHEME | {"type": "float"}, ["type: expected 'int', got 'float'", "fp8"]),
    (SCHEME | {"num_bits": 4}, ["num_bits: expected 8, got 4"]),
    (SCHEME | {"symmetric": False}, ["symmetric: expected True, got False"]),
    (SCHEME | {"dynamic": True}, ["dynamic: expected False, got True"]),
    (SCHEME | {"dynamic": 0}, ["dynamic: expected False, got 0"]),
    (SCHEME | {"strategy": "channel"}, ["strategy: expected 'tensor' or 'attn_head', got 'channel'"]),
    (None, ["expected a kv_cache_scheme"]),
])
def test_other_schemes(tmp_path, scheme, message):
    refused(written(tmp_path, GOOD, scheme), "config.json", *message)


@pytest.mark.parametrize(("config", "message"), [
    ({}, "expected a quantization_config"),
    ({"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": SCHEME}}, "expected a quantization_config of"),
    ([], "expected a JSON object"),
])
def test_other_configs(tmp_path, config, message):
    refused(written(tmp_path, GOOD, config=config), "config.json", message)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        Scales.from_vllm(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        Scales.from_vllm(tmp_path / "nowhere")
    folder = checkpoint(tmp_path / "model")
    per_tensor().to_vllm(folder)
    (folder / "model-b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-b\.safetensors: no such file, though"):
        Scales.from_vllm(folder)


def test_broken_files(tmp_path):
    folder = written(tmp_path, GOOD)
    (folder / "model.safetensors").write_bytes(b"\0" * 50)
    refused(folder, "model.safetensors: not a readable .safetensors file")
    written(tmp_path, GOOD)
    written(tmp_path, GOOD, name="other.safetensors")
    refused(folder, f"{L0}.k_scale is also in model.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "model.safetensors.index.json: expected a weight_map")
