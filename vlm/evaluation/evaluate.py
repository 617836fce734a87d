"""Class log-probabilities of a whole split, and the metrics that follow. N = images, C = classes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Subset

from vlm.classifier.calibration import Scores
from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.reasoning import classify, explain, names_class, write_freely
from vlm.classifier.search import TOLERANCE
from vlm.common.modes import evaluation_mode
from vlm.common.progress import progress
from vlm.config.formats import reasoning_of
from vlm.conversation.prompts import parse_answer
from vlm.data.splits import Split
from vlm.evaluation.metrics import classification_metrics, user_metrics

TEXTS = 32  # images whose text is generated in a test evaluation


def score_split(
    classifier: VLMClassifier,
    split: Split,
    batch_size: int = 8,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    description: str = "evaluating",
    tolerance: float = TOLERANCE,
) -> Scores:
    """The sums of N samples (log-probability of each class's scored text, see vlm/conversation/responses.py) and their
    openings, on the CPU.

    Args:
        indices: these samples only.
        tolerance: see `VLMClassifier.search`; 0 makes every number exact. That of the true class always is.
    """
    samples = split if indices is None else Subset(split, indices)
    if not len(samples):
        return Scores(torch.empty(0, len(classifier.class_names)), torch.empty(0))
    loader = DataLoader(
        samples,
        batch_size,
        collate_fn=classifier.collate(with_response=False),
        num_workers=workers,
        generator=torch.Generator(),
    )
    parts = []
    with evaluation_mode(classifier), torch.no_grad():
        for batch in progress(loader, len(samples), description, count=_images):
            labels = batch["labels"].tolist()
            found = classify(classifier, send_to_device(batch, classifier.device), tolerance, labels=labels)
            parts.append((found.scores.cpu(), found.openings.cpu()))
    return Scores(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _images(batch: dict[str, Any]) -> int:
    return len(batch["labels"])


def evaluate_vlm_model(
    classifier: VLMClassifier,
    split: Split,
    batch_size: int = 8,
    metrics: Sequence[Callable[..., Any]] = (),
    workers: int = 0,
    description: str = "evaluating",
) -> dict[str, Any]:
    """Metrics of a model on a split, each image counted by exact match of its most probable class.

    Args:
        metrics: own metrics, each called with labels (N,), predictions (N,), probabilities (N, C) and the class names.

    Returns:
        accuracy, macro_f1, weighted_f1, per_class, confusion_matrix, nll (of the class, nats, with the model's
        calibration), loss (cross
        entropy of a scored token, nats: of the whole response where each class has one, else of the answer), and the
            results of own
        metrics under "own_metrics".
    """
    scores = score_split(classifier, split, batch_size, workers=workers, description=description)
    return metrics_of_scores(classifier, split.labels, scores, metrics)


def metrics_of_scores(
    classifier: VLMClassifier, labels: Sequence[int], scores: Scores, metrics: Sequence[Callable[..., Any]] = ()
) -> dict[str, Any]:
    """What `evaluate_vlm_model` returns, from what `score_split` gave."""
    truth = torch.as_tensor(list(labels))
    log_probabilities = classifier.calibration.log_probabilities(*scores).numpy()
    names = list(classifier.class_names)
    result = classification_metrics(truth.numpy(), log_probabilities, names)
    response = scores.sums.gather(1, truth.unsqueeze(1)).sum()
    result["loss"] = float(-response / classifier.tree.lengths[truth.numpy()].sum())
    if metrics:
        probabilities = np.exp(log_probabilities)
        result["own_metrics"] = user_metrics(metrics, truth.numpy(), probabilities.argmax(-1), probabilities, names)
    return result


def check_texts(classifier: VLMClassifier, split: Split, batch_size: int = 8, count: int = TEXTS) -> dict[str, Any]:
    """Generate the text of a few images, freely, and compare its answer with the prediction.

    Returns:
        texts: how many. invalid: free texts whose answer is no class name, which are never counted as a class.
            agree_with_prediction: free
        texts that answer with the predicted class. reasoning_names_answer: free texts whose reasoning names the class
        that they answer with; None in a format without reasoning. explanations_agree: texts of `explain` that answer
        with the predicted class: all.
    """
    chosen = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist()
    loader = DataLoader(
        Subset(split, chosen),
        batch_size,
        collate_fn=classifier.collate(with_response=False),
        generator=torch.Generator(),
    )
    prompts = classifier.prompts
    predictions, free, constrained = [], [], []
    with evaluation_mode(classifier):
        for batch in progress(loader, len(chosen), "writing texts", count=_images):
            batch = send_to_device(batch, classifier.device)
            found = classify(classifier, batch)
            best = classifier.calibration.log_probabilities(found.scores, found.openings).argmax(-1).tolist()
            predictions += [classifier.class_names[i] for i in best]
            free += write_freely(classifier, found.reading) if found.texts is None else found.texts
            constrained += explain(classifier, found, best)
    answers, explained = (
        [parse_answer(text, prompts.class_names, prompts.response_format) for text in texts]
        for texts in (free, constrained)
    )
    named = [
        answer is not None and names_class(reasoning_of(text), answer)
        for text, answer in zip(free, answers, strict=True)
    ]
    return {
        "texts": len(answers),
        "invalid": sum(answer is None for answer in answers),
        "agree_with_prediction": sum(
            answer == prediction for answer, prediction in zip(answers, predictions, strict=True)
        ),
        "reasoning_names_answer": None if prompts.response_format == "answer-only" else sum(named),
        "explanations_agree": sum(
            answer == prediction for answer, prediction in zip(explained, predictions, strict=True)
        ),
    }


def explanations(
    classifier: VLMClassifier, split: Split, indices: Sequence[int], answers: Sequence[int], batch_size: int = 8
) -> list[str]:
    """The text of some images of a split.

    Args:
        answers: the class that each text answers with, the prediction: in a batch of other images two classes that are
            as probable might change places by rounding.
    """
    loader = DataLoader(
        Subset(split, indices),
        batch_size,
        collate_fn=classifier.collate(with_response=False),
        generator=torch.Generator(),
    )
    texts: list[str] = []
    with evaluation_mode(classifier):
        for batch in progress(loader, len(indices), "writing explanations", count=_images):
            batch = send_to_device(batch, classifier.device)
            found = classify(classifier, batch)
            texts += explain(classifier, found, list(answers[len(texts) : len(texts) + _images(batch)]))
    return texts
