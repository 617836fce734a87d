"""Samples -> one batch. L = longest row, B = batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.common.errors import UsageError
from vlm.conversation.responses import response_of
from vlm.data.splits import Sample
from vlm.families.base import Family
from vlm.families.encoded import EncodedImages, Rendered

IGNORED = -100  # a target that is not in the loss; what torch's cross entropy ignores


def encode(samples: Sequence[Sample], family: Family, cache: Any = None) -> EncodedImages:
    """The images of some samples as the model takes them: features where a `FeatureCache` has all of them, else
    pixels."""
    known = cache.encode([sample.key for sample in samples]) if cache else None
    return known or family.encode_images([sample.image for sample in samples])


def vlm_collate_fn(
    samples: Sequence[Sample], family: Family, rendered: Rendered, with_response: bool = True, cache: Any = None
) -> dict[str, Any]:
    """Encode images and lay out one row a sample: image tokens, question and, for training, its response.

    The prefix is not in the rows: it is the same for all and run once. Rows are padded on the right, where causal
    attention keeps the padding out.

    Args:
        cache: a `FeatureCache`. Where it has the features of these images, they are in the place of pixels, and no
            image is opened.

    Returns:
        pixels: what the family's vision encoder takes. input_ids: (B, L); without responses each row has what all of
            them begin with.
        targets: (B, L), the response tokens where they stand in `input_ids`, else -100. lengths: (B,) tokens of each
            row without padding
        and, where it has no response, without that beginning. prompts: (B,) tokens of each row in front of the text
        that a class is scored by (see vlm/conversation/responses.py). labels: (B,). image_places: places of the image
        tokens in the flattened rows; predicting: places in front of the response tokens.

    Raises:
        UsageError: a sample is longer than the model can read. Samples with an image are never truncated.
    """
    encoded = encode(samples, family, cache)
    rows, targets, lengths, prompts = [], [], [], []
    for sample, image_ids in zip(samples, encoded.token_ids, strict=True):
        prompt = [*image_ids, *rendered.question_ids]
        response = response_of(sample, family, rendered) if with_response else []
        lengths.append(len(prompt) + len(response))
        total = len(rendered.prefix_ids) + lengths[-1]
        if total > rendered.max_length:
            raise UsageError(
                f"{sample.name} has {total} tokens with its texts, and the model reads {rendered.max_length} at most: "
                "shorten --system-instructions, the class descriptions or its reasoning."
            )
        rows.append(prompt + (response or rendered.opening_ids))
        targets.append([IGNORED] * len(prompt) + (response or [IGNORED] * len(rendered.opening_ids)))
        behind = (
            response and rendered.prompts.free and not rendered.prompts.answer_first
        )  # the image's own reasoning comes first
        prompts.append(lengths[-1] - len(rendered.scored_ids[sample.label]) if behind else len(prompt))
    ids, targets = pad_rows(rows), pad_rows(targets, IGNORED)
    return {
        "pixels": encoded.inputs,
        "input_ids": ids,
        "targets": targets,
        "lengths": torch.tensor(lengths),
        "prompts": torch.tensor(prompts),
        "labels": torch.tensor([sample.label for sample in samples]),
        # Found here: a GPU would have to wait for the count.
        "image_places": places(ids == family.image_token_id),
        "predicting": places(targets != IGNORED) - 1,
    }


def batch_without_image(rendered: Rendered) -> dict[str, Any]:
    """What `vlm_collate_fn` would make, without responses, of one sample that has no image: the question follows the
    prefix.

    Tokens around the image that belong to prefix or question in a family stay there.
    """
    ids, none = torch.tensor([[*rendered.question_ids, *rendered.opening_ids]]), torch.empty(0, dtype=torch.long)
    return {
        "pixels": {},
        "input_ids": ids,
        "targets": torch.full_like(ids, IGNORED),
        "lengths": torch.tensor([len(rendered.question_ids)]),
        "labels": torch.tensor([0]),
        "image_places": none,
        "predicting": none,
    }


def places(mask: Tensor) -> Tensor:
    """(B, L) bool -> the places of the true ones in the flattened rows."""
    return mask.flatten().nonzero().squeeze(1)


def pad_rows(rows: list[list[int]], value: int = 0) -> Tensor:
    """Rows of unequal length -> (B, L), filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
