"""cyflash: FlashAttention for people who hold arrays.

    flash_attention(q, k, v, ...)                 FlashAttention(config).forward(q, k, v, ...)
              |                                                 |
       attention.py  <---------------------------------  config.py
         |   validates, plans (plan.py), allocates, routes      tile sizes, the engine and what it reports
         |   arrays.py: views of the caller's memory
         |   operands.py: what flash_attention_int8 is given, as codes (quantized.py)
         |   parts.py: heads of a layer that differ, each part a call of its own
         |   stored.py: keys and values as the kernels read them, in pages
         v
       cpu/          picks a SIMD build and a number of threads
         driver.pxi    cuts the call into tasks under prange
         kernel.pxi    the algorithm, written once in the words of simd/*.h
       gpu/          for arrays that live on a GPU: quantises, picks a kernel, compiles and launches it with CuPy

    foreign.py       arrays of torch, JAX and others: seen by NumPy on the way in, of their library on the way out
    varlen.py        sequences of unlike lengths, one after another in one array
    kvcache.py       keys and values of earlier tokens, and flash_attention_with_kvcache: pool.py (pages and rows),
                     storing.py (floats or codes in them), cachefile.py
    reference.py     the specification: float64 attention in plain NumPy; reference_int8.py: int8, code by code
    sdpa.py          the signature and semantics of torch's scaled_dot_product_attention
    compat/          the functions of other libraries (flash_attn, torch), imported by who wants them
    merge.py         attention over keys in parts, put together
    schemes.py       what compare and evaluate measure
    flops.py         what a call counts as work
    plain.py         attention in plain NumPy float32, to compare with
    capture.py       Q, K, V in .npz and .safetensors files
    measure.py       time and memory of a call, in a fresh process
    quant/           cyflash.quant: accuracy metrics, int8 arrays with their scales
    cli.py           the command `cyflash`: compare.py and comparison.py, calibrate.py with observing.py, check.py,
                     report.py, bench/, info.py; inputs.py and output.py are common to them
"""
from cyflash import reference
from cyflash.attention import flash_attention, flash_attention_int8
from cyflash.config import FlashAttention, FlashAttentionConfig, FlashAttentionOutput, MemorySavings
from cyflash.cpu import cpu_info, set_implementation
from cyflash.cpu.threads import set_num_threads
from cyflash.gpu.status import GPUUnavailableError, gpu_status
from cyflash.kvcache import KVCache, PagedKVCache, flash_attention_with_kvcache
from cyflash.merge import merge_states
from cyflash.quantized import LayerScales, QuantizedTensor, quantize
from cyflash.sdpa import scaled_dot_product_attention
from cyflash.varlen import flash_attention_int8_varlen, flash_attention_varlen

__version__ = "0.1.0"

__all__ = [
    "FlashAttention",
    "FlashAttentionConfig",
    "FlashAttentionOutput",
    "GPUUnavailableError",
    "KVCache",
    "LayerScales",
    "MemorySavings",
    "PagedKVCache",
    "QuantizedTensor",
    "cpu_info",
    "flash_attention",
    "flash_attention_int8",
    "flash_attention_int8_varlen",
    "flash_attention_varlen",
    "flash_attention_with_kvcache",
    "gpu_status",
    "merge_states",
    "quantize",
    "reference",
    "scaled_dot_product_attention",
    "set_implementation",
    "set_num_threads",
]
