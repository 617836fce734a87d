#!/usr/bin/env python3
"""Which variant of LoRA classifies best: the same training with each --lora-variant, over several seeds.

python benchmarks/lora_variants.py --output FILE.json

The model is that of the demo, trained a little on digits. Each run goes on from it with LoRA, on 10 images of each
digit that are turned by a quarter, so that there is something to learn. What is behind `--` goes to every run. Figures
are those of the test split: mean over the seeds, and standard deviation of the accuracy.
"""

import sys

import common
import numpy as np
import runs
from PIL import Image
from sklearn.datasets import load_digits

import train_vlm

VARIANTS = ("lora", "dora", "rslora", "pissa")
BASE = ["--demo", "--max-samples", "300", "--epochs", "8", "--device", "cpu"]
FLAGS = ["--shots", "10", "--max-samples", "200", "--epochs", "24", "--learning-rate", "1e-3", "--batch-size", "8"]


def main() -> int:
    parser = common.parser(__doc__)
    runs.add_options(parser)
    options = runs.parse(parser, "lora_variants")
    base, images = options.cache / "lora_base", options.cache / "turned_digits"
    if not (base / "results.json").is_file() and train_vlm.main([*BASE, "--output-dir", str(base), "--overwrite"]):
        raise SystemExit("the model could not be trained")
    if not images.is_dir():
        digits = load_digits()
        for i, (digit, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            (images / str(label)).mkdir(parents=True, exist_ok=True)
            turned = Image.fromarray((np.rot90(digit) * 15.9).astype(np.uint8))
            turned.save(images / str(label) / f"{i:04}.png")
    more = [] if options.flags == ["--demo"] else options.flags
    options.flags = ["--model", str(base / "best_model"), "--dataset", str(images), *FLAGS, *more]
    cases = [({"variant": variant}, ["--lora-variant", variant]) for variant in VARIANTS]
    return common.report(options, runs.rows(options, cases))


if __name__ == "__main__":
    sys.exit(main())
