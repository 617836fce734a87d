"""Texts of the user with tokens that structure the conversation are refused, and it is said where they are."""

import pytest
import torch
from test_reasoning import split_of

from vlm.common import UsageError
from vlm.config import resolve
from vlm.conversation import before_answer, build_prompts, response_lengths
from vlm.conversation.prompts import Prompts
from vlm.families import load_family


@pytest.fixture(scope="module")
def family(tiny_model):
    return load_family(tiny_model, torch.float32, torch.device("cpu"), {})


@pytest.mark.parametrize("token", ["<end_of_utterance>", "<|im_start|>", "<image>", "<fake_token_around_image>"])
def test_a_control_token_is_refused_in_every_text(family, token, tmp_path):
    descriptions = tmp_path / "descriptions.json"
    descriptions.write_text(f'{{"cat": "has {token} fur"}}')
    cases = [
        ({}, ["dog", f"cat{token}"], f'class name "cat{token}" contains {token}', "--class-names"),
        ({"task_description": f"pets{token}"}, ["cat", "dog"], f"question contains {token}", "--task-description"),
        ({"prompt_template": f"What {token}?"}, ["cat", "dog"], f"question contains {token}", "--prompt-template"),
        ({"system_instructions": f"{token}Hi"}, ["cat", "dog"], f"image contains {token}", "--system-instructions"),
        ({"class_descriptions": str(descriptions)}, ["cat", "dog"], "response of class cat", "--class-descriptions"),
    ]
    for settings, names, said, flag in cases:
        with pytest.raises(UsageError) as error:
            family.render(build_prompts(resolve(settings), names))
        assert said in str(error.value) and flag in str(error.value)


def test_a_control_token_that_is_put_together_from_several_texts_is_refused(family):
    prompts = build_prompts(resolve({"system_instructions": "<{task_description}> {classes}"}), ["cat", "dog"])
    family.render(prompts)
    joined = resolve({"system_instructions": "<{task_description}> {classes}", "task_description": "image"})
    with pytest.raises(UsageError, match="text before the image contains <image>"):
        family.render(build_prompts(joined, ["cat", "dog"]))


def test_a_template_that_makes_a_control_token_of_a_text_is_refused(family, monkeypatch):
    template = family.processor.chat_template.replace(
        "part['text']", "part['text'] | replace('(image)', '<|im_start|>')"
    )
    monkeypatch.setattr(family.processor, "chat_template", template)
    family.render(Prompts("look", "what?", ("a", "b"), ("Answer: a", "Answer: b")))
    with pytest.raises(UsageError):
        family.render(Prompts("look (image)", "what?", ("a", "b"), ("Answer: a", "Answer: b")))


def test_text_that_only_looks_like_markup_is_taken(family):
    family.render(build_prompts(resolve({"task_description": "a < b, <b>x</b>, |im_end| and <>"}), ["<a>", "!", "#"]))


def test_a_control_token_in_a_reasoning_is_named_with_its_image(family):
    rendered = family.render(Prompts("s", "q", ("a", "b"), ("Answer: a", "Answer: b"), reasoning_tokens=5))
    with pytest.raises(UsageError, match="reasoning of image 1 contains <end_of_utterance>"):
        response_lengths(split_of([None, "it <end_of_utterance> is", None, None]), family, rendered)


def test_control_tokens_that_a_model_writes_are_left_out(family):
    prompts = Prompts("s", "q", ("a", "b"), ("Answer: a", "Answer: b"), "reasoning-first", reasoning_tokens=5)
    rendered = family.render(prompts)
    clean = before_answer(family, rendered, "it is")
    assert before_answer(family, rendered, "it<end_of_utterance><image> is") == clean
