"""Every kind of source gives the same data: folders, CSV, JSONL, save_to_disk, parquet, a hub; and what is odd in one
is said."""

import csv
import io
import json
from pathlib import Path

import datasets
import pytest
from fake_hub import COMMIT
from PIL import Image
from test_data import counts, draw, images, load, refuse
from test_hub import hub, switch_off  # noqa: F401

CODES = ["ael", "aec", "cli", "rid", "fsf", "sfe", "fsg", "fse", "fss", "cra", "sfx", "mix", "rou", "smo", "tex"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (2, 2), value).save(file, "PNG")
    return file.getvalue()


def table(labels: list, names: list[str] | None = None, first: int = 0, **columns) -> datasets.Dataset:
    """A dataset with an image for each label, of the gray values from `first` on; `names` makes the labels a
    ClassLabel."""
    kind = (
        datasets.ClassLabel(names=names)
        if names
        else datasets.Value("string" if isinstance(labels[0], str) else "int64")
    )
    rows = {
        "image": [{"bytes": png((first + i) % 256), "path": None} for i in range(len(labels))],
        "label": labels,
    } | columns
    return datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {"image": datasets.Image(), "label": kind} | {c: datasets.Value("string") for c in columns}
        ),
    )


def mars() -> datasets.DatasetDict:
    """The layout of the default dataset: train, val, test, and partitions for few-shot work; a ClassLabel of 15
    codes."""
    sizes = {"train": 4, "val": 1, "test": 2, "train_1_shot": 1, "train_2_shot": 2}
    starts = {"val": 60, "test": 75}  # no image of theirs is in train
    return datasets.DatasetDict(
        {name: table([i % 15 for i in range(15 * n)], CODES, starts.get(name, 0)) for name, n in sizes.items()}
    )


def check_mars(data) -> None:
    assert data.class_names == CODES
    assert counts(data) == [60, 15, 30]
    summary = dict(data.summary)
    assert summary["unused splits"] == "train_1_shot, train_2_shot" and summary["validation"] == "15 images (val)"
    assert (summary["image column"], summary["label column"]) == ("image", "label")
    assert data.train.labels[:17] == [*range(15), 0, 1]
    assert data.train[16].image.getpixel((0, 0)) == (16, 16, 16) and data.train[16].name == "train[16]"


def test_the_default_datasets_layout_from_save_to_disk(tmp_path):
    mars().save_to_disk(tmp_path / "mars")
    check_mars(load(tmp_path / "mars"))


def test_the_default_datasets_layout_from_a_folder_of_parquet_files(tmp_path):
    for name, part in mars().items():
        (tmp_path / "mars/data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(tmp_path / f"mars/data/{name}-00000-of-00001.parquet")
    draw(tmp_path / "mars/assets/preview.png")
    check_mars(load(tmp_path / "mars"))


def test_the_default_datasets_layout_from_a_hub_and_then_from_the_cache(tmp_path, hub, monkeypatch, capsys):  # noqa: F811
    for name, part in mars().items():
        file = io.BytesIO()
        part.to_parquet(file)
        hub.add("datasets", "me/mars", {f"data/{name}-00000-of-00001.parquet": file.getvalue()})
    hub.add("datasets", "me/mars", {"README.md": "---\nlicense: mit\n---\n"})
    data = load("me/mars")
    check_mars(data)
    assert data.source["commit"] == COMMIT and data.source["dataset"] == "me/mars"
    switch_off(monkeypatch)
    check_mars(load("me/mars"))
    assert "using the cached copy of dataset me/mars" in capsys.readouterr().err


def test_given_names_of_the_default_dataset_in_another_order_are_matched_by_name(tmp_path):
    mars().save_to_disk(tmp_path / "mars")
    data = load(tmp_path / "mars", class_names=sorted(CODES))
    assert data.class_names == sorted(CODES)
    assert [data.class_names[label] for label in data.train.labels[:15]] == CODES


def test_several_configurations_are_listed_and_one_can_be_chosen(hub):  # noqa: F811
    configs = ["large", "small"]
    card = {"configs": [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in configs]}
    hub.add("datasets", "me/two", {"README.md": f"---\n{json.dumps(card)}\n---\n"})
    for size, name in enumerate(configs, 3):
        file = io.BytesIO()
        table(["a", "b"] * size).to_parquet(file)
        hub.add("datasets", "me/two", {f"{name}/train.parquet": file.getvalue()})
    refuse("several configurations. Choose one with --dataset-config: large, small", "me/two")
    refuse("no configuration tiny. Choose one with --dataset-config: large, small", "me/two", dataset_config="tiny")
    assert sum(counts(load("me/two", dataset_config="small"))) == 8


def test_a_dataset_unknown_to_the_hub_is_one_line(hub):  # noqa: F811
    refuse("dataset me/none: not on the hub", "me/none")


def test_a_single_saved_dataset_is_train(tmp_path):
    table(["b", "a"] * 5).save_to_disk(tmp_path / "one")
    data = load(tmp_path / "one")
    assert data.class_names == ["a", "b"] and sum(counts(data)) == 10


def test_hidden_labels_of_test_are_said_and_test_is_cut_from_train(tmp_path):
    parts = {
        "train": table([0, 1] * 6, ["a", "b"]),
        "val": table([0, 1], ["a", "b"]),
        "test": table([-1] * 9, ["a", "b"]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    data = load(tmp_path / "set")
    assert counts(data) == [10, 2, 2]
    assert dict(data.summary)["test"] == "2 images (cut from train, as test has no labels)"


def test_some_missing_labels_are_left_out_and_counted_in_every_split(tmp_path, capsys):
    parts = {"train": table([0, 1, -1, 0, None] * 3, ["a", "b"]), "test": table([0, 1, None], ["a", "b"], first=99)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert counts(load(tmp_path / "set")) == [7, 2, 2]
    said = capsys.readouterr().err
    assert "note: train: 6 of 15 images have no label and are left out, first train[2], train[4], train[7]." in said
    assert "note: test: 1 of 3 images have no label and are left out, first test[2]." in said
    table([None] * 3, ["a", "b"]).save_to_disk(tmp_path / "none")
    refuse("train: none of the 3 images has a label. Label them, or name another column", tmp_path / "none")


def test_names_without_images_are_left_out_and_said(tmp_path):
    table([0, 2] * 5, ["a", "b", "c"]).save_to_disk(tmp_path / "set")
    data = load(tmp_path / "set")
    assert data.class_names == ["a", "c"] and set(data.test.labels) == {0, 1}
    assert "no image has them: b" in dict(data.summary)["class names"]


def test_integers_are_sorted_as_numbers(tmp_path):
    table([10, 9, 2] * 4).save_to_disk(tmp_path / "set")
    assert load(tmp_path / "set").class_names == ["2", "9", "10"]


def test_columns_are_found_by_type_before_name(tmp_path):
    data = table([0, 1] * 5, ["a", "b"], path=["x"] * 10, category=["y"] * 10).rename_columns(
        {"image": "scan", "label": "finding"}
    )
    data.save_to_disk(tmp_path / "set")
    assert load(tmp_path / "set").source["image_column"] == "scan"
    assert load(tmp_path / "set").source["label_column"] == "finding"


def test_a_missing_column_lists_those_there_with_the_likely_one(tmp_path):
    table(["a", "b"] * 5).save_to_disk(tmp_path / "set")
    refuse(
        r"--image-column imge: no such column. Columns there: image, label. Did you mean image\?",
        tmp_path / "set",
        image_column="imge",
    )
    refuse(
        r"--label-column LABEL: no such column. .*image, label \(image is the image column\). Did you mean label\?",
        tmp_path / "set",
        label_column="LABEL",
    )
    table(["a", "b"] * 5, more=["x"] * 10).rename_column("label", "whatever").save_to_disk(tmp_path / "other")
    refuse("--label-column: no column was recognized.*there: image, whatever, more", tmp_path / "other")
    assert load(tmp_path / "other", label_column="whatever").class_names == ["a", "b"]


def write_csv(path: Path, labels: list[str], separator: str = ",", header: str = "file,label") -> Path:
    """A table of labels whose images are in pics/, next to it."""
    lines = [header.replace(",", separator)] + [f"pics/{i}.png{separator}{label}" for i, label in enumerate(labels)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    for i in range(len(labels)):
        draw(path.parent / f"pics/{i}.png", i)
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_labels_of_a_csv_file_stay_text(tmp_path, separator):
    path = write_csv(tmp_path / "birds.csv", ["01", "1", "übel"] * 3, separator)
    data = load(path)
    assert data.class_names == ["01", "1", "übel"]
    assert data.train[0].image.getpixel((0, 0))[0] == int(Path(data.train[0].name).stem)
    assert load(tmp_path).train.names == data.train.names, "the folder of the one file is as good"


def test_a_folder_of_csv_files_by_split(tmp_path):
    for split, size in {"train": 8, "val": 2, "test": 4, "train_1_shot": 2}.items():
        write_csv(tmp_path / f"{split}.csv", ["a", "b"] * (size // 2), header="image,species")
    data = load(tmp_path)
    assert counts(data) == [8, 2, 4] and dict(data.summary)["unused splits"] == "train_1_shot"


def test_jsonl_rows_keep_their_kinds(tmp_path):
    for i in range(8):
        draw(tmp_path / f"{i}.png")
    rows = [json.dumps({"id": i, "path": f"{i}.png", "y": bool(i % 2)}) for i in range(8)]
    (tmp_path / "all.jsonl").write_text("\n\n".join(rows))
    assert load(tmp_path / "all.jsonl").class_names == ["False", "True"]


def test_white_space_around_labels_does_not_make_another_class(tmp_path):
    for i in range(8):
        draw(tmp_path / f"{i}.png")
    (tmp_path / "all.jsonl").write_text(
        "\n".join(json.dumps({"path": f"{i}.png", "label": "ab"[i % 2] + " " * (i // 4)}) for i in range(8))
    )
    assert load(tmp_path / "all.jsonl").class_names == ["a", "b"]


@pytest.mark.parametrize(("line", "message"), [('{"path": ', "line 2: not JSON"), ("[1]", "line 2: no JSON object")])
def test_a_bad_line_of_a_jsonl_file_is_named_by_number(tmp_path, line, message):
    (tmp_path / "all.jsonl").write_text('{"path": "a.png", "label": "a"}\n' + line)
    refuse(message, tmp_path / "all.jsonl")


def test_odd_csv_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("file,label\na.png,b,c\n")
    refuse("line 2: more fields than the header", path)
    path.write_text("file,label\n")
    refuse("no rows. Expected a header", path)
    path.write_bytes(b"file,label\n\xff\xfe,a\n")
    refuse("not a readable text file in UTF-8", path)


def test_image_files_that_are_not_there_count_as_unreadable(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["a", "b"] * 5)
    for file in (tmp_path / "pics").iterdir():
        file.unlink()
    refuse("images of .* are unreadable.*no such file", path)


def test_hidden_and_other_files_of_an_image_folder_are_ignored_and_nested_ones_count(tmp_path):
    images(tmp_path, {"cat/2024/may": 3, "cat": 2, "dog": 5, ".thumbnails": 2, "dog/.cache": 4})
    (tmp_path / "dog/notes.txt").write_text("x")
    (tmp_path / "cat/.hidden.png").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("a table next to the folders,of another kind\n")
    draw(tmp_path / "preview.png")
    (tmp_path / "cat/LOUD.PNG").write_bytes(png())
    data = load(tmp_path)
    assert data.class_names == ["cat", "dog"] and sum(counts(data)) == 11


def test_a_class_may_be_called_like_a_split(tmp_path):
    assert load(images(tmp_path, {"bus": 5, "train": 5, "plane": 5})).class_names == ["bus", "plane", "train"]


def test_images_directly_in_train_are_refused(tmp_path):
    refuse("directly in train, not in folders of classes. Expected a hub id", images(tmp_path, {"train": 5, "test": 5}))


def test_images_of_test_without_class_folders_have_no_labels(tmp_path):
    data = load(images(tmp_path, {"Train/a": 7, "Train/b": 7, "test": 5}))
    assert counts(data) == [10, 2, 2]
    assert "test has no labels" in dict(data.summary)["test"]


def test_links_to_folders_are_followed(tmp_path):
    images(tmp_path / "elsewhere", {"a": 5, "b": 5})
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert sum(counts(load(tmp_path / "set"))) == 10


def test_an_image_folder_with_metadata_is_read_by_the_library(tmp_path):
    images(tmp_path, {"train": 8})
    rows = [json.dumps({"file_name": f"{i}.png", "species": "ab"[i % 2]}) for i in range(8)]
    (tmp_path / "train/metadata.jsonl").write_text("\n".join(rows))
    data = load(tmp_path)
    assert data.class_names == ["a", "b"] and sum(counts(data)) == 8


def test_what_is_no_dataset_says_what_was_expected(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    refuse("no such file or folder. Expected a hub id", tmp_path / "none")
    refuse(
        "a.txt: a text file, not a folder or a table. A table has equally many fields in each line", tmp_path / "a.txt"
    )
    (tmp_path / "empty").mkdir()
    refuse("nothing there that can be read as a dataset. Expected a hub id", tmp_path / "empty")


# A column of texts about the images


WHY = ["Reasoning: stripes.\nAnswer: a", None, "", "  two\nlines ", "x", "y"]
READ = ["stripes.", None, None, "two\nlines", "x", "y"]


def write_why(folder: Path, kind: str) -> Path:
    if kind == "disk":
        datasets.DatasetDict({"train": table(["a", "b"] * 3, why=WHY), "test": table(["a", "b"])}).save_to_disk(
            folder / "data"
        )
        return folder / "data"
    if kind == "parquet":
        table(["a", "b"] * 3, why=WHY).to_parquet(folder / "train.parquet")
        return folder
    for i in range(6):
        draw(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "label": "ab"[i % 2], "why": WHY[i]} for i in range(6)]
    if kind == "jsonl":
        (folder / "data.jsonl").write_text(
            "\n".join(json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows)
        )
        return folder / "data.jsonl"
    with (folder / "metadata.csv" if kind == "metadata" else folder / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "label", "why"])
        writer.writeheader()
        writer.writerows(rows)
    return folder if kind == "metadata" else folder / "data.csv"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "metadata", "parquet", "disk"])
def test_a_reasoning_column_of_every_kind_of_source(tmp_path, kind):
    data = load(write_why(tmp_path, kind), reasoning_column="why", validation_ratio=0.01, test_ratio=0.01)
    found = {}
    for role in ("train", "validation", "test"):
        split = getattr(data, role)
        assert [split[i].reasoning for i in range(len(split))] == split.reasonings
        found |= dict(zip(split.names, split.reasonings, strict=True))
    own = {name: text for name, text in found.items() if not name.startswith("test")}
    assert [own[name] for name in sorted(own)][: len(READ)] == READ[: len(own)]
    count = sum(text is not None for text in data.train.reasonings)
    summary = dict(data.summary)
    assert summary["reasoning column"] == f"why: {count} of {len(data.train)} training images have a text"
    assert summary.get("without a text", "0").split()[0] == str(len(data.train) - count)
    assert data.source["reasoning_column"] == "why"
    assert load(write_why(tmp_path, kind)).train.reasonings == [None] * len(data.train) if kind == "csv" else True


def test_a_reasoning_column_that_cannot_be_used(tmp_path):
    file = write_why(tmp_path, "csv")
    refuse("--reasoning-column wy: no such column.* Did you mean why", file, reasoning_column="wy")
    refuse("--reasoning-column label: no such column", file, reasoning_column="label")
    (tmp_path / "empty.csv").write_text(
        "file_name,label,why\n" + "".join(f"{i}.png,{'ab'[i % 2]},\n" for i in range(6))
    )
    refuse("--reasoning-column why: no training image has a text there", tmp_path / "empty.csv", reasoning_column="why")
    lines = [json.dumps({"file_name": f"{i}.png", "label": "ab"[i % 2], "why": i}) for i in range(6)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(lines))
    refuse("0.png has a value of type int. Expected text", tmp_path / "numbers.jsonl", reasoning_column="why")
    folder = images(tmp_path / "folder", {"a": 3, "b": 3})
    refuse('"image folder", which has no columns', folder, reasoning_column="why")
