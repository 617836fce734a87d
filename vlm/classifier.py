"""One module, three uses: the loss, the probability of every class, the text. The only owner of the forward pass.

B = batch, P = prefix tokens, L = row tokens (picture and question, when training the response too), K = P + L,
I = inner nodes of the label tree, T = its nodes, C = classes, D = width.

The prefix (instructions, class list) stands before the picture and is the same for every sample. Causal attention means that its
keys and values do not depend on the picture: it is run once, with gradients, and only the rows are run per sample.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vlm import plain
from vlm.batching import IGNORED, vlm_collate_fn
from vlm.calibration import Calibration
from vlm.data import Sample
from vlm.errors import UsageError
from vlm.families.base import Family
from vlm.label_tree import LabelTree, build_label_tree, class_log_probabilities
from vlm.prompts import Prompts
from vlm.tracking import note

# Largest difference between shared and plain forward of the log-probability of a response: float32, and formats of half the size.
CHECK_TOLERANCE, HALF_TOLERANCE = 1e-3, 0.5
LOGITS_AT_ONCE = 2**25  # elements of one block of logits: 128 MiB in float32


class LossOutput(NamedTuple):
    """loss: scalar, the summed cross entropy of the response tokens. tokens: how many there are."""

    loss: Tensor
    tokens: Tensor


@dataclass
class Reading:
    """Prompts that were read: what scoring and writing go on from.

    cache: keys and values of the K tokens. seen: (B, K) bool, False at padding. hidden: (B, D) state of the last prompt token.
    next_position: (B,) position of the token to come. A model without a shared prefix
    has the batch itself instead.
    """

    cache: Cache | None = None
    seen: Tensor | None = None
    hidden: Tensor | None = None
    next_position: Tensor | None = None
    batch: dict[str, Any] | None = None


class VLMClassifier(nn.Module):
    """A vision-language model together with the conversation it classifies by.

    Args:
        family: the architecture with its weights and processor.
        prompts: the conversation and the response of each class.

    Raises:
        UsageError: two classes have the same response, or a text breaks the conversation.
    """

    def __init__(self, family: Family, prompts: Prompts):
        super().__init__()
        self.family = family
        self.model = family.model
        self.prompts = prompts
        self.rendered = family.render(prompts)
        try:
            self.tree: LabelTree = build_label_tree(self.rendered.response_ids)
        except ValueError as error:
            raise UsageError(f"the responses do not tell the classes apart ({error}): give every class a name of its own.") from error
        self.feature_cache: Any = None  # a `FeatureCache` while training with a frozen vision tower
        self.calibration = Calibration()  # what makes probabilities of the scores; fitted after training, and loaded with a model
        self._kept_prefix: Cache | None = None
        if family.must_be_checked and family.shares_prefix:
            self._check_shared_prefix()

    def _check_shared_prefix(self) -> None:
        """Hold the shared prefix and the label tree against the plain forward; where they differ, do without them."""
        was_training = self.training
        self.eval()
        picture = Image.effect_noise((64, 48), 80).convert("RGB")
        batch = send_to_device(self.collate(with_response=False)([Sample(picture, 0, "a picture of noise")]), self.device)
        some = range(min(3, len(self.class_names)))
        try:
            difference = (self.score(self.read(batch))[:, : len(some)] - plain.score(self, batch, some)).abs()
            worst = float(difference.max())
            reason = f"the log-probabilities of the responses differ by {worst:.1e}"
        except Exception as error:
            worst, reason = float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.train(was_training)
        if not worst <= (CHECK_TOLERANCE if self.model.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE):
            note(f"the shared prefix does not fit this model ({reason}): falling back to the plain forward, which is slower and as exact.")
            self.family.shares_prefix = False
            self.rendered = self.family.render(self.prompts)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.prompts.class_names

    def train(self, mode: bool = True) -> "VLMClassifier":
        self._kept_prefix = None  # the weights are about to change, or have changed
        return super().train(mode)

    def collate(self, with_response: bool) -> Callable[[Sequence[Sample]], dict[str, Any]]:
        """`vlm_collate_fn` for this model's pictures and conversation, for a loader with any number of processes."""
        family, cache = self.family.without_weights(), self.feature_cache
        return partial(vlm_collate_fn, family=family, rendered=self.rendered, with_response=with_response, cache=cache)

    # Training

    def forward(self, batch: dict[str, Any]) -> LossOutput:
        """Cross entropy of the response tokens, summed; logits are computed at these positions only."""
        if not self.family.shares_prefix:
            return LossOutput(*plain.loss(self, batch))
        hidden, _, _ = self._run_rows(batch)
        targets = batch["targets"][:, 1:]
        in_loss = targets != IGNORED
        logits = self.family.logits(hidden[:, :-1][in_loss])
        return LossOutput(nn.functional.cross_entropy(logits, targets[in_loss], reduction="sum"), in_loss.sum())

    def _run_rows(self, batch: dict[str, Any]) -> tuple[Tensor, Cache, Tensor]:
        """Prefix once, rows over it: hidden states (B, L, D) of the rows, the cache of all K tokens, (B,) the position that follows."""
        ids = batch["input_ids"]
        embeddings = self.family.embed(ids)
        features = self.family.picture_features(batch["pixels"]).to(embeddings.dtype)
        places = (ids == self.family.image_token_id).unsqueeze(-1)
        if places.sum() != len(features):
            raise RuntimeError(f"{int(places.sum())} picture tokens in the text, {len(features)} picture features")
        embeddings = embeddings.masked_scatter(places, features)
        cache = expand(self._prefix(), len(ids))
        positions, ends = self.family.positions(len(self.rendered.prefix_ids), batch)
        return self.family.run_language(embeddings, positions, cache), cache, ends

    def _prefix(self) -> Cache:
        """Keys and values (1, heads, P, width) of the prefix; kept between calls while nothing can change them."""
        if self._kept_prefix is not None:
            return self._kept_prefix
        ids = torch.tensor([self.rendered.prefix_ids], device=self.device)
        cache = self.family.new_cache()
        positions = torch.arange(ids.shape[1], device=self.device).unsqueeze(0)
        self.family.run_language(self.family.embed(ids), self.family.text_positions(positions), cache)
        if not self.training and not torch.is_grad_enabled():
            self._kept_prefix = cache
        return cache

    # Reading, then scoring or writing

    @torch.no_grad()
    def read(self, batch: dict[str, Any]) -> Reading:
        """Read prefix, pictures and questions of a batch made with `with_response=False`."""
        if not self.family.shares_prefix:
            return Reading(batch=batch)
        hidden, cache, ends = self._run_rows(batch)
        lengths = batch["lengths"]
        start = len(self.rendered.prefix_ids)
        places = torch.arange(start + hidden.shape[1], device=hidden.device)
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        return Reading(cache, places < (start + lengths).unsqueeze(1), last, ends)

    @torch.no_grad()
    def score(self, reading: Reading) -> Tensor:
        """(B, C) exact log-probability of each class's whole response, end of turn included, by the label tree."""
        if reading.batch is not None:
            return plain.score(self, reading.batch)
        tree = self.tree = self.tree.to(self.device)
        count = len(reading.hidden)
        hidden = reading.hidden.unsqueeze(1)
        if len(tree.inner_tokens):
            embeddings = self.family.embed(tree.inner_tokens.expand(count, -1))
            positions = self.family.text_positions(reading.next_position.unsqueeze(1) + tree.inner_depths)
            allowed = torch.cat(
                [reading.seen.unsqueeze(1).expand(-1, len(tree.inner_tokens), -1), tree.inner_mask.expand(count, -1, -1)], dim=-1
            )
            nodes = self.family.run_language(embeddings, positions, expand(reading.cache, count), allowed.unsqueeze(1))
            hidden = torch.cat([hidden, nodes], dim=1)
        return class_log_probabilities(tree, self._node_log_probabilities(hidden))

    def _node_log_probabilities(self, hidden: Tensor) -> Tensor:
        """(B, 1 + I, D) states that predict -> (B, T) log-probability of each node's token, in blocks of bounded size."""
        tree = self.tree
        result = torch.empty(len(hidden), len(tree.tokens), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows in self._blocks(hidden):
            logits = self.family.logits(hidden[:, rows])
            log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
            nodes = ((tree.predictor >= rows.start) & (tree.predictor < rows.stop)).nonzero().squeeze(1)
            result[:, nodes] = log_probabilities[:, tree.predictor[nodes] - rows.start, tree.tokens[nodes]].to(result.dtype)
        return result

    def _blocks(self, hidden: Tensor) -> Iterator[slice]:
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        step = max(1, LOGITS_AT_ONCE // (len(hidden) * vocabulary))
        for start in range(0, hidden.shape[1], step):
            yield slice(start, min(start + step, hidden.shape[1]))

    @torch.no_grad()
    def write(self, reading: Reading, max_new_tokens: int | None = None) -> list[str]:
        """The text of each sample by greedy decoding, stopped at the end of turn.

        Args:
            max_new_tokens: default: twice the longest response, and at least 64.
        """
        limit = max_new_tokens or max(64, 2 * int(self.tree.lengths.max()))
        if reading.batch is not None:
            return plain.write(self, reading.batch, limit)
        stops = torch.tensor(self.family.stop_ids, device=self.device)
        cache, seen, hidden = expand(reading.cache, len(reading.hidden)), reading.seen, reading.hidden
        written = torch.empty(len(hidden), 0, dtype=torch.long, device=hidden.device)
        done = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        for step in range(limit):
            token = self.family.logits(hidden).argmax(-1)
            token = torch.where(done, stops[0], token)
            written = torch.cat([written, token.unsqueeze(1)], dim=1)
            done |= torch.isin(token, stops)
            if done.all():
                break
            embeddings = self.family.embed(token.unsqueeze(1))
            seen = torch.nn.functional.pad(seen, (0, 1), value=True)
            positions = self.family.text_positions((reading.next_position + step).unsqueeze(1))
            hidden = self.family.run_language(embeddings, positions, cache, seen[:, None, None])[:, 0]
        return [self.family.decode(ids) for ids in written.tolist()]


def expand(cache: Cache, count: int) -> Cache:
    """A cache of `count` rows that shares the keys and values of a cache of one row, or of as many.

    What is added to it later is not added to the original.
    """
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in result.layers:
        layer.keys = layer.keys.expand(count, -1, -1, -1)
        layer.values = layer.values.expand(count, -1, -1, -1)
    return result
