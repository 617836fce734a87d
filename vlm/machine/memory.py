"""How much memory a run needs, computed from the configuration of its model, before anything is loaded.

A run trains, evaluates and saves, one after the other, so it needs the largest of:

    training    weights + gradients + optimizer + activations
    evaluation  weights + optimizer + keys and values of two forward passes + the larger of vision encoder and logits
    saving      weights + optimizer + the weights that are copied in order to be saved

Trained weights are float32; each has a float32 gradient and two float32 values of AdamW. All other weights have the
number format of the computation (see `prepare_tuning`). Parameters are counted on the real modules, without values.

A block of a transformer keeps, for the backward pass, these numbers for each token. D: width of the block. Q: width
of the queries. K: width of keys and values together. I: inner width of the MLP. W: outputs of the MLP's first layers,
which is I, or 2 I with a gate.

    always                        2 D (float32 inputs of the two norms) + 2 Q (queries, output of the attention) + K
                                  + W + (with a gate) I
    if its weights are trained    + (RMSNorm) 2 D (float32, normalized) + I (input of the MLP's last layer)
                                  + the inputs of the other linear layers: 2 D, or in a smaller number format one
                                  input for each layer, since autocast converts them one by one
    if it has LoRA                + the inputs of its linear layers; with dropout one input for each layer, and its mask

The keys and values of a row include those of the shared prefix. Except on a CPU, they are repeated for each head
that shares them. The attention mask of a layer has one number for each pair of a row's token and a key. Tokens keep
nothing if no trained weight comes before them: the images in the vision encoder, unless --tune full, and the shared
prefix with --tune connector.

How close this is to what a process takes: benchmarks/memory_estimate.py, docs/models.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlm.classifier import LOGITS_AT_ONCE, NODES_AT_ONCE, NODES_KEPT
from vlm.config import BOTH, DORA, POSTERIOR, RESPONSE, Settings
from vlm.conversation import Prompts, Rendered
from vlm.families import Family

GIB = 2**30
FLOAT32 = 4  # bytes
CHARACTERS_PER_TOKEN = 3  # in English; a low guess, so that the estimate is rather too high
# What torch's own libraries take when they are first used, and a batch of images; measured: 70 to 110 MiB.
LIBRARIES = 100 * 2**20
BYTES_OF_BITS = {4: 0.5 + 4 / 64, 8: 1.0}  # 4 bits have a float32 scale for each block of 64 weights


@dataclass(frozen=True)
class Texts:
    """Lengths of the conversation in tokens, and the number of classes.

    prefix: before the image, computed once for a batch. question: after the image. response: the longest one.
    edge: longest edge of the images in pixels, for `--image-size auto`; None: as published.
    """

    prefix: int = 200
    question: int = 50
    response: int = 50
    classes: int = 10
    edge: int | None = None

    @classmethod
    def exactly(cls, rendered: Rendered, edge: int | None = None) -> "Texts":
        """The lengths of a conversation whose tokens are known."""
        longest = max(map(len, rendered.response_ids))
        return cls(len(rendered.prefix_ids), len(rendered.question_ids), longest, len(rendered.response_ids), edge)

    @classmethod
    def of(cls, prompts: Prompts, reasonings: Sequence[str] = (), edge: int | None = None) -> "Texts":
        """Estimated from the number of characters: the tokenizer, which would count exactly, is not loaded yet.

        Args:
            reasonings: the texts of the images' own, in addition to the responses.
        """
        before, after = prompts.system, prompts.question
        if prompts.question_first:
            before, after = before + after, ""
        longest = max([*prompts.responses, *reasonings], key=len)
        prefix, question, response = (len(text) // CHARACTERS_PER_TOKEN + 10 for text in (before, after, longest))
        return cls(prefix, question, response, len(prompts.class_names), edge)


@dataclass(frozen=True)
class Need:
    """Bytes. evaluation and saving: in addition to weights and optimizer, while a run evaluates or saves."""

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


def estimate(family: Family, settings: Settings, dtype: torch.dtype, device: str, texts: Texts | None = None) -> Need:
    """What a run with these settings needs.

    Args:
        family: from `outline`.
        settings: a batch size that is not decided yet counts as 1.
        dtype: number format of the computation.
        device: cpu, cuda or mps.
        texts: the conversation; default: 200 + 50 + 50 tokens and 10 classes.
    """
    texts, size = texts or Texts(), dtype.itemsize
    trained, frozen, quantized = _count(family, settings)
    quantized_bytes = int(quantized * BYTES_OF_BITS[settings.bits]) if settings.bits else 0
    converted = trained * size if size < FLOAT32 else 0  # autocast's copies of the trained weights
    return Need(
        weights=trained * FLOAT32 + frozen * size + quantized_bytes,
        gradients=trained * FLOAT32,
        optimizer=2 * trained * FLOAT32,
        activations=int(_activations(family, settings, size, device, texts)) + converted,
        evaluation=evaluation_bytes(family, settings, size, texts),
        saving=_copied(family, settings, size) if device == "cpu" else 0,  # a GPU's weights are copied to the CPU
    )


def _count(family: Family, settings: Settings) -> tuple[int, int, int]:
    """The number of weights that are trained, that are frozen, and that are frozen and quantized."""
    model = family.model
    model.requires_grad_(settings.tune == "full")
    family.connector.requires_grad_(not settings.freeze_connector)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    layers = _language_layers(family)
    quantized = sum(m.weight.numel() for m in layers) if settings.bits else 0
    if settings.tune == "lora":
        trained += settings.lora_rank * sum(m.in_features + m.out_features for m in layers)
        trained += sum(m.out_features for m in layers) if settings.lora_variant == DORA else 0
    return trained, frozen - quantized, quantized


def _language_layers(family: Family) -> list[nn.Linear]:
    names = family.linear_layers(language=True)
    return [layer for layer in map(family.model.get_submodule, names) if isinstance(layer, nn.Linear)]


def _image_load(family: Family, settings: Settings, texts: Texts) -> tuple[int, int]:
    """Patches and tokens of the largest image, with those image options that the family has."""
    options = settings.image_options(texts.edge)
    return family.image_load(**{name: value for name, value in options.items() if name in family.image_defaults})


def _copied(family: Family, settings: Settings, size: int) -> int:
    """Bytes of the weights that are copied to be saved: those that LoRA is merged into, or float32 ones to convert."""
    if settings.tune == "lora":
        return sum(m.weight.numel() for m in _language_layers(family)) * size
    trained = sum(p.numel() for p in family.model.parameters() if p.requires_grad)
    return trained * size if size < FLOAT32 else 0


@dataclass(frozen=True)
class Block:
    """The widths of an encoder's blocks, in the letters of the top of this file, and how many blocks there are."""

    count: int
    width: int  # D
    queries: int  # Q
    keys: int  # K
    inner: int  # I
    wide: int  # W
    inputs: int  # of all linear layers, except the last one of the attention and the last one of the MLP
    rms_norm: bool

    @classmethod
    def of(cls, encoder: nn.Module) -> "Block":
        """Read from the first block of an encoder."""
        blocks = _blocks(encoder)
        linears = {name: m for name, m in blocks[0].named_modules() if isinstance(m, nn.Linear)}
        attention = [m for name, m in linears.items() if "att" in name]
        mlp = [m for name, m in linears.items() if "att" not in name]
        # The MLP goes from D to I and back: of its layers, the last one has the most inputs.
        inner, width = max((m.in_features, m.out_features) for m in mlp)
        # All layers of the attention read D numbers, except the last one, which reads Q.
        queries = width + sum(m.in_features - width for m in attention)
        # The layers of the attention put out Q, K and, the last one, D.
        keys = sum(m.out_features for m in attention) - queries - width
        return cls(
            count=len(blocks),
            width=width,
            queries=queries,
            keys=keys,
            inner=inner,
            wide=sum(m.out_features for m in mlp) - width,
            inputs=sum(m.in_features for m in linears.values()) - queries - inner,
            rms_norm=not any(isinstance(m, nn.LayerNorm) for m in blocks[0].modules()),
        )

    def kept(self, size: int, trained: bool) -> float:
        """Bytes that a block keeps for a token, except keys and values. size: bytes of a number of the computation."""
        numbers = 2 * self.queries + self.wide
        if self.wide > self.inner:  # a gate
            numbers += self.inner
        kept = 2 * self.width * FLOAT32 + numbers * size
        if trained:
            inputs = self.inputs if size < FLOAT32 else 2 * self.width
            kept += (self.inner + inputs) * size + 2 * self.width * FLOAT32 * self.rms_norm
        return kept

    def passing(self, size: int) -> float:
        """Bytes that a token has in a forward pass without gradients, while the largest layer runs."""
        return 2 * (self.width + max(self.queries + self.keys / 2, self.wide)) * size


def _blocks(encoder: nn.Module) -> nn.ModuleList:
    """The innermost list of modules that holds all linear layers that any list of the encoder holds."""
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]
    return max(reversed(lists), key=lambda m: sum(isinstance(part, nn.Linear) for part in m.modules()))


@dataclass(frozen=True)
class Rows:
    """What goes through the language model in one forward pass of a training, in tokens.

    count: rows. prefix: tokens that all rows share, computed once. length: tokens of a row. predicted: tokens of a row
    with logits. nodes: tokens of a row that belong to the label tree, whose logits are computed in parts.
    """

    count: int
    prefix: int
    length: int
    predicted: int
    nodes: int

    @classmethod
    def of(cls, family: Family, settings: Settings, texts: Texts, image: int) -> "Rows":
        """image: tokens of an image."""
        batch = settings.batch_size or 1
        if not family.shares_prefix:
            # Whole rows, one for the response and at most one for each class (see vlm/classifier/plain.py).
            copies = {None: 2, RESPONSE: 1, POSTERIOR: texts.classes, BOTH: 1 + texts.classes}[settings.objective]
            length = texts.prefix + image + texts.question + texts.response
            return cls(batch * copies, prefix=0, length=length, predicted=length, nodes=0)
        response = 0 if settings.objective == POSTERIOR else texts.response
        # Upper limits: all nodes of the tree for the posterior, and about one for each class with both.
        nodes = {None: texts.classes, RESPONSE: 0, POSTERIOR: texts.response * texts.classes, BOTH: texts.classes}
        tree = nodes[settings.objective]
        length = image + texts.question + response + tree
        return cls(batch, prefix=texts.prefix, length=length, predicted=response, nodes=tree)


def _activations(family: Family, settings: Settings, size: int, device: str, texts: Texts) -> float:
    """Bytes at the end of the forward pass, when activations are most, and what the first steps back add."""
    patches, image = _image_load(family, settings, texts)
    rows = Rows.of(family, settings, texts, image)
    per_image = patches * _kept_by_vision(family, settings, size) + image * _kept_by_connector(family, settings, size)
    language = _kept_by_language(family, settings, size, device, rows)
    return LIBRARIES + language + rows.count * per_image + _logits(family, settings, rows)


def _kept_by_language(family: Family, settings: Settings, size: int, device: str, rows: Rows) -> float:
    """Bytes that the blocks of the language model keep for all tokens."""
    block = Block.of(family.language)
    prefix = 0 if settings.tune == "connector" else rows.prefix  # else no trained weight comes before it
    per_token: float = block.count * block.kept(size, trained=settings.tune == "full")
    if settings.tune == "lora":
        per_token += _inputs_of_lora(family, settings, size, device, block)
    # Except on a CPU, a mask makes transformers repeat keys and values for each head.
    keys = block.keys if device == "cpu" else 2 * block.queries
    attention: float = block.count * rows.count * (rows.prefix + rows.length) * (keys + rows.length) * size
    if settings.gradient_checkpointing:  # the inputs of all blocks, and one block whole
        per_token = block.count * block.width * FLOAT32 + per_token / block.count
        attention /= block.count
    prefix_keys = prefix * block.count * block.keys * size
    return (prefix + rows.count * rows.length) * per_token + attention + prefix_keys


def _inputs_of_lora(family: Family, settings: Settings, size: int, device: str, block: Block) -> int:
    """Bytes that LoRA keeps for a token: the inputs of its layers, with dropout its masks, and with DoRA what the
    layers give without LoRA and what LoRA gives."""
    layers = _language_layers(family)
    inputs = sum(m.in_features for m in layers)
    results = 2 * sum(m.out_features for m in layers) * size if settings.lora_variant == DORA else 0
    if settings.lora_dropout:
        mask = 1 if device == "cuda" else FLOAT32  # CUDA keeps which values are dropped, others the factors
        return inputs * (size + mask) + results
    if size == FLOAT32:  # layers with the same input keep it once; else autocast converts it for each layer
        inputs = block.count * (2 * block.width + block.inner)
    return inputs * size + results


def _kept_by_vision(family: Family, settings: Settings, size: int) -> float:
    """Bytes that the blocks of the vision encoder keep for a patch."""
    if settings.tune != "full":
        return 0
    block = Block.of(family.vision)
    per_patch = block.count * (block.kept(size, trained=True) + block.keys * size)
    if settings.gradient_checkpointing:  # the inputs of all blocks, and one block whole
        per_patch = block.count * block.width * FLOAT32 + per_patch / block.count
    return per_patch


def _kept_by_connector(family: Family, settings: Settings, size: int) -> int:
    """Bytes that the connector keeps for a token of an image."""
    if settings.freeze_connector:
        return 0
    return size * sum(m.in_features + m.out_features for m in family.connector.modules() if isinstance(m, nn.Linear))


def _logits(family: Family, settings: Settings, rows: Rows) -> int:
    """Bytes of the logits, their softmax and its gradient, and with --tune full of the output layer's new gradient."""
    words, width = family.model.get_output_embeddings().weight.shape
    numbers = rows.count * rows.predicted * words + min(rows.count * rows.nodes * words, LOGITS_AT_ONCE)
    gradient = words * width if settings.tune == "full" else 0  # in addition to the one that it is added to
    return (3 * numbers + gradient) * FLOAT32


def evaluation_bytes(family: Family, settings: Settings, size: int, texts: Texts) -> int:
    """Bytes that an evaluation, or an inference, takes in addition to the weights.

    Args:
        size: bytes of a number of the computation.
    """
    batch, language, vision = settings.eval_batch_size, Block.of(family.language), Block.of(family.vision)
    words = family.model.get_output_embeddings().weight.shape[0]
    patches, image = _image_load(family, settings, texts)
    nodes = min(texts.response * texts.classes, NODES_KEPT + NODES_AT_ONCE)
    # Keys and values of two passes, and those of the nodes of the label tree.
    tokens = 2 * (texts.prefix + image + texts.question) + nodes
    keys = batch * tokens * language.count * language.keys * size
    passing = batch * max(patches * vision.passing(size), (image + texts.question) * language.passing(size))
    if family.shares_prefix:
        parts = 3 if size == FLOAT32 else 3.5  # logits of a part, their logarithms, and those of the part before
        logits = parts * min(batch * (1 + nodes) * words, LOGITS_AT_ONCE)
    else:  # the forward pass of transformers: logits of whole rows
        logits = batch * (texts.prefix + image + texts.question + texts.response) * words
    return int(LIBRARIES + keys + max(passing, logits * FLOAT32))
