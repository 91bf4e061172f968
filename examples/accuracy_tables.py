"""The tables of docs/accuracy.md, in Markdown: how far each kind of call is from attention in float64.

    python examples/accuracy_tables.py

Errors are relative L1, sum|O - O'| / sum|O|. Real activations are those in examples/data, the mean over its layers;
fixtures are cyflash.quant.fixtures with Lq = 128, Lk = 2048, D = 64, the mean over four draws. Nothing is timed. Digits
beyond those shown depend on the SIMD build, as the order of sums does.
"""

import statistics
from pathlib import Path

import numpy as np

import cyflash
from cyflash.capture import load_capture
from cyflash.plain import plain_attention
from cyflash.quant import compare, fixtures

DATA = Path(__file__).parent / "data" / "minilm.safetensors"
FIXTURES = ("normal", "student_t", "fa3_outlier", "k_channel_bias", "sink9", "peaky", "llm_like")
INT8 = {
    "per tensor, K with its mean": {"granularity": "tensor", "smooth_k": False},
    "per tensor": {"granularity": "tensor"},
    "per head": {"granularity": "head"},
    "per token (default)": {},
    "4 keys in fp32": {"fp32_sinks": 4},
    'pv="bf16"': {"pv": "bf16"},
    'pv="fp32"': {"pv": "fp32"},
}


def main():
    layers = [tuple(layer) for layer in load_capture(DATA).values()]
    drawn = {name: [fixtures.draw(name, seed) for seed in range(4)] for name in FIXTURES}
    data = {"activations": layers} | drawn
    table("float arrays", exact_calls(), {name: data[name] for name in ("activations", "normal", "llm_like")})
    table("int8", {label: call(cyflash.flash_attention_int8, **options) for label, options in INT8.items()}, data)
    table("caches", {dtype: to_cache(dtype) for dtype in ("fp32", "fp16", "bf16", "int8")}, data)


def table(title, calls, data):
    """A row for each call, a column for each kind of data."""
    print(f"| {title} | {' | '.join(data)} |")
    print(f"|---|{'---|' * len(data)}")
    exact = {name: [cyflash.reference.attention(*qkv) for qkv in draws] for name, draws in data.items()}
    for label, attend in calls.items():
        cells = []
        for name, draws in data.items():
            errors = [compare(attend(*qkv), out).rel_l1 for qkv, out in zip(draws, exact[name], strict=True)]
            cells.append(f"{statistics.mean(errors):.1e}")
        print(f"| {label} | {' | '.join(cells)} |")
    print()


def exact_calls():
    calls = {"plain NumPy, fp32": plain_attention, "fp32": cyflash.flash_attention}
    calls["fp16"] = lambda *qkv: cyflash.flash_attention(*(x.astype(np.float16) for x in qkv)).astype(np.float32)
    return calls


def call(function, **options):
    return lambda q, k, v: function(q, k, v, **options)


def to_cache(dtype):
    """Attention of all queries to a cache of this dtype, a batch of one."""

    def attend(q, k, v):
        q, k, v = (x.reshape(1, *x.shape[-3:]) for x in (q, k, v))
        cache = cyflash.KVCache(1, k.shape[1], k.shape[3], k.shape[2], dtype)
        return cyflash.flash_attention_with_kvcache(q, cache, k, v, causal=False)

    return lambda q, k, v: attend(q, k, v).reshape(q.shape)


if __name__ == "__main__":
    main()
