"""The sections of the page. Each takes the content and gives its markup, or None where there is nothing to show. C =
classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm.data import Split, UnreadableImage
from vlm.evaluation.calibrate import is_calibrated
from vlm.report.figures import accuracy_range, probed_encoder, reliability_states, series, smooth, wants_log_scale
from vlm.report.page.charts import Axis, Line, axis_around, line_chart
from vlm.report.page.content import Content, Prediction, triple
from vlm.report.page.markup import (
    LONGEST_TEXT,
    Markup,
    bar,
    class_name,
    element,
    facts,
    interval,
    join,
    percent,
    shorten,
    table,
    thumbnail,
)
from vlm.report.page.matrix import matrix
from vlm.report.summary import MEANING, abstention_line

HOW_IT_WAS_STARTED = {"resume", "overwrite"}  # not what the result depends on
MOST_SAMPLES = 100  # classes with an image in the section on the data
MOST_ROWS = 100  # classes in the table of classes


def comparison(content: Content) -> Markup | None:
    """The accuracy beside that of cheaper answers; None where there is only the most frequent class to compare with."""
    results = content.results
    check, probe = results.get("picture_check") or {}, results.get("probe") or {}
    subset = f"on {check['pictures']:,} images, {percent(check['accuracy'])} with their own" if check else ""
    rows = [
        ("This model", None, content.accuracy),
        (
            "Linear probe",
            f"logistic regression on {probed_encoder(probe.get('tower'))}",
            triple(probe.get("accuracy")),
        ),
        ("Zero-shot", "the same model before training", triple((results.get("zero_shot") or {}).get("accuracy"))),
        ("Other image", f"images shuffled, {subset}", triple(check.get("shuffled"))),
        ("No image", f"a gray one, {subset}", triple(check.get("gray"))),
    ]
    rows = [row for row in rows if row[2]]
    if len(rows) == 1:
        return None
    rows.append(("Most frequent class", "always the same answer", (content.majority[1], None, None)))
    cells = [[with_hint(name, hint), percent(figure[0]), interval(figure), bar(*figure)] for name, hint, figure in rows]
    return table(["answers by", "accuracy", "95% interval", ""], cells)


def confusion(content: Content) -> Markup:
    """The matrix and the most frequent confusions."""
    pairs = content.confusions
    rows = [[join([class_name(a, 24), " taken for ", class_name(b, 24)]), f"{n:,} of {s:,}"] for a, b, n, s in pairs]
    frequent = table(["most frequent mistakes", "images"], rows) if rows and len(content.names) > 2 else None
    return element("div", matrix(content), frequent, class_="side")


def mistakes(content: Content) -> Markup:
    if not content.mistakes:
        return element("p", "The model makes no mistake on the test images.")
    total = int(content.counts.sum() - content.counts.trace())
    what = "mistakes, the most confident first" if total > 1 else "mistake"
    return join([_cut_line(len(content.mistakes), total, what), _cards(content, content.mistakes)])


def uncertain(content: Content) -> Markup | None:
    if not content.uncertain:
        return None
    line = "The test images with the lowest confidence, lowest first; mistakes that are shown above are left out."
    return join([element("p", line, class_="quiet"), _cards(content, content.uncertain)])


def _cards(content: Content, positions: Sequence[int]) -> Markup:
    return element("div", *(_card(content, i) for i in positions), class_="cards")


def _card(content: Content, position: int) -> Markup:
    """Image, truth, prediction, the three most probable classes, and the text."""
    p = content.predictions[position]
    best = np.argsort(-p.probabilities, kind="stable")[:3].tolist()
    rows = [_probability(content, p, i) for i in best + ([] if p.label in best else [p.label])]
    truth, answer = content.names[p.label], content.names[p.predicted]
    good, mark = ("good", " ✓ right") if p.label == p.predicted else ("bad", " ✗ wrong")
    if p.confidence < content.abstains_below:
        good, mark = "quiet", f"{mark}, but too unsure to be given"
    alt = f"{shorten(p.name, 80)}: {shorten(truth, 60)}, predicted {shorten(answer, 60)}"
    lines = [("truth", class_name(truth), None), ("prediction", class_name(answer), element("span", mark, class_=good))]
    summary = [element("p", element("b", what), element("span", name, sign)) for what, name, sign in lines]
    text = element("blockquote", shorten(p.text.strip(), LONGEST_TEXT)) if p.text else None
    file = element("p", shorten(p.name, 44), class_="quiet file", title=shorten(p.name, LONGEST_TEXT))
    side = element("div", *summary, element("ul", *rows, class_="top"))
    return element("article", element("div", _image(content.data.test, position, alt), side, class_="pair"), text, file)


def _probability(content: Content, prediction: Prediction, number: int) -> Markup:
    value = float(prediction.probabilities[number])
    name = element("b" if number == prediction.label else "span", class_name(content.names[number], 28))
    return element("li", name, element("span", f"{value:.3f}", class_="number"), bar(value))


def per_class(content: Content) -> Markup:
    figures = content.test["per_class"]
    order = sorted(content.names, key=lambda name: (figures[name]["support"] == 0, figures[name]["f1"]))
    rows = [
        [class_name(name), *(f"{figures[name][key]:.3f}" for key in ("precision", "recall", "f1")), bar(figures[name]["f1"]),
         f"{figures[name]['support']:,}"]
        for name in order[:MOST_ROWS]
    ]  # fmt: skip
    head = ["class", "precision", "recall", "F1", "", "images"]
    return join([_cut_line(len(rows), len(order), "classes, the lowest F1 first"), table(head, rows)])


def metrics(content: Content) -> Markup:
    test, after = content.test, content.calibration.get("after", {})
    before = content.calibration.get("before", {}) if is_calibrated(content.calibration) else {}
    known = (
        ("Accuracy", "accuracy", content.accuracy), ("Macro F1", "macro_f1", None), ("Weighted F1", "weighted_f1", None),
        ("NLL, nats an image", "nll", None), ("Brier score", "brier", None), ("ECE", "ece", None), ("Loss, nats a token", "loss", None),
    )  # fmt: skip
    rows = [
        [label, *_measured(value or after.get(key, test.get(key)), before.get(key), bool(before))]
        for label, key, value in known
    ]
    for name, value in test.get("own_metrics", {}).items():
        for key, number in value.items() if isinstance(value, dict) else (("", value),):
            rows.append([shorten(f"{name} {key}".strip(), 60), *_measured(number, None, bool(before))])
    best = content.results.get("validation", {}).get("accuracy")
    rows.append(["Validation accuracy", *_measured(best, None, bool(before))])
    head = ["test split", "value", "95% interval"] + (["before calibration"] if before else [])
    notes = [
        _text_line(content),
        _temperature_line(content),
        _score_line(content),
        _abstention_line(content),
        _glossary(content),
    ]
    return join(
        [table(head, [row for row in rows if row[1] != "–"]), *(element("p", n, class_="quiet") for n in notes if n)]
    )


def _measured(value: Any, before: Any, with_before: bool) -> list[str]:
    now, earlier = triple(value), triple(before)
    cells = [f"{now[0]:.4f}" if now else "–", interval(now, "{:.4f}") if now else ""]
    return cells + ([f"{earlier[0]:.4f}" if earlier else ""] if with_before else [])


def _glossary(content: Content) -> str:
    """What the figures mean whose names do not say it."""
    names = {"nll": "NLL", "brier": "Brier score", "ece": "ECE (expected calibration error)"}
    measured = content.test | content.calibration.get("after", {})
    return " ".join(f"{name}: {MEANING[key]}." for key, name in names.items() if key in measured)


def _text_line(content: Content) -> str | None:
    texts = content.results.get("texts") or {}
    if not texts.get("texts"):
        return None
    agree, invalid = texts.get("agree_with_prediction"), texts.get("invalid")
    free = f"Of {texts['texts']:,} texts that were generated freely, {agree} agree with the prediction and {invalid} name no class"
    named = texts.get("reasoning_names_answer")
    free += f"; the reasoning of {named} names the class that they answer, too." if named is not None else "."
    return free


def _temperature_line(content: Content) -> str | None:
    temperature = triple(content.calibration.get("temperature"))
    if not temperature:
        return None
    if not is_calibrated(content.calibration):
        return "The probabilities are the model's own: nothing was calibrated."
    biases = " and a bias for each class" if content.calibration.get("bias") else ""
    return f"The probabilities are calibrated with a temperature of {temperature[0]:.3f}{biases}."


def _abstention_line(content: Content) -> str | None:
    abstention = content.test.get("abstention")
    return f"Abstaining: {abstention_line(abstention)}." if abstention else None


def _score_line(content: Content) -> str | None:
    """Which score was taken, and what the others would have given."""
    known = [(name, triple(figures.get("nll"))) for name, figures in (content.calibration.get("scores") or {}).items()]
    compared = ", ".join(f"{name} {nll[0]:.4f}" for name, nll in known if nll)
    return (
        f"Score of a class: {content.calibration.get('score')}. NLL on validation of each, calibrated: {compared}."
        if compared
        else None
    )


def reliability(content: Content) -> Markup | None:
    """Accuracy over confidence, before and after calibration; None without calibration."""
    bins = content.calibration.get("reliability") or {}
    lines = []
    styles = {"before": "second", "after": "first"}
    for key, label in reliability_states(bins):
        filled = [(c, a) for c, a, n in bins.get(key) or () if n and c is not None and a is not None]
        if filled:
            lines.append(Line(label, *zip(*filled, strict=True), styles[key], dots=True))
    if not lines:
        return None
    lines.insert(0, Line("perfect", [0, 1], [0, 1], "plain"))
    chart = line_chart(lines, Axis("mean confidence", 0, 1), Axis("accuracy", 0, 1), "Confidence and accuracy")
    words = "Each point stands for images of similar confidence. Below the dashed line the model is too sure of itself, above it too unsure."
    return element("div", chart, element("p", words, class_="quiet"), class_="side")


def curves(content: Content) -> Markup | None:
    history = content.results.get("history") or []
    steps, loss = series(history, "train", "loss")
    checked, checked_loss = series(history, "validation", "loss")
    at, accuracy = series(history, "validation", "accuracy")
    best = content.results.get("validation", {}).get("step")
    best = best if best in at else None
    last = max([*steps, *checked, *at, 1])
    charts = []
    if len(loss) or len(checked_loss):
        lines = [Line("training, smoothed", steps, smooth(loss), "first", len(loss) < 3),
                 Line("validation", checked, checked_loss, "second", dots=True)]  # fmt: skip
        shown = np.concatenate([lines[0].y, lines[1].y])
        y = axis_around("loss", shown, log=wants_log_scale(loss, shown))
        charts.append(line_chart(lines, Axis("optimizer step", 0, last, whole=True), y, "Loss", best))
    if len(at):
        lines = [Line("validation", at, accuracy, "second", dots=True)]
        charts.append(
            line_chart(
                lines,
                Axis("optimizer step", 0, last, whole=True),
                Axis("accuracy", *accuracy_range(accuracy)),
                "Accuracy",
                best,
            )
        )
    mark = (
        element("p", f"The upright line marks step {best:,}, whose model was saved and tested.", class_="quiet")
        if best
        else None
    )
    return join([element("div", *charts, class_="side"), mark]) if charts else None


def data(content: Content) -> Markup:
    """What was detected, the counts of each class, and one training image of each."""
    splits = [("train", content.data.train), ("validation", content.data.validation), ("test", content.data.test)]
    counts = [
        np.bincount(np.asarray(split.labels, dtype=np.int64), minlength=len(content.names)) for _, split in splits
    ]
    first: dict[int, int] = {}
    for position, label in enumerate(content.data.train.labels):
        first.setdefault(label, position)
    cards = []
    for number, name in enumerate(content.names[:MOST_SAMPLES]):
        image = (
            _image(content.data.train, first[number], f"A training image of {shorten(name, 60)}")
            if number in first
            else None
        )
        numbers = " · ".join(
            f"{split[0]}\N{NO-BREAK SPACE}{count[number]:,}" for split, count in zip(splits, counts, strict=True)
        )
        cards.append(
            element("figure", image, element("figcaption", class_name(name), element("span", numbers, class_="quiet")))
        )
    smallest = element("p", _spread(counts[0]), class_="quiet")
    detected = facts([(key, value) for key, value in content.data.summary])
    cut = _cut_line(len(cards), len(content.names), "classes, each with a training image and its number of images")
    return join([detected, smallest, cut, element("div", *cards, class_="samples")])


def _spread(counts: np.ndarray) -> str:
    low, middle, high = int(counts.min()), float(np.median(counts)), int(counts.max())
    return f"Training images of a class: {low:,} at least, {round(middle):,} typically (the median), {high:,} at most."


def settings(content: Content) -> Markup | None:
    given = [(k.replace("_", " "), v) for k, v in used_settings(content.results).items()]
    timings = [(k.replace("_", " "), v) for k, v in content.results.get("timings", {}).items() if v is not None]
    versions = content.results.get("versions", {}).items()
    groups = [(None, given), ("Time", timings), ("Versions", versions)]
    shown = [join([element("h3", title) if title else None, facts(rows)]) for title, rows in groups if rows]
    return join(shown) if shown else None


def used_settings(results: dict[str, Any]) -> dict[str, Any]:
    """The settings that had a part in the result: with the device, number format and image size that were taken,
    without what was off."""
    given = results.get("settings", {})
    device = results.get("device") or {}
    taken = {"device": device["type"], "dtype": device["dtype"]} if device else {}
    if results.get("image_size"):
        taken["image_size"] = results["image_size"]
    lora = given.get("tune", "lora") == "lora"
    return {
        name: taken.get(name, value)
        for name, value in given.items()
        if value not in (None, "")
        and value is not False
        and name not in HOW_IT_WAS_STARTED
        and (lora or not name.startswith("lora_"))
    }


def _image(split: Split, position: int, alt: str) -> Markup:
    try:
        return thumbnail(split[position].image, alt)
    except UnreadableImage:  # it was there when the run began
        return element("span", "no image", class_="thumb quiet")


def _cut_line(shown: int, total: int, what: str) -> Markup:
    text = f"{shown:,} of {total:,} {what}; the others are left out here." if shown < total else f"{total:,} {what}."
    return element("p", text, class_="quiet")


def with_hint(name: str, hint: str | None) -> Markup:
    return join([name, element("span", hint, class_="quiet hint") if hint else None])
