"""Items -> results, in their order: images are read ahead by threads and classified in batches. B = images."""

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlm.classifier import TOLERANCE, Batch, VLMClassifier, classify
from vlm.classifier import explain as explain_predictions
from vlm.common import Bar
from vlm.config import RunSettings, read_settings
from vlm.conversation import Prompts
from vlm.data import Sample, UnreadableImage
from vlm.families import FeatureCache, open_cache
from vlm.inference.items import Item
from vlm.inference.writing import READABLE_NAME
from vlm.machine import largest_batch

Result = dict[str, Any]
Prepared = tuple[Batch | None, dict[int, str]]  # the batch of the readable images, and why the others are not in it

MOST_READERS = 8  # threads that decode images
NOT_FINITE = "the model's scores are not finite: try --dtype float32"  # the error of an image that could be read
BATCHES_AHEAD = 2  # that are read while the model is busy with the ones before


class Outcome(NamedTuple):
    """An item, what `predict_batch` returns for it, and its (C,) scores before the calibration, with the evidence that
    counts and without; None if unreadable."""

    item: Item
    result: Result
    scores: Tensor | None
    sums: Tensor | None


@dataclass(frozen=True)
class Options:
    """How images are classified; see `predict_batch`."""

    batch_size: int | None = None
    explain: bool = True
    show_progress: bool = True
    exhaustive: bool = False
    feature_cache: bool = False


def classify_items(
    model: VLMClassifier,
    metadata: dict[str, Any],
    items: Iterable[Item],
    options: Options,
    total: int | None = None,
    done: int = 0,
    share: str = "",
) -> Generator[Outcome, None, None]:
    """Classify items in their order. No more of them are held than a few batches.

    Args:
        items: taken one after the other, a few batches ahead; names may come twice.
        total, done: of the progress bar: how many items there are in all, None if unknown, and how many came before.
        share: what the bar says of the items, if other processes have others.

    Yields:
        each item with its result, when its batch is computed.
    """
    batch_size = options.batch_size or largest_batch(model, settings_of(metadata))
    cache = _open_cache(model, metadata) if options.feature_cache else None
    tolerance = 0.0 if options.exhaustive else TOLERANCE
    chunks = batches_ahead(partial(_prepare, model, cache), items, batch_size, in_thread=cache is None)
    try:
        with Bar(total, f"classifying{share}", initial=done, enabled=options.show_progress) as bar, closing(chunks):
            for chunk, (batch, faults) in chunks:
                read = [item for i, item in enumerate(chunk) if i not in faults]
                exact = [item.exact or 0 for item in read] if any(item.exact is not None for item in read) else None
                predicted = iter(predict(model, batch, options.explain, tolerance, exact) if batch else ())
                for i, item in enumerate(chunk):
                    fault = ({"prediction": None, "error": faults[i]}, None, None) if i in faults else None
                    yield Outcome(item, *(fault or next(predicted)))
                bar.update(len(chunk))
    finally:
        if cache:
            cache.flush()


def settings_of(metadata: dict[str, Any]) -> RunSettings:
    """The settings of the training, also of a version that wrote fewer of them or none."""
    return read_settings(metadata.get("settings") or {})


def _open_cache(model: VLMClassifier, metadata: dict[str, Any]) -> FeatureCache | None:
    """The cache for a trained model, with the size and number format of its training.

    It holds features before the connector, if the cache has a folder for this vision encoder, as after a training
    without --freeze-connector; else features after the connector, of which there are fewer. The weights are hashed for
    it, so it is opened once for all calls.
    """
    if model.inference_cache is None:
        settings = settings_of(metadata)
        options = settings.cache_dtype, settings.cache_size
        before = open_cache(model.family, False, *options)
        known = before is None or before.folder.is_dir()
        model.inference_cache = before if known else open_cache(model.family, True, *options)
    return model.inference_cache


def batches_ahead(
    prepare: Callable[[list["Future[Image.Image]"], list[Item]], Prepared],
    items: Iterable[Item],
    batch_size: int,
    in_thread: bool,
) -> Generator[tuple[list[Item], Prepared], None, None]:
    """Batches of items with what is made of them. Their images are decoded in threads.

    Args:
        prepare: the images, which are being decoded, and their items -> what is made of them.
        in_thread: prepare in a thread, too. With a feature cache, preparing runs the vision encoder, which only one
            thread at a time may do.
    """
    readers = ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1))
    maker = ThreadPoolExecutor(1)
    waiting: list[tuple[list[Item], Callable[[], Prepared]]] = []
    rest = iter(items)
    try:
        while chunk := list(islice(rest, batch_size)):
            opened = [readers.submit(item.open) for item in chunk]
            later = maker.submit(prepare, opened, chunk).result if in_thread else partial(prepare, opened, chunk)
            waiting.append((chunk, later))
            if len(waiting) > BATCHES_AHEAD:
                first, made = waiting.pop(0)
                yield first, made()
        while waiting:
            first, made = waiting.pop(0)
            yield first, made()
    finally:  # Ctrl-C does not wait for what is not begun
        readers.shutdown(cancel_futures=True)
        maker.shutdown(cancel_futures=True)


def _prepare(
    model: VLMClassifier, cache: FeatureCache | None, opened: list["Future[Image.Image]"], items: list[Item]
) -> Prepared:
    """The batch of the images that can be read, None if there is none, and by position why the others cannot."""
    samples, faults = {}, {}
    for i, (image, item) in enumerate(zip(opened, items, strict=True)):
        try:
            samples[i] = Sample(image.result(), 0, item.name)
        except UnreadableImage as error:
            faults[i] = str(error)
    batch, refused = collate(model, cache, samples)
    return batch, faults | refused


def collate(model: VLMClassifier, cache: FeatureCache | None, samples: dict[int, Sample]) -> Prepared:
    """The batch of the images that the processor takes, None if there is none, and why it does not take the others.

    Args:
        samples: by their position.
    """
    if not samples:
        return None, {}
    taken = list(samples.values())
    try:
        if cache:
            cache.add_missing(model.family, taken)
        return model.collate(with_response=False, cache=cache)(taken), {}
    except Exception:  # each processor has its own way to refuse an image
        reasons = {i: model.family.refusal(sample.image) for i, sample in samples.items()}
        refused = {i: f"{samples[i].name}: {reason}" for i, reason in reasons.items() if reason}
        if not refused:
            raise
    batch, more = collate(model, cache, {i: sample for i, sample in samples.items() if i not in refused})
    return batch, refused | more


@torch.no_grad()
def predict(
    model: VLMClassifier,
    batch: Batch,
    explain: bool,
    tolerance: float = TOLERANCE,
    exact: Sequence[int] | None = None,
) -> list[tuple[Result, Tensor, Tensor]]:
    """For each of the B images of a batch what `predict_batch` returns, and its (C,) scores, as in `Outcome`.

    Args:
        exact: B classes whose scores are to be exact.
    """
    if model.training:
        model.eval()
    found = classify(model, batch.to(model.device), tolerance, exact)
    scores, sums = found.scores.cpu(), found.sums.cpu()
    probabilities = model.calibration.log_probabilities(scores).exp()  # (B, C)
    predictions = probabilities.argmax(-1).tolist()
    abstained = [model.calibration.abstains(confidence) for confidence in probabilities.amax(-1).tolist()]
    texts = [""] * len(predictions)
    if explain and not all(abstained):
        texts = explain_predictions(model, found, predictions)
    rows = zip(probabilities, predictions, found.unexplored.tolist(), texts, abstained, strict=True)
    return [(image_result(model.prompts, *row), scores[i], sums[i]) for i, row in enumerate(rows)]


def image_result(
    prompts: Prompts, probabilities: Tensor, best: int, bound: float, text: str, abstained: bool
) -> Result:
    """What `predict_batch` returns for one image, from its (C,) probabilities."""
    if probabilities.isnan().any():
        return {"prediction": None, "error": NOT_FINITE}
    result = {
        "prediction": prompts.class_names[best],
        **({READABLE_NAME: prompts.readable_names[best]} if prompts.readable_names else {}),
        "confidence": float(probabilities[best]),
        "probabilities": dict(zip(prompts.class_names, probabilities.tolist(), strict=True)),
        "error_bound": bound,
        "full_response": text,
    }
    if abstained:  # no text answers if the prediction does not
        result |= {"prediction": None, "abstained": True, "full_response": ""}
        result.pop(READABLE_NAME, None)
    return result
