"""Settings as they were given become settings that can work: defaults filled in, contradictions named.

Nothing heavy is imported here, so that a mistake in the flags is answered at once.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from vlm.common.errors import UsageError, reason
from vlm.config.formats import choose_format
from vlm.config.settings import (
    AUTO,
    BOTH,
    DEFAULT_DATASET,
    DEFAULT_MODEL,
    DEMO_DEFAULTS,
    IMAGES_PER_STEP,
    POSTERIOR,
    RESPONSE,
    TUNING_DEFAULTS,
    Settings,
)

# Flags that may differ between an interrupted run and the one that goes on from it.
NOT_PART_OF_THE_RUN = {
    "calibration",
    "score",
    "abstain_below",
    "target_precision",
    "probe",
    "no_feature_cache",
    "cache_size",
    "resume",
    "overwrite",
    "debug",
    "output_dir",
    "device",
    "workers",
    "threads",
    "compile",
    "save_minutes",
    "track",
    "use_wandb",
    "wandb_project",
}


def resolve(given: dict[str, Any], saved: dict[str, Any] | None = None) -> Settings:
    """Settings from the flags that were given, or from a saved run and the flags that may differ from it.

    Raises:
        UsageError: settings that cannot work, all of them at once.
    """
    given = {name: _from_file(name, value) for name, value in given.items()}
    if saved is not None:
        _check_same_run(given, saved)
        names = {item.name for item in dataclasses.fields(Settings)}
        names -= {"resume", "overwrite", "debug"}  # what was asked of the earlier start alone
        merged = {k: v for k, v in saved.items() if k in names} | given
        for one, other in (("abstain_below", "target_precision"), ("target_precision", "abstain_below")):
            if one in given and other not in given:  # both say when to abstain, and the new one counts
                merged[other] = None
    elif given.get("demo"):
        merged = DEMO_DEFAULTS | given
    else:
        merged = dict(given)
    settings = Settings(**merged)
    _fill(settings)
    problems = _problems(settings)
    if problems:
        raise UsageError("\n       ".join(problems))
    return settings


def _check_same_run(given: dict[str, Any], saved: dict[str, Any]) -> None:
    different = [
        f"--{name.replace('_', '-')} {value} (the interrupted run has {saved.get(name)})"
        for name, value in given.items()
        if name not in NOT_PART_OF_THE_RUN and saved.get(name) != value
    ]
    if different:
        raise UsageError(
            f"--resume goes on with the settings of the interrupted run, but was given {', '.join(different)}. "
            "Leave these out, or start again with --overwrite."
        )


def _fill(settings: Settings) -> None:
    settings.tune = settings.tune or "lora"
    for name, value in TUNING_DEFAULTS[settings.tune].items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.response_format = choose_format(settings.response_format, settings.prompt_template)
    if settings.objective is None and settings.label_smoothing:
        settings.objective = BOTH
    if settings.connector_learning_rate is None:
        settings.connector_learning_rate = settings.learning_rate
    if settings.batch_size is not None and settings.batch_size >= 1:
        set_batch_size(settings, settings.batch_size)
    if settings.eval_batch_size is None:
        settings.eval_batch_size = max(IMAGES_PER_STEP, settings.batch_size or 1)
    if not settings.demo:
        settings.model = settings.model or DEFAULT_MODEL
        settings.dataset = settings.dataset or DEFAULT_DATASET


def set_batch_size(settings: Settings, batch_size: int) -> None:
    """Fill in the batch size, and what follows from it. One that was not given is found when model and device are known
    (`vlm.machine.memory`)."""
    settings.batch_size = batch_size
    if settings.gradient_accumulation_steps is None:
        settings.gradient_accumulation_steps = math.ceil(IMAGES_PER_STEP / batch_size)


def _from_file(name: str, value: Any) -> Any:
    """The text of `@FILE` for the settings that may come from a file; else the value itself."""
    if name not in ("system_instructions", "prompt_template") or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{name.replace('_', '-')} {value}: not a readable text file ({reason(error)}).") from error


def _problems(s: Settings) -> list[str]:
    """What is wrong with the values, each with what was expected."""
    problems = []

    def expect(correct: bool, name: str, wanted: str) -> None:
        if not correct:
            value = getattr(s, name)
            shown = " ".join(value) if isinstance(value, list) else value
            problems.append(f"--{name.replace('_', '-')} {shown}: expected {wanted}.")

    for name in (
        "batch_size", "gradient_accumulation_steps", "eval_batch_size", "eval_steps", "max_samples", "lora_rank", "shots",
        "min_pixels", "max_pixels", "num_crops", "threads",
    ):  # fmt: skip
        value = getattr(s, name)
        expect(value is None or value >= 1, name, "a whole number of at least 1")
    expect(s.epochs >= 0, "epochs", "a whole number of at least 0")
    number = s.image_size.isdecimal() and int(s.image_size) > 0
    expect(number or s.image_size == AUTO, "image_size", "a number of pixels, or auto")
    for name in ("image_splitting", "max_pixels"):
        if number and getattr(s, name):
            problems.append(
                f"--image-size and --{name.replace('_', '-')} exclude each other: both say how large images become."
            )
    expect((s.min_pixels or 0) <= (s.max_pixels or math.inf), "min_pixels", f"no more than --max-pixels {s.max_pixels}")
    for name in ("learning_rate", "connector_learning_rate", "lora_alpha", "save_minutes", "cache_size"):
        expect(0 < getattr(s, name) < math.inf, name, "a number above 0")
    for name in ("weight_decay", "max_grad_norm"):
        expect(0 <= getattr(s, name) < math.inf, name, "a number of at least 0")
    for name in ("validation_ratio", "test_ratio"):
        expect(0 < getattr(s, name) < 1, name, "a share between 0 and 1, such as 0.15")
    expect(
        s.validation_ratio + s.test_ratio < 1,
        "validation_ratio",
        f"less than 1 together with --test-ratio {s.test_ratio}",
    )
    expect(0 <= s.warmup_ratio < 1, "warmup_ratio", "a share of at least 0 and below 1")
    expect(0 <= s.label_smoothing < 1, "label_smoothing", "a share of at least 0 and below 1")
    expect(0 <= s.lora_dropout < 1, "lora_dropout", "a share of at least 0 and below 1")
    expect(s.workers is None or s.workers >= 0, "workers", "a whole number of at least 0")
    expect(s.seed >= 0, "seed", "a whole number of at least 0")
    for name in ("abstain_below", "target_precision"):
        value = getattr(s, name)
        expect(value is None or 0 <= value <= 1, name, "a probability, 0 to 1")
    if s.class_names is not None:
        repeated = sorted({name for name in s.class_names if s.class_names.count(name) > 1})
        expect(len(s.class_names) >= 2, "class_names", "at least two names")
        expect(not repeated, "class_names", f"different names, but {', '.join(repeated)} is there twice")
    return problems + _contradictions(s)


def _contradictions(s: Settings) -> list[str]:
    """What cannot be asked for together."""
    problems = []
    if s.abstain_below is not None and s.target_precision is not None:
        problems.append(
            "--abstain-below and --target-precision exclude each other: a fixed threshold, or one picked on validation."
        )
    if s.demo and (s.model or s.dataset):
        problems.append(
            "--demo brings its own model and dataset: leave out --model and --dataset, or leave out --demo."
        )
    if s.reasoning_column and s.response_format == "answer-only":
        problems.append(
            "--reasoning-column is for responses with a reasoning, not answer-only (--response-format, or --prompt-template)."
        )
    if s.reasoning_column and s.objective == POSTERIOR:
        problems.append(
            "--objective posterior teaches the answer alone, and --reasoning-column a text: take --objective both."
        )
    if s.label_smoothing and s.objective == RESPONSE:
        problems.append(
            "--label-smoothing is about classes, and --objective response about tokens: take --objective posterior or both."
        )
    if s.load_in_4bit and s.load_in_8bit:
        problems.append(
            "--load-in-4bit and --load-in-8bit exclude each other: 4 bits need less memory, 8 are closer to the model."
        )
    if s.freeze_connector and s.tune != "lora":
        problems.append(
            f"--freeze-connector is for --tune lora, not {s.tune}, which trains the connector: leave it out."
        )
    if s.freeze_connector and s.connector_learning_rate != s.learning_rate:
        problems.append(
            "--connector-learning-rate and --freeze-connector exclude each other: a frozen connector is not trained."
        )
    if s.bits and s.tune != "lora":
        problems.append(
            f"--load-in-{s.bits}bit is for --tune lora, not {s.tune}: quantized weights cannot be trained themselves."
        )
    if s.resume and s.overwrite:
        problems.append("--resume and --overwrite exclude each other: go on with the earlier run, or delete it.")
    return problems
