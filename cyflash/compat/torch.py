"""torch.nn.functional.scaled_dot_product_attention by cyflash, for the calls that a model makes within a `with`.

    sdpa_context(...)     a TorchFunctionMode: sees the calls of its thread, and takes those of CPU tensors
      eager                 sdpa.py, on the tensors' memory
      torch.compile         the operator cyflash::attention, which stays in the graph and does the same

Any name that the function was imported by is seen, and torch's fused layers, which would not call it, are not used.
"""
import itertools
import threading
import weakref
from functools import partial
from os import PathLike

try:
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.overrides import TorchFunctionMode
except ImportError as error:
    raise ImportError(f"cyflash.compat.torch needs torch; pip install 'cyflash-attn[torch]' ({error})") from error

from cyflash import sdpa
from cyflash.attention import attend, attend_int8
from cyflash.compat import torch_functional
from cyflash.cpu import threads
from cyflash.foreign import same_kind
from cyflash.quantized import LayerScales, checked_product

__all__ = ["sdpa_context"]

SDPA = torch.nn.functional.scaled_dot_product_attention
MULTI_HEAD = torch.nn.functional.multi_head_attention_forward
FUSED = (torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("exact", "int8")

class _OfThread(threading.local):
    def __init__(self):
        self.contexts = []  # that this thread is in, innermost last


_of_thread = _OfThread()
_lock, _entered, _fused_before = threading.Lock(), 0, True  # of what contexts share

# Operators take numbers: those of LayerScales, as long as somebody holds them.
_numbers = itertools.count()
_number_of = weakref.WeakKeyDictionary()
_layer_of = weakref.WeakValueDictionary()


class sdpa_context(TorchFunctionMode):
    """Within this context, `torch.nn.functional.scaled_dot_product_attention` of CPU tensors is computed by cyflash.

    Parameters
    ----------
    precision : {"exact", "int8"}, default "exact"
        As `cyflash.flash_attention`, or as `cyflash.flash_attention_int8`.
    scales : LayerScales, Scales, or path of a file of Scales, optional
        With "int8": static scales, for all calls, or for those of each layer. Default: scales are found in each call,
        one for each token, with the mean of the keys taken out.
    model : torch.nn.Module, optional
        With Scales: the model whose submodules have the layers' names; a call is of the innermost of these that is
        running.
    pv : {"int8", "bf16", "fp32"}, optional
        With "int8": arithmetic of the second product. Default: that of the scales, else "int8".
    fallback : {"error", "torch"}, default "error"
        What to do with a call that cannot be honoured, which are those with dropout, tensors that require a gradient
        (while gradients are computed), float64 and other dtypes, unlike dtypes, nested and sparse tensors, and
        subclasses of torch.Tensor: raise NotImplementedError, or call torch's own function.
    num_threads : int, optional
        As in `cyflash.flash_attention`. torch's own number does not count.

    Raises
    ------
    ValueError
        For another option; for scales without int8, or with a pv; for a model that has not all layers of the scales.
    TypeError
        For scales that are none, a Scales without a model, or a model without a Scales.
    NotImplementedError
        Within: for a call that cannot be honoured, with fallback="error".

    Notes
    -----
    Tensors on other devices are torch's, whatever fallback is. What does not call this function is not replaced:
    `torch.nn.MultiheadAttention` with need_weights=True, attention written out in products and softmax, scripted
    modules. Rows that see no key are 0. With is_causal and an attn_mask both, a call raises, as torch documents it.

    The context is that of a thread; each thread enters its own. It may be used again; of contexts within each other the
    innermost counts. While there is one, torch's fused layers of `torch.nn` are off in the process
    (`torch.backends.mha`): they compute attention inside. Every function of torch takes a microsecond or two more
    within it.

    `torch.compile` has its own graphs for calls within and without; attention is the operator `cyflash::attention` in
    them, and fullgraph=True works. The operator has no gradient. With the Scales of layers it compiles again whenever
    the context is entered: enter once, around many calls.

    Examples
    --------
    >>> import torch
    >>> from cyflash.compat.torch import sdpa_context
    >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    >>> x = torch.randn(2, 100, 64)
    >>> with torch.no_grad():
    ...     expected = layer(x)
    ...     with sdpa_context():
    ...         found = layer(x)
    >>> bool((found - expected).abs().max() < 1e-5)
    True
    """

    def __init__(self, precision="exact", *, scales=None, model=None, pv=None, fallback="error", num_threads=None):
        super().__init__()
        for name, value, allowed in (("precision", precision, PRECISIONS), ("fallback", fallback, ("error", "torch"))):
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
        for name, value in (("scales", scales), ("pv", pv)):
            if value is not None and precision != "int8":
                raise ValueError(f"{name}: expected None with precision={precision!r}; it is for 'int8'")
        self.precision, self.fallback = precision, fallback
        self.pv = None if pv is None else checked_product(pv)
        self.num_threads = None if num_threads is None else threads.checked("num_threads", num_threads)
        self._layers = {}  # {module: number of its LayerScales}
        self._running = []  # those modules among them that are in their forward, innermost last
        self._number = None  # of the LayerScales of all calls
        self._hooks, self._thread = [], None
        self._covered = 0  # contexts within this one
        self._set_scales(scales, model)

    def _set_scales(self, scales, model):
        if isinstance(scales, (str, PathLike)):
            from cyflash.quant import Scales

            scales = Scales.load(scales)
        if scales is None or isinstance(scales, LayerScales):
            if model is not None:
                raise TypeError(f"model: expected None without the Scales of layers, got {type(model).__name__}")
            self._scales, self._number = scales, None if scales is None else _number(scales)
            return
        from cyflash.quant import Scales

        if not isinstance(scales, Scales):
            raise TypeError(f"scales: expected a LayerScales, a Scales or the path of one, got {type(scales).__name__}")
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"model: expected the torch.nn.Module whose submodules are the layers of the scales, got {model!r}; "
                "for one layer pass scales=scales[name]"
            )
        modules = dict(model.named_modules())
        missing = [name for name in scales if name not in modules]
        if missing:
            raise ValueError(
                f"scales: expected names of the model's submodules, got layers that are none: {', '.join(missing)}; "
                f"the model has {', '.join(name for name in modules if name)}"
            )
        self._scales = scales
        self._layers = {modules[name]: _number(layer) for name, layer in scales.items()}

    # Entering and leaving

    def __enter__(self):
        if self._thread is not None:
            raise RuntimeError("sdpa_context: expected one that nobody is in, got one that was entered already")
        self._thread = threading.get_ident()
        for module in self._layers:
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))
        for outer in _of_thread.contexts:
            outer._covered += 1
        _of_thread.contexts.append(self)
        _without_fused_layers(1)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        _without_fused_layers(-1)
        _of_thread.contexts.remove(self)
        for outer in _of_thread.contexts:
            outer._covered -= 1
        while self._hooks:
            self._hooks.pop().remove()
        self._thread = None

    def _begin(self, module, args):
        if self._is_here():
            self._running.append(self._layers[module])

    def _end(self, module, args, result):
        if self._is_here():
            self._running.pop()

    def _is_here(self):
        """Whether this is the context's thread: others may run the same model."""
        return torch.compiler.is_compiling() or threading.get_ident() == self._thread

    # Calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._covered:
            return func(*args, **kwargs)
        if func is SDPA:
            return self._attend(*args, **kwargs)
        if func is MULTI_HEAD:
            torch_functional.context.attend = self._attend
            try:
                return torch_functional.multi_head_attention_forward(*args, **kwargs)
            finally:
                torch_functional.context.attend = None
        if func is torch.Tensor.unflatten and torch.compiler.is_compiling():  # whose super() dynamo cannot follow here
            return torch.unflatten(*args, **kwargs)
        if func in FUSED and self.fallback == "error":
            raise NotImplementedError(
                f"{func.__name__}: this fused layer of torch computes attention inside, where cyflash cannot; call "
                "torch.backends.mha.set_fastpath_enabled(False), or pass fallback='torch'"
            )
        return func(*args, **kwargs)

    def _attend(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ):
        tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        if any(x.device.type != "cpu" for x in tensors):
            return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        reason = _why_not(tensors, dropout_p)
        if reason is not None:
            if self.fallback == "torch":
                return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            raise NotImplementedError(
                f"scaled_dot_product_attention: {reason}; torch's own function takes such calls with "
                "sdpa_context(..., fallback='torch')"
            )
        number = self._number
        if self._layers:
            if not self._running:
                raise RuntimeError(
                    "scaled_dot_product_attention: expected a call within a layer of the scales, got one outside of "
                    f"them; they are {', '.join(self._scales)}"
                )
            number = self._running[-1]
        how = (is_causal, scale, enable_gqa, self.precision, self.pv, number, self.num_threads)
        if torch.compiler.is_compiling() or isinstance(query, FakeTensor):
            return _operator(query, key, value, attn_mask, *how)
        return _compute(query, key, value, attn_mask, *how)


def _why_not(tensors, dropout_p):
    """What cyflash cannot do about a call, in words, or None."""
    query, key, value, *mask = tensors
    if dropout_p:
        return f"dropout is not implemented, got dropout_p={dropout_p}; in a model, call model.eval()"
    for x in tensors:
        if type(x) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
            return f"expected plain tensors, got {type(x).__name__}"
        if x.layout is not torch.strided or x.is_nested:
            return f"expected dense tensors, got layout {x.layout}{' of a nested one' if x.is_nested else ''}"
        if x.requires_grad and torch.is_grad_enabled():
            return "gradients are not computed, got a tensor that requires one; call within torch.no_grad()"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        got = ", ".join(str(x.dtype) for x in (query, key, value))
        return f"expected float32, float16 or bfloat16, the same for query, key and value, got {got}"
    if mask and mask[0].dtype not in (torch.bool, torch.float32, query.dtype):
        return f"expected an attn_mask of bool, float32 or {query.dtype}, got {mask[0].dtype}"
    return None


@partial(torch.library.custom_op, "cyflash::attention", mutates_args=(), device_types="cpu")
def _operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool,
    scale: float | None, enable_gqa: bool, precision: str, pv: str | None, layer: int | None, num_threads: int | None,
) -> torch.Tensor:
    return _compute(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, precision, pv, layer, num_threads
    )


@_operator.register_fake
def _like_the_output(
    query, key, value, attn_mask, is_causal, scale, enable_gqa, precision, pv, layer, num_threads
):
    shapes = [x.shape[:-3] if enable_gqa else x.shape[:-2] for x in (query, key, value)]
    lead = torch.broadcast_shapes(*shapes)
    heads = query.shape[-3:-2] if enable_gqa else ()
    return query.new_empty((*lead, *heads, query.shape[-2], value.shape[-1]))


def _compute(query, key, value, attn_mask, is_causal, scale, enable_gqa, precision, pv, layer, num_threads):
    if precision == "exact":
        function = partial(attend, num_threads=num_threads)
    else:
        quant = None if layer is None else _layer_of[layer]
        function = partial(attend_int8, quant=quant, pv=pv, num_threads=num_threads)
    return _attended(function, query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)


_attended = same_kind(sdpa.attended)


def _number(layer):
    """The number of a LayerScales, the same as long as it lives."""
    with _lock:
        number = _number_of.get(layer)
        if number is None:
            number = _number_of[layer] = next(_numbers)
            _layer_of[number] = layer
        return number


def _without_fused_layers(entered):
    """Turn torch's fused layers off when the first context is entered, and on again when the last one is left."""
    global _entered, _fused_before
    with _lock:
        if not _entered:
            _fused_before = torch.backends.mha.get_fastpath_enabled()
        _entered += entered
        torch.backends.mha.set_fastpath_enabled(_fused_before and not _entered)
