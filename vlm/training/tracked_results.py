"""What trackers show of the test at the end of a run: its figures as images, its tables, the worst mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from vlm.config import PAGE, RESULTS
from vlm.data import Data, Split, UnreadableImage
from vlm.report import Prediction, confident_mistakes

FIGURES = {  # by the names that trackers show, the files in the output folder
    "training_curves": "training_curves.png",
    "test/confusion_matrix": "confusion_matrix.png",
    "test/reliability": "reliability.png",
}
MISTAKES, CLASSES, IMAGE = "test/mistakes", "test/classes", "image"
EDGE = 256  # pixels, the longer side of the copy of an image


@dataclass(frozen=True)
class Table:
    """columns: their names; rows: texts, numbers and, in the column `IMAGE`, images, one for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class ShownResults:
    """What is shown: PNG files and tables by name, and the folder that `results.json` and the page are in."""

    output: Path
    figures: dict[str, Path]
    tables: dict[str, Table]


def figures_of_test(test: dict[str, Any]) -> dict[str, float]:
    """The figures of a test by name, with both ends of their intervals, from `test` in `results.json`."""
    figures: dict[str, float] = {
        name: test[name] for name in ("accuracy", "macro_f1", "weighted_f1", "loss") if name in test
    }
    for name, measured in test["calibration"]["after"].items():
        if isinstance(measured, list) and len(measured) == 3:
            figures |= dict(zip((name, f"{name}_low", f"{name}_high"), measured, strict=True))
    own = test.get("own_metrics", {})
    return figures | {name: value for name, value in own.items() if isinstance(value, int | float)}


def results_of_test(output: Path, test: dict[str, Any], data: Data, predictions: Sequence[Prediction]) -> ShownResults:
    """What trackers show of a finished run.

    Args:
        output: the output folder, with the figures in it.
        test: as in `results.json`. predictions: one for each test image.
    """
    names = data.class_names
    measures = ("precision", "recall", "f1", "support")
    per_class = [[name, *(of_class[key] for key in measures)] for name, of_class in test["per_class"].items()]
    mistakes = []
    for i in confident_mistakes(predictions):
        p = predictions[i]
        row = [_small(data.test, i), p.name, names[p.label], names[p.predicted], p.confidence, (p.text or "").strip()]
        mistakes.append(row)
    tables = {
        CLASSES: Table(("class", "precision", "recall", "F1", "images"), per_class),
        MISTAKES: Table((IMAGE, "name", "true class", "prediction", "confidence", "text"), mistakes),
    }
    return ShownResults(output, {name: output / file for name, file in FIGURES.items()}, tables)


def show_results(tracker: GeneralTracker, results: ShownResults, step: int) -> None:
    """Give a tracker of accelerate what it can show of the results."""
    show = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}[tracker.name]
    show(tracker, results, step)


def _small(split: Split, position: int) -> Image.Image | None:
    try:
        copy = split[position].image.convert("RGB")
    except UnreadableImage:  # it was there during the test
        return None
    copy.thumbnail((EDGE, EDGE))
    return copy


def _tensorboard(tracker: GeneralTracker, results: ShownResults, step: int) -> None:
    """Tables become Markdown, and their images images of their own."""
    writer = tracker.tracker
    for name, path in results.figures.items():
        with Image.open(path) as image:
            writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    for name, table in results.tables.items():
        lines = [table.columns, ["---"] * len(table.columns)]
        for number, row in enumerate(table.rows, 1):
            cells = list(row)
            for column, cell in enumerate(row):
                if isinstance(cell, Image.Image):
                    cells[column] = f"{name}/{number:02}"
                    writer.add_image(cells[column], np.asarray(cell), step, dataformats="HWC")
            lines.append(cells)
        text = "\n".join(f"| {' | '.join(_markdown(cell) for cell in line)} |" for line in lines)
        writer.add_text(name, text, step)
    writer.flush()


def _markdown(cell: Any) -> str:
    return _short(cell).replace("|", "\\|")


def _short(cell: Any) -> str:
    """A cell in one line."""
    text = f"{cell:.4f}" if isinstance(cell, float) else "" if cell is None else str(cell)
    return " ".join(text.split())


def _wandb(tracker: GeneralTracker, results: ShownResults, step: int) -> None:
    """Tables with images become images with captions, others HTML: `wandb.Table` keeps copies outside of the run."""
    import pandas
    import wandb

    shown: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in results.figures.items()}
    for name, table in results.tables.items():
        if IMAGE in table.columns:
            rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            images = [(row.pop(IMAGE), row) for row in rows]
            shown[name] = [wandb.Image(image, caption=_caption(row)) for image, row in images if image is not None]
        else:
            html = pandas.DataFrame(list(table.rows), columns=list(table.columns)).to_html(index=False)
            shown[name] = wandb.Html(html)
    tracker.tracker.log(shown, step=step)


def _caption(row: dict[str, Any]) -> str:
    return ", ".join(f"{column}: {_short(cell)}" for column, cell in row.items())


def _trackio(tracker: GeneralTracker, results: ShownResults, step: int) -> None:
    import pandas
    import trackio

    figures = {name: trackio.Image(str(path)) for name, path in results.figures.items()}
    tables = {}
    for name, table in results.tables.items():
        rows = [[trackio.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in table.rows]
        tables[name] = trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(table.columns)))
    tracker.tracker.log({**figures, **tables}, step=step)


def _mlflow(tracker: GeneralTracker, results: ShownResults, step: int) -> None:
    """Files of the run: the figures, `results.json`, the page, tables as JSON and their images as PNG."""
    import mlflow

    for name, path in results.figures.items():
        mlflow.log_artifact(str(path), name.rpartition("/")[0] or None)
    for file in (RESULTS, PAGE):
        mlflow.log_artifact(str(results.output / file))
    for name, table in results.tables.items():
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        for number, row in enumerate(rows, 1):
            if isinstance(image := row.get(IMAGE), Image.Image):
                row[IMAGE] = f"{name}/{number:02}.png"
                mlflow.log_image(image, row[IMAGE])
        mlflow.log_dict({"rows": rows}, f"{name}.json")
