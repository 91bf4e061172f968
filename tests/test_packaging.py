"""What is shipped and what an import brings in: package contents, versions, documents that must agree with the code."""

import doctest
import importlib
import importlib.metadata
import inspect
import operator
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

import cyflash
from cyflash.schemes import INT8_OPTIONS, SCHEMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LATE = {"scipy", "rich", "matplotlib", "safetensors", "torch", "cupy", "onnxruntime", "openvino", "dask"}


def modules_after(statement):
    """Top-level names in sys.modules of a fresh interpreter that ran the statement."""
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


# --- Imports ----------------------------------------------------------------------------------------------------------


def test_importing_cyflash_is_light():
    assert not modules_after("import cyflash") & LATE


def test_a_call_imports_nothing_heavy():
    call = "import cyflash, numpy; x = numpy.ones((4, 8), 'f'); cyflash.flash_attention(x, x, x)"
    assert not modules_after(call) & LATE


@pytest.mark.parametrize("module", ["cyflash", "cyflash.quant", "cyflash.cli"])
def test_quant_is_imported_as_a_part_of_cyflash_only(module):
    assert "quant" not in modules_after(f"import {module}")


def test_the_core_does_not_import_quant():
    code = "import cyflash, sys; sys.exit('cyflash.quant' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- Metadata ---------------------------------------------------------------------------------------------------------


def test_one_version_everywhere():
    version = PYPROJECT["project"]["version"]
    assert importlib.metadata.version("cyflash-attn") == version
    assert cyflash.__version__ == version


def test_no_numpy_at_build_time():
    sources = [path for pattern in ("*.pyx", "*.pxi", "*.pxd") for path in (ROOT / "cyflash").rglob(pattern)]
    assert sources
    for path in sources:
        assert not re.search(r"cimport\s+numpy|numpy/arrayobject", path.read_text()), path
    assert not any("numpy" in requirement for requirement in PYPROJECT["build-system"]["requires"])


# --- Documents --------------------------------------------------------------------------------------------------------


def commands(text):
    """Lines that make a virtual environment, wherever it is."""
    return [re.sub(r'"\$venv"|\.venv', "VENV", line) for line in re.findall("^python3 -m venv.*", text, re.M)]


def test_the_readme_has_two_commands_and_ci_runs_the_second():
    main, tests = commands(README)
    assert main.endswith("VENV/bin/cyflash compare")
    assert commands((ROOT / ".ci" / "run").read_text()) == [f"{tests} </dev/null"]


def test_options_of_the_readme_are_those_of_flash_attention():
    table = README.partition("## Options")[2].partition("\n## ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \|.*\| `([^|`]*)` \|$", table, re.M))
    parameters = inspect.signature(cyflash.flash_attention).parameters
    options = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert list(documented) == list(options)
    assert documented == {name: repr(default).replace("'", '"') for name, default in options.items()}


def test_names_of_the_documents_exist():
    table = (ROOT / "docs/coming-from.md").read_text().partition("## The Rust engines")[2]
    ours = " ".join(row for row in re.findall(r"^\|.*\|(.*)\|$", table, re.M) if "planned" not in row)
    names = set(re.findall(r"`((?:Flash|flash_)\w+(?:\.\w+)?)", ours)) | set(re.findall(r"\bcyflash\.(\w+)\(", README))
    assert {"FlashAttentionConfig.for_head_dim", "flash_attention", "set_implementation"} <= names
    for name in sorted(names):
        operator.attrgetter(name)(cyflash)


def test_the_map_of_the_sources_is_true():
    map_ = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2]
    paths = re.findall(r"^([\w/.]+) {2,}\w", map_, re.M)
    assert "cyflash/attention.py" in paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_quick_start_of_the_readme_runs(capsys):
    section = README.partition("## Quick start")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == names["exact"].shape == (2, 8, 1024, 64)
    assert "reduction" in capsys.readouterr().out


def test_the_part_of_the_readme_about_other_arrays_runs():
    torch = pytest.importorskip("torch")
    section = README.partition("## torch, JAX and other arrays")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2
    names = {}
    exec(blocks[0], names)
    assert names["out"].dtype == torch.bfloat16
    exec(blocks[1], names)
    assert names["out"].shape == (2, 100, 64)


def test_the_int8_part_of_the_readme_runs(capsys):
    quick_start, int8 = (README.partition(f"## {name}")[2].partition("\n## ")[0] for name in ("Quick start", "int8"))
    names = {}
    exec(re.findall(r"```python\n(.*?)```", quick_start, re.S)[0], names)
    (block,) = re.findall(r"```python\n(.*?)```", int8, re.S)
    exec(block, names)
    assert names["out"].shape == (2, 8, 1024, 64)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and said[1].startswith("int8 tensor 0.0")


def test_options_and_schemes_of_int8_are_documented():
    text = (ROOT / "docs/int8-settings.md").read_text()
    options = text.partition("\n## Options\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)`(?:, `(\w+)`, `(\w+)`)? \|", options, re.M)
    assert {name for names in documented for name in names if name} == set(INT8_OPTIONS)
    schemes = re.findall(r"^\| `(int8 [\w, ]+)`", text, re.M)
    assert schemes == [name for name in SCHEMES if "int8" in name]


def test_the_calibration_part_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README.partition("## Calibration")[2].partition("\n## ")[0], re.S)
    arrays = np.random.default_rng(0).standard_normal((4, 3, 2, 64, 32), dtype=np.float32)
    exec(block, {"cyflash": cyflash, "recorded": [("layer0", *qkv) for qkv in arrays]})
    assert "rel_l1" in capsys.readouterr().out
    assert Path("scales.safetensors").is_file()


def test_the_serving_part_of_the_readme_runs():
    quick_start, serving = (
        README.partition(f"\n## {name}\n")[2].partition("\n## ")[0] for name in ("Quick start", "Serving")
    )
    names = {}
    exec(re.findall(r"```python\n(.*?)```", quick_start, re.S)[0], names)
    (block,) = re.findall(r"```python\n(.*?)```", serving, re.S)
    exec(block, names)
    assert names["cache"].dtype == np.int8 and names["cache"].lengths.tolist() == [1025, 701]
    assert names["out"].shape == (2, 8, 1, 64)


def test_the_document_on_serving_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = (ROOT / "docs/serving.md").read_text().partition("\n## Measured\n")[0], {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    assert cyflash.KVCache.load("cache.safetensors").lengths.tolist() == [1020, 700]
    assert names["cache"].dtype == np.int8 and names["cache"].window == (1023, 0)
    assert names["pages"].lengths.tolist() == [1024, 1024] and names["pages"].free_pages == 1024 - 1024 // 64
    q, k, v = (names[name] for name in "qkv")
    assert np.allclose(names["lse"], cyflash.flash_attention(q, k, v, return_lse=True)[1], atol=1e-5)
    exact = cyflash.flash_attention(q, k, v, causal=True).swapaxes(1, 2)
    assert names["out"].dtype == np.float16 and np.allclose(names["out"], exact, atol=1e-2)


def modules_with_examples():
    """Their names, with quant/ as it is installed."""
    for path in sorted([*(ROOT / "cyflash").rglob("*.py"), *(ROOT / "quant").rglob("*.py")]):
        if ">>> " in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(("cyflash", *parts) if parts[0] == "quant" else parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_of_docstrings_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "cyflash-attn[" not in str(error):
            raise
        pytest.skip(str(error))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_every_public_name_has_an_example_or_says_what_it_holds():
    for name in cyflash.__all__:
        thing = getattr(cyflash, name)
        if not inspect.ismodule(thing):
            assert re.search(r"\n(Examples|Attributes)\n-", inspect.getdoc(thing)), name


# --- Builds -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, and a virtual environment with what pyproject.toml asks of a build."""
    folder = tmp_path_factory.mktemp("build")
    unwanted = (".git", ".venv*", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*unwanted))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    run(folder / "venv/bin/pip", "install", "--quiet", *PYPROJECT["build-system"]["requires"])
    return tree


@pytest.fixture(scope="module")
def wheel(tree):
    return build(tree, "wheel")


@pytest.fixture(scope="module")
def sdist(tree, wheel):
    """Made after the wheel: the tree then holds generated files that must not get in."""
    assert list(tree.rglob("*.c"))
    return build(tree, "sdist")


def run(*command, cwd=None):
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(tree, kind):
    hook = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    return tree / "dist" / run(tree.parent / "venv/bin/python", "-c", hook, cwd=tree).split()[-1]


@pytest.mark.slow
def test_sdist_holds_the_sources_and_nothing_generated(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    suffixes = {".py", ".pyi", ".pyx", ".pxi", ".h", ".cu", ".cuh", ".cpp", ".typed", ".html", ".css"}
    tops = ("cyflash", "quant", "tests")
    sources = [path for top in tops for path in (ROOT / top).rglob("*") if path.suffix in suffixes]
    assert len(sources) > 20
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml", "MANIFEST.in", "examples/quickstart.py"} <= names
    assert {f"examples/data/{path.name}" for path in (ROOT / "examples/data").iterdir()} <= names
    assert not [name for name in names if name.endswith((".c", ".so", ".pyc")) or name.startswith(("build", "dist"))]


@pytest.mark.slow
def test_wheel_holds_the_package_and_no_sources_of_kernels(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"cyflash", f"cyflash_attn-{cyflash.__version__}.dist-info"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cyflash").rglob("*.py")}
    modules |= {f"cyflash/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "quant").rglob("*.py")}
    assert "cyflash/quant/__init__.py" in modules
    data = {"cyflash/py.typed", "cyflash/report_page.html", "cyflash/page.css", "cyflash/bench/page.html"}
    stubs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cyflash").rglob("*.pyi")}
    assert modules | data | stubs | {"cyflash/quant/__init__.pyi"} <= set(names)
    assert [name for name in names if name.startswith("cyflash/cpu/_baseline") and name.endswith(".so")]
    compiled_later = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cyflash/gpu").iterdir()
                      if path.suffix in (".cu", ".cuh", ".h")}
    assert "cyflash/gpu/params.h" in compiled_later and compiled_later <= set(names)
    assert not [name for name in set(names) - compiled_later if name.endswith((".c", ".h", ".pyx", ".pxi"))]


@pytest.mark.slow
def test_wheel_is_small_and_for_all_later_pythons(wheel):
    assert wheel.stat().st_size < 3e6
    assert re.search(r"-cp311-abi3-\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        compiled = [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
    assert len(compiled) > 2 and all(name.endswith((".abi3.so", ".pyd")) for name in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_the_wheel_runs_on(version, wheel, tmp_path):
    """The same file on every Python that is here, from a directory that holds nothing of the project."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", "import venv"], capture_output=True).returncode:
        pytest.skip(f"there is no Python {version} here")
    run(python, "-m", "venv", tmp_path / "venv")
    run(tmp_path / "venv/bin/pip", "install", "--quiet", wheel)
    call = "x = numpy.ones((5, 8), 'f'); print(cyflash.flash_attention(x, x, x).sum())"
    code = f"import cyflash, cyflash.quant, numpy; {call}"
    assert run(tmp_path / "venv/bin/python", "-c", code, cwd=tmp_path).split() == ["40.0"]
    assert "cyflash info" in run(tmp_path / "venv/bin/cyflash", "info", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_an_inplace_build_removes_modules_of_other_names(tree, wheel):
    """Python takes detect.cpython-311-....so before detect.abi3.so."""
    own = tree / "cyflash/cpu"
    stale = own / "detect.cpython-311-x86_64-linux-gnu.so"
    stale.touch()
    run(tree.parent / "venv/bin/python", "setup.py", "-q", "build_ext", "--inplace", cwd=tree)
    assert not stale.exists() and list(own.glob("detect.*.so"))


@pytest.mark.slow
def test_the_sdist_installs_and_runs_anywhere(tree, sdist, tmp_path):
    """sdist -> wheel -> installed, and run from a directory that holds nothing of the project."""
    run(tree.parent / "venv/bin/pip", "install", "--quiet", sdist)
    call = "x = numpy.ones((5, 8), 'f'); print(cyflash.flash_attention(x, x, x).sum())"
    code = f"import cyflash, cyflash.quant, numpy; {call}"
    assert run(tree.parent / "venv/bin/python", "-c", code, cwd=tmp_path).split() == ["40.0"]
    assert cyflash.__version__ in run(tree.parent / "venv/bin/cyflash", "info", cwd=tmp_path)
