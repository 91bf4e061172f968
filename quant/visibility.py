"""Which rows see a key, and which keys a row sees: what nothing sees is left out of every statistic.

    seen(plan, b) -> (rows (H, Lq), keys (Hk, Lk)), bool, of one sequence of a call
"""

import numpy as np

from cyflash.plan import UNBOUNDED

__all__ = ["seen"]

BLOCK = 1 << 22  # pairs that are looked at together


def seen(plan, b):
    """Rows (H, Lq) that see a key and keys (Hk, Lk) that a row sees, in sequence b of the call; None where all do."""
    by_position = _by_position(plan)
    masks = [x[b] for x in (plan.mask, plan.bias) if x is not None]
    if not masks:
        rows, keys = (np.broadcast_to(x, (n, len(x))) for x, n in zip(by_position, (plan.H, plan.Hk), strict=True))
    else:
        by_head = all(x.strides[0] == 0 for x in masks)
        found = [_of_head(plan, masks, h) for h in range(1 if by_head else plan.H)]
        rows, keys = (np.stack(x) for x in zip(*found, strict=True))
        rows = np.broadcast_to(rows, (plan.H, plan.Lq))
        keys = np.broadcast_to(keys, (plan.H, plan.Lk)).reshape(plan.Hk, plan.H // plan.Hk, plan.Lk).any(axis=1)
    return tuple(None if x.all() else np.array(x, order="C") for x in (rows, keys))


def _span(plan, rows):
    """(first key, last key + 1) that positions let each row see, within the keys."""
    position = rows + plan.offset
    first = np.clip(position - plan.left, 0, plan.Lk)
    end = np.clip(position + plan.right + 1, 0, plan.Lk)
    return first, np.maximum(end, first)


def _by_position(plan):
    first, end = _span(plan, np.arange(plan.Lq))
    step = np.zeros(plan.Lk + 1, np.int64)
    np.add.at(step, first, 1)
    np.add.at(step, end, -1)
    return end > first, np.cumsum(step[:-1]) > 0


def _of_head(plan, masks, h):
    """(rows, keys) of one head, by blocks of rows: no (Lq, Lk) array is made."""
    masks = [x[h] for x in masks]
    alike = all(x.strides[0] == 0 for x in masks) and min(plan.left, plan.right) >= UNBOUNDED
    count = min(plan.Lq, 1) if alike else plan.Lq
    rows, keys = np.zeros(count, bool), np.zeros(plan.Lk, bool)
    size = max(1, BLOCK // max(plan.Lk, 1))
    columns = np.arange(plan.Lk)
    for begin in range(0, count, size):
        block = np.arange(begin, min(begin + size, count))
        first, end = _span(plan, block)
        visible = (columns >= first[:, None]) & (columns < end[:, None])
        for x in masks:
            visible &= x[block] != (-np.inf if x.dtype == np.float32 else 0)
        rows[block] = visible.any(axis=1)
        keys |= visible.any(axis=0)
    return np.broadcast_to(rows, plan.Lq) if alike else rows, keys
