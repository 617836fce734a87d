"""Class names and instructions -> one conversation; a class -> its response; a text -> a class or None.

Training and inference both come here, so that they cannot ask differently.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlm.common import joined
from vlm.config import DEFAULT_FORMAT, Settings, lay_out
from vlm.conversation.class_files import read_class_map, read_descriptions

SYSTEM = "You are an expert in {task_description}. Every image belongs to exactly one of these classes: {classes}"
UNLISTED = "You are an expert in {task_description}. Every image belongs to exactly one of {count} classes."
# The longest class list that the default instructions have. About 2,048 tokens, a quarter of what SmolVLM reads (8,192)
# and half of what Phi-3.5-vision does: image, question and response need the rest.
LONGEST_LIST = 8192  # characters
QUESTION = "Please classify this image for the {task_description} task. Strictly use this format:\n"
SHOWN_REASONING, SHOWN_ANSWER = "[what you see in the image]", "[one class name]"  # of a response, in the question
REASONING = "Looking at this image, I can see {description}. Based on the visual features, this appears to be {class}."
DESCRIPTION = "features of {class}"
CLOSING_PUNCTUATION = ".!?,;:"


@dataclass(frozen=True)
class Prompts:
    """Everything that is said to the model and everything it may answer.

    Attributes:
        system: text before the image, equal for every sample.
        question: text after the image, equal for every sample.
        class_names, responses: one entry a class, in the order of the labels.
        readable_names: what the model is shown in the place of the class names, one entry a class; empty if it is shown
            the class names.
        response_format: the order of reasoning and answer (vlm/config/formats.py).
        reasoning_tokens: the most tokens that the model writes of a reasoning of its own, as it was trained on texts of
            the dataset; 0: each class has one response.
        question_first: the question stands before the image.
    """

    system: str
    question: str
    class_names: tuple[str, ...]
    responses: tuple[str, ...]
    response_format: str = DEFAULT_FORMAT
    reasoning_tokens: int = 0
    question_first: bool = False
    readable_names: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields; those of later versions only if they say something, so that the digests of older conversations
        stay valid."""
        later = {name for name in ("question_first", "readable_names") if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in later}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Prompts":
        """The prompts from the JSON of this or an earlier version."""
        names = ("class_names", "responses", *(["readable_names"] if "readable_names" in values else []))
        texts: dict[str, Any] = {name: tuple(values[name]) for name in names}
        return cls(**values | texts)

    @property
    def shown_names(self) -> tuple[str, ...]:
        """The name of each class in all that the model reads and writes."""
        return self.readable_names or self.class_names

    @property
    def free(self) -> bool:
        """Whether the model was trained on a reasoning for each image."""
        return self.reasoning_tokens > 0

    @property
    def answer_first(self) -> bool:
        """Whether a text begins with its answer."""
        return self.response_format != "reasoning-first"

    def response(self, label: int, reasoning: str | None = None) -> str:
        """The answer to an image of a class: its own reasoning laid out, or without one the response of the class."""
        return lay_out(self.response_format, reasoning, self.shown_names[label]) if reasoning else self.responses[label]

    def messages(self) -> list[dict[str, Any]]:
        """The conversation up to the model's turn, with list content, which every chat template understands."""
        user = [{"type": "image"}, {"type": "text", "text": self.question}]
        if self.question_first:
            user = [{"type": "text", "text": self.question + "\n"}, {"type": "image"}]
        return [
            {"role": "system", "content": [{"type": "text", "text": self.system}]},
            {"role": "user", "content": user},
        ]


def build_prompts(settings: Settings, class_names: list[str]) -> Prompts:
    """Render the conversation and the response of each class.

    Raises:
        UsageError: the file of class descriptions, or of readable names, cannot be used.
    """
    shown = read_class_map(settings.class_map, class_names) if settings.class_map else class_names
    template = lay_out(settings.response_format, REASONING, "{class}")
    question = settings.prompt_template or QUESTION + lay_out(settings.response_format, SHOWN_REASONING, SHOWN_ANSWER)
    descriptions = (
        read_descriptions(settings.class_descriptions, class_names, shown) if settings.class_descriptions else {}
    )
    default = UNLISTED.replace("{count}", f"{len(shown):,}") if leaves_list_out(settings, shown) else SYSTEM
    system = settings.system_instructions or default
    if descriptions:  # the list begins on a line of its own: no blank is left before it
        system, question = (text.replace(" {classes}", "{classes}") for text in (system, question))
    values = {"classes": _class_list(shown, descriptions), "task_description": settings.task_description}
    responses = []
    for name in shown:
        description = descriptions.get(name) or fill(DESCRIPTION, {"class": name})
        responses.append(fill(template, {"description": description.rstrip(" ."), "class": name}))
    return Prompts(
        system=fill(system, values),
        question=fill(question, values),
        class_names=tuple(class_names),
        responses=tuple(responses),
        response_format=settings.response_format,
        question_first=settings.question_first,
        readable_names=tuple(shown) if settings.class_map else (),
    )


def leaves_list_out(settings: Settings, shown_names: Sequence[str]) -> bool:
    """Whether the default instructions do not list the classes, as the list would be too long.

    Descriptions and instructions of the user's own are said in any case.
    """
    own = settings.system_instructions or settings.class_descriptions
    return not own and len(joined(shown_names)) > LONGEST_LIST


def fill(template: str, values: dict[str, str]) -> str:
    """Replace `{key}` for the keys in `values`, in one pass; every other brace stays."""
    pattern = "|".join(re.escape("{" + key + "}") for key in values)
    return re.sub(pattern, lambda found: values[found[0][1:-1]], template)


def _class_list(names: Sequence[str], descriptions: dict[str, str]) -> str:
    if not descriptions:
        return joined(names)
    return "".join(f"\n- {name}: {descriptions[name]}" if name in descriptions else f"\n- {name}" for name in names)


def parse_answer(
    text: str, class_names: list[str] | tuple[str, ...], response_format: str = DEFAULT_FORMAT
) -> str | None:
    """The class that a text answers with, or None.

    What stands on the line of the last "Answer:" (of the first one, in a format that begins with the answer) has to be
    a class name, after trimming case, white space and closing punctuation. A name inside a longer text does not count:
    "cat or dog" is no answer, and "catfish" is not "cat".
    """
    found = re.findall(r"answer\s*:[ \t]*([^\n]*)", text, flags=re.IGNORECASE)
    if not found:
        return None
    answer = found[-1 if response_format == "reasoning-first" else 0].strip()
    if answer in class_names:
        return answer
    matches = [name for name in class_names if _trimmed(name) == _trimmed(answer)]
    return matches[0] if len(matches) == 1 else None


def _trimmed(text: str) -> str:
    return text.strip().rstrip(CLOSING_PUNCTUATION).strip().casefold()
