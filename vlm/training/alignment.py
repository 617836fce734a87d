"""A connector that was never trained learns the names of the classes before the training (`--align-connector`).

If a model was put together from two halves, its connector is random, and the language model reads noise where the
image should be. A short fine-tuning is over before that has changed. Here only the connector is trained first, in
seconds and without the language model, similar to the first stage of LLaVA (Liu et al. 2023, arXiv 2304.08485). LLaVA
trains it on captions; here the mean of an image's tokens moves towards the embedding of the name of its class. Figures:
docs/experiments.md.

B = images, C = classes, D = width of the language model.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm.common import Bar, note
from vlm.data import Split
from vlm.families import Family, FeatureCache, encode
from vlm.training.setup import Run

STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 400, 32, 1e-3, 0.01
# The loss is multiplied by this: in float16 the gradients of single tokens would underflow. Adam's steps stay the same.
SCALE = 1024.0
# Of the softmax over squared distances, whose unit is the mean squared distance of the names from their mean.
SHARPNESS = 8.0
MOST_CHECKED = 512  # validation images

Autocast = Callable[[], AbstractContextManager[Any]]


def align_connector(run: Run, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Align the connector of a run, equally in all of its processes.

    Args:
        check: called before each step; what it raises ends the run.

    Returns:
        seconds: how long it took.
        validation_accuracy: the share of validation images (of up to 512) that are nearest to the name of their class.
    """
    started = time.monotonic()
    family, names = run.classifier.family, run.classifier.prompts.shown_names
    note("aligning the connector with the names of the classes.")
    align(family, names, run.data.train, run.cache, run.settings.seed, run.accelerator.autocast, check)
    with torch.no_grad():
        for weight in family.connector.state_dict().values():
            weight.copy_(broadcast(weight))  # several processes continue from the same numbers
    with run.accelerator.autocast():
        accuracy = nearest_name_accuracy(family, names, run.data.validation, run.cache)
    note(f"{accuracy:.1%} of the validation images are nearest to the name of their class.")
    return {"seconds": round(time.monotonic() - started, 2), "validation_accuracy": accuracy}


def align(
    family: Family,
    class_names: Sequence[str],
    train: Split,
    cache: FeatureCache | None,
    seed: int = 0,
    autocast: Autocast = nullcontext,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Train only the connector, on the names of the classes. The same arguments give the same weights.

    Args:
        cache: features of images before the connector. Those of other images are computed each time.
        autocast: makes the context of one forward pass; a new one each time, because autocast keeps converted weights.
        check: called before each step.
    """
    names = name_embeddings(family, class_names)
    weights = list(family.connector.parameters())
    trained_later = [p.requires_grad for p in weights]
    family.connector.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, STEPS, pct_start=0.05, cycle_momentum=False
    )
    batches = _batches(len(train), torch.Generator().manual_seed(seed))
    with Bar(STEPS * BATCH_SIZE, "aligning the connector") as bar:
        for _ in range(STEPS):
            check()
            chosen = next(batches)
            with autocast():
                # (B, D) mean tokens and (C, D) names -> (B, C)
                logits = similarities(pooled(family, train, chosen, cache), names)
            labels = torch.tensor([train.labels[i] for i in chosen], device=logits.device)
            (SCALE * cross_entropy(logits, labels)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update(len(chosen))
    for weight, trained in zip(weights, trained_later, strict=True):
        weight.requires_grad_(trained)


@torch.no_grad()
def name_embeddings(family: Family, class_names: Sequence[str]) -> Tensor:
    """(C, D) for each class the mean embedding of its name's tokens, as long as a word's embedding is on average."""
    words = family.model.get_input_embeddings().weight
    ids = [torch.tensor(family.tokenize(f" {name}"), device=words.device) for name in class_names]
    names = torch.stack([words[some].float().mean(0) for some in ids])
    return names * (words.float().norm(dim=-1).mean() / names.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def pooled(family: Family, split: Split, positions: Sequence[int], cache: FeatureCache | None) -> Tensor:
    """(B, D) the mean of each image's tokens after the connector."""
    encoded = encode([split[i] for i in positions], family, cache)
    features = family.image_features({name: tensor.to(family.device) for name, tensor in encoded.inputs.items()})
    counts = [ids.count(family.image_token_id) for ids in encoded.token_ids]
    # (tokens of all images, D) -> (B, D): an image may have any number of tokens
    return torch.stack([one.float().mean(0) for one in features.split(counts)])


def similarities(images: Tensor, names: Tensor) -> Tensor:
    """(B, C) logits: negative squared distances, in units of the mean squared distance of the names from their mean."""
    unit = (names - names.mean(0)).square().sum(-1).mean()
    with torch.autocast(images.device.type, enabled=False):
        # |a - b|^2 = |a|^2 - 2 ab + |b|^2: the differences themselves would be (B, C, D)
        products = images @ names.T  # (B, D) @ (D, C) -> (B, C)
    return -SHARPNESS * (images.square().sum(-1, keepdim=True) - 2 * products + names.square().sum(-1)) / unit


@torch.no_grad()
def nearest_name_accuracy(
    family: Family, class_names: Sequence[str], split: Split, cache: FeatureCache | None
) -> float:
    """Share of images, of up to 512 spread over the split, whose mean token is nearest to the name of their class."""
    names = name_embeddings(family, class_names)
    chosen = torch.linspace(0, len(split) - 1, min(MOST_CHECKED, len(split))).long().tolist()
    found: list[int] = []
    for start in range(0, len(chosen), BATCH_SIZE):
        found += (
            similarities(pooled(family, split, chosen[start : start + BATCH_SIZE], cache), names).argmax(-1).tolist()
        )
    return sum(found[k] == split.labels[i] for k, i in enumerate(chosen)) / max(1, len(chosen))


def _batches(count: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Positions in random orders, one after the other, without end."""
    waiting: list[int] = []
    while True:
        while len(waiting) < BATCH_SIZE:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:BATCH_SIZE]
        waiting = waiting[BATCH_SIZE:]
