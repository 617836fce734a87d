"""The response formats: the order of reasoning and answer, and which order a question template asks for."""

import re

DEFAULT_FORMAT = "reasoning-first"
# "Answer: " is in every format, so that one rule reads all texts, and a class name always follows the same tokens.
LAYOUTS = {
    "reasoning-first": "Reasoning: {reasoning}\nAnswer: {answer}",
    "answer-first": "Answer: {answer}\nReasoning: {reasoning}",
    "answer-only": "Answer: {answer}",
}
ANSWER_LINE = re.compile(r"^[ \t]*answer[ \t]*:", re.IGNORECASE | re.MULTILINE)
REASONING = re.compile(r"reasoning[ \t]*:", re.IGNORECASE)
# Names of the two in a user's template: at the beginning of a line, after "1." or "- **", or anywhere.
_WORDS = (
    r"(?:reasoning|reasons?|explanations?|rationale|justification|why|observations?|description|analysis"
    r"|thoughts?|thinking|evidence)"
)
_LINE = r"^[^\w\n]*(?:\d+[.)][^\w\n]*)?"
LABELED_LINES = tuple(re.compile(rf"{_LINE}(?:\w+ )?{word}\W{{0,3}}:", re.I | re.M) for word in ("answer", _WORDS))
LABELS = tuple(re.compile(rf"{word}[ \t]*:", re.I) for word in ("answer", _WORDS))
NEGATED = re.compile(r"\b(?:do not|don't|never|without|no)\b(?: \w+){0,2} (?:expla|reason|describ|justif)\w*", re.I)
MENTION = re.compile(r"reason|expla|why|because|descri|justif|rational|observ|analy|think|thought|step by step", re.I)


def lay_out(response_format: str, reasoning: str, answer: str) -> str:
    """One response, or the example of one in the question. Braces in the texts stay as they are."""
    return LAYOUTS[response_format].format(reasoning=reasoning, answer=answer)


def stated_format(template: str | None) -> str | None:
    """The format that a question template asks for, or None if it asks for none.

    "Reasoning:" (or a word like it) and "Answer:" state an order: the last ones that begin a line, else the first ones
    anywhere. "Answer:" without any word about reasoning, or with one that excludes it ("do not explain"), states
    answer-only.
    """
    template = template or ""
    on_lines = [[found.start() for found in label.finditer(template)] for label in LABELED_LINES]
    if all(on_lines):
        answer, reasoning = (places[-1] for places in on_lines)
        return "answer-first" if answer < reasoning else "reasoning-first"
    answers, reasonings = ([found.start() for found in label.finditer(template)] for label in LABELS)
    if answers and reasonings:
        return "answer-first" if answers[0] < reasonings[0] else "reasoning-first"
    return "answer-only" if answers and not MENTION.search(NEGATED.sub("", template)) else None


def choose_format(given: str | None, template: str | None) -> str:
    """The format given, else the one that the template states, else the default."""
    return given or stated_format(template) or DEFAULT_FORMAT


def reasoning_of(text: str) -> str:
    """Only the reasoning of a text, which may be laid out as a response of any format, without white space around it.

    Removed are "Reasoning:" at the beginning, a first line that begins with "Answer:", and all lines from a later
    "Answer:" on.
    """
    text = text.strip()
    first = ANSWER_LINE.match(text)
    if first:
        text = text.partition("\n")[2].strip()
    again = ANSWER_LINE.search(text)
    text = text[: again.start()].strip() if again else text
    opening = REASONING.match(text)
    return text[opening.end() :].strip() if opening else text
