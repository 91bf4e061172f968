"""Every remainder of every loop: all head sizes with all lengths, once per build."""
import bounds
import cases
import numpy as np
import pytest

from cyflash import flash_attention

HEAD_DIMS = range(1, 161)
LENGTHS = range(1, 131)


def sweep(D, lengths):
    """For each (Lq, Lk): a call whose arrays end where others, all NaN, begin."""
    q, k, v = (x[0] for x in cases.arrays(1, 1, Lq=132, D=D, seed=1))
    for Lq, Lk in lengths:
        spoiled = [np.full_like(x, np.nan) for x in (q, k, v)]
        parts = [x[:, :L] for x, L in zip(spoiled, (Lq, Lk, Lk), strict=True)]
        for part, x in zip(parts, (q, k, v), strict=True):
            part[...] = x[:, : part.shape[1]]
        out, lse = flash_attention(*parts, return_lse=True, num_threads=1)
        bounds.Case(*parts).check(out, lse)


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_some_lengths_of_every_head_dim(build, D):
    """The lengths move with D, so that all of them occur."""
    n = len(LENGTHS)
    sweep(D, [(1 + 37 * D % n, 1 + 53 * D % n), (1 + 71 * D % n, 1 + 11 * D % n), (1 + D % 17, 1 + D % 9)])


@pytest.mark.parametrize("D", [1, 3, 8, 17, 64])
def test_every_length_of_some_head_dims(build, D):
    sweep(D, [(L, L) for L in LENGTHS] + [(L, 1 + 7 * L % 131) for L in LENGTHS[::3]])


@pytest.mark.parametrize("Dv", [*range(1, 70), *range(70, 161, 9)])
def test_every_value_dim(build, Dv):
    cases.verify(*cases.arrays(1, 1, Lq=1 + Dv % 50, Lk=1 + Dv % 23, D=5, Dv=Dv))


@pytest.mark.slow
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_length_of_every_head_dim(build, D):
    sweep(D, [(L, L) for L in LENGTHS])
