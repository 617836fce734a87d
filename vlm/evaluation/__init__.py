"""What is measured of a classifier: metrics, calibration, and whether the image and the VLM are worth it.

evaluate.py scores a split; calibrating.py fits and stores the calibration; image_check.py and linear_probe.py compare
with other images and with a linear classifier; reliability.py has the figures and their intervals.
"""

from vlm.evaluation.calibrating import add_test_figures, calibrate, is_calibrated, method_of, missed_target
from vlm.evaluation.evaluate import (
    TEXTS,
    Parts,
    check_texts,
    evaluate_vlm_model,
    explanations,
    metrics_of_sums,
    score_parts,
    score_split,
    split_losses,
)
from vlm.evaluation.evidence import evidence_figures
from vlm.evaluation.head_fit import FittedHead, fit_head, image_vectors
from vlm.evaluation.image_check import IMAGES, check_images
from vlm.evaluation.label_issues import LabelIssue, find_label_issues, issues_table
from vlm.evaluation.linear_probe import compare, probe, probe_figures
from vlm.evaluation.metrics import classification_metrics, load_metric
from vlm.evaluation.reliability import LEVEL, accuracy_interval, confidence_and_correctness, reliability_figures

__all__ = [
    "FittedHead",
    "LabelIssue",
    "Parts",
    "IMAGES",
    "LEVEL",
    "TEXTS",
    "accuracy_interval",
    "add_test_figures",
    "calibrate",
    "check_images",
    "check_texts",
    "classification_metrics",
    "compare",
    "confidence_and_correctness",
    "evaluate_vlm_model",
    "evidence_figures",
    "explanations",
    "find_label_issues",
    "fit_head",
    "image_vectors",
    "is_calibrated",
    "issues_table",
    "load_metric",
    "method_of",
    "metrics_of_sums",
    "missed_target",
    "probe",
    "probe_figures",
    "reliability_figures",
    "score_parts",
    "score_split",
    "split_losses",
]
