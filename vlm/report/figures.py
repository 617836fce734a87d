"""Images and tables for people: training curves, confusion matrix, reliability diagram, aligned text tables.

Figures are drawn by matplotlib's object interface, so that the backend of a notebook stays as it is.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from vlm.common.files import replacing
from vlm.common.tables import format_table, printable, text_width

DPI = 150
SMOOTHING = 15  # the smoothed training loss is the mean over about 1/15 of the run
RANGE_FOR_LOG_SCALE = 30  # largest / smallest loss; above, all after the first steps would lie flat on the axis
LEAST_RANGE = 0.1  # of an axis of accuracies; in a smaller one noise would look like a trend
MOST_CLASSES_WITH_COUNTS = 30  # above, a count in each cell could not be read
MOST_TICK_LABELS = 100
LONGEST_NAME = 24  # characters, on the axes of the confusion matrix
TRAIN_COLOR, VALIDATION_COLOR, BEST_COLOR = "tab:blue", "tab:orange", "tab:red"
BEFORE_COLOR, AFTER_COLOR = "tab:orange", "tab:blue"  # calibration, as on the page


def training_curves(history: Sequence[dict[str, Any]], path: str | Path, best_step: int | None = None) -> None:
    """Draw loss and accuracy over the optimizer steps, as a PNG.

    Args:
        history: entries of `log.jsonl`: kind "train" with step and loss, kind "validation" with step, loss and
            accuracy. Other kinds, and figures that are missing, null or NaN, are left out.
        path: the PNG; replaced if there.
        best_step: the step of the best model, which is marked.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2, sharex=True)
    steps, accuracy = series(history, "validation", "accuracy")
    if len(accuracy):
        low, high = accuracy_range(accuracy)
        edge = 0.03 * (high - low)  # a mark at 0 or 1 is seen whole
        accuracy_axes.set_ylim(low - edge, high + edge)
    _draw_loss(loss_axes, history)
    _draw_points(accuracy_axes, steps, accuracy, VALIDATION_COLOR, "validation")
    if best_step in steps:
        best = accuracy[list(steps).index(best_step)]
        accuracy_axes.plot(
            best_step, best, "*", color=BEST_COLOR, markersize=13, label=f"best: {best:.3f} at step {best_step}"
        )
        loss_axes.axvline(best_step, color=BEST_COLOR, linestyle=":", label="best model")
    for axes, title, unit in ((loss_axes, "Loss", "loss"), (accuracy_axes, "Accuracy", "share of correct predictions")):
        _finish(axes, title, unit)
    _save(figure, path)


def _draw_loss(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    steps, loss = series(history, "train", "loss")
    smoothed = smooth(loss)
    if len(loss) > 2:
        axes.plot(steps, loss, color=TRAIN_COLOR, alpha=0.3, linewidth=1, label="training")
        axes.plot(steps, smoothed, color=TRAIN_COLOR, linewidth=2, label="training, smoothed")
    else:
        _draw_points(axes, steps, loss, TRAIN_COLOR, "training")
    validation_steps, validation_loss = series(history, "validation", "loss")
    _draw_points(axes, validation_steps, validation_loss, VALIDATION_COLOR, "validation")
    shown = np.concatenate([smoothed, validation_loss])
    if wants_log_scale(loss, shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def wants_log_scale(loss: np.ndarray, shown: np.ndarray) -> bool:
    """Whether the losses that are `shown` span so much that most of them would lie flat; `loss`: the raw ones, all
    above 0."""
    positive = len(shown) > 0 and loss.min(initial=np.inf) > 0 and shown.min() > 0
    return bool(positive and shown.max() / shown.min() > RANGE_FOR_LOG_SCALE)


def series(history: Sequence[dict[str, Any]], kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one figure."""
    pairs = [
        (entry["step"], entry[name]) for entry in history if entry.get("kind") == kind and entry.get(name) is not None
    ]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def accuracy_range(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis for (N,) accuracies: some room around them, at least a tenth wide, within 0 and 1."""
    low, high = float(values.min()), float(values.max())
    room = max(0.06 * (high - low), (LEAST_RANGE - (high - low)) / 2)
    low, high = low - room, high + room
    shift = max(0.0, -low) - max(0.0, high - 1)
    return max(0.0, low + shift), min(1.0, high + shift)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each value; the window is smaller at the ends, so that it stays in the middle and does
    not lag."""
    here = np.arange(len(values))
    reach = np.minimum(np.minimum(here, here[::-1]), math.ceil(len(values) / SMOOTHING / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[here + reach + 1] - sums[here - reach]) / (2 * reach + 1)


def _draw_points(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    if len(values):
        axes.plot(steps, values, color=color, marker="o", markersize=4, label=label)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="optimizer step", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False
        )  # below, where it covers nothing
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was measured", ha="center", va="center", color="gray", transform=axes.transAxes)


def confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str], path: str | Path) -> None:
    """Draw a confusion matrix as a PNG: the color is the share of the true class, blue where right and orange where
    wrong. Up to 30 classes each cell has its count.

    Args:
        matrix: C rows of C counts; rows are the true classes, columns the predicted ones.
        class_names: C names; long ones are cut, and above 100 classes only some are shown.
        path: the PNG; replaced if there.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    classes = len(class_names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = float(np.clip(10 / classes, 0.16, 0.6))  # inches
    side = float(np.clip(cell * classes, 3, 16))
    points = side / classes * 72  # size of a cell in typographic points
    # The matrix fills the figure; what stands around it is added when the figure is saved with a tight box.
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    right = np.eye(classes, dtype=bool)
    for i, (hidden, colors, kind) in enumerate(((~right, "Blues", "right"), (right, "Oranges", "wrong"))):
        image = axes.imshow(
            np.ma.masked_array(shares, hidden | (counts == 0)), cmap=colors, vmin=-0.1, vmax=1
        )  # a single image is seen
        bar = figure.colorbar(image, cax=figure.add_axes((1 + (0.2 + 0.3 * i) / side, 0, 0.2 / side, 1)))
        bar.ax.set_ylim(0, 1)
        bar.ax.set_title(kind, fontsize=8, rotation=45, ha="left", va="bottom")
        bar.ax.yaxis.set_tick_params(labelright=kind == "wrong")
    bar.set_label("share of the true class")
    _draw_grid(axes, classes, points)
    _name_classes(axes, class_names, points)
    if classes <= MOST_CLASSES_WITH_COUNTS:
        digits = len(str(counts.max(initial=0)))
        font = float(np.clip(min(0.5 * points, 1.3 * points / digits), 4, 14))
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=font)
    correct, total = int(counts.trace()), int(counts.sum())
    axes.set_title(f"Accuracy {correct / max(total, 1):.3f} ({correct:,} of {total:,})")
    axes.set(xlabel="predicted class", ylabel="true class")
    _save(figure, path)


def _draw_grid(axes: Axes, classes: int, points: float) -> None:
    """Lines between the cells, thinner where these are small and none where they are tiny, and a frame around each one
    on the diagonal."""
    if classes <= MOST_TICK_LABELS:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(np.arange(0.5, classes - 1), minor=True)
        axes.grid(which="minor", color="lightgray", linewidth=min(0.8, points / 20))
        axes.tick_params(which="minor", length=0)
    for i in range(classes):
        axes.add_patch(
            Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="tab:blue", linewidth=min(1.2, points / 12))
        )


def _name_classes(axes: Axes, class_names: Sequence[str], points: float) -> None:
    shown = range(0, len(class_names), math.ceil(len(class_names) / MOST_TICK_LABELS))
    names = [_shorten(printable(class_names[i])) for i in shown]
    font = float(np.clip(0.62 * points, 5, 10))
    fits = max(map(text_width, names)) * 0.65 * font < points
    turned = (
        {} if fits else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if points > 20 else {"rotation": 90}
    )
    # parse_math=False: a class name with dollar signs is no formula
    axes.set_yticks(list(shown), names, fontsize=font, parse_math=False)
    axes.set_xticks(list(shown), names, fontsize=font, parse_math=False, **turned)


def reliability_diagram(calibration: dict[str, Any], path: str | Path) -> None:
    """Draw accuracy over confidence before and after the calibration, if any, as a PNG; in an honest model the points
    lie on the diagonal.

    Each point is one bin, its area the bin's share of the images: bins of equal mass have equal ones. Both axes begin
    below the lowest point, since those of a good model crowd at the top.

    Args:
        calibration: as in results.json: before and after, each with ece [value, low, high], and reliability, for each
            the list of [mean confidence, accuracy, images].
        path: the PNG; replaced if there.
    """
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    axes = figure.subplots()
    points = np.concatenate([np.array(bins, dtype=float)[:, :2] for bins in calibration["reliability"].values()])
    start = math.floor(10 * min(points.min(), 0.9)) / 10
    limits = (start - 0.03 * (1 - start), 1 + 0.03 * (1 - start))
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1, label="as right as it is sure")
    looks = {"before": (BEFORE_COLOR, "s"), "after": (AFTER_COLOR, "o")}
    for state, name in reliability_states(calibration["reliability"]):
        color, marker = looks[state]
        confidence, accuracy, count = np.array(calibration["reliability"][state], dtype=float).T
        value, low, high = calibration[state]["ece"]
        label = f"{name}: ECE {value:.3f} ({low:.3f} to {high:.3f})"
        axes.plot(confidence, accuracy, color=color, alpha=0.5, linewidth=1)
        axes.scatter(
            confidence,
            accuracy,
            s=600 * count / count.sum(),
            color=color,
            marker=marker,
            alpha=0.8,
            label=label,
            zorder=3,
        )
    axes.set(title="Reliability", xlabel="confidence", ylabel="share of correct predictions")
    axes.set(xlim=limits, ylim=limits)
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=1, frameon=False)
    _save(figure, path)


def reliability_states(reliability: dict[str, Any]) -> list[tuple[str, str]]:
    """Key and name of each line of a reliability diagram: two, or one where the calibration changed nothing."""
    if reliability.get("before") == reliability.get("after"):
        return [("after", "not calibrated")]
    return [("before", "before calibration"), ("after", "after calibration")]


def _shorten(name: str) -> str:
    """Cut in the middle, since long names often differ at the end."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME * 2 // 3 - 1]}…{name[-LONGEST_NAME // 3 :]}"


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as beside, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # a name in a script that the font lacks is drawn as boxes
        FigureCanvasAgg(figure).print_figure(beside, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)


def probed_encoder(encoder: str | None) -> str:
    """In words, which vision encoder the probe was fitted on; `encoder` as `probe` in results.json has it."""
    known = {
        "frozen": "the same vision encoder, which is frozen",
        "before the training": "the vision encoder as it was before the training",
        "random weights": "the vision encoder before the training (random weights)",
    }
    return known.get(encoder, "the vision encoder")


def per_class_table(metrics: dict[str, Any]) -> str:
    """The table of what `classification_metrics` gives: one line a class, then the averages of F1 and the accuracy."""
    rows: list[tuple[Any, ...]] = [
        (name, figures["precision"], figures["recall"], figures["f1"], figures["support"])
        for name, figures in metrics["per_class"].items()
    ]
    rows.append(("macro average", None, None, metrics["macro_f1"], metrics["samples"]))
    rows.append(("weighted average", None, None, metrics["weighted_f1"], metrics["samples"]))
    rows.append(("accuracy", None, metrics["accuracy"], None, metrics["samples"]))
    return format_table(rows, ("class", "precision", "recall", "F1", "images"))
