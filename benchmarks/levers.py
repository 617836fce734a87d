#!/usr/bin/env python3
"""What each lever of this program contributes: the work with one of them switched off against the work with all.

python benchmarks/levers.py --output benchmarks/results/levers.json

Every lever is exact, so that loss or probabilities, or for the optimizer the update of the weights, are compared in the
same run. To add one: a function in `TRAINING` or `SCORING` that switches it off in the object it is given, as a context
manager.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import common
import torch
import workload
from torch import Tensor, nn
from train_vs_trl import BATCH_SIZES

from vlm.classifier import IGNORED, Batch, VLMClassifier
from vlm.classifier.forward import LossOutput, Scored
from vlm.classifier.prefix import expand, in_front
from vlm.classifier.search import Reading
from vlm.data import Sample, open_image
from vlm.training.tuning import trained_parameters

# of loss and update, relative; of probabilities, absolute and three times that, as the search may leave out 1e-4
TOLERANCE = 1e-4
FUSED = "fused optimizer"
Lever = Callable[[Any], Any]


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object has another value inside."""
    own, before = name in vars(target), getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before) if own else delattr(target, name)


def _embeddings(classifier: VLMClassifier, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embeddings (B, P + L, D) of whole rows, prefix included, and their targets."""
    family, rows = classifier.family, batch.input_ids
    prefix = torch.tensor([classifier.rendered.prefix_ids]).expand(len(rows), -1)
    ids = torch.cat([prefix, rows], dim=1)
    places = (ids == family.image_token_id).unsqueeze(-1)
    embeddings = family.embed(ids).masked_scatter(places, family.image_features(batch.pixels))
    return embeddings, torch.cat([torch.full_like(prefix, IGNORED), batch.targets], dim=1)


def without_shared_prefix(ours: workload.OurTraining) -> Any:
    """The prefix runs in every row; logits at the response only, as before."""
    classifier = ours.classifier

    def forward(batch: Batch, **_: Any) -> LossOutput:
        embeddings, targets = _embeddings(classifier, batch)
        hidden = classifier.family.run_language(embeddings, torch.arange(embeddings.shape[1]).unsqueeze(0))
        in_loss = targets[:, 1:] != IGNORED
        logits = classifier.family.logits(hidden[:, :-1][in_loss])
        return LossOutput(
            nn.functional.cross_entropy(logits, targets[:, 1:][in_loss], reduction="sum"), int(in_loss.sum())
        )

    return replaced(classifier, "forward", forward)


def without_response_logits(ours: workload.OurTraining) -> Any:
    """Logits at every place of the rows, of which most are thrown away; the prefix shared, as before."""
    classifier = ours.classifier

    def forward(batch: Batch, **_: Any) -> LossOutput:
        hidden, _ = classifier.strategy.run_rows(batch, in_front(classifier.strategy.run_prefix()))
        logits, targets = classifier.family.logits(hidden[:, :-1]), batch.targets[:, 1:]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return LossOutput(loss, int((targets != IGNORED).sum()))

    return replaced(classifier, "forward", forward)


@contextmanager
def without_fused_optimizer(ours: workload.OurTraining) -> Iterator[None]:
    """AdamW as a loop over the parameters."""
    groups = ours.run.optimizer.param_groups
    before = [(group["fused"], group["foreach"]) for group in groups]
    for group in groups:
        group["fused"], group["foreach"] = False, False
    try:
        yield
    finally:
        for group, (fused, foreach) in zip(groups, before, strict=True):
            group["fused"], group["foreach"] = fused, foreach


TRAINING: dict[str, Lever] = {
    "shared prefix": without_shared_prefix,
    "logits only at the response": without_response_logits,
    FUSED: without_fused_optimizer,
}


@contextmanager
def without_kept_prefix(classifier: VLMClassifier) -> Iterator[None]:
    """The prefix is read again for each batch."""
    read = classifier.read

    def forgetful(batch: dict[str, Any]) -> Any:
        classifier.eval()  # forgets the prefix
        return read(batch)

    with replaced(classifier, "read", forgetful):
        yield


def without_search(classifier: VLMClassifier) -> Any:
    """The whole label tree is visited."""
    return replaced(classifier, "search", partial(classifier.search, tolerance=0.0))


def without_label_tree(classifier: VLMClassifier) -> Any:
    """One pass a class over the same cache, its response scored token by token."""

    def search(reading: Reading) -> Scored:
        columns = [_log_probability(classifier, reading, response) for response in classifier.rendered.scored_ids]
        nothing = torch.zeros(len(reading.states))
        return Scored(torch.stack(columns, dim=1), nothing)

    return replaced(classifier, "search", torch.no_grad()(search))


def _log_probability(classifier: VLMClassifier, reading: Reading, response: list[int]) -> Tensor:
    """(B,) of one response. What all responses begin with was read with the prompt."""
    family, begun = classifier.family, reading.states.shape[1] - 1
    ids = torch.tensor([response]).expand(len(reading.states), -1)
    rest = ids[:, begun:-1]
    places = torch.arange(begun, len(response) - 1)
    causal = torch.ones(len(places), len(places), dtype=torch.bool).tril().expand(len(ids), -1, -1)
    mask = torch.cat([reading.seen_opening.unsqueeze(1).expand(-1, len(places), -1), causal], dim=-1).unsqueeze(1)
    positions = family.text_positions(reading.next_position.unsqueeze(1) + places)
    states = family.run_language(family.embed(rest), positions, expand(reading.cache, len(ids)), mask)
    logits = family.logits(torch.cat([reading.states, states], dim=1))
    return -nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").sum(1)


@contextmanager
def without_features(classifier: VLMClassifier) -> Iterator[None]:
    """Every image is new."""
    with replaced(
        classifier, "collate", lambda with_response, cache=None: VLMClassifier.collate(classifier, with_response)
    ):
        yield


SCORING: dict[str, Lever] = {
    "feature cache": without_features,
    "prefix kept between batches": without_kept_prefix,
    "best-first search of the tree": without_search,
    "label tree": without_label_tree,
}


def update_difference(ours: workload.OurTraining) -> float:
    """How far the update of the weights without the fused optimizer is from the one with it, relative, from the same
    gradients."""
    gradients = ours.examine()[2]
    with without_fused_optimizer(ours):
        plain = update(ours, gradients)
    return workload.relative_difference(plain, update(ours, gradients))


def update(ours: workload.OurTraining, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first update changes of the trained weights, given the gradients; it is undone.

    The learning rate is 1 here, so that little of the update is lost in the rounding of the weights. The next step sets
    its own.
    """
    parameters, optimizer = trained_parameters(ours.classifier.model), ours.run.optimizer
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    changes = {name: parameter.detach() - before[name] for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    return changes


def train(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a lever of training."""
    batch_size = options.batch_size or BATCH_SIZES[options.size]["lora"]
    ours = workload.OurTraining(options, "lora", batch_size, cached=True, lora_dropout=0.0, weight_decay=0.0)
    uncached = workload.OurTraining(options, "lora", batch_size, cached=False, lora_dropout=0.0, weight_decay=0.0)
    samples = ours.samples(list(range(batch_size)))

    def loss(side: workload.OurTraining, lever: Lever) -> float:
        with lever(side), torch.no_grad():
            return float(side.classifier(side.classifier.collate(with_response=True)(samples)).loss)

    def off(side: workload.OurTraining, lever: Lever) -> Callable[[], None]:
        def work() -> None:
            with lever(side):
                side.step()

        return work

    cases = {"feature cache": (uncached, lambda _: nullcontext())} | {
        name: (ours, lever) for name, lever in TRAINING.items()
    }
    whole = loss(ours, lambda _: nullcontext())
    differences = {name: abs(loss(*case) - whole) / whole for name, case in cases.items()}
    differences[FUSED] = update_difference(ours)  # the loss knows nothing of it
    seconds = common.take_turns(
        {"all": ours.step, **{name: off(*case) for name, case in cases.items()}}, options.rounds
    )
    return [row("train, lora", name, seconds, differences[name], TOLERANCE) for name in cases]


def score(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a lever of scoring."""
    batch_size = options.batch_size or BATCH_SIZES[options.size]["lora"]
    files = workload.image_files(options, batch_size)
    samples = [Sample(open_image(file), 0, str(file)) for file in files]
    classifier = workload.classifier(options, options.classes, peaked=True)
    cache = workload.keep_features(classifier, samples)

    def work(lever: Lever = lambda _: nullcontext()) -> Tensor:
        with lever(classifier):
            reading = classifier.read(classifier.collate(with_response=False, cache=cache)(samples))
            return classifier.search(reading).scores.softmax(-1)

    whole = work()
    differences = {name: float((work(lever) - whole).abs().max()) for name, lever in SCORING.items()}
    sides = {"all": work, **{name: (lambda lever=lever: work(lever)) for name, lever in SCORING.items()}}
    seconds = common.take_turns(sides, options.rounds)
    return [
        row(f"score, {options.classes} classes", name, seconds, differences[name], 3 * TOLERANCE) for name in SCORING
    ]


def row(work: str, name: str, seconds: dict[str, list[float]], difference: float, tolerance: float) -> dict[str, Any]:
    """What one lever brings."""
    return {
        **common.ratio(seconds[name], seconds["all"]),
        "work": work,
        "switched off": name,
        "seconds with all": statistics.median(seconds["all"]),
        "seconds without": statistics.median(seconds[name]),
        "differs": f"{difference:.1e}",
        "agrees": difference < tolerance,
    }


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--batch-size", type=int, metavar="N", help="images (default: 8; --quick: 2)")
    parser.add_argument("--classes", type=int, default=15, metavar="N", help="in scoring (default: 15)")
    options = common.start(parser.parse_args())
    rows = train(options) + score(options)
    return common.report(options, rows, all(r["agrees"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
