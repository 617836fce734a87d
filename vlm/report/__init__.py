"""A run, shown to people: the figures, the page report.html, and the tables at the end of a run.

All of it is a function of what stands in `results.json`, the images and the predictions.
"""

from vlm.report.cards import Prediction, shown_images
from vlm.report.page import write_report
from vlm.report.summary import per_class_table, summary_rows, warnings_of

__all__ = ["Prediction", "per_class_table", "shown_images", "summary_rows", "warnings_of", "write_report"]
