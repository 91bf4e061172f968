"""`cyflash compare`: what it measures and says, for every flag, and what it says when it cannot."""

import contextlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from broken_schemes import ONE_NAN
from made_up_costs import MadeUp

import cyflash
from cyflash import compare, comparison, measure, schemes
from cyflash.capture import load_capture, save_capture
from cyflash.cli import main
from cyflash.quant import evaluation

ROOT = Path(__file__).parents[1]
NAMES = list(schemes.SCHEMES)
FP32 = ("--schemes", "*fp32")  # quicker, where int8 would add nothing


@pytest.fixture(autouse=True)
def costs(request, monkeypatch):
    """Of one short round, where a test is marked to measure them; else they are made up."""
    monkeypatch.setattr(evaluation, "interleaved_times", partial(measure.interleaved_times, rounds=1, seconds=0.0))
    if not request.node.get_closest_marker("measured"):
        monkeypatch.setattr(evaluation, "CallProcess", MadeUp)


def arrays(*shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(dtype) for _ in "qkv")


@pytest.fixture
def capture(tmp_path):
    return save_capture(tmp_path / "tiny.npz", {"a": arrays(2, 40, 16), "b": arrays(2, 40, 16, seed=1)})


def run(capsys, *arguments):
    """(exit status, what stdout says, what stderr says)"""
    status = main(["compare", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def run_json(capsys, tmp_path, *arguments):
    path = tmp_path / "report.json"
    status, *_ = run(capsys, *arguments, "--json", path)
    assert status == 0
    return json.loads(path.read_text())


@pytest.fixture
def options_used(monkeypatch):
    """The options that each scheme was called with here, in order."""
    used, call = [], schemes.Scheme.__call__

    def recording(scheme, layer, options, num_threads):
        used.append((options, num_threads))
        return call(scheme, layer, options, num_threads)

    monkeypatch.setattr(schemes.Scheme, "__call__", recording)
    return used


# What is said


def test_the_tables_have_every_layer_and_scheme(capsys, capture):
    status, out, err = run(capsys, capture)
    assert status == 0
    assert err == ""  # the progress bar is for terminals
    lines = out.splitlines()
    by_layer, summary = "\n".join(lines).split("2 layers")
    assert [line.split()[0] for line in by_layer.splitlines() if "numpy fp32" in line] == ["a", "b"]
    for name in NAMES:
        assert sum(f"{name} " in line for line in by_layer.splitlines()) == 2, name
        assert sum(line.startswith(f"{name} ") for line in summary.splitlines()) == 1, name
    for header in ("rel. L1", "1-cos", "RMSE", "worst", "head", "row", "time", "/NumPy", "/fp32", "memory"):
        assert header in by_layer
    assert "tiny.npz" in out and "Options: none" in out
    assert f"{cyflash.cpu_info()['implementation']} build" in out


@pytest.mark.measured
def test_the_numbers_are_written_as_json(capsys, capture, tmp_path):
    path = tmp_path / "numbers.json"
    status, out, _ = run(capsys, capture, "--json", path, "--threads", 1)
    assert status == 0
    assert f"Numbers: {path}" in out
    got = json.loads(path.read_text())
    assert got["cyflash"] == cyflash.__version__
    assert got["numpy"] == np.__version__
    assert got["machine"]["implementation"] == cyflash.cpu_info()["implementation"]
    assert got["settings"]["threads"] == 1
    assert got["settings"]["numpy_blas_threads"] in (1, None)
    assert got["settings"]["schemes"]["int8 head"] == {"granularity": ["head", "head", "token"], "smooth_k": True}
    assert [(row["layer"], row["scheme"]) for row in got["layers"]] == [
        (layer, scheme) for layer in "ab" for scheme in NAMES
    ]
    for row in got["layers"]:
        error, low, high = row["error"], *((1e-3, 0.1) if "int8" in row["scheme"] else (1e-8, 1e-6))
        assert set(error) == {"rel_l1", "cosine", "rmse", "max_abs", "worst_head", "worst_row"}
        assert low < error["rel_l1"] < high
        assert error["rel_l1"] <= error["worst_head"] <= error["worst_row"] < 10 * high
        assert 0 < 1 - error["cosine"] < high**2
        assert row["seconds"] > 0
        assert row["memory"]["peak"] >= row["memory"]["before"] > 1e6
        assert row["shapes"] == {"q": [2, 40, 16], "k": [2, 40, 16], "v": [2, 40, 16]}
        assert row["stored"] == "float32"
        assert row["problem"] is None
        base = {other["scheme"]: other for other in got["layers"] if other["layer"] == row["layer"]}
        assert row["speedup"] == base["numpy fp32"]["seconds"] / row["seconds"]
        assert row["speedup_over_fp32"] == base["cyflash fp32"]["seconds"] / row["seconds"]
        if base["numpy fp32"]["memory"]["extra"]:
            assert row["memory_ratio"] == row["memory"]["extra"] / base["numpy fp32"]["memory"]["extra"]


def test_the_summary_has_mean_and_worst_over_layers(capsys, capture, tmp_path):
    got = run_json(capsys, tmp_path, capture)
    for name, summary in got["summary"].items():
        rows = [row for row in got["layers"] if row["scheme"] == name]
        assert summary["layers"] == len(rows) == 2
        for key, worst in (("rel_l1", max), ("cosine", min), ("worst_head", max), ("worst_row", max)):
            values = [row["error"][key] for row in rows]
            assert summary["mean"][key] == pytest.approx(np.mean(values))
            assert summary["worst"][key] == worst(values)
        for key in ("speedup", "speedup_over_fp32"):
            values = [row[key] for row in rows]
            assert summary[key] == {"median": np.median(values), "min": min(values), "max": max(values)}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("int8 token", "int8 head"), ["int8 head", "int8 token"]),  # in the order of the table
        (("int8*PV",), ["int8 token, bf16 PV", "int8 token, fp32 PV"]),
        (("cyflash fp32", "*tensor"), ["cyflash fp32", "int8 tensor"]),
    ],
)
def test_schemes_are_chosen_by_name_or_pattern_and_keep_their_ratios(capsys, capture, tmp_path, patterns, names):
    got = run_json(capsys, tmp_path, capture, "--schemes", *patterns)
    assert [row["scheme"] for row in got["layers"]] == 2 * names
    assert list(got["summary"]) == names
    for row in got["layers"]:
        assert row["speedup"] > 0 and row["speedup_over_fp32"] > 0
    _, out, _ = run(capsys, capture, "--schemes", *patterns)
    assert "numpy fp32" not in out
    assert out.count("\na ") == out.count("\nb ") == 1  # the layer stands before the first of them


def test_the_numbers_are_written_before_anything_is_shown(capture, tmp_path, monkeypatch):
    def broken(report):
        raise OSError("the terminal is gone")

    monkeypatch.setattr(compare, "show", broken)
    path = tmp_path / "numbers.json"
    assert main(["compare", str(capture), "--json", str(path)]) == 2
    assert len(json.loads(path.read_text())["layers"]) == 2 * len(NAMES)


def test_the_errors_are_those_of_the_functions(capsys, capture, tmp_path):
    got = run_json(capsys, tmp_path, capture, "--causal")
    layer = load_capture(capture)["b"]
    reference = cyflash.reference.attention(*layer, causal=True)
    outputs = {
        "cyflash fp32": cyflash.flash_attention(*layer, causal=True),
        "int8 tensor": cyflash.flash_attention_int8(*layer, causal=True, granularity="tensor", smooth_k=False),
        "int8 token": cyflash.flash_attention_int8(*layer, causal=True),
        "int8 token, bf16 PV": cyflash.flash_attention_int8(*layer, causal=True, pv="bf16"),
    }
    errors = {row["scheme"]: row["error"] for row in got["layers"] if row["layer"] == "b"}
    for name, output in outputs.items():
        assert errors[name] == cyflash.quant.compare(output, reference)._asdict(), name


def test_evaluate_gives_the_same_numbers(capsys, capture, tmp_path):
    got = run_json(capsys, tmp_path, capture, "--softcap", 5)
    rows = [row for row in got["layers"] if row["layer"] == "a"]
    evaluated = cyflash.quant.evaluate(*load_capture(capture)["a"], softcap=5.0)
    assert [row["scheme"] for row in evaluated] == NAMES
    for ours, theirs in zip(evaluated, rows, strict=True):
        assert {name: ours[name] for name in theirs["error"]} == theirs["error"]
        assert {"speedup", "speedup_over_fp32", "memory_ratio", "seconds", "memory"} < ours.keys() & theirs.keys()


def test_the_plot_is_a_picture_with_something_in_it(capsys, capture, tmp_path):
    image, colours = pytest.importorskip("matplotlib.image"), pytest.importorskip("matplotlib.colors")
    path = tmp_path / "plot.png"
    status, out, _ = run(capsys, capture, "--plot", path)
    assert status == 0
    assert f"Plot: {path}" in out
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 500
    height, width = pixels.shape[:2]
    seen = [colours.to_rgb(comparison._colour(name)) for name in NAMES]
    assert len(set(seen)) == len(NAMES)
    for part in (pixels[:, : width // 2], pixels[: height // 2, width // 2 :]):  # by layer; accuracy against speed
        drawn = [(abs(part[..., :3] - rgb).max(axis=-1) < 0.02).sum() for rgb in seen]
        assert sum(count > 30 for count in drawn) >= len(NAMES) - 1, drawn  # two points may coincide


def test_a_reference_of_zeros_is_no_obstacle(capsys, tmp_path):
    """Its relative error is 0 or inf."""
    pytest.importorskip("matplotlib")
    q, k, v = arrays(2, 40, 16)
    path = save_capture(tmp_path / "x.npz", {"zero": (q, k, v * 0), "one": (q, k, v)})
    status, _, _ = run(capsys, path, "--plot", tmp_path / "plot.png", "--json", tmp_path / "x.json")
    assert status == 0
    errors = [row["error"]["rel_l1"] for row in json.loads((tmp_path / "x.json").read_text())["layers"]]
    assert errors[len(NAMES) :] == [0.0] * len(NAMES)
    infinite = {"label": "a", "scheme": "int8 token", "speedup_over_fp32": 2.0, "seconds": None, "memory": None}
    infinite["error"] = dict.fromkeys(comparison.ERRORS, np.inf)
    about = {"cyflash": "1", "numpy": "2", "machine": {"cpu": "x", "implementation": "x"}, "settings": {"threads": 1}}
    comparison.draw(about | {"layers": [infinite]}, tmp_path / "infinite.png")
    assert (tmp_path / "infinite.png").stat().st_size > 1000


def test_several_files_are_told_apart(capsys, capture, tmp_path):
    other = save_capture(tmp_path / "other.safetensors", arrays(1, 8, 4), causal=True)
    got = run_json(capsys, tmp_path, capture, other, *FP32)
    assert [row["label"] for row in got["layers"]][::2] == ["tiny: a", "tiny: b", "other: other"]
    assert got["settings"]["files"] == {str(capture): {}, str(other): {"causal": True}}


@pytest.mark.parametrize("layer", ["technical.layer", "model.transformer.layers.attention."])
@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_tables_fit_the_terminal(capsys, monkeypatch, layer, width):
    import rich.console

    terminal = partial(rich.console.Console, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(rich.console, "Console", lambda **options: terminal(**options))
    error = dict.fromkeys(comparison.ERRORS, 1.23e-7) | {"cosine": 0.5}
    ratios = {"speedup": 12.34, "speedup_over_fp32": 2.9, "memory_ratio": 0.34}
    row = {"label": f"{layer}0", "error": error, "seconds": 0.123, "seconds_by_round": [[1.0]], **ratios}
    rows = [row | {"scheme": name, "memory": {"extra": 1.23e6}} for name in NAMES]
    rows += [row | {"speedup": 11.1, "label": f"{layer}1"} for row in rows]
    settings = {"files": {}, "threads": 2, "numpy_blas_threads": 2}
    machine = {"cpu": "x", "cores": 2, "implementation": "avx2"}
    about = {"cyflash": "1", "numpy": "2", "machine": machine, "settings": settings, "baseline": schemes.NUMPY}
    comparison.show(about | {"layers": rows, "summary": comparison.summarise(rows), "notes": []})
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    cells = "1.2e-07", "5.0e-01", "123 ms", "12.3x", "2.90x", "1.23 MB", "0.34x"
    assert all(text in out for text in (layer[:19], "int8 token, bf16 PV", *cells))
    assert out.count("RMSE") == (2 if width == 80 else 3)  # the legend, the summary, and by layer where there is room
    assert ("11.7x (11.1-12.3)" in out) == (width >= 100)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_on_a_terminal_a_progress_bar_names_the_steps(capture):
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-P", "-m", "cyflash", "compare", str(capture), "--schemes", "int8 token"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while part := os.read(ours, 65536):
                said += part
    os.close(ours)
    assert process.returncode == 0
    steps = 2 * (3 + 2)  # both in fp32 are measured as well
    for text in ("a: error", "b: memory of int8 token", "b: time", f"0/{steps}", f"{steps}/{steps}"):
        assert text in said.decode()


# Flags and options


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {}),
        (("--causal",), {"causal": True}),
        (("--scale", "0.5"), {"scale": 0.5}),
        (("--window", "3", "0"), {"window": (3, 0)}),
        (("--window", "-1", "2"), {"window": (-1, 2)}),
        (("--softcap", "2.5"), {"softcap": 2.5}),
        (("--causal", "--scale", "1", "--softcap", "9"), {"causal": True, "scale": 1.0, "softcap": 9.0}),
    ],
)
def test_flags_are_options_of_every_scheme(capsys, capture, flags, expected, options_used):
    status, out, _ = run(capsys, capture, *flags)
    assert status == 0
    assert options_used and all(options == expected for options, _ in options_used)
    for name, value in expected.items():
        assert f"{name}={value}" in out
    assert len(options_used) == 2 * len(NAMES)


def test_the_errors_of_a_flag_are_against_the_reference_with_that_flag(capsys, capture, tmp_path):
    for flags in (("--causal",), ("--window", 3, 1), ("--softcap", 1.5), ("--scale", 2)):
        for row in run_json(capsys, tmp_path, capture, *flags)["layers"]:
            assert row["error"]["rel_l1"] < (0.05 if "int8" in row["scheme"] else 1e-6)


def test_options_of_the_file_are_used_unless_given(capsys, tmp_path, options_used):
    sinks = np.array([1.0, 0.5], np.float32)
    saved = dict(causal=True, scale=0.3, window=(4, -1), sinks=sinks)
    path = save_capture(tmp_path / "x.safetensors", arrays(2, 8, 4), **saved)
    status, out, _ = run(capsys, path, *FP32)
    assert status == 0
    options, _ = options_used[-1]
    assert options.keys() == {"causal", "scale", "window", "sinks"}
    assert options["causal"] is True and options["scale"] == 0.3 and options["window"] == (4, -1)
    assert "scale=0.3" in out and "sinks=[1.0, 0.5]" in out

    status, out, _ = run(capsys, path, "--no-causal", "--scale", "0.7", *FP32)
    assert status == 0
    options, _ = options_used[-1]
    assert options["causal"] is False and options["scale"] == 0.7 and options["window"] == (4, -1)


def test_layout_blhd_reads_the_other_order(capsys, tmp_path):
    q, k, v = (x.transpose(1, 0, 2) for x in arrays(4, 6, 8))  # (L, H, D)
    path = tmp_path / "x.npz"
    np.savez(path, q=q, k=k, v=v)
    got = run_json(capsys, tmp_path, path, "--layout", "blhd", *FP32)
    assert got["layers"][0]["shapes"]["q"] == [4, 6, 8]
    assert got["settings"]["layout"] == "blhd"
    assert run_json(capsys, tmp_path, path, *FP32)["layers"][0]["shapes"]["q"] == [6, 4, 8]


def test_threads_are_those_of_all(capsys, capture, tmp_path, options_used):
    if cyflash.cpu_info()["openmp"] is None:
        pytest.skip("built without OpenMP")
    got = run_json(capsys, tmp_path, capture, "--threads", 2)
    assert got["settings"]["threads"] == 2
    assert got["settings"]["numpy_blas_threads"] in (2, None)
    assert {threads for _, threads in options_used} == {2} and MadeUp.threads == 2
    assert "on 2 threads" in run(capsys, capture, "--threads", 2, *FP32)[1]
    got = run_json(capsys, tmp_path, capture, *FP32)
    assert got["settings"]["threads"] == cyflash.cpu_info()["threads"]


def test_without_openmp_all_run_on_one_thread_and_it_is_said(monkeypatch):
    from cyflash.cpu import detect

    monkeypatch.setattr(detect, "openmp", lambda: (False, None, 1))
    threads, notes = evaluation.call_threads(4)
    assert threads == 1
    assert "without OpenMP" in notes[0]
    assert evaluation.call_threads(None) == (1, [])


# Notes


def test_float64_is_rounded_and_said(capsys, tmp_path):
    path = save_capture(tmp_path / "x.npz", {"a": arrays(8, 4, dtype=np.float64), "b": arrays(8, 4, dtype=np.float16)})
    status, out, _ = run(capsys, path)
    assert status == 0
    assert "x.npz: a: float64, rounded to float32" in out
    assert "b: float" not in out


def test_nan_where_the_reference_has_none_fails_the_comparison(capsys, capture, monkeypatch):
    monkeypatch.setitem(schemes.SCHEMES, "int8 token", ONE_NAN)
    status, out, _ = run(capsys, capture)
    assert status == 1
    assert "a, int8 token: output: expected NaN" in out
    assert out.count("output: expected NaN") == 2


@pytest.mark.measured
def test_what_int8_refuses_is_said_and_the_others_are_measured(capsys, tmp_path):
    q, k, v = arrays(2, 40, 16)
    k[1, 7, 3] = np.nan
    path = save_capture(tmp_path / "x.npz", (q, k, v))
    status, out, _ = run(capsys, path, "--schemes", "cyflash fp32", "int8 token")
    assert status == 1
    assert "x, int8 token: " in out and "nan" in out.lower()
    fp32, int8 = (next(line for line in out.splitlines() if name in line) for name in ("cyflash fp32", "int8 token"))
    assert "e-0" in fp32
    assert "e-0" not in int8


def test_numpy_is_not_run_where_its_scores_do_not_fit(capsys, capture, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_available_memory", lambda: 12_000)  # its scores take 2 * 40 * 40 * 4 bytes
    monkeypatch.setattr(evaluation, "_errors", lambda layer, options, outputs, problems: {})
    status, out, _ = run(capsys, capture, *FP32)
    assert status == 0
    assert "a, numpy fp32: not run: its scores alone need 12.8 kB, and 12.0 kB are free" in out
    got = run_json(capsys, tmp_path, capture)["layers"]
    assert got[0]["seconds"] is None and got[0]["memory"] is None
    assert got[1]["seconds"] > 0 and got[1]["speedup"] is None
    assert got[2]["speedup_over_fp32"] > 0 and got[2]["memory_ratio"] is None


def test_the_reference_is_not_run_where_it_does_not_fit(monkeypatch, capture):
    monkeypatch.setattr(evaluation, "_available_memory", lambda: 50_000)
    problems = {}
    assert evaluation._errors(load_capture(capture)["a"], {}, {"cyflash fp32": None}, problems) == {}
    assert "the float64 reference needs 89.6 kB, and 50.0 kB are free" in str(problems["cyflash fp32"])


def test_free_memory_is_known_on_linux():
    free = evaluation._available_memory()
    assert free is None or 1e6 < free < 1e15
    assert not sys.platform.startswith("linux") or free is not None


def test_restless_times_are_noted():
    row = {"label": "a", "scheme": "x", "problem": None, "memory": None}
    calm, restless = row | {"seconds_by_round": [[1, 1], [1.5]]}, row | {"seconds_by_round": [[1.0], [2.5]]}
    assert compare._notes([], [calm]) == []
    assert "1 of 2 rows" in compare._notes([], [calm, restless])[0]


# What cannot be done: exit status 2 and one line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.npz",), "absent.npz: no such file"),
        (("data.bin",), "expected a file that ends in .npz or .safetensors"),
        (("TINY", "--json", "absent/x.json"), "no folder absent"),
        (("TINY", "--plot", "absent/x.png"), "no folder absent"),
        (("TINY", "--json", "."), "cannot be written"),
        (("TINY", "--softcap", "-1"), "softcap"),
        (("--schemes", "int8*", "tiny.npz"), "put each FILE before --schemes"),
        (("TINY", "--schemes", "int7*"), "expected names of 'numpy fp32', 'cyflash fp32', 'int8 tensor'"),
        (("TINY", "--window", "-2", "0"), "window"),
        (("TINY", "--plot", "x.unknown"), "ends in .png"),
        (("TINY", "--plot", "x"), "ends in .png"),
    ],
)
def test_errors_of_use_are_one_line(capsys, capture, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *(capture if x == "TINY" else x for x in arguments))
    assert status == 2
    assert out == ""
    assert err.startswith("cyflash compare: error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    "arguments", [("--threads", "0"), ("--threads", "two"), ("--layout", "dlhb"), ("--window", "1")]
)
def test_argparse_errors_exit_with_2(capsys, capture, arguments):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, capture, *arguments)
    assert stopped.value.code == 2


def test_without_matplotlib_the_plot_names_the_extra(capsys, capture, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(capsys, capture, "--plot", tmp_path / "x.png")
    assert status == 2
    assert out == ""
    assert "pip install 'cyflash-attn[plot]'" in err


# The activations that ship with the source tree


def test_the_shipped_file_is_the_one_described():
    path = ROOT / "examples" / "data" / "minilm.safetensors"
    assert compare.shipped_data().samefile(path)
    assert path.stat().st_size <= 8_000_000
    capture = load_capture(path)
    assert list(capture) == [f"{text}.layer{n}" for text in ("story", "technical") for n in range(6)]
    assert set(capture.stored.values()) == {"float16"}
    assert capture.options == {"scale": 32**-0.5}
    for layer in capture.values():
        assert [x.shape for x in layer] == [(12, 256, 32)] * 3
        assert all(np.isfinite(x).all() and x.std() > 0.1 for x in layer)
    # Two unlike texts, and layers that differ.
    assert len({layer.q.tobytes() for layer in capture.values()}) == 12


def test_the_shipped_file_is_compared_without_an_argument(capsys, tmp_path):
    got = run_json(capsys, tmp_path, "--threads", 1)
    rows = [row for row in got["layers"] if row["scheme"] == "cyflash fp32"]
    assert len(rows) == 12
    for row in rows:
        assert row["error"]["rel_l1"] < 1e-6
        assert row["error"]["worst_row"] < 1e-4
    (options,) = got["settings"]["files"].values()
    assert options == {"scale": 32**-0.5}
    # Mean relative L1 over the layers, worst head.
    limits = {
        "int8 tensor": (0.024, 0.055),
        "int8 head": (0.013, 0.028),
        "int8 token": (0.0095, 0.019),
        "int8 token, bf16 PV": (0.0065, 0.014),
        "int8 token, fp32 PV": (0.0065, 0.014),
    }
    for name, (mean, worst) in limits.items():
        assert got["summary"][name]["mean"]["rel_l1"] <= mean, name
        assert got["summary"][name]["worst"]["worst_head"] <= worst, name


@pytest.mark.measured
def test_a_layer_of_the_shipped_file_needs_less_memory_than_its_scores(capsys, tmp_path):
    """All have the same shape."""
    layers = load_capture(compare.shipped_data())
    path = save_capture(tmp_path / "one.npz", {"a": tuple(layers["story.layer0"])}, **layers.options)
    (row,) = run_json(capsys, tmp_path, path, "--threads", 1, "--schemes", "cyflash fp32")["layers"]
    assert row["shapes"]["q"] == [12, 256, 32]
    assert row["memory"]["extra"] < 3e6  # NumPy's scores alone are 12 * 256 * 256 * 4 bytes = 3.1 MB
    assert row["memory_ratio"] < 1


def test_without_the_data_a_file_is_asked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cyflash, "__file__", str(tmp_path / "site-packages" / "cyflash" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys)
    assert status == 2
    assert "pass a .npz or .safetensors file" in err
    monkeypatch.chdir(ROOT)  # a wheel, run in a checkout
    assert compare.shipped_data() == Path.cwd() / "examples" / "data" / "minilm.safetensors"
