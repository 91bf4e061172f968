"""`cyflash bench`: what it reports, what it refuses, and that its measurements are what it says. No time is judged."""

import json
from dataclasses import asdict, replace

import bench_peers
import numpy as np
import pytest
from rich.console import Console

from cyflash import bench, cpu, cpu_info, flash_attention_int8, flops, quantize
from cyflash.bench import cases, int8, race, suite, systems
from cyflash.bench.cases import FP32, OPTIONS, Case, Error, Expected, Int8
from cyflash.cli import main
from cyflash.reference import attention

PEERS = ["torch", "onnxruntime", "openvino"]


@pytest.fixture
def bench_run(tmp_path, capsys):
    """Runs the command with one thread; returns (status, JSON document or None, stdout, stderr)."""

    def run(*arguments):
        path = tmp_path / "bench.json"
        status = main(["bench", "--threads", "1", "--json", str(path), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, json.loads(path.read_text()) if path.exists() else None, captured.out, captured.err

    return run


@pytest.fixture
def enter(monkeypatch):
    """Enters more systems into the benchmark."""

    def add(*entries):
        for system in entries:
            monkeypatch.setitem(systems.SYSTEMS, system.name, system)

    return add


# --- A plain run ------------------------------------------------------------------------------------------------------


def test_run_reports_everything(bench_run, tmp_path):
    plot = tmp_path / "bench.png"
    arguments = "--shapes", "1,2,64,16", "2x3x33x8", "--systems", "numpy", "--rounds", 4, "--plot", plot
    status, document, out, err = bench_run(*arguments)
    assert status == 0
    assert err == ""  # the progress bar is for terminals
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert document["format"] == "cyflash bench 1"
    assert document["environment"]["cpu"] == json.loads(json.dumps(cpu_info()))
    assert document["failures"] == {}
    assert document["skipped"].keys() == set(PEERS)
    for name in ("(1, 2, 64, 16)", "(2, 3, 33, 8)", "cyflash", "numpy", np.__version__, *PEERS):
        assert name in out
    about = document["systems"]["1"]
    assert about["numpy"]["version"] == np.__version__
    assert about["cyflash"]["settings"]["implementation"] == cpu_info()["implementation"]
    assert all(system["threads"]["asked"] == 1 for system in about.values())
    assert [contest["entries"].keys() for contest in document["races"]] == [{"cyflash", "numpy"}] * 2


def test_figures_follow_from_the_raw_times(bench_run):
    _, document, _, _ = bench_run("--shapes", "2,3,33,8", "--systems", "numpy", "--rounds", 5, "--causal")
    (contest,) = document["races"]
    medians = {}
    for label, entry in contest["entries"].items():
        assert len(entry["rounds"]) == 5
        assert all(len(times) == entry["calls"] for times in entry["rounds"])
        medians[label] = np.median([np.median(times) for times in entry["rounds"]])
        assert entry["median_seconds"] == medians[label] > 0
        assert entry["flops"] == 2 * (8 + 8) * (33 * 34 // 2) * 2 * 3  # visible pairs of 2 sequences of 3 heads
        assert entry["gflops"] == pytest.approx(entry["flops"] / medians[label] / 1e9)
        assert entry["error"]["rel_l1"] < 1e-6
        assert entry["error"]["checked"] == entry["error"]["rows"] == 2 * 3 * 33
    ratio = contest["entries"]["numpy"]["ratio_to_cyflash"]
    assert ratio["value"] == pytest.approx(medians["numpy"] / medians["cyflash"])
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert contest["best_peer"] == "numpy"
    share = contest["entries"]["cyflash"]["flops"] / medians["cyflash"] / np.median(contest["fma_rates"])
    assert contest["fma_share"]["value"] == pytest.approx(share)


def test_isa_chooses_the_build(bench_run):
    arguments = "--shapes", "1,1,32,8", "--systems", "numpy", "--rounds", 1, "--isa", "baseline"
    _, document, _, _ = bench_run(*arguments)
    assert document["systems"]["1"]["cyflash"]["settings"]["implementation"] == "baseline"


@pytest.mark.skipif(cpu_info()["threads"] < 2, reason="needs two threads")
def test_both_thread_counts_are_run_and_counted(bench_run):
    arguments = "--shapes", "1,4,64,16", "--systems", "numpy", "--rounds", 1, "--threads", 1, 2
    status, document, out, _ = bench_run(*arguments)
    assert status == 0, out
    assert [contest["threads"] for contest in document["races"]] == [1, 2]
    for threads in ("1", "2"):
        counts = document["systems"][threads]["cyflash"]["threads"]
        assert counts["asked"] == counts["reported"] == int(threads)
        assert counts["busy"] in (None, int(threads))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("causal", [False, True])
def test_installed_peers_agree_with_float64(bench_run, name, causal):
    if reason := systems.SYSTEMS[name].missing():  # not importorskip: a peer stays out of this process
        pytest.skip(reason)
    flags = ["--causal"] if causal else []
    status, document, out, _ = bench_run("--shapes", "2,3,70,32", "--systems", name, "--rounds", 1, *flags)
    assert status == 0, out
    (contest,) = document["races"]
    entry = contest["entries"][name]
    assert entry["error"]["rel_l1"] < 1e-6
    assert entry["variants"][entry["variant"]] == min(entry["variants"].values())
    assert document["systems"]["1"][name]["threads"]["reported"] == 1


# --- What is refused --------------------------------------------------------------------------------------------------


def test_misbehaving_systems_are_refused_by_name_and_the_others_measured(bench_run, enter, monkeypatch):
    monkeypatch.setattr(race, "THREAD_PROBES", 1)
    enter(bench_peers.Honest, *bench_peers.MISBEHAVING.values())
    names = "honest", *bench_peers.MISBEHAVING
    status, document, out, _ = bench_run("--shapes", "1,2,96,16", "--systems", *names, "--causal", "--rounds", 20)
    assert status == 1
    (contest,) = document["races"]
    assert contest["entries"].keys() == {"cyflash", "honest"}
    reasons = {
        "one wrong row": "not fp32 attention",
        "low precision": "not fp32 attention",
        "nan": "not fp32 attention",
        "ignores causal": "not fp32 attention",
        "two threads": "asked for 1 threads, but it",
        "spins": "while it should sleep",
        "says three": "reports 3 threads",
        "cannot start": "OSError: a library of it [/in/this/folder] is missing",
        "dies": "process ended: exit code 7",
    }
    for name, reason in reasons.items():
        (found,) = (
            text
            for where, text in document["failures"].items()
            if where.startswith(f"{name},") or where.startswith(f"{name} (")
        )
        assert reason in found
    assert out.count("FAILED") >= len(reasons)


def test_missing_peers_are_named(bench_run, enter):
    enter(bench_peers.NotInstalled)
    arguments = "--shapes", "1,1,32,8", "--systems", "numpy", "not installed", "--rounds", 1
    status, document, out, _ = bench_run(*arguments)
    assert status == 0
    assert document["skipped"]["not installed"] == "no_module_of_this_name not installed"
    assert "no_module_of_this_name not installed" in out


def test_wrong_cyflash_ends_the_run(bench_run, monkeypatch):
    monkeypatch.setitem(systems.SYSTEMS, "cyflash", bench_peers.SaysThree)
    status, document, _, err = bench_run("--shapes", "1,1,32,8", "--systems", "numpy", "--rounds", 1)
    assert status == 1
    assert document is None
    assert "reports 3 threads" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "tensorflow"], "--systems: expected names of cyflash, numpy, torch"),
        (["--threads", "0"], "--threads: expected 1 to"),
        (["--threads", "100000"], "--threads: expected 1 to"),
        (["--rounds", "0"], "--rounds: expected 1 or more; got 0"),
        (["--seconds", "-1"], "--seconds: expected a time above 0"),
        (["--isa", "sse9"], "sse9"),
        (["--int8", "--systems", "openvino"], "--systems: expected names of cyflash, torch, openvino bf16; got"),
        (["--suite", "--causal"], "--suite measures a fixed list"),
        (["--int8", "--shapes", "1,1,8,8"], "--int8 measures a fixed list"),
        (["--suite", "--shapes", "1,1,8,8"], "--suite measures a fixed list"),
        (["--json", "no/such/folder/x.json"], "no folder no/such/folder"),
        (["--plot", "no/such/folder/x.png"], "no folder no/such/folder"),
        (["--json", "."], "cannot be written"),
        (["--plot", "x.unknown"], "ends in .png"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,0", "a,b,c,d", "1,2,3,4,5"])
def test_bad_shapes_show_a_good_one(shape, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--shapes", shape])
    assert "1,8,512,64" in capsys.readouterr().err


# --- The parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 4, 40, 8)),
        Case((2, 4, 40, 8), causal=True),
        Case((2, 4, 40, 8), window=(5, 2)),
        Case((1, 4, 40, 8), causal=True, window=(9, 0), options=tuple(OPTIONS), kv_heads=2),
    ],
)
@pytest.mark.parametrize("at_once", [2**24, 4 * 40 * 10])
def test_expected_rows_are_those_of_the_whole_case(case, at_once, monkeypatch):
    monkeypatch.setattr(cases, "SCORES_AT_ONCE", at_once)
    whole = attention(*case.inputs(), **case.keywords())
    expected = Expected(case)
    assert expected.error(whole).rel_l1 < 1e-14
    assert (expected.error(whole).checked == expected.error(whole).rows) == (at_once == 2**24)
    for row in (0, 39):
        wrong = whole.copy()
        wrong[-1, -1, row] += 0.01
        assert not FP32.accepts(expected.error(wrong))
    with pytest.raises(ValueError, match="expected shape"):
        expected.error(whole[:, :, :-1])


def test_inputs_and_options_are_the_same_in_every_process():
    case = Case((1, 4, 24, 8), options=tuple(OPTIONS), kv_heads=2)
    again = Case((1, 4, 24, 8), options=tuple(OPTIONS), kv_heads=2)
    for x, y in zip(case.inputs(), again.inputs(), strict=True):
        np.testing.assert_array_equal(x, y)
    for name, value in case.keywords().items():
        np.testing.assert_array_equal(value, again.keywords()[name])


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_option_changes_the_answer(name):
    case = Case((1, 4, 24, 8), options=(name,))
    plain = attention(*case.inputs())
    assert np.abs(attention(*case.inputs(), **case.keywords()) - plain).max() > 1e-3


def test_flops_are_those_of_the_library():
    case = Case((2, 3, 40, 8), causal=True, window=(7, 0))
    assert case.flops() == flops.attention_flops(2, 3, 40, 40, 8, 8, causal=True, window=(7, 0))


def test_ratio_is_of_medians_with_an_interval_over_rounds():
    def timing(*seconds):
        return race.Timing("", {}, "", None, rounds=[[x, x, 100.0] for x in seconds])  # one slow call in every round

    result = race.Race(1, {}, {"a": timing(2, 4, 6, 8, 20), "b": timing(1, 2, 3, 4, 10)})
    spread = result.ratio("a", "b")
    assert spread.value == 2.0
    assert spread.low == spread.high == 2.0  # rounds are paired: drift common to both leaves no spread
    assert result.ratio("b", "a").value == 0.5
    assert result.time("a").value == 6.0


@pytest.mark.parametrize(
    ("limit", "done", "elapsed", "over"),
    [
        (race.Limit(5.0), 6, 100.0, False),
        (race.Limit(5.0), 7, 5.0, True),
        (race.Limit(5.0), 100, 4.9, False),
        (race.Limit(5.0, rounds=3), 3, 0.0, True),
        (race.Limit(0.1, rounds=3), 2, 9.0, False),
    ],
)
def test_limit(limit, done, elapsed, over):
    assert limit.reached(done, elapsed) is over
    assert 0 <= limit.fraction(done, elapsed) <= 1


def test_importing_the_command_imports_no_peer():
    import subprocess
    import sys

    code = f"import sys, cyflash.bench; print(*set(sys.modules) & {set(PEERS)})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- The suite --------------------------------------------------------------------------------------------------------


def test_suite_measures_every_row(bench_run, monkeypatch):
    shrunk = {"PLAIN": (1, 4, 64, 16), "FULL": (1, 1, 64, 16), "LONG_FULL": (1, 1, 128, 16)}
    for name, shape in shrunk.items():
        monkeypatch.setattr(suite, name, replace(getattr(suite, name), shape=shape))
    small = {label: replace(case, shape=(1, 4, 64, 16)) for label, case in suite.ALONE.items()}
    monkeypatch.setattr(suite, "ALONE", small)
    monkeypatch.setattr(suite, "TOGETHER", replace(suite.TOGETHER, shape=(1, 4, 64, 16)))
    monkeypatch.setattr(suite, "THREADED", (Case((1, 4, 64, 16)),))
    monkeypatch.setattr(suite, "LONG", ((1, 1, 64, 16),))
    monkeypatch.setattr(suite, "ENCODERS", ((2, 2, 32, 8),))
    monkeypatch.setattr(suite, "LONGEST", 2048)
    status, document, out, _ = bench_run("--suite", "--systems", "numpy", "--rounds", 3)
    assert status == 0, out
    rows = {row["what"]: row for row in document["suite"]}
    for words in (*OPTIONS, "GQA", "all of them", "causal", "window", "one call", "extra memory", "bias of broadcast"):
        assert any(words in what for what in rows), words
    missing = {what for what, row in rows.items() if row["spread"] is None}
    assert all("threads against one" in what or "build against torch" in what for what in missing)
    assert all(row["spread"]["value"] >= 0 for what, row in rows.items() if what not in missing)
    assert all(what in out for what in rows)
    labels = [set(comparison["entries"]) for comparison in document["comparisons"]]
    assert {"plain", *suite.ALONE, "all of them"} in labels
    assert {"full", "causal"} in labels
    assert {"full", "window"} in labels


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_int8(monkeypatch):
    """Its fixed list, in miniature."""
    monkeypatch.setattr(race, "THREAD_PROBES", 1)
    monkeypatch.setattr(int8, "SHAPES", ((1, 1, 96, 16), (1, 1, 96, 24)))
    monkeypatch.setattr(int8, "PLAIN", (Case((1, 4, 96, 16)),))
    monkeypatch.setattr(int8, "BUILDS", (Case((1, 1, 96, 16)),))
    monkeypatch.setattr(int8, "THREADED", (Case((1, 4, 96, 16)),))
    monkeypatch.setitem(int8.OPTIONS, "window (256, 0)", {"window": (25, 0)})


def test_int8_measures_every_row(bench_run, enter, small_int8, monkeypatch, tmp_path):
    plot = tmp_path / "int8.png"
    for peer in (bench_peers.Bf16, bench_peers.Honest):
        monkeypatch.setitem(systems.INT8_SYSTEMS, peer.name, peer)
    arguments = "--int8", "--systems", "is bf16", "honest", "--rounds", 3, "--threads", 1, 2, "--plot", plot
    if cpu_info()["threads"] < 2:
        arguments = (*arguments[:-4], 1, *arguments[-2:])
    status, document, out, _ = bench_run(*arguments)
    assert status == 0, out
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = {row["what"]: row for row in document["suite"]}
    ways = [label.removeprefix("cyflash int8, ") for label in int8.WAYS]
    ends = [
        *(f"16) {way}: vs own fp32" for way in ways),
        *(f"16) codes per tensor: {end}" for end in ("vs is bf16", "share of the int8 peak")),
        *(f"{option}, {way}: vs own fp32" for option in int8.OPTIONS for way in ways[1:3]),
        *(f") {name}, {way}: vs own fp32" for name in cpu.runnable() for way in (ways[0], ways[2])),
    ]
    for end in ends:
        (row,) = (row for what, row in rows.items() if what.endswith(end))
        assert row["spread"]["value"] > 0 and row["note"] == ""
    for peer in ("torch", "openvino bf16"):
        found = [row for what, row in rows.items() if what.endswith(f"vs {peer}")]
        assert len(found) == 2
        assert all(row["spread"] is None and row["note"] == "not among --systems" for row in found)
    if cpu_info()["threads"] > 1:
        assert rows["(1, 4, 96, 16) codes per tensor: 2 threads vs one"]["spread"]["value"] > 0
    assert all(what in out for what in rows)
    for contest in document["int8"]:
        assert contest["entries"].keys() == {"cyflash", "is bf16", "honest", *int8.WAYS}
        assert len(contest["dot_rates"]) == 3
        for label, entry in contest["entries"].items():
            low, high = (1e-3, 3e-2) if "int8" in label or "bf16" in label else (1e-8, 1e-6)
            assert low < entry["error"]["rel_l1"] < high
            assert entry["case"]["int8"] == (asdict(int8.WAYS[label]) if label in int8.WAYS else None)


def test_int8_figures_follow_from_the_raw_times(bench_run, small_int8, monkeypatch):
    monkeypatch.setattr(cpu, "runnable", lambda: ())
    monkeypatch.setattr(int8, "PLAIN", ())
    _, document, _, _ = bench_run("--int8", "--systems", "torch", "--rounds", 4)
    rows = {row["what"]: row for row in document["suite"]}
    contest, label = document["int8"][0], "cyflash int8, codes per tensor"
    medians = {name: np.median([np.median(x) for x in e["rounds"]]) for name, e in contest["entries"].items()}
    where = "(1, 1, 96, 16) codes per tensor: "
    assert rows[where + "vs own fp32"]["spread"]["value"] == pytest.approx(medians["cyflash"] / medians[label])
    share = flops.attention_flops(1, 1, 96, 96, 16, 16) / medians[label] / np.median(contest["dot_rates"])
    assert rows[where + "share of the int8 peak"]["spread"]["value"] == pytest.approx(share)


def test_a_system_that_is_more_precise_than_it_says_is_refused(bench_run, small_int8, monkeypatch):
    monkeypatch.setattr(cpu, "runnable", lambda: ())
    monkeypatch.setitem(systems.INT8_SYSTEMS, "says bf16", bench_peers.SaysBf16)
    status, document, *_ = bench_run("--int8", "--systems", "says bf16", "--rounds", 1)
    assert status == 1
    (reason, _) = (text for where, text in document["failures"].items() if where.startswith("says bf16"))
    assert "not bf16 attention" in reason
    rows = [row for row in document["suite"] if row["what"].endswith("vs says bf16")]
    assert all(row["spread"] is None and "not bf16 attention" in row["note"] for row in rows)


@pytest.mark.parametrize("name", ["torch", "openvino bf16"])
def test_installed_peers_of_int8_have_their_precision(bench_run, small_int8, monkeypatch, name):
    if reason := systems.INT8_SYSTEMS[name].missing():
        pytest.skip(reason)
    monkeypatch.setattr(cpu, "runnable", lambda: ())
    monkeypatch.setattr(int8, "PLAIN", ())
    status, document, out, _ = bench_run("--int8", "--systems", name, "--rounds", 1)
    assert status == 0, out
    for contest in document["int8"]:
        entry = contest["entries"][name]
        assert (1e-3 < entry["error"]["rel_l1"] < 1e-2) if "bf16" in name else (entry["error"]["rel_l1"] < 1e-6)
        assert len(entry["variants"]) == (4 if "bf16" in name else 1)


def test_the_ways_to_int8_are_the_calls_of_their_names():
    q, k, v = Case((1, 2, 40, 16)).inputs()
    codes, smooth = (quantize(x, "token") for x in (q, v)), quantize(k, "token", smooth=True)
    q8, v8 = codes
    calls = {
        "cyflash int8, codes per tensor": lambda: flash_attention_int8(*(quantize(x, "tensor") for x in (q, k, v))),
        "cyflash int8, codes per token": lambda: flash_attention_int8(q8, smooth, v8),
        "cyflash int8, float in": lambda: flash_attention_int8(q, k, v),
        "cyflash int8, codes, bf16 PV": lambda: flash_attention_int8(q8, smooth, v8, pv="bf16"),
        "cyflash int8, float in, bf16 PV": lambda: flash_attention_int8(q, k, v, pv="bf16"),
    }
    assert list(calls) == list(int8.WAYS)
    for label, call in calls.items():
        (build,) = systems.Cyflash(1).candidates(Case((1, 2, 40, 16), int8=int8.WAYS[label])).values()
        candidate = build()
        np.testing.assert_array_equal(candidate.read(candidate.call()), call(), err_msg=label)


@pytest.mark.parametrize("how", [Int8(), Int8("tensor"), Int8(pv="bf16")])
def test_the_tolerance_of_int8_refuses_fp32_noise_and_nan(how):
    tolerance = how.tolerance()
    assert tolerance.accepts(Error(1.2e-2, 2e-2, 1, 1))
    assert tolerance.accepts(Error(2.2e-2, 2e-2, 1, 1)) == (how.granularity == "tensor")
    for rel_l1, largest in ((1e-6, 1e-6), (0.1, 2e-2), (1.2e-2, 0.5), (np.nan, np.nan), (1.2e-2, np.nan)):
        assert not tolerance.accepts(Error(rel_l1, largest, 1, 1))


def test_default_shapes_include_the_long_and_the_encoder_ones():
    assert {(1, 1, 2048, 64), (1, 1, 4096, 64), (1, 1, 4096, 128), (8, 12, 512, 64)} <= set(bench.SHAPES)


def test_the_tables_fit_a_terminal_of_80_columns(capsys, monkeypatch):
    """With all peers, long names of settings, and times of three digits: nothing is cut or wrapped."""
    from cyflash.bench import report

    labels, case = ["cyflash", "numpy", *PEERS], Case((16, 12, 384, 128), causal=True)

    def timing(seconds):
        return race.Timing("way", {"way": seconds, "other": 1.0}, "", None, rounds=[[seconds * x] for x in (1, 1.5, 2)])

    contest = race.Race(1, dict.fromkeys(labels, case), {label: timing(1.23e-2) for label in labels}, {}, [2e11] * 3)
    about = {"version": "2026.4.1", "settings": {"A_RATHER_LONG_SETTING_OF_ITS": "/with/a/long/path" * 3}}
    about["threads"] = {"busy": 1, "cpu_over_wall": 1.0}
    outcome = report.Outcome({}, {}, {1: dict.fromkeys(labels, about)}, races=[contest])
    monkeypatch.setattr(report, "Console", lambda: Console(width=80, force_terminal=True, color_system=None))
    report.show(outcome)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    for text in (*labels, "(16, 12, 384, 128)", "1.00 x", "1.00-1.00", "18.4 ms"):
        assert text in out

    labels = ["cyflash", "torch", "openvino bf16", *int8.WAYS]
    contests = [
        race.Race(1, {label: replace(Case(shape), int8=int8.WAYS.get(label)) for label in labels})
        for shape in ((1, 1, 4096, 64), (1, 1, 4096, 128), (1, 1, 2048, 64), (1, 1, 2048, 128))
    ]
    for contest in contests:
        contest.timings = {label: timing(1.23e-3) for label in labels}
        for own in contest.timings.values():
            own.error = Error(1.2e-2, 1e-2, 1, 1)
    report.show(report.Outcome({}, {}, {1: dict.fromkeys(labels, about)}, int8=contests))
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("openvino bf16", "GFLOP/s", "GOP/s", "1.00 x", "1.2e-02"):
        assert text in out
