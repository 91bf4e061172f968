"""The table of SIMD builds: every name below becomes one compiled module `cyflash.cpu._<name>` of the same algorithm.

A build is chosen at run time (cyflash/cpu/__init__.py); flags here decide only what a compiled module may contain.
"""
import glob
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What is built for, which need not be what builds: cross compilers set _PYTHON_HOST_PLATFORM, which Python heeds here.
TARGET = sysconfig.get_platform().rpartition("-")[2].lower()
if TARGET == "universal2":
    TARGET = platform.machine()

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
SIMD_BUILDS = {"baseline": []}
if TARGET in ("x86_64", "amd64"):
    SIMD_BUILDS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avxvnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
        "avx512": AVX512,
        "avx512_vnni": [*AVX512, "-mavx512vnni"],
        "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    }
elif TARGET in ("aarch64", "arm64"):
    SIMD_BUILDS |= {"neon": ["-march=armv8.2-a+dotprod"]}

# -O3: distributions build Python, and so extensions, at -O2, where the tiles are not unrolled (a third of the speed).
# -ffp-contract=off: one order of roundings whatever the tile width; the kernels ask for fma where they want it.
# -fno-fast-math: whatever CFLAGS say. It would lose NaN and masks, and linked with it a module makes the whole process
# flush denormals: LINK_FLAGS take back every flag that GCC does that for.
FLAGS = ["-O3", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-g0"]
LINK_FLAGS = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations"]
# Where the compiler knows them: without these GCC 12 spills two operands of the 8 x 3 tile (181 instead of 231 GFLOP/s
# at D = 64) and moves registers about in its inner loop. For AArch64 it would put the loads of a tile's step first, and
# then spill accumulators; for x86 it does not by itself.
GCC_FLAGS = ["-fno-ivopts", "-fira-region=all", "-fno-schedule-insns"]
# Tiles are templates: their bounds become constants only when Cython's inline functions really are inlined.
MACROS = [("CYTHON_INLINE", "inline __attribute__((always_inline))")]
# One file for Python 3.11, the first that has buffers in the limited API, and all later ones: calls take as long as
# without, and modules are a tenth smaller. Free-threaded builds of Python have no limited API yet.
LIMITED = platform.python_implementation() == "CPython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
LIMITED_API = [("Py_LIMITED_API", "0x030B0000")] if LIMITED else []
CPU = "cyflash/cpu"
SHARED = [*glob.glob(f"{CPU}/*.pxi"), *glob.glob(f"{CPU}/simd/*.h")]


def simd_extension(name, flags):
    return Extension(
        f"cyflash.cpu._{name}",
        [f"{CPU}/_{name}.pyx"],
        include_dirs=[f"{CPU}/simd"],
        define_macros=[*LIMITED_API, *MACROS, ("CYFLASH_SIMD", f'"{name}.h"')],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=LINK_FLAGS.copy(),
        depends=SHARED,
        py_limited_api=LIMITED,
    )


class BuildExt(build_ext):
    """Adds OpenMP and leaves out SIMD builds as the compiler allows, and says what to install when there is none."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        if not self._compiles():
            sys.exit(
                "cyflash: no working C compiler was found. Install one and try again: on Debian or Ubuntu `apt install "
                "gcc python3-dev`, on Fedora `dnf install gcc python3-devel`, on macOS `xcode-select --install`."
            )
        for name, flags in SIMD_BUILDS.items():
            if not self._compiles(*flags):
                print(f"cyflash: this compiler does not know {' '.join(flags)}: building without {name}")
                self.extensions = [one for one in self.extensions if one.name != f"cyflash.cpu._{name}"]
        for flag in filter(self._compiles, GCC_FLAGS):
            for extension in self.extensions:
                extension.extra_compile_args.append(flag)
        if os.environ.get("CYFLASH_OPENMP", "1") != "0" and self._compiles("-fopenmp"):
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        else:
            print("cyflash: building without OpenMP: calls will run on one thread (`cyflash info` says so)")
        super().build_extensions()

    def copy_extensions_to_source(self):
        """Also removes modules of earlier builds under other names, which Python would take first."""
        for extension in self.extensions:
            path = Path(self.get_ext_fullpath(extension.name))
            for other in path.parent.glob(f"{extension.name.rpartition('.')[2]}.*"):
                if other.suffix in (".so", ".pyd") and other.name != path.name:
                    other.unlink()
        super().copy_extensions_to_source()

    def _compiles(self, *flags):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w") as file:
                file.write("#include <Python.h>\nint main(void) { return 0; }\n")
            includes = [f"-I{path}" for path in self.include_dirs]
            output = os.path.join(folder, "probe.o")
            command = [*self.compiler.compiler_so, *includes, *flags, source, "-c", "-o", output]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False


# What every CPU runs: finding out what this one is, threads and forks, and the integers of calibration.
plain = [
    Extension(
        f"cyflash.cpu.{name}",
        [f"{CPU}/{name}.pyx"],
        include_dirs=[CPU, f"{CPU}/simd"],
        define_macros=[*LIMITED_API, ("CYFLASH_SIMD", '"baseline.h"')],
        extra_compile_args=FLAGS.copy(),
        extra_link_args=LINK_FLAGS.copy(),
        libraries=["dl"] if sys.platform == "linux" else [],  # fork.h asks which OpenMP it has
        depends=[*SHARED, *glob.glob(f"{CPU}/*.h")],
        py_limited_api=LIMITED,
    )
    for name in ("detect", "team", "observe")
]

setup(
    packages=[
        "cyflash", "cyflash.bench", "cyflash.compat", "cyflash.compat.transformers", "cyflash.cpu", "cyflash.gpu",
        "cyflash.quant",
    ],
    package_dir={"cyflash": "cyflash", "cyflash.quant": "quant"},
    package_data={
        "cyflash": ["py.typed", "*.pyi", "*.html", "*.css"],
        "cyflash.cpu": ["*.pyi"],
        "cyflash.quant": ["*.pyi"],
        "cyflash.bench": ["*.html"],
        "cyflash.gpu": ["*.cu", "*.cuh", "*.h"],
    },
    ext_modules=cythonize(
        [*plain, *(simd_extension(name, flags) for name, flags in SIMD_BUILDS.items())],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
            "freethreading_compatible": True,  # what calls share is atomic, or Python's own and locked by it
        },
        build_dir="build/cython",
    ),
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
    cmdclass={"build_ext": BuildExt},
)
