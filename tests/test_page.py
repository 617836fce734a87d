"""The page is well-formed, shows every part that is there, and holds nothing from elsewhere, whatever the names are."""

import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny import random_image

from vlm.common import shorten
from vlm.data import Data, Rows, Split
from vlm.data.splits import NearPair
from vlm.evaluation.metrics import classification_metrics
from vlm.report import Prediction, page, shown_images, write_report
from vlm.report.cards import MOST_IMAGES, MOST_PAIRS
from vlm.report.content import MOST_ROWS, MOST_SAMPLES, Content
from vlm.report.figures import draw
from vlm.report.page import render_page
from vlm.report.used_settings import used_settings

EVIL = "<b>&\"'</td><script src=http://x.example>{{ 7 * 7 }}"
NAMES = ["cat", EVIL, "猫"]
SECTIONS = [
    "comparison",
    "confusion",
    "mistakes",
    "uncertain",
    "classes",
    "metrics",
    "reliability",
    "curves",
    "data",
    "settings",
]
VOID = {"img", "meta"}  # elements that have no end tag
CSS = Path(page.__file__).with_name("page.css").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements with their attributes, texts by section; every end tag must close the element that is open."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source = source
        self.open, self.elements, self.texts, self.text_of = [], [], [], {}
        self.section = "top"
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.texts.append(text)
            self.text_of[self.section] = " ".join(f"{self.text_of.get(self.section, '')} {text}".split())

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def sections(self):
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def split(labels, images=7):
    few = [random_image(i, 200, 150) for i in range(images)]
    names = [f"folder <i>/{i}.jpg" for i in range(len(labels))]
    return Split(Rows([few[i % images] for i in range(len(labels))], labels, names), range(len(labels)), labels)


def run_of(names=NAMES, each=4, seed=0, strength=2.0):
    """Results, data and predictions of a run that never was."""
    rng = np.random.default_rng(seed)
    labels = [i % len(names) for i in range(each * len(names))]
    scores = rng.normal(size=(len(labels), len(names)))
    scores[np.arange(len(labels)), labels] += strength
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    summary, source = [("dataset", EVIL)], {"dataset": EVIL}
    data = Data(split(labels), split(labels), split(labels), list(names), edge=8, summary=summary, source=source)
    predictions = [Prediction(*row) for row in zip(data.test.names, labels, np.exp(scores), strict=True)]
    for i in shown_images(predictions):
        predictions[i].text = f"Reasoning: I see {EVIL}\nAnswer: {names[predictions[i].predicted]}"
    return results_of(classification_metrics(labels, scores, names)), data, predictions


def results_of(test):
    """What results.json holds of a run with these metrics."""
    accuracy = test["accuracy"]
    figures = {"nll": [0.61, 0.5, 0.7], "brier": [0.31, 0.2, 0.4], "ece": [0.11, 0.1, 0.2]}
    figures["accuracy"] = [accuracy, accuracy - 0.04, accuracy + 0.03]
    bins = {"before": [[0.4, 0.5, 6], [0.9, 0.8, 6]], "after": [[0.5, 0.5, 6], [0.8, 0.8, 6]]}
    calibration = {
        "temperature": 1.75,
        "bias": None,
        "score": "prior",
        "scores": {"sum": {"nll": 0.4321}, "prior": {"nll": 0.4123}, "other": {"nll": None}},
        "before": figures,
        "after": figures | {"ece": [0.021, 0.01, 0.03]},
        "reliability": bins,
    }
    own = {"top two": 0.875, "failed": None, "parts": {"a": 0.625}}
    history = [{"kind": "train", "step": s, "loss": 9 / s} for s in range(1, 90)]
    history += [{"kind": "train", "step": 90, "loss": math.nan}]
    history += [{"kind": "validation", "step": s, "loss": 9 / s, "accuracy": 1 - 1 / s} for s in (30, 60, 90)]
    check = {"accuracy": accuracy, "shuffled": 0.31, "gray": 0.32, "chance": 0.33, "pictures": 12, "warning": None}
    return {
        "test": test | {"calibration": calibration, "loss": 0.123456, "own_metrics": own},
        "picture_check": check,
        "probe": {"accuracy": [0.765, 0.7, 0.8], "tower": "frozen", "warning": None},
        "zero_shot": {"accuracy": 0.234},
        "texts": {"texts": 12, "invalid": 1, "agree_with_prediction": 10, "reasoning_names_answer": 9},
        "validation": {"accuracy": 0.99, "loss": 0.1, "step": 60},
        "history": history,
        "settings": {"task_description": EVIL, "model": "some/model", "epochs": 3, "seed": 0, "resume": False},
        "device": {"type": "cpu", "dtype": "float32"},
        "image_size": None,
        "timings": {"train_seconds": 12.5, "train_pictures_per_second": None},
        "versions": {"torch": "2"},
    }


def page_of(results, data, predictions, drawn=False):
    """The page; with its figures if they are drawn."""
    blank = {name: Figure(figsize=(1, 1)) for name in ("training_curves", "confusion_matrix", "reliability")}
    figures = draw(results, data.class_names) if drawn else blank
    return Page(render_page(Content(results, data, predictions), figures))


def test_every_part_is_there():
    page = page_of(*run_of())
    assert page.sections == SECTIONS
    said = (
        "prior, the log-probability of its response minus that without an image. NLL on validation of each, calibrated:"
    )
    assert f"Score of a class: {said} sum 0.4321, prior 0.4123." in page.text
    for text in ("76.5%", "23.4%", "31.0%", "70.0% to 80.0%", "some/model"):
        assert text in page.text, text
    for text in ("0.0210", "0.0100 to 0.0300", "0.1100", "1.750", "0.8750", "parts a", "0.6250", "0.1235", "0.9900"):
        assert text in page.text_of["metrics"], text
    assert "train seconds 12.5" in page.text_of["settings"] and "torch 2" in page.text_of["settings"]
    assert {name for name in NAMES if name in page.text} == set(NAMES)
    links = {attributes["href"] for attributes in page.all("a")}
    assert links == {f"#{name}" for name in page.sections}


@pytest.mark.slow
def test_a_report_is_the_page_and_an_image_of_each_figure(tmp_path):
    results, data, predictions = run_of(["a", "b"])
    predictions[0].name = "caf\udce9.png"  # a file name that is not valid text
    write_report(tmp_path, results, data, predictions)
    names = {"report.html", "training_curves.png", "confusion_matrix.png", "reliability.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).sections == SECTIONS


def test_what_was_not_measured_is_left_out():
    results, data, predictions = run_of()
    check = results["picture_check"] | {"shuffled": None, "gray": None}
    results |= {"picture_check": check, "probe": None, "history": []}
    results["texts"] |= {"reasoning_names_answer": None}
    results.pop("zero_shot")
    page = page_of(results, data, predictions)
    assert page.sections == [name for name in SECTIONS if name not in ("comparison", "curves")]
    assert "the reasoning of" not in page.text and "name no class." in page.text
    assert "nan" not in page.text.lower() and "None" not in page.text


def test_test_images_that_are_in_train_are_a_warning_with_the_accuracy_on_the_others():
    results, data, predictions = run_of()
    results |= {"overlap": {"test_in_train": 5}, "pictures": {"test": 12}}
    results["test"]["not_in_train"] = {"pictures": 7, "accuracy": [0.571, 0.25, 0.84]}
    page = page_of(results, data, predictions)
    assert "This model, new images 7 that are not in train 57.1% 25.0% to 84.0%" in page.text_of["comparison"]
    assert "5 of 12 test images are in train" in page.text_of["top"]


def test_near_duplicates_are_shown_side_by_side():
    results, data, predictions = run_of()
    data.near = [NearPair("test", 2, "train", i, 3) for i in range(MOST_PAIRS + 1)]
    page = page_of(results, data, predictions)
    assert page.sections == [*SECTIONS[:-1], "near", SECTIONS[-1]]
    shown = page.text_of["near"]
    assert f"{MOST_PAIRS} of {MOST_PAIRS + 1} images that look almost like one in another split" in shown
    assert "test: 猫 folder <i>/2.jpg train: cat folder <i>/0.jpg" in shown
    alone = page_of(*run_of())
    assert len(page.all("img")) == len(alone.all("img")) + 2 * MOST_PAIRS


def test_nothing_is_loaded_from_elsewhere_and_no_name_becomes_markup():
    page = page_of(*run_of(), drawn=True)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
        assert attributes.get("href", "#").startswith("data:image/" if tag == "image" else "#"), tag
    assert page.source.count("url(") == page.source.count("url(#") and "@import" not in page.source
    rest = page.source.replace("http://x.example", "")
    assert EVIL not in page.source and "{{ 7 * 7 }}" in page.source, "a name is no template"
    assert rest.count("http") == 1, "only the http-equiv of the policy"
    assert "default-src 'none'" in next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_every_image_has_a_text_for_those_who_cannot_see_it():
    page = page_of(*run_of(), drawn=True)
    assert page.all("img") and all(image["alt"] for image in page.all("img"))
    figures = page.all("svg")
    assert len(figures) == 3 and all(figure["aria-label"] and figure["role"] == "img" for figure in figures)


def test_mistakes_and_uncertain_images_are_chosen_and_explained():
    results, data, predictions = run_of(each=60, strength=1.0)
    wrong = [p for p in predictions if p.predicted != p.label]
    assert len(wrong) > MOST_IMAGES
    shown = [predictions[i] for i in shown_images(predictions)]
    mistakes, uncertain = shown[:MOST_IMAGES], shown[MOST_IMAGES:]
    assert [p.confidence for p in mistakes] == sorted((p.confidence for p in wrong), reverse=True)[:MOST_IMAGES]
    left = sorted(p.confidence for p in predictions if not any(p is m for m in mistakes))
    assert [p.confidence for p in uncertain] == left[:MOST_IMAGES]
    page = page_of(results, data, predictions)
    assert len(page.all("article")) == 2 * MOST_IMAGES
    for p in shown:
        assert " ".join(p.text.split()) in page.text and f"{p.confidence:.3f}" in page.text and p.name in page.text
    assert f"{MOST_IMAGES} of {len(wrong)} mistakes" in page.text


def test_a_truth_that_is_not_among_the_best_three_is_shown_too():
    results, data, predictions = run_of(["a", "b", "c", "d", "e"])
    predictions[0].probabilities = np.array([0.0125, 0.5, 0.3, 0.1375, 0.05])
    card = next(card for card in Content(results, data, predictions).mistakes if card.name == predictions[0].name)
    expected = [("b", 0.5, False), ("c", 0.3, False), ("d", 0.1375, False), ("a", 0.0125, True)]
    assert card.probabilities == expected


def test_two_classes_and_few_images_and_no_mistake():
    results, data, predictions = run_of(["a", "b"], each=1, strength=50.0)
    results["test"]["calibration"]["after"]["accuracy"] = [1.0, 0.34, 1.0]
    page = page_of(results, data, predictions)
    assert "no mistake" in page.text and "2 test images are few" in page.text
    assert "not clearly above" in page.text, "two of two right is no proof"


@pytest.mark.parametrize("part", ["probe", "picture_check"])
def test_warnings_are_given_if_they_are_due(part):
    results, data, predictions = run_of(each=100)
    assert not [a for a in page_of(results, data, predictions).all("ul") if a.get("class") == "warnings"]
    results[part]["warning"] = "it is blind."
    page = page_of(results, data, predictions)
    assert len([a for a in page.all("ul") if a.get("class") == "warnings"]) == 1 and "It is blind." in page.text


@pytest.mark.slow
@pytest.mark.parametrize("classes", [31, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_classes_give_a_page_of_bounded_size_that_says_what_it_leaves_out(classes):
    names = [f"{i} {'long ' * 90}{i}" for i in range(classes)]
    results, data, predictions = run_of(names, each=2)
    results["history"] = [{"kind": "train", "step": s, "loss": 1.0 + s % 7} for s in range(20_000)]
    page = page_of(results, data, predictions, drawn=True)
    assert len(page.source) < 2_000_000
    assert len(page.all("img")) <= 2 * MOST_IMAGES + MOST_SAMPLES
    assert (f"{MOST_ROWS} of {classes:,} classes" in page.text) == (classes > MOST_ROWS)
    assert (f"{MOST_SAMPLES} of {classes:,} classes" in page.text) == (classes > MOST_SAMPLES)
    assert ("One in 20 is named." in page.text) == (classes == 1000)
    assert names[0] not in page.text and shorten(names[0], 40) in page.text


def verdict_of(counts):
    """The top of the page of a run with this confusion matrix."""
    names = [f"color {i}" for i in range(len(counts))]
    results, data, predictions = run_of(names, each=1)
    results["test"]["confusion_matrix"] = counts
    return page_of(results, data, predictions).text_of["top"]


def test_the_headline_names_what_a_collapsed_model_answers():
    always = np.zeros((100, 100), int)
    always[:, 57] = 1
    collapsed = verdict_of(always)
    assert "The model answers color 57 for 100 of 100 images." in collapsed
    assert "No mistake was made twice" not in collapsed
    assert "The model answers color 1 for 100 of 100 images." in verdict_of([[0, 50], [0, 50]])
    assert "The model answers color 2 for 60 of 120 images." in verdict_of(
        [[20, 0, 20, 0], [0, 10, 20, 0], [0, 0, 20, 0], [0, 10, 0, 20]]
    )


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([[90, 0], [10, 0]], "Most frequent mistake: color 1 taken for color 0 (10 of 10)."),  # most are of one class
        ([[30, 20], [5, 45]], "Most frequent mistake: color 0 taken for color 1 (20 of 50)."),
        ([[9, 1, 0], [0, 10, 0], [0, 0, 10]], "No mistake was made twice."),
    ],
)
def test_the_headline_of_any_other_model_names_its_mistake(counts, words):
    verdict = verdict_of(counts)
    assert words in verdict and "The model answers" not in verdict


@pytest.mark.parametrize(("classes", "wide"), [(3, False), (16, True)])
def test_a_matrix_that_is_wider_than_a_phone_says_so_there(classes, wide):
    page = page_of(*run_of([f"name {i}" for i in range(classes)]))
    assert ("swipe sideways" in page.text) is wide


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("before the training", "on the vision encoder as it was before the training"),
        ("random weights", "before the training (random weights)"),
        (None, "on the vision encoder 76.5%"),
    ],
)
def test_the_probe_names_the_encoder_it_was_fitted_on(encoder, words):
    results, data, predictions = run_of()
    results["probe"]["tower"] = encoder
    assert words in page_of(results, data, predictions).text_of["comparison"]


def test_a_precision_that_no_threshold_reaches_is_told_at_the_top():
    results, data, predictions = run_of(each=100)
    results["test"]["abstention"] = {"below": None, "target_precision": 0.95, "validation": None, "test": None}
    assert "answers every image" in page_of(results, data, predictions).text_of["top"]
    kept = {"coverage": 0.75, "accuracy": 1.0}
    results["test"]["abstention"] = {"below": 0.5, "target_precision": 0.95, "validation": kept, "test": kept}
    page = page_of(results, data, predictions)
    assert "every image" not in page.text and "75.0% of the test images" in page.text_of["metrics"]


def test_images_that_the_model_abstains_from_are_marked():
    results, data, predictions = run_of(each=60, strength=1.0)
    kept = {"coverage": 0.75, "accuracy": 1.0}
    below = float(np.median([p.confidence for p in predictions]))
    marks = []
    for threshold in (None, below):
        results["test"]["abstention"] = {"below": threshold, "target_precision": 0.9, "validation": kept, "test": kept}
        marks.append(page_of(results, data, predictions).text.count("too unsure to be given"))
    unsure = sum(predictions[i].confidence < below for i in shown_images(predictions))
    assert marks == [0, unsure] and unsure > 0


def test_what_was_not_calibrated_is_not_shown_twice():
    results, data, predictions = run_of()
    assert "by the sum, not calibrated" in page_of(results, data, predictions).text, "the score is another one"
    results["test"]["calibration"] |= {"score": "sum"}
    assert "before calibration" in page_of(results, data, predictions).text
    results["test"]["calibration"] |= {"temperature": 1.0}
    page = page_of(results, data, predictions)
    assert "before calibration" not in page.text and "nothing was calibrated" in page.text


def test_the_settings_are_those_that_were_used():
    given = {"tune": "full", "lora_rank": 16, "device": "auto", "dtype": "auto", "resume": True, "epochs": 0}
    given |= {"shots": None, "probe": False, "image_size": "auto", "cache_size": 20.0, "shuffle_buffer": 1000}
    given |= {"wandb_project": "x"}
    results = {"settings": given, "device": {"type": "cuda", "dtype": "bfloat16"}, "image_size": "84 of 168 px"}
    used = {"tune": "full", "device": "cuda", "dtype": "bfloat16", "epochs": 0, "image_size": "84 of 168 px"}
    assert used_settings(results) == used, "0 is no False, and what auto came to"
    assert "image_size" not in used_settings(results | {"image_size": None}), "the model has one size, or its own ones"
    lora = used_settings(results | {"settings": given | {"tune": "lora", "track": ["mlflow"]}})
    assert (lora["lora_rank"], lora["cache_size"], lora["wandb_project"]) == (16, "20 GB", "x")


def test_codes_have_their_readable_names_next_to_them():
    results, data, predictions = run_of(["cat", "dog"], strength=-1)
    results["readable_names"] = {"cat": "a house cat", "dog": "dog"}
    page = page_of(results, data, predictions)
    assert "truth cat a house cat" in page.text_of["mistakes"] and "dog dog" not in page.text_of["mistakes"]


def test_a_fold_says_which_one_it_is():
    results, data, predictions = run_of()
    data.source["fold"] = {"number": 2, "of": 5}
    assert "fold 2 of 5 · some/model" in page_of(results, data, predictions).text


def test_the_curve_is_told_from_the_accuracy_that_the_calibration_makes():
    results, data, predictions = run_of()
    results["test"]["calibration"]["scores"]["prior"]["accuracy"] = 0.4583
    results["validation"]["accuracy"] = 0.25
    page = page_of(results, data, predictions)
    said = "With it, as in the test, the saved model is right on 45.8% of the validation images, and not on 25.0%."
    assert said in page.text_of["curves"] and "Validation accuracy, calibrated 0.4583" in page.text_of["metrics"]
    results["test"]["calibration"]["score"] = "sum"
    assert "without its calibration" not in page_of(results, data, predictions).text


def test_words_of_the_page_are_said_once_and_explained():
    results, data, predictions = run_of()
    data.train = split([0, 0, 0, 1, 2, 2])
    page = page_of(results, data, predictions)
    assert page.texts.count("Settings") == 2, "the heading and its link"
    assert "mean distance of confidence and accuracy" in page.text_of["metrics"]
    assert "-log of the probability of the true class" in page.text_of["metrics"]
    assert "1 at least, 2 typically (the median), 3 at most." in page.text_of["data"]
    assert "train\N{NO-BREAK SPACE}3 · validation\N{NO-BREAK SPACE}4" in "".join(page.texts)


def test_on_paper_headings_stay_with_what_they_head():
    paper = CSS.split("@media print")[1]
    kept = next(line for line in paper.splitlines() if "break-after: avoid" in line)
    assert all(rule in kept for rule in ("h2", "h3", ":has(+ .cards)", ":has(+ .samples)", ":has(+ .scroll)"))
    assert "#confusion" in next(line for line in paper.splitlines() if line.strip().startswith("#comparison")), (
        "the matrix and its table"
    )
    assert ".cards { display: flow-root" in paper, "a grid would leave its heading behind at the foot of a page"


def test_an_image_that_has_gone_leaves_a_gap(tmp_path):
    results, data, predictions = run_of()
    labels = data.test.labels
    data.test = Split(
        Rows([tmp_path / "gone.png"] * len(labels), labels, ["gone.png"] * len(labels)), range(len(labels)), labels
    )
    assert "no image" in page_of(results, data, predictions).text
