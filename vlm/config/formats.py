"""In which order reasoning and answer stand: the response formats, and what a question template says about them."""

import re

DEFAULT_FORMAT = "reasoning-first"
# "Answer: " stands in every format, so that one rule reads all texts, and a class name always follows the same tokens.
LAYOUTS = {
    "reasoning-first": "Reasoning: {reasoning}\nAnswer: {answer}",
    "answer-first": "Answer: {answer}\nReasoning: {reasoning}",
    "answer-only": "Answer: {answer}",
}
ANSWER_LINE = re.compile(r"^[ \t]*answer[ \t]*:", re.IGNORECASE | re.MULTILINE)
REASONING = re.compile(r"reasoning[ \t]*:", re.IGNORECASE)
# What a user's template may call them, at the beginning of a line, behind "1." or "- **", or anywhere.
_WORDS = r"(?:reasoning|reasons?|explanations?|rationale|justification|why|observations?|description|analysis|thoughts?|thinking|evidence)"
_LINE = r"^[^\w\n]*(?:\d+[.)][^\w\n]*)?"
LABELED_LINES = tuple(re.compile(rf"{_LINE}(?:\w+ )?{word}\W{{0,3}}:", re.I | re.M) for word in ("answer", _WORDS))
LABELS = tuple(re.compile(rf"{word}[ \t]*:", re.I) for word in ("answer", _WORDS))
NEGATED = re.compile(r"\b(?:do not|don't|never|without|no)\b(?: \w+){0,2} (?:expla|reason|describ|justif)\w*", re.I)
MENTION = re.compile(r"reason|expla|why|because|descri|justif|rational|observ|analy|think|thought|step by step", re.I)


def lay_out(response_format: str, reasoning: str, answer: str) -> str:
    """One response, or what the question shows of it. Braces in the texts are left alone."""
    return LAYOUTS[response_format].format(reasoning=reasoning, answer=answer)


def stated_format(template: str | None) -> str | None:
    """The format that a question template asks for, or None where it asks for none.

    "Reasoning:", or a word like it, and "Answer:" state an order: the last ones that begin a line, else the first ones
    anywhere. "Answer:" alone states that there is no reasoning, if no word of it is found at all but to exclude it.
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
    """The reasoning alone, of a text that may be laid out as a response, whatever its format; white space around it is
    dropped.

    A "Reasoning:" at the beginning goes, and all lines from one that begins with "Answer:", or, where that is the first
    line, this line.
    """
    text = text.strip()
    first = ANSWER_LINE.match(text)
    if first:
        text = text.partition("\n")[2].strip()
    again = ANSWER_LINE.search(text)
    text = text[: again.start()].strip() if again else text
    opening = REASONING.match(text)
    return text[opening.end() :].strip() if opening else text
