"""Datasets of a hub on this machine, through the real client: the four of the README, renamed ones, parts of them, and
only the files that are needed."""

import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from commands import TRACEBACK, run
from fake_hub import COMMIT, TOKEN
from published import (
    CIFAR,
    FOOD,
    IMAGENET,
    MARS,
    publish,
    publish_cifar10,
    publish_food101,
    publish_imagenet,
    publish_mars,
    split_of,
)
from test_data import counts, draw, load, refuse
from test_hub import hub, switch_off  # noqa: F401

from vlm.common import UsageError
from vlm.config import METADATA, classify_settings
from vlm.data import read_images


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "vlm"))
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()


def again_without_the_hub(monkeypatch, name, data, **settings):
    """The same dataset from the cache."""
    switch_off(monkeypatch)
    cached = load(name, **settings)
    assert cached.fingerprint == data.fingerprint and cached.source["commit"] == COMMIT
    return cached


def test_cifar10_by_its_old_name(hub, monkeypatch, capsys):  # noqa: F811
    publish_cifar10(hub)
    data = load("cifar10")
    assert (data.class_names, counts(data)) == (CIFAR, [30, 10, 10])
    assert data.source["image_column"] == "img"
    assert (data.source["dataset"], data.source["commit"]) == ("uoft-cs/cifar10", COMMIT)
    assert "note: dataset cifar10 is called uoft-cs/cifar10 on the hub now." in capsys.readouterr().err
    again_without_the_hub(monkeypatch, "cifar10", data)
    assert "using the cached copy of dataset uoft-cs/cifar10" in capsys.readouterr().err


def test_to_classify_only_the_split_for_the_test_is_fetched(hub):  # noqa: F811
    publish_cifar10(hub)
    found = read_images(classify_settings({"dataset": "cifar10"}))
    assert found.class_names == CIFAR and len(found.labels) == 10 and None not in found.labels
    assert found.source["split"] == "test" and found.source["commit"] == COMMIT
    assert not [file for file in hub.files_sent() if "train-" in file]
    publish_food101(hub)
    with pytest.raises(UsageError, match="Splits there: train, validation"):
        read_images(classify_settings({"dataset": "food101"}))


def test_food101_has_no_test_split(hub, monkeypatch):  # noqa: F811
    publish_food101(hub)
    data = load("food101")
    assert (data.class_names, counts(data)) == (FOOD, [36, 12, 12])
    assert dict(data.summary)["test"] == "12 images (cut from train)"
    again_without_the_hub(monkeypatch, "ethz/food101", data)


@pytest.mark.slow
def test_imagenet_has_short_names_and_no_shard_of_its_hidden_test_is_fetched(hub, monkeypatch):  # noqa: F811
    publish_imagenet(hub)
    refuse("access must be asked for", "imagenet-1k")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    data = load("imagenet-1k")
    assert counts(data) == [1000, 1000, 1000]
    snapshot = Path(huggingface_hub.constants.HF_HUB_CACHE, "datasets--ILSVRC--imagenet-1k/snapshots", COMMIT, "data")
    assert {path.name.split("-")[0] for path in snapshot.iterdir()} == {"train", "validation"}
    assert dict(data.summary)["test"] == "1,000 images (cut from train, as test has no labels)"
    expected = [
        *("tench", "goldfish", "hen", "hen-of-the-woods", "Cardigan Welsh corgi", "cardigan", "crane", "crane bird"),
        *("maillot", "tank suit", "sunglass", "sunglasses", "missile", "projectile", "laptop", "notebook"),
        *("Indian elephant", "African elephant", "species 0"),
    ]
    assert data.class_names[: len(expected)] == expected and len(set(map(str.lower, data.class_names))) == len(IMAGENET)
    names = dict(data.summary)["class names"]
    assert "the first of the synonyms of" in names and "maillot, tank suit -> tank suit" in names
    again_without_the_hub(monkeypatch, "imagenet-1k", data)


def test_names_with_a_few_commas_stay_as_they_are(hub):  # noqa: F811
    names = ["chest, left", "chest, right", "hand"]
    publish(hub, "me/scans", {"train": split_of([0, 1, 2] * 4, names)})
    assert load("me/scans").class_names == names


def test_the_mars_set_has_partitions_that_are_not_fetched(hub, monkeypatch):  # noqa: F811
    publish_mars(hub)
    data = load("Mirali33/mb-domars16k")
    assert (data.class_names, counts(data)) == (MARS, [45, 15, 15])
    assert dict(data.summary)["unused splits"] == "few_shot_1"
    assert not [file for file in hub.files_sent() if "few_shot" in file]
    again_without_the_hub(monkeypatch, "Mirali33/mb-domars16k", data)


@pytest.mark.parametrize(
    "name",
    [
        "hf://datasets/uoft-cs/cifar10",
        "datasets/uoft-cs/cifar10",
        "uoft-cs/cifar10@main",
        f"hf://datasets/uoft-cs/cifar10@{COMMIT}",
        "https://hub.example/datasets/uoft-cs/cifar10",
        "https://hub.example/datasets/uoft-cs/cifar10/tree/main/plain_text",
        "https://hub.example/datasets/cifar10/viewer",
    ],
)
def test_a_name_may_be_written_as_anywhere_else(hub, name):  # noqa: F811
    publish_cifar10(hub)
    data = load(name)
    assert counts(data) == [30, 10, 10] and data.source["dataset"] == "uoft-cs/cifar10"


def test_names_that_are_no_dataset(hub):  # noqa: F811
    publish_cifar10(hub)
    refuse("no revision v9 on the hub", "uoft-cs/cifar10@v9")
    refuse("not the address of a dataset on the hub", "https://example.org/files/data")
    refuse("this names a model. Give it to --model", "models/me/small")


def test_only_what_is_needed_is_fetched(hub):  # noqa: F811
    publish_food101(hub)
    refuse("--max-samples 5: expected at least one for each of the 12 classes", "food101", max_samples=5)
    refuse("--label-column dish: no such column", "food101", label_column="dish")
    refuse("no split nowhere. Splits there: train, validation", "food101", dataset_split="nowhere")
    assert hub.files_sent() == ["README.md"]
    load("food101", dataset_split="train")
    assert not [file for file in hub.files_sent() if "validation" in file]


def test_without_a_card_the_types_are_read_from_the_end_of_a_file(hub):  # noqa: F811
    splits = {"train": split_of([*range(10)] * 4, CIFAR)}
    publish(hub, "me/plain", splits, described=False, shards=2)
    refuse("--max-samples 5: expected at least one for each of the 10 classes", "me/plain", max_samples=5)
    assert "data/train-00001-of-00002.parquet" not in hub.files_sent()
    assert load("me/plain").class_names == CIFAR


def publish_large(hub):  # noqa: F811
    """2,000 rows of 10 classes in 4 files, in groups of 20 rows, and 200 of test."""
    train = split_of([*range(10)] * 200, CIFAR, size=32)
    splits = {"train": train, "test": split_of([*range(10)] * 20, CIFAR, first=9000, size=32)}
    publish(hub, "me/large", splits, shards=4, rows_in_group=20)


def test_max_samples_fetches_some_groups_of_rows(hub, monkeypatch, capsys):  # noqa: F811
    publish_large(hub)
    size = sum(path.stat().st_size for path in hub.root.rglob("*.parquet"))
    data = load("me/large", max_samples=20)
    assert counts(data) == [20, 20, 20] and set(data.train.labels) == set(range(10))
    assert hub.sent < size / 4, "a part of the files is fetched"
    assert "note: --max-samples: 140 rows of train are fetched" in capsys.readouterr().err
    sent = hub.sent
    assert load("me/large", max_samples=20).fingerprint == data.fingerprint
    assert hub.sent - sent < 2000, "the rows were kept"
    other = load("me/large", max_samples=20, seed=7)
    assert other.fingerprint["images of train"] != data.fingerprint["images of train"]
    again_without_the_hub(monkeypatch, "me/large", data, max_samples=20)
    refuse("the cache has no complete copy", "me/large", max_samples=30)


@pytest.mark.parametrize("online", [True, False])
def test_max_samples_draws_the_same_images_if_all_files_are_in_the_cache(hub, monkeypatch, tmp_path, online):  # noqa: F811
    publish_large(hub)
    data = load("me/large", max_samples=20)
    load("me/large")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "another"))
    if not online:
        switch_off(monkeypatch)
    assert load("me/large", max_samples=20).fingerprint == data.fingerprint


def test_a_hidden_test_is_not_fetched_although_another_command_did_not_ask_for_it(hub):  # noqa: F811
    splits = {name: split_of([0, 1] * 10, ["a", "b"], first=100 * i) for i, name in enumerate(("train", "val"))}
    publish(hub, "me/hidden", splits | {"test": split_of([-1] * 10, ["a", "b"], first=300)})
    load("me/hidden", dataset_split="train,val")
    assert counts(load("me/hidden"))[1] == 20
    assert hub.files_sent() == [
        "README.md",
        *(f"data/{name}-00000-of-00001.parquet" for name in ("test", "train", "val")),
    ]
    snapshots = Path(huggingface_hub.constants.HF_HUB_CACHE, "datasets--me--hidden/snapshots", COMMIT, "data")
    assert len(list(snapshots.iterdir())) == 2, "of test only the end was read"


def test_folds_fetch_no_test(hub):  # noqa: F811
    publish_mars(hub)
    data = load("Mirali33/mb-domars16k", folds=3)
    assert sum(counts(data)) == 60 and dict(data.summary)["unused splits"] == "few_shot_1, test"
    assert not [file for file in hub.files_sent() if "test" in file]


def test_a_sample_that_needs_most_rows_takes_the_whole_files(hub, tmp_path, capsys):  # noqa: F811
    publish_cifar10(hub)
    assert counts(load("uoft-cs/cifar10", max_samples=10)) == [10, 10, 10]
    assert "rows of train are fetched" not in capsys.readouterr().err


def test_parts_of_splits(hub):  # noqa: F811
    publish_mars(hub)
    name = "Mirali33/mb-domars16k"
    whole = load(name)
    data = load(name, dataset_split="train,test[-10:]")
    assert counts(data) == [30, 15, 10] and data.test.keys == whole.test.keys[-10:]
    assert dict(data.summary)["test"] == "10 images (test[-10:])"
    assert dict(data.summary)["unused splits"] == "few_shot_1, val"
    assert not [file for file in hub.files_sent() if "few_shot" in file]
    both = load(name, dataset_split="train=train[:67%], validation=few_shot_1, test=train[67%:]")
    assert counts(both) == [30, 15, 15] and both.validation.keys[0] not in whole.validation.keys


def test_a_single_split_is_for_training(hub):  # noqa: F811
    publish(hub, "me/full", {"full": split_of([0, 1] * 10, ["a", "b"])})
    refuse("no split called train. Splits there: full. Name one with --dataset-split", "me/full")
    assert counts(load("me/full", dataset_split="full")) == [12, 4, 4]
    assert sum(counts(load("me/full", dataset_split="full[:60%]"))) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train[:10", "not understood. Expected names of splits"),
        ("train[:x]", "not understood"),
        ("train,few", "what few is for is not clear. Write train=few, validation=few or test=few"),
        ("test,val", "expected one split for train"),
        ("train,train[:5]", "at most one for each other use"),
        ("train[:6],test=train[4:]", "train and test have 2 rows of train in common. Give parts that do not overlap"),
        ("train,test=train", "train and test have 12 rows of train in common"),
    ],
)
def test_parts_that_cannot_be_understood(tmp_path, text, message):
    for i in range(12):
        draw(tmp_path / "ab"[i % 2] / f"{i}.png")
    refuse(message, tmp_path, dataset_split=text)


def test_parts_of_splits_of_a_folder(tmp_path):
    for i in range(60):
        draw(tmp_path / ("train", "val", "test")[i % 3] / "ab"[i // 3 % 2] / f"{i:02}.png")
    data = load(tmp_path, dataset_split="train,test[:50%]")
    assert counts(data) == [16, 4, 10] and dict(data.summary)["unused splits"] == "val"


def test_classes_that_a_part_has_lost_are_said(tmp_path, capsys):
    for i, name in enumerate("abc"):  # the rows of a folder are sorted by class
        (tmp_path / "d" / name).mkdir(parents=True)
        for k in range(6):
            draw(tmp_path / "d" / name / f"{k}.png", 10 * i + k)
    assert load(tmp_path / "d", dataset_split="train[:50%]").class_names == ["a", "b"]
    assert "warning: train[:50%] has no row of c, which train has." in capsys.readouterr().err
    load(tmp_path / "d", dataset_split="train[:90%]")
    assert "has no row of" not in capsys.readouterr().err


def test_a_dataset_that_a_program_loads_is_refused(hub):  # noqa: F811
    hub.add("datasets", "me/old", {"README.md": "x", "old.py": "import os"})
    refuse(r"a program of its own \(old.py\), and no code of a dataset is run", "me/old")
    publish(hub, "me/both", {"train": split_of([0, 1] * 6, ["a", "b"])})
    hub.add("datasets", "me/both", {"both.py": "raise SystemExit"})
    assert load("me/both").class_names == ["a", "b"], "the files are enough"


@pytest.mark.parametrize("where", ["", "tables/"])
def test_paths_in_a_table_are_relative_to_the_repository_or_the_table(hub, monkeypatch, tmp_path, where):  # noqa: F811
    lines = ["image,label"]
    for i in range(12):
        draw(tmp_path / "x.png", i)
        hub.add("datasets", "me/table", {f"pics/{i}.png": (tmp_path / "x.png").read_bytes()})
        lines.append(f"pics/{i}.png,{'ab'[i % 2]}")
    hub.add("datasets", "me/table", {f"{where}train.csv": "\n".join(lines), "train.py": "raise SystemExit"})
    data = load("me/table")
    assert (data.class_names, sum(counts(data))) == (["a", "b"], 12) and not data.skipped
    assert (data.source["dataset"], data.source["commit"]) == ("me/table", COMMIT)
    again_without_the_hub(monkeypatch, "me/table", data)


def test_paths_in_a_parquet_file_are_relative_to_the_repository(hub, tmp_path):  # noqa: F811
    for i in range(12):
        draw(tmp_path / "x.png", i)
        hub.add("datasets", "me/paths", {f"pics/{i}.png": (tmp_path / "x.png").read_bytes()})
    rows = {"image": [f"pics/{i}.png" for i in range(12)], "label": ["a", "b"] * 6}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    hub.add("datasets", "me/paths", {"data/train.parquet": (tmp_path / "train.parquet").read_bytes()})
    data = load("me/paths")
    assert data.class_names == ["a", "b"] and not data.skipped


def test_folders_of_classes(hub, monkeypatch, tmp_path):  # noqa: F811
    for i in range(12):
        draw(tmp_path / "x.png", i)
        hub.add("datasets", "me/folders", {f"train/{'ab'[i % 2]}/{i}.png": (tmp_path / "x.png").read_bytes()})
    data = load("me/folders")
    assert dict(data.summary)["dataset"].startswith("me/folders (hub, image folder")
    again_without_the_hub(monkeypatch, "me/folders", data)


def test_what_the_library_hides_is_said(hub):  # noqa: F811
    publish(hub, "me/damaged", {"train": split_of([0, 1] * 10, ["a", "b"])})
    hub.add("datasets", "me/damaged", {"data/train-00000-of-00001.parquet": b"PAR1 and nothing else PAR1"})
    refuse(r"--dataset me/damaged: cannot be loaded \(ArrowInvalid: ", "me/damaged")


def test_a_stream_of_a_renamed_dataset(hub, monkeypatch):  # noqa: F811
    publish_cifar10(hub)
    streamed = {"streaming": True, "max_steps": 2, "max_samples": 5, "model": "m"}
    data = load("cifar10", **streamed)
    assert (data.class_names, counts(data)[1:]) == (CIFAR, [5, 5])
    assert (data.source["dataset"], data.source["commit"]) == ("uoft-cs/cifar10", COMMIT)
    refuse("no revision v9 on the hub", "cifar10@v9", **streamed)
    load("cifar10")  # into the cache
    switch_off(monkeypatch)
    assert load("cifar10", **streamed).test.keys == data.test.keys


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(hub, tiny_model, tmp_path):  # noqa: F811
    publish_cifar10(hub)
    folders = {"HF_HOME": tmp_path / "home", "HF_HUB_OFFLINE": None, "VLM_CACHE": tmp_path / "vlm"}
    flags = ["--model", tiny_model, "--dataset", "cifar10", "--dataset-split", "train[:50%],test"]
    flags += ["--epochs", 1, "--device", "cpu", "--output-dir", tmp_path / "out"]
    result = run("train_vlm.py", *flags, HF_ENDPOINT=hub.url, **folders)
    assert result.returncode == 0 and TRACEBACK not in result.stderr, result.stderr
    metadata = json.loads((tmp_path / "out" / METADATA).read_text())
    assert (metadata["dataset"]["dataset"], metadata["dataset"]["commit"]) == ("uoft-cs/cifar10", COMMIT)
    assert metadata["dataset"]["splits"]["train"]["from"] == "train[:50%]"
