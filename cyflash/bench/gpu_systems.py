"""Who is asked on the GPU: functions that take a case's arrays and return a call to time, or raise Absent.

All calls of a race are queued on one stream and timed by events on it, so host time counts only where the GPU waits.
"""
import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

import cyflash

FEW_ROWS = 16  # a case with fewer is measured by the bytes it reads
DISTINCT = 4   # sequences that differ: more would take long to make, and none is read twice from a cache


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

    @property
    def few(self):
        """Whether keys and values are waited for more than products are made."""
        return self.Lq < FEW_ROWS

    def repeats(self):
        """How often `arrays` are to follow each other along the batch."""
        return max(n for n in range(1, self.B + 1) if self.B % n == 0 and (n == 1 or self.B // n >= DISTINCT))

    def arrays(self):
        """q, k and v in float32 on the host, from a seed: the first sequences, which the others repeat."""
        rng, B = np.random.default_rng(0), self.B // self.repeats()
        shapes = (B, self.H, self.Lq, self.D), *[(B, self.Hk, self.Lk, self.D)] * 2
        return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


class OfCyflash:
    """A call. q, k, v: torch tensors of the case's kind (for int8: of 16 bits), or CuPy's where there is no torch."""

    def __init__(self, case, q, k, v):
        self.options = {"causal": case.causal}
        if case.kind.startswith("int8"):
            self.options["pv"] = "int8" if case.kind == "int8" else "bf16"
            if not case.quantise:  # queries too: what is timed is the kernel
                q, k = cyflash.quantize(q, "token"), cyflash.quantize(k, "token")
                v = cyflash.quantize(v, "token") if case.kind == "int8" else v
        self.operands = q, k, v

    def __call__(self):
        call = cyflash.flash_attention_int8 if "pv" in self.options else cyflash.flash_attention
        return call(*self.operands, **self.options)

    def kernel(self):
        """What a call runs, as the engine names it."""
        from cyflash import attention

        attend = attention.attend_int8 if "pv" in self.options else attention.attend
        return attend(*self.operands, **self.options)[2].implementation


class OfCyflashMma(OfCyflash):
    """The same by mma.sync, on devices where another kernel would be chosen."""

    def __init__(self, case, q, k, v):
        from cyflash.gpu import launch

        if case.few or case.kind == "fp32" or launch.architecture(0) != "sm_90a":
            raise Absent("is what cyflash takes here, or takes no part")
        super().__init__(case, q, k, v)

    def __call__(self):
        with without("hopper.cu"):
            return super().__call__()

    def kernel(self):
        with without("hopper.cu"):
            return super().kernel()


@contextmanager
def without(source):
    """No kernel of this source is chosen."""
    from cyflash.gpu import variants

    variants.passed_over.add(source)
    try:
        yield
    finally:
        variants.passed_over.discard(source)


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
    """FlashAttention-2 written in Triton, the fastest of its tiles."""
    _require_triton()
    if case.kind not in ("fp16", "bf16") or case.few:
        raise Absent("takes 16 bits and many query rows; beside codes it would be measured again")
    from cyflash.bench import gpu_triton

    return partial(gpu_triton.attention, q, k, v, causal=case.causal)


def of_flex(case, q, k, v):
    """The kernel that torch's flex_attention has Triton compile."""
    torch = _require_triton()
    if case.kind != "fp16":
        raise Absent("is measured with fp16 only: it takes long to compile")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if case.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.Lq, case.Lk, device="cuda")
    return partial(torch.compile(flex_attention), q, k, v, block_mask=mask, enable_gqa=case.grouped)


SYSTEMS = {
    "cyflash": OfCyflash,
    "cyflash mma": OfCyflashMma,
    "torch flash": partial(of_torch, "FLASH_ATTENTION"),
    "torch cuDNN": partial(of_torch, "CUDNN_ATTENTION"),
    "Triton": of_triton,
    "Triton (flex)": of_flex,
}


def tensors(case):
    """q, k and v on the GPU, in torch's arrays where torch has CUDA, else in CuPy's."""
    kind = {"fp32": "float32", "bf16": "bfloat16"}.get(case.kind, "float16")
    try:
        torch = _torch()
    except Absent:
        from cyflash.arrays import checked_dtype
        from cyflash.gpu import status

        cupy, dtype = status.cupy(), checked_dtype("kind", kind)
        return [cupy.tile(x, (n, 1, 1, 1)) if (n := case.repeats()) > 1 else x
                for x in (cupy.asarray(x.astype(dtype)) for x in case.arrays())]
    return [torch.from_numpy(x).to("cuda", getattr(torch, kind)).repeat(case.repeats(), 1, 1, 1) for x in case.arrays()]


def _require_triton():
    torch = _torch()
    if importlib.util.find_spec("triton") is None:
        raise Absent("triton is not installed")
    return torch


def _torch():
    if importlib.util.find_spec("torch") is None:
        raise Absent("torch is not installed")
    import torch

    if not torch.cuda.is_available():
        raise Absent("torch is installed without CUDA")
    return torch
