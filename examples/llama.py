"""A Llama in plain NumPy: a decoder-only transformer whose attention is left to a function of the caller.

    model = load("folder")                       # config.json and .safetensors files, float32, float16 or bfloat16
    model = seeded(layers=4, heads=8)            # or random weights such that attention decides the logits
    hidden = model.hidden(ids, lambda layer, q, k, v: cyflash.flash_attention(q, k, v, causal=True))
    logits = model.logits(hidden)                # (L, vocab_size)

One sequence at a time, everything in float32. What a config asks for and this model does not compute is a ValueError.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import safetensors
from scipy.special import expit

ROPE = {  # kinds of rotary embedding, and what each reads from the config
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class Llama:
    """config: the contents of config.json; weights: {name: float32 array}, named as in the .safetensors files."""

    def __init__(self, config, weights):
        self.config = checked(config)
        self.weights = complete(weights, self.config)
        self.frequencies = rotary_frequencies(self.config)

    def hidden(self, ids, attend, start=0):
        """(L, hidden_size): what the layers make of ids (L,), which stand at positions start, start + 1, ...

        attend(layer, q, k, v) -> (1, H, L, D): causal attention of q (1, H, L, D) to all keys from position 0 on, of
        which k and v (1, Hk, L, D) are the last.
        """
        angles = np.arange(start, start + len(ids), dtype=np.float32)[:, None] * self.frequencies
        turn = np.cos(angles), np.sin(angles)
        x = self.weights["model.embed_tokens.weight"][ids]
        for n in range(self.config.num_hidden_layers):
            layer = f"model.layers.{n}"
            x = x + self._attention(n, self._norm(x, f"{layer}.input_layernorm"), turn, attend)
            x = x + self._mlp(n, self._norm(x, f"{layer}.post_attention_layernorm"))
        return self._norm(x, "model.norm")

    def logits(self, hidden):
        """(..., vocab_size) for hidden (..., hidden_size)."""
        tied = self.config.tie_word_embeddings
        return self._linear(hidden, "model.embed_tokens" if tied else "lm_head")

    def _attention(self, n, x, turn, attend):
        layer = f"model.layers.{n}.self_attn"
        q, k, v = (self._heads(self._linear(x, f"{layer}.{part}_proj")) for part in "qkv")
        out = attend(n, rotated(q, *turn), rotated(k, *turn), v)
        return self._linear(out[0].swapaxes(0, 1).reshape(len(x), -1), f"{layer}.o_proj")

    def _mlp(self, n, x):
        layer = f"model.layers.{n}.mlp"
        gate, up = self._linear(x, f"{layer}.gate_proj"), self._linear(x, f"{layer}.up_proj")
        return self._linear(gate * expit(gate) * up, f"{layer}.down_proj")

    def _linear(self, x, name):
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _norm(self, x, name):
        mean_square = np.square(x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + np.float32(self.config.rms_norm_eps)) * self.weights[f"{name}.weight"]

    def _heads(self, x):
        """(L, heads * D) seen as (1, heads, L, D)."""
        return x.reshape(1, len(x), -1, self.config.head_dim).swapaxes(1, 2)


def rotated(x, cos, sin):
    """Rotary embedding: x[..., i] and x[..., i + D / 2] turn by one angle. x (1, H, L, D); cos, sin (L, D / 2)."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def rotary_frequencies(config):
    """(D / 2,) float32: the angle from one position to the next, of each pair of dimensions."""
    rope, D = config.rope, config.head_dim
    frequencies = 1 / np.float32(rope["rope_theta"]) ** (np.arange(0, D, 2, dtype=np.float32) / np.float32(D))
    if rope["rope_type"] == "linear":
        return frequencies / np.float32(rope["factor"])
    if rope["rope_type"] == "llama3":  # slow turns are slowed down further, fast ones are kept, a ramp between them
        turns = frequencies * rope["original_max_position_embeddings"] / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return (frequencies * (kept + (1 - kept) / rope["factor"])).astype(np.float32)
    return frequencies


def checked(config):
    """The entries of config.json that matter, with Llama's defaults."""
    get = config.get
    for name, expected in (("model_type", "llama"), ("hidden_act", "silu")):
        if get(name, expected) != expected:
            raise ValueError(f"config.json: {name}: expected {expected!r}, got {get(name)!r}")
    scaling = get("rope_parameters") or get("rope_scaling") or {}  # newer files, older files
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE:
        raise ValueError(f"config.json: rope_type: expected one of {', '.join(ROPE)}, got {kind!r}")
    missing = [name for name in SIZES if name not in config] + [name for name in ROPE[kind] if name not in scaling]
    if missing:
        raise ValueError(f"config.json: no {', '.join(missing)}")
    H = config["num_attention_heads"]
    Hk, D = get("num_key_value_heads") or H, get("head_dim") or config["hidden_size"] // H
    if H % Hk or D % 2:
        raise ValueError(
            "config.json: expected num_attention_heads to be a multiple of num_key_value_heads and head_dim to be "
            f"even, got {H}, {Hk} and {D}"
        )
    return SimpleNamespace(
        **{name: config[name] for name in SIZES},
        num_key_value_heads=Hk,
        head_dim=D,
        rms_norm_eps=get("rms_norm_eps", 1e-6),
        tie_word_embeddings=get("tie_word_embeddings", False),
        attention_bias=get("attention_bias", False),
        mlp_bias=get("mlp_bias", False),
        rope={"rope_theta": get("rope_theta", 10000.0)} | scaling | {"rope_type": kind},
    )


def shapes(config):
    """{name: shape} of all weights."""
    width, inner = config.hidden_size, config.intermediate_size
    H, Hk = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    found = {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, width)
    matrices = {
        "self_attn": {"q_proj": (H, width), "k_proj": (Hk, width), "v_proj": (Hk, width), "o_proj": (width, H)},
        "mlp": {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)},
    }
    biased = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        found |= {f"{layer}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        for part in matrices:
            found |= {f"{layer}.{part}.{name}.weight": shape for name, shape in matrices[part].items()}
            if biased[part]:
                found |= {f"{layer}.{part}.{name}.bias": shape[:1] for name, shape in matrices[part].items()}
    return found


def complete(weights, config):
    """The weights that the config asks for; ValueError where one is missing, has another shape, or would be ignored."""
    expected = shapes(config)
    for name, shape in expected.items():
        if name not in weights:
            raise ValueError(f"weights: no {name} in the files")
        if weights[name].shape != shape:
            raise ValueError(f"weights: {name}: expected {shape} by config.json, got {weights[name].shape}")
    repeated = ("rotary_emb.inv_freq", "lm_head.weight")  # what the config says too, in old files and in tied ones
    if odd := [name for name in weights if name not in expected and not name.endswith(repeated)]:
        raise ValueError(f"weights: {odd[0]} is no part of a Llama with this config.json")
    return {name: weights[name] for name in expected}


def load(folder):
    """The model in a folder: config.json and model.safetensors, or several files and model.safetensors.index.json."""
    config = parsed(Path(folder, "config.json"))
    index = Path(folder, "model.safetensors.index.json")
    files = set(parsed(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    weights = {}
    for name in sorted(files):
        weights |= read(Path(folder, name))
    return Llama(config, weights)


def parsed(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


def read(path):
    """{name: float32 array} of a .safetensors file; float16 and bfloat16 are widened, which is exact."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            if odd := [name for name, kind in kinds.items() if kind not in ("F32", "F16", "BF16")]:
                raise ValueError(f"{path}: {odd[0]}: expected F32, F16 or BF16, got {kinds[odd[0]]}")
            if "BF16" in kinds.values():
                name_bfloat16(path)
            return {name: file.get_tensor(name).astype(np.float32, copy=False) for name in kinds}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a readable .safetensors file: {error}") from None


def name_bfloat16(path):
    try:
        import ml_dtypes  # noqa: F401  NumPy knows the dtype from then on
    except ImportError:
        raise ImportError(f"{path}: bfloat16 needs ml_dtypes; install it with: pip install ml_dtypes") from None


def seeded(layers=4, heads=8, kv_heads=4, head_dim=64, vocabulary=1024, seed=0):
    """Random weights such that attention decides the logits: without it, or with one key less, other tokens follow.

    Embeddings are small beside what attention adds to them. Scores spread widely, so that a head looks at few tokens;
    the first head of each group asks with its key, and so looks at its own token as well.
    """
    rng = np.random.default_rng(seed)
    width = heads * head_dim
    config = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "rope_theta": 500000.0,
    }  # fmt: skip
    gains = {"q_proj": 2.0, "k_proj": 1.5, "lm_head": 3.0}
    weights = {}
    for name, shape in shapes(checked(config)).items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
        else:
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            weights[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(gain / math.sqrt(shape[1]))
    for n in range(layers):
        q, k = (weights[f"model.layers.{n}.self_attn.{part}_proj.weight"] for part in "qk")
        groups = q.reshape(kv_heads, -1, head_dim, width)
        groups[:, 0] = k.reshape(kv_heads, head_dim, width) / 2
    return Llama(config, weights)
