"""What Python on AArch64 takes, in one folder: Debian's packages of it, wheels, and cyflash cross-compiled.

Nothing of it is installed into this machine. The folder is build/aarch64, or what CYFLASH_AARCH64 names.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = Path(os.environ.get("CYFLASH_AARCH64") or REPOSITORY / "build" / "aarch64").absolute()
PREPARE = "python -m tests.emulated --prepare"
COMPILER = "aarch64-linux-gnu-gcc"
PACKAGES = ("python3", "libpython3-dev", "libgomp1", "libstdc++6")
WHEELS = ("numpy", "scipy", "rich", "safetensors", "threadpoolctl", "pytest>=8", "pytest-timeout>=2.3", "hypothesis",
          "ml_dtypes")
TOOLS = {
    "apt-get": "apt, of Debian or Ubuntu", "dpkg": "dpkg, of Debian or Ubuntu", "qemu-aarch64": "qemu-user",
    COMPILER: "gcc-aarch64-linux-gnu, with libc6-dev-arm64-cross and libgomp1-arm64-cross",
}


def python():
    """The interpreter, a binary of AArch64."""
    found = sorted((ROOT / "usr" / "bin").glob("python3.*[0-9]"))
    return found[0] if found else None


def version():
    return python().name.removeprefix("python")


def modules():
    """cyflash's compiled modules."""
    return sorted((ROOT / "lib-cyflash" / "cyflash" / "cpu").glob("*.abi3.so"))


def why_not():
    """Why there is no such Python here; an empty string where there is one, with cyflash."""
    if python() is None or not modules():
        return f"no Python for AArch64 in {ROOT}: `{PREPARE}` puts one there"
    return ""


def environment():
    """What that Python finds its libraries and packages by."""
    return {"PYTHONHOME": str(ROOT / "usr"), "PYTHONPATH": f"{ROOT / 'lib-cyflash'}:{ROOT / 'site'}"}


def prepare():
    """Downloads what is not there yet, and compiles what has changed."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        sys.exit(f"python -m tests.emulated: please install {'; '.join(missing)}")
    if python() is None:
        _unpack_packages()
    if not (ROOT / "site" / "numpy").is_dir():
        _install_wheels()
    _compile()
    _write_bytecode()


def _run(*command, **options):
    try:
        subprocess.run([*map(str, command)], check=True, **options)
    except subprocess.CalledProcessError as error:
        sys.exit(f"python -m tests.emulated: `{' '.join(map(str, command))}` failed ({error.returncode})")


def _unpack_packages():
    """Those of the distribution that this machine runs, by an apt that knows of nothing installed here."""
    apt = ROOT / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "conf").write_text(
        f'APT::Architecture "arm64";\nAPT::Architectures {{ "arm64"; }};\nAPT::Sandbox::User "";\n'
        f'Dir::State "{apt}/state";\nDir::State::status "{apt}/status";\nDir::Cache "{apt}/cache";\n'
    )
    settings = {**os.environ, "APT_CONFIG": str(apt / "conf")}
    _run("apt-get", "-q", "update", env=settings)
    _run("apt-get", "-q", "install", "-y", "--download-only", "--no-install-recommends", *PACKAGES, env=settings)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run("dpkg", "-x", package, ROOT)
    if python() is None:
        sys.exit(f"python -m tests.emulated: the packages {', '.join(PACKAGES)} brought no Python")


def _install_wheels():
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 40)]
    _run(
        sys.executable, "-m", "pip", "install", "-q", "--target", ROOT / "site", *platforms,
        f"--python-version={version()}", "--implementation=cp", "--only-binary=:all:", *WHEELS,
    )


def _compile():
    """cyflash by its own setup.py, for another machine than the one that it runs on."""
    include = ROOT / "usr" / "include"
    settings = {
        "_PYTHON_HOST_PLATFORM": "linux-aarch64", "CC": COMPILER, "LDSHARED": f"{COMPILER} -shared",
        "CFLAGS": f"-w -I{include}/python{version()} -idirafter {include}",
    }
    _run(
        sys.executable, "setup.py", "-q", "build", "--build-lib", ROOT / "lib-cyflash", "--build-temp", ROOT / "temp",
        cwd=REPOSITORY, env=os.environ | settings,
    )


def _write_bytecode():
    """Which neither Debian's packages nor setup.py bring: each start of Python would take seconds more."""
    command, settings = [sys.executable], os.environ
    if version() != f"{sys.version_info.major}.{sys.version_info.minor}":  # whose bytecode is another one
        command, settings = ["qemu-aarch64", "-L", ROOT, python()], os.environ | environment()
    folders = (ROOT / "usr" / "lib" / f"python{version()}", ROOT / "site", ROOT / "lib-cyflash")
    _run(*command, "-m", "compileall", "-q", "-x", "/(test|tests|idlelib|lib2to3)/", *folders, env=settings)
