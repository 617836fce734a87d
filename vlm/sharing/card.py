"""The model card: README.md of a model folder, for people and for the hub.

Texts that come from the user or a dataset stay texts: in the metadata they are one line each, which YAML quotes; in
the page they are escaped, or stand in a block that is longer than any mark in them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vlm.common import format_table, printable, printable_lines, shorten
from vlm.config import ADAPTER_FOLDER, BEST_MODEL, HEAD_FILE
from vlm.sharing.origin import LICENSE_KEYS

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAGS = ["vlm-classification", "image-classification", "vision-language-model"]
MOST_CLASSES = 200  # on the page
LONGEST_TITLE = 40  # of a class in a row of the results
LONGEST_NAME = 200  # characters in the metadata
MARKS = re.compile(r"[\\`*_{}\[\]<>#|~&$@]|(?<=:)//")  # what Markdown or HTML might take for markup, or for an address
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
NAMED = re.compile(r"^(folder = |vlm-predict --model-dir )\S+", re.MULTILINE)  # in the examples
FENCE = re.compile(r"`{3,}")
CODE = """\
import re

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = {folder}
prompt = {prompt}
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
image = Image.open("image.png").convert("RGB")
inputs = processor(text=[prompt], images=[[image]], add_special_tokens={special}, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=256, do_sample=False)
text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
answer = re.search(r"Answer: *(.*)", text)
print(answer[1] if answer else text)
"""


class Measure(NamedTuple):
    """A figure of the test. type: what the hub calls it; low, high: its 95% interval, None if it has none."""

    type: str
    title: str
    value: float
    low: float | None = None
    high: float | None = None


def model_card(
    metadata: dict[str, Any],
    results: dict[str, Any] | None = None,
    warnings: Sequence[str] = (),
    name: str = BEST_MODEL,
    adapter: bool = False,
) -> ModelCard:
    """The card of a trained model.

    Args:
        metadata: the content of its `training_metadata.json`; keys that earlier versions did not write may be missing.
        results: the content of `results.json`; None before the test.
        warnings: why the accuracy may mean less than it seems, in sentences.
        name: what the examples call the model: its folder, or its name on the hub.
        adapter: whether the folder has the adapter too.
    """
    measures = _measures(results) if results else []
    origin, classes = metadata.get("origin") or {}, metadata.get("class_names", [])
    license = {key: origin[key] for key in LICENSE_KEYS if key in origin}
    data = ModelCardData(
        base_model=origin.get("hub_id"),
        datasets=_hub_dataset(metadata),
        eval_results=[_eval_result(measure, metadata) for measure in measures] or None,
        library_name="transformers",
        metrics=[measure.type for measure in measures if measure.type in ("accuracy", "f1")] or None,
        model_name=_one_line(name.rpartition("/")[2]) if measures else None,
        pipeline_tag="image-text-to-text",
        tags=TAGS,
        **license,
    )
    prompt = metadata.get("plain_prompt")
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        text=markdown,
        fenced=fenced,
        task=metadata.get("task_description") or "image classification",
        trained="trained" if metadata.get("model") == "demo" else "fine-tuned",
        version=str(metadata.get("versions", {}).get("vlm", "")),
        classes=classes,
        shown_classes=_class_table(classes[:MOST_CLASSES], metadata, results),
        more_classes=max(0, len(classes) - MOST_CLASSES),
        about=[(title, markdown(value)) for title, value in _about(metadata, origin, results) if value],
        rows=measures + (_comparison(results) if results else []),
        texts=results.get("texts") if results else None,
        warnings=warnings,
        validation=metadata.get("validation", {}).get("accuracy"),
        calibration=_calibration(metadata.get("calibration")),
        needs_code="plain_prompt" in metadata,
        code=prompt and CODE.format(folder=repr(name), prompt=repr(prompt["text"]), special=prompt["special_tokens"]),
        name=name,
        adapter=adapter and ADAPTER_FOLDER,
        prompts=metadata.get("prompts"),
    )


def renamed(text: str, name: str) -> str:
    """The page with another name of the model in its examples."""
    return NAMED.sub(lambda found: found[1] + (repr(name) if found[1] == "folder = " else name), text)


def markdown(text: object) -> str:
    """A text in one line that Markdown and HTML show as it is."""
    return MARKS.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), " ".join(printable(str(text)).split()))


def fenced(text: str, language: str = "") -> str:
    """A text in a block of code, in which nothing is markup."""
    fence = "`" * max(3, 1 + max((len(found) for found in FENCE.findall(text)), default=0))
    return f"{fence}{language or 'text'}\n{printable_lines(text.rstrip())}\n{fence}"


def _one_line(text: object) -> str:
    return shorten(" ".join(printable(str(text)).split()), LONGEST_NAME)


def _measures(results: dict[str, Any]) -> list[Measure]:
    test = results["test"]
    after = test["calibration"]["after"]
    return [
        Measure("accuracy", "accuracy", *after["accuracy"]),
        Measure("f1", "macro F1", test["macro_f1"]),
        Measure("ece", "expected calibration error", *after["ece"]),
        Measure("nll", "negative log-likelihood", *after["nll"]),
    ]


def _hub_dataset(metadata: dict[str, Any]) -> str | None:
    """The name of the dataset on the hub; None if it is not from there."""
    dataset = metadata.get("dataset") or {}
    return dataset["dataset"] if str(dataset.get("kind", "")).startswith("hub") and dataset.get("commit") else None


def _eval_result(measure: Measure, metadata: dict[str, Any]) -> EvalResult:
    dataset, hub = metadata.get("dataset") or {}, _hub_dataset(metadata)
    name = _one_line(dataset.get("dataset") or "unknown")
    images = dataset.get("splits", {}).get("test", {}).get("pictures")
    interval = f"95% interval {measure.low:.4f} to {measure.high:.4f}, " if measure.low is not None else ""
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=hub or "custom",
        dataset_name=name,
        dataset_config=dataset.get("config") if hub else None,
        dataset_split="test",
        dataset_revision=dataset.get("commit") if hub else None,
        metric_type=measure.type,
        metric_value=round(measure.value, 6),
        metric_name=f"{measure.title} ({interval}{images} images)",
    )


def _about(
    metadata: dict[str, Any], origin: dict[str, Any], results: dict[str, Any] | None
) -> list[tuple[str, str | None]]:
    """What the table at the top says; values that are unknown are None."""
    settings, dataset = metadata.get("settings", {}), metadata.get("dataset") or {}
    base = origin.get("hub_id") or Path(str(metadata.get("model"))).name
    commit = f", commit {origin['commit']}" if origin.get("commit") else ""
    splits = ", ".join(f"{split['pictures']} {role}" for role, split in dataset.get("splits", {}).items())
    data_commit = f", commit {dataset['commit']}" if dataset.get("commit") else ""
    names = [origin.get("license_name") or origin.get("license"), origin.get("license_link")]
    license = " ".join(filter(None, names)) or "unknown: the base model's files name none"
    license = license if base != "demo" else "unknown: there is no base model, and the program names none"
    return [
        ("base model", f"{base}{commit}" if base != "demo" else "random weights"),
        ("license of the base model", license),
        ("what was trained", _trained(settings)),
        ("dataset", f"{dataset['dataset']}{data_commit}" if "dataset" in dataset else None),
        ("images", splits or None),
        ("image size", metadata.get("image_size")),
        ("trained at", metadata.get("created")),
        ("number format", results["device"]["dtype"] if results else None),
    ]


def _trained(settings: Mapping[str, Any]) -> str | None:
    """The parts of the model whose weights were trained."""
    lora = f"LoRA ({settings.get('lora_variant', 'lora')}, rank {settings.get('lora_rank')})"
    parts = {
        "full": "all weights",
        "connector": "the connector between vision encoder and language model",
        "lora": f"the language model with {lora}, which is merged into its weights",
    }
    name = str(settings.get("tune") or "")
    connector = name == "lora" and not settings.get("freeze_connector")
    return f"{parts[name]}; {parts['connector']}" if connector else parts.get(name)


def _calibration(calibration: dict[str, Any] | None) -> str:
    if not calibration:
        return "They are not calibrated."
    minus = ", minus the one that the class has without an image," if calibration.get("score") == "prior" else ""
    plus = ", and a number of its class is added" if calibration.get("bias") else ""
    head = f"the logit of a linear classifier on vision features (`{HEAD_FILE}`)"
    weight = calibration.get("evidence")
    score = f"each log-probability{minus}"
    if weight is not None:
        score += f" plus {weight:.4g} times {head}"
    if not calibration.get("text", True):
        score = f"not the response but {head} counts, and"
    how = f"{score} is divided by a temperature of {calibration['temperature']:.4g}{plus}"
    below = calibration.get("abstain_below")
    abstain = f" The model gives no prediction below a confidence of {below:.4g}." if below else ""
    return f"The model is calibrated on the validation split: {how}.{abstain}"


def _comparison(results: dict[str, Any]) -> list[Measure]:
    """What a model without skill would reach, and this one with other images: the accuracy is worth the difference."""
    per_class, check = results["test"]["per_class"], results["picture_check"]
    name = max(per_class, key=lambda one: per_class[one]["support"])
    share = per_class[name]["support"] / max(1, sum(one["support"] for one in per_class.values()))
    rows = [Measure("", f"accuracy if always {markdown(shorten(name, LONGEST_TITLE))} is answered", share)]
    some = f"on {check['pictures']} of the images"
    for key, title in (("accuracy", "as they are"), ("shuffled", "exchanged among the classes"), ("gray", "all gray")):
        if check[key] is not None:
            rows.append(Measure("", f"accuracy {some}, {title}", check[key]))
    return rows


def _class_table(names: Sequence[object], metadata: dict[str, Any], results: dict[str, Any] | None) -> str:
    """The class names, with the number of their images as far as it is known."""
    training = (metadata.get("dataset") or {}).get("training_images") or []
    columns: dict[str, list[Any]] = {"class": [printable(shorten(str(name), LONGEST_NAME)) for name in names]}
    if training:
        columns["training images"] = training[: len(names)]
    if results:
        per_class = results["test"]["per_class"]
        columns["test images"] = [per_class.get(name, {}).get("support") for name in names]
    if len(columns) == 1:
        return "\n".join(columns["class"])
    return format_table(list(zip(*columns.values(), strict=False)), list(columns))
