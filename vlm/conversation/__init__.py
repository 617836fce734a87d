"""What is said to the model and what it may answer.

From class names and instructions to messages (prompts.py), to token ids (rendered.py), and to the tokens of responses
that are trained and scored (responses.py). Knows no architecture.
"""

from vlm.conversation.class_files import read_renames, renamed_classes
from vlm.conversation.prompts import LONGEST_LIST, Prompts, build_prompts, leaves_list_out, parse_answer
from vlm.conversation.rendered import Rendered
from vlm.conversation.responses import (
    before_answer,
    before_reasoning,
    longest_reasoning,
    response_lengths,
    response_of,
    scored_texts,
)

__all__ = [
    "LONGEST_LIST",
    "Prompts",
    "Rendered",
    "before_answer",
    "before_reasoning",
    "build_prompts",
    "leaves_list_out",
    "longest_reasoning",
    "parse_answer",
    "read_renames",
    "renamed_classes",
    "response_lengths",
    "response_of",
    "scored_texts",
]
