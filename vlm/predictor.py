"""A model folder -> predictions: one by one or in batches. C = classes."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image

from vlm.calibration import Calibration
from vlm.checkpoint import read_metadata, recover
from vlm.classifier import VLMClassifier
from vlm.data import Sample
from vlm.device import pick_device, pick_dtype
from vlm.errors import UsageError
from vlm.families import load_family
from vlm.pictures import UnreadablePicture, open_picture
from vlm.prompts import Prompts
from vlm.tracking import Bar

BATCH_SIZE = 8


def load_model_and_metadata(
    model_dir: str | Path = "vlm_results/best_model", device: str = "auto", dtype: str = "auto", abstain_below: float | None = None
) -> tuple[VLMClassifier, Any, dict[str, Any]]:
    """Load what `train_vlm.py` saved.

    Args:
        model_dir: folder with the weights; `training_metadata.json` lies in it or beside it.
        device: auto, cpu, cuda or mps. dtype: auto, float32, bfloat16 or float16.
        abstain_below: a prediction whose confidence is smaller is None; default: as stored with the model; 0 switches it off.

    Returns:
        model: a `VLMClassifier` in evaluation mode, with its calibration; `model.model` is the transformers model. processor: that of
            transformers.
        metadata: the content of `training_metadata.json`.

    Raises:
        UsageError: the folder is not there or holds no trained classifier.
    """
    folder = Path(model_dir).expanduser()
    recover(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: train a model first (./run_vlm_training.sh --demo), or name its folder.")
    metadata = read_metadata(folder)
    chosen, _ = pick_device(device)
    family = load_family(folder, pick_dtype(dtype, chosen), chosen)
    classifier = VLMClassifier(family, Prompts.from_json(metadata["prompts"])).eval()
    classifier.calibration = Calibration.from_metadata(metadata, classifier.prompts)
    if abstain_below is not None:
        classifier.calibration = replace(classifier.calibration, abstain_below=abstain_below)
    return classifier, family.processor, metadata


def predict_single_image(
    model: VLMClassifier, processor: Any, image: str | Path | Image.Image | np.ndarray, metadata: dict[str, Any], explain: bool = True
) -> tuple[str | None, float, str]:
    """Classify one picture.

    Args:
        model, processor, metadata: what `load_model_and_metadata` returned.
        image: path, PIL picture, or array (HxW, HxWx1, HxWx3 or HxWx4).
        explain: generate the text; without it `full_response` is empty and the call is faster.

    Returns:
        prediction: the most probable class, or None where the model abstains. confidence: the probability of the most probable class
        within the label set, calibrated, 0 to 1. full_response: the text.

    Raises:
        UnreadablePicture: the picture cannot be decoded.
    """
    _check_same_model(model, processor, metadata)
    result = _predict(model, [Sample(open_picture(image), 0, "picture")], explain)[0]
    return result["prediction"], result["confidence"], result["full_response"]


def predict_batch(
    model: VLMClassifier,
    processor: Any,
    image_paths: Iterable[str | Path],
    metadata: dict[str, Any],
    batch_size: int = BATCH_SIZE,
    explain: bool = True,
    show_progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Classify many picture files, with a progress bar on stderr.

    Args:
        image_paths: files; a file that is named twice is classified once.
        explain: generate the texts; without it `full_response` is empty and the call is faster.

    Returns:
        For each path, in the order given: prediction (str), confidence (0 to 1, within the label set), probabilities ({class:
        probability}, calibrated, they add up to 1) and full_response (str). Where the model abstains, prediction is None and abstained
        True; for a file that cannot be read: error (str), prediction None.
    """
    _check_same_model(model, processor, metadata)
    if isinstance(image_paths, str | Path):
        raise TypeError(f"image_paths is one path ({image_paths}): pass a list of paths, or use predict_single_image.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    paths = list(dict.fromkeys(str(path) for path in image_paths))
    results: dict[str, dict[str, Any]] = {}
    with Bar(len(paths), "classifying", enabled=show_progress) as bar:
        for start in range(0, len(paths), batch_size):
            some = paths[start : start + batch_size]
            results |= _predict_files(model, some, explain)
            bar.update(len(some))
    return results


def _predict_files(model: VLMClassifier, paths: list[str], explain: bool) -> dict[str, dict[str, Any]]:
    samples, results = [], {}
    for path in paths:
        results[path] = {}  # keeps the order
        try:
            samples.append(Sample(open_picture(path), 0, path))
        except UnreadablePicture as error:
            results[path] = {"prediction": None, "error": str(error)}
    for sample, result in zip(samples, _predict(model, samples, explain), strict=True):
        results[sample.name] = result
    return results


@torch.no_grad()
def _predict(model: VLMClassifier, samples: list[Sample], explain: bool) -> list[dict[str, Any]]:
    if not samples:
        return []
    if model.training:
        model.eval()
    batch = model.collate(with_response=False)(samples)
    reading = model.read(send_to_device(batch, model.device))
    probabilities = model.calibration.log_probabilities(model.score(reading)).exp()
    texts = model.write(reading) if explain else [""] * len(samples)
    results = []
    for row, text in zip(probabilities, texts, strict=True):
        best = int(row.argmax())
        result = {
            "prediction": model.class_names[best],
            "confidence": float(row[best]),
            "probabilities": dict(zip(model.class_names, row.tolist(), strict=True)),
            "full_response": text,
        }
        if model.calibration.abstains(result["confidence"]):
            result |= {"prediction": None, "abstained": True}
        results.append(result)
    return results


def _check_same_model(model: VLMClassifier, processor: Any, metadata: dict[str, Any]) -> None:
    """The three belong together: a processor or class list of another model would give wrong answers without a word."""
    if not isinstance(model, VLMClassifier):
        raise TypeError(f"model is a {type(model).__name__}: pass the three values that load_model_and_metadata returned.")
    if processor is not model.family.processor or tuple(metadata["class_names"]) != model.class_names:
        raise ValueError(
            "model, processor and metadata belong to different models: pass the three that one load_model_and_metadata returned."
        )
