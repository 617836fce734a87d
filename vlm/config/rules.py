"""What cannot be asked for together, one row a rule, and what is wrong with settings; values.py has single values."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vlm.common import shorten
from vlm.config.defaults import (
    AUTO,
    BOTH,
    DORA,
    HEAD,
    LORA,
    NO_TRACKER,
    PISSA,
    POSTERIOR,
    PROMPTS_OF_MODEL,
    RESPONSE,
    TRAIN_DEMO_MODEL,
)
from vlm.config.names import DEMO_MODEL
from vlm.config.settings import Settings
from vlm.config.values import VALUES

OLD_SCORE = "mean"  # of earlier versions
RENAMED = {"track": "report_to"}  # settings whose key in saved files is older than their flag
LONGEST_VALUE = 200  # characters of a value in a message


class Conflict(NamedTuple):
    """What cannot be asked for together. message: filled in with the settings as `s`."""

    is_there: Callable[[Settings], Any]
    message: str


OF_THE_DEMO = TRAIN_DEMO_MODEL.format(folder=f"{{s.output_dir}}/{DEMO_MODEL}")
CONFLICTS = (
    Conflict(
        lambda s: not s.output_dir.strip(),
        "--output-dir is empty: expected a folder for the results, such as vlm_results.",
    ),
    Conflict(
        lambda s: s.image_size != AUTO and s.image_splitting,
        "--image-size and --image-splitting exclude each other: both say how large images become.",
    ),
    Conflict(
        lambda s: s.image_size != AUTO and s.max_pixels,
        "--image-size and --max-pixels exclude each other: both say how large images become.",
    ),
    Conflict(
        lambda s: s.min_pixels and s.max_pixels and s.min_pixels > s.max_pixels,
        "--min-pixels {s.min_pixels}: expected no more than --max-pixels {s.max_pixels}.",
    ),
    Conflict(
        lambda s: s.validation_ratio + s.test_ratio >= 1,
        "--validation-ratio {s.validation_ratio}: expected less than 1 together with --test-ratio {s.test_ratio}.",
    ),
    Conflict(
        lambda s: s.score == OLD_SCORE,
        "--score mean no longer exists: give --score sum, or auto for the one that validation chooses.",
    ),
    Conflict(
        lambda s: s.abstain_below is not None and s.target_precision is not None,
        "--abstain-below and --target-precision exclude each other: one is a fixed threshold, the other finds one.",
    ),
    Conflict(
        lambda s: s.demo and (s.model or s.dataset),
        "--demo brings its own model and dataset: leave out --model and --dataset. "
        f"To train its small model on your images after a demo: {OF_THE_DEMO}",
    ),
    Conflict(
        lambda s: s.prompts == PROMPTS_OF_MODEL and (s.given_texts or s.demo),
        "--prompts model takes the prompts that --model was trained with: leave out --demo, --task-description, "
        "--system-instructions and the other flags about prompts, or give --prompts new.",
    ),
    Conflict(
        lambda s: s.reasoning_column and s.response_format == "answer-only",
        "--reasoning-column needs responses with a reasoning, but they are answer-only: "
        "change --response-format or --prompt-template.",
    ),
    Conflict(
        lambda s: s.reasoning_column and s.objective == POSTERIOR,
        "--objective posterior does not teach the texts of --reasoning-column: give --objective both.",
    ),
    Conflict(
        lambda s: s.label_smoothing and s.objective == RESPONSE,
        "--label-smoothing smooths over classes, and --objective response learns tokens: "
        "give --objective posterior or both.",
    ),
    Conflict(
        lambda s: s.load_in_4bit and s.load_in_8bit,
        "--load-in-4bit and --load-in-8bit exclude each other: 4 bits need less memory, 8 are closer to the model.",
    ),
    Conflict(
        lambda s: s.bits and s.tune != "lora",
        "--load-in-{s.bits}bit needs --tune lora, not {s.tune}: quantized weights cannot be trained themselves.",
    ),
    Conflict(
        lambda s: s.lora_variant != LORA and s.tune != "lora",
        "--lora-variant {s.lora_variant} needs --tune lora, not {s.tune}: leave one of the two out.",
    ),
    Conflict(
        lambda s: s.lora_variant == PISSA and s.bits,
        "--lora-variant pissa and --load-in-{s.bits}bit exclude each other: PiSSA takes a part out of the weights, and "
        "quantized ones cannot be changed. Give --lora-variant lora.",
    ),
    Conflict(
        lambda s: s.lora_variant == DORA and s.load_in_8bit,
        "--lora-variant dora and --load-in-8bit exclude each other: bitsandbytes cannot use weights of 8 bits after "
        "DoRA has read them. Give --load-in-4bit, or --lora-variant lora.",
    ),
    Conflict(
        lambda s: s.freeze_connector and s.tune != "lora",
        "--freeze-connector needs --tune lora, not {s.tune}, which trains the connector: leave it out.",
    ),
    Conflict(
        lambda s: s.freeze_connector and s.connector_learning_rate != s.learning_rate,
        "--connector-learning-rate and --freeze-connector exclude each other: a frozen connector is not trained.",
    ),
    Conflict(
        lambda s: s.align_connector and s.tune == "full",
        "--align-connector needs a frozen vision encoder, and --tune full trains it: give --tune lora or connector.",
    ),
    Conflict(
        lambda s: s.align_connector and s.no_feature_cache,
        "--align-connector and --no-feature-cache exclude each other: the connector is aligned on cached features.",
    ),
    Conflict(
        lambda s: s.align_connector and s.epochs == 0,
        "--align-connector and --epochs 0 exclude each other: with 0 epochs nothing is trained.",
    ),
    Conflict(
        lambda s: s.augment_views and s.views == 1 and s.augment_views > 1,
        "--augment-views {s.augment_views} says how many views there are, but not how they differ: "
        "add --augment light, --augment-flips or --augment-turns.",
    ),
    Conflict(
        lambda s: s.streaming and s.max_steps is None,
        "--streaming needs --max-steps N: how many images there are is not known before everything was read.",
    ),
    Conflict(
        lambda s: s.max_steps is not None and not s.streaming,
        "--max-steps is for --streaming: give --epochs instead.",
    ),
    Conflict(
        lambda s: s.streaming and (s.shots or s.class_balance or s.align_connector or s.probe or s.views > 1),
        "--streaming excludes --shots, --class-balance, --align-connector, --augment and --probe, which need to know "
        "all training images: leave these out.",
    ),
    Conflict(
        lambda s: s.evidence in (HEAD, BOTH) and s.streaming,
        "--evidence {s.evidence} and --streaming exclude each other: the head is fitted to all images at once.",
    ),
    Conflict(
        lambda s: s.evidence in (HEAD, BOTH) and s.calibration == "none",
        "--evidence {s.evidence} needs a calibration, which weighs it: leave out --calibration none.",
    ),
    Conflict(
        lambda s: s.exclude and s.streaming,
        "--exclude and --streaming exclude each other: the names of a stream are not known before it is read.",
    ),
    Conflict(
        lambda s: s.streaming and s.dataset_split,
        "--streaming and --dataset-split exclude each other: a stream has no parts.",
    ),
    Conflict(
        lambda s: s.demo and s.dataset_split,
        "--demo and --dataset-split exclude each other: the demo's splits are always the same.",
    ),
    Conflict(
        lambda s: s.streaming and s.demo,
        "--streaming and --demo exclude each other: the demo's images are on this machine already.",
    ),
    Conflict(
        lambda s: s.group_column and s.group_pattern,
        "--group-column and --group-pattern exclude each other: both say what belongs together.",
    ),
    Conflict(
        lambda s: s.streaming and (s.group_column or s.group_pattern),
        "--streaming and groups exclude each other: a stream is not cut.",
    ),
    Conflict(
        lambda s: s.folds and s.streaming,
        "--folds and --streaming exclude each other: a stream is not divided into folds.",
    ),
    Conflict(
        lambda s: s.folds and s.epochs == 0,
        "--folds and --epochs 0 exclude each other: with 0 epochs nothing is trained, so there is nothing to repeat.",
    ),
    Conflict(
        lambda s: s.folds and s.test_ratio != Settings.test_ratio,
        "--folds and --test-ratio exclude each other: each fold is the test split once.",
    ),
    Conflict(
        lambda s: s.folds and s.fold is None and s.push_to_hub,
        "--folds and --push-to-hub exclude each other: a cross-validation has no model of its own to push.",
    ),
    Conflict(
        lambda s: s.public and not s.push_to_hub,
        "--public says how to push, and not where to: add --push-to-hub OWNER/NAME, or leave it out.",
    ),
    Conflict(
        lambda s: s.fold and (s.folds is None or s.fold > s.folds),
        "--fold {s.fold}: expected it with --folds, and at most as large.",
    ),
    Conflict(
        lambda s: NO_TRACKER in (s.track or []) and len(set(s.track or [])) > 1,
        "--report-to none excludes other trackers: leave out none, or the others.",
    ),
    Conflict(
        lambda s: s.patience and s.epochs == 0,
        "--patience and --epochs 0 exclude each other: with 0 epochs nothing is trained.",
    ),
    Conflict(
        lambda s: s.resume and s.overwrite,
        "--resume and --overwrite exclude each other: continue the earlier run, or delete it.",
    ),
    Conflict(
        lambda s: s.resume and (s.dry_run or s.show_data),
        "--resume continues a run, and --dry-run and --show-data only look: leave out --resume.",
    ),
    Conflict(
        lambda s: s.dry_run and s.show_data,
        "--dry-run and --show-data exclude each other: look at the data first, then at the run.",
    ),
)


def flag_of(name: str) -> str:
    """The flag of a setting: batch_size -> --batch-size."""
    return f"--{RENAMED.get(name, name).replace('_', '-')}"


def problems(settings: Settings) -> list[str]:
    """What cannot work in the settings, each with what was expected."""
    conflicts = [rule.message.format(s=settings) for rule in CONFLICTS if rule.is_there(settings)]
    return [
        *_wrong_values(settings),
        *_unknown_choices(settings),
        *_repeated_names(settings.class_names or []),
        *conflicts,
    ]


def _wrong_values(settings: Settings) -> Iterator[str]:
    for rule in VALUES:
        for name in rule.names:
            value = getattr(settings, name)
            if value is not None and not rule.fits(value):
                yield f"{_as_given(name, value)}: expected {rule.wanted}."


def _unknown_choices(settings: Settings) -> Iterator[str]:
    """argparse checks those of the command line; these may come from a file."""
    for item in dataclasses.fields(settings):
        choices, value = item.metadata.get("choices", ()), getattr(settings, item.name)
        words = value if isinstance(value, list) else [value]
        unknown = [word for word in words if choices and word not in (*choices, None, OLD_SCORE)]
        if unknown:
            yield f"{_as_given(item.name, unknown)}: expected {', '.join(choices)}."


def _as_given(name: str, value: Any) -> str:
    """A flag with its value, as in a command; a long value is cut, and an empty one is seen."""
    words = value if isinstance(value, list) else [value]
    return f"{flag_of(name)} {shorten(' '.join(map(_seen, words)), LONGEST_VALUE)}"


def _seen(word: Any) -> str:
    return str(word) if str(word).strip() else f'"{word}"'


def _repeated_names(names: list[str]) -> Iterator[str]:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        yield (
            f"{_as_given('class_names', names)}: expected different names, "
            f"but these are there more than once: {shorten(', '.join(repeated), LONGEST_VALUE)}."
        )
