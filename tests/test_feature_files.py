"""The files of the feature cache: bounded, shared by runs, unharmed by kills, and used by the test and by inference."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import classify, names_in, train
from damage import cut_short, empty, flip_bit, make_folder
from feature_checks import classifier_of, split
from PIL import Image
from safetensors.torch import load_file, save_file

from inference_vlm import load_model_and_metadata, predict_batch
from vlm.families import Family, FeatureCache, cache_root, encode, fill_cache
from vlm.families.features import cache as cache_file
from vlm.families.features import shards
from vlm.families.features.cache import nbytes
from vlm.families.features.room import make_room

OLD, NEW = 2 * 86400, 60  # seconds since a file was used


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return cache_root()


def put(file: Path, age: float, size: int = 600_000) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(size))
    for path in (file, file.parent):
        os.utime(path, (time.time() - age, time.time() - age))
    return file


def found(cache, images) -> bool:
    """Whether the features of all images are there, and whole."""
    return cache is not None and all(cache.entry(images[i].key) for i in range(len(images)))


def start(classifier, images, save) -> multiprocessing.Process:
    """Another process that fills the cache, with `save` in the place of the function that writes a file."""

    def fill():
        shards.save_file = save
        sys.exit(0 if found(fill_cache(classifier.family, [images], limit_gb=1), images) else 1)

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    return process


# Size


def test_features_that_are_too_large_are_not_kept(tmp_path, root, capsys):
    classifier = classifier_of("idefics3", tmp_path / "model")
    assert fill_cache(classifier.family, [split()], limit_gb=1e-6) is None
    assert "0 of them fit into --cache-size 1e-06" in capsys.readouterr().err
    assert not list(root.glob("*/*"))


def test_features_that_turn_out_larger_than_the_first_ones_stay_within_the_limit(tmp_path, root, monkeypatch, capsys):
    """Images of unequal size: the estimate is of some of them."""
    classifier = classifier_of("qwen2_vl", tmp_path / "model")
    images = split()
    whole = fill_cache(classifier.family, [images], limit_gb=1)
    sizes = [nbytes(whole.entry(key)) for key in images.keys[:3]]
    assert sizes[0] == min(sizes) and 3 * sizes[0] < sum(sizes) - 1
    shutil.rmtree(whole.folder)
    monkeypatch.setattr("vlm.families.features.filling.TRIED", 1)
    limit = (sum(sizes) - 1) / 1e9
    cache = fill_cache(classifier.family, [images], limit_gb=limit)
    assert [cache.use(key) for key in images.keys[:3]] == [True, True, False]
    assert (
        f"--cache-size {limit:g} is reached: other vision features are computed each time." in capsys.readouterr().err
    )


def test_only_features_that_nobody_used_for_a_day_make_room(tmp_path, root):
    """Other encoders' and this one's alike, the longest unused first, and no more of them than need be."""
    classifier = classifier_of("idefics3", tmp_path / "model")
    own = FeatureCache(classifier.family, False, False, 1).folder.name
    oldest, older = put(root / "other" / "oldest", 3 * OLD), put(root / own / "older", 2 * OLD)
    old, new = put(root / "other" / "old", OLD), put(root / own / "new", NEW)
    assert fill_cache(classifier.family, [split()], limit_gb=1.5e-3) is not None
    assert [file.exists() for file in (oldest, older, old, new)] == [False, False, True, True]
    assert sum(file.stat().st_size for file in root.glob("*/*")) <= 1.5e6


def test_nothing_is_deleted_in_vain(root):
    old = put(root / "other" / "old", OLD)
    assert make_room(root / "own", 3e5, limit_gb=1e-3).free == 4e5
    assert old.exists()
    room = make_room(root / "own", 2e9, limit_gb=1e-3)
    assert (room.free, room.all_gb) == (1e6, 2), "as much as possible, and what would be enough"
    assert not old.exists()


def test_what_a_run_looks_up_stays(tmp_path, root):
    classifier = classifier_of("idefics3", tmp_path / "model")
    images = split()
    cache = fill_cache(classifier.family, [images], limit_gb=1)
    files = list(cache.folder.iterdir())
    looks = (
        lambda: fill_cache(classifier.family, [images], limit_gb=1),
        lambda: FeatureCache(classifier.family, False, False, 1).entry(images.keys[0]),
    )
    for look in looks:
        for file in files:
            os.utime(file, (time.time() - OLD, time.time() - OLD))
        look()
        assert make_room(root / "other", 5e8, limit_gb=0.5).free < 5e8
        assert all(file.exists() for file in files)


def test_folders_without_files_go_when_they_are_old(root):
    for name, age in (("old", OLD), ("new", NEW)):
        put(root / name / "x", age).unlink()
        os.utime(root / name, (time.time() - age, time.time() - age))
    make_room(root / "own", 1, limit_gb=1)
    assert names_in(root) == {"new", "own"}


# Several runs, and killed ones


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    classifier = classifier_of("idefics3", tmp_path / "model")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file"))
    assert fill_cache(classifier.family, [split()], limit_gb=1) is None
    assert "vision features cannot be kept in" in capsys.readouterr().err


def test_two_runs_fill_the_same_cache_at_once(tmp_path, root):
    """Each writes a shard of its own, since they look for features before either has written any."""
    classifier = classifier_of("idefics3", tmp_path / "model")
    images, both = split(), multiprocessing.get_context("fork").Barrier(2)

    def save(tensors, path):
        both.wait(timeout=60)
        save_file(tensors, path)

    runs = [start(classifier, images, save) for _ in range(2)]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    (folder,) = root.iterdir()
    first, second = folder.iterdir()
    assert all(load_file(file)["keys"].shape == (3, 16) for file in (first, second))
    cache = FeatureCache(classifier.family, False, False, 1)
    first.unlink()
    assert found(cache, images), "what one has lost is in the other"


@pytest.mark.parametrize("damage", [flip_bit, cut_short, empty, make_folder])
def test_a_damaged_shard_is_computed_again(tmp_path, capsys, damage):
    classifier = classifier_of("idefics3", tmp_path / "model")
    images = split()
    before = fill_cache(classifier.family, [images], limit_gb=1)
    own = [{name: tensor.clone() for name, tensor in before.entry(key).items()} for key in images.keys]
    shards.open_shard.cache_clear()  # what is mapped must not be cut short
    (file,) = before.folder.iterdir()
    damage(file)
    cache = FeatureCache(classifier.family, False, False, 1)
    for i in range(4):
        entry = cache.entry(images.keys[i]) or own[i]
        assert torch.equal(entry[cache.name], own[i][cache.name]), "what is damaged is never taken"
    samples = [images[i] for i in range(4)]
    assert "pixel_values" in encode(samples, classifier.family, cache).inputs
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{file} is damaged: it is deleted, and the vision features in it are computed again."
    )
    assert not file.exists()
    assert found(fill_cache(classifier.family, [images], limit_gb=1), images)


def test_a_run_that_is_killed_while_it_writes_loses_the_last_shard(tmp_path, root):
    def save(tensors, path):
        if list(path.parent.glob("*.safetensors")):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path)

    classifier = classifier_of("idefics3", tmp_path / "model")
    images = split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_file, "SHARD_IMAGES", 1)
        run = start(classifier, images, save)
        run.join()
    assert run.exitcode == -signal.SIGKILL
    (left,) = root.glob("*/.*.tmp")
    before = FeatureCache(classifier.family, False, False, 1)
    assert sum(before.use(key) for key in [images[i].key for i in range(3)]) == 1
    cache = fill_cache(classifier.family, [images], limit_gb=1)
    assert found(cache, images) and len(list(cache.folder.glob("*.safetensors"))) == 2
    assert left.exists(), "it may be another run's that is still writing"
    os.utime(left, (time.time() - OLD, time.time() - OLD))
    make_room(cache.folder, 1, limit_gb=1)
    assert not left.exists() and found(cache, images)


# The whole program


@pytest.fixture
def encoders(monkeypatch):
    """How many images each pass through the vision encoder had, by whether it was for the cache."""
    passes = {"cache": [], "model": []}
    inside = []
    whole, each = Family.encoder_features, Family.features_of_each

    def encoder_features(self, inputs):
        if "pixel_values" in inputs and not inside:
            passes["model"].append(len(inputs["pixel_values"]))
        return whole(self, inputs)

    def features_of_each(self, images, connected):
        inside.append(1)
        passes["cache"].append(len(images))
        try:
            return each(self, images, connected)
        finally:
            inside.pop()

    monkeypatch.setattr(Family, "encoder_features", encoder_features)
    monkeypatch.setattr(Family, "features_of_each", features_of_each)
    return passes


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--freeze-connector", "--cache-dtype", "float16")])
def test_training_test_and_inference_compute_each_image_once(flags, tmp_path, root, encoders):
    output = tmp_path / "out"
    arguments = (
        "--demo",
        "--tune",
        "lora",
        "--max-samples",
        20,
        "--epochs",
        2,
        "--batch-size",
        4,
        "--output-dir",
        output,
        *flags,
    )
    assert train(*arguments) == 0
    (folder,) = root.iterdir()
    assert sum(encoders["cache"]) == sum(len(load_file(file)["keys"]) for file in folder.iterdir()) <= 60
    # The gray image of the check is in no dataset; head and probe read what the cache has.
    assert sum(encoders["model"]) == 1
    encoders["cache"].clear()
    saved = json.loads((output / "results.json").read_text())["test"]["accuracy"]
    assert train(*arguments, "--overwrite") == 0
    assert encoders["cache"] == [] and json.loads((output / "results.json").read_text())["test"]["accuracy"] == saved

    images = sorted((output / "demo_images").iterdir())
    Image.effect_noise((8, 8), 80).convert("RGB").save(tmp_path / "new.png")
    model, processor, metadata = load_model_and_metadata(output / "best_model", device="cpu")

    def probabilities(**options):
        results = predict_batch(
            model, processor, [*images, tmp_path / "new.png", "no.png"], metadata, explain=False, **options
        )
        return torch.tensor([list(result.get("probabilities", {}).values()) for result in list(results.values())[:-1]])

    encoders["model"].clear()
    expected = probabilities()
    assert sum(encoders["model"]) == len(images) + 1
    encoders["model"].clear()
    for _ in range(2):
        found = probabilities(feature_cache=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if flags else 1e-5)
    assert encoders == {"cache": [1], "model": []}, "only the new image was computed, and once"
    assert {path.name for path in root.iterdir()} == {folder.name}


def test_inference_without_a_training_keeps_the_features_behind_the_connector(demo_run, root, encoders, capsys):
    images = demo_run / "demo_images"
    for _ in range(2):
        assert classify("--model-dir", demo_run / "best_model", "--device", "cpu", "--feature-cache", images) == 0
    assert sum(encoders["cache"]) == 10 and encoders["model"] == []
    (file,) = root.glob("*/*.safetensors")
    assert {name.removeprefix("values.") for name in load_file(file)} >= {"connected_features", "token_ids"}
    first, second = capsys.readouterr().out.split("image ")[1:]
    assert first == second
