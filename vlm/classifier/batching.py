"""Samples -> one batch. B = images, L = tokens of the longest row."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vlm.common import RunError, UsageError
from vlm.conversation import Rendered, response_of
from vlm.data import Sample, UnreadableImage
from vlm.families import EncodedImages, Family, FeatureCache, encode

IGNORED = -100  # a target that is not in the loss; what torch's cross entropy ignores


@dataclass(frozen=True)
class Batch:
    """Images and one row of tokens each: image tokens, question and, for training, the response.

    The prefix is not in the rows: it is the same for all of them and is run once. Rows are padded on the right, where
    causal attention keeps the padding out.

    Attributes:
        pixels: what the family's vision encoder takes, or features of the images; empty if there is no image.
        input_ids: (B, L). Without a response each row ends in the opening, the tokens that all scored texts begin with.
        targets: (B, L) the response tokens at their places in `input_ids`, else -100.
        lengths: (B,) tokens of each row, without padding and, if it has no response, without the opening.
        prompt_lengths: (B,) tokens of each row before the text that a class is scored by
            (vlm/conversation/responses.py).
        labels: (B,) class of each image.
        image_places: (number of image tokens,) their places in the flattened rows.
        predicting: (number of response tokens,) places before the response tokens in the flattened rows.
        begun: (B,) how many of a row's last tokens belong to a response that was begun, or None if none was
            (see `vlm.classifier.reasoning.continue_rows`).
        counted: (B,) bool, False for the gray stand-in of an image that cannot be read; None if there is none.
        vectors: (cached images, S, W) what the block that the head reads has made of them (vlm/families/pooling.py).
        cached: (B,) bool, which images these are; None if there are none.
        faults: the rows of these stand-ins, with the name of each image and why it cannot be read.
    """

    pixels: dict[str, Tensor]
    input_ids: Tensor
    targets: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    labels: Tensor
    image_places: Tensor
    predicting: Tensor
    begun: Tensor | None = None
    counted: Tensor | None = None
    vectors: Tensor | None = None
    cached: Tensor | None = None
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def class_targets(self) -> Tensor:
        """(B,) the class that each row is trained on; -100 for a stand-in."""
        return self.labels if self.counted is None else self.labels.where(self.counted, IGNORED)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, name: str) -> Any:
        """A field by its name, for programs that know a batch as a dictionary; there prompt_lengths was `prompts`."""
        return getattr(self, {"prompts": "prompt_lengths", "picture_places": "image_places"}.get(name, name))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; a DataLoader calls this for a GPU."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Any) -> "Batch":
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        pixels = {name: change(tensor) for name, tensor in values.pop("pixels").items()}
        del values["faults"]
        changed: dict[str, Any] = {name: None if x is None else change(x) for name, x in values.items()}
        return replace(self, pixels=pixels, **changed)


def vlm_collate_fn(
    samples: Sequence[Sample],
    family: Family,
    rendered: Rendered,
    with_response: bool = True,
    cache: FeatureCache | None = None,
    layer: int | None = None,
) -> Batch:
    """Encode images and lay out one row a sample.

    Args:
        samples: B samples. One that was not checked before and cannot be read gets a gray stand-in.
        family: encodes the images; needs no weights.
        rendered: the conversation as token ids.
        with_response: add the response that is trained.
        cache: if it has the features of these images, they take the place of pixels, and no image is opened.
        layer: the block of the vision encoder whose vectors are wanted of these images, if any.

    Raises:
        UsageError: a sample is longer than the model can read. Samples with an image are never truncated.
    """
    encoded, faults = _encode(samples, family, cache, layer)
    rows, targets, lengths, prompt_lengths = [], [], [], []
    for i, (sample, image_ids) in enumerate(zip(samples, encoded.token_ids, strict=True)):
        prompt = [*image_ids, *rendered.question_ids]
        response = response_of(sample, family, rendered) if with_response else []
        length = len(prompt) + len(response)
        _check_length(sample, len(rendered.prefix_ids) + length, rendered)
        lengths.append(length)
        rows.append(prompt + (response or rendered.opening_ids))
        trained = response if response and i not in faults else [IGNORED] * len(response or rendered.opening_ids)
        targets.append([IGNORED] * len(prompt) + trained)
        # In reasoning-first the image's own reasoning stands before the scored text.
        reasoned = response and rendered.prompts.free and not rendered.prompts.answer_first
        prompt_lengths.append(length - len(rendered.scored_ids[sample.label]) if reasoned else len(prompt))
    input_ids, padded_targets = pad_rows(rows), pad_rows(targets, IGNORED)  # lists of B rows -> (B, L)
    return Batch(
        pixels=encoded.inputs,
        input_ids=input_ids,
        targets=padded_targets,
        lengths=torch.tensor(lengths),
        prompt_lengths=torch.tensor(prompt_lengths),
        labels=torch.tensor([sample.label for sample in samples]),
        # Found here, because a GPU would have to wait for the count.
        image_places=places(input_ids == family.image_token_id),
        predicting=places(padded_targets != IGNORED) - 1,
        counted=torch.tensor([i not in faults for i in range(len(samples))]) if faults else None,
        vectors=encoded.vectors,
        cached=None if encoded.cached is None else torch.tensor(encoded.cached),
        faults=faults,
    )


def _encode(
    samples: Sequence[Sample], family: Family, cache: FeatureCache | None, layer: int | None
) -> tuple[EncodedImages, dict[int, str]]:
    """The images of some samples, gray ones in the place of those that cannot be read.

    Returns:
        The images as the model takes them.
        The positions of those that cannot be read, with the name of each and why.

    Raises:
        RunError: an image cannot be read any more that was checked before.
    """
    unchecked = [i for i, sample in enumerate(samples) if not sample.is_checked]
    faults = {}
    for i in unchecked:
        try:
            samples[i].image  # noqa: B018 - it is decoded here
        except UnreadableImage as error:
            faults[i] = str(error)
    used = [sample.stand_in() if i in faults else sample for i, sample in enumerate(samples)]
    try:
        return encode(used, family, cache, layer), faults
    except RunError:
        refused = {i: why for i in unchecked if i not in faults and (why := family.refusal(used[i].image))}
        if not refused:
            raise
    faults |= {i: f"{samples[i].name}: {why}" for i, why in refused.items()}
    used = [sample.stand_in() if i in refused else sample for i, sample in enumerate(used)]
    return encode(used, family, cache, layer), faults


def _check_length(sample: Sample, tokens: int, rendered: Rendered) -> None:
    if tokens > rendered.max_length:
        said = rendered.prompts.system + rendered.prompts.question
        names = rendered.prompts.shown_names
        cure = "shorten --system-instructions, the class descriptions or its reasoning."
        if all(name in said for name in names) and 2 * sum(map(len, names)) > len(said):
            cure = (
                f"most of that is the list of the {len(names):,} classes. "
                "Give --system-instructions without {classes}, or a model that reads more."
            )
        raise UsageError(
            f"{sample.name} has {tokens} tokens with its texts, and the model reads at most {rendered.max_length}: "
            f"{cure}"
        )


def batch_without_image(rendered: Rendered) -> Batch:
    """A batch of one row without image and response: the question follows the prefix.

    Tokens around the image that belong to prefix or question in a family stay there.
    """
    input_ids = torch.tensor([[*rendered.question_ids, *rendered.opening_ids]])  # (1, L)
    length, nothing = torch.tensor([len(rendered.question_ids)]), torch.empty(0, dtype=torch.long)
    return Batch(
        pixels={},
        input_ids=input_ids,
        targets=torch.full_like(input_ids, IGNORED),
        lengths=length,
        prompt_lengths=length,
        labels=torch.tensor([0]),
        image_places=nothing,
        predicting=nothing,
    )


def places(mask: Tensor) -> Tensor:
    """(B, L) bool -> the places of the true ones in the flattened rows."""
    return mask.flatten().nonzero().squeeze(1)


def pad_rows(rows: list[list[int]], value: int = 0) -> Tensor:
    """Rows of unequal length -> (B, L), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
