"""Phi-3.5-vision, which transformers does not know: our model against plain loops and one plain Phi-3 forward."""

import json
import re

import pytest
import torch
from family_checks import FamilyChecks, naive_scores
from hub_layout_phi3_vision import build_tokenizer, save_published, save_tokenizer
from safetensors import safe_open
from tiny import NAMES, random_image, tiny_prompts
from transformers import Phi3ForCausalLM

from vlm.classifier.batching import vlm_collate_fn
from vlm.classifier.classifier import VLMClassifier
from vlm.common.errors import UsageError
from vlm.config import resolve
from vlm.conversation.prompts import Prompts
from vlm.data import Sample
from vlm.families import FeatureCache, load_family
from vlm.families.phi3.model import Phi3VConfig, Phi3VForCausalLM
from vlm.training.tuning import ADAPTER, merged_state_dict, prepare_tuning

CPU = torch.device("cpu")


def plain_features(model, pixel_values, image_sizes):
    """(N, D) by loops over lines, columns and the four patches of each token."""
    embedding = model.model.vision_embed_tokens
    patches = embedding.img_processor(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    tokens, first = [], 0
    for height, width in image_sizes.tolist():
        columns = width // 336

        def line(tile_of, y, length, first=first):
            for x in range(length):
                corners = [(2 * (y % 12) + dy) * 24 + 2 * (x % 12) + dx for dy in (0, 1) for dx in (0, 1)]
                tokens.append(torch.cat([patches[first + tile_of(x), place] for place in corners]))
            tokens.append(embedding.sub_GN.flatten())

        for y in range(height // 336 * 12):
            line(lambda x, y=y, columns=columns: 1 + y // 12 * columns + x // 12, y, 12 * columns)
        tokens.append(embedding.glb_GN.flatten())
        for y in range(12):
            line(lambda x: 0, y, 12)
        first += 1 + height // 336 * columns
    first_layer, _, second_layer = embedding.img_projection
    hidden = torch.stack(tokens) @ first_layer.weight.T + first_layer.bias
    return torch.nn.functional.gelu(hidden) @ second_layer.weight.T + second_layer.bias


class Phi3Checks(FamilyChecks):
    num_crops = 1

    def build(self, folder):
        save_published(folder)

    def classifier(self, folder, dtype=torch.float32, prompts=None):
        family = load_family(folder, dtype, CPU, {"num_crops": self.num_crops})
        return VLMClassifier(family, prompts or tiny_prompts(tuple(self.names))).eval()

    def one_image(self, batch, i):
        sizes = batch.pixels["image_sizes"]
        counts = (1 + (sizes // 336).prod(1)).tolist()
        return {"pixel_values": batch.pixels["pixel_values"].split(counts)[i], "image_sizes": sizes[i : i + 1]}

    def full_logits(self, classifier, ids, pixels):
        model = classifier.model
        features = iter(
            plain_features(model, pixels["pixel_values"].to(model.dtype), pixels["image_sizes"]) if pixels else ()
        )
        placeholder = classifier.family.tokenizer.convert_tokens_to_ids("<|image|>")
        words = model.model.embed_tokens(torch.tensor(ids))
        embeddings = torch.stack(
            [next(features, words[i]) if token == placeholder else words[i] for i, token in enumerate(ids)]
        )
        assert next(features, None) is None
        return Phi3ForCausalLM.forward(model, inputs_embeds=embeddings.unsqueeze(0), use_cache=False).logits[0]


@pytest.mark.slow
class TestPhi3Vision(Phi3Checks):
    pass


@pytest.mark.slow
class TestPhi3VisionOfSeveralTiles(Phi3Checks):
    """745 and 757 tokens an image. The option is saved with the model: see `test_tuned_saved_and_reloaded...`."""

    num_crops = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_published(tmp_path_factory.mktemp("published"))


def load(folder, images=None, dtype=torch.float32):
    return load_family(folder, dtype, CPU, images)


def test_features_of_unequal_images_equal_plain_loops(folder):
    family = load(folder, {"num_crops": 4})
    inputs = family.encode_images(
        [random_image(i, *size) for i, size in enumerate([(40, 28), (20, 90), (90, 20)])]
    ).inputs
    assert len({tuple(size) for size in inputs["image_sizes"].tolist()}) == 3
    with torch.no_grad():
        torch.testing.assert_close(
            family.image_features(inputs), plain_features(family.model, **inputs), rtol=0, atol=1e-5
        )  # the same numbers in another order of adding


def test_cached_features_give_the_same_loss(folder, tmp_path, monkeypatch):
    """`image_sizes` stays in a batch whose pixels are replaced by features: the newlines depend on it."""
    family = load(folder, {"num_crops": 4})
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    cache = FeatureCache(family, connected=False, halved=False, limit_gb=1)
    classifier = VLMClassifier(family, tiny_prompts())
    samples = [Sample(random_image(i, *size), i, f"image {i}") for i, size in enumerate([(40, 28), (20, 90)])]
    with torch.no_grad():
        assert cache.add_missing(family, samples)
        losses = [
            classifier(vlm_collate_fn(samples, family, classifier.rendered, cache=kept)).loss for kept in (None, cache)
        ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


# Text


@pytest.mark.parametrize("metaspace", [False, True])
def test_token_ids_are_those_of_the_published_processor(tmp_path, metaspace):
    """It tokenizes the text before and after the image by itself, each with the beginning of a text before it."""
    save_published(tmp_path)
    tokenizer = build_tokenizer(metaspace)
    save_tokenizer(tmp_path, tokenizer)
    prompts = tiny_prompts()
    rendered = load(tmp_path).render(prompts)
    assert rendered.prefix_ids == tokenizer.encode(f"<|system|>\n{prompts.system}<|end|>\n<|user|>\n").ids
    after = f"\n{prompts.question}<|end|>\n<|assistant|>\n"
    assert rendered.question_ids == tokenizer.encode(after).ids
    assert rendered.prefix_ids[0] == rendered.question_ids[0] == tokenizer.token_to_id("<s>")
    for response, ids in zip(prompts.responses, rendered.response_ids, strict=True):
        assert rendered.question_ids + ids == tokenizer.encode(f"{after}{response}<|end|>").ids
        assert ids[-1] == tokenizer.token_to_id("<|end|>")


def test_written_text_is_the_response(folder):
    family = load(folder)
    prompts = tiny_prompts()
    for response, ids in zip(prompts.responses, family.render(prompts).response_ids, strict=True):
        assert family.decode(ids) == response


@pytest.mark.parametrize("text", ["<|image_1|>", "<|image_2|>", "<|image|>"])
def test_placeholders_in_the_texts_are_refused(folder, text):
    for prompts in (
        Prompts("system", f"look at {text}", ("a", "b"), ("a", "b")),
        Prompts(f"system {text}", "question", ("a", "b"), ("a", "b")),
    ):
        with pytest.raises(UsageError, match=re.escape(text)):
            load(folder).render(prompts)
    with pytest.raises(UsageError, match=re.escape(text)):
        load(folder).render(Prompts("system", "question", ("a", "b"), ("a", f"it is {text}")))


def test_both_end_tokens_stop_the_text(folder):
    family = load(folder)
    assert family.tokenizer.convert_ids_to_tokens(family.stop_ids) == ["<|end|>", "<|endoftext|>"]


def test_without_the_reserved_token_the_padding_of_the_vocabulary_stands_for_images(tmp_path):
    save_published(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / name
        file.write_text(file.read_text(encoding="utf-8").replace("<|image|>", "<|other|>"), encoding="utf-8")
    family = load(tmp_path)
    assert family.image_token_id == family.model.config.vocab_size - 1 >= len(family.tokenizer)


# Positions


def test_transformers_changes_all_positions_behind_the_switch(tmp_path):
    """The rule that `max_length` is made after: one token more, and the positions of all before it change."""
    family = load(save_published(tmp_path, rope_switch=20))
    ids = torch.randint(300, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {n: Phi3ForCausalLM.forward(family.model, input_ids=ids[:, :n]).logits for n in (19, 20, 21)}
    assert (logits[20][:, :19] - logits[19]).abs().max() < 1e-4
    assert (logits[21][:, :20] - logits[20]).abs().max() > 1e-2


def at_the_switch(folder, spare: int = 0) -> VLMClassifier:
    """A model whose positions change `spare` tokens behind the last one that may be written after an image."""
    rendered = load(save_published(folder)).render(tiny_prompts())
    row = len(rendered.prefix_ids) + 313 + len(rendered.question_ids)
    room = max(64, 2 * max(map(len, rendered.response_ids)))
    return VLMClassifier(load(save_published(folder, rope_switch=row + room + spare), {}), tiny_prompts()).eval()


def test_scores_and_texts_up_to_the_switch_equal_the_plain_forward(tmp_path, monkeypatch):
    classifier, checks = at_the_switch(tmp_path), Phi3Checks()
    batch = checks.batch(classifier, [0])
    reading = classifier.read(batch)
    expected = naive_scores(checks, classifier, batch)
    torch.testing.assert_close(classifier.score(reading).double(), expected, rtol=1e-6, atol=1e-4)
    monkeypatch.setattr(type(classifier.family), "stop_ids", [classifier.model.config.vocab_size - 1])
    monkeypatch.setattr(type(classifier.family), "decode", lambda self, ids: ids)
    written = classifier.write(reading)[0]
    prompt = classifier.rendered.prefix_ids + batch.input_ids[0, : batch.lengths[0]].tolist()
    assert len(prompt) + len(written) == classifier.family.switch_length
    with torch.no_grad():
        logits = checks.full_logits(classifier, prompt + written, checks.one_image(batch, 0))
    assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == written


def test_a_image_too_many_tokens_from_the_switch_is_refused_by_name(tmp_path):
    classifier = at_the_switch(tmp_path, spare=-1)
    with pytest.raises(UsageError, match="image 0 has .* tokens"):
        Phi3Checks().batch(classifier, [0])


def test_nothing_is_written_behind_the_switch(tmp_path):
    family = load(save_published(tmp_path, rope_switch=20))
    cache = family.new_cache()
    with torch.no_grad():
        family.run_language(torch.zeros(1, 20, 32), torch.arange(20).unsqueeze(0), cache)
        with pytest.raises(UsageError, match="positions change"):
            family.run_language(torch.zeros(1, 1, 32), torch.tensor([[20]]), cache)


def test_a_short_sliding_window_bounds_the_rows(tmp_path):
    assert load(save_published(tmp_path)).max_length == 4096
    assert load(save_published(tmp_path, sliding_window=600)).max_length == 600
    assert load(save_published(tmp_path, rope_scaling=None, sliding_window=None)).max_length == 131072


# Files


def test_saved_folder_has_the_published_layout(folder, tmp_path):
    family = load(folder, {"num_crops": 16})
    family.save(tmp_path, merged_state_dict(family.model, torch.float16), torch.float16)
    names = set(json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
        words = [file.get_tensor(f"model.{name}.weight") for name in ("embed_tokens", "vision_embed_tokens.wte")]
        assert (words[0] == words[1]).all() and words[0].dtype == torch.float16
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_bytes()) == json.loads((folder / name).read_bytes()), name
    code = "microsoft/Phi-3.5-vision-instruct--"
    for name, changed in (("config.json", {"torch_dtype": "float16"}), ("preprocessor_config.json", {"num_crops": 16})):
        expected = json.loads((folder / name).read_bytes()) | changed
        expected.pop("_attn_implementation", None)  # asks for one kind of GPU, so it is not kept
        expected["auto_map"] = {kind: code + place for kind, place in expected["auto_map"].items()}
        assert json.loads((tmp_path / name).read_bytes()) == expected
    assert not list(tmp_path.glob("*.py"))


def test_saved_twice_is_the_same(folder, tmp_path):
    family = load(folder)
    state = merged_state_dict(family.model, torch.float32)
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        family.save(tmp_path / name, state, torch.float32)
        family = load(tmp_path / name)
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes(), file.name


def test_number_of_tiles_is_one_when_training_and_as_saved_when_predicting(folder):
    assert load(folder, {}).processor.image_processor.num_crops == 1
    assert load(folder, {"num_crops": 9}).processor.image_processor.num_crops == 9
    assert load(folder).processor.image_processor.num_crops == 4  # as published


def test_loaded_in_the_wanted_format_with_the_weights_of_the_files(folder):
    family = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in family.model.parameters()} == {torch.bfloat16}
    shards = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    published = "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.2.mlp.fc1.weight"
    with safe_open(folder / shards[published], "pt") as file:
        expected = file.get_tensor(published)
    assert (family.vision.encoder.layers[2].mlp.fc1.weight == expected.to(torch.bfloat16)).all()


def test_missing_weights_are_refused(folder, tmp_path):
    save_published(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[0].rename(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="incomplete"):
        load(tmp_path)


def test_another_layout_of_the_image_tokens_is_refused():
    layout = {"embedding_cls": "image", "hd_transform_order": "glb_sub", "projection_cls": "mlp"}
    with pytest.raises(UsageError, match="hd_transform_order glb_sub"), torch.device("meta"):
        Phi3VForCausalLM(Phi3VConfig(num_hidden_layers=1, embd_layer=layout))


def test_published_sizes_have_4_billion_parameters():
    """The model page says 4.2B. The published configuration says nothing of the encoder's sizes."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig(img_processor={"name": "clip_vision_model", "image_dim_out": 1024}))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(4.15e9, rel=0.005)
    vision = model.model.vision_embed_tokens
    assert sum(p.numel() for p in vision.img_processor.parameters()) == pytest.approx(303.5e6, rel=0.001)
    assert vision.img_projection[0].weight.shape == (3072, 4096) and vision.sub_GN.shape == (1, 1, 1, 4096)


# Tuning


def test_every_trained_parameter_gets_a_gradient(folder):
    """Several processes wait for the gradient of every parameter that is trained."""
    for tune in ("full", "lora", "connector"):
        family = load(folder, {})
        prepare_tuning(family, resolve({"tune": tune}))
        classifier = VLMClassifier(family, tiny_prompts(tuple(NAMES[:3]))).train()
        classifier(classifier.collate(True)([Sample(random_image(0), 0, "image")])).loss.backward()
        without = [name for name, p in family.model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, (tune, without)
        frozen = [name for name, p in family.model.named_parameters() if not p.requires_grad]
        if tune == "full":
            assert frozen and all("encoder.layers.2." in name or "post_layernorm" in name for name in frozen)


def test_lora_is_put_on_the_language_model_only_and_the_connector_is_trained(folder):
    family = load(folder, {})
    prepare_tuning(family, resolve({"tune": "lora"}))
    adapted = {
        name.split(".lora_A")[0] for name, _ in family.model.named_modules() if name.endswith(f"lora_A.{ADAPTER}")
    }
    layers = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert adapted == {f"model.layers.{i}.{name}" for i in range(2) for name in layers}
    others = {name for name, p in family.model.named_parameters() if p.requires_grad and "lora_" not in name}
    projection = {f"img_projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert others == {f"model.vision_embed_tokens.{name}" for name in projection | {"sub_GN", "glb_GN"}}
