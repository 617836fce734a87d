"""Tables as people write them: separators, headers, paths from elsewhere, one-hot columns, images as text."""

import base64
import csv
import pickle
from pathlib import Path

import pytest
from test_data import counts, draw, load, refuse
from test_data_forms import write
from test_sources import own_cache, png, table  # noqa: F401

from vlm.common import UsageError
from vlm.config import resolve
from vlm.data import load_data
from vlm.data.images import UnreadableImage

ROWS = [(f"pics/{i}.png", "ab"[i % 2]) for i in range(8)]


def text_table(path: Path, lines: list[str]) -> Path:
    write(path, [])  # draws the images
    path.write_text("\n".join(lines) + "\n")
    return path


def check(data) -> None:
    """All eight images are there, each with its own label."""
    assert sum(counts(data)) == 8 and data.class_names == ["a", "b"]
    for split in (data.train, data.validation, data.test):
        for i in range(len(split)):
            gray = split[i].image.getpixel((0, 0))[0]
            assert split[i].label == gray % 2 and split[i].image.size == (2, 2)


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.dat"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found_by_the_fields_and_not_by_the_header(tmp_path, name, separator):
    other = next(other for other in ",;|" if other != separator)
    header = f'"file{other} its name{other} or path"{separator}label'
    lines = [header, *(f'"{path}"{separator}{label}' for path, label in ROWS)]
    check(load(text_table(tmp_path / name, lines)))


@pytest.mark.parametrize("first", ["sep=;", "\ufeffSEP=;", '"sep=;"'])
def test_the_separator_that_excel_writes_into_the_first_line(tmp_path, first):
    check(load(text_table(tmp_path / "a.csv", [first, "image;label", *(";".join(row) for row in ROWS)])))
    broken = text_table(tmp_path / "b.csv", [first, "image;label", "pics/0.png;a;b"])
    refuse("b.csv, line 3: more fields than the header has", broken)


def test_spaces_within_the_fields_of_a_text_file_do_not_divide_them(tmp_path):
    lines = ["file name, label", *(f"pics/my {path[5:]}, {label}" for path, label in ROWS)]
    path = text_table(tmp_path / "a.txt", lines)
    for i in range(8):
        draw(tmp_path / f"pics/my {i}.png", i)
    check(load(path))


def test_a_text_file_with_spaces_and_without_a_header_is_a_table(tmp_path):
    path = text_table(tmp_path / "train.txt", [f"{path}  {label}" for path, label in ROWS])
    refuse("the first line is data .pics/0.png., not a header. Add --no-header", path)
    check(load(path, no_header=True))
    text_table(path, ["Some words", "on pics/0.png here"])
    refuse("train.txt: a text file, not a folder or a table. A table has equally many fields", path)


def test_without_a_header_columns_are_found_by_their_content_or_named_by_number(tmp_path):
    path = text_table(tmp_path / "a.csv", [f"{label},{i},{path}" for i, (path, label) in enumerate(ROWS)])
    refuse("--label-column: .* Columns there: column3, column1, column2", path, no_header=True)
    data = load(path, no_header=True, label_column="column1")
    check(data)
    assert dict(data.summary)["image column"] == "column3"
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "label": "a"}\n' * 3)
    refuse("--no-header: the dataset is of the kind JSONL file, not a CSV file", tmp_path / "a.jsonl", no_header=True)


def test_columns_of_other_names_are_found_if_only_one_has_image_paths_and_one_is_left(tmp_path):
    path = text_table(tmp_path / "a.csv", ["breed,scan", *(f"{label},{path}" for path, label in ROWS)])
    data = load(path)
    check(data)
    assert (data.source["image_column"], data.source["label_column"]) == ("scan", "breed")


@pytest.mark.parametrize("label", ["label", "breed"])
def test_names_without_an_ending_are_the_images_if_a_flag_makes_them_paths(tmp_path, label):
    path = text_table(tmp_path / "a.csv", [f"id,{label}", *(f"{i},{i % 2}" for i in range(8))])
    data = load(path, image_folder=str(tmp_path / "pics"), image_suffix=".png")
    assert sum(counts(data)) == 8 and data.class_names == ["0", "1"], "the labels are names of files, too"
    assert (data.source["image_column"], data.source["label_column"]) == ("id", label)
    refuse("--image-column: no column was recognized", path)


@pytest.mark.parametrize("label", ["label", "breed"])
def test_the_column_of_names_is_found_even_if_their_ending_is_wrong(tmp_path, label):
    path = text_table(tmp_path / "a.csv", [f"id,{label}", *(f"{i},{'ab'[i % 2]}" for i in range(8))])
    wrong = "no file 0.jpg of the column id in .*, but there is 0.png. Give: --image-suffix .png instead of .jpg"
    refuse(wrong, path, image_folder=str(tmp_path / "pics"), image_suffix=".jpg")


def test_a_column_that_is_mostly_empty_is_not_taken_for_the_labels(tmp_path):
    lines = ["Datei;Planet;Bemerkung", *(f"{path};{label};{'blurred' * (path == ROWS[3][0])}" for path, label in ROWS)]
    path = text_table(tmp_path / "a.csv", lines)
    data = load(path)
    check(data)
    assert data.source["label_column"] == "Planet"
    refuse(
        r"no such column. Columns there: Datei, Planet, Bemerkung \(Datei is the image column\)", path, label_column="x"
    )


def test_empty_fields_at_the_end_of_lines_are_no_columns(tmp_path):
    lines = ["image,label", *(f"{path},{label},," for path, label in ROWS), ""]
    check(load(text_table(tmp_path / "a.csv", lines)))


# Paths


@pytest.mark.parametrize(
    ("beginning", "cut"),
    [
        ("C:\\Users\\me\\set\\pics\\", "C:/Users/me/set/"),
        ("/home/me/set/pics/", "/home/me/set/"),
        ("other/pics/", "other/"),
    ],
)
def test_paths_of_another_machine_are_found_by_their_last_parts(tmp_path, capsys, beginning, cut):
    check(load(write(tmp_path / "a.csv", [f"{beginning}{i}.png" for i in range(8)])))
    said = f"the paths of the column image begin with {cut}, which is left out; the files are in {tmp_path}."
    assert f"note: {tmp_path}/a.csv: {said}" in capsys.readouterr().err


def test_a_beginning_that_not_all_paths_have_is_not_left_out(tmp_path):
    write(path := tmp_path / "a.csv", [f"/data/{'ab'[i % 2]}/{i}.png" for i in range(8)])
    for i in range(8):
        draw(tmp_path / f"{i}.png", i)
    refuse("unreadable|no file /data/a/0.png", path)


def test_absolute_paths_and_paths_from_the_folder_above_are_found(tmp_path, capsys):
    write(tmp_path / "b.csv", [])
    check(load(write(tmp_path / "tables/a.csv", [f"{tmp_path}/pics/{i}.png" for i in range(8)])))
    assert "note:" not in capsys.readouterr().err
    path = tmp_path / "other/a.csv"
    path.parent.mkdir()
    path.write_text("image,label\n" + "".join(f"{path},{label}\n" for path, label in ROWS))
    check(load(path))
    assert f"a.csv: the paths of the column image are relative to {tmp_path}." in capsys.readouterr().err


def test_images_of_several_folders_are_not_promised_by_one_flag(tmp_path):
    write(path := tmp_path / "a.csv", [f"x{i}" for i in range(8)])
    for i in range(8):
        draw(tmp_path / f"{'ab'[i % 2]}/x{i}.png", i)
    with pytest.raises(Exception, match="--image-folder") as caught:
        load(path)
    flag = str(caught.value).split("--image-folder ")[1].split()[0]
    assert Path(flag).is_dir()


def test_paths_of_a_library_table_have_the_same_flags(tmp_path):
    for i in range(8):
        draw(tmp_path / f"pics/{i}.png", i)
    rows = table(["a", "b"] * 4, file=[str(i) for i in range(8)]).remove_columns("image")
    rows.save_to_disk(tmp_path / "set")
    check(load(tmp_path / "set", image_folder=str(tmp_path / "pics"), image_suffix=".png"))


def test_flags_of_tables_are_refused_for_folders_of_classes(tmp_path):
    for i in range(8):
        draw(tmp_path / f"{'ab'[i % 2]}/{i}.png", i)
    refuse('--image-suffix: the dataset is of the kind "image folder"', tmp_path, image_suffix=".png")


# One-hot columns


def one_hot(path: Path, rows: list[str], header: str = "image, cat, dog, UNK") -> Path:
    return text_table(path, [header, *(f"pics/{i}.png, {row}" for i, row in enumerate(rows))])


@pytest.mark.parametrize(("one", "zero"), [("1", "0"), ("1.0", "0.0"), ("True", "False")])
def test_one_hot_columns_are_the_label_and_rows_without_a_one_have_none(tmp_path, capsys, one, zero):
    rows = [f"{one}, {zero}, {zero}" if i % 2 else f"{zero}, {one}, {zero}" for i in range(7)]
    data = load(one_hot(tmp_path / "a.csv", [*rows, f"{zero}, {zero}, {zero}"]))
    assert data.class_names == ["cat", "dog"] and sum(counts(data)) == 7
    assert dict(data.summary)["label column"] == "one-hot: cat, dog, UNK"
    assert "1 of 8 images have no label and are left out, first pics/7.png" in capsys.readouterr().err


def test_one_hot_columns_next_to_a_split_column(tmp_path):
    rows = [f"{label}, {split}" for split in ("train", "train", "val", "test") for label in ("1, 0", "0, 1")]
    data = load(one_hot(tmp_path / "a.csv", rows, "image, cat, dog, split"))
    assert dict(data.summary)["label column"] == "one-hot: cat, dog"
    assert [len(split) for split in (data.train, data.validation, data.test)] == [4, 2, 2]


def test_other_numbers_are_no_one_hot_columns(tmp_path):
    rows = [f"{int(i % 2 == 0)}, {i % 2}, 0.5, {i}" for i in range(8)]
    data = load(one_hot(tmp_path / "a.csv", rows, "image, a, b, UNK, age"))
    assert dict(data.summary)["label column"] == "one-hot: a, b"
    check(data)


def test_several_ones_in_a_row_are_several_labels(tmp_path):
    path = one_hot(tmp_path / "a.csv", ["1, 0, 0", "0, 1, 0", "0, 1, 1", "1, 1, 0"])
    refuse(r"2 of 4 rows have more than one label, first pics/2.png: dog, UNK .columns of 0 and 1: cat, dog, UNK", path)


def test_a_table_in_the_folder_of_each_split_as_roboflow_has_it(tmp_path):
    for split, size in {"train": 6, "valid": 2, "test": 4}.items():
        lines = [f"{i}.png, {int(i % 2 == 0)}, {i % 2}" for i in range(size)]
        (tmp_path / split).mkdir()
        (tmp_path / split / "_classes.csv").write_text("\n".join(["filename, a, b", *lines]))
        for i in range(size):
            draw(tmp_path / split / f"{i}.png", i)
    data = load(tmp_path)
    assert counts(data) == [6, 2, 4] and data.class_names == ["a", "b"]
    assert dict(data.summary)["validation"] == "2 images (valid/_classes.csv)"


@pytest.mark.parametrize(("labels", "used"), [("ab", True), ("xy", False)])
def test_a_split_whose_labels_are_in_a_column_of_another_name(tmp_path, capsys, labels, used):
    write(tmp_path / "train.csv", [path for path, _ in ROWS])
    for i in range(4):
        draw(tmp_path / f"{i}.png", 100 + i)
    (tmp_path / "test.csv").write_text("image,class\n" + "".join(f"{i}.png,{labels[i % 2]}\n" for i in range(4)))
    data = load(tmp_path)
    assert dict(data.summary)["test"] == (
        "4 images (test.csv)" if used else "2 images (cut from train, as test.csv has no labels)"
    )
    said = "note: test.csv has no column label: its labels are those of the column class."
    assert (said in capsys.readouterr().err) == used
    assert not used or data.test.labels == [0, 1, 0, 1]


def test_one_hot_columns_of_the_library(tmp_path):
    bits = {"cat": ["1", "0"] * 4, "dog": ["0", "1"] * 4}
    table(["x"] * 8, **bits).remove_columns("label").save_to_disk(tmp_path)
    assert load(tmp_path).class_names == ["cat", "dog"]


# Images as text


@pytest.mark.parametrize("beginning", ["", "data:image/png;base64,"])
def test_base64_texts_and_data_uris_are_images(tmp_path, beginning):
    cells = [f'"{beginning}{base64.b64encode(png(i)).decode()}"' for i in range(8)]
    before = csv.field_size_limit()
    data = load(write(tmp_path / "a.csv", cells))
    check(data)
    assert data.train[0].name.startswith("row ") and csv.field_size_limit() == before
    pickle.loads(pickle.dumps(data.train))[0].image.load()


def test_long_base64_texts_are_read_and_damaged_ones_named_by_their_row(tmp_path):
    good = base64.b64encode(png() + bytes(200_000)).decode()
    cells = [base64.b64encode(png(i) + bytes(200_000)).decode() for i in range(60)]
    data = load(write(tmp_path / "a.csv", [*cells, f'"data:image/png;base64,{good[:-5]}!"', *cells[:1]]))
    assert len(data.skipped) == 1 and "row 61" in data.skipped[0] and good[:50] not in data.skipped[0]
    assert "damaged base64 text" in data.skipped[0]


def test_base64_texts_of_the_library_are_images_too(tmp_path):
    codes = [base64.b64encode(png(i)).decode() for i in range(8)]
    table(["a", "b"] * 4, code=codes).remove_columns("image").save_to_disk(tmp_path)
    check(load(tmp_path, image_column="code"))


def test_a_data_uri_that_is_not_base64_is_no_image(tmp_path):
    cells = ["pics/0.png"] * 40 + ['"data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22/%3E"']
    data = load(write(tmp_path / "a.csv", [f"pics/{i % 8}.png" for i in range(40)] + cells[-1:]), max_samples=None)
    assert "a data URI that is not in base64" in data.skipped[0]
    assert issubclass(UnreadableImage, ValueError)


@pytest.mark.parametrize(
    "header", ["image,breed,train,test", "image,diagnosis,benign,malignant", "image,is_train,is_sick"]
)
def test_other_columns_of_zeros_and_ones_are_not_taken_for_classes(tmp_path, header):
    wide = header.count(",") == 3
    rows = [
        f"{i}.png,{'xy'[i % 2]},{i // 2 % 2},{1 - i // 2 % 2}" if wide else f"{i}.png,{i % 2},{1 - i % 2}"
        for i in range(12)
    ]
    (tmp_path / "t.csv").write_text("\n".join([header, *rows]))
    with pytest.raises(UsageError, match="--label-column: no column was recognized"):
        load_data(resolve({"model": "m", "dataset": str(tmp_path / "t.csv")}))


def test_a_line_end_within_a_path_is_an_unclosed_quote(tmp_path):
    (tmp_path / "t.csv").write_text('image,label\n0.png,a\n"1.png,a\n2.png,b\n3.png",b\n')
    with pytest.raises(UsageError, match="row 2 of the column image has a line end in it"):
        load_data(resolve({"model": "m", "dataset": str(tmp_path / "t.csv")}))
