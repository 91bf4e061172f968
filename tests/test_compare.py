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

import cyflash
from cyflash import compare, measure, report
from cyflash.capture import load_capture, save_capture
from cyflash.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_short_round(monkeypatch):
    monkeypatch.setattr(compare, "interleaved_times", partial(measure.interleaved_times, rounds=1, seconds=0.0))


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
    """The options that each scheme was called with, in order."""
    used = []

    def recording(attend):
        return lambda layer, options, threads: used.append((options, threads)) or attend(layer, options, threads)

    monkeypatch.setattr(compare, "SCHEMES", {name: recording(attend) for name, attend in compare.SCHEMES.items()})
    return used


# What is said


def test_the_table_has_every_layer_and_scheme_and_a_summary(capsys, capture):
    status, out, err = run(capsys, capture)
    assert status == 0
    assert err == ""  # the progress bar is for terminals
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if "numpy fp32" in line] == ["a", "b"]
    assert sum("cyflash fp32" in line for line in lines) == 2 + 1  # and the summary
    assert lines[-1].startswith("cyflash fp32, 2 layers: ")
    for text in ("as fast as NumPy", "its memory", "mean relative L1", "worst row"):
        assert text in lines[-1]
    for header in ("rel. L1", "max abs", "head", "row", "time", "ratio", "memory"):
        assert header in out
    assert "tiny.npz" in out and "Options: none" in out
    assert f"{cyflash.cpu_info()['implementation']} build" in out


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
    assert [(row["layer"], row["scheme"]) for row in got["layers"]] == [
        (layer, scheme) for layer in "ab" for scheme in ("numpy fp32", "cyflash fp32")
    ]
    for row in got["layers"]:
        assert set(row["error"]) == {"rel_l1", "cosine", "rmse", "max_abs", "worst_head", "worst_row"}
        assert 0 < row["error"]["rel_l1"] < 1e-6
        assert row["error"]["rel_l1"] <= row["error"]["worst_head"] <= row["error"]["worst_row"] < 1e-5
        assert row["seconds"] > 0
        assert row["memory"]["peak"] >= row["memory"]["before"] > 1e6
        assert row["shapes"] == {"q": [2, 40, 16], "k": [2, 40, 16], "v": [2, 40, 16]}
        assert row["stored"] == "float32"
        assert row["problem"] is None
    assert got["layers"][0]["speedup"] is None
    assert got["layers"][1]["speedup"] > 0
    summary = got["summary"]["cyflash fp32"]
    assert summary["layers"] == 2
    assert summary["rel_l1_mean"] == pytest.approx(np.mean([got["layers"][n]["error"]["rel_l1"] for n in (1, 3)]))
    assert summary["largest"]["worst_row"] == max(got["layers"][n]["error"]["worst_row"] for n in (1, 3))


def test_the_numbers_are_written_before_anything_is_shown(capture, tmp_path, monkeypatch):
    def broken(report):
        raise OSError("the terminal is gone")

    monkeypatch.setattr(compare, "show", broken)
    path = tmp_path / "numbers.json"
    assert main(["compare", str(capture), "--json", str(path)]) == 2
    assert len(json.loads(path.read_text())["layers"]) == 4


def test_the_errors_are_those_of_the_functions(capsys, capture, tmp_path):
    got = run_json(capsys, tmp_path, capture)
    layer = load_capture(capture)["b"]
    reference = cyflash.reference.attention(*layer)
    expected = cyflash.quant.compare(cyflash.flash_attention(*layer), reference)
    assert got["layers"][3]["error"] == expected._asdict()


def test_the_plot_is_a_picture_with_something_in_it(capsys, capture, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "plot.png"
    status, out, _ = run(capsys, capture, "--plot", path)
    assert status == 0
    assert f"Plot: {path}" in out
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 500
    for colour in report.COLOURS.values():
        rgb = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
        assert (abs(pixels[..., :3] - rgb).max(axis=-1) < 0.01).sum() > 1000  # its bars


def test_several_files_are_told_apart(capsys, capture, tmp_path):
    other = save_capture(tmp_path / "other.safetensors", arrays(1, 8, 4), causal=True)
    got = run_json(capsys, tmp_path, capture, other)
    assert [row["label"] for row in got["layers"]][::2] == ["tiny: a", "tiny: b", "other: other"]
    assert got["settings"]["files"] == {str(capture): {}, str(other): {"causal": True}}


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_the_terminal(capsys, width):
    error = dict.fromkeys(report.ERRORS, 1.23e-7)
    row = {"label": "technical.layer0", "error": error, "seconds": 0.123, "speedup": 12.34, "memory_ratio": 0.34}
    rows = [row | {"scheme": scheme, "memory": {"extra": 123e6}} for scheme in compare.SCHEMES]
    from rich.console import Console

    table = report._table({"layers": rows, "baseline": compare.BASELINE}, wide=width >= report._wide(rows))
    Console(width=width).print(table)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    for text in ("technical.layer0", "cyflash fp32", "1.2e-07", "123 ms", "12.34x", "123 MB", "0.34x"):
        assert text in out


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_on_a_terminal_a_progress_bar_names_the_steps(capture):
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-P", "-m", "cyflash", "compare", str(capture)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while part := os.read(ours, 65536):
                said += part
    os.close(ours)
    assert process.returncode == 0
    for text in ("a: error", "b: memory of cyflash fp32", "b: time", "0/8", "8/8"):
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
    call = compare.prepare_call(
        str(capture), "a", "bhld", json.loads(json.dumps(expected)), "cyflash fp32", 1
    )  # what the fresh process runs
    options_used.clear()
    np.testing.assert_array_equal(call(), cyflash.flash_attention(*load_capture(capture)["a"], **expected))
    assert options_used == [(expected, 1)]


def test_the_errors_of_a_flag_are_against_the_reference_with_that_flag(capsys, capture, tmp_path):
    for flags in (("--causal",), ("--window", 3, 1), ("--softcap", 1.5), ("--scale", 2)):
        for row in run_json(capsys, tmp_path, capture, *flags)["layers"]:
            assert row["error"]["rel_l1"] < 1e-6


def test_options_of_the_file_are_used_unless_given(capsys, tmp_path, options_used):
    sinks = np.array([1.0, 0.5], np.float32)
    saved = dict(causal=True, scale=0.3, window=(4, -1), sinks=sinks)
    path = save_capture(tmp_path / "x.safetensors", arrays(2, 8, 4), **saved)
    status, out, _ = run(capsys, path)
    assert status == 0
    options, _ = options_used[-1]
    assert options.keys() == {"causal", "scale", "window", "sinks"}
    assert options["causal"] is True and options["scale"] == 0.3 and options["window"] == (4, -1)
    assert "scale=0.3" in out and "sinks=[1.0, 0.5]" in out

    status, out, _ = run(capsys, path, "--no-causal", "--scale", "0.7")
    assert status == 0
    options, _ = options_used[-1]
    assert options["causal"] is False and options["scale"] == 0.7 and options["window"] == (4, -1)


def test_layout_blhd_reads_the_other_order(capsys, tmp_path):
    q, k, v = (x.transpose(1, 0, 2) for x in arrays(4, 6, 8))  # (L, H, D)
    path = tmp_path / "x.npz"
    np.savez(path, q=q, k=k, v=v)
    got = run_json(capsys, tmp_path, path, "--layout", "blhd")
    assert got["layers"][0]["shapes"]["q"] == [4, 6, 8]
    assert got["settings"]["layout"] == "blhd"
    assert run_json(capsys, tmp_path, path)["layers"][0]["shapes"]["q"] == [6, 4, 8]


def test_threads_are_those_of_both(capsys, capture, tmp_path, options_used):
    if cyflash.cpu_info()["openmp"] is None:
        pytest.skip("built without OpenMP")
    got = run_json(capsys, tmp_path, capture, "--threads", 2)
    assert got["settings"]["threads"] == 2
    assert got["settings"]["numpy_blas_threads"] in (2, None)
    assert {threads for _, threads in options_used} == {2}
    assert "on 2 threads" in run(capsys, capture, "--threads", 2)[1]
    got = run_json(capsys, tmp_path, capture)
    assert got["settings"]["threads"] == cyflash.cpu_info()["threads"]


def test_without_openmp_both_run_on_one_thread_and_it_is_said(monkeypatch):
    info = cyflash.cpu_info() | {"openmp": None}
    monkeypatch.setattr(cyflash, "cpu_info", lambda: info)
    threads, notes = compare._threads(4)
    assert threads == 1
    assert "without OpenMP" in notes[0]


# Notes


def test_float64_is_rounded_and_said(capsys, tmp_path):
    path = save_capture(tmp_path / "x.npz", {"a": arrays(8, 4, dtype=np.float64), "b": arrays(8, 4, dtype=np.float16)})
    status, out, _ = run(capsys, path)
    assert status == 0
    assert "x.npz: a: float64, rounded to float32" in out
    assert "b: float" not in out


def test_nan_where_the_reference_has_none_fails_the_comparison(capsys, capture, monkeypatch):
    def broken(layer, options, threads):
        output = cyflash.flash_attention(*layer, **options)
        output[0, 3] = np.nan
        return output

    monkeypatch.setitem(compare.SCHEMES, "cyflash fp32", broken)
    status, out, _ = run(capsys, capture)
    assert status == 1
    assert "a, cyflash fp32: output: expected NaN" in out


def test_numpy_is_not_run_where_its_scores_do_not_fit(capsys, capture, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_available_memory", lambda: 12_000)  # its scores take 2 * 40 * 40 * 4 bytes
    monkeypatch.setattr(compare, "_errors", lambda layer, options, outputs: ({}, {}))
    status, out, _ = run(capsys, capture)
    assert status == 0
    assert "a, numpy fp32: not run: its scores alone need 12.8 kB, and 12.0 kB are free" in out
    assert "nothing was measured" in out
    got = run_json(capsys, tmp_path, capture)["layers"]
    assert got[0]["seconds"] is None and got[0]["memory"] is None
    assert got[1]["seconds"] > 0 and got[1]["speedup"] is None


def test_the_reference_is_not_run_where_it_does_not_fit(monkeypatch, capture):
    monkeypatch.setattr(compare, "_available_memory", lambda: 50_000)
    errors, problems = compare._errors(load_capture(capture)["a"], {}, {"cyflash fp32": None})
    assert errors == {}
    assert "the float64 reference needs 89.6 kB, and 50.0 kB are free" in problems["cyflash fp32"]


def test_free_memory_is_known_on_linux():
    free = compare._available_memory()
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
        assert row["memory"]["extra"] < 3e6  # NumPy's scores alone are 12 * 256 * 256 * 4 bytes = 3.1 MB
        assert row["memory_ratio"] < 1
    (options,) = got["settings"]["files"].values()
    assert options == {"scale": 32**-0.5}


def test_without_the_data_a_file_is_asked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cyflash, "__file__", str(tmp_path / "site-packages" / "cyflash" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys)
    assert status == 2
    assert "pass a .npz or .safetensors file" in err
    monkeypatch.chdir(ROOT)  # a wheel, run in a checkout
    assert compare.shipped_data() == Path.cwd() / "examples" / "data" / "minilm.safetensors"
