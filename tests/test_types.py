"""Types: stubs say what is there, the package is clean under mypy, and a user's program has the types documented."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cyflash import cpu

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[1]
STUBS = [path.relative_to(ROOT) for top in ("cyflash", "quant") for path in (ROOT / top).rglob("*.pyi")]
# What stubtest finds and is right to be so: left over by Cython and dataclasses; aliases that it takes for unions.
ALLOWED = r"""
.*\.__test__
.*\.__post_init__
cyflash\.annotations\..*
cyflash\.__main__
"""


AS_USER = ("--strict", "--follow-imports=silent")  # mypy reports nothing about installed packages


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The package as a wheel lays it out, for mypy to find."""
    tree = tmp_path_factory.mktemp("types")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "cyflash", tree / "cyflash", ignore=ignore)
    shutil.copytree(ROOT / "quant", tree / "cyflash" / "quant", ignore=ignore)
    absent = [rf"cyflash\.cpu\._{name}" for name in cpu.BUILDS if name not in cpu.runnable()]  # have a stub, no module
    (tree / "allowed").write_text("\n".join([ALLOWED, *absent, ""]))
    return tree


def run(tree, module, *arguments):
    environment = os.environ | {"MYPYPATH": str(tree), "MYPY_CACHE_DIR": str(tree / "cache")}
    command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=tree, env=environment, **streams)


def mypy(tree, *arguments):
    return run(tree, "mypy", "--config-file", ROOT / "pyproject.toml", *arguments)


def stubtest(tree, *modules):
    options = ["--mypy-config-file", ROOT / "pyproject.toml", "--allowlist", tree / "allowed"]
    got = run(tree, "mypy.stubtest", *options, "--ignore-unused-allowlist", "--concise", *modules)
    assert "not checking stubs" not in got.stdout, got.stdout
    return [line for line in got.stdout.splitlines() if line.startswith("cyflash")]


def test_a_users_program(tree):
    got = mypy(tree, *AS_USER, ROOT / "tests" / "data" / "typed_user.py")
    assert got.returncode == 0, got.stdout


def test_a_users_program_is_looked_at(tree):
    """Without its `type: ignore` each mistake is found."""
    text = (ROOT / "tests" / "data" / "typed_user.py").read_text()
    (tree / "mistakes.py").write_text(re.sub(r"  # type: ignore.*", "  # mistake", text))
    got = mypy(tree, *AS_USER, "mistakes.py")
    found = {int(n) for n in re.findall(r"^mistakes\.py:(\d+): error", got.stdout, re.M)}
    lines = (tree / "mistakes.py").read_text().splitlines()
    assert found == {n for n, line in enumerate(lines, 1) if line.endswith("# mistake")} and len(found) == 7


def compiled():
    builds = (f"_{name}" for name in cpu.runnable())
    return [f"cyflash.cpu.{name}" for name in ("detect", "team", "observe", *builds)]


def test_stubs_of_compiled_modules(tree):
    assert stubtest(tree, *compiled()) == []


def test_a_stub_that_is_wrong_is_found(tree, tmp_path):
    wrong = shutil.copytree(tree, tmp_path / "wrong", ignore=shutil.ignore_patterns("cache"))
    path = wrong / "cyflash/cpu/detect.pyi"
    path.write_text(path.read_text().replace("subleaf", "leaflet") + "def more() -> None: ...\n")
    assert {line.split()[0] for line in stubtest(wrong, "cyflash.cpu.detect")} == {
        "cyflash.cpu.detect.read_cpuid", "cyflash.cpu.detect.more",
    }  # fmt: skip


def test_every_compiled_module_has_a_stub():
    sources = [path.relative_to(ROOT) for path in (ROOT / "cyflash").rglob("*.pyx")]
    assert sources and {path.with_suffix(".pyi") for path in sources} <= set(STUBS)


@pytest.mark.slow
def test_stubs_of_the_public_names(tree):
    """Of modules with a stub: others are their own."""
    stubbed = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in STUBS}
    stubbed = {re.sub("^quant", "cyflash.quant", name) for name in stubbed}
    modules = [".".join(path.relative_to(tree).with_suffix("").parts) for path in (tree / "cyflash").rglob("*.py")]
    modules = sorted({name.removesuffix(".__init__") for name in modules} | stubbed, key=len, reverse=True)
    lines = stubtest(tree, "cyflash")
    of = {line: next(name for name in modules if f"{line.split()[0]}.".startswith(f"{name}.")) for line in lines}
    assert [line for line, module in of.items() if module in stubbed] == []


@pytest.mark.slow
def test_mypy_on_the_package(tree):
    got = mypy(tree, "-p", "cyflash")
    assert got.returncode == 0, got.stdout
    assert int(re.search(r"no issues found in (\d+) source files", got.stdout)[1]) > 80
