"""Folders of images: what is in them and not used is said, and no class disappears."""

import os
from pathlib import Path

import pytest
from test_data import counts, draw, images, load, refuse
from test_data_forms import message, write

PILLOW_HEIF = "HEIC images are read if pillow-heif is installed: pip install pillow-heif."


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.fixture
def no_heif(monkeypatch):
    """HEIC images do not count, whether pillow-heif is installed or not."""
    import vlm.data.finding

    endings = {ending for ending in vlm.data.finding.IMAGE_ENDINGS if ending not in (".heic", ".heif")}
    monkeypatch.setattr(vlm.data.finding, "IMAGE_ENDINGS", endings)


def test_what_of_a_folder_is_not_used_is_one_note_with_counts_by_ending(tmp_path, capsys, no_heif):
    images(tmp_path, {"cat": 5, "dog": 5})
    put(
        tmp_path, "cat/a.HEIC", "dog/b.heic", "cat/0001", "dog/notes.txt", "dog/Thumbs.db", "README.md", "dog/.DS_Store"
    )
    draw(tmp_path / "preview.png")
    assert sum(counts(load(tmp_path))) == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: not used: files that do not count as images: 2 .heic, 1 without an ending, 1 .txt; ")
    assert line.endswith("images without a class folder: 1. " + PILLOW_HEIF)


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_class_that_would_disappear_is_an_error(tmp_path, split, no_heif):
    images(tmp_path, {f"{split}cat": 5, f"{split}dog": 5})
    (tmp_path / split / "fish").mkdir()
    refuse(r"no file in these class folders counts as an image: fish \(empty\)\. Add images, or move", tmp_path)
    put(tmp_path, f"{split}bird/a.HEIC", f"{split}bird/b.HEIC", f"{split}bird/x.xml")
    refuse(r"an image: bird \(2 .heic, 1 .xml\); fish \(empty\)\. HEIC images are read if pillow-heif", tmp_path)


def test_a_class_folder_that_is_a_link_without_images_of_its_own_is_an_error(tmp_path):
    images(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "bird").symlink_to(tmp_path / "gone")
    refuse(r"an image: bird \(a link to nothing\)", tmp_path)
    (tmp_path / "bird").unlink()
    (tmp_path / "bird").symlink_to(tmp_path / "dog")
    refuse(r"an image: bird \(a link to a folder that is there under another name\)", tmp_path)


def test_a_class_folder_without_permission_is_an_error(tmp_path, monkeypatch):
    images(tmp_path, {"cat": 5, "dog": 5, "bird": 5})
    walk, access = os.walk, os.access

    def closed_walk(top, *args, **more):
        for place, folders, names in walk(top, *args, **more):
            yield place, folders, [] if Path(place).name == "bird" else names

    monkeypatch.setattr(os, "walk", closed_walk)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "bird" and access(path, mode))
    refuse(r"an image: bird \(no permission to read it\)", tmp_path)


def test_a_class_folder_that_is_empty_in_a_held_out_split_is_noted(tmp_path, capsys):
    images(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 3})
    (tmp_path / "val/b").mkdir()
    assert counts(load(tmp_path)) == [4, 3, 2]
    assert "note: not used: class folders without an image: val/b." in capsys.readouterr().err


def test_a_folder_without_anything_that_is_read_says_what_is_there(tmp_path, no_heif):
    put(tmp_path, "cat/1.HEIC", "dog/2.HEIC", "dog/3.mp4")
    assert "Files there: 2 .heic, 1 .mp4. HEIC images are read if pillow-heif" in message(tmp_path)
    put(tmp_path, "train.zip")
    assert "the files are in an archive (train.zip). Unpack it" in message(tmp_path)


@pytest.mark.parametrize("inner", ["pets", "archive/pets"])
@pytest.mark.parametrize("layout", [{"cat": 4, "dog": 4}, {"train/cat": 4, "train/dog": 4}])
def test_a_folder_around_everything_is_understood(tmp_path, inner, layout, capsys):
    images(tmp_path / inner, layout)
    put(tmp_path, f"__MACOSX/{inner}/._0.png", ".DS_Store")
    data = load(tmp_path)
    assert data.class_names == ["cat", "dog"] and sum(counts(data)) == 8
    assert f"note: {tmp_path} has nothing but {inner}, which is read as the dataset." in capsys.readouterr().err


def test_a_folder_around_a_table_is_understood_and_a_single_class_is_none(tmp_path):
    write(tmp_path / "set/inner/a.csv", [f"pics/{i}.png" for i in range(8)])
    assert sum(counts(load(tmp_path / "set"))) == 8
    images(tmp_path / "one", {"cats/2024": 4})
    refuse(r"only one class \(cats\)", tmp_path / "one")
    (tmp_path / "loop/a").mkdir(parents=True)
    (tmp_path / "loop/a/up").symlink_to(tmp_path / "loop")
    refuse("nothing there that can be read", tmp_path / "loop")


def test_what_macos_adds_to_an_archive_is_no_class(tmp_path, capsys):
    images(tmp_path, {"cat": 4, "dog": 4})
    put(tmp_path, "__MACOSX/cat/._0.png")
    assert load(tmp_path).class_names == ["cat", "dog"] and capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["", "train/"])
@pytest.mark.parametrize(("inner", "warned"), [(("cat", "dog"), True), (("train", "test"), True), (("cat",), False)])
def test_class_folders_with_the_same_folders_in_them_are_pointed_out(tmp_path, capsys, place, inner, warned):
    images(tmp_path, {f"{place}part{part}/{name}": 6 for part in (1, 2) for name in inner})
    assert load(tmp_path).class_names == ["part1", "part2"]
    said = (
        f"warning: the classes are part1, part2, and each of these folders has the folders {', '.join(sorted(inner))}."
    )
    assert (said in capsys.readouterr().err) == warned


def test_class_folders_with_different_folders_in_them_are_usual(tmp_path, capsys):
    images(tmp_path, {"cat/black": 6, "cat/white": 6, "dog/black": 6, "dog": 6})
    assert load(tmp_path).class_names == ["cat", "dog"] and "warning" not in capsys.readouterr().err
