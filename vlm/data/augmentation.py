"""Augmented views of the training images: another crop, other colors, mirrored or turned.

A view has the size of its image, so that it takes as many tokens. View 0 is the image itself. Which view an epoch sees,
and how it is drawn, are functions of the seed, the image's position and the epoch: a resumed run sees the same ones.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from vlm.config import Settings
from vlm.data.sample import Sample
from vlm.data.splits import Split

AUGMENT = 4  # after the user's seed, as the draws in cutting.py
DRAWING = 1  # of views; to be raised if the same draw looks different, since features of views are kept


class Strength(NamedTuple):
    """How far a view may be from its image.

    smallest_crop: share of the area; widest: factor between the shapes of crop and image; colors: change of brightness,
    contrast and saturation; turn: degrees; blur: share of the views that are blurred.
    """

    smallest_crop: float = 1.0
    widest: float = 1.0
    colors: float = 0.0
    turn: float = 0.0
    blur: float = 0.0


STRENGTHS = {
    "none": Strength(),
    "light": Strength(smallest_crop=0.8, widest=1.1, colors=0.1),
    "strong": Strength(smallest_crop=0.5, widest=4 / 3, colors=0.3, turn=10, blur=0.2),
}
LARGEST_BLUR = 2.0  # radius in hundredths of the shorter edge
FLIP = Image.Transpose.FLIP_LEFT_RIGHT
QUARTERS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn.

    Attributes:
        strength: a name in `STRENGTHS`.
        flips: mirror half of the views left to right.
        turns: turn views by quarters; those of images that are not square are turned by 180 degrees only.
        views: how many an image has, with itself.
        seed: of the run.
    """

    strength: str
    flips: bool
    turns: bool
    views: int
    seed: int

    def view_of(self, epoch: int, position: int) -> int:
        """The number of the view that an epoch sees of the image at a position. Each epoch has all views alike."""
        return (epoch + position) % self.views

    def draw(self, image: Image.Image, position: int, view: int) -> Image.Image:
        """A view of an RGB image, of the same size and mode."""
        if view == 0:
            return image
        rng = np.random.default_rng([self.seed, AUGMENT, position, view])
        strength = STRENGTHS[self.strength]
        if self.flips and rng.random() < 0.5:
            image = image.transpose(FLIP)
        if self.turns:
            square = image.width == image.height
            quarter = QUARTERS[int(rng.integers(4))] if square else QUARTERS[2 * int(rng.integers(2))]
            image = image if quarter is None else image.transpose(quarter)
        if strength.turn:
            image = _turned(image, rng.uniform(-strength.turn, strength.turn))
        if strength.smallest_crop < 1:
            image = _cropped(image, strength, rng)
        if strength.colors:
            image = _recolored(image, strength.colors, rng)
        if rng.random() < strength.blur:
            radius = rng.uniform(0, LARGEST_BLUR) * min(image.size) / 100
            image = image.filter(ImageFilter.GaussianBlur(radius))
        return image

    def key(self, key: str, position: int, view: int) -> str:
        """The key of a view's features, from the `image_key` of its image."""
        if view == 0:
            return key
        how = replace(self, views=0)  # how many there are makes no view another one
        return hashlib.sha256(f"{key} {DRAWING} {how} {position} {view}".encode()).hexdigest()


def as_seen(train: Split, settings: Settings, epoch: int) -> Split:
    """The training images as an epoch sees them: themselves or, if the settings ask for it, their `Views`."""
    if settings.views == 1:
        return train
    flips, turns = settings.augment_flips, settings.augment_turns
    return Views(train, Augmentation(settings.augment, flips, turns, settings.views, settings.seed), epoch)


class Views(Split):
    """A split as one epoch sees it: of each image one view. The keys are those of the views."""

    drawn = True

    def __init__(self, split: Split, augmentation: Augmentation, epoch: int) -> None:
        vars(self).update(vars(split))
        self._split, self._augmentation, self._epoch = split, augmentation, epoch
        self.keys = [None] * len(split)

    def __getitem__(self, i: int) -> Sample:
        sample, view = self._split[i], self._augmentation.view_of(self._epoch, i)
        if view == 0 or sample.fault:
            return sample
        how = self._augmentation
        key = sample.known_key and how.key(sample.known_key, i, view)
        return replace(sample, source=partial(_draw, sample, how, i, view), known_key=key)


def _draw(sample: Sample, how: Augmentation, position: int, view: int) -> Image.Image:
    return how.draw(sample.image, position, view)


def _turned(image: Image.Image, degrees: float) -> Image.Image:
    """Turned, and enlarged so far that no corner is empty."""
    radians = np.deg2rad(degrees)
    ratio = max(image.size) / min(image.size)
    scale = np.cos(radians) + ratio * abs(np.sin(radians))  # of the largest upright part of the same shape
    cos, sin = np.cos(radians) / scale, np.sin(radians) / scale
    x, y = image.width / 2, image.height / 2
    # from a place in the view to one in the image, both relative to the middle
    place = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    return image.transform(image.size, Image.Transform.AFFINE, place, Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, strength: Strength, rng: np.random.Generator) -> Image.Image:
    """A random part, enlarged to the size of the image (Szegedy et al. 2015, arXiv 1409.4842, section 6)."""
    area = rng.uniform(strength.smallest_crop, 1)
    shape = np.exp(rng.uniform(-1, 1) * np.log(strength.widest) / 2)  # of the crop's width, its inverse of the height
    width = min(1.0, np.sqrt(area) * shape) * image.width
    height = min(1.0, np.sqrt(area) / shape) * image.height
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))


def _recolored(image: Image.Image, most: float, rng: np.random.Generator) -> Image.Image:
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(1 - most, 1 + most))
    return image
