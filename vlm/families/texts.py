"""The half of a family that is about text: tokens, chat template, responses, and texts that would disturb them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from vlm.common import UsageError, printable
from vlm.conversation import Prompts, Rendered, scored_texts
from vlm.data import COPY_AGAIN
from vlm.families.processors import chat_text, drops_texts


class FamilyTexts:
    """What an architecture makes of texts; a part of `Family`."""

    end_of_turn: ClassVar[str] = ""

    model: Any
    processor: Any
    tokenizer: Any

    @property
    def image_token(self) -> str:
        """The placeholder of an image in the rendered conversation."""
        return self.processor.image_token

    @property
    def image_token_id(self) -> int:
        """The token whose embedding is replaced by an image feature."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @cached_property
    def control_tokens(self) -> dict[int, str]:
        """The tokens that structure a conversation, by their ids; no text of the user may have one."""
        return {self.image_token_id: self.image_token} | control_tokens(self.tokenizer)

    def control_in(self, text: str) -> str | None:
        """The first control token, or else placeholder of an image, that a text is read as; None if it has none."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return next((self.control_tokens[number] for number in ids if number in self.control_tokens), None) or next(
            iter(self.placeholders_in(text)), None
        )

    def placeholders_in(self, text: str) -> list[str]:
        """The placeholders of an image that a text has, whether or not they are tokens."""
        return [self.image_token] if self.image_token in text else []

    def _is_token(self, text: str) -> bool:
        """Whether the tokenizer has a token that is written like this."""
        return self.tokenizer.convert_tokens_to_ids(text) not in (None, self.tokenizer.unk_token_id)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a text when the model writes."""
        return [self.tokenizer.convert_tokens_to_ids(self.end_of_turn)]

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads."""
        return self.model.config.get_text_config().max_position_embeddings

    def render(self, prompts: Prompts) -> Rendered:
        """Conversation and responses -> token ids.

        Raises:
            UsageError: a text contains a control token.
            UsageError: tokenizer or chat template are not those of the model.
        """
        check_texts(self, prompts)
        missing = [text for text in (self.image_token, self.end_of_turn) if not self._is_token(text)]
        if missing:
            raise UsageError(f"the tokenizer in {self.tokenizer.name_or_path} has no token {missing[0]}. {COPY_AGAIN}")
        opening = self.apply_template(prompts.messages(), add_generation_prompt=True)
        pieces = opening.split(self.image_token)
        if len(pieces) != 2 or any(text.strip() not in opening for text in (prompts.system, prompts.question)):
            raise drops_texts(self.processor)
        check_rendering(self, prompts)
        return self.rendered(prompts, self.tokenize(pieces[0]), self.tokenize(pieces[1]))

    def rendered(self, prompts: Prompts, prefix: list[int], question: list[int]) -> Rendered:
        """Prefix and question (token ids), with the responses of the classes and what is scored of them.

        Raises:
            UsageError: the model does not know a token.
        """
        responses = [self.response_ids(prompts, text) for text in prompts.responses]
        highest = max(max(ids, default=0) for ids in (prefix, question, *responses))
        known = len(self.model.get_input_embeddings().weight)
        if highest >= known:
            raise UsageError(
                f"the tokenizer in {self.tokenizer.name_or_path} is that of another model: it writes token {highest}, "
                f"and the model knows {known}. {COPY_AGAIN}"
            )
        return Rendered(prefix, question, responses, scored_texts(self, prompts, responses), self.max_length, prompts)

    def response_ids(self, prompts: Prompts, text: str) -> list[int]:
        """The tokens of one response to a rendered conversation, end of turn included. Also runs in loader
        processes."""
        return self.tokenize(self.turn(prompts, text))

    def turn(self, prompts: Prompts, text: str) -> str:
        """What the chat template adds to the conversation if it is answered with a text, up to the end of turn."""
        opening = self.apply_template(prompts.messages(), add_generation_prompt=True)
        answered = [*prompts.messages(), {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        turn = self.apply_template(answered, add_generation_prompt=False).removeprefix(opening)
        before, end, _ = turn.rpartition(self.end_of_turn)
        if text not in before:
            raise drops_texts(self.processor)
        return before + end

    def apply_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Messages -> text. Raises UsageError if the chat template is missing or damaged."""
        return chat_text(self.processor, messages, add_generation_prompt)

    def plain_prompt(self, prompts: Prompts) -> dict[str, Any] | None:
        """What the model's processor in transformers has to be given, with an image, to read the same conversation.

        Returns:
            text: with the placeholder of the image. special_tokens: whether the processor adds the tokens that begin
            a text. None if transformers cannot load the model without code of its own.
        """
        return {"text": self.apply_template(prompts.messages(), add_generation_prompt=True), "special_tokens": False}

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int], exact: bool = False) -> str:
        """Token ids -> text; special tokens and white space around it are kept only if it is to be exact."""
        return self.tokenizer.decode(ids) if exact else self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens of a tokenizer by their ids.

    Not among them: the one for unknown characters, which any text may have, and single characters, which some
    tokenizers misuse as padding.
    """
    added = tokenizer.added_tokens_decoder
    return {
        number: token.content
        for number, token in added.items()
        if token.special and len(token.content) > 1 and number != tokenizer.unk_token_id
    }


def check_texts(family: Any, prompts: Prompts) -> None:
    """Check what the user may have given of a conversation.

    Args:
        family: a `Family`.

    Raises:
        UsageError: a text contains a control token, or becomes one in the chat template.
    """
    for what, text, cure in _texts(prompts):
        if token := family.control_in(text):
            raise UsageError(f"{what} contains {token}, a control token of the model. {cure}")


def check_rendering(family: Any, prompts: Prompts) -> None:
    """Check that the texts bring no control token into the conversation, in whatever way the chat template treats them.

    Args:
        family: a `Family` whose `apply_template` takes the messages of any prompts.

    Raises:
        UsageError: the conversation has other control tokens than one of plain words.
    """
    plain = replace(prompts, system="a", question="b")
    found, expected = (
        [token for token in family.tokenize(opening) if token in family.control_tokens]
        for opening in (family.apply_template(one.messages(), add_generation_prompt=True) for one in (prompts, plain))
    )
    if found != expected:
        raise UsageError(
            "your texts become control tokens of the model in its chat template: remove what looks like <...> from "
            "--system-instructions, --prompt-template, --task-description, --class-descriptions, --class-map and "
            "--class-names."
        )


def _texts(prompts: Prompts) -> Iterator[tuple[str, str, str]]:
    """What each text is, the text, and the cure."""
    flag = "--class-map" if prompts.readable_names else "--class-names"
    for name in prompts.shown_names:
        yield f'the class name "{printable(name)}"', name, f"Give another name with {flag}."
    yield "the question", prompts.question, "Remove it from --prompt-template or --task-description."
    for name, response in zip(prompts.shown_names, prompts.responses, strict=True):
        yield f"the response of class {printable(name)}", response, "Remove it from --class-descriptions."
    flags = "--system-instructions, --task-description or --class-descriptions"
    yield "the text before the image", prompts.system, f"Remove it from {flags}."
