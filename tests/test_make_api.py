"""docs/make_api.py: every public name is in the reference, with its signature, and its links lead somewhere."""

import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import links_of, sections_of

import cyflash.compat

SCRIPT = Path(__file__).parents[1] / "docs" / "make_api.py"
OF_LIBRARIES = ("flash_attn", "torch", "transformers", "dask")  # users of cyflash.compat import these
MODULES = ("cyflash", "cyflash.quant", *(f"cyflash.compat.{name}" for name in OF_LIBRARIES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pages, made by a Python that finds no package at all."""
    folder = tmp_path_factory.mktemp("api")
    said = subprocess.run([sys.executable, "-I", "-S", SCRIPT, folder], capture_output=True, text=True, check=True)
    assert said.stdout.endswith("pages\n")
    return folder


@pytest.fixture(scope="module")
def api():
    return runpy.run_path(str(SCRIPT))


def test_modules_of_other_libraries_are_all_there():
    modules = {module.name for module in pkgutil.iter_modules(cyflash.compat.__path__)}
    helpers = {"dask_cluster", "flash_attn_cache", "flash_attn_checks", "torch_functional"}
    assert modules - helpers == set(OF_LIBRARIES)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_there(name, folder):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    text = (folder / f"{name}.md").read_text()
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.ismodule(thing):
            assert f"({thing.__name__}.md)" in text and (folder / f"{thing.__name__}.md").is_file()
            continue
        section = re.search(rf"^## {public}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
        if not callable(thing) or (inspect.isclass(thing) and issubclass(thing, Exception)):
            continue
        shown = re.search(r"```python\n(.*?)```", section, re.S)[1]
        for parameter in inspect.signature(thing).parameters:
            assert re.search(rf"\b{parameter}\b", shown), (public, parameter)
        methods = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else ()
        for method, function in methods:
            if method[0] != "_" and function.__doc__ and function.__module__.startswith("cyflash."):
                assert f"\n### {public}.{method}\n" in section


def test_links_lead_somewhere(folder):
    links = [(path, *link.partition("#")[::2]) for path in folder.iterdir() for link in links_of(path)]
    assert len(links) > 50
    for path, file, section in links:
        target = folder / file
        assert target.is_file() and (not section or section in sections_of(target)), (path.name, file, section)


def test_docstrings_become_markdown(folder):
    text = (folder / "cyflash.md").read_text()
    assert "\n    flash_attention(q, k, v, ...)" in text  # the diagram stays one
    assert "- `dropout_p`: float" in text and "```pycon\n>>> import numpy" in text
    assert "\n### PagedKVCache.append\n" in text  # of its base class
    assert 'v_scale=None, *, k_mean=None, fp32_sinks=0, pv="int8"' in text  # fields of LayerScales
    assert "Scores are ``scale * q @ k.T``, then" in text


def test_a_name_that_is_not_defined_is_an_error(api):
    module = api["Module"]("cyflash")
    module.tree = api["ast"].parse("__all__ = ['nothing']")
    with pytest.raises(LookupError, match=r"cyflash\.nothing"):
        api["page"](module)


def test_signatures(api):
    def shown(source):
        return api["call"]("f", api["ast"].parse(source).body[0].args)

    assert shown("def f(a, b: int = 1, *, c='x', d): pass") == 'f(a, b=1, *, c="x", d)'
    assert shown("def f(a=(-1, 2), *b, **c): pass") == "f(a=(-1, 2), *b, **c)"

