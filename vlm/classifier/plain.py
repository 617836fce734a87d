"""The plain full forward: for a model whose parts the shared prefix does not fit, and to check that it does. Exact, and
slow.

B = batch, K = tokens of a whole sequence, V = vocabulary, C = classes. Here the rows of a batch are whole sequences:
prefix included.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.classifier.batching import IGNORED


def whole_rows(classifier: Any, batch: dict[str, Any], lengths: str = "lengths") -> list[list[int]]:
    """The token ids of each sample, prefix included, without padding.

    Args:
        lengths: what of the batch says where each row ends.
    """
    prefix = classifier.rendered.prefix_ids
    return [prefix + row[:length].tolist() for row, length in zip(batch["input_ids"], batch[lengths], strict=True)]


def begun_responses(batch: dict[str, Any]) -> list[int]:
    """How many tokens at the end of each row are a response that was begun (see `vlm.classifier.reasoning.go_on`)."""
    return batch["begun"].tolist() if "begun" in batch else [0] * len(batch["lengths"])


def run(classifier: Any, rows: list[list[int]], responses: list[int], pixels: dict[str, Tensor]) -> Tensor:
    """(B, K, V) by transformers' own forward. `responses`: how many tokens at the end of each row are the response."""
    device = classifier.device
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    places = torch.arange(ids.shape[1], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
    starts = lengths - torch.tensor(responses, device=device).unsqueeze(1)
    return classifier.family.full_logits(ids, places < lengths, (places >= starts) & (places < lengths), pixels)


def loss(classifier: Any, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """Summed loss of the response tokens, and their number, of a batch made with responses."""
    counts = (batch["targets"] != IGNORED).sum(1).tolist()
    rows = whole_rows(classifier, batch)
    logits = run(classifier, rows, counts, batch["pixels"])
    total = logits.new_zeros(())
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        end = len(row)
        targets = torch.tensor(row[end - count :], device=logits.device)
        total = total + classifier.objective.of_tokens(
            logits[i, end - count - 1 : end - 1], targets, batch["labels"][i].expand(count)
        )
    return total, sum(counts)


def log_probabilities(logits: Tensor, row: list[int], count: int) -> Tensor:
    """Log-probability of the last `count` tokens of a row, from its (K, V) logits."""
    end = len(row)
    predicted = logits[end - count - 1 : end - 1].log_softmax(-1)
    return predicted.gather(
        1, torch.tensor(row[end - count :], dtype=torch.long, device=logits.device).unsqueeze(1)
    ).sum()


@torch.no_grad()
def score_opening(classifier: Any, batch: dict[str, Any]) -> Tensor:
    """(B,) log-probability of the tokens that all scored texts begin with, of a batch made without responses."""
    prompts, opening = whole_rows(classifier, batch), classifier.rendered.opening_ids
    if not opening:
        return torch.zeros(len(prompts))
    rows = [prompt + opening for prompt in prompts]
    logits = run(classifier, rows, [count + len(opening) for count in begun_responses(batch)], batch["pixels"])
    return torch.stack([log_probabilities(logits[i], row, len(opening)) for i, row in enumerate(rows)])


@torch.no_grad()
def score(classifier: Any, batch: dict[str, Any], classes: range | None = None) -> Tensor:
    """(B, C) log-probability of each class's scored text, by `scores`, of a batch made without responses."""
    responses = [classifier.rendered.scored_ids[c] for c in classes or range(len(classifier.class_names))]
    return scores(classifier, whole_rows(classifier, batch), begun_responses(batch), responses, batch["pixels"])


def scores_in_training(classifier: Any, batch: dict[str, Any]) -> Tensor:
    """(B, C) the scores that the objective is about, with gradients, of a batch made with or without responses."""
    prompts = whole_rows(classifier, batch, "prompts")
    counts = (batch["targets"] != IGNORED).sum(1)
    begun = (
        (counts - (batch["lengths"] - batch["prompts"])).clamp(min=0).tolist()
    )  # of a response whose answer comes last
    responses = classifier.rendered.scored_ids
    if classifier.objective.has_response:  # see vlm/classifier/objective.py
        responses = [ids[:count] for ids, count in zip(responses, classifier.tree.parted, strict=True)]
    return scores(classifier, prompts, begun, responses, batch["pixels"])


def scores(
    classifier: Any, prompts: list[list[int]], begun: list[int], responses: list[list[int]], pixels: dict[str, Tensor]
) -> Tensor:
    """(B, number of responses) log-probability of each response behind each prompt. Those that differ in their last
    token alone take one forward.

    Args:
        begun: how many tokens at the end of each prompt are the response already.
    """
    stems: dict[tuple[int, ...], list[int]] = {}
    for number, response in enumerate(responses):
        stems.setdefault(tuple(response[:-1]), []).append(number)
    columns: dict[int, Tensor] = {}
    for stem, numbers in stems.items():
        rows = [prompt + list(stem) for prompt in prompts]
        logits = run(classifier, rows, [count + len(stem) for count in begun], pixels)
        last = torch.tensor([responses[number][-1] for number in numbers], device=logits.device)
        found = [
            log_probabilities(logits[i], row, len(stem)) + logits[i, len(row) - 1].log_softmax(-1)[last]
            for i, row in enumerate(rows)
        ]
        columns |= dict(zip(numbers, torch.stack(found).unbind(1), strict=True))
    return torch.stack([columns[number] for number in range(len(responses))], dim=1)


@torch.no_grad()
def write(classifier: Any, batch: dict[str, Any], limit: int) -> list[str]:
    """Greedy text of each sample, by one full forward a token, of a batch made without responses."""
    rows, begun = whole_rows(classifier, batch), begun_responses(batch)
    written: list[list[int]] = [[] for _ in rows]
    stops = set(classifier.family.stop_ids)
    for _ in range(limit):
        counts = [count + len(new) for count, new in zip(begun, written, strict=True)]
        logits = run(classifier, [row + new for row, new in zip(rows, written, strict=True)], counts, batch["pixels"])
        for i, new in enumerate(written):
            if not stops.intersection(new[-1:]):
                new.append(int(logits[i, len(rows[i]) + len(new) - 1].argmax()))
        if all(new[-1] in stops for new in written):
            break
    return [classifier.family.decode(new) for new in written]
