#!/usr/bin/env python3
"""Class probabilities by this program against transformers' `generate()`: how many times as long the text takes.

python benchmarks/classify_vs_generate.py --output benchmarks/results/classify_vs_generate.json

Both read the same image files in one batch: `predict_batch` gives the probability of every class, `generate()` 40
greedy tokens of a response of 43. Ours runs at native size, at 256 pixels, and with cached vision features; the text at
native size. The weights are peaked (trained until they are sure of one class's response, see `workload.peak`), as a
fine-tuned model is of an easy image, or random: the worst case for a search of the label tree, which has to visit all
of it. In the same run the probabilities are compared with one plain forward a class, and the text with the program's
own.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
import workload
from torch import Tensor
from train_vs_plain import plain_batch

from vlm.classifier import VLMClassifier
from vlm.config import ImageSize
from vlm.data import Sample, open_image
from vlm.inference import predict_batch

NEW_TOKENS = 40
TOLERANCE = 5e-4  # of a probability relative to the most probable class; the search of the tree may leave out 1e-4
COMPARED = 3  # classes, the most probable ones
GOALS = {"native": (3, 2), "256 px": (6, 6), "cached features": (20, 12)}
CLASSES = {"full": [15, 100], "quick": [15], "tiny": [5]}


def predict(classifier: VLMClassifier, files: list[Path], cached: bool = False) -> dict[str, dict[str, Any]]:
    """The probabilities of all classes, by the program's own function."""
    metadata = {"class_names": list(classifier.class_names), "prompts": classifier.prompts.to_json()}
    quickly = {"explain": False, "show_progress": False, "feature_cache": cached}
    return predict_batch(classifier, classifier.family.processor, files, metadata, len(files), **quickly)


@torch.no_grad()
def generate(classifier: VLMClassifier, files: list[Path]) -> list[str]:
    """The texts by transformers' generation from the same files."""
    samples = [Sample(open_image(file), 0, str(file)) for file in files]
    batch = plain_batch(
        classifier.family, classifier.rendered, samples, with_response=False
    )  # rows of one length: no padding
    ids = classifier.model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    return [classifier.family.decode(row) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


@torch.no_grad()
def plain_log_probability(classifier: VLMClassifier, sample: Sample, label: int) -> Tensor:
    """Log-probability of one class's response by transformers' forward over the whole row."""
    batch = plain_batch(classifier.family, classifier.rendered, [replace(sample, label=label)])
    labels = batch.pop("labels")[0, 1:]
    logits = classifier.model(**batch, use_cache=False).logits[0, :-1]
    return -torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def largest_error(classifier: VLMClassifier, file: Path, cached: bool) -> float:
    """How far probabilities, each as a share of the most probable class's, are from the plain ones."""
    probabilities = predict(classifier, [file], cached)[str(file)]["probabilities"]
    names = sorted(probabilities, key=lambda name: -probabilities[name])[:COMPARED]
    ours = torch.tensor([probabilities[name] for name in names], dtype=torch.float64)
    sample = Sample(open_image(file), 0, str(file))
    plain = torch.stack(
        [plain_log_probability(classifier, sample, classifier.class_names.index(name)) for name in names]
    ).double()
    return float((ours / ours[0] - (plain - plain[0]).exp()).abs().max())


def same_texts(classifier: VLMClassifier, files: list[Path]) -> bool:
    """Whether the program's own text begins as the generated one."""
    batch = classifier.collate(with_response=False)([Sample(open_image(file), 0, str(file)) for file in files])
    return classifier.write(classifier.read(batch), NEW_TOKENS) == generate(classifier, files)


def top_probability(classifier: VLMClassifier, files: list[Path]) -> float:
    """How sure the model is of these images, on average."""
    return statistics.mean(max(result["probabilities"].values()) for result in predict(classifier, files).values())


def compare(options: argparse.Namespace, classes: int, peaked: bool) -> list[dict[str, Any]]:
    """One row for each way of ours, against generation at native size."""
    files = workload.image_files(options, options.batch_size)
    native = workload.classifier(options, classes, peaked)
    ways = {"native": native, "cached features": native}
    if options.size != "tiny":
        ways["256 px"] = workload.classifier(options, classes, peaked, image_size=ImageSize(256))
    errors = {name: largest_error(way, files[0], name == "cached features") for name, way in ways.items()}
    equal = same_texts(native, files[:1])
    most = {name: top_probability(way, files) for name, way in ways.items()}
    sides = {"generate": lambda: generate(native, files)}
    sides |= {
        name: (lambda way=way, cached=name == "cached features": predict(way, files, cached))
        for name, way in ways.items()
    }
    seconds = common.take_turns(sides, options.rounds)
    return [
        {
            **common.ratio(seconds["generate"], seconds[name]),
            "classes": classes,
            "weights": "peaked" if peaked else "random",
            "image": name,
            "ours s": statistics.median(seconds[name]),
            "generate s": statistics.median(seconds["generate"]),
            "images/s": len(files) / statistics.median(seconds[name]),
            "top probability": most[name],
            "probability differs": f"{errors[name]:.1e}",
            "same text": equal,
            "agrees": errors[name] < TOLERANCE and equal,
        }
        for name in ways
    ]


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--classes", type=int, nargs="+", metavar="N", help="up to 100 (default: 15 100; --quick: 15)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images (default: 8; --quick: 2)")
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=("peaked", "random"),
        help="(default: both, random only for the fewest classes; --quick: peaked)",
    )
    options = common.start(parser.parse_args())
    quick = options.size == "quick"
    options.batch_size = options.batch_size or (2 if quick else 8)
    rows = []
    counts = options.classes or CLASSES[options.size]
    for classes in counts:
        for weights in options.weights or ("peaked", "random")[: 1 if quick or classes > min(counts) else 2]:
            rows += compare(options, classes, weights == "peaked")
    return common.report(
        options,
        rows,
        all(row["agrees"] for row in rows),
        goals=GOALS,
        new_tokens=NEW_TOKENS,
        batch_size=options.batch_size,
    )


if __name__ == "__main__":
    sys.exit(main())
