"""Samples -> one batch. L = longest row, B = batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.data import Sample
from vlm.errors import UsageError
from vlm.families.base import Family, Rendered

IGNORED = -100  # a target that is not in the loss; what torch's cross entropy ignores


def vlm_collate_fn(
    samples: Sequence[Sample], family: Family, rendered: Rendered, with_response: bool = True, cache: Any = None
) -> dict[str, Any]:
    """Encode pictures and lay out one row a sample: picture tokens, question and, for training, its label's response.

    The prefix is not in the rows: it is the same for all and run once. Rows are padded on the right, where causal attention
    keeps the padding out.

    Args:
        cache: a `FeatureCache`. Where it has the features of these pictures, they are in the place of pixels, and no picture is opened.

    Returns:
        pixels: what the family's vision tower takes. input_ids: (B, L). targets: (B, L), the response tokens where they stand in
        `input_ids`, else -100. lengths: (B,) tokens of each row without padding. labels: (B,).

    Raises:
        UsageError: a sample is longer than the model can read. Samples with a picture are never truncated.
    """
    encoded = cache.encode([sample.key for sample in samples]) if cache else None
    encoded = encoded or family.encode_pictures([sample.image for sample in samples])
    rows, targets = [], []
    for sample, picture_ids in zip(samples, encoded.token_ids, strict=True):
        prompt = [*picture_ids, *rendered.question_ids]
        response = rendered.response_ids[sample.label] if with_response else []
        total = len(rendered.prefix_ids) + len(prompt) + len(response)
        if total > rendered.max_length:
            raise UsageError(
                f"{sample.name} has {total} tokens with its texts, and the model reads {rendered.max_length} at most: "
                "shorten --system-instructions or the class descriptions."
            )
        rows.append(prompt + response)
        targets.append([IGNORED] * len(prompt) + response)
    return {
        "pixels": encoded.inputs,
        "input_ids": _pad(rows, 0),
        "targets": _pad(targets, IGNORED),
        "lengths": torch.tensor([len(row) for row in rows]),
        "labels": torch.tensor([sample.label for sample in samples]),
    }


def _pad(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
