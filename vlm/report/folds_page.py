"""report.html of a cross-validation: the figures of all folds, and the out-of-fold predictions of their images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.config import PAGE, fold_folder
from vlm.data import Data
from vlm.report.cards import Card, Prediction, card, confident_mistakes, thumbnail
from vlm.report.content import Content
from vlm.report.page import draw_matrix
from vlm.report.templates import render, write_page
from vlm.report.used_settings import used_settings

TEMPLATE = "folds_page.html.jinja"
COLUMNS = {"accuracy": "accuracy", "macro_f1": "macro F1", "nll": "NLL", "ece": "ECE"}

Row = tuple[str, str | None, int | None, list[str]]  # name, page, images, a text for each of the columns


@dataclass
class FoldsContent(Content):
    """All that the page shows: of a run's page the parts about predictions.

    results: the content of `results.json` of the cross-validation; data: of one of its folds; predictions: of the
    images of all folds, each by the model that was not trained on it; images: name -> split and position in `data`.
    """

    images: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def test(self) -> dict[str, Any]:
        return self.results["out_of_fold"]

    @property
    def accuracy(self) -> tuple[float, float, float]:
        value, low, high = self.test["accuracy"]
        return value, low, high

    @property
    def mean(self) -> float:
        """The mean accuracy of the folds."""
        return self.results["over_folds"]["accuracy"]["mean"]

    @property
    def subtitle(self) -> list[str]:
        model = self.results["settings"].get("model") or "the demo's model"
        counts = [f"cross-validation of {len(self.results['folds'])} folds", f"{len(self.names):,} classes"]
        return [
            str(fact) for fact in (model, self.data.source.get("dataset"), *counts, f"{self.total:,} images") if fact
        ]

    @property
    def columns(self) -> list[str]:
        return list(COLUMNS.values())

    @property
    def rows(self) -> list[Row]:
        return [
            (name, f"{fold_folder(number)}/{PAGE}" if number else None, images, values)
            for name, number, images, values in fold_rows(self.results)
        ]

    @property
    def mistakes(self) -> list[Card]:
        shown = [self.predictions[i] for i in confident_mistakes(self.predictions)]
        return [card(prediction, self.names, self._image(prediction.name), 0.0) for prediction in shown]

    def _image(self, name: str) -> Any:
        role, position = self.images.get(name, ("", 0))
        return thumbnail(getattr(self.data, role), position) if role else None

    @property
    def settings(self) -> dict[str, Any]:
        return used_settings(self.results)


def fold_rows(results: dict[str, Any]) -> list[tuple[str, int | None, int | None, list[str]]]:
    """The rows of the table of a cross-validation, from the content of its `results.json`.

    Returns:
        For each row its name, the number of the fold if it is one, its images if they are counted, and a text for each
        of `COLUMNS`, empty if there is no such figure.
    """
    over, pooled = results["over_folds"], results["out_of_fold"]
    rows: list[tuple[str, int | None, int | None, list[str]]] = [
        (f"fold {fold['fold']}", fold["fold"], fold["pictures"], [f"{fold[name]:.4f}" for name in COLUMNS])
        for fold in results["folds"]
    ]
    for what, key in (("mean of the folds", "mean"), ("standard deviation", "standard_deviation")):
        rows.append((what, None, None, [f"{over[name][key]:.4f}" for name in COLUMNS]))
    rows.append(("95% interval of the mean", None, None, [_range(over[name]["interval"]) for name in COLUMNS]))
    values = {name: pooled[name] if isinstance(pooled[name], list) else [pooled[name]] for name in COLUMNS}
    rows.append(("all images together", None, pooled["samples"], [f"{values[name][0]:.4f}" for name in COLUMNS]))
    rows.append(("95% interval", None, None, [_range(values[name][1:]) for name in COLUMNS]))
    return rows


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if len(ends) == 2 else ""


def write_folds_report(folder: Path, results: dict[str, Any], data: Data, predictions: Sequence[Prediction]) -> None:
    """Write the page of a cross-validation, whole or not at all.

    Args:
        folder: where its `results.json` is, too.
        data: of one of the folds, which has the images of all.
        predictions: of the images of all folds.

    Raises:
        WriteError: it cannot be written.
    """
    images = {
        name: (role, position)
        for role in ("train", "validation", "test")
        for position, name in enumerate(getattr(data, role).names)
    }
    content = FoldsContent(results, data, predictions, images=images)
    write_page(folder / PAGE, render(TEMPLATE, page=content, **draw_matrix(content)))
