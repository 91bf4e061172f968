"""The command line itself: its commands, what it imports for each, `cyflash info`, and how it fails."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import cyflash
from cyflash import cli, info
from cyflash.capture import save_capture


def cyflash_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-P", "-m", "cyflash", *arguments], capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_module_with_help(name, capsys):
    module = importlib.import_module(f"cyflash.{name}")
    assert callable(module.add_arguments) and callable(module.run)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: cyflash {name}" in capsys.readouterr().out


def test_python_m_cyflash_works_anywhere(tmp_path):
    got = cyflash_command("info", cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    assert cyflash.__version__ in got.stdout


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"cyflash {cyflash.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["explain"], ["info", "--unknown"]])
def test_wrong_use_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: cyflash" in capsys.readouterr().err


def test_a_command_imports_only_what_it_needs(tmp_path):
    code = (
        "import sys; from cyflash.cli import main; main(['info', '--json'])\n"
        "heavy = {'matplotlib', 'scipy', 'safetensors', 'torch', 'rich', 'cyflash.compare', 'cyflash.bench'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    got = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert got.returncode == 0, got.stderr


class Failing:
    """A command that raises."""

    def __init__(self, error):
        self.error = error

    def add_arguments(self, parser):
        pass

    def run(self, args):
        raise self.error


@pytest.fixture
def failing(monkeypatch):
    def install(error):
        monkeypatch.setitem(sys.modules, "cyflash.info", Failing(error))

    return install


@pytest.mark.parametrize(
    "error", [ValueError("v"), TypeError("t"), OSError("o"), NotImplementedError("n"), RuntimeError("r"), MemoryError()]
)
def test_errors_of_a_user_are_one_line_and_exit_2(failing, capsys, error):
    failing(error)
    assert cli.main(["info"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"cyflash info: error: {str(error) or 'MemoryError'}\n"


def test_an_error_of_several_lines_is_said_in_one(failing, capsys):
    failing(ValueError("first\n  second"))
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "cyflash info: error: first second\n"


def test_traceback_shows_where_it_was(failing):
    failing(ValueError("here"))
    with pytest.raises(ValueError, match="here"):
        cli.main(["--traceback", "info"])


def test_mistakes_of_ours_keep_their_traceback(failing):
    failing(AssertionError("a bug"))
    with pytest.raises(AssertionError):
        cli.main(["info"])


def test_an_interrupt_exits_with_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "cyflash: interrupted\n"


def test_a_closed_pipe_is_no_error():
    code = "import sys; from cyflash.cli import main; sys.exit(main(['info', '--json']))"
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show_are_no_error(tmp_path, encoding):
    x = np.ones((5, 4), np.float32)
    path = save_capture(tmp_path / "x.npz", {"слой": (x, x, x)})
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    got = cyflash_command("compare", path, env=environment, encoding=encoding)
    assert got.returncode == 0, got.stderr
    assert "1 layer" in got.stdout and got.stdout.count("int8 tensor") == 2


# cyflash info


YES_NO = ("yes", "no")


def test_info_shows_what_cpu_info_knows(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    known = cyflash.cpu_info()
    assert known["model"] in out
    for name, build in known["builds"].items():
        # a feature may have the same name, and begin a line of its own
        words = next(words for words in map(str.split, out.splitlines()) if words[:1] == [name] and words[1] in YES_NO)
        assert words[1:3] == ["yes" if build["built"] else "no", "yes" if build["runs"] else "no"]
        assert ("used" in words[3:4]) == (name == known["implementation"])
    for feature in known["features"]:
        assert feature in out
    assert f"{known['threads']}, from " in out
    shown = "".join(out.split())  # a long path is on two lines
    assert "".join((known["openmp"] or "built without it").split()) in shown


def test_info_follows_a_forced_build(capsys):
    with cyflash.set_implementation("baseline"):
        cli.main(["info"])
    out = capsys.readouterr().out
    assert "used" in next(line for line in out.splitlines() if line.split()[:1] == ["baseline"])


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    known = cyflash.cpu_info()
    assert got.pop("version") == cyflash.__version__
    assert got == json.loads(json.dumps(known))


def test_brackets_in_names_are_shown_as_they_are(capsys):
    known = cyflash.cpu_info() | {"openmp": "OpenMP 1, /[x]/[/lib]/libgomp.so", "model": "CPU [/dim] 1"}
    info.show(known)
    out = capsys.readouterr().out
    assert "/[x]/[/lib]/libgomp.so" in out and "CPU [/dim] 1" in out


def test_info_without_openmp_and_with_a_build_that_does_not_run(capsys):
    known = cyflash.cpu_info()
    known["openmp"] = None
    known["caches"] = {"l1d": 49152, "l2": 1 << 20, "l3": None}
    known["builds"]["avx512"] = {"built": True, "runs": False, "reason": "the processor has no avx512f"}
    known["implementation"] = "baseline"
    info.show(known)
    out = " ".join(capsys.readouterr().out.split())
    assert "from the build: it has no OpenMP" in out
    assert "none: cyflash was built without it" in out
    assert "L1D 48 KiB, L2 1 MiB, L3 unknown" in out
    assert "avx512 yes no the processor has no avx512f" in out


LIMITS = dict.fromkeys(("affinity", "cgroup", "omp_num_threads", "cyflash_num_threads", "set_num_threads"))


@pytest.mark.parametrize(
    ("threads", "limits", "text"),
    [
        (8, {"affinity": 8}, "processors this process may run on"),
        (2, {"affinity": 8, "cgroup": 2}, "the container's quota"),
        (2, {"affinity": 2, "cgroup": 2}, "processors this process may run on and the container's quota"),
        (1, {"affinity": 8, "cgroup": 2, "omp_num_threads": 1}, "OMP_NUM_THREADS"),
        (4, {"affinity": 2, "cyflash_num_threads": 4}, "CYFLASH_NUM_THREADS"),
        (3, {"affinity": 2, "cyflash_num_threads": 4, "set_num_threads": 3}, "cyflash.set_num_threads"),
    ],
)
def test_the_origin_of_the_thread_count(threads, limits, text):
    assert info.origin(threads, LIMITS | limits, "libgomp") == text


@pytest.mark.parametrize(
    ("environment", "text"),
    [("CYFLASH_NUM_THREADS", "1, from CYFLASH_NUM_THREADS"), ("OMP_NUM_THREADS", "OMP_NUM_THREADS")],
)
def test_info_names_the_variable_that_decided(environment, text, monkeypatch):
    if cyflash.cpu_info()["openmp"] is None:
        pytest.skip("built without OpenMP")
    for name in ("CYFLASH_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(environment, "1")
    assert text in " ".join(cyflash_command("info").stdout.split())
