"""Labels that may be wrong: which are found, what the file says, and that --exclude takes it."""

import csv
import io
import json

import numpy as np
import pytest
from commands import train
from PIL import Image

from vlm.common import UsageError
from vlm.data import Rows, Split
from vlm.data.excluding import exclude
from vlm.evaluation.label_issues import COLUMNS, find_label_issues, issues_table


def judged(count=300, classes=4, exchanged=30, seed=0):
    """Probabilities of a good fit, for labels of which some were exchanged."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, count)
    logits = rng.normal(0, 1, (count, classes))
    logits[np.arange(count), truth] += 4
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = truth.copy()
    wrong = rng.permutation(count)[:exchanged]
    labels[wrong] = (truth[wrong] + rng.integers(1, classes, exchanged)) % classes
    return labels, truth, probabilities, set(wrong.tolist())


def test_exchanged_labels_come_first_with_the_true_class_as_suggestion():
    labels, truth, probabilities, wrong = judged()
    half = len(labels) // 2
    found = find_label_issues(
        {
            "train": (range(half), labels[:half].tolist(), probabilities[:half]),
            "test": (range(half), labels[half:].tolist(), probabilities[half:]),
        }
    )
    places = [issue.position + (half if issue.role == "test" else 0) for issue in found]
    assert len(wrong & set(places[: 2 * len(wrong)])) >= 0.9 * len(wrong)
    assert [issue.margin for issue in found] == sorted((issue.margin for issue in found), reverse=True)
    for place, issue in zip(places, found, strict=True):
        assert issue.label == labels[place] != issue.suggested
        assert issue.margin == pytest.approx(
            probabilities[place, issue.suggested] - probabilities[place, labels[place]]
        )
        mean = probabilities[labels == issue.suggested, issue.suggested].mean()
        assert issue.clear == (probabilities[place, issue.suggested] >= mean)
    right = [issue.suggested == truth[place] for place, issue in zip(places, found, strict=True) if place in wrong]
    assert np.mean(right) > 0.9 and any(issue.clear for issue in found) and not all(issue.clear for issue in found)
    without = [i for i in range(len(labels)) if i not in places]
    assert all(probabilities[i].argmax() == labels[i] for i in without)


def test_the_file_can_be_read_whatever_the_names_are():
    labels, _, probabilities, _ = judged(40)
    names = [f'a, "b"\n{i}' for i in range(40)]
    found = find_label_issues({"train": (range(40), labels.tolist(), probabilities)})
    split = Split(Rows([None] * 40, labels.tolist(), names), range(40), labels.tolist())
    rows = list(csv.reader(io.StringIO(issues_table(found, {"train": split}, ["w", "x", "y", "z, z"]))))
    assert tuple(rows[0]) == COLUMNS and len(rows) == len(found) + 1
    assert [row[0] for row in rows[1:]] == [names[issue.position] for issue in found]


def rows_of(**names):
    return {role: Rows([None] * len(them), [0] * len(them), list(them)) for role, them in names.items()}


def write(tmp_path, text):
    (tmp_path / "out.csv").write_text(text, encoding="utf-8")
    return str(tmp_path / "out.csv")


def test_images_are_left_out_of_the_split_that_the_file_names(tmp_path, capsys):
    rows = rows_of(train=("a", "b", "c", "a"), test=("a", "d"))
    left = exclude(rows, write(tmp_path, "image,split,label\na,test,x\nb,validation,x\nzz,train,x\n"))
    assert left["train"].names == ["a", "c", "a"] and left["test"].names == ["d"], "validation was cut from train"
    said = capsys.readouterr().err
    assert "--exclude: 2 images are left out." in said and "1 images are not in the dataset, first zz" in said
    everywhere = exclude(rows, write(tmp_path, "image\na\n"))
    assert everywhere["train"].names == ["b", "c"] and everywhere["test"].names == ["d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image\nzz\n", "has no image called zz"),
        ("name,label\na,b\n", "has the columns name, label. Expected a column"),
        ("", "is empty. Expected a column"),
    ],
)
def test_a_file_that_says_nothing_is_refused(text, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        exclude(rows_of(train=("a",)), write(tmp_path, text))
    with pytest.raises(UsageError, match="cannot be read"):
        exclude(rows_of(train=("a",)), str(tmp_path / "none.csv"))


@pytest.mark.slow
def test_a_run_lists_exchanged_labels_and_the_next_one_leaves_them_out(tmp_path):
    """Four colors, of which some images lie in the folder of another."""
    rng, colors = np.random.default_rng(0), {"red": 0, "green": 1, "blue": 2}
    wrong = set()
    for i in range(150):
        color = list(colors)[i % 3]
        folder = color
        if i % 15 == 0:
            folder = list(colors)[(i + 1) % 3]
            wrong.add(f"{folder}/{i}.png")
        pixels = rng.integers(0, 120, (24, 24, 3), dtype=np.uint8)
        pixels[..., colors[color]] += 100
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{i}.png")
    flags = ["--dataset", tmp_path / "data", "--epochs", 1, "--batch-size", 8]
    base = tmp_path / "base"
    assert train("--demo", "--max-samples", 60, "--epochs", 0, "--evidence", "text", "--output-dir", base) == 0
    flags = ["--model", base / "demo_model", "--tune", "full", "--learning-rate", "1e-3", *flags]
    assert train(*flags, "--output-dir", tmp_path / "one") == 0
    file = tmp_path / "one" / "label_issues.csv"
    listed = [row["image"] for row in csv.DictReader(file.read_text().splitlines())]
    found = {name for name in wrong if any(image.endswith(name) for image in listed[: 2 * len(wrong)])}
    assert len(found) >= 0.8 * len(wrong), (wrong - found, listed[:25])
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["label_issues"]["judged"] == 150 and results["label_issues"]["listed"] == len(listed)
    page = (tmp_path / "one" / "report.html").read_text()
    assert "Labels to check" in page and "labeled" in page
    assert train(*flags, "--exclude", file, "--output-dir", tmp_path / "two") == 0
    pictures = json.loads((tmp_path / "two" / "results.json").read_text())["pictures"]
    assert pictures["train"] + pictures["validation"] + pictures["test"] == 150 - len(listed)
