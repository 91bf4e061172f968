"""What the tests of cyflash.compat.dask run in workers, which import it by this name."""
import os
import time
from pathlib import Path

import numpy as np


def arrays(seed, H=2, Hk=None, Lq=24, Lk=None, D=8):
    r = np.random.default_rng(seed)
    shapes = ((H, Lq, D), (Hk or H, Lk or Lq, D), (Hk or H, Lk or Lq, D))
    return tuple(r.standard_normal(shape, dtype=np.float32) for shape in shapes)


def entry(seed, layer="layer0", **sizes):
    return layer, *arrays(seed, **sizes)


def entries(seed):
    return [entry(seed), (*entry(seed + 100, "layer1"), {"causal": True})]


def pair(k, v):
    return k, v


def slow_entry(seed, folder, seconds):
    """Says that it runs, and in which process, then takes its time."""
    Path(folder, f"{seed}.{os.getpid()}").touch()
    time.sleep(seconds)
    return entry(seed)


def slow_pair(k, v, folder, seconds):
    Path(folder, f"{time.monotonic_ns()}.{os.getpid()}").touch()
    time.sleep(seconds)
    return k, v


def die():
    os._exit(1)


def value(x):
    return x
