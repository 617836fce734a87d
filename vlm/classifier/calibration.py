"""From scores to probabilities: the calibration that belongs to a classifier, as it is used and stored.

How it is fitted: vlm/evaluation/fit_calibration.py. It belongs to one conversation and one list of classes, and is
stored with a key of both.

N = images, C = classes. The sums (N, C) are log-probabilities of the scored texts. The evidence (N, C), the logits of
the head (head.py), is added to them. The scores (N, C) are what that comes to, without the prior.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vlm.common import note
from vlm.conversation import Prompts


@dataclass(frozen=True)
class Calibration:
    """What turns sums and evidence into scores, and scores into probabilities: softmax of scores / temperature + bias.

    Attributes:
        temperature: above 0.
        bias: one number a class, or None.
        abstain_below: a prediction whose probability is smaller is none.
        prior: (C,) the sums of the same conversation without an image. If given, it is subtracted from the score.
        evidence: the score of a class is its sum and this many times its evidence; None: its sum.
        text: False: the sum does not count.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] | None = None
    abstain_below: float | None = None
    prior: tuple[float, ...] | None = None
    evidence: float | None = None
    text: bool = True

    @property
    def score(self) -> str:
        """What the sums become: sum, as they are, or prior."""
        return "sum" if self.prior is None else "prior"

    @property
    def kind(self) -> str:
        """What the score is made of: text, head or both."""
        return "text" if self.evidence is None else "both" if self.text else "head"

    def with_evidence(self, sums: Tensor, evidence: Tensor | None) -> Tensor:
        """(N, C) sums, to which the evidence that counts is added, on the CPU."""
        if self.evidence is None:
            return sums.cpu()
        assert evidence is not None, "the evidence of the head counts"
        added = self.evidence * evidence.detach().cpu().double()
        return sums.detach().cpu().double() + added if self.text else added

    def scores(self, sums: Tensor) -> Tensor:
        """(N, C) sums with evidence -> (N, C) scores, on the CPU, in float64."""
        scores = sums.detach().cpu().double()
        return scores if self.prior is None else scores - scores.new_tensor(self.prior)

    def log_probabilities(self, sums: Tensor) -> Tensor:
        """(N, C) sums with evidence -> (N, C) log-probabilities, on the CPU.

        In float64, so that the temperature makes no two classes equal by rounding.
        """
        scaled = self.scores(sums) / self.temperature
        if self.bias is not None:
            scaled = scaled + scaled.new_tensor(self.bias)
        return scaled.log_softmax(-1)

    @property
    def is_temperature(self) -> bool:
        """Whether the sums are divided by a temperature and nothing else."""
        return self.prior is None and self.bias is None and self.evidence is None

    def weighting(self, evidence: Tensor | None = None) -> tuple[float, np.ndarray]:
        """What a search compares classes by: sums are divided by the first, and the second is added: one, (C,) or,
        with evidence, (B, C).

        A temperature without prior and bias counts as at least 1, so that the sums before it are as exact. What a
        search with the larger temperature leaves out is left out rightly: the true weights are the a-th power, a > 1,
        of those there, which makes a small share of the total smaller, as long as there are fewer classes than
        1 / tolerance.
        """
        if self.is_temperature:
            return max(1.0, self.temperature), np.array(0.0)
        added = np.array(self.bias or 0.0) - np.array(self.prior or 0.0) / self.temperature
        if self.evidence is not None and evidence is not None:
            added = added + (self.evidence / self.temperature) * evidence.double().cpu().numpy()
        return self.temperature, added

    def abstains(self, confidence: float) -> bool:
        """Whether a prediction with this probability is none."""
        return self.abstain_below is not None and confidence < self.abstain_below

    def to_json(self, prompts: Prompts) -> dict[str, Any]:
        """What `training_metadata.json` says about it."""
        return {
            "score": self.score,
            "prior": None if self.prior is None else list(self.prior),
            "temperature": self.temperature,
            "bias": None if self.bias is None else list(self.bias),
            "evidence": self.evidence,
            "text": self.text,
            "abstain_below": self.abstain_below,
            "key": key_of(prompts),
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], prompts: Prompts) -> "Calibration":
        """The calibration that is stored with a model; none, with a note, if it does not fit texts and classes."""
        stored = metadata.get("calibration")
        if stored is None:
            return cls()
        problem = _problem_of(stored, prompts)
        if problem:
            note(
                f"the calibration in training_metadata.json {problem}: the probabilities are the model's own "
                "(temperature 1), and it abstains from nothing."
            )
            return cls()
        values = {name: stored[name] for name in ("abstain_below", "evidence", "text") if name in stored}
        values |= {name: tuple(stored[name]) for name in ("bias", "prior") if stored.get(name) is not None}
        return cls(float(stored["temperature"]), **values)


def key_of(prompts: Prompts) -> str:
    """Digest of all that is said to the model and that it may answer."""
    text = json.dumps(prompts.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _problem_of(stored: Any, prompts: Prompts) -> str | None:
    """Why a stored calibration cannot be used, or None."""
    if isinstance(stored, dict) and stored.get("score") == "mean":
        return "is for the score mean, which this version does not have"
    if not _is_whole(stored, len(prompts.class_names)):
        return "is damaged"
    if stored.get("key") != key_of(prompts):
        return "was fitted with other prompts or classes than are there now"
    return None


def _is_whole(stored: Any, classes: int) -> bool:
    """Whether all values have the right types and lengths."""
    if not isinstance(stored, dict) or not _is_number(stored.get("temperature")) or stored["temperature"] <= 0:
        return False
    threshold, evidence = stored.get("abstain_below"), stored.get("evidence")
    vectors = {name: stored[name] for name in ("bias", "prior") if stored.get(name) is not None}
    score = "prior" if "prior" in vectors else "sum"
    return (
        all(_is_vector(values, classes) for values in vectors.values())
        and stored.get("score", "sum") == score  # older folders have none
        and (threshold is None or _is_number(threshold))
        and (evidence is None or _is_number(evidence))
        and stored.get("text", True) in (True, False)
    )


def _is_vector(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
