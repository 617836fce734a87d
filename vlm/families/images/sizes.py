"""What `--image-size` comes to, in families whose images all become squares of one size."""

from vlm.common import UsageError
from vlm.config import ImageSize

# `auto` goes down to this share of the published edge and no further, however small the images are: a pretrained
# encoder sees little in a few patches. docs/experiments.md has the measurements.
LEAST_SHARE = 0.5


def pick_size(wish: ImageSize | None, unit: int, published: int, title: str, enlarges: bool = False) -> int:
    """The edge in pixels.

    Args:
        wish: None: the published size. auto: the smallest one that loses nothing of the images, between half the
            published size and all of it.
        unit: pixels that come together to one token in a line; all multiples of it work, and the published size.
        enlarges: whether more than the published size works too.

    Raises:
        UsageError: exactly so many pixels do not work.
    """
    if wish is None:
        return published
    if wish.auto:
        least = max(wish.pixels, LEAST_SHARE * published)
        return next((edge for edge in range(unit, published, unit) if edge >= least), published)
    if wish.pixels == published or (wish.pixels % unit == 0 and (wish.pixels < published or enlarges)):
        return wish.pixels
    below = wish.pixels // unit * unit
    near = [edge for edge in (below, below + unit) if 0 < edge < published or enlarges and edge]
    if not enlarges and below + unit >= published:  # the largest that there is, also where it is no multiple
        near = [(published - 1) // unit * unit, published]
    raise UsageError(
        f"--image-size {wish.pixels}: {title} takes multiples of {unit} pixels{'' if enlarges else f' up to {published}'}. "
        f"The nearest are {' and '.join(str(edge) for edge in near if edge)}."
    )


def size_text(
    wish: ImageSize, edge: int, published: int, load: tuple[int, int], published_load: tuple[int, int]
) -> str:
    """The choice and its cost, for people. load: patches and tokens of an image, of `image_load`."""
    why = f" (auto: 95% of the images are at most {wish.pixels} px)" if wish.auto else ""
    if edge == published:
        return f"{edge} px, as published{why}: {load[1]} image tokens."
    return (
        f"{edge} of {published} px{why}: {load[1]} image tokens instead of {published_load[1]}, "
        f"about {load[0] / published_load[0]:.0%} of the vision work."
    )
