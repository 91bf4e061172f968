"""The documents in docs/ agree with the code: their Python runs, commands are commands, links lead somewhere.

    ```python      run, the blocks of a file one after the other, in one namespace and one temporary folder
    ```console     `cyflash ...` is parsed as the command line would; after a line `<!-- run -->` it is run as well,
                   in the same folder, and must have exit status 0. With prompts `$ `, the other lines are output
    <!-- needs: torch, gpu -->      in the line before a block: left out, with the reason, where that is missing
"""

import contextlib
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

import cyflash
from cyflash import cli

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
LINKED = [*DOCS, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))]
# Others are shown only. `python` and `console` have to be spelled like this, or they would not be tested.
LANGUAGES = {"python", "console", "", "text", "json", "yaml", "toml", "dockerfile", "mermaid"}


class Block(NamedTuple):
    """A fenced block; line: the number of its first line of text; needs, run: what the comment before it says."""

    language: str
    text: str
    line: int
    needs: tuple[str, ...] = ()
    run: bool = False


def blocks_of(text):
    found, fence, start, before = [], None, 0, ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        opened = re.fullmatch(r"(`{3,})\s*([\w+-]*)\s*", line.lstrip())
        if fence is None and opened:
            fence, language, start = *opened.groups(), number + 1
            comment = re.fullmatch(r"<!-- (.*) -->", before.strip())
            words = comment[1] if comment else ""
            needs = re.search(r"needs: ([\w, ]+)", words)
            names = tuple(name.strip() for name in needs[1].split(",")) if needs else ()
            run = bool(re.search(r"\brun\b", words))
        elif fence is not None and line.strip() == fence:
            found.append(Block(language, "\n".join(lines[start - 1 : number - 1]), start, names, run))
            fence = None
        before = line
    assert fence is None, f"the block of line {start} has no end"
    return found


def commands_in(text):
    """The arguments of each `cyflash` in a console block, lists of str."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command, redirected = [], False
        for word in [*words, ";"]:
            if re.fullmatch(r"[|&;<>()]+", word):
                while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                    del command[0]
                if command[:3] == ["python", "-m", "cyflash"]:
                    command[:3] = ["cyflash"]
                if command and command[0] == "cyflash":
                    yield command[1:]
                command, redirected = [], word in (">", ">>", "<")
            elif redirected:
                redirected = False
            else:
                command.append(word)


def missing(needs):
    """What is not here, as a reason, or None."""
    if "gpu" in needs and not (status := cyflash.gpu_status()).available:
        return f"no GPU: {status.reason}"
    absent = [name for name in needs if name != "gpu" and importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)}: not installed" if absent else None


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, left_out = {"__name__": "__main__"}, []
    for block in blocks_of(path.read_text()):
        assert block.language in LANGUAGES, f"{path.name}:{block.line}: ```{block.language}"
        if block.language == "python" or block.run:
            if reason := missing(block.needs):
                left_out.append(f"line {block.line}: {reason}")
            elif block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
                exec(code, names)
            else:
                commands = list(commands_in(block.text))
                assert commands, f"{path.name}:{block.line}: nothing to run"
                for command in commands:
                    assert cli.main(command) == 0, f"{path.name}:{block.line}: cyflash {shlex.join(command)}"
    if left_out:
        pytest.skip("all but " + "; ".join(left_out))


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_commands_are_those_of_the_command_line(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(path.read_text()):
        if block.language == "console":
            for command in commands_in(block.text):
                try:
                    with contextlib.suppress(FileNotFoundError):  # a file that stands for the reader's own
                        cli.command_parser(command).parse_args(command)
                except SystemExit as end:  # --help and --version, or an error
                    assert not end.code, f"{path.name}:{block.line}: {capsys.readouterr().err}"


def test_commands_of_the_readme_are_those_of_the_command_line(capsys):
    text = (ROOT / "README.md").read_text()
    lines = [line for block in blocks_of(text) for line in block.text.splitlines() if line.startswith("cyflash ")]
    commands = [command for line in lines for command in commands_in(re.split(r" {3,}", line)[0])]
    assert {command[0] for command in commands} == set(cli.COMMANDS) - {"completion"}
    for command in commands:
        try:
            cli.command_parser(command).parse_args(command)
        except SystemExit:
            pytest.fail(f"cyflash {shlex.join(command)}: {capsys.readouterr().err}")


def test_the_readme_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"\bExtras, as in .*?: (.*?)\.$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert set(re.findall(r"`([\w-]+)`", named)) == set(extras)


def without_code(text):
    """Headings and prose: fenced blocks and code in lines are blank."""
    lines, fence = [], None
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,})", line)
        if mark and fence in (None, mark[1]):
            fence, line = (mark[1], "") if fence is None else (None, "")
        lines.append("" if fence else line)
    return "\n".join(lines)


def sections_of(path):
    """The names by which links reach the headings, as GitHub makes them."""
    found = set()
    for title in re.findall(r"^#{1,6} +(.*?)\s*$", without_code(path.read_text()), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower()
        slug, count = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"), 0
        while (numbered := f"{slug}-{count}" if count else slug) in found:
            count += 1
        found.add(numbered)
    return found


def links_of(path):
    prose = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", without_code(path.read_text()))
    return re.findall(r"\]\(([^()\s]+)\)", prose)


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_links_lead_somewhere(path):
    broken = []
    for link in links_of(path):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, section = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (section and section not in sections_of(target)):
            broken.append(link)
    assert not broken


def test_the_index_names_every_document():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links_of(index)}
    assert not [name_of(path) for path in DOCS if path not in linked | {index}]


# --- These tests themselves -------------------------------------------------------------------------------------------

SAMPLE = """# A `title`, twice
<!-- needs: torch, gpu -->
```python
a = 1
```
<!-- run -->
```console
$ A=1 cyflash info --json - | cat > x && \\
  cyflash check s --data y
cyflash is output
```
# A title, twice
[here](#a-title-twice-1), not `[there](x)` or
```
[nor](here)
# nor this
```
"""


def test_blocks_and_commands_are_found():
    python, console, plain = blocks_of(SAMPLE)
    assert python == Block("python", "a = 1", 4, ("torch", "gpu"))
    assert console.run and console.line == 8 and plain.language == ""
    assert list(commands_in(console.text)) == [["info", "--json", "-"], ["check", "s", "--data", "y"]]
    assert list(commands_in("cyflash compare --schemes 'int8*'  # some")) == [["compare", "--schemes", "int8*"]]


def test_links_and_sections_are_found(tmp_path):
    path = tmp_path / "x.md"
    path.write_text(SAMPLE)
    assert sections_of(path) == {"a-title-twice", "a-title-twice-1"}
    assert links_of(path) == ["#a-title-twice-1"]


def test_wrong_commands_are_told(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.md"
    path.write_text("```console\ncyflash compare --no-such-option\n```\n")
    with pytest.raises(AssertionError, match=r"x\.md:2.*no-such-option"):
        test_commands_are_those_of_the_command_line(path, tmp_path, monkeypatch, capsys)
