"""Writes report.html, one file that shows a run without network and scripts, and the figures next to it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlm.common import Bar
from vlm.config import PAGE
from vlm.data import Data
from vlm.evaluation import LabelIssue
from vlm.report.cards import Prediction
from vlm.report.content import Content
from vlm.report.figure_files import describe, save_png, to_svg
from vlm.report.figures import MOST_CLASSES_WITH_COUNTS, confusion_matrix, draw, names_every
from vlm.report.templates import render, write_page

TEMPLATE = "page.html.jinja"
MATRIX = "Confusion matrix: rows are the true classes, columns the predicted ones."
MOST_CLASSES_ON_A_PHONE = 7  # a wider matrix is cut off there


def write_report(
    folder: Path,
    results: dict[str, Any],
    data: Data,
    predictions: Sequence[Prediction],
    issues: Sequence[LabelIssue] = (),
) -> None:
    """Write the page and the PNG of each figure, each whole or not at all. The size of the page is bounded, whatever
    the number of images and classes.

    Args:
        folder: where `results.json` is, too.
        results: what stands in `results.json`.
        data: the images, for thumbnails and counts.
        predictions: one for each image of `data.test`, in its order.
        issues: labels that may be wrong, the likeliest first.
    """
    figures = draw(results, data.class_names)
    with Bar(len(figures), "drawing the figures", unit="figures") as bar:
        for name, figure in figures.items():
            save_png(figure, folder / f"{name}.png")
            bar.update()
    page = render_page(Content(results, data, predictions, issues), figures)
    write_page(folder / PAGE, page)


def time_to_draw(class_names: Sequence[str]) -> float:
    """About how many seconds all figures take, as files and on the page, measured with an empty confusion matrix."""
    started = time.monotonic()
    to_svg(confusion_matrix([[0] * len(class_names) for _ in class_names], class_names), "", "")
    return 6 * (time.monotonic() - started)


def render_page(content: Content, figures: dict[str, Figure]) -> str:
    """The page as text. All that the template is given is escaped, other than the figures."""
    alts = {name: describe(figure) for name, figure in figures.items()}
    alts["confusion_matrix"] = MATRIX
    svgs = {name: to_svg(figure, name, alts[name]) for name, figure in figures.items()}
    return render(TEMPLATE, page=content, figures=svgs, **_matrix_layout(content))


def draw_matrix(content: Content) -> dict[str, Any]:
    """What `confusion.html.jinja` needs besides the content of the page."""
    figure = confusion_matrix(content.counts.tolist(), content.names)
    return {"figures": {"confusion_matrix": to_svg(figure, "confusion_matrix", MATRIX)}, **_matrix_layout(content)}


def _matrix_layout(content: Content) -> dict[str, Any]:
    classes = len(content.names)
    return {
        "names_every": names_every(classes),
        "has_counts": classes <= MOST_CLASSES_WITH_COUNTS,
        "is_wide": classes > MOST_CLASSES_ON_A_PHONE,
    }
