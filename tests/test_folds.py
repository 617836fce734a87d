"""`--folds`: every image is tested once, by a model that was not trained on it; a run can be stopped and resumed."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from commands import classify, names_in, train
from test_groups import rows_of_patients, write_table
from test_output import everything
from tiny import random_image

from vlm.common import Stopped, UsageError
from vlm.config import (
    METADATA,
    PAGE,
    PREDICTIONS,
    PREVIOUS_RUN,
    RESULTS,
    fold_folder,
    read_settings,
    resolve,
    written_by,
)
from vlm.data import load_data
from vlm.training import check_output, fit_folds
from vlm.training.out_of_fold import mean_figures
from vlm.training.run_files import begin, claim_results, files_of_run, foreign_files, settle


def write_images(folder, counts, split=""):
    """Different images of each class."""
    for c, count in enumerate(counts):
        (folder / split / f"c{c}").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            random_image(1000 * len(split) + 100 * c + i).save(folder / split / f"c{c}" / f"{i}.png")
    return folder


def load(path, folds, fold=None, **more):
    return load_data(resolve({"model": "m", "dataset": str(path), "folds": folds, "fold": fold, **more}))


def every_fold(path, folds, **more):
    return [load(path, folds, number, **more) for number in range(1, folds + 1)]


# Cutting


def test_every_image_is_in_the_test_of_one_fold_and_no_split_has_it_twice(tmp_path):
    found = every_fold(write_images(tmp_path, [11, 11, 11, 7]), 5)
    tested = [key for data in found for key in data.test.keys]
    assert len(tested) == len(set(tested)) == 40
    for data in found:
        parts = [set(split.keys) for split in (data.train, data.validation, data.test)]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 40
        assert set(data.validation.labels) == set(data.train.labels) == set(range(4))
        assert np.bincount(data.test.labels, minlength=4).tolist()[:3] in [[2, 2, 2], [3, 2, 2], [2, 3, 2], [2, 2, 3]]
    assert {len(data.test) for data in found} <= {7, 8, 9}, "what is left over of the classes goes to different folds"
    assert len({data.source["fold"]["digest"] for data in found}) == 1
    assert found[1].summary[0] == ("fold", "2 of 5") and dict(found[1].summary)["test"] == "8 images (fold 2 of 5)"


def test_a_validation_split_takes_part_and_a_test_split_stays_out(tmp_path):
    for split in ("train", "validation", "test"):
        write_images(tmp_path, [6, 6], split)
    found = every_fold(tmp_path, 3)
    names = [name for data in found for name in data.test.names]
    assert len(names) == 24 and not any("test/" in name for name in names)
    assert dict(found[0].summary)["unused splits"] == "test"


def test_groups_and_equal_images_are_not_cut_apart(tmp_path):
    table = write_table(tmp_path, rows_of_patients(12))
    shutil.copy(tmp_path / "i" / "0.png", tmp_path / "i" / "20.png")  # patients 0 and 4 have an equal image
    found = every_fold(table, 3, group_column="patient")
    groups = [set(data.test.groups) for data in found]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 13
    assert any({"p0", "p4"} <= group for group in groups)


@pytest.mark.parametrize(
    ("counts", "folds", "said"),
    [
        (
            [6, 3],
            4,
            r"--folds 4: there are fewer than 4 different images of c1 \(3\). Expected at least 4 of each class",
        ),
        (
            [6, 2],
            2,
            r"--folds 2: without fold 1, train has fewer than 2 images of c1 \(1\), so validation cannot be cut",
        ),
    ],
)
def test_too_few_images_are_refused_whichever_fold_is_asked_for(tmp_path, counts, folds, said):
    with pytest.raises(UsageError, match=said):
        load(write_images(tmp_path, counts), folds, folds)


def test_too_few_images_because_of_max_samples_are_refused_with_its_name(tmp_path):
    with pytest.raises(UsageError, match="--folds 4 with --max-samples 6: there are fewer than 4 different images of"):
        load(write_images(tmp_path, [9, 9]), 4, max_samples=6)


def test_groups_that_make_validation_large_are_pointed_out(tmp_path, capsys):
    table = write_table(tmp_path, [f"{'ab'[i // 4 % 2]},p{i // 4}" for i in range(24)])
    assert len(load(table, 3, 1, group_column="patient").validation) == 8
    assert "note: validation has 8 of the 16 images that are not in the test" in capsys.readouterr().err


def test_too_few_groups_are_refused(tmp_path):
    table = write_table(tmp_path, ["a,p0", "a,p1", "b,p2", "b,p2", "a,p3"] * 2)
    with pytest.raises(UsageError, match="--folds 5: there are 4 groups, and none is cut apart. Expected at least 5"):
        load(table, 5, group_column="patient")
    with pytest.raises(UsageError, match=r"without fold \d, train has 2 groups, of which none can go to validation"):
        load(table, 2, group_column="patient")


def test_with_max_samples_all_folds_share_the_same_images(tmp_path):
    found = every_fold(write_images(tmp_path, [20, 20]), 4, max_samples=12)
    assert sum(len(data.test) for data in found) == 12 and {data.source["fold"]["pictures"] for data in found} == {12}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"folds": 1}, "--folds 1: expected a whole number of at least 2"),
        ({"folds": 3, "epochs": 0}, "--folds and --epochs 0 exclude each other"),
        ({"folds": 3, "streaming": True, "max_steps": 3}, "--folds and --streaming exclude each other"),
        ({"folds": 3, "test_ratio": 0.3}, "--folds and --test-ratio exclude each other"),
        ({"fold": 1}, "--fold 1: expected it with --folds"),
        ({"folds": 3, "fold": 4}, "--fold 4: expected it with --folds, and at most as large"),
    ],
)
def test_what_makes_no_sense_is_refused(more, said):
    with pytest.raises(UsageError, match=said):
        resolve(more)


# Figures


def test_mean_and_interval_of_the_folds_are_those_of_students_t():
    found = mean_figures([{"accuracy": value, "nll": 10 * value} for value in (0.7, 0.8, 0.9)])
    half = 4.302652729911275 * 0.1 / 3**0.5  # the 97.5% quantile for 2 degrees of freedom, of a table
    assert found["nll"]["mean"] == pytest.approx(8) and found["nll"]["standard_deviation"] == pytest.approx(1)
    assert found["nll"]["interval"] == pytest.approx([8 - 10 * half, 8 + 10 * half])
    assert found["accuracy"]["interval"] == pytest.approx([0.8 - half, 1.0]), "a share is at most 1"
    assert mean_figures([{"nll": 1.0}, {"nll": 30.0}])["nll"]["interval"][0] == 0, "an NLL is never below 0"
    equal = mean_figures([{"accuracy": 1.0}] * 3)["accuracy"]
    assert equal == {"mean": 1.0, "standard_deviation": 0.0, "interval": [1.0, 1.0]}


# The output folder


def make_folds(output, count=2, finished=True):
    """What a cross-validation leaves, without its models."""
    output.mkdir(exist_ok=True)
    begin(output, False, False, written_by(count))
    for number in range(1, count + 1):
        fold = output / fold_folder(number)
        fold.mkdir()
        begin(fold, False, False)
        (fold / METADATA).write_text("{}")
        (fold / "best_model").mkdir()
        (fold / "best_model" / "model.safetensors").write_text("old")
    (output / METADATA).write_text("{}")
    if finished:
        claim_results(output, written_by(count))
        (output / RESULTS).write_text("{}")
    return everything(output)


def settings(output, **more):
    return resolve({"demo": True, "output_dir": str(output), **more})


@pytest.mark.parametrize("folds", [None, 2])
@pytest.mark.parametrize(("finished", "said"), [(True, "holds a finished run"), (False, "holds an interrupted run")])
def test_neither_kind_of_run_begins_in_the_folder_of_a_cross_validation(tmp_path, folds, finished, said):
    before = make_folds(tmp_path, finished=finished)
    with pytest.raises(UsageError, match=said):
        check_output(settings(tmp_path, folds=folds))
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["fold_1/notes.txt", "fold_2/tensorboard/mine.txt", "fold_2/results.json"])
def test_a_file_of_somebody_else_in_a_fold_is_not_deleted(tmp_path, name):
    make_folds(tmp_path, finished=False)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"holds {name}, which no run of this program has written"):
        check_output(settings(tmp_path, overwrite=True))


def test_folders_that_only_look_like_folds_are_nobodys(tmp_path):
    (tmp_path / "fold_1").mkdir()
    with pytest.raises(UsageError, match="holds fold_1, which no run of this program has written"):
        check_output(settings(tmp_path, folds=2))
    assert not foreign_files(tmp_path) and not files_of_run(tmp_path), "an ordinary run writes no folds"


def test_a_cross_validation_is_put_back_unless_the_next_run_has_a_model(tmp_path):
    before = make_folds(tmp_path)
    begin(tmp_path, False, True, written_by(3))
    assert names_in(tmp_path) == {PREVIOUS_RUN, ".run_files.json"}
    (tmp_path / METADATA).write_text("new")
    settle(tmp_path)
    assert everything(tmp_path) == before
    begin(tmp_path, False, True, written_by(3))
    (tmp_path / METADATA).write_text("new")
    (tmp_path / "fold_1" / "best_model").mkdir(parents=True)
    settle(tmp_path)
    assert names_in(tmp_path) == {"fold_1", METADATA, ".run_files.json"}


# Whole commands


FLAGS = ("--epochs", 1, "--batch-size", 4, "--gradient-accumulation-steps", 1, "--folds", 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, color_folder):
    """A cross-validation in three folds. Only to be read."""
    output = tmp_path_factory.mktemp("folds") / "out"
    assert train("--model", tiny_model, "--dataset", color_folder, *FLAGS, "--output-dir", output) == 0
    return output


def table(output):
    with (output / PREDICTIONS).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_image_is_predicted_once_and_the_figures_are_those_of_the_folds(whole, color_folder):
    rows, results = table(whole), json.loads((whole / RESULTS).read_text())
    assert names_in(whole) == {".run_files.json", "fold_1", "fold_2", "fold_3", METADATA, PREDICTIONS, RESULTS, PAGE}
    assert len({row["path"] for row in rows}) == len(rows) == 36 == results["out_of_fold"]["samples"]
    assert all(row["label"] in row["path"] and row["prediction"] in row["full_response"] for row in rows)
    for number, fold in enumerate(results["folds"], 1):
        mine = [row for row in rows if row["fold"] == str(number)]
        own = json.loads((whole / fold_folder(number) / RESULTS).read_text())
        right = np.mean([row["prediction"] == row["label"] for row in mine])
        assert fold["pictures"] == len(mine) == 12 and fold["fold"] == number
        assert fold["accuracy"] == pytest.approx(own["test"]["accuracy"]) == pytest.approx(right)
    everything_right = np.mean([row["prediction"] == row["label"] for row in rows])
    assert results["out_of_fold"]["accuracy"][0] == pytest.approx(everything_right)
    assert results["over_folds"]["accuracy"]["mean"] == pytest.approx(everything_right), (
        "as the folds are equally large"
    )


@pytest.mark.slow
def test_one_page_is_about_all_folds_and_links_to_theirs(whole):
    page, results = (whole / PAGE).read_text(), json.loads((whole / RESULTS).read_text())
    links = re.findall(r'<a href="(fold_[^"]*)"', page)
    assert links == [f"fold_{number}/{PAGE}" for number in (1, 2, 3)] and all(
        (whole / link).is_file() for link in links
    )
    right = sum(row["prediction"] == row["label"] for row in table(whole))
    assert f"Right on {right} of 36 images" in page and f"{results['over_folds']['accuracy']['mean']:.4f}" in page
    assert page.count("<article>") == min(12, 36 - right) == page.count('<img class="thumb')
    assert "fold 2 of 3" in (whole / "fold_2" / PAGE).read_text().split("<main>")[0]


@pytest.mark.slow
def test_a_fold_has_a_model_and_the_whole_says_that_it_has_none(whole, color_folder, capsys):
    assert classify("--model-dir", whole / "fold_2" / "best_model", color_folder) == 0
    assert classify("--model-dir", whole, color_folder) == 2
    assert f"take that of a fold, such as {whole / 'fold_1' / 'best_model'}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_cross_validation_goes_on_at_its_fold_and_ends_with_the_same_predictions(
    whole, tmp_path, tiny_model, color_folder, capsys
):
    given = {"model": str(tiny_model), "dataset": str(color_folder), "epochs": 1, "batch_size": 4, "folds": 3}
    given |= {"gradient_accumulation_steps": 1, "output_dir": str(tmp_path / "out")}

    def in_the_second_fold():
        return (tmp_path / "out" / "fold_2").exists()

    with pytest.raises(
        Stopped, match=r"fold 2 of 3 stopped after step 1 of \d+. Continue with .* --resume --output-dir"
    ):
        fit_folds(resolve(given), in_the_second_fold)
    assert not (tmp_path / "out" / RESULTS).exists() and (tmp_path / "out" / "fold_1" / RESULTS).exists()
    capsys.readouterr()
    assert train("--resume", "--output-dir", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "fold 1 of 3: finished before, and kept." in said.err and "continuing after step 1" in said.err
    assert said.out.splitlines()[0].split() == ["images", "accuracy", "macro", "F1", "NLL", "ECE"]
    assert (tmp_path / "out" / PREDICTIONS).read_bytes() == (whole / PREDICTIONS).read_bytes()
    assert train("--resume", "--output-dir", tmp_path / "out") == 2
    once = f"--output-dir {tmp_path / 'out_2'} --test-ratio 0.01"
    assert once in capsys.readouterr().err, "the command of the model to use"


@pytest.mark.slow
@pytest.mark.parametrize("change", ["an image is gone", "images are in another order", "a class has another name"])
def test_folds_of_other_images_or_texts_are_not_mixed(whole, tmp_path, tiny_model, color_folder, change):
    images, output = tmp_path / "images", tmp_path / "out"
    shutil.copytree(color_folder, images)
    shutil.copytree(whole, output)
    (output / RESULTS).unlink()
    shutil.rmtree(output / "fold_3")
    saved = read_settings(json.loads((output / METADATA).read_text())["settings"])
    first = min(images.rglob("*.png"))
    if change == "an image is gone":
        first.unlink()
    elif change == "images are in another order":
        first.rename(first.with_name("zzz.png"))
    else:
        last = max(images.iterdir())
        last.rename(last.with_name(f"{last.name}_2"))
    again = resolve({"resume": True, "output_dir": str(output)}, saved)
    what = "the class names or the texts of the conversation" if "class" in change else "the images, labels or groups"
    with pytest.raises(UsageError, match=f"{what} are not those that the other folds were trained on"):
        fit_folds(replace(again, dataset=str(images)))
    assert (output / "fold_2" / RESULTS).exists()


@pytest.mark.slow
def test_a_run_that_never_began_leaves_nothing(tmp_path, color_folder):
    flags = (
        "--model",
        tmp_path / "no_model",
        "--dataset",
        color_folder,
        "--folds",
        3,
        "--output-dir",
        tmp_path / "out",
    )
    assert train(*flags) == 2
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--folds trains with one process"):
        fit_folds(settings(tmp_path / "out", folds=2))
    assert not (tmp_path / "out").exists()
