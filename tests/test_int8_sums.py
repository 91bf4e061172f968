"""The integers: every build's sums of products of codes equal those of int64, at every length and head size."""
import numpy as np
import pytest

import cyflash

HEAD_DIMS = range(1, 161)
LENGTHS = range(1, 131)
FILLS = {  # codes of int8 arrays; those of P are 128 more
    "random": lambda r, shape: r.integers(-128, 128, shape),
    "extreme": lambda r, shape: r.choice([-128, -127, 127], shape),
    "lowest": lambda r, shape: np.full(shape, -128),
    "highest": lambda r, shape: np.full(shape, 127),
    "sparse": lambda r, shape: np.where(r.random(shape) < 0.1, r.choice([-128, -1, 1, 127], shape), 0),
}


def signed(fill, r, *shape):
    return FILLS[fill](r, shape).astype(np.int8)


def unsigned(fill, r, *shape):
    return (FILLS[fill](r, shape) + 128).astype(np.uint8)


def check_scores(q, k):
    """Of full panels, and of panels with few rows."""
    expected = q.astype(np.int64) @ k.astype(np.int64).T
    for few in (False, True):
        assert_equal(cyflash.cpu.active().integer_scores(q, k, few), expected)


def check_values(p, v):
    expected = p.astype(np.int64) @ v.astype(np.int64)
    for few in (False, True):
        assert_equal(cyflash.cpu.active().integer_values(p, v, few), expected)


def assert_equal(sums, expected):
    assert sums.dtype == np.float32 and sums.shape == expected.shape
    wrong = np.argwhere(sums != expected)
    assert not len(wrong), f"{len(wrong)} of {sums.size} sums differ, first at {wrong[0]}: {sums[tuple(wrong[0])]}"


@pytest.mark.parametrize("fill", FILLS)
def test_some_lengths_of_every_size(build, fill):
    """The lengths move with the size, so that all remainders of both meet."""
    n = len(LENGTHS)
    for D in HEAD_DIMS:
        r = np.random.default_rng(D)
        Lq, Lk = 1 + 37 * D % n, 1 + 53 * D % n
        check_scores(signed(fill, r, Lq, D), signed(fill, r, Lk, D))
        check_values(unsigned(fill, r, Lq, Lk), signed(fill, r, Lk, D))


def test_codes_of_opposite_signs(build):
    """The largest sums of either sign; 255 x 127 twice is beyond 16 bits."""
    for D, L in ((64, 128), (128, 128), (160, 130)):
        for a, b in ((-128, -128), (-128, 127), (127, -128), (127, 127)):
            check_scores(np.full((L, D), a, np.int8), np.full((L, D), b, np.int8))
        for a in (-128, 127):
            check_values(np.full((L, L), 255, np.uint8), np.full((L, D), a, np.int8))


def test_largest_block(build):
    """512 keys: sums still below 2^24."""
    r = np.random.default_rng(0)
    for fill in FILLS:
        check_values(unsigned(fill, r, 50, 512), signed(fill, r, 512, 33))
        check_scores(signed(fill, r, 50, 512), signed(fill, r, 70, 512))


def test_every_pair_of_codes(build):
    """All 65,536 products of either kind."""
    q = np.arange(-128, 128, dtype=np.int8).reshape(256, 1)
    check_scores(q, q)
    for p in range(256):
        check_values(np.array([[p]], np.uint8), q.reshape(1, 256))


@pytest.mark.slow
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_length_of_every_size(build, D):
    r = np.random.default_rng(D)
    q, k = (signed("random", r, len(LENGTHS), D) for _ in range(2))
    p, v = unsigned("random", r, len(LENGTHS), len(LENGTHS)), signed("random", r, len(LENGTHS), D)
    for L in LENGTHS:
        other = 1 + 7 * L % len(LENGTHS)
        check_scores(q[:L].copy(), k[:other].copy())
        check_values(p[:L, :other].copy(), v[:other].copy())
