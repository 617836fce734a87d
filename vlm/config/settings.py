"""Every setting, declared once: one dataclass field is one flag of `train_vlm.py` and one key of the saved JSON.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import dataclasses
import math
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, NamedTuple

from vlm.config.data_settings import DataSettings
from vlm.config.declare import flag
from vlm.config.defaults import (
    AUTO,
    BOTH,
    FEW_NODES,
    FEW_VIEWS,
    HEAD,
    IMAGES_PER_STEP,
    LORA,
    NEW_PROMPTS,
    NO_TRACKER,
    POSTERIOR,
    PROMPTS_OF_MODEL,
    RESPONSE,
    TEXT,
)
from vlm.config.formats import DEFAULT_FORMAT, LAYOUTS
from vlm.config.model_settings import ModelSettings
from vlm.config.output_settings import OutputSettings

PROMPT_TEXTS = ("task_description", "system_instructions", "prompt_template", "question_first", "response_format")
CLASS_FILES = ("class_descriptions", "class_map")


class ImageSize(NamedTuple):
    """The longest edge that was asked for: `pixels` exactly or, with `auto`, what images with such an edge need."""

    pixels: int
    auto: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings(OutputSettings, DataSettings, ModelSettings):
    """The settings as given, from `resolve`: the flags, and the defaults that follow from the flags themselves.

    `None` means that nothing was said: the feature is off, or the data, the model or the free memory decide.

    Attributes:
        labels_needed: whether the images of the dataset have to have labels.
        split_flag: the flag that says which splits are read.
    """

    labels_needed: ClassVar[bool] = True
    split_flag: ClassVar[str] = "--dataset-split"

    task_description: str = flag(
        "image classification", "prompts", "what is classified (default: image classification)"
    )
    class_descriptions: str | None = flag(None, "prompts", "JSON file: class name -> description", metavar="FILE")
    class_map: str | None = flag(
        None,
        "prompts",
        "JSON file: class name -> readable name that the model is shown instead, for names that are codes; results and "
        "predictions keep the codes",
        metavar="FILE",
    )
    system_instructions: str | None = flag(
        None, "prompts", "text before the image, or @FILE; {classes} and {task_description} are filled in"
    )
    prompt_template: str | None = flag(
        None, "prompts", "question after the image, or @FILE; {classes} and {task_description} are filled in"
    )
    question_first: bool = flag(
        False,
        "prompts",
        "put the question before the image: it is computed once, with the instructions, which is faster",
    )
    response_format: str = flag(
        MISSING,
        "prompts",
        "order of reasoning and answer (default: the order in --prompt-template, if it states one, "
        "else reasoning-first)",
        choices=tuple(LAYOUTS),
    )
    prompts: str = flag(
        AUTO,
        "prompts",
        "model: the prompts that --model was trained with, if this program trained it; new: those that the flags say "
        "(default: auto: model, unless another flag of this group is given)",
        choices=(AUTO, PROMPTS_OF_MODEL, NEW_PROMPTS),
    )

    objective: str | None = flag(
        None,
        "training",
        "what is learned: response: to write the response; posterior: to choose among the classes; both "
        f"(default: both, or response if both would need more than {FEW_NODES} more tokens an image; demo: response)",
        choices=(RESPONSE, POSTERIOR, BOTH),
    )
    label_smoothing: float = flag(
        0.0,
        "training",
        "with --objective posterior or both: share of the target spread evenly over all classes (default: 0)",
    )
    class_balance: bool = flag(
        False, "training", "give every class the same weight in the loss, however many images it has"
    )
    batch_size: int | None = flag(
        None,
        "training",
        f"images in one forward pass (default: what fits into the free memory, up to {IMAGES_PER_STEP}; demo: 16)",
    )
    gradient_accumulation_steps: int | None = flag(
        None, "training", f"batches in one optimizer step (default: as many as make {IMAGES_PER_STEP} images)"
    )
    epochs: int = flag(
        MISSING, "training", "passes over the training images; 0 trains nothing (default: 3; connector: 5; demo: 16)"
    )
    max_steps: int | None = flag(None, "training", "with --streaming: optimizer steps of the training")
    learning_rate: float = flag(
        MISSING, "training", "peak learning rate (default: lora 2e-4, connector 5e-4, full 1e-5, demo 1.5e-3)"
    )
    connector_learning_rate: float = flag(
        MISSING,
        "training",
        "peak learning rate of the connector; take a larger one for an untrained connector (default: --learning-rate)",
    )
    align_connector: bool = flag(
        False,
        "training",
        "for a model whose connector was never trained: it learns the names of the classes before the training",
    )
    weight_decay: float = flag(0.01, "training", "AdamW weight decay (default: 0.01; demo: 0.1)")
    warmup_ratio: float = flag(0.05, "training", "share of the steps with a rising learning rate (default: 0.05)")
    max_grad_norm: float = flag(1.0, "training", "gradients are clipped to this norm; 0: no clipping (default: 1.0)")
    augment: str = flag(
        "none",
        "training",
        "train on changed views of the images: light: crops and colors; strong: more of both, turned by up to 10 "
        "degrees, blurred (default: none)",
        choices=("none", "light", "strong"),
    )
    augment_flips: bool = flag(
        False, "training", "mirror half of the views left to right; not for texts, or where left and right differ"
    )
    augment_turns: bool = flag(
        False, "training", "turn views by quarters; for images without an up, such as maps from above"
    )
    augment_views: int | None = flag(
        None,
        "training",
        f"views of an image, with the image itself (default: {FEW_VIEWS}, so that their features can be cached; "
        "--tune full: as many as epochs)",
    )
    gradient_checkpointing: bool = flag(
        False, "training", "recompute activations in the backward pass: less memory, slower"
    )
    compile: bool = flag(
        False, "training", "compile the language model with torch.compile; takes minutes at first, needs a C++ compiler"
    )
    threads: int | None = flag(None, "training", "threads of the CPU (default: its physical cores; demo: 1)")
    eval_steps: int | None = flag(
        None, "training", "optimizer steps between evaluations (default: at the end of each epoch)"
    )
    eval_batch_size: int = flag(
        MISSING, "training", "images in one batch of an evaluation (default: 8, or --batch-size if larger; demo: 64)"
    )
    patience: int | None = flag(
        None,
        "training",
        "stop after this many evaluations without a better model; the learning rate falls as without it",
    )
    time_limit: str | None = flag(
        None,
        "training",
        "end with a tested model in this time, counted from the start of the command, such as 2h, 90m or 1h30m; "
        "--resume goes on later",
        metavar="TIME",
    )
    zero_shot: bool = flag(False, "training", "test the model before the training too, for comparison")
    workers: int | None = flag(
        None, "training", "processes that prepare images (default: 0 on the CPU, up to 8 on a GPU)"
    )
    no_feature_cache: bool = flag(
        False, "training", "do not cache the features of a frozen vision encoder: compute them each time"
    )
    cache_size: float = flag(20.0, "training", "largest size of the feature cache in ~/.cache/vlm, in GB (default: 20)")
    cache_dtype: str = flag(
        "float32",
        "training",
        "number format of the feature cache: float16 halves its size, and results differ in the fourth digit "
        "(default: float32)",
        choices=("float32", "float16"),
    )
    seed: int = flag(42, "training", "seed of the order, the splits and all other randomness (default: 42)")

    calibration: str = flag(
        "temperature",
        "evaluation",
        "how probabilities are calibrated on the validation split (default: temperature)",
        choices=("temperature", "bias", "none"),
    )
    score: str = flag(
        AUTO,
        "evaluation",
        "score of a class: sum: log-probability of its response; prior: the same minus that without an image "
        "(default: auto: sum, unless prior is better on the validation split)",
        choices=(AUTO, "sum", "prior"),
    )
    evidence: str = flag(
        AUTO,
        "evaluation",
        "what counts for a class: text: the score of its response; head: a linear classifier on features of the vision "
        "encoder; both: the two added up (default: auto: text, unless another is better on the validation split)",
        choices=(AUTO, TEXT, HEAD, BOTH),
    )
    abstain_below: float | None = flag(
        None, "evaluation", "give no prediction if its confidence is below this, such as 0.5"
    )
    target_precision: float | None = flag(
        None,
        "evaluation",
        "instead of --abstain-below: find the threshold on the validation split from which this share of the "
        "predictions is right, such as 0.95",
    )
    probe: bool = flag(
        False, "evaluation", "also train a linear classifier on the vision encoder's features, to compare (demo: yes)"
    )

    demo: bool = flag(
        False, "help", "train the small built-in model on scikit-learn's handwritten digits; needs no hub"
    )
    list_models: bool = flag(
        False, "help", "list the tested models, their sizes and the memory that each tuning mode needs, then stop"
    )
    dry_run: bool = flag(
        False,
        "help",
        "load data and model, show what the model would read, its memory and the time of the run from a few real "
        "steps, then stop; nothing is written",
    )
    show_data: bool = flag(
        False,
        "help",
        "write a page with images of each class and split, their sizes and copies into the output folder, then stop; "
        "needs no model",
    )
    debug: bool = flag(False, "help", "show the traceback of an error")

    @property
    def texts(self) -> dict[str, Any]:
        """The settings that prompts are built from, by name, other than the files about the classes."""
        return {name: getattr(self, name) for name in PROMPT_TEXTS}

    @property
    def given_texts(self) -> list[str]:
        """The flags about prompts that were given, other than with their default."""
        usual = {"task_description": Settings.task_description, "response_format": DEFAULT_FORMAT}
        names = [name for name in (*PROMPT_TEXTS, *CLASS_FILES) if getattr(self, name) not in (None, False)]
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != usual.get(name)]

    @property
    def bits(self) -> int | None:
        """Bits of a weight of the language model, or None if it is not quantized."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def trackers(self) -> list[str]:
        """The trackers that --report-to and --use-wandb ask for, each once."""
        if NO_TRACKER in (self.track or []):
            return []
        return list(dict.fromkeys([*(self.track or []), *(["wandb"] if self.use_wandb else [])]))

    @property
    def trains_folds(self) -> bool:
        """Whether this is a cross-validation, which trains several models, and not a run that trains one."""
        return self.folds is not None and self.fold is None

    @property
    def views(self) -> int:
        """How many views of an image the training sees, with the image itself; 1 if nothing is augmented."""
        if self.augment == "none" and not (self.augment_flips or self.augment_turns):
            return 1
        return self.augment_views or (max(1, self.epochs) if self.tune == "full" else FEW_VIEWS)

    def image_options(self, edge: int | None = None) -> dict[str, Any]:
        """The options of the model's image processing that were given; `load_family` refuses those of other families.

        Args:
            edge: longest edge of the training images in pixels, for `--image-size auto`; None: as published.
        """
        options = {name: getattr(self, name) for name in ("image_splitting", "min_pixels", "max_pixels", "num_crops")}
        if self.image_size != AUTO:
            options["image_size"] = ImageSize(int(self.image_size))
        elif edge and not self.demo and not self.image_splitting:  # the demo's model fits its images already
            options["image_size"] = ImageSize(edge, auto=True)
        return {name: value for name, value in options.items() if value}

    def with_tuning(self, mode: str) -> "Settings":
        """The same settings with another `--tune`, without the flags that only lora has."""
        if mode == "lora":
            return dataclasses.replace(self, tune=mode)
        return dataclasses.replace(
            self, tune=mode, load_in_4bit=False, load_in_8bit=False, freeze_connector=False, lora_variant=LORA
        )

    def complete(self, batch_size: int, objective: str) -> "RunSettings":
        """The settings of a run, once the model and the free memory have decided what the flags left open.

        Args:
            batch_size: images in one forward pass. objective: response, posterior or both.
        """
        steps = self.gradient_accumulation_steps or math.ceil(IMAGES_PER_STEP / batch_size)
        decided = {"batch_size": batch_size, "objective": objective, "gradient_accumulation_steps": steps}
        return RunSettings(**vars(self) | decided)

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values, one key a field."""
        return dataclasses.asdict(self)


def _decided() -> Any:
    """A field that has to be given. Type checkers want an assignment here, since the fields above have defaults."""
    return field()


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """The settings that a run works with, as in its `training_metadata.json`: see `Settings.complete`."""

    batch_size: int = _decided()
    gradient_accumulation_steps: int = _decided()
    objective: str = _decided()


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(Settings):
    """The settings by which a trained model reads a dataset: one split, in which labels may be missing.

    Attributes:
        model_classes: the names of the model's classes, by which a column of labels is found.
    """

    labels_needed = False
    split_flag = "--split"

    model_classes: tuple[str, ...] = ()
