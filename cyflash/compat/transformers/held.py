"""Keys and values that a Cache holds, as tensors that only cyflash's attention can read."""
import torch


class Held(torch.Tensor):
    """Stands for the keys or the values of one layer of a Cache: shape and dtype, no numbers.

    A model passes it from `Cache.update` to the attention function, which reads the cache where it lies. Whatever else
    asks for its numbers, such as another attn_implementation, raises: a copy of them would be made for each token.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # __torch_dispatch__ sees all that asks for numbers

    @staticmethod
    def __new__(cls, layer, part, shape, dtype):
        held = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        held.layer, held.part = layer, part
        return held

    def require_whole(self, value, keys):
        """Raise unless this is a layer as it is now, with its values, of which all `keys` are attended to."""
        now = int(self.layer.kv.lengths.max(initial=0))
        if not isinstance(value, Held) or value.layer is not self.layer:
            raise ValueError("value: expected the values of the same layer of the Cache as key, got others")
        if not keys == self.shape[2] == now:
            raise ValueError(
                f"key: expected all {now} tokens of the Cache, got {self.shape[2]} of an earlier state, of which "
                f"{keys} are attended to"
            )

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(
            f"past_key_values: the tokens of a cyflash Cache are read by attn_implementation='cyflash' or "
            f"'cyflash-int8' alone, but {function} was called on them; write model.set_attn_implementation('cyflash'), "
            "or use a cache of transformers"
        )

    def __repr__(self):
        return f"Held({self.part} of {self.layer}, {tuple(self.shape)})"
