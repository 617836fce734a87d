#!/usr/bin/env python3
"""Share of the machine's float32 matmul peak that training and scoring reach.

python benchmarks/peak.py --output benchmarks/results/peak.json

The peak is the best rate of large matrix products, measured between the steps. Floating-point operations are counted by
torch's FlopCounterMode while the real step runs; its count of one decoder layer is checked against a count by hand in
the same run. Attention is counted without regard to the mask.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import torch
import workload
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from train_vs_trl import BATCH_SIZES

from vlm.classifier import VLMClassifier
from vlm.data import Sample, open_image

SIDE = {"full": 3072, "quick": 2048, "tiny": 256}  # of the square matrices
GOAL = (0.80, 0.70)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not among those that the counter knows


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _add_product(total: Any, left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def count(work: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    rules = {
        torch.ops.aten.addmm_: _add_product,
        # the counter's own rule fails on the form with a number format for the result
        torch.ops.aten.addmm: _add_product,
        ATTENTION: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=rules) as counter:
        work()
    return counter.get_total_flops()


def check_counter(classifier: VLMClassifier, tokens: int = 96) -> dict[str, int]:
    """One decoder layer over some tokens: operations by hand and by the counter."""
    family, config = classifier.family, classifier.model.config.text_config
    heads, width = config.num_attention_heads, config.head_dim
    weights = sum(m.weight.numel() for m in family.language.layers[0].modules() if isinstance(m, torch.nn.Linear))
    by_hand = (
        2 * tokens * weights + 2 * 2 * heads * tokens * tokens * width
    )  # products; query times key, and those times value
    states = torch.randn(1, tokens, config.hidden_size)
    positions = torch.arange(tokens).unsqueeze(0)
    angles = family.language.rotary_emb(states, positions)
    with torch.no_grad():
        counted = count(lambda: family.language.layers[0](states, position_ids=positions, position_embeddings=angles))
    return {"by hand": by_hand, "counted": counted}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--batch-size", type=int, metavar="N", help="images (default: 8; --quick: 2)")
    parser.add_argument(
        "--tune", nargs="+", choices=("lora", "connector", "full"), help="training modes (default: lora and connector)"
    )
    options = common.start(parser.parse_args())
    works, classifier = build_works(options)
    layer = check_counter(classifier)
    side = SIDE[options.size]
    left, right = torch.randn(side, side), torch.randn(side, side)
    operations = {name: count(work) for name, work in works.items()}
    product = 2 * side**3
    seconds = common.take_turns({"matmul": lambda: left @ right, **works}, max(options.rounds, 1), warm_up=2)
    best = product / min(seconds["matmul"])
    rows = []
    for name in works:
        rates = [operations[name] / taken for taken in seconds[name]]
        rows.append(
            {
                "share of peak": statistics.median(rates) / best,
                "best": max(rates) / best,
                "work": name,
                "GFLOP": operations[name] / 1e9,
                "seconds": statistics.median(seconds[name]),
                "GFLOP/s": statistics.median(rates) / 1e9,
                "peak GFLOP/s": best / 1e9,
            }
        )
    return common.report(options, rows, layer["by hand"] == layer["counted"], goals=GOAL, one_layer=layer)


def build_works(options: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], VLMClassifier]:
    """Training steps and scoring, as the program does them, and the classifier that scores."""
    batch_size = options.batch_size or BATCH_SIZES[options.size]["lora"]
    works: dict[str, Callable[[], Any]] = {}
    for tune in options.tune or (["lora"] if options.size != "full" else ["lora", "connector"]):
        works[f"train, {tune}"] = workload.OurTraining(options, tune, batch_size, cached=True).step
    classifier = workload.classifier(options, classes=15)
    files = workload.image_files(options, batch_size)
    batch = classifier.collate(with_response=False)([Sample(open_image(file), 0, str(file)) for file in files])

    @torch.no_grad()
    def score() -> None:
        classifier.search(classifier.read(batch))

    return works | {"score new images, 15 classes": score}, classifier


if __name__ == "__main__":
    sys.exit(main())
