"""The page is well-formed, shows every part that is there, and holds nothing from elsewhere, whatever the names are."""

import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny import random_image

from vlm.data import Data, Rows, Split
from vlm.evaluation.metrics import classification_metrics
from vlm.report.page import SECTIONS, Prediction, content, matrix, sections, shown_images, top, write_page
from vlm.report.page.markup import VOID, shorten

EVIL = "<b>&\"'</td><script src=http://x.example>"
NAMES = ["cat", EVIL, "猫"]
OPTIONAL = {"comparison", "reliability", "curves", "settings"}


class Page(HTMLParser):
    """Elements with their attributes, texts by section; every end tag must close the element that is open."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open, self.elements, self.texts = [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.texts.append(text)

    @property
    def text(self):
        return " ".join(self.texts)

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
    """Results, data and predictions of a run that never was, with the least that must be there."""
    rng = np.random.default_rng(seed)
    labels = [i % len(names) for i in range(each * len(names))]
    scores = rng.normal(size=(len(labels), len(names)))
    scores[np.arange(len(labels)), labels] += strength
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    data = Data(
        split(labels),
        split(labels),
        split(labels),
        list(names),
        edge=8,
        summary=[("dataset", EVIL)],
        source={"dataset": EVIL},
    )
    predictions = [Prediction(*row) for row in zip(data.test.names, labels, np.exp(scores), strict=True)]
    for i in shown_images(predictions):
        predictions[i].text = f"Reasoning: I see {EVIL}\nAnswer: {names[predictions[i].predicted]}"
    return {"test": classification_metrics(labels, scores, names)}, data, predictions


def everything(results):
    """Adds all that results.json may hold."""
    accuracy = results["test"]["accuracy"]
    figures = {
        "nll": [0.61, 0.5, 0.7],
        "brier": [0.31, 0.2, 0.4],
        "ece": [0.11, 0.1, 0.2],
        "accuracy": [accuracy, 0.41, 0.93],
    }
    bins = {"before": [[0.4, 0.5, 6], [0.9, 0.8, 6], [None, None, 0]], "after": [[0.5, 0.5, 6], [0.8, 0.8, 6]]}
    calibration = {"temperature": 1.75, "before": figures, "after": figures | {"ece": [0.021, 0.01, 0.03]}}
    calibration |= {
        "score": "mean",
        "scores": {"sum": {"nll": 0.4321}, "mean": {"nll": 0.4123}, "prior": {"nll": None}},
    }
    results["test"] |= {"calibration": calibration | {"reliability": bins}, "loss": 0.123456}
    results["test"]["own_metrics"] = {"top two": 0.875, "failed": None, "parts": {"a": 0.625}}
    history = [{"kind": "train", "step": s, "loss": 9 / s} for s in range(1, 90)] + [
        {"kind": "train", "step": 90, "loss": math.nan}
    ]
    history += [{"kind": "validation", "step": s, "loss": 9 / s, "accuracy": 1 - 1 / s} for s in (30, 60, 90)]
    return results | {
        "picture_check": {
            "accuracy": accuracy,
            "shuffled": 0.31,
            "gray": 0.32,
            "chance": 0.33,
            "pictures": 12,
            "warning": None,
        },
        "probe": {"accuracy": [0.765, 0.7, 0.8]},
        "zero_shot": {"accuracy": 0.234},
        "texts": {
            "texts": 12,
            "invalid": 1,
            "agree_with_prediction": 10,
            "reasoning_names_answer": 9,
            "explanations_agree": 12,
        },
        "validation": {"accuracy": 0.99, "loss": 0.1, "step": 60},
        "history": history,
        "settings": {"task_description": EVIL, "model": "some/model", "epochs": 3, "seed": 0, "resume": False},
        "timings": {"train_seconds": 12.5},
        "versions": {"torch": "2"},
    }


def page_of(path, results, data, predictions):
    write_page(path, results, data, predictions)
    return Page(path)


def test_every_part_is_there(tmp_path):
    results, data, predictions = run_of()
    page = page_of(tmp_path / "report.html", everything(results), data, predictions)
    assert page.sections == [name for name, _, _ in SECTIONS]
    assert "Score of a class: mean. NLL on validation of each, calibrated: sum 0.4321, mean 0.4123." in page.text
    for text in (
        "76.5%",
        "23.4%",
        "31.0%",
        "41.0% to 93.0%",
        "0.0210",
        "0.1100",
        "1.750",
        "0.8750",
        "parts a",
        "0.1235",
        "some/model",
    ):
        assert text in page.text, text
    assert {name for name in NAMES if name in page.text} == set(NAMES)
    links = {attributes["href"] for attributes in page.all("a")}
    assert links == {f"#{name}" for name in page.sections}
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_what_was_not_measured_is_left_out(tmp_path):
    page = page_of(tmp_path / "report.html", *run_of())
    assert set(page.sections) == {name for name, _, _ in SECTIONS} - OPTIONAL
    assert "calibration" not in page.text and "nan" not in page.text.lower() and "None" not in page.text


def test_nothing_is_loaded_from_elsewhere_and_no_name_becomes_markup(tmp_path):
    results, data, predictions = run_of()
    page = page_of(tmp_path / "report.html", everything(results), data, predictions)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page.source and "@import" not in page.source
    assert EVIL not in page.source and page.source.replace("http://x.example", "").count("http") == 1, (
        "the policy's http-equiv alone"
    )
    assert "default-src 'none'" in next(a["content"] for a in page.all("meta") if "http-equiv" in a)


def test_every_image_has_a_text_for_those_who_cannot_see_it(tmp_path):
    results, data, predictions = run_of()
    page = page_of(tmp_path / "report.html", everything(results), data, predictions)
    assert page.all("img") and all(image["alt"] for image in page.all("img"))
    charts = page.all("svg")
    assert len(charts) == 3 and all("from" in chart["aria-label"] and chart["role"] == "img" for chart in charts)


def test_mistakes_and_uncertain_images_are_chosen_and_explained(tmp_path):
    results, data, predictions = run_of(each=60, strength=1.0)
    wrong = [p for p in predictions if p.predicted != p.label]
    assert len(wrong) > content.MOST_IMAGES
    shown = [predictions[i] for i in shown_images(predictions)]
    mistakes, uncertain = shown[: content.MOST_IMAGES], shown[content.MOST_IMAGES :]
    assert [p.confidence for p in mistakes] == sorted((p.confidence for p in wrong), reverse=True)[
        : content.MOST_IMAGES
    ]
    left = sorted(p.confidence for p in predictions if not any(p is m for m in mistakes))
    assert [p.confidence for p in uncertain] == left[: content.MOST_IMAGES]
    page = page_of(tmp_path / "report.html", results, data, predictions)
    assert len(page.all("article")) == 2 * content.MOST_IMAGES
    for p in shown:
        assert p.text in page.text and f"{p.confidence:.3f}" in page.text and p.name in page.text
    assert f"{content.MOST_IMAGES} of {len(wrong)} mistakes" in page.text


def test_a_truth_behind_the_best_three_is_shown_too(tmp_path):
    results, data, predictions = run_of(["a", "b", "c", "d", "e"])
    predictions[0].probabilities = np.array([0.0125, 0.5, 0.3, 0.1375, 0.05])
    write_page(tmp_path / "report.html", results, data, predictions)
    card = sections._card(content.Content(results, data, predictions), 0)
    assert [name for name in "abcde" if f">{name}</span></" in card.split("<ul")[1]] == ["a", "b", "c", "d"]
    assert "0.013" in card or "0.012" in card


def test_two_classes_and_few_images_and_no_mistake(tmp_path):
    page = page_of(tmp_path / "report.html", *run_of(["a", "b"], each=1, strength=50.0))
    assert "no mistake" in page.text and "2 test images are few" in page.text
    assert "not clearly above" in page.text, "two of two right is no proof"


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({"probe": {"accuracy": [1.0, 1.0, 1.0], "warning": "the probe is better."}}, "The probe is better."),
        (
            {
                "picture_check": {
                    "pictures": 12,
                    "accuracy": 0.9,
                    "shuffled": 0.85,
                    "gray": 0.2,
                    "chance": 0.33,
                    "warning": "it is blind.",
                }
            },
            "It is blind.",
        ),
        (
            {
                "picture_check": {
                    "pictures": 12,
                    "accuracy": 0.9,
                    "shuffled": None,
                    "gray": 0.33,
                    "chance": 0.33,
                    "warning": None,
                }
            },
            None,
        ),
        ({"probe": None, "picture_check": None, "zero_shot": None, "texts": None, "history": None}, None),
    ],
)
def test_warnings_are_given_where_they_are_due(tmp_path, changed, warning):
    results, data, predictions = run_of(each=100)
    page = page_of(tmp_path / "report.html", results | changed, data, predictions)
    warnings = len([a for a in page.all("ul") if a.get("class") == "warnings"])
    assert (warnings, warning is None or warning in page.text) == (int(warning is not None), True)


@pytest.mark.parametrize("classes", [31, 1000])
def test_many_classes_give_a_page_of_bounded_size_that_says_what_it_leaves_out(tmp_path, classes):
    names = [f"{i} {'long ' * 90}{i}" for i in range(classes)]
    results, data, predictions = run_of(names, each=2)
    results["test"]["calibration"] = {"reliability": {}}
    results["history"] = [{"kind": "train", "step": s, "loss": 1.0 + s % 7} for s in range(20_000)]
    page = page_of(tmp_path / "report.html", results, data, predictions)
    assert len(page.source) < 2_000_000
    assert len(page.all("img")) <= 2 * content.MOST_IMAGES + sections.MOST_SAMPLES + 1
    assert (f"{sections.MOST_ROWS} of {classes:,} classes" in page.text) == (classes > sections.MOST_ROWS)
    assert (f"{sections.MOST_SAMPLES} of {classes:,} classes" in page.text) == (classes > sections.MOST_SAMPLES)
    assert names[0] not in page.text and shorten(names[0], 40) in page.text


def test_the_matrix_of_many_classes_tells_right_from_wrong_and_names_its_axes(tmp_path):
    counts = np.array([[3, 1, 0], [0, 4, 0], [2, 2, 0]])
    pixels = np.array(matrix._pixels(counts))
    assert {tuple(pixels[i, i, :3]) for i in (0, 1)} == {matrix.RIGHT}
    assert {tuple(pixels[i, j, :3]) for i, j in ((0, 1), (2, 0))} == {matrix.WRONG}
    assert (pixels[..., 3] > 0).tolist() == (counts > 0).tolist() and pixels[1, 1, 3] == 255 > pixels[0, 0, 3] > pixels[
        0, 1, 3
    ]
    for classes, each in ((31, 1), (95, 3)):
        page = page_of(tmp_path / "report.html", *run_of([f"color {i:03d}" for i in range(classes)], each=2))
        named = page.source.split('class="axis top"')[1].split("<img")[0]
        shown = [i for i in range(classes) if f">color {i:03d}</span>" in named]
        assert shown == list(range(0, classes, each)) and named.count("color") == 2 * len(shown), (
            "above and at the left"
        )
        assert {"key right", "key wrong"} <= {a.get("class") for a in page.all("i")}
        assert (f"One in {each} is named." in page.text) == (each > 1)


def verdict_of(counts):
    names = [f"color {i}" for i in range(len(counts))]
    data = Data(split([0]), split([0]), split([0]), names, edge=8)
    return top.verdict(content.Content({"test": {"confusion_matrix": counts}}, data, []))


def test_the_headline_names_what_a_collapsed_model_answers():
    always = np.zeros((100, 100), int)
    always[:, 57] = 1
    assert "The model answers <" in verdict_of(always) and ">color 57</span> for 100 of 100 images." in verdict_of(
        always
    )
    assert "No mistake was made twice" not in verdict_of(always)
    assert ">color 1</span> for 100 of 100 images." in verdict_of([[0, 50], [0, 50]])
    assert ">color 2</span> for 60 of 120 images." in verdict_of(
        [[20, 0, 20, 0], [0, 10, 20, 0], [0, 0, 20, 0], [0, 10, 0, 20]]
    )


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([[90, 0], [10, 0]], "Most frequent mistake: "),  # nine of ten images are of that class
        ([[30, 20], [5, 45]], "Most frequent mistake: "),
        ([[9, 1, 0], [0, 10, 0], [0, 0, 10]], "No mistake was made twice."),
    ],
)
def test_the_headline_of_any_other_model_names_its_mistake(counts, words):
    assert words in verdict_of(counts) and "The model answers" not in verdict_of(counts)


@pytest.mark.parametrize(("classes", "wide"), [(3, False), (16, True), (40, True)])
def test_a_matrix_that_is_wider_than_a_phone_says_so_there(tmp_path, classes, wide):
    page = page_of(tmp_path / "report.html", *run_of([f"name {i}" for i in range(classes)]))
    assert (matrix.SWIPE in page.text) is wide


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("frozen", "on the same vision encoder, which is frozen"),
        ("before the training", "on the vision encoder as it was before the training"),
        ("random weights", "before the training (random weights)"),
        (None, "on the vision encoder<"),
    ],
)
def test_the_probe_names_the_encoder_it_was_fitted_on(encoder, words):
    results, data, predictions = run_of()
    results["probe"] = {"accuracy": [0.7, 0.6, 0.8], "tower": encoder}
    assert words in sections.comparison(content.Content(results, data, predictions))


def test_a_precision_that_no_threshold_reaches_stands_at_the_top(tmp_path):
    results, data, predictions = run_of(each=100)
    results["test"]["abstention"] = {"below": None, "target_precision": 0.95, "validation": None, "test": None}
    shown = content.Content(results, data, predictions)
    assert any(
        "95% of the predictions on validation" in line and "answers every image" in line for line in top.concerns(shown)
    )
    kept = {"coverage": 0.75, "accuracy": 1.0}
    results["test"]["abstention"] = {"below": 0.5, "target_precision": 0.95, "validation": kept, "test": kept}
    assert top.concerns(shown) == [] and "75.0% of the test images" in sections.metrics(shown)


def test_images_that_the_model_abstains_from_are_marked():
    results, data, predictions = run_of(each=60, strength=1.0)
    kept = {"coverage": 0.75, "accuracy": 1.0}
    below = float(np.median([p.confidence for p in predictions]))
    marks = []
    for threshold in (None, below):
        results["test"]["abstention"] = {"below": threshold, "target_precision": None, "validation": kept, "test": kept}
        shown = content.Content(results, data, predictions)
        marks.append(
            [str(sections.mistakes(shown)) + str(sections.uncertain(shown))][0].count("too unsure to be given")
        )
    unsure = sum(predictions[i].confidence < below for i in shown_images(predictions))
    assert marks == [0, unsure] and unsure > 0


def test_what_was_not_calibrated_is_not_shown_twice(tmp_path):
    results, data, predictions = run_of()
    results = everything(results)
    assert "before calibration" in sections.metrics(content.Content(results, data, predictions))
    results["test"]["calibration"] |= {"temperature": 1.0, "score": "sum"}
    shown = sections.metrics(content.Content(results, data, predictions))
    assert "before calibration" not in shown and "nothing was calibrated" in shown


def test_the_settings_are_those_that_were_used():
    given = {
        "tune": "full",
        "lora_rank": 16,
        "device": "auto",
        "dtype": "auto",
        "resume": True,
        "epochs": 0,
        "shots": None,
        "probe": False,
    }
    results = {"settings": given, "device": {"type": "cuda", "dtype": "bfloat16"}}
    assert sections.used_settings(results) == {"tune": "full", "device": "cuda", "dtype": "bfloat16", "epochs": 0}, (
        "0 is no False"
    )
    assert sections.used_settings({"settings": given | {"tune": "lora"}})["lora_rank"] == 16, (
        "and of older results what there is"
    )
    assert sections.used_settings({"settings": given})["device"] == "auto"
    taken = {"settings": given | {"image_size": "auto"}, "image_size": "84 of 168 px"}
    assert sections.used_settings(taken)["image_size"] == "84 of 168 px", "what auto came to"
    assert sections.used_settings(taken | {"image_size": None})["image_size"] == "auto"


def test_words_of_the_page_are_said_once_and_explained(tmp_path):
    results, data, predictions = run_of()
    page = page_of(tmp_path / "report.html", everything(results), data, predictions)
    assert page.texts.count("Settings") == 2, "the heading and its link"
    assert (
        "mean distance of confidence and accuracy" in page.text
        and "-log of the probability of the true class" in page.text
    )
    assert sections._spread(np.array([3, 126, 127, 200])).endswith(
        "3 at least, 126 typically (the median), 200 at most."
    )


def test_on_paper_headings_stay_with_what_they_head():
    paper = (Path(sections.__file__).parent / "style.css").read_text().split("@media print")[1]
    kept = next(line for line in paper.splitlines() if "break-after: avoid" in line)
    assert all(rule in kept for rule in ("h2", "h3", ":has(+ .cards)", ":has(+ .samples)", ":has(+ .scroll)"))
    assert "#confusion" in next(line for line in paper.splitlines() if line.strip().startswith("#comparison")), (
        "the matrix and its table"
    )
    assert ".cards { display: flow-root" in paper, "a grid would leave its heading behind at the foot of a page"


def test_calibration_has_the_colors_of_the_image_beside(tmp_path):
    results, data, predictions = run_of()
    chart = sections.reliability(content.Content(everything(results), data, predictions))
    assert 'class="second"></i>before calibration' in chart and 'class="first"></i>after calibration' in chart
    css = (Path(sections.__file__).parent / "style.css").read_text()
    assert ".second { stroke: rgb(var(--orange))" in css and ".first { stroke: rgb(var(--blue))" in css


def test_a_image_that_has_gone_leaves_a_gap(tmp_path):
    results, data, predictions = run_of()
    labels = data.test.labels
    data.test = Split(
        Rows([tmp_path / "gone.png"] * len(labels), labels, ["gone.png"] * len(labels)), range(len(labels)), labels
    )
    predictions[0].name = "caf\udce9.png"  # a file name that is not valid text
    assert "no image" in page_of(tmp_path / "report.html", results, data, predictions).text
