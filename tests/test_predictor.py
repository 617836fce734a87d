"""The three functions of inference, on the demo's model."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from inference_vlm import load_model_and_metadata, predict_batch, predict_each, predict_single_image
from vlm.classifier.calibration import Calibration
from vlm.common.errors import UsageError
from vlm.data import Sample, UnreadableImage
from vlm.evaluation.evaluate import score_split
from vlm.inference import classifying

COUNT = 7


@pytest.fixture(scope="module")
def loaded(demo_run):
    return load_model_and_metadata(demo_run / "best_model", device="cpu")


@pytest.fixture(scope="module")
def arrays():
    return [(digit * (255 / 16)).round().astype(np.uint8) for digit in load_digits().images[:COUNT]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory, arrays):
    folder = tmp_path_factory.mktemp("digits")
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(COUNT)]


def batch(loaded, paths, **options):
    model, processor, metadata = loaded
    return predict_batch(model, processor, paths, metadata, **{"show_progress": False} | options)


def single(loaded, image, **options):
    model, processor, metadata = loaded
    return predict_single_image(model, processor, image, metadata, **options)


def table(results):
    """(images, classes) probabilities."""
    return np.array([list(result["probabilities"].values()) for result in results.values()])


@pytest.mark.slow
def test_what_is_loaded_is_ready_to_use(loaded):
    model, processor, metadata = loaded
    assert not model.training and model.device.type == "cpu"
    assert processor is model.family.processor and hasattr(processor, "tokenizer")
    assert metadata["class_names"] == list(model.class_names) and metadata["model"] == "demo"


def test_path_text_image_and_array_give_the_same(loaded, paths, arrays):
    expected = single(loaded, paths[0])
    assert single(loaded, str(paths[0])) == expected
    assert single(loaded, Image.open(paths[0])) == expected
    assert single(loaded, arrays[0]) == expected
    assert single(loaded, np.stack([arrays[0]] * 3, axis=-1)) == expected
    prediction, confidence, text = expected
    assert prediction in loaded[2]["class_names"] and 0 < confidence < 1 and isinstance(text, str) and text


def test_one_by_one_is_the_same_as_in_a_batch(loaded, paths):
    for path, result in batch(loaded, paths, batch_size=3).items():
        prediction, confidence, text = single(loaded, path)
        assert (prediction, text) == (result["prediction"], result["full_response"])
        assert confidence == pytest.approx(result["confidence"], abs=1e-5)


@pytest.fixture
def uncalibrated(loaded, monkeypatch):
    """With the model's own probabilities: after so short a training the calibrated ones are nearly the same for every
    image."""
    monkeypatch.setattr(loaded[0], "calibration", Calibration())


def test_images_of_one_batch_do_not_change_each_other(loaded, paths, uncalibrated):
    results = batch(loaded, paths, batch_size=1, explain=False)
    expected = table(results)
    assert (np.abs(expected - expected[0]).max(axis=1)[1:] > 1e-4).all(), (
        "else an image in the wrong place would go unnoticed"
    )
    for size in (2, COUNT, 100):
        together = batch(loaded, paths, batch_size=size, explain=False)
        assert list(together) == list(results)
        np.testing.assert_allclose(table(together), expected, atol=1e-5)


def test_results_come_in_the_order_of_the_paths_and_each_path_once(loaded, paths, uncalibrated):
    mixed = [paths[4], str(paths[1]), paths[6], paths[1], paths[0]]
    results = batch(loaded, mixed, batch_size=2, explain=False)
    assert list(results) == [str(path) for path in (paths[4], paths[1], paths[6], paths[0])]
    alone = batch(loaded, [paths[6]], explain=False)[str(paths[6])]
    np.testing.assert_allclose(
        list(results[str(paths[6])]["probabilities"].values()), list(alone["probabilities"].values()), atol=1e-5
    )
    assert list(batch(loaded, (path for path in paths), explain=False)) == list(map(str, paths)), "any iterable will do"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA error")])
def test_what_was_computed_before_an_interrupt_or_error_is_in_it(loaded, paths, monkeypatch, error):
    whole = batch(loaded, paths, batch_size=2)
    calls = iter([None, None, error])

    def classify(*arguments):
        if failure := next(calls):
            raise failure
        return real(*arguments)

    real = classifying.classify
    monkeypatch.setattr(classifying, "classify", classify)
    with pytest.raises(type(error)) as caught:
        batch(loaded, paths, batch_size=2)
    assert caught.value.results == {str(path): whole[str(path)] for path in paths[:4]}
    assert any(note.startswith("4 images were classified before") for note in caught.value.__notes__)


def test_each_result_is_there_once_its_batch_is_computed(loaded, paths):
    model, processor, metadata = loaded
    rows = predict_each(model, processor, paths, metadata, batch_size=2, show_progress=False)
    assert [next(rows)[0] for _ in range(3)] == [str(path) for path in paths[:3]]
    rows.close()


def test_confidence_is_the_largest_probability_and_they_add_up_to_one(loaded, paths):
    for result in batch(loaded, paths).values():
        assert set(result) == {"prediction", "confidence", "probabilities", "error_bound", "full_response"}
        assert list(result["probabilities"]) == loaded[2]["class_names"]
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert (
            result["confidence"]
            == max(result["probabilities"].values())
            == result["probabilities"][result["prediction"]]
        )


def test_confidence_is_after_the_stored_calibration(demo_run, loaded, paths):
    model, _, metadata = loaded
    stored = metadata["calibration"]
    results = json.loads((demo_run / "results.json").read_text())
    assert (
        stored["temperature"] == results["test"]["calibration"]["temperature"] != 1 and stored["abstain_below"] is None
    )
    assert json.loads((demo_run / "training_metadata.json").read_text())["calibration"] == stored
    sample = Sample(Image.open(paths[0]).convert("RGB"), 0, "x")
    sums = score_split(model, [sample], 1, tolerance=0)[0].double()
    scores = sums if stored["score"] == "sum" else sums - torch.tensor(stored["prior"])
    expected = (scores / stored["temperature"]).softmax(0)
    result = batch(loaded, paths[:1])[str(paths[0])]
    np.testing.assert_allclose(list(result["probabilities"].values()), expected, atol=1e-6)
    assert result["prediction"] == model.class_names[int(scores.argmax())]


def test_a_calibration_for_other_prompts_is_not_used_and_that_is_said(demo_run, tmp_path, capsys):
    shutil.copytree(demo_run / "best_model", tmp_path / "model")
    file = tmp_path / "model" / "training_metadata.json"
    metadata = json.loads(file.read_text())
    metadata["prompts"]["question"] += " Think."
    file.write_text(json.dumps(metadata))
    with pytest.raises(UsageError, match=r"changed the file on purpose, delete checksums.json"):
        load_model_and_metadata(tmp_path / "model", device="cpu")
    (tmp_path / "model" / "checksums.json").unlink()
    model, _, _ = load_model_and_metadata(tmp_path / "model", device="cpu")
    assert model.calibration == Calibration()
    assert "fitted with other prompts or classes" in capsys.readouterr().err


def test_a_model_that_abstains_gives_none_with_its_probabilities(demo_run, loaded, paths, tmp_path):
    plain = batch(loaded, paths)
    threshold = float(
        np.mean(sorted(result["confidence"] for result in plain.values())[COUNT // 2 - 1 : COUNT // 2 + 1])
    )
    shutil.copytree(demo_run / "best_model", tmp_path / "model")
    file = tmp_path / "model" / "training_metadata.json"
    metadata = json.loads(file.read_text())
    metadata["calibration"]["abstain_below"] = threshold
    file.write_text(json.dumps(metadata))
    (tmp_path / "model" / "checksums.json").unlink()
    abstaining = load_model_and_metadata(tmp_path / "model", device="cpu")
    results = batch(abstaining, paths)
    assert sum("abstained" in result for result in results.values()) == COUNT // 2
    for path, result in results.items():
        left_out = (
            {"prediction": None, "abstained": True, "full_response": ""}
            if plain[path]["confidence"] < threshold
            else {}
        )
        assert result == plain[path] | left_out
        assert single(abstaining, path) == (
            result["prediction"],
            pytest.approx(result["confidence"], abs=1e-5),
            result["full_response"],
        )
    assert batch(load_model_and_metadata(tmp_path / "model", device="cpu", abstain_below=0), paths) == plain, (
        "0 switches it off"
    )


def test_without_explain_the_text_is_empty_and_all_else_the_same(loaded, paths):
    with_text, without = batch(loaded, paths), batch(loaded, paths, explain=False)
    assert all(result["full_response"] for result in with_text.values())
    assert without == {path: result | {"full_response": ""} for path, result in with_text.items()}
    assert single(loaded, paths[0], explain=False)[2] == ""


def test_files_that_cannot_be_read_are_named_and_the_rest_goes_on(loaded, paths, tmp_path):
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no image")
    bad = [tmp_path / "broken.png", tmp_path / "missing.png", tmp_path / "notes.txt", tmp_path]
    results = batch(loaded, [bad[0], paths[0], *bad[1:], paths[1]], batch_size=2, explain=False)
    assert list(results) == [str(path) for path in (bad[0], paths[0], *bad[1:], paths[1])]
    for path in bad:
        assert set(results[str(path)]) == {"prediction", "error"} and results[str(path)]["prediction"] is None
        assert results[str(path)]["error"].startswith(f"{path}: ") and "\n" not in results[str(path)]["error"]
    expected = table(batch(loaded, paths[:2], explain=False))
    np.testing.assert_allclose(table({path: results[str(path)] for path in paths[:2]}), expected, atol=1e-5)
    with pytest.raises(UnreadableImage, match=r"missing\.png: no such file"):
        single(loaded, bad[1])


def test_no_images_give_no_results(loaded):
    assert batch(loaded, []) == {}


def test_one_image_instead_of_a_list_is_refused(loaded, paths, arrays):
    image = Image.fromarray(arrays[0])
    for one in (paths[0], str(paths[0]), paths[0].read_bytes(), image, arrays[0], np.asarray(image.convert("RGB"))):
        with pytest.raises(TypeError, match="^this is one .*: pass a list of images"):
            batch(loaded, one)


def test_images_of_all_kinds_in_one_list_are_the_same_as_their_files(loaded, paths, arrays):
    content = paths[3].read_bytes()
    image = Image.fromarray(arrays[2])
    given = [
        paths[0],
        arrays[1],
        image,
        content,
        str(paths[4]),
        bytearray(content),
        memoryview(content),
        paths[0],
        image,
    ]
    results = batch(loaded, iter(given), batch_size=4, explain=False)
    names = [str(paths[0]), "image 1", "image 2", "image 3", str(paths[4]), "image 5", "image 6", "image 8"]
    assert list(results) == names, "a path comes once, another object as often as it is given"
    of_files = table(batch(loaded, paths[:5], explain=False))
    np.testing.assert_allclose(table(results), of_files[[0, 1, 2, 3, 4, 3, 3, 2]], atol=1e-5)
    assert single(loaded, content, explain=False) == single(loaded, paths[3], explain=False)


def test_an_array_of_several_images_is_taken_as_a_list(loaded, arrays):
    stack = np.stack(arrays[:3])
    results = batch(loaded, stack, explain=False)
    assert list(results) == ["image 0", "image 1", "image 2"]
    assert results == batch(loaded, list(stack), explain=False)
    rgb = np.stack([stack] * 3, axis=-1)
    np.testing.assert_allclose(table(batch(loaded, rgb, explain=False)), table(results), atol=1e-5)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image_or_too_large_is_an_error_of_its_own_image(loaded, paths, arrays, tmp_path, monkeypatch):
    image = Image.new("L", (10, 10))
    image.save(tmp_path / "bomb.png")
    content = (tmp_path / "bomb.png").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    bombs = [tmp_path / "bomb.png", content, Image.open(tmp_path / "bomb.png"), image, np.zeros((10, 10, 3), np.uint8)]
    results = batch(loaded, [*bombs, arrays[0], 0, None, b"", {"path": "a"}], explain=False)
    *refused, good, number, nothing, empty, other = results.values()
    assert all("10x10 is more than the 99 pixels" in result["error"] for result in refused)
    assert "error" not in good and good["prediction"] is not None
    assert number["error"].startswith("image 6: of the type int; expected a path, a PIL image, an array or the bytes")
    assert nothing["error"] == "image 7: there is no image"
    assert empty["error"].startswith("image 8: not an image") and other["error"].startswith("image 9: of the type dict")


def test_a_file_with_the_name_of_an_image_without_a_path_is_not_mixed_with_it(loaded, arrays):
    for images in ([arrays[0], "image 0"], ["image 1", arrays[0]]):
        with pytest.raises(ValueError, match=r"a file called image \d, .* write \./image \d"):
            batch(loaded, images)


def test_a_batch_size_of_zero_is_refused(loaded, paths):
    with pytest.raises(ValueError, match="batch_size=0: expected a whole number of at least 1, and"):
        batch(loaded, paths, batch_size=0)


def test_the_progress_bar_counts_images_and_can_be_switched_off(loaded, paths, capsys, monkeypatch):
    monkeypatch.setattr("vlm.common.progress.SECONDS_BETWEEN_LINES", 0)
    batch(loaded, paths, batch_size=3, explain=False, show_progress=True)
    out, err = capsys.readouterr()
    assert out == "" and [line.split()[1] for line in err.splitlines()] == ["3/7", "6/7", "7/7"]
    batch(loaded, paths, batch_size=3, explain=False)
    assert capsys.readouterr() == ("", "")


def test_metadata_may_lie_beside_the_model_folder(demo_run, loaded, paths, tmp_path):
    shutil.copytree(demo_run / "best_model", tmp_path / "model")
    (tmp_path / "model" / "training_metadata.json").rename(tmp_path / "training_metadata.json")
    moved = load_model_and_metadata(str(tmp_path / "model"), device="cpu", dtype="float32")
    assert moved[2] == loaded[2]
    assert batch(moved, paths[:1]) == batch(loaded, paths[:1])


def test_the_model_before_the_training_is_not_taken_for_a_trained_one(demo_run, tmp_path):
    with pytest.raises(UsageError, match=r"demo_model is the model before the training: take .*best_model"):
        load_model_and_metadata(demo_run / "demo_model", device="cpu")
    metadata = json.loads((demo_run / "training_metadata.json").read_text())
    shutil.copytree(demo_run / "demo_model", tmp_path / "base")
    (tmp_path / "training_metadata.json").write_text(json.dumps(metadata | {"model": str(tmp_path / "base")}))
    with pytest.raises(UsageError, match="base is the model before the training"):
        load_model_and_metadata(tmp_path / "base", device="cpu")


def test_the_folder_of_a_run_names_the_model_in_it(demo_run):
    with pytest.raises(UsageError, match="is the folder of a run: its model is .*best_model"):
        load_model_and_metadata(demo_run, device="cpu")


def test_an_interrupted_save_is_undone(demo_run, tmp_path):
    shutil.copytree(demo_run / "best_model", tmp_path / "best_model.old")
    assert load_model_and_metadata(tmp_path / "best_model", device="cpu")[2]["model"] == "demo"


def test_values_of_different_models_are_refused(demo_run, loaded, paths):
    model, processor, metadata = loaded
    other = load_model_and_metadata(demo_run / "final_model", device="cpu")
    others = [
        (model, other[1], metadata),
        (model, processor, metadata | {"class_names": metadata["class_names"][::-1]}),
        (other[0], processor, metadata),
    ]
    for mixed in others:
        with pytest.raises(ValueError, match="belong to different models"):
            single(mixed, paths[0])
        with pytest.raises(ValueError, match="belong to different models"):
            batch(mixed, paths)
    with pytest.raises(TypeError, match="pass the three values"):
        single((model.model, processor, metadata), paths[0])


def test_a_folder_without_a_trained_model_says_what_was_expected(demo_run, tmp_path):
    with pytest.raises(UsageError, match=r"nothing is not a folder: train a model first"):
        load_model_and_metadata(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"no training_metadata.json in .* or next to it"):
        load_model_and_metadata(tmp_path)
    (tmp_path / "training_metadata.json").write_text("{")
    with pytest.raises(UsageError, match="training_metadata.json cannot be read"):
        load_model_and_metadata(tmp_path)
    shutil.copy(demo_run / "training_metadata.json", tmp_path)
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_model_and_metadata(tmp_path)


def test_a_device_or_number_format_that_is_not_there_is_refused(demo_run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        load_model_and_metadata(demo_run / "best_model", device="cuda")
    with pytest.raises(UsageError, match="float16 works on CUDA only"):
        load_model_and_metadata(demo_run / "best_model", device="cpu", dtype="float16")


def test_while_a_run_is_overwritten_the_error_names_the_model_of_the_earlier_one(tmp_path):
    (tmp_path / ".previous_run" / "best_model").mkdir(parents=True)
    with pytest.raises(
        UsageError, match=r"best_model is not there: .* has no model yet.* is .*\.previous_run/best_model\.$"
    ):
        load_model_and_metadata(tmp_path / "best_model")
