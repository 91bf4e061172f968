"""Figures of matplotlib as SVG to put into a page: its colours and fonts are the page's, light or dark."""

import io
import itertools
import re
from html import escape

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

__all__ = ["INK", "PAPER", "axes_at", "is_light", "svg"]

INK, PAPER = "#010203", "#fdfcfb"  # stand for the page's colours until the figure is text
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "cyflash", "font.size": 8, "font.family": "sans-serif",
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "text.parse_math": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
PIXEL = 1 / 96  # of CSS, in inches

_numbers = itertools.count()


def svg(draw, width, height, text):
    """The SVG that draw(figure) makes, `width` x `height` CSS pixels; text: what it shows, in words."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * PIXEL, height * PIXEL), dpi=96)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    image = file.getvalue()
    image = image[image.index("<svg") :]
    image = re.sub(r"<metadata>.*?</metadata>", "", image, flags=re.DOTALL)
    own = f"f{next(_numbers)}-"  # ids are the page's, not the figure's
    image = re.sub(r'\bid="', f'id="{own}', image)
    image = re.sub(r'(url\(#|href="#)', rf"\g<1>{own}", image)
    image = re.sub(r"<svg[^>]*>", "", image, count=1)
    image = re.sub(r'font-family: [^;"]*', "font-family: var(--font)", image)
    # as other versions of matplotlib write it
    image = re.sub(r'font: ([^;"\']*px) [^;"]*', r"font: \1 var(--font)", image)
    image = image.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    box = f"0 0 {width * 0.75:g} {height * 0.75:g}"
    return (
        f'<svg role="img" aria-label="{escape(text)}" viewBox="{box}" width="{width:g}" height="{height:g}">'
        f"<title>{escape(text)}</title>{image}"
    )


def axes_at(figure, left, top, width, height):
    """Axes at a place in CSS pixels, from the upper left."""
    whole_width, whole_height = figure.get_size_inches() / PIXEL
    return figure.add_axes(
        (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    )


def is_light(colour):
    """Whether dark text reads better on it."""
    r, g, b = (int(to_hex(colour)[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return 0.299 * r + 0.587 * g + 0.114 * b > 0.5
