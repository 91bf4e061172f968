"""Copies of the tree to plant faults in: the fault put in, the module that it needs compiled, and tests run there."""
import compileall
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from tests.planted.fault import ROOT

# What a fault of the CPU path is not looked for in
ELSEWHERE = re.compile(
    r"test_(gpu.*|compat_dask|transformers.*|packaging|docs|bench.*|make_api|types|planted|examples|generate|"
    r"accuracy_tables)"
)
SUFFIX = ".abi3.so"
SECONDS = 1200  # a run of tests that takes longer hangs, or was stopped and continued

README = """
import re, sys, numpy as np, cyflash
from cyflash.reference import attention
block = re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL).group(1)
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 2, 256, 64), dtype=np.float32) for _ in range(3))
exact, errors = attention(q, k, v, causal=True), []
for line in block.splitlines():
    exec(line)
    errors.append(float(np.abs(out - exact).max()))
sys.exit(not (len(errors) == 2 and errors[0] < 1e-5 and errors[1] < 0.05))
"""


class Outcome(NamedTuple):
    """Of a run of tests."""

    passed: bool
    failed: list  # tests that failed, the first one first; or how the run ended otherwise
    tail: str  # the end of what it printed


class Workshop:
    """A folder with an unfaulted copy of the tracked files, whose copies are faulted.

    Compiled modules are those of the checkout. C that Cython wrote is kept by build, for faults of headers alone.
    """

    def __init__(self, folder):
        self.folder, self.base = Path(folder), Path(folder) / "base"
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
        for name in filter(None, files.split("\0")):
            target = self.base / name
            if (ROOT / name).is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        for module in (ROOT / "cyflash/cpu").glob(f"*{SUFFIX}"):
            shutil.copy(module, self.base / "cyflash/cpu")
        (self.base / "cyflash/quant").symlink_to("../quant")
        compileall.compile_dir(self.base / "cyflash", quiet=2)

    def copy(self, name, build=None):
        """A copy of the tree; build: the only SIMD build that it is to have."""
        tree = self.folder / name
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(self.base, tree, symlinks=True)
        if build is not None:
            for module in (tree / "cyflash/cpu").glob(f"_*{SUFFIX}"):
                if module.name != f"_{build}{SUFFIX}":
                    module.unlink()
        return tree

    def compile(self, tree, build, headers_alone):
        """Compile one build of a tree again, as setup.py would; CalledProcessError where that fails."""
        kept = self.folder / f"_{build}.c"
        source = kept if headers_alone else tree / f"_{build}.c"
        if not source.exists():
            directives = ("boundscheck=False", "wraparound=False", "cdivision=True", "initializedcheck=False")
            options = [word for one in (*directives, "embedsignature=True") for word in ("-X", one)]
            module = ["--module-name", f"cyflash.cpu._{build}", f"cyflash/cpu/_{build}.pyx", "-o", str(source)]
            _run([sys.executable, "-m", "cython", "-3", *options, *module], self.base if headers_alone else tree)
        setup = _settings_of_setup()
        macros = [f"-D{name}={value}" for name, value in (*setup["LIMITED_API"], *setup["MACROS"])]
        flags = [*setup["FLAGS"], *setup["SIMD_BUILDS"][build], *setup["GCC_FLAGS"], "-fopenmp"]
        compiler = sysconfig.get_config_var("CC").split()
        _run(
            [*compiler, "-shared", "-fPIC", "-fwrapv", "-DNDEBUG", "-w", *macros, f'-DCYFLASH_SIMD="{build}.h"',
             f"-I{sysconfig.get_path('include')}", "-Icyflash/cpu/simd", *flags, str(source),
             "-o", f"cyflash/cpu/_{build}{SUFFIX}"],
            tree,
        )  # fmt: skip

    def readme(self, tree, build=None):
        """Whether README's first example is computed right."""
        return _python(["-c", README], tree, build).returncode == 0

    def test(self, tree, tests, build=None, stop=True):
        """The `Outcome` of these files of tests, or single tests."""
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "-rfE", "--timeout=0"]
        done = _python([*command, *(["-x"] if stop else []), *tests], tree, build)
        text = done.stdout
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        if done.returncode < 0:
            at = re.findall(r'File ".*?(tests/test_\w+\.py)", line \d+ in (test_\w+)', text + done.stderr)
            failed = [f"{'::'.join(at[0]) if at else 'tests'} (signal {-done.returncode})"]
        elif done.returncode == 124:
            failed = ["it did not end"]
        elif done.returncode not in (0, 1):
            failed = failed or [f"pytest ended with {done.returncode}"]
        return Outcome(done.returncode == 0, failed, text[-3000:] + done.stderr[-2000:])

    def others(self, names):
        """All files of tests but these, and those that are about something else."""
        found = sorted(path.stem for path in (self.base / "tests").glob("test_*.py"))
        return files_of(one[5:] for one in found if not ELSEWHERE.fullmatch(one) and one[5:] not in names)


def files_of(names):
    """Where the tests of these names are."""
    return [f"tests/test_{name}.py" for name in names]


def _settings_of_setup():
    """The tables of setup.py, without its call of setup()."""
    text = (ROOT / "setup.py").read_text().partition("CPU = ")[0]
    found = {}
    exec(compile(text, "setup.py", "exec"), found)
    return found


def _run(command, folder):
    subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True)


def _python(arguments, tree, build):
    """A finished run of Python in a tree, whose packages come first."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("CYFLASH_")}
    environment["PYTHONPATH"] = str(tree)
    if build is not None:
        environment["CYFLASH_ISA"] = build
    command = [sys.executable, *arguments]
    options = {"cwd": tree, "env": environment, "capture_output": True, "text": True, "timeout": SECONDS}
    try:
        return subprocess.run(command, **options)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""  # bytes, whatever was asked for
        return subprocess.CompletedProcess(command, 124, printed.decode(errors="replace"), "")
