"""The conversation as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vlm.conversation.prompts import Prompts


@dataclass(frozen=True)
class Rendered:
    """The conversation as token ids. The image's own tokens stand between prefix and question.

    Attributes:
        prefix_ids: the tokens before the image, equal for all samples.
        question_ids: the tokens after the image.
        response_ids: for each class its response, ending in the end-of-turn token.
        scored_ids: for each class the tokens whose log-probability is its score (vlm/conversation/responses.py).
        max_length: the most tokens that the model can read.
        prompts: what was rendered.
    """

    prefix_ids: list[int]
    question_ids: list[int]
    response_ids: list[list[int]]
    scored_ids: list[list[int]]
    max_length: int
    prompts: Prompts

    @cached_property
    def opening_ids(self) -> list[int]:
        """What all scored texts begin with; it is read together with the prompt."""
        return self.scored_ids[0][: common_start(*self.scored_ids)]


def common_start(*sequences: Sequence[int]) -> int:
    """How many tokens all sequences begin with."""
    count = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count
