"""From settings to a run that can start: device, data, model, what is trained, and a look at one sample."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

import vlm
from vlm.classifier import Objective, VLMClassifier, balanced_weights, usual_objective
from vlm.common import doing, format_table, note, usual_modes, writing
from vlm.config import NEW_PROMPTS, RunSettings, Settings
from vlm.conversation import Prompts, build_prompts, longest_reasoning
from vlm.data import (
    ROLES,
    Data,
    Split,
    as_seen,
    check_what_is_known,
    leave_out_refused,
    load_data,
    model_folder,
    pack_keys,
)
from vlm.families import (
    DEMO_NAME,
    Family,
    FeatureCache,
    build_demo_model,
    check_quantization,
    checkpoint_blocks,
    compile_blocks,
    fill_cache,
    load_family,
)
from vlm.machine import Texts, check_compiler, fit_to_memory, pick_device, pick_dtype, pick_threads, share_of_cores
from vlm.sharing import origin_of
from vlm.training.class_map import point_out_names
from vlm.training.deadline import Deadline
from vlm.training.preflight import point_out_contradictions, preflight, settings_rows
from vlm.training.prompts import choose_prompts
from vlm.training.resume_state import Progress
from vlm.training.run_files import NEW_DEMO_MODEL
from vlm.training.tuning import parameter_groups, prepare_tuning, trained_parameters

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "scikit-learn", "pillow")
# How long one process waits for another: one computes the vision features, or writes, while the others wait.
LONGEST_WAIT = timedelta(hours=12)
BRIEF = ("fold", "groups", *ROLES)  # rows of the table of the data that differ from fold to fold
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Run:
    """A run that can start.

    Attributes:
        folder: the model as it was before the training.
        classifier: what is trained. model: the same as the training calls it, wrapped if there are several processes.
        cache: the vision features of all images, if they are kept.
        learned: the trained weights by name, which are saved to resume from.
        metadata: what the model folder says about the run.
        workers: processes that prepare images.
        seconds_to_load: the model.
    """

    settings: RunSettings
    accelerator: Accelerator
    dtype: torch.dtype
    data: Data
    folder: Path
    classifier: VLMClassifier
    model: nn.Module
    cache: FeatureCache | None
    optimizer: Any
    learned: dict[str, Tensor]
    metadata: dict[str, Any]
    workers: int
    seconds_to_load: float = 0.0

    def train_in(self, epoch: int) -> Split:
        """The training images as an epoch sees them."""
        return as_seen(self.data.train, self.settings, epoch)

    @property
    def images_an_epoch(self) -> int:
        """How many images an epoch trains on; those of a stream are one epoch."""
        if self.data.stream is None or self.settings.max_steps is None:
            return len(self.data.train)
        return self.settings.max_steps * self.images_a_step

    @property
    def images_a_step(self) -> int:
        """The images of an optimizer step, in all processes; the last step of an epoch may have fewer."""
        return self.settings.batch_size * self.settings.gradient_accumulation_steps * self.accelerator.num_processes

    def images_until(self, progress: Progress) -> int:
        """How many images the training has seen so far."""
        in_epoch = min(progress.step_in_epoch * self.images_a_step, self.images_an_epoch)
        return progress.epoch * self.images_an_epoch + in_epoch

    @property
    def output(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def readable_names(self) -> dict[str, str]:
        """Class name -> what the model is shown (`--class-map`); empty if it is shown the class names."""
        prompts = self.metadata["prompts"]
        return dict(zip(prompts["class_names"], prompts.get("readable_names", ()), strict=False))


def set_up(
    settings: Settings,
    dataset: object = None,
    draft: Path | None = None,
    deadline: Deadline | None = None,
    brief: bool = False,
) -> Run:
    """Load and print everything, in the order in which a mistake is cheapest to find: device, data, model, one sample.

    Args:
        dataset: see `load_data`.
        draft: only look: a folder that takes the place of the output folder. No vision features are computed.
        deadline: when it has to be done; None: at any time. Vision features that are computed until then are kept.

        brief: print only the splits, because an earlier fold has printed the rest.

    Raises:
        UsageError: anything in settings or data with which the run cannot start.
        RunError: the time is over.
    """
    deadline = deadline or Deadline(None, 0.0, inf)
    deadline.check()  # the imports take seconds
    torch.set_num_threads(pick_threads(settings.threads))
    device, reason = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    check_quantization(settings.bits, device)
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=PRECISIONS[dtype], kwargs_handlers=[waiting])

    with doing("reading the dataset"):
        data = load_data(settings, dataset)
    deadline.check()
    note("\n" + format_table([row for row in data.summary if not brief or row[0] in BRIEF]) + "\n")
    prompts = build_prompts(settings, data.class_names)
    with doing("loading the model"):
        folder, revision = _find_model(settings, data.class_names, accelerator, draft)
        chosen = choose_prompts(prompts, settings, folder)
        prompts, settings = chosen.prompts, replace(settings, prompts=chosen.kind)
        if chosen.kind == NEW_PROMPTS:
            point_out_contradictions(settings)
        point_out_names(prompts)
        batch_size = _fit_batch(folder, settings, prompts, data, dtype, accelerator)
        started = time.monotonic()
        family, image_size = _load_model(folder, settings, data, dtype, accelerator)
        seconds_to_load = time.monotonic() - started
    deadline.check()
    classifier = _build_classifier(family, prompts, settings, data)
    run_settings = settings.complete(batch_size, classifier.objective.name)
    rows = settings_rows(run_settings, classifier, reason, dtype, accelerator.num_processes)
    if not brief:
        note(format_table(rows) + "\n")
        preflight(classifier, data.train.example)

    workers = _loader_processes(settings, device)
    check = deadline.check_features
    cache = None if draft else _fill_cache(family, settings, data, accelerator, workers, check)
    learned: dict[str, Tensor] = dict(trained_parameters(classifier))
    if settings.freeze_connector:  # trainable until here if it is aligned, so that the cache holds what it reads
        family.connector.requires_grad_(False)
    model, optimizer = accelerator.prepare(classifier, _optimizer(classifier, settings, accelerator.device))
    return Run(
        settings=run_settings,
        accelerator=accelerator,
        dtype=dtype,
        data=data,
        folder=folder,
        classifier=classifier,
        model=model,
        cache=cache,
        optimizer=optimizer,
        learned=learned,
        metadata=_metadata(run_settings, data, classifier, chosen.texts, folder, revision, image_size),
        workers=workers,
        seconds_to_load=seconds_to_load,
    )


def _optimizer(classifier: VLMClassifier, settings: Settings, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with the learning rate and the weight decay of each."""
    groups = parameter_groups(
        classifier, settings.weight_decay, settings.learning_rate, settings.connector_learning_rate
    )
    return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))


def least(accelerator: Accelerator, number: int) -> int:
    """The smallest of a number that each process has."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())


def build_objective(settings: Settings, classifier: VLMClassifier, labels: Sequence[int]) -> Objective:
    """What the training minimizes, by the settings and the labels of the training images."""
    weights = balanced_weights(labels, len(classifier.class_names)) if settings.class_balance else None
    opening = len(classifier.rendered.opening_ids)
    name = settings.objective or usual_objective(classifier.tree, opening, classifier.family.shares_prefix)
    return Objective(name, classifier.tree, opening, settings.label_smoothing, weights).to(classifier.device)


def _find_model(
    settings: Settings, class_names: list[str], accelerator: Accelerator, draft: Path | None
) -> tuple[Path, str | None]:
    """The folder of the model, and its commit on the hub."""
    if settings.model is not None:  # it is None only in the demo
        return model_folder(settings.model, settings.model_revision)
    folder = (draft or Path(settings.output_dir)) / NEW_DEMO_MODEL
    if accelerator.is_main_process:
        with writing(folder):
            build_demo_model(folder, settings, class_names)
            usual_modes(folder)
    accelerator.wait_for_everyone()
    return folder, None


def _fit_batch(
    folder: Path, settings: Settings, prompts: Prompts, data: Data, dtype: torch.dtype, accelerator: Accelerator
) -> int:
    """The batch size: the one that was given, or what all processes have memory for."""
    texts = Texts.of(prompts, [text for text in data.train.reasonings if text], data.edge)
    processes = accelerator.num_processes
    return fit_to_memory(folder, settings, dtype, accelerator.device, texts, processes, partial(least, accelerator))


def _load_model(
    folder: Path, settings: Settings, data: Data, dtype: torch.dtype, accelerator: Accelerator
) -> tuple[Family, str | None]:
    """The family with what is trained unfrozen, and in words what `--image-size` came to."""
    options = settings.image_options(data.edge)
    family = load_family(folder, dtype, accelerator.device, options, settings.bits)
    image_size = family.size_text(options["image_size"]) if "image_size" in options else None
    if image_size:
        note(f"image size: {image_size}\n")
    prepare_tuning(family, settings)
    if settings.gradient_checkpointing:
        checkpoint_blocks(family)
    if settings.compile:
        check_compiler(accelerator.device)
        compile_blocks(family)
    return family, image_size


def _build_classifier(family: Family, prompts: Prompts, settings: Settings, data: Data) -> VLMClassifier:
    """What is trained. Images that it cannot take leave the data."""
    if settings.reasoning_column:
        prompts = replace(prompts, reasoning_tokens=longest_reasoning(data.train.reasonings, family))
    classifier = VLMClassifier(family, prompts)
    leave_out_refused(data, family.refusal_of_size)
    classifier.objective = build_objective(settings, classifier, data.train.labels)
    return classifier


def _loader_processes(settings: Settings, device: torch.device) -> int:
    if settings.workers is not None:
        return settings.workers
    return min(8, share_of_cores()) if device.type == "cuda" else 0  # on the CPU they would take the model's cores


def _fill_cache(
    family: Family,
    settings: Settings,
    data: Data,
    accelerator: Accelerator,
    workers: int,
    check: Callable[[], None],
) -> FeatureCache | None:
    """The vision features of the images, of as many as fit; None if none are kept."""
    if settings.no_feature_cache:
        return None
    splits: tuple[Split, ...] = (data.validation, data.test)
    if settings.epochs and data.stream is None:
        splits = (data.train, *splits)
    if settings.views > 1:  # after train, since their keys follow from those of its images
        splits += tuple(as_seen(data.train, settings, epoch) for epoch in range(min(settings.views, settings.epochs)))
    with accelerator.local_main_process_first():  # the others of this machine find what the first one has computed
        cache = fill_cache(family, splits, settings.cache_size, settings.cache_dtype, workers, data.known, check)
    if not data.checked:
        check_what_is_known(data)
    return cache


def _metadata(
    settings: RunSettings,
    data: Data,
    classifier: VLMClassifier,
    texts: dict[str, Any],
    folder: Path,
    revision: str | None,
    image_size: str | None,
) -> dict[str, Any]:
    """What the model folder tells inference, and people."""
    return {
        "format_version": 1,
        "run_id": uuid4().hex,  # a resumed run takes over that of the interrupted one
        "model": DEMO_NAME if settings.demo else settings.model,
        "model_revision": revision,
        "origin": origin_of(folder, settings.model, revision),
        "model_type": classifier.model.config.model_type,
        "class_names": list(classifier.class_names),
        "task_description": texts["task_description"],
        "prompts": classifier.prompts.to_json(),
        "plain_prompt": classifier.family.plain_prompt(classifier.prompts),
        "texts": texts,
        "dataset": data.source,
        "train_images": None if data.stream else pack_keys(data.train.keys),
        "validation_images": pack_keys(data.validation.keys),  # the best model is chosen and calibrated on them
        "settings": settings.to_json(),
        "image_size": image_size,
        "versions": {"vlm": vlm.__version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
