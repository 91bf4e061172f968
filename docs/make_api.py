"""The reference of the public names, from their docstrings (numpydoc) to Markdown.

    python docs/make_api.py [FOLDER]        default: docs/api

Sources are read, not imported: no package is needed, and the pages are the same wherever they are made. A name in
`__all__` is followed through `from ... import` to where it is defined.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = (
    "cyflash", "cyflash.quant", "cyflash.compat.flash_attn", "cyflash.compat.torch", "cyflash.compat.transformers",
    "cyflash.compat.dask",
)  # and those that their __all__ names
SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}\n", re.M)
WITH_ENTRIES = {"Parameters", "Returns", "Attributes", "Raises", "Yields"}


class Module:
    """A module's syntax tree, and what its names are."""

    def __init__(self, name):
        self.name, path = name, self.path(name)
        if path is None:
            raise LookupError(f"no source of {name}")
        self.tree = ast.parse(path.read_text())
        self.doc = ast.get_docstring(self.tree, clean=False)  # it would dedent a diagram

    @staticmethod
    def path(name):
        """The folder quant/ is installed as cyflash.quant."""
        base = ROOT / re.sub(r"^cyflash/quant\b", "quant", name.replace(".", "/"))
        found = [path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()]
        return found[0] if found else None

    def public(self):
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return ast.literal_eval(node.value)
        raise LookupError(f"{self.name} has no __all__")

    def find(self, name):
        """(module, node) where a name is defined: a Module and None where the name is a module."""
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return self, node
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                return self, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        if self.path(whole := f"{node.module}.{alias.name}"):
                            return Module(whole), None
                        return Module(node.module).find(alias.name)
        raise LookupError(f"{self.name}.{name} is in __all__, and defined nowhere")


def pages():
    """{file name: text} of all pages; README.md is the index."""
    done, index = {}, ["# Reference", "", "Made from the docstrings by `python docs/make_api.py`.", ""]
    left = list(MODULES)
    while left:
        module = Module(left.pop(0))
        text, names, modules = page(module)
        left[:0] = modules
        done[f"{module.name}.md"] = text
        links = ", ".join(f"[`{name}`]({module.name}.md#{name.lower()})" for name in names)
        index.append(f"- [{module.name}]({module.name}.md): {links}")
    done["README.md"] = "\n".join(index) + "\n"
    return done


def page(module):
    """Text of a module's page, the names on it, and the modules that it names."""
    lines, names, modules = [f"# {module.name}", "", text_of(module.doc)], [], []
    for name in module.public():
        where, node = module.find(name)
        if node is None:
            modules.append(where.name)
        else:
            names.append(name)
            lines += ["", *entry(where, node, name)]
    lines += [f"\nMore: [{name}]({name}.md)" for name in modules]
    return "\n".join(lines) + "\n", names, modules


def entry(module, node, name):
    yield f"## {name}\n"
    if isinstance(node, ast.Assign):
        yield code("python", ast.unparse(node))
        return
    doc = documented(node, f"{module.name}.{name}")
    if isinstance(node, ast.FunctionDef):
        yield code("python", call(name, node.args))
        yield from sections(doc)
        return
    if shown := constructor(node):
        yield code("python", shown)
    yield from sections(doc)
    for owner, method in methods(module, node):
        yield f"### {name}.{method.name}\n"
        decorators = {ast.unparse(decorator) for decorator in method.decorator_list}
        if "property" in decorators:
            yield "A property.\n"
        else:
            yield code("python", call(f"{name}.{method.name}", method.args, skip=1))
        yield from sections(documented(method, f"{owner.name}.{method.name}"))


def documented(node, name):
    doc = ast.get_docstring(node)
    if not doc:
        raise LookupError(f"{name} has no docstring")
    return doc


def methods(module, node):
    """Public methods and properties with a docstring, those of own base classes after them."""
    seen, left = set(), [(module, node)]
    while left:
        module, node = left.pop(0)
        for one in node.body:
            if isinstance(one, ast.FunctionDef) and one.name[0] != "_" and one.name not in seen:
                seen.add(one.name)
                if ast.get_docstring(one):
                    yield module, one
        for base in node.bases:
            try:
                found = module.find(ast.unparse(base))
            except LookupError:  # of another library, or built in
                continue
            left += [found] if isinstance(found[1], ast.ClassDef) else []


def constructor(node):
    """The call that makes one: that of __init__, or of the fields of a dataclass or NamedTuple; None for others, which
    are exceptions."""
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and one.name == "__init__":
            return call(node.name, one.args, skip=1)
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
    return wrapped(node.name, [*map(field, fields)]) if fields else None


def field(node):
    """`_: KW_ONLY` is the star of a dataclass, and field(default=...) a default."""
    if ast.unparse(node.annotation).endswith("KW_ONLY"):
        return "*"
    value = node.value
    if isinstance(value, ast.Call):
        value = {keyword.arg: keyword.value for keyword in value.keywords}.get("default", value)
    return argument(ast.arg(node.target.id), value)


def call(name, arguments, skip=0):
    """The signature without annotations; skip: self or cls."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    pieces = [argument(*pair) for pair in zip(plain, defaults, strict=True)][skip:]
    if arguments.vararg:
        pieces.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        pieces.append("*")
    pieces += map(argument, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        pieces.append(f"**{arguments.kwarg.arg}")
    return wrapped(name, pieces)


def argument(own, default):
    return own.arg + (f"={ast.unparse(default)}".replace("'", '"') if default else "")


def wrapped(name, arguments):
    one = f"{name}({', '.join(arguments)})"
    if len(one) <= 100:
        return one
    return f"{name}(\n{textwrap.indent(textwrap.fill(', '.join(arguments), 96), '    ')}\n)"


def code(language, text):
    return f"```{language}\n{text}\n```\n"


def sections(doc):
    """A docstring as Markdown, one section after the other."""
    first, *rest = SECTION.split(doc)
    yield text_of(first)
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        yield f"**{title}**\n"
        if title in WITH_ENTRIES:
            yield "\n".join(entries(body)) + "\n"
        elif title == "Examples":
            yield code("pycon", body.strip("\n"))
        else:
            yield text_of(body)


def entries(body):
    """`name : type` with an indented description after it, as list items."""
    for block in re.split(r"\n(?=\S)", body.strip("\n")):
        head, _, description = block.partition("\n")
        name, colon, kind = head.partition(" : ")
        yield f"- `{name}`" + (f": {escaped(kind)}" if colon else "")
        if description.strip():
            yield "\n" + textwrap.indent(text_of(textwrap.dedent(description)), "  ").rstrip("\n")


def text_of(text):
    """Indented blocks are code in Markdown too; what looks like a tag outside them is none."""
    lines = text.replace("::\n\n    ", ":\n\n    ").strip("\n").split("\n")
    return "\n".join(line if line.startswith("    ") else escaped(line) for line in lines) + "\n"


def escaped(line):
    """Outside of code, `<` and `*` mean themselves."""
    pieces = re.split(r"(``.*?``|`[^`]*`)", line)
    return "".join(re.sub(r"([*<])", r"\\\1", piece) if i % 2 == 0 else piece for i, piece in enumerate(pieces))


def main(folder=ROOT / "docs/api"):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for name, text in made.items():
        (folder / name).write_text(re.sub(r"\n{3,}", "\n\n", text))
    print(f"{folder}: {len(made)} pages")


if __name__ == "__main__":
    main(*sys.argv[1:2])
