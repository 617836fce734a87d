"""Images can be read back and show what they should; tables are aligned."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.common.tables import format_table
from vlm.evaluation.metrics import classification_metrics
from vlm.report import figures as report
from vlm.report.figures import confusion_matrix, per_class_table, reliability_diagram, training_curves


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small images are drawn faster, and hold the same."""
    monkeypatch.setattr(report, "DPI", 40)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look at what is in them."""
    figures = []
    save = report._save
    monkeypatch.setattr(report, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def is_image(path):
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and len(image.convert("L").getcolors()) > 2


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


def test_curves_show_raw_and_smoothed_loss_and_mark_the_best_model(tmp_path, drawn):
    training_curves(history(), tmp_path / "curves.png", best_step=30)
    assert is_image(tmp_path / "curves.png")
    loss, accuracy = drawn[0].axes
    assert texts(loss) == ["training", "training, smoothed", "validation", "best model"]
    assert texts(accuracy) == ["validation", "best: 0.900 at step 30"], "of two equal accuracies the one that was saved"
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (loss, accuracy))
    assert loss.get_yscale() == "log", "a loss that falls by a factor of 40 is not flat on the axis"


def test_legends_cover_no_data(tmp_path, drawn):
    training_curves(history(), tmp_path / "curves.png")
    for axes in drawn[0].axes:
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


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
    training_curves(entries, tmp_path / "curves.png")
    assert is_image(tmp_path / "curves.png")
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
def test_the_axis_of_accuracies_is_no_magnifying_glass(tmp_path, drawn, values, ends):
    assert report.accuracy_range(np.array(values)) == pytest.approx(ends)
    training_curves(
        [entry("validation", i + 1, accuracy=value) for i, value in enumerate(values)], tmp_path / "curves.png"
    )
    low, high = drawn[0].axes[1].get_ylim()
    assert low <= ends[0] + 1e-9 and high >= ends[1] - 1e-9 and high - low <= 1.2 * (ends[1] - ends[0])


def test_smoothing_keeps_a_line_and_quiets_noise():
    line = np.arange(50, dtype=float)
    assert np.allclose(report.smooth(line), line), "the window stays in the middle: no lag"
    noise = np.random.default_rng(0).normal(size=600)
    assert report.smooth(noise)[30:-30].std() < 0.3 * noise.std()


@pytest.mark.parametrize("classes", [2, 15, 40])
def test_confusion_matrices_have_counts_up_to_thirty_classes(tmp_path, drawn, classes):
    matrix = np.eye(classes, dtype=int) * 7
    matrix[0, 1] = 7
    confusion_matrix(matrix, [f"class {i}" for i in range(classes)], tmp_path / "matrix.png")
    assert is_image(tmp_path / "matrix.png")
    axes = drawn[0].axes[0]
    counts = [text.get_text() for text in axes.texts]
    assert counts == (["7"] * (classes + 1) if classes <= 30 else [])
    assert axes.get_title() == f"Accuracy {classes / (classes + 1):.3f} ({classes * 7} of {classes * 7 + 7})"
    shares = axes.images[0].get_array()
    assert shares[0, 0] == 0.5 and shares[1, 1] == 1.0
    right, wrong = (image.get_array().filled(-1) for image in axes.images)
    assert (right[0, 0], right[0, 1], wrong[0, 0], wrong[0, 1]) == (0.5, -1, -1, 0.5), "each in a color of its own"
    assert axes.images[0].get_cmap().name != axes.images[1].get_cmap().name
    assert [patch.get_xy() for patch in axes.patches] == [(i - 0.5, i - 0.5) for i in range(classes)], (
        "the diagonal is marked"
    )
    assert (
        axes.xaxis.get_gridlines()
        and len(axes.get_xticks(minor=True)) == len(axes.get_yticks(minor=True)) == classes - 1
    )
    assert axes.get_ylabel() == "true class" and axes.get_xlabel() == "predicted class"


@pytest.mark.parametrize("classes", [2, 20, 40])
def test_names_on_the_axes_do_not_overlap(tmp_path, drawn, classes):
    names = [f"a very long name that ends in {i}" for i in range(classes)]
    confusion_matrix(np.eye(classes, dtype=int), names, tmp_path / "matrix.png")
    axes = drawn[0].axes[0]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert len(set(shown)) == classes and max(map(len, shown)) <= report.LONGEST_NAME, "cut, but still different"
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(boxes[i].y0 >= boxes[i + 1].y1 for i in range(classes - 1))
    step = axes.transData.transform([[0, 0], [1, 0]])[:, 0]
    line_height = boxes[0].height
    turned = np.sin(np.radians(axes.get_xticklabels()[0].get_rotation()))
    assert (step[1] - step[0]) * turned >= line_height


def test_odd_names_and_empty_rows_are_drawn(tmp_path, recwarn):
    confusion_matrix([[0, 0, 0], [3, 1, 0], [0, 0, 123456]], ["$x$ $", "金魚", "two\nlines"], tmp_path / "matrix.png")
    assert is_image(tmp_path / "matrix.png")
    assert not recwarn.list


def test_a_image_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    training_curves([], path)
    old = path.read_bytes()
    monkeypatch.setattr(report.FigureCanvasAgg, "print_figure", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training_curves(history(), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_the_backend_of_a_notebook_is_left_alone(tmp_path):
    draw = f"report.training_curves([], {str(tmp_path / 'x.png')!r})"
    code = f"import sys; from vlm.report import figures as report; {draw}; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(report.__file__).parents[2],
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_tables_align_numbers_right_and_text_left():
    table = format_table([("cat", 1, 0.5), ("catfish", 1000, None)], ("class", "n", "share"))
    assert table.splitlines() == [
        "class       n  share",
        "-------  ----  -----",
        "cat         1  0.500",
        "catfish  1000",
    ]


def test_tables_without_headers_or_rows_and_with_wide_or_control_characters():
    assert format_table([("dataset", "digits"), ("images", 1797)]) == "dataset  digits\nimages   1797"
    assert format_table([], ("a", "b")) == "a  b\n-  -"
    assert format_table([]) == ""
    assert format_table([("金魚", "x"), ("goldfish", "a\nb\x1b[31m")]) == "金魚      x\ngoldfish  a b [31m"


def test_per_class_table_has_every_class_and_the_averages():
    metrics = classification_metrics(
        [0, 0, 1, 1], np.log([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]), ["cat", "dog"]
    )
    lines = per_class_table(metrics).splitlines()
    assert lines[0].split() == ["class", "precision", "recall", "F1", "images"]
    assert lines[2].split() == ["cat", "0.667", "1.000", "0.800", "2"]
    assert lines[3].split() == ["dog", "1.000", "0.500", "0.667", "2"]
    assert [line.split()[-2:] for line in lines[4:]] == [["0.733", "4"], ["0.733", "4"], ["0.750", "4"]]
    assert len({len(line) for line in lines}) == 1


def test_what_was_not_calibrated_has_one_line_in_the_diagram(tmp_path, drawn):
    bins = dict.fromkeys(("before", "after"), [[0.9, 0.8, 10]])
    reliability_diagram({"after": {"ece": [0.1, 0.05, 0.2]}, "reliability": bins}, tmp_path / "reliability.png")
    assert texts(drawn[0].axes[0])[1:] == ["not calibrated: ECE 0.100 (0.050 to 0.200)"]


@pytest.mark.parametrize(("lowest", "begin"), [(0.0, 0.0), (0.73, 0.7), (1.0, 0.9)])
def test_the_reliability_diagram_shows_every_bin_before_and_after(tmp_path, drawn, lowest, begin):
    bins = {"before": [[0.9, lowest, 10], [0.99, 1.0, 10]], "after": [[0.95, 1.0, 20]]}
    figures = {state: {"ece": [0.1, 0.05, 0.2]} for state in bins}
    reliability_diagram({**figures, "reliability": bins}, tmp_path / "reliability.png")
    assert is_image(tmp_path / "reliability.png")
    axes = drawn[0].axes[0]
    points = [collection.get_offsets().tolist() for collection in axes.collections]
    assert points == [[[0.9, lowest], [0.99, 1.0]], [[0.95, 1.0]]]
    blue = [color[2] > color[0] for color in (collection.get_facecolor()[0] for collection in axes.collections)]
    assert blue == [False, True], "orange before and blue after, as on the page"
    assert axes.get_xlim() == axes.get_ylim() and begin - 0.05 < axes.get_xlim()[0] < begin < 1 < axes.get_xlim()[1]
    assert texts(axes)[1:] == [f"{state} calibration: ECE 0.100 (0.050 to 0.200)" for state in bins]
    assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
