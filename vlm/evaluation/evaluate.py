"""Class log-probabilities of a whole split, and what follows from them: metrics, texts, explanations.

N = images, C = classes.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import eq
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from vlm.classifier import TOLERANCE, Batch, VLMClassifier, classify, explain, names_class, write_freely
from vlm.common import evaluation_mode, with_bar
from vlm.config import reasoning_of
from vlm.conversation import parse_answer
from vlm.data import Sample, Split
from vlm.evaluation.metrics import classification_metrics, user_metrics
from vlm.families import FeatureCache

TEXTS = 32  # images whose text is written in a test


class Parts(NamedTuple):
    """What the scores of a split are made of: sums and evidence, both (N, C); evidence is None without a head."""

    sums: Tensor
    evidence: Tensor | None


def score_split(
    classifier: VLMClassifier,
    split: Split | Sequence[Sample],
    batch_size: int = 8,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    description: str = "evaluating",
    tolerance: float = TOLERANCE,
    cache: FeatureCache | None = None,
) -> Tensor:
    """(N, C) log-probability of the scored text of each class (vlm/conversation/responses.py), with the evidence of the
    head if it counts, on the CPU.

    Args:
        indices: only these samples.
        tolerance: see `VLMClassifier.search`; 0 makes every number exact. That of the true class is always exact.
        cache: features that take the place of pixels.

    An image that turns out to be unreadable has a row without a meaning; the split knows it from then on
    (`Split.faults`).
    """
    parts = score_parts(classifier, split, batch_size, indices, workers, description, tolerance, cache)
    return classifier.calibration.with_evidence(*parts)


def score_parts(
    classifier: VLMClassifier,
    split: Split | Sequence[Sample],
    batch_size: int = 8,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    description: str = "evaluating",
    tolerance: float = TOLERANCE,
    cache: FeatureCache | None = None,
) -> Parts:
    """Sums and evidence of a split from the same pass; see `score_split`."""
    samples: Any = split if indices is None else _some(split, indices)
    if not len(samples):
        none = torch.empty(0, len(classifier.class_names))
        return Parts(none, None if classifier.head is None else none.double())
    sums: list[Tensor] = []
    evidence: list[Tensor] = []
    positions = range(len(split)) if indices is None else indices
    done = 0
    for batch in _batches(classifier, samples, batch_size, description, workers, cache):
        if isinstance(split, Split):
            for row, fault in batch.faults.items():
                split.leave_out(positions[done + row], fault)
        done += len(batch)
        found = classify(classifier, batch, tolerance, batch.labels.tolist())
        sums.append(found.sums.cpu())
        if found.evidence is not None:
            evidence.append(found.evidence)
    return Parts(torch.cat(sums), torch.cat(evidence) if evidence else None)


def split_losses(
    classifier: VLMClassifier,
    split: Split,
    batch_size: int,
    indices: Sequence[int],
    workers: int = 0,
    cache: FeatureCache | None = None,
) -> Tensor:
    """What the training minimizes, on some samples of a split, so that both can be compared.

    Returns:
        (2, 2) float64 on the CPU: the summed loss of response tokens and how many there are; the summed loss of classes
        and how many images there are. Zeros for the part that is not trained.
    """
    sums = torch.zeros(2, 2, dtype=torch.float64)
    objective = classifier.objective
    samples = _some(split, indices)
    for batch in _batches(classifier, samples, batch_size, "validation loss", workers, cache, objective.has_response):
        found = classifier(batch)
        if objective.has_response:
            sums[0] += torch.tensor([float(found.loss), found.tokens], dtype=torch.float64)
        if found.posterior is not None:
            sums[1] += torch.tensor([float(found.posterior), len(batch) - len(batch.faults)], dtype=torch.float64)
    return sums


def _some(split: Split | Sequence[Sample], indices: Sequence[int]) -> Dataset[Sample]:
    """Some samples of a split, for a loader."""
    return Subset(cast("Dataset[Sample]", split), indices)


def _batches(
    classifier: VLMClassifier,
    samples: Any,
    batch_size: int,
    description: str,
    workers: int = 0,
    cache: FeatureCache | None = None,
    with_response: bool = False,
) -> Iterator[Batch]:
    """Batches on the classifier's device, while it is in evaluation mode, with a progress bar."""
    collate = classifier.collate(with_response, cache)
    loader = DataLoader(samples, batch_size, collate_fn=collate, num_workers=workers, generator=torch.Generator())
    with evaluation_mode(classifier), torch.no_grad():
        for batch in with_bar(loader, len(samples), description, count=len):
            yield batch.to(classifier.device)


def evaluate_vlm_model(
    classifier: VLMClassifier,
    split: Split,
    batch_size: int = 8,
    metrics: Sequence[Callable[..., Any]] = (),
    workers: int = 0,
    description: str = "evaluating",
) -> dict[str, Any]:
    """Metrics of a model on a split. An image counts as right only if its most probable class is its label.

    Args:
        metrics: own metrics, each called with labels (N,), predictions (N,), probabilities (N, C) and the class names.

    Returns:
        accuracy, macro_f1, weighted_f1, per_class, confusion_matrix.
        nll: of the class, in nats, with the model's calibration.
        loss: cross entropy of a scored token, in nats: of the whole response if each class has one, else of the answer.
        own_metrics: the results of own metrics, if there are any.
    """
    parts = score_parts(classifier, split, batch_size, workers=workers, description=description)
    sums, kept = classifier.calibration.with_evidence(*parts), split.readable
    return metrics_of_sums(classifier, [split.labels[i] for i in kept], sums[kept], metrics, parts.sums[kept])


def metrics_of_sums(
    classifier: VLMClassifier,
    labels: Sequence[int],
    sums: Tensor,
    metrics: Sequence[Callable[..., Any]] = (),
    text_sums: Tensor | None = None,
) -> dict[str, Any]:
    """What `evaluate_vlm_model` returns, from the (N, C) result of `score_split`.

    Args:
        text_sums: (N, C) the same without evidence; default: there is none in them.
    """
    truth = torch.as_tensor(list(labels))
    log_probabilities = classifier.calibration.log_probabilities(sums).numpy()
    names = list(classifier.class_names)
    result = classification_metrics(truth.tolist(), log_probabilities, names)
    of_labels = (sums if text_sums is None else text_sums).gather(1, truth.unsqueeze(1)).sum()  # (N, C) -> (N, 1) -> ()
    result["loss"] = float(-of_labels / classifier.tree.lengths[truth.numpy()].sum())
    if metrics:
        probabilities = np.exp(log_probabilities)
        result["own_metrics"] = user_metrics(metrics, truth.numpy(), probabilities.argmax(-1), probabilities, names)
    return result


def check_texts(
    classifier: VLMClassifier,
    split: Split,
    batch_size: int = 8,
    count: int = TEXTS,
    cache: FeatureCache | None = None,
) -> dict[str, Any]:
    """Let the model write the text of a few images freely, and compare its answer with the prediction.

    Returns:
        texts: how many.
        invalid: texts whose answer is no class name; they are never counted as a class.
        agree_with_prediction: texts that answer with the predicted class.
        reasoning_names_answer: texts whose reasoning names the class that they answer with; None in a format without
            reasoning.
    """
    chosen = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist()
    prompts = classifier.prompts
    predictions: list[str] = []
    texts: list[str] = []
    for batch in _batches(classifier, _some(split, chosen), batch_size, "writing texts", cache=cache):
        found = classify(classifier, batch)
        best = classifier.calibration.log_probabilities(found.scores).argmax(-1).tolist()
        predictions += [prompts.shown_names[i] for i in best]
        texts += write_freely(classifier, found.reading) if found.texts is None else found.texts
    answers = [parse_answer(text, prompts.shown_names, prompts.response_format) for text in texts]
    return {
        "texts": len(texts),
        "invalid": answers.count(None),
        "agree_with_prediction": sum(map(eq, answers, predictions)),
        "reasoning_names_answer": None if prompts.response_format == "answer-only" else _named(texts, answers),
    }


def _named(texts: Sequence[str], answers: Sequence[str | None]) -> int:
    """How many texts name their answer in their reasoning."""
    pairs = zip(texts, answers, strict=True)
    return sum(answer is not None and names_class(reasoning_of(text), answer) for text, answer in pairs)


def explanations(
    classifier: VLMClassifier,
    split: Split,
    indices: Sequence[int],
    answers: Sequence[int],
    batch_size: int = 8,
    cache: FeatureCache | None = None,
) -> list[str]:
    """A text for some images of a split.

    Args:
        indices: which images.
        answers: for each its prediction, which the text answers with. It is given, because in a batch with other images
            two equally probable classes may change places by rounding.
    """
    texts: list[str] = []
    for batch in _batches(classifier, _some(split, indices), batch_size, "writing explanations", cache=cache):
        found = classify(classifier, batch)
        texts += explain(classifier, found, list(answers[len(texts) : len(texts) + len(batch)]))
    return texts
