"""One module, three uses: the loss, the probability of every class, the text. The only owner of the forward pass.

B = images, C = classes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.classifier.batching import Batch, vlm_collate_fn
from vlm.classifier.calibration import Calibration
from vlm.classifier.forward import Forward, LossOutput, Scored
from vlm.classifier.head import Head
from vlm.classifier.label_tree import LabelTree, build_label_tree
from vlm.classifier.objective import Objective
from vlm.classifier.plain import PlainForward
from vlm.classifier.search import PROVEN, TOLERANCE
from vlm.classifier.shared import SharedPrefix
from vlm.common import UsageError, evaluation_mode, first_line, note
from vlm.config import RESPONSE
from vlm.conversation import Prompts
from vlm.data import Sample
from vlm.families import Family, FeatureCache, Listening, uncached_inputs

# The largest difference between the log-probabilities of the shared and the plain forward: in float32, and in formats
# of half the size.
CHECK_TOLERANCE, HALF_TOLERANCE = 1e-3, 0.5
MORE_TOKENS, FEWEST_TOKENS = 2, 64  # the limit of a free text: so many times the longest response, and at least so many


class VLMClassifier(nn.Module):
    """A vision-language model together with the conversation that it classifies by.

    Args:
        family: the architecture with its weights and processor.
        prompts: the conversation and the response of each class.

    Attributes:
        model: the transformers model.
        tree: the label tree of the scored texts.
        objective: what the training minimizes.
        calibration: turns scores into probabilities; fitted after the training, and loaded with a model.
        head: gives evidence besides the text; fitted and loaded likewise. None: there is none.
        strategy: how the model is run, with a shared prefix or plain.

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
        self.identity = ""  # a digest of the weights and metadata that it was loaded from
        self.inference_cache: FeatureCache | None = None  # opened by `predict_batch`, for as long as the weights stay
        self.objective = Objective(RESPONSE, self.tree, len(self.rendered.opening_ids))
        self.calibration = Calibration()
        self.head: Head | None = None
        self.strategy: Forward = (SharedPrefix if family.shares_prefix else PlainForward)(
            family, self.rendered, self.tree
        )
        if family.must_be_checked and family.shares_prefix:
            self._check_shared_prefix()

    def _check_shared_prefix(self) -> None:
        """Compare the shared prefix and the label tree with the plain forward; if they differ, use the plain one."""
        plain = PlainForward(self.family, self.rendered, self.tree)
        noise = Image.effect_noise((64, 48), 80).convert("RGB")
        batch = self.collate(with_response=False)([Sample(noise, 0, "an image of noise")]).to(self.device)
        some = range(min(3, len(self.class_names)))
        try:
            with evaluation_mode(self):
                difference = (self.score(self.read(batch))[:, : len(some)] - plain.score(batch, some)).abs()
            worst = float(difference.max())
            reason = f"the log-probabilities of the responses differ by {worst:.1e}"
        except Exception as error:
            worst, reason = float("inf"), f"{type(error).__name__}: {first_line(error)}"
        full_size = self.model.dtype in (torch.float32, torch.float64)
        if not worst <= (CHECK_TOLERANCE if full_size else HALF_TOLERANCE):
            note(
                f"the shared prefix does not fit this model ({reason}): falling back to the plain forward, which is "
                "slower and as exact."
            )
            self.family.shares_prefix = False
            self.rendered = self.family.render(self.prompts)
            self.strategy = PlainForward(self.family, self.rendered, self.tree)

    @property
    def device(self) -> torch.device:
        return self.strategy.device

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.prompts.class_names

    @property
    def counted_head(self) -> Head | None:
        """The head, if its evidence counts."""
        return None if self.calibration.evidence is None else self.head

    def train(self, mode: bool = True) -> "VLMClassifier":
        self.strategy.forget()  # the weights are about to change, or have changed
        self.inference_cache = None
        return super().train(mode)

    def collate(self, with_response: bool, cache: FeatureCache | None = None) -> Callable[[Sequence[Sample]], Batch]:
        """`vlm_collate_fn` for this model's images and conversation, for a loader with any number of processes."""
        return partial(
            vlm_collate_fn,
            family=self.family.without_weights(),
            rendered=self.rendered,
            with_response=with_response,
            cache=cache,
            layer=None if self.head is None or with_response else self.head.layer,
        )

    def forward(self, batch: Batch, first: bool = True, last: bool = True) -> LossOutput:
        """The summed losses that the objective asks for.

        Args:
            batch: made with responses, if they are trained.
            first, last: whether the batch is the first, or the last, of an optimizer step. The prefix is run with the
                first; its gradients come with the backward pass of the last, which has to come after those of the
                others.
        """
        return self.strategy.losses(batch, self.objective, first, last)

    def read(self, batch: Batch) -> Any:
        """Read prefix, images, questions and opening of a batch made with `with_response=False`.

        The result is for `score`, `search` and `write`, any number of times.
        """
        return self.strategy.read(batch)

    def with_features(self, batch: Batch) -> Batch:
        """The batch with features in the place of pixels, if the model can be run from them."""
        return self.strategy.with_features(batch)

    @torch.no_grad()
    def look(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Encode the images of a batch, and have the head judge them.

        Returns:
            the batch with features in the place of pixels, if the model can be run from them.
            (B, C) logits of the head.
        """
        assert self.head is not None
        cached = torch.zeros(len(batch), dtype=torch.bool) if batch.cached is None else batch.cached.cpu()
        new = (~cached).nonzero().squeeze(1)
        with Listening(self.family, [self.head.layer]) as listening:
            seen = self.strategy.with_features(batch)
            if seen is batch and len(new):  # this strategy runs the encoder again when it reads the batch
                self.family.encoder_features(batch.pixels)
        parts = [] if batch.vectors is None else [batch.vectors.cpu()]
        if len(new):
            tokens = (batch.input_ids == self.family.image_token_id).sum(1).cpu()  # (B,)
            shares = self.family.shares(uncached_inputs(batch.pixels), tokens[new].tolist())
            parts.append(listening.vectors(shares)[:, 0])  # (new, 1, S, W) -> (new, S, W)
        # cached ones and, after them, new ones -> the order of the batch
        vectors = torch.cat(parts)[torch.cat([cached.nonzero().squeeze(1), new]).argsort()]
        return seen, self.head.logits(vectors)

    def score(self, reading: Any) -> Tensor:
        """(B, C) exact log-probability of the scored text of each class, by a visit of the whole label tree."""
        return self.search(reading, tolerance=0.0).scores

    def search(
        self,
        reading: Any,
        tolerance: float = TOLERANCE,
        labels: Sequence[int] | None = None,
        proven: int = PROVEN,
        evidence: Tensor | None = None,
    ) -> Scored:
        """Log-probabilities of the scored texts, the most probable branches of the label tree first.

        Args:
            tolerance, proven: see `best_first.Searches`. The probabilities are those after `calibration`; if that is
                only a temperature, those before it, too.
            labels: for each image a class whose log-probability has to be exact.
            evidence: (B, C) logits of the head, if they count.
        """
        weighting = self.calibration.weighting(evidence)
        return self.strategy.search(reading, weighting, tolerance, labels, proven)

    def write(self, reading: Any, max_new_tokens: int | None = None) -> list[str]:
        """The text of each sample by greedy decoding, stopped at the end of turn.

        Args:
            max_new_tokens: default: twice the longest scored text, and at least 64.
        """
        longest = MORE_TOKENS * int(self.tree.lengths.max())
        return self.strategy.write(reading, max_new_tokens or max(FEWEST_TOKENS, longest))
