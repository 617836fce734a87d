"""Classifies the images of many requests together, in one thread. Knows nothing of models, files or the web."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Image = TypeVar("Image")
Result = dict[str, Any]

PLACES = 64  # images that are being read, wait or are classified at one time
BATCH_PIXELS = 100_000_000  # of all images of a batch; decoded, they are 300 MB


class QueueFull(Exception):
    """All places are taken. The message is for the user."""


@dataclass(frozen=True)
class Waiting(Generic[Image]):
    """One image of the queue. pixels: how many it has; explain: with its text; answer: gets what is returned for it."""

    image: Image
    pixels: int
    explain: bool
    answer: "Future[Result]" = field(default_factory=Future)


class Batcher(Generic[Image]):
    """A thread that takes what waits, up to a batch, classifies it and answers each. Usable in `with`.

    The first image that comes while the thread is idle is not kept waiting for others: a batch is what came while the
    one before was computed.

    Args:
        classify: (images, with their texts) -> as many results. It is called in one thread only. If it raises an
            error, both halves of the batch are tried, so that an image that cannot be classified does
            not fail others, and a batch that is too large for the memory is computed in parts.
        batch_size: images of a batch.
        places: images that are admitted at one time.
        batch_pixels: pixels of a batch; a larger image has a batch of its own.
    """

    def __init__(
        self,
        classify: Callable[[Sequence[Image], bool], Sequence[Result]],
        batch_size: int,
        places: int = PLACES,
        batch_pixels: int = BATCH_PIXELS,
    ) -> None:
        self._classify = classify
        self.batch_size, self.places, self.batch_pixels = batch_size, places, batch_pixels
        self.answered = self.batches = 0
        self._taken = 0
        self._queue: deque[Waiting[Image]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="classifying", daemon=True)

    def __enter__(self) -> "Batcher[Image]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the batch that is computed; what still waits is cancelled."""
        with self._changed:
            self._closed = True
            for waiting in self._queue:
                waiting.answer.cancel()
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()

    @contextmanager
    def admitted(self, images: int = 1) -> Iterator[None]:
        """Hold places for some images, from before they are read until they are answered.

        Raises:
            QueueFull: there are not as many.
        """
        with self._changed:
            if self._taken + images > self.places:
                raise QueueFull(
                    f"{self._taken} images are waiting, and at most {self.places} may: try again in some seconds."
                )
            self._taken += images
        try:
            yield
        finally:
            with self._changed:
                self._taken -= images

    def submit(self, image: Image, pixels: int = 0, explain: bool = True) -> "Future[Result]":
        """Put an image into the queue. Cancelling its future takes it out, if its batch is not begun."""
        waiting = Waiting(image, pixels, explain)
        with self._changed:
            if self._closed:
                waiting.answer.cancel()
            else:
                self._queue.append(waiting)
                self._changed.notify()
        return waiting.answer

    def _run(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[Waiting[Image]]:
        """The next batch, waited for; empty if the block has ended. Its oldest image decides on the texts."""
        with self._changed:
            batch: list[Waiting[Image]] = []
            while not batch and not self._closed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                pixels, left = 0, deque[Waiting[Image]]()
                for one in self._queue:
                    alike = not batch or one.explain == batch[0].explain
                    fits = not batch or (len(batch) < self.batch_size and pixels + one.pixels <= self.batch_pixels)
                    if not (alike and fits):
                        left.append(one)
                    elif one.answer.set_running_or_notify_cancel():
                        batch.append(one)
                        pixels += one.pixels
                self._queue = left
            return batch

    def _answer(self, batch: list[Waiting[Image]]) -> None:
        results = None
        try:
            results = self._classify([one.image for one in batch], batch[0].explain)
            self.batches += 1
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
        if results is None:  # outside of `except`, so that the error no longer holds the memory of the whole batch
            self._answer(batch[: len(batch) // 2])
            self._answer(batch[len(batch) // 2 :])
            return
        for one, result in zip(batch, results, strict=True):
            self.answered += 1
            one.answer.set_result(result)
