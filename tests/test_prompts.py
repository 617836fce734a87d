"""What is said to the model, and how its answers are read."""

import json

import pytest

from vlm.config import Settings
from vlm.errors import UsageError
from vlm.prompts import Prompts, build_prompts, parse_answer

NAMES = ["cat", "catfish", "cat fish"]


def test_default_texts_hold_the_task_and_all_classes():
    prompts = build_prompts(Settings(task_description="pet recognition"), NAMES)
    assert "pet recognition" in prompts.system and "cat, catfish, cat fish" in prompts.system
    assert prompts.question.startswith("Please classify this image for the pet recognition task. Strictly use this format:")
    assert prompts.question.index("Reasoning:") < prompts.question.index("Answer:")
    assert prompts.responses[1] == (
        "Reasoning: Looking at this image, I can see features of catfish. "
        "Based on the visual features, this appears to be catfish.\nAnswer: catfish"
    )


def test_only_the_two_known_fields_of_a_template_are_filled():
    template = '{classes} for {task_description}; keep {this}, {} and {"json": {classes}}'
    prompts = build_prompts(Settings(prompt_template=template, system_instructions="sys {class}", task_description="{classes}"), ["a", "b"])
    assert prompts.question == 'a, b for {classes}; keep {this}, {} and {"json": a, b}'
    assert prompts.system == "sys {class}"


def test_descriptions_go_into_system_text_and_responses(tmp_path):
    file = tmp_path / "descriptions.json"
    file.write_text(json.dumps({"cat": "fur and {class} whiskers."}), encoding="utf-8")
    prompts = build_prompts(Settings(class_descriptions=str(file)), NAMES)
    assert "- cat: fur and {class} whiskers." in prompts.system and "- catfish" in prompts.system
    assert "I can see fur and {class} whiskers. Based" in prompts.responses[0]
    assert "I can see features of catfish." in prompts.responses[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a readable JSON file"), ('["cat"]', "expected a JSON object"), ('{"dog": "x"}', "describes dog"), (None, "not a readable")],
)
def test_bad_description_files_are_refused_with_their_name(tmp_path, content, message):
    file = tmp_path / "descriptions.json"
    if content:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as error:
        build_prompts(Settings(class_descriptions=str(file)), NAMES)
    assert str(file) in str(error.value)


def test_prompts_survive_json():
    prompts = build_prompts(Settings(), NAMES)
    assert Prompts.from_json(json.loads(json.dumps(prompts.to_json()))) == prompts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Reasoning: I see a catfish.\nAnswer: cat", "cat"),
        ("Answer: catfish", "catfish"),
        ("Answer: cat fish.", "cat fish"),
        ("answer:  CAT !", "cat"),
        ("ANSWER : Catfish.\nmore", "catfish"),
        ("Answer: dog\nNo. Answer: cat", "cat"),
        ("Answer: cat or catfish", None),
        ("Answer: a cat", None),
        ("Answer: dog", None),
        ("Answer:", None),
        ("Answer:\ncat", None),
        ("I think it is a cat", None),
        ("", None),
    ],
)
def test_answers_are_matched_exactly_or_not_at_all(text, answer):
    assert parse_answer(text, NAMES) == answer


def test_names_that_differ_only_in_case_need_the_exact_one():
    assert parse_answer("Answer: A", ["a", "A"]) == "A"
    assert parse_answer("Answer: A.", ["a", "A"]) is None


def test_names_with_closing_punctuation_are_found():
    assert parse_answer("Answer: C++ vs. C.", ["C++ vs. C.", "x"]) == "C++ vs. C."
    assert parse_answer("Answer: etc", ["etc.", "x"]) == "etc."
