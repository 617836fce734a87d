"""From a model folder to predictions.

model_folder.py writes and reads the folder, which holds all that inference needs; classifying.py takes items
(items.py) and gives results, which predictor.py offers to Python and writing.py writes.
"""

from vlm.inference.classifying import Options, classify_items, image_result
from vlm.inference.items import Item
from vlm.inference.model_folder import save_model_folder, update_metadata
from vlm.inference.predictor import (
    load_model_and_metadata,
    predict_batch,
    predict_each,
    predict_single_image,
)
from vlm.inference.writing import PredictionFile, PredictionTable, check_replaceable

__all__ = [
    "Item",
    "Options",
    "PredictionFile",
    "PredictionTable",
    "check_replaceable",
    "classify_items",
    "image_result",
    "load_model_and_metadata",
    "predict_batch",
    "predict_each",
    "predict_single_image",
    "save_model_folder",
    "update_metadata",
]
