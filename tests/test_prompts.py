"""What is said to the model, and how its answers are read."""

import json
from dataclasses import replace

import pytest

from vlm.common.errors import UsageError
from vlm.config import LAYOUTS, reasoning_of, resolve, stated_format
from vlm.conversation.prompts import LONGEST_LIST, Prompts, build_prompts, parse_answer

NAMES = ["cat", "catfish", "cat fish"]


def test_default_texts_hold_the_task_and_all_classes():
    prompts = build_prompts(resolve({"task_description": "pet recognition"}), NAMES)
    assert "pet recognition" in prompts.system and "cat, catfish, cat fish" in prompts.system
    assert prompts.question.startswith(
        "Please classify this image for the pet recognition task. Strictly use this format:"
    )
    assert prompts.question.index("Reasoning:") < prompts.question.index("Answer:")
    assert prompts.responses[1] == (
        "Reasoning: Looking at this image, I can see features of catfish. "
        "Based on the visual features, this appears to be catfish.\nAnswer: catfish"
    )


def test_a_class_list_that_would_be_too_long_is_left_out_of_the_default_text(tmp_path):
    room = LONGEST_LIST - len("cat, fish, ")
    names = ["cat", "fish", "x" * room]
    fits, longer = build_prompts(resolve({}), names), build_prompts(resolve({}), [*names[:2], "x" * (room + 1)])
    assert fits.system.endswith("these classes: " + ", ".join(names))
    assert longer.system.endswith("exactly one of 3 classes.") and len(longer.responses) == 3
    own = build_prompts(resolve({"system_instructions": "One of {classes}."}), [*names, "y"])
    assert own.system == f"One of {', '.join(names)}, y."
    file = tmp_path / "descriptions.json"
    file.write_text('{"cat": "fur"}', encoding="utf-8")
    described = build_prompts(resolve({"class_descriptions": str(file)}), [*names, "y"])
    assert "\n- cat: fur\n- fish\n" in described.system


def test_names_with_commas_are_told_apart_and_are_answers():
    names = ["tench, Tinca tinca", "goldfish", "crane", "crane, bird"]
    prompts = build_prompts(resolve({}), names)
    assert prompts.system.endswith("classes: tench, Tinca tinca; goldfish; crane; crane, bird")
    assert [parse_answer(response, names) for response in prompts.responses] == names


def test_only_the_two_known_fields_of_a_template_are_filled():
    template = '{classes} for {task_description}; keep {this}, {} and {"json": {classes}}'
    prompts = build_prompts(
        resolve({"prompt_template": template, "system_instructions": "sys {class}", "task_description": "{classes}"}),
        ["a", "b"],
    )
    assert prompts.question == 'a, b for {classes}; keep {this}, {} and {"json": a, b}'
    assert prompts.system == "sys {class}"


def test_descriptions_go_into_system_text_and_responses(tmp_path):
    file = tmp_path / "descriptions.json"
    file.write_text(json.dumps({"cat": "fur and {class} whiskers."}), encoding="utf-8")
    prompts = build_prompts(resolve({"class_descriptions": str(file)}), NAMES)
    assert "these classes:\n- cat: fur and {class} whiskers.\n- catfish\n" in prompts.system
    assert "I can see fur and {class} whiskers. Based" in prompts.responses[0]
    assert "I can see features of catfish." in prompts.responses[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ('["cat"]', "expected a JSON object"),
        ('{"dog": "x"}', "names dog, which is no class"),
        (None, r"JSON file \(no such file or directory\)"),
    ],
)
def test_bad_description_files_are_refused_with_their_name(tmp_path, content, message):
    file = tmp_path / "descriptions.json"
    if content:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as error:
        build_prompts(resolve({"class_descriptions": str(file)}), NAMES)
    assert str(file) in str(error.value)


def test_prompts_survive_json():
    prompts = replace(build_prompts(resolve({"response_format": "answer-first"}), NAMES), reasoning_tokens=50)
    assert Prompts.from_json(json.loads(json.dumps(prompts.to_json()))) == prompts
    earlier = {"system": "s", "question": "q", "class_names": ["a", "b"], "responses": ["Answer: a", "Answer: b"]}
    assert Prompts.from_json(earlier).response_format == "reasoning-first" and not Prompts.from_json(earlier).free


# Formats

REASONING = "Looking at this image, I can see features of cat. Based on the visual features, this appears to be cat."
RESPONSES = {
    "reasoning-first": f"Reasoning: {REASONING}\nAnswer: cat",
    "answer-first": f"Answer: cat\nReasoning: {REASONING}",
    "answer-only": "Answer: cat",
}


@pytest.mark.parametrize("response_format", LAYOUTS)
def test_question_and_responses_have_the_format(response_format):
    prompts = build_prompts(resolve({"response_format": response_format}), NAMES)
    assert prompts.responses[0] == RESPONSES[response_format] == prompts.response(0)
    assert stated_format(prompts.question) == response_format, "the question asks for what the responses are"
    assert prompts.response_format == response_format
    for name, text in zip(NAMES, prompts.responses, strict=True):
        assert parse_answer(text, NAMES, response_format) == name


def test_a_reasoning_of_the_images_own_is_laid_out_as_it_is():
    prompts = build_prompts(resolve({"response_format": "answer-first"}), NAMES)
    assert prompts.response(1, "{class} and {answer}: 50%") == "Answer: catfish\nReasoning: {class} and {answer}: 50%"
    assert prompts.response(1, "") == prompts.response(1, None) == prompts.responses[1]


@pytest.mark.parametrize(
    ("template", "stated"),
    [
        ("Reasoning: ...\nAnswer: ...", "reasoning-first"),
        ("First answer: X, then reasoning : Y", "answer-first"),
        ("Answer: [class]\nExplanation: [why]", "answer-first"),
        ("Rationale: ...\nAnswer: ...", "reasoning-first"),
        ("ANSWER: [class]", "answer-only"),
        ("Answer: [class]. Explain yourself.", None),
        ("Give a reason, then Answer: [class]", None),
        ("Observations: what you see\nAnswer: one class", "reasoning-first"),
        ("1. Description: what you see\n2. Final answer: one class", "reasoning-first"),
        ("- **Answer**: x\n- **Analysis**: y", "answer-first"),
        ("The last line must be 'Answer: <class>'.\nReasoning: ...\nAnswer: ...", "reasoning-first"),
        ("Explain yourself (Reasoning: ...) and close with\nAnswer: ...", "reasoning-first"),
        ("Describe the image.\nAnswer: ...", None),
        ("Question: what is it?\nAnswer: ...", "answer-only"),
        ("Reply with 'Answer: <class>' only. Do not explain.", "answer-only"),
        ("Answer: <class>, without any reasoning", "answer-only"),
        ("Answer: <class>. There is no reason not to explain.", None),
        ("What is it? {classes}", None),
        (None, None),
    ],
)
def test_the_format_follows_the_template_unless_it_is_given(template, stated):
    assert stated_format(template) == stated
    prompts = build_prompts(resolve({"prompt_template": template}), NAMES)
    assert prompts.response_format == (stated or "reasoning-first")
    given = build_prompts(resolve({"prompt_template": template, "response_format": "answer-first"}), NAMES)
    assert given.response_format == "answer-first" and given.responses[0].startswith("Answer: cat")
    assert resolve({"prompt_template": template or "x"}).response_format == (stated or "reasoning-first")


def test_a_reasoning_column_needs_a_format_with_reasoning():
    with pytest.raises(UsageError, match="--reasoning-column needs .* answer-only"):
        resolve({"reasoning_column": "why", "response_format": "answer-only"})


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("Answer: cat\nReasoning: no catfish.\nAnswer: catfish", "cat", "catfish"),
        ("Reasoning: x\nAnswer: cat", "cat", "cat"),
        ("Answer: dog\nAnswer: cat", None, "cat"),
    ],
)
def test_the_answer_is_the_first_or_the_last_by_format(text, first, last):
    assert parse_answer(text, NAMES, "answer-first") == parse_answer(text, NAMES, "answer-only") == first
    assert parse_answer(text, NAMES) == parse_answer(text, NAMES, "reasoning-first") == last


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("  Stripes.\nAnd whiskers. ", "Stripes.\nAnd whiskers."),
        ("Reasoning: stripes\nAnswer: cat", "stripes"),
        ("Answer: cat\nReasoning: stripes", "stripes"),
        ("Answer: cat\nReasoning: stripes\nAnswer: dog\nmore", "stripes"),
        ("The answer: stripes", "The answer: stripes"),
        ("reasoning : Reasoning: twice", "Reasoning: twice"),
        ("Answer: cat", ""),
        (" \n ", ""),
    ],
)
def test_the_reasoning_alone(text, reasoning):
    assert reasoning_of(text) == reasoning


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
