"""Models that have no family file of their own, as transformers publishes them."""

import pytest
import torch
from family_checks import FamilyChecks, randomize
from tiny import tiny_prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from vlm.families.processors import processor_class_of

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tokenizer(special, **more):
    prompts = tiny_prompts()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([prompts.system, prompts.question, *prompts.responses], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_input_names=["input_ids", "attention_mask"], **more)


class Generic(FamilyChecks):
    """What the generic checks need: the pixels of one image stand at one place of each tensor."""

    shares_prefix = True

    def one_image(self, batch, i):
        return {name: tensor[i : i + 1] for name, tensor in batch.pixels.items()}

    def test_the_shared_prefix_is_used_where_it_fits(self, folder, capsys):
        classifier = self.classifier(folder)
        assert classifier.family.shares_prefix is self.shares_prefix
        assert ("the plain forward" in capsys.readouterr().err) is not self.shares_prefix


def save_llava(folder, vision, strategy="default"):
    words = tokenizer(["<|im_start|>", "<|im_end|>", "<image>"], eos_token="<|im_end|>", pad_token="<|im_end|>")
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=len(words), **TEXT).to_dict(),
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config)
    randomize(model)
    model.generation_config.eos_token_id = words.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)


class TestLlavaClip(Generic):
    def build(self, folder):
        save_llava(folder, CLIPVisionConfig(**VISION).to_dict())


@pytest.mark.slow
class TestLlavaDinov2(Generic):
    def build(self, folder):
        vision = {name: value for name, value in VISION.items() if name != "intermediate_size"}
        save_llava(folder, Dinov2Config(**vision).to_dict())


@pytest.mark.slow
class TestLlavaOnevision(Generic):
    """A varying number of tiles an image, and a learned newline between their rows."""

    def build(self, folder):
        words = tokenizer(
            ["<|im_start|>", "<|im_end|>", "<image>", "<video>"], eos_token="<|im_end|>", pad_token="<|im_end|>"
        )
        torch.manual_seed(0)
        pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
        config = LlavaOnevisionConfig(
            vision_config=VISION | {"vision_use_head": False, "model_type": "siglip_vision_model"},
            vision_feature_select_strategy="full",
            text_config=TEXT | {"vocab_size": len(words), "model_type": "qwen2"},
            vision_feature_layer=-1,
            image_grid_pinpoints=pinpoints,
            image_token_index=words.convert_tokens_to_ids("<image>"),
            video_token_index=words.convert_tokens_to_ids("<video>"),
        )
        model = LlavaOnevisionForConditionalGeneration(config)
        randomize(model)
        model.generation_config.eos_token_id = words.convert_tokens_to_ids("<|im_end|>")
        model.save_pretrained(folder)
        images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
        processor_class_of(folder)(
            images,
            words,
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            chat_template=CHATML.replace("IMAGE", "<image>"),
        ).save_pretrained(folder)


class TestInternVL(Generic):
    """A varying number of tiles an image, one after the other in one tensor."""

    def build(self, folder):
        special = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        words = tokenizer(
            ["<|im_start|>", "<|im_end|>", *special.values()],
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            extra_special_tokens=special,
        )
        torch.manual_seed(0)
        config = InternVLConfig(
            vision_config=VISION | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [7, 7]},
            downsample_ratio=0.5,
            text_config=TEXT | {"vocab_size": len(words), "model_type": "qwen2"},
            image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        )
        model = InternVLForConditionalGeneration(config)
        randomize(model)
        model.generation_config.eos_token_id = words.convert_tokens_to_ids("<|im_end|>")
        model.save_pretrained(folder)
        images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=3)
        template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
        processor_class_of(folder)(images, words, image_seq_length=4, chat_template=template).save_pretrained(folder)

    def one_image(self, batch, i):
        counts = [int((row == self.image_token).sum()) // 4 for row in batch.input_ids]
        return {"pixel_values": batch.pixels["pixel_values"][sum(counts[:i]) : sum(counts[: i + 1])]}

    def classifier(self, folder, *more, **named):
        classifier = super().classifier(folder, *more, **named)
        self.image_token = classifier.model.config.image_token_id
        return classifier

    def test_images_have_unequal_numbers_of_tiles(self, folder):
        batch = self.batch(self.classifier(folder), [0, 1, 2])
        assert len(set(batch.lengths.tolist())) > 1


@pytest.mark.slow
class TestGemma3(Generic):
    """Image tokens see each other in both directions, and there is no system role."""

    shares_prefix = False
    # Its norms compute in float32 whatever the model's format, so that more than float32 cannot be had.
    gradient_tolerance = {torch.float64: 1e-5, torch.float32: 1e-5}
    zero_gradient = {torch.float64: 1e-3, torch.float32: 1e-3}

    def build(self, folder):
        words = tokenizer(
            [
                "<pad>",
                "<bos>",
                "<eos>",
                "<start_of_turn>",
                "<end_of_turn>",
                "<start_of_image>",
                "<end_of_image>",
                "<image_soft_token>",
            ],
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            extra_special_tokens={
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
                "image_token": "<image_soft_token>",
            },
        )
        torch.manual_seed(0)
        config = Gemma3Config(
            text_config=TEXT
            | {
                "vocab_size": len(words),
                "head_dim": 8,
                "sliding_window": 512,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            vision_config=VISION | {"vision_use_head": False, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
            boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        )
        model = Gemma3ForConditionalGeneration(config)
        randomize(model, scale=0.2)
        model.generation_config.eos_token_id = [words.eos_token_id, words.convert_tokens_to_ids("<end_of_turn>")]
        model.save_pretrained(folder)
        template = (
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{% for message in messages %}"
            "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
            "<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        )
        images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_pan_and_scan=False)
        Gemma3Processor(images, words, chat_template=template, image_seq_length=4).save_pretrained(folder)

    def full_logits(self, classifier, ids, pixels):
        ids = torch.tensor([ids])
        types = (ids == classifier.model.config.image_token_id).long()
        return classifier.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=types, **pixels, use_cache=False
        ).logits[0]

    def test_the_instructions_are_at_the_head_of_the_user_turn(self, folder):
        classifier = self.classifier(folder)
        ids = self.batch(classifier, [0]).input_ids[0].tolist()
        text = classifier.family.tokenizer.decode(ids)
        assert text.startswith("<bos><start_of_turn>user\n" + classifier.prompts.system)
        assert text.count("<bos>") == 1
        assert (
            text.index(classifier.prompts.system)
            < text.index("<image_soft_token>")
            < text.index(classifier.prompts.question)
        )


@pytest.mark.slow
class TestPaliGemma(Generic):
    """No chat template, and the prompt is read in both directions."""

    shares_prefix = False
    gradient_tolerance = TestGemma3.gradient_tolerance
    zero_gradient = TestGemma3.zero_gradient

    def build(self, folder):
        words = tokenizer(
            ["<pad>", "<bos>", "<eos>", "<image>"], bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        )
        torch.manual_seed(0)
        config = PaliGemmaConfig(
            text_config=TEXT | {"vocab_size": len(words), "model_type": "gemma", "head_dim": 8},
            projection_dim=16,
            vision_config=VISION
            | {"vision_use_head": False, "model_type": "siglip_vision_model", "projection_dim": 16},
            image_token_index=words.convert_tokens_to_ids("<image>"),
            hidden_size=16,
        )
        model = PaliGemmaForConditionalGeneration(config)
        randomize(model, scale=0.2)
        model.generation_config.eos_token_id = words.eos_token_id
        model.save_pretrained(folder)
        images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
        images.image_seq_length = 4
        PaliGemmaProcessor(images, words).save_pretrained(folder)

    def full_logits(self, classifier, ids, pixels):
        """Which tokens are the response is found by what precedes it: the end of the prompt."""
        types = torch.zeros(1, len(ids), dtype=torch.long)
        types[0, self.prompt_length(classifier, ids) :] = 1
        ids = torch.tensor([ids])
        return classifier.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=types, **pixels, use_cache=False
        ).logits[0]

    def prompt_length(self, classifier, ids):
        question = classifier.rendered.question_ids
        return next(i for i in range(len(question), len(ids) + 1) if ids[i - len(question) : i] == question)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "reads text only"),
        ({"model_type": "no_such"}, "does not know"),
        ({}, "names no model_type"),
    ],
)
def test_models_that_cannot_be_used_are_refused_in_one_line(tmp_path, config, message):
    import json

    from vlm.common.errors import UsageError
    from vlm.families import load_family

    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=message):
        load_family(tmp_path, torch.float32, torch.device("cpu"))
