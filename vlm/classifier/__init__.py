"""The one forward pass, and the loss, class probabilities and texts that come out of it.

`VLMClassifier` (classifier.py) runs a model in one of two ways (shared.py, plain.py); label_tree.py and search.py score
all classes, and reasoning.py puts reading, scoring and writing together.
"""

from vlm.classifier.batching import IGNORED, Batch, batch_without_image, vlm_collate_fn
from vlm.classifier.calibration import Calibration, key_of
from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.head import Head, features, read_head
from vlm.classifier.objective import Objective, balanced_weights, usual_objective
from vlm.classifier.reasoning import classify, explain, names_class, write_freely
from vlm.classifier.search import LOGITS_AT_ONCE, NODES_AT_ONCE, NODES_KEPT, TOLERANCE

__all__ = [
    "IGNORED",
    "LOGITS_AT_ONCE",
    "NODES_AT_ONCE",
    "NODES_KEPT",
    "TOLERANCE",
    "Batch",
    "Calibration",
    "Head",
    "Objective",
    "VLMClassifier",
    "balanced_weights",
    "batch_without_image",
    "classify",
    "explain",
    "features",
    "key_of",
    "names_class",
    "read_head",
    "usual_objective",
    "vlm_collate_fn",
    "write_freely",
]
