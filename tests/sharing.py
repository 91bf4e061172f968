"""Judges that tests share: what float64 expects of the same arguments is computed once, not once for every build."""
import collections
import hashlib
from typing import ClassVar

import numpy as np

MOST_KEPT = 512
LARGEST = 1 << 24  # bytes of an argument; there may be views of far more than there is memory


class Shared(type):
    """Metaclass of judges: the same object for arguments of the same bytes. A judge does not depend on the build."""

    kept: ClassVar = collections.OrderedDict()  # the latest ones

    def __call__(cls, *arrays, **options):
        given = (*arrays, *options.values())
        if any(isinstance(x, np.ndarray) and x.nbytes > LARGEST for x in given):
            return super().__call__(*arrays, **options)
        key = cls, len(arrays), tuple(options), tuple(map(_content, given))
        if key not in cls.kept:
            # Copies: bounds are computed later, and a test may have changed its arrays until then.
            cls.kept[key] = super().__call__(*map(_own, arrays), **{name: _own(x) for name, x in options.items()})
        cls.kept.move_to_end(key)
        while len(cls.kept) > MOST_KEPT:
            cls.kept.popitem(last=False)
        return cls.kept[key]


def _content(x):
    if isinstance(x, np.ndarray):
        return x.shape, x.dtype.name, x.dtype.byteorder, hashlib.blake2b(np.ascontiguousarray(x).tobytes()).digest()
    return type(x).__name__, repr(x)


def _own(x):
    return x.copy() if isinstance(x, np.ndarray) else x
