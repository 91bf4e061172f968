"""Random calls of every kind, on one thread and on four, with the same bits: what races.py watches.

    python tests/random_calls.py [--builds baseline ...] [--seconds 60] [--seed 0]

Goes through whole rounds of the kinds until the time is over. Prints a line of JSON that says what was run.
"""
import argparse
import itertools
import json
import time

import cases
import numpy as np

import cyflash
from cyflash.quant import Calibrator

THREADS = (1, 4)


def attention(r, threads):
    """Any shape, plain or with every option, in fp32 and int8."""
    B, H, Lq, Lk, D = r.integers(1, 3), 2 * r.integers(1, 3), *r.integers(1, 200, 2), r.integers(1, 70)
    options = cases.all_options(B, H, Lq, Lk) if r.random() < 0.5 else {}
    q, k, v = cases.arrays(B, H, H // 2, Lq, Lk, D, seed=int(r.integers(1 << 30)))
    how = {"fp32_sinks": min(int(r.integers(0, 3)), Lk), "pv": ("int8", "bf16", "fp32")[r.integers(3)]}
    return (
        *cyflash.flash_attention(q, k, v, **options, return_lse=True, num_threads=threads),
        *cyflash.flash_attention_int8(q, k, v, **options, **how, return_lse=True, num_threads=threads),
    )


def halves(r, threads):
    q, k, v = cases.arrays(2, 2, 1, *r.integers(1, 150, 2), r.integers(1, 70), seed=int(r.integers(1 << 30)))
    half = [x.astype(np.float16) for x in (q, k, v)]
    return (
        cyflash.flash_attention(*half, num_threads=threads).astype(np.float32),
        cyflash.flash_attention_int8(*half, num_threads=threads).astype(np.float32),
    )


def chunks(r, threads):
    """Keys in chunks, merged."""
    q, k, v = cases.arrays(1, 4, 2, r.integers(1, 9), r.integers(1, 9000), 17, seed=int(r.integers(1 << 30)))
    return (
        cyflash.flash_attention(q, k, v, num_threads=threads),
        cyflash.flash_attention_int8(q, k, v, num_threads=threads),
    )


def varlen(r, threads):
    ends = np.concatenate([[0], np.cumsum(r.integers(0, 60, 6))]).astype(np.int32)
    q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in cases.arrays(1, 2, 1, ends[-1], D=20))
    return (
        cyflash.flash_attention_varlen(q, k, v, ends, ends, causal=True, num_threads=threads),
        cyflash.flash_attention_int8_varlen(q, k, v, ends, ends, num_threads=threads),
    )


def caches(r, threads):
    cyflash.set_num_threads(threads)
    results, rows = [], r.integers(1, 9)
    for dtype in ("fp32", "fp16", "int8"):
        cache = cyflash.PagedKVCache(64, 16, 2, 40, dtype)
        numbers = [cache.add() for _ in range(3)]
        _, k, v = cases.arrays(3, 2, Lq=200, D=40)
        cache.append(k, v, rows=numbers, lengths=[200, 7, 111])
        q = cases.arrays(3, 4, Lq=rows, D=40)[0]
        results.append(cyflash.flash_attention_with_kvcache(q, cache, rows=numbers))
    return results


def calibration(r, threads):
    cyflash.set_num_threads(threads)
    q, k, v = cases.arrays(2, 4, 2, Lq=90, D=20, seed=int(r.integers(1 << 30)))
    calibrator = Calibrator()
    calibrator.observe("layer", q, k, v)
    codes = cyflash.quantize(k, "token", smooth=True)
    scales = calibrator.compute("max")["layer"]
    return codes.data.astype(np.float32), codes.scale, codes.mean, *(
        np.asarray(x, np.float32) for x in (scales.q_scale, scales.k_scale)
    )


KINDS = (attention, halves, chunks, varlen, caches, calibration)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--builds", nargs="+", default=["baseline"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    builds, end = arguments.builds, time.monotonic() + arguments.seconds
    for number, kind in zip(itertools.count(arguments.seed), itertools.cycle(KINDS)):
        if number > arguments.seed and kind is KINDS[0] and time.monotonic() > end:
            break
        print(f"seed {number}: {kind.__name__}", flush=True)
        for build in builds:
            with cyflash.set_implementation(build):
                one, several = (kind(np.random.default_rng(number), threads) for threads in THREADS)
            cases.assert_same_bits(several, one)
    seeds = number - arguments.seed
    print(json.dumps({"seeds": seeds, "calls": seeds * len(builds) * len(THREADS), "builds": builds}))


if __name__ == "__main__":
    main()
