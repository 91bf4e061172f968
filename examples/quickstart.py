"""Attention for NumPy arrays: one head, several heads, grouped heads, in fp32 and in int8, and how exact each is."""

import numpy as np

import cyflash
from cyflash import FlashAttention, FlashAttentionConfig, quant

rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


# One head, (L, D); several heads of a batch, (B, H, L, D), with any strides; grouped heads (8 of q read 2 of k and v).
q, k, v = normal(100, 64), normal(300, 64), normal(300, 64)
out, lse = cyflash.flash_attention(q, k, v, return_lse=True)
print(f"one head:      {out.shape}, log-sum-exp {lse.shape}")
x = normal(2, 512, 8, 64).transpose(0, 2, 1, 3)
print(f"several heads: {cyflash.flash_attention(x, x, x).shape}")
q, k, v = normal(8, 512, 64), normal(2, 512, 64), normal(2, 512, 64)
exact = cyflash.reference.attention(q, k, v, causal=True, window=(127, 0))
print(f"fp32:          {quant.compare(cyflash.flash_attention(q, k, v, causal=True, window=(127, 0)), exact)}")

# int8: from float arrays, or from arrays that were quantised before, which take a quarter of the memory.
out = cyflash.flash_attention_int8(q, k, v, causal=True, window=(127, 0))
print(f"int8:          {quant.compare(out, exact)}")
k8, v8 = quant.quantize(k, "token", smooth=True), quant.quantize(v, "token")
assert np.array_equal(cyflash.flash_attention_int8(q, k8, v8, causal=True, window=(127, 0)), out)
print(f"memory:        {k8.nbytes + v8.nbytes} bytes for K and V, {k.nbytes + v.nbytes} in fp32")
for row in quant.evaluate(q, k, v, causal=True):
    print(f"{row['scheme']:20} relative L1 {row['rel_l1']:.1e}, {row['speedup']:5.2f} x as fast as NumPy")

# The same through the engine, which also says what the call took.
engine = FlashAttention(FlashAttentionConfig.auto(head_dim=64, num_heads=8).with_causal(True))
result = engine.forward_multi_head(q, k, v)
print(f"engine:        {result.flops / 1e6:.0f} MFLOP, SIMD build {result.implementation}")
print(f"memory:        {engine.memory_savings(8192)}")
