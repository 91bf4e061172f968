"""Outcomes of `cyflash bench` with made-up times, for the tests of its page: nothing is run."""

from dataclasses import replace

import numpy as np

from cyflash import cpu_info
from cyflash.bench import lengths
from cyflash.bench.cases import Case, Error
from cyflash.bench.decode_cases import Decode
from cyflash.bench.race import Race, Spread, Timing
from cyflash.bench.report import Outcome, Row

# GFLOP/s of one thread on long sequences, and the error.
FP32 = {"cyflash": 260, "numpy": 110, "torch": 100, "onnxruntime": 230, "openvino": 225}
BF16 = {"openvino bf16": 330}
INT8 = dict(zip(lengths.WAYS, (640, 600, 560, 450, 430), strict=True))
ERRORS = {"cyflash": 2e-7, "numpy": 3e-7, "torch": 4e-7, "onnxruntime": 3e-7, "openvino": 3e-7, "openvino bf16": 4e-3}
ERRORS |= dict(zip(lengths.WAYS, (2e-2, 9e-3, 9e-3, 6e-3, 6e-3), strict=True))


def timing(seconds, error, rng, rounds=9):
    times = [[seconds * (1 + 0.04 * x) for x in own] for own in rng.random((rounds, 3))]
    return Timing("way", {"way": seconds}, "", Error(error, error, 10, 10), 3, times)


def race(case, threads, rates, rng, failures=()):
    cases = {label: replace(case, int8=lengths.WAYS.get(label)) for label in rates}
    result = Race(threads, cases, failures={label: "made up <b>" for label in failures})
    for label, rate in rates.items():
        if label not in failures:
            slowdown = 1 + 400 / case.shape[2]
            result.timings[label] = timing(case.flops() * slowdown / (rate * threads * 1e9), ERRORS[label], rng)
    result.fma_rates, result.dot_rates = [290e9] * 9, [1000e9] * 9
    return result


def systems(names, threads):
    about = {"version": "1.0", "settings": {"setting": 1}, "threads": {"busy": threads, "cpu_over_wall": threads}}
    return {name: about for name in names}


def outcome(threads=(1, 2), shapes=(), caches=False, failures=(), rows=True):
    """As of `--lengths`; of `shapes` in fp32 where there are any; with caches as of `--decode`."""
    rng = np.random.default_rng(0)
    found = Outcome({"lengths": not shapes, "isa": None}, {"jax": "not installed"})
    found.environment["cpu"] = cpu_info() | {"model": "Made-up CPU"}
    for count in threads:
        found.systems[count] = systems({**FP32, **BF16}, count)
        for shape in shapes:
            found.races.append(race(Case(shape), count, FP32, rng, failures))
        if not shapes:
            for length in lengths.LENGTHS:
                found.int8.append(race(Case((1, 1, length, 64)), count, {**FP32, **BF16, **INT8}, rng, failures))
    if caches:
        found.caches = [cache(keys, rng) for keys in (8192, 16384)]
    if rows:
        found.rows = [Row("causal against not causal", Spread(1.96, 1.9, 2.0), "x"), Row("memory", None, "MB", "<why>")]
    return found


def cache(keys, rng):
    labels = {"cyflash": 5.2, "cyflash bf16": 2.7, "cyflash int8": 1.6, "torch": 10.0, "reading fp32": 4.9}
    result = Race(2, dict.fromkeys(labels, Decode((keys,), 32, 32, 128)))
    for label, milliseconds in labels.items():
        result.timings[label] = timing(milliseconds * keys / 8192e3, 3e-7, rng)
    return result
