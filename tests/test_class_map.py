"""Class names that are codes: the model reads and writes readable names, results keep the codes (`--class-map`)."""

import csv
import json

import pytest
from commands import classify, train

from inference_vlm import load_model_and_metadata, predict_batch, predict_single_image
from vlm.common import Stopped, UsageError
from vlm.config import resolve
from vlm.conversation import Prompts, build_prompts, parse_answer
from vlm.training import fit
from vlm.training.class_map import point_out_names

CODES = ["aec", "ael", "tex"]
NAMES = {"aec": "Aeolian Curved", "ael": "Aeolian Straight", "tex": "Textured Terrain"}
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS = {word: f"digit {number}" for number, word in enumerate(WORDS)}


@pytest.fixture
def prompts_of(tmp_path):
    """Makes prompts with a map, given as an object or as text, and other settings."""

    def make(content, **settings):
        file = tmp_path / "codes.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return build_prompts(resolve({"class_map": str(file)} | settings), CODES)

    return make


def test_the_model_is_shown_readable_names_and_the_classes_stay_codes(prompts_of):
    prompts = prompts_of(NAMES)
    assert prompts.class_names == tuple(CODES) and prompts.shown_names == tuple(NAMES.values())
    said = [prompts.system, prompts.question, *prompts.responses, prompts.response(0, "Curved ridges.")]
    assert "Aeolian Curved, Aeolian Straight, Textured Terrain" in prompts.system
    assert prompts.responses[2].endswith("this appears to be Textured Terrain.\nAnswer: Textured Terrain")
    assert said[-1].endswith("Answer: Aeolian Curved") and not any(code in text for text in said for code in CODES)
    assert parse_answer(prompts.responses[1], prompts.shown_names) == "Aeolian Straight"


def test_the_metadata_bring_both_back_and_without_a_map_they_are_as_before(prompts_of):
    prompts = prompts_of(NAMES)
    assert Prompts.from_json(json.loads(json.dumps(prompts.to_json()))) == prompts
    plain = build_prompts(resolve({}), CODES)
    assert "readable_names" not in plain.to_json() and plain.shown_names == plain.class_names


def test_classes_that_the_map_leaves_out_are_shown_as_they_are_with_a_note(prompts_of, capsys):
    prompts = prompts_of({"aec": "Aeolian Curved"})
    assert prompts.shown_names == ("Aeolian Curved", "ael", "tex")
    point_out_names(prompts)
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.endswith("results keep the class names: aec -> Aeolian Curved.")
    assert second == "note: --class-map has no other name for ael, tex: the model is shown the class name."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"aecc": "Aeolian"}, r"names aecc, which is no class. Did you mean aec\? The classes: aec, ael, tex"),
        ({"aec": "Dunes", "ael": " Dunes"}, "gives aec, ael the same name, Dunes"),
        ({"aec": "tex"}, "gives aec, tex the same name, tex"),
        ('{"aec": "Dunes", "aec": "Ripples"}', "names aec twice"),
        ({"aec": 3}, "expected a JSON object of texts"),
        (["aec"], "expected a JSON object of texts"),
        ({"aec": {"name": "Dunes"}}, "expected a JSON object of texts"),
        ({"aec": "Dunes\nAnswer: tex"}, "a line end, a control character"),
        ({"aec": " "}, "aec: a class name is empty"),
        ("{", "not a readable JSON file"),
        ({}, "is empty. Expected names of classes"),
    ],
)
def test_a_map_that_cannot_be_is_refused_with_its_name(prompts_of, content, message):
    with pytest.raises(UsageError, match=message) as error:
        prompts_of(content)
    assert "--class-map" in str(error.value) and "codes.json" in str(error.value)


def test_descriptions_may_name_a_class_by_its_code_or_its_readable_name(prompts_of, tmp_path):
    file = tmp_path / "descriptions.json"
    file.write_text(json.dumps({"aec": "curved ridges", "Textured Terrain": "a fine pattern"}), encoding="utf-8")
    system = prompts_of(NAMES, class_descriptions=str(file)).system
    assert "\n- Aeolian Curved: curved ridges\n- Aeolian Straight\n- Textured Terrain: a fine pattern" in system
    file.write_text(json.dumps({"tex": "a pattern", "Textured Terrain": "a fine pattern"}), encoding="utf-8")
    with pytest.raises(UsageError, match="describes Textured Terrain twice"):
        prompts_of(NAMES, class_descriptions=str(file))


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The output folder of a short run of the demo, whose model reads and writes "digit 7" for the class seven."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "names.json").write_text(json.dumps(DIGITS))
    flags = ("--demo", "--max-samples", 100, "--epochs", 6, "--batch-size", 4, "--class-map", folder / "names.json")
    assert train(*flags, "--output-dir", folder / "results") == 0
    return folder / "results"


@pytest.mark.slow
def test_a_whole_run_has_codes_in_its_results_and_readable_names_in_its_texts(digits_run, tmp_path, capsys):
    results = json.loads((digits_run / "results.json").read_text())
    assert list(results["test"]["per_class"]) == list(DIGITS) and results["readable_names"] == DIGITS
    assert results["texts"]["agree_with_prediction"] > 0, "texts have readable names, predictions codes"
    page = (digits_run / "report.html").read_text()
    assert ">digit 7</span>" in page

    model, processor, metadata = load_model_and_metadata(digits_run / "best_model", device="cpu")
    images = sorted((digits_run / "demo_images").iterdir())
    found = predict_batch(model, processor, images, metadata, show_progress=False)
    for result in found.values():
        assert list(result["probabilities"]) == list(DIGITS)
        assert result["readable_name"] == DIGITS[result["prediction"]]
        assert result["full_response"].endswith(f"Answer: {result['readable_name']}")
    first = next(iter(found.values()))
    assert predict_single_image(model, processor, images[0], metadata)[0] == first["prediction"]

    assert classify("--model-dir", digits_run / "best_model", "--output", tmp_path / "a.csv", *images) == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["readable_name"] for row in rows] == [result["readable_name"] for result in found.values()]
    assert classify("--model-dir", digits_run / "best_model", "--output", tmp_path / "a.csv", images[0]) == 0
    capsys.readouterr()
    assert classify("--model-dir", digits_run / "best_model", images[0]) == 0
    assert f"{first['prediction']} ({first['readable_name']})" in capsys.readouterr().out
    assert classify("--model-dir", digits_run / "best_model", "--abstain-below", 1, images[0]) == 0
    assert first["readable_name"] not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_map(tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps(DIGITS))
    given = {"demo": True, "max_samples": 30, "epochs": 1, "batch_size": 4, "class_map": str(names)}
    settings = resolve(given | {"output_dir": str(tmp_path / "results")})
    with pytest.raises(Stopped):
        fit(settings, should_stop=lambda: True)
    names.write_text(json.dumps(DIGITS | {"seven": "VII"}))
    assert train("--resume", "--output-dir", tmp_path / "results") == 2
    names.write_text(json.dumps(DIGITS))
    assert train("--resume", "--output-dir", tmp_path / "results") == 0
