"""How a model without a family file lays out a conversation, with chat templates of every kind."""

from types import SimpleNamespace

import pytest
from jinja2 import Environment
from tiny import tiny_prompts

from vlm.common import UsageError
from vlm.families.layout import Layout, lay_out_conversation

USER_ONLY = (
    "{% if messages[0]['role'] == 'system' %}{{ refuse() }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITH_SYSTEM = USER_ONLY.replace("{{ refuse() }}", "")
WITHOUT_TEXT = WITH_SYSTEM.replace("{{ part['text'] }}", "")
SPACED = WITH_SYSTEM.replace(
    "[{{ message['role'] }}]", "[{{ message['role'] }}]{{ ' ' if message['role'] == 'assistant' }}"
)


def processor(template: str | None) -> SimpleNamespace:
    def apply(messages, add_generation_prompt, tokenize):
        return (
            Environment().from_string(template).render(messages=messages, add_generation_prompt=add_generation_prompt)
        )

    return SimpleNamespace(chat_template=template, apply_chat_template=apply, name_or_path="folder")


def test_instructions_have_a_turn_of_their_own_or_are_at_the_head_of_the_users():
    prompts = tiny_prompts()
    after = f"{prompts.question}[end]\n[assistant]"
    whole = lay_out_conversation(processor(WITH_SYSTEM), prompts, "<image>")
    assert whole == Layout(f"[system]{prompts.system}[end]\n[user]<image>{after}", "", "[end]")
    merged = lay_out_conversation(processor(USER_ONLY), prompts, "<image>")
    assert merged == Layout(f"[user]{prompts.system}\n<image>{after}", "", "[end]")


def test_without_a_template_the_texts_follow_each_other(capsys):
    prompts = tiny_prompts()
    found = lay_out_conversation(processor(None), prompts, "<image>")
    assert found == Layout(f"<image>{prompts.system}\n{prompts.question}\n")
    assert "no chat template" in capsys.readouterr().err


def test_a_space_before_an_answer_belongs_to_it():
    assert lay_out_conversation(processor(SPACED), tiny_prompts(), "<image>").before == " "


def test_a_template_that_drops_texts_is_refused():
    with pytest.raises(UsageError, match=r"folder/chat_template\.jinja drops the instructions"):
        lay_out_conversation(processor(WITHOUT_TEXT), tiny_prompts(), "<image>")


@pytest.mark.parametrize(("placeholder", "count"), [("<photo>", 0), ("[end]", 2)])
def test_a_conversation_has_one_placeholder(placeholder, count):
    with pytest.raises(UsageError, match="expected 1") as error:
        lay_out_conversation(processor(WITH_SYSTEM), tiny_prompts(), placeholder)
    assert f"writes {count} of {placeholder}" in str(error.value)
