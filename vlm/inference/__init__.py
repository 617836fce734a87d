"""From a model folder to predictions.

model_folder.py writes and reads the folder, which holds all that inference needs; predictor.py loads it and classifies
images one by one or in batches; writing.py writes the predictions.
"""

from vlm.inference.model_folder import save_model_folder, update_metadata
from vlm.inference.predictor import (
    image_result,
    load_model_and_metadata,
    predict_batch,
    predict_each,
    predict_single_image,
)
from vlm.inference.writing import PredictionFile, PredictionTable, check_replaceable

__all__ = [
    "PredictionFile",
    "PredictionTable",
    "check_replaceable",
    "image_result",
    "load_model_and_metadata",
    "predict_batch",
    "predict_each",
    "predict_single_image",
    "save_model_folder",
    "update_metadata",
]
