"""Labels as people write them: numbers of several types, capitals, white space, missing ones, several in one."""

import json
from pathlib import Path

import pytest
from test_data import counts, draw, images, load, refuse
from test_sources import own_cache, table, write_csv  # noqa: F401


def rows(path: Path, labels: list, **columns: list) -> Path:
    """A JSONL table with these labels, and its images."""
    for i in range(len(labels)):
        draw(path.parent / f"{i}.png", i)
    more = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or [{}] * 999
    path.write_text("\n".join(json.dumps({"path": f"{i}.png", "label": v} | more[i]) for i, v in enumerate(labels)))
    return path


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 2.0, 10], ["1", "2", "10"]),
        ([1, "1", 2, "2.0"], ["1", "2"]),
        ([True, False, "true", " FALSE"], ["False", "True"]),
        (["1.0", "1", "1", "2"], ["1", "2"]),
        ([["a"], ["b"], "a", ["b", "b"]], ["a", "b"]),
        (["['a']", '["b"]', "a", "[ 'b', 'b' ]"], ["a", "b"]),
        (["[1]", "[2]"], ["1", "2"]),
        (["a ", " a", "b", "b\t"], ["a", "b"]),
        (["tabby  cat", "tabby cat", "dog", "tabby cat"], ["dog", "tabby cat"]),
    ],
)
def test_labels_of_one_meaning_are_one_class(tmp_path, labels, names):
    data = load(rows(tmp_path / "a.jsonl", labels * 6))
    assert data.class_names == names and sum(counts(data)) == len(labels) * 6


@pytest.mark.parametrize("kind", ["folders", "table", "names"])
def test_spellings_of_one_word_are_merged_into_the_frequent_one_and_said(tmp_path, capsys, kind):
    spelled = ["Cat"] * 3 + ["cat"] * 4 + ["DOG"] * 3 + ["ox"] * 3
    if kind == "folders":
        images(tmp_path, {name: spelled.count(name) for name in set(spelled)})
    elif kind == "table":
        write_csv(tmp_path / "a.csv", spelled)
    else:
        names = ["Cat", "cat", "DOG", "ox"]
        table([names.index(name) for name in spelled], names).save_to_disk(tmp_path)
    data = load(tmp_path)
    assert sorted(data.class_names) == ["DOG", "cat", "ox"] and sum(counts(data)) == 13
    said = "Cat (3) and cat (4) are one class: cat"
    assert f"note: {said}. If they are different classes, give all their names with --class-names." in (
        capsys.readouterr().err
    )
    assert "several spellings as one class: cat" in dict(data.summary)["class names"]
    assert sorted(load(tmp_path, class_names=["ox", "DOG", "cat", "Cat"]).class_names) == ["Cat", "DOG", "cat", "ox"]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1, "x"], "labels of several types: 1 int, 1 str"),
        ([1, True], "labels of several types: 1 int, 1 bool"),
        ([0.5, 1.5], "labels of type float. Expected one name or whole number for each image"),
        ([{"a": 1}, {"b": 1}], "labels of type dict"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, said):
    refuse(said, rows(tmp_path / "a.jsonl", labels))


@pytest.mark.parametrize("missing", [None, "", "  ", "NaN", "nan ", "NULL", "N/A", "#N/A", "[]", float("nan"), []])
def test_a_missing_label_is_left_out_and_counted(tmp_path, capsys, missing):
    data = load(rows(tmp_path / "a.jsonl", ["a", "b"] * 4 + [missing]))
    assert data.class_names == ["a", "b"] and sum(counts(data)) == 8
    assert "1 of 9 images have no label and are left out, first 8.png." in capsys.readouterr().err


@pytest.mark.parametrize("word", ["NA", "None"])
def test_a_text_that_may_be_a_class_is_one_and_said(tmp_path, capsys, word):
    path = rows(tmp_path / "a.jsonl", ["a", word] * 4)
    assert set(load(path).class_names) == {"a", word}
    assert f"a.jsonl: 4 images have the label {word}, which is taken for a class." in capsys.readouterr().err
    load(path, class_names=["a", word])
    assert "taken for a class" not in capsys.readouterr().err


def test_names_that_the_user_gives_and_names_of_folders_are_classes(tmp_path):
    assert load(rows(tmp_path / "a.jsonl", ["a", "null"] * 4), class_names=["null", "a"]).class_names == ["null", "a"]
    images(tmp_path / "pictures", {"nan": 4, "null": 4})
    assert load(tmp_path / "pictures").class_names == ["nan", "null"]


def test_classes_that_differ_in_leading_zeros_are_two_and_pointed_out(tmp_path):
    data = load(rows(tmp_path / "a.jsonl", ["01", "1", "2"] * 4))
    assert data.class_names == ["01", "1", "2"]
    assert "classes that differ in leading zeros only: 01, 1" in dict(data.summary)["class names"]


@pytest.mark.parametrize("joined", ["a|b", "b; a", "a,b", ["a", "b"], "['a', 'b']"])
def test_several_labels_for_one_image_are_refused_with_the_first_row(tmp_path, joined):
    path = rows(tmp_path / "a.jsonl", ["a", "b", joined, "a", "b", joined])
    refuse("train: 2 of 6 images have more than one label, first 2.png: [ab], [ab]. This program learns one", path)


def test_a_name_with_a_separator_is_one_label_if_its_parts_are_none_or_the_user_says_so(tmp_path):
    assert load(rows(tmp_path / "a.jsonl", ["a|b", "c, d", "a"] * 3)).class_names == ["a", "a|b", "c, d"]
    given = ["a", "b", "a|b"]
    assert load(rows(tmp_path / "a.jsonl", ["a|b", "b", "a"] * 3), class_names=given).class_names == given


@pytest.mark.parametrize("library", [True, False])
def test_names_beside_numbers_are_the_class_names_in_the_order_of_the_numbers(tmp_path, capsys, library):
    numbers, texts = [3, 1, 2] * 4, ["ape", "zebra", "ox"] * 4
    if library:
        table(numbers, label_text=texts).save_to_disk(tmp_path)
    else:
        rows(tmp_path / "a.jsonl", numbers, label_text=texts)
    data = load(tmp_path)
    assert data.class_names == ["zebra", "ox", "ape"] and sum(counts(data)) == 12
    assert "note: the numbers of the column label have their names from the column label_text." in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("texts", [["x", "x", "y"], ["x", "y", None], ["x", "y", "z", "z", "y", "x"]])
def test_names_that_do_not_fit_the_numbers_are_not_used_and_that_is_said(tmp_path, capsys, texts):
    data = load(rows(tmp_path / "a.jsonl", [3, 1, 2] * 6, label_text=texts * (18 // len(texts))))
    assert data.class_names == ["1", "2", "3"]
    assert "note: the column label_text is not used: it does not have one name for each number" in (
        capsys.readouterr().err
    )
