"""The command line itself: its commands, what it imports for each, `cyflash info`, and how it fails."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

import cyflash
from cyflash import cli, info
from cyflash.capture import save_capture
from cyflash.gpu.status import GPUStatus


def cyflash_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-P", "-m", "cyflash", *arguments], capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_module_with_help(name, capsys):
    module = importlib.import_module(f"cyflash.{name}")
    assert callable(module.add_arguments) and callable(module.run) and module.EXAMPLES
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: cyflash {name}" in out
    assert all(f"  {example}\n" in out for example in module.EXAMPLES)
    documented = dict(re.findall(r"^  (\d+) +(.*)", out.partition("exit status:")[2], re.M))
    assert documented == {str(number): text for number, text in {**cli.STATUS, **module.STATUS}.items()}


def examples():
    for name in cli.COMMANDS:
        yield from importlib.import_module(f"cyflash.{name}").EXAMPLES


@pytest.mark.parametrize("example", list(examples()))
def test_examples_of_the_help_are_right(example):
    words = shlex.split(re.split(r" [|>] ", example)[0])
    words = words[words.index("cyflash") + 1 :]
    assert cli.command_parser(words).parse_args(words).command == words[0]


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "completion"])
def test_every_command_that_finds_numbers_has_json(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert "--json" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("arguments", "prog"), [([], "cyflash"), (["explain"], "cyflash"), (["info", "--unknown"], "cyflash info")]
)
def test_wrong_use_exits_with_2(arguments, prog, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"{prog}: error: .*; {prog} --help lists the options\n", said.err)


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

    EXAMPLES, STATUS = {}, {}

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


def test_traceback_shows_where_it_was_and_the_exit_status_stays(failing, capsys):
    failing(ValueError("here"))
    assert cli.main(["--traceback", "info"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("ValueError: here\n")


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
    got = cyflash_command("compare", path, "--schemes", "int8 tensor", env=environment, encoding=encoding)
    assert got.returncode == 0, got.stderr
    assert "1 layer" in got.stdout and got.stdout.count("int8 tensor") == 2


# Streams: what is said where


@pytest.fixture
def capture(tmp_path):
    """Two observations of a layer that are quick."""
    arrays = np.random.default_rng(0).standard_normal((3, 2, 2, 64, 8), dtype=np.float32)
    return save_capture(tmp_path / "x.npz", {"a": tuple(arrays)})


def test_json_to_stdout_comes_alone(capture, tmp_path):
    scales = tmp_path / "s.safetensors"
    for keys, *arguments in (
        ({"layers", "summary"}, "compare", capture, "--schemes", "int8 token"),
        ({"layers", "settings"}, "calibrate", capture, "-o", scales, "--method", "max"),
        ({"layers", "ok"}, "check", scales, "--data", capture, "--max-rel-l1", "1"),
        ({"layers", "verdict"}, "report", scales, "-o", tmp_path / "r.html"),
        ({"races"}, "bench", "--shapes", "1,1,64,16", "--threads", "1", "--rounds", "1", "--systems", "numpy"),
    ):
        got = cyflash_command(*map(str, arguments), "--json", "-", cwd=tmp_path)
        assert got.returncode == 0, got.stderr
        assert keys <= json.loads(got.stdout).keys()
        assert len(got.stderr.splitlines()) > 1  # what a person reads
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"r.html", "s.observed.safetensors", "s.safetensors", "x.npz"}


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self):
        self._own, self.end = __import__("pty").openpty()

    def read(self):
        os.close(self.end)
        text = b""
        while True:
            try:
                more = os.read(self._own, 65536)
            except OSError:  # the other end is closed
                more = b""
            if not more:
                os.close(self._own)
                return text.decode()
            text += more


COLOUR = re.compile(r"\x1b\[[\d;]*3\dm")
TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "100"}


def on_terminal(stream, arguments, **variables):
    """What a command writes to a terminal and to a pipe; stream: which of its two is the terminal."""
    pytest.importorskip("pty", reason="needs pseudo-terminals")
    environment = {name: x for name, x in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    terminal = Terminal()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: terminal.end}
    command = [sys.executable, "-P", "-m", "cyflash", *arguments]
    process = subprocess.Popen(command, text=True, env=environment | TERMINAL | variables, **streams)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return terminal.read(), out if stream == "stderr" else err


def test_colours_on_a_terminal_only():
    shown, _ = on_terminal("stdout", ["info"])
    assert COLOUR.search(shown)
    shown, _ = on_terminal("stdout", ["info"], NO_COLOR="1")
    assert "avx2" in shown and not COLOUR.search(shown)
    assert "\x1b" not in cyflash_command("info").stdout


def test_progress_is_shown_on_a_terminal_that_stderr_is(capture, tmp_path):
    arguments = ["calibrate", str(capture), "-o", str(tmp_path / "s.safetensors"), "--method", "max", "--restart"]
    shown, out = on_terminal("stderr", arguments)
    assert "reading files" in shown and "choosing scales" in shown
    assert "\x1b" not in out and "Scales: " in out
    shown, err = on_terminal("stdout", arguments)
    assert err == "" and "reading files" not in shown and "Scales: " in shown


# cyflash completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts_are_in_their_language(shell, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("cyflash", "calibrate", "--max-rel-l1" if shell != "tcsh" else "max-rel-l1"))
    if shutil.which(shell) and shell != "tcsh":
        (tmp_path / "script").write_text(script)
        got = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
        assert got.returncode == 0, got.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("che", "check"),
        ("check --max", "--max-rel-l1 --max-worst-row"),
        ("calibrate x.npz --method o", "output octav"),
        ("completion ", "bash zsh tcsh"),
        ("report sca", "scales.safetensors"),
        ("compare --plot sca", "scales.safetensors"),
    ],
)
def test_bash_completes(line, expected, capsys, tmp_path):
    pytest.importorskip("shtab")
    bash = shutil.which("bash") or pytest.skip("there is no bash here")
    cli.main(["completion", "bash"])
    (tmp_path / "scales.safetensors").touch()
    words = ["cyflash", *line.split(" ")]
    script = capsys.readouterr().out + (
        f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}\n"
        "_shtab_cyflash cyflash; echo ${COMPREPLY[@]}\n"
    )
    got = subprocess.run([bash, "--norc"], input=script, capture_output=True, text=True, cwd=tmp_path)
    assert got.stdout.split() == expected.split(), got.stderr


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'cyflash-attn[completion]'" in capsys.readouterr().err


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
    assert got.pop("gpu") == cyflash.gpu_status()._asdict()
    assert got == json.loads(json.dumps(known))


def test_info_as_json_goes_where_it_is_told(capsys, tmp_path):
    assert cli.main(["info", "--json", "-"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert cli.main(["info", "--json", str(tmp_path / "info.json")]) == 0
    assert "SIMD build" in capsys.readouterr().out
    assert json.loads((tmp_path / "info.json").read_text()) == alone
    assert cli.main(["info", "--json", str(tmp_path / "none" / "info.json")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_info_with_a_gpu(capsys, monkeypatch):
    status = GPUStatus(True, "GPU [/x], compute capability 9.0", "GPU [/x]", "9.0", "14.2.0", "13.0")
    monkeypatch.setattr(cyflash, "gpu_status", lambda: status)
    assert cli.main(["info"]) == 0
    words = "GPU GPU [/x], compute capability 9.0 (CuPy 14.2.0, NVRTC 13.0)"
    assert words in " ".join(capsys.readouterr().out.split())
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu"] == {
        "available": True, "reason": "GPU [/x], compute capability 9.0", "device": "GPU [/x]",
        "compute_capability": "9.0", "cupy": "14.2.0", "nvrtc": "13.0",
    }  # fmt: skip


def test_info_without_cupy(tmp_path):
    """It says what to install, and looks for nothing else."""
    code = "import sys; sys.modules['cupy'] = None; from cyflash.cli import main; sys.exit(main(['info']))"
    got = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert got.returncode == 0 and not got.stderr
    words = " ".join(got.stdout.split())
    assert "GPU not used: CuPy is not installed; install it with: pip install 'cyflash-attn[gpu-cuda13]'" in words


def test_info_with_a_cupy_that_does_not_import(tmp_path):
    (tmp_path / "cupy.py").write_text("raise OSError('no room for a folder')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for more in ([], ["--json"]):
        got = cyflash_command("info", *more, cwd=tmp_path, env=environment)
        assert got.returncode == 0 and "CuPy does not import: no room for a folder" in " ".join(got.stdout.split())


def test_brackets_in_names_are_shown_as_they_are(capsys):
    known = info.found() | {"openmp": "OpenMP 1, /[x]/[/lib]/libgomp.so", "model": "CPU [/dim] 1"}
    info.show(known)
    out = capsys.readouterr().out
    assert "/[x]/[/lib]/libgomp.so" in out and "CPU [/dim] 1" in out


def test_info_without_openmp_and_with_a_build_that_does_not_run(capsys):
    known = info.found()
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
