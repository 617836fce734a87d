"""From a model folder to predictions.

model_folder.py writes and reads the folder, which holds all that inference needs. classifying.py takes items and gives
results, which predictor.py offers to Python, job.py writes, and testing.py compares with labels.
The names are imported when they are first used: the command line is read before torch is imported.
"""

from typing import TYPE_CHECKING

from vlm.common import lazy_names

if TYPE_CHECKING:
    from vlm.inference.arguments import build_parser, check_arguments, check_push_arguments
    from vlm.inference.batch_predictor import BatchPredictor
    from vlm.inference.classifying import NOT_FINITE, Options, Outcome, classify_items, image_result, settings_of
    from vlm.inference.evaluating import evaluate
    from vlm.inference.items import Files, Item, Items
    from vlm.inference.job import Job, about_rows, check_all_read, run_job, show_table
    from vlm.inference.labeled import LABEL, match_items, read_images_for
    from vlm.inference.model_folder import read_metadata, save_model_folder, trained_with, update_metadata
    from vlm.inference.predictor import (
        load_model_and_metadata,
        predict_batch,
        predict_each,
        predict_single_image,
    )
    from vlm.inference.tested import Tested
    from vlm.inference.testing import SavedModelTest, print_results
    from vlm.inference.writing import PredictionFile, PredictionTable, check_replaceable

__all__ = [
    "LABEL",
    "NOT_FINITE",
    "BatchPredictor",
    "Files",
    "Item",
    "Items",
    "Job",
    "Options",
    "Outcome",
    "PredictionFile",
    "PredictionTable",
    "SavedModelTest",
    "Tested",
    "about_rows",
    "build_parser",
    "check_all_read",
    "check_arguments",
    "check_push_arguments",
    "check_replaceable",
    "classify_items",
    "evaluate",
    "image_result",
    "load_model_and_metadata",
    "match_items",
    "predict_batch",
    "predict_each",
    "predict_single_image",
    "print_results",
    "read_images_for",
    "read_metadata",
    "run_job",
    "save_model_folder",
    "settings_of",
    "show_table",
    "trained_with",
    "update_metadata",
]

__getattr__ = lazy_names(
    __name__,
    {
        ".arguments": ("build_parser", "check_arguments", "check_push_arguments"),
        ".batch_predictor": ("BatchPredictor",),
        ".classifying": ("NOT_FINITE", "Options", "Outcome", "classify_items", "image_result", "settings_of"),
        ".evaluating": ("evaluate",),
        ".items": ("Files", "Item", "Items"),
        ".job": ("Job", "about_rows", "check_all_read", "run_job", "show_table"),
        ".labeled": ("LABEL", "match_items", "read_images_for"),
        ".model_folder": ("read_metadata", "save_model_folder", "trained_with", "update_metadata"),
        ".predictor": (
            "load_model_and_metadata",
            "predict_batch",
            "predict_each",
            "predict_single_image",
        ),
        ".tested": ("Tested",),
        ".testing": ("SavedModelTest", "print_results"),
        ".writing": ("PredictionFile", "PredictionTable", "check_replaceable"),
    },
)
