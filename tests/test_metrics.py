"""Figures of merit against values worked out by hand, and the metrics of users."""

import json

import numpy as np
import pytest

from vlm.common.errors import RunError, UsageError
from vlm.evaluation.metrics import classification_metrics, load_metric, user_metrics

NAMES = ["a", "b", "absent"]
LABELS = [0, 0, 0, 1]
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])


def standard(**changes):
    return classification_metrics(
        **{"labels": LABELS, "log_probabilities": np.log(PROBABILITIES), "class_names": NAMES} | changes
    )


def test_figures_are_those_worked_out_by_hand():
    metrics = standard()
    assert metrics["accuracy"] == pytest.approx(3 / 4)
    assert metrics["per_class"]["a"] == pytest.approx({"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3})
    assert metrics["per_class"]["b"] == pytest.approx({"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1})
    assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 0) / 3)
    assert metrics["weighted_f1"] == pytest.approx((3 * 0.8 + 2 / 3) / 4)
    assert metrics["confusion_matrix"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert metrics["nll"] == pytest.approx(-np.log([0.7, 0.6, 0.2, 0.8]).mean())
    assert metrics["samples"] == 4


def test_a_class_without_samples_is_there_with_zeros_and_no_warning(recwarn):
    assert standard()["per_class"]["absent"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert not recwarn.list


def test_metrics_are_json_also_with_a_probability_of_zero():
    with np.errstate(divide="ignore"):
        metrics = standard(log_probabilities=np.log(np.eye(3)[[0, 0, 1, 1]], dtype=np.float32))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["nll"] == pytest.approx(25.0), "one in four has probability 0, which counts as exp(-100)"


def test_nan_is_an_error_and_no_class():
    broken = np.log(PROBABILITIES)
    broken[1, 2] = np.nan
    with pytest.raises(RunError, match="1 of 4 images"):
        standard(log_probabilities=broken)


@pytest.mark.parametrize(
    "changes", [{"labels": [0, 1]}, {"class_names": ["a", "b"]}, {"labels": [], "log_probabilities": np.zeros((0, 3))}]
)
def test_sizes_that_do_not_go_together_are_refused(changes):
    with pytest.raises(ValueError, match="do not fit"):
        standard(**changes)


@pytest.fixture
def metric_file(tmp_path):
    path = tmp_path / "my_metrics.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Pair:\n    x: 'int'\n"
        "def top2(labels, predictions, probabilities, class_names):\n"
        "    order = probabilities.argsort(axis=1)[:, -2:]\n"
        "    return (order == labels[:, None]).any(axis=1).mean()\n"
        "number = 3\n"
    )
    return path


def run(*metrics):
    return user_metrics(metrics, np.array(LABELS), PROBABILITIES.argmax(1), PROBABILITIES, NAMES)


def test_a_metric_from_a_file_is_called_with_arrays(metric_file):
    assert run(load_metric(f"{metric_file}:top2")) == {"top2": 1.0}


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("FILE", "expected FILE.py:FUNCTION"),
        ("FILE:", "expected FILE.py:FUNCTION"),
        (":top2", "expected FILE.py:FUNCTION"),
        ("FILE:missing", "no function missing"),
        ("FILE:number", "no function number"),
        ("nowhere.py:top2", "no Python file nowhere.py"),
    ],
)
def test_a_wrong_specification_says_what_was_expected(metric_file, specification, message):
    with pytest.raises(UsageError, match=message):
        load_metric(specification.replace("FILE", str(metric_file)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise ValueError('\\n'.join(map(str, range(50))))", "ValueError: 0$"),
    ],
)
def test_a_file_that_does_not_run_is_a_usage_error_of_one_line(tmp_path, content, message):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_metric(f"{tmp_path / 'bad.py'}:f")
    assert "\n" not in str(caught.value)


def test_numbers_and_dicts_of_numbers_become_floats():
    def several(*_):
        return {"one": np.float32(1), "two": 2, 3: np.array(3.0), "undefined": np.nan}

    def whole(*_):
        return np.int64(7)

    results = run(several, whole)
    assert results == {"several": {"one": 1.0, "two": 2.0, "3": 3.0, "undefined": None}, "whole": 7.0}
    json.dumps(results, allow_nan=False)


def test_a_metric_that_fails_or_gives_no_number_is_null_with_a_note_and_the_others_go_on(capsys):
    def failing(*_):
        raise KeyError("oops")

    def leaving(*_):
        raise SystemExit

    def text(*_):
        return "0.5"

    def array(*_):
        return np.ones(2)

    def infinite(*_):
        return float("inf")

    def nothing(*_):
        return None

    def endless(*_):
        raise ValueError("\n".join(map(str, range(50))))

    def huge(*_):
        return 10**400

    def hostile(*_):
        class Value:
            def __str__(self):
                raise RuntimeError("no text")

        return Value()

    def fine(*_):
        return 1

    wrong = (failing, leaving, text, array, infinite, nothing, endless, huge, hostile)
    assert run(*wrong, fine) == {metric.__name__: None for metric in wrong} | {"fine": 1.0}
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == len(wrong) and all(
        f"metric {metric.__name__} " in note for metric, note in zip(wrong, notes, strict=True)
    )
    assert "KeyError" in notes[0] and "'oops'" in notes[0] and "0.5 (str)" in notes[2]
    assert notes[6].endswith("ValueError: 0") and "OverflowError" in notes[7]


def test_two_metrics_of_one_name_are_both_there():
    def first(*_):
        return 1

    def second(*_):
        return 2

    second.__name__ = "first"
    assert run(first, second, first) == {"first": 1.0, "first_2": 2.0, "first_3": 1.0}


def test_a_metric_cannot_change_the_data_of_the_next_one():
    def spoil(labels, predictions, probabilities, class_names):
        labels[:], probabilities[:] = 9, 0
        class_names.clear()
        return 0

    def check(labels, predictions, probabilities, class_names):
        return int(labels.tolist() == LABELS and np.array_equal(probabilities, PROBABILITIES) and class_names == NAMES)

    assert run(spoil, check)["check"] == 1.0
