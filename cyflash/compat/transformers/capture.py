"""What the attention layers of a model are given, while it runs: for a Calibrator, or for a capture file."""
import contextlib
from pathlib import Path

import numpy as np

from cyflash.capture import OPTIONS, save_capture
from cyflash.compat.transformers.layers import own_settings
from cyflash.compat.transformers.registry import register_names


@contextlib.contextmanager
def capture(model, into=None):
    """Within the `with`, show queries, keys and values of every call of attention of a model to a Calibrator.

    The model computes with "cyflash" meanwhile, exact attention, and has its attn_implementation back afterwards.

    Parameters
    ----------
    model : PreTrainedModel
        Layers have the names that its modules have in it, such as "model.layers.0.self_attn".
    into : Calibrator or path, optional
        A path ending in .npz or .safetensors: a capture file is written at the end, with a layer
        ``call<n>.<name>`` for the n-th call of each layer; `cyflash calibrate --rename 'call[0-9]+[.]='` takes them for
        one. Default: a new Calibrator.

    Yields
    ------
    Calibrator or Path
        What it goes into.

    Raises
    ------
    ValueError
        For what the Calibrator refuses; for a file, where layers differ in their options, such as windows, or where a
        mask or a bias is needed: files hold neither. The file is not written where the block raised.
    RuntimeError
        Where no layer was called through transformers' attention interface.
    NotImplementedError
        For keys and values of a `Cache`, and for whatever "cyflash" cannot honour.

    Notes
    -----
    Each call counts as it is: a padded batch with its padding hidden, a decoding step with all the keys that it reads.
    Prompts are what to calibrate on. Bias and mask may differ from call to call.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from cyflash.compat.transformers import capture, register
    >>> model = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    ...                              intermediate_size=32)).eval()
    >>> ids = torch.arange(1, 41).reshape(2, 20)
    >>> with torch.no_grad(), capture(model) as calibrator:
    ...     for _ in range(4):
    ...         _ = model(ids.roll(1, 1))
    >>> calibrator.layers
    ('encoder.layer.0.attention.self',)
    >>> register(model, int8=calibrator.compute("max"))
    >>> with torch.no_grad():
    ...     model(ids).last_hidden_state.shape
    torch.Size([2, 20, 32])
    """
    if into is None:
        from cyflash.quant import Calibrator

        into = Calibrator()
    file = _File(Path(into)) if isinstance(into, str | Path) else None
    observe = into.observe if file is None else file.observe
    called = set()

    def watch(name, q, k, v, options):
        observe(name, q, k, v, **{key: value for key, value in options.items() if value is not None})
        called.add(name)

    settings = own_settings(model)
    configs = {id(x.config): x.config for x in model.modules() if hasattr(x, "set_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    register_names()
    model.set_attn_implementation("cyflash")
    for one in settings.values():
        one.watcher = watch
    try:
        yield into if file is None else file.path
    finally:
        for one in settings.values():
            one.watcher = None
        for config, implementation in before:  # outermost first: setting one sets those within it
            config._attn_implementation = implementation
    if not called:
        raise RuntimeError(
            f"model: no layer of {type(model).__name__} was called through transformers' attention interface within "
            "capture; was the model called?"
        )
    if file is not None:
        file.write()


class _File:
    """Copies of what was seen, and the options that all of it shares."""

    def __init__(self, path):
        self.path, self.layers, self.options, self.first = path, {}, None, None

    def observe(self, name, q, k, v, **options):
        for option, value in options.items():
            if option not in OPTIONS:
                raise ValueError(
                    f"layer {name!r}: a capture file holds no {option}, got one of shape {np.shape(value)}; run "
                    "sequences without padding, or capture into a Calibrator"
                )
        plain = {option: x.tolist() if isinstance(x, np.ndarray) else x for option, x in options.items()}
        if self.options is None:
            self.options, self.first = plain, name
        elif plain != self.options:
            raise ValueError(
                f"layer {name!r}: expected the options of {self.first!r}, {self.options}, since a capture file has one "
                f"set for all of its layers, got {plain}; capture into a Calibrator"
            )
        call = 0
        while f"call{call}.{name}" in self.layers:
            call += 1
        self.layers[f"call{call}.{name}"] = [_storable(x) for x in (q, k, v)]

    def write(self):
        save_capture(self.path, self.layers, **self.options)


def _storable(x):
    """A copy, in float32 where it is bfloat16."""
    return np.array(x, x.dtype if x.dtype.kind == "f" else np.float32, order="C")
