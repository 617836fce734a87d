#!/usr/bin/env python3
"""Images a second with 10, 100 and 1,000 classes: how many times as long an image takes as with the fewest.

python benchmarks/many_classes.py --output benchmarks/results/many_classes.json

Measured is `search`, the probabilities of all classes, from features of the vision encoder that are kept. The weights
are peaked (trained until they are sure of one class's response, see `workload.peak`), as a fine-tuned model is of an
easy image, or random: the worst case, in which the whole label tree has to be visited. Next to it the images a second
of a training step with the default objective. In the same run the probabilities are compared with one plain forward a
class.
"""

import argparse
import statistics
import sys
from typing import Any

import common
import torch
import workload
from classify_vs_generate import TOLERANCE, plain_log_probability

from vlm.classifier import Batch, Objective, VLMClassifier, usual_objective
from vlm.data import Sample

CLASSES = {"full": [10, 100, 1000], "quick": [10, 100, 1000], "tiny": [5, 20]}
COMPARED = 3  # classes, the most probable ones


def batches(classifier: VLMClassifier, samples: list[Sample]) -> tuple[Batch, Batch]:
    """Without responses, and with them; the vision encoder has seen the images."""
    reading, training = (classifier.collate(with_response=with_response)(samples) for with_response in (False, True))
    with torch.no_grad():
        reading = classifier.with_features(reading)
    return reading, Batch(**vars(training) | {"pixels": reading.pixels})


def train(classifier: VLMClassifier, batch: Batch) -> None:
    """Forward and backward of one batch, through the language model."""
    out = classifier(batch)
    (out.loss if out.posterior is None else out.loss + out.posterior).backward()
    classifier.zero_grad(set_to_none=True)


def largest_error(classifier: VLMClassifier, batch: Batch, samples: list[Sample]) -> float:
    """How far probabilities of the first image, each as a share of the most probable class's, are from the plain
    ones."""
    scores = classifier.search(classifier.read(batch)).scores[0]
    labels = scores.topk(min(COMPARED, len(scores))).indices.tolist()
    ours = scores[labels].double()
    plain = torch.stack([plain_log_probability(classifier, samples[0], label) for label in labels]).double()
    return float(((ours - ours[0]).exp() - (plain - plain[0]).exp()).abs().max())


def compare(options: argparse.Namespace, counts: list[int], peaked: bool) -> list[dict[str, Any]]:
    """One row for each number of classes."""
    image = workload.shapes.shape(options.shape, options.size).image
    samples = [Sample(workload.noise(0 if peaked else i, image), 0, f"noise {i}") for i in range(options.batch_size)]
    classify, training, errors, objectives = {}, {}, {}, {}
    for count in counts:
        classifier = workload.classifier(options, count, peaked)
        opening = len(classifier.rendered.opening_ids)
        objectives[count] = usual_objective(classifier.tree, opening)
        classifier.objective = Objective(objectives[count], classifier.tree, opening)
        reading, with_response = batches(classifier, samples)
        errors[count] = largest_error(classifier, reading, samples)
        classifier.family.language.requires_grad_(True)
        classify[str(count)] = lambda model=classifier, batch=reading: model.search(model.read(batch))
        training[str(count)] = lambda model=classifier, batch=with_response: train(model, batch)
    seconds = common.take_turns(classify, options.rounds)
    steps = common.take_turns(training, options.rounds)
    fewest = seconds[str(counts[0])]
    return [
        {
            **common.ratio(seconds[name], fewest),
            "classes": count,
            "weights": "peaked" if peaked else "random",
            "images/s": len(samples) / statistics.median(seconds[name]),
            "training images/s": len(samples) / statistics.median(steps[name]),
            "objective": objectives[count],
            "probability differs": f"{errors[count]:.1e}",
            "agrees": errors[count] < TOLERANCE,
        }
        for count, name in ((count, str(count)) for count in counts)
    ]


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--classes", type=int, nargs="+", metavar="N", help="(default: 10 100 1000)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", choices=("peaked", "random"), default=("peaked", "random"))
    options = common.start(parser.parse_args())
    counts = sorted(options.classes or CLASSES[options.size])
    rows = [row for weights in options.weights for row in compare(options, counts, weights == "peaked")]
    return common.report(options, rows, all(row["agrees"] for row in rows), batch_size=options.batch_size)


if __name__ == "__main__":
    sys.exit(main())
