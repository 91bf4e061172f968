"""What int8 attention loses and gains on activations of a real model: one option after the other, error beside speed.

    python examples/accuracy_comparison.py [CAPTURE.safetensors] [PLOT.png]

A row is one way to call flash_attention_int8. Its errors, against attention in float64, are the mean and the worst over
all layers of the file. Its speed is that of a call on the float arrays of the first layer, on one thread, quantisation
included, against flash_attention (fp32) on the same. `cyflash compare` shows every layer, and memory.
"""

import statistics
import sys
from pathlib import Path

import numpy as np

import cyflash
from cyflash.capture import load_capture
from cyflash.quant import LayerScales, compare, evaluate

DATA = Path(__file__).parent / "data" / "minilm.safetensors"
LADDER = {
    "one scale per tensor": {"granularity": "tensor", "smooth_k": False},
    "K without its mean": {"granularity": "tensor", "smooth_k": True},
    "a scale per head": {"granularity": "head", "smooth_k": True},
    "V per token": {"granularity": ("head", "head", "token"), "smooth_k": True},
    "all per token: the default": {},
    "the default, 4 keys in fp32": {"fp32_sinks": 4},
    "the default, P V in bf16": {"pv": "bf16"},
    "the default, P V in fp32": {"pv": "fp32"},
}


def main(capture=DATA, plot=None):
    capture = load_capture(capture)
    errors = {label: [] for label in ("fp32", *LADDER, "static scales per tensor")}
    for layer in capture.values():
        exact = cyflash.reference.attention(*layer, **capture.options)
        errors["fp32"].append(compare(cyflash.flash_attention(*layer, **capture.options), exact))
        for label, options in ladder(layer).items():
            output = cyflash.flash_attention_int8(*layer, **options, **capture.options)
            errors[label].append(compare(output, exact))
    first = next(iter(capture.values()))
    rows = evaluate(*first, schemes=ladder(first), num_threads=1, **capture.options)
    speeds = {"fp32": 1.0} | {row["scheme"]: row["speedup_over_fp32"] for row in rows}

    print(f"{f'{capture.path.name}, layers: {len(capture)}':32}  rel. L1  worst head  worst row    speed")
    for label, own in errors.items():
        mean = statistics.mean(error.rel_l1 for error in own)
        head, row = max(error.worst_head for error in own), max(error.worst_row for error in own)
        print(f"{label:32}{mean:9.1e}{head:12.1e}{row:11.1e}{speeds[label]:7.2f} x")
    if plot:
        draw(errors, speeds, plot)


def ladder(layer):
    """With static scales from the layer's own greatest values; real ones come from calibration data."""
    scales = LayerScales(*(float(np.abs(x).max()) / 127 for x in layer))
    return LADDER | {"static scales per tensor": {"quant": scales}}


def draw(errors, speeds, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for label, own in errors.items():
        point = speeds[label], statistics.mean(error.rel_l1 for error in own)
        axes.scatter(*point, zorder=2, label=label)
    axes.set(xlabel="speed against fp32 (x)", ylabel="mean relative L1", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
