from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS: dict[str, int]
LAYOUT: dict[str, int]

def count_values(
    x: NDArray[Any],
    mean: NDArray[np.float32] | None,
    seen: NDArray[np.uint8] | None,
    counts: NDArray[np.int64],
    sums: NDArray[np.int64],
    top: NDArray[np.float32],
    threads: int,
) -> None: ...
def sum_channels(
    x: NDArray[Any], seen: NDArray[np.uint8] | None, factor: float, total: NDArray[np.int64], threads: int
) -> None: ...
def fingerprints(x: NDArray[Any], seen: NDArray[np.uint8] | None, out: NDArray[np.uint64], threads: int) -> None: ...
