"""The cache of vision features: where the vision tower is frozen, each distinct picture goes through it once, and never again.

One folder for one way of computing (tower weights, picture processing, number format), one safetensors file a picture, named by
the picture's content. Files are written whole or not at all, so runs that share the cache, or are killed, do it no harm.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm.families.base import TOWER_FEATURES, EncodedPictures, Family
from vlm.tracking import Bar, note, replacing

TOKEN_IDS = "token_ids"
DAY = 24 * 3600.0


def cache_root() -> Path:
    """Where features are kept: `VLM_CACHE`, or the user's cache folder."""
    base = os.environ.get("VLM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vlm")
    return Path(base).expanduser() / "features"


class FeatureCache:
    """Features of one tower. Can be pickled, for the processes of a loader."""

    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, picture: Image.Image) -> Path:
        """The file of an RGB picture, by its size and pixels."""
        content = hashlib.sha256(f"{picture.width}x{picture.height}".encode())
        content.update(picture.tobytes())
        return self.folder / f"{content.hexdigest()}.safetensors"

    def encode(self, pictures: list[Image.Image]) -> EncodedPictures:
        """What `Family.encode_pictures` gives, with the tower's features in the place of the pixels.

        Raises:
            FileNotFoundError: the features of a picture are not there (see `fill`).
        """
        entries = [load_file(self.file(picture)) for picture in pictures]
        token_ids = [entry.pop(TOKEN_IDS).tolist() for entry in entries]
        return EncodedPictures({name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}, token_ids)

    def add(self, family: Family, picture: Image.Image) -> Path:
        """Compute and write the features of one picture."""
        encoded = family.encode_pictures([picture])
        device = next(family.model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in encoded.inputs.items()}
        entry = {name: tensor for name, tensor in inputs.items() if not name.startswith("pixel")}
        entry |= {TOWER_FEATURES: family.tower_features(inputs), TOKEN_IDS: torch.tensor(encoded.token_ids[0])}
        with replacing(self.file(picture)) as new:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()}, new)
        return self.file(picture)


def fingerprint(family: Family) -> str:
    """What the features depend on beside the picture: weights of the tower, picture processing, number format, program."""
    content = hashlib.sha256(type(family).__name__.encode())
    for name, tensor in sorted(family.vision.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    images = family.processor.image_processor
    settings = images.to_dict() if hasattr(images, "to_dict") else vars(images)
    content.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return content.hexdigest()[:32]


@torch.no_grad()
def fill_cache(family: Family, splits: Iterable[Any], limit_gb: float) -> FeatureCache | None:
    """Compute what is missing of the pictures of some splits, with a progress bar.

    Args:
        splits: each with `len` and samples by index.
        limit_gb: the largest size of all that is kept, in 10^9 bytes. Older features that nobody used for a day make room.

    Returns:
        The cache with the features of every picture, or None where they cannot be kept: the tower is trained, the family cannot stop
        behind its tower, or the features are too large.
    """
    if any(p.requires_grad for p in family.vision.parameters()) or not family.can_cache:
        return None
    cache = FeatureCache(cache_root() / fingerprint(family))
    splits = list(splits)
    was_training = family.model.training
    family.model.eval()
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        os.utime(cache.folder)
        size = cache.add(family, splits[0][0].image).stat().st_size  # the first one tells how large all will be
        total = sum(len(split) for split in splits)
        if not _make_room(cache.folder, size * total, limit_gb):
            wanted = f"{size * total / 1e9:.1f} GB"
            note(f"the vision features of {total} pictures would take {wanted}, more than --cache-size {limit_gb:g}: not kept.")
            return None
        with Bar(total, "vision features") as bar:
            for split in splits:
                for i in range(len(split)):
                    picture = split[i].image
                    if not cache.file(picture).exists():
                        cache.add(family, picture)
                    bar.update()
    except OSError as error:
        note(f"vision features cannot be kept in {cache.folder} ({error.strerror}): they are computed anew each time.")
        return None
    finally:
        family.model.train(was_training)
    return cache


def _make_room(folder: Path, wanted: int, limit_gb: float) -> bool:
    """Delete the features of other towers, the longest unused first, until `wanted` bytes fit; whether they do."""
    others = [other for other in folder.parent.iterdir() if other.is_dir() and other != folder]
    sizes = {other: sum(file.stat().st_size for file in other.iterdir()) for other in others}
    for other in sorted(others, key=lambda other: other.stat().st_mtime):
        if wanted + sum(sizes.values()) <= limit_gb * 1e9:
            break
        if time.time() - other.stat().st_mtime > DAY:
            shutil.rmtree(other, ignore_errors=True)
            sizes.pop(other)
    return wanted + sum(sizes.values()) <= limit_gb * 1e9
