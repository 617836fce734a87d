"""How many images go through the model at once: as many as the free memory has room for. And a warning if none fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from vlm.classifier import VLMClassifier
from vlm.common import note
from vlm.config import IMAGES_PER_STEP, RESPONSE, Settings
from vlm.families import Family, outline, read_config
from vlm.machine.memory import GIB, Texts, estimate, evaluation_bytes

BATCHES = (128, 64, 32, 16, 8, 4, 2)
BATCH_ON_CPU, BATCH_ON_GPU = 16, 128  # larger ones are no faster
TRAINING_SHARE = 0.7  # of the free memory; the rest is for other programs, and for what the estimate leaves out
INFERENCE_SHARE = 0.5


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, including those that torch holds in reserve."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def largest_batch(classifier: VLMClassifier, settings: Settings) -> int:
    """How many images a batch of an inference may have: as many as half of the free memory has room for.

    Args:
        settings: those of the classifier's training.
    """
    texts, free = Texts.exactly(classifier.rendered), free_memory(classifier.device)
    size = classifier.model.dtype.itemsize
    most = BATCH_ON_GPU if classifier.device.type == "cuda" else BATCH_ON_CPU
    for batch in BATCHES:
        wanted = replace(settings, eval_batch_size=batch)
        if batch <= most and evaluation_bytes(classifier.family, wanted, size, texts) < INFERENCE_SHARE * free:
            return batch
    return 1


def largest_training_batch(
    family: Family, settings: Settings, dtype: torch.dtype, device: torch.device, texts: Texts, free: int
) -> int:
    """How many images of an optimizer step go through the model at once: as many as the memory has room for.

    Args:
        free: bytes.
    """
    most = IMAGES_PER_STEP // (settings.gradient_accumulation_steps or 1)
    for batch in BATCHES:
        wanted = replace(settings, batch_size=batch)
        if batch <= most and estimate(family, wanted, dtype, device.type, texts).total < TRAINING_SHARE * free:
            return batch
    return 1


def fit_to_memory(
    folder: Path,
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
    texts: Texts,
    processes: int = 1,
    least: Callable[[int], int] = lambda batch_size: batch_size,
) -> int:
    """The batch size of a training: the given one, else the largest that fits. Warns if memory may not be enough.

    Args:
        folder: the model.
        processes: of this run; on a CPU they share its memory.
        least: the smallest of the batch sizes that all processes have found.

    Returns:
        images in one forward pass.
    """
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    try:
        family = outline(read_config(folder))
        batch_size = settings.batch_size or largest_training_batch(family, settings, dtype, device, texts, free)
    except Exception:  # a model that cannot even be outlined is refused, with the reason, when it is loaded
        family, batch_size = None, 1
    batch_size = settings.batch_size or least(batch_size)
    if family is not None:
        _warn(family, replace(settings, batch_size=batch_size), dtype, device, texts, free)
    return batch_size


def _warn(
    family: Family, settings: Settings, dtype: torch.dtype, device: torch.device, texts: Texts, free: int
) -> None:
    """Say it if the memory may not be enough, and which flags need less."""
    need = estimate(family, settings, dtype, device.type, texts).total
    if need <= free:
        return
    changed = {
        "--batch-size 1": replace(settings, batch_size=1),
        "--gradient-checkpointing": replace(settings, gradient_checkpointing=True),
        "--objective response": replace(settings, objective=RESPONSE),
        "--tune lora": settings.with_tuning("lora"),
        "--tune connector": settings.with_tuning("connector"),
        "--tune lora --load-in-4bit": replace(settings, tune="lora", load_in_4bit=True, load_in_8bit=False),
    }
    needs = {flags: estimate(family, other, dtype, device.type, texts).total for flags, other in changed.items()}
    less = "".join(f"{flags} ({other / GIB:.1f} GiB), " for flags, other in needs.items() if other < need)
    note(
        f"warning: this run needs about {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free on {device.type}: "
        f"it may run out of memory. Less is needed by {less}or a smaller --model (see --list-models)."
    )
