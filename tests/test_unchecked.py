"""A dataset that is too large to check first: unreadable images are left out when they are used, in every epoch."""

import json
import os
import tempfile
from dataclasses import replace
from functools import partial

import pytest
import torch
from commands import ROOT, run
from feature_checks import classifier_of
from safetensors.torch import load_file
from test_data import images
from test_resume import resumed, stop_after
from tiny import random_image, refusing, samples, tiny_classifier

from vlm.classifier import Objective
from vlm.classifier.plain import PlainForward
from vlm.common import RunError, Stopped, UsageError
from vlm.config import STATE, resolve
from vlm.data import Sample, UnreadableImage, as_seen, leave_out_unreadable, load_data, readable, splits, unchecked
from vlm.data.known import stamp_of
from vlm.evaluation import evaluate_vlm_model, score_split
from vlm.families import Family, fill_cache
from vlm.training.dry_run import look_at_run
from vlm.training.resume_state import read_state
from vlm.training.running import fit

SPLITS = {"train": 14, "val": 8, "test": 8}
BROKEN = ["train/cat/3.png", "train/dog/5.png", "val/cat/2.png", "test/dog/4.png"]


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Datasets of this size count as large, and the images that are broken here are not among those looked at first."""
    monkeypatch.setattr(unchecked, "CHECKED_FIRST", 20)
    monkeypatch.setattr(unchecked, "LOOKED_AT", {"train": 3, "validation": 1, "test": 1})


@pytest.fixture
def folder(tmp_path):
    """Three splits of two classes with different images, four of which are damaged."""
    root = tmp_path / "data"
    images(root, {f"{split}/{name}": count for split, count in SPLITS.items() for name in ("cat", "dog")})
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        random_image(number).save(file)
    for file in BROKEN:
        (root / file).write_bytes(b"no image")
    return root


def flags(folder, output, model, **more):
    return {
        "dataset": str(folder),
        "model": str(model),
        "output_dir": str(output),
        "epochs": 2,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "device": "cpu",
    } | more


@pytest.fixture
def opened(monkeypatch):
    """The names of the images that are opened."""
    names = []
    opening = splits.open_image
    monkeypatch.setattr(splits, "open_image", lambda source, name: names.append(name) or opening(source, name))
    return names


def test_only_some_images_are_decoded_before_the_training(folder, opened, capsys):
    data = load_data(resolve({"dataset": str(folder)}))
    assert len(opened) == 5 and not data.checked
    assert [len(split) for split in (data.train, data.validation, data.test)] == [28, 16, 16]
    assert data.edge == 20 and data.train.example.known_key
    assert capsys.readouterr().err.startswith("note: 5 of 60 images are checked now, the others while they are used")
    assert load_data(resolve({"dataset": str(folder)})).train.checks == data.train.checks, "drawn by the seed"


@pytest.mark.parametrize("asked", [{"check_images": True}, {"probe": True}, {"max_samples": 6}])
def test_all_images_are_decoded_if_they_are_few_or_it_is_asked_for(folder, asked):
    (folder / BROKEN[0]).unlink()
    for file in BROKEN[1:]:
        random_image(len(file)).save(folder / file)
    data = load_data(resolve({"dataset": str(folder)} | asked))
    assert data.checked and None not in [*data.train.keys, *data.validation.keys, *data.test.keys]


def test_the_splits_of_a_large_dataset_are_cut_by_class_and_seed(tmp_path):
    root = images(tmp_path / "data", {"cat": 20, "dog": 40})
    cut = load_data(resolve({"dataset": root, "seed": 3}))
    assert sorted(cut.train.names + cut.validation.names + cut.test.names) == sorted(
        f"{name}/{i}.png" for name, count in (("cat", 20), ("dog", 40)) for i in range(count)
    )
    assert [split.labels.count(0) for split in (cut.train, cut.validation, cut.test)] == [14, 3, 3]
    assert [split.labels.count(1) for split in (cut.train, cut.validation, cut.test)] == [28, 6, 6]
    again = load_data(resolve({"dataset": root, "seed": 3}))
    assert again.validation.names == cut.validation.names and again.fingerprint == cut.fingerprint


def test_what_becomes_known_of_the_images_changes_no_fingerprint(folder, tiny_model):
    data = load_data(resolve({"dataset": str(folder)}))
    before = data.fingerprint
    family = tiny_classifier(tiny_model).family
    family.vision.requires_grad_(False)
    assert fill_cache(family, (data.train, data.validation, data.test), 1, known=data.known) is not None
    assert data.train.keys.count(None) == 2 and set(data.train.faults) == {7, 23}
    assert data.fingerprint == before


@pytest.mark.parametrize("model", ["idefics3", "llava"])
@pytest.mark.parametrize("name", ["response", "posterior", "both"])
def test_an_unreadable_image_has_no_part_in_the_losses(tmp_path, model, name):
    """The losses are those of a batch without it, with a shared prefix and (llava) with whole sequences."""
    classifier = classifier_of(model, tmp_path)
    if model == "llava":
        classifier.strategy = PlainForward(classifier.family, classifier.rendered, classifier.tree)
    opening = len(classifier.rendered.opening_ids)
    classifier.objective = Objective(name, classifier.tree, opening, 0.1, [1.0, 2, 3, 4, 5, 6, 7])
    collate = classifier.collate(classifier.objective.has_response)

    def gone():
        raise UnreadableImage("b.png: no such file")

    whole, unreadable = samples([0, 3, 5]), Sample(gone, 1, "b.png")
    losses = []
    for some in (whole, [whole[0], unreadable, *whole[1:]], [unreadable]):
        batch = collate(some)
        found = classifier(batch)
        losses.append(found.loss + (0 if found.posterior is None else found.posterior))
    assert batch.faults == {0: "b.png: no such file"}
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    assert losses[2].item() == 0
    losses[2].backward()  # all processes exchange the gradients of each step


def test_an_image_that_the_processor_refuses_is_unreadable_too(tiny_model, monkeypatch):
    classifier = tiny_classifier(tiny_model)
    family = classifier.family.without_weights()
    monkeypatch.setattr(family, "encode_images", refusing((7, 9), family.encode_images))
    monkeypatch.setattr(classifier.family, "without_weights", lambda: family)
    some = [Sample(partial(random_image, i, *size), 0, f"{i}.png") for i, size in enumerate([(20, 14), (7, 9)])]
    batch = classifier.collate(True)(some)
    assert list(batch.faults) == [1] and batch.faults[1].startswith("1.png: 7 x 9 pixels")
    assert batch.class_targets.tolist() == [0, -100]


def test_metrics_are_those_of_the_readable_images(folder, tiny_model):
    classifier = tiny_classifier(tiny_model, names=["cat", "dog"])
    data = load_data(resolve({"dataset": str(folder)}))
    found = evaluate_vlm_model(classifier, data.test, batch_size=3)
    assert data.test.faults.keys() == {8 + 4} and sum(row["support"] for row in found["per_class"].values()) == 15
    sums = score_split(classifier, data.test)[leave_out_unreadable(data, "test")]
    assert len(data.test) == 15 == len(sums) and data.skipped[0].startswith("test/dog/4.png")
    assert dict(data.summary)["test"].startswith("15 images") and data.source["unreadable"] == 1
    torch.testing.assert_close(score_split(classifier, data.test), sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_a_training_leaves_them_out_and_counts_them(folder, tmp_path, tiny_model, opened, capsys, monkeypatch, cached):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out"
    results = fit(resolve(flags(folder, output, tiny_model, no_feature_cache=not cached)))
    assert results["pictures"] == {"train": 26, "validation": 15, "test": 15, "skipped": 4}
    assert sum(row["support"] for row in results["test"]["per_class"].values()) == 15
    assert json.loads((output / "training_metadata.json").read_text())["dataset"]["unreadable"] == 4
    assert results["overlap"] == {"test_in_train": 0} and "not_in_train" not in results["test"]
    assert opened.count(BROKEN[0].removeprefix("data/")) == 1, "known to be unreadable in the second epoch"
    said = capsys.readouterr().err
    assert said.count("left out, as it is unreadable: train/") == 2
    assert "2 unreadable images of train are left out, first train/cat/3.png: not an image" in said


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path, tiny_model, monkeypatch, cached):
    """Although an image is repaired in between, which the run has left out already."""
    more = {"no_feature_cache": not cached, "learning_rate": 1e-3}
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    fit(resolve(flags(folder, tmp_path / "unbroken", tiny_model, **more)))
    with pytest.raises(Stopped):
        fit(resolve(flags(folder, tmp_path / "out", tiny_model, **more)), stop_after(9))
    assert read_state(tmp_path / "out").progress.unreadable.keys() == {"7", "23"}
    random_image(1).save(folder / BROKEN[0])
    results = fit(resumed(tmp_path / "out"))
    ours, theirs = (load_file(tmp_path / name / "final_model/model.safetensors") for name in ("out", "unbroken"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert results["pictures"]["train"] == 26 and not (tmp_path / "out" / STATE).exists()


@pytest.mark.slow
def test_two_processes_leave_out_what_each_of_them_finds(folder, tmp_path, tiny_model):
    script, output = tmp_path / "small.py", tmp_path / "out"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_vlm\nfrom vlm.data import unchecked\n"
        "unchecked.CHECKED_FIRST = 20\nunchecked.LOOKED_AT = dict(train=3, validation=1, test=1)\n"
        "sys.exit(train_vlm.main())\n"
    )
    launch = ["launch_processes.py", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", script]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in flags(folder, output, tiny_model).items()]
    result = run(*launch, *options, "--no-feature-cache")
    assert result.returncode == 0, result.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["pictures"] == {"train": 26, "validation": 15, "test": 15, "skipped": 4}


def test_too_many_stop_the_run_after_a_state_was_saved(folder, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(unchecked, "FEWEST", 3)
    for i in range(3):
        (folder / f"train/dog/{i}.png").write_bytes(b"")
    message = r"(?s)of \d+ images of train are unreadable, more than 5%\. First: train/.*--overwrite"
    with pytest.raises(RunError, match=message):
        fit(resolve(flags(folder, tmp_path / "out", tiny_model, no_feature_cache=True)))
    assert read_state(tmp_path / "out").progress.step > 0


def test_too_many_among_those_looked_at_first_are_refused(folder):
    for file in folder.glob("train/*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(UsageError, match="3 of 3 images of train are unreadable"):
        load_data(resolve({"dataset": str(folder)}))


def test_those_found_or_refused_at_the_start_are_left_out_alike(folder, tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(unchecked, "LOOKED_AT", {"train": 28, "validation": 16, "test": 16})
    monkeypatch.setattr(readable, "MOST_UNREADABLE", 0.1)
    random_image(0, 9, 9).save(folder / "val/dog/0.png")
    refusal = "1 x 1, which is too small"
    monkeypatch.setattr(Family, "refusal_of_size", lambda self, *size: refusal if size == (9, 9) else None)
    results = fit(resolve(flags(folder, tmp_path / "out", tiny_model)))
    assert results["pictures"] == {"train": 26, "validation": 14, "test": 15, "skipped": 5}
    assert f"unreadable: val/dog/0.png: {refusal}" in capsys.readouterr().err


def test_what_was_found_is_remembered_by_the_file(folder, tiny_model, opened, monkeypatch, tmp_path):
    """A second start decodes none of the images that have features; one that was changed is decoded again."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    family = tiny_classifier(tiny_model).family
    family.vision.requires_grad_(False)

    def start():
        data = load_data(resolve({"dataset": str(folder)}))
        opened.clear()
        fill_cache(family, (data.train,), 1, known=data.known)
        return data

    first = start()
    assert len(opened) >= 25
    again = start()
    assert set(opened) <= {name for name in BROKEN if name.startswith("train")} and again.train.keys == first.train.keys
    random_image(500).save(folder / "train/cat/7.png")
    os.utime(folder / "train/cat/7.png", ns=(1, 1))
    changed = start()
    assert "train/cat/7.png" in opened and "train/cat/8.png" not in opened
    assert [a != b for a, b in zip(changed.train.keys, first.train.keys, strict=True)].index(True) == 11
    for file in (tmp_path / "cache/images").iterdir():
        file.write_bytes(file.read_bytes()[:-3] + b"abc")
    assert start().train.keys == changed.train.keys, "a damaged file is no obstacle"


def test_files_that_change_places_are_other_images(folder):
    """Although their sizes and times are equal."""
    one, other = (folder / f"train/{name}/1.png" for name in ("cat", "dog"))
    for number, path in enumerate((one, other)):
        path.write_bytes(bytes([number]) * 700)
        os.utime(path, ns=(1, 1))
    before = stamp_of([one], 0), stamp_of([other], 0)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    assert one.stat().st_mtime_ns == 1 and one.stat().st_size == 700
    assert {*before}.isdisjoint({stamp_of([one], 0), stamp_of([other], 0)})


@pytest.mark.slow
def test_a_class_without_readable_images_is_said_and_stops_the_run_if_it_is_known_in_time(
    folder, tmp_path, tiny_model, monkeypatch, capsys
):
    monkeypatch.setattr(unchecked, "MOST_UNREADABLE", 0.9)
    for split in ("train", "test"):
        for path in (folder / split / "dog").iterdir():
            path.write_bytes(b"no image")
    settings = resolve(flags(folder, tmp_path / "out", tiny_model))
    monkeypatch.setattr(unchecked, "LOOKED_AT", {"train": 1, "validation": 1, "test": 1})
    monkeypatch.setattr(readable, "MOST_UNREADABLE", 1)
    with pytest.raises(RunError, match="train has no readable image of dog. Repair these files, or remove the class"):
        fit(settings)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    fit(resolve(flags(folder, tmp_path / "out", tiny_model, no_feature_cache=True)))
    said = capsys.readouterr().err
    assert "warning: train has no readable image of dog, so the model did not learn them." in said
    assert "warning: test has no readable image of dog, so its accuracy says nothing about them." in said


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_images_checked_first(folder, tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(readable, "MOST_UNREADABLE", 0.5)
    with pytest.raises(Stopped):
        fit(resolve(flags(folder, tmp_path / "out", tiny_model)), stop_after(3))
    with pytest.raises(
        UsageError, match="had some of its images checked first .--check-images, --probe., this one has all"
    ):
        fit(replace(resumed(tmp_path / "out"), probe=True))


def test_equal_images_are_found_as_far_as_their_features_tell(folder, tmp_path, tiny_model, capsys):
    for i in range(2):
        random_image(900 + i).save(folder / f"test/cat/{i}.png")
        random_image(900 + i).save(folder / f"train/dog/{i}.png")
    results = fit(resolve(flags(folder, tmp_path / "out", tiny_model)))
    assert results["overlap"] == {"test_in_train": 2} and results["test"]["not_in_train"]["pictures"] == 13
    assert "warning: 2 of 15 test images are in train" in capsys.readouterr().err


def test_equal_paths_are_one_image(tmp_path, tiny_model, opened):
    for i in range(3):
        random_image(i).save(tmp_path / f"{i}.png")
    rows = [f"{i % 3}.png,{'cat' if i % 3 else 'dog'}" for i in range(60)]
    (tmp_path / "rows.csv").write_text("image,label\n" + "\n".join(rows))
    data = load_data(resolve({"dataset": str(tmp_path / "rows.csv")}))
    family = tiny_classifier(tiny_model).family
    family.vision.requires_grad_(False)
    opened.clear()
    fill_cache(family, (data.train, data.validation), 1, known=data.known)
    assert len(opened) <= 2 * 3 and len(set(data.train.keys)) == 3 and None not in data.train.keys


@pytest.mark.slow
def test_a_dry_run_names_each_image_once(folder, tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = resolve(flags(folder, tmp_path / "out", tiny_model, dry_run=True))
    look_at_run(settings)
    said = capsys.readouterr().err
    named = [line for line in said.splitlines() if line.startswith("left out, as it is unreadable: train/")]
    assert len(named) == len(set(named)) > 0


def test_views_of_an_unreadable_image_are_unreadable(folder):
    settings = resolve({"dataset": str(folder), "augment": "light"})
    data = load_data(settings)
    data.train.leave_out(3, "why")
    for epoch in range(2):
        assert as_seen(data.train, settings, epoch)[3].fault == "why"
