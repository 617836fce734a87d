"""The tokens of responses: which of them are trained, and which stand for a class when it is scored.

If each class has one response, the scored text of a class is this whole response. If the images have reasonings of
their own, the scored text is only the answer: in answer-first "Answer: X" and the line end, before any reasoning; in
reasoning-first "X" and the end of turn, after the reasoning and "Answer:".
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from vlm.common import UsageError
from vlm.config import lay_out
from vlm.conversation.prompts import Prompts
from vlm.conversation.rendered import Rendered, common_start
from vlm.data import Sample, Split

ANY_REASONING = "It is."  # a reasoning for texts of which only the tokens around it are looked at


class Texts(Protocol):
    """What is needed of an architecture here; a `Family` is one."""

    @property
    def control_tokens(self) -> Mapping[int, str]:
        """The tokens that structure a conversation, with the placeholder of an image."""
        ...

    def control_in(self, text: str) -> str | None:
        """The first control token or placeholder that a text is read as, or None."""
        ...

    def response_ids(self, prompts: Prompts, text: str) -> list[int]:
        """The tokens of a response, end of turn included."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Text -> token ids, without special tokens."""
        ...

    def decode(self, ids: list[int], exact: bool = False) -> str:
        """Token ids -> text; special tokens and white space around it are kept only if it is to be exact."""
        ...


def scored_texts(family: Texts, prompts: Prompts, response_ids: list[list[int]]) -> list[list[int]]:
    """The tokens by which each class is scored; none begins another.

    Args:
        response_ids: for each class the tokens of its whole response.
    """
    if not prompts.free:
        return response_ids
    texts = [lay_out(prompts.response_format, ANY_REASONING, name) for name in prompts.shown_names]
    whole = [family.response_ids(prompts, text) for text in texts]
    if prompts.answer_first:
        return [_first_line(family, ids) for ids in whole]
    up_to_answer = texts[0].removesuffix(prompts.shown_names[0]).rstrip()  # it ends in "Answer:"
    opened = family.response_ids(prompts, up_to_answer)
    return [ids[common_start(opened, *whole) :] for ids in whole]


def _first_line(family: Texts, ids: list[int]) -> list[int]:
    """The tokens of a text up to the one with its first line end."""
    return next((ids[:count] for count in range(1, len(ids)) if "\n" in family.decode(ids[:count], exact=True)), ids)


def before_answer(family: Texts, rendered: Rendered, reasoning: str) -> list[int]:
    """The tokens of a response from its beginning to its scored text, in a format that ends with the answer.

    A control token, such as a placeholder of an image, should a model have written one, is left out.
    """
    text = lay_out(rendered.prompts.response_format, reasoning, rendered.prompts.shown_names[0])
    ids = family.response_ids(rendered.prompts, text)
    return [token for token in ids[: len(ids) - len(rendered.scored_ids[0])] if token not in family.control_tokens]


def before_reasoning(family: Texts, rendered: Rendered, label: int) -> list[int]:
    """The tokens of a response from its beginning to its reasoning, in a format that begins with the answer."""
    name = rendered.prompts.shown_names[label]
    texts = [lay_out(rendered.prompts.response_format, text, name) for text in (ANY_REASONING, "")]
    first, second = (family.response_ids(rendered.prompts, text.rstrip()) for text in texts)
    return first[: common_start(first, second)]


def response_of(sample: Sample, family: Texts, rendered: Rendered) -> list[int]:
    """The tokens that a sample is trained on: its own reasoning laid out, else the response of its class."""
    return _response(sample.label, sample.reasoning, family, rendered)


def _response(label: int, reasoning: str | None, family: Texts, rendered: Rendered) -> list[int]:
    if not (reasoning and rendered.prompts.free):
        return rendered.response_ids[label]
    return family.response_ids(rendered.prompts, rendered.prompts.response(label, reasoning))


def response_lengths(split: Split, family: Texts, rendered: Rendered) -> list[int]:
    """How many tokens the response of each sample has, without decoding its image.

    Raises:
        UsageError: a reasoning contains a control token.
    """
    lengths = []
    for label, reasoning, name in zip(split.labels, split.reasonings, split.names, strict=True):
        if reasoning and (token := family.control_in(reasoning)):
            raise UsageError(
                f"the reasoning of {name} contains {token}, a control token of the model. Remove it there."
            )
        lengths.append(len(_response(label, reasoning, family, rendered)))
    return lengths


def longest_reasoning(reasonings: Sequence[str | None], family: Texts) -> int:
    """Tokens of the longest reasoning, with those around it; 0 if there is none."""
    around = lay_out("reasoning-first", "", "")
    return max((len(family.tokenize(around + text)) for text in reasonings if text), default=0)
