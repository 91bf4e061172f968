"""The figures of RELIABILITY.md have the commands that make them, and a part that fails is not overlooked."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests.reliability, which is run from the root

from tests import reliability  # noqa: E402

DOCUMENT = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`python -m tests\.(\w+)([^`]*)`", DOCUMENT)


def test_every_part_has_a_figure():
    assert not re.search("@[A-Z0-9]+@", DOCUMENT)
    assert set(reliability.PARTS) <= {name for name, _ in COMMANDS}


@pytest.mark.parametrize("name", sorted({name for name, _ in COMMANDS}))
def test_options_of_the_commands_exist(name):
    """Those of the document, and those of both tiers."""
    done = subprocess.run([sys.executable, "-m", f"tests.{name}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tiers = [*reliability.PARTS[name]] if name in reliability.PARTS else []
    for arguments in (*(arguments for one, arguments in COMMANDS if one == name), *tiers):
        for option in re.findall(r"--\w[\w-]*", arguments or ""):
            assert option in done.stdout, f"tests.{name} has no {option}"


@pytest.mark.parametrize(("status", "last", "outcome"), [
    (0, "0 failures", "passed"), (1, "1 failures", "FAILED"), (1, "cannot run: clang is not installed", "not run"),
    (0, "cannot run: is only said", "passed"), (-11, "", "FAILED"),
])  # fmt: skip
def test_outcomes(monkeypatch, status, last, outcome):
    done = subprocess.CompletedProcess([], status, f"first\n\n{last}\n")
    monkeypatch.setattr(reliability.subprocess, "run", lambda *_, **__: done)
    assert reliability.run("fuzz", "--seed 1").outcome == outcome


def test_a_part_that_hangs_has_failed(monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout, b"seed 7\n")

    monkeypatch.setattr(reliability.subprocess, "run", hang)
    outcome = reliability.run("fuzz", "--seed 1")
    assert outcome.outcome == "FAILED" and outcome.lines == ["seed 7", "hangs: not done in 900 s"]


@pytest.mark.parametrize(("outcome", "status"), [("passed", 0), ("not run", 0), ("FAILED", 1)])
def test_status(monkeypatch, capsys, tmp_path, outcome, status):
    ran = []

    def run(name, arguments, long):
        assert not long
        ran.append(name)
        said = outcome if name == "races" else "passed"
        return reliability.Outcome(f"python -m tests.{name}", said, 1, ["it said so"])

    monkeypatch.setattr(reliability, "run", run)
    monkeypatch.setattr(sys, "argv", ["reliability", "--json", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit) as ended:
        reliability.main()
    assert ended.value.code == status
    assert ran == [name for name, part in reliability.PARTS.items() if part.fast is not None]
    assert "it said so" in capsys.readouterr().out and "races" in (tmp_path / "x.json").read_text()
