"""A dataset that a trained model reads: one split, labels may be missing, classes are matched by name."""

import json

import datasets
import pytest
from tiny import random_image

from vlm.common import UsageError
from vlm.config import IN_MEMORY, classify_settings
from vlm.data import match_classes, read_images


def read(dataset, classes=(), **given):
    named = isinstance(dataset, str)
    name = dataset if named else IN_MEMORY
    return read_images(classify_settings({"dataset": name} | given), None if named else dataset, classes)


def write_images(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(i).save(folder / name)
    return str(folder)


def named(found):
    """The class name of each image, in order."""
    return [label if label is None else found.class_names[label] for label in found.labels]


def table_of(rows, path, names="image,label"):
    path.write_text("\n".join([names, *rows]) + "\n")
    return str(path)


def of_labels(labels, **features):
    images = [random_image(i) for i in range(len(labels))]
    kinds = datasets.Features({"image": datasets.Image(), **features})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, kinds if features else None)


# Which split


def test_the_split_for_the_test_is_read_else_the_only_one_else_it_is_asked_for(tmp_path):
    folder = write_images(tmp_path / "a", "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "val/dog/4.png")
    found = read(folder)
    assert found.rows.names == ["test/cat/3.png"] and named(found) == ["cat"]
    assert found.source["split"] == "test" and found.source["other_splits"] == ["train", "val"]
    assert ("unused splits", "train, val") in found.summary
    assert named(read(folder, dataset_split="val")) == ["dog"]
    assert read(folder, dataset_split="train[:1]").rows.names == ["train/cat/1.png"]
    only = read(write_images(tmp_path / "b", "train/cat/1.png", "train/dog/2.png"))
    assert only.source["split"] == "train" and named(only) == ["cat", "dog"]
    with pytest.raises(UsageError, match="none is called test. Splits there: train, val. Name one with --split"):
        read(write_images(tmp_path / "c", "train/cat/1.png", "val/dog/2.png"))
    with pytest.raises(UsageError, match=r"^--split: the dataset has no split exam"):
        read(folder, dataset_split="exam")


def test_the_splits_of_tables_and_of_programs_are_found_alike(tmp_path):
    write_images(tmp_path, "1.png", "2.png", "3.png")
    table_of(["1.png,cat", "2.png,dog"], tmp_path / "train.csv")
    table_of(["3.png,cat"], tmp_path / "test.csv")
    assert named(read(str(tmp_path))) == ["cat"] and named(read(str(tmp_path), dataset_split="train")) == ["cat", "dog"]
    (tmp_path / "train.csv").unlink()
    table_of(["1.png,dog"], tmp_path / "val.csv")
    assert named(read(str(tmp_path))) == ["cat"], "no train is needed"
    words = of_labels(["cat", "dog"])
    assert named(read(datasets.DatasetDict(train=words, test=words.select([1])))) == ["dog"]
    assert read(datasets.DatasetDict(corrected=words)).source["split"] == "corrected"
    with pytest.raises(UsageError, match="Splits there: a, b"):
        read(datasets.DatasetDict(a=words, b=words))
    column = table_of(["1.png,dog,train", "2.png,cat,test"], tmp_path / "all.csv", "image,label,split")
    assert named(read(column)) == ["cat"]


def test_a_folder_with_a_table_in_each_split_needs_no_train(tmp_path):
    write_images(tmp_path / "test", "1.png", "2.png")
    write_images(tmp_path / "other", "x.png")
    table_of(["1.png,cat", "2.png,dog"], tmp_path / "test" / "labels.csv")
    assert named(read(str(tmp_path))) == ["cat", "dog"]


# Labels


def test_images_directly_in_a_folder_have_no_labels(tmp_path):
    found = read(write_images(tmp_path, "1.png", "2.png"))
    assert found.labels == [None, None] and found.class_names == [] and found.source["kind"] == "folder of images"
    assert ("without a label", "2 of them, which are only classified") in found.summary


def test_one_class_alone_is_enough(tmp_path):
    assert named(read(write_images(tmp_path, "cat/1.png", "cat/2.png"))) == ["cat", "cat"]


@pytest.mark.parametrize("given", [{}, {"label_column": "none"}])
def test_a_table_without_a_column_of_labels_has_none(tmp_path, given):
    write_images(tmp_path, "1.png", "2.png")
    columns = "image,width,height" if not given else "image,label,height"
    found = read(table_of(["1.png,20,14", "2.png,21,14"], tmp_path / "x.csv", columns), **given)
    assert found.labels == [None, None] and found.source["label_column"] is None


def test_a_label_that_is_missing_is_none_and_the_others_stay(tmp_path):
    write_images(tmp_path, "1.png", "2.png", "3.png")
    found = read(table_of(["1.png,", "2.png,dog", "3.png,NaN"], tmp_path / "x.csv"))
    assert named(found) == [None, "dog", None]
    found = read(of_labels([1, -1, 0], label=datasets.ClassLabel(names=["cat", "dog"])))
    assert named(found) == ["dog", None, "cat"]
    assert read(of_labels([-1, -1], label=datasets.ClassLabel(names=["cat", "dog"]))).class_names == []


def test_names_for_numbers_are_those_that_are_given():
    numbers = of_labels([2, 1, 2])
    assert named(read(numbers)) == ["2", "1", "2"]
    assert named(read(numbers, class_names=["cat", "dog"])) == ["dog", "cat", "dog"]
    with pytest.raises(UsageError, match="--class-names has 3 names, but the dataset has 2 classes"):
        read(numbers, class_names=["cat", "dog", "hen"])
    classes = datasets.ClassLabel(names=["cat", "dog", "hen"])
    assert named(read(of_labels([2, 0], label=classes))) == ["hen", "cat"], "not all classes need be there"


def test_names_of_a_test_that_has_not_all_classes():
    numbers, names = of_labels([2, 0, 3]), ["zero", "one", "two", "three"]
    assert named(read(numbers, class_names=names)) == ["two", "zero", "three"]
    assert named(read(of_labels(["TWO", "zero"]), class_names=names)) == ["two", "zero"]
    with pytest.raises(UsageError, match="--class-names has 4 names"):  # 1 may be the first or the second
        read(of_labels([1, 3]), class_names=names)
    with pytest.raises(UsageError, match="--class-names has 4 names"):
        read(of_labels([0, 4]), class_names=names)


def test_several_spellings_of_a_name_that_is_given_are_one_class():
    words = of_labels(["EIGHT", "eight", "nine", "Nine "])
    assert named(read(words, class_names=["eight", "nine"])) == ["eight", "eight", "nine", "nine"]
    assert named(read(of_labels(["Dame", "dame"]), class_names=["Dame", "dame"])) == ["Dame", "dame"]


def test_a_name_that_looks_like_a_missing_label_is_a_class_in_a_folder_or_of_the_model(tmp_path):
    words = ["N-A", "None", "nan", "null"]
    folder = write_images(tmp_path, *(f"{name}/1.png" for name in words))
    assert named(read(folder)) == words
    table = table_of([f"{name}/1.png,{name}" for name in words], tmp_path / "labels.csv")
    assert named(read(table)) == ["N-A", "None", None, None]
    assert named(read(table, ["Null", "cat"])) == ["N-A", "None", None, "null"]
    assert named(read(table, class_names=["N-A", "None", "nan", "null"])) == words


def test_flags_about_columns_need_columns(tmp_path):
    folder = write_images(tmp_path, "cat/1.png", "dog/2.png")
    with pytest.raises(UsageError, match="--image-column: the dataset is of the kind"):
        read(folder, image_column="x")
    assert read(folder, label_column="none").labels == [None, None]


def test_nothing_is_decoded(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    assert named(read(str(tmp_path))) == ["cat"]


def test_exports_with_labels_are_read_too(tmp_path):
    write_images(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.json").write_text(json.dumps({"1.png": "cat", "2.png": None}))
    assert named(read(str(tmp_path / "labels.json"))) == ["cat", None]


# The model's classes


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["dog", "cat"], [1, 0]),
        (["DOG", " Cat ", "great  Ape"], [1, 0, 2]),
        (["dog", "pluto"], [1, None]),
        (["a dog", "A  CAT"], [1, 0]),
        (["cat", "a dog"], [0, 1]),
        ([], []),
    ],
)
def test_names_match_if_they_differ_in_spelling_only_or_are_readable_names(own, expected):
    assert match_classes(own, ["cat", "dog", "Great ape"], ["a cat", "a dog", "an ape"]) == expected


def test_names_that_are_alike_in_the_model_match_only_exactly():
    names = ["Dame", "dame"]
    assert match_classes(["dame", "Dame", "DAME"], names) == [1, 0, None]
    assert match_classes(["1", "2.0", "3"], ["2", "1"]) == [1, 0, None]


def test_the_kind_of_name_that_most_are_of_comes_first():
    codes, readable = ["a", "b", "c"], ["b", "c", "d"]
    assert match_classes(["b", "c", "d"], codes, readable) == [0, 1, 2]
    assert match_classes(["a", "b", "c"], codes, readable) == [0, 1, 2]
