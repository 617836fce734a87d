"""The labels of a run that may be wrong: its head judges all images, each by a fit that has not seen it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vlm.common import replacing
from vlm.data import ROLES, Data
from vlm.evaluation import FittedHead, LabelIssue, find_label_issues, issues_table


@dataclass(frozen=True)
class LabelIssues:
    """found: the issues, the largest margin first. judged: how many images were looked at."""

    found: list[LabelIssue]
    judged: int

    def to_json(self) -> dict[str, Any]:
        """What `results.json` says about them."""
        clear = sum(issue.clear for issue in self.found)
        return {"label_issues": {"judged": self.judged, "listed": len(self.found), "clear": clear}}

    def write(self, file: Path, data: Data) -> None:
        """Write them as CSV. Raises WriteError: the file cannot be written."""
        splits = {role: getattr(data, role) for role in ROLES}
        with replacing(file) as new:
            table = issues_table(self.found, splits, data.class_names)
            new.write_text(table, encoding="utf-8", errors="backslashreplace")


def label_issues(
    data: Data, fitted: FittedHead | None, validation: Tensor | None, test: Tensor | None
) -> LabelIssues | None:
    """Labels that may be wrong, in all splits; None without a head.

    Args:
        data: without unreadable images. fitted: the head. validation, test: (N, C) its logits.
    """
    if fitted is None or validation is None or test is None:
        return None
    known = ~np.isnan(fitted.held_out).any(1)
    positions = np.array(fitted.positions)[known].tolist()
    labels = [data.train.labels[i] for i in positions]
    judged = {
        "train": (positions, labels, fitted.held_out[known]),
        "validation": (range(len(data.validation)), data.validation.labels, validation.softmax(1).numpy()),
        "test": (range(len(data.test)), data.test.labels, test.softmax(1).numpy()),
    }
    return LabelIssues(find_label_issues(judged), sum(len(positions) for positions, _, _ in judged.values()))
