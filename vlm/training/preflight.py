"""What is printed before the first step: settings, contradictions in the texts, one sample as the model sees it."""

from collections.abc import Sequence
from typing import Any

import torch

from vlm.classifier import IGNORED, VLMClassifier, vlm_collate_fn
from vlm.common import UsageError, dtype_name, joined, note, shorten
from vlm.config import (
    IMAGES_PER_STEP,
    PROMPTS_OF_MODEL,
    RunSettings,
    Settings,
    flag_of,
    other_settings,
    stated_format,
)
from vlm.conversation import LONGEST_LIST, Prompts, leaves_list_out
from vlm.data import Sample
from vlm.families import cache_root

SHOWN_SETTINGS = (
    "tune",
    "objective",
    "epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "connector_learning_rate",
    "weight_decay",
    "warmup_ratio",
    "eval_steps",
    "seed",
    "output_dir",
)
SHOWN_ELSEWHERE = {"model", "dataset", "device", "dtype", "response_format", "demo", "cache_size", "prompts"}
LONGEST_VALUE = 80  # characters of a setting


def settings_rows(
    settings: RunSettings, classifier: VLMClassifier, device: str, dtype: torch.dtype, processes: int
) -> list[tuple[str, str]]:
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    every = classifier.model.num_parameters()  # quantized ones too, of which there are several in a number
    quantized = f", the language model's weights in {settings.bits} bits" if settings.bits else ""
    rows = [
        ("model", "the demo's, 3 + 3 layers with random weights" if settings.demo else str(settings.model)),
        ("device", device),
        ("number format", dtype_name(dtype) + quantized),
        *_prompt_rows(settings, classifier.prompts),
        ("trained parameters", f"{trained:,} of {every:,} ({trained / every:.1%})"),
    ]
    shown = {
        name: "each epoch" if getattr(settings, name) is None else str(getattr(settings, name))
        for name in SHOWN_SETTINGS
    }
    if settings.streaming:
        del shown["epochs"]
        shown["steps"] = f"{settings.max_steps:,} (--max-steps)"
    if settings.connector_learning_rate == settings.learning_rate:  # so it is where the connector is frozen, too
        del shown["connector_learning_rate"]
    if settings.batch_size == 1:
        shown["batch_size"] += f" (with --batch-size {IMAGES_PER_STEP} a step is faster; it needs more memory)"
    rows += [(_title(name), value) for name, value in shown.items()]
    rows += _augmentation_row(settings)
    rows += [
        (_title(name), _shown(value))
        for name, value in other_settings(settings).items()
        if name not in {*SHOWN_SETTINGS, *SHOWN_ELSEWHERE} and not name.startswith("augment")
    ]
    if processes > 1:
        rows.append(("processes", f"{processes}, each with batches of its own"))
    if settings.tune != "full" and not settings.no_feature_cache and classifier.family.can_cache:
        rows.append(
            (
                "vision features",
                f"kept in {cache_root()}, all runs together at most {settings.cache_size:g} GB (--cache-size)",
            )
        )
    return rows


def _title(name: str) -> str:
    """A setting as its flag calls it, without hyphens."""
    return flag_of(name).removeprefix("--").replace("-", " ")


def _prompt_rows(settings: Settings, prompts: Prompts) -> list[tuple[str, str]]:
    if settings.prompts == PROMPTS_OF_MODEL:
        return [("prompts", "those that the model was trained with"), ("response format", prompts.response_format)]
    return [("response format", _format_row(settings)), *_class_list_row(settings, prompts.shown_names)]


def _augmentation_row(settings: Settings) -> list[tuple[str, str]]:
    """What the training sees of each image, if that is more than itself."""
    if settings.views == 1:
        return []
    how = [] if settings.augment == "none" else [f"changed as by --augment {settings.augment}"]
    how += ["mirrored half of the time"] if settings.augment_flips else []
    how += ["turned by quarters"] if settings.augment_turns else []
    return [("augmentation", f"{settings.views} views of each training image: itself, and others {', '.join(how)}")]


def _shown(value: Any) -> str:
    """A setting as the table shows it."""
    if value is True:
        return "yes"
    return shorten(" ".join(map(str, value)) if isinstance(value, list) else str(value), LONGEST_VALUE)


def _class_list_row(settings: Settings, shown_names: Sequence[str]) -> list[tuple[str, str]]:
    if not leaves_list_out(settings, shown_names):
        return []
    length = len(joined(shown_names))
    why = f"not in the prompt: it has {length:,} characters, above {LONGEST_LIST:,}"
    return [("class list", f"{why} (--system-instructions with {{classes}} puts it there)")]


def _format_row(settings: Settings) -> str:
    stated = stated_format(settings.prompt_template) == settings.response_format
    return f"{settings.response_format}{', as --prompt-template states it' if stated else ''}"


def point_out_contradictions(settings: Settings) -> None:
    """Print which texts contradict each other, or the response format."""
    template, stated = settings.prompt_template, stated_format(settings.prompt_template)
    if template and stated is None:
        note(
            f'--prompt-template states no order of "Reasoning:" and "Answer:": the responses are '
            f"{settings.response_format} (another: --response-format).\n"
        )
    texts = (settings.system_instructions or "{classes}") + (template or "")
    if settings.class_descriptions and "{classes}" not in texts:
        only = "no text of this run" if settings.response_format == "answer-only" else "only the responses"
        note(
            f"the class descriptions are in {only}: put {{classes}} into --system-instructions, which then lists the "
            "classes with them.\n"
        )
    if stated not in (None, settings.response_format):
        note(
            f"--prompt-template asks for {stated}, --response-format says {settings.response_format}: the responses "
            f"are {settings.response_format}, unlike what the question asks. Make the two equal, or leave out "
            "--response-format.\n"
        )


def preflight(classifier: VLMClassifier, sample: Sample) -> None:
    """Print one sample as the model sees it, the tokens in the loss marked.

    Raises:
        UsageError: the sample has no image token or no response token.
    """
    family, rendered, objective = classifier.family, classifier.rendered, classifier.objective
    batch = vlm_collate_fn([sample], family, rendered, objective.has_response)
    ids, targets = batch.input_ids[0], batch.targets[0]
    images = int((ids == family.image_token_id).sum())
    responses = int((targets != IGNORED).sum())
    parts = [f"the {responses} tokens in [[ ]] are in the loss (docs/objectives.md)"] if objective.has_response else []
    if objective.has_posterior:
        parts.append("the class is learned from the tokens that tell the responses apart")
    note(
        f"One sample as the model sees it ({sample.name}, {classifier.class_names[sample.label]}): "
        f"{len(rendered.prefix_ids)} tokens that all images share, and {len(ids)} of its own, "
        f"{images} of them image tokens; {', and '.join(parts)}."
    )
    note(render_sample(classifier, ids.tolist(), targets.tolist()) + "\n")
    if not images:
        raise UsageError(
            "the sample above has no image token: the model would learn only from the text. Check the model's "
            "processor."
        )
    if objective.has_response and not responses:
        raise UsageError(
            "the sample above has no response token: there is nothing to learn. Check class names and responses."
        )


def render_sample(classifier: VLMClassifier, ids: Sequence[int], targets: Sequence[int]) -> str:
    """Prefix and row as text: runs of image tokens shortened, what is in the loss between [[ and ]]."""
    family = classifier.family
    text = [family.decode(classifier.rendered.prefix_ids, exact=True)]
    run: list[int] = []  # tokens that are all in the loss, or all not
    images, in_loss = 0, False
    for token, target in [*zip(ids, targets, strict=True), (None, IGNORED)]:
        if token == family.image_token_id:
            images += 1
            continue
        if (target != IGNORED) != in_loss or images or token is None:
            text.append(family.decode(run, exact=True))
            text.append(f"{family.image_token} x {images}" if images else "")
            text.append(("]]" if in_loss else "[[") if (target != IGNORED) != in_loss else "")
            run, images, in_loss = [], 0, target != IGNORED
        if token is not None:
            run.append(token)
    return "  | " + "".join(text).replace("\n", "\n  | ")
