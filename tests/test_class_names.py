"""Which classes there are, in which order, and which names they may have."""

import os
import re
import unicodedata
from pathlib import Path

import datasets
import pytest
from test_data import counts, images, load, refuse
from test_sources import own_cache, table, write_csv  # noqa: F401

NUMBERS = [str(i) for i in range(12)]


@pytest.mark.parametrize("kind", ["folders", "folders of splits", "text", "whole numbers", "names"])
def test_labels_that_are_whole_numbers_are_ordered_as_numbers_in_every_source(tmp_path, kind):
    if kind == "folders":
        images(tmp_path, {name: 3 for name in NUMBERS})
    elif kind == "folders of splits":
        images(tmp_path, {f"{split}/{name}": 1 for name in NUMBERS for split in ("train", "val", "test")})
    elif kind == "text":
        write_csv(tmp_path / "a.csv", NUMBERS * 3)
    elif kind == "whole numbers":
        table([int(name) for name in NUMBERS] * 3).save_to_disk(tmp_path)
    else:
        in_text_order = sorted(NUMBERS)
        table([in_text_order.index(name) for name in NUMBERS] * 3, in_text_order).save_to_disk(tmp_path)
    data = load(tmp_path)
    assert data.class_names == NUMBERS
    for name, label in zip(data.train.names, data.train.labels, strict=True):
        own = Path(name).parent.name if "folders" in kind else int(re.findall("[0-9]+", name)[0]) % 12
        assert label == int(own)
    renamed = load(tmp_path, class_names=[f"c{name}" for name in NUMBERS])
    assert renamed.class_names == [f"c{name}" for name in NUMBERS] and renamed.train.labels == data.train.labels
    assert "10 -> c10" in dict(renamed.summary)["class names"]


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["-1", "0", "+1", "10"], ["-1", "0", "+1", "10"]),
        (["1.0", "10.0", "2."], ["1.0", "2.", "10.0"]),
        (["007", "01", "1"], ["01", "1", "007"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["9" * 5000, "1" * 5001], ["9" * 5000, "1" * 5001]),
    ],
)
def test_what_counts_as_a_whole_number(tmp_path, names, ordered):
    assert load(write_csv(tmp_path / "a.csv", names * 3)).class_names == ordered


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["c0", "c1", "c10", "c2"], "c10 -> n2, c2 -> n3"),
        (["1", "10", "2", "x"], "10 -> n1, 2 -> n2"),
        (["1", "01"], "01 -> n0, 1 -> n1"),
        (["Zebra", "ape"], "Zebra -> n0, ape -> n1"),
        (["Birne", "Äpfel"], "Birne -> n0, Äpfel -> n1"),
    ],
)
def test_names_by_index_are_refused_where_the_index_can_be_meant_in_two_ways(tmp_path, names, shown):
    path = write_csv(tmp_path / "a.csv", names * 3)
    refuse(
        f"can be ordered in two ways. Ordered as text, .*{shown}",
        path,
        class_names=[f"n{i}" for i in range(len(names))],
    )
    assert load(path, class_names=names[::-1]).class_names == names[::-1], "the own names are matched by name"


def test_the_datasets_own_order_is_not_in_question(tmp_path):
    table([0, 1, 2] * 3, ["c10", "c2", "c1"]).save_to_disk(tmp_path)
    assert load(tmp_path, class_names=["x", "y", "z"]).class_names == ["x", "y", "z"]


@pytest.mark.parametrize("kind", ["folders", "table", "names"])
def test_names_that_differ_in_their_unicode_form_only_are_one_class(tmp_path, kind):
    forms = [unicodedata.normalize(form, "übel") for form in ("NFC", "NFD")]
    if kind == "folders":
        images(tmp_path, {name: 3 for name in [*forms, "gut"]})
    elif kind == "table":
        write_csv(tmp_path / "a.csv", [*forms, "gut"] * 3)
    else:
        table([0, 1, 2] * 3, [*forms, "gut"]).save_to_disk(tmp_path)
    data = load(tmp_path)
    assert sorted(data.class_names) == ["gut", forms[0]] and sum(counts(data)) == 9
    assert load(tmp_path, class_names=[forms[1], "gut"]).class_names == [forms[0], "gut"]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\u2028b", "a\u202eb", "\udcff"])
def test_names_that_a_terminal_or_an_answer_cannot_show_are_refused(tmp_path, name):
    images(tmp_path / "set", {"first": 4, "other": 4})
    os.rename(tmp_path / "set/first", tmp_path / "set" / name)
    with pytest.raises(Exception, match="has a line end, a control character or a byte outside UTF-8") as caught:
        load(tmp_path / "set")
    assert str(caught.value).isprintable(), "the name is shown, harmless"
    assert load(tmp_path / "set", class_names=["x", "y"]).class_names == ["x", "y"]


def test_names_of_scripts_that_join_letters_are_fine(tmp_path):
    names = ["گربه\u200cسان", "👩\u200d🔬"]
    assert sorted(load(images(tmp_path, {name: 3 for name in names})).class_names) == sorted(names)


def test_an_empty_name_is_refused(tmp_path):
    table([0, 1] * 3, ["", "b"]).save_to_disk(tmp_path / "names")
    refuse("a class name is empty", tmp_path / "names")


def test_a_long_list_of_classes_is_cut_in_messages(tmp_path):
    path = write_csv(tmp_path / "a.csv", [f"{'word ' * 30}{i}" for i in range(80)] * 3)
    with pytest.raises(Exception, match="--class-names has 2 names, but the dataset has 80 classes") as caught:
        load(path, class_names=["x", "y"])
    assert len(str(caught.value)) < 1500
    with pytest.raises(Exception, match="train has fewer than 3 images of word") as caught:
        load(write_csv(path, [f"{'word ' * 30}{i}" for i in range(80)]))
    assert len(str(caught.value)) < 1700


def test_letters_that_differ_in_capitals_only_are_classes_of_their_own_and_said(tmp_path):
    data = load(images(tmp_path, {"A": 3, "a": 3, "dog": 3}))
    assert "classes that differ in capitals only: A, a" in dict(data.summary)["class names"]


@pytest.mark.parametrize("names", [["b", "a"], None])
def test_splits_that_number_the_classes_otherwise_are_refused(tmp_path, names):
    parts = {"train": table([0, 1] * 4, ["a", "b"]), "test": table([0, 1] * 4, names)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    refuse("test: the column label has other class names than train: (b, a|none); train has a, b. Give all", tmp_path)
