"""Classifies batches of columns, as programs for tables and clusters hand them on: Ray Data, Spark, `datasets.map`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm.classifier import VLMClassifier
from vlm.common import UsageError, did_you_mean, listed
from vlm.config import checked_keywords
from vlm.data import IMAGE_COLUMNS, open_image
from vlm.inference.classifying import Options, classify_items
from vlm.inference.items import Item
from vlm.inference.model_folder import model_identity, read_metadata
from vlm.inference.predictor import load_model_and_metadata
from vlm.inference.writing import READABLE_NAME

BYTES = ("bytes", "content")  # columns of files as Ray and Spark read them, next to a column of their paths
TEXTS = ("prediction", "error", "full_response", READABLE_NAME)


class BatchPredictor:
    """A function of a batch that can be sent to another process: it loads the model there, at its first call.

    Args:
        model_dir: the folder of the model, which every worker can read.
        image_column: the column of the images (default: found by its name).
        keep: columns of a batch that are handed on (default: all, that of the images too).
        explain: give the texts.
        batch_size: images in one forward pass (default: what fits into the free memory).
        exhaustive, feature_cache: see `predict_batch`.
        device, dtype, abstain_below: see `load_model_and_metadata`.

    Raises:
        ValueError: an argument has another value than is documented.
    """

    def __init__(
        self,
        model_dir: str | Path = "vlm_results/best_model",
        image_column: str | None = None,
        keep: Sequence[str] | None = None,
        explain: bool = False,
        batch_size: int | None = None,
        exhaustive: bool = False,
        feature_cache: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        abstain_below: float | None = None,
    ) -> None:
        loading = {"device": device, "dtype": dtype, "abstain_below": abstain_below}
        given = checked_keywords("BatchPredictor", batch_size=batch_size, image_column=image_column, **loading)
        self.model_dir, self.image_column = str(model_dir), given["image_column"]
        self.keep = [keep] if isinstance(keep, str) else keep
        self.options = Options(given["batch_size"], explain, False, exhaustive, feature_cache)
        self._load = {name: given[name] for name in loading}
        self._loaded: tuple[VLMClassifier, dict[str, Any]] | None = None

    @property
    def class_names(self) -> list[str]:
        """The C classes, in the order of the probabilities. Loads the model."""
        return list(self._model()[0].class_names)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Classify the images of a batch.

        Args:
            batch: B values of each column, as an array or a list; also a table of pyarrow, or a data frame of pandas.
                An image is the bytes of a file, a path, an array HxW, HxWx3 or HxWx4, a PIL image, or a dict with
                "bytes" or "path".

        Returns:
            the columns that are kept, and these arrays of B values:
            prediction: the class; None if the model abstains or the image cannot be read.
            confidence: its probability, 0 to 1; NaN if the image cannot be read, as in the next two.
            probabilities: (B, C), in the order of `class_names`.
            error_bound: how much a probability can be wrong at most.
            abstained: whether the model abstains.
            error: why the image cannot be read, else None.
            full_response: the text, with `explain`.
            readable_name: what the model calls the class, if it was trained with `--class-map`.

        Raises:
            UsageError: there is no such column, one has another length, or one has the name of a result.
        """
        batch = _columns(batch)
        column = self._image_column(batch)
        kept = self._kept(batch, len(batch[column]))
        model, metadata = self._model()
        rows = [outcome.result for outcome in classify_items(model, metadata, _items(batch, column), self.options)]
        none = dict.fromkeys(model.class_names, np.nan)
        probabilities = [list((row.get("probabilities") or none).values()) for row in rows]
        found: dict[str, Any] = {name: _texts(rows, name) for name in TEXTS}
        found |= {name: np.array([row.get(name, np.nan) for row in rows]) for name in ("confidence", "error_bound")}
        found["probabilities"] = np.array(probabilities).reshape(len(rows), len(model.class_names))  # (B, C)
        found["abstained"] = np.array([bool(row.get("abstained")) for row in rows], dtype=bool)
        if not self.options.explain:
            del found["full_response"]
        if not model.prompts.readable_names:
            del found[READABLE_NAME]
        if both := [name for name in kept if name in found]:
            raise UsageError(f"the batch has columns with the names of results: {listed(both)}. Rename them.")
        return kept | found

    def __getstate__(self) -> dict[str, Any]:
        """Without the model. Its digest is there, because `datasets` takes equal states for equal results."""
        try:
            folder = Path(self.model_dir).expanduser()
            identity = model_identity(folder, read_metadata(folder))
        except (UsageError, OSError):  # it is on another machine
            identity = ""
        return vars(self) | {"_loaded": None, "_identity": identity}

    def _model(self) -> tuple[VLMClassifier, dict[str, Any]]:
        if self._loaded is None:
            model, _, metadata = load_model_and_metadata(self.model_dir, **self._load)
            self._loaded = model, metadata
        return self._loaded

    def _image_column(self, batch: Mapping[str, Any]) -> str:
        if self.image_column:
            _check_there("image_column", self.image_column, batch)
            return self.image_column
        if found := [name for name in (*BYTES, *IMAGE_COLUMNS) if name in batch]:
            return found[0]
        raise UsageError(f"image_column: no column was recognized by its name. {_columns_there(batch)}")

    def _kept(self, batch: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The columns that are handed on, each of so many values."""
        for name in self.keep or ():
            _check_there("keep", name, batch)
        kept = {name: batch[name] for name in (batch if self.keep is None else self.keep)}
        for name, values in kept.items():
            if len(values) != count:
                raise UsageError(f"the column {name} has {len(values):,} values, and there are {count:,} images.")
        return kept


def _columns(batch: Any) -> Mapping[str, Any]:
    """A batch by column. Tables of pyarrow become lists of Python's own values."""
    return batch.to_pydict() if hasattr(batch, "to_pydict") else batch


def _check_there(argument: str, name: str, batch: Mapping[str, Any]) -> None:
    if name not in batch:
        near = did_you_mean(name, list(map(str, batch)))
        raise UsageError(f"{argument}: no column {name}. {_columns_there(batch)}{near}")


def _columns_there(batch: Mapping[str, Any]) -> str:
    return f"Columns there: {listed(map(str, batch)) or 'none'}."


def _items(batch: Mapping[str, Any], column: str) -> Iterator[Item]:
    for row, cell in enumerate(batch[column]):
        if hasattr(cell, "as_py"):  # a value of a column of pyarrow
            cell = cell.as_py()
        path = cell
        if isinstance(cell, Mapping):  # as `datasets` stores images
            path = cell.get("path")
            cell = cell.get("bytes") or path
        name = str(path) if isinstance(path, str | Path) else f"row {row + 1}"
        yield Item(name, partial(open_image, cell, name))


def _texts(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([row.get(name) for row in rows], dtype=object)
