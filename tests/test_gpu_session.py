"""The session with a GPU, rehearsed without one: tests that fail in every way, and the command itself."""
import json
import subprocess
import sys
import time

import pytest
from gpu_session import bench, machine, processes, tests
from gpu_session.__main__ import arguments, few
from gpu_session.report import Report

BAD = """
import os, time
import gpu_on_device
import pytest

pytestmark = pytest.mark.gpu

def test_passes(): pass
def test_skipped(): pytest.skip("a reason")
def test_fails(): assert 1 + 1 == 3, "sums"
def test_crashes(): os.abort()
def test_after_a_crash(): pass
def test_hangs(): time.sleep(100)
def test_after_a_hang(): pass
def test_breaks_the_gpu():
    gpu_on_device.Device.broken = "cyflash_x of x.cu"
    assert False, "illegal address"
def test_after_breaking(): assert not gpu_on_device.Device.broken
@pytest.fixture
def late():
    yield
    raise OSError("in teardown")
def test_fails_late(late): pass
"""


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "out", fresh=False)


def outcomes(report):
    lines = map(json.loads, (report.folder / "tests.jsonl").read_text().splitlines())
    return {one["id"].rpartition("::")[2]: one for one in lines}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that writes a file of tests, alone in its project."""
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: x']\n")
    monkeypatch.setenv("PYTHONPATH", str(processes.ROOT))
    monkeypatch.setattr(processes, "ROOT", tmp_path)

    def write(text):
        (tmp_path / "test_it.py").write_text(text)
        return [tmp_path / "test_it.py"]

    return write


def test_whatever_tests_do(report, project, capsys):
    """Each has its result, those that hang or crash too, and none takes another one with it."""
    names = project(BAD)
    good = tests.run(report, time.monotonic() + 300, jobs=1, limit=8.0, names=names)
    found = outcomes(report)
    assert not good and {name: one["outcome"] for name, one in found.items()} == {
        "test_passes": "passed", "test_skipped": "skipped", "test_fails": "failed", "test_crashes": "crashed",
        "test_after_a_crash": "passed", "test_hangs": "hung", "test_after_a_hang": "passed",
        "test_breaks_the_gpu": "failed", "test_after_breaking": "passed", "test_fails_late": "failed",
    }  # fmt: skip
    assert "sums" in found["test_fails"]["why"] and "a reason" in found["test_skipped"]["why"]
    assert "SIGABRT" in found["test_crashes"]["why"] and "test_crashes" in found["test_crashes"]["text"]
    assert "took more than 8 s" in found["test_hangs"]["why"] and "in teardown" in found["test_fails_late"]["why"]
    assert found["test_breaks_the_gpu"]["broken"] == "cyflash_x of x.cu"
    shown = capsys.readouterr().out
    assert "HUNG" in shown and "1 crashed, 4 passed" not in shown and "skipped 1 times" in shown
    assert shown == (report.folder / "report.txt").read_text()

    again = Report(report.folder, fresh=False)  # a session that goes on
    assert not tests.run(again, time.monotonic() + 300, jobs=1, limit=8.0, names=names)
    assert "0 tests" in (shown := capsys.readouterr().out) and "10 done before" in shown
    assert Report(report.folder, fresh=True).found == {} and not (report.folder / "tests.jsonl").exists()


def test_out_of_time(report, project):
    names = project("import pytest, time\npytestmark = pytest.mark.gpu\n"
                    "def test_one(): time.sleep(60)\ndef test_two(): pass\n")
    assert not tests.run(report, time.monotonic() + 8, jobs=1, limit=100.0, names=names)
    assert [one["outcome"] for one in report.found["tests"]] == ["not run", "not run"]


def test_what_cannot_be_collected(report, project, capsys):
    names = project("import no_such_module\n")
    assert not tests.run(report, time.monotonic() + 100, jobs=1, limit=8.0, names=names)
    assert "NOT COLLECTED" in (shown := capsys.readouterr().out) and "no_such_module" in shown


def test_every_file_belongs_to_a_part():
    from gpu_session.__main__ import FILES

    assert sorted(name for names in FILES.values() for name in names) == sorted(tests.files())


def test_processes_end():
    done = processes.run(processes.python("-c", "print('said', flush=True); import time; time.sleep(60)"), 3)
    assert done.code is None and done.output == "said\n" and done.why() == "did not end in 3 s"
    assert processes.run(processes.python("-c", "raise SystemExit(4)"), 60).why() == "exit status 4"
    assert "SIGSEGV" in processes.run(processes.python("-c", "import os, signal; os.kill(os.getpid(), 11)"), 60).why()


def test_a_machine_without_anything(report, monkeypatch, capsys):
    monkeypatch.setattr(machine, "QUESTIONS", {"nothing": "import no_such_module", "numpy": machine.QUESTIONS["numpy"]})
    found = machine.describe(report)
    assert "no_such_module" in found["nothing"]["error"] and found["numpy"]["numpy"]
    assert "nothing: exit status 1" in capsys.readouterr().out


def result(kind, seconds, kernels, **more):
    from cyflash.bench.gpu_systems import GPUCase

    shape = dict(B=1, H=16, Hk=16, Lq=16384, Lk=16384, D=128) | more
    return {"case": GPUCase(kind, **shape), "seconds": seconds, "kernels": kernels, "failures": {}, "absent": []}


def test_targets(report, capsys):
    from cyflash.bench import gpu

    flops = 4 * 16 * 16384**2 * 128
    results = [
        result("fp16", {"cyflash": flops / 650e12, "cyflash mma": flops / 300e12, "torch cuDNN": flops / 700e12},
               {"cyflash": "cyflash_hopper sm_90a", "cyflash mma": "cyflash_mma sm_90a"}),
        result("int8", {"cyflash": flops / 900e12}, {"cyflash": "cyflash_mma sm_90a"}),
        result("fp16", {"cyflash": 2 * 64 * 8 * 8192 * 128 * 2 / 3.6e12}, {}, B=64, H=32, Hk=8, Lq=1, Lk=8192),
    ]  # fmt: skip
    rows = {row["what"]: row for row in bench.targets(report, gpu, {"copy": 4e12, "fp32": 67e12}, results)}
    assert rows["fp16, D=128, TMA + wgmma"]["measured"] == pytest.approx(650)
    assert rows["fp16, D=128, TMA + wgmma"]["vs cuDNN"] == pytest.approx(650 / 700)
    assert rows["decode, fp16 cache, of the copy bandwidth"]["measured"] == pytest.approx(0.9)
    shown = capsys.readouterr().out
    assert "MISSED" in shown and "another kernel ran: cyflash_mma sm_90a" in shown and "not measured" in shown


def test_arguments(capsys):
    assert arguments(["--out", "x", "--parts", "bench,public"]).parts == ["bench", "public"]
    with pytest.raises(SystemExit):
        arguments(["--out", "x", "--parts", "bench,all"])
    assert "expected some of machine, primitives" in capsys.readouterr().err
    assert few(["a::f[1]", "a::f[2]", "a::g", "a::test_long"]) == ["a::f[1]", "a::g"]


def session(*given):
    done = subprocess.run([sys.executable, "-m", "tests.gpu_session", *map(str, given)], cwd=processes.ROOT,
                          capture_output=True, text=True, timeout=1500)
    return done.returncode, done.stdout + done.stderr


def test_help():
    code, shown = session("--help")
    assert code == 0 and "It has to be installed" in shown and "report.txt" in shown


def test_without_a_gpu(tmp_path):
    code, shown = session("--out", tmp_path, "--parts", "bench")
    if "nothing can be run" not in shown:
        pytest.skip("there is a GPU")
    assert code == 2 and (tmp_path / "report.txt").read_text() == shown


def test_rehearsal(tmp_path):
    """The command, from the machine to the targets; its tests and the rest in the slow one."""
    code, shown = session("--out", tmp_path, "--dry", "--parts", "bench")
    found = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and found["outcomes"] == {"bench": True} and "REHEARSAL" in shown, shown
    assert all(one["seconds"]["cyflash"] > 0 for one in found["bench"]["results"]) and len(found["targets"]) == 7


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_rehearsal(tmp_path):
    code, shown = session("--out", tmp_path, "--dry", "--jobs", 2, "--minutes", 20)
    assert code == 0, shown
    assert {path.name for path in tmp_path.iterdir()} == {"report.txt", "report.json", "tests.jsonl", "log.txt"}
