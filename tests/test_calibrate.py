"""`cyflash calibrate`: the scales that a Calibrator gives, whatever the processes, interruptions and bad files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cyflash import cli, observing
from cyflash.capture import load_capture, save_capture
from cyflash.quant import Calibrator, Scales, fixtures

NAMES = ("layer0", "layer1", "layer10")
RENAMED = r"--rename=.*\.(layer\d+)=\1"


def save(folder, seed, suffix=".safetensors", **options):
    layers = {}
    for i, name in enumerate(NAMES):
        q, k, v = fixtures.draw("llm_like", 10 * seed + i, Lq=40, Lk=90, D=16, model=i)
        layers[f"run{seed}.{name}"] = q[0], k[0], v[0]
    return save_capture(folder / f"part{seed}{suffix}", layers, **options)


@pytest.fixture
def files(tmp_path):
    """Three files of three layers, in a folder of their own."""
    folder = tmp_path / "captures"
    folder.mkdir()
    return [save(folder, 0, causal=True), save(folder, 1, ".npz", causal=True), save(folder, 2, causal=True)]


def calibrate(out, *inputs, more=("--method", "max")):
    return cli.main(["calibrate", *map(str, inputs), "-o", str(out), RENAMED, *more])


def by_hand(files, causal=True, **settings):
    calibrator = Calibrator(**settings)
    for path in files:
        for name, qkv in load_capture(path).items():
            calibrator.observe(name.rpartition(".")[2], *qkv, causal=causal)
    return calibrator


def observed(out):
    return out.with_name(f"{out.stem}.observed.safetensors")


def same_contents(path, calibrator, folder):
    """Whether the observations are these, file for file."""
    return Calibrator.load(path).save(folder / "a.safetensors").read_bytes() == calibrator.save(
        folder / "b.safetensors"
    ).read_bytes()


# What comes out


@pytest.mark.parametrize(
    ("more", "settings", "choose"),
    [
        (["--method", "max"], {}, lambda c: c.compute("max")),
        (["--method", "octav", "--granularity", "head"], {"granularity": "head"}, lambda c: c.compute("octav")),
        (["--method", "percentile", "--percentile", "99", "--granularity", "head,head,token"],
         {"granularity": ("head", "head", "token")}, lambda c: c.compute("percentile", percentile=99)),
        (["--method", "max", "--fp32-sinks", "4", "--smooth-k", "off", "--reservoir-mb", "0.5", "--seed", "3",
          "--nonfinite", "ignore"],
         {"fp32_sinks": 4, "smooth_k": False, "reservoir_mb": 0.5, "seed": 3, "nonfinite": "ignore"},
         lambda c: c.compute("max")),
        (["--objective", "rmse", "--smooth-k", "on"], {"smooth_k": True}, lambda c: c.compute(objective="rmse")),
    ],
)  # fmt: skip
def test_the_scales_are_those_of_a_calibrator(tmp_path, files, more, settings, choose):
    out = tmp_path / "s.safetensors"
    assert calibrate(out, *files, more=more) == 0
    calibrator = by_hand(files, **settings)
    assert Scales.load(out) == choose(calibrator)
    assert same_contents(observed(out), calibrator, tmp_path)


def test_a_plan(tmp_path, files, capsys):
    out = tmp_path / "s.safetensors"
    assert calibrate(out, *files, more=["--plan", "--rel-l1", "0.3", "--worst", "3"]) == 0
    scales = Scales.load(out)
    assert scales.settings["method"] == "plan" and scales.settings["target"] == {"rel_l1": 0.3, "worst": 3}
    printed = capsys.readouterr().out
    for name in NAMES:
        for part in scales.about[name]["parts"]:
            assert part["rung"] in printed


def test_options_of_the_command_line_win_over_those_of_a_file(tmp_path, files):
    out = tmp_path / "s.safetensors"
    assert calibrate(out, *files, more=["--method", "max", "--no-causal", "--window", "5", "0"]) == 0
    assert Scales.load(out).about["layer0"]["options"] | {"causal": False, "window": [5, 0]} == (
        Scales.load(out).about["layer0"]["options"]
    )


def test_layout(tmp_path):
    q, k, v = (x[0] for x in fixtures.draw("normal", H=3, Lq=20, Lk=30, D=8))
    plain = save_capture(tmp_path / "x.npz", (q, k, v))
    out, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert cli.main(["calibrate", str(plain), "-o", str(out), "--method", "max"]) == 0
    np.savez(plain, **{name: x.transpose(1, 0, 2) for name, x in zip("qkv", (q, k, v), strict=True)})
    assert cli.main(["calibrate", str(plain), "-o", str(other), "--method", "max", "--layout", "blhd"]) == 0
    assert out.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("workers", ["2", "5"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, files, workers):
    outs = [tmp_path / "one.safetensors", tmp_path / "many.safetensors"]
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no arrays")
    for out, count in zip(outs, ("1", workers), strict=True):
        assert calibrate(out, files[0], bad, *files[1:], more=["--method", "mse", "--workers", count]) == 1
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert observed(outs[0]).read_bytes() == observed(outs[1]).read_bytes()


def test_the_order_of_the_files_changes_no_byte(tmp_path, files):
    outs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    calibrate(outs[0], *files)
    calibrate(outs[1], *reversed(files))
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert observed(outs[0]).read_bytes() == observed(outs[1]).read_bytes()


def test_without_rename_layers_keep_their_names(tmp_path, files):
    out = tmp_path / "s.safetensors"
    assert cli.main(["calibrate", str(files[0]), "-o", str(out), "--method", "max"]) == 0
    assert list(Scales.load(out)) == [f"run0.{name}" for name in NAMES]


def test_the_numbers_as_json(tmp_path, files, capsys):
    out, numbers = tmp_path / "s.safetensors", tmp_path / "x.json"
    assert calibrate(out, *files, tmp_path / "absent.npz", more=["--method", "max", "--json", str(numbers)]) == 1
    report = json.loads(numbers.read_text())
    scales = Scales.load(out)
    assert report["settings"] == scales.settings
    assert [file["name"] for file in report["files"]] == [path.name for path in sorted(files)]
    assert [file["size"] for file in report["files"]] == [path.stat().st_size for path in sorted(files)]
    assert list(report["left_out"]) == [str(tmp_path / "absent.npz")]
    for name, layer in scales.items():
        shown = report["layers"][name]
        assert shown["scales"] == {f"{x}_scale": [float(getattr(layer, f"{x}_scale"))] for x in "qkv"}
        assert shown["error"] == scales.about[name]["error"] and shown["observations"] == 3
    printed = capsys.readouterr().out
    assert str(numbers) in printed and str(out) in printed and str(observed(out)) in printed


# Going on


@pytest.fixture
def reads(monkeypatch):
    """The files that are observed, as they are."""
    seen = []
    observe = observing.observe_layers

    def noted(path, *args):
        seen.append(path.name)
        return observe(path, *args)

    monkeypatch.setattr(observing, "observe_layers", noted)
    return seen


def test_another_method_needs_no_second_pass(tmp_path, files, reads):
    out = tmp_path / "s.safetensors"
    calibrate(out, *files)
    before = observed(out).read_bytes()
    assert calibrate(out, *files, more=["--method", "octav"]) == 0
    assert len(reads) == 3 and observed(out).read_bytes() == before
    assert Scales.load(out) == by_hand(files).compute("octav")


def test_new_files_are_added_and_known_ones_are_not_read_again(tmp_path, files, reads):
    out = tmp_path / "s.safetensors"
    calibrate(out, *files[:2])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    known = [shutil.copy(path, moved / path.name) for path in files[:2]]  # by name and content, wherever they are
    assert calibrate(out, *known, files[2], files[2]) == 0
    assert reads == [path.name for path in files]
    assert Scales.load(out) == by_hand(files).compute("max")


@pytest.mark.parametrize("how", ["removed", "changed"])
def test_files_that_cannot_be_taken_back_are_an_error(tmp_path, files, capsys, how):
    out = tmp_path / "s.safetensors"
    calibrate(out, *files)
    before = out.read_bytes(), observed(out).read_bytes()
    if how == "changed":
        save(files[1].parent, 1, ".npz", causal=False)
    left = files if how == "changed" else [files[0], files[2]]
    capsys.readouterr()
    assert calibrate(out, *left) == 2
    error = capsys.readouterr().err
    assert "part1.npz are not among INPUT, or have changed" in error and "--restart" in error
    assert (out.read_bytes(), observed(out).read_bytes()) == before
    assert calibrate(out, files[0], files[2], more=["--method", "max", "--restart"]) == 0
    assert Scales.load(out) == by_hand([files[0], files[2]]).compute("max")


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--seed", "1"], "seed 0, now 1"), (["--fp32-sinks", "2"], "fp32_sinks 0, now 2"),
     (["--granularity", "head"], "granularity"), (["--no-causal"], "options {}, now {'causal': False}"),
     (["--layout", "blhd"], "layout bhld, now blhd"), (["--rename", "a=b"], "renames")],
)  # fmt: skip
def test_other_settings_are_an_error(tmp_path, files, capsys, more, said):
    out = tmp_path / "s.safetensors"
    calibrate(out, *files)
    capsys.readouterr()
    assert calibrate(out, *files, more=["--method", "max", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and "--restart" in error and error.count("\n") == 1
    assert "reservoir_mb" not in error  # only what differs


def test_what_was_left_out_of_a_layer_is_shown(tmp_path, files, capsys):
    q, k, v = (x[0] for x in fixtures.draw("normal", Lq=40, Lk=40, D=16))
    k[1, 2, 3] = np.inf
    bad = save_capture(tmp_path / "bad.npz", {"a.layer7": (q, k, v), "b.layer7": (q, np.abs(k), 0 * v)}, causal=True)
    assert calibrate(tmp_path / "s.safetensors", *files, more=["--method", "max"]) == 0
    assert "Left out" not in capsys.readouterr().out
    good = save_capture(tmp_path / "good.npz", {"c.layer7": (q, q[: len(k)], v)}, causal=True)
    more = ["--method", "max", "--nonfinite", "ignore"]
    assert calibrate(tmp_path / "t.safetensors", *files, bad, good, more=more) == 0
    assert "Left out of layer7: k: 2 not finite, v: 1 tensors of zeros" in capsys.readouterr().out


def test_an_interruption_loses_only_the_file_at_work(tmp_path, files, monkeypatch, capsys):
    out = tmp_path / "s.safetensors"
    observe = observing.observe_layers

    def interrupted(path, *args):
        if path == files[2]:
            raise KeyboardInterrupt
        return observe(path, *args)

    monkeypatch.setattr(observing, "observe_layers", interrupted)
    assert calibrate(out, *files) == 130
    assert not out.exists() and same_contents(observed(out), by_hand(files[:2]), tmp_path)
    monkeypatch.setattr(observing, "observe_layers", observe)
    assert calibrate(out, *files) == 0
    straight = tmp_path / "straight.safetensors"
    calibrate(straight, *files)
    assert out.read_bytes() == straight.read_bytes()
    assert observed(out).read_bytes() == observed(straight).read_bytes()


def test_a_crash_while_writing_leaves_what_was_there(tmp_path, files, monkeypatch, capsys):
    out = tmp_path / "s.safetensors"
    calibrate(out, *files[:2])
    before = observed(out).read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(observing.shutil, "copyfileobj", full)
    assert calibrate(out, *files) == 2
    assert "no space left" in capsys.readouterr().err
    assert observed(out).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captures", observed(out).name, out.name]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_all_processes(tmp_path, workers):
    layers = {f"l{i}": tuple(x[0] for x in fixtures.draw("normal", i, H=4, Lq=600, Lk=600)) for i in range(4)}
    inputs = [save_capture(tmp_path / f"x{i}.safetensors", layers) for i in range(30)]
    out = tmp_path / "s.safetensors"
    arguments = ["calibrate", *map(str, inputs), "-o", str(out), "--workers", workers]
    command = [sys.executable, "-P", "-m", "cyflash", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not observed(out).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.strip().splitlines()[-1] == "cyflash: interrupted"
    assert not out.exists() and Calibrator.load(observed(out)).layers == ("l0", "l1", "l2", "l3")
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# Files that cannot be used


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_others_are_counted_and_the_exit_status_says_so(tmp_path, files, capsys, workers):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files[0].read_bytes()[:-100])
    without = tmp_path / "without.npz"
    np.savez(without, query=np.ones((3, 4)), key=np.ones((3, 4)))
    nan = np.ones((3, 40, 16), np.float32)
    nan[1, 2, 3] = np.nan
    ok = tuple(x[0] for x in fixtures.draw("normal", Lq=40, Lk=40, D=16))
    with_nan = save_capture(tmp_path / "nan.npz", {"a.layer0": ok, "a.layer5": (nan, nan, nan)})
    other_size = save_capture(tmp_path / "size.npz", {"b.layer0": tuple(x[..., :8] for x in ok), "b.layer7": ok})
    damaged = save(tmp_path, 7, ".npz")
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1  # a checksum tells, once the arrays are read
    damaged.write_bytes(data)
    bad = [tmp_path / "absent.npz", broken, without, with_nan, other_size, damaged]
    out = tmp_path / "s.safetensors"
    assert calibrate(out, *files[:2], *bad, files[2], more=["--method", "max", "--workers", workers]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(bad)
    said = ["no such file", "not a readable", "found key, query", "'layer5'.*q: .*nan", "'layer0'.*head_dim",
            "not a readable"]  # fmt: skip
    for line in lines:
        assert line.startswith("cyflash calibrate: left out: ")
    for path, why in zip(bad, said, strict=True):
        assert any(str(path) in line and re.search(why, line) for line in lines), (why, lines)
    assert Scales.load(out) == by_hand(files).compute("max")  # no layer of a file that was left out
    assert same_contents(observed(out), by_hand(files), tmp_path)
    assert calibrate(out, *files) == 0  # what was left out is not asked for again


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path, files, capsys):
    os.mkfifo(tmp_path / "pipe.npz")
    assert calibrate(tmp_path / "s.safetensors", *files, tmp_path / "pipe.npz") == 1
    assert "pipe.npz: expected a file, got a pipe" in capsys.readouterr().err


def test_a_file_that_was_repaired_is_read_by_the_next_run(tmp_path, files, capsys):
    out = tmp_path / "s.safetensors"
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:-10])
    assert calibrate(out, *files) == 1
    files[2].write_bytes(whole)
    assert calibrate(out, *files) == 0
    assert Scales.load(out) == by_hand(files).compute("max")


def test_no_file_that_can_be_read(tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    assert calibrate(out, tmp_path / "a.npz", tmp_path / "b.npz") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "none of 2 files could be observed" in lines[2]
    assert not out.exists() and not observed(out).exists()


def test_too_little_for_a_search_keeps_the_observations(tmp_path, files, capsys):
    out = tmp_path / "s.safetensors"
    assert calibrate(out, files[0], more=[]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cyflash calibrate: error: layers 'layer0', 'layer1', 'layer10': ")
    assert error.count("expected at least two different") == error.count("\n") == 1
    assert not out.exists() and same_contents(observed(out), by_hand(files[:1]), tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "another", "plain"])
def test_observations_that_cannot_be_read_are_an_error(tmp_path, files, capsys, damage):
    out = tmp_path / "s.safetensors"
    calibrate(out, *files)
    path = observed(out)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-64])
    elif damage == "another":
        shutil.copy(files[0], path)
    else:
        by_hand(files).save(path)
    before = path.read_bytes()
    capsys.readouterr()
    assert calibrate(out, *files) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1 and path.read_bytes() == before
    assert calibrate(out, *files, more=["--method", "max", "--restart"]) == 0


# Arguments


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "max", "--objective", "rmse"], "--objective: has no effect"),
        (["--percentile", "99"], "--percentile: has no effect"),
        (["--method", "percentile", "--percentile", "101"], "--percentile: expected a number above 0 and up to 100"),
        (["--rel-l1", "0.1"], "--rel-l1: has no effect"),
        (["--plan", "--method", "max"], "--method: has no effect in --plan"),
        (["--plan", "--worst", "-1"], "--worst: expected a number above 0"),
        (["--granularity", "heads"], "granularity: expected one of"),
        (["--granularity", "head,head"], "granularity: expected one or three"),
        (["--reservoir-mb", "0"], "reservoir_mb: expected"),
        (["--seed", "-1"], "seed: expected"),
        (["--fp32-sinks", "-1"], "fp32_sinks: expected"),
        (["--json", "nowhere/x.json"], "no folder nowhere"),
    ],
)
def test_options_that_cannot_be_are_said_before_a_file_is_read(tmp_path, files, capsys, reads, more, said):
    assert calibrate(tmp_path / "s.safetensors", *files, more=more) == 2
    error = capsys.readouterr().err
    assert error.startswith("cyflash calibrate: error: ") and said in error and error.count("\n") == 1
    assert not reads


def test_outputs_that_cannot_be(tmp_path, files, capsys, reads):
    for out, said in [
        (tmp_path / "s.npz", "ends in .safetensors"), (tmp_path / "no" / "s.safetensors", "no folder"),
        (files[0], "is an INPUT"),
    ]:
        assert calibrate(out, *files) == 2
        assert said in capsys.readouterr().err
    assert not reads


@pytest.mark.parametrize("text", ["abc", "=x", "(=x", r"a=\1", "[=b"])
def test_renamings_that_cannot_be(tmp_path, files, capsys, text):
    with pytest.raises(SystemExit) as stopped:
        calibrate(tmp_path / "s.safetensors", *files, more=["--rename", text])
    assert stopped.value.code == 2
    assert repr(text) in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["80", "160"])
def test_the_table_fits_the_terminal(tmp_path, files, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = tmp_path / "s.safetensors"
    calibrate(out, *files, more=["--method", "max", "--granularity", "head"])
    printed = capsys.readouterr().out
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("Scales: of"))]
    assert max(map(len, table)) <= int(columns)
    assert all(sum(name in line.split() for line in table) == 1 for name in NAMES)
