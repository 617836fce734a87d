"""Processors as transformers publishes them, without what needs torchvision; and their chat templates."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from vlm.common import UsageError, is_out_of_memory, write_json
from vlm.data import COPY_AGAIN, read_object
from vlm.families.configuration import read_config
from vlm.families.pretrained import CHOOSE_ANOTHER, brief, load_pretrained

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
LARGEST = 10_000  # pixels of an edge, or tokens of an image
BOUNDED = re.compile(r"image_seq_len$|num_image_tokens$|max_image_size")  # settings that memory depends on
OF_THE_LOADING = {"backend", "is_local", "local_files_only"}  # how a tokenizer was loaded; version 5 writes it too
IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")


def read_processor(folder: Path, processor_class: Any = AutoProcessor) -> Any:
    """The processor in a folder, whose image processor computes with Pillow: pixels do not depend on torchvision.

    Raises:
        UsageError: a file of it is missing or damaged, or it needs code of its own.
    """
    for name in IMAGE_SETTINGS:
        if (folder / name).is_file():
            _check_sizes(read_object(folder / name), folder / name)
    with naming_the_file(folder):
        processor = load_pretrained(processor_class, folder)
        if not isinstance(processor, ProcessorMixin):
            raise UsageError(f"{folder} has no processor of images and text. {CHOOSE_ANOTHER}")
        processor.image_processor = load_pretrained(AutoImageProcessor, folder, backend="pil")
        return processor


def _check_sizes(value: Any, path: Path, name: str = "") -> None:
    """Refuse numbers of tokens and edges that no memory has room for, before an image is made of them."""
    if isinstance(value, dict):
        for key, part in value.items():
            inner = f"{name}.{key}" if name else key
            _check_sizes(part, path, inner)
    elif isinstance(value, int | float) and BOUNDED.search(name) and not 0 < value <= LARGEST:
        raise UsageError(f"{path} says {name}: {value}, expected 1 to {LARGEST:,}. {COPY_AGAIN}")


@contextmanager
def naming_the_file(folder: Path) -> Iterator[None]:
    """Turn any error while a processor is loaded into a UsageError that names the file that is to blame."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        if is_out_of_memory(error):
            raise
        raise UsageError(_what_is_wrong(folder, error)) from error


def _what_is_wrong(folder: Path, error: Exception) -> str:
    own, common = (folder / name for name in IMAGE_SETTINGS)
    if not own.exists() and not (common.exists() and "image_processor" in read_object(common)):
        return f"{folder / IMAGE_SETTINGS[0]} is missing: it says how images are processed. {COPY_AGAIN}"
    if isinstance(error, ImportError):
        return f"the processor in {folder} needs a package that is not installed ({brief(error)})."
    for name, read in ((TOKENIZER, _read_tokenizer), (TEMPLATE, _read_text)):
        path = folder / name
        try:
            read(path)
        except FileNotFoundError:
            if name == TOKENIZER and not any((folder / other).exists() for other in ("tokenizer.model", "vocab.json")):
                return f"{path} is missing. {COPY_AGAIN}"
        except Exception as damage:  # the library of tokenizers knows no other kind
            return f"{path} cannot be read ({brief(damage)}). {COPY_AGAIN}"
    names = " and ".join(name for name in (*IMAGE_SETTINGS, "tokenizer_config.json") if (folder / name).exists())
    return f"the processor in {folder} cannot be made from {names} ({brief(error)}). {COPY_AGAIN}"


def _read_text(path: Path) -> None:
    path.read_text(encoding="utf-8")


def _read_tokenizer(path: Path) -> None:
    _read_text(path)
    Tokenizer.from_file(str(path))


def processor_class_of(folder: Path) -> Any:
    """The class that reads the processor in a folder, without its video half if it has one."""
    published = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(read_config(folder)["model_type"], ""), None)
    if published is None or "video_processor" not in published.get_attributes():
        return AutoProcessor
    return without_videos(published)


def chat_text(owner: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """What the chat template of a processor or tokenizer makes of messages.

    Raises:
        UsageError: there is none, it is damaged, or it does not take these messages.
    """
    try:
        return owner.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # of jinja, or whatever its expressions raise
        if is_out_of_memory(error):
            raise
        where = template_file(owner)
        if not getattr(owner, "chat_template", None):
            raise UsageError(f"{where} is missing or empty, so no conversation can be written. {COPY_AGAIN}") from error
        raise UsageError(f"the chat template in {where} does not work ({brief(error)}). {COPY_AGAIN}") from error


def drops_texts(owner: Any) -> UsageError:
    """The error of a chat template that leaves out a part of the conversation."""
    return UsageError(
        f"the chat template in {template_file(owner)} drops the instructions, the question, the image or the answer. "
        f"{COPY_AGAIN[:-1]}, or choose another."
    )


def template_file(owner: Any) -> Path:
    """The file with the chat template of a processor or tokenizer."""
    folder = Path(getattr(owner, "tokenizer", owner).name_or_path)
    for name in (TEMPLATE, "chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and (path.suffix != ".json" or "chat_template" in read_object(path)):
            return path
    return folder / TEMPLATE


@cache
def without_videos(published: Any) -> Any:
    """The class of a processor of images and text. It keeps its name, under which it is saved and others load it."""
    return type(published.__name__, (_ImagesAndText, published), {"__module__": published.__module__})


class _ImagesAndText:
    """What `without_videos` adds to a published class: which parts there are, and how instances are pickled."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        published: Any = super()
        return [name for name in published.get_attributes() if name != "video_processor"]

    def __reduce__(self) -> tuple[Any, ...]:
        """The class is made at run time, so a loader process cannot import it: it makes it again."""
        published = type(self).__bases__[1]
        return _new_instance, (published,), vars(self)


def _new_instance(published: Any) -> ProcessorMixin:
    return ProcessorMixin.__new__(without_videos(published))


def write_for_older_programs(folder: Path) -> None:
    """Write the settings of the processor in a folder as transformers 4 does, which version 5 reads too."""
    own, common = (folder / name for name in IMAGE_SETTINGS)
    if common.is_file() and "image_processor" in (config := read_object(common)):
        images = config.pop("image_processor")
        write_json(own, images | {"processor_class": config.get("processor_class")})
        write_json(common, config)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = {name: value for name, value in read_object(path).items() if name not in OF_THE_LOADING}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
