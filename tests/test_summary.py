"""The final table says in words what stands in results.json, and nothing that was not measured."""

import numpy as np
import pytest

from vlm.evaluation.metrics import classification_metrics
from vlm.report import per_class_table, summary_rows, warnings_of


def results_of(**changes):
    """The results of a run that never was."""
    before = {"accuracy": [0.1, 0.05, 0.2], "ece": [0.02, 0.01, 0.04], "nll": [0.5, 0.4, 0.6]}
    calibration = {"temperature": 1.5, "bias": None, "score": "sum", "scores": {}, "before": before}
    calibration |= {"after": before | {"ece": [0.012, 0.01, 0.03]}} | changes.pop("calibration", {})
    test = {"accuracy": 0.1, "macro_f1": 0.08, "weighted_f1": 0.09, "calibration": calibration} | changes.pop(
        "test", {}
    )
    check = {"accuracy": 0.109, "shuffled": 0.031, "gray": 0.062, "chance": 0.0625, "pictures": 64, "warning": None}
    texts = {"texts": 32, "agree_with_prediction": 30, "invalid": 1, "reasoning_names_answer": None}
    return {
        "test": test,
        "texts": texts | changes.pop("texts", {}),
        "picture_check": check | changes.pop("picture_check", {}),
        "probe": None,
        "validation": {"accuracy": 0.2, "step": 40},
        "pictures": {"test": 200},
        "timings": {"train_seconds": 35.9, "train_pictures_per_second": 11.16},
        "settings": {"epochs": 3},
    } | changes


def table_of(**changes):
    return dict(summary_rows(results_of(**changes)))


def test_figures_are_told_apart_by_words():
    table = table_of()
    assert table["test accuracy"] == "0.1000  (95% interval 0.0500 to 0.2000, 200 images)"
    assert (
        table["accuracy with other images"]
        == "0.031 exchanged, 0.062 gray, chance 0.062  (64 images, 0.109 with their own)"
    )
    assert table["texts written freely"] == "30 of 32 answer with the predicted class, 1 with no class at all"
    assert table["training"] == "35.9 s, 11.16 images/s"
    assert (
        not {"abstaining", "reasonings", "score of a class", "accuracy of the probe", "test accuracy before training"}
        & table.keys()
    )
    assert "exchanged" not in table_of(picture_check={"shuffled": None})["accuracy with other images"]
    assert table_of(texts={"reasoning_names_answer": 20})["reasonings"].startswith("20 of 32 ")
    assert table_of(settings={"epochs": 0})["training"] == "none (--epochs 0)"


@pytest.mark.parametrize(
    ("encoder", "words"), [("frozen", "the same vision encoder"), ("random weights", "(random weights)")]
)
def test_the_probe_names_its_encoder(encoder, words):
    assert words in table_of(probe={"accuracy": [0.7, 0.6, 0.8], "tower": encoder})["accuracy of the probe"]


def test_own_metrics_are_the_last_and_have_four_digits():
    rows = summary_rows(
        results_of(test={"own_metrics": {"balanced": 1 / 3, "parts": {"a": 0.25, "n": 7}, "failed": None}})
    )
    assert rows[-3:] == [("balanced", "0.3333"), ("parts", "a 0.2500, n 7"), ("failed", "None")]


def test_what_was_not_calibrated_has_no_before():
    table = table_of(calibration={"temperature": 1.0})
    assert table["calibration"] == "none" and "before" not in table["ECE on test"] + table["NLL on test"]
    assert (
        "before the calibration 0.0200" in table_of()["ECE on test"]
        and table_of()["calibration"] == "temperature 1.500, fitted on validation"
    )
    for change in ({"bias": [0.1, -0.1]}, {"score": "prior"}):
        assert table_of(calibration={"temperature": 1.0} | change)["calibration"].endswith("fitted on validation")


@pytest.mark.parametrize(
    ("after", "words"), [(0.012, None), (0.03, "no clear change"), (0.05, "so it is worse on test")]
)
def test_an_error_that_grew_is_called_so(after, words):
    figures = {"accuracy": [0.1, 0, 1], "ece": [after, after - 0.015, 0.1], "nll": [0.5, 0.4, 0.6]}
    line = table_of(calibration={"after": figures})["ECE on test"]
    assert "0 at best); before the calibration 0.0" in line
    assert (words in line) if words else ("change" not in line and "worse" not in line)


def test_abstaining_is_a_sentence():
    nothing = {"below": 0.9, "target_precision": None, "validation": {"coverage": 0.0, "accuracy": None}}
    some = nothing | {"test": {"coverage": 0.25, "accuracy": 0.5}}
    answers = "answers 0.0% of the validation images, 25.0% of the test images (50.0% of them right)"
    expected = f"below a confidence of 0.9000; {answers}"
    assert table_of(test={"abstention": some})["abstaining"] == expected


def test_a_precision_that_no_threshold_reaches_is_told():
    missed = {"below": None, "target_precision": 0.95, "validation": None, "test": None}
    words = "no confidence was found from which 95% of the predictions on validation are right"
    assert table_of(test={"abstention": missed})["abstaining"] == f"{words}: the model answers every image"


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


def test_the_table_of_a_thousand_classes_has_those_with_the_lowest_f1():
    names = [f"c{i}" for i in range(1000)]
    labels = np.arange(990)  # the last ten classes have no image
    metrics = classification_metrics(labels, np.eye(1000)[np.where(labels % 100, labels, labels + 1)], names)
    lines = per_class_table(metrics).splitlines()
    assert len(lines) < 120 and lines[2].split()[0] == "c0" and lines[2].split()[3] == "0.000"
    more = next(line for line in lines if "more classes" in line)
    assert more.split() == ["900", "more", "classes", "(results.json)", "890"]
    assert lines[-1].split()[-1] == "990"


def test_the_untrained_model_is_compared_without_calibration():
    zero_shot = {"accuracy": 0.05}
    assert table_of(zero_shot=zero_shot)["test accuracy before training"] == "0.0500", "a temperature changes no class"
    for calibration in ({"bias": [0.1]}, {"score": "prior"}):
        row = table_of(zero_shot=zero_shot, calibration=calibration)["test accuracy before training"]
        assert row == "0.0500 (not calibrated; the trained model without calibration: 0.1000)"


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ({}, "0.2000  (step 40, the best)"),
        ({"bias": [0.1]}, "0.2000  (step 40, the best; not calibrated)"),
        (
            {
                "score": "prior",
                "scores": {"prior": {"accuracy": 0.25, "nll": 1.0}, "sum": {"accuracy": 0.2, "nll": 2.0}},
            },
            "0.2000  (step 40, the best; 0.2500 with the score prior)",
        ),
        (
            {"bias": [0.1], "scores": {"sum": {"accuracy": 0.3, "nll": 2.0}}},
            "0.2000  (step 40, the best; 0.3000 with the bias of each class)",
        ),
    ],
)
def test_the_validation_accuracy_with_the_calibration_is_said_if_it_can_differ(calibration, said):
    assert table_of(calibration=calibration)["validation accuracy"] == said


def test_warnings_are_those_of_the_checks():
    assert warnings_of(results_of()) == []
    probe = {"accuracy": [0.7, 0.6, 0.8], "tower": "frozen", "warning": "the probe is ahead"}
    assert warnings_of(results_of(probe=probe, picture_check={"warning": "the image"})) == [
        "the probe is ahead",
        "the image",
    ]


@pytest.mark.parametrize(
    ("count", "others", "said"),
    [
        (
            5,
            {"pictures": 195, "accuracy": [0.75, 0.6, 0.8]},
            "5 of 200 test images are in train, too (accuracy on the 195 others 0.7500): keep each in one split only.",
        ),
        (
            199,
            {"pictures": 1, "accuracy": [1.0, 0.2, 1.0]},
            "199 of 200 test images are in train, too (accuracy on the other one 1.0000): keep each in one split only.",
        ),
        (
            200,
            {"pictures": 0, "accuracy": None},
            "200 of 200 test images are in train, too (all): keep each in one split only.",
        ),
    ],
)
def test_test_images_that_were_trained_on_are_the_last_warning(count, others, said):
    results = results_of(overlap={"test_in_train": count}, test={"not_in_train": others})
    assert warnings_of(results | {"probe": {"warning": "the probe is ahead"}}) == ["the probe is ahead", said]


def test_the_accuracy_on_images_that_are_not_in_train_stands_next_to_that_on_all():
    others = {"pictures": 195, "accuracy": [0.75, 0.6, 0.8]}
    rows = summary_rows(results_of(overlap={"test_in_train": 5}, test={"not_in_train": others}))
    assert [name for name, _ in rows[:2]] == ["test accuracy", "test accuracy, images not in train"]
    assert rows[1][1] == "0.7500  (0.6000 to 0.8000, 195 images; 5 of 200 test images are in train)"
    none = {"pictures": 0, "accuracy": None}
    table = table_of(overlap={"test_in_train": 200}, test={"not_in_train": none})
    assert table["test accuracy, images not in train"] == "unknown: 200 of 200 test images are in train"
    assert "test accuracy, images not in train" not in table_of(overlap={"test_in_train": 0})
