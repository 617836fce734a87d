#!/usr/bin/env python3
"""One training step of this program against the plain one: transformers' forward over whole rows with `labels`, and the
same optimizer.

python benchmarks/train_vs_plain.py --output benchmarks/results/train_vs_plain.json

The plain side is what a short script of one's own does: images and texts through the processor, `model(**batch).loss`,
backward, clipping, fused AdamW. Frozen parts are frozen on both sides. Both take turns; loss and gradients of one batch
are compared first, without dropout.
"""

import argparse
import sys
from typing import Any

import common
import torch
import workload
from torch import Tensor
from train_vs_trl import BATCH_SIZES, add_options, cases, row

from vlm.classifier import IGNORED, vlm_collate_fn
from vlm.config import Settings
from vlm.conversation import Rendered
from vlm.data import Sample
from vlm.training.tuning import prepare_tuning, trained_parameters

PLAIN_GOALS = {"lora": (5, 4), "connector": (5, 4)}


class PlainTraining:
    """The same model in an object of its own, trained without anything that this program does."""

    def __init__(self, options: argparse.Namespace, settings: Settings):
        self.family = workload.load(options)
        prepare_tuning(self.family, settings)
        self.model, self.clip = self.family.model.train(), settings.max_grad_norm
        parameters = list(trained_parameters(self.model).values())
        self.optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    def step(self, rendered: Rendered, samples: list[Sample]) -> None:
        self._loss(rendered, samples).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, rendered: Rendered, samples: list[Sample]) -> Tensor:
        return self.model(**plain_batch(self.family, rendered, samples), use_cache=False).loss

    def compare(self, ours: workload.OurTraining) -> dict[str, float]:
        """How far loss and gradients of one batch are from those of ours, relative, with the same trained
        parameters."""
        source = dict(ours.classifier.model.named_parameters())
        with torch.no_grad():
            for name, parameter in trained_parameters(self.model).items():
                parameter.copy_(source[name])
        indices, our_loss, our_gradients = ours.examine()
        with workload.without_dropout(self.model):
            loss = self._loss(ours.classifier.rendered, ours.samples(indices))
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in trained_parameters(self.model).items() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        difference = workload.relative_difference(gradients, our_gradients)
        return {"loss": abs(loss.item() - our_loss) / our_loss, "gradients": difference}


def plain_batch(
    family: Any, rendered: Rendered, samples: list[Sample], with_response: bool = True
) -> dict[str, Tensor]:
    """What transformers' forward takes, from the tokens that this program makes of the same samples."""
    made = vlm_collate_fn(samples, family, rendered, with_response)
    length = int(made.lengths.max())  # without responses, the rows have the beginning of one behind it
    rows = made.input_ids[:, :length]
    prefix = torch.tensor([rendered.prefix_ids]).expand(len(samples), -1)
    places = torch.arange(length)
    batch = {
        "input_ids": torch.cat([prefix, rows], dim=1),
        "attention_mask": torch.cat([torch.ones_like(prefix), (places < made.lengths.unsqueeze(1)).long()], dim=1),
        **{name: tensor.unsqueeze(1) for name, tensor in made.pixels.items()},  # one tile an image
    }
    if with_response:
        batch["labels"] = torch.cat([torch.full_like(prefix, IGNORED), made.targets], dim=1)
    return batch


def compare(options: argparse.Namespace, tune: str, cached: bool) -> dict[str, Any]:
    """One row of the table."""
    batch_size = options.batch_size or BATCH_SIZES[options.size][tune]
    ours = workload.OurTraining(options, tune, batch_size, cached)
    plain = PlainTraining(options, ours.run.settings)
    differences = plain.compare(ours)
    indices = list(range(batch_size))

    def plain_step() -> None:
        plain.step(ours.classifier.rendered, ours.samples(indices))

    seconds = common.take_turns({"plain": plain_step, "ours": ours.step}, options.rounds)
    return row(tune, batch_size, cached, seconds, differences, "plain")


def main() -> int:
    parser = common.parser(__doc__)
    add_options(parser)
    options = common.start(parser.parse_args())
    rows = [compare(options, *case) for case in cases(options)]
    return common.report(options, rows, all(r["agrees"] for r in rows), goals=PLAIN_GOALS)


if __name__ == "__main__":
    sys.exit(main())
