"""The count of work: compared with brute force, cell by cell."""

import itertools

import numpy as np
import pytest

from cyflash.flops import attention_flops, visible_pairs

LENGTHS = (0, 1, 2, 3, 7, 12, 31)
REACHES = (-1, 0, 1, 2, 5, 11, 40)


def visible(Lq, Lk, causal, causal_align, window):
    """The Lq x Lk mask, straight from the definition."""
    i, j = np.mgrid[:Lq, :Lk]
    p = i + (Lk - Lq if causal_align == "bottom-right" else 0)
    left, right = window or (-1, -1)
    mask = np.ones((Lq, Lk), dtype=bool)
    if causal:
        mask &= j <= p
    if left >= 0:
        mask &= j >= p - left
    if right >= 0:
        mask &= j <= p + right
    return mask


@pytest.mark.parametrize("causal_align", ["bottom-right", "top-left"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("Lq", LENGTHS)
def test_pairs_equal_brute_force(Lq, causal, causal_align):
    windows = [None, *itertools.product(REACHES, REACHES)]
    for Lk, window in itertools.product(LENGTHS, windows):
        options = (Lq, Lk, causal, causal_align, window)
        assert visible_pairs(*options) == visible(*options).sum(), options


def test_pairs_are_exact_beyond_64_bits():
    L = 2**40
    assert visible_pairs(L, L) == L * L
    assert visible_pairs(L, L, causal=True) == L * (L + 1) // 2


def test_flops_are_two_per_multiply_add_of_both_products():
    assert attention_flops(1, 1, 128, 128, 64, 64) == 4 * 128 * 128 * 64
    assert attention_flops(3, 8, 5, 7, 16, 24) == 2 * (16 + 24) * 35 * 3 * 8


@pytest.mark.parametrize(
    "options", [dict(causal=True), dict(causal=True, causal_align="top-left"), dict(window=(2, 1))], ids=str
)
def test_flops_count_only_visible_pairs(options):
    assert attention_flops(2, 3, 9, 13, 4, 5, **options) == 2 * 9 * 2 * 3 * visible_pairs(9, 13, **options)
    assert visible_pairs(9, 13, **options) < 9 * 13


def test_unknown_alignment_is_an_error():
    with pytest.raises(ValueError, match=r"causal_align: expected 'bottom-right' or 'top-left', got 'upper'"):
        visible_pairs(4, 4, causal=True, causal_align="upper")
