"""How long a run needs after its last step, so that --time-limit ends the training early enough."""

import time
from collections.abc import Callable
from functools import partial
from math import inf

import numpy as np

from vlm.classifier import TOLERANCE
from vlm.common import evaluation_mode
from vlm.config import TEXT, in_words
from vlm.data import Split
from vlm.evaluation import IMAGES, TEXTS, check_texts, image_vectors, score_split, split_losses
from vlm.families import NoVectors
from vlm.report import MOST_SHOWN, time_to_draw
from vlm.training.deadline import Deadline
from vlm.training.saving import Saver
from vlm.training.setup import Run

SAMPLED = 64  # validation images of the timed test, at most
UNCACHED = 4  # images that are timed without cached features, as gray ones have none, at most
TIMED = 16  # images of which the features of the head are timed, at most
FITS = 1e-3  # seconds for an image and a class, of all fits of the head: 647 images of 16 classes took 7 to 34
SHARE = 0.01  # of the time that is left, for which one part may be timed on more than one image
MARGIN = 1.25  # what was measured takes longer on a busy machine
OTHERS = 5.0  # seconds for what is not measured: tables, pages, thumbnails, metadata


class TimeNeeded:
    """Seconds for evaluation, saving, loading, calibration, test, head and probe. Own metrics are not in it.

    Attributes:
        evaluation: of an evaluation during the training, measured again at each of them.
        untrained: of the test before the training.
        is_complete: False if a few parts showed that the time is too short, so all of them take longer.
    """

    def __init__(self, run: Run, saver: Saver) -> None:
        self.run, self.saver = run, saver
        self.evaluation = self.untrained = self._test = 0.0
        self.is_complete = True
        self._longest = inf  # seconds for which a part is timed on more than one image

    def measure(self, deadline: Deadline) -> None:
        """Time the parts of evaluation and test on a few validation images, or some of the parts if these show that
        the time is too short. Called in one process."""
        self._longest = SHARE * deadline.left
        parts = (self._measure_evaluation, self._measure_scores, self._measure_texts, self._measure_rest)
        with self.run.accelerator.autocast():
            self._scored(1)  # the first pass takes longer than the others
            for measure_part in parts:
                if deadline.left < self.seconds:
                    self.is_complete = False
                    return
                measure_part()

    def _measure_evaluation(self) -> None:
        run, size, workers = self.run, self.run.settings.eval_batch_size, self.run.workers
        validation, most = run.data.validation, max(SAMPLED, size)
        scored = self._of_an_image(self._scored, most)
        lost = self._of_an_image(
            lambda n: split_losses(run.classifier, _some(validation, n), size, range(n), workers, run.cache), most
        )
        self.evaluation = len(validation) * (scored + lost) / run.accelerator.num_processes
        self.untrained = len(run.data.test) * scored / run.accelerator.num_processes

    def _measure_scores(self) -> None:
        """Of calibration, test and the explanations on the page, which need exact scores."""
        data = self.run.data
        exact = self._of_an_image(lambda n: self._scored(n, 0.0), max(SAMPLED, self.run.settings.eval_batch_size))
        self._test += (len(data.validation) + len(data.test) + MOST_SHOWN) * exact

    def _measure_texts(self) -> None:
        run, size = self.run, self.run.settings.eval_batch_size
        validation = run.data.validation
        most = min(TEXTS, size)
        written = self._of_an_image(lambda n: check_texts(run.classifier, validation, size, n, run.cache), most)
        self._test += min(TEXTS, len(run.data.test)) * written

    def _measure_rest(self) -> None:
        """Of gray images, which have no cached features, the head, the model that is loaded again, and the page."""
        run = self.run
        few = _some(run.data.validation, UNCACHED)
        alike = len({few[i].image.size for i in range(len(few))}) == 1
        gray = self._of_an_image(lambda n: self._scored(n, cached=False), UNCACHED)
        self._test += (1 if alike else IMAGES) * gray + run.seconds_to_load
        self._test += self._head(_some(run.data.validation, TIMED)) + time_to_draw(run.data.class_names)

    def _scored(self, count: int, tolerance: float = TOLERANCE, cached: bool = True) -> None:
        run, few = self.run, _some(self.run.data.validation, count)
        size, cache = run.settings.eval_batch_size, run.cache if cached else None
        score_split(run.classifier, few, size, None, run.workers, "timing the test", tolerance, cache)

    def _of_an_image(self, work: Callable[[int], object], most: int) -> float:
        """Seconds that a work takes for one image of some. More images are timed while that is quick: on a GPU, many
        together take little longer than one.

        Args:
            work: is given the number of images. most: that number at most.
        """
        count, most = 1, min(most, len(self.run.data.validation))
        while True:
            taken = _seconds(partial(work, count))
            more = min(4 * count, most)
            if count == more or taken * more / count > self._longest:
                return taken / count
            count = more

    @property
    def in_words(self) -> str:
        """What it needs."""
        return f"{'about' if self.is_complete else 'more than'} {in_words(self.seconds)}"

    @property
    def seconds(self) -> float:
        """After a last step that is not evaluated yet."""
        saving = 2 * self.saver.seconds("model") + self.saver.seconds("state")  # best and final model
        return MARGIN * (self.evaluation + saving + self._test) + OTHERS

    def _head(self, few: Split) -> float:
        """Of the head and of the probe: features of the images, and the fits; 0 without them."""
        run, data, settings = self.run, self.run.data, self.run.settings
        head = settings.evidence != TEXT and not settings.streaming
        probe = settings.probe and (settings.tune == "full" or not head)
        if not (head or probe):
            return 0.0
        samples, family = [few[i] for i in range(len(few))], run.classifier.family
        try:
            with evaluation_mode(family.model):
                each = self._of_an_image(lambda n: image_vectors(family, samples[:n], run.cache), len(samples))
        except NoVectors:  # a note says it later
            return 0.0
        fits = FITS * len(data.train) * len(data.class_names)
        loaded_again = run.seconds_to_load if settings.tune == "full" and settings.probe else 0.0
        return loaded_again + (head + probe) * (each * len(data.train) + fits) + probe * each * len(data.test)


def _some(split: Split, count: int) -> Split:
    """At most `count` images of a split, from all parts of it."""
    return split.take(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist())


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started
