"""Types that the signatures of cyflash are written with (the .pyi files), for annotations of your own.

Array stands for whatever cyflash takes and gives back: ndarrays, tensors of torch, arrays of JAX and CuPy.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

__all__ = ["Align", "Array", "ArrayT", "Granularity", "Product", "Scale"]


class Array(Protocol):
    """An array of any library."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=Array)
Align = Literal["bottom-right", "top-left"]
Granularity = Literal["tensor", "head", "token"]
Product = Literal["int8", "bf16", "fp32"]
Scale = float | Array | Sequence[Any]
