"""Builds cyflash with other flags, as sanitizers need it, in a folder of its own; the modules in use stay as they are.

The folder holds the whole package: a Python process that has it first in PYTHONPATH imports that one.
"""
import argparse
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU = "cyflash.cpu"

# Lines of the generated C, which name those of the .pyx and .pxi in their comments. Loops need no unrolling here.
FLAGS = ("-g1", "-O1", "-fno-omit-frame-pointer")


def build(name, flags, builds, *, compiler="gcc", link=()):
    """The folder in `build/<name>` with the package in it: of its SIMD builds those asked for.

    What did not change since the last call is not compiled again.
    """
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(folder), "--builds", *builds]
    command += [f"--flag={flag}" for flag in (*FLAGS, *flags)] + [f"--link={flag}" for flag in link]
    environment = os.environ | {"CC": compiler, "LDSHARED": f"{compiler} -shared"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return folder / "lib"


def environment(folder, *path, **more):
    """What a process needs to import the package in `folder`, and the tests beside it."""
    path = [str(folder), str(ROOT / "tests"), *path, os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | more


def runtime(compiler, library):
    """Where a compiler's run-time library is, or None."""
    command = [compiler, f"-print-file-name={library}"]
    path = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def missing(*programs):
    """The names of those programs that are not installed."""
    return [program for program in programs if shutil.which(program) is None]


def why_not():
    """Why modules cannot be compiled here; an empty string when they can."""
    absent = [name for name in ("setuptools", "Cython") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: the extra `test` has them" if absent else ""


# Runs of random_calls.py, before which errors are planted


@contextmanager
def planted(source, *command):
    """A library compiled from C text by `command`, within."""
    with tempfile.TemporaryDirectory() as place:
        text, library = Path(place, "planted.c"), Path(place, "planted.so")
        text.write_text(source)
        subprocess.run([*command, "-shared", "-fPIC", str(text), "-o", str(library)], check=True)
        yield library


def call_planted(name, library, n):
    """A function of such a library."""
    function = getattr(ctypes.CDLL(library), name)
    function.argtypes = [ctypes.c_long]
    function(n)


def options(description, builds):
    """(What was asked for, the options of random_calls.py for it); --control: a planted function, and its library."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", nargs="+", default=builds, help=f"SIMD builds (default: {' '.join(builds)})")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    return asked, ["--builds", *asked.builds, "--seconds", asked.seconds, "--seed", asked.seed]


def _build(folder, builds, flags, link):
    """What setup.py does, on some of its extensions, with more flags."""
    import setuptools  # noqa: F401, I001  before distutils, which is its own then
    from distutils.core import run_setup

    command = ["-q", "build", f"--build-lib={folder}/lib", f"--build-temp={folder}/temp"]
    distribution = run_setup("setup.py", command, stop_after="commandline")
    wanted = {f"{CPU}.{name}" for name in ("detect", "observe", "team", *(f"_{name}" for name in builds))}
    unknown = wanted - {extension.name for extension in distribution.ext_modules}
    if unknown:
        raise SystemExit(f"no such builds: {', '.join(sorted(unknown))}")
    distribution.ext_modules[:] = [extension for extension in distribution.ext_modules if extension.name in wanted]
    for extension in distribution.ext_modules:
        extension.extra_compile_args += flags
        extension.extra_link_args += link
    distribution.run_commands()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--builds", nargs="+", default=())
    parser.add_argument("--flag", action="append", default=[])
    parser.add_argument("--link", action="append", default=[])
    arguments = parser.parse_args()
    _build(arguments.folder, arguments.builds, arguments.flag, arguments.link)
