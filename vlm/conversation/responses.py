"""The tokens of responses: which of them are trained, and which stand for a class when it is scored.

The scored text of a class is its whole response where each class has one. Where the reasonings are the images' own, it
is the answer where it stands: "Answer: X" and the line end, before any reasoning, or "X" and the end of turn, behind
the reasoning and "Answer:".
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm.common.errors import UsageError
from vlm.config.formats import lay_out
from vlm.conversation.prompts import Prompts
from vlm.data.splits import Sample

if TYPE_CHECKING:
    from vlm.families.base import Family
    from vlm.families.encoded import Rendered

ANY_REASONING = "It is."  # what stands in for a reasoning where only the tokens around it are looked at


def scored_ids(family: "Family", prompts: Prompts, response_ids: list[list[int]]) -> list[list[int]]:
    """The tokens by which each class is scored; none begins another.

    Args:
        response_ids: the tokens of the classes' whole responses.
    """
    if not prompts.free:
        return response_ids
    texts = [lay_out(prompts.response_format, ANY_REASONING, name) for name in prompts.class_names]
    whole = [family.response_ids(prompts, text) for text in texts]
    if prompts.answer_first:
        return [_first_line(family, ids) for ids in whole]
    opened = family.response_ids(
        prompts, texts[0][: len(texts[0]) - len(prompts.class_names[0])].rstrip()
    )  # up to "Answer:"
    return [ids[common_start(opened, *whole) :] for ids in whole]


def _first_line(family: "Family", ids: list[int]) -> list[int]:
    """The tokens of a text up to the one with its first line end."""
    return next((ids[:count] for count in range(1, len(ids)) if "\n" in family.tokenizer.decode(ids[:count])), ids)


def common_start(*sequences: Sequence[int]) -> int:
    """How many tokens all sequences begin with."""
    count = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def before_answer(family: "Family", rendered: "Rendered", reasoning: str) -> list[int]:
    """The tokens of a response from its beginning to where the scored text stands, in a format that ends with the
    answer.

    A placeholder of an image, should a model have spelled one, is left out.
    """
    text = lay_out(rendered.prompts.response_format, reasoning, rendered.prompts.class_names[0])
    ids = family.response_ids(rendered.prompts, text)
    return [token for token in ids[: len(ids) - len(rendered.scored_ids[0])] if token != family.image_token_id]


def before_reasoning(family: "Family", rendered: "Rendered", label: int) -> list[int]:
    """The tokens of a response from its beginning to where the reasoning stands, in a format that begins with the
    answer of a class."""
    texts = [
        lay_out(rendered.prompts.response_format, text, rendered.prompts.class_names[label])
        for text in (ANY_REASONING, "")
    ]
    first, second = (family.response_ids(rendered.prompts, text.rstrip()) for text in texts)
    return first[: common_start(first, second)]


def response_of(sample: Sample, family: "Family", rendered: "Rendered") -> list[int]:
    """The tokens that a sample is trained on: its own reasoning laid out, else the response of its class. Needs no
    weights."""
    if not (sample.reasoning and rendered.prompts.free):
        return rendered.response_ids[sample.label]
    return family.response_ids(rendered.prompts, rendered.prompts.response(sample.label, sample.reasoning))


def response_lengths(split: Any, family: "Family", rendered: "Rendered") -> list[int]:
    """How many tokens the response of each sample of a `Split` has, without decoding its image.

    Raises:
        UsageError: a reasoning holds the token that stands for an image.
    """
    lengths = []
    for label, reasoning, name in zip(split.labels, split.reasonings, split.names, strict=True):
        ids = response_of(Sample(None, label, name, reasoning), family, rendered)
        if family.image_token_id in ids:
            raise UsageError(
                f"the reasoning of {name} holds {family.image_token}, which stands for an image: leave it out."
            )
        lengths.append(len(ids))
    return lengths


def longest_reasoning(split: Any, family: "Family") -> int:
    """Tokens of the longest reasoning of a `Split`'s own, with those around it; 0 where there is none."""
    texts = [text for text in split.reasonings if text]
    around = lay_out("reasoning-first", "", "")
    return max((len(family.tokenize(around + text)) for text in texts), default=0)
