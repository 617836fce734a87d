#!/usr/bin/env python3
"""Are exchanged labels found? Some training images get another label, and the head lists labels that may be wrong.

python benchmarks/label_issues.py --model MODEL --dataset DATA --output FILE.json

"found" is the share of the exchanged labels among the first 2 x as many that are listed, mean and lowest over the
seeds; "right class" how many of these are given their true class as suggestion. No model is trained: the head reads the
vision encoder as it is.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from vlm.config import resolve
from vlm.conversation import build_prompts
from vlm.data import Split, load_data
from vlm.evaluation import find_label_issues, fit_head
from vlm.families import Family, load_family

SHARES = (0.05, 0.10)
TWICE = 2


def measure(family: Family, train: Split, names: list[str], share: float, seed: int) -> tuple[float, float]:
    """The share of exchanged labels that is found, and how many of these get their true class."""
    rng = np.random.default_rng(seed)
    truth, labels = list(train.labels), list(train.labels)
    exchanged = rng.permutation(len(labels))[: round(share * len(labels))].tolist()
    for i in exchanged:
        labels[i] = int(rng.choice([c for c in range(len(names)) if c != truth[i]]))
    train.labels = labels
    try:
        fitted = fit_head(family, train, names, None, seed)
    finally:
        train.labels = truth
    kept = [labels[i] for i in fitted.positions]
    issues = find_label_issues({"train": (fitted.positions, kept, fitted.held_out)})
    first = {issue.position: issue for issue in issues[: TWICE * len(exchanged)]}
    found = [first[i] for i in exchanged if i in first]
    right = [issue.suggested == truth[issue.position] for issue in found]
    return len(found) / len(exchanged), statistics.fmean(right) if right else 0.0


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--dataset", required=True, help="as for train_vlm.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    options = common.start(parser.parse_args())
    options.rounds = 1
    settings = resolve({"model": options.model, "dataset": options.dataset})
    data = load_data(settings)
    images = settings.image_options(data.edge)
    family = load_family(Path(options.model), torch.float32, torch.device("cpu"), images)
    family.model.eval()
    family.render(build_prompts(settings, data.class_names))  # some processors encode images within the conversation
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        found, right = zip(
            *(measure(family, data.train, data.class_names, share, seed) for seed in options.seeds), strict=True
        )
        rows.append(
            {
                "exchanged": f"{share:.0%}",
                "found": statistics.fmean(found),
                "lowest": min(found),
                "right class": statistics.fmean(right),
                "images": len(data.train),
                "seeds": len(options.seeds),
            }
        )
    return common.report(options, rows)


if __name__ == "__main__":
    sys.exit(main())
