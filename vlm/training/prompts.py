"""The prompts of a run: those that its model was trained with, if this program trained it, or built from the flags."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.common import CONTINUED, UsageError, command_of, listed, note
from vlm.config import AUTO, IN_MEMORY, NEW_PROMPTS, PROMPTS_OF_MODEL, Settings
from vlm.conversation import Prompts, build_prompts
from vlm.data import match_classes
from vlm.inference import trained_with


@dataclass(frozen=True)
class Chosen:
    """The prompts of a run.

    Attributes:
        kind: model or new, as `--prompts` says it.
        texts: the settings that they were built from, see `Settings.texts`.
    """

    prompts: Prompts
    kind: str
    texts: dict[str, Any]


def choose_prompts(own: Prompts, settings: Settings, folder: Path) -> Chosen:
    """The prompts of a run. Notes say what is taken over of a model that this program has trained.

    Args:
        own: the prompts that are built from the flags.
        settings: `prompts` in it is auto, model or new.
        folder: of the model that the run starts from.

    Raises:
        UsageError: the prompts of the model are asked for or taken over, and it has none, or they cannot be used.
    """
    new = Chosen(own, NEW_PROMPTS, settings.texts)
    found = None if settings.demo else trained_with(folder)
    if found is None:
        if settings.prompts == PROMPTS_OF_MODEL:
            raise UsageError(
                f"--prompts model: {settings.model} has none, as this program did not train it. Leave out --prompts."
            )
        return new
    stored, texts = found
    if settings.epochs == 0 and not settings.resume:
        _point_to_the_test(settings)
    begin = f"note: this program has trained --model {settings.model}"
    if settings.prompts == NEW_PROMPTS:
        return new
    kept = _with_classes(stored, own.class_names)
    if settings.prompts == AUTO and (flags := settings.given_texts):
        if kept != own:  # the flags of the same run again change nothing
            note(f"{begin}: its prompts are not used, as {listed(flags)} was given.\n")
        return new
    if kept is not None:
        note(f"{begin}: its prompts are used again, and the dataset has its {len(own.class_names):,} classes.")
    else:
        kept = build_prompts(replace(settings, **texts), list(own.class_names))
        note(f"{begin}: its prompts are used again, with the classes of the dataset. {_difference(stored, own)}")
    note("--prompts new builds the prompts from the flags.\n")
    if settings.reasoning_column and kept.response_format == "answer-only":
        raise UsageError(
            f"--reasoning-column needs responses with a reasoning, and those of --model {settings.model} are "
            "answer-only: add --prompts new."
        )
    return Chosen(kept, PROMPTS_OF_MODEL, texts)


def _with_classes(stored: Prompts, names: Sequence[str]) -> Prompts | None:
    """The prompts of a model for a dataset with the same classes, in its order; None if the classes are others."""
    found = match_classes(names, stored.class_names, stored.readable_names)
    order = [index for index in found if index is not None]
    if len(names) != len(stored.class_names) or sorted(order) != list(range(len(stored.class_names))):
        return None
    shown = tuple(stored.shown_names[index] for index in order)
    return replace(
        stored,
        class_names=tuple(names),
        responses=tuple(stored.responses[index] for index in order),
        readable_names=() if shown == tuple(names) else shown,
        reasoning_tokens=0,  # decided by the dataset
    )


def _difference(stored: Prompts, own: Prompts) -> str:
    """Which classes only the model or only the dataset has, in sentences."""
    found = match_classes(own.class_names, stored.class_names, stored.readable_names)
    added = [name for name, index in zip(own.class_names, found, strict=True) if index is None]
    lost = [name for number, name in enumerate(stored.class_names) if number not in found]
    parts = [f"New classes: {listed(added)}." if added else "", f"No longer there: {listed(lost)}." if lost else ""]
    return " ".join([*filter(None, parts), "Descriptions and readable names of classes are not kept."])


def _point_to_the_test(settings: Settings) -> None:
    """`--epochs 0` with a trained model looks like a test of it, and is none: it calibrates, and may cut the data."""
    dataset = "DATASET" if settings.dataset in (None, IN_MEMORY) else shlex.quote(str(settings.dataset))
    command = f"{command_of('inference_vlm.py', 'vlm-predict')} --model-dir {shlex.quote(str(settings.model))}"
    note(
        "note: --epochs 0 trains nothing, but the calibration is fitted again, on a part of this dataset: this is no "
        f"test of {settings.model} as it is. To test it:{CONTINUED}{command} --dataset {dataset}\n"
    )
