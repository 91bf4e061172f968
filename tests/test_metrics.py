"""compare(): the definitions, each against a direct sum, and what it does with zeros and non-finite values."""

import doctest

import numpy as np
import pytest

import cyflash.quant.metrics
from cyflash.quant import Comparison, compare


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((2, 3, 5, 4))
    return reference + 0.01 * rng.standard_normal(reference.shape), reference


def test_definitions_against_direct_sums(pair):
    output, reference = pair
    got = compare(output, reference)
    assert isinstance(got, Comparison)
    assert all(type(x) is float for x in got)
    difference = abs(output - reference)
    assert got.rel_l1 == pytest.approx(difference.sum() / abs(reference).sum())
    assert got.rmse == pytest.approx(np.sqrt(np.mean(difference**2)))
    assert got.max_abs == difference.max()
    assert got.cosine == pytest.approx(
        (output * reference).sum() / np.sqrt((output**2).sum()) / np.sqrt((reference**2).sum())
    )
    heads = [difference[b, h].sum() / abs(reference[b, h]).sum() for b in range(2) for h in range(3)]
    assert got.worst_head == pytest.approx(max(heads))
    rows = []
    for b in range(2):
        for h in range(3):
            mean = abs(reference[b, h]).sum(axis=-1).mean()
            for i in range(5):
                rows.append(difference[b, h, i].sum() / max(abs(reference[b, h, i]).sum(), mean))
    assert got.worst_row == pytest.approx(max(rows))


def test_str_is_for_people():
    text = str(Comparison(0.0123456, 0.999912344, 0.001, 0.5, 0.0254, 0.1))
    assert text == (
        "relative L1 1.2e-02, cosine 0.99991234, RMSE 1.0e-03, largest 5.0e-01; "
        "relative L1 of the worst head 2.5e-02, of the worst row 1.0e-01"
    )


def test_equal_arrays_have_no_error(pair):
    got = compare(pair[1], pair[1])
    assert (got.rel_l1, got.rmse, got.max_abs, got.worst_head, got.worst_row) == (0, 0, 0, 0, 0)
    assert got.cosine == pytest.approx(1.0, abs=1e-15)


def test_one_bad_head_shows_in_worst_head_and_hardly_in_the_mean():
    reference = np.ones((1, 100, 8, 4))
    output = reference.copy()
    output[0, 37] = 0.0
    got = compare(output, reference)
    assert got.rel_l1 == pytest.approx(0.01)
    assert got.worst_head == 1.0
    assert got.worst_row == 1.0


def test_a_nearly_zero_row_is_measured_against_its_heads_mean():
    reference = np.ones((4, 2))
    reference[0] = 1e-9
    output = reference.copy()
    output[0] += 0.01  # ten million times the row itself
    assert compare(output, reference).worst_row == pytest.approx(0.02 / (6.000000002 / 4))


def test_heads_of_different_sequences_are_not_mixed():
    reference = np.ones((2, 2, 3, 4))
    output = reference.copy()
    output[1, 0] *= 1.5
    assert compare(output, reference).worst_head == pytest.approx(0.5)


def test_zero_rows_heads_and_arrays_are_defined():
    reference = np.ones((2, 3, 4))
    reference[0] = 0.0
    assert compare(reference, reference).worst_head == 0.0
    output = reference.copy()
    output[0, 1, 2] = 1e-3
    got = compare(output, reference)
    assert got.worst_head == np.inf and got.worst_row == np.inf
    assert got.rel_l1 == pytest.approx(1e-3 / 12)
    zero = np.zeros((3, 4))
    assert compare(zero, zero) == (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    assert compare(zero + 1.0, zero) == (np.inf, 0.0, 1.0, 1.0, np.inf, np.inf)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0, 3, 5, 4)])
def test_empty_arrays_have_no_error(shape):
    assert compare(np.empty(shape), np.empty(shape)) == (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def test_a_matrix_is_one_head(pair):
    output, reference = (x[0, 0] for x in pair)
    assert compare(output, reference) == compare(output[None, None], reference[None, None])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nonfinite_values_on_one_side_raise(pair, value, side):
    pair[side][1, 2, 3, 0] = value
    with pytest.raises(ValueError, match=r"1 other places, the first at \(1, 2, 3, 0\)"):
        compare(*pair)


def test_infinities_of_different_sign_raise(pair):
    pair[0][0, 0, 0, 0], pair[1][0, 0, 0, 0] = np.inf, -np.inf
    with pytest.raises(ValueError, match="infinities"):
        compare(*pair)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_values_on_both_sides_are_left_out(pair, value):
    output, reference = pair
    output[0, 0, 0, 0] = reference[0, 0, 0, 0] = 0.0
    expected = compare(output, reference)
    output[0, 0, 0, 0] = reference[0, 0, 0, 0] = value
    assert compare(output, reference) == expected


def test_the_inputs_are_not_written(pair):
    output, reference = pair
    output[0, 0, 0, 0] = reference[0, 0, 0, 0] = np.nan
    before = output.copy(), reference.copy()
    compare(output, reference)
    np.testing.assert_array_equal(output, before[0])
    np.testing.assert_array_equal(reference, before[1])


def test_sums_are_taken_in_float64():
    reference = np.full((1, 100_000), 0.1, np.float16)
    output = reference + np.float16(2**-13)
    assert compare(output, reference).rel_l1 == pytest.approx(2**-13 / float(np.float16(0.1)), rel=1e-12)


def test_huge_and_tiny_values_neither_overflow_nor_vanish():
    for size in (1e300, 1e-300):
        reference = np.full((2, 3), size)
        got = compare(reference * 1.5, reference)
        assert got.rmse == pytest.approx(0.5 * size)
        assert got.cosine == pytest.approx(1.0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"reference's shape \(3, 4\), got \(4, 3\)"):
        compare(np.ones((4, 3)), np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"expected \(L, D\)"):
        compare(np.ones(3), np.ones(3))
    with pytest.raises(TypeError, match="complex128"):
        compare(np.ones((2, 2), complex), np.ones((2, 2)))
    with pytest.raises(TypeError, match="reference: expected real numbers"):
        compare(np.ones((1, 1)), np.array([["a"]]))


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(cyflash.quant.metrics).failed == 0
