"""In which order reasoning and answer stand: the response formats, and what a question template says about them."""

import re

DEFAULT_FORMAT = "reasoning-first"
# "Answer: " stands in every format, so that one rule reads all texts, and a class name always follows the same tokens.
LAYOUTS = {
    "reasoning-first": "Reasoning: {reasoning}\nAnswer: {answer}",
    "answer-first": "Answer: {answer}\nReasoning: {reasoning}",
    "answer-only": "Answer: {answer}",
}
ANSWER = re.compile(r"answer[ \t]*:", re.IGNORECASE)
ANSWER_LINE = re.compile(r"^[ \t]*answer[ \t]*:", re.IGNORECASE | re.MULTILINE)
REASONING = re.compile(r"reasoning[ \t]*:", re.IGNORECASE)
ANY_REASONING = re.compile(r"(reasoning|reasons?|explanation|rationale|justification|why)[ \t]*:", re.IGNORECASE)  # in a user's template


def lay_out(response_format: str, reasoning: str, answer: str) -> str:
    """One response, or what the question shows of it. Braces in the texts are left alone."""
    return LAYOUTS[response_format].format(reasoning=reasoning, answer=answer)


def stated_format(template: str | None) -> str | None:
    """The format that a question template asks for, or None where it asks for none.

    "Reasoning:", or a word like it, and "Answer:" state an order. "Answer:" alone states that there is no reasoning, if no word of it is
    found at all.
    """
    answer, reasoning = ANSWER.search(template or ""), ANY_REASONING.search(template or "")
    if answer and reasoning:
        return "answer-first" if answer.start() < reasoning.start() else "reasoning-first"
    if answer and not re.search("reason|expla|why|because|describ", template or "", re.IGNORECASE):
        return "answer-only"
    return None


def choose_format(given: str | None, template: str | None) -> str:
    """The format given, else the one that the template states, else the default."""
    return given or stated_format(template) or DEFAULT_FORMAT


def reasoning_of(text: str) -> str:
    """The reasoning alone, of a text that may be laid out as a response, whatever its format; white space around it is dropped.

    A "Reasoning:" at the beginning goes, and all lines from one that begins with "Answer:", or, where that is the first line, this line.
    """
    text = text.strip()
    first = ANSWER_LINE.match(text)
    if first:
        text = text.partition("\n")[2].strip()
    again = ANSWER_LINE.search(text)
    text = text[: again.start()].strip() if again else text
    opening = REASONING.match(text)
    return text[opening.end() :].strip() if opening else text
