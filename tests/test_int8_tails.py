"""Every remainder of every loop of int8 attention: all head sizes with all lengths, on each build."""
import cases
import cases_int8
import numpy as np
import pytest

from cyflash.quantized import QuantizedTensor

HEAD_DIMS = range(1, 161)
LENGTHS = range(1, 131)


def sweep(D, lengths, pv="int8"):
    """For each (Lq, Lk): a call on codes that end where others, all 111, begin, with a scale for every token."""
    r = np.random.default_rng(D)
    for Lq, Lk in lengths:
        operands = []
        for L in (Lq, Lk, Lk):
            codes = np.full((1, 132, D), 111, np.int8)
            codes[:, :L] = r.integers(-128, 128, (1, L, D))
            scale = np.full((1, 132, 1), np.nan, np.float32)
            scale[:, :L] = r.uniform(0.005, 0.02, (1, L, 1))
            operands.append(QuantizedTensor(codes[:, :L], scale[:, :L]))
        cases_int8.verify(*operands, pv=pv, num_threads=1)


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_some_lengths_of_every_head_dim(build, D):
    """The lengths move with D, so that all of them occur."""
    n = len(LENGTHS)
    sweep(D, [(1 + 37 * D % n, 1 + 53 * D % n), (1 + D % 17, 1 + D % 9)])
    sweep(D, [(1 + 71 * D % 40, 1 + 11 * D % n)], pv=("bf16", "fp32")[D % 2])


@pytest.mark.parametrize("D", [3, 17, 64])
def test_every_length_of_some_head_dims(build, D):
    sweep(D, [(1 + 7 * L % 50, L) for L in LENGTHS] + [(L, 1 + 7 * L % 50) for L in LENGTHS[::3]])
    sweep(D, [(3, L) for L in LENGTHS[::2]], pv="bf16")


@pytest.mark.parametrize("pv", ["int8", "bf16", "fp32"])
def test_every_value_dim(build, pv):
    for Dv in range(1, 161, 1 if pv == "int8" else 3):
        q, k, v = cases.arrays(1, 1, Lq=1 + Dv % 50, Lk=1 + Dv % 23, D=5, Dv=Dv)
        cases_int8.verify(q, k, v, pv=pv)


@pytest.mark.slow
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_length_of_every_head_dim(build, D):
    for pv in ("int8", "bf16", "fp32"):
        sweep(D, [(L, 1 + 7 * L % 131) for L in LENGTHS], pv)
