"""The model that is served: what is known of it, and images -> results."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlm.classifier import VLMClassifier
from vlm.common import UsageError, note, read_json
from vlm.config import BEST_MODEL, DEMO_IMAGES, METADATA, RESULTS
from vlm.data import UnreadableImage, find_images, open_image, readable_formats
from vlm.inference import Item, Options, classify_items, settings_of
from vlm.machine import largest_batch

Result = dict[str, Any]
MOST_EXAMPLES = 12
WRITTEN_BY = "It is written by train_vlm.py."


class Upload(NamedTuple):
    """The bytes of an image file, and what messages call it."""

    name: str
    data: bytes

    @property
    def pixels(self) -> int:
        """How many its header says that it has; 0 if it cannot be read, which is said when it is decoded."""
        try:
            with Image.open(io.BytesIO(self.data), formats=readable_formats()) as image:
                return image.width * image.height
        except Exception:  # damaged files make the decoders raise almost anything
            return 0


@dataclass(frozen=True)
class Accuracy:
    """The test accuracy and its 95% interval, and the number of test images."""

    value: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class Served:
    """A loaded model.

    Attributes:
        model, metadata: what `load_model_and_metadata` returned.
        name: of the model, such as vlm_results/best_model or owner/name on the hub.
        base: what was trained, such as HuggingFaceTB/SmolVLM-256M-Instruct.
        accuracy: of the test after its training; None if the model's folder is no longer in the folder of its run.
        exhaustive: score every class to its end.
    """

    model: VLMClassifier
    metadata: dict[str, Any]
    accuracy: Accuracy | None
    exhaustive: bool = False
    name: str = BEST_MODEL

    @property
    def base(self) -> str:
        return str(self.metadata.get("model", "a model"))

    @property
    def task(self) -> str:
        return str(self.metadata.get("task_description") or "image classification")

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the words that people read."""
        return list(self.model.prompts.shown_names)

    @property
    def abstains_below(self) -> float:
        """The confidence below which the model gives no prediction; 0: it always gives one."""
        return self.model.calibration.abstain_below or 0.0

    @property
    def batch_size(self) -> int:
        """How many images the memory has room for."""
        return largest_batch(self.model, settings_of(self.metadata))

    def classify(self, uploads: Sequence[Upload], explain: bool) -> list[Result]:
        """One forward pass; what `predict_batch` returns for each."""
        items = [Item(name, partial(open_image, data, name)) for name, data in uploads]
        options = Options(len(items), explain, show_progress=False, exhaustive=self.exhaustive)
        return [outcome.result for outcome in classify_items(self.model, self.metadata, items, options)]


def served_name(model_dir: str) -> str:
    """The last two parts of a path, or the name on the hub: the page and its answers name no other folders."""
    return "/".join(Path(model_dir).expanduser().absolute().parts[-2:])


def test_accuracy(folder: Path, metadata: dict[str, Any]) -> Accuracy | None:
    """The figures of the run that a model belongs to, from the files next to its folder; None if they are not there,
    or are those of another run."""
    run = folder.resolve().parent
    try:
        of_run, results = (read_json(run / name, WRITTEN_BY) for name in (METADATA, RESULTS))
        if folder.resolve().name != BEST_MODEL or of_run["run_id"] != metadata["run_id"]:
            return None
        value, low, high = map(float, results["test"]["calibration"]["after"]["accuracy"])
        return Accuracy(value, low, high, int(results["pictures"]["test"]))
    except (OSError, UsageError, KeyError, TypeError, ValueError):
        return None


def find_examples(given: str | None, folder: Path) -> list[Path]:
    """Some images of a folder for the page: the first one of each folder in it, then the second ones, and so on. So
    classes in folders are all shown. An image that cannot be read is left out, with a note.

    Args:
        given: the folder; None: the one that --demo makes next to the model, if it is there.
        folder: the model's.

    Raises:
        UsageError: the folder does not exist or has no image.
    """
    demo = folder.resolve().parent / DEMO_IMAGES
    if given is None and not demo.is_dir():
        return []
    try:
        found = list(map(Path, find_images([given or demo])))
    except UsageError as error:
        raise UsageError(f"--examples: {error}") from error
    by_folder: dict[Path, list[Path]] = {}
    for path in found:
        by_folder.setdefault(path.parent, []).append(path)
    in_turn = (path for paths in zip_longest(*by_folder.values()) for path in paths if path)
    return sorted(islice(filter(_is_readable, in_turn), MOST_EXAMPLES))


def _is_readable(path: Path) -> bool:
    try:
        open_image(path)
    except UnreadableImage as error:
        note(f"note: --examples: {error}")
        return False
    return True
