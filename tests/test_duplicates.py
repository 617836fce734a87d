"""Equal images are counted and named, and stay on one side when splits are cut from train."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from commands import train
from PIL import Image
from test_data import ROLES, counts, draw, images, load, refuse

from vlm.data import Data

NOTHING = dict.fromkeys(
    [
        *("test_in_train", "validation_in_train", "test_in_validation"),
        *("twice_in_train", "twice_in_validation", "twice_in_test", "under_two_labels"),
        *("test_near_train", "validation_near_train", "test_near_validation"),
    ],
    0,
)


def given_splits(root: Path, each: int = 3) -> str:
    return images(root, {f"{split}/{c}": each for split in ("train", "val", "test") for c in ("a", "b")})


def copy(root: Path, source: str, *targets: str) -> None:
    for target in targets:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / source, root / target)


def roles_by_name(data: Data) -> dict[str, str]:
    return {name: role for role in ROLES for name in getattr(data, role).names}


def test_different_images_are_no_duplicates(tmp_path, capsys):
    data = load(given_splits(tmp_path))
    assert data.overlap == NOTHING and "equal images" not in dict(data.summary)
    assert capsys.readouterr().err.count("\n") <= 1, "the bar only"


def test_images_of_given_splits_that_overlap_are_counted_and_the_first_are_named(tmp_path, capsys):
    folder = given_splits(tmp_path)
    copy(tmp_path, "train/a/0.png", "test/a/x.png", "test/a/y.png", "val/a/x.png")
    copy(tmp_path, "train/b/1.png", "test/b/x.png")
    data = load(folder)
    found = {"test_in_train": 3, "validation_in_train": 1, "test_in_validation": 2, "twice_in_test": 1}
    assert data.overlap == NOTHING | found and counts(data) == [6, 7, 9], "given splits stay as they are"
    assert dict(data.summary)["equal images"] == (
        "3 of 9 images of test are in train, too; 1 of 7 images of validation is in train, too; "
        "2 of 9 images of test are in validation, too; 1 of 9 images of test is a copy of another in it"
    )
    notes = capsys.readouterr().err
    pairs = "test/a/x.png = train/a/0.png, test/a/y.png = train/a/0.png, test/b/x.png = train/b/1.png"
    assert f"3 of 9 images of test are in train, too: {pairs}\n" in notes


def test_an_image_under_two_labels_is_named_with_both(tmp_path, capsys):
    folder = given_splits(tmp_path)
    copy(tmp_path, "train/a/0.png", "train/b/x.png")
    data = load(folder)
    assert data.overlap == NOTHING | {"twice_in_train": 1, "under_two_labels": 2}
    notes = capsys.readouterr().err
    assert (
        "2 images are under another label, too: train/a/0.png (a) = train/b/x.png (b). Correct their labels\n" in notes
    )


def test_the_same_pixels_in_another_file_are_the_same_image(tmp_path):
    folder = given_splits(tmp_path)
    Image.open(tmp_path / "train/a/0.png").save(tmp_path / "test/a/x.bmp")
    (tmp_path / "test/b/link.png").symlink_to(tmp_path / "train/b/0.png")
    assert load(folder).overlap == NOTHING | {"test_in_train": 2}


def test_equal_images_stay_on_one_side_of_the_cut(tmp_path):
    """Half of the images are there four times: cut one by one, most of them would be in several splits."""
    folder = images(tmp_path, {"a": 20, "b": 20})
    for c in ("a", "b"):
        for i in range(10):
            copy(tmp_path, f"{c}/{i}.png", *(f"{c}/{i} copy {n}.png" for n in range(3)))
    for seed in range(3):
        data = load(folder, seed=seed)
        assert data.overlap == NOTHING | {"twice_in_train": 60}, "those that are there once are drawn first"
        assert counts(data) == [88, 6, 6], "15% of 20 different images of each class"
    assert load(folder, seed=1).test.names != load(folder, seed=2).test.names
    assert load(folder, seed=1).test.names == load(folder, seed=1).test.names


def test_a_class_of_copies_only_is_cut_by_different_images(tmp_path):
    folder = images(tmp_path, {"a": 20, "b": 6})
    for i in range(6):
        copy(tmp_path, f"b/{i}.png", f"b/{i} copy.png")
    data = load(folder)
    role_of = roles_by_name(data)
    assert all(role_of[f"b/{i}.png"] == role_of[f"b/{i} copy.png"] for i in range(6))
    assert Counter(role_of[f"b/{i}.png"] for i in range(6)) == {"train": 4, "validation": 1, "test": 1}


def test_images_under_two_labels_stay_in_train(tmp_path):
    folder = images(tmp_path, {"a": 8, "b": 8})
    copy(tmp_path, "a/0.png", "b/x.png")
    copy(tmp_path, "a/1.png", "b/y.png")
    for seed in range(4):
        role_of = roles_by_name(load(folder, seed=seed, validation_ratio=0.3, test_ratio=0.3))
        assert {role_of[name] for name in ("a/0.png", "b/x.png", "a/1.png", "b/y.png")} == {"train"}


def test_what_a_given_split_has_is_not_cut_from_train_too(tmp_path):
    folder = images(tmp_path, {f"{split}/{c}": 8 for split in ("train", "test") for c in ("a", "b")})
    for i in range(5):
        copy(tmp_path, f"train/a/{i}.png", f"test/a/copy {i}.png")
    for seed in range(4):
        data = load(folder, seed=seed, validation_ratio=0.3)
        assert data.overlap == NOTHING | {"test_in_train": 5} and counts(data) == [13, 3, 21]


def test_a_class_with_too_few_different_images_is_named(tmp_path):
    folder = images(tmp_path, {"a": 5, "b": 2})
    copy(tmp_path, "b/0.png", "b/x.png", "b/y.png")
    refuse(r"fewer than 3 images of b \(2\).* Equal images \(b/0.png = b/x.png\) count as one", folder)


def test_a_link_to_a_folder_above_does_not_multiply_the_images(tmp_path):
    folder = images(tmp_path / "data", {"a": 6, "b": 6})
    (tmp_path / "data/a/up").symlink_to("..")
    data = load(folder)
    assert sum(counts(data)) == 12 and data.overlap == NOTHING
    assert all(len(Path(name).parts) == 2 for role in ROLES for name in getattr(data, role).names)


def test_max_samples_decodes_only_what_is_used_and_leaves_copies_out(tmp_path, capsys):
    folder = images(tmp_path, {"a": 40, "b": 40})
    for c in ("a", "b"):
        for i in range(40):
            copy(tmp_path, f"{c}/{i}.png", f"{c}/{i} copy.png")
    (tmp_path / "a/damaged.png").write_bytes(b"damaged")
    data = load(folder, max_samples=30, seed=5)
    train, validation, test = (set(getattr(data, role).keys) for role in ROLES)
    assert not (train & validation or train & test or validation & test) and len(data.train) == 30
    assert data.overlap["test_in_train"] == 0 and 0 < len(data.test) < 24
    assert "images of test are left out, as another split has them, too" in capsys.readouterr().err
    assert not data.skipped, "an image that is not used is not looked at"


def test_max_samples_of_which_no_test_image_is_left_is_refused(tmp_path):
    folder = images(tmp_path, {"a": 1, "b": 1})
    for c in ("a", "b"):
        copy(tmp_path, f"{c}/0.png", *(f"{c}/{n}.png" for n in range(1, 9)))
    refuse("validation is cut from train, but other splits have all of its", folder, max_samples=8)


def test_unreadable_images_equal_nothing(tmp_path):
    folder = images(tmp_path, {"a": 30, "b": 30})
    for name in ("a/1.png", "a/2.png"):
        (tmp_path / name).write_bytes(b"damaged")
    data = load(folder)
    assert data.overlap == NOTHING and len(data.skipped) == 2


def test_hostile_names_are_printed_in_one_line(tmp_path, capsys):
    folder = given_splits(tmp_path)
    draw(tmp_path / "val/a/x\n\x1b[31m.png", "new")
    copy(tmp_path, "val/a/x\n\x1b[31m.png", "val/a/y.png")
    assert load(folder).overlap["twice_in_validation"] == 1
    assert "val/a/y.png = val/a/x  [31m.png\n" in capsys.readouterr().err


def test_no_more_than_three_pairs_are_named(tmp_path, capsys):
    folder = given_splits(tmp_path, each=5)
    copy(tmp_path, "train/a/0.png", *(f"test/a/x{n}.png" for n in range(4)))
    load(folder)
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.count(" = ") == 3 and first.endswith(", ...")


@pytest.mark.slow
def test_a_run_with_test_images_in_train_says_so_everywhere(tmp_path, tiny_model, capsys):
    given_splits(tmp_path / "data")
    copy(tmp_path / "data", "train/a/0.png", "test/a/x.png", "test/a/y.png")
    output = tmp_path / "out"
    flags = ("--dataset", tmp_path / "data", "--model", tiny_model, "--epochs", 0, "--output-dir", output)
    assert train(*flags, "--device", "cpu") == 0
    results = json.loads((output / "results.json").read_text())
    assert results["overlap"] == NOTHING | {"test_in_train": 2, "twice_in_test": 1}
    unseen = results["test"]["not_in_train"]
    names = results["test"]["per_class"]
    assert unseen["pictures"] == 6 and sum(measures["support"] for measures in names.values()) == 8
    value, low, high = unseen["accuracy"]
    assert low <= value <= high and 6 * value == pytest.approx(round(6 * value))
    printed = capsys.readouterr()
    assert "2 of 8 test images are in train)" in printed.out
    page = (output / "report.html").read_text()
    assert "2 of 8 images of test are in train, too" in page and "This model, new images" in page
