"""Arrays anywhere: their axes in any order and direction, with gaps, misaligned; and whether bytes changed unasked.

Each array lies in memory of its own, whose other bytes are 0xFF (NaN as a float of any size, True as a bool). After a
call, `Memory.check` compares all of it with what it was, outputs left out: so inputs were not written, nor anything
around an output.
"""
import numpy as np


class Memory:
    """The memory of the arrays of one call."""

    def __init__(self, draw, wild=True):
        self.draw, self.wild, self.kept = draw, wild, []

    def place(self, x, output=False):
        """x, or an array like it for an output, somewhere."""
        r, steps, size = self.draw, [1] * x.ndim, x.itemsize
        y = once(x)  # what is broadcast stays so
        order, gaps, start = list(range(x.ndim)), [0] * x.ndim, 0
        if self.wild and r.chance(0.6):
            if r.chance(0.4):
                r.shuffle(order)
            for axis in range(x.ndim):
                steps[axis] = 2 if r.chance(0.1) else 1
                gaps[axis] = r.randint(1, 3) if r.chance(0.2) else 0
            start = r.randint(0, 16) * size + (r.randint(1, max(1, size - 1)) if r.chance(0.1) else 0)
        strides, end = [0] * x.ndim, size
        for axis in reversed(order):
            strides[axis] = end * steps[axis]
            end = strides[axis] * y.shape[axis] + gaps[axis] * end
        memory = np.full(start + end + 64, 0xFF, np.uint8)
        view = np.ndarray(y.shape, x.dtype, memory, start, strides)
        if self.wild and r.chance(0.15):
            view = view[(*(slice(None, None, -1) if r.chance(0.4) else slice(None) for _ in order), ...)]
        if not output:
            view[...] = y
        if y.shape != x.shape:
            view = np.broadcast_to(view, x.shape)
        self.kept.append((memory, memory.copy(), view if output else None))
        return view

    def check(self):
        """Raise unless all bytes are what they were, but for those of outputs."""
        for memory, before, output in self.kept:
            if output is not None:
                output.view(f"V{output.itemsize}")[...] = b"\xff" * output.itemsize
            if not np.array_equal(memory, before):
                where = "around an output" if output is not None else "of an input"
                raise AssertionError(f"memory {where} was written, {np.count_nonzero(memory != before)} bytes of it")


def once(x):
    """A view of x in which axes that were broadcast have length 1."""
    if not x.size:
        return x
    return x[(*(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides), ...)]


def contiguous(x):
    """x as NumPy makes arrays; what is not one as it is."""
    return np.array(x, order="C") if isinstance(x, np.ndarray) else x


def same_bits(what, actual, expected):
    """Raise unless arrays are equal bit for bit, NaN and the sign of zero included."""
    for name, a, b in zip(("out", "lse"), actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: {name} {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        bits = f"u{a.itemsize}"
        a, b = (np.ascontiguousarray(x).view(bits) for x in (a, b))
        assert np.array_equal(a, b), f"{what}: {np.count_nonzero(a != b)} of {a.size} of {name} differ in their bits"
