"""Who is asked on the GPU: functions that take a case's arrays and return a call to time, or raise Absent.

All calls of a race are queued on one stream and timed by events on it, so host time counts only where the GPU waits.
"""
import importlib.util
from dataclasses import dataclass
from functools import partial

import numpy as np

import cyflash


class Absent(Exception):
    """Why a system takes no part in a case."""


@dataclass(frozen=True)
class GPUCase:
    """kind: "fp32", "fp16", "bf16", or of codes "int8" (both products) and "int8 qk" (the second one in 16 bits)."""

    kind: str
    B: int
    H: int
    Hk: int
    Lq: int
    Lk: int
    D: int
    causal: bool = False
    quantise: bool = False  # int8: the time of quantising is part of the call

    def title(self):
        heads = f"{self.H}/{self.Hk}" if self.grouped else f"{self.H}"
        length = f"{self.Lk}" if self.Lq == self.Lk else f"{self.Lq} x {self.Lk}"
        quantise, causal = ", with quantising" * self.quantise, ", causal" * self.causal
        return f"{self.kind}{quantise}{causal}: {self.B} x {heads} heads, {length}, D={self.D}"

    @property
    def grouped(self):
        return self.Hk < self.H

    def flops(self):
        pairs = cyflash.flops.visible_pairs(self.Lq, self.Lk, causal=self.causal)
        return 4 * self.B * self.H * pairs * self.D

    def elements(self):
        """Of keys and values, which few rows of queries wait for."""
        return 2 * self.B * self.Hk * self.Lk * self.D

    def arrays(self):
        """q, k and v in float32 on the host, from a seed."""
        rng = np.random.default_rng(0)
        shapes = (self.B, self.H, self.Lq, self.D), *[(self.B, self.Hk, self.Lk, self.D)] * 2
        return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def of_cyflash(case, q, k, v):
    """q, k, v: torch tensors of the case's kind (for int8: of 16 bits), or CuPy's where there is no torch."""
    if not case.kind.startswith("int8"):
        return partial(cyflash.flash_attention, q, k, v, causal=case.causal)
    pv = "int8" if case.kind == "int8" else "bf16"
    if not case.quantise:
        # Queries too: what is timed is the kernel.
        q, k = cyflash.quantize(q, "token"), cyflash.quantize(k, "token")
        v = cyflash.quantize(v, "token") if pv == "int8" else v
    return partial(cyflash.flash_attention_int8, q, k, v, pv=pv, causal=case.causal)


def of_torch(backend, case, q, k, v):
    """torch's scaled_dot_product_attention by one of its backends; codes are beside 16 bits there."""
    torch = _torch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, enable_gqa=case.grouped
            )

    return call


def of_triton(case, q, k, v):
    """The kernel that torch's flex_attention has Triton compile."""
    torch = _torch()
    if importlib.util.find_spec("triton") is None:
        raise Absent("triton is not installed")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if case.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.Lq, case.Lk, device="cuda")
    return partial(torch.compile(flex_attention), q, k, v, block_mask=mask, enable_gqa=case.grouped)


SYSTEMS = {
    "cyflash": of_cyflash,
    "torch flash": partial(of_torch, "FLASH_ATTENTION"),
    "torch cuDNN": partial(of_torch, "CUDNN_ATTENTION"),
    "Triton": of_triton,
}


def tensors(case):
    """q, k and v on the GPU, in torch's arrays where torch has CUDA, else in CuPy's."""
    kind = {"fp32": "float32", "bf16": "bfloat16"}.get(case.kind, "float16")
    try:
        torch = _torch()
    except Absent:
        from cyflash.arrays import checked_dtype
        from cyflash.gpu import status

        return [status.cupy().asarray(x.astype(checked_dtype("kind", kind))) for x in case.arrays()]
    return [torch.from_numpy(x).to("cuda", getattr(torch, kind)) for x in case.arrays()]


def _torch():
    if importlib.util.find_spec("torch") is None:
        raise Absent("torch is not installed")
    import torch

    if not torch.cuda.is_available():
        raise Absent("torch is installed without CUDA")
    return torch
