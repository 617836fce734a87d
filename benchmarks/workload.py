"""What is measured: a model in SmolVLM's true shape with random weights, images of noise, texts of the usual length.

`options` says which: the shape (SmolVLM-256M's unless a benchmark asks for another), its size, device and number
format.

The system text has about 450 tokens, a response 43. The tokenizer is trained on the spot and knows few words;
embeddings and head have the published number of rows all the same, so that every product has its true size.
"""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common  # noqa: F401, first: it finds the program
import shapes
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.classifier import VLMClassifier
from vlm.config import RESPONSE, Settings, resolve
from vlm.conversation import Prompts, build_prompts
from vlm.data import Sample, Split, Step, load_data
from vlm.families import ENCODER_FEATURES, Family, FeatureCache, build_model, build_processor, load_family, open_cache
from vlm.families.demo import CHAT_TEMPLATE
from vlm.machine import DTYPES
from vlm.training.loop import Trainer
from vlm.training.setup import set_up
from vlm.training.tuning import trained_parameters

CACHE_GB = 20.0
PEAK_STEPS, SURE, LARGEST_LOGIT = 1000, 0.998, 30.0
PREFIX_TOKENS = {"full": 450, "quick": 450, "tiny": 60}
ADJECTIVES = ["rough", "smooth", "dark", "bright", "old", "young", "steep", "flat", "dusty", "icy"]
NOUNS = ["crater", "dune", "ridge", "slope", "plain", "cliff", "gully", "mound", "valley", "terrace"]
DESCRIPTION = "a wide piece of {} terrain with marks of running water"
# The wording of the committed results; other words would have other tokens, and another time.
RULES = (
    "Look at the whole picture before you decide. Light comes from one side, so that every height has a shadow. "
    "Size says little about the kind, since pictures were taken from different heights. "
    "Where two kinds are in one picture, the larger one counts. "
)
# The layout of SmolVLM-Instruct without the line break after the last turn: TRL would train that token too, and this
# program does not.
TEMPLATE = CHAT_TEMPLATE.replace(
    "<end_of_utterance>\n{% endfor %}",
    "<end_of_utterance>{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}",
)


def class_names(count: int) -> list[str]:
    """Names of two words, of the same number of tokens each; neighbors share neither word. From the hundredth on they
    end with a number."""
    names = [f"{ADJECTIVES[(i + i // 10) % 10]} {NOUNS[i % 10]}" for i in range(count)]
    return [name if i < 100 else f"{name} {i // 100}" for i, name in enumerate(names)]


def system_text(size: str, tokens: int | None = None) -> str:
    """A text of about so many tokens, with one token a word or mark."""
    tokens = tokens or PREFIX_TOKENS[size]
    words = (RULES * (1 + tokens // 50)).replace(".", " .").replace(",", " ,").split()
    return " ".join(words[: max(1, tokens - 4)]).replace(" .", ".").replace(" ,", ",")


def prompts(size: str, classes: int, tokens: int | None = None, question_first: bool = False) -> Prompts:
    """The conversation about so many classes. The class list stays out, so that the prefix does not grow with it."""
    names = class_names(classes)
    rendered = build_prompts(resolve({"system_instructions": system_text(size, tokens)}), names)
    responses = [
        r.replace(f"features of {name}", DESCRIPTION.format(name))
        for r, name in zip(rendered.responses, names, strict=True)
    ]
    return replace(rendered, responses=tuple(responses), question_first=question_first)


def kept(options: argparse.Namespace, name: str) -> Path:
    """A place in the cache folder that is another one after each change of the files from which all follows that is
    kept there."""
    sources = b"".join(Path(file).read_bytes() for file in (__file__, shapes.__file__))
    return options.cache / f"{hashlib.sha256(sources).hexdigest()[:8]}_{name}"


def model_folder(options: argparse.Namespace) -> Path:
    """The model as on the hub, in the cache folder; built where it is not there yet. The same seed gives the same
    weights."""
    folder = kept(options, f"model_{options.shape}_{options.size}_{options.dtype}")
    if (folder / "config.json").is_file():
        return folder
    new = folder.with_name(f"{folder.name}.new")
    build(new, shapes.shape(options.shape, options.size), DTYPES[options.dtype])
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return folder


def build(folder: Path, shape: shapes.Shape, dtype: torch.dtype = torch.float32) -> None:
    """Write a model of this shape, and a processor of its own."""
    said = prompts("full", 100)
    processor = build_processor(
        shape.image, shape.patch, shape.scale, corpus=[said.system, said.question, *said.responses]
    )
    processor.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = build_model(processor, shape.vision, shape.text, shape.image, shape.patch, shape.scale)
    with torch.no_grad():
        # The padding token, which the conversation begins with, starts as zeros. They stay zeros through all layers,
        # and the gradient of a norm at zero, over 300 each time, is no number any more after 20 of them.
        words = model.get_input_embeddings().weight
        words[words.abs().sum(1) == 0] = words.std()
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)


def load(options: argparse.Namespace, **images: Any) -> Family:
    """The model and its processor, in the number format and on the device that are measured. images: image options of
    the family."""
    return load_family(model_folder(options), DTYPES[options.dtype], torch.device(options.device), images)


def noise(number: int, size: int) -> Image.Image:
    """An image of noise, different for each number."""
    pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    return Image.fromarray(pixels.numpy())


def image_files(options: argparse.Namespace, count: int) -> list[Path]:
    """So many image files in the cache folder."""
    edge = shapes.shape(options.shape, options.size).image
    folder = options.cache / f"images_{edge}"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i:04}.png" for i in range(count)]
    for i, file in enumerate(files):
        if not file.is_file():
            noise(i, edge).save(file, compress_level=1)
    return files


def image_folder(options: argparse.Namespace, images: int, classes: int) -> Path:
    """A dataset as `train_vlm.py` takes it: so many images in train, one a class in validation and test, which are the
    same ones."""
    folder = kept(options, f"data_{options.shape}_{options.size}_{images}_{classes}")
    if folder.is_dir():
        return folder
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for i, file in enumerate(image_files(options, images)):
        for split in ("train", "validation", "test") if i < classes else ("train",):
            place = new / split / class_names(classes)[i % classes]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    new.rename(folder)
    return folder


# Training, as the program does it


def images_for(batch_size: int) -> int:
    """How many different images are trained on, by those of a step."""
    return max(2 * batch_size, 10)


def settings(options: argparse.Namespace, tune: str, batch_size: int, cached: bool, **more: Any) -> dict[str, Any]:
    """The flags of the training run that is measured, by field name of `Settings`. The objective is the one that other
    programs have."""
    images = batch_size * more.get("gradient_accumulation_steps", 1)
    descriptions = kept(options, "descriptions.json")
    if not descriptions.is_file():
        descriptions.write_text(
            json.dumps({name: DESCRIPTION.format(name) for name in class_names(10)}), encoding="utf-8"
        )
    return {
        "model": str(model_folder(options)),
        "dataset": str(image_folder(options, images_for(images), 10)),
        "tune": tune,
        "epochs": 1000,
        "objective": RESPONSE,
        "system_instructions": system_text(options.size),
        "class_descriptions": str(descriptions),
        "batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "no_feature_cache": not cached,
        "device": options.device,
        "dtype": options.dtype,
        "threads": options.threads,
        "workers": options.workers,
        "question_first": options.question_first,
        "output_dir": str(options.cache / "output"),
        **more,
    }


def given(options: argparse.Namespace, tune: str, batch_size: int) -> tuple[Settings, Split, Prompts]:
    """What another side is given: settings, training images and texts, with nothing of ours loaded."""
    chosen = resolve(settings(options, tune, batch_size, cached=False))
    with contextlib.redirect_stderr(io.StringIO()):
        data = load_data(chosen)
    return chosen, data.train, build_prompts(chosen, data.class_names)


def repeated(options: argparse.Namespace, count: int) -> list[int]:
    """The numbers of so many images, as often as an epoch has each of them.

    With loader processes, an epoch should be longer than what is measured: its first steps wait for them.
    """
    return list(range(count)) * options.repeats


class OurTraining:
    """The program's own set-up and loop (`fit` without evaluation and saving), one optimizer step at a time.

    Args:
        cached: whether the features of a frozen vision encoder are kept.
        more: further settings, by field name.
    """

    def __init__(self, options: argparse.Namespace, tune: str, batch_size: int, cached: bool, **more: Any):
        with contextlib.redirect_stderr(io.StringIO()):
            self.run = set_up(resolve(settings(options, tune, batch_size, cached, **more)))
            train = self.run.data.train
            self.run.data.train = train.take(repeated(options, len(train)))
            self.trainer = Trainer(self.run, lambda: False)
        self.classifier: VLMClassifier = self.run.classifier
        start_adapters(self.classifier)
        self.run.model.train()
        self._steps = self._all_steps()

    def _all_steps(self) -> Iterator[tuple[Step, Iterator[dict[str, Any]]]]:
        for epoch in range(self.run.settings.epochs):
            plan = [step for step in self.trainer.plan(epoch) if len(step.indices) == self.trainer.run.images_a_step]
            batches = self.trainer.batches(plan)
            for step in plan:
                yield step, batches

    def step(self) -> list[int]:
        """One optimizer step with its images; returns which ones."""
        step, batches = next(self._steps)
        self.loss = self.trainer.run_step(step, batches).sum()  # looking at it here would make a GPU wait
        self.trainer.progress.step += 1
        return step.indices

    def examine(self) -> tuple[list[int], float, dict[str, Tensor]]:
        """A step without its update, clipping and dropout: which images, the loss, the gradients by name."""
        gradients: dict[str, Tensor] = {}

        def keep() -> None:
            gradients.update(
                {n: p.grad.clone() for n, p in trained_parameters(self.classifier.model).items() if p.grad is not None}
            )

        settings = self.run.settings
        self.trainer.settings = self.run.settings = replace(settings, max_grad_norm=0.0)
        self.run.optimizer.step = keep
        try:
            with without_dropout(self.classifier):
                indices = self.step()
        finally:
            del self.run.optimizer.step
            self.trainer.settings = self.run.settings = settings
        return indices, float(self.loss), gradients

    def samples(self, indices: list[int]) -> list[Sample]:
        return [self.run.data.train[i] for i in indices]


def start_adapters(classifier: VLMClassifier) -> None:
    """Random values where LoRA starts with zeros, as after some steps; else half of the gradients would be zero, and
    agree."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in classifier.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.01)


@contextlib.contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """No dropout inside; the model stays in training mode."""
    layers = [(module, module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module, _ in layers:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in layers:
            module.p = p


def relative_difference(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, as a share of their norm.

    Raises:
        ValueError: the sides do not train the same parameters.
    """
    if theirs.keys() != ours.keys():
        raise ValueError(f"trained on one side only: {sorted(theirs.keys() ^ ours.keys())[:4]}")
    different = sum(float((theirs[n] - ours[n]).double().square().sum()) for n in ours)
    return (different / sum(float(ours[n].double().square().sum()) for n in ours)) ** 0.5


# Classifying, as the program does it


def classifier(
    options: argparse.Namespace, classes: int, peaked: bool = False, tokens: int | None = None, **images: Any
) -> VLMClassifier:
    """A classifier ready to predict.

    Args:
        peaked: with weights that were trained on the responses (see `peak`).
        tokens: of the prefix. images: image options of the family.
    """
    family = load(options, **images)
    family.model.requires_grad_(False)
    result = VLMClassifier(family, prompts(options.size, classes, tokens, options.question_first)).eval()
    if peaked:
        peak(options, result)
    return result


def keep_features(classifier: VLMClassifier, samples: list[Sample]) -> FeatureCache:
    """Compute the features of these images, and keep them."""
    cache = open_cache(classifier.family, True, "float32", CACHE_GB)
    if cache is None or not cache.add_missing(classifier.family, samples):
        raise RuntimeError("the features cannot be kept")
    return cache


def peak(options: argparse.Namespace, result: VLMClassifier) -> None:
    """Make the model sure of the first class and of every word of its response, as a fine-tuned one is of an easy
    image.

    The last two layers and the norm behind them are trained with AdamW on that response behind one image, until all of
    it together has the probability `SURE`. What was trained is kept in the cache folder.

    Raises:
        RuntimeError: it is not sure after `PEAK_STEPS`.
    """
    model, count = result.model, len(result.class_names)
    layers, norm = result.family.language.layers, result.family.language.norm
    trained = torch.nn.ModuleDict(
        {"norm": norm} | {str(i): layers[i] for i in range(max(0, len(layers) - 2), len(layers))}
    )
    image = noise(0, shapes.shape(options.shape, options.size).image)
    batch = result.collate(with_response=True)([Sample(image, 0, "noise")])
    # An image of another size has other tokens
    lengths = f"{len(result.rendered.prefix_ids)}_{batch.input_ids.shape[1]}"
    file = kept(options, f"peaked_{options.shape}_{options.size}_{count}_{lengths}.safetensors")
    if file.is_file():
        trained.load_state_dict(load_file(file))
        return
    trained.requires_grad_(True)
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # random embeddings are so short that no logit could stand out
        norm.weight.fill_(LARGEST_LOGIT / (float(head.norm(dim=-1).mean()) * head.shape[1] ** 0.5))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    batch = replace(batch, pixels={ENCODER_FEATURES: result.family.encoder_features(batch.pixels)})
    model.train()
    for _ in range(PEAK_STEPS):
        out = result(batch)
        if float(torch.exp(-out.loss.detach())) > SURE:
            break
        (out.loss / out.tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    else:
        raise RuntimeError(f"the model is not sure of a response after {PEAK_STEPS} steps")
    trained.requires_grad_(False)
    result.eval()
    save_file(trained.state_dict(), file)
