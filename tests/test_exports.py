"""Exports of annotation programs, and JSON files as people have them."""

import json
from pathlib import Path

import pytest
from test_data import counts, draw, load, refuse
from test_sources import own_cache  # noqa: F401
from test_table_forms import check

from vlm.common import UsageError
from vlm.config import resolve
from vlm.data import load_data
from vlm.data.sources.exports import read_export

LABELS = ["ab"[i % 2] for i in range(8)]


def export(path: Path, data: object, pattern: str = "pics/{}.png", first: int = 0) -> Path:
    """A JSON file, and eight images next to it, of the gray values from `first` on."""
    for i in range(8):
        draw(path.parent / pattern.format(i), first + i)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def task(image: str, *choices: list[str], question: str = "choice") -> dict:
    """A task of Label Studio, with an annotation for each list of choices."""
    annotations = [
        {
            "id": number,
            "was_cancelled": False,
            "result": [
                {
                    "value": {"choices": chosen},
                    "from_name": question,
                    "to_name": "image",
                    "type": "choices",
                    "origin": "manual",
                }
            ],
        }
        for number, chosen in enumerate(choices)
    ]
    return {"id": 1, "annotations": annotations, "predictions": [], "data": {"image": image}, "project": 1}


def coco(*labels: list[int]) -> dict:
    images = [{"id": i + 10, "file_name": f"pics/{i}.png", "width": 2, "height": 2} for i in range(len(labels))]
    found = [(i + 10, category) for i, categories in enumerate(labels) for category in categories]
    return {
        "info": {},
        "images": images,
        "annotations": [{"id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(found)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def via(i: int, **attributes: object) -> dict:
    return {"filename": f"pics/{i}.png", "size": 70, "regions": [], "file_attributes": attributes}


def sample(i: int, label: str, **more: object) -> dict:
    return {"filepath": f"pics/{i}.png", "tags": [], "ground_truth": {"_cls": "Classification", "label": label}} | more


FORMS = {
    "objects": [{"image": f"pics/{i}.png", "label": label} for i, label in enumerate(LABELS)],
    "by path": {f"pics/{i}.png": label for i, label in enumerate(LABELS)},
    "objects by path": {f"pics/{i}.png": {"label": label, "by": "me"} for i, label in enumerate(LABELS)},
    "paths by class": {name: [f"pics/{i}.png" for i in range(8) if LABELS[i] == name] for name in "ab"},
    "Label Studio": [task(f"/data/local-files/?d=pics%2F{i}.png", [label], [label]) for i, label in enumerate(LABELS)],
    "Label Studio JSON_MIN": [
        {"image": f"http://localhost:8080/data/local-files/?d=pics/{i}.png", "kind": label}
        | {"id": i, "annotator": 1, "annotation_id": i, "created_at": "", "updated_at": "", "lead_time": 1.5}
        for i, label in enumerate(LABELS)
    ],
    "COCO": coco(*([1, 1] if label == "a" else [2] for label in LABELS)),
    "VIA": {f"{i}.png70": via(i, kind=label) for i, label in enumerate(LABELS)},
    "VIA project": {
        "_via_settings": {},
        "_via_img_metadata": {str(i): via(i, kind={label: True}) for i, label in enumerate(LABELS)},
    },
    "FiftyOne samples": {"name": "x", "samples": [sample(i, label, uniqueness=0.5) for i, label in enumerate(LABELS)]},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_json_file_is_read_by_its_layout_and_so_is_the_folder_around_it(tmp_path, form):
    path = export(tmp_path / "x.json", FORMS[form])
    data = load(path)
    check(data)
    kind = form.split()[0]
    if kind[0].isupper():
        assert f" ({kind}" in dict(data.summary)["dataset"] and dict(data.summary)["dataset"].endswith(" export)")
    check(load(tmp_path))


def test_a_json_file_with_an_object_in_each_line_is_read(tmp_path):
    path = export(tmp_path / "x.json", [])
    path.write_text("\n".join(map(json.dumps, FORMS["objects"])))
    check(load(path))


def test_json_that_is_about_something_else_makes_no_table_of_a_folder_of_classes(tmp_path):
    for i in range(8):
        draw(tmp_path / LABELS[i] / f"{i}.png", i)
    (tmp_path / "classes.json").write_text('{"a": "aardvark", "b": "bee"}')
    check(load(tmp_path))
    refuse("classes.json: JSON of a layout that is not read. Read are", tmp_path / "classes.json")


def test_splits_in_one_json_file(tmp_path):
    rows = FORMS["objects"]
    data = load(export(tmp_path / "x.json", {"train": rows[:4], "val": rows[4:6], "test": rows[6:]}))
    assert counts(data) == [4, 2, 2]


# Label Studio


@pytest.mark.parametrize("folder", ["", "pics/"])
@pytest.mark.parametrize("own", ["", "0123abcd-"])
def test_uploaded_files_are_found_under_both_names(tmp_path, own, folder):
    tasks = [task(f"/data/upload/3/0123abcd-{i}.png", [label]) for i, label in enumerate(LABELS)]
    path = export(tmp_path / "x.json", tasks, f"{folder}{own}{{}}.png")
    check(load(path, image_folder=str(tmp_path / folder) if folder else None))


def test_local_files_are_found_below_another_root(tmp_path, capsys):
    tasks = [task(f"/data/local-files/?d=home/me/pics/{i}.png", [label]) for i, label in enumerate(LABELS)]
    check(load(export(tmp_path / "x.json", tasks)))
    assert f"begin with home/me/, which is left out; the files are in {tmp_path}." in capsys.readouterr().err


def test_the_csv_export_of_label_studio(tmp_path):
    path = export(tmp_path / "x.json", [])
    head = "image,id,choice,annotator,annotation_id,created_at,updated_at,lead_time\n"
    rows = [f"/data/local-files/?d=pics/{i}.png,{i},{label},1,{i},,,2.5\n" for i, label in enumerate(LABELS)]
    (csv_file := tmp_path / "x.csv").write_text(head + "".join(rows))
    data = load(csv_file)
    check(data)
    assert dict(data.summary)["label column"] == "choice" and "(Label Studio export)" in dict(data.summary)["dataset"]
    csv_file.write_text(head + "".join(rows).replace(",a,", ',"{""choices"": [""a"", ""c""]}",'))
    refuse("train: 4 of 8 images have more than one label, first .*0.png: a, c", csv_file)
    path.unlink()


def test_tasks_without_a_choice_are_left_out_and_annotators_who_differ_are_refused(tmp_path, capsys):
    tasks = [task(f"pics/{i}.png", [label]) for i, label in enumerate(LABELS[:7])]
    skipped = task("pics/7.png", ["b"])
    skipped["annotations"][0]["was_cancelled"] = True
    assert sum(counts(load(export(tmp_path / "x.json", [*tasks, skipped])))) == 7
    assert "1 of 8 images have no label and are left out, first pics/7.png" in capsys.readouterr().err
    path = export(tmp_path / "x.json", [*tasks, task("pics/7.png", ["b"], ["a"])])
    refuse("train: 1 of 8 images have more than one label, first pics/7.png: b, a", path)


def test_one_of_several_questions_is_named_by_its_column(tmp_path):
    tasks = [task(f"pics/{i}.png", [label], question="kind") for i, label in enumerate(LABELS)]
    for one in tasks:
        one["annotations"] += task("", ["good"], question="quality")["annotations"]
    refuse("--label-column: no column was recognized.*kind, quality", export(tmp_path / "x.json", tasks))
    check(load(tmp_path / "x.json", label_column="kind"))


# COCO, FiftyOne


def test_an_image_with_two_coco_categories_is_refused_and_one_without_left_out(tmp_path, capsys):
    path = export(tmp_path / "x.json", coco([1], [2], [1, 2], [1], [2]))
    refuse("train: 1 of 5 images have more than one label, first pics/2.png: a, b. This program learns one class", path)
    data = coco([1], [2], [], [1], [2], [1], [2])
    data["annotations"].append({"id": 99, "image_id": 99, "category_id": 1})
    load(export(path, data))
    said = capsys.readouterr().err
    assert "1 of 7 images have no label" in said
    assert "not used: the annotations of 1 images that are not in its list of images" in said


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("splits", [True, False])
def test_the_classification_export_of_fiftyone(tmp_path, named, splits):
    def labels(numbers: list[int]) -> dict:
        targets = {f"x{i}": i % 2 if named else LABELS[i] for i in numbers}
        return {"classes": ["a", "b"] if named else None, "labels": targets | {"x8": None}}

    for number, split in enumerate(("train", "validation") if splits else ("",)):
        export(tmp_path / split / "labels.json", labels(list(range(8))), "data/x{}.png", 20 * number)
        draw(tmp_path / split / "data/x8.png", 20 * number + 8)
    data = load(tmp_path)
    if splits:
        assert counts(data)[1] == 8 and dict(data.summary)["validation"] == "8 images (validation/labels.json)"
    else:
        check(data)


def test_tags_of_fiftyone_samples_name_the_splits(tmp_path):
    tags = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    samples = [sample(i, label, tags=["new", tags[i]]) for i, label in enumerate(LABELS)]
    assert counts(load(export(tmp_path / "samples.json", {"samples": samples}))) == [4, 2, 2]


def test_several_fields_of_fiftyone_samples_and_the_one_that_is_true(tmp_path):
    guess = {"_cls": "Classification", "label": "x", "confidence": 0.1}
    samples = [sample(i, label, prediction=guess) for i, label in enumerate(LABELS)]
    check(load(export(tmp_path / "samples.json", {"samples": samples})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["0.png"], "b": ["1.png"], "a": ["2.png"]}', "the key a is there twice"),
        ('{"train": ["0.png"], "test": ["1.png"]}', "its keys are names of splits, and its paths have no labels"),
        (
            '{"images": [{"id": 1, "file_name": "0.png"}, {"id": 1, "file_name": "1.png"}], "annotations": [], '
            '"categories": []}',
            "two of its images have the id 1",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}',
            "two of its categories have the id 3",
        ),
    ],
)
def test_what_could_mix_up_labels_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_data(resolve({"model": "m", "dataset": str(tmp_path / "x.json")}))


def test_an_unanswered_task_has_no_label_although_it_had_a_value():
    answer = {"from_name": "label", "type": "choices", "value": {"choices": ["cat"]}}
    tasks = [
        {"data": {"image": "0.png", "label": "old"}, "annotations": [{"result": [answer]}]},
        {"data": {"image": "1.png", "label": "old"}, "annotations": []},
    ]
    assert [row["label"] for row in read_export(tasks, Path("x.json")).rows] == ["cat", None]
