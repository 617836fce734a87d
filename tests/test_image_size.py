"""--image-size: what it comes to in every family, that the saved folder keeps it, and that plain transformers reads it
right."""

import numpy as np
import pytest
import test_family_generic as generic
import torch
from hub_layout_phi3_vision import save_published as save_phi3
from hub_layout_qwen2_vl import save_published as save_qwen
from hub_layout_smolvlm import save_published as save_smolvlm
from PIL import Image
from test_image_options import CPU, at_inference, trained
from tiny import NAMES, random_image, save_tiny_model, tiny_prompts
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from vlm.classifier.batching import vlm_collate_fn
from vlm.classifier.classifier import VLMClassifier
from vlm.common.errors import UsageError
from vlm.config import ImageSize, resolve
from vlm.data import Sample, load_data
from vlm.families import load_family
from vlm.families.images.sizes import pick_size
from vlm.families.processors import processor_class_of

SAVE = {
    "smolvlm": save_smolvlm,
    "smolvlm 2.2B": lambda folder: save_smolvlm(folder, "2.2B"),
    "small": lambda folder: save_tiny_model(folder, image_size=64),
    "qwen": save_qwen,
    "phi3": save_phi3,
    "llava dinov2": generic.TestLlavaDinov2().build,
    "llava clip": generic.TestLlavaClip().build,
    "onevision": generic.TestLlavaOnevision().build,
    "internvl": generic.TestInternVL().build,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A published folder by name, built once."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("published")
            SAVE[name](folders[name])
        return folders[name]

    return get


def tokens_of(family, image=None) -> int:
    if family.title == "this model":  # it lays out images as a part of the conversation
        family.render(tiny_prompts())
    ids = family.encode_images([image or random_image(0, 64, 48)]).token_ids[0]
    return ids.count(family.image_token_id)


def auto(folder, edge):
    """The family as a training run loads it whose images have edges so long."""
    return load_family(folder, torch.float32, CPU, {"image_size": ImageSize(edge, auto=True)})


# The rule


def reference(edge: int, unit: int, published: int) -> int:
    """The rule of auto, by trying every size."""
    fitting = [
        n for n in range(1, published + 1) if (n % unit == 0 or n == published) and n >= edge and 2 * n >= published
    ]
    return fitting[0] if fitting else published


@pytest.mark.parametrize(("unit", "published"), [(64, 512), (42, 384), (14, 168), (28, 28), (16, 32)])
def test_auto_takes_the_smallest_size_that_loses_nothing_from_half_of_the_published_on(unit, published):
    for edge in range(1, 3 * published, 3):
        assert pick_size(ImageSize(edge, auto=True), unit, published, "") == reference(edge, unit, published)
    assert pick_size(None, unit, published, "") == published


@pytest.mark.parametrize(
    ("asked", "unit", "published", "near"),
    [
        (250, 64, 512, "192 and 256"),
        (30, 64, 512, "64"),
        (500, 64, 512, "448 and 512"),
        (1024, 64, 512, "448 and 512"),
        (380, 42, 384, "378 and 384"),
        (400, 42, 384, "378 and 384"),
    ],
)
def test_a_size_that_does_not_work_is_refused_with_the_nearest_that_do(asked, unit, published, near):
    with pytest.raises(
        UsageError,
        match=rf"--image-size {asked}: SmolVLM takes multiples of {unit} .* {published}\. The nearest .* {near}\.$",
    ):
        pick_size(ImageSize(asked), unit, published, "SmolVLM")
    for edge in map(int, near.split(" and ")):
        assert pick_size(ImageSize(edge), unit, published, "SmolVLM") == edge


def test_wrong_values_and_combinations_are_refused():
    for value in ("0", "-3", "12.5", "large", ""):
        with pytest.raises(UsageError, match="expected a number of pixels, or auto"):
            resolve({"image_size": value})
    for other in ({"image_splitting": True}, {"max_pixels": 5000}):
        with pytest.raises(UsageError, match="exclude each other"):
            resolve({"image_size": "256"} | other)
        resolve(other)


def test_auto_leaves_the_demo_and_split_images_alone():
    assert resolve({}).image_options(200) == {"image_size": ImageSize(200, auto=True)}
    assert resolve({}).image_options() == {}
    assert resolve({"demo": True}).image_options(8) == {}
    assert resolve({"image_splitting": True}).image_options(200) == {"image_splitting": True}


def test_the_edge_of_a_data_set_is_that_of_95_percent_of_its_training_images(tmp_path):
    for name in ("a", "b"):
        for split, count in (("train", 50), ("validation", 2), ("test", 2)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                width = 900 if split != "train" else 20 + i if i < 48 else 800  # 4 of 100 are large
                Image.new("RGB", (10, width)).save(tmp_path / split / name / f"{i}.png")
    data = load_data(resolve({"dataset": str(tmp_path)}))
    edges = sorted(max(data.train[i].image.size) for i in range(len(data.train)))
    assert data.edge == edges[int(np.ceil(0.95 * (len(edges) - 1)))] and data.edge < 70


# Families


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flag", "tokens"),
    [
        ("smolvlm", "256", 16),
        ("smolvlm", "512", 64),
        ("smolvlm", "64", 1),
        ("smolvlm 2.2B", "384", 81),
        ("smolvlm 2.2B", "210", 25),
        ("qwen", "112", 16),
        ("phi3", "336", 313),
        ("llava dinov2", "14", 1),
        ("llava dinov2", "56", 16),  # more than the processor has: the encoder interpolates
        ("internvl", "14", 1),
    ],
)
def test_training_decides_and_inference_keeps_it(model, flag, tokens, folder_of, tmp_path):
    image = (
        random_image(0, 112, 112)
        if model == "qwen"
        else Image.new("RGB", (14, 14), "red")
        if model == "internvl"
        else None
    )
    family = trained(folder_of(model), ["--image-size", flag])
    assert tokens_of(family, image) == tokens
    assert tokens_of(at_inference(family, tmp_path / "model"), image) == tokens


@pytest.mark.parametrize(
    ("model", "flag", "message"),
    [
        ("smolvlm", "250", "192 and 256"),
        ("smolvlm 2.2B", "256", "252 and 294"),
        ("qwen", "27", "at least 28 pixels"),
        ("phi3", "224", "fixed to tiles of 336 pixels"),
        ("llava dinov2", "20", "14 and 28"),
        ("llava clip", "14", "fixed to images of 28 pixels"),
        ("onevision", "14", "fixed to images of 28 pixels"),
    ],
)
def test_what_a_family_cannot_do_is_said_in_a_line(model, flag, message, folder_of):
    with pytest.raises(UsageError, match=f"--image-size {flag}: .*{message}"):
        trained(folder_of(model), ["--image-size", flag])


@pytest.mark.parametrize(
    ("model", "edge", "tokens", "line"),
    [
        (
            "smolvlm",
            200,
            16,
            "256 of 512 px (auto: 95% of the images are at most 200 px): 16 image tokens instead of 64, ",
        ),
        ("smolvlm", 255, 16, "instead of 64, about 25% of the vision work."),
        ("smolvlm", 300, 25, "320 of 512 px"),
        (
            "smolvlm",
            2000,
            64,
            "512 px, as published; larger images are scaled down (95% of the images are at most 2000 px)",
        ),
        ("smolvlm", 512, 64, "512 px, as published (95% of the images are at most 512 px): 64 image tokens."),
        ("smolvlm 2.2B", 64, 25, "25 image tokens instead of 81, about 31% of"),
        ("llava dinov2", 8, 1, "14 of 28 px"),
        ("llava clip", 8, 4, "28 px, as published"),
        ("onevision", 8, None, "28 px, as published"),
        ("qwen", 8, 4, "at most 200,704 pixels: up to 256 image tokens"),
        ("phi3", 8, 313, "336 px, to which Phi-3.5-vision is fixed"),
    ],
)
def test_auto_says_what_it_takes_and_what_that_costs(model, edge, tokens, line, folder_of):
    family = auto(folder_of(model), edge)
    assert line in family.size_text(ImageSize(edge, auto=True))
    if tokens:
        assert tokens_of(family) == tokens


def test_a_model_saved_at_a_smaller_size_can_be_trained_on_at_the_published_one(folder_of, tmp_path):
    at_inference(trained(folder_of("smolvlm"), ["--image-size", "256"]), tmp_path / "first")
    assert tokens_of(trained(tmp_path / "first", [])) == 64
    assert tokens_of(trained(tmp_path / "first", ["--image-splitting"]), random_image(0, 512, 512)) == 17 * 64


def probabilities(classifier, image):
    batch = vlm_collate_fn([Sample(image, 0, "")], classifier.family, classifier.rendered, with_response=False)
    return classifier.score(classifier.read(batch)).softmax(-1)


def plain_processor(folder, model):
    """As anybody loads it; the video half of some processors needs torchvision."""
    loader = processor_class_of(folder) if model == "internvl" else AutoProcessor
    processor = loader.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size"),
    [("small", "32"), ("smolvlm", "256"), ("smolvlm 2.2B", "210"), ("llava dinov2", "42"), ("internvl", "14")],
)
def test_the_saved_folder_gives_the_same_in_plain_transformers(model, size, folder_of, tmp_path):
    """The same token ids, the same logits, and the same probabilities after a reload."""
    family = trained(folder_of(model), ["--image-size", size])
    prompts = tiny_prompts(tuple(NAMES))
    classifier = VLMClassifier(family, prompts).eval()
    image = random_image(3, 14, 14) if model == "internvl" else random_image(3, 90, 60)
    batch = vlm_collate_fn([Sample(image, 2, "an image")], family, classifier.rendered)
    loaded = at_inference(family, tmp_path / "model")
    again = vlm_collate_fn([Sample(image, 2, "an image")], VLMClassifier(loaded, prompts).family, classifier.rendered)
    for name, tensor in batch.pixels.items():
        assert torch.equal(tensor, again.pixels[name])

    processor = plain_processor(tmp_path / "model", model)
    text = processor.apply_chat_template(prompts.messages(), add_generation_prompt=True, tokenize=False)
    plain = processor(text=[text], images=[[image]], return_tensors="pt")
    length = int(batch.lengths[0]) - len(classifier.rendered.response_ids[2])
    prompt = classifier.rendered.prefix_ids + batch.input_ids[0, :length].tolist()
    assert plain["input_ids"][0].tolist() == prompt

    row = classifier.rendered.prefix_ids + batch.input_ids[0].tolist()
    plain["input_ids"], plain["attention_mask"] = torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)
    with torch.no_grad():
        logits = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)(**plain).logits[0]
        loss = classifier(batch).loss
        scores = [probabilities(VLMClassifier(f, prompts).eval(), image) for f in (family, loaded)]
        reading = classifier.read(
            vlm_collate_fn([Sample(image, 0, "")], family, classifier.rendered, with_response=False)
        )
    start = len(prompt)
    torch.testing.assert_close(
        classifier.family.logits(reading.states[:, 0])[0], logits[start - 1], rtol=1e-5, atol=1e-5
    )
    expected = torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(row[start:]), reduction="sum")
    torch.testing.assert_close(loss.float(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-6)
