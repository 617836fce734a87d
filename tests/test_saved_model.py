"""A saved model is tested on a dataset (`inference_vlm.py --dataset`, `evaluate`): the figures, the rows, the page."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from commands import names_in
from tiny import random_image

from inference_vlm import evaluate
from vlm.common import UsageError, WriteError
from vlm.config import METADATA, RESULTS, classify_settings, read_run, read_settings
from vlm.data import load_data, pack_keys, short_key, unpack_keys
from vlm.data.images import image_key
from vlm.data.trained_on import MOST_KEPT
from vlm.inference import read_images_for
from vlm.inference.testing import seen_in_training
from vlm.training import Result

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
REPORT = {"report.html", "results.json", "confusion_matrix.png", "reliability.png"}
INTERVALS = "accuracy", "nll", "brier", "ece"


@pytest.fixture(scope="module")
def test_images(demo_run, tmp_path_factory):
    """The test images of the demo's training as a folder with a folder for each class. Only to be read."""
    folder = tmp_path_factory.mktemp("test images")
    split = load_data(read_settings(read_run(demo_run)["settings"])).test
    for i, label in enumerate(split.labels):
        place = folder / WORDS[label]
        place.mkdir(exist_ok=True)
        split[i].image.save(place / f"{i}.png")
    return folder


@pytest.fixture
def model(demo_run):
    return demo_run / "best_model"


def few(images, folder, **counts):
    """Copies some images of classes into folders of other names."""
    for name, (word, count) in counts.items():
        (folder / name).mkdir(parents=True)
        for path in sorted((images / word).iterdir())[:count]:
            shutil.copy(path, folder / name)
    return folder


def test_the_figures_are_those_of_the_test_after_the_training(demo_run, model, test_images, capsys):
    before = json.loads((demo_run / RESULTS).read_text())
    stored = (model / METADATA).read_bytes()
    results = evaluate(model, test_images)
    found, expected = results["test"], before["test"]
    for name in ("accuracy", "macro_f1", "weighted_f1", "nll", "loss"):
        assert found[name] == pytest.approx(expected[name], abs=1e-4), name
    assert found["confusion_matrix"] == expected["confusion_matrix"] and found["per_class"] == expected["per_class"]
    for state in ("before", "after"):
        for name in INTERVALS:
            figures = found["calibration"][state][name], expected["calibration"][state][name]
            assert figures[0] == pytest.approx(figures[1], abs=0.03), "resamples depend on the order of the images"
            assert figures[0][0] == pytest.approx(figures[1][0], abs=1e-4)
    for name in ("temperature", "bias", "score", "method"):
        assert found["calibration"][name] == expected["calibration"][name], "the calibration is the model's"
    assert (model / METADATA).read_bytes() == stored
    assert results["pictures"] == {"test": before["pictures"]["test"], "unlabeled": 0, "skipped": 0}
    assert results["overlap"]["test_in_train"] == before["overlap"]["test_in_train"]
    assert results["dataset"]["kind"] == "image folder" and "unknown_classes" not in results
    assert capsys.readouterr().out == "", "a function prints no tables"


def test_the_command_prints_the_table_and_writes_rows_and_page(infer, model, test_images, tmp_path):
    rows, report = tmp_path / "rows.csv", tmp_path / "report"
    code, out, err = infer("--dataset", test_images, "--output", rows, "--report-dir", report)
    assert code == 0 and out.splitlines()[0].split() == ["class", "precision", "recall", "F1", "images"]
    assert "\ntest accuracy" in out and "\nNLL on test" in out and "\ntexts written freely" in out
    assert f"The page is {report / 'report.html'}." in err
    with rows.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    results = json.loads((report / RESULTS).read_text())
    assert {row["label"] for row in table} == set(WORDS) and all(row["path"].startswith(row["label"]) for row in table)
    right = sum(row["prediction"] == row["label"] for row in table)
    assert right / len(table) == results["test"]["accuracy"]
    assert out.split("test accuracy")[1].split()[0] == f"{results['test']['accuracy']:.4f}"
    assert names_in(report) == REPORT
    page = (report / "report.html").read_text("utf-8")
    assert "test accuracy" in page and 'id="curves"' not in page and 'id="mistakes"' in page
    assert "Training images of a class" not in page and "10 classes with test images: one of each" in page
    # A later test replaces it, and what is no test stays.
    assert infer("--dataset", test_images, "--report-dir", report)[0] == 0
    (report / RESULTS).write_text('{"history": []}')
    code, _, err = infer("--dataset", test_images, "--report-dir", report)
    assert code == 2 and "of something else: choose another folder" in err


def test_a_report_that_failed_halfway_can_be_written_again(infer, test_images, tmp_path, monkeypatch):
    def fail(*_):
        (tmp_path / "report" / "confusion_matrix.png").touch()
        raise WriteError(tmp_path / "report" / "report.html", "no space left on device")

    images = few(test_images, tmp_path / "images", zero=("zero", 2))
    with monkeypatch.context() as patch:
        patch.setattr("vlm.inference.testing.write_report", fail)
        code, _, err = infer("--dataset", images, "--report-dir", tmp_path / "report")
        assert code == 1 and "report.html could not be written" in err
    assert infer("--dataset", images, "--report-dir", tmp_path / "report")[0] == 0
    assert names_in(tmp_path / "report") == REPORT


def test_classes_are_matched_by_name_and_those_that_the_model_lacks_are_counted(infer, test_images, tmp_path):
    images = few(test_images, tmp_path / "images", **{"ZERO ": ("zero", 4), "Pluto": ("two", 3), "one": ("one", 2)})
    (images / "Pluto" / "broken.png").write_bytes(b"no image")
    code, out, err = infer("--dataset", images, "--output", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert code == 1 and "1 of 10 images could not be read" in err
    assert [row["label"] for row in rows] == ["Pluto"] * 4 + ["zero"] * 4 + ["one"] * 2
    assert "images of 2 of the model's 10 classes; no image of two" in err
    assert "ZERO = zero" in err and "\nimages of other classes  Pluto (4)\n" in err
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert f"\ntest accuracy                       {right / 6:.4f}" in out
    assert f"\naccuracy, unknown classes as wrong  {right / 9:.4f}" in out
    assert "3 images have classes that the model lacks, Pluto (3)" in out
    assert "macro F1 of the 2 classes that have test images" in out


def test_the_page_shows_what_is_in_no_figure_and_what_the_figures_do_not_prove(model, test_images, tmp_path):
    images = few(test_images, tmp_path / "images", zero=("zero", 2), Pluto=("two", 3), one=("one", 2))
    (images / "one" / "broken.png").write_bytes(b"no image")
    results = evaluate(model, images, report_dir=tmp_path / "report")
    predicted = results["unknown_classes"]["predictions"]["Pluto"]
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert sum(predicted.values()) == 3 and all(f"{name} ({count})" in page for name, count in predicted.items())
    assert "Classes that the model lacks" in page and "1 image that could not be read" in page
    assert "4 test images are few: on others like them, expect an accuracy of" in page
    assert f"tested at {results['timings']['tested_at']}" in page
    assert "2 classes with test images" in page and "No test image: two, three" in page and "test&nbsp;0" not in page
    assert results["tested"]["folder"] == str(model) and results["tested"]["model"] == "demo"
    assert results["texts"]["reasoning_names_answer"] is None and "<blockquote>" not in page
    with pytest.raises(UsageError, match="holds the test of a saved model, and not a run"):
        Result.read(tmp_path / "report")


def test_a_column_without_a_usual_name_is_found_by_the_names_of_the_classes(model, test_images, tmp_path):
    def table(*rows):
        text = "\n".join(["Bild;Körper;Gebiet", *(f"{image};{label};west" for image, label in rows)])
        (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
        return evaluate(model, tmp_path / "rows.csv", show_progress=False)

    zero, one = (sorted((test_images / word).iterdir())[0] for word in ("zero", "one"))
    results = table((zero, "Zero"), (one, "one"), (zero, ""), (one, "Pluto"))
    assert results["dataset"]["label_column"] == "Körper"
    assert results["test"]["samples"] == 2 and results["unknown_classes"]["classes"] == {"Pluto": 1}


def test_if_no_column_has_classes_of_the_model_all_columns_are_named(infer, test_images, tmp_path):
    zero = sorted((test_images / "zero").iterdir())[0]
    (tmp_path / "rows.csv").write_text(f"Bild;Körper;Gebiet\n{zero};Pluto;west\n", encoding="utf-8")
    code, _, err = infer("--dataset", tmp_path / "rows.csv")
    assert code == 0 and "none was recognized among Körper, Gebiet (--label-column names one)" in err


def test_nothing_in_common_is_refused_and_a_map_or_names_help(model, test_images, tmp_path, capsys):
    images = few(test_images, tmp_path / "images", nil=("zero", 2), uno=("one", 2))
    words = r"none of its classes \(nil, uno\) is a class of the model \(zero, one, two"
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(model, images)
    (hint,) = caught.value.__notes__
    assert hint.endswith("keywords: dataset=..., class_names=..., class_map=..., label_column=...")
    (tmp_path / "map.json").write_text(json.dumps({"nil": "zero", "uno": "ONE", "due": "two"}))
    mapped = evaluate(model, images, class_map={"nil": "zero", "uno": "ONE", "due": "two"})
    summary = capsys.readouterr().err
    assert "matched by --class-map  nil = zero, uno = one" in summary and "matched by name" not in summary
    assert mapped["test"] == evaluate(model, images, class_map=str(tmp_path / "map.json"))["test"]
    named = evaluate(model, images, class_names=["zero", "one"])
    (tmp_path / "wrong.json").write_text(json.dumps({"nil": "zero", "uno": "onee"}))
    with pytest.raises(UsageError, match=r"wrong.json gives onee, which the model does not have.*mean one\?"):
        evaluate(model, images, class_map=str(tmp_path / "wrong.json"))
    assert mapped["test"]["samples"] == named["test"]["samples"] == 4
    assert mapped["test"]["confusion_matrix"] == named["test"]["confusion_matrix"]
    (tmp_path / "map.json").write_text(json.dumps({"null": "zero"}))
    with pytest.raises(UsageError, match="names no class of the dataset. Its classes: nil, uno"):
        evaluate(model, images, class_map=str(tmp_path / "map.json"))


def test_classes_of_the_model_and_of_a_map_are_no_missing_labels(model, test_images, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('{"null": "two", "hen": "one"}')
    table = tmp_path / "table.csv"
    paths = [*sorted((test_images / "two").iterdir())[:2], next((test_images / "one").iterdir())]
    rows = zip(paths, ["null", "nan", "one"], strict=True)
    table.write_text("image,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    settings = classify_settings({"dataset": str(table)})
    assert read_images_for(model, settings).labels == [None, None, 0]
    assert read_images_for(model, replace(settings, class_map=str(names))).class_names == ["null", "one"]
    other = tmp_path / "other"
    shutil.copytree(model, other)
    metadata = json.loads((other / METADATA).read_text("utf-8"))
    metadata["class_names"][4] = metadata["prompts"]["class_names"][4] = "nan"
    (other / METADATA).write_text(json.dumps(metadata))
    assert read_images_for(other, settings).class_names == ["nan", "one"]


def test_images_without_labels_are_only_classified(infer, model, test_images, tmp_path):
    files = sorted(path.relative_to(test_images) for path in test_images.rglob("*.png"))[:6]
    labels = ["eight", "", "eight", "", "eight", ""]
    table = tmp_path / "table.csv"
    table.write_text("image,label\n" + "".join(f"{file},{x}\n" for file, x in zip(files, labels, strict=True)))
    code, out, err = infer("--dataset", table, "--image-folder", test_images)
    assert code == 0 and "3 of them, which are only classified" in err
    predictions, figures = out.split("\n\nclass ")
    assert [line.split()[0] for line in predictions.splitlines()[2:]] == list(map(str, files[1::2]))
    assert "3 images)" in figures
    for flags in (["--label-column", "none"], []):
        table.write_text("image,foo\n" + "".join(f"{file},eight\n" for file in files))
        dataset = table if flags else test_images / "eight"
        folder = ["--image-folder", test_images] if flags else []
        code, out, err = infer("--dataset", dataset, *folder, *flags)
        assert code == 0 and "class " not in out and out.startswith("image ") and "which are only classified" in err
    results = evaluate(model, test_images / "eight")
    assert results["test"] is None and results["pictures"]["unlabeled"] == len(list((test_images / "eight").iterdir()))


def test_a_dataset_of_a_program_and_own_metrics(model, test_images):
    import datasets

    labels = [0, 1, -1]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["One", "zero"])})
    dataset = datasets.Dataset.from_dict({"image": [random_image(i) for i in range(3)], "label": labels}, features)

    def share_of_zeros(labels, predictions, probabilities, class_names):
        assert class_names == WORDS and probabilities.shape == (2, 10)
        return float((labels == 0).mean())

    results = evaluate(model, dataset, metrics=[share_of_zeros])
    assert results["test"]["own_metrics"] == {"share_of_zeros": 0.5}
    assert results["pictures"] == {"test": 2, "unlabeled": 1, "skipped": 0}
    assert results["test"]["per_class"]["one"]["support"] == results["test"]["per_class"]["zero"]["support"] == 1
    with pytest.raises(TypeError, match="epochs"):
        evaluate(model, dataset, epochs=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to classify"),
        (["--dataset", "{images}", "x.png"], "exclude each other"),
        (["--split", "test", "--report-dir", "r", "x.png"], "--split and --report-dir: only with --dataset"),
        (["--dataset", "{images}", "--report-dir", "{images}/report"], "is in the folder of --dataset"),
        (["--dataset", "{images}", "--report-dir", "{model}"], "is in the folder of --model-dir"),
        (["--dataset", "{images}", "--report-dir", "."], "--report-dir . is the folder that you are in, or one above"),
        (["--dataset", "{images}", "--report-dir", ".."], "Name one for the 4 files of the report"),
        (["--dataset", "{images}", "--split", "validation"], "no split validation"),
        (["--dataset", "{images}", "--split", "a,b"], "expected one split"),
        (["--dataset", "{images}/one", "--report-dir", "r"], "no image has a label"),
        (["--dataset", "{images}", "--resume", "--output", "x.csv"], "a test needs the scores of all images at once"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(infer, model, test_images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = infer(*(argument.format(images=test_images, model=model) for argument in arguments))
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(error)) == (2, "", 1) and message in error[0]
    assert not names_in(tmp_path)


def test_images_that_the_model_was_trained_on_are_counted(demo_run, infer, tmp_path):
    data = load_data(read_settings(read_run(demo_run)["settings"]))
    for split, count in ((data.train, 6), (data.validation, 3), (data.test, 4)):
        for i, label in enumerate(split.labels[:count]):
            (tmp_path / "images" / WORDS[label]).mkdir(parents=True, exist_ok=True)
            split[i].image.save(tmp_path / "images" / WORDS[label] / f"{split.names[i]}.png")
    code, out, err = infer("--dataset", tmp_path / "images", "--report-dir", tmp_path / "report")
    results = json.loads((tmp_path / "report" / RESULTS).read_text())
    assert code == 0 and results["overlap"] == {"test_in_train": 6, "test_in_validation": 3}
    assert results["test"]["not_in_train"]["pictures"] == 7
    assert results["test"]["not_in_train_or_validation"]["pictures"] == 4
    assert "\ntest accuracy, new images" in out and "images not in train" not in out
    assert "6 of 13 test images are in train, 3 in validation, by which the model was chosen and calibrated, too" in err
    assert "4 that are neither in train nor in validation" in (tmp_path / "report" / "report.html").read_text("utf-8")


@pytest.mark.parametrize("keys", [[], ["0" * 64, None], ["0" * 64] * (MOST_KEPT + 1)])
def test_of_too_many_or_unknown_images_nothing_is_kept(keys):
    assert pack_keys(keys) is None and unpack_keys(None) == frozenset()


def test_short_keys_are_kept_as_a_text():
    images = [random_image(i) for i in range(5)]
    text = pack_keys([image_key(image) for image in images])
    assert unpack_keys(text) == set(map(short_key, images)) and len(text) == 40
    assert unpack_keys("no base64!") == unpack_keys(3) == unpack_keys("é") == frozenset()


def test_the_split_that_the_model_was_trained_on_is_pointed_out():
    def trained(origin, **more):
        data = {"dataset": "planets", "config": None, "commit": None, "splits": {"train": {"from": origin}}}
        return {"dataset": data | more}

    def tested(split, **more):
        return {"dataset": "planets", "config": None, "commit": None, "split": split} | more

    assert "trained on images of train of a dataset" in seen_in_training(trained("train"), tested("train"))
    assert seen_in_training(trained("train, 5 of each class"), tested("train[:10]"))
    assert seen_in_training(trained("the folder"), tested("the folder"))
    assert seen_in_training(trained("train"), tested("test")) is None
    assert seen_in_training(trained("train"), tested("train", dataset="stars")) is None
    assert seen_in_training(trained("train", commit="a"), tested("train", commit="b")) is None
    assert seen_in_training({}, tested("train")) is None, "a model of an earlier version"


def test_a_list_of_pairs_is_tested_too(model, test_images):
    pairs = [(sorted((test_images / word).iterdir())[0], word) for word in ("one", "two")]
    pairs += [(np.asarray(random_image(1)), "Zero"), (random_image(2), None), (pairs[0][0].read_bytes(), "pluto")]
    results = evaluate(model, {"train": pairs[:1], "test": pairs}, show_progress=False)
    assert results["pictures"] == {"test": 3, "unlabeled": 1, "skipped": 0}
    assert results["unknown_classes"]["classes"] == {"pluto": 1} and results["dataset"]["split"].endswith("test")
    supports = {name: row["support"] for name, row in results["test"]["per_class"].items() if row["support"]}
    assert supports == {"zero": 1, "one": 1, "two": 1}
    with pytest.raises(UsageError, match="^the dataset: none of its classes"):
        evaluate(model, [(random_image(1), "pluto")])
