"""examples/generate.py and examples/llama.py: the model is a Llama, and what the example says of caches is true."""

import json
import types

import generate
import llama
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import rel_entr, softmax

import cyflash

SMALL = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocabulary": 256}


@pytest.fixture(autouse=True)
def default_threads():
    """The example sets the number of threads of its process, which here is everyone's."""
    yield
    cyflash.set_num_threads(None)


@pytest.fixture(scope="module")
def small():
    return llama.seeded(**SMALL)


def prompt_of(model, length, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length)


def logits_of(model, ids):
    return model.logits(model.hidden(ids, generate.causal))


# The seeded model: what its attention does can be seen in what it says.


@pytest.mark.parametrize("seed", range(3))
def test_attention_decides_the_logits(seed):
    model = llama.seeded(seed=seed)
    without, one_less = generate.decided_by_attention(model, prompt_of(model, 256, seed))
    assert without > 0.95
    assert one_less > 0.9


def test_seeds_make_models(small):
    again, other = llama.seeded(**SMALL), llama.seeded(**SMALL, seed=1)
    for name, weight in small.weights.items():
        assert np.array_equal(weight, again.weights[name])
        assert np.array_equal(weight, other.weights[name]) == (weight.ndim == 1)


# Caches.


def test_fp32_generates_what_recomputing_every_id_gives(small):
    prompt = prompt_of(small, 16)
    text, run = generate.generate(small, prompt, 256, "fp32")
    expected = list(prompt)
    for _ in range(256):
        expected.append(logits_of(small, np.array(expected))[-1].argmax())
    assert text.tolist() == expected
    assert generate.verdict(quiet(), run, generate.recompute(small, text, 16)) == 0
    assert len(set(text[16:])) > 64  # no short cycle


@pytest.mark.parametrize(("dtype", "least", "ratio"), [("fp16", 0.97, 1.9), ("bf16", 0.9, 1.9), ("int8", 0.85, 3.0)])
def test_smaller_caches_say_nearly_the_same(small, dtype, least, ratio):
    if dtype == "bf16":
        pytest.importorskip("ml_dtypes")
    text, exact = generate.generate(small, prompt_of(small, 64), 128, "fp32")
    before = text.copy()
    run = generate.follow(small, text, 64, dtype)
    assert np.array_equal(text, before)
    reference = generate.recompute(small, text, 64)
    assert generate.agreement(run.logits, reference).mean() > least
    assert generate.divergences(exact.logits, reference).max() < 1e-8
    assert 1e-8 < generate.divergences(run.logits, reference).mean() < 0.01
    assert exact.nbytes > ratio * run.nbytes


def test_any_cache_may_come_first(small):
    text, run = generate.generate(small, prompt_of(small, 32), 32, "int8")
    assert np.array_equal(run.logits.argmax(axis=-1), text[32:])
    assert np.array_equal(generate.follow(small, text, 32, "int8").logits, run.logits)


def test_another_id_than_recomputed_fails(small, capsys):
    text, run = generate.generate(small, prompt_of(small, 8), 16, "fp32")
    reference = generate.recompute(small, text, 8)
    wrong = reference.copy()
    wrong[5, reference[5].argmin()] = reference[5].max() + 1
    assert generate.verdict(generate.Console(), run._replace(logits=wrong), reference) == 1
    assert "id 5 of 16 is not the one" in capsys.readouterr().out
    assert generate.verdict(quiet(), run._replace(dtype="int8", logits=wrong), reference) == 0


def quiet():
    return types.SimpleNamespace(print=lambda *args, **options: None)


def test_nan_agrees_with_nothing():
    logits = np.array([[1, 2], [2, 1], [np.nan, 1]], np.float32)
    assert generate.agreement(logits, np.array([[1, 2], [1, 2], [np.nan, 1]])).tolist() == [True, False, False]


def test_divergence_is_kullback_leibler():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((5, 40)) for _ in range(2))
    expected = rel_entr(softmax(b, axis=-1), softmax(a, axis=-1)).sum(axis=-1)
    np.testing.assert_allclose(generate.divergences(a, b), expected, rtol=1e-12)


# Folders. These files are made here; the next section has transformers' own.


def config_of(model):
    sizes = {name: getattr(model.config, name) for name in (*llama.SIZES, "num_key_value_heads", "head_dim")}
    return {"model_type": "llama", "rope_theta": 500000.0} | sizes


def save(folder, model, weights=None, **entries):
    (folder / "config.json").write_text(json.dumps(config_of(model) | entries))
    save_file(weights or model.weights, folder / "model.safetensors")


def test_a_folder_is_the_model(small, tmp_path):
    ids = prompt_of(small, 40)
    save(tmp_path, small)
    assert np.array_equal(logits_of(llama.load(tmp_path), ids), logits_of(small, ids))

    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(weights)
    where = {name: f"part{names.index(name) % 3}.safetensors" for name in names}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert np.array_equal(logits_of(llama.load(tmp_path), ids), logits_of(small, ids))
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part1.safetensors: no such file"):
        llama.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(small, tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    half = {name: torch.from_numpy(weight).to(getattr(torch, dtype)) for name, weight in small.weights.items()}
    save(tmp_path, small)
    save_torch(half, tmp_path / "model.safetensors")
    found = llama.load(tmp_path).weights
    for name, weight in half.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], weight.float().numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: expected 'llama', got 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type: expected one of .*, got 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no low_freq_factor, high_freq_factor, original"),
        ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads"),
        ({"head_dim": 31}, "head_dim to be even"),
        ({"vocab_size": 255}, r"embed_tokens.weight: expected \(255, 128\) by config.json, got \(256, 128\)"),
        ({"attention_bias": True}, "no model.layers.0.self_attn.q_proj.bias"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is no part of a Llama with this"),
    ],
)
def test_what_is_not_computed_is_refused(small, tmp_path, change, message):
    save(tmp_path, small, **change)
    with pytest.raises(ValueError, match=message):
        llama.load(tmp_path)


def test_what_cannot_be_read_is_refused(small, tmp_path):
    save(tmp_path, small, {**small.weights, "model.layers.0.self_attn.q_norm.weight": np.ones(32, np.float32)})
    with pytest.raises(ValueError, match=r"q_norm.weight is no part of a Llama"):
        llama.load(tmp_path)
    save(tmp_path, small, {**small.weights, "lm_head.weight": np.ones(32, np.int8)})
    with pytest.raises(ValueError, match=r"lm_head.weight: expected F32, F16 or BF16, got I8"):
        llama.load(tmp_path)
    save(tmp_path, small)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable"):
        llama.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a JSON file"):
        llama.load(tmp_path)


# transformers' Llama.

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 500000.0}
CASES = {
    "plain": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama3": {
        "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "linear": {
        "num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_are_those_of_transformers(tmp_path, case, dtype):
    """As near to transformers in float64 as transformers in float32 is: RMS within 2 x, the largest within 4 x."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, rms_norm_eps=1e-5, **CASES[case],
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones until now
                weight.add_(torch.randn_like(weight) * 0.3)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="60KB" if case == "llama3" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (case == "llama3")

    ids = np.random.default_rng(0).integers(0, 96, 200)
    with torch.no_grad():
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        single = theirs(torch.from_numpy(ids)[None]).logits[0].numpy()
        exact = theirs.double()(torch.from_numpy(ids)[None]).logits[0].numpy()
    own, allowed = logits_of(llama.load(tmp_path), ids) - exact, single - exact
    assert exact.std() > 1
    assert 1e-7 < rms(allowed) < 1e-5
    assert rms(own) < 2 * rms(allowed)
    assert np.abs(own).max() < 4 * np.abs(allowed).max()

    old_form(tmp_path / "config.json")
    assert np.array_equal(logits_of(llama.load(tmp_path), ids) - exact, own)


def rms(x):
    return np.sqrt(np.square(x).mean())


def old_form(path):
    """config.json as before transformers 5: rope_theta beside rope_scaling, which is null or has no rope_theta."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(config))


# The command.


def test_errors_are_one_line(capsys):
    for arguments, message in (
        (["--ids", "1024"], "--ids: expected ids from 0 to 1023, got 1024"),
        (["--kv-heads", "3"], "config.json: expected num_attention_heads to be a multiple"),
        (["--model", "nowhere"], "nowhere"),
    ):
        assert generate.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    with pytest.raises(SystemExit):
        generate.main(["--model", "nowhere", "--layers", "3"])
    assert "--layers: a model from a folder has its own" in capsys.readouterr().err


def test_a_folder_generates(small, tmp_path, capsys):
    save(tmp_path, small)
    assert generate.main(["--model", str(tmp_path), "--ids", "7", "1", "200", "--tokens", "4"]) == 0
    out = capsys.readouterr().out
    text, _ = generate.generate(small, np.array([7, 1, 200]), 4, "fp32")
    assert f"3 ids in; out: {' '.join(map(str, text[3:]))}" in out
    assert "attention decides" not in out


@pytest.mark.parametrize(("arguments", "expected"), [([], 1), (["--threads", "2"], 2)])
def test_threads_are_those_asked_for(capsys, arguments, expected):
    assert generate.main(["--tokens", "2", "--prompt-length", "4", "--layers", "1", *arguments]) == 0
    assert cyflash.cpu_info()["threads"] == expected
    assert f"threads: {expected}" in capsys.readouterr().out
