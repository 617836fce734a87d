"""From settings to a run that can start: device, data, model, what is trained, and a look at one sample."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

import vlm
from vlm.classifier.batching import IGNORED, vlm_collate_fn
from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.objective import Objective, balanced_weights, usual_objective
from vlm.common.errors import UsageError
from vlm.common.progress import note
from vlm.config.formats import stated_format
from vlm.config.settings import IMAGES_PER_STEP, Settings
from vlm.conversation.prompts import build_prompts
from vlm.conversation.responses import longest_reasoning
from vlm.data.hub import model_folder
from vlm.data.splits import Data, Sample, load_data
from vlm.families import load_family
from vlm.families.demo import MODEL_NAME, build_demo_model
from vlm.families.features import cache_root, fill_cache
from vlm.families.quantization import check_quantization
from vlm.inference.model_folder import usual_modes
from vlm.machine.device import check_compiler, pick_device, pick_dtype, pick_threads, share_of_cores
from vlm.machine.memory import Texts, fit_to_memory
from vlm.report.figures import format_table
from vlm.training.alignment import needs_alignment
from vlm.training.cross_fit import Weights, weights_for_folds
from vlm.training.output import DEMO_MODEL
from vlm.training.tuning import parameter_groups, prepare_tuning, trained_parameters

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "scikit-learn", "pillow")
SHOWN_SETTINGS = (
    "tune", "objective", "epochs", "batch_size", "gradient_accumulation_steps", "learning_rate", "connector_learning_rate", "weight_decay",
    "warmup_ratio", "eval_steps", "seed", "output_dir",
)  # fmt: skip
LONGEST_WAIT = timedelta(
    hours=12
)  # of one process for another: one computes the vision features, or writes, while the others wait
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Run:
    """A run that can start. folder: the model as it was before. model: the classifier as the training calls it, wrapped
    where there are several processes. aligns: whether its connector learns the names of the classes first.
    fold_connectors: none, or those of each fold (see vlm/training/cross_fit.py). learned: the weights that will not be
    as in `folder`, by name.
    """

    settings: Settings
    accelerator: Accelerator
    dtype: torch.dtype
    data: Data
    folder: Path
    classifier: VLMClassifier
    model: nn.Module
    optimizer: Any
    aligns: bool
    fold_connectors: list[Weights]
    learned: dict[str, Tensor]
    metadata: dict[str, Any]
    workers: int

    @property
    def output(self) -> Path:
        return Path(self.settings.output_dir)


def set_up(settings: Settings) -> Run:
    """Load and print everything, in the order in which a mistake is cheapest to find: device, data, model, one sample.

    Raises:
        UsageError: anything in settings or data with which the run cannot start.
    """
    torch.set_num_threads(pick_threads(settings.threads))
    device, reason = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    check_quantization(settings.bits, device)
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=PRECISIONS[dtype], kwargs_handlers=[waiting])
    data = load_data(settings)
    note("\n" + format_table(data.summary) + "\n")
    _point_out_contradictions(settings)

    prompts = build_prompts(settings, data.class_names)
    folder, revision = _find_model(settings, data.class_names, accelerator)
    texts = Texts.of(prompts, [text for text in data.train.reasonings if text], data.edge)
    fit_to_memory(
        folder, settings, dtype, accelerator.device, texts, accelerator.num_processes, partial(least, accelerator)
    )
    images = settings.image_options(data.edge)
    family = load_family(folder, dtype, accelerator.device, images, settings.bits)
    image_size = family.size_text(images["image_size"]) if "image_size" in images else None
    if image_size:
        note(f"image size: {image_size}\n")
    aligns = needs_alignment(family, settings)
    prepare_tuning(family, settings, aligns)
    if settings.gradient_checkpointing:
        family.checkpoint_layers()
    if settings.compile:
        check_compiler(accelerator.device)
        family.compile_layers()
    if settings.reasoning_column:
        prompts = replace(prompts, reasoning_tokens=longest_reasoning(data.train, family))
    classifier = VLMClassifier(family, prompts)
    settings.objective = settings.objective or usual_objective(
        classifier.tree, len(classifier.rendered.opening_ids), family.shares_prefix
    )
    classifier.objective = build_objective(settings, classifier, data.train.labels)
    note(format_table(_settings_rows(settings, classifier, reason, dtype, accelerator.num_processes)) + "\n")
    preflight(classifier, data.train[0])

    workers = settings.workers
    if workers is None:  # on the CPU they would take the cores from the model
        workers = min(8, share_of_cores()) if device.type == "cuda" else 0
    if not settings.no_feature_cache:
        with accelerator.local_main_process_first():  # the others of this machine find what the first one has computed
            splits = (data.train, data.validation, data.test) if settings.epochs else (data.validation, data.test)
            classifier.feature_cache = fill_cache(family, splits, settings.cache_size, settings.cache_dtype, workers)
    aligns = aligns and _can_align(settings, accelerator, classifier)
    learned: dict[str, Tensor] = dict(trained_parameters(classifier))
    if (
        settings.freeze_connector
    ):  # one that is aligned was trainable until here, so that the features are those before it
        family.connector.requires_grad_(False)
    folds = weights_for_folds(family.connector, data.train) if aligns and settings.freeze_connector else []
    learned |= {
        f"fold_connectors.{k}.{name}": weight for k, weights in enumerate(folds) for name, weight in weights.items()
    }
    groups = parameter_groups(
        classifier, settings.weight_decay, settings.learning_rate, settings.connector_learning_rate
    )
    optimizer = torch.optim.AdamW(groups, fused=accelerator.device.type in ("cpu", "cuda"))
    model, optimizer = accelerator.prepare(classifier, optimizer)
    metadata = _metadata(settings, data, classifier, revision, image_size)
    return Run(
        settings,
        accelerator,
        dtype,
        data,
        folder,
        classifier,
        model,
        optimizer,
        aligns,
        folds,
        learned,
        metadata,
        workers,
    )


def _can_align(settings: Settings, accelerator: Accelerator, classifier: VLMClassifier) -> bool:
    """Whether a random connector can learn the names of the classes: in all processes, or in none."""
    kept = bool(least(accelerator, int(classifier.feature_cache is not None)))
    if not kept:
        hardly = ", and --freeze-connector leaves it so: the model can hardly see" if settings.freeze_connector else ""
        note(
            f"the connector was never trained{hardly}. It would learn the names of the classes first if vision features were kept."
        )
    return kept


def least(accelerator: Accelerator, number: int) -> int:
    """The smallest of a number that each process has."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())


def build_objective(settings: Settings, classifier: VLMClassifier, labels: Sequence[int]) -> Objective:
    """What the training minimizes, by the settings and the labels of the training images."""
    weights = balanced_weights(labels, len(classifier.class_names)) if settings.class_balance else None
    opening = len(classifier.rendered.opening_ids)
    return Objective(settings.objective, classifier.tree, opening, settings.label_smoothing, weights).to(
        classifier.device
    )


def _find_model(settings: Settings, class_names: list[str], accelerator: Accelerator) -> tuple[Path, str | None]:
    if not settings.demo:
        return model_folder(settings.model, settings.model_revision)
    folder = Path(settings.output_dir) / DEMO_MODEL
    if accelerator.is_main_process:
        build_demo_model(folder, settings, class_names)
        usual_modes(folder)
    accelerator.wait_for_everyone()
    return folder, None


def _settings_rows(
    settings: Settings, classifier: VLMClassifier, device: str, dtype: torch.dtype, processes: int
) -> list[tuple[str, str]]:
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    every = classifier.model.num_parameters()  # quantized ones too, of which there are several in a number
    quantized = f", the language model's weights in {settings.bits} bits" if settings.bits else ""
    rows = [
        ("model", "the demo's, 3 + 3 layers with random weights" if settings.demo else str(settings.model)),
        ("device", device),
        ("number format", str(dtype).removeprefix("torch.") + quantized),
        ("response format", _format_row(settings)),
        ("trained parameters", f"{trained:,} of {every:,} ({trained / every:.1%})"),
    ]
    shown = {
        name: "each epoch" if getattr(settings, name) is None else str(getattr(settings, name))
        for name in SHOWN_SETTINGS
    }
    if settings.connector_learning_rate == settings.learning_rate:  # so it is where the connector is frozen, too
        del shown["connector_learning_rate"]
    if settings.batch_size == 1:
        shown["batch_size"] += f" (with --batch-size {IMAGES_PER_STEP} a step is faster; it needs more memory)"
    rows += [(name.replace("_", " "), value) for name, value in shown.items()]
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


def _format_row(settings: Settings) -> str:
    stated = stated_format(settings.prompt_template) == settings.response_format
    return f"{settings.response_format}{', as --prompt-template states it' if stated else ''}"


def _point_out_contradictions(settings: Settings) -> None:
    """Texts that are right each as it is, but not together."""
    template, stated = settings.prompt_template, stated_format(settings.prompt_template)
    if template and stated is None:
        note(
            f'--prompt-template states no order of "Reasoning:" and "Answer:": the responses are {settings.response_format} '
            "(--response-format says another).\n"
        )
    texts = (settings.system_instructions or "{classes}") + (template or "")
    if settings.class_descriptions and "{classes}" not in texts:
        only = "no text of this run" if settings.response_format == "answer-only" else "the responses alone"
        note(
            f"the class descriptions are in {only}: put {{classes}} into --system-instructions, where the list of classes belongs.\n"
        )
    if stated not in (None, settings.response_format):
        note(
            f"--prompt-template asks for {stated}, --response-format says {settings.response_format}: the responses are "
            f"{settings.response_format}, against what the question asks. Make the two equal, or leave out --response-format.\n"
        )


def preflight(classifier: VLMClassifier, sample: Sample) -> None:
    """Print one sample as the model sees it, the tokens in the loss marked.

    Raises:
        UsageError: the sample has no image token or no response token.
    """
    family, rendered, objective = classifier.family, classifier.rendered, classifier.objective
    batch = vlm_collate_fn([sample], family, rendered, objective.has_response)
    ids, targets = batch["input_ids"][0], batch["targets"][0]
    images = int((ids == family.image_token_id).sum())
    responses = int((targets != IGNORED).sum())
    parts = [f"the {responses} in [[ ]] are in the loss"] if objective.has_response else []
    if objective.has_posterior:
        parts.append("the class is learned where the classes' responses part")
    note(
        f"One sample as the model sees it ({sample.name}, {classifier.class_names[sample.label]}): {len(rendered.prefix_ids)} tokens run "
        f"once for all, then {len(ids)} with {images} image tokens; {', and '.join(parts)}."
    )
    note(render_sample(classifier, ids.tolist(), targets.tolist()) + "\n")
    if not images:
        raise UsageError(
            "the sample above has no image token: the model would learn from the text alone. Check the processor of the model."
        )
    if objective.has_response and not responses:
        raise UsageError(
            "the sample above has no response token: there is nothing to learn. Check the class names and the responses."
        )


def render_sample(classifier: VLMClassifier, ids: Sequence[int], targets: Sequence[int]) -> str:
    """Prefix and row as text: runs of image tokens shortened, what is in the loss between [[ and ]]."""
    family = classifier.family
    text, run = [family.tokenizer.decode(classifier.rendered.prefix_ids)], []
    images, in_loss = 0, False
    for token, target in [*zip(ids, targets, strict=True), (None, IGNORED)]:
        if token == family.image_token_id:
            images += 1
            continue
        if (target != IGNORED) != in_loss or images or token is None:
            text.append(family.tokenizer.decode(run))
            text.append(f"{family.image_token} x {images}" if images else "")
            text.append(("]]" if in_loss else "[[") if (target != IGNORED) != in_loss else "")
            run, images, in_loss = [], 0, target != IGNORED
        run.append(token)
    return "  | " + "".join(text).replace("\n", "\n  | ")


def _metadata(
    settings: Settings, data: Data, classifier: VLMClassifier, revision: str | None, image_size: str | None
) -> dict[str, Any]:
    """What the model folder tells inference, and people."""
    return {
        "format_version": 1,
        "model": MODEL_NAME if settings.demo else settings.model,
        "model_revision": revision,
        "model_type": classifier.model.config.model_type,
        "class_names": list(classifier.class_names),
        "task_description": settings.task_description,
        "prompts": classifier.prompts.to_json(),
        "dataset": data.source,
        "settings": settings.to_json(),
        "image_size": image_size,
        "versions": {"vlm": vlm.__version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
