"""JSON files as people have them, and exports of annotation programs -> one object for each image.

A label is a text, a list of several different ones, or None. An image that several annotations give the same label has
that one.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlm.common import UsageError, brief, note
from vlm.data.finding import is_image
from vlm.data.sources.roles import role_of

Row = dict[str, Any]
LABEL_STUDIO = "Label Studio export"
# The columns of Label Studio's JSON_MIN and CSV that are neither an image nor a label.
ABOUT_ANNOTATIONS = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"}
READ = (
    'Read are [{"image": "a.png", "label": "cat"}, ...], {"a.png": "cat", ...}, and the exports of '
    "Label Studio, COCO, FiftyOne and VIA."
)


class Export(NamedTuple):
    """kind: in words; rows: one object for each image; label: the column of the labels, if the layout says which."""

    kind: str
    rows: list[Row]
    label: str | None = None


def read_export(data: Any, path: Path) -> Export:
    """The rows of what a JSON file has.

    Raises:
        UsageError: the layout is not one of those that are read.
    """
    for fits, read in FORMS:
        if fits(data):
            try:
                return read(data, path)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise UsageError(f"{path}: JSON of a layout that is read, but damaged ({error!r}). {READ}") from error
    raise UsageError(f"{path}: JSON of a layout that is not read. {READ}")


def load_json(text: str | bytes) -> Any:
    """JSON whose objects have each key once.

    Raises:
        ValueError: it is no JSON, or a key is there twice, of which Python would take the last.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {brief(twice)} is there twice")
    return found


def is_export(data: Any) -> bool:
    """Whether what a JSON file has is one of the layouts that are read."""
    return any(fits(data) for fits, _ in FORMS)


def choices_of(value: Any) -> Any:
    """The label in a cell of Label Studio: one choice is a text, several are an object, in CSV as JSON."""
    if isinstance(value, str) and value.startswith('{"choices"'):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, dict) and isinstance(value.get("choices"), list):
        return _one_of(value["choices"])
    return value


def _one_of(labels: Iterable[Any]) -> Any:
    """The one label that all annotations of an image give; a list, if they give several."""
    different = list(dict.fromkeys(labels))
    return different if len(different) > 1 else next(iter(different), None)


def _are_objects(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, dict) for value in values)


def _has(data: Any, kind: type, *names: str) -> bool:
    return isinstance(data, dict) and all(isinstance(data.get(name), kind) for name in names)


def _are_label_studio(data: Any) -> bool:
    return _are_objects(data) and _has(data[0], dict, "data") and _has(data[0], list, "annotations")


def _label_studio(data: list[Row], _: Path) -> Export:
    """Tasks with the choices of their annotators; each question is a column."""
    rows, questions = [], {}
    for task in data:
        row = dict(task["data"])
        results = [r for a in task["annotations"] if not a.get("was_cancelled") for r in a.get("result", ())]
        results = [result for result in results if result.get("type") == "choices"]
        for name in dict.fromkeys(result["from_name"] for result in results):
            questions[name] = True
            row[name] = _one_of(c for r in results if r["from_name"] == name for c in r["value"]["choices"])
        rows.append(row)
    for task, row in zip(data, rows, strict=True):  # an old value of the task is no answer to a question of its name
        answered = {r["from_name"] for a in task["annotations"] for r in a.get("result", ()) if "from_name" in r}
        row |= {name: None for name in questions if name not in answered}
    return Export(LABEL_STUDIO, rows, next(iter(questions)) if len(questions) == 1 else None)


def _coco(data: Row, path: Path) -> Export:
    """Images and annotations, each of which gives its image a category."""
    for kind in ("images", "categories"):
        ids = [entry["id"] for entry in data[kind]]
        if len(set(ids)) < len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise UsageError(f"{path}: two of its {kind} have the id {twice}, so labels could be mixed up. Correct it.")
    names = {category["id"]: category["name"] for category in data["categories"]}
    labels: dict[Any, list[str]] = {}
    for annotation in data["annotations"]:
        labels.setdefault(annotation["image_id"], []).append(names[annotation["category_id"]])
    rows = [
        {"file_name": image["file_name"], "category": _one_of(labels.get(image["id"], ()))} for image in data["images"]
    ]
    if lost := len(set(labels) - {image["id"] for image in data["images"]}):
        note(f"note: {path}: not used: the annotations of {lost:,} images that are not in its list of images.")
    return Export("COCO export", rows, "category")


def _fiftyone_labels(data: Row, path: Path) -> Export:
    """Names of files without their endings, each with a class name or an index; the files are in data/."""
    files = _by_stem(path.parent / "data")
    names = data.get("classes")

    def label_of(target: Any) -> Any:
        if isinstance(target, dict):
            target = target.get("label")
        if isinstance(target, list):
            return _one_of(map(label_of, target))
        if names and isinstance(target, int):
            return names[target] if target >= 0 else None
        return target

    rows = [
        {"filepath": f"data/{files.get(name, name)}", "label": label_of(target)}
        for name, target in data["labels"].items()
    ]
    return Export("FiftyOne export", rows, "label")


def _by_stem(folder: Path) -> dict[str, str]:
    """The images below a folder by their path without its ending."""
    found = [
        PurePosixPath(Path(place, name).relative_to(folder)) for place, _, names in os.walk(folder) for name in names
    ]
    return {str(file.with_suffix("")): str(file) for file in found if is_image(Path(file))}


def _are_samples(data: Any) -> bool:
    return _has(data, list, "samples") and _are_objects(data["samples"]) and "filepath" in data["samples"][0]


def _fiftyone_samples(data: Row, _: Path) -> Export:
    """Samples with fields; those that hold classifications are columns, and so are tags that name splits."""
    rows, fields = [], {}
    for sample in data["samples"]:
        row: Row = {"filepath": sample["filepath"]}
        for name, value in sample.items():
            kind = value.get("_cls") if isinstance(value, dict) else None
            if kind in ("Classification", "Classifications"):
                fields[name] = True
                row[name] = _one_of(label["label"] for label in value.get("classifications", [value]))
        if roles := [tag for tag in sample.get("tags") or () if role_of(tag)]:
            row["split"] = _one_of(roles)
        rows.append(row)
    found = "ground_truth" if "ground_truth" in fields else next(iter(fields), None) if len(fields) == 1 else None
    return Export("FiftyOne export", rows, found)


def _are_via(data: Any) -> bool:
    if _has(data, dict, "_via_img_metadata"):
        return True
    values = list(data.values())[:10] if isinstance(data, dict) else []
    return _are_objects(values) and all("filename" in value and "file_attributes" in value for value in values)


def _via(data: Row, _: Path) -> Export:
    """Files with attributes, each of which is a column."""
    files = data.get("_via_img_metadata", data).values()
    rows = [
        {"filename": file["filename"]} | {name: _chosen(v) for name, v in file["file_attributes"].items()}
        for file in files
    ]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "filename"))
    return Export("VIA export", rows, names[0] if len(names) == 1 else None)


def _chosen(value: Any) -> Any:
    """The one option of a value that is a box to tick for each."""
    return _one_of(name for name, ticked in value.items() if ticked) if isinstance(value, dict) else value


def _are_splits(data: Any) -> bool:
    return isinstance(data, dict) and bool(data) and all(role_of(name) and _are_objects(v) for name, v in data.items())


def _splits(data: Mapping[str, list[Row]], _: Path) -> Export:
    return Export("JSON file", [{"split": name} | row for name, rows in data.items() for row in rows])


def _are_by_path(data: Any) -> bool:
    return isinstance(data, dict) and bool(data) and all(is_image(Path(name)) for name in data)


def _by_path(data: Row, _: Path) -> Export:
    """A label, or an object, for each path."""
    if _are_objects(list(data.values())):
        return Export("JSON file", [{"path": path} | row for path, row in data.items()])
    return Export(
        "JSON file",
        [{"path": path, "label": _one_of(label) if isinstance(label, list) else label} for path, label in data.items()],
    )


def _are_paths_by_class(data: Any) -> bool:
    return isinstance(data, dict) and bool(data) and all(map(_are_paths, data.values()))


def _are_paths(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) and is_image(Path(v)) for v in values)


def _paths_by_class(data: Mapping[str, Sequence[str]], path: Path) -> Export:
    if all(map(role_of, data)):
        raise UsageError(f"{path}: its keys are names of splits, and its paths have no labels. {READ}")
    return Export("JSON file", [{"path": path, "label": label} for label, paths in data.items() for path in paths])


def _objects(data: list[Row], _: Path) -> Export:
    return Export("JSON file", data)


# Whether JSON has a layout, and how it is read; special ones before general ones.
FORMS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Path], Export]], ...] = (
    (_are_label_studio, _label_studio),
    (lambda data: _has(data, list, "images", "annotations", "categories"), _coco),
    (lambda data: _has(data, dict, "labels") and "classes" in data, _fiftyone_labels),
    (_are_samples, _fiftyone_samples),
    (_are_via, _via),
    (_are_splits, _splits),
    (_are_by_path, _by_path),
    (_are_paths_by_class, _paths_by_class),
    (_are_objects, _objects),
)
