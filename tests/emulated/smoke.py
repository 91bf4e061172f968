"""What runs on every emulated CPU: which build is chosen, that no other one can be forced, what both precisions give.
Prints it as JSON for test_emulated.py, which compares it with the references: those would take seconds more here."""
import importlib
import json
import os
import sys

import numpy as np

import cyflash
from cyflash import cpu


def refusal(name, force):
    """What is raised when build `name` is forced."""
    try:
        force(name)
    except RuntimeError as error:
        return str(error)
    return ""


def by_environment(name):
    os.environ["CYFLASH_ISA"] = name
    cpu._active = None
    try:
        cyflash.cpu_info()
    finally:
        del os.environ["CYFLASH_ISA"]


def qkv():
    """Query rows for a full panel of every build and a part of one, keys for a part of 64 and some."""
    r = np.random.default_rng(0)
    return [r.standard_normal((1, n, 20), dtype=np.float32) for n in (50, 70, 70)]


def main():
    chosen = cyflash.cpu_info()["implementation"]
    others = [name for name in cpu.BUILDS if name not in cpu.runnable()]
    refused = {name: [refusal(name, cyflash.set_implementation), refusal(name, by_environment)] for name in others}
    print(json.dumps({
        "chosen": chosen,
        "runnable": cpu.runnable(),
        "built": [name for name, build in cyflash.cpu_info()["builds"].items() if build["built"]],
        "features": sorted(cyflash.cpu_info()["features"]),
        "fp32": cyflash.flash_attention(*qkv(), causal=True).tolist(),
        "int8": cyflash.flash_attention_int8(*qkv(), causal=True).tolist(),
        "refused": refused,
    }))


if __name__ == "__main__":
    if len(sys.argv) > 1:  # a build to run regardless: the CPU must not know its instructions
        importlib.import_module(f"cyflash.cpu._{sys.argv[1]}").dot_rate(0.001)
        print("alive")
    else:
        main()
