"""A column of split names decides the splits; columns that look like groups are named."""

from pathlib import Path

import datasets
import pytest
from test_data import counts, draw, images, load, refuse
from test_sources import own_cache, table  # noqa: F401

SPLITS = ["train"] * 24 + ["val"] * 6 + ["test"] * 6


def write(path: Path, header: str = "image,label,split", **columns: list) -> Path:
    """A table of 36 images of two classes with further columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[f"pics/{i}.png", "ab"[i % 2], *(values[i] for values in columns.values())] for i in range(36)]
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))
    for i in range(36):
        draw(path.parent / f"pics/{i}.png", i)
    return path


def check_splits(data, column: str = "split") -> None:
    assert counts(data) == [24, 6, 6]
    assert dict(data.summary)["split column"] == column == data.source["split_column"]
    found = [getattr(data, role)[0].image.getpixel((0, 0))[0] for role in ("train", "validation", "test")]
    assert found == [0, 24, 30], "each row is in the split that the column says, with its own image"


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "VALID", "Testing"), ("TRAIN", "dev ", "eval")]
)
@pytest.mark.parametrize("column", ["split", "my_Subset", "anything"])
def test_a_column_of_split_names_in_any_spelling_decides(tmp_path, names, column):
    spelled = dict(zip(("train", "val", "test"), names, strict=True))
    path = write(tmp_path / "a.csv", f"image,label,{column}", s=[spelled[name] for name in SPLITS])
    data = load(path)
    check_splits(data, column)
    assert dict(data.summary)["validation"] == f"6 images ({column} = {names[1].strip()})"


@pytest.mark.parametrize("kind", ["saved", "parquet", "class labels", "metadata"])
def test_a_split_column_of_what_the_library_reads(tmp_path, kind):
    data = table(["a", "b"] * 18, split=SPLITS)
    if kind == "metadata":
        write(tmp_path / "metadata.csv", "file_name,label,split", s=SPLITS)
    elif kind == "parquet":
        data.to_parquet(tmp_path / "data.parquet")
    else:
        names = datasets.ClassLabel(names=["test", "train", "val"])
        data = data.cast_column("split", names) if kind == "class labels" else data
        data.save_to_disk(tmp_path)
    check_splits(load(tmp_path))


def test_what_the_column_lacks_is_cut_from_train(tmp_path):
    two = ["train" if name == "val" else name for name in SPLITS]
    assert counts(load(write(tmp_path / "a.csv", s=two))) == [26, 4, 6]


def test_labels_that_the_column_hides_are_cut_from_train(tmp_path):
    path = write(tmp_path / "a.csv", s=SPLITS)
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(line.replace(",a,", ",,").replace(",b,", ",,") if "test" in line else line for line in lines)
    )
    data = load(path)
    assert counts(data) == [20, 6, 4] and "split = test has no labels" in dict(data.summary)["test"]


@pytest.mark.parametrize(("value", "said"), [("extra", "has extra in"), ("", "has no value in"), ("x" * 999, "x…x")])
def test_a_row_with_an_unknown_split_or_none_is_named(tmp_path, value, said):
    path = write(tmp_path / "a.csv", s=[*SPLITS[:7], value, *SPLITS[8:]])
    refuse(rf"a.csv: row 8 \(pics/7.png\) .*{said}.*column split, which names splits. Expected train, val or", path)


def test_two_columns_of_splits_have_to_agree(tmp_path):
    path = write(tmp_path / "a.csv", "image,label,split,set", s=SPLITS, t=SPLITS)
    check_splits(load(path))
    path = write(tmp_path / "a.csv", "image,label,split,set", s=SPLITS, t=SPLITS[::-1])
    refuse(r"row 1 .* has train in the column split and test in the column set", path)


def test_splits_of_the_dataset_stay_and_a_column_that_contradicts_them_is_said(tmp_path, capsys):
    for name, split in (("train", "train"), ("val", "Valid"), ("test", "test")):
        write(tmp_path / f"{name}.csv", s=[split] * 36)
    data = load(tmp_path)
    assert "split column" not in dict(data.summary) and "column" not in capsys.readouterr().err
    write(tmp_path / "val.csv", s=["val"] * 30 + ["test"] * 6)
    assert counts(load(tmp_path)) == [36, 36, 36]
    assert (
        "warning: 6 rows are in another split than the column split says, first pics/30.png of val.csv: test"
        in capsys.readouterr().err
    )


def test_a_class_called_train_is_no_split(tmp_path, capsys):
    path = write(tmp_path / "a.csv", "image,label,kind", k=["train", "bus"] * 18)
    assert sum(counts(load(path))) == 36 and capsys.readouterr().err == ""
    assert load(path, label_column="kind").class_names == ["bus", "train"]


def test_unused_columns_that_look_like_groups_or_splits_are_named(tmp_path, capsys):
    columns = ["fold", "patient_id", "VideoID", "is_valid", "subset", "age", "text"]
    write(
        tmp_path / "a.csv",
        ",".join(["image,label", *columns]),
        **{name: [i % 3 for i in range(36)] for name in columns},
    )
    load(tmp_path)
    assert "not used: fold, patient_id, VideoID, is_valid, subset. --group-column keeps" in capsys.readouterr().err
    table(["a", "b"] * 5, patient=["x"] * 10, color=["y"] * 10).save_to_disk(tmp_path / "set")
    load(tmp_path / "set")
    assert "not used: patient. " in capsys.readouterr().err
    load(images(tmp_path / "folder", {"site": 4, "video": 4}))
    assert capsys.readouterr().err == ""
