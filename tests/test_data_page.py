"""The page of `--show-data`: images of each class and split before anything is trained."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
from commands import ROOT, names_in, train
from test_data import images
from test_page import EVIL, Page, split
from tiny import random_image

from vlm.config import resolve
from vlm.data import Data, Rows, Split, as_seen, unchecked
from vlm.data.splits import NearPair
from vlm.report import DataContent, data_page, is_data_page, write_data_page
from vlm.report.cards import thumbnail


def data_of(names, each=4, **more):
    labels = [i % len(names) for i in range(each * len(names))]
    parts = [split(labels), split(labels[: len(names)]), split(labels[: len(names)])]
    return Data(*parts, class_names=names, edge=200, summary=[("dataset", EVIL)], **more)


def page_of(tmp_path, data, **more):
    write_data_page(tmp_path / "data.html", DataContent(data, EVIL, **more))
    return Page((tmp_path / "data.html").read_text(encoding="utf-8"))


def test_hostile_names_are_text_and_nothing_comes_from_elsewhere(tmp_path):
    page = page_of(tmp_path, data_of(["cat", EVIL], skipped=[f"{EVIL}.png: truncated"]), readable_names={"cat": EVIL})
    assert not page.all("script") and not page.all("b") and page.text.count("{{ 7 * 7 }}") > 3
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'") and not page.all("a")[0]["href"].startswith("http")


def test_each_class_and_split_is_shown_with_its_counts(tmp_path):
    page = page_of(tmp_path, data_of(["cat", "dog"]), readable_names={"dog": "a hound"})
    assert page.sections == ["detected", "counts", "sheets"], "there are no sizes, copies or unreadable images"
    assert "dog shown to the model as a hound train 4 · validation 1 · test 1" in page.text_of["sheets"]
    assert len(page.all("img")) == 2 * (4 + 1 + 1)


def test_near_duplicates_are_side_by_side(tmp_path):
    page = page_of(tmp_path, data_of(["cat", "dog"], near=[NearPair("test", 1, "train", 2, 3)]))
    assert "1 image that looks almost like one in another split." in page.text_of["near"]
    assert "test: dog folder <i>/1.jpg train: cat folder <i>/2.jpg" in page.text_of["near"]


def test_a_dataset_without_faults_is_said_to_have_none(tmp_path):
    said = "No image is unreadable, and none was found twice or looks almost like one in another split."
    assert said in page_of(tmp_path, data_of(["cat", "dog"])).text_of["detected"]
    for more in ({"skipped": ["a.png: truncated"]}, {"near": [NearPair("test", 1, "train", 2, 3)]}, {"checked": False}):
        assert said not in page_of(tmp_path, data_of(["cat", "dog"], **more)).text


def test_augmented_images_are_shown_in_their_views_the_image_itself_first(tmp_path):
    data = data_of(["cat", "dog"])
    settings = resolve({"augment": "strong", "augment_views": 3})
    content = DataContent(data, "x", views=3, train_in=partial(as_seen, data.train, settings))
    assert [name for name, _ in content.augmented] == ["cat", "dog"]
    for position, (_, views) in enumerate(content.augmented):
        assert len({view.address for view in views}) == 3 and views[0] == thumbnail(data.train, position, 96)
    assert DataContent(data, "x", views=1, train_in=partial(as_seen, data.train, resolve({}))).augmented == []


def test_the_images_are_drawn_with_the_seed(tmp_path):
    data = data_of(["cat", "dog"], each=30)
    first, same, other = (page_of(tmp_path, data, seed=seed).source for seed in (1, 1, 2))
    assert first == same != other


def test_the_page_of_many_classes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(data_page, "MOST_THUMBNAILS", 30)
    monkeypatch.setattr(data_page, "MOST_CLASSES", 25)
    page = page_of(tmp_path, data_of([f"class {i}" for i in range(40)]))
    assert len(page.all("img")) == 25, "one of train for each class that is shown"
    assert "25 of 40 classes, each with some of its images" in page.text_of["sheets"]


def test_sizes_copies_and_unreadable_images_of_a_folder(tmp_path):
    images(tmp_path / "set", {f"{part}/{name}": 25 for part in ("train", "test") for name in ("cat", "dog")})
    random_image(900, 300, 100).save(tmp_path / "set/train/cat/wide.png")
    random_image(901, 1, 1).save(tmp_path / "set/train/dog/small.png")
    for place in ("train/cat", "test/dog"):
        random_image(902).save(tmp_path / f"set/{place}/copy.png")
    (tmp_path / "set/train/dog/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert train("--dataset", tmp_path / "set", "--show-data", "--output-dir", tmp_path / "out") == 0
    page = Page((tmp_path / "out/data.html").read_text(encoding="utf-8"))
    assert page.sections == ["detected", "left-out", "copies", "counts", "sizes", "sheets"]
    sizes, copies = page.text_of["sizes"], page.text_of["copies"]
    assert "257 to 512 1" in sizes and " 1 1 2 100 " in sizes, "images by their longest edge"
    assert "largest: 300 × 100 train, cat" in sizes and "smallest: 1 × 1 train, dog" in sizes
    assert copies.index("train, cat") < copies.index("test, dog")
    assert "1 images that cannot be read" in page.text_of["left-out"] and "broken.png" in page.text_of["left-out"]


def test_images_of_one_size_have_a_sentence_and_no_table(tmp_path):
    images(tmp_path / "set", {"cat": 20, "dog": 20})
    assert train("--dataset", tmp_path / "set", "--show-data", "--output-dir", tmp_path / "out") == 0
    page = Page((tmp_path / "out/data.html").read_text(encoding="utf-8"))
    assert re.fullmatch(r"Sizes All 40 images that were decoded have \d+\s×\s\d+ pixels\.", page.text_of["sizes"])


@pytest.mark.parametrize("large", [True, False])
def test_many_unreadable_images_stop_no_page(tmp_path, monkeypatch, capsys, large):
    monkeypatch.setattr(unchecked, "CHECKED_FIRST", 10 if large else 5000)
    images(tmp_path / "set", {f"{part}/{name}": 8 for part in ("train", "val", "test") for name in ("cat", "dog")})
    for path in [*(tmp_path / "set/train/dog").iterdir(), *(tmp_path / "set/val").rglob("*.png")]:
        path.write_bytes(b"GIF89a")
    flags = ("--dataset", tmp_path / "set", "--output-dir", tmp_path / "out")
    assert train(*flags, "--show-data") == 0
    page, said = Page((tmp_path / "out/data.html").read_text(encoding="utf-8")), capsys.readouterr().err
    assert "24 images that cannot be read" in page.text_of["left-out"]
    assert "a training would stop here: 8 of 16 images of train are unreadable, more than 5%." in said
    assert large or "a training would stop here: validation has no readable image." in said
    for path in (tmp_path / "set/train/cat").iterdir():
        path.write_bytes(b"GIF89a")
    (tmp_path / "out/data.html").unlink()
    assert large or train(*flags, "--show-data") == 2, "there is nothing to look at"


def test_the_command_loads_no_torch_and_says_where_the_page_is(tmp_path):
    images(tmp_path / "set", {"cat": 8, "dog": 8})
    program = "import sys, train_vlm; print(train_vlm.main(sys.argv[1:]), 'torch' in sys.modules)"
    flags = ["--dataset", tmp_path / "set", "--show-data", "--output-dir", tmp_path / "out"]
    result = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == f"Look at {tmp_path}/out/data.html\n0 False\n", result.stderr
    assert names_in(tmp_path / "out") == {"data.html"} and is_data_page(tmp_path / "out/data.html")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--show-data", "--dry-run"), "--dry-run and --show-data exclude each other"),
        (("--show-data", "--resume"), "leave out --resume"),
        (("--show-data", "--class-map", "no.json"), "not a readable JSON file"),
        (("--show-data", "--output-dir", "set/out"), "in the folder of --dataset"),
    ],
)
def test_wrong_usage_is_found_and_nothing_written(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "set", {"cat": 8, "dog": 8})
    assert train("--dataset", "set", *flags) == 2
    assert said in capsys.readouterr().err and os.listdir(tmp_path) == ["set"]


def test_a_page_of_somebody_else_is_not_overwritten_and_an_own_one_is(tmp_path, capsys):
    images(tmp_path / "set", {"cat": 8, "dog": 8})
    command = ("--dataset", tmp_path / "set", "--show-data", "--output-dir", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/data.html").write_text("<h1>mine</h1>")
    assert train(*command) == 2 and "data.html is no page of --show-data" in capsys.readouterr().err
    (tmp_path / "out/data.html").unlink()
    assert train(*command) == train(*command) == 0


def test_an_image_that_has_gone_leaves_a_gap(tmp_path):
    data = data_of(["cat", "dog"])
    gone = Split(Rows([tmp_path / "gone.png"] * 2, [0, 1], ["gone.png"] * 2), range(2), [0, 1])
    data.test = gone
    assert page_of(tmp_path, data).text_of["sheets"].count("no image") == 2
