"""A model folder -> predictions, from Python: of one image or of many."""

from collections.abc import Generator, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlm.classifier import Calibration, VLMClassifier, read_head
from vlm.common import RunError, read_folder
from vlm.config import HEAD_FILE, checked_keywords
from vlm.data import ImageSource, Sample, UnreadableImage, open_image
from vlm.families import load_family
from vlm.inference.classifying import Options, classify_items, collate, predict
from vlm.inference.items import Item
from vlm.inference.model_folder import find_model_folder, model_identity, read_metadata, read_prompts
from vlm.inference.naming import named_images
from vlm.machine import pick_device, pick_dtype


def load_model_and_metadata(
    model_dir: str | Path = "vlm_results/best_model",
    device: str = "auto",
    dtype: str = "auto",
    abstain_below: float | None = None,
) -> tuple[VLMClassifier, Any, dict[str, Any]]:
    """Load what `train_vlm.py` saved.

    Args:
        model_dir: folder with the weights; `training_metadata.json` is in it or next to it. Or a model on the hub that
            `--push-to-hub` has put there: owner/name, with @revision if that is not the newest.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        abstain_below: predictions with a smaller confidence become None; default: as stored with the model; 0: none do.

    Returns:
        model: a `VLMClassifier` in evaluation mode, with its calibration; `model.model` is the transformers model.
        processor: the one of transformers.
        metadata: the content of `training_metadata.json`.

    Raises:
        ValueError: device, dtype or abstain_below has another value.
        UsageError: the folder does not exist, holds no trained classifier, or has a damaged file.
        UsageError, RunError: the model on the hub cannot be found or downloaded.
    """
    given = checked_keywords("load_model_and_metadata", device=device, dtype=dtype, abstain_below=abstain_below)
    folder = find_model_folder(model_dir)
    chosen, _ = pick_device(given["device"])
    chosen_dtype = pick_dtype(given["dtype"], chosen)
    classifier, metadata = read_folder(folder, partial(_load, device=chosen, dtype=chosen_dtype))
    if given["abstain_below"] is not None:
        classifier.calibration = replace(classifier.calibration, abstain_below=given["abstain_below"])
    return classifier, classifier.family.processor, metadata


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[VLMClassifier, dict[str, Any]]:
    metadata = read_metadata(folder)
    prompts = read_prompts(folder, metadata)
    classifier = VLMClassifier(load_family(folder, dtype, device), prompts).eval()
    classifier.calibration = Calibration.from_metadata(metadata, prompts)
    if classifier.calibration.evidence is not None:
        classifier.head = read_head(folder / HEAD_FILE, prompts.class_names)
    classifier.identity = model_identity(folder, metadata)
    return classifier, metadata


def predict_single_image(
    model: VLMClassifier,
    processor: Any,
    image: ImageSource,
    metadata: dict[str, Any],
    explain: bool = True,
) -> tuple[str | None, float, str]:
    """Classify one image.

    Args:
        model, processor, metadata: what `load_model_and_metadata` returned.
        image: path, PIL image, array (HxW, HxWx1, HxWx3 or HxWx4), or the bytes of a file.
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
    batch, refused = collate(model, None, {0: Sample(open_image(image), 0, "image")})
    if batch is None:
        raise UnreadableImage(refused[0])
    result, _, _ = predict(model, batch, explain)[0]
    if "error" in result:
        raise RunError(result["error"])
    return result["prediction"], result["confidence"], result["full_response"]


def predict_batch(
    model: VLMClassifier,
    processor: Any,
    image_paths: Iterable[ImageSource],
    metadata: dict[str, Any],
    batch_size: int | None = None,
    explain: bool = True,
    show_progress: bool = True,
    exhaustive: bool = False,
    feature_cache: bool = False,
) -> dict[str, dict[str, Any]]:
    """Classify many images, with a progress bar on stderr.

    Args:
        model, processor, metadata: what `load_model_and_metadata` returned.
        image_paths: what `predict_single_image` takes, in any mixture, or one array (N, H, W, channels). A file that is
            named twice is classified once.
        batch_size: images in one forward pass; default: as many as the free memory has room for, up to 16 on the CPU
            and 128 on a GPU.
        explain: give the texts; without it `full_response` is empty, and nothing is written but what scoring needs.
        show_progress: False shows no bar.
        exhaustive: score every class to the end. Without it, classes that are too improbable to matter are left out
            early, and a probability may be wrong by `error_bound`.
        feature_cache: look up the images' vision features in the cache and add those that are missing: the next call
            on the same images skips the vision encoder.

    Returns:
        For each image, in the order given. The key of a file is its path; that of another image is its place in
        `image_paths`, from 0, such as "image 3":
        prediction: the class, or None if the model abstains or there is an error.
        readable_name: what the model calls the class, only if it was trained with `--class-map` and gives a prediction.
        confidence: its probability within the label set, 0 to 1.
        probabilities: {class: probability}, calibrated; they add up to 1.
        error_bound: how much a probability can be wrong at most, 0 to 0.0001.
        full_response: the text; empty if the model abstains.
        abstained: True, only if it abstains.
        error: the reason, only if the image cannot be read or the processor refuses it; then there is nothing but
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
    image_paths: Iterable[ImageSource],
    metadata: dict[str, Any],
    batch_size: int | None = None,
    explain: bool = True,
    show_progress: bool = True,
    exhaustive: bool = False,
    feature_cache: bool = False,
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """`predict_batch`, which yields each key with its result when the batch of the image is computed."""
    _check_same_model(model, processor, metadata)
    items = [Item(name, partial(open_image, image, name)) for name, image in named_images(image_paths)]
    batch_size = checked_keywords("predict_batch", batch_size=batch_size)["batch_size"]
    options = Options(batch_size, explain, show_progress, exhaustive, feature_cache)
    for item, result, _, _ in classify_items(model, metadata, items, options, len(items)):
        yield item.name, result


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
