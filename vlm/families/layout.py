"""How a model without a family file lays out a conversation: as its chat template does, if it has one."""

from dataclasses import dataclass
from typing import Any

from vlm.common import UsageError, note
from vlm.conversation import Prompts
from vlm.families.pretrained import CHOOSE_ANOTHER
from vlm.families.processors import chat_text, drops_texts, template_file

ANSWER = "ANSWER"  # stands for an answer while the text around it is looked at


@dataclass(frozen=True)
class Layout:
    """The text around an answer.

    Attributes:
        opening: the conversation up to the model's turn, with the placeholder of the image.
        before: a space that belongs to the answer, or nothing.
        closing: what ends the model's turn; nothing for the end-of-text token.
    """

    opening: str
    before: str = ""
    closing: str = ""


def lay_out_conversation(processor: Any, prompts: Prompts, placeholder: str) -> Layout:
    """The conversation as text.

    Args:
        placeholder: what stands for an image, before the processor puts in its tokens.

    Raises:
        UsageError: the chat template drops the instructions or the question.
        UsageError: the conversation does not have exactly one placeholder.
    """
    if not getattr(processor, "chat_template", None):
        note("the model has no chat template: image, instructions and question are put one after the other.")
        return Layout(f"{placeholder}{prompts.system}\n{prompts.question}\n")
    messages, opening = _accepted_messages(processor, prompts)
    count = opening.count(placeholder)
    if count != 1:
        raise UsageError(
            f"the chat template in {template_file(processor)} writes {count} of {placeholder}, expected 1. "
            f"{CHOOSE_ANOTHER}"
        )
    # The model's turn with an answer -> what the template puts before and after the answer
    answered = [*messages, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    turn = chat_text(processor, answered, add_generation_prompt=False).removeprefix(opening)
    before, _, after = turn.partition(ANSWER)
    return Layout(opening, before if len(before) <= 1 else "", after.rstrip())


def _accepted_messages(processor: Any, prompts: Prompts) -> tuple[list[dict[str, Any]], str]:
    """The messages that the chat template takes, and the conversation up to the model's turn.

    A model without a system role gets the instructions at the head of the user's turn.
    """
    problem = drops_texts(processor)
    asked = prompts.messages()[-1]["content"]
    in_user_turn = [{"role": "user", "content": [{"type": "text", "text": prompts.system + "\n"}, *asked]}]
    for messages in (prompts.messages(), in_user_turn):
        try:
            opening = chat_text(processor, messages, add_generation_prompt=True)
        except UsageError as error:  # each template has its own way to refuse a system role
            problem = error
            continue
        if prompts.system in opening and prompts.question in opening:
            return messages, opening
    raise problem
