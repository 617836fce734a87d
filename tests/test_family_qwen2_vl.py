"""Qwen2-VL and Qwen2.5-VL: the checks of every family, multimodal positions, processor, patch embedding, the saved
layout."""

import json

import pytest
import torch
from family_checks import FamilyChecks
from hub_layout_qwen2_vl import save_published
from safetensors import safe_open
from tiny import random_image, save_classifier, tiny_prompts
from torch import nn
from transformers import AutoModelForImageTextToText

from vlm.common.errors import UsageError
from vlm.config import resolve
from vlm.families import load_family
from vlm.families.qwen2_vl import PatchLinear
from vlm.training.tuning import prepare_tuning, trained_parameters

CPU = torch.device("cpu")


def saved_keys(folder) -> set[str]:
    """The names of all tensors in the safetensors files of a folder."""
    keys = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            keys |= set(tensors.keys())
    return keys


class TestQwen2VL(FamilyChecks):
    model_type = "qwen2_vl"
    tie = True  # as in the 2B model

    def build(self, folder):
        save_published(folder, self.model_type, self.tie)

    def one_image(self, batch, i):
        grids = batch.pixels["image_grid_thw"]
        patches = batch.pixels["pixel_values"].split(grids.prod(1).tolist())
        return {"pixel_values": patches[i], "image_grid_thw": grids[i : i + 1]}

    def full_logits(self, classifier, ids, pixels):
        """transformers works out the positions itself, from the kind of each token."""
        ids = torch.tensor([ids])
        kinds = (ids == classifier.family.image_token_id).int()
        return classifier.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **pixels, use_cache=False
        ).logits[0]

    # Positions

    @pytest.mark.parametrize("with_response", [True, False])
    def test_positions_equal_get_rope_index(self, folder, with_response):
        """Prefix, padded rows of unequal images, and the tokens that follow."""
        classifier = self.classifier(folder)
        family, prefix = classifier.family, torch.tensor(classifier.rendered.prefix_ids)
        batch = self.batch(classifier, [0, 5, 3], with_response)
        assert len({tuple(grid) for grid in batch.pixels["image_grid_thw"].tolist()}) > 1
        positions, ends = family.positions(len(prefix), batch.input_ids, batch.lengths, batch.pixels)
        for i, length in enumerate(batch.lengths.tolist()):
            after = torch.full((5,), family.tokenizer.convert_tokens_to_ids("a"))
            ids = torch.cat([prefix, batch.input_ids[i, :length], after]).unsqueeze(0)
            kinds = (ids == family.image_token_id).int()
            expected, _ = classifier.model.model.get_rope_index(
                ids, kinds, image_grid_thw=batch.pixels["image_grid_thw"][i : i + 1]
            )
            assert torch.equal(torch.arange(len(prefix)).expand(3, -1), expected[:, 0, : len(prefix)])
            assert torch.equal(positions[:, i, :length], expected[:, 0, len(prefix) : -5])
            assert torch.equal((ends[i] + torch.arange(5)).expand(3, -1), expected[:, 0, -5:])

    # Images and tokens

    def test_the_rows_are_what_the_published_processor_makes(self, folder):
        """Token ids and pixels of whole conversations, expanded by transformers' own processor code."""
        classifier = self.classifier(folder)
        processor, batch = classifier.family.processor, self.batch(classifier, [0, 1, 2])
        text = processor.apply_chat_template(
            tiny_prompts(tuple(self.names)).messages(), add_generation_prompt=True, tokenize=False
        )
        images = [sample.image for sample in self.samples([0, 1, 2])]
        expected = processor(text=[text] * 3, images=[[image] for image in images], padding=True, return_tensors="pt")
        torch.testing.assert_close(batch.pixels["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
        assert torch.equal(expected["image_grid_thw"], batch.pixels["image_grid_thw"])
        for i, length in enumerate(batch.lengths.tolist()):
            ids = expected["input_ids"][i][expected["attention_mask"][i].bool()].tolist()
            assert ids == classifier.rendered.prefix_ids + batch.input_ids[i, :length].tolist()

    def test_the_conversation_has_the_published_layout(self, folder):
        classifier = self.classifier(folder)
        rendered, tokenizer = classifier.rendered, classifier.family.tokenizer
        prompts = classifier.prompts
        assert (
            tokenizer.decode(rendered.prefix_ids)
            == f"<|im_start|>system\n{prompts.system}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        )
        assert (
            tokenizer.decode(rendered.question_ids)
            == f"<|vision_end|>{prompts.question}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert [tokenizer.decode(ids) for ids in rendered.response_ids] == [
            f"{text}<|im_end|>" for text in prompts.responses
        ]

    @pytest.mark.parametrize(
        ("options", "tokens"),
        [
            ({}, 256),  # 448 x 448
            ({"max_pixels": 64 * 28 * 28}, 64),
            ({"max_pixels": 1024 * 28 * 28}, 324),  # its own size, 504 x 504
            ({"min_pixels": 400 * 28 * 28, "max_pixels": 900 * 28 * 28}, 400),
            (None, 324),  # as published: nothing is made smaller
        ],
    )
    def test_image_sizes_decide_the_number_of_tokens(self, folder, options, tokens):
        family = load_family(folder, torch.float32, CPU, options)
        encoded = family.encode_images([random_image(0, 504, 504), random_image(1, 4, 3)])
        assert len(encoded.token_ids[0]) == tokens
        assert len(encoded.token_ids[1]) >= (options or {}).get("min_pixels", 3136) // 784

    def test_impossible_sizes_are_refused(self, folder):
        with pytest.raises(UsageError, match="--min-pixels 500000 is more than --max-pixels 200704"):
            load_family(folder, torch.float32, CPU, {"min_pixels": 500_000})

    # Vision

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
    def test_image_features_equal_those_of_an_untouched_model(self, folder, dtype, tolerance):
        """Patch embedding, encoder and merger, one after the other, against transformers' own with its Conv3d."""
        classifier = self.classifier(folder, dtype)
        inputs = self.batch(classifier, [0, 1, 2]).pixels
        plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        assert isinstance(plain.model.visual.patch_embed.proj, nn.Conv3d)
        with torch.no_grad():
            expected = torch.cat(
                plain.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
            )
            features = classifier.family.image_features(inputs)
            error = float((features - expected).norm() / expected.norm())
        self.report(f"image features, {str(dtype).removeprefix('torch.')}", error)
        assert error < tolerance

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_patch_embedding_as_a_matrix_product_is_exact(self, dtype):
        torch.manual_seed(0)
        convolution = nn.Conv3d(3, 48, (2, 14, 14), stride=(2, 14, 14), bias=False, dtype=dtype)
        product = PatchLinear(convolution)
        assert product.state_dict().keys() == convolution.state_dict().keys() and product.weight is convolution.weight
        patches = torch.randn(50, 3, 2, 14, 14, dtype=dtype)
        expected, result = convolution(patches).view(50, 48), product(patches)
        error = float(((result - expected).norm() / expected.norm()).detach())
        self.report(f"patch embedding, {str(dtype).removeprefix('torch.')}", error)
        assert error < 1e-6
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), convolution.weight)
        (gradient,) = torch.autograd.grad(result.square().sum(), product.weight)
        assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-6

    def test_encoder_and_connector_are_told_apart(self, folder):
        family = load_family(folder, torch.float32, CPU)
        visual = family.model.model.visual
        encoder, merger = set(family.vision.parameters()), set(family.connector.parameters())
        assert encoder and merger and not encoder & merger and encoder | merger == set(visual.parameters())
        prepare_tuning(family, resolve({"tune": "connector"}))
        assert set(trained_parameters(family.model)) == {
            f"model.visual.merger.{name}" for name, _ in family.connector.named_parameters()
        }

    @pytest.mark.parametrize(("tune", "encoder_trains"), [("lora", False), ("connector", False), ("full", True)])
    def test_a_frozen_encoder_keeps_no_graph_and_its_merger_learns(self, folder, tune, encoder_trains):
        classifier = self.classifier(folder).train()
        family, seen = classifier.family, []
        prepare_tuning(family, resolve({"tune": tune}))
        whole = family.vision_features
        family.vision_features = lambda inputs: seen.append(whole(inputs)) or seen[-1]
        classifier(self.batch(classifier, [0, 1], with_response=True)).loss.backward()
        assert seen[0].requires_grad == encoder_trains
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in family.connector.parameters() if p.ndim > 1)
        assert all((p.grad is not None) == encoder_trains for p in family.vision.parameters())

    # Saving

    def test_saved_folder_has_the_published_names(self, folder, tmp_path):
        """After LoRA, which renames modules, and with our patch embedding: as transformers itself saves an untouched
        model."""
        classifier, metadata = (
            self.classifier(folder),
            {"class_names": self.names, "prompts": tiny_prompts(tuple(self.names)).to_json()},
        )
        prepare_tuning(classifier.family, resolve({"tune": "lora"}))
        save_classifier(tmp_path / "ours", classifier, metadata, torch.bfloat16)
        AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
        assert saved_keys(tmp_path / "ours") == saved_keys(tmp_path / "theirs") == saved_keys(folder)
        config = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
        assert config["model_type"] == self.model_type and config["dtype"] == "bfloat16"

    def test_saved_image_sizes_are_kept_at_inference(self, folder, tmp_path):
        classifier, metadata = (
            self.classifier(folder),
            {"class_names": self.names, "prompts": tiny_prompts(tuple(self.names)).to_json()},
        )
        classifier.family.processor = type(classifier.family).load_processor(folder, min_pixels=7840, max_pixels=31360)
        save_classifier(tmp_path / "model", classifier, metadata, torch.float32)
        size = {"shortest_edge": 7840, "longest_edge": 31360}
        assert dict(load_family(tmp_path / "model", torch.float32, CPU).processor.image_processor.size) == size
        # What older programs, and the video half of transformers' own processor, read.
        saved = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text(encoding="utf-8"))
        published = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        assert saved.items() >= (published | {"min_pixels": 7840, "max_pixels": 31360, "size": size}).items()
        named = json.loads((tmp_path / "model" / "processor_config.json").read_text(encoding="utf-8"))
        assert named["processor_class"] == published["processor_class"]


class TestQwen25VL(TestQwen2VL):
    """Windows in the encoder, another processor name; the head is a matrix of its own, as in the 7B model."""

    model_type = "qwen2_5_vl"
    tie = False
