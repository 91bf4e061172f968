"""capture: what a model's attention is given, into a Calibrator or a file, under the names of its modules; and back."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

from transformers_models import CONFIGS, WINDOW, in_float64, inputs, logits, made, rms  # noqa: E402

import cyflash  # noqa: E402
from cyflash.capture import load_capture  # noqa: E402
from cyflash.cli import main  # noqa: E402
from cyflash.compat.transformers import Cache, capture, layers, register  # noqa: E402
from cyflash.quant import Calibrator, Scales  # noqa: E402

LAYERS = {
    "llama": "model.layers.{}.self_attn", "mistral": "model.layers.{}.self_attn",
    "gemma2": "model.layers.{}.self_attn", "gpt2": "transformer.h.{}.attn", "qwen2": "model.layers.{}.self_attn",
    "gpt_oss": "model.layers.{}.self_attn", "bert": "bert.encoder.layer.{}.attention.self",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(name, implementation="eager"):
    model = copy.deepcopy(made(name))
    model.set_attn_implementation(implementation)
    return model


def run(model, name, padding=None, passes=1, length=24):
    with torch.no_grad():
        for seed in range(passes):
            model(**inputs(name, padding, seed=seed, length=length))


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_named_as_in_the_model(name):
    model = fresh(name)
    with capture(model) as calibrator:
        run(model, name, "left")
    if name == "t5":
        expected = {f"{side}.block.{i}.layer.0.SelfAttention" for side in ("encoder", "decoder") for i in range(2)}
        expected |= {f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)}
    else:
        expected = {LAYERS[name].format(i) for i in range(2)}
    assert set(calibrator.layers) == expected <= set(dict(model.named_modules()))
    assert model.config._attn_implementation == "eager"


def test_what_is_seen_are_queries_keys_values_and_options():
    """As recorded beside the model, by hooks on its projections."""
    model, seen, projected = fresh("gpt2"), [], []

    class Watcher(Calibrator):
        def observe(self, name, q, k, v, **options):
            seen.append((name, *(x.copy() for x in (q, k, v)), options))

    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda _, inputs, output: projected.append(output))
    with capture(model, Watcher()):
        run(model, "gpt2", "left")
    for (name, *qkv, options), output, i in zip(seen, projected, range(2), strict=True):
        assert name == f"transformer.h.{i}.attn"
        for x, expected in zip(qkv, output.split(64, dim=2), strict=True):
            assert np.array_equal(x, expected.view(2, 24, 4, 16).transpose(1, 2).numpy())
        assert options.keys() == {"causal", "scale", "mask", "softcap"}
        assert options["causal"] and options["scale"] == 0.25
        assert np.array_equal(options["mask"][:, 0, 0], inputs("gpt2", "left")["attention_mask"].bool().numpy())


def test_windows_softcap_and_sinks_are_the_layers():
    for name in ("gemma2", "gpt_oss"):
        model = fresh(name)
        with capture(model) as calibrator:
            run(model, name, "left")
        first, second = (row["options"] for row in calibrator.summary())
        assert first["window"] == [WINDOW - 1, 0] and "window" not in second
        assert first["softcap"] == (1.5 if name == "gemma2" else 0)
        assert ("sinks" in first) is (name == "gpt_oss")


def test_calibrate_save_int8_is_three_lines(tmp_path):
    model, path = fresh("llama"), tmp_path / "scales.safetensors"
    arguments = inputs("llama", length=40)
    exact = logits(model, "cyflash", arguments)

    with torch.no_grad(), capture(model) as calibrator:
        for seed in range(4):
            model(**inputs("llama", seed=seed, length=40))
    calibrator.compute().save(path)
    register(model, int8=path)

    assert model.config._attn_implementation == "cyflash-int8"
    error = rms(logits(model, "cyflash-int8", arguments) - exact) / rms(exact)
    dynamic = rms(logits(made("llama"), "cyflash-int8", arguments) - exact) / rms(exact)
    assert 0.5 * dynamic < error < 4 * dynamic
    tables = [layer._cyflash_settings.how for layer in model.modules() if hasattr(layer, "_cyflash_settings")]
    assert tables[0] == Scales.load(path)


def test_a_file_that_the_command_line_calibrates(tmp_path, capsys):
    model, path, found = fresh("llama"), tmp_path / "calls.safetensors", tmp_path / "scales.safetensors"
    with capture(model, path) as there:
        run(model, "llama", passes=2, length=40)
    assert there == path
    captured = load_capture(path)
    assert list(captured) == [f"call{n}.model.layers.{i}.self_attn" for n in range(2) for i in range(2)]
    assert captured.options == {"causal": True, "scale": 0.25, "softcap": 0.0}
    assert main(["calibrate", str(path), "-o", str(found), "--rename", "call[0-9]+[.]="]) == 0
    assert list(Scales.load(found)) == [f"model.layers.{i}.self_attn" for i in range(2)]
    register(model, int8=found)
    logits(model, "cyflash-int8", inputs("llama"))


def test_a_file_of_bfloat16(tmp_path):
    model = fresh("llama").to(torch.bfloat16)
    with capture(model, tmp_path / "x.npz"):
        run(model, "llama")
    layer = load_capture(tmp_path / "x.npz")["call0.model.layers.0.self_attn"]
    assert layer.q.dtype == np.float32
    assert np.array_equal(layer.q.view(np.uint32) & 0xFFFF, np.zeros(layer.q.shape, np.uint32))


def test_what_a_file_cannot_hold(tmp_path):
    model = fresh("llama")
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn': a capture file holds no mask"), \
            capture(model, tmp_path / "x.npz"):
        run(model, "llama", "left")
    assert model.config._attn_implementation == "eager"
    model = fresh("gemma2")
    with pytest.raises(ValueError, match=r"expected the options of 'model.layers.0.self_attn'.*into a Calibrator"), \
            capture(model, tmp_path / "x.npz"):
        run(model, "gemma2")
    assert not list(tmp_path.iterdir())


def test_the_model_is_as_before():
    """Its implementation, those of nested models, and whether somebody watches; after an error as well."""
    model = fresh("t5", "sdpa")
    expected = logits(model, "sdpa", inputs("t5"))
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    with pytest.raises(ZeroDivisionError), capture(model):
        run(model, "t5")
        1 / 0  # noqa: B018
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == before
    assert np.array_equal(logits(model, "sdpa", inputs("t5")), expected)
    with capture(model) as calibrator:
        run(model, "t5")
    logits(model, "cyflash", inputs("t5"))  # no longer seen
    assert {row["observations"] for row in calibrator.summary()} == {2}


def test_exact_attention_within(monkeypatch):
    monkeypatch.setattr(layers, "default", {"pv": "fp32"})
    model = fresh("llama", "cyflash-int8")
    with torch.no_grad(), capture(model):
        found = model(**inputs("llama")).logits.double().flatten(0, 1).numpy()
    assert abs(found - in_float64("llama", "eager", inputs("llama"))).max() < 1e-5
    assert model.config._attn_implementation == "cyflash-int8"
    assert layers.default == {"pv": "fp32"}  # what `register` said still counts


def test_nothing_was_called():
    with pytest.raises(RuntimeError, match="model: no layer of LlamaForCausalLM was called"), capture(fresh("llama")):
        pass


def test_a_cache_keeps_no_floats():
    model = fresh("llama")
    with pytest.raises(NotImplementedError, match="past_key_values: capture sees keys and values"), capture(model):
        model(**inputs("llama"), past_key_values=Cache(model, 64))


def test_steps_of_generate_are_seen():
    model = fresh("llama")
    with capture(model) as calibrator:
        model.generate(inputs("llama")["input_ids"], max_new_tokens=3, do_sample=False)
    assert {row["observations"] for row in calibrator.summary()} == {2 * 3}


def test_another_calibrator():
    own = Calibrator("head")
    model = fresh("llama")
    with capture(model, own) as found:
        run(model, "llama")
    assert found is own and len(own.layers) == 2
    assert own.compute("max")["model.layers.0.self_attn"].k_scale.shape == (2, 1, 1)
    assert cyflash.quant.Calibrator is Calibrator
