"""Datasets that a program has made: of the datasets library, tables of pandas, lists of pairs."""

import io

import datasets
import numpy as np
import pandas
import pytest
import torch
from tiny import random_image

from vlm.common import UsageError
from vlm.config import resolve
from vlm.data import load_data

NAMES = ["cat", "dog"]


def load(data, **more):
    return load_data(resolve({"model": "m", "dataset": "(in memory)", **more}), data)


def a_dataset(count=12):
    return datasets.Dataset.from_dict(
        {"image": [random_image(i, 20, 14) for i in range(count)], "label": [0, 1] * (count // 2)}
    )


def pairs(count=12, first=0):
    return [(random_image(first + i, 20, 14), NAMES[i % 2]) for i in range(count)]


def pixels(data):
    """What the splits have, whatever its order: the pixels of each image and its class."""
    samples = [sample for split in (data.train, data.validation, data.test) for sample in split]
    return sorted((sample.image.tobytes(), data.class_names[sample.label]) for sample in samples)


def test_pairs_of_any_kind_of_image_are_read_as_the_dataset_they_are(tmp_path):
    expected = pixels(load(a_dataset().cast_column("label", datasets.ClassLabel(names=NAMES))))
    given = []
    for place, (image, label) in enumerate(pairs()):
        path, content = tmp_path / f"{place}.png", io.BytesIO()
        image.save(path)
        image.save(content, "PNG")
        kinds = (image, np.asarray(image), content.getvalue(), str(path), path)
        given.append((kinds[place % len(kinds)], label))
    loaded = load(given)
    assert loaded.class_names == NAMES and not loaded.skipped and pixels(loaded) == expected
    assert dict(loaded.summary)["dataset"] == "list of pairs, in memory"
    assert pixels(load(tuple(map(list, given)))) == expected


def test_labels_may_be_numbers_of_numpy_and_torch():
    numbers = [(image, (np.int64, torch.tensor)[i % 2](NAMES.index(name))) for i, (image, name) in enumerate(pairs())]
    loaded = load(numbers, class_names=NAMES)
    assert loaded.class_names == NAMES and pixels(loaded) == pixels(load(pairs()))


def test_a_dict_has_the_splits_by_name():
    loaded = load(
        {"train": pairs(), "val": pairs(4, 100), "test": pandas.DataFrame(pairs(6, 200), columns=["image", "label"])}
    )
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [12, 4, 6]
    loaded = load({"train": a_dataset(), "test": a_dataset(4)}, class_names=NAMES)
    assert len(loaded.test) == 4 and dict(loaded.summary)["dataset"] == "DatasetDict, in memory"


def test_a_table_of_pandas_has_columns_as_any_table(tmp_path):
    for place, (image, _) in enumerate(pairs()):
        image.save(tmp_path / f"{place}.png")
    frame = pandas.DataFrame(
        {"file": [f"{i}.png" for i in range(12)], "kind": pandas.Categorical([name for _, name in pairs()]), "n": 1}
    )
    loaded = load(frame, image_folder=str(tmp_path), label_column="kind")
    assert loaded.class_names == NAMES and pixels(loaded) == pixels(load(pairs()))
    with pytest.raises(UsageError, match="--label-column species"):
        load(frame, label_column="species")


@pytest.mark.parametrize("kind", [str, int])
def test_a_missing_value_of_pandas_is_a_missing_label(kind, capsys):
    labels = [name if kind is str else NAMES.index(name) for _, name in pairs()] + [pandas.NA]
    images = [image for image, _ in pairs()] + [pairs(1)[0][0]]
    frame = pandas.DataFrame(
        {"image": images, "label": pandas.Series(labels, dtype="string" if kind is str else "Int64")}
    )
    for data in (frame, list(zip(images, labels, strict=True))):
        assert pixels(load(data, class_names=NAMES)) == pixels(load(pairs()))
        assert "train: 1 of 13 images have no label and are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data, found",
    [
        ([1, 2], r"dataset\[0\] is of the type int, and no pair"),
        ([*pairs(2), ("a", "b", "c")], r"dataset\[2\] is of the type tuple, and no pair"),
        ([], "dataset is empty"),
        (7, "dataset is of the type int"),
        ({"train": pairs(), "test": "folder"}, r"dataset\['test'\] is of the type str"),
        (a_dataset().to_iterable_dataset(), "dataset is of the type IterableDataset"),
    ],
    ids=["numbers", "triples", "empty", "number", "text", "stream"],
)
def test_other_objects_are_refused(data, found):
    with pytest.raises(UsageError, match=f"{found}. Expected a Dataset or DatasetDict"):
        load(data)


def test_a_table_with_two_columns_of_one_name_is_refused():
    with pytest.raises(UsageError, match="two columns of the same name"):
        load(pandas.DataFrame(pairs(), columns=["label", "label"]))


def test_splits_of_different_kinds_are_refused():
    with pytest.raises(UsageError, match=r"dataset\['train'\] is a Dataset and dataset\['test'\] a list"):
        load({"train": a_dataset(), "test": pairs()})


@pytest.mark.parametrize("make", [datasets.DatasetDict, dict])
def test_the_splits_of_an_object_without_train_are_named(make):
    with pytest.raises(UsageError, match="no split called train. Splits there: other, test"):
        load(make(test=a_dataset(), other=a_dataset()))


def test_a_run_of_a_program_cannot_be_continued_by_its_name():
    with pytest.raises(UsageError, match=r"train\(dataset=..., resume=True, output_dir=...\)"):
        load(None)
