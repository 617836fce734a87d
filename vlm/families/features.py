"""The cache of vision features: where the vision encoder is frozen, each distinct image goes through it once, and never
again.

One folder for one way of computing (`fingerprint`), one safetensors file an image, named by the image's content. An
image has one view: nothing in this program augments images. Files are mapped into memory, so that reading one copies
nothing until a batch is made.

Where the connector is frozen too, the features are those behind it, of which there are fewer; else those before it.

Files are written whole or not at all, so runs that share the cache, or are killed, do it no harm. What a killed run
left half written is deleted after a day. All folders together stay within a size: see `make_room`.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlm.common import Bar, evaluation_mode, note, replacing
from vlm.data import Sample, Split
from vlm.families.base import Family
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES, EncodedImages, besides_pixels

FORMAT = 2  # of the files; another one is another fingerprint
TOKEN_IDS = "token_ids"
HOUR, DAY = 3600.0, 24 * 3600.0
# A batch for the encoder: 32 small images, or eight of 512 x 512.
IMAGES_AT_ONCE, VALUES_AT_ONCE = 32, 8 * 3 * 512 * 512
CHANGES_NOTHING = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "architectures",
)  # in a configuration


def cache_root() -> Path:
    """Where features are kept: `VLM_CACHE`, or the user's cache folder."""
    base = os.environ.get("VLM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vlm")
    return Path(base).expanduser() / "features"


class FeatureCache:
    """Features of one model's images. Can be pickled, for the processes of a loader.

    Args:
        connected: features behind the connector, else before it.
        halved: float32 features are kept as float16, half the size. They come back as float32, with a relative
            difference of at most 2^-11; an image with a feature that float16 cannot hold is kept as it is.
        limit_gb: the largest size of all that is kept, in 10^9 bytes.
        connectors: the weights of all that features come from, where it is not the family's connector alone.
        root: the folder of all folders of features, where it is not that of the user.
    """

    def __init__(
        self,
        family: Family,
        connected: bool,
        halved: bool,
        limit_gb: float,
        connectors: Sequence[dict[str, Tensor]] = (),
        root: Path | None = None,
    ):
        self.connected = connected
        self.halved = halved
        self.folder = (root or cache_root()) / fingerprint(family, connected, halved, connectors)
        self.limit_gb = limit_gb
        self.room = 0.0  # bytes that may be written before the folders are looked at again
        self.full = False

    def fits(self, family: Family) -> bool:
        """Whether the features are those of this model too."""
        return fingerprint(family, self.connected, self.halved) == self.folder.name

    # Reading

    def use(self, key: str) -> bool:
        """Whether the features of an image are there. Marks them as used now, so that they stay for a day at least."""
        file = self._file(key)
        try:
            os.utime(file)
        except OSError:  # not there, or another user's
            return os.access(file, os.R_OK)
        return True

    def encode(self, keys: Sequence[str]) -> EncodedImages | None:
        """What `Family.encode_images` gives, with features in the place of pixels; None where one of the images has
        none here."""
        entries = []
        for key in keys:
            try:
                if time.time() - self._file(key).stat().st_mtime > HOUR:
                    self.use(key)
                entries.append(load_file(self._file(key)))
            except OSError:
                return None
            except SafetensorError:  # damaged, such as by a machine that went down: computed again the next time
                with suppress(OSError):
                    self._file(key).unlink()
                return None
        token_ids = [entry.pop(TOKEN_IDS).tolist() for entry in entries]
        inputs = {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}
        if self.halved:
            inputs[self._name] = inputs[self._name].float()
        return EncodedImages(inputs, token_ids)

    # Writing

    @torch.no_grad()
    def add(self, family: Family, images: dict[str, EncodedImages], to_come: int = 0) -> bool:
        """Compute the features of some images together, and write them.

        Args:
            images: each encoded by itself, by its key. family: in evaluation mode.
            to_come: how many more will follow, for which room is made with these.

        Returns:
            False where they cannot be kept; a note says why, and nothing is tried from then on.
        """
        if self.full or not images:
            return not self.full
        entries = self._compute(family, images)
        size = sum(tensor.nbytes for entry in entries.values() for tensor in entry.values())
        wanted = size * (1 + to_come / len(images))
        try:
            if size > self.room:
                self.room = make_room(self.folder, wanted, self.limit_gb)
                self.full = self.room < wanted
            if self.full:
                count = f"{wanted / 1e9:.1f} GB for {len(images) + to_come} images"
                note(
                    f"vision features would take {count}, more than --cache-size {self.limit_gb:g}: not kept. Smaller: a smaller "
                    f"--image-size, --cache-dtype float16{'' if self.connected else ', --freeze-connector'}."
                )
                return False
            for key, entry in entries.items():
                with replacing(self._file(key)) as new:
                    save_file(entry, new)
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a disk that is full
            reason = getattr(error, "strerror", None) or str(error)
            note(f"vision features cannot be kept in {self.folder} ({reason}).")
            self.full = True
        self.room -= size
        return not self.full

    def add_missing(self, family: Family, samples: Iterable[Sample]) -> bool:
        """`add` those of a few samples that are not there yet."""
        if self.full:
            return False
        missing = {sample.key: sample for sample in samples if not self.use(sample.key)}
        return self.add(family, {key: family.encode_images([sample.image]) for key, sample in missing.items()})

    def _compute(self, family: Family, images: dict[str, EncodedImages]) -> dict[str, dict[str, Tensor]]:
        """The content of each image's file: features, the inputs that are no pixels, and the image's tokens."""
        features = family.features_of_each(list(images.values()), self.connected)
        entries = {}
        for (key, one), tensor in zip(images.items(), features, strict=True):
            half = tensor.half() if self.halved else tensor
            own = {self._name: half if half.isfinite().all() else tensor, TOKEN_IDS: torch.tensor(one.token_ids[0])}
            entry = besides_pixels(one.inputs) | own
            entries[key] = {name: kept.detach().cpu().contiguous() for name, kept in entry.items()}
        return entries

    @property
    def _name(self) -> str:
        return CONNECTED_FEATURES if self.connected else ENCODER_FEATURES

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def encode(samples: Sequence[Sample], family: Family, cache: FeatureCache | None = None) -> EncodedImages:
    """The images of some samples as the model takes them: features if the cache has all of them, else pixels."""
    known = cache.encode([sample.key for sample in samples]) if cache else None
    return known or family.encode_images([sample.image for sample in samples])


def fingerprint(family: Family, connected: bool, halved: bool, connectors: Sequence[dict[str, Tensor]] = ()) -> str:
    """What the features depend on beside the image: weights, image processing, number format, program."""
    content = hashlib.sha256(
        f"{FORMAT} {transformers.__version__} {type(family).__name__} {connected} {halved}".encode()
    )
    _add_weights(content, family.vision.state_dict())
    for weights in (connectors or [family.connector.state_dict()]) if connected else ():
        _add_weights(content, weights)
    image_processor = family.processor.image_processor
    settings = image_processor.to_dict() if hasattr(image_processor, "to_dict") else vars(image_processor)
    content.update(
        json.dumps([settings, _vision_settings(family.model.config.to_dict())], sort_keys=True, default=str).encode()
    )
    return content.hexdigest()[:32]


def _add_weights(content: Any, weights: dict[str, Tensor]) -> None:
    for name, tensor in sorted(weights.items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))


def _vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a model's configuration says about images, such as the layer whose features are taken."""
    about = ("vision", "image", "img", "projector", "scale", "downsample")
    found = {name: value for name, value in config.items() if any(word in name for word in about)}
    return {name: _without(value) for name, value in found.items() if not name.endswith("token_id")}


def _without(value: Any) -> Any:
    """A part of a configuration without what may change when a model is saved."""
    return (
        {name: inner for name, inner in value.items() if name not in CHANGES_NOTHING}
        if isinstance(value, dict)
        else value
    )


def open_cache(family: Family, connected: bool, cache_dtype: str, limit_gb: float) -> FeatureCache | None:
    """The cache for a model, or None for one whose features cannot be told apart by image.

    Args:
        cache_dtype: float32 keeps features as they are computed, float16 halves those of a model in float32.
    """
    if not family.can_cache:
        return None
    computed = next(family.vision.parameters()).dtype
    return FeatureCache(family, connected, cache_dtype == "float16" and computed == torch.float32, limit_gb)


def fill_cache(
    family: Family, splits: Iterable[Split], limit_gb: float, cache_dtype: str = "float32", workers: int = 0
) -> FeatureCache | None:
    """Compute what is missing of the images of some splits, in batches, with a progress bar.

    The splits know the key of each of their images then: where all features are there, no image is opened any more.

    Args:
        limit_gb, cache_dtype: see `open_cache`. workers: processes that prepare the images.

    Returns:
        The cache with the features of every image, or None where they cannot be kept: the encoder is trained, the
            family cannot stop
        behind its encoder, or the features are too large.
    """
    if _is_trained(family.vision):
        return None
    cache = open_cache(family, not _is_trained(family.connector), cache_dtype, limit_gb)
    if cache is None:
        return None
    missing: dict[str, tuple[Split, int]] = {}
    for split in splits:
        for i in range(len(split)):
            split.keys[i] = key = split[i].key
            if key not in missing and not cache.use(key):
                missing[key] = split, i
    left = len(missing)
    with evaluation_mode(family.model), Bar(left, "vision features") as bar:
        for images in _batches(family, _Places(list(missing.values())), workers):
            left -= len(images)
            if not cache.add(family, images, left):
                return None
            bar.update(len(images))
    return cache


def _is_trained(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


@dataclass
class _Places:
    """Samples by their places in splits, each made again when it is asked for: a sample that was kept would keep its
    image."""

    places: list[tuple[Split, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Sample:
        split, position = self.places[i]
        return split[position]


class _Encode:
    """Sample -> key and encoded image. Can be pickled."""

    def __init__(self, family: Family):
        self.family = family.without_weights()

    def __call__(self, sample: Sample) -> tuple[str, EncodedImages]:
        return sample.key, self.family.encode_images([sample.image])


def _batches(family: Family, samples: _Places, workers: int) -> Iterator[dict[str, EncodedImages]]:
    """Encoded images by key, as many together as the encoder takes at once."""
    loader = DataLoader(
        samples, batch_size=None, collate_fn=_Encode(family), num_workers=workers, generator=torch.Generator()
    )
    batch: dict[str, EncodedImages] = {}
    values = 0
    for key, encoded in loader:
        size = encoded.inputs["pixel_values"].numel()
        if batch and (len(batch) == IMAGES_AT_ONCE or values + size > VALUES_AT_ONCE):
            yield batch
            batch, values = {}, 0
        batch[key] = encoded
        values += size
    if batch:
        yield batch


def make_room(folder: Path, wanted: float, limit_gb: float) -> float:
    """Make a model's folder and room in the cache; returns the bytes that may be written (fewer than `wanted` where
    there is no room).

    The rule: a file that any run has read or looked up within the last day is never deleted. Of the others, in this
    folder or another model's, the longest unused go first, and no more than needed; none where that would not be
    enough. Two runs that write at once do not see each other's plans, and may pass the limit together by what the
    smaller one writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    old: list[tuple[float, int, Path]] = []
    room = limit_gb * 1e9
    for file in folder.parent.glob("*/*"):
        with suppress(FileNotFoundError):  # another run was faster
            about = file.stat()
            if now - about.st_mtime <= DAY:
                room -= about.st_size
            elif file.suffix == ".tmp":  # a run was killed while it wrote
                file.unlink()
            else:
                room -= about.st_size
                old.append((about.st_mtime, about.st_size, file))
    if room < wanted <= room + sum(size for _, size, _ in old):
        for _, size, file in sorted(old):
            if room >= wanted:
                break
            file.unlink(missing_ok=True)
            room += size
    for other in folder.parent.iterdir():
        with suppress(OSError):  # not empty, or another run was faster
            if other != folder and now - other.stat().st_mtime > DAY:
                other.rmdir()
    return room
