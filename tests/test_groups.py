"""Groups are never cut apart, and the classes are shared as evenly as that allows."""

import numpy as np
import pytest
from commands import train
from tiny import random_image

from vlm.common import UsageError
from vlm.config import resolve
from vlm.data import load_data
from vlm.data.cutting import share_units
from vlm.data.sources.groups import group_names, point_out_groups


def write_table(folder, rows, header="image,label,patient"):
    (folder / "i").mkdir(parents=True, exist_ok=True)
    lines = [header]
    for i, row in enumerate(rows):
        random_image(i, 20, 14).save(folder / "i" / f"{i}.png")
        lines.append(f"i/{i}.png,{row}")
    (folder / "t.csv").write_text("\n".join(lines))
    return folder / "t.csv"


def load(path, **more):
    return load_data(resolve({"model": "m", "dataset": str(path), **more}))


def groups_of(data):
    return {role: set(getattr(data, role).groups) - {None} for role in ("train", "validation", "test")}


def rows_of_patients(count, each=5):
    """Patients with some images each, of one class, the last with two."""
    rows = [f"{'ab'[p % 2]},p{p}" for p in range(count) for _ in range(each)]
    return [*rows, f"a,p{count}", f"b,p{count}"]


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_on_one_side_only(tmp_path, seed):
    data = load(write_table(tmp_path, rows_of_patients(20)), group_column="patient", seed=seed)
    found = groups_of(data)
    assert all(found.values()) and sum(map(len, found.values())) == 21 == len(set().union(*found.values()))
    counts = ", ".join(f"{len(groups)} in {role}" for role, groups in found.items())
    assert dict(data.summary)["groups"] == f"patient: 21 groups ({counts})"
    for split in (data.train, data.validation, data.test):
        assert set(split.labels) == {0, 1}


def test_without_the_flag_groups_are_cut_apart_and_the_column_is_pointed_out(tmp_path, capsys):
    data = load(write_table(tmp_path, rows_of_patients(20)))
    assert not data.train.has_groups and "groups" not in dict(data.summary)
    assert "look like groups or splits, but are not used: patient. --group-column keeps" in capsys.readouterr().err


def test_the_cut_depends_on_the_seed_only(tmp_path):
    path = write_table(tmp_path, rows_of_patients(20))
    first, again, other = (load(path, group_column="patient", seed=seed) for seed in (1, 1, 2))
    assert groups_of(first) == groups_of(again) != groups_of(other)


def test_equal_images_join_their_groups(tmp_path):
    path = write_table(tmp_path, rows_of_patients(20))
    random_image(0, 20, 14).save(tmp_path / "i" / "97.png")  # an image of p0 that p19 has, too
    found = groups_of(load(path, group_column="patient"))
    assert any({"p0", "p19"} <= groups for groups in found.values())


def test_rows_without_a_group_are_groups_of_their_own(tmp_path, capsys):
    rows = [f"{'ab'[i % 2]},{'' if i < 12 else f'p{i // 4}'}" for i in range(40)]
    data = load(write_table(tmp_path, rows), group_column="patient")
    assert "12 of 40 images have no group; each is one of its own" in capsys.readouterr().err
    assert len(data.validation) + len(data.test) + len(data.train) == 40


def test_splits_that_share_groups_are_counted_and_warned_of(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    for split, patients, first in (("train", range(10), 0), ("test", range(8, 14), 500)):
        lines = ["image,label,patient"]
        for i, patient in enumerate(p for p in patients for _ in range(4)):
            random_image(first + i, 20, 14).save(tmp_path / "d" / f"{split}{i}.png")
            lines.append(f"{split}{i}.png,{'ab'[patient % 2]},p{patient}")
        (tmp_path / "d" / f"{split}.csv").write_text("\n".join(lines))
    data = load(tmp_path / "d", group_column="patient")
    assert data.overlap["test_groups_in_train"] == 2
    assert "2 groups of test are in train, too: p8, p9" in capsys.readouterr().err
    # those that test has too stay in train, so that validation shares no group with test
    assert not groups_of(data)["validation"] & (groups_of(data)["test"] | groups_of(data)["train"])


def test_too_few_groups(tmp_path):
    with pytest.raises(UsageError, match="train has 2 groups that could be cut off, too few for validation and test"):
        load(write_table(tmp_path, [f"{'ab'[i % 2]},p{i // 10}" for i in range(20)]), group_column="patient")


def test_classes_of_one_group_cannot_be_cut(tmp_path):
    rows = [f"{'abc'[i % 3]},p{i % 3}" for i in range(24)]
    with pytest.raises(UsageError, match="train has 3 groups, of which none can go to validation and test"):
        load(write_table(tmp_path, rows), group_column="patient")


def test_groups_from_names(tmp_path, capsys):
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(24):
            patient = i // 3 if name == "a" else 8 + i // 3
            random_image(100 * (name == "b") + i, 20, 14).save(tmp_path / "d" / name / f"patient{patient}_slice{i}.png")
    load(tmp_path / "d")
    printed = capsys.readouterr().err
    assert "16 times patient with a number" in printed and "--group-pattern 'patient[-_ ]?[0-9]+'" in printed
    found = groups_of(load(tmp_path / "d", group_pattern="patient[-_ ]?[0-9]+"))
    assert sum(map(len, found.values())) == 16 and "patient3" in set().union(*found.values())
    found = groups_of(load(tmp_path / "d", group_pattern=r"patient(\d)"))
    assert set().union(*found.values()) == {str(i) for i in range(10)}
    with pytest.raises(UsageError, match="it is in none of the names of the folder, first a/"):
        load(tmp_path / "d", group_pattern="person")


@pytest.mark.parametrize(
    "names",
    [
        [f"cat/img_{i:04}.png" for i in range(40)],
        [f"mars/mars_{i}.png" for i in range(40)],
        [f"{i:06}.jpg" for i in range(40)],
        [f"train/class{i % 3}/image{i}.jpg" for i in range(40)],
        [f"a/IMG_2024{i:04}_12{i:02}00.jpg" for i in range(40)],
        [f"scan1_part{i}.png" for i in range(40)],
        [],
    ],
)
def test_names_that_only_count_are_not_pointed_out(names, capsys):
    point_out_groups(names)
    assert capsys.readouterr().err == ""


def shares_of(parts, labels):
    total = np.bincount(labels)
    return [np.bincount([labels[i] for i in part], minlength=len(total)) / total for part in parts]


def test_classes_are_divided_by_the_shares():
    rng = np.random.default_rng(0)
    labels, units = [], []
    for _ in range(300):
        size, label = int(rng.integers(1, 6)), int(rng.integers(4))
        units.append(list(range(len(labels), len(labels) + size)))
        labels += [label] * size
    parts = share_units(units, labels, [0.15, 0.15, 0.7], [1])
    assert sorted(i for part in parts for i in part) == list(range(len(labels)))
    where = {i: number for number, part in enumerate(parts) for i in part}
    assert all(len({where[i] for i in unit}) == 1 for unit in units)
    for share, found in zip([0.15, 0.15, 0.7], shares_of(parts, labels), strict=True):
        assert np.abs(found - share).max() < 0.03


def test_a_large_group_leaves_each_share_something():
    units = [list(range(50)), *([i] for i in range(50, 60))]
    parts = share_units(units, [0] * 60, [0.15, 0.15, 0.7], [1])
    assert all(parts) and parts[2][:50] == units[0]


def test_a_class_with_few_groups_is_in_the_largest_share():
    units = [[0, 1], [2, 3], [4], [5], [6]]
    parts = share_units(units, [0, 0, 0, 0, 1, 1, 1], [0.2, 0.2, 0.6], [3])
    assert any(i in parts[2] for i in range(4)) and all(any(i in part for i in (4, 5, 6)) for part in parts)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-column", "p", "--group-pattern", "x"], "exclude each other"),
        (["--group-pattern", "("], "expected a regular expression of at most 200 characters"),
        (["--group-pattern", ""], "expected a regular expression"),
    ],
)
def test_wrong_usage(flags, message, capsys):
    assert train("--model", "m", "--dataset", "d", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_folder_has_no_column_of_groups(color_folder):
    with pytest.raises(UsageError, match="--group-column: the dataset is of the kind"):
        load(color_folder, group_column="patient")


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="--group-column nothing: no such column"):
        load(write_table(tmp_path, rows_of_patients(4)), group_column="nothing")


def test_spellings_of_a_group_are_one_and_texts_for_missing_are_none():
    assert group_names(["2", "2.0", "002", 2, 2.0, "P1 ", "p1"], "x") == ["2", "2", "2", "2", "2", "p1", "p1"]
    assert group_names(["NaN", "none", None, float("nan"), ""], "x") == [None] * 5
