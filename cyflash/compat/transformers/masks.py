"""Masks that say what they mean: causal, a window, padding. The kernels never see a (Lq, Lk) array for these.

    mask_of(...)    what transformers calls instead of its own mask functions: a Mask, or, where the pattern is none of
                    these (packed sequences, blocks of an image, a model's own function), a dense tensor of bool
    Mask            a tensor (B, 1, Lq, Lk) of bool for everybody who looks at it: any operation of torch makes it dense
                    first. `options` is what the attention function reads instead.
"""
import inspect

import torch
from torch.utils._pytree import tree_map
from transformers import masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from cyflash.compat.transformers.tensors import as_array

# Functions of transformers that close over a number or over other functions are known by their code.
_ALL_OF = masking_utils.and_masks(causal_mask_function).__code__
_NOT_BEFORE = masking_utils.sliding_window_overlay(1).__code__
_NEAR = masking_utils.sliding_window_bidirectional_overlay(1).__code__


def mask_of(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function, attention_mask=None,
    device="cpu", **kwargs,
):
    """The mask of a forward pass, as `transformers.AttentionMaskInterface` asks for it.

    Query i stands at position q_offset + i, key j at kv_offset + j. `mask_function` says for a pair of positions
    whether it is visible; `attention_mask`, (B, positions) of bool, is False where a token is padding.
    """
    left_right = visible_sides(mask_function)
    offset = int(q_offset) - int(kv_offset)
    if left_right is not None and not torch.compiler.is_compiling():
        left, right = left_right
        shape = batch_size, 1, q_length, kv_length
        seen = offset + q_length if right == 0 else kv_length  # of more keys none is visible
        if seen <= kv_length and (right == 0 or left == right == -1 or offset == kv_length - q_length):
            padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
            if padding is not None:
                padding = padding[:, kv_offset : kv_offset + kv_length]
            return Mask(shape, left, right, offset, seen, padding)
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **kwargs
    )


def visible_sides(mask_function):
    """(left, right): positions p - left to p + right are visible from p, -1 is unbounded. None: another pattern."""
    if mask_function is causal_mask_function:
        return -1, 0
    if mask_function is bidirectional_mask_function:
        return -1, -1
    code = getattr(mask_function, "__code__", None)
    if code not in (_ALL_OF, _NOT_BEFORE, _NEAR):
        return None
    held = inspect.getclosurevars(mask_function).nonlocals
    if code is _ALL_OF:
        sides = [visible_sides(one) for one in held.get("mask_functions", [None])]
        return None if None in sides else tuple(map(_narrower, *sides)) if len(sides) > 1 else sides[0]
    window = held.get("sliding_window")
    if not isinstance(window, int):
        return None
    return (window - 1, -1) if code is _NOT_BEFORE else (window, window)


def _narrower(*sides):
    return min((side for side in sides if side >= 0), default=-1)


class Mask(torch.Tensor):
    """Which of (B, 1, Lq, Lk) pairs are visible, by rules."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # __torch_dispatch__ sees all that asks for numbers

    @staticmethod
    def __new__(cls, shape, left, right, offset, seen, padding):
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool)
        mask.sizes = tuple(shape)
        mask.left, mask.right, mask.offset, mask.seen = left, right, offset, seen
        mask.padding = padding  # (B, Lk) of bool, False hides; or None
        mask.made_dense = None
        return mask

    def options(self):
        """(keys, {...}): how many keys, the first ones, to attend to, with which options of `flash_attention`."""
        options = {"causal": self.right == 0, "window": (self.left, self.right)}
        if (self.left, self.right) in ((-1, 0), (-1, -1)):
            options["window"] = None
        if self.padding is not None:
            padding = as_array("attention_mask", self.padding)[:, : self.seen]
            if not padding.all():
                options["mask"] = padding[:, None, None]
        return self.seen, options

    def dense(self):
        """The tensor of bool. From then on it is what counts: whoever asked for it may have written to it."""
        if self.made_dense is None:
            B, _, Lq, Lk = self.shape
            distance = torch.arange(Lq)[:, None] + self.offset - torch.arange(Lk)
            visible = torch.ones_like(distance, dtype=torch.bool)
            if self.left >= 0:
                visible &= distance <= self.left
            if self.right >= 0:
                visible &= -distance <= self.right
            visible = visible[None, None].expand(B, 1, Lq, Lk)
            self.made_dense = visible.clone() if self.padding is None else visible & self.padding[:, None, None]
        return self.made_dense

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(x):
            return x.dense() if isinstance(x, Mask) else x

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __repr__(self):
        padded = "" if self.padding is None else ", padding"
        return f"Mask({tuple(self.shape)}, left={self.left}, right={self.right}, offset={self.offset}{padded})"
