"""Images that look almost like one in another split are counted, named and shown."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from test_data import images, load

from vlm.data import Data, Rows, Split
from vlm.data.duplicates import cure_of_near
from vlm.data.looks import perceptual_hash
from vlm.data.near_duplicates import find_near
from vlm.data.readable import decode


def scene(seed: int, edge: int = 96) -> Image.Image:
    """An image with structure at all sizes, like no other seed's: with coarse parts stronger than fine ones."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(0, 160 / n, (n, n)) for n in (3, 6, 12, 24)]
    whole = sum(np.asarray(Image.fromarray(p.astype(np.float32)).resize((edge, edge))) for p in parts)
    gray = Image.fromarray(np.clip(128 + whole, 0, 255).astype(np.uint8))
    return Image.merge("RGB", [gray, gray.point(lambda value: value * 9 // 10), gray.point(lambda value: value // 2)])


def again_as_jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def cut(image: Image.Image) -> Image.Image:
    edge = round(0.015 * image.width)
    return image.crop((edge, edge, image.width - edge, image.height - edge))


CHANGES = {
    "compressed again": again_as_jpeg,
    "smaller": lambda image: image.resize((image.width * 4 // 5, image.height * 4 // 5)),
    "much smaller": lambda image: image.resize((image.width // 3, image.height // 3)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "cut": cut,
    "gray": lambda image: image.convert("L").convert("RGB"),
}


def splits_of(**given: list[Image.Image]) -> dict[str, Split]:
    splits = {}
    for role in ("train", "validation", "test"):
        found = given.get(role, [])
        names = [f"{role}/{i}" for i in range(len(found))]
        splits[role] = Split(Rows(found, [0] * len(found), names), range(len(found)), [0] * len(found))
    decode(splits)
    return splits


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("edge", [96, 700])
def test_a_changed_copy_is_found_among_others(change, edge):
    train = [scene(i, edge) for i in range(8)]
    test = [scene(99, edge), change(train[5]), scene(98, edge)]
    (pair,) = find_near(splits_of(train=train, test=test))
    assert pair[:4] == ("test", 1, "train", 5) and pair.kind == "test_near_train"


def test_of_several_ones_the_most_similar_is_named_and_the_nearest_pairs_come_first():
    train = [cut(scene(1)), again_as_jpeg(scene(1)), scene(2)]
    pairs = find_near(splits_of(train=train, test=[cut(scene(2)), scene(1)]))
    assert [(pair.position, pair.other_position) for pair in pairs] == [(1, 1), (0, 2)]
    assert pairs[0].distance < pairs[1].distance


def test_different_scenes_are_no_near_duplicates():
    splits = splits_of(train=[scene(i) for i in range(150)], test=[scene(1000 + i) for i in range(150)])
    assert all(check.look for check in splits["train"].checks) and not find_near(splits)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (64, 64), "white"),
        Image.linear_gradient("L").convert("RGB"),
        scene(1, 31),
        scene(1).point(lambda value: 128 + value // 128),
        Image.effect_noise((600, 600), 4).convert("RGB").resize((64, 64)).point(lambda value: 128 + (value > 150)),
    ],
    ids=["flat", "a gradient", "small", "two gray levels", "a little noise"],
)
def test_what_shows_too_little_has_no_hash(image):
    assert perceptual_hash(image) is None
    assert not find_near(splits_of(train=[image], test=[image.transpose(Image.Transpose.ROTATE_90)]))


def test_equal_images_and_unreadable_ones_and_those_of_unknown_content_are_none():
    splits = splits_of(train=[scene(1), scene(2), None], test=[scene(1), None, cut(scene(2))])
    assert [pair.position for pair in find_near(splits)] == [2], "the first is counted as equal"
    for split in splits.values():
        split.keys = [None] * len(split)
    assert [pair.position for pair in find_near(splits)] == [0, 2], "an unknown key equals no other"
    splits["train"].checks = [None] * 3
    assert not find_near(splits)


def three_splits(root) -> Data:
    folder = images(root, {f"{split}/{name}": 3 for split in ("train", "val", "test") for name in ("a", "b")})
    scene(1).save(root / "train/a/one.png")
    scene(2).save(root / "val/b/two.png")
    for i, change in enumerate((cut, again_as_jpeg, CHANGES["brighter"], CHANGES["smaller"])):
        change(scene(1)).save(root / f"test/b/one {i}.png")
    cut(scene(2)).save(root / "test/a/two again.png")
    again_as_jpeg(scene(1)).save(root / "val/b/one again.png")
    return load(folder)


@pytest.mark.parametrize(
    ("has_columns", "is_cut", "said"),
    [(True, True, "see --group-column"), (False, True, "see --group-pattern"), (False, False, "move such images into")],
)
def test_what_is_advised_about_near_duplicates_can_be_done(has_columns, is_cut, said):
    assert said in cure_of_near(has_columns, is_cut)


def test_near_duplicates_are_counted_and_named_and_stay(tmp_path, capsys):
    data = three_splits(tmp_path)
    counted = {key: count for key, count in data.overlap.items() if count}
    assert counted == {
        "test_near_train": 4,
        "validation_near_train": 1,
        "test_near_validation": 4,
        "test_in_validation": 1,
    }
    assert len(data.test) == 11 and len(data.near) == 9
    assert dict(data.summary)["near-duplicates"] == (
        "4 of 11 images of test look almost like one in train; 1 of 8 images of validation looks almost like one in "
        "train; 4 of 11 images of test look almost like one in validation"
    )
    notes = capsys.readouterr().err
    pair = "val/b/one again.png ~ train/a/one.png"
    cure = "(the splits are those of the dataset: move such images into one of them)"
    assert f"1 of 8 images of validation looks almost like one in train {cure}: {pair}\n" in notes
    (first,) = [line for line in notes.splitlines() if "of test look almost like one in train (" in line]
    assert first.count(" ~ train/a/one.png") == 3 and first.endswith(", ...")
