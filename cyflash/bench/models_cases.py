"""Cases of `--transformers`: a forward pass of an encoder, a step of generation, sentences that become embeddings.

Models have random weights of the sizes named, and MiniLM its own, from an installed package. What is judged is the
output of the attention of every layer, or the embeddings, against the same model with attention in float64.
"""

from dataclasses import dataclass, replace

import numpy as np

from cyflash.bench.cases import Parts
from cyflash.flops import attention_flops

BATCH = 40  # sentences that are padded to one length
EXACT = "exact"  # the implementation whose attention is in float64


@dataclass(frozen=True)
class Encoder:
    """Tokens through a BERT with weights that make attention choose. `attention`: an attn_implementation. Time is that
    within the attention function."""

    attention: str = EXACT
    tokens: int = 512
    batch: int = 1
    layers: int = 12
    heads: int = 12
    D: int = 64

    def title(self):
        shape = f"{self.layers} layers, {self.heads} heads, D={self.D}"
        return f"BERT, {shape}, {self.batch} x {self.tokens} tokens: attention"

    def question(self):
        return replace(self, attention=EXACT)

    def flops(self):
        return self.layers * attention_flops(self.batch, self.heads, self.tokens, self.tokens, self.D, self.D)

    def expected(self):
        from cyflash.bench.models_systems import attended

        return Parts(*_whole(attended(self.question())))


@dataclass(frozen=True)
class Step:
    """A token through a Llama whose cache holds `keys` tokens. `kept`: dtype of the Cache of cyflash; None: a
    DynamicCache. Time is that within the attention function, `with_cache` that of the cache's update as well."""

    attention: str = EXACT
    kept: str | None = None
    with_cache: bool = False
    keys: int = 8192
    layers: int = 8
    heads: int = 32
    kv_heads: int = 8
    D: int = 128
    dtype: str = "float32"  # of the model

    def title(self):
        what = "attention and cache" if self.with_cache else "attention"
        shape = f"{self.layers} layers, {self.heads}/{self.kv_heads} heads, D={self.D}"
        return f"Llama {self.dtype}, {shape}, a token after {self.keys}: {what}"

    def question(self):
        return replace(self, attention=EXACT, kept=None, with_cache=False)

    def flops(self):
        return self.layers * attention_flops(1, self.heads, 1, self.keys + 1, self.D, self.D)

    def expected(self):
        from cyflash.bench.models_systems import attended

        return Parts(*_whole(attended(self.question())))


@dataclass(frozen=True)
class Sentences:
    """`n` sentences to embeddings by all-MiniLM-L6-v2, in batches of BATCH of like lengths. All of it is timed, but for
    making tokens."""

    attention: str = EXACT
    n: int = 200

    def title(self):
        return f"all-MiniLM-L6-v2, {self.n} sentences to embeddings"

    def question(self):
        return replace(self, attention=EXACT)

    def flops(self):
        return 0

    def expected(self):
        from cyflash.bench.models_systems import embeddings

        return Parts(*_whole(embeddings(self.question())))


def _whole(x):
    return x.shape, [(np.s_[:], x.astype(np.float64))]
