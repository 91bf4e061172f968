"""Pieces of HTML that the pages of `cyflash report` and `cyflash bench` share, and their style (page.css)."""

import re
from html import escape
from pathlib import Path

__all__ = ["chosen", "figure", "key", "style", "table", "terms"]


def style():
    """The style sheet of all pages, to put into one."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def chosen(template, **kept):
    """The template with or without its optional sections."""
    for name, keep in kept.items():
        replacement = r"\1" if keep else ""
        template = re.sub(rf"<!-- if {name} -->\n?(.*?)<!-- end {name} -->\n?", replacement, template, flags=re.DOTALL)
    return template


def table(headers, rows, caption=""):
    """headers: {text: class}; rows of cells, each text or (text, class); the first cell of a row is its header."""
    head = "".join(f'<th scope="col" class="{kind}">{escape(text)}</th>' for text, kind in headers.items())
    body = "\n".join(_row(row, headers.values()) for row in rows)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table>{caption}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(row, kinds):
    cells = [cell if isinstance(cell, tuple) else (cell, "") for cell in row]
    line = ""
    for (text, own), kind in zip(cells, kinds, strict=True):
        tag = "td" if line else 'th scope="row"'
        line += f'<{tag} class="{" ".join(filter(None, (kind, own)))}">{escape(text)}</{tag[:2]}>'
    return f"<tr>{line}</tr>"


def figure(svg, caption):
    """caption: HTML."""
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def key(colour, text):
    return f'<span><span class="key" style="background:{colour}"></span>{escape(text)}</span>'


def terms(items):
    return "\n".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(text))}</dd>" for name, text in items.items())
