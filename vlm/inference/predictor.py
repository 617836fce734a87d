"""A model folder -> predictions: one by one or in batches. B = images, C = classes."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm.classifier import TOLERANCE, Batch, Calibration, VLMClassifier, classify
from vlm.classifier import explain as explain_predictions
from vlm.common import Bar, RunError, UsageError, existing, read_folder
from vlm.config import PREVIOUS_RUN, RunSettings, read_settings
from vlm.conversation import Prompts
from vlm.data import Sample, UnreadableImage, open_image
from vlm.families import FeatureCache, load_family, open_cache
from vlm.inference.model_folder import read_metadata, read_prompts
from vlm.inference.writing import READABLE_NAME
from vlm.machine import largest_batch, pick_device, pick_dtype

Item = TypeVar("Item")
Result = TypeVar("Result")


def load_model_and_metadata(
    model_dir: str | Path = "vlm_results/best_model",
    device: str = "auto",
    dtype: str = "auto",
    abstain_below: float | None = None,
) -> tuple[VLMClassifier, Any, dict[str, Any]]:
    """Load what `train_vlm.py` saved.

    Args:
        model_dir: folder with the weights; `training_metadata.json` is in it or next to it.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        abstain_below: predictions with a smaller confidence become None; default: as stored with the model; 0: none do.

    Returns:
        model: a `VLMClassifier` in evaluation mode, with its calibration; `model.model` is the transformers model.
        processor: the one of transformers.
        metadata: the content of `training_metadata.json`.

    Raises:
        UsageError: the folder does not exist, holds no trained classifier, or has a damaged file.
    """
    folder = Path(model_dir).expanduser()
    if not existing(folder).is_dir():
        if (folder.parent / PREVIOUS_RUN / folder.name).is_dir():
            raise UsageError(
                f"{folder} is not there: the run that overwrites it has no model yet. The model of the run before is "
                f"{folder.parent / PREVIOUS_RUN / folder.name}."
            )
        raise UsageError(
            f"{folder} is not a folder: train a model first (./run_vlm_training.sh --demo), or name its folder."
        )
    chosen, _ = pick_device(device)
    classifier, metadata = read_folder(folder, partial(_load, device=chosen, dtype=pick_dtype(dtype, chosen)))
    if abstain_below is not None:
        classifier.calibration = replace(classifier.calibration, abstain_below=abstain_below)
    return classifier, classifier.family.processor, metadata


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[VLMClassifier, dict[str, Any]]:
    metadata = read_metadata(folder)
    prompts = read_prompts(folder, metadata)
    classifier = VLMClassifier(load_family(folder, dtype, device), prompts).eval()
    classifier.calibration = Calibration.from_metadata(metadata, prompts)
    return classifier, metadata


def predict_single_image(
    model: VLMClassifier,
    processor: Any,
    image: str | Path | Image.Image | np.ndarray,
    metadata: dict[str, Any],
    explain: bool = True,
) -> tuple[str | None, float, str]:
    """Classify one image.

    Args:
        model, processor, metadata: what `load_model_and_metadata` returned.
        image: path, PIL image, or array (HxW, HxWx1, HxWx3 or HxWx4).
        explain: give the text; without it `full_response` is empty, and nothing is written but what scoring needs.

    Returns:
        prediction: the most probable class, or None if the model abstains.
        confidence: the calibrated probability of the most probable class within the label set, 0 to 1.
        full_response: a text whose answer is the prediction (see `vlm.classifier.explain`); empty if it abstains. With
            `--class-map` it has the readable name, and the prediction is the class.

    Raises:
        UnreadableImage: the image cannot be decoded, or the model's processor does not take it.
        RunError: the model's scores are not finite.
    """
    _check_same_model(model, processor, metadata)
    batch, refused = _collate(model, None, [Sample(open_image(image), 0, "image")])
    if batch is None:
        raise UnreadableImage(refused["image"])
    result = _predict(model, batch, explain)[0]
    if "error" in result:
        raise RunError(result["error"])
    return result["prediction"], result["confidence"], result["full_response"]


def predict_batch(
    model: VLMClassifier,
    processor: Any,
    image_paths: Iterable[str | Path],
    metadata: dict[str, Any],
    batch_size: int | None = None,
    explain: bool = True,
    show_progress: bool = True,
    exhaustive: bool = False,
    feature_cache: bool = False,
) -> dict[str, dict[str, Any]]:
    """Classify many image files, with a progress bar on stderr.

    Args:
        model, processor, metadata: what `load_model_and_metadata` returned.
        image_paths: files; a file that is named twice is classified once.
        batch_size: images in one forward pass; default: as many as the free memory has room for, up to 16 on the CPU
            and 128 on a GPU.
        explain: give the texts; without it `full_response` is empty, and nothing is written but what scoring needs.
        show_progress: False shows no bar.
        exhaustive: score every class to the end. Without it, classes that are too improbable to matter are left out
            early, and a probability may be wrong by `error_bound`.
        feature_cache: look up the images' vision features in the cache and add those that are missing: the next call
            on the same images skips the vision encoder.

    Returns:
        For each path, in the order given:
        prediction: the class, or None if the model abstains or there is an error.
        readable_name: what the model calls the class, only if it was trained with `--class-map` and gives a prediction.
        confidence: its probability within the label set, 0 to 1.
        probabilities: {class: probability}, calibrated; they add up to 1.
        error_bound: how much a probability can be wrong at most, 0 to 0.0001.
        full_response: the text; empty if the model abstains.
        abstained: True, only if it abstains.
        error: the reason, only if the file cannot be read or the processor refuses the image; then there is nothing but
            this and the prediction.

    Raises:
        TypeError, ValueError: the arguments do not belong together, or have a wrong type or value.
        Any error in the middle, KeyboardInterrupt too, has an attribute `results`: what was computed until then.
    """
    results: dict[str, dict[str, Any]] = {}
    options = batch_size, explain, show_progress, exhaustive, feature_cache
    try:
        for path, result in predict_each(model, processor, image_paths, metadata, *options):
            results[path] = result
    except BaseException as error:
        if results:
            vars(error)["results"] = results
            error.add_note(
                f"{len(results)} images were classified before. They are in the attribute `results` of this error; "
                "in a notebook: import sys; results = sys.last_value.results"
            )
        raise
    return results


def predict_each(
    model: VLMClassifier,
    processor: Any,
    image_paths: Iterable[str | Path],
    metadata: dict[str, Any],
    batch_size: int | None = None,
    explain: bool = True,
    show_progress: bool = True,
    exhaustive: bool = False,
    feature_cache: bool = False,
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """`predict_batch`, which yields each path with its result when its batch is computed."""
    _check_same_model(model, processor, metadata)
    if isinstance(image_paths, str | Path):
        raise TypeError(f"image_paths is one path ({image_paths}): pass a list of paths, or use predict_single_image.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    batch_size = batch_size or largest_batch(model, _settings_of(metadata))
    paths = list(dict.fromkeys(str(path) for path in image_paths))
    chunks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    cache = _open_cache(model, metadata) if feature_cache else None
    prepare = partial(_prepare, model, cache)
    # With a cache, preparing runs the vision encoder, which only one thread at a time may do.
    prepared = map(prepare, chunks) if feature_cache else _ahead(prepare, chunks)
    tolerance = 0.0 if exhaustive else TOLERANCE
    try:
        with Bar(len(paths), "classifying", enabled=show_progress) as bar:
            for chunk, (batch, errors) in zip(chunks, prepared, strict=True):
                predictions = iter(_predict(model, batch, explain, tolerance) if batch else ())
                for path in chunk:
                    yield path, errors.get(path) or next(predictions)
                bar.update(len(chunk))
    finally:
        if cache:
            cache.flush()


def _settings_of(metadata: dict[str, Any]) -> RunSettings:
    """The settings of the training, also of a version that wrote fewer of them or none."""
    return read_settings(metadata.get("settings", {}))


def _open_cache(model: VLMClassifier, metadata: dict[str, Any]) -> FeatureCache | None:
    """The cache for a trained model, with the size and number format of its training.

    It holds features before the connector, if the cache has a folder for this vision encoder, as after a training
    without --freeze-connector; else features after the connector, of which there are fewer. The weights are hashed for
    it, so it is opened once for all calls.
    """
    if model.inference_cache is None:
        settings = _settings_of(metadata)
        options = settings.cache_dtype, settings.cache_size
        before = open_cache(model.family, False, *options)
        known = before is None or before.folder.is_dir()
        model.inference_cache = before if known else open_cache(model.family, True, *options)
    return model.inference_cache


def _ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` in a thread that is one item ahead: images are decoded while the model is busy with the ones before."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: list[Future[Result]] = []
        for item in items:
            waiting.append(thread.submit(work, item))
            if len(waiting) > 1:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)


def _prepare(
    model: VLMClassifier, cache: FeatureCache | None, paths: list[str]
) -> tuple[Batch | None, dict[str, dict[str, Any]]]:
    """The batch of the images that can be read, None if there is none, and the results of the others."""
    samples, errors = [], {}
    for path in paths:
        try:
            samples.append(Sample(open_image(path), 0, path))
        except UnreadableImage as error:
            errors[path] = {"prediction": None, "error": str(error)}
    batch, refused = _collate(model, cache, samples)
    return batch, errors | {path: {"prediction": None, "error": reason} for path, reason in refused.items()}


def _collate(
    model: VLMClassifier, cache: FeatureCache | None, samples: list[Sample]
) -> tuple[Batch | None, dict[str, str]]:
    """The batch of the images that the processor takes, None if there is none, and why it does not take the others."""
    if not samples:
        return None, {}
    try:
        if cache:
            cache.add_missing(model.family, samples)
        return model.collate(with_response=False, cache=cache)(samples), {}
    except Exception:  # each processor has its own way to refuse an image
        reasons = {sample.name: model.family.refusal(sample.image) for sample in samples}
        refused = {name: f"{name}: {reason}" for name, reason in reasons.items() if reason}
        if not refused:
            raise
    batch, more = _collate(model, cache, [sample for sample in samples if sample.name not in refused])
    return batch, refused | more


@torch.no_grad()
def _predict(model: VLMClassifier, batch: Batch, explain: bool, tolerance: float = TOLERANCE) -> list[dict[str, Any]]:
    """For each image of a batch what `predict_batch` returns."""
    if model.training:
        model.eval()
    found = classify(model, batch.to(model.device), tolerance)
    probabilities = model.calibration.log_probabilities(found.scores).exp()  # (B, C)
    predictions = probabilities.argmax(-1).tolist()
    abstained = [model.calibration.abstains(confidence) for confidence in probabilities.amax(-1).tolist()]
    texts = [""] * len(predictions)
    if explain and not all(abstained):
        texts = explain_predictions(model, found, predictions)
    rows = zip(probabilities, predictions, found.unexplored.tolist(), texts, abstained, strict=True)
    return [image_result(model.prompts, *row) for row in rows]


def image_result(
    prompts: Prompts, probabilities: Tensor, best: int, bound: float, text: str, abstained: bool
) -> dict[str, Any]:
    """What `predict_batch` returns for one image, from its (C,) probabilities."""
    if probabilities.isnan().any():
        return {"prediction": None, "error": "the model's scores are not finite: try --dtype float32"}
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


def _check_same_model(model: VLMClassifier, processor: Any, metadata: dict[str, Any]) -> None:
    """The three belong together: a processor or class list of another model would give wrong answers without a word."""
    if not isinstance(model, VLMClassifier):
        raise TypeError(
            f"model is a {type(model).__name__}: pass the three values that load_model_and_metadata returned."
        )
    if processor is not model.family.processor or tuple(metadata["class_names"]) != model.class_names:
        raise ValueError(
            "model, processor and metadata belong to different models: pass the three values that one call of "
            "load_model_and_metadata returned."
        )
