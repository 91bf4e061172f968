"""Static int8 scales for a real model: calibrated on one text, judged on another one, saved, loaded and run.

    python examples/calibrate_int8.py [SCALES.safetensors]

The activations are those of all-MiniLM-L6-v2 in examples/data. A call's rows are observed in four parts, each with all
keys: four observations per layer, of which "output" searches on two and reports its error on the other two.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import cyflash
from cyflash.quant import Calibrator, Scales, compare, load_capture

DATA = Path(__file__).parent / "data" / "minilm.safetensors"
OBSERVED, JUDGED = "story", "technical"
METHODS = ("max", "percentile", "mse", "octav", "entropy", "output")


def main(path="minilm_scales.safetensors"):
    capture = load_capture(DATA)
    layers = sorted({name.partition(".")[2] for name in capture})

    calibrator = Calibrator(granularity="tensor")
    for layer in layers:
        q, k, v = capture[f"{OBSERVED}.{layer}"]
        for rows in range(0, q.shape[1], 64):
            calibrator.observe(layer, q[:, rows : rows + 64], k, v, **capture.options)

    found = {method: calibrator.compute(method) for method in METHODS}  # one pass over the data for all of them
    found["output"].save(path)
    found["output"] = Scales.load(path)
    plan = calibrator.plan(rel_l1=0.02, worst=0.1)

    errors = Table("layer", *METHODS, "held-out", title=f"relative L1 error on '{JUDGED}', scales from '{OBSERVED}'")
    planned = Table("layer", "error", "worst head", "rung of the ladder: heads", title="planned: each head to 0.02")
    for layer in layers:
        arrays = capture[f"{JUDGED}.{layer}"]
        exact = cyflash.reference.attention(*arrays, **capture.options)

        def error(scales, arrays=arrays, exact=exact, layer=layer):
            return compare(cyflash.flash_attention_int8(*arrays, quant=scales[layer], **capture.options), exact)

        held_out = found["output"].about[layer]["error"]["held_out"]["rel_l1"]
        errors.add_row(layer, *(f"{error(scales).rel_l1:.4f}" for scales in found.values()), f"{held_out:.4f}")
        rungs = "; ".join(f"{part['rung']}: {len(part['kv_heads'])}" for part in plan.about[layer]["parts"])
        planned.add_row(layer, f"{error(plan).rel_l1:.4f}", f"{error(plan).worst_head:.4f}", rungs)
    console = Console()
    console.print(errors)
    console.print("held-out: what 'output' measured on the tiles that it did not search on")
    console.print(planned)
    console.print(f"{path}: scales of {len(found['output'])} layers")


if __name__ == "__main__":
    main(*sys.argv[1:])
