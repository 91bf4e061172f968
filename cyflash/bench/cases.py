"""A case: one attention call to measure. Its inputs come from a seed, so every process makes the same ones;
its work is counted by `cyflash.flops`, and an output is judged against the float64 reference.
"""

from dataclasses import dataclass

import numpy as np

from cyflash.flops import attention_flops
from cyflash.reference import attention as reference_attention

SCORES_AT_ONCE = 2**24  # float64 scores of one call of the reference: 128 MB


@dataclass(frozen=True)
class Int8:
    """Options of `flash_attention_int8`, None: not given. `quantised`: q, k, v come as codes, made before the call."""

    granularity: str | None = None
    smooth_k: bool | None = None
    pv: str | None = None
    quantised: bool = False

    def tolerance(self):
        return INT8_TENSOR if self.granularity == "tensor" else INT8


@dataclass(frozen=True)
class Case:
    """`shape` is (B, H, L, D); `kv_heads` None means H; `options` are names in OPTIONS; `reuse_out` writes every
    output into one array, as the peers that can do; `num_threads` None means the process's default; `int8` None means
    floats, of `dtype`."""

    shape: tuple[int, int, int, int]
    causal: bool = False
    window: tuple[int, int] | None = None
    options: tuple[str, ...] = ()
    kv_heads: int | None = None
    num_threads: int | None = None
    reuse_out: bool = True
    int8: Int8 | None = None
    dtype: str = "float32"

    def title(self):
        return f"({', '.join(map(str, self.shape))}){' causal' if self.causal else ''}"

    def question(self):
        """The case without what must not change the answer, so that its reference is computed once."""
        return Case(self.shape, self.causal, self.window, self.options, self.kv_heads)

    def expected(self):
        return Expected(self)

    def inputs(self):
        """q, k, v: float32, standard normal."""
        B, H, L, D = self.shape
        rng = np.random.default_rng(L * 1000 + D)
        Hk = self.kv_heads or H
        return tuple(rng.standard_normal((B, heads, L, D), dtype=np.float32) for heads in (H, Hk, Hk))

    def keywords(self):
        """The keyword arguments of `flash_attention` and of the reference."""
        keywords = {"causal": self.causal, "window": self.window}
        for position, name in enumerate(self.options):
            keywords |= OPTIONS[name](np.random.default_rng(position), self.shape)
        return keywords

    def flops(self):
        B, H, L, D = self.shape
        return attention_flops(B, H, L, L, D, D, causal=self.causal, window=self.window)


# The options as cases name them; mask and bias are shared by batch and heads.
OPTIONS = {
    "bool mask": lambda rng, shape: {"mask": rng.random((shape[2], shape[2]), dtype=np.float32) < 0.5},
    "float bias": lambda rng, shape: {"bias": rng.standard_normal((shape[2], shape[2]), dtype=np.float32)},
    "softcap": lambda rng, shape: {"softcap": 20.0},
    "ALiBi": lambda rng, shape: {"alibi_slopes": np.exp2(-8 * np.arange(1, shape[1] + 1, dtype=np.float32) / shape[1])},
    "sinks": lambda rng, shape: {"sinks": rng.standard_normal(shape[1], dtype=np.float32)},
}


@dataclass(frozen=True)
class Error:
    """Of an output against float64, over `checked` of its `rows` rows."""

    rel_l1: float
    max_over_max: float
    checked: int
    rows: int


@dataclass(frozen=True)
class Tolerance:
    """What arithmetic of a precision may lose against float64, whatever the order of its sums; and what it must lose,
    or it is a more precise one."""

    precision: str
    rel_l1: float
    max_over_max: float
    at_least: float = 0.0

    def accepts(self, error):
        return self.at_least <= error.rel_l1 <= self.rel_l1 and error.max_over_max <= self.max_over_max  # not NaN


# On the inputs of cases. fp32 systems are seen at 1e-7 to 1e-6 of relative L1; bfloat16 or TF32 products, which some
# systems choose by themselves, at 4e-4 or more, bfloat16 throughout at 3e-3 to 5e-3; int8 at 8e-3 to 2e-2.
FP32 = Tolerance("fp32", 1e-5, 1e-4)
BF16 = Tolerance("bf16", 1e-2, 5e-2, at_least=1e-4)
FP16 = Tolerance("fp16", 1e-3, 5e-3, at_least=1e-5)
INT8 = Tolerance("int8", 1.8e-2, 4e-2, at_least=1e-3)
INT8_TENSOR = Tolerance("int8", 3e-2, 6e-2, at_least=1e-3)


INT8_ROW = Tolerance("int8", 3e-2, 6e-2, at_least=1e-3)  # a single row of many keys, most with weights of few codes
TOLERANCES = {"float32": FP32, "float16": FP16, "bfloat16": BF16, "int8": INT8_ROW}  # of arrays and caches


class Parts:
    """What is known of an output in float64: `parts` are (index, values there); the last axis are the columns."""

    def __init__(self, shape, parts):
        self.shape, self.parts = shape, parts

    def error(self, output):
        if output.shape != self.shape:
            raise ValueError(f"output: expected shape {self.shape}, got {output.shape}")
        difference = magnitude = worst = largest = checked = 0.0
        for index, expected in self.parts:
            gap = np.abs(output[index] - expected)
            difference += gap.sum()
            magnitude += np.abs(expected).sum()
            worst = np.maximum(worst, gap.max())  # keeps NaN
            largest = max(largest, np.abs(expected).max())
            checked += expected.size // self.shape[-1]
        rows = output.size // self.shape[-1]
        return Error(float(difference / magnitude), float(worst / largest), int(checked), rows)


class Expected(Parts):
    """The float64 output of a case: all of it, or of large cases the first and last rows, which bound every window
    and diagonal, of the first and last sequences."""

    def __init__(self, case):
        B, H, L, _ = case.shape
        q, k, v = case.inputs()
        at_once = max(2, SCORES_AT_ONCE // (H * L))
        blocks = [(slice(0, L), "bottom-right")]
        if at_once < L:  # with Lq < Lk, top-left keeps the positions of the first rows, bottom-right those of the last
            blocks = [(slice(0, at_once // 2), "top-left"), (slice(L - at_once // 2, L), "bottom-right")]
        sequences = range(B) if B * H * L * L <= 8 * SCORES_AT_ONCE else sorted({0, B - 1})
        keywords = case.keywords()
        parts = []
        for rows, align in blocks:
            by_rows = {name: keywords[name][rows] for name in ("mask", "bias") if name in keywords}
            for b in sequences:
                arrays = q[b, :, rows], k[b], v[b]
                values = reference_attention(*arrays, causal_align=align, **(keywords | by_rows))
                parts.append(((b, slice(None), rows), values))
        super().__init__(case.shape, parts)
