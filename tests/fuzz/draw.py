"""What a case is drawn with: decisions from the seed and the case's number alone, sizes, and arrays of numbers."""
import random

import halves
import numpy as np

HALVES = {np.dtype(x).name: np.dtype(x) for x in halves.installed()}
KINDS = ("float32", *HALVES)
VALUES = (*2 * ("normal", "small", "wide", "integers", "outliers", "equal", "large", "tiny"), "normal", "zeros")


class Draw(random.Random):
    """Decisions; `numbers` makes arrays. The same seed and case give the same, on any machine."""

    def __init__(self, seed, case):
        super().__init__(f"{seed} {case}")
        self.numbers = np.random.Generator(np.random.SFC64(self.getrandbits(64)))

    def chance(self, p):
        return self.random() < p

    def length(self, longest=300):
        """Of a sequence: short mostly, 0 at times."""
        x = self.random()
        if x < 0.04:
            return 0
        if x < 0.16:
            return self.randint(1, 3)
        return self.randint(1, 40 if x < 0.85 else 70) if x < 0.97 else self.randint(71, longest)

    def lengths(self):
        """(Lq, Lk): any, or enough keys that causal rows see some."""
        Lq = self.length()
        return Lq, Lq + self.randint(0, 20) if self.chance(0.4) else self.length()

    def head_dim(self):
        return self.randint(1, 40) if self.chance(0.93) else self.choice((41, 64, 65, 80, 96, 127, 128, 130))

    def heads(self):
        """(H, Hk)"""
        Hk = self.choice((1, 1, 1, 1, 1, 2))
        return Hk * self.choice((1, 1, 1, 1, 2, 3)), Hk

    def kind(self):
        """A dtype of 32 or 16 bits."""
        return np.dtype(np.float32) if self.chance(0.5) else self.choice([np.dtype(np.float32), *HALVES.values()])

    def values(self, shape, dtype, how):
        """An array of this distribution; "special": with NaN and infinities."""
        r = self.numbers
        if how == "integers":
            x = r.integers(-3, 4, shape).astype(np.float32)
        elif how == "zeros":
            x = np.zeros(shape, np.float32)
        else:
            x = r.standard_normal(shape, np.float32)
        if how in ("small", "wide", "large"):
            x *= np.float32({"small": 0.05, "wide": 4.0, "large": 60.0}[how])
        elif how == "tiny":  # denormal
            x *= np.float32(1e-6 if dtype == np.float16 else 1e-40)
        elif how == "outliers":
            x[..., r.integers(shape[-1])] *= np.float32(40)
            if shape[-2]:
                x[..., r.integers(shape[-2]), :] *= np.float32(10)
        elif how == "equal":
            x[...] = x[..., :1, :]
        elif how == "special":
            count = self.randint(1, 3)
            for _ in range(count if x.size else 0):
                x.reshape(-1)[r.integers(x.size)] = self.choice((np.nan, np.nan, np.inf, -np.inf))
        return x.astype(dtype, copy=False)
