"""vlm/inference/model_folder.py: damaged folders are refused by name, whole ones are read and never written."""

import json
import shutil

import pytest
from commands import MODEL_FOLDER, names_in
from damage import cut_short, delete, empty, flip_bit, make_folder, nested, no_keys, other_type
from tiny import save_classifier, tiny_classifier, tiny_prompts

from vlm.common import UsageError
from vlm.common.checksums import check_checksums
from vlm.inference import load_model_and_metadata, update_metadata


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "best_model"
    classifier, prompts = tiny_classifier(tiny_model), tiny_prompts()
    metadata = {"class_names": list(prompts.class_names), "prompts": prompts.to_json(), "settings": {}}
    save_classifier(folder, classifier, metadata, classifier.model.dtype)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "best_model")


def load(folder):
    return load_model_and_metadata(folder, device="cpu")


@pytest.mark.parametrize("damage", [flip_bit, cut_short, empty, delete, make_folder])
@pytest.mark.parametrize("name", sorted(MODEL_FOLDER - {"checksums.json", "README.md"}))
def test_a_damaged_file_is_refused_by_name(folder, name, damage):
    damage(folder / name)
    with pytest.raises(UsageError) as error:
        load(folder)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [cut_short, empty, other_type, no_keys, nested])
def test_damaged_metadata_without_checksums_are_refused_by_name(folder, damage):
    (folder / "checksums.json").unlink()
    damage(folder / "training_metadata.json")
    with pytest.raises(UsageError) as error:
        load(folder)
    assert str(folder / "training_metadata.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompts", None),
        ("prompts", []),
        ("class_names", ["another"]),
        ("class_names", 3),
        ("system", 3),
        ("responses", [1, 2]),
        ("unknown", "x"),
        ("reasoning_tokens", "many"),
        ("readable_names", ["a"] * len(tiny_prompts().class_names)),
    ],
)
def test_metadata_with_values_of_another_kind_are_refused(folder, key, value):
    (folder / "checksums.json").unlink()
    path = folder / "training_metadata.json"
    metadata = json.loads(path.read_text())
    (metadata if key in metadata else metadata["prompts"])[key] = value
    path.write_text(json.dumps(metadata))
    with pytest.raises(UsageError, match="training_metadata.json is damaged: its classes and prompts cannot be read"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("settings", [1]), ("dataset", "x"), ("texts", 3), ("train_images", [1]), ("validation", [])]
)
def test_a_part_of_the_metadata_of_another_kind_is_named(folder, key, value):
    (folder / "checksums.json").unlink()
    path = folder / "training_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=f"training_metadata.json is damaged: its {key} cannot be read"):
        load(folder)


def test_classes_of_one_name_are_refused(folder):
    (folder / "checksums.json").unlink()
    path = folder / "training_metadata.json"
    metadata = json.loads(path.read_text())
    metadata["class_names"] = metadata["prompts"]["class_names"] = ["a"] * len(metadata["class_names"])
    path.write_text(json.dumps(metadata))
    with pytest.raises(UsageError, match="its classes and prompts cannot be read"):
        load(folder)


def test_a_folder_without_checksums_is_read(folder):
    (folder / "checksums.json").unlink()
    assert load(folder)[2]["class_names"] == list(tiny_prompts().class_names)


def test_reading_writes_nothing(folder):
    """Also if a training was killed while it replaced the folder."""
    folder.rename(folder.with_name("best_model.old"))
    before = listing(folder.parent)
    load(folder)
    assert listing(folder.parent) == before


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_new_metadata_come_with_new_checksums(folder):
    """The weights are not written again, and those that were damaged meanwhile are not taken for whole ones."""
    weights = (folder / "model.safetensors").stat()
    metadata = load(folder)[2] | {"calibration": None, "note": "new"}
    update_metadata(folder, metadata)
    assert names_in(folder) == MODEL_FOLDER and names_in(folder.parent) == {"best_model"}
    check_checksums(folder, "")
    assert load(folder)[2] == metadata
    assert (folder / "model.safetensors").stat().st_ino == weights.st_ino
    flip_bit(folder / "model.safetensors")
    update_metadata(folder, metadata)
    with pytest.raises(UsageError, match="model.safetensors is damaged"):
        load(folder)


def test_a_file_system_without_links(folder, monkeypatch):
    def fail(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", fail)
    update_metadata(folder, load(folder)[2] | {"note": "new"})
    assert load(folder)[2]["note"] == "new"
