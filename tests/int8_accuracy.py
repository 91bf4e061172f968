"""The accuracy table of int8 attention: relative L1 error against float64, on real activations and synthetic ones.

    python tests/int8_accuracy.py            prints the table of this machine beside the committed one
    python tests/int8_accuracy.py --write    and commits it to tests/data/int8_accuracy.json

test_int8_accuracy.py makes the table again and compares it with that file.
"""
import argparse
import functools
import json
from pathlib import Path

import numpy as np

import cyflash
from cyflash.capture import load_capture
from cyflash.quant import compare, fixtures

SCHEMES = {  # the names of `cyflash compare`
    "int8 tensor": {"granularity": "tensor", "smooth_k": False},
    "int8 head": {"granularity": ("head", "head", "token"), "smooth_k": True},
    "int8 token": {},
    "int8 token, bf16 PV": {"pv": "bf16"},
    "int8 token, fp32 PV": {"pv": "fp32"},
}
ACTIVATIONS = Path(__file__).parent.parent / "examples" / "data" / "minilm.safetensors"
COMMITTED = Path(__file__).parent / "data" / "int8_accuracy.json"


@functools.cache
def activations():
    """(q, k, v), options, float64 output of every layer of the shipped file."""
    capture = load_capture(ACTIVATIONS)
    return [(layer, capture.options, cyflash.reference.attention(*layer, **capture.options))
            for layer in capture.values()]


@functools.cache
def synthetic(name, seed=0):
    """(q, k, v), options, float64 output of one distribution."""
    qkv = fixtures.draw(name, seed, H=1, Lk=1024)
    return qkv, {}, cyflash.reference.attention(*qkv)


def error(case, scheme):
    qkv, options, expected = case
    return compare(cyflash.flash_attention_int8(*qkv, **options, **SCHEMES[scheme]), expected)


def row(scheme):
    """{column: relative L1} of one scheme on the build in use: mean over layers and worst head of all, then each
    distribution."""
    return _row(scheme, cyflash.cpu_info()["implementation"])


@functools.cache
def _row(scheme, build):
    real = [error(case, scheme) for case in activations()]
    return {
        "mean": float(np.mean([c.rel_l1 for c in real])),
        "worst head": max(c.worst_head for c in real),
        **{name: error(synthetic(name), scheme).rel_l1 for name in fixtures.ALL},
    }


def committed():
    return json.loads(COMMITTED.read_text())


def show(table, before):
    from rich.console import Console
    from rich.table import Table

    grid = Table("relative L1", *table, title=f"int8 accuracy, build {cyflash.cpu_info()['implementation']}")
    for column in next(iter(table.values())):
        cells = [f"{100 * r[column]:.3f} %" for r in table.values()]
        old = [f" ({100 * before[s][column]:.3f})" if column in before.get(s, {}) else "" for s in table]
        grid.add_row(column, *(a + b for a, b in zip(cells, old, strict=True)))
    Console(width=150).print(grid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the accuracy table of int8 attention (committed beside).")
    parser.add_argument("--write", action="store_true", help=f"replace {COMMITTED.name}")
    arguments = parser.parse_args()
    table = {scheme: row(scheme) for scheme in SCHEMES}
    show(table, committed() if COMMITTED.exists() else {})
    if arguments.write:
        COMMITTED.parent.mkdir(exist_ok=True)
        rounded = {s: {column: round(x, 6) for column, x in r.items()} for s, r in table.items()}
        COMMITTED.write_text(json.dumps(rounded, indent=1) + "\n")
        print(f"Written: {COMMITTED}")
