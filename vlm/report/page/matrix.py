"""The confusion matrix of the page: a table of counts, or with many classes an image with one pixel a cell. C =
classes."""

import math

import numpy as np
from PIL import Image

from vlm.report.figures import MOST_CLASSES_WITH_COUNTS
from vlm.report.page.content import Content
from vlm.report.page.markup import Markup, class_name, data_address, element, shorten

RIGHT, WRONG = (43, 108, 196), (196, 88, 22)  # as in the style sheet; an image cannot follow light and dark
FAINTEST = 60  # opacity of 255; a single image is seen, too
MOST_NAMES = 40  # on an axis of the image
FITS_A_PHONE = 7  # classes
SWIPE = "Where columns are cut off, swipe sideways to see the rest."


def matrix(content: Content) -> Markup:
    """Rows are the true classes, columns the predicted ones; up to 30 classes with counts, above as an image with names
    on its axes."""
    classes = len(content.names)
    shown = _table(content) if classes <= MOST_CLASSES_WITH_COUNTS else _image(content)
    hint = element("p", SWIPE, class_="quiet narrow") if classes > FITS_A_PHONE else None
    return element("figure", hint, element("div", shown, class_="scroll"), _legend(content))


def _legend(content: Content) -> Markup:
    classes = len(content.names)
    every = _names_every(classes)
    cut = f" One in {every} is named." if every > 1 else ""
    counts = (
        ""
        if classes <= MOST_CLASSES_WITH_COUNTS
        else f"{classes:,} classes in their order.{cut} All counts are in results.json. "
    )
    keys = [
        element("span", element("i", class_=f"key {kind}"), text)
        for kind, text in (("right", "right"), ("wrong", "wrong"))
    ]
    words = f"Rows: true class; columns: prediction. {counts}The stronger the color, the larger the share of the true class."
    return element("figcaption", element("span", *keys, class_="legend"), words)


def _table(content: Content) -> Markup:
    names = [class_name(name, 18) for name in content.names]
    head = element("tr", element("td"), *(element("th", n, scope="col") for n in names))
    rows = []
    for i, (name, counts) in enumerate(zip(names, content.counts.tolist(), strict=True)):
        total = max(sum(counts), 1)
        cells = [
            element(
                "td",
                count or "",
                class_=_cell_class(i == j, count / total),
                style=f"--s:{count / total:.3f}" if count else None,
            )
            for j, count in enumerate(counts)
        ]
        rows.append(element("tr", element("th", name, scope="row"), *cells))
    return element("table", element("thead", head), element("tbody", *rows), class_="matrix")


def _cell_class(right: bool, share: float) -> str | None:
    if not share:
        return None
    return ("right" if right else "wrong") + (" strong" if share > 0.5 else "")


def _image(content: Content) -> Markup:
    alt = f"Confusion matrix of {len(content.names):,} classes: rows are the true classes, columns the predicted ones."
    image = element("img", src=data_address(_pixels(content.counts), "PNG", optimize=True), alt=alt, class_="coarse")
    return element("div", element("div"), _axis(content, "top"), _axis(content, "left"), image, class_="matrix-image")


def _pixels(counts: np.ndarray) -> Image.Image:
    """(C, C) counts -> one pixel a cell: blue where right, orange where wrong, the more opaque the larger the share of
    the true class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pixels = np.zeros((*counts.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(np.eye(len(counts), dtype=bool)[..., None], RIGHT, WRONG)
    pixels[..., 3] = np.where(counts > 0, FAINTEST + shares * (255 - FAINTEST), 0)
    return Image.fromarray(pixels, "RGBA")


def _axis(content: Content, side: str) -> Markup:
    """Class names beside the middle of their rows, or columns; with many classes every second, third, ... of them."""
    classes = len(content.names)
    offset = "left" if side == "top" else "top"
    names = [
        element("span", shorten(content.names[i], 16), class_="name", style=f"{offset}:{(i + 0.5) / classes:.2%}")
        for i in range(0, classes, _names_every(classes))
    ]
    return element("div", *names, class_=f"axis {side}", aria_hidden="true")


def _names_every(classes: int) -> int:
    return 1 if classes <= MOST_CLASSES_WITH_COUNTS else math.ceil(classes / MOST_NAMES)
