"""What `--image-size` means in families whose images all become squares of one size."""

from vlm.common import UsageError
from vlm.config import ImageSize

# `auto` goes down to this share of the published edge, however small the images are: a pretrained vision encoder sees
# little in a few patches. docs/experiments.md has the measurements.
LEAST_SHARE = 0.5


def pick_size(wish: ImageSize | None, unit: int, published: int, title: str, enlarges: bool = False) -> int:
    """The edge in pixels.

    Args:
        wish: None: the published size. auto: the smallest size that loses nothing of the images, between half the
            published size and all of it.
        unit: pixels of an image token in a line. All multiples of it work, and the published size.
        published: the edge that the model was published with, in pixels.
        title: what messages call the model.
        enlarges: whether more than the published size works too.

    Raises:
        UsageError: an exact size does not work.
    """
    if wish is None:
        return published
    if wish.auto:
        least = max(wish.pixels, LEAST_SHARE * published)
        return next((edge for edge in range(unit, published, unit) if edge >= least), published)
    fits = wish.pixels % unit == 0 and (enlarges or wish.pixels < published)
    if fits or wish.pixels == published:
        return wish.pixels
    most = "" if enlarges else f" up to {published}"
    nearest = " and ".join(str(edge) for edge in _nearest(wish.pixels, unit, published, enlarges))
    raise UsageError(
        f"--image-size {wish.pixels}: {title} takes multiples of {unit} pixels{most}. The nearest are {nearest}."
    )


def _nearest(pixels: int, unit: int, published: int, enlarges: bool) -> list[int]:
    """The sizes that work just below and just above one that does not."""
    below = pixels // unit * unit
    above = below + unit
    if not enlarges and above >= published:  # the published size is the largest, even if it is no multiple
        below, above = (published - 1) // unit * unit, published
    return [edge for edge in (below, above) if edge]


def size_text(
    wish: ImageSize, edge: int, published: int, load: tuple[int, int], published_load: tuple[int, int]
) -> str:
    """A message: the size that was picked, and what it costs.

    Args:
        wish: as in `pick_size`.
        edge, published: of an image, as it is processed and as published, in pixels.
        load, published_load: patches and tokens of an image of these sizes (see `Family.image_load`).
    """
    images = f"95% of the images are at most {wish.pixels} px" if wish.auto else ""
    if edge == published:
        smaller = "; larger images are scaled down" if wish.auto and wish.pixels > edge else ""
        why = f" ({images})" if wish.auto else ""
        return f"{edge} px, as published{smaller}{why}: {_tokens(load[1])}."
    why = f" (auto: {images})" if wish.auto else ""
    return (
        f"{edge} of {published} px{why}: {_tokens(load[1])} instead of {published_load[1]}, "
        f"about {load[0] / published_load[0]:.0%} of the vision work."
    )


def _tokens(count: int) -> str:
    return "1 image token" if count == 1 else f"{count} image tokens"
