"""Class scores and explanations, if the model may write a reasoning of its own.

There are three cases. Each class has one response: it is scored as a whole, and nothing has to be written. The model
reasons freely after its answer: the answers are scored, and nothing has to be written either. The model reasons before
its answer: its reasoning is written first, greedily, and the answers are scored after it.

B = images, C = classes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlm.classifier.batching import IGNORED, Batch, pad_rows, places
from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.search import TOLERANCE
from vlm.config import lay_out, reasoning_of
from vlm.conversation import before_answer, before_reasoning


@dataclass
class Classified:
    """What is known of a batch of images.

    Attributes:
        scores: (B, C) log-probability of the scored text of each class (vlm/conversation/responses.py), with the
            evidence of the head if it counts.
        unexplored: (B,) how much the probability of a class can be wrong at most.
        reading: of the images and questions; see `VLMClassifier.read`.
        batch: what was read, with the features of the images if it may be read again.
        texts: what the model wrote freely, if its reasoning comes before the answer; else None.
        sums: (B, C) the same as scores, without evidence. evidence: (B, C) logits of the head, None without one
            or without an image.
    """

    scores: Tensor
    unexplored: Tensor
    reading: Any
    batch: Batch
    texts: list[str] | None
    sums: Tensor
    evidence: Tensor | None


@torch.no_grad()
def classify(
    classifier: VLMClassifier,
    batch: Batch,
    tolerance: float = TOLERANCE,
    labels: Sequence[int] | None = None,
) -> Classified:
    """Score the classes of a batch made with `with_response=False`, on the classifier's device.

    Args:
        tolerance, labels: see `VLMClassifier.search`. If only the head counts, a tolerance above 0 leaves texts out.
    """
    prompts, calibration = classifier.prompts, classifier.calibration
    evidence, texts = None, None
    if classifier.head is not None and batch.pixels:
        batch, evidence = classifier.look(batch)
    elif prompts.free:
        batch = classifier.with_features(batch)
    scored = reading = classifier.read(batch)
    if prompts.free and not prompts.answer_first:
        texts = write_freely(classifier, reading)
        begun = [before_answer(classifier.family, classifier.rendered, reasoning_of(text)) for text in texts]
        scored = classifier.read(continue_rows(classifier, batch, begun))
    if tolerance > 0 and not calibration.text:
        sums, unexplored = torch.zeros(len(batch), len(classifier.class_names)), torch.zeros(len(batch))
    else:
        sums, unexplored = classifier.search(scored, tolerance, labels, evidence=evidence)
    scores = sums if evidence is None else calibration.with_evidence(sums, evidence)
    return Classified(scores, unexplored, reading, batch, texts, sums, evidence)


def continue_rows(classifier: VLMClassifier, batch: Batch, begun: Sequence[list[int]]) -> Batch:
    """The batch with the beginning of a response after each question, to be read again.

    Args:
        begun: for each sample the token ids of the beginning.
    """
    device, opening = classifier.device, classifier.rendered.opening_ids
    rows, lengths = batch.input_ids.tolist(), batch.lengths.tolist()
    continued = [row[:length] + more for row, length, more in zip(rows, lengths, begun, strict=True)]
    input_ids = pad_rows([row + opening for row in continued])  # (B, L)
    new_lengths = torch.tensor([len(row) for row in continued])
    new = replace(
        batch,
        input_ids=input_ids,
        targets=torch.full_like(input_ids, IGNORED),
        image_places=places(input_ids == classifier.family.image_token_id),
        lengths=new_lengths,
        prompt_lengths=new_lengths,
        begun=torch.tensor([len(more) for more in begun]),
    )
    return new.to(device)


def write_freely(classifier: VLMClassifier, reading: Any) -> list[str]:
    """The text of each sample without constraint: greedy, to the end of turn or as long as a trained response may
    be."""
    if not classifier.prompts.free:
        return classifier.write(reading)
    longest = max(map(len, classifier.rendered.scored_ids))
    return classifier.write(reading, classifier.prompts.reasoning_tokens + longest)


@torch.no_grad()
def explain(classifier: VLMClassifier, found: Classified, predictions: Sequence[int]) -> list[str]:
    """A text for each sample whose answer is the predicted class, so that the two cannot disagree.

    If each class has one response, it is the response of the predicted class, which is what was scored. Else the
    reasoning is written greedily: after the predicted class, if the answer comes first, or as it was written before
    scoring.
    """
    prompts = classifier.prompts
    if not prompts.free:
        return [prompts.responses[c] for c in predictions]
    texts = found.texts
    if texts is None:
        begun = [before_reasoning(classifier.family, classifier.rendered, c) for c in predictions]
        answered = classifier.read(continue_rows(classifier, found.batch, begun))
        texts = classifier.write(answered, prompts.reasoning_tokens)
    return [
        lay_out(prompts.response_format, reasoning_of(text), prompts.shown_names[c])
        for text, c in zip(texts, predictions, strict=True)
    ]


def names_class(reasoning: str, name: str) -> bool:
    """Whether a text names a class, as whole words in any case: "catfish" does not name "cat"."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", reasoning, re.IGNORECASE) is not None
