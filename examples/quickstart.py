"""Attention for NumPy arrays: one head, several heads, grouped heads with causal, and the memory that tiles save."""

import numpy as np

import cyflash
from cyflash import FlashAttention, FlashAttentionConfig

rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


# One head: (L, D). The options of flash_attention are those of the attention literature; all of them combine.
q, k, v = normal(100, 64), normal(300, 64), normal(300, 64)
out, lse = cyflash.flash_attention(q, k, v, return_lse=True)
error = np.abs(out - cyflash.reference.attention(q, k, v)).max()
print(f"one head:       {out.shape}, log-sum-exp {lse.shape}, largest error against float64 {error:.1e}")

# Several heads of a batch: (B, H, L, D). Any strides do, without a copy: this one is a transposed view.
x = normal(2, 512, 8, 64).transpose(0, 2, 1, 3)
print(f"several heads:  {cyflash.flash_attention(x, x, x).shape}")

# Grouped heads (8 of q read 2 of k and v), causal, each token seeing itself and the 127 before it.
q, k, v = normal(8, 512, 64), normal(2, 512, 64), normal(2, 512, 64)
print(f"grouped heads:  {cyflash.flash_attention(q, k, v, causal=True, window=(127, 0)).shape}")

# The same through the engine, which also says what the call took.
engine = FlashAttention(FlashAttentionConfig.auto(head_dim=64, num_heads=8, seq_len=512).with_causal(True))
result = engine.forward_multi_head(q, k, v)
print(f"engine:         {result.flops / 1e6:.0f} MFLOP in tiles of {result.block_size_q} x {result.block_size_kv}")
print(f"                {result.peak_tile_bytes / 1024:.0f} KB per thread, SIMD build {result.implementation}")
for seq_len in (2048, 8192, 32768):
    print(f"memory:         {engine.memory_savings(seq_len)}")
