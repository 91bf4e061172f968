"""`cyflash bench --decode`: every row is measured, and what is measured is what the row says. No time is judged."""

import contextlib
import importlib.util
import io
import json
from dataclasses import replace

import bench_peers
import numpy as np
import pytest
from rich.console import Console

import cyflash
from cyflash import cpu, cpu_info
from cyflash.bench import decode, decode_systems, race
from cyflash.bench.cases import FP16, FP32, Case, Error
from cyflash.bench.decode_cases import Append, Decode, Ragged, Read
from cyflash.bench.decode_systems import CyflashDecode, TorchDecode, filled_cache
from cyflash.cli import main
from cyflash.reference import attention

THREADS = min(2, cpu_info()["threads"])
BF16 = importlib.util.find_spec("ml_dtypes") is not None
SMALL = Decode((40,), 4, 4, 16)
UNLIKE = Decode((70, 33, 16), 4, 2, 16)
RAGGED = Ragged((5, 80, 2, 33), 2, 16)


def run_small(folder, *arguments, threads=THREADS):
    """Runs the fixed list in miniature; returns (status, JSON document, what it printed)."""
    small = {
        "CACHES": (SMALL, replace(SMALL, keys=(64,))),
        "GROUPED": replace(SMALL, kv_heads=2),
        "LONG_ROW": Decode((300,), 1, 1, 16),
        "APPENDED": Decode((9, 9), 2, 2, 16),
        "UNLIKE": UNLIKE,
        "RAGGED": (RAGGED, replace(RAGGED, queries="last")),
        "HALF": (Case((1, 2, 64, 16)),),
    }
    printed, path = io.StringIO(), folder / "bench.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(race, "THREAD_PROBES", 1)
        for name, value in small.items():
            patch.setattr(decode, name, value)
        status = main(["bench", "--decode", "--threads", str(threads), "--json", str(path), *map(str, arguments)])
    return status, json.loads(path.read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(status, JSON document, stdout, plot) of one run of everything."""
    folder = tmp_path_factory.mktemp("bench")
    plot = folder / "decode.png"
    return *run_small(folder, "--rounds", 4, "--plot", plot), plot


def answer(case, threads=1):
    """(what every way of cyflash gives for the case, the case's judge)."""
    (build,) = CyflashDecode(threads).candidates(case).values()
    candidate = build()
    return candidate.read(candidate.call()), case.question().expected()


# --- The list ---------------------------------------------------------------------------------------------------------


def test_every_row_is_measured(whole):
    status, document, out, plot = whole
    assert status == 0, out
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = {row["what"]: row for row in document["suite"]}
    caches = "4 heads, 40 keys, D=16", "4 heads, 64 keys, D=16", "4/2 heads, 40 keys, D=16"
    dtypes = ["bf16"] * BF16 + ["fp16", "int8"]
    expected = [
        *(f"{where}, {name} cache: vs reading it" for where in caches for name in ("fp32", "int8")),
        *(f"{where}, {name} cache: vs fp32 cache" for where in caches for name in dtypes),
        *(f"append of a token, 2 rows, 2 heads, 9 keys, D=16, {name} cache" for name in ("fp32", "int8")),
        *(
            f"{of}4 sequences of 2 to 80, 2 heads, D=16, {name}: varlen vs loop"
            for of in ("", "last queries of ")
            for name in ("fp32", "int8")
        ),
        *(
            f"3 rows, 4/2 heads, 16 to 70 keys, D=16, {name}, pages of {size}: vs KVCache"
            for name in ("fp32", "int8")
            for size in decode.PAGE_SIZES
        ),
        *(f"{caches[0]}, {name} cache: times fewer bytes" for name in dtypes),
    ]
    if THREADS > 1:
        ways = (f"{what}{name} cache" for what in ("", "reading the ") for name in ("fp32", "int8"))
        expected += [f"1 head, 300 keys, D=16, {way}: {THREADS} threads vs one" for way in ways]
    if BF16:
        expected += ["flash_attention (1, 2, 64, 16), bf16, 1 thread: vs own fp32"]
    if not (missing := TorchDecode.missing()):
        expected += [f"{where}, fp32 cache: vs torch" for where in caches]
    assert all(rows[what]["spread"]["value"] > 0 for what in expected)
    others = [row for what, row in rows.items() if what not in expected]
    assert all(row["spread"] is None and row["note"] in (missing, "one thread is available") for row in others)
    assert all(what in out for what in rows)
    assert document["systems"].keys() == {"1", str(THREADS)}


def test_figures_follow_from_the_raw_times(whole):
    _, document, _, _ = whole
    rows = {row["what"]: row for row in document["suite"]}
    entries = document["caches"][0]["entries"]
    medians = {label: np.median([np.median(times) for times in e["rounds"]]) for label, e in entries.items()}
    where = "4 heads, 40 keys, D=16, "
    share = rows[where + "int8 cache: vs reading it"]
    assert share["spread"]["value"] == pytest.approx(medians["reading int8"] / medians["cyflash int8"])
    ratio = rows[where + "int8 cache: vs fp32 cache"]["spread"]["value"]
    assert ratio == pytest.approx(medians["cyflash"] / medians["cyflash int8"])
    appends = next(x["entries"] for x in document["comparisons"] if x["entries"].keys() == {"fp32", "int8"})
    for name, entry in appends.items():
        row = rows[f"append of a token, 2 rows, 2 heads, 9 keys, D=16, {name} cache"]
        assert row["unit"] == "us"
        assert row["spread"]["value"] == pytest.approx(1e6 * entry["median_seconds"])
    for label, low, high in (("cyflash", 1e-9, 1e-6), ("cyflash fp16", 1e-5, 1e-3), ("cyflash int8", 1e-3, 2e-2)):
        assert low < entries[label]["error"]["rel_l1"] < high
    assert entries["cyflash int8"]["case"]["dtype"] == "int8"
    caches = (cyflash.KVCache(1, 4, 16, 40, dtype) for dtype in ("float32", "int8"))
    fp32, int8 = (cache.nbytes for cache in caches)
    assert rows[where + "int8 cache: times fewer bytes"]["spread"]["value"] == pytest.approx(fp32 / int8)


def test_a_wrong_cache_is_refused_and_the_others_measured_on_one_thread(tmp_path, monkeypatch):
    monkeypatch.setitem(decode_systems.DECODE_SYSTEMS, "cyflash", bench_peers.ForgetsTokens)
    status, document, out = run_small(tmp_path, "--systems", "cyflash", "--rounds", 1, threads=1)
    assert status == 1
    assert "FAILED" in out
    rows = {row["what"]: row for row in document["suite"]}
    lost = [row for what, row in rows.items() if what.endswith("int8 cache: vs fp32 cache")]
    assert lost and all(row["spread"] is None and "not int8 attention" in row["note"] for row in lost)
    assert all("int8" in where and "not int8 attention" in why for where, why in document["failures"].items())
    assert all(row["spread"] for what, row in rows.items() if what.endswith("fp16 cache: vs fp32 cache"))
    alone = rows["1 head, 300 keys, D=16: two threads vs one"]
    assert alone["spread"] is None and alone["note"] == "one thread is available"
    torch = [row for what, row in rows.items() if what.endswith("vs torch")]
    assert torch and all(row["spread"] is None and row["note"] == "not among --systems" for row in torch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode", "--causal"], "--decode measures a fixed list"),
        (["--decode", "--shapes", "1,1,8,8"], "--decode measures a fixed list"),
        (["--decode", "--systems", "openvino"], "--systems: expected names of cyflash, torch; got 'openvino'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_list_has_the_shapes_that_are_asked_about():
    assert [case.keys for case in decode.CACHES] == [(8192,), (16384,), (32768,)]
    assert all((case.heads, case.kv_heads, case.D) == (32, 32, 128) for case in decode.CACHES)
    assert (decode.GROUPED.heads, decode.GROUPED.kv_heads, decode.GROUPED.keys) == (32, 8, (16384,))
    assert (min(decode.LENGTHS), max(decode.LENGTHS)) == (16, 4096)


def test_the_tables_fit_a_terminal_of_80_columns(capsys, monkeypatch):
    from cyflash.bench import report

    def timing(seconds):
        return race.Timing("way", {"way": seconds}, "", Error(1e-7, 1e-7, 1, 1), rounds=[[seconds]] * 3)

    labels = *decode.DTYPES, *decode.READ, "torch"
    cases = *decode.CACHES, decode.GROUPED
    contests = [race.Race(2, dict.fromkeys(labels, x), {label: timing(0.123) for label in labels}) for x in cases]
    about = {"version": "0", "settings": {}, "threads": {"busy": 2, "cpu_over_wall": 2.0}}
    outcome = report.Outcome({}, {}, {2: {"cyflash": about}}, caches=contests)
    monkeypatch.setattr(report, "Console", lambda: Console(width=80, force_terminal=True, color_system=None))
    report.show(outcome)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("cyflash fp32", "reading int8 cache", "torch", "32/8 heads", "32768 keys", "123 ms", "1.00 x"):
        assert text in out


# --- The cases --------------------------------------------------------------------------------------------------------

DTYPES = ["float32", "float16", "int8", *["bfloat16"] * BF16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_caches_hold_the_tokens_that_references_see(dtype, page_size):
    case = replace(UNLIKE, dtype=dtype, page_size=page_size)
    out, expected = answer(case)
    error = expected.error(out)
    assert CyflashDecode.tolerance(case).accepts(error)
    assert error.checked == error.rows == 3 * 4
    for lost in (slice(0, 8), slice(-8, None)):  # of row 1: without them the reference is another one
        k, v = np.concatenate(list(case.tokens(1, 1)), axis=1)
        wrong = out.copy()
        wrong[1, 2:, 0] = attention(case.queries()[1, 2:, 0], *(np.delete(x, np.r_[:33][lost], 0) for x in (k, v)))
        assert not CyflashDecode.tolerance(case).accepts(expected.error(wrong))


def test_large_caches_are_judged_by_three_heads_of_every_row(monkeypatch):
    monkeypatch.setattr("cyflash.bench.decode_cases.CHECK_ALL_BELOW", 0)
    out, expected = answer(Decode((20, 30), 10, 5, 16))
    error = expected.error(out)
    assert FP32.accepts(error)
    assert (error.checked, error.rows) == (2 * 3 * 2, 2 * 10)
    for row, head in ((0, 0), (1, 5), (1, 9)):
        wrong = out.copy()
        wrong[row, head] *= 1.01
        assert not FP32.accepts(expected.error(wrong))


def test_tokens_of_long_rows_are_those_of_the_chunks(monkeypatch):
    monkeypatch.setattr("cyflash.bench.decode_cases.CHUNK", 8)
    case = Decode((21, 8), 2, 2, 4)
    rows = {0: [], 1: []}
    for row, k, v in case.chunks():
        assert k.shape == v.shape and k.shape[:2] == (1, 2) and k.shape[2] <= 8
        rows[row].append(np.concatenate([k, v]))
    for row, length in enumerate(case.keys):
        made = np.concatenate(rows[row], axis=2)
        assert made.shape == (2, 2, length, 4)
        for head in range(2):
            np.testing.assert_array_equal(made[:, head], np.concatenate(list(case.tokens(row, head)), axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_appends_go_on_beyond_the_room_and_are_judged(dtype, monkeypatch):
    monkeypatch.setattr(decode_systems, "APPENDS", 5)
    case = Append(replace(UNLIKE, keys=(17, 17), dtype=dtype))
    (build,) = CyflashDecode(1).candidates(case).values()
    candidate = build()
    for _ in range(12):
        candidate.call()
    expected = case.question().expected()
    out = candidate.read(None)
    assert CyflashDecode.tolerance(case).accepts(expected.error(out))
    whole = filled_cache(case.cache)
    np.testing.assert_array_equal(out, cyflash.flash_attention_with_kvcache(case.cache.queries(), whole))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("queries", ["all", "last"])
def test_ragged_batches_are_the_same_in_one_call_and_many(int8, queries, monkeypatch):
    monkeypatch.setattr("cyflash.bench.decode_cases.CHECKED_ROWS", 9)
    case = replace(RAGGED, int8=int8, queries=queries)
    out, expected = answer(case)
    assert CyflashDecode.tolerance(case).accepts(expected.error(out))
    np.testing.assert_array_equal(out, answer(replace(case, how="loop"))[0])
    for of_queries, _ in case.slices():
        wrong = out.copy()
        wrong[of_queries.stop - 1] = 1.0
        assert not CyflashDecode.tolerance(case).accepts(expected.error(wrong))


@pytest.mark.parametrize("name", cpu.runnable())
@pytest.mark.parametrize("threads", [1, THREADS])
def test_every_word_is_read(name, threads):
    with cyflash.set_implementation(name):
        for n in (0, 1, 7, 127, 128, 129, 1000, 4099):
            x = np.random.default_rng(n).integers(-(2**31), 2**31, n, dtype=np.int32)
            assert cpu.active().read_words(x, threads) == x.view(np.uint32).sum(dtype=np.uint32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_is_of_the_cache_that_calls_read(dtype):
    system, case = CyflashDecode(THREADS), replace(SMALL, dtype=dtype)
    (attend,), (read,) = (list(system.candidates(x).values()) for x in (case, Read(case)))
    kept = attend()
    candidate = read()
    assert len(system._caches) == 1
    (cache,) = system._caches.values()
    _, total = candidate.read(candidate.call())
    assert FP32.accepts(Read(case).expected().error(candidate.read(candidate.call())))
    cache.reset()
    cache.append(*(np.zeros((1, 4, 40, 16), np.float32) for _ in range(2)))
    assert total != candidate.read(candidate.call())[0]
    assert not FP32.accepts(Read(case).expected().error(np.array([1, 2])))
    del kept, candidate, cache
    assert not system._caches  # what no case uses is given back


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_way_of_torch_gives_the_answer(kv_heads):
    if reason := TorchDecode.missing():
        pytest.skip(reason)
    worker = race.Worker(TorchDecode, 1)
    try:
        worker.ask("start")
        case = replace(SMALL, kv_heads=kv_heads)
        made = worker.ask("prepare", case)
    finally:
        worker.close()
    assert made["failed"] == {}
    assert len(made["seconds"]) == (4 if kv_heads == 2 else 2)
    assert FP32.accepts(case.expected().error(made["output"]))


def test_the_tolerance_of_float16_refuses_fp32_and_bf16():
    assert FP16.accepts(Error(2e-4, 1e-3, 1, 1))
    for rel_l1 in (1e-7, 4e-3, np.nan):
        assert not FP16.accepts(Error(rel_l1, 1e-3, 1, 1))
