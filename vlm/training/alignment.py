"""A connector that was never trained learns the names of the classes before the training: in seconds, without the
language model.

Where a model was put together of two halves, what joins them is random, and the language model sees noise in the place
of images. A short fine-tuning then goes by until it has found out what the vision features say. Here the connector
alone learns that first, as in the first stage of LLaVA (Liu et al. 2023, arXiv 2304.08485). There the language model
reads captions for it; here the mean of an image's tokens becomes most like the embedding of its class's name among
those of all classes. Figures: docs/experiments.md.

B = images, C = classes, D = width of the language model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlm.classifier.batching import encode
from vlm.common.progress import Bar
from vlm.config.settings import Settings
from vlm.data.splits import Split
from vlm.families.base import Family
from vlm.families.features import FeatureCache

SMALLEST_SIDE = 64  # of a matrix that says whether it is random
LARGEST_EXCESS = (
    1.1  # of its largest singular value over that of a random one; trained ones have 1.9 and more (docs/experiments.md)
)
POWERS = 30  # iterations, after which a value that is a tenth above all others is known to a few percent
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 400, 32, 1e-3, 0.01
SCALE = (
    1024.0  # of the loss: in float16 the gradients of single tokens would be too small, and Adam takes the same steps
)
SHARPNESS = (
    8.0  # of the softmax over squared distances, whose unit is the mean squared distance of the names from their middle
)
MOST_CHECKED = 512  # validation images

Autocast = Callable[[], AbstractContextManager[Any]]


@torch.no_grad()
def is_random(part: nn.Module) -> bool:
    """Whether the weights of a part are as they were drawn.

    The largest singular value of an M x N matrix of independent numbers with standard deviation s is about s (sqrt(M) +
    sqrt(N)), whatever they are drawn from (Bai and Yin 1993, doi 10.1214/aop/1176989118); what was learned stands out
    above it. Matrices with a side below 64 say too little: a part with no larger one counts as trained.
    """
    matrices = [
        p.detach().flatten(1).float()
        for p in part.parameters()
        if p.ndim >= 2 and min(p.flatten(1).shape) >= SMALLEST_SIDE
    ]
    for matrix in matrices:
        drawn = matrix.square().mean().sqrt() * (matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5)
        if largest_singular_value(matrix) > LARGEST_EXCESS * drawn:
            return False
    return bool(matrices)


def largest_singular_value(matrix: Tensor) -> Tensor:
    """By power iteration, from below: near for a value that stands out, which is what counts here, and cheap for a
    large matrix."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix.device)
    for _ in range(POWERS):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    return (matrix @ vector).norm()


def needs_alignment(family: Family, settings: Settings) -> bool:
    """Whether the connector is random, the embeddings of words, which it would learn, are not, and the settings leave
    it to us."""
    if settings.no_alignment or settings.tune == "full" or not settings.epochs:
        return False
    return is_random(family.connector) and not is_random(family.model.get_input_embeddings())


def align(
    family: Family,
    class_names: Sequence[str],
    train: Split,
    cache: FeatureCache,
    seed: int = 0,
    autocast: Autocast = nullcontext,
    title: str = "aligning the connector",
) -> None:
    """Train the connector alone on the names of the classes, whether it is frozen afterwards or not.

    The same arguments give the same weights.

    Args:
        cache: the features of all images, from before the connector.
        autocast: the number format of a forward pass. It is entered for each again, since it remembers the weights of
            its first one.
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
    with Bar(STEPS * BATCH_SIZE, title) as bar:
        for _ in range(STEPS):
            chosen = next(batches)
            with autocast():
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


def pooled(family: Family, split: Split, positions: Sequence[int], cache: FeatureCache) -> Tensor:
    """(B, D) the mean of each image's tokens behind the connector."""
    encoded = encode([split[i] for i in positions], family, cache)
    device = next(family.model.parameters()).device
    features = family.image_features({name: tensor.to(device) for name, tensor in encoded.inputs.items()})
    counts = [ids.count(family.image_token_id) for ids in encoded.token_ids]
    return torch.stack([one.float().mean(0) for one in features.split(counts)])


def similarities(images: Tensor, names: Tensor) -> Tensor:
    """(B, C) logits: squared distances, negative, in units of those of the names from their middle."""
    unit = (names - names.mean(0)).square().sum(-1).mean()
    with torch.autocast(images.device.type, enabled=False):
        products = images @ names.T  # the differences themselves would be (B, C, D)
    return -SHARPNESS * (images.square().sum(-1, keepdim=True) - 2 * products + names.square().sum(-1)) / unit


@torch.no_grad()
def nearest_name_accuracy(family: Family, class_names: Sequence[str], split: Split, cache: FeatureCache) -> float:
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
