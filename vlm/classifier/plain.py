"""The plain forward pass over whole sequences: exact, and slow.

It is for models whose prefix cannot be shared, and checks those whose prefix can. Here a row is a whole sequence,
prefix included.

B = images, K = tokens of a whole sequence, R = responses, V = vocabulary, C = classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.classifier.batching import IGNORED, Batch
from vlm.classifier.forward import Forward, LossOutput, Scored
from vlm.classifier.objective import Objective

Rows = list[list[int]]  # token ids of each row, without padding


class PlainForward(Forward):
    """Runs prefix, image, question and response of each sample through transformers' own forward."""

    def losses(self, batch: Batch, objective: Objective, first: bool = True, last: bool = True) -> LossOutput:
        loss, tokens = torch.zeros((), device=self.device), 0
        if objective.has_response:
            loss, tokens = self._response_loss(batch, objective)
        if not objective.has_posterior:
            return LossOutput(loss, tokens)
        return LossOutput(
            loss, tokens, objective.of_classes(self.training_scores(batch, objective), batch.class_targets)
        )

    def _response_loss(self, batch: Batch, objective: Objective) -> tuple[Tensor, int]:
        """Summed loss of the response tokens, and their number."""
        counts = (batch.targets != IGNORED).sum(1).tolist()
        rows = self._whole_rows(batch, batch.lengths)
        logits = self._run(rows, counts, batch.pixels)
        total = logits.new_zeros(())
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            end = len(row)
            targets = torch.tensor(row[end - count :], dtype=torch.long, device=logits.device)
            # (K, V) -> (count, V): the logits that predict the response
            predicting = logits[i, end - count - 1 : end - 1]
            total = total + objective.of_tokens(predicting, targets, batch.labels[i].expand(count))
        return total, sum(counts)

    def training_scores(self, batch: Batch, objective: Objective) -> Tensor:
        """(B, C) the scores that the objective is about, with gradients; the batch may have responses."""
        responses = self.rendered.scored_ids
        if objective.has_response:  # only up to where responses part (vlm/classifier/objective.py)
            responses = [ids[:count] for ids, count in zip(responses, self.tree.parted, strict=True)]
        # A response whose answer comes last has begun in the prompt: so many of its tokens stand there already.
        trained = (batch.targets != IGNORED).sum(1)
        begun = (trained - (batch.lengths - batch.prompt_lengths)).clamp(min=0).tolist()
        return self._scores(self._whole_rows(batch, batch.prompt_lengths), begun, responses, batch.pixels)

    def read(self, batch: Batch) -> Batch:
        return batch

    def forget(self) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def search(
        self,
        reading: Batch,
        weighting: tuple[float, np.ndarray] | None = None,
        tolerance: float = 0.0,
        labels: Sequence[int] | None = None,
        proven: int = 1,
    ) -> Scored:
        """Every class is scored to the end, so nothing is left unexplored."""
        scores = self.score(reading)
        return Scored(scores, torch.zeros(len(scores)))

    @torch.no_grad()
    def score(self, batch: Batch, classes: Sequence[int] | None = None) -> Tensor:
        """(B, C) log-probability of the scored text of each class, or of some, of a batch made without responses."""
        chosen = classes if classes is not None else range(len(self.rendered.scored_ids))
        responses = [self.rendered.scored_ids[c] for c in chosen]
        return self._scores(self._whole_rows(batch, batch.lengths), _begun(batch), responses, batch.pixels)

    @torch.no_grad()
    def write(self, reading: Batch, limit: int) -> list[str]:
        """Greedy text of each sample, by one full forward a token."""
        rows, begun = self._whole_rows(reading, reading.lengths), _begun(reading)
        written: Rows = [[] for _ in rows]
        stops = set(self.family.stop_ids)
        for _ in range(limit):
            counts = [count + len(new) for count, new in zip(begun, written, strict=True)]
            logits = self._run([row + new for row, new in zip(rows, written, strict=True)], counts, reading.pixels)
            for i, new in enumerate(written):
                if not stops.intersection(new[-1:]):
                    new.append(int(logits[i, len(rows[i]) + len(new) - 1].argmax()))
            if all(new[-1] in stops for new in written):
                break
        return [self.family.decode(new) for new in written]

    def _whole_rows(self, batch: Batch, lengths: Tensor) -> Rows:
        """The token ids of each sample, prefix included, up to (B,) lengths of its row."""
        prefix = self.rendered.prefix_ids
        return [prefix + row[:length].tolist() for row, length in zip(batch.input_ids, lengths, strict=True)]

    def _scores(self, prompts: Rows, begun: list[int], responses: Rows, pixels: dict[str, Tensor]) -> Tensor:
        """(B, R) log-probability of each response after each prompt.

        Responses that differ only in their last token take one forward.

        Args:
            begun: for each prompt how many tokens at its end belong to the response already.
        """
        stems: dict[tuple[int, ...], list[int]] = {}
        for number, response in enumerate(responses):
            stems.setdefault(tuple(response[:-1]), []).append(number)
        columns: dict[int, Tensor] = {}
        for stem, numbers in stems.items():
            last = [responses[number][-1] for number in numbers]
            found = self._scores_of_stem(prompts, begun, list(stem), last, pixels)
            columns |= dict(zip(numbers, found.unbind(1), strict=True))
        return torch.stack([columns[number] for number in range(len(responses))], dim=1)

    def _scores_of_stem(
        self, prompts: Rows, begun: list[int], stem: list[int], last: list[int], pixels: dict[str, Tensor]
    ) -> Tensor:
        """(B, number of last tokens) log-probability of a stem followed by each of the last tokens."""
        rows = [prompt + stem for prompt in prompts]
        logits = self._run(rows, [count + len(stem) for count in begun], pixels)
        index = torch.tensor(last, device=logits.device)
        found = []
        for i, row in enumerate(rows):
            of_stem = _log_probability(logits[i], row, len(stem))
            # (V,) -> (number of last tokens,): all of them are predicted by the state of the stem's end
            of_last = logits[i, len(row) - 1].log_softmax(-1)[index]
            found.append(of_stem + of_last)
        return torch.stack(found)

    def _run(self, rows: Rows, responses: list[int], pixels: dict[str, Tensor]) -> Tensor:
        """(B, K, V) logits.

        Args:
            responses: for each row how many tokens at its end are the response.
        """
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)  # (B, K)
        places = torch.arange(ids.shape[1], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device).unsqueeze(1)  # (B, 1)
        starts = lengths - torch.tensor(responses, device=self.device).unsqueeze(1)
        in_row, in_response = places < lengths, (places >= starts) & (places < lengths)  # (B, K) each
        return self.family.full_logits(ids, in_row, in_response, pixels)


def _begun(batch: Batch) -> list[int]:
    """For each row how many tokens at its end are a response that was begun."""
    return [0] * len(batch) if batch.begun is None else batch.begun.tolist()


def _log_probability(logits: Tensor, row: list[int], count: int) -> Tensor:
    """Log-probability of the last `count` tokens of a row, from its (K, V) logits."""
    end = len(row)
    predicted = logits[end - count - 1 : end - 1].log_softmax(-1)  # (count, V)
    targets = torch.tensor(row[end - count :], dtype=torch.long, device=logits.device)
    return predicted.gather(1, targets.unsqueeze(1)).sum()
