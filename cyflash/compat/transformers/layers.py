"""What is kept with a model's modules: their names in the model, how they run int8, and who watches them.

Only scales of a model and `capture` need it. It is an attribute of the modules, so it lives and is copied with them.
"""
from collections.abc import Mapping
from pathlib import Path

from cyflash.quantized import LayerScales

ATTRIBUTE = "_cyflash_settings"
OPTIONS = ("granularity", "smooth_k", "fp32_sinks", "pv")  # of flash_attention_int8


class Settings:
    """Of one module."""

    def __init__(self, name=None, how=None, watcher=None):
        self.name = name  # in the model
        self.how = how  # Scales of the whole model, options of flash_attention_int8, or None: the defaults
        self.watcher = watcher  # is called with each layer's name, arrays and options; None: nobody

    def int8(self):
        """Arguments of `flash_attention_int8`."""
        how = default if self.how is None else self.how
        return how if isinstance(how, dict) else {"quant": self.layer_scales()}

    def layer_scales(self):
        """The LayerScales of this module; None where the model has no Scales."""
        if self.how is None or isinstance(self.how, dict):
            return None
        if self.name not in self.how:
            raise ValueError(
                f"int8: expected scales of the layer {self.name!r}; there are those of {', '.join(self.how)}"
            )
        return self.how[self.name]

    def pv_of(self, layer):
        """The `pv` of a call that reads codes of `layer`, of a Cache, whose scales must be these."""
        if layer.kv.dtype != "int8":
            raise ValueError(
                f"past_key_values: expected a Cache of dtype 'int8' with 'cyflash-int8', got one of "
                f"{layer.kv.dtype.name}; use attn_implementation='cyflash', or Cache(..., dtype='int8')"
            )
        scales = self.layer_scales()
        if scales is not None:
            if layer.quant is not scales:
                raise ValueError(
                    f"past_key_values: expected the scales of the layer {self.name!r} that `register` gave the model, "
                    "got a Cache with others; make it by Cache(model, ...) without scales"
                )
            return None
        how = self.int8()
        for name, value in how.items():
            if name != "pv" and value is not None:
                raise ValueError(
                    f"{name}: expected None with a Cache, which has made its own codes already, got {value!r} from "
                    "`register`"
                )
        return how.get("pv")

    def observe(self, q, k, v, options):
        if self.watcher is not None:
            self.watcher(self.name, q, k, v, options)

    def require_no_capture(self):
        if self.watcher is not None:
            raise NotImplementedError(
                "past_key_values: capture sees keys and values as the model makes them, which a Cache does not keep; "
                "use transformers' own caches within capture"
            )


default = {}
_plain = Settings()


def settings_of(module):
    return module.__dict__.get(ATTRIBUTE, _plain)


def own_settings(model):
    """{name: Settings} of all modules of a model, which have one each from now on."""
    for name, module in model.named_modules():
        if ATTRIBUTE not in module.__dict__:
            setattr(module, ATTRIBUTE, Settings())
        settings_of(module).name = name
    return {name: settings_of(module) for name, module in model.named_modules()}


def attention_layers(model):
    """Names of the modules that are attention, as far as their attributes tell."""
    return [name for name, module in model.named_modules() if hasattr(module, "is_causal")]


def checked_how(int8, model):
    """`int8` of `register` as Scales that fit the model, or as a dict of options."""
    from cyflash.quant import Scales

    if isinstance(int8, str | Path):
        int8 = Scales.load(int8)
    if isinstance(int8, Scales):
        return _fitting(int8, model)
    if isinstance(int8, LayerScales) or not isinstance(int8, Mapping):
        raise TypeError(
            f"int8: expected Scales, the path of their file, or a mapping of {', '.join(OPTIONS)}, got "
            f"{type(int8).__name__}"
        )
    for name in int8:
        if name not in OPTIONS:
            raise ValueError(f"int8: expected options among {', '.join(OPTIONS)}, got {name!r}")
    return dict(int8)


def _fitting(scales, model):
    if model is None:
        raise ValueError("model: expected the model whose layers the Scales name, got None; write register(model, ...)")
    unknown = scales.keys() - dict(model.named_modules()).keys()
    if unknown:
        own = ", ".join(attention_layers(model)) or "of which none is attention"
        raise ValueError(f"int8: expected scales of this model's layers, {own}; got those of {', '.join(scales)}")
    return scales
