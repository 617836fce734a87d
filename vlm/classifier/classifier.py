"""One module, three uses: the loss, the probability of every class, the text. The only owner of the forward pass.

B = batch, P = prefix tokens, L = row tokens (image and question, when training the response too), K = P + L,
C = classes, D = width.

The prefix (instructions, class list) stands before the image and is the same for every sample. Causal attention means
that its keys and values do not depend on the image: it is run once, with gradients, and only the rows are run per
sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vlm.classifier import plain
from vlm.classifier.batching import vlm_collate_fn
from vlm.classifier.calibration import Calibration
from vlm.classifier.label_tree import LabelTree, Search, build_label_tree
from vlm.classifier.objective import Objective
from vlm.classifier.prefix import KeysAndValues, Recorded, StepPrefix, expand, in_front
from vlm.classifier.search import PROVEN, TOLERANCE, run_searches
from vlm.classifier.tree_rows import TreeRows
from vlm.common.errors import UsageError
from vlm.common.modes import evaluation_mode
from vlm.common.progress import note
from vlm.config.settings import RESPONSE
from vlm.conversation.prompts import Prompts
from vlm.data.splits import Sample
from vlm.families.base import Family

# Largest difference between shared and plain forward of the log-probability of a response: float32, and formats of half
# the size.
CHECK_TOLERANCE, HALF_TOLERANCE = 1e-3, 0.5


class LossOutput(NamedTuple):
    """loss: scalar, the summed loss of the response tokens. tokens: how many there are. posterior: scalar, the summed
    loss of the classes, where it is trained (see vlm/classifier/objective.py).
    """

    loss: Tensor
    tokens: int
    posterior: Tensor | None = None


class Scored(NamedTuple):
    """scores: (B, C) log-probability of each response. unexplored: (B,) how much the probability of any class can be
    wrong at most. openings: (B,) log-probability of the tokens that all responses begin with."""

    scores: Tensor
    unexplored: Tensor
    openings: Tensor


@dataclass
class Reading:
    """Prompts that were read: what scoring and writing go on from.

    cache: keys and values of the K tokens: prompt, and the O tokens that all responses begin with. seen: (B, K) bool,
    True at the prompt; seen_opening: True at those O too. states: (B, 1 + O, D) hidden states of the last prompt token
    and of those O. next_position: (B,) position of the first token behind the prompt. A model without a shared prefix
    has the batch itself instead.
    """

    cache: Cache | None = None
    seen: Tensor | None = None
    seen_opening: Tensor | None = None
    states: Tensor | None = None
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
            self.tree: LabelTree = build_label_tree(self.rendered.scored_ids)
        except ValueError as error:
            raise UsageError(
                f"the responses do not tell the classes apart ({error}): give every class a name of its own."
            ) from error
        self.feature_cache: Any = None  # a `FeatureCache` while training with a frozen vision encoder
        self.inference_cache: Any = None  # the one that `predict_batch` has opened
        self.objective = Objective(RESPONSE, self.tree, len(self.rendered.opening_ids))  # what the training minimizes
        self.calibration = (
            Calibration()
        )  # what makes probabilities of the scores; fitted after training, and loaded with a model
        self._kept_prefix: Cache | None = None
        self._step_prefix: StepPrefix | None = None
        self._prefix_ids = torch.tensor([self.rendered.prefix_ids])
        if family.must_be_checked and family.shares_prefix:
            self._check_shared_prefix()

    def _check_shared_prefix(self) -> None:
        """Hold the shared prefix and the label tree against the plain forward; where they differ, do without them."""
        image = Image.effect_noise((64, 48), 80).convert("RGB")
        batch = send_to_device(self.collate(with_response=False)([Sample(image, 0, "an image of noise")]), self.device)
        some = range(min(3, len(self.class_names)))
        try:
            with evaluation_mode(self):
                difference = (self.score(self.read(batch))[:, : len(some)] - plain.score(self, batch, some)).abs()
            worst = float(difference.max())
            reason = f"the log-probabilities of the responses differ by {worst:.1e}"
        except Exception as error:
            worst, reason = float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not worst <= (CHECK_TOLERANCE if self.model.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE):
            note(
                f"the shared prefix does not fit this model ({reason}): falling back to the plain forward, which is slower and as exact."
            )
            self.family.shares_prefix = False
            self.rendered = self.family.render(self.prompts)
            self._prefix_ids = torch.tensor([self.rendered.prefix_ids])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.prompts.class_names

    def train(self, mode: bool = True) -> "VLMClassifier":
        self._kept_prefix = self.inference_cache = None  # the weights are about to change, or have changed
        return super().train(mode)

    def collate(self, with_response: bool, cache: Any = None) -> Callable[[Sequence[Sample]], dict[str, Any]]:
        """`vlm_collate_fn` for this model's images and conversation, for a loader with any number of processes.

        Args:
            cache: a `FeatureCache` in the place of `feature_cache`.
        """
        family, cache = self.family.without_weights(), cache or self.feature_cache
        return partial(vlm_collate_fn, family=family, rendered=self.rendered, with_response=with_response, cache=cache)

    # Training

    def forward(self, batch: dict[str, Any], first: bool = True, last: bool = True) -> LossOutput:
        """The losses that the objective asks for, summed; logits are computed only where something is predicted.

        Args:
            batch: made with responses where they are trained.
            first, last: whether the batch is the first, or the last, of an optimizer step. The prefix is run with the
                first; its gradients come with the backward pass of the last, which has to come after those of the
                others.
        """
        if not self.family.shares_prefix:
            return self._plain_losses(batch)
        objective, rows = self.objective, self.objective.rows
        branching = batch["prompts"] + len(self.rendered.opening_ids) if objective.has_posterior else None
        hidden, _ = self._run_rows(batch, in_front(self._prefix_of_step(first, last)), rows, branching)
        length = batch["input_ids"].shape[1]
        states = hidden[:, :length].flatten(0, 1)[batch["predicting"]]
        targets = batch["targets"].flatten()[batch["predicting"] + 1]
        labels = batch["labels"][batch["predicting"] // length]
        loss = (
            objective.of_tokens(self.family.logits(states), targets, labels)
            if objective.has_response
            else hidden.new_zeros(())
        )
        posterior = (
            objective.of_classes(rows.scores(self.family, hidden, branching), batch["labels"])
            if objective.has_posterior
            else None
        )
        return LossOutput(loss, len(targets), posterior)

    def _plain_losses(self, batch: dict[str, Any]) -> LossOutput:
        objective, labels = self.objective, batch["labels"]
        loss, tokens = plain.loss(self, batch) if objective.has_response else (torch.zeros((), device=self.device), 0)
        if not objective.has_posterior:
            return LossOutput(loss, tokens)
        return LossOutput(loss, tokens, objective.of_classes(plain.scores_in_training(self, batch), labels))

    def _prefix_of_step(self, first: bool, last: bool) -> KeysAndValues:
        if first and last:
            return self._run_prefix()
        if first:
            self._step_prefix = StepPrefix(self._run_prefix())
        if not last:
            return self._step_prefix.for_batch()
        step, self._step_prefix = self._step_prefix, None
        return step.for_last_batch()

    def _run_rows(
        self, batch: dict[str, Any], cache: Cache, nodes: TreeRows | None = None, branching: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D) hidden states of the rows behind what is in the cache, and (B,) the position that follows each row.

        Args:
            nodes: the label tree, whose nodes are to be run with the rows; there are as many more states then.
                branching: see there.
        """
        ids = batch["input_ids"]
        embeddings = self.family.embed(ids)
        if batch["pixels"]:  # else a conversation without an image
            features = self.family.image_features(batch["pixels"]).to(embeddings.dtype)
            if len(batch["image_places"]) != len(features):
                raise RuntimeError(
                    f"{len(batch['image_places'])} image tokens in the text, {len(features)} image features"
                )
            embeddings = embeddings.flatten(0, 1).index_copy(0, batch["image_places"], features).unflatten(0, ids.shape)
        start = len(self.rendered.prefix_ids)
        positions, ends = self.family.positions(start, batch)
        if nodes is None:
            return self.family.run_language(embeddings, positions, cache), ends
        behind = self.family.text_positions(nodes.positions(ends - batch["lengths"] + branching))
        leading = torch.broadcast_shapes(positions.shape[:-1], behind.shape[:-1])
        positions = torch.cat([part.expand(*leading, -1) for part in (positions, behind)], dim=-1)
        embeddings = torch.cat([embeddings, self.family.embed(nodes.tokens).expand(len(ids), -1, -1)], dim=1)
        return self.family.run_language(embeddings, positions, cache, nodes.mask(start, ids.shape[1], branching)), ends

    def _run_prefix(self) -> KeysAndValues:
        """Keys and values of the prefix, one row."""
        if self._prefix_ids.device != self.device:
            self._prefix_ids = self._prefix_ids.to(self.device)
        ids = self._prefix_ids
        cache = Cache(layer_class_to_replicate=Recorded)
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        self.family.run_language(self.family.embed(ids), self.family.text_positions(positions), cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    # Reading, then scoring or writing

    @torch.no_grad()
    def read(self, batch: dict[str, Any]) -> Reading:
        """Read prefix, images, questions and what all responses begin with, of a batch made with
        `with_response=False`."""
        if not self.family.shares_prefix:
            return Reading(batch=batch)
        cache = expand(self._prefix(), len(batch["input_ids"]))
        hidden, ends = self._run_rows(batch, cache)
        start, lengths = len(self.rendered.prefix_ids), batch["lengths"].unsqueeze(1)
        places = torch.arange(start + hidden.shape[1], device=hidden.device)
        behind = torch.arange(len(self.rendered.opening_ids) + 1, device=hidden.device)
        states = hidden.gather(1, (lengths - 1 + behind).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return Reading(cache, places < start + lengths, places < start + lengths + len(behind) - 1, states, ends)

    def _prefix(self) -> Cache:
        """The cache of the prefix, one row; kept between calls while nothing can change it."""
        if self._kept_prefix is not None:
            return self._kept_prefix
        cache = self.family.new_cache()
        for index, (keys, values) in enumerate(self._run_prefix()):
            cache.update(keys, values, index)
        if not self.training:
            self._kept_prefix = cache
        return cache

    @torch.no_grad()
    def score(self, reading: Reading) -> Tensor:
        """(B, C) exact log-probability of each class's scored text (see vlm/conversation/responses.py), by a visit of
        the whole label tree."""
        return self.search(reading, tolerance=0.0).scores

    @torch.no_grad()
    def search(
        self,
        reading: Reading,
        tolerance: float = TOLERANCE,
        labels: Sequence[int] | None = None,
        proven: int = PROVEN,
    ) -> Scored:
        """Log-probabilities of the scored texts, the most probable branches of the label tree first (see
        `label_tree.Search`).

        Args:
            tolerance, proven: see `label_tree.Search`; the probabilities are meant after `calibration` and, where that
                is a temperature of the sums alone, as they are, too.
            labels: of each image a class whose log-probability has to be exact.
        """
        if reading.batch is not None:
            scores = plain.score(self, reading.batch)
            return Scored(scores, torch.zeros(len(scores)), plain.score_opening(self, reading.batch))
        temperature, bias = self.calibration.weighting()
        searches = [
            Search(self.tree, tolerance, temperature, bias, label, proven)
            for label in (labels if labels is not None else [None] * len(reading.states))
        ]
        run_searches(self, reading, searches)
        scores = np.stack([search.class_log_probabilities() for search in searches])
        kind = torch.promote_types(reading.states.dtype, torch.float32)
        openings = torch.tensor([search.opening for search in searches], dtype=torch.float64)
        return Scored(
            torch.from_numpy(scores).to(kind), torch.tensor([search.unexplored for search in searches]), openings
        )

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
        hidden, seen = reading.states[:, 0], reading.seen
        cache = expand(reading.cache, len(hidden))
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
