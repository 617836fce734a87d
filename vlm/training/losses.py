"""The two losses of a run, that of the response and that of the class, by their names in `log.jsonl` and in words.

Training and validation log the same two quantities (vlm/classifier/objective.py), so they can be compared.
"""

import statistics
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from vlm.classifier import Objective
from vlm.config import BEST_MODEL, Settings

# By name: mean over the response tokens, and mean over the images. `loss` is their sum, which is minimized.
LOSSES = {"response_loss": "response loss per token", "class_loss": "class loss per image"}


def both_losses(response: Tensor, posterior: Tensor | None, per_image: float | Tensor) -> Tensor:
    """(2,) the two losses; that of the class is 0 if it is not trained.

    Args:
        response: scalar, divided by the response tokens. posterior: scalar, multiplied by `per_image`.
    """
    return torch.stack([response, response.new_zeros(()) if posterior is None else posterior * per_image])


def named_losses(losses: Sequence[float], objective: Objective) -> dict[str, float]:
    """The losses that are trained by name, and their sum as `loss`.

    Args:
        losses: the two, in the order of `LOSSES`.
    """
    trained = (objective.has_response, objective.has_posterior)
    parts = {name: loss for name, loss, is_trained in zip(LOSSES, losses, trained, strict=True) if is_trained}
    return {"loss": sum(parts.values()), **parts}


def mean_since_evaluation(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each training loss since the last evaluation in the history; empty if nothing was logged since."""
    since = list(takewhile(lambda entry: entry["kind"] != "validation", reversed(history)))
    return {name: statistics.fmean(values) for name in LOSSES if (values := [e[name] for e in since if name in e])}


def losses_in_words(validation: dict[str, float], training: dict[str, float]) -> str:
    """The losses on validation, each next to the mean of the same loss in the training since the last evaluation."""
    parts = []
    for name, words in LOSSES.items():
        if name in validation:
            seen = f" (training {training[name]:.4f})" if name in training else ""
            parts.append(f"{words} {validation[name]:.4f}{seen}")
    return ", ".join(parts)


def advice(settings: Settings, dtype: torch.dtype, best_step: int) -> str:
    """What helps if the loss is not finite, and what is left of the run.

    Args:
        best_step: the step of the best model; 0 if there is none.
    """
    cures = [f"a lower --learning-rate (now {settings.learning_rate:g})", "a smaller --max-grad-norm"]
    cures += ["--dtype float32"] if dtype != torch.float32 else []
    best = f" The best model so far (step {best_step}) is in {BEST_MODEL}." if best_step else ""
    return f"try {' or '.join(cures)}.{best}"
