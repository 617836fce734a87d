"""Figures show what they should, and can be read back from their files."""

import importlib
import itertools
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vlm.report import figure_files, figures
from vlm.report.figure_files import describe, save_png, to_svg
from vlm.report.figures import (
    BLUE,
    LONGEST_NAME,
    accuracy_range,
    confusion_matrix,
    merged_bins,
    reliability_diagram,
    smooth,
    training_curves,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small images are drawn faster, and hold the same."""
    monkeypatch.setattr(figure_files, "DPI", 40)


def saved(figure, path):
    """The figure, laid out as it is when it is saved, which must give an image that is not empty."""
    save_png(figure, path)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and len(image.convert("L").getcolors()) > 2
    return figure


def entry(kind, step, **figures):
    return {"kind": kind, "step": step, "time": 0.0, "epoch": step / 10, **figures}


def history():
    entries = [entry("train", step, loss=3 / step, learning_rate=1e-4) for step in range(1, 41)]
    accuracies = {10: 0.5, 20: 0.9, 30: 0.9, 40: 0.8}
    return entries + [
        entry("validation", step, loss=4 / step, accuracy=accuracy) for step, accuracy in accuracies.items()
    ]


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_show_raw_and_smoothed_loss_and_mark_the_best_model(tmp_path):
    loss, accuracy = saved(training_curves(history(), best_step=30), tmp_path / "curves.png").axes
    assert texts(loss) == ["training", "training, smoothed", "validation", "best model"]
    assert texts(accuracy) == ["validation", "best: 0.900 at step 30"], "of two equal accuracies the one that was saved"
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (loss, accuracy))
    assert loss.get_yscale() == "log", "a loss that falls by a factor of 40 is not flat on the axis"
    named = [label.get_text() for label in loss.get_yticklabels(which="both") if label.get_text()]
    assert {"0.1", "0.2", "0.5", "1", "2"} <= set(named) and len(named) < 12, "plain numbers, and not too many"


def test_each_loss_has_axes_of_its_own_on_which_training_and_validation_are_the_same_quantity(tmp_path):
    entries = [entry("train", step, loss=3, response_loss=1, class_loss=2) for step in range(1, 9)]
    entries.append(entry("validation", 8, loss=0.3, response_loss=0.1, class_loss=0.2, accuracy=0.9))
    response, of_class, accuracy = saved(training_curves(entries), tmp_path / "curves.png").axes
    for axes, training, validation in ((response, 1, 0.1), (of_class, 2, 0.2)):
        curves = {line.get_label(): set(line.get_ydata()) for line in axes.lines}
        assert curves == {"training": {training}, "training, smoothed": {training}, "validation": {validation}}
    assert (response.get_title(), of_class.get_title()) == ("Response loss", "Class loss")
    assert accuracy.get_title() == "Accuracy"


def test_legends_cover_no_data(tmp_path):
    for axes in saved(training_curves(history()), tmp_path / "curves.png").axes:
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.slow
@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry("train", 1, loss=2.0)],
        [entry("validation", 5, loss=1.0, accuracy=0.5)],
        [entry("train", step, loss=1.0) for step in range(1, 9)],
        [
            entry("train", 1, loss=None),
            entry("train", 2, loss=float("nan")),
            entry("train", 3, loss=0.0),
            entry("validation", 3),
        ],
        [{"kind": "wandb", "step": 0, "id": "x"}, entry("test", 9, accuracy=1.0)],
    ],
    ids=["nothing", "one point", "validation only", "no validation", "nan", "other kinds"],
)
def test_curves_of_little_data_are_drawn_without_warnings(tmp_path, entries, recwarn):
    figure = saved(training_curves(entries), tmp_path / "curves.png")
    assert to_svg(figure, "curves", describe(figure))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.01], (0, 0.1)),
        ([1.0], (0.9, 1)),
        ([0.5], (0.45, 0.55)),
        ([0.97, 0.98], (0.9, 1)),
        ([0.2, 0.7], (0.17, 0.73)),
        ([0, 1], (0, 1)),
    ],
)
def test_the_axis_of_accuracies_is_no_magnifying_glass(values, ends):
    assert accuracy_range(np.array(values)) == pytest.approx(ends)
    figure = training_curves([entry("validation", i + 1, accuracy=value) for i, value in enumerate(values)])
    low, high = figure.axes[1].get_ylim()
    assert low <= ends[0] + 1e-9 and high >= ends[1] - 1e-9 and high - low <= 1.2 * (ends[1] - ends[0])


def test_smoothing_keeps_a_line_and_quiets_noise():
    line = np.arange(50, dtype=float)
    assert np.allclose(smooth(line), line), "the window stays in the middle: no lag"
    noise = np.random.default_rng(0).normal(size=600)
    assert smooth(noise)[30:-30].std() < 0.3 * noise.std()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 15, 40])
def test_confusion_matrices_have_counts_up_to_thirty_classes(tmp_path, classes):
    matrix = np.eye(classes, dtype=int) * 7
    matrix[0, 1] = 7
    figure = saved(confusion_matrix(matrix, [f"class {i}" for i in range(classes)]), tmp_path / "matrix.png")
    axes = figure.axes[0]
    counts = [text.get_text() for text in axes.texts]
    assert counts == (["7"] * (classes + 1) if classes <= 30 else [])
    assert axes.get_title(loc="left") == f"Accuracy {classes / (classes + 1):.3f} ({classes * 7} of {classes * 7 + 7})"
    shares = axes.images[0].get_array()
    assert shares[0, 0] == 0.5 and shares[1, 1] == 1.0
    right, wrong = (image.get_array().filled(-1) for image in axes.images)
    assert (right[0, 0], right[0, 1], wrong[0, 0], wrong[0, 1]) == (0.5, -1, -1, 0.5), "each in a color of its own"
    assert [scale.get_title() for scale in figure.axes[1:]] == ["right", "wrong"]
    blue, orange = (image.get_cmap()(1.0) for image in axes.images)
    assert blue[2] > blue[0] and orange[0] > orange[2]
    faint = axes.images[0].get_cmap()(0.0)[3]
    assert 0 < faint < 1, "a single image is seen, too"
    assert [patch.get_xy() for patch in axes.patches] == [(i - 0.5, i - 0.5) for i in range(classes)], (
        "the diagonal is marked"
    )
    assert (
        axes.xaxis.get_gridlines()
        and len(axes.get_xticks(minor=True)) == len(axes.get_yticks(minor=True)) == classes - 1
    )
    assert axes.get_ylabel() == "true class" and axes.get_xlabel() == "predicted class"


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 20, 40])
def test_names_on_the_axes_do_not_overlap(tmp_path, classes):
    names = [f"a very long name that ends in {i}" for i in range(classes)]
    axes = saved(confusion_matrix(np.eye(classes, dtype=int), names), tmp_path / "matrix.png").axes[0]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert len(set(shown)) == classes and max(map(len, shown)) <= LONGEST_NAME, "cut, but still different"
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(boxes[i].y0 >= boxes[i + 1].y1 for i in range(classes - 1))
    step = axes.transData.transform([[0, 0], [1, 0]])[:, 0]
    line_height = boxes[0].height
    turned = np.sin(np.radians(axes.get_xticklabels()[0].get_rotation()))
    assert (step[1] - step[0]) * turned >= line_height


def test_odd_names_and_empty_rows_are_drawn(tmp_path, recwarn):
    names = ["$x$ $", "金魚", "two\nlines <b>\udce9"]  # the last letter is of a file name that is no valid text
    figure = saved(confusion_matrix([[0, 0, 0], [3, 1, 0], [0, 0, 123456]], names), tmp_path / "matrix.png")
    assert "two lines &lt;b&gt;" in to_svg(figure, "matrix", "A matrix.")
    assert not recwarn.list


def test_of_very_many_classes_some_are_named():
    axes = confusion_matrix(np.eye(1000, dtype=int), [f"class {i}" for i in range(1000)]).axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == [f"class {i}" for i in range(0, 1000, 20)]


def test_a_figure_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    save_png(training_curves([]), path)
    old = path.read_bytes()
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_png(training_curves(history()), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_the_backend_of_a_notebook_is_left_alone(tmp_path, monkeypatch):
    """Whoever imports pyplot here fails."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for module in (figures, figure_files):
        importlib.reload(module)
    figure = training_curves(history())
    save_png(figure, tmp_path / "x.png")
    assert to_svg(figure, "curves", describe(figure))
    with pytest.raises(ImportError):
        importlib.import_module("matplotlib.pyplot")


def ids_of(svg):
    return [element.get("id") for element in ElementTree.fromstring(svg).iter() if element.get("id")]


def test_figures_share_no_id_on_a_page_and_find_their_own_parts():
    svgs = [to_svg(training_curves(history()), name, "A figure.") for name in ("first", "second")]
    ids = list(map(ids_of, svgs))
    assert all(ids) and len(set(itertools.chain(*ids))) == sum(map(len, ids))
    for svg, own in zip(svgs, ids, strict=True):
        used = re.findall(r"url\(#(.+?)\)", svg) + re.findall(r'href="#(.+?)"', svg)
        assert used and set(used) <= set(own)


@pytest.mark.slow
def test_an_svg_has_text_and_follows_the_colors_of_the_page():
    svg = to_svg(training_curves(history(), best_step=30), "curves", 'A "figure".')
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root.get("aria-label") == 'A "figure".' and root.get("viewBox")
    assert {"optimizer step", "training, smoothed"} <= {text.text for text in root.iter("text")}
    assert BLUE not in svg and "rgb(var(--blue))" in svg and "rgb(var(--orange))" in svg and "currentColor" in svg
    assert "<style" not in svg and "http" not in svg, (
        "nothing that would count for the whole page, or come from elsewhere"
    )


def test_the_svg_of_a_long_run_stays_small():
    steps = [entry("train", step, loss=1.0 + step % 7) for step in range(20_000)]
    assert len(to_svg(training_curves(steps), "curves", "A figure.")) < 300_000


def test_a_figure_is_described_by_its_legend():
    words = describe(training_curves(history(), best_step=30))
    assert "Loss, loss over optimizer step: training, from 3 to 0.075; training, smoothed, from" in words
    assert "validation, from 0.5 to 0.8; best: 0.900 at step 30." in words
    assert "best model." in words, "an upright line goes from nowhere to nowhere"
    assert "nothing." in describe(training_curves([]))


def test_what_was_not_calibrated_has_one_line_in_the_diagram():
    bins = dict.fromkeys(("before", "after"), [[0.9, 0.8, 10]])
    figure = reliability_diagram({"after": {"ece": [0.1, 0.05, 0.2]}, "reliability": bins})
    assert texts(figure.axes[0])[1:] == ["not calibrated: ECE 0.100 (0.050 to 0.200)"]


def test_bins_of_few_images_are_drawn_as_one_point():
    rows = np.array([[0.2, 0.0, 2], [0.4, 1.0, 2], [0.6, 0.5, 4], [0.9, 1.0, 1]])
    assert merged_bins(rows) == pytest.approx(np.array([[4.5 / 9, 5 / 9, 9]])), "the last one is too small for a point"
    many = np.array([[0.2, 0.3, 5], [0.8, 0.9, 6]])
    assert merged_bins(many) == pytest.approx(many)


@pytest.mark.parametrize(("lowest", "begin"), [(0.0, 0.0), (0.73, 0.7), (1.0, 0.9)])
def test_the_reliability_diagram_shows_every_bin_before_and_after(tmp_path, lowest, begin):
    bins = {"before": [[0.9, lowest, 10], [0.99, 1.0, 10]], "after": [[0.95, 1.0, 20]]}
    figures = {state: {"ece": [0.1, 0.05, 0.2]} for state in bins}
    axes = saved(reliability_diagram({**figures, "reliability": bins}), tmp_path / "reliability.png").axes[0]
    points = [collection.get_offsets().tolist() for collection in axes.collections]
    assert points == [[[0.9, lowest], [0.99, 1.0]], [[0.95, 1.0]]]
    blue = [color[2] > color[0] for color in (collection.get_facecolor()[0] for collection in axes.collections)]
    assert blue == [False, True], "orange before and blue after"
    assert axes.get_xlim() == axes.get_ylim() and begin - 0.05 < axes.get_xlim()[0] < begin < 1 < axes.get_xlim()[1]
    assert texts(axes)[1:] == [f"{state} calibration: ECE 0.100 (0.050 to 0.200)" for state in bins]
    assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
