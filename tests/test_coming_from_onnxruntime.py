"""docs/coming-from.md on ONNX Runtime: each attribute and input that it names, run there and beside it here."""

import numpy as np
import pytest

import cyflash

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

B, L, H, Hk, D = 2, 6, 4, 2, 8
TOLERANCE = 2e-6  # scores of some units, in float32
INPUTS = {
    "MultiHeadAttention": ["query", "key", "value", "bias", "key_padding_mask", "attention_bias"],
    "GroupQueryAttention": [
        "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length",
        "cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink",
    ],
    "Attention": ["Q", "K", "V", "attn_mask", "past_key", "past_value"],
}  # fmt: skip


def theirs(operator, arrays, **attributes):
    """The first output of one node, whose inputs are named arrays."""
    names = [name if name in arrays else "" for name in INPUTS[operator]]
    while not names[-1]:
        del names[-1]
    outputs = ["out", "present_key", "present_value"][: 3 if "past_key" in arrays or operator[0] == "G" else 1]
    domain = "" if operator == "Attention" else "com.microsoft"
    node = onnx.helper.make_node(operator, names, outputs, domain=domain, **attributes)
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in arrays.items()
    ]
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", infos, [out]), opset_imports=opsets, ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["out"], arrays)[0]


def split(x, heads):
    """(B, L, heads * D) -> (B, heads, L, D), a view."""
    return x.reshape(B, -1, heads, D).swapaxes(1, 2)


def joined(out):
    return out.swapaxes(1, 2).reshape(B, -1, H * D)


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


Q, K, V = random(B, L, H * D), random(B, L + 1, H * D)[:, 1:].copy(), random(B, L + 2, H * D)[:, 2:].copy()
SCORES = random(1, 1, L, L)
PADDING = np.ones((B, L), np.int32)
PADDING[1, 3:] = 0
KEEPS = PADDING[:, None, None, :] != 0
SINKS = random(H)


def check(got, expected):
    assert np.abs(got - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("arrays", "attributes", "options"),
    [
        ({}, {}, {}),
        ({}, {"unidirectional": 1}, {"causal": True}),
        ({}, {"scale": 0.7}, {"scale": 0.7}),
        ({"key_padding_mask": PADDING}, {}, {"mask": KEEPS}),
        ({"key_padding_mask": np.array([6, 3], np.int32)}, {}, {"mask": KEEPS}),
        ({"attention_bias": SCORES}, {}, {"bias": SCORES}),
        ({"attention_bias": SCORES, "key_padding_mask": PADDING}, {}, {"bias": SCORES, "mask": KEEPS}),
        ({"attention_bias": SCORES}, {"unidirectional": 1}, {"bias": SCORES, "causal": True}),
    ],
)
def test_multi_head_attention(arrays, attributes, options):
    got = theirs("MultiHeadAttention", {"query": Q, "key": K, "value": V} | arrays, num_heads=H, **attributes)
    check(got, joined(cyflash.flash_attention(*(split(x, H) for x in (Q, K, V)), **options)))


def test_the_bias_of_multi_head_attention_is_that_of_the_projections():
    bias = random(3 * H * D)
    got = theirs("MultiHeadAttention", {"query": Q, "key": K, "value": V, "bias": bias}, num_heads=H)
    added = (x + part for x, part in zip((Q, K, V), np.split(bias, 3), strict=True))
    check(got, joined(cyflash.flash_attention(*(split(x, H) for x in added))))


@pytest.mark.parametrize(
    ("arrays", "attributes", "options"),
    [
        ({}, {}, {"causal": True}),
        ({}, {"causal": 0}, {}),
        ({}, {"scale": 0.7}, {"causal": True, "scale": 0.7}),
        ({}, {"local_window_size": 3}, {"window": (2, 0)}),
        ({"attention_bias": SCORES}, {"softcap": 2.0}, {"causal": True, "bias": SCORES, "softcap": 2.0}),
        ({"head_sink": SINKS}, {}, {"causal": True, "sinks": SINKS}),
        ({}, {"smooth_softmax": 1}, {"causal": True, "sinks": np.zeros(H, np.float32)}),
    ],
)
def test_group_query_attention(arrays, attributes, options):
    k, v = K[..., : Hk * D].copy(), V[..., : Hk * D].copy()
    lengths = {"seqlens_k": np.full(B, L - 1, np.int32), "total_sequence_length": np.array(L, np.int32)}
    arrays = {"query": Q, "key": k, "value": v} | lengths | arrays
    got = theirs("GroupQueryAttention", arrays, num_heads=H, kv_num_heads=Hk, **attributes)
    check(got, joined(cyflash.flash_attention(split(Q, H), split(k, Hk), split(v, Hk), **options)))


def test_group_query_attention_with_a_past():
    k, v = K[..., : Hk * D].copy(), V[..., : Hk * D].copy()
    past = {"past_key": random(B, Hk, 5, D), "past_value": random(B, Hk, 5, D)}
    lengths = {"seqlens_k": np.full(B, 5, np.int32), "total_sequence_length": np.array(6, np.int32)}
    one = {"query": Q[:, :1].copy(), "key": k[:, :1].copy(), "value": v[:, :1].copy()}
    got = theirs("GroupQueryAttention", one | past | lengths, num_heads=H, kv_num_heads=Hk)
    cache = cyflash.KVCache(B, Hk, D, 8)
    cache.append(*past.values())
    q, k, v = split(one["query"], H), split(one["key"], Hk), split(one["value"], Hk)
    check(got, joined(cyflash.flash_attention_with_kvcache(q, cache, k, v)))


@pytest.mark.parametrize(
    ("arrays", "attributes", "options"),
    [
        ({}, {"is_causal": 1}, {"causal": True, "causal_align": "top-left"}),
        ({}, {"scale": 0.7}, {"scale": 0.7}),
        ({"attn_mask": SCORES[..., :4]}, {"softcap": 2.0}, {"bias": SCORES[..., :4], "softcap": 2.0}),
        ({"attn_mask": SCORES[0, 0, :, :4] > 0}, {}, {"mask": SCORES[0, 0, :, :4] > 0}),
    ],
)
def test_attention(arrays, attributes, options):
    """Lq is 6 and Lk is 4."""
    q, k, v = split(Q, H).copy(), split(K, H)[:, :Hk, :4].copy(), split(V, H)[:, :Hk, :4].copy()
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    got = theirs("Attention", {"Q": q, "K": k, "V": v} | arrays, **attributes)
    check(got, cyflash.flash_attention(q, k, v, **options))


def test_attention_with_a_past():
    q, k, v = (np.ascontiguousarray(split(x, H)[:, :, :2]) for x in (Q, K, V))
    past_k, past_v = random(B, H, 3, D), random(B, H, 4, D)[:, :, 1:].copy()
    arrays = {"Q": q, "K": k, "V": v, "past_key": past_k, "past_value": past_v}
    every = np.concatenate([past_k, k], 2), np.concatenate([past_v, v], 2)
    check(theirs("Attention", arrays, is_causal=1), cyflash.flash_attention(q, *every, causal=True))
