"""How much memory a training run needs: computed from the configuration, before anything is loaded.

    training    weights + gradients + optimizer + activations
    evaluation  weights + optimizer + keys and values of two forward passes, and the larger of vision encoder and logits
    saving      weights + optimizer + the weights that have to be copied to be saved

The three come one after the other, so what a run needs is the largest. Weights that are trained are float32, with a
float32 gradient and two float32 values of AdamW each; all others are in the number format of the device (see
`prepare_tuning`). The parameters are counted on the true modules, without their values.

What a block of the transformer keeps for the backward pass, numbers for each token (D = width, Q = width of queries, K
= of keys and values together, I = inner width; "wide" is what the MLP's first layers put out: I, or 2 I where a gate is
multiplied):

    always                       2 D (inputs of the two norms, float32) + 2 Q (queries, result of the attention) + K + wide
                                   (+ I with a gate)
    where the weights are        + 2 D (normalized, float32, where the norm is RMSNorm) + I (input of the last layer) + the inputs of the
    trained too                    other linear layers: 2 D, and one for each layer where autocast converts it
    where LoRA is trained        + the inputs of the linear layers; with dropout one for each layer, and the noise

Keys and values of a row include the shared prefix's and, but on a CPU, are repeated for each of the heads that share
them; the mask of a layer has a number for each pair of row token and key. Tokens that no trained weight comes before
keep nothing: all of the vision encoder unless all weights are trained, and the prefix where the connector alone is.

Measured against it: benchmarks/memory_estimate.py, docs/models.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from vlm.classifier.search import LOGITS_AT_ONCE, NODES_AT_ONCE, NODES_KEPT
from vlm.common.progress import note
from vlm.config.resolve import set_batch_size
from vlm.config.settings import BOTH, IMAGES_PER_STEP, POSTERIOR, RESPONSE, Settings
from vlm.conversation.prompts import Prompts
from vlm.families import Family, outline, read_config

GIB = 2**30
FLOAT32 = 4  # bytes
CHARACTERS_PER_TOKEN = 3  # of English; a low guess, so that the estimate is no lower than the truth
BATCHES = (128, 64, 32, 16, 8, 4, 2)
BATCH_ON_CPU, BATCH_ON_GPU = 16, 128  # more is no faster
TRAINING_SHARE = 0.7  # of the free memory, which others want a part of, and for what the estimate lacks
LIBRARIES = (
    100 * 2**20
)  # what torch's own libraries take when they are first used, and a batch of images; measured: 70 to 110 MiB
BYTES_OF_BITS = {4: 0.5 + 4 / 64, 8: 1.0}  # a float32 scale for each block of 64 weights of 4 bits


@dataclass(frozen=True)
class Texts:
    """Tokens of the conversation: before the image (run once for a batch), behind it, and of a response; and the
    classes.

    edge: longest edge of the images, for `--image-size auto`; None: as published.
    """

    prefix: int = 200
    question: int = 50
    response: int = 50
    classes: int = 10
    edge: int | None = None

    @classmethod
    def of(cls, prompts: Prompts, reasonings: Sequence[str] = (), edge: int | None = None) -> "Texts":
        """About as many as the texts have, and the reasonings of the images' own; the exact numbers would take the
        tokenizer."""
        longest = max(map(len, [*prompts.responses, *reasonings]))
        before, behind = (
            (prompts.system + prompts.question, "") if prompts.question_first else (prompts.system, prompts.question)
        )
        lengths = (len(text) // CHARACTERS_PER_TOKEN + 10 for text in (before, behind, "." * longest))
        return cls(*lengths, classes=len(prompts.class_names), edge=edge)


@dataclass(frozen=True)
class Need:
    """Bytes. evaluation and saving: what comes on top of weights and optimizer while a run evaluates or saves."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    evaluation: int
    saving: int

    @property
    def training(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        """The most that a run has at one time."""
        return max(self.training, self.weights + self.optimizer + max(self.evaluation, self.saving))


@dataclass(frozen=True)
class Block:
    """The widths of one encoder's blocks, and how many there are: see the top of this file."""

    count: int
    width: int
    queries: int
    keys: int
    wide: int
    inner: int
    inputs: int  # of all linear layers but those that come last, in attention and MLP
    rms_norm: bool

    @classmethod
    def of(cls, encoder: nn.Module) -> "Block":
        """Read from the first block: of a list of modules that holds all linear layers of the encoder, the innermost
        such list."""
        lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]
        blocks = max(reversed(lists), key=lambda m: sum(isinstance(part, nn.Linear) for part in m.modules()))
        linears = {name: m for name, m in blocks[0].named_modules() if isinstance(m, nn.Linear)}
        attention = [m for name, m in linears.items() if "att" in name]
        mlp = [m for name, m in linears.items() if "att" not in name]
        inner, width = max((m.in_features, m.out_features) for m in mlp)
        queries = (
            sum(m.in_features - width for m in attention) + width
        )  # all but the last layer of the attention read the width
        return cls(
            count=len(blocks),
            width=width,
            queries=queries,
            keys=sum(m.out_features for m in attention) - width - queries,
            wide=sum(m.out_features for m in mlp) - width,
            inner=inner,
            inputs=sum(m.in_features for m in linears.values()) - queries - inner,
            rms_norm=not any(isinstance(m, nn.LayerNorm) for m in blocks[0].modules()),
        )

    def kept(self, size: int, trained: bool) -> float:
        """Bytes that a block keeps for a token, keys and values aside. size: bytes of a number of the computation."""
        gated = self.wide > self.inner
        total = 2 * self.width * FLOAT32 + (2 * self.queries + self.wide + self.inner * gated) * size
        if trained:
            inputs = self.inputs if size < FLOAT32 else 2 * self.width
            total += 2 * self.width * FLOAT32 * self.rms_norm + (self.inner + inputs) * size
        return total

    def passing(self, size: int) -> float:
        """Bytes that a token has in a forward pass without gradients, while the largest layer runs."""
        return 2 * (self.width + max(self.queries + self.keys / 2, self.wide)) * size


def estimate(family: Family, settings: Settings, dtype: torch.dtype, device: str, texts: Texts | None = None) -> Need:
    """What a run with these settings needs.

    Args:
        family: from `outline`. settings: a batch size that was not found yet counts as 1.
        dtype: number format of the computation. device: cpu, cuda or mps.
        texts: the conversation; default: 200 + 50 + 50 tokens and 10 classes.
    """
    texts = texts or Texts()
    size = dtype.itemsize
    trained, frozen, quantized = _count(family, settings)
    weights = trained * FLOAT32 + frozen * size + int(quantized * BYTES_OF_BITS.get(settings.bits, 0))
    return Need(
        weights=weights,
        gradients=trained * FLOAT32,
        optimizer=2 * trained * FLOAT32,
        activations=int(_activations(family, settings, size, device, texts))
        + (trained * size if size < FLOAT32 else 0),
        evaluation=int(_evaluation(family, settings, size, texts)),
        saving=_copied(family, settings, size) if device == "cpu" else 0,  # a GPU's weights are copied to the CPU
    )


def _count(family: Family, settings: Settings) -> tuple[int, int, int]:
    """Numbers that are trained, that are frozen, and that are frozen and quantized."""
    model = family.model
    model.requires_grad_(settings.tune == "full")
    family.connector.requires_grad_(not settings.freeze_connector)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    layers = _language_layers(family)
    quantized = sum(m.weight.numel() for m in layers) if settings.bits else 0
    if settings.tune == "lora":
        trained += settings.lora_rank * sum(m.in_features + m.out_features for m in layers)
    return trained, frozen - quantized, quantized


def _language_layers(family: Family) -> list[nn.Linear]:
    return [family.model.get_submodule(name) for name in family.linear_layers(language=True)]


def _image_load(family: Family, settings: Settings, texts: Texts) -> tuple[int, int]:
    """Patches and tokens of the largest image, with the options that the family knows."""
    options = settings.image_options(texts.edge)
    return family.image_load(**{name: value for name, value in options.items() if name in family.image_defaults})


def _activations(family: Family, settings: Settings, size: int, device: str, texts: Texts) -> float:
    """Bytes at the end of the forward pass, when they are most, and what the first steps back add."""
    block, batch, full = Block.of(family.language), settings.batch_size or 1, settings.tune == "full"
    patches, tokens = _image_load(family, settings, texts)
    response = 0 if settings.objective == POSTERIOR else texts.response
    nodes = {RESPONSE: 0, POSTERIOR: texts.response * texts.classes, BOTH: texts.classes}[
        settings.objective or BOTH
    ]  # about, and at most
    logits_of = response
    # whole rows and their logits: one for the response, and at most one for each class (see vlm/classifier/plain.py)
    if not family.shares_prefix:
        batch *= {None: 2, RESPONSE: 1, POSTERIOR: texts.classes, BOTH: 1 + texts.classes}[settings.objective]
        texts, nodes, response = replace(texts, question=texts.prefix + texts.question, prefix=0), 0, texts.response
        logits_of = tokens + texts.question + response
    row = tokens + texts.question + response + nodes
    keys = texts.prefix + row
    prefix = 0 if settings.tune == "connector" else texts.prefix
    per_token = block.count * block.kept(size, trained=full)
    if settings.tune == "lora":
        noise = (
            0 if not settings.lora_dropout else 1 if device == "cuda" else FLOAT32
        )  # CUDA keeps which, the others by how much
        inputs = sum(m.in_features for m in _language_layers(family))
        if not noise and size == FLOAT32:  # layers that read the same tensor keep it once
            inputs = block.count * (2 * block.width + block.inner)
        per_token += inputs * (size + noise)
    shared = (
        block.keys if device == "cpu" else 2 * block.queries
    )  # elsewhere a mask makes transformers repeat them for each head
    attended = block.count * batch * keys * (shared * size + row * size)
    vision = Block.of(family.vision)
    seen = vision.count * (vision.kept(size, trained=True) + vision.keys * size) if full else 0
    if settings.gradient_checkpointing:  # the inputs of all blocks, and one block whole
        per_token, attended = block.count * block.width * FLOAT32 + per_token / block.count, attended / block.count
        seen = vision.count * vision.width * FLOAT32 + seen / vision.count if full else 0
    connector = sum(m.in_features + m.out_features for m in family.connector.modules() if isinstance(m, nn.Linear))
    connector = 0 if settings.freeze_connector else connector
    vocabulary = family.model.get_output_embeddings().weight
    predicted = batch * logits_of * vocabulary.shape[0] + min(batch * nodes * vocabulary.shape[0], LOGITS_AT_ONCE)
    logits = 3 * predicted * FLOAT32  # logits, their softmax, its gradient
    head = vocabulary.numel() * FLOAT32 if full else 0  # its new gradient, beside the one it is added to
    attended += prefix * block.count * block.keys * size
    return (
        LIBRARIES
        + (prefix + batch * row) * per_token
        + attended
        + batch * (patches * seen + tokens * connector * size)
        + logits
        + head
    )


def _evaluation(family: Family, settings: Settings, size: int, texts: Texts) -> float:
    block, batch = Block.of(family.language), settings.eval_batch_size
    patches, tokens = _image_load(family, settings, texts)
    nodes = min(texts.response * texts.classes, NODES_KEPT + NODES_AT_ONCE)
    keys = batch * (2 * (texts.prefix + tokens + texts.question) + nodes) * block.count * block.keys * size
    scored = batch * (1 + nodes) * family.model.get_output_embeddings().weight.shape[0]
    passing = batch * max(
        patches * Block.of(family.vision).passing(size), (tokens + texts.question) * block.passing(size)
    )
    blocks = 3 if size == FLOAT32 else 3.5  # logits of a block, their logarithms, and those of the block before
    logits = blocks * min(scored, LOGITS_AT_ONCE)
    if not family.shares_prefix:  # transformers' own forward: logits of whole rows
        row = texts.prefix + tokens + texts.question + texts.response
        logits = batch * row * family.model.get_output_embeddings().weight.shape[0]
    return LIBRARIES + keys + max(passing, logits * FLOAT32)


def _copied(family: Family, settings: Settings, size: int) -> int:
    """Bytes of the weights that are not saved as they are: those that LoRA is merged into, and float32 ones saved in
    another format."""
    if settings.tune == "lora":
        return sum(m.weight.numel() for m in _language_layers(family)) * size
    every = sum(p.numel() for p in family.model.parameters() if p.requires_grad)
    return every * size if size < FLOAT32 else 0


def largest_batch(classifier: Any, settings: Mapping[str, Any]) -> int:
    """How many images a batch of an inference may have: as many as half of the free memory has room for.

    Args:
        classifier: a `VLMClassifier`. settings: those of its training, from the metadata.
    """
    rendered, most = classifier.rendered, BATCH_ON_GPU if classifier.device.type == "cuda" else BATCH_ON_CPU
    texts = Texts(
        len(rendered.prefix_ids),
        len(rendered.question_ids),
        max(map(len, rendered.response_ids)),
        len(rendered.response_ids),
    )
    known = {item.name for item in fields(Settings)}
    settings = Settings(**{name: value for name, value in settings.items() if name in known})
    for batch in (b for b in BATCHES if b <= most):
        need = _evaluation(
            classifier.family, replace(settings, eval_batch_size=batch), classifier.model.dtype.itemsize, texts
        )
        if need < free_memory(classifier.device) / 2:
            return batch
    return 1


def largest_training_batch(
    family: Family, settings: Settings, dtype: torch.dtype, device: torch.device, texts: Texts, free: int
) -> int:
    """How many images of an optimizer step go through the model at once: the most that a part of the free memory has
    room for.

    Args:
        free: bytes.
    """
    most = IMAGES_PER_STEP // (settings.gradient_accumulation_steps or 1)
    for batch_size in (b for b in BATCHES if b <= most):
        need = estimate(family, replace(settings, batch_size=batch_size), dtype, device.type, texts).total
        if need < TRAINING_SHARE * free:
            return batch_size
    return 1


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, with what torch keeps of it for later."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available


def fit_to_memory(
    folder: Path,
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
    texts: Texts,
    processes: int = 1,
    least: Callable[[int], int] = lambda batch_size: batch_size,
) -> None:
    """Fill in a batch size that was not given, and print a warning where the model in a folder will not fit, with what
    would help.

    Args:
        processes: of this run; on a CPU they share its memory. least: the smallest of the batch sizes that all
            processes have found.
    """
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    try:
        family = outline(read_config(folder))
        batch_size = settings.batch_size or largest_training_batch(family, settings, dtype, device, texts, free)
    except Exception:  # a model that cannot even be outlined is refused, with the reason, when it is loaded
        family, batch_size = None, 1
    if settings.batch_size is None:
        set_batch_size(settings, least(batch_size))
    if family is None:
        return
    need = estimate(family, settings, dtype, device.type, texts).total
    if need > free:
        note(
            f"warning: this run needs about {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free on {device.type}: it may run out of "
            f"memory. {_help(family, settings, dtype, device, texts)}"
        )


def _help(family: Family, settings: Settings, dtype: torch.dtype, device: torch.device, texts: Texts) -> str:
    """The flags that need less memory, with what they need."""
    changes = [
        ("--batch-size 1", {"batch_size": 1}, settings.batch_size > 1),
        ("--gradient-checkpointing", {"gradient_checkpointing": True}, not settings.gradient_checkpointing),
        ("--objective response", {"objective": RESPONSE}, settings.objective != RESPONSE),
        ("--tune lora", {"tune": "lora"}, settings.tune == "full"),
        ("--tune connector", {"tune": "connector", "freeze_connector": False}, settings.tune != "connector"),
        ("--tune lora --load-in-4bit", {"tune": "lora", "load_in_4bit": True}, not settings.bits),
    ]
    tried: list[str] = []
    for flags, values, sensible in changes:
        if sensible:
            less = estimate(family, replace(settings, **values), dtype, device.type, texts).total
            tried.append(f"{flags} ({less / GIB:.1f} GiB)")
    return (
        f"Less is needed by {', '.join(tried)}, or a smaller --model (see --list-models)."
        if tried
        else "Take a smaller --model."
    )
