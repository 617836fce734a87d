"""Which labels may be wrong: those that the head, which has not seen them, finds less probable than another class.

N = images, C = classes.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.data import Split

COLUMNS = ("image", "split", "label", "suggested", "margin", "clear")


@dataclass(frozen=True)
class LabelIssue:
    """An image whose label may be wrong.

    Attributes:
        role: its split. position: its place there. label, suggested: classes.
        margin: how much more probable the suggested class is, 0 to 1.
        clear: the suggested class is at least as probable as it is, on average, for images with that label.
    """

    role: str
    position: int
    label: int
    suggested: int
    margin: float
    clear: bool


def find_label_issues(judged: Mapping[str, tuple[Sequence[int], Sequence[int], np.ndarray]]) -> list[LabelIssue]:
    """The labels that may be wrong, the largest margin first.

    What is clear is decided by the thresholds of confident learning (Northcutt et al. 2021, Journal of Artificial
    Intelligence Research 70, section 3.1): the mean probability of a class over the images labeled with it.

    Args:
        judged: for each split the positions of N images, their labels, and (N, C) probabilities by a fit that has not
            seen them.
    """
    labels = np.concatenate([np.asarray(of_split[1], dtype=int) for of_split in judged.values()])
    probabilities = np.concatenate([of_split[2] for of_split in judged.values()])
    places = [(role, position) for role, (positions, _, _) in judged.items() for position in positions]
    rows = np.arange(len(labels))
    own = probabilities[rows, labels]
    others = probabilities.copy()
    others[rows, labels] = -np.inf
    suggested = others.argmax(1)
    margins = others.max(1) - own
    means = {c: own[labels == c].mean() for c in set(labels.tolist())}
    clear = [means.get(c, np.inf) <= others[i, c] for i, c in enumerate(suggested.tolist())]
    found = [
        LabelIssue(*places[i], int(labels[i]), int(suggested[i]), float(margins[i]), bool(clear[i]))
        for i in np.flatnonzero(margins > 0)
    ]
    return sorted(found, key=lambda issue: -issue.margin)


def issues_table(issues: Sequence[LabelIssue], splits: Mapping[str, Split], class_names: Sequence[str]) -> str:
    """The issues as CSV, with a line of headings; `--exclude` reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for issue in issues:
        name = splits[issue.role].names[issue.position]
        classes = class_names[issue.label], class_names[issue.suggested]
        writer.writerow([name, issue.role, *classes, f"{issue.margin:.4f}", "yes" if issue.clear else "no"])
    return text.getvalue()
