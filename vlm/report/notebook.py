"""What a notebook shows of a finished run. A function of what stands in `results.json` only."""

import base64
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlm.report.figure_files import describe, to_png
from vlm.report.figures import confusion_matrix, draw
from vlm.report.summary import fold_rows, summary_rows, warnings_of
from vlm.report.templates import render

TEMPLATE = "notebook.html.jinja"
DPI = 80  # a notebook keeps every figure in its file
ROWS = (  # of the summary; the report has the others
    "test accuracy",
    "test accuracy, images not in train",
    "test accuracy before training",
    "macro F1, weighted F1",
    "validation accuracy",
    "ECE on test",
    "NLL on test",
    "training",
)


def figures_of(results: dict[str, Any]) -> dict[str, Figure]:
    """The figures of a run by name; those of a cross-validation are of its out-of-fold predictions."""
    if "test" in results:
        figures = draw(results, list(results["test"]["per_class"]))
    else:
        pooled = results["out_of_fold"]
        figures = {"confusion_matrix": confusion_matrix(pooled["confusion_matrix"], list(pooled["per_class"]))}
    for figure in figures.values():  # a notebook shows a figure of its own accord only after `%matplotlib inline`
        vars(figure)["_repr_png_"] = partial(to_png, figure, DPI)
    return figures


def result_html(results: dict[str, Any], figures: Mapping[str, Figure], paths: Mapping[str, Path]) -> str:
    """A small table, the warnings and the figures of a run as a part of a page. All texts are escaped.

    Args:
        results: what stands in `results.json`.
        figures: by name, from `figures_of`.
        paths: what is named below, by name.
    """
    shown = {name: base64.b64encode(to_png(figure, DPI)).decode() for name, figure in figures.items()}
    rows = [row for row in summary_rows(results) if row[0] in ROWS] if "test" in results else fold_rows(results)
    return render(
        TEMPLATE,
        rows=rows,
        warnings=warnings_of(results) if "test" in results else [],
        figures=[(name.replace("_", " "), describe(figures[name]), png) for name, png in shown.items()],
        paths={name.replace("_", " "): str(path) for name, path in paths.items()},
    )
