"""A run, shown to people: the figures, the page report.html, and the tables at the end of a run. And data.html.

All of a run's is a function of what stands in `results.json`, the images and the predictions. The page data.html needs
only the images, and no torch: the names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from vlm.common import lazy_names

if TYPE_CHECKING:
    from vlm.report.cards import MOST_SHOWN, Prediction, confident_mistakes, image_address, shown_images
    from vlm.report.data_page import DataContent, is_data_page, write_data_page
    from vlm.report.folds_page import COLUMNS, fold_rows, write_folds_report
    from vlm.report.notebook import figures_of, result_html
    from vlm.report.page import time_to_draw, write_report
    from vlm.report.summary import NEW, ended_early, per_class_table, summary_rows, warnings_of
    from vlm.report.templates import render

__all__ = [
    "COLUMNS",
    "MOST_SHOWN",
    "NEW",
    "DataContent",
    "Prediction",
    "confident_mistakes",
    "ended_early",
    "figures_of",
    "fold_rows",
    "image_address",
    "is_data_page",
    "per_class_table",
    "render",
    "result_html",
    "shown_images",
    "summary_rows",
    "time_to_draw",
    "warnings_of",
    "write_data_page",
    "write_folds_report",
    "write_report",
]

__getattr__ = lazy_names(
    __name__,
    {
        ".cards": ("MOST_SHOWN", "Prediction", "confident_mistakes", "image_address", "shown_images"),
        ".data_page": ("DataContent", "is_data_page", "write_data_page"),
        ".notebook": ("figures_of", "result_html"),
        ".folds_page": ("COLUMNS", "fold_rows", "write_folds_report"),
        ".page": ("time_to_draw", "write_report"),
        ".summary": ("NEW", "ended_early", "per_class_table", "summary_rows", "warnings_of"),
        ".templates": ("render",),
    },
)
