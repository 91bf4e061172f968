"""Types of the public names of cyflash.quant."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from cyflash import LayerScales as LayerScales
from cyflash import QuantizedTensor as QuantizedTensor
from cyflash import quantize as quantize
from cyflash.annotations import Align, Array, Granularity
from cyflash.capture import Capture
from cyflash.quant import fixtures as fixtures
from cyflash.quant.histogram import Histogram
from cyflash.quant.tiles import Tile
from cyflash.quant.watching import Watch

__all__ = [
    "Calibrator",
    "Comparison",
    "LayerScales",
    "QuantizedTensor",
    "Scales",
    "compare",
    "evaluate",
    "fixtures",
    "load_capture",
    "quantize",
    "save_capture",
    "watch",
]

class Calibrator:
    granularity: tuple[Granularity, Granularity, Granularity]
    fp32_sinks: int
    smooth_k: bool | Literal["auto"]
    reservoir_mb: float
    nonfinite: Literal["raise", "ignore"]
    seed: int
    def __init__(
        self,
        granularity: Granularity | Sequence[Granularity] = "tensor",
        *,
        fp32_sinks: int = 0,
        smooth_k: bool | Literal["auto"] = "auto",
        reservoir_mb: float = 64,
        nonfinite: Literal["raise", "ignore"] = "raise",
        seed: int = 0,
    ) -> None: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def layers(self) -> tuple[str, ...]: ...
    def observe(
        self,
        name: str,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = False,
        causal_align: Align = "bottom-right",
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        bias: Array | None = None,
        mask: Array | None = None,
        alibi_slopes: Array | Sequence[float] | None = None,
        sinks: Array | Sequence[float] | None = None,
    ) -> None: ...
    def merge(self, other: Calibrator) -> Self: ...
    def summary(self) -> list[dict[str, Any]]: ...
    def histogram(self, name: str, part: Literal["q", "k", "k_centred", "v"], head: int | None = None) -> Histogram: ...
    def tiles(self, name: str) -> tuple[list[Tile], list[Tile]]: ...
    def compute(
        self,
        method: Literal["output", "max", "percentile", "mse", "octav", "entropy"] = "output",
        *,
        percentile: float = 99.9999,
        objective: Literal["rel_l1", "rmse", "worst_row"] = "rel_l1",
        progress: Callable[[str], object] | None = None,
    ) -> Scales: ...
    def plan(
        self, *, rel_l1: float = 0.02, worst: float = 0.05, progress: Callable[[str], object] | None = None
    ) -> Scales: ...
    def save(self, path: str | PathLike[str]) -> Path: ...
    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self: ...

class Comparison(NamedTuple):
    rel_l1: float
    cosine: float
    rmse: float
    max_abs: float
    worst_head: float
    worst_row: float

class Scales(Mapping[str, LayerScales]):
    settings: dict[str, Any]
    about: dict[str, dict[str, Any]]
    def __init__(
        self,
        layers: Mapping[str, LayerScales],
        *,
        settings: Mapping[str, Any] | None = None,
        about: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None: ...
    def __getitem__(self, name: str) -> LayerScales: ...
    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def __eq__(self, other: object) -> bool: ...
    __hash__: None  # type: ignore[assignment]
    def save(self, path: str | PathLike[str]) -> Path: ...
    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self: ...
    def to_vllm(self, directory: str | PathLike[str]) -> Any: ...
    @classmethod
    def from_vllm(cls, directory: str | PathLike[str]) -> Self: ...

def compare(output: Array, reference: Array) -> Comparison: ...
def evaluate(
    q: Array,
    k: Array,
    v: Array,
    *,
    schemes: Iterable[str] | Mapping[str, Any] | None = None,
    num_threads: int | None = None,
    **options: Any,
) -> list[dict[str, Any]]: ...
def load_capture(path: str | PathLike[str], layout: Literal["bhld", "blhd"] = "bhld") -> Capture: ...
def save_capture(
    path: str | PathLike[str],
    layers: Mapping[str, tuple[Array, Array, Array]] | tuple[Array, Array, Array],
    **options: Any,
) -> Path: ...
def watch(scales: Mapping[str, LayerScales]) -> Watch: ...
