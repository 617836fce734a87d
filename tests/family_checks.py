"""The exactness checks of every family, each against transformers' plain full forward. A family's test file fills in
the gaps.

The checks print the difference they measure (pytest -s): the table in docs/families.md is made of these lines.
"""

import json
from dataclasses import replace

import pytest
import torch
from tiny import NAMES, random_image, save_classifier, tiny_prompts
from torch import Tensor

from vlm.classifier.batching import IGNORED, batch_without_image
from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.objective import Objective
from vlm.classifier.reasoning import classify, continue_rows, explain
from vlm.config import reasoning_of, resolve
from vlm.conversation.prompts import Prompts, build_prompts, parse_answer
from vlm.conversation.responses import before_answer, before_reasoning, response_of
from vlm.data import Sample
from vlm.evaluation.score_choice import measure_prior
from vlm.families import checkpoint_blocks, load_family
from vlm.inference.predictor import load_model_and_metadata
from vlm.training.tuning import parameter_groups, prepare_tuning

SIZES = ((40, 28), (20, 60), (33, 33))  # unequal, so that families with a varying number of image tokens are tested


def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Weights so large that the classes, and the images, differ clearly; norms are left alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * scale)


def naive_scores(
    checks: "FamilyChecks", classifier: VLMClassifier, batch: dict, texts: list[list[int]] | None = None
) -> Tensor:
    """(B, C) by one full forward for every class of every sample, of the scored text (or others, as token ids) behind
    the row."""
    prefix = classifier.rendered.prefix_ids
    texts = texts or classifier.rendered.scored_ids
    scores = torch.zeros(len(batch.labels), len(texts), dtype=torch.float64)
    for i, length in enumerate(batch.lengths.tolist()):
        prompt = batch.input_ids[i, :length].tolist()
        pixels = checks.one_image(batch, i) if batch.pixels else {}
        for c, response in enumerate(texts):
            with torch.no_grad():
                logits = checks.full_logits(classifier, prefix + prompt + response, pixels)
            start = len(prefix) + length - 1
            rows = logits.double().log_softmax(-1)[start : start + len(response)]
            scores[i, c] = rows.gather(1, torch.tensor(response).unsqueeze(1)).sum()
    return scores


def parted(responses: list[list[int]]) -> list[int]:
    """How many tokens of each response it takes until no other one begins with them."""
    return [
        next(n for n in range(1, len(own) + 1) if sum(other[:n] == own[:n] for other in responses) == 1)
        for own in responses
    ]


def gradients_of(classifier: VLMClassifier, loss: Tensor) -> dict[str, Tensor]:
    classifier.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}


class FamilyChecks:
    """Subclass, name it Test..., and say `build`, `one_image` and, where it is not the default, `full_logits`."""

    names = NAMES
    gradient_tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}  # relative, of each parameter's gradient
    # A gradient that is zero but for rounding (a bias in front of a softmax) is compared with this share of the largest
    # one.
    zero_gradient = {torch.float64: 1e-9, torch.float32: 1e-3}

    def build(self, folder) -> None:
        """Write a small model of the true architecture with its processor, as on the hub."""
        raise NotImplementedError

    def one_image(self, batch: dict, i: int) -> dict[str, Tensor]:
        """The pixel arguments of transformers' forward for the i-th sample of a batch."""
        raise NotImplementedError

    def full_logits(self, classifier: VLMClassifier, ids: list[int], pixels: dict[str, Tensor]) -> Tensor:
        """transformers' own forward over one whole sequence, without cache -> (L, V)."""
        ids = torch.tensor([ids])
        return classifier.model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, use_cache=False).logits[0]

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("family")
        cls().build(folder)
        return folder

    def classifier(self, folder, dtype=torch.float32, prompts=None) -> VLMClassifier:
        return VLMClassifier(
            load_family(folder, dtype, torch.device("cpu")), prompts or tiny_prompts(tuple(self.names))
        ).eval()

    def samples(self, labels: list[int]) -> list[Sample]:
        return [Sample(random_image(i, *SIZES[i % len(SIZES)]), label, f"image {i}") for i, label in enumerate(labels)]

    def batch(self, classifier, labels, with_response=False) -> dict:
        return classifier.collate(with_response)(self.samples(labels))

    def scores(self, classifier, labels=(0, 1, 2)) -> Tensor:
        return classifier.score(classifier.read(self.batch(classifier, list(labels))))

    def report(self, what: str, difference: float) -> None:
        print(f"\n{type(self).__name__.removeprefix('Test')} | {what} | {difference:.1e}")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_loss_and_every_gradient_equal_the_plain_full_forward(self, folder, dtype):
        classifier = self.classifier(folder, dtype).train()
        batch = self.batch(classifier, [0, 5, 3], with_response=True)
        ours = classifier(batch).loss
        ours.backward()
        gradients = {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}
        classifier.zero_grad()
        prefix = len(classifier.rendered.prefix_ids)
        plain = 0
        for i, length in enumerate(batch.lengths.tolist()):
            row = classifier.rendered.prefix_ids + batch.input_ids[i, :length].tolist()
            logits = self.full_logits(classifier, row, self.one_image(batch, i))[prefix - 1 : -1] if prefix else None
            if logits is None:
                logits = self.full_logits(classifier, row, self.one_image(batch, i))[:-1]
            targets = batch.targets[i, :length][0 if prefix else 1 :]
            plain = plain + torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
        plain.backward()
        name = str(dtype).removeprefix("torch.")
        loss_error = float(((ours - plain).abs() / plain.abs()).detach())
        self.report(f"loss, {name}", loss_error)
        assert loss_error < self.gradient_tolerance[dtype]
        expected = {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        largest = max(float(gradient.norm()) for gradient in expected.values())
        worst = 0.0
        for key, gradient in expected.items():
            error = float(
                (gradients[key] - gradient).norm() / max(float(gradient.norm()), self.zero_gradient[dtype] * largest)
            )
            worst = max(worst, error)
            assert error < self.gradient_tolerance[dtype], f"{key}: relative error {error:.2e}"
        self.report(f"gradients, {name}", worst)

    @pytest.mark.parametrize("name", ["posterior", "both"])
    def test_posterior_and_every_gradient_equal_one_forward_a_class(self, folder, name):
        classifier = self.classifier(folder, torch.float64).train()
        rendered, labels = classifier.rendered, [0, 5, 3]
        classifier.objective = Objective(name, classifier.tree, len(rendered.opening_ids), 0.1)
        batch = self.batch(classifier, labels, with_response=name == "both")
        found = classifier(batch)
        ours = gradients_of(classifier, found.posterior + 0.5 * found.loss)
        scores, whole = [], []
        for i, length in enumerate(batch.prompt_lengths.tolist()):
            prompt = rendered.prefix_ids + batch.input_ids[i, :length].tolist()
            for response, apart in zip(rendered.scored_ids, parted(rendered.scored_ids), strict=True):
                logits = self.full_logits(classifier, prompt + response, self.one_image(batch, i)).log_softmax(-1)
                each = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response).unsqueeze(1))[:, 0]
                scores.append(each.sum() if name == "posterior" else each[:apart].sum())
                whole.append(each.sum())
        scores, whole = (torch.stack(values).unflatten(0, (len(labels), -1)) for values in (scores, whole))
        posterior = torch.nn.functional.cross_entropy(
            scores, torch.tensor(labels), reduction="sum", label_smoothing=0.1
        )
        response = -whole[range(3), labels].sum() if name == "both" else 0.0  # each class has one response here
        self.report("posterior, float64", float(((found.posterior - posterior).abs() / posterior).detach()))
        torch.testing.assert_close(found.posterior, posterior, rtol=1e-6, atol=0)
        expected = gradients_of(classifier, posterior + 0.5 * response)
        assert ours.keys() == expected.keys()
        largest = max(float(gradient.norm()) for gradient in expected.values())
        for key, gradient in expected.items():
            error = float((ours[key] - gradient).norm() / max(float(gradient.norm()), 1e-9 * largest))
            assert error < 1e-6, f"{key}: relative error {error:.2e}"

    @pytest.mark.parametrize(("tune", "objective"), [("lora", "response"), ("full", "both")])
    def test_gradient_checkpointing_changes_no_gradient(self, folder, tune, objective):
        """Nor does it with a prefix that several batches share, nor with LoRA's dropout, which has to be drawn alike
        again, nor where the vision encoder is trained and the nodes of the label tree follow each row."""
        found = []
        for checkpointing in (False, True):
            classifier = self.classifier(folder)
            prepare_tuning(classifier.family, resolve({"tune": tune, "lora_dropout": 0.2}))
            classifier.objective = Objective(objective, classifier.tree, len(classifier.rendered.opening_ids))
            with torch.no_grad():  # LoRA's second matrix starts at zero, and the first has no gradient then
                for name, parameter in classifier.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(0.01)
            if checkpointing:
                checkpoint_blocks(classifier.family)
            classifier.train()
            torch.manual_seed(0)
            for i, labels in enumerate(([0, 5], [3])):
                losses = classifier(self.batch(classifier, labels, with_response=True), first=i == 0, last=i == 1)
                (losses.loss if losses.posterior is None else losses.loss + losses.posterior).backward()
            found.append({name: p.grad for name, p in classifier.named_parameters() if p.grad is not None})
        vision = {id(p) for p in classifier.family.vision.parameters()}
        assert any(p.grad is not None and id(p) in vision for p in classifier.parameters()) == (tune == "full")
        assert found[0].keys() == found[1].keys() and any("lora_A" in name for name in found[0]) == (tune == "lora")
        for name, gradient in found[0].items():
            torch.testing.assert_close(
                found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )

    def test_label_tree_equals_one_forward_a_class(self, folder):
        classifier = self.classifier(folder)
        batch = self.batch(classifier, [0, 1, 2])
        scores = classifier.score(classifier.read(batch)).double()
        expected = naive_scores(self, classifier, batch)
        assert expected.std(1).min() > 1e-2, "the classes should differ, or the test says little"
        self.report("label tree", float((scores - expected).abs().max()))
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-4)

    def test_a_question_before_the_image_is_run_once_for_all(self, folder):
        usual = self.classifier(folder)
        classifier = self.classifier(folder, prompts=replace(tiny_prompts(tuple(self.names)), question_first=True))
        family, rendered, batch = classifier.family, classifier.rendered, self.batch(classifier, [0, 1, 2])
        question = family.tokenizer.decode(rendered.prefix_ids if family.shares_prefix else batch.input_ids[0])
        assert "Strictly use this format" in question
        if family.shares_prefix:
            assert len(rendered.prefix_ids) > len(usual.rendered.prefix_ids) and len(rendered.question_ids) < len(
                usual.rendered.question_ids
            )
        scores = classifier.score(classifier.read(batch)).double()
        torch.testing.assert_close(scores, naive_scores(self, classifier, batch), rtol=1e-6, atol=1e-4)
        restored = Prompts.from_json(json.loads(json.dumps(classifier.prompts.to_json())))
        assert restored == classifier.prompts and restored.question_first

    def test_a_conversation_without_a_image_is_read_like_any_other(self, folder):
        """The prior of the classes, against one full forward a class without pixels."""
        classifier = self.classifier(folder)
        batch = batch_without_image(classifier.rendered)
        prior, remark = measure_prior(classifier)
        assert remark is None
        expected = naive_scores(self, classifier, batch)[0]
        self.report("prior", float((torch.tensor(prior) - expected).abs().max()))
        torch.testing.assert_close(torch.tensor(prior, dtype=torch.float64), expected, rtol=1e-6, atol=1e-4)
        with_images = self.scores(classifier)[0].double()
        assert (with_images - expected).abs().max() > 1e-3, "an image should change something"
        for response_format in ("reasoning-first", "answer-first"):
            assert measure_prior(self.free_classifier(folder, response_format))[1] is None

    def free_classifier(self, folder, response_format) -> VLMClassifier:
        """A model that writes reasonings of its own."""
        prompts = replace(build_prompts(resolve({"response_format": response_format}), self.names), reasoning_tokens=8)
        return self.classifier(folder, torch.float32, prompts)

    @pytest.mark.parametrize("response_format", ["reasoning-first", "answer-first"])
    def test_the_scored_text_is_a_part_of_every_response_as_it_is_trained(self, folder, response_format):
        classifier = self.free_classifier(folder, response_format)
        family, rendered, prompts = classifier.family, classifier.rendered, classifier.prompts
        light = family.without_weights()  # as in a loader process
        for label, name in enumerate(self.names):
            for reasoning in ("Fur, whiskers.", "(50%) 1. a\n2. ß 猫!", "x"):
                response = response_of(Sample(None, label, "", reasoning), light, rendered)
                assert family.decode(response) == prompts.response(label, reasoning)
                scored = rendered.scored_ids[label]
                if response_format == "answer-first":
                    assert response[: len(scored)] == scored
                    assert family.decode(scored) == f"Answer: {name}" and family.tokenizer.decode(scored).endswith("\n")
                    opened = before_reasoning(family, rendered, label)
                    assert response[: len(opened)] == opened and family.decode(opened) == f"Answer: {name}\nReasoning:"
                else:
                    assert (
                        response == before_answer(family, rendered, reasoning) + scored
                        and family.decode(scored) == name
                    )
                    assert scored[-1] == rendered.response_ids[label][-1]

    @pytest.mark.parametrize("response_format", ["reasoning-first", "answer-first"])
    def test_free_reasoning_is_scored_where_the_answer_stands(self, folder, response_format):
        """Against one full forward a class, over prompt, reasoning and answer; the answer of every explanation is the
        prediction."""
        classifier = self.free_classifier(folder, response_format)
        batch = self.batch(classifier, [0, 1, 2])
        found = classify(classifier, batch, tolerance=0.0)
        rows = batch
        if response_format == "reasoning-first":
            assert len(found.texts) == 3
            rows = continue_rows(
                classifier,
                batch,
                [before_answer(classifier.family, classifier.rendered, reasoning_of(text)) for text in found.texts],
            )
        expected = naive_scores(self, classifier, rows)
        assert expected.std(1).min() > 1e-2, "the classes should differ, or the test says little"
        torch.testing.assert_close(found.scores.double(), expected, rtol=1e-6, atol=1e-4)
        for c in range(len(self.names)):
            for text in explain(classifier, found, [c] * 3):
                assert parse_answer(text, self.names, response_format) == self.names[c]

    def test_one_by_one_equals_a_batch_of_unequal_images(self, folder):
        classifier = self.classifier(folder)
        together = self.scores(classifier)
        alone = []
        for sample in self.samples([0, 1, 2]):
            alone.append(classifier.score(classifier.read(classifier.collate(False)([sample])))[0])
        posterior, expected = together.softmax(-1), torch.stack(alone).softmax(-1)
        self.report("batch", float((posterior - expected).abs().max()))
        torch.testing.assert_close(posterior, expected, rtol=0, atol=1e-5)

    def test_another_image_changes_the_scores(self, folder):
        scores = self.scores(self.classifier(folder), (0, 0, 0))
        assert (scores[0] - scores[1]).abs().max() > 1e-3

    def test_tuned_saved_and_reloaded_gives_the_same_probabilities(self, folder, tmp_path):
        """LoRA, unmerged against merged and reloaded; and the untouched model saved and reloaded."""
        metadata = {"class_names": self.names, "prompts": tiny_prompts(tuple(self.names)).to_json()}
        for tune, tolerance in (("full", 1e-6), ("lora", 1e-5)):
            classifier = self.classifier(folder)
            before = self.scores(classifier).softmax(-1)
            prepare_tuning(classifier.family, resolve({"tune": tune}))
            if tune == "lora":
                self.train_a_little(classifier)
            expected = self.scores(classifier).softmax(-1)
            assert tune == "full" or (expected - before).abs().max() > 1e-3, "training should have changed something"
            save_classifier(tmp_path / tune, classifier, metadata, torch.float32)
            model, _, _ = load_model_and_metadata(tmp_path / tune, device="cpu")
            again = self.scores(model).softmax(-1)
            self.report(f"save and reload, {tune}", float((again - expected).abs().max()))
            torch.testing.assert_close(again, expected, rtol=0, atol=tolerance)

    def train_a_little(self, classifier) -> None:
        optimizer = torch.optim.AdamW(parameter_groups(classifier, 0.0, 2e-3, 2e-3))
        classifier.train()
        for _ in range(3):
            classifier(self.batch(classifier, [0, 1, 2], with_response=True)).loss.backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        classifier.eval()

    def test_written_text_equals_the_greedy_text_of_transformers(self, folder):
        classifier = self.classifier(folder)
        batch = self.batch(classifier, [0, 1, 2])
        texts = classifier.write(classifier.read(batch), max_new_tokens=8)
        for i, length in enumerate(batch.lengths.tolist()):
            ids = classifier.rendered.prefix_ids + batch.input_ids[i, :length].tolist()
            start = len(ids)
            for _ in range(8):
                with torch.no_grad():
                    ids.append(int(self.full_logits(classifier, ids, self.one_image(batch, i))[-1].argmax()))
                if ids[-1] in classifier.family.stop_ids:
                    break
            assert texts[i] == classifier.family.decode(ids[start:])
