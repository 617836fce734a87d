"""evaluate: a saved model is tested on a dataset, from Python."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm.common import doing, format_table, note, switches_as_before
from vlm.config import IN_MEMORY, checked_keywords, classify_settings, from_keywords, said_in_python
from vlm.inference.arguments import OF_A_DATASET, check_output, check_report_dir
from vlm.inference.classifying import Options
from vlm.inference.labeled import match_items, read_images_for
from vlm.inference.predictor import load_model_and_metadata
from vlm.inference.testing import SavedModelTest
from vlm.inference.writing import check_replaceable
from vlm.machine import Team


def evaluate(
    model_dir: str | Path,
    dataset: Any,
    split: str | None = None,
    *,
    output: str | Path | None = None,
    report_dir: str | Path | None = None,
    metrics: Sequence[Callable[..., Any]] = (),
    batch_size: int | None = None,
    explain: bool = False,
    exhaustive: bool = False,
    feature_cache: bool = False,
    abstain_below: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    show_progress: bool = True,
    **columns: Any,
) -> dict[str, Any]:
    """Test a saved model on labeled images. Its calibration stays as it was fitted in the training.

        results = evaluate("vlm_results/best_model", "my_test_images/")
        results["test"]["accuracy"]

    Args:
        model_dir: the folder of the model; see `load_model_and_metadata`.
        dataset: any dataset that the training reads: its name or path, or a dataset that a program has made.
        split: of the dataset; default: test, or the only one.
        output: write one row an image into this file, .csv, .jsonl or .parquet, with its true class as `label`.
        report_dir: write the page, the figures and `results.json` into this folder.
        metrics: own metrics; see `evaluate_vlm_model`.
        batch_size, explain, exhaustive, feature_cache, show_progress: see `predict_batch`.
        abstain_below, device, dtype: see `load_model_and_metadata`.
        columns: how the dataset is read, by the flags of `inference_vlm.py`: label_column="species" is --label-column.
            class_map may be a dict instead of a JSON file.

    Returns:
        What stands in `results.json` (docs/results.md): test (None if no image has a label that is a class of the
        model), unknown_classes, pictures, picture_check and so on.

    Raises:
        ValueError: an argument has another value than is documented.
        UsageError: the model or the dataset cannot be read, or none of the dataset's classes is one of the model.
        UnknownKeyword: there is no such flag; it is a TypeError, too.
    """
    columns = from_keywords("evaluate", columns, OF_A_DATASET.keys() - {"dataset", "dataset_split", "metrics"})
    columns |= from_keywords("evaluate", {"dataset_split": split})
    loading = checked_keywords("evaluate", device=device, dtype=dtype, abstain_below=abstain_below)
    batch_size = checked_keywords("evaluate", batch_size=batch_size)["batch_size"]
    named = isinstance(dataset, str | os.PathLike)
    given = {"dataset": str(dataset) if named else IN_MEMORY, **columns}
    with switches_as_before(), said_in_python():
        settings = classify_settings(given)
        if output is not None:
            check_output(Path(output), Path(model_dir))
            check_replaceable(Path(output))
        if report_dir is not None:
            check_report_dir(report_dir, Path(model_dir), settings.dataset)
        with doing("reading the dataset"):
            images = read_images_for(model_dir, settings, None if named else dataset)
        model, _, metadata = load_model_and_metadata(model_dir, **loading)
        items = match_items(images, settings, model.prompts, metadata)
        note("\n" + format_table(items.summary) + "\n")
        options = Options(batch_size, explain, show_progress, exhaustive, feature_cache)
        test = SavedModelTest(model, metadata, str(model_dir), items, settings, options)
        test.run(Team(), output)
        return test.results(metrics, report_dir)
