"""Splits, class names, balance, unreadable images; the sources themselves are in test_sources.py."""

import os
import pickle
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.common.errors import UsageError
from vlm.config import resolve
from vlm.data import Data, load_data

ROLES = ("train", "validation", "test")


def draw(path: Path, content: object = None) -> None:
    """An image that is equal only to those with the same content; without content, to no other path's. A number below
    256 is the gray of all pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_gray = isinstance(content, int) and content < 256
    digest = sha256(os.fsencode(str(path if content is None else content))).digest()
    Image.frombytes("RGB", (2, 2), bytes([content] * 12) if is_gray else digest[:12]).save(path)


def images(root: Path, counts: dict[str, int]) -> str:
    """An image folder: `counts` maps CLASS or SPLIT/CLASS to a number of images."""
    for place, count in counts.items():
        for i in range(count):
            draw(root / place / f"{i}.png")
    return str(root)


def load(dataset: str | Path, **settings) -> Data:
    return load_data(resolve({"dataset": str(dataset)} | settings))


def refuse(message: str, dataset: str | Path, **settings) -> None:
    """`load` must end with a UsageError that matches."""
    with pytest.raises(UsageError, match=message):
        load(dataset, **settings)


def counts(data: Data) -> list[int]:
    return [len(getattr(data, role)) for role in ROLES]


def per_class(data: Data) -> list[dict[str, int]]:
    return [dict(Counter(data.class_names[label] for label in getattr(data, role).labels)) for role in ROLES]


def test_the_demo_is_scikit_learns_digits():
    data = load_data(resolve({"demo": True}))
    assert counts(data) == [1259, 269, 269]
    assert data.class_names == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    sample = data.train[0]
    assert (sample.image.mode, sample.image.size) == ("RGB", (8, 8))
    assert (sample.label, sample.name) == (data.train.labels[0], data.train.names[0])
    assert max(np.asarray(data.train[i].image).max() for i in range(9)) == 255
    assert not set(data.train.names) & set(data.test.names)


def test_missing_splits_are_cut_from_train_by_class_and_seed(tmp_path):
    folder = images(tmp_path, {"a": 20, "b": 40, "c": 3})
    data = load(folder)
    assert per_class(data) == [{"a": 14, "b": 28, "c": 1}, {"a": 3, "b": 6, "c": 1}, {"a": 3, "b": 6, "c": 1}]
    names = [set(getattr(data, role).names) for role in ROLES]
    assert len(set.union(*names)) == 63 == sum(map(len, names)), "no image may be in two splits"
    assert load(folder).test.names == data.test.names
    assert load(folder, seed=1).test.names != data.test.names
    assert counts(load(folder, validation_ratio=0.5, test_ratio=0.25)) == [16, 31, 16]


def test_a_seed_gives_these_splits_for_ever(tmp_path):
    folder = images(tmp_path, {"a": 8, "b": 8})
    data = load(folder, seed=7, validation_ratio=0.25, test_ratio=0.25)
    assert data.validation.names == ["a/3.png", "a/6.png", "b/4.png", "b/7.png"]
    assert data.test.names == ["a/0.png", "a/1.png", "b/1.png", "b/2.png"]
    assert load(folder, seed=7, max_samples=4).train.names == ["a/1.png", "a/5.png", "b/5.png", "b/6.png"]
    assert load(folder, seed=7, shots=2).train.names == ["a/2.png", "a/5.png", "b/1.png", "b/2.png"]


@pytest.mark.parametrize(
    ("there", "expected"), [("val", [32, 3, 8]), ("test", [32, 8, 3]), ("val and test", [40, 3, 3])]
)
def test_only_the_missing_split_is_cut(tmp_path, there, expected):
    layout = {"train/a": 20, "train/b": 20} | {
        f"{name}/{c}": n for name in there.split(" and ") for c, n in (("a", 1), ("b", 2))
    }
    data = load(images(tmp_path, layout), validation_ratio=0.2, test_ratio=0.2)
    assert counts(data) == expected
    table = dict(data.summary)
    assert [("cut from train" in table[role]) for role in ROLES] == [False, "val" not in there, "test" not in there]


def test_few_shot_partitions_are_not_used_and_named(tmp_path):
    data = load(images(tmp_path, {"train/a": 5, "train/b": 5, "train_1_shot/a": 1, "train_1_shot/b": 1}))
    assert sum(counts(data)) == 10
    assert dict(data.summary)["unused splits"] == "train_1_shot"


def test_no_train_split_is_refused(tmp_path):
    refuse("no split called train. Splits there: test", images(tmp_path, {"test/a": 3, "test/b": 3}))


def test_an_empty_split_is_refused(tmp_path):
    folder = images(tmp_path, {"train/a": 3, "train/b": 3})
    (tmp_path / "val").mkdir()
    refuse("split val is empty", folder)


def test_a_class_with_too_few_images_to_cut_is_named(tmp_path):
    refuse(r"fewer than 3 images of rare \(1\).*at least 3", images(tmp_path / "cut", {"common": 9, "rare": 1}))
    layout = {f"{split}/{c}": 1 for split in ("train", "val", "test") for c in ("a", "b")}
    assert counts(load(images(tmp_path / "whole", layout))) == [2, 2, 2]


def test_one_class_only_is_refused(tmp_path):
    refuse(r"only one class \(cats\)", images(tmp_path, {"cats": 9}))


def test_a_label_of_another_split_that_train_does_not_have_is_named(tmp_path):
    layout = {"train/a": 5, "train/b": 5, "test/a": 1, "test/emu": 1}
    refuse(r"test: the label emu is outside the names of train \(a, b\)", images(tmp_path, layout))


def test_given_names_that_are_the_datasets_own_set_the_order(tmp_path):
    folder = images(tmp_path, {"ael": 5, "cli": 6, "mix": 7})
    data = load(folder, class_names=["MIX", "ael", "cli"])
    assert data.class_names == ["MIX", "ael", "cli"]
    assert all(
        Path(name).parts[0] == data.class_names[label].lower()
        for name, label in zip(data.train.names, data.train.labels, strict=True)
    )
    assert "matched by name" in dict(data.summary)["class names"]


def test_new_names_rename_by_index_and_the_table_says_so(tmp_path):
    data = load(images(tmp_path, {"a": 5, "b": 6}), class_names=["cat", "b"])
    assert data.class_names == ["cat", "b"]
    assert {Path(name).parts[0]: label for name, label in zip(data.train.names, data.train.labels, strict=True)} == {
        "a": 0,
        "b": 1,
    }
    assert "renamed by index: a -> cat" in dict(data.summary)["class names"]


def test_a_mistyped_name_among_the_datasets_own_does_not_rename_other_classes(tmp_path):
    folder = images(tmp_path, {"ael": 5, "cli": 5, "mix": 5})
    refuse("mix is one of the dataset's own names, but cli is missing", folder, class_names=["mix", "ael", "clj"])


def test_a_count_of_names_that_does_not_fit_says_both_counts(tmp_path):
    folder = images(tmp_path, {"a": 5, "b": 5, "c": 5})
    refuse("--class-names has 2 names, but the dataset has 3 classes: a, b, c", folder, class_names=["a", "b"])


def test_max_samples_holds_for_each_split_and_is_balanced(tmp_path):
    folder = images(tmp_path, {"train/a": 30, "train/b": 30, "train/c": 2, "test/a": 5, "test/b": 1})
    data = load(folder, max_samples=10)
    train, validation, test = per_class(data)
    assert train["c"] == 1 and {train["a"], train["b"]} == {4, 5}
    assert validation == {"a": 4, "b": 4, "c": 1} and test == {"a": 5, "b": 1}, "smaller splits stay whole"
    assert load(folder, max_samples=10).train.names == data.train.names
    assert ", drawn " in dict(data.summary)["train"]
    assert load(folder, max_samples=10, seed=1).train.names != data.train.names
    refuse("--max-samples 2: expected at least one for each of the 3 classes", folder, max_samples=2)


def test_unreadable_images_are_skipped_counted_and_named(tmp_path, capsys):
    folder = images(tmp_path, {f"{split}/{c}": 30 for split in ("train", "val", "test") for c in ("a", "b")})
    (tmp_path / "train/a/3.png").write_bytes(b"damaged")
    (tmp_path / "test/b/7.png").write_bytes((tmp_path / "test/b/8.png").read_bytes()[:40])
    data = load(folder)
    assert counts(data) == [59, 60, 59]
    assert [text.split(":")[0] for text in data.skipped] == ["train/a/3.png", "test/b/7.png"]
    assert not set(data.train.names) & {"train/a/3.png"} and len(data.train.labels) == 59
    assert "train/a/3.png" in capsys.readouterr().err
    assert dict(data.summary)["skipped"] == "2 unreadable images" and data.source["unreadable"] == 2


def test_more_than_5_percent_unreadable_images_of_a_split_stop(tmp_path):
    folder = images(tmp_path, {f"{split}/{c}": 30 for split in ("train", "val", "test") for c in ("a", "b")})
    for i in range(3):
        (tmp_path / f"val/a/{i}.png").write_bytes(b"damaged")
    assert counts(load(folder)) == [60, 57, 60], "exactly 5% is allowed"
    (tmp_path / "val/b/1.png").write_bytes(b"damaged")
    refuse(r"4 of 60 images of validation are unreadable, more than 5%. First: val/a/0.png", folder)


def test_unreadable_images_are_counted_before_train_is_cut(tmp_path):
    """However many of them fall into the small test split."""
    folder = Path(images(tmp_path, {"a": 20, "b": 20}))
    for name in load(folder).test.names[:2]:
        (folder / name).write_bytes(b"damaged")
    data = load(folder)
    assert len(data.skipped) == 2 and counts(data) == [28, 6, 4]
    for name in data.validation.names[:3]:
        (folder / name).write_bytes(b"damaged")
    refuse(r"5 of 40 images of train \(validation and test are cut from it\) are unreadable", folder)
    refuse("Repair or remove these files", folder)


def test_a_split_without_any_readable_image_is_refused(tmp_path):
    ratios = {"validation_ratio": 0.01, "test_ratio": 0.01}
    folder = Path(images(tmp_path, {"a": 70, "b": 70}))
    for name in load(folder, **ratios).test.names:
        (folder / name).write_bytes(b"damaged")
    refuse("test has no readable image. Repair its images, or add some", folder, **ratios)


def test_a_class_that_loses_its_last_image_is_named(tmp_path):
    folder = images(
        tmp_path, {f"{split}/{c}": n for split in ("train", "val", "test") for c, n in (("a", 60), ("rare", 1))}
    )
    (tmp_path / "train/rare/0.png").write_bytes(b"damaged")
    refuse("train has no readable image of rare", folder)


def test_columns_cannot_be_named_if_there_are_none(tmp_path):
    refuse('"image folder", which has no columns', images(tmp_path, {"a": 5, "b": 5}), image_column="image")


def test_what_the_metadata_say_names_no_path_of_this_machine(tmp_path):
    source = load(images(tmp_path / "pets", {"a": 5, "b": 5})).source
    assert source["dataset"] == "pets" and str(tmp_path) not in str(source)
    assert source["splits"]["test"] == {"from": "cut from train", "pictures": 2}


def test_the_fingerprint_says_which_part_of_the_data_differs(tmp_path):
    folder = images(tmp_path, {f"{split}/{c}": 3 for split in ("train", "val", "test") for c in ("a", "b")})

    def changed() -> set[str]:
        now = load(folder).fingerprint
        return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}

    before = load(folder).fingerprint
    assert not changed() and before["labels of train"] == before["labels of test"]
    draw(tmp_path / "val/b/1.png", "other")
    assert changed() == {"images of validation"}
    before = load(folder).fingerprint
    (tmp_path / "train/a").rename(tmp_path / "train/x")
    (tmp_path / "train/b").rename(tmp_path / "train/a")
    (tmp_path / "train/x").rename(tmp_path / "train/b")
    assert changed() == {"images of train"}, "labels are numbers: the images have changed places"
    before = load(folder).fingerprint
    draw(tmp_path / "test/a/3.png", "one more")
    assert changed() == {"labels of test", "images of test", "reasonings of test"}
    before = load(folder).fingerprint
    for split in ("train", "val", "test"):
        (tmp_path / split / "a").rename(tmp_path / split / "Aa")
    assert changed() == {"class names"}


def _first(split) -> tuple:
    return split[0].image.size, split[0].label, split[0].name


def test_a_split_works_in_another_process(tmp_path):
    split = load(images(tmp_path, {"a": 5, "b": 5})).train
    assert pickle.loads(pickle.dumps(split)).labels == split.labels
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_first, split).result() == _first(split)


def test_shots_are_so_many_of_each_class_by_the_seed(tmp_path):
    folder = images(tmp_path, {"a": 20, "b": 40, "c": 5})
    data = load(folder, shots=3)
    assert per_class(data)[0] == {"a": 3, "b": 3, "c": 3}
    assert per_class(data)[1:] == per_class(load(folder))[1:], "the other splits are those without it"
    assert set(data.train.names) <= set(load(folder).train.names)
    assert dict(data.summary)["train"] == "9 images (the folder, 3 of each class)"
    assert load(folder, shots=3).train.names == data.train.names
    assert load(folder, shots=3, seed=1).train.names != data.train.names
    assert per_class(load(folder, shots=3, max_samples=9))[0] == {"a": 3, "b": 3, "c": 3}


def test_a_class_with_fewer_images_than_shots_is_named(tmp_path):
    folder = images(tmp_path, {"a": 20, "b": 40, "c": 5})
    refuse(r"--shots 4: train has fewer images of c \(3\)\. Expected at least 4", folder, shots=4)
    refuse(
        r"--shots 3: train has fewer images of .* after --max-samples 6\. Expected at least 3",
        folder,
        shots=3,
        max_samples=6,
    )
    refuse("--shots 0: expected a whole number of at least 1", folder, shots=0)
