"""The figures of a run: training curves, confusion matrix and reliability diagram.

Each is drawn once, as a matplotlib `Figure`. `figure_files.py` saves it as a PNG and as SVG.
Figures are drawn without pyplot, so that the backend of a notebook stays as it is.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from vlm.common import printable, shorten, text_width

SMOOTHING = 15  # the smoothed training loss is the mean over about 1/15 of the run
RANGE_FOR_LOG_SCALE = 30  # largest / smallest loss; above, all after the first steps would lie flat on the axis
RANGE_FOR_DECADES = 3000  # largest / smallest loss; above, ticks at 2 and 5 would be too many
LEAST_RANGE = 0.1  # of an axis of accuracies; in a smaller one noise would look like a trend
MOST_CLASSES_WITH_COUNTS = 30  # above, a count in each cell could not be read
MOST_NAMED_CLASSES = 100  # on the axes of the confusion matrix
NAMES_OF_MORE_CLASSES = 50  # above, so many are named, about
LONGEST_NAME = 24  # characters, on the axes of the confusion matrix
FAINTEST = 0.2  # opacity of a cell; a single image is seen, too
LEAST_OF_A_POINT = 5  # images of a point of the reliability diagram
STRONG = 0.85  # share of the true class; on the color of a larger one white is easier to read than black

# Title and unit of each loss; logs of earlier versions have only their sum, as `loss`.
LOSSES = {"response_loss": ("Response loss", "nats a token"), "class_loss": ("Class loss", "nats an image")}
INK, BLUE, ORANGE, RED, GRAY = "#1b1f24", "#2b6cc4", "#c45816", "#d62728", "#808890"
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "path.simplify_threshold": 0.5,  # pixels; a long run has thousands of points
    "image.composite_image": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vlm",  # the same ids in every run
}


def draw(results: dict[str, Any], class_names: Sequence[str]) -> dict[str, Figure]:
    """Draw all figures of a run.

    Args:
        results: what stands in `results.json`.
        class_names: C names, in the order of the confusion matrix.

    Returns:
        The figures by name; a PNG has the name of its figure. Of a model that was only tested there are no curves.
    """
    trained = "history" in results
    return {
        **({"training_curves": training_curves(results["history"], results["validation"]["step"])} if trained else {}),
        "confusion_matrix": confusion_matrix(results["test"]["confusion_matrix"], class_names),
        "reliability": reliability_diagram(results["test"]["calibration"]),
    }


@rc_context(STYLE)
def training_curves(history: Sequence[dict[str, Any]], best_step: int | None = None) -> Figure:
    """Draw each loss that is trained, and the accuracy, over the optimizer steps.

    Args:
        history: entries of `log.jsonl`: kind "train" with step and losses, kind "validation" with step, losses and
            accuracy. Other kinds, and values that are missing, null or NaN, are left out.
        best_step: the step of the best model, which is marked.
    """
    losses = [name for name in LOSSES if any(name in entry for entry in history)] or ["loss"]
    figure = Figure(figsize=(5.5 * (len(losses) + 1), 4.8), layout="constrained")
    *loss_axes, accuracy_axes = figure.subplots(1, len(losses) + 1, sharex=True)
    steps, accuracy = series(history, "validation", "accuracy")
    if len(accuracy):
        low, high = accuracy_range(accuracy)
        edge = 0.03 * (high - low)  # a mark at 0 or 1 is seen whole
        accuracy_axes.set_ylim(low - edge, high + edge)
    for axes, name in zip(loss_axes, losses, strict=True):
        _draw_loss(axes, history, name)
    _draw_points(accuracy_axes, steps, accuracy, ORANGE, "validation")
    if best_step in steps:
        best = accuracy[list(steps).index(best_step)]
        label = f"best: {best:.3f} at step {best_step}"
        accuracy_axes.plot(best_step, best, "*", color=RED, markersize=13, label=label)
        for axes in loss_axes:
            axes.axvline(best_step, color=RED, linestyle=":", label="best model")
    for axes, name in zip(loss_axes, losses, strict=True):
        _finish(axes, *LOSSES.get(name, ("Loss", "loss")))
    _finish(accuracy_axes, "Accuracy", "share of correct predictions")
    return figure


def _draw_loss(axes: Axes, history: Sequence[dict[str, Any]], name: str) -> None:
    steps, loss = series(history, "train", name)
    smoothed = smooth(loss)
    if len(loss) > 2:
        axes.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=1, label="training")
        axes.plot(steps, smoothed, color=BLUE, linewidth=2, label="training, smoothed")
    else:
        _draw_points(axes, steps, loss, BLUE, "training")
    validation_steps, validation_loss = series(history, "validation", name)
    _draw_points(axes, validation_steps, validation_loss, ORANGE, "validation")
    shown = np.concatenate([smoothed, validation_loss])
    positive = len(shown) > 0 and loss.min(initial=np.inf) > 0 and shown.min() > 0
    if positive and (span := shown.max() / shown.min()) > RANGE_FOR_LOG_SCALE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < RANGE_FOR_DECADES else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def series(history: Sequence[dict[str, Any]], kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and values (n,) of one measure of the history, as far as they are finite."""
    measured = [(entry["step"], entry.get(name)) for entry in history if entry.get("kind") == kind]
    pairs = [(step, value) for step, value in measured if value is not None and math.isfinite(value)]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def accuracy_range(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis for (n,) accuracies: some room around them, at least a tenth wide, within 0 and 1."""
    low, high = float(values.min()), float(values.max())
    room = max(0.06 * (high - low), (LEAST_RANGE - (high - low)) / 2)
    low, high = low - room, high + room
    shift = max(0.0, -low) - max(0.0, high - 1)
    return max(0.0, low + shift), min(1.0, high + shift)


def smooth(values: np.ndarray) -> np.ndarray:
    """(n,) -> (n,): mean over a window around each value. The window is smaller at the ends, so that it stays in the
    middle and does not lag."""
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
    axes.grid(color=INK, alpha=0.15)
    if axes.lines:  # the legend is below the axes, where it covers nothing
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was measured", ha="center", va="center", transform=axes.transAxes)


@rc_context(STYLE)
def confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix: the color is the share of the true class, blue if right and orange if wrong. Up to 30
    classes each cell has its count.

    Args:
        matrix: C rows of C counts; rows are the true classes, columns the predicted ones.
        class_names: C names; long ones are cut, and above 100 classes only some are shown.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    classes = len(class_names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(np.clip(7 / classes, 0.16, 0.5) * classes, 2.5, 12))  # inches
    points = side / classes * 72  # size of a cell in typographic points
    # The matrix fills the figure. What stands around it is added when the figure is saved with a tight box.
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    right = np.eye(classes, dtype=bool)
    for kind, color, hidden, left in (("right", BLUE, ~right, 0.2), ("wrong", ORANGE, right, 0.5)):
        shades = LinearSegmentedColormap.from_list(kind, [(*to_rgb(color), FAINTEST), (*to_rgb(color), 1.0)])
        cells = np.ma.masked_array(shares, hidden | (counts == 0))
        axes.imshow(cells, cmap=shades, vmin=0, vmax=1, interpolation="none")
        _draw_scale(figure.add_axes((1 + left / side, 0, 0.2 / side, 1)), kind, shades)
    _draw_grid(axes, classes, points)
    _name_classes(axes, class_names, points)
    if classes <= MOST_CLASSES_WITH_COUNTS:
        _write_counts(axes, counts, shares > STRONG, points)
    correct, total = int(counts.trace()), int(counts.sum())
    # On a phone only the left part of a wide matrix is seen.
    axes.set_title(f"Accuracy {correct / max(total, 1):.3f} ({correct:,} of {total:,})", loc="left")
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def _draw_scale(axes: Axes, kind: str, shades: LinearSegmentedColormap) -> None:
    """What the shades of one color mean; the scale at the right has the numbers of both."""
    axes.imshow(np.linspace(0, 1, 256)[:, None], cmap=shades, origin="lower", extent=(0, 1, 0, 1), aspect="auto")
    axes.set_title(kind, fontsize=8, rotation=45, ha="left", va="bottom")
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    if kind == "right":
        axes.set_yticks([])
    else:
        axes.set_ylabel("share of the true class")


def _draw_grid(axes: Axes, classes: int, points: float) -> None:
    """Lines between the cells, and a frame around each cell on the diagonal; neither if the cells are tiny."""
    if classes > MOST_NAMED_CLASSES:
        return
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.arange(0.5, classes - 1), minor=True)
    axes.grid(which="minor", color=INK, alpha=0.15, linewidth=min(0.8, points / 20))
    axes.tick_params(which="minor", length=0)
    for i in range(classes):
        width = min(1.2, points / 12)
        frame = Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=BLUE, linewidth=width)
        axes.add_patch(frame).set(zorder=2.6, clip_on=False)  # above the lines next to it


def _name_classes(axes: Axes, class_names: Sequence[str], points: float) -> None:
    every = names_every(len(class_names))
    shown, points = range(0, len(class_names), every), points * every
    names = [shorten(printable(class_names[i]), LONGEST_NAME) for i in shown]
    font = float(np.clip(0.62 * points, 5, 10))
    turned: dict[str, Any] = {}
    if max(map(text_width, names)) * 0.65 * font >= points:
        slanted = {"rotation": 45, "va": "top"} if points > 20 else {"rotation": 90, "va": "center"}
        turned = {"ha": "right", "rotation_mode": "anchor", **slanted}
    # parse_math=False: a class name with dollar signs is no formula
    axes.set_yticks(list(shown), names, fontsize=font, parse_math=False)
    axes.set_xticks(list(shown), names, fontsize=font, parse_math=False, **turned)


def names_every(classes: int) -> int:
    """Every how many classes one is named on the axes of the confusion matrix."""
    return 1 if classes <= MOST_NAMED_CLASSES else math.ceil(classes / NAMES_OF_MORE_CLASSES)


def _write_counts(axes: Axes, counts: np.ndarray, strong: np.ndarray, points: float) -> None:
    digits = len(str(counts.max(initial=0)))
    font = float(np.clip(min(0.5 * points, 1.3 * points / digits), 4, 14))
    for row, column in np.argwhere(counts):
        color = "white" if strong[row, column] else INK
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=font)


@rc_context(STYLE)
def reliability_diagram(calibration: dict[str, Any]) -> Figure:
    """Draw accuracy over confidence before and after the calibration, if any. If the probabilities are right, the
    points lie on the diagonal.

    Each point is one bin, and its area is the bin's share of the images. Both axes begin below the lowest point, since
    the points of a good model crowd at the top.

    Args:
        calibration: as in `results.json`: before and after, each with ece [value, low, high], and reliability, for
            each the list of [mean confidence, accuracy, images].
    """
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    axes = figure.subplots()
    bins = {state: merged_bins(np.array(rows, dtype=float)) for state, rows in calibration["reliability"].items()}
    lowest = min(float(rows[:, :2].min()) for rows in bins.values())
    start = math.floor(10 * min(lowest, 0.9)) / 10
    limits = (start - 0.03 * (1 - start), 1 + 0.03 * (1 - start))
    axes.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1, label="as right as it is sure")
    looks = [("before", "before calibration", ORANGE, "s"), ("after", "after calibration", BLUE, "o")]
    if np.array_equal(bins["before"], bins["after"]):
        looks = [("after", "not calibrated", BLUE, "o")]
    for state, name, color, marker in looks:
        confidence, accuracy, images = bins[state].T
        value, low, high = calibration[state]["ece"]
        label = f"{name}: ECE {value:.3f} ({low:.3f} to {high:.3f})"
        area = 600 * images / images.sum()
        axes.plot(confidence, accuracy, color=color, alpha=0.5, linewidth=1)
        axes.scatter(confidence, accuracy, s=area, color=color, marker=marker, alpha=0.8, label=label, zorder=3)
    axes.set(title="Reliability", xlabel="confidence", ylabel="share of correct predictions")
    axes.set(xlim=limits, ylim=limits)
    axes.set_aspect("equal")
    axes.grid(color=INK, alpha=0.15)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=1)
    return figure


def merged_bins(bins: np.ndarray) -> np.ndarray:
    """(n, 3) mean confidence, accuracy and images of each bin -> fewer bins of at least `LEAST_OF_A_POINT` images each,
    unless there are fewer images in all: the accuracy on one or two images is 0 or 1 by chance."""
    merged: list[np.ndarray] = []
    for row in bins:
        if merged and merged[-1][2] < LEAST_OF_A_POINT:
            merged[-1] = _together(merged[-1], row)
        else:
            merged.append(row)
    if len(merged) > 1 and merged[-1][2] < LEAST_OF_A_POINT:
        merged[-2:] = [_together(*merged[-2:])]
    return np.array(merged)


def _together(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    images = first[2] + second[2]
    return np.array([*((first[:2] * first[2] + second[:2] * second[2]) / images), images])
