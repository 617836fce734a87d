"""Scores and texts where the model may write a reasoning of its own, by reading, writing and scoring of a
`VLMClassifier` alone.

Three cases. Each class has one response: it is scored as a whole, and nothing has to be written. The model reasons
freely behind its answer: the answers are scored, and nothing has to be written either. It reasons first: its reasoning
is written, greedily, and the answers are scored behind it. B = batch, C = classes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.classifier.batching import IGNORED, pad_rows, places
from vlm.classifier.classifier import Reading, VLMClassifier
from vlm.classifier.search import TOLERANCE
from vlm.config.formats import lay_out, reasoning_of
from vlm.conversation.responses import before_answer, before_reasoning
from vlm.families.encoded import CONNECTED_FEATURES, beside_images


@dataclass
class Classified:
    """What is known of a batch of images.

    scores: (B, C) log-probability of each class's scored text (see vlm/conversation/responses.py). unexplored: (B,) how
    much the probability of a class can be wrong at most. openings: (B,) log-probability of the tokens that all scored
    texts begin with. reading: of the images and questions. batch: what was read, with the features of the images where
    it may be read again. texts: what the model wrote freely, where its reasoning comes before the answer; else None.
    """

    scores: Tensor
    unexplored: Tensor
    openings: Tensor
    reading: Reading
    batch: dict[str, Any]
    texts: list[str] | None = None


@torch.no_grad()
def classify(
    classifier: VLMClassifier, batch: dict[str, Any], tolerance: float = TOLERANCE, **search: Any
) -> Classified:
    """Score the classes of a batch made with `with_response=False`, on the classifier's device.

    Args:
        tolerance, search: see `VLMClassifier.search`.
    """
    prompts = classifier.prompts
    if prompts.free:
        batch = with_features(classifier, batch)
    reading = classifier.read(batch)
    if prompts.answer_first or not prompts.free:
        return Classified(*classifier.search(reading, tolerance, **search), reading, batch)
    texts = write_freely(classifier, reading)
    begun = [before_answer(classifier.family, classifier.rendered, reasoning_of(text)) for text in texts]
    behind = classifier.read(go_on(classifier, batch, begun))
    return Classified(*classifier.search(behind, tolerance, **search), reading, batch, texts)


def with_features(classifier: VLMClassifier, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with features behind the connector in the place of pixels, so that images that are read twice are seen
    once.

    A model that is driven by its plain forward takes pixels alone: its batch stays as it is.
    """
    if not classifier.family.shares_prefix or not batch["pixels"]:  # a row without an image has none
        return batch
    features = classifier.family.image_features(batch["pixels"])
    return batch | {"pixels": beside_images(batch["pixels"]) | {CONNECTED_FEATURES: features}}


def go_on(classifier: VLMClassifier, batch: dict[str, Any], begun: Sequence[list[int]]) -> dict[str, Any]:
    """The batch with the beginning of a response (token ids) behind the question of each sample, to be read again.

    begun: (B,) how many of a row's last tokens are the response's, for a model that reads the prompt in both
    directions.
    """
    device, opening = batch["input_ids"].device, classifier.rendered.opening_ids
    prompts = [ids[:n] for ids, n in zip(batch["input_ids"].tolist(), batch["lengths"].tolist(), strict=True)]
    input_ids = pad_rows([prompt + more + opening for prompt, more in zip(prompts, begun, strict=True)])
    return batch | {
        "input_ids": input_ids.to(device),
        "targets": torch.full_like(input_ids, IGNORED).to(device),
        "image_places": places(input_ids == classifier.family.image_token_id).to(device),
        "lengths": torch.tensor(
            [len(prompt) + len(more) for prompt, more in zip(prompts, begun, strict=True)], device=device
        ),
        "begun": torch.tensor([len(more) for more in begun], device=device),
    }


def write_freely(classifier: VLMClassifier, reading: Reading) -> list[str]:
    """The text of each sample with no constraint: greedy, to the end of turn or as long as a trained response may
    be."""
    prompts = classifier.prompts
    limit = prompts.reasoning_tokens + max(map(len, classifier.rendered.scored_ids)) if prompts.free else None
    return classifier.write(reading, limit)


@torch.no_grad()
def explain(classifier: VLMClassifier, found: Classified, predictions: Sequence[int]) -> list[str]:
    """A text for each sample whose answer is the predicted class, so that the two cannot disagree.

    Where each class has one response, it is that of the predicted class, which is what was scored: no other response
    was trained. Else the reasoning is written greedily: behind the predicted class, where the answer comes first, or as
    it was written before scoring.
    """
    prompts = classifier.prompts
    if not prompts.free:
        return [prompts.responses[c] for c in predictions]
    texts = found.texts
    if texts is None:
        begun = [before_reasoning(classifier.family, classifier.rendered, c) for c in predictions]
        texts = classifier.write(classifier.read(go_on(classifier, found.batch, begun)), prompts.reasoning_tokens)
    return [
        lay_out(prompts.response_format, reasoning_of(text), prompts.class_names[c])
        for text, c in zip(texts, predictions, strict=True)
    ]


def names_class(reasoning: str, name: str) -> bool:
    """Whether a class is named in a text, as whole words in any case: "catfish" does not name "cat"."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", reasoning, re.IGNORECASE) is not None
