"""Forms that people have their data in: read where it is clear what is meant, else said in a line, with the cure."""

import json
import os
import unicodedata
from pathlib import Path

import datasets
import pytest
from test_data import counts, draw, images, load, refuse
from test_sources import own_cache, png, table  # noqa: F401

from vlm.common.errors import UsageError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def write(path: Path, cells: list, column: str = "image") -> Path:
    """A CSV table with these cells in its image column; eight images are in pics/, next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{column},label\n" + "".join(f"{cell},{'ab'[i % 2]}\n" for i, cell in enumerate(cells)))
    for i in range(8):
        draw(path.parent / f"pics/{i}.png", i)
    return path


def message(dataset: Path, **settings) -> str:
    """The error that a dataset ends in, of two lines at most."""
    with pytest.raises(UsageError) as caught:
        load(dataset, **settings)
    text = str(caught.value)
    assert len(text.splitlines()) <= 2 and len(text.replace(str(dataset), "")) < 350
    return text


# Files that are no table


FILES = {
    "a.xlsx": (b"PK\x03\x04", "a spreadsheet, not a folder or a table. Save it as CSV in UTF-8"),
    "a.json": (b"[]", "JSON of a layout that is not read. Read are [{"),
    "cut.json": (b"[{", "cut.json: not JSON (Expecting property name"),
    "damaged.json": (
        b'{"images": [{"id": 1}], "annotations": [], "categories": []}',
        "JSON of a layout that is read, but damaged (KeyError('file_name'))",
    ),
    "a.npz": (b"PK\x03\x04", "a file of arrays, not a folder or a table. Write its images into files"),
    "a.png": (png(), "one image. Give a folder with one folder for each class, or a table"),
    "a.weird": (b"1", "files of this type are not read. Expected a hub id"),
    "pointer.parquet": (POINTER.encode(), "a Git LFS pointer, not the file itself. Get the file with: git lfs pull"),
    "pointer.csv": (POINTER.encode(), "a Git LFS pointer"),
    "excel.csv": (b"PK\x03\x04", "a spreadsheet or a zip archive. Save it as CSV in UTF-8, or let its name"),
    "utf16.csv": ("image,label\n".encode("utf-16"), "text in UTF-16. Save it as CSV in UTF-8"),
    "utf16 without a mark.csv": ("image,label\n".encode("utf-16-le"), "it has characters of value 0"),
    "latin.csv": ("image,label\na.png,b\na.png,übel\n".encode("latin-1"), "line 3: not a readable text file in UTF-8"),
    "empty.csv": (b"", "no rows. Expected a header"),
    "mark.csv": (b"\xef\xbb\xbf", "no rows. Expected a header"),
    "no header.csv": (
        b"pics/0.png,cat\npics/1.png,dog\n",
        "the first line is data (pics/0.png), not a header. Add --no-header",
    ),
    "twice.csv": (b"image,label, label\na,b,c\n", "several columns are called label. Give each column its own name"),
    "quote.csv": (b'image,label\na.png,b\n"a,b\n' + b"x" * 200_000, "line 3: a quote is not closed. Close the quote"),
    "deep.jsonl": (b"[" * 100_000, "line 1: JSON that is nested too deep. Expected one object in each line"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_table_is_named_with_what_it_is_and_the_cure(tmp_path, name):
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content)
    found = message(tmp_path / name)
    assert str(tmp_path / name) in found and said in found


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = write(tmp_path / "a.csv", [f"pics/{i}.png" for i in range(8)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path).source["image_column"] == "image"


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", ["pics/0.png"])
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    refuse("a.csv cannot be read .permission denied.", path)


@pytest.mark.parametrize("name", ["data/train-0.parquet", "metadata.csv"])
def test_a_pointer_in_a_folder_for_the_library_is_named(tmp_path, name):
    images(tmp_path, {"a": 3, "b": 3})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(POINTER)
    assert f"{tmp_path / name}: a Git LFS pointer" in message(tmp_path)


def test_a_pointer_in_a_saved_dataset_is_named(tmp_path):
    table(["a", "b"] * 4).save_to_disk(tmp_path)
    next(tmp_path.glob("*.arrow")).write_text(POINTER)
    assert ".arrow: a Git LFS pointer" in message(tmp_path)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-100]])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    table(["a", "b"] * 4).to_parquet(path := tmp_path / "train.parquet")
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}: a Parquet file that is damaged or not whole. Copy or download it again" in message(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("state.json", b"{", "state.json cannot be read (it is not JSON"),
        ("dataset_info.json", b"[" * 100_000, "dataset_info.json cannot be read (it is nested too deep"),
        ("dataset_info.json", b"[]", "dataset_info.json: not what save_to_disk writes. Copy"),
        ("data-00000-of-00001.arrow", b"", "cannot be loaded (ArrowInvalid"),
    ],
)
def test_a_damaged_file_of_a_saved_dataset_is_named(tmp_path, name, content, said):
    table(["a", "b"] * 4).save_to_disk(tmp_path)
    (tmp_path / name).write_bytes(content)
    found = message(tmp_path)
    assert said in found and "opy or download it again" in found


def test_what_the_library_hides_is_said(tmp_path):
    (tmp_path / "data.json").write_text("{")
    assert "cannot be loaded (ArrowInvalid: JSON parse error" in message(tmp_path)


def test_images_without_a_row_of_the_metadata_are_counted(tmp_path, capsys):
    images(tmp_path, {"train": 9})
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(7))
    (tmp_path / "train/metadata.csv").write_text(f"file_name,label\n{rows}")
    assert sum(counts(load(tmp_path))) == 7
    assert "note: not used: 2 images without a row in a metadata file." in capsys.readouterr().err


def test_images_that_are_pointers_are_said_to_be_that(tmp_path):
    images(tmp_path, {"a": 3, "b": 3})
    for path in tmp_path.rglob("*.png"):
        path.write_text(POINTER)
    assert "a Git LFS pointer" in message(tmp_path)


# Cells of the image column


def test_windows_paths_are_understood_where_the_file_is_there(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", [f"pics\\{i}.png" for i in range(8)])
    assert sum(counts(load(path))) == 8
    monkeypatch.chdir(tmp_path)
    assert sum(counts(load(".\\a.csv"))) == 8
    assert "It is a Windows path" in message(Path("C:\\data\\a.csv"))
    assert r"C:\Users\me\0.jpg of the column image" in (found := message(write(path, [r"C:\Users\me\0.jpg"] * 8)))
    assert "it is a Windows path. Name the folder that holds the images with --image-folder" in found


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_files_are_found_in_the_other_unicode_form(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    path = write(tmp_path / "a.csv", [unicodedata.normalize(form, f"bläh/{i}.png") for i in range(8)])
    os.rename(tmp_path / "pics", tmp_path / unicodedata.normalize(other, "bläh"))
    assert sum(counts(load(path))) == 8


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["https://a.b/0.png"] * 8, "row 1 of the column image: a web address (https://a.b/0.png). Download"),
        (["word " * 99] * 8, "row 1 of the column image: a text of 494 characters. Expected the path of an image"),
        ([f"{i}.png" for i in range(8)], "no file 0.png of the column image in"),
    ],
)
def test_cells_that_are_no_paths_are_said_and_not_printed(tmp_path, cells, said):
    found = message(write(tmp_path / "a.csv", cells))
    assert said in found and "a.csv" in found and "word" not in found


def test_files_in_another_folder_and_names_without_an_ending_are_recognized(tmp_path):
    path, folder = write(tmp_path / "a.csv", [f"{i}.png" for i in range(8)]), str(tmp_path / "pics")
    assert message(path).endswith(f", but there is pics/0.png. Add: --image-folder {folder}")
    assert sum(counts(load(path, image_folder=folder))) == 8
    found = message(write(tmp_path / "a.csv", list(range(8)), "id_code"))
    assert "no file 0 of the column id_code" in found
    assert found.endswith(f", but there is pics/0.png. Add: --image-folder {folder} --image-suffix .png")
    assert sum(counts(load(path, image_folder=folder, image_suffix="png"))) == 8
    assert message(path, image_folder=folder).endswith("there is 0.png. Add: --image-suffix .png")
    found = message(path, image_folder=folder, image_suffix=".jpg")
    assert "no file 0.jpg of the column id_code" in found
    assert found.endswith("there is 0.png. Give: --image-suffix .png instead of .jpg")
    refuse("--image-folder nowhere: no such folder. Name the folder", path, image_folder="nowhere")
    refuse(f"--image-folder pics: no such folder here. Give {folder}.", path, image_folder="pics")


def test_paths_with_a_folder_are_told_which_folder_they_are_relative_to(tmp_path):
    path = write(tmp_path / "a.csv", [f"{'ab'[i % 2]}/{i}.png" for i in range(8)])
    for i in range(8):
        (tmp_path / f"photos/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"pics/{i}.png").rename(tmp_path / f"photos/{'ab'[i % 2]}/{i}.png")
    found = message(path)
    assert found.endswith(f", but there is photos/a/0.png. Add: --image-folder {tmp_path / 'photos'}")
    assert sum(counts(load(path, image_folder=str(tmp_path / "photos")))) == 8
    longer = path.with_name("b.csv")
    longer.write_text(path.read_text().replace("a/", "old/set/a/").replace("b/", "old/set/b/"))
    assert message(longer).endswith(f"Add: --image-folder {tmp_path / 'photos'}")
    assert sum(counts(load(longer, image_folder=str(tmp_path / "photos")))) == 8


def test_a_folder_of_images_and_a_table_of_their_names_names_the_table(tmp_path):
    images(tmp_path, {"train": 4, "test": 4})
    (tmp_path / "labels.csv").write_text("id,breed\n0,a\n1,b\n")
    assert (
        "directly in train, not in folders of classes. If a table has the labels, give it to --dataset: labels.csv"
        in (message(tmp_path))
    )


def test_a_list_with_one_image_is_an_image(tmp_path):
    for i in range(8):
        draw(tmp_path / f"{i}.png", i)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"images": [f"{i}.png"], "label": "ab"[i % 2]}) for i in range(8)))
    assert load(path).train[0].image.getpixel((0, 0))[0] == int(load(path).train[0].name[0])
    path.write_text(path.read_text().replace('["3.png"]', '["3.png", "4.png"]'))
    assert "row 4 of the column images: a list of 2 images. Expected one" in message(path)
    path.write_text("\n".join(json.dumps({"image": {"path": f"{i}.png"}, "label": "ab"[i % 2]}) for i in range(8)))
    assert sum(counts(load(path))) == 8


def saved_lists(folder: Path, lengths: list[int]) -> Path:
    lists = [[{"bytes": png(i), "path": None}] * length for i, length in enumerate(lengths)]
    kinds = datasets.Features({"photos": datasets.List(datasets.Image()), "label": datasets.Value("string")})
    rows = {"photos": lists, "label": ["ab"[i % 2] for i in range(len(lists))]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(folder)
    return folder


def test_a_list_with_one_image_is_an_image_for_the_library_too(tmp_path):
    data = load(saved_lists(tmp_path / "one", [1] * 8))
    assert (
        data.source["image_column"] == "photos"
        and data.train[0].name == f"train[{data.train[0].image.getpixel((0, 0))[0]}]"
    )
    assert "train[5], column photos: a list of 3 images" in message(saved_lists(tmp_path / "more", [1, 1, 1, 1, 1, 3]))


def test_a_split_without_the_image_column_is_refused(tmp_path):
    for name, column in (("train", "image"), ("val", "photo")):
        write(tmp_path / f"{name}.csv", [f"pics/{i}.png" for i in range(8)], column)
    refuse("--image-column image: train has this column, but val.csv does not. Columns there: photo, label", tmp_path)
