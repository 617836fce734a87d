"""The forward pass with a shared prefix.

The prefix (instructions, class list) stands before the image and is equal for all samples. Because of causal attention
its keys and values do not depend on the image: they are computed once, with gradients, and only the rows are run for
each sample.

B = images, P = prefix tokens, L = tokens of the longest row, K = P + L, O = tokens of the opening, N = nodes of the
label tree in a row, C = classes, D = width.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlm.classifier.batching import Batch
from vlm.classifier.best_first import Searches
from vlm.classifier.forward import Forward, LossOutput, Scored
from vlm.classifier.label_tree import LabelTree
from vlm.classifier.objective import Objective
from vlm.classifier.prefix import KeysAndValues, Recorded, StepPrefix, expand, in_front, keys_and_values
from vlm.classifier.search import Reading, run_searches
from vlm.classifier.tree_rows import TreeRows
from vlm.common import RunError
from vlm.conversation import Rendered
from vlm.families import Family


class SharedPrefix(Forward):
    """Runs the prefix once and only the rows for each sample."""

    def __init__(self, family: Family, rendered: Rendered, tree: LabelTree):
        super().__init__(family, rendered, tree)
        self._prefix_ids = torch.tensor([rendered.prefix_ids])  # (1, P)
        self._kept: Cache | None = None  # the prefix between calls, while the weights cannot change
        self._step: StepPrefix | None = None  # the prefix of an optimizer step of several batches

    def forget(self) -> None:
        self._kept = None

    # Training

    def losses(self, batch: Batch, objective: Objective, first: bool, last: bool) -> LossOutput:
        """The losses that the objective asks for; logits are computed only for tokens that are predicted.

        The prefix is run with the first batch of a step. Its gradient comes with the backward pass of the last one,
        which has to come after those of the others.
        """
        rows = objective.rows
        branching = batch.prompt_lengths + len(self.rendered.opening_ids) if rows is not None else None
        hidden, _ = self.run_rows(batch, in_front(self._prefix_of_step(first, last)), rows, branching)
        length = batch.input_ids.shape[1]
        # (B, L, D) -> (B*L, D) -> (response tokens, D): the states that predict a response token
        states = hidden[:, :length].flatten(0, 1)[batch.predicting]
        targets = batch.targets.flatten()[batch.predicting + 1]
        labels = batch.labels[batch.predicting // length]
        loss, posterior = hidden.new_zeros(()), None
        if objective.has_response:
            loss = objective.of_tokens(self.family.logits(states), targets, labels)
        if rows is not None and branching is not None:
            posterior = objective.of_classes(rows.scores(self.family, hidden, branching), batch.class_targets)
        return LossOutput(loss, len(targets), posterior)

    def _prefix_of_step(self, first: bool, last: bool) -> KeysAndValues:
        if not torch.is_grad_enabled():
            return keys_and_values(self._prefix())
        if first and last:
            return self.run_prefix()
        if first:
            self._step = StepPrefix(self.run_prefix())
        assert self._step is not None, "the first batch of a step comes first"
        if not last:
            return self._step.for_batch()
        step, self._step = self._step, None
        return step.for_last_batch()

    def run_prefix(self) -> KeysAndValues:
        """Keys and values of the prefix, one row."""
        if self._prefix_ids.device != self.device:
            self._prefix_ids = self._prefix_ids.to(self.device)
        ids = self._prefix_ids
        cache = Cache(layer_class_to_replicate=Recorded)
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)  # (1, P)
        self.family.run_language(self.family.embed(ids), self.family.text_positions(positions), cache)
        return keys_and_values(cache)

    def run_rows(
        self, batch: Batch, cache: Cache, nodes: TreeRows | None = None, branching: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the rows of a batch after what is in the cache.

        Args:
            nodes: the label tree, if its nodes are run together with the rows. branching: see `TreeRows.mask`.

        Returns:
            hidden states (B, L, D), or (B, L + N, D) with nodes.
            ends: (B,) the position after each row.
        """
        embeddings = self._embed(batch)
        start = len(self.rendered.prefix_ids)
        positions, ends = self.family.positions(start, batch.input_ids, batch.lengths, batch.pixels)
        if nodes is None or branching is None:
            return self.family.run_language(embeddings, positions, cache), ends
        # Row and nodes in one sequence: positions (..., L) and (..., N) -> (..., L + N), embeddings alike.
        of_nodes = self.family.text_positions(nodes.positions(ends - batch.lengths + branching))
        leading = torch.broadcast_shapes(positions.shape[:-1], of_nodes.shape[:-1])
        positions = torch.cat([part.expand(*leading, -1) for part in (positions, of_nodes)], dim=-1)
        node_embeddings = self.family.embed(nodes.tokens).expand(len(batch), -1, -1)
        embeddings = torch.cat([embeddings, node_embeddings], dim=1)
        mask = nodes.mask(start, batch.input_ids.shape[1], branching)
        return self.family.run_language(embeddings, positions, cache, mask), ends

    def _embed(self, batch: Batch) -> Tensor:
        """(B, L, D) embeddings of the rows, image features at the places of the image tokens."""
        embeddings = self.family.embed(batch.input_ids)
        if not batch.pixels:  # a conversation without an image
            return embeddings
        features = self.family.image_features(batch.pixels).to(embeddings.dtype)
        if len(batch.image_places) != len(features):
            raise RunError(
                f"the processor writes {len(batch.image_places)} image tokens, and the vision encoder gives "
                f"{len(features)} features: the processor's settings do not fit the model. Copy or download it again."
            )
        # (B, L, D) -> (B*L, D), features (image tokens, D) written at their places, -> (B, L, D)
        placed = embeddings.flatten(0, 1).index_copy(0, batch.image_places, features)
        return placed.unflatten(0, batch.input_ids.shape)

    # Reading, then scoring or writing

    @torch.no_grad()
    def read(self, batch: Batch) -> Reading:
        """Read prefix, images, questions and the opening of a batch made without responses."""
        cache = expand(self._prefix(), len(batch))
        hidden, ends = self.run_rows(batch, cache)
        start, lengths = len(self.rendered.prefix_ids), batch.lengths.unsqueeze(1)  # (B, 1)
        places = torch.arange(start + hidden.shape[1], device=hidden.device)  # (K,)
        offsets = torch.arange(len(self.rendered.opening_ids) + 1, device=hidden.device)  # (1 + O,)
        # (B, L, D) -> (B, 1 + O, D): the last prompt token of each row and its opening
        index = (lengths - 1 + offsets).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        seen, seen_opening = (places < start + lengths + count for count in (0, len(offsets) - 1))  # (B, K)
        return Reading(cache, seen, seen_opening, hidden.gather(1, index), ends)

    def _prefix(self) -> Cache:
        """The cache of the prefix, one row; kept between calls while the weights cannot change."""
        if self._kept is not None:
            return self._kept
        cache = self.family.new_cache()
        for index, (keys, values) in enumerate(self.run_prefix()):
            cache.update(keys, values, index)
        if not self.family.model.training:
            self._kept = cache
        return cache

    @torch.no_grad()
    def search(
        self,
        reading: Reading,
        weighting: tuple[float, np.ndarray],
        tolerance: float,
        labels: Sequence[int] | None,
        proven: int,
    ) -> Scored:
        searches = Searches(self.tree, len(reading.states), tolerance, *weighting, labels, proven)
        run_searches(self.family, self.tree, reading, searches)
        dtype = torch.promote_types(reading.states.dtype, torch.float32)
        scores = torch.from_numpy(searches.class_log_probabilities())  # (B, C)
        return Scored(scores.to(dtype), torch.from_numpy(searches.unexplored).float())

    @torch.no_grad()
    def write(self, reading: Reading, limit: int) -> list[str]:
        stops = torch.tensor(self.family.stop_ids, device=self.device)
        hidden, seen = reading.states[:, 0], reading.seen  # (B, D) of the last prompt token, (B, K)
        cache = expand(reading.cache, len(hidden))
        written = torch.empty(len(hidden), 0, dtype=torch.long, device=hidden.device)
        done = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        for step in range(limit):
            token = self.family.logits(hidden).argmax(-1)  # (B, D) -> (B, V) -> (B,)
            token = torch.where(done, stops[0], token)
            written = torch.cat([written, token.unsqueeze(1)], dim=1)  # (B, step + 1)
            done |= torch.isin(token, stops)
            if done.all():
                break
            seen = torch.nn.functional.pad(seen, (0, 1), value=True)  # (B, K + step + 1)
            positions = self.family.text_positions((reading.next_position + step).unsqueeze(1))
            embeddings = self.family.embed(token.unsqueeze(1))  # (B, 1, D)
            # The mask is (B, 1, 1, K + step + 1): one new token, which sees the prompt and all that was written.
            hidden = self.family.run_language(embeddings, positions, cache, seen[:, None, None])[:, 0]
        return [self.family.decode(ids) for ids in written.tolist()]

    def with_features(self, batch: Batch) -> Batch:
        """The batch with features after the connector, so that images that are read twice are encoded once."""
        if not batch.pixels:  # a row without an image
            return batch
        return replace(batch, pixels=self.family.with_features(batch.pixels))
