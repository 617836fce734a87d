"""Processors as transformers publishes them, without what needs torchvision."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES


def read_processor(folder: Path, processor_class: Any = AutoProcessor) -> Any:
    """The processor in a folder, whose image processor computes with Pillow: pixels do not depend on torchvision."""
    processor = processor_class.from_pretrained(folder, local_files_only=True)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return processor


def processor_class_of(folder: Path) -> Any:
    """The class that reads the processor in a folder, without its video half if it has one."""
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    published = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(model_type, ""), None)
    if published is None or "video_processor" not in published.get_attributes():
        return AutoProcessor
    return without_videos(published)


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
