"""Figures as files: a PNG next to `results.json`, and SVG in the page."""

import io
import itertools
import warnings
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlm.common import replacing
from vlm.report.figures import BLUE, INK, ORANGE, STYLE

DPI = 150
# The page has its own values of these, for light and dark.
COLORS_OF_THE_PAGE = {INK: "currentColor", BLUE: "rgb(var(--blue))", ORANGE: "rgb(var(--orange))"}


def save_png(figure: Figure, path: str | Path) -> None:
    """Save a figure as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(to_png(figure, DPI))


def to_png(figure: Figure, dpi: int) -> bytes:
    """A figure as the content of a PNG file, with so many pixels an inch."""
    file = io.BytesIO()
    _save(figure, file, format="png", pad_inches=0.15, dpi=dpi)
    return file.getvalue()


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """A figure as an `<svg>` element for an HTML page, in the colors of the page.

    Args:
        name: begins every id, so that the ids of several figures on a page differ.
        alt: what the figure shows, for readers who cannot see it.
    """
    file = io.BytesIO()
    _save(figure, file, format="svg", pad_inches=0, transparent=True, metadata={"Date": None})
    svg = ElementTree.fromstring(file.getvalue())
    for element in svg.iter():
        # HTML knows the namespaces of SVG by itself: {http://www.w3.org/2000/svg}path -> path
        element.tag = element.tag.rpartition("}")[2]
        given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib = {key: _of_the_page(key, value, name) for key, value in given.items()}
    for tag in ("metadata", "defs"):  # of the whole image: who made it, and a style for every element of the page
        svg.remove(next(child for child in svg if child.tag == tag))
    svg.attrib = {"viewBox": svg.attrib["viewBox"], "width": svg.attrib["width"], "role": "img", "aria-label": alt}
    return ElementTree.tostring(svg, encoding="unicode")


def _of_the_page(key: str, value: str, name: str) -> str:
    """An attribute of an SVG as the page needs it: with ids of its own, and the colors of the page."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for color, of_the_page in COLORS_OF_THE_PAGE.items():
            value = value.replace(color, of_the_page)
    return value


def _save(figure: Figure, file: IO[bytes], **options: Any) -> None:
    with rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, bbox_inches="tight", **options)


def describe(figure: Figure) -> str:
    """The legend of each part of a figure in words: what is drawn, and where it begins and ends."""
    parts = []
    for axes in figure.axes:
        drawn = "; ".join(itertools.starmap(_in_words, zip(*axes.get_legend_handles_labels(), strict=True)))
        parts.append(f"{axes.get_title()}, {axes.get_ylabel()} over {axes.get_xlabel()}: {drawn or 'nothing'}.")
    return " ".join(parts)


def _in_words(drawn: Line2D | Collection, label: str) -> str:
    points = np.asarray(drawn.get_offsets() if isinstance(drawn, Collection) else drawn.get_xydata())
    (first, start), (last, end) = points[0], points[-1]
    return label if first == last else f"{label}, from {start:.3g} to {end:.3g}"
