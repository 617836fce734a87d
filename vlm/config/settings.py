"""Every setting, declared once: one dataclass field is one flag of `train_vlm.py` and one key of the saved JSON.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vlm.config.formats import LAYOUTS

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"
DEFAULT_DATASET = "Mirali33/mb-domars16k"

# What `None` becomes, by tuning mode. Settings that the mode does not decide have their default in the field.
TUNING_DEFAULTS = {
    "lora": {"learning_rate": 2e-4, "epochs": 3},
    "connector": {"learning_rate": 5e-4, "epochs": 5},
    "full": {"learning_rate": 1e-5, "epochs": 3},
}
RESPONSE, POSTERIOR, BOTH = "response", "posterior", "both"  # see vlm/classifier/objective.py
# The demo trains a very small model from scratch, which wants other values than fine-tuning does.
DEMO_DEFAULTS = {
    "tune": "full",
    "learning_rate": 1.5e-3,
    "weight_decay": 0.1,
    "objective": RESPONSE,  # as accurate there as both, and faster (docs/objectives.md)
    "epochs": 16,
    "batch_size": 16,
    "eval_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "threads": 1,  # so small a model gains little from more, and loses much where the cores are busy
    "task_description": "handwritten digit recognition",
    "probe": True,
}
CACHE_GB = 20.0  # what --cache-size is when it is not given
AUTO = "auto"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # each writes to a folder of this name in the output folder
FEW_NODES = (
    64  # of the label tree: what the class posterior may add to each image unasked, as much as an image of SmolVLM's
)
IMAGES_PER_STEP = 8  # what --gradient-accumulation-steps aims at when it is not given


class ImageSize(NamedTuple):
    """What is asked of the longest edge of images: exactly so many pixels, or (auto) what images with edges so long
    need."""

    pixels: int
    auto: bool = False


def _flag(default: Any, group: str, help: str, **more: Any) -> Any:
    """A dataclass field with what argparse needs. `more`: choices, metavar, nargs."""
    return field(default=default, metadata={"group": group, "help": help, **more})


@dataclass
class Settings:
    """The settings of one training run. `None` means: decided by the tuning mode or found in the data (see
    vlm/config/resolve.py)."""

    model: str | None = _flag(
        None, "model", f"hub id or folder of an image-text-to-text model (default: {DEFAULT_MODEL})"
    )
    model_revision: str | None = _flag(None, "model", "branch, tag or commit of the model on the hub")
    tune: str | None = _flag(
        None, "model", "what is trained: LoRA on the language model plus the connector (default), all weights, or the connector",
        choices=("lora", "full", "connector"),
    )  # fmt: skip
    freeze_connector: bool = _flag(
        False,
        "model",
        "with --tune lora: train LoRA alone; the features behind the connector are kept, which is faster and smaller",
    )
    lora_rank: int = _flag(16, "model", "rank of the LoRA matrices (default: 16)")
    lora_alpha: float = _flag(32.0, "model", "LoRA scale; the update is multiplied by alpha / rank (default: 32)")
    lora_dropout: float = _flag(
        0.0, "model", "dropout in front of the LoRA matrices (default: 0; some time of each step where it is not)"
    )
    device: str = _flag("auto", "model", "where to compute (default: auto)", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = _flag(
        "auto", "model", "number format of the computation (default: auto: bfloat16 on CUDA where supported, else float32)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    load_in_4bit: bool = _flag(
        False, "model", "keep the language model's weights in 4 bits (NF4); with --tune lora, needs bitsandbytes"
    )
    load_in_8bit: bool = _flag(
        False, "model", "keep the language model's weights in 8 bits; with --tune lora, needs bitsandbytes"
    )

    image_size: str = _flag(
        AUTO, "model", "edge of images in pixels (default: auto: what the training images need, at least half of the published)",
        metavar="N",
    )  # fmt: skip
    image_splitting: bool = _flag(
        False, "model", "SmolVLM: cut images into tiles, as published: sharper, and up to 17 times the tokens"
    )
    min_pixels: int | None = _flag(
        None, "model", "Qwen2-VL: enlarge images to this many pixels (default: as published, 3136)"
    )
    max_pixels: int | None = _flag(
        None, "model", "Qwen2-VL: shrink images to this many pixels; 28 x 28 are a token (default: 200704, 256 tokens)"
    )
    num_crops: int | None = _flag(
        None, "model", "Phi-3.5-vision: crops of an image beside the whole of it (default: 1)"
    )

    dataset: str | None = _flag(
        None, "data", f"hub id, image folder, CSV or JSONL file, or save_to_disk folder (default: {DEFAULT_DATASET})"
    )
    dataset_config: str | None = _flag(None, "data", "configuration of a hub dataset that has several")
    image_column: str | None = _flag(
        None, "data", "column with the images (default: found by its type, then by its name)"
    )
    label_column: str | None = _flag(
        None, "data", "column with the labels (default: found by its type, then by its name)"
    )
    reasoning_column: str | None = _flag(
        None, "data", "column with a text about each image that the model learns to write (default: one text a class)"
    )
    class_names: list[str] | None = _flag(
        None,
        "data",
        "names of the classes: several words, or one string separated by commas or spaces",
        nargs="+",
        metavar="NAME",
    )
    max_samples: int | None = _flag(None, "data", "at most this many images of each split, balanced over the classes")
    shots: int | None = _flag(None, "data", "train on this many images of each class, drawn by the seed")
    validation_ratio: float = _flag(
        0.15, "data", "share cut from train where there is no validation split (default: 0.15)"
    )
    test_ratio: float = _flag(0.15, "data", "share cut from train where there is no test split (default: 0.15)")

    task_description: str = _flag(
        "image classification", "prompts", "what is classified (default: image classification)"
    )
    class_descriptions: str | None = _flag(None, "prompts", "JSON file: class name -> description", metavar="FILE")
    system_instructions: str | None = _flag(
        None, "prompts", "text before the image, or @file; {classes} and {task_description} are filled in"
    )
    prompt_template: str | None = _flag(
        None, "prompts", "question after the image, or @file; {classes} and {task_description} are filled in"
    )
    question_first: bool = _flag(
        False,
        "prompts",
        "put the question before the image, not behind it: it is run once with the instructions, which is faster",
    )
    response_format: str | None = _flag(
        None, "prompts", "order of reasoning and answer (default: as --prompt-template states it, else reasoning-first)",
        choices=tuple(LAYOUTS),
    )  # fmt: skip

    objective: str | None = _flag(
        None, "training",
        "what is learned: to write the response, which class it is among all, or both (default: both, unless the names need "
        f"more than {FEW_NODES} tokens an image for it; demo: response)",
        choices=(RESPONSE, POSTERIOR, BOTH),
    )  # fmt: skip
    label_smoothing: float = _flag(
        0.0,
        "training",
        "with --objective posterior or both: share of the target that all classes have equally (default: 0)",
    )
    class_balance: bool = _flag(
        False, "training", "let every class count equally in the loss, however many images it has"
    )
    batch_size: int | None = _flag(
        None,
        "training",
        f"images in one forward pass (default: what the free memory has room for, up to {IMAGES_PER_STEP}; demo: 16)",
    )
    gradient_accumulation_steps: int | None = _flag(
        None, "training", f"batches in one optimizer step (default: as many as make {IMAGES_PER_STEP} images)"
    )
    epochs: int | None = _flag(
        None, "training", "passes over the training images; 0 trains nothing (default: 3; connector: 5; demo: 16)"
    )
    learning_rate: float | None = _flag(
        None, "training", "peak learning rate (default: lora 2e-4, connector 5e-4, full 1e-5, demo 1.5e-3)"
    )
    connector_learning_rate: float | None = _flag(
        None,
        "training",
        "peak learning rate of the connector, larger for one that was never trained (default: --learning-rate)",
    )
    align_connector: bool = _flag(
        False,
        "training",
        "before the training, teach the connector the names of the classes; for a connector that was never trained",
    )
    no_alignment: bool = _flag(
        False,
        "training",
        "leave a connector that was never trained as it is; else it learns the names of the classes first, in seconds",
    )
    weight_decay: float = _flag(0.01, "training", "AdamW weight decay (default: 0.01; demo: 0.1)")
    warmup_ratio: float = _flag(0.05, "training", "share of the steps with a rising learning rate (default: 0.05)")
    max_grad_norm: float = _flag(
        1.0, "training", "gradients are clipped to this norm; 0 switches it off (default: 1.0)"
    )
    gradient_checkpointing: bool = _flag(
        False, "training", "keep less for the backward pass and compute it again: less memory, slower"
    )
    compile: bool = _flag(
        False, "training", "let torch.compile speed up the language model; takes minutes at first, needs a C++ compiler"
    )
    threads: int | None = _flag(None, "training", "threads of the CPU (default: its physical cores; demo: 1)")
    eval_steps: int | None = _flag(
        None, "training", "optimizer steps between evaluations (default: at the end of each epoch)"
    )
    eval_batch_size: int | None = _flag(
        None, "training", "images in one batch of an evaluation (default: 8, or --batch-size if larger; demo: 64)"
    )
    zero_shot: bool = _flag(False, "training", "test the model before the training too, for comparison")
    workers: int | None = _flag(
        None, "training", "processes that prepare images (default: 0 on the CPU, up to 8 on a GPU)"
    )
    no_feature_cache: bool = _flag(False, "training", "compute the features of a frozen vision encoder again each time")
    cache_size: float = _flag(
        CACHE_GB, "training", f"largest size of the features kept in ~/.cache/vlm, in GB (default: {CACHE_GB:g})"
    )
    cache_dtype: str = _flag(
        "float32", "training", "how the features are kept: float16 halves them, and results differ in the fourth digit (default: float32)",
        choices=("float32", "float16"),
    )  # fmt: skip
    seed: int = _flag(42, "training", "seed of the order, the splits and all other randomness (default: 42)")

    calibration: str = _flag(
        "temperature", "evaluation", "what is fitted on validation so that the probabilities are true (default: temperature)",
        choices=("temperature", "bias", "none"),
    )  # fmt: skip
    score: str = _flag(
        AUTO, "evaluation", "score of a class: log-probability of its response, its mean over the tokens, or it less that without a "
        "image; auto is sum unless another is better on validation (default: auto)",
        choices=(AUTO, "sum", "prior"),
    )  # fmt: skip
    abstain_below: float | None = _flag(
        None, "evaluation", "give no prediction where its probability is below this, such as 0.5"
    )
    target_precision: float | None = _flag(
        None,
        "evaluation",
        "instead: the threshold on validation from which this share of the predictions is right, such as 0.95",
    )
    probe: bool = _flag(
        False, "evaluation", "also train a linear classifier on the vision encoder's features, to compare (demo: yes)"
    )

    output_dir: str = _flag("vlm_results", "output", "folder of the results (default: vlm_results)")
    overwrite: bool = _flag(False, "output", "delete the results of an earlier run in the output folder")
    resume: bool = _flag(False, "output", "go on from the newest saved state in the output folder, with its settings")
    save_minutes: float = _flag(10.0, "output", "save a state to resume from at least this often (default: 10 minutes)")
    metrics: list[str] | None = _flag(
        None, "output", "your own metrics: FILE.py:FUNCTION(labels, predictions, probabilities, class_names)",
        nargs="+", metavar="FILE:FUNCTION",
    )  # fmt: skip
    track: list[str] | None = _flag(
        None,
        "output",
        f"trackers that get the figures of the run too: {', '.join(TRACKERS)}",
        choices=TRACKERS,
        nargs="+",
        metavar="NAME",
    )
    use_wandb: bool = _flag(False, "output", "log to Weights & Biases too: the same as --track wandb")
    wandb_project: str = _flag(
        "vlm-classification", "output", "project of the run in all trackers (default: vlm-classification)"
    )

    demo: bool = _flag(
        False, "help", "train the small built-in model on scikit-learn's handwritten digits; needs no hub"
    )
    list_models: bool = _flag(
        False, "help", "list the tested models, their sizes and the memory that each tuning mode needs, then stop"
    )
    debug: bool = _flag(False, "help", "show the traceback of an error")

    @property
    def bits(self) -> int | None:
        """Of a weight of the language model where it is quantized."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def trackers(self) -> list[str]:
        """The trackers that --track and --use-wandb ask for, each once."""
        return list(dict.fromkeys([*(self.track or []), *(["wandb"] if self.use_wandb else [])]))

    def image_options(self, edge: int | None = None) -> dict[str, Any]:
        """What was asked of the model's image processing; an option may belong to one family alone (see `load_family`).

        Args:
            edge: longest edge of the images, for `--image-size auto`; None: as published.
        """
        options = {name: getattr(self, name) for name in ("image_splitting", "min_pixels", "max_pixels", "num_crops")}
        if self.image_size != AUTO:
            options["image_size"] = ImageSize(int(self.image_size))
        elif (
            edge and not self.demo and not self.image_splitting
        ):  # the demo's model has the size that it is tested with
            options["image_size"] = ImageSize(edge, auto=True)
        return {name: value for name, value in options.items() if value}

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values, one key a field."""
        return dataclasses.asdict(self)
