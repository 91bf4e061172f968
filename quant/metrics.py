"""How far an attention output is from its reference: one number per question, the worst head and row among them."""

from typing import NamedTuple

import numpy as np

from cyflash.foreign import any_kind

__all__ = ["Comparison", "compare", "pooled"]


class Comparison(NamedTuple):
    """How far an output O' is from its reference O: what `compare` returns. Zeros, and a cosine of 1, mean no error.

    Attributes
    ----------
    rel_l1 : float
        Relative L1 error, sum|O - O'| / sum|O|, over all elements.
    cosine : float
        Cosine similarity of the two flattened arrays.
    rmse : float
        Root of the mean squared difference, in units of the output.
    max_abs : float
        Largest absolute difference, in units of the output.
    worst_head : float
        Largest relative L1 error of one head of one sequence.
    worst_row : float
        Largest relative L1 error of one row (one query of one head). The denominator is at least the mean sum|O| of the
        head's rows, so a row whose values happen to be almost zero does not decide alone.
    """

    rel_l1: float
    cosine: float
    rmse: float
    max_abs: float
    worst_head: float
    worst_row: float

    def __str__(self):
        return (
            f"relative L1 {self.rel_l1:.1e}, cosine {self.cosine:.8f}, RMSE {self.rmse:.1e}, largest "
            f"{self.max_abs:.1e}; relative L1 of the worst head {self.worst_head:.1e}, of the worst row "
            f"{self.worst_row:.1e}"
        )


@any_kind
def compare(output, reference):
    """Measure how far `output` is from `reference`.

    Parameters
    ----------
    output, reference : array-like, same shape, (L, D), (H, L, D) or (B, H, L, D), or with more leading axes
        Any real dtype; all sums are taken in float64. NaN, and infinities, must stand at the same places in both: these
        elements then count as equal.

    Returns
    -------
    Comparison
        `rel_l1`, `cosine`, `rmse`, `max_abs`, `worst_head`, `worst_row`, each a float. Where a reference is all zero
        its relative error is 0 if the output is zero as well, else inf (and the cosine 1, or 0). Empty arrays have no
        error.

    Raises
    ------
    TypeError
        A complex or non-numeric dtype.
    ValueError
        Shapes differ or have fewer than two axes; NaN or infinities at different places.

    Notes
    -----
    Relative L1, cosine similarity and RMSE are the measures of the SageAttention papers (Zhang et al., 2024), which
    report their average over layers. An average hides the one head that fails, hence `worst_head` and `worst_row`.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.quant import compare
    >>> reference = np.array([[1.0, -1.0], [2.0, 0.0]])
    >>> compare(reference + [[0.0, 0.0], [0.5, 0.0]], reference).rel_l1
    0.125
    """
    return pooled([(output, reference)])


def pooled(pairs):
    """`compare` over several (output, reference), as if all were heads and rows of one: sums and maxima of all."""
    sums, worst_head, worst_row = [], 0.0, 0.0
    for output, reference in pairs:
        output, reference = _checked(output, reference)
        difference, magnitude = np.abs(output - reference), np.abs(reference)
        rows, row_size = difference.sum(axis=-1), magnitude.sum(axis=-1)
        heads, head_size = rows.sum(axis=-1), row_size.sum(axis=-1)
        mean_row_size = head_size / max(rows.shape[-1], 1)
        worst_head = max(worst_head, _worst_ratio(heads, head_size))
        worst_row = max(worst_row, _worst_ratio(rows, np.maximum(row_size, mean_row_size[..., None])))
        sums.append((heads.sum(), head_size.sum(), difference, output, reference))
    errors, sizes, differences, outputs, references = zip(*sums, strict=True)
    difference = np.concatenate([x.ravel() for x in differences])
    return Comparison(
        rel_l1=_worst_ratio(sum(errors), sum(sizes)),
        cosine=_cosine(*(np.concatenate([x.ravel() for x in arrays]) for arrays in (outputs, references))),
        rmse=_root_mean_square(difference),
        max_abs=float(difference.max(initial=0.0)),
        worst_head=worst_head,
        worst_row=worst_row,
    )


def _checked(output, reference):
    output, reference = _as_float64("output", output), _as_float64("reference", reference)
    if output.shape != reference.shape:
        raise ValueError(f"output: expected the reference's shape {reference.shape}, got {output.shape}")
    if output.ndim < 2:
        raise ValueError(f"output: expected (L, D), (H, L, D) or (B, H, L, D), got {output.shape}; write x[None]")
    return _leave_out_equal_nonfinite(output, reference)


def _as_float64(name, x):
    x = np.asarray(x)
    if not (x.dtype.kind in "fiub" or x.dtype.name == "bfloat16"):
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    return x.astype(np.float64, copy=False)


def _leave_out_equal_nonfinite(output, reference):
    """Both arrays with 0 wherever both are NaN, or the same infinity; a difference in such places is an error."""
    bad_output, bad_reference = ~np.isfinite(output), ~np.isfinite(reference)
    if not (bad_output.any() or bad_reference.any()):
        return output, reference
    differ = (bad_output | bad_reference) & ~((output == reference) | (np.isnan(output) & np.isnan(reference)))
    if count := int(differ.sum()):
        first = tuple(int(i) for i in np.argwhere(differ)[0])
        raise ValueError(
            f"output: expected NaN and infinities exactly where the reference has them, got {count} other places, the "
            f"first at {first}: {output[first]} where the reference has {reference[first]}"
        )
    return np.where(bad_output, 0.0, output), np.where(bad_reference, 0.0, reference)


def _worst_ratio(error, size):
    """The largest error / size; 0 / 0 is 0: nothing was asked for and nothing came."""
    error, size = np.atleast_1d(error), np.atleast_1d(size)
    ratio = np.divide(error, size, out=np.where(error > 0, np.inf, 0.0), where=size > 0)
    return float(ratio.max(initial=0.0))


def _cosine(a, b):
    # Scaled first, so that squares of huge or tiny values neither overflow nor vanish.
    largest_a, largest_b = np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0)
    if largest_a == 0.0 or largest_b == 0.0:
        return float(largest_a == largest_b)
    a, b = a / largest_a, b / largest_b
    return float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1.0, 1.0))


def _root_mean_square(x):
    largest = x.max(initial=0.0)
    return float(largest * np.sqrt(np.mean(np.square(x / largest)))) if largest > 0.0 else 0.0
