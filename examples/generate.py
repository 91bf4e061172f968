"""Text, id by id, from a Llama in NumPy through cyflash's KV caches: how fast, how large and how exact each one is.

    python examples/generate.py                                          # seeded weights, caches in fp32 and int8
    python examples/generate.py --model FOLDER --dtypes fp32 bf16 int8   # config.json and .safetensors files

The first cache generates greedily, the others are led through the same text. All are judged by one forward pass over
the text without a cache. Causal attention makes its row at each position what a pass that ends there would give: the
next id of an fp32 cache has to be the same everywhere, or the exit status is 1. For the others, "same id" is the share
of positions where it is, and KL the divergence of their probabilities from those without a cache.

There is no tokenizer: the prompt is random ids or --ids 1 2 3, ids come out, and none of them ends the text.
"""

import argparse
import sys
import time
from typing import NamedTuple

import numpy as np
from llama import load, seeded
from rich.console import Console
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits

import cyflash
from cyflash.output import as_bytes, empty_table

SIZES = {"layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 64, "vocabulary": 1024}


class Run(NamedTuple):
    """What one kind of cache did: the logits that chose each new id, its bytes, seconds of prefill and of decode."""

    dtype: str
    logits: np.ndarray
    nbytes: int
    prefill: float
    decode: float


def main(arguments=None):
    args = parse(arguments)
    try:
        cyflash.set_num_threads(args.threads or (None if args.model else 1))  # seeded: small products
        with threadpool_limits(cyflash.cpu_info()["threads"], "blas"):
            return report(args)
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2


def report(args):
    console, info = Console(highlight=False), cyflash.cpu_info()
    sizes = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in SIZES.items()}
    model = load(args.model) if args.model else seeded(**sizes, seed=args.seed)
    c = model.config
    prompt = make_prompt(args, c.vocab_size)
    console.print(
        f"{args.model or f'seeded weights {args.seed}'}: {c.num_hidden_layers} layers, {c.num_attention_heads} heads, "
        f"{c.num_key_value_heads} kv heads, head_dim {c.head_dim}, {c.vocab_size} ids"
    )
    console.print(f"SIMD build {info['implementation']}, threads: {info['threads']}")
    if not args.model:
        without, one_less = decided_by_attention(model, prompt)
        console.print(
            f"attention decides: without it {without:.0%} of the next ids are others, "
            f"{one_less:.0%} where no token sees itself"
        )
    text, first = generate(model, prompt, args.tokens, args.dtypes[0])
    runs = [first, *(follow(model, text, len(prompt), dtype) for dtype in args.dtypes[1:])]
    reference = recompute(model, text, len(prompt))

    console.print(f"{len(prompt)} ids in; out: {' '.join(map(str, text[len(prompt) :]))}")
    console.print(table(runs, reference, len(prompt)))
    return max(verdict(console, run, reference) for run in runs)


def generate(model, prompt, tokens, dtype):
    """(text, Run): the prompt and the `tokens` ids that follow it, each the one with the greatest logit."""
    text = np.concatenate((prompt, np.zeros(tokens, prompt.dtype)))
    return text, follow(model, text, len(prompt), dtype, greedy=True)


def follow(model, text, begin, dtype, greedy=False):
    """The Run of a cache through text: its first `begin` ids at once, the others one by one.

    greedy: write the ids from `begin` on instead of reading them.
    """
    c = model.config
    caches = [
        cyflash.KVCache(1, c.num_key_value_heads, c.head_dim, len(text), dtype) for _ in range(c.num_hidden_layers)
    ]

    def attend(layer, q, k, v):
        return cyflash.flash_attention_with_kvcache(q, caches[layer], k, v)

    logits = np.empty((len(text) - begin, c.vocab_size), np.float32)
    times = [time.perf_counter()]
    hidden = model.hidden(text[:begin], attend)
    for n, row in enumerate(logits):
        if n:
            hidden = model.hidden(text[begin + n - 1 : begin + n], attend, start=begin + n - 1)
        row[:] = model.logits(hidden[-1])
        if greedy:
            text[begin + n] = row.argmax()
        times.append(time.perf_counter())
    return Run(dtype, logits, sum(cache.nbytes for cache in caches), times[1] - times[0], times[-1] - times[1])


def recompute(model, text, begin):
    """The logits that choose each id from `begin` on, by one pass over the whole text, without a cache."""
    return model.logits(model.hidden(text[:-1], causal)[begin - 1 :])


def causal(layer, q, k, v):
    return cyflash.flash_attention(q, k, v, causal=True)


def decided_by_attention(model, ids):
    """Shares of positions where another id follows: without attention, and where no token sees itself."""

    def nothing(layer, q, k, v):
        return np.zeros_like(q)

    def one_less(layer, q, k, v):
        return cyflash.flash_attention(q, k, v, mask=np.tri(len(ids), k=-1, dtype=bool))

    proper, *others = (model.logits(model.hidden(ids, attend)) for attend in (causal, nothing, one_less))
    return tuple(1 - agreement(other, proper).mean() for other in others)


def table(runs, reference, begin):
    found = empty_table()
    found.padding = (0, 1)
    for name in ("cache", "memory", "prefill ids/s", "decode ids/s", "same id", "KL mean", "KL worst"):
        found.add_column(name, justify="left" if name == "cache" else "right")
    for run in runs:
        kl = divergences(run.logits, reference)
        steps = len(reference) - 1  # prefill gives the first id
        speeds = f"{begin / run.prefill:.0f}", f"{steps / run.decode:.0f}" if steps else "-"
        same = f"{agreement(run.logits, reference).mean():.1%}"
        found.add_row(run.dtype, as_bytes(run.nbytes), *speeds, same, f"{kl.mean():.1e}", f"{kl.max():.1e}")
    return found


def divergences(logits, reference):
    """(L,) Kullback-Leibler divergence of each position's probabilities from the reference's, in nats."""

    def divergence(row, other):
        p, q = log_softmax(other.astype(np.float64)), log_softmax(row.astype(np.float64))
        return np.exp(p) @ (p - q)

    return np.array([divergence(*rows) for rows in zip(logits, reference, strict=True)])


def agreement(logits, reference):
    """(L,) whether the greatest logit is at the same id; NaN is nowhere the same."""
    return (logits.argmax(axis=-1) == reference.argmax(axis=-1)) & ~np.isnan(logits + reference).any(axis=-1)


def verdict(console, run, reference):
    """0, or 1 for an fp32 cache that chose an id which recomputation does not; says how close a call it was."""
    if run.dtype != "fp32":
        return 0
    second, best = np.partition(reference, -2, axis=-1)[:, -2:].T
    margin, gap = best - second, np.abs(run.logits - reference).max()
    same = agreement(run.logits, reference)
    where = f"the closest choice was by {margin.min():.1e}, and logits differ by at most {gap:.1e}"
    if same.all():
        console.print(f"fp32: all {len(same)} ids are those recomputed without a cache; {where}")
        return 0
    n = int(same.argmin())
    console.print(
        f"fp32: id {n} of {len(same)} is not the one recomputed without a cache, a choice by {margin[n]:.1e}; {where}"
    )
    return 1


def make_prompt(args, vocabulary):
    if args.ids is None:
        return np.random.default_rng(args.seed).integers(0, vocabulary, args.prompt_length)
    if odd := [i for i in args.ids if not 0 <= i < vocabulary]:
        raise ValueError(f"--ids: expected ids from 0 to {vocabulary - 1}, got {odd[0]}")
    return np.array(args.ids)


def parse(arguments):
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FOLDER", help="config.json and .safetensors files; default: seeded weights")
    parser.add_argument("--tokens", type=positive, default=256, help="ids to generate (%(default)s)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-length", type=positive, default=256, help="random ids to begin with (%(default)s)")
    prompt.add_argument("--ids", type=int, nargs="+", help="ids to begin with")
    dtypes = ("fp32", "fp16", "bf16", "int8")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=["fp32", "int8"], help="caches (fp32 int8)")
    threads = "of cyflash and of NumPy's products (default: 1; all CPUs with --model)"
    parser.add_argument("--threads", type=positive, help=threads)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the prompt (%(default)s)")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, help=f"of the seeded model ({default})")
    args = parser.parse_args(arguments)
    if given := [name for name in SIZES if args.model and getattr(args, name) is not None]:
        parser.error(f"--{given[0].replace('_', '-')}: a model from a folder has its own; leave out one of the two")
    return args


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
