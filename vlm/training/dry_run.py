"""--dry-run: everything up to the first steps of a run, and what they say about the whole of it. Nothing is kept."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from vlm.common import UsageError, format_table, note, process_count
from vlm.config import Settings, in_words, seconds_of
from vlm.data import ROLES, Data, Rows, Sample, Split, Step
from vlm.evaluation import load_metric
from vlm.families import fill_cache, outline, read_config
from vlm.machine import GIB, Texts, estimate, free_memory, pick_device
from vlm.training.loop import Trainer
from vlm.training.output import check_place, why_not_here
from vlm.training.running import trainer_of
from vlm.training.setup import Run, set_up
from vlm.training.time_needed import MARGIN, OTHERS
from vlm.training.tracker_check import check_trackers
from vlm.training.validation import split_metrics, validation_losses

WARM_UP, TIMED = 1, 4  # steps
LONGEST = 60.0  # seconds after which no further step is begun
EVALUATED = 64  # validation images of the timed evaluation
MOST_CLASSES = 40  # rows of the table


@dataclass(frozen=True)
class Seconds:
    """What was timed. feature: of one image, None if no features are kept; step: of an optimizer step, None if there is
    none; evaluation: of one image of an evaluation during the training; start: of reading the data and the model."""

    feature: float | None
    step: float | None
    evaluation: float
    start: float


def look_at_run(settings: Settings, dataset: object = None) -> None:
    """Load data and model, run a few steps, and print what the whole run would be. Nothing is written that stays.

    Args:
        dataset: see `load_data`.

    Raises:
        UsageError: settings or data with which a run cannot start; an earlier run in the output folder is only noted.
    """
    if process_count() > 1:
        raise UsageError("--dry-run looks at one process: start it without the launcher, as python train_vlm.py.")
    check_place(settings)
    problem = why_not_here(settings)
    check_trackers(settings.trackers)
    for name in settings.metrics or ():
        load_metric(name)
    free = free_memory(pick_device(settings.device)[0])
    with TemporaryDirectory(prefix="vlm_dry_run_") as folder:
        started = time.monotonic()
        run = set_up(settings, dataset, draft=Path(folder))
        start = time.monotonic() - started
        trainer = trainer_of(run)
        with _features_in(Path(folder)):
            rows = _token_rows(trainer) + _memory_rows(run, free)
            seconds = _time(trainer, start)
        rows += _measured_rows(run) + time_rows(trainer, seconds)
    print(format_table(class_rows(run.data, run.readable_names), headers=("class", *ROLES)) + "\n")
    print(format_table(rows))
    note("\nThis was a dry run: nothing was trained or kept.")
    if settings.trains_folds:
        note(f"note: this is one of {settings.folds} folds; all of them take about {settings.folds} times as long.")
    if problem:
        note(f"note: without --dry-run, this command stops: {problem}")


@contextmanager
def _features_in(folder: Path) -> Iterator[None]:
    """Vision features are kept in a folder, and the user's cache is left alone."""
    before = os.environ.get("VLM_CACHE")
    os.environ["VLM_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["VLM_CACHE"]
        if before is not None:
            os.environ["VLM_CACHE"] = before


# Timing


def _time(trainer: Trainer, start: float) -> Seconds:
    """Run and time features, steps and an evaluation, each on a few images of the run. The model is trained by them.

    Args:
        start: seconds that were timed before.
    """
    run, settings = trainer.run, trainer.settings
    steps = trainer.plan(0)[: WARM_UP + TIMED] if settings.epochs else []
    count = min(len(run.data.validation), max(EVALUATED, settings.eval_batch_size))
    validation = run.data.validation.take(np.linspace(0, len(run.data.validation) - 1, count).astype(int).tolist())
    trained = [] if run.data.stream else sorted({i for step in steps for i in step.indices})
    feature = _time_features(run, trained, validation)
    step = _time_steps(trainer, steps)
    small = replace(run, data=replace(run.data, validation=validation))
    started = time.monotonic()
    split_metrics(small, "validation", "timing an evaluation")
    validation_losses(small)
    return Seconds(feature, step, (time.monotonic() - started) / count, start)


def _time_features(run: Run, trained: Sequence[int], validation: Split) -> float | None:
    """Compute the features of some images, which the steps then read; seconds for one image, None if none are kept."""
    if run.settings.no_feature_cache:
        return None
    options = run.settings.cache_size, run.settings.cache_dtype, run.workers
    train = run.data.train.take(trained)
    started = time.monotonic()
    run.cache = fill_cache(run.classifier.family, (train, validation), *options)
    seconds = (time.monotonic() - started) / max(1, len({*train.keys, *validation.keys}))
    for i, key, check in zip(trained, train.keys, train.checks, strict=True):  # those of views follow from them
        run.data.train.keys[i], run.data.train.checks[i] = key, check
    if run.settings.views > 1:
        run.cache = fill_cache(run.classifier.family, (_Some(run.train_in(0), trained),), *options)
    return seconds if run.cache else None


class _Some(Split):
    """Some samples of a split, as the split gives them."""

    drawn = True

    def __init__(self, split: Split, positions: Sequence[int]) -> None:
        super().__init__(Rows([], [], []), positions, [split.labels[i] for i in positions])
        self._split = split

    def __getitem__(self, i: int) -> Sample:
        return self._split[int(self._indices[i])]


def _time_steps(trainer: Trainer, steps: Sequence[Step]) -> float | None:
    """Seconds of an optimizer step: the median without the first one, unless there is only one."""
    if not steps:
        return None
    trainer.run.model.train()
    batches = trainer.batches(steps)
    taken: list[float] = []
    for step in steps:
        started = time.monotonic()
        trainer.run_step(step, batches).tolist()  # waits for a GPU
        trainer.progress.step += 1
        taken.append(time.monotonic() - started)
        if sum(taken) > LONGEST:
            break
    return median(taken[WARM_UP:] or taken)


# What is printed


def class_rows(data: Data, readable_names: dict[str, str]) -> list[tuple[Any, ...]]:
    """The images of each class in each split, then those of all; of many classes the first ones.

    Returns:
        For each row its name, and the number of images in train, validation and test.
    """
    labels = [np.asarray(getattr(data, role).labels, dtype=np.int64) for role in ROLES]
    counts = np.stack([np.bincount(numbers, minlength=len(data.class_names)) for numbers in labels], axis=1)
    readable = [readable_names.get(name, name) for name in data.class_names]
    shown = [
        f"{code} ({name})" if code != name else code for code, name in zip(data.class_names, readable, strict=True)
    ]
    rows = [(name, *count) for name, count in zip(shown[:MOST_CLASSES], counts.tolist(), strict=False)]
    if len(shown) > MOST_CLASSES:
        rows.append((f"{len(shown) - MOST_CLASSES:,} more classes", *counts[MOST_CLASSES:].sum(0).tolist()))
    return [*rows, ("all", *counts.sum(0).tolist())]


def _token_rows(trainer: Trainer) -> list[tuple[str, str]]:
    rendered, lengths = trainer.run.classifier.rendered, trainer.response_lengths
    family = trainer.run.classifier.family
    image = max(map(len, family.encode_samples([trainer.run.data.train[0]]).token_ids))
    longest = len(rendered.prefix_ids) + image + len(rendered.question_ids) + max(lengths)
    return [
        ("tokens of the text before the image", f"{len(rendered.prefix_ids):,} (run once for all images of a step)"),
        ("tokens of the first training image", f"{image:,}"),
        ("tokens of the question", f"{len(rendered.question_ids):,}"),
        ("tokens of a response", f"{min(lengths):,} to {max(lengths):,}, median {median(lengths):g}"),
        ("longest sequence", f"{longest:,} tokens; the model reads {rendered.max_length:,}"),
    ]


def _memory_rows(run: Run, free: int) -> list[tuple[str, str]]:
    device = run.accelerator.device
    texts = Texts.exactly(run.classifier.rendered, run.data.edge)
    try:
        need = estimate(outline(read_config(run.folder)), run.settings, run.dtype, device.type, texts).total / GIB
        text = f"about {need:.1f} GiB (estimated)"
    except Exception:  # a model that loads but whose layout the estimate does not know
        text = "not known for this model"
    return [("memory", f"{text}; {free / GIB:.1f} GiB were free on {device.type} before")]


def _measured_rows(run: Run) -> list[tuple[str, str]]:
    """What torch has taken of a GPU at most; on a CPU it cannot be told from what else the process has."""
    if run.accelerator.device.type != "cuda":
        return []
    most = torch.cuda.max_memory_allocated(run.accelerator.device) / GIB
    return [("memory in these steps", f"{most:.1f} GiB (measured)")]


def time_rows(trainer: Trainer, seconds: Seconds) -> list[tuple[str, str]]:
    """How long the parts of the run take, and the whole of it."""
    data, settings = trainer.run.data, trainer.settings
    rows: list[tuple[str, str]] = []
    parts = [seconds.start]
    if seconds.feature is not None:
        views = min(settings.views, settings.epochs) if data.stream is None else 0
        images = views * len(data.train) + len(data.validation) + len(data.test)
        parts.append(images * seconds.feature)
        rows.append(("vision features", f"{in_words(parts[-1])} for {images:,} images, less if some are kept already"))
    before = sum(parts)
    if seconds.step is not None:
        steps, each = trainer.total_steps, trainer.steps_per_epoch
        parts.append(steps * seconds.step)
        text = f"{steps:,} of {trainer.run.images_a_step} images ({each:,} an epoch), {seconds.step:.3g} s each"
        rows += [("steps", text), ("training", in_words(parts[-1]))]
    validations = evaluations(trainer.total_steps, trainer.steps_per_epoch, settings.eval_steps)
    # Calibration looks at validation once more.
    images = (validations + 1) * len(data.validation) + (1 + settings.zero_shot) * len(data.test)
    parts.append(images * seconds.evaluation)
    rows.append(("evaluation", f"{in_words(parts[-1])} for {validations:,} on validation, calibration and test"))
    more = (("--align-connector", settings.align_connector), ("--probe", settings.probe))
    others = [
        "saving",
        "the checks after the test (free texts, other images)",
        *(flag for flag, asked_for in more if asked_for),
    ]
    without = f"without {', '.join(others[:-1])} and {others[-1]}"
    if settings.time_limit:
        left = (seconds_of(settings.time_limit) or 0.0) - before
        allowed = steps_within(trainer, seconds, left / ((settings.folds or 1) if settings.trains_folds else 1))
        rows.append(("time limit", f"{settings.time_limit}: {allowed}{' in each fold' * settings.trains_folds}"))
    return [*rows, ("the whole run", f"about {in_words(sum(parts))} {without}, on a machine as busy as now")]


def steps_within(trainer: Trainer, seconds: Seconds, limit: float) -> str:
    """In words, how many steps a time limit leaves time for.

    Args:
        limit: seconds, without those before the first step.
    """
    total, data = trainer.total_steps, trainer.run.data
    if seconds.step is None:
        return "there are no steps"
    validation = len(data.validation) * seconds.evaluation
    # After the last step come an evaluation, the calibration and the test; between steps, the other evaluations.
    after = MARGIN * (2 * validation + len(data.test) * seconds.evaluation) + OTHERS
    others = evaluations(total, trainer.steps_per_epoch, trainer.settings.eval_steps) - 1
    steps = int((limit - after) / (seconds.step + others * validation / total))
    if steps >= total:
        return f"all {total:,} steps"
    return f"about {steps:,} of {total:,} steps" if steps > 0 else "no time for a step: give a longer one"


def evaluations(total_steps: int, steps_per_epoch: int, every: int | None) -> int:
    """How many evaluations on the validation split a run has: at the end of each epoch and each `every` steps."""
    at = set(range(steps_per_epoch, total_steps + 1, steps_per_epoch)) | set(
        range(every, total_steps + 1, every) if every else ()
    )
    return max(1, len(at))
